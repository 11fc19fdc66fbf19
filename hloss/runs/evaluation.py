"""Evaluation and result files of a run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from hloss.losses.histogram import pair_histograms
from hloss.retrieval.neighbors import neighbors
from hloss.retrieval.protocols import Retrieval, evaluate
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.errors import RunError
from hloss.runs.files import NETWORK_FILE, atomic_save, atomic_write, non_finite
from hloss.runs.images import center_crop
from hloss.runs.models import embed
from hloss.runs.pair_record import separation, slope_record

PANEL_QUERIES, PANEL_NEIGHBORS = 6, 8
SIMILARITY_BINS = 100
PAIR_ROWS = 256  # rows of the distance matrix computed at a time


def split_embeddings(
    network: nn.Module, dataset: Dataset, split: str, config: RunConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embed the images of a split, with the run's central crop.

    Args:
        network: the network, on `device`.
        dataset: the prepared dataset.
        split: "train", "val" or "test".
        config: the settings of the run.
        device: the device that embeds.

    Returns:
        Embeddings, float32 (n, d), and labels, int64 (n,), both on `device`.
    """
    return embedded_rows(network, dataset, dataset.rows(split), config, device)


def embedded_rows(
    network: nn.Module, dataset: Dataset, rows: np.ndarray, config: RunConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embed the images of the given rows of the dataset's index, as `split_embeddings` does for a split."""
    found = embed(network, lambda part: center_crop(dataset.pixels(rows[part]), config.crop).to(device), len(rows))
    return found, dataset.labels(rows).to(device)


def validation_recall(dataset: Dataset, config: RunConfig, embeddings: Tensor, labels: Tensor) -> float:
    """Measure Recall@1 on the validation classes; the iteration with the highest value is chosen.

    Args:
        dataset: the prepared dataset.
        config: the settings of the run.
        embeddings: floating-point (n, d), one row per validation image.
        labels: int64 (n,).

    Returns:
        Recall@1 by `validation_protocol`, a fraction in [0, 1].
    """
    protocol, metric = validation_protocol(dataset), config.metric or config.trained_metric
    return _evaluate_split(dataset, "val", protocol, (1,), embeddings, labels, metric).metrics["recall@1"]


def pair_record(
    network: nn.Module,
    dataset: Dataset,
    rows: np.ndarray,
    validation: tuple[Tensor, Tensor] | None,
    config: RunConfig,
    device: torch.device,
) -> dict[str, float]:
    """Measure slopes and separation of pairs for a training batch, and separation for the validation classes.

    `slope_record` and `separation` define the values. The batch is embedded again, in evaluation mode and without
    augmentation. Neither the network nor a random generator changes.

    Args:
        network: the network, on `device`.
        dataset: the prepared dataset.
        rows: row numbers of the batch's images in the dataset's index.
        validation: the result of `split_embeddings` for the validation images, None if there are none.
        config: the settings of the run.
        device: the device that embeds.

    Returns:
        The values of `slope_record`; `batch_overlap` and `batch_reverse`; with validation images also
        `validation_overlap` and `validation_reverse`. The last four are values of `separation` in the metric that the
        loss trains.
    """
    loss = config.build_loss(len(dataset.labels(rows).unique()))
    assert loss is not None
    batch = embedded_rows(network, dataset, rows, config, device)
    record = slope_record(loss, *batch)
    parts = {"batch": batch} | ({"validation": validation} if validation else {})
    for name, pairs in parts.items():
        found = separation(*pairs, config.trained_metric)
        record |= {f"{name}_{value}": number for value, number in found.items()}
    return record


def validation_protocol(dataset: Dataset) -> str:
    """Protocol of the validation classes: that of the test set, but with one image per query.

    No validation image has the role "pool", so a query cannot consist of several images.
    """
    return str(dataset.card["protocol"]).removesuffix("-multi-query")


def evaluate_test(dataset: Dataset, embeddings: Tensor, labels: Tensor, metric: str) -> Retrieval:
    """Evaluate on the test set, with the card's protocol and values of K; called once per run and training length.

    Args:
        dataset: the prepared dataset.
        embeddings: floating-point (n, d), one row per test image.
        labels: int64 (n,).
        metric: "cosine" or "euclidean".

    Returns:
        Metrics, and the rank of each query's first match.
    """
    recall_at = tuple(dataset.card["recall_at"])
    return _evaluate_split(dataset, "test", dataset.card["protocol"], recall_at, embeddings, labels, metric)


def _evaluate_split(
    dataset: Dataset, split: str, protocol: str, k: tuple[int, ...], embeddings: Tensor, labels: Tensor, metric: str
) -> Retrieval:
    rows = dataset.rows(split)
    return evaluate(protocol, embeddings, labels, k, metric, dataset.cameras(rows), dataset.roles(rows))


def identified_rows(dataset: Dataset) -> np.ndarray:
    """Positions of query and gallery images among the test images, int64; images of other roles are left out."""
    roles = dataset.index.role.iloc[dataset.rows("test")]
    return np.flatnonzero(roles.isin(["both", "query", "gallery"]))


def similarity_density(dataset: Dataset, embeddings: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Estimate the densities of positive and negative similarities of the test images (Figure 5 of the paper).

    Args:
        dataset: the prepared dataset.
        embeddings: floating-point (n, d), one row per test image.
        labels: int64 (n,).

    Returns:
        `nodes`, `positive` and `negative`, each with SIMILARITY_BINS + 1 values; the densities sum to 1.
    """
    known = torch.from_numpy(identified_rows(dataset))
    histograms = pair_histograms(embeddings[known], labels[known], n_bins=SIMILARITY_BINS)
    return {name: getattr(histograms, name).tolist() for name in histograms._fields}


def trained_overlap(
    dataset: Dataset, embeddings: Tensor, labels: Tensor, metric: str, density: dict[str, list[float]]
) -> float:
    """Measure the overlap of the densities of positive and negative test pairs, in the metric that the loss trains.

    Args:
        dataset: the prepared dataset.
        embeddings: floating-point (n, d), one row per test image.
        labels: int64 (n,).
        metric: the metric that the loss trains, "cosine" or "euclidean".
        density: the densities of cosine similarities, from `similarity_density`.

    Returns:
        Sum of min(h+, h-) over the bins of the two densities, a fraction in [0, 1].
    """
    if metric == "cosine":
        return float(np.minimum(density["positive"], density["negative"]).sum())
    known = torch.from_numpy(identified_rows(dataset))
    counts = _distance_counts(embeddings[known], labels[known])
    return float((counts / counts.sum(1, keepdim=True)).amin(0).sum())


def _distance_counts(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Histograms of Euclidean distances, float64 (2, 2 SIMILARITY_BINS): row 0 negative, row 1 positive pairs."""
    centred = embeddings.double() - embeddings.mean(0, dtype=torch.float64)
    bins, most = 2 * SIMILARITY_BINS, 2 * centred.norm(dim=1).max()  # no distance exceeds twice the largest norm
    most = most.clamp_min(torch.finfo(most.dtype).tiny)  # for equal embeddings, whose largest distance is 0
    counts = torch.zeros(2 * bins, dtype=torch.float64, device=centred.device)
    for rows in torch.arange(len(centred), device=centred.device).split(PAIR_ROWS):
        places = (torch.cdist(centred[rows], centred) / most * bins).long().clamp(max=bins - 1)
        places += bins * (labels[rows, None] == labels)
        once = torch.arange(len(centred), device=centred.device) > rows[:, None]
        counts += torch.bincount(places[once], minlength=2 * bins)
    return counts.reshape(2, bins)


def retrieval_panel(dataset: Dataset, embeddings: Tensor, labels: Tensor, metric: str) -> dict[str, list]:
    """Find the nearest images of a few test queries; all runs on a dataset have the same queries.

    Args:
        dataset: the prepared dataset.
        embeddings: floating-point (n, d), one row per test image.
        labels: int64 (n,).
        metric: "cosine" or "euclidean".

    Returns:
        `queries`, `neighbors` and `hits`. `queries` are row numbers of PANEL_QUERIES images in the dataset's index.
        `neighbors` are row numbers of the nearest images of each query, at most PANEL_NEIGHBORS. `hits` says whether
        these images have the class of the query.
    """
    known = torch.from_numpy(identified_rows(dataset))
    rows, embeddings, labels = dataset.rows("test")[known.numpy()], embeddings[known], labels[known].cpu()
    queries = torch.linspace(0, len(rows) - 1, PANEL_QUERIES + 2).long()[1:-1]
    k = min(PANEL_NEIGHBORS, len(rows) - 1)
    _, nearest = neighbors(embeddings[queries], embeddings, k, metric, own=queries)
    hits = labels[nearest] == labels[queries, None]
    return {"queries": rows[queries].tolist(), "neighbors": rows[nearest].tolist(), "hits": hits.tolist()}


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 hash of the names and values of all parameters and buffers, as hex digits."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + b"\0" + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def is_still_improving(validations: list[tuple[int, float]], length: int) -> bool:
    """Whether the best validation of a training lies in the last tenth of its iterations.

    Args:
        validations: iteration and Recall@1 of each validation, in order.
        length: number of iterations of the training; later validations are left out.

    Returns:
        True if the highest Recall@1 was first reached after 9/10 of `length`; False without a validation.
    """
    until = [(iteration, recall) for iteration, recall in validations if iteration <= length]
    best = max(until, key=lambda validation: validation[1], default=(0, 0.0))  # the first of equal ones
    return bool(10 * best[0] > 9 * length)


def history_table(progress: dict[str, Any]) -> pd.DataFrame:
    """Tabulate losses and validations of a training.

    Args:
        progress: the progress of the run, with `losses` by stage and `validations`.

    Returns:
        One row per iteration, with the columns iteration, loss and validation_recall@1 (NaN without a validation). With
        `refit` there is the column refit_loss, with `record_pairs` the values of `pair_record` (NaN without a
        validation). The table is empty without training.
    """
    if not progress["losses"]["choose"]:
        return pd.DataFrame()
    history = pd.DataFrame({"loss": progress["losses"]["choose"]})
    history.insert(0, "iteration", range(1, len(history) + 1))
    validations = pd.DataFrame(progress["validations"], columns=["iteration", "validation_recall@1"])
    history = history.merge(validations.astype({"iteration": int, "validation_recall@1": float}), how="left")
    if progress["pairs"]:
        history = history.merge(pd.DataFrame(progress["pairs"]), how="left")
    if progress["losses"]["refit"]:
        history["refit_loss"] = pd.Series(progress["losses"]["refit"])
    return history


def write_run_files(
    folder: Path,
    result: dict[str, Any],
    history: pd.DataFrame,
    ranks: Tensor,
    queries: Tensor,
    embeddings: Tensor,
    network: nn.Module | None,
) -> None:
    """Write the files of a complete run.

    `result.json` is written last, so that all other files are complete if `result.json` exists.

    Args:
        folder: the run's folder.
        result: content of `result.json`; all numbers are finite.
        history: content of `history.parquet`.
        ranks: content of `ranks.npy`, int32 (lengths, q): the rank of each query's first match at each training length.
        queries: content of `queries.npy`, int32 (q,): positions of the queries among the test images.
        embeddings: content of `embeddings.npy`, float32 (n, d), one row per test image.
        network: its state dict is written to `network.pt`; None to write no network.

    Raises:
        RunError: a number of the result is NaN or infinite; nothing is written.
        OSError: a file cannot be written.
    """
    if wrong := non_finite(result):
        raise RunError(f"all numbers of result.json must be finite: got {wrong}; check dataset and settings")
    atomic_write(folder / "history.parquet", lambda part: history.to_parquet(part, index=False))
    arrays = {"ranks": ranks.to(torch.int32), "queries": queries.to(torch.int32)}
    for name, array in (arrays | {"embeddings": embeddings}).items():
        atomic_write(folder / f"{name}.npy", lambda part, array=array: _save_array(part, array.cpu().numpy()))  # type: ignore[misc]
    if network is not None:
        atomic_save(folder / NETWORK_FILE, {name: value.cpu() for name, value in network.state_dict().items()})
    atomic_write(
        folder / "result.json", lambda part: part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    )


def _save_array(file: Path, array: np.ndarray) -> None:
    with open(file, "wb") as opened:
        np.save(opened, array, allow_pickle=False)
