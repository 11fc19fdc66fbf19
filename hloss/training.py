"""One run: train, validate, choose the iteration on the validation classes, test once, write the run folder.

`run(config)` is what the notebook, `python -m hloss.training CONFIG.json` and a study all call. A run that was killed
continues from its checkpoint to the same numbers; a finished run of the same code and data is returned as it is.
"""

import fcntl
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.datasets import Dataset, DatasetError, open_dataset
from hloss.experiment import (
    ConfigError,
    RunConfig,
    fingerprint,
    found_from_here,
    parse_config,
    provenance,
    read_result,
    write_whole,
)
from hloss.histogram import pair_histograms
from hloss.networks import build_network, embed
from hloss.retrieval import Retrieval, evaluate
from hloss.samplers import SAMPLERS

PANEL_QUERIES, PANEL_NEIGHBOURS = 6, 8
SIMILARITY_BINS = 100


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


def run(config: RunConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Carry out a run, or return its result if it is complete; `report` gets a line per validation.

    Returns the content of `result.json`. Metrics are fractions in [0, 1]. Raises ConfigError or DatasetError before any
    training, RunError if another process holds the run's folder or the loss is not finite.
    """
    dataset = open_dataset(found_from_here(config.data_dir) / config.dataset)
    made_by = fingerprint(dataset.card_sha256)
    config.folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    with _held(config.folder), torch.random.fork_rng():
        result = read_result(config.folder)
        if result and result["fingerprint"] == made_by:
            return result
        torch.set_num_threads(config.threads)
        try:
            return _carried_out(config, dataset, made_by, report)
        finally:
            torch.set_num_threads(threads)


def _carried_out(
    config: RunConfig, dataset: Dataset, made_by: dict[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    (config.folder / "result.json").unlink(missing_ok=True)  # of other code: the folder is being made anew
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "cuda"}[config.device]
    fabric = Fabric(accelerator=accelerator, devices=1, precision="32-true")
    torch.manual_seed(config.seed)
    height, width, channels = dataset.images.shape[1:]
    network = build_network(config.network, (height, width, channels), config.embedding_dim).to(fabric.device)
    state = {"config": config.resolved(), "fingerprint": made_by}
    test_rows = dataset.rows("test")
    before = _embeddings(network, dataset, test_rows, fabric.device)
    chosen = {"iteration": 0, "how": "no training"}
    history, seconds = pd.DataFrame(), 0.0
    if config.iterations:
        history, chosen, seconds = _trained(config, dataset, network, fabric, state, report)
    embeddings = _embeddings(network, dataset, test_rows, fabric.device)
    labels = dataset.labels(test_rows)
    retrieval = evaluate(dataset.card["protocol"], embeddings, labels, tuple(dataset.card["recall_at"]))
    report(f"test Recall@1 {100 * retrieval.metrics['recall@1']:.1f} %")
    validation = evaluate("all-vs-rest", *_validation(network, dataset, fabric.device), (1,))
    result = {
        "run_id": config.run_id,
        "study": config.study,
        "config": config.resolved(),
        "metrics": retrieval.metrics,
        "protocol": retrieval.protocol,
        "n_queries": retrieval.n_queries,
        "n_unmatched": retrieval.n_unmatched,
        "validation_recall@1": validation.metrics["recall@1"],
        "chosen": chosen,
        "similarity_density": {"before": _density(before, labels), "after": _density(embeddings, labels)},
        "panel": _panel(embeddings, labels, test_rows),
        "training_seconds": seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "fingerprint": made_by,
        "provenance": provenance(fabric.device, config.threads),
    }
    _write(config.folder, result, history, retrieval, embeddings)
    return result


def _trained(
    config: RunConfig,
    dataset: Dataset,
    network: nn.Module,
    fabric: Fabric,
    state: dict[str, Any],
    report: Callable[[str], None],
) -> tuple[pd.DataFrame, dict[str, Any], float]:
    """Train `network` in place to its chosen iteration; returns the history, the choice and the seconds."""
    train_rows = dataset.rows("train")
    labels = dataset.labels(train_rows)
    generator = torch.Generator().manual_seed(config.seed)
    sampler = SAMPLERS[config.sampler](labels, config.batch_size, config.images_per_class, generator)
    loss_of = config.build_loss()
    assert loss_of is not None
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    wrapped, optimizer = fabric.setup(network, optimizer)
    progress: dict[str, Any] = {"iteration": 0, "seconds": 0.0, "losses": [], "validations": [], "best": None}
    saved = _load_checkpoint(config.folder, state)
    if saved:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        sampler.load_state_dict(saved["sampler"])
        progress = saved["progress"]
        report(f"continued from iteration {progress['iteration']}")
    started = time.perf_counter() - progress["seconds"]
    batches = iter(sampler)
    while progress["iteration"] < config.iterations:
        batch = next(batches)
        progress["iteration"] += 1
        torch.manual_seed(config.seed * 1_000_003 + progress["iteration"])  # a resumed run draws the same
        images = dataset.pixels(train_rows[batch]).to(fabric.device)
        loss = loss_of(wrapped(images), labels[batch].to(fabric.device))
        value = loss.item()
        if not np.isfinite(value):
            raise RunError(f"the loss is {value} at iteration {progress['iteration']}; lower learning_rate")
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        progress["losses"].append(value)
        if progress["iteration"] % config.validate_every == 0 or progress["iteration"] == config.iterations:
            progress["seconds"] = time.perf_counter() - started
            _validate(network, dataset, fabric.device, progress)
            _report_progress(progress, config, report)
            parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            _save_checkpoint(config.folder, {**state, **parts, "sampler": sampler.state_dict(), "progress": progress})
    best = progress["best"]
    network.load_state_dict(best["network"])
    history = pd.DataFrame({"iteration": range(1, config.iterations + 1), "loss": progress["losses"]})
    validations = pd.DataFrame(progress["validations"], columns=["iteration", "validation_recall@1"])
    chosen = {"iteration": best["iteration"], "how": "best Recall@1 on validation classes"}
    return history.merge(validations, how="left"), chosen, progress["seconds"]


def _validate(network: nn.Module, dataset: Dataset, device: torch.device, progress: dict[str, Any]) -> None:
    """Add the validation Recall@1 of this iteration; keep the network if it is the best (the earliest of equals)."""
    recall = evaluate("all-vs-rest", *_validation(network, dataset, device), (1,)).metrics["recall@1"]
    progress["validations"].append([progress["iteration"], recall])
    if progress["best"] is None or recall > progress["best"]["recall"]:
        kept = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        progress["best"] = {"iteration": progress["iteration"], "recall": recall, "network": kept}


def _report_progress(progress: dict[str, Any], config: RunConfig, report: Callable[[str], None]) -> None:
    done, seconds = progress["iteration"], progress["seconds"]
    report(
        f"iteration {done}/{config.iterations}  loss {np.mean(progress['losses'][-config.validate_every :]):.4f}  "
        f"validation Recall@1 {100 * progress['validations'][-1][1]:.1f} %  "
        f"{done * config.batch_size / max(seconds, 1e-9):.0f} images/s  "
        f"about {seconds / done * (config.iterations - done):.0f} s left"
    )


def _validation(network: nn.Module, dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = dataset.rows("val")
    return _embeddings(network, dataset, rows, device), dataset.labels(rows)


def _embeddings(network: nn.Module, dataset: Dataset, rows: np.ndarray, device: torch.device) -> Tensor:
    return embed(network, lambda part: dataset.pixels(rows[part]).to(device), len(rows))


def _density(embeddings: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """The two densities of the similarities (the paper's Figure 5), per node, on SIMILARITY_BINS intervals."""
    histograms = pair_histograms(embeddings, labels, n_bins=SIMILARITY_BINS)
    return {name: getattr(histograms, name).tolist() for name in histograms._fields}


def _panel(embeddings: Tensor, labels: Tensor, rows: np.ndarray) -> dict[str, list]:
    """A few queries, the same in every run on a dataset, with the rows of their nearest images and which are hits."""
    unit = F.normalize(embeddings)
    queries = torch.linspace(0, len(rows) - 1, PANEL_QUERIES + 2).long()[1:-1]
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    nearest = similarity.topk(min(PANEL_NEIGHBOURS, len(rows) - 1)).indices
    hits = labels[nearest] == labels[queries, None]
    return {"queries": rows[queries].tolist(), "neighbours": rows[nearest].tolist(), "hits": hits.tolist()}


def _write(
    folder: Path, result: dict[str, Any], history: pd.DataFrame, retrieval: Retrieval, embeddings: Tensor
) -> None:
    """Everything of a run, `result.json` last: it says that the rest is whole."""
    write_whole(folder / "history.parquet", lambda part: history.to_parquet(part, index=False))
    for name, array in (("ranks.npy", retrieval.ranks.to(torch.int32)), ("embeddings.npy", embeddings)):
        write_whole(folder / name, lambda part, array=array: _save_array(part, array.numpy()))  # type: ignore[misc]
    write_whole(folder / "result.json", lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    for file in folder.glob("checkpoint*.pt"):
        file.unlink()


def _save_array(file: Path, array: np.ndarray) -> None:
    with open(file, "wb") as opened:
        np.save(opened, array, allow_pickle=False)


def _save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Replace the checkpoint, keeping the one before."""
    current = folder / "checkpoint.pt"
    if current.exists():
        current.replace(folder / "checkpoint.previous.pt")
    write_whole(current, lambda part: torch.save(checkpoint, part))


def _load_checkpoint(folder: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint made by this config, code and data; None if there is none."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        if (folder / name).exists():
            checkpoint = torch.load(folder / name, map_location="cpu", weights_only=True)
            if all(checkpoint[key] == value for key, value in state.items()):
                return checkpoint
    return None


@contextmanager
def _held(folder: Path, patience_seconds: float = 10.0) -> Iterator[None]:
    """Hold a run folder: a second process waits a little, then is refused."""
    with open(folder / ".lock", "w") as lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process is working in {folder}; wait for it or end it") from None
                time.sleep(0.2)
        yield


def main() -> None:
    """`python -m hloss.training CONFIG.json`: one run from a file of its settings."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hloss.training CONFIG.json")
    try:
        config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
        run(config)
    except (ConfigError, DatasetError, RunError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"hloss.training: {error}")
    print(config.folder / "result.json")


if __name__ == "__main__":
    main()
