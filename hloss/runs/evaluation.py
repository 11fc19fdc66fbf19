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

PANEL_QUERIES, PANEL_NEIGHBORS = 6, 8
SIMILARITY_BINS = 100


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
    rows = dataset.rows(split)
    found = embed(network, lambda part: center_crop(dataset.pixels(rows[part]), config.crop).to(device), len(rows))
    return found, dataset.labels(rows).to(device)


def validation_recall(network: nn.Module, dataset: Dataset, config: RunConfig, device: torch.device) -> float:
    """Measure Recall@1 on the validation classes, by which the iteration is chosen.

    Args:
        network: the network, on `device`.
        dataset: the prepared dataset.
        config: the settings of the run.
        device: the device that embeds.

    Returns:
        Recall@1 by `validation_protocol`, a fraction in [0, 1].
    """
    found = split_embeddings(network, dataset, "val", config, device)
    metric = config.metric or config.trained_metric
    return _evaluate_split(dataset, "val", validation_protocol(dataset), (1,), *found, metric).metrics["recall@1"]


def validation_protocol(dataset: Dataset) -> str:
    """Protocol of the test set, with single queries: validation images have no role "pool" for multiple queries."""
    return str(dataset.card["protocol"]).removesuffix("-multi-query")


def evaluate_test(dataset: Dataset, embeddings: Tensor, labels: Tensor, metric: str) -> Retrieval:
    """Evaluate on the test set, with the protocol and the values of K in the dataset's card; called once per run.

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


def retrieval_panel(dataset: Dataset, embeddings: Tensor, labels: Tensor, metric: str) -> dict[str, list]:
    """Find the nearest images of a few test queries, which are the same in all runs on a dataset.

    Args:
        dataset: the prepared dataset.
        embeddings: floating-point (n, d), one row per test image.
        labels: int64 (n,).
        metric: "cosine" or "euclidean".

    Returns:
        `queries`, PANEL_QUERIES rows of the dataset's index; `neighbors`, the rows of the nearest images of each query,
        at most PANEL_NEIGHBORS; `hits`, whether these images have the class of the query.
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


def history_table(progress: dict[str, Any]) -> pd.DataFrame:
    """Tabulate losses and validations of a training.

    Args:
        progress: the progress of the run, with `losses` by stage and `validations`.

    Returns:
        One row per iteration: iteration, loss, validation_recall@1 (NaN without a validation) and, with `refit`,
        refit_loss. Empty without training.
    """
    if not progress["losses"]["choose"]:
        return pd.DataFrame()
    history = pd.DataFrame({"loss": progress["losses"]["choose"]})
    history.insert(0, "iteration", range(1, len(history) + 1))
    validations = pd.DataFrame(progress["validations"], columns=["iteration", "validation_recall@1"])
    history = history.merge(validations.astype({"iteration": int, "validation_recall@1": float}), how="left")
    if progress["losses"]["refit"]:
        history["refit_loss"] = pd.Series(progress["losses"]["refit"])
    return history


def write_run_files(
    folder: Path,
    result: dict[str, Any],
    history: pd.DataFrame,
    retrieval: Retrieval,
    embeddings: Tensor,
    network: nn.Module | None,
) -> None:
    """Write the files of a complete run.

    `result.json` is written last, so that all other files are complete if it exists.

    Args:
        folder: the run's folder.
        result: content of `result.json`; all numbers are finite.
        history: content of `history.parquet`.
        retrieval: `queries.npy` gets the positions of the queries among the test images, int32 (q,); `ranks.npy` the
            ranks of their first matches, int32 (q,).
        embeddings: content of `embeddings.npy`, float32 (n, d), one row per test image.
        network: its state dict is written to `network.pt`; None to write no network.

    Raises:
        RunError: a number of the result is NaN or infinite; nothing is written.
        OSError: a file cannot be written.
    """
    if wrong := non_finite(result):
        raise RunError(f"result.json cannot have a number that is not finite: got {wrong}; check dataset and settings")
    atomic_write(folder / "history.parquet", lambda part: history.to_parquet(part, index=False))
    arrays = {"ranks": retrieval.ranks.to(torch.int32), "queries": retrieval.query_index.to(torch.int32)}
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
