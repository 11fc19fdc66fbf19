"""One run: train, validate, choose the iteration on the validation classes, test once, write the run folder.

`run(config)` is what the notebook, `python -m hloss.runs CONFIG.json` and a study all call. A run that was killed
continues from its checkpoint to the same numbers; a finished run of the same code and data is returned as it is. With
several devices it starts the command under torchrun, one process each, and passes on what that prints; every batch is
then shared out among the processes, and its loss is the whole batch's.
"""

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hloss.runs.checkpoints import StopSignals, load_checkpoint, read_status, remove_checkpoints, write_status
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset, open_dataset
from hloss.runs.errors import ConfigError, DatasetError, RunError, RunStopped
from hloss.runs.evaluation import (
    evaluate_test,
    history_table,
    retrieval_panel,
    similarity_density,
    split_embeddings,
    validation_protocol,
    validation_recall,
    weights_sha256,
    write_run_files,
)
from hloss.runs.files import read_result, run_lock
from hloss.runs.launch import build_fabric, run_on_devices
from hloss.runs.loop import CHOOSE, REFIT, Loop, RunContext
from hloss.runs.models import batchnorms, build_network
from hloss.runs.provenance import fingerprint, provenance


def _print(line: str) -> None:
    """Print at once: whoever follows the log of an unattended run would wait for a buffer to fill."""
    print(line, flush=True)


def run(config: RunConfig, report: Callable[[str], None] = _print) -> dict[str, Any]:
    """Carry out a run, or return its result if it is complete; `report` gets a line per validation.

    Returns the content of `result.json`. Metrics are fractions in [0, 1]. Raises ConfigError or DatasetError before any
    training; RunError if another process holds the run's folder or the loss is not finite; RunStopped after SIGTERM or
    SIGINT, with everything saved. `status.json` in the run's folder says the same to other processes. Under torchrun
    every process calls this; all but the first report nothing and return an empty dict.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        dataset = open_dataset(config.data_folder)
        identity = _identity(config, dataset)
    except (ConfigError, DatasetError) as error:
        if first:
            _note_refusal(config.folder, error)
        raise
    config.folder.mkdir(parents=True, exist_ok=True)
    starter = config.devices > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if starter and not _finished(config, identity):
        return run_on_devices(config, report)
    holding = run_lock(config.folder) if first else nullcontext()
    # The caller's generator on the CPU is put back. A GPU's is seeded anew in every step; asked for all of them, torch
    # warns where there are several, and touches each.
    generator = torch.random.fork_rng(devices=[])
    with holding, StopSignals(first) as stop, generator, _default_dtype(config.precision):
        result = _finished(config, identity)
        if result:
            if first:
                _tidy(config.folder)
            return result
        try:
            fabric = build_fabric(config)
        except ConfigError as error:
            if first:
                _write_refusal(config.folder, error)
            raise
        work = RunContext(config, dataset, identity, fabric, stop, report if first else lambda line: None)
        with _threads(config.threads):
            return _watched(work) if first else _carried_out(work)


def _note_refusal(folder: Path, error: Exception) -> None:
    """Let `status.json` say that a run was refused before it had its folder to itself.

    Not where there is no folder, which a typo must not make; nor where another process is at work; nor beside a result,
    which stays one without its data.
    """
    if folder.is_dir() and read_result(folder) is None:
        with suppress(RunError, OSError), run_lock(folder, patience_seconds=0.0):
            _write_refusal(folder, error)


def _write_refusal(folder: Path, error: Exception) -> None:
    iteration = (read_status(folder) or {"iteration": 0})["iteration"]  # what a checkpoint holds is not lost
    write_status(folder, "failed", iteration, f"{type(error).__name__}: {error}")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _default_dtype(precision: str) -> Iterator[None]:
    """What Fabric hands embeddings over in, and so the loss computes in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "64-true" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _identity(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What a result and a checkpoint must share: settings, fingerprint and the file of the pretrained weights."""
    weights = config.weights_file
    if weights and not weights.is_file():
        raise ConfigError(f'weights={config.weights!r} is neither "none" nor "imagenet" nor a file that exists')
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None
    made_by = fingerprint(config, dataset.card_sha256)
    return {"config": config.resolved(), "fingerprint": made_by, "pretrained_sha256": sha256}


def _finished(config: RunConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result in the run's folder, if it is of this code, data and pretrained weights."""
    result = read_result(config.folder)
    same = result and all(result.get(key) == identity[key] for key in ("fingerprint", "pretrained_sha256"))
    return result if same else None


def _tidy(folder: Path) -> None:
    """What a process leaves that is killed between its result and its end."""
    status = read_status(folder) or {"state": "running", "iteration": 0}
    if status["state"] != "complete":
        remove_checkpoints(folder)
        write_status(folder, "complete", status["iteration"])


def _watched(work: RunContext) -> dict[str, Any]:
    """Carry out the run and keep `status.json` true."""

    def ended(state: str, message: str = "", retry: bool = False) -> None:
        write_status(work.config.folder, state, work.progress.get("iteration", 0), message, retry)

    ended("running")
    try:
        result = _carried_out(work)
    except (RunStopped, KeyboardInterrupt) as error:
        ended("stopped", str(error) or "interrupted", retry=True)
        raise
    except OSError as error:  # a full disk, a file system away: the same run may go on another day
        ended("failed", str(error), retry=True)
        raise
    except BaseException as error:
        # What torch says of memory, of a device or of a process that is gone: with more, or elsewhere, the run goes on.
        passing = isinstance(error, (RuntimeError, MemoryError)) and not isinstance(error, RunError)
        ended("failed", f"{type(error).__name__}: {error}", retry=passing)
        raise
    ended("complete")
    return result


def _carried_out(work: RunContext) -> dict[str, Any]:
    """Everything of a run from its first network to its result."""
    config, fabric = work.config, work.fabric
    network = new_network(work)
    _check(work, network)
    (config.folder / "result.json").unlink(missing_ok=True)  # of other code: the folder is being made anew
    saved = load_checkpoint(config.folder, work.identity, work.report)
    if saved:
        work.progress.update(saved["progress"])
        if fabric.is_global_zero:
            write_status(config.folder, "running", work.progress["iteration"])
        work.report(f"continued from iteration {work.progress['iteration']} ({work.progress['stage']})")
    else:
        losses: dict[str, list[float]] = {CHOOSE: [], REFIT: []}
        work.progress.update(stage=CHOOSE, iteration=0, seconds=0.0, losses=losses, validations=[], best=None)
        work.progress["seconds_before_stage"] = 0.0
        if fabric.is_global_zero:
            work.progress["before"] = similarity_density(work.dataset, *_embeddings(work, network, "test"))
    if config.iterations:
        network = _trained(work, network, saved)
    return _result(work, network) if fabric.is_global_zero else {}


def new_network(work: RunContext) -> nn.Module:
    """The network as the seed draws it, the same on every process."""
    config = work.config
    height, width, channels = work.dataset.images.shape[1:]
    if config.crop is not None and config.crop > min(height, width):
        raise ConfigError(f"crop={config.crop} is larger than the images of {config.dataset}, {height} x {width}")
    shape = (config.crop or height, config.crop or width, channels)
    settings = config.network_settings()
    torch.manual_seed(config.seed)
    try:
        network = build_network(
            config.network,
            shape,
            settings["embedding_dim"],
            settings["dropout"],
            str(config.weights_file or config.weights),
            settings["normalize_embeddings"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return network.to(work.fabric.device)


def _check(work: RunContext, network: nn.Module) -> None:
    """Refuse what the settings alone could not show to be wrong."""
    config, card = work.config, work.dataset.card
    if config.iterations and not len(work.dataset.rows("val")):
        raise ConfigError(f"dataset {config.dataset!r} has no validation images, by which an iteration could be chosen")
    if config.refit and not card.get("val_from_train"):
        raise ConfigError(
            f"refit=True: the validation classes of {config.dataset!r} were not carved out of its training classes"
        )
    live = config.network_settings()["batchnorm"] == "live" and bool(batchnorms(network))
    if live and config.slice_size:
        raise ConfigError(
            f"micro_batch={config.micro_batch}: network {config.network!r} has BatchNorm, and a batch in slices has no "
            'live statistics; set batchnorm to "frozen" (those of the weights) or "slices" (each slice its own)'
        )
    if live and config.devices > 1 and work.fabric.device.type != "cuda":
        raise ConfigError(
            f"devices={config.devices}: live BatchNorm is synchronised over devices, which torch can do on CUDA only; "
            'set batchnorm to "frozen" or "slices"'
        )


def _trained(work: RunContext, network: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
    """The network at the iteration that validation chose; with `refit`, that of a second training on all classes."""
    config, progress = work.config, work.progress
    if progress["stage"] == CHOOSE:
        Loop(work, network, work.dataset.rows("train"), config.iterations, saved).train()
        saved = None
        if not config.refit:
            if work.fabric.is_global_zero:
                network.load_state_dict(progress["best"]["network"])
            return network
        best = {k: v for k, v in (progress["best"] or {}).items() if k != "network"}
        progress |= {"stage": REFIT, "iteration": 0, "best": work.fabric.broadcast(best)}
        progress["seconds_before_stage"] = progress["seconds"]
    network = new_network(work)
    rows = np.sort(np.concatenate([work.dataset.rows("train"), work.dataset.rows("val")]))
    Loop(work, network, rows, progress["best"]["iteration"], saved).train()
    return network


def _result(work: RunContext, network: nn.Module) -> dict[str, Any]:
    """Test once, and write what a run leaves."""
    config, dataset, progress = work.config, work.dataset, work.progress
    embeddings, labels = _embeddings(work, network, "test")
    metric = config.metric or config.trained_metric
    retrieval = evaluate_test(dataset, embeddings, labels, metric)
    work.report(f"test Recall@1 {100 * retrieval.metrics['recall@1']:.1f} %")
    best = progress["best"]
    validation = best["recall"] if best else validation_recall(network, dataset, config, work.fabric.device)
    how = "best Recall@1 on validation classes" if best else "no training"
    result = {
        "run_id": config.run_id,
        "study": config.study,
        "config": config.resolved(),
        "metrics": retrieval.metrics,
        "protocol": retrieval.protocol,
        "n_queries": retrieval.n_queries,
        "n_unmatched": retrieval.n_unmatched,
        "validation_recall@1": validation,
        "validation_protocol": validation_protocol(dataset),
        "chosen": {"iteration": best["iteration"] if best else 0, "how": how},
        "trained_on": _trained_on(config),
        "similarity_density": {"before": progress["before"], "after": similarity_density(dataset, embeddings, labels)},
        "panel": retrieval_panel(dataset, embeddings, labels, metric),
        "training_seconds": progress["seconds"],
        "peak_memory_mib": _peak_memory_mib(work.fabric.device),
        "network_sha256": weights_sha256(network),
        "pretrained_sha256": work.identity["pretrained_sha256"],
        "fingerprint": work.identity["fingerprint"],
        "provenance": provenance(work.fabric.device, config.threads),
    }
    write_run_files(config.folder, result, history_table(progress), retrieval, embeddings)
    remove_checkpoints(config.folder)
    return result


def _trained_on(config: RunConfig) -> str:
    """Which classes the tested network was trained on."""
    if not config.iterations:
        return "nothing"
    return "training and validation classes (refit)" if config.refit else "training classes"


def _embeddings(work: RunContext, network: nn.Module, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return split_embeddings(network, work.dataset, split, work.config, work.fabric.device)


def _peak_memory_mib(device: torch.device) -> float:
    """Most memory in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the peak of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
