"""Execute a run: train a network, choose the iteration on validation classes, evaluate on test classes.

The notebook, `python -m hloss.runs CONFIG.json` and studies call `run(config)`. When a killed run is started again, it
continues from its last checkpoint and gives the same numbers. If a complete run of the same code and data exists, its
result is returned.

With several devices, `run` starts one process per device with torchrun and forwards their progress reports. Each
process embeds its share of every batch; the loss is that of the whole batch.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hloss.retrieval.protocols import Retrieval
from hloss.runs.checkpoints import (
    PROGRESS,
    StopSignals,
    clean_up_complete_run,
    load_checkpoint,
    read_status,
    remove_checkpoints,
    write_status,
)
from hloss.runs.config import BEST, LAST, RunConfig
from hloss.runs.datasets import Dataset, open_dataset, query_counts
from hloss.runs.errors import ConfigError, DatasetError, GPUMemoryError, RunError, RunStopped
from hloss.runs.evaluation import (
    evaluate_test,
    history_table,
    is_still_improving,
    retrieval_panel,
    similarity_density,
    split_embeddings,
    trained_overlap,
    validation_protocol,
    validation_recall,
    weights_sha256,
    write_run_files,
)
from hloss.runs.files import NETWORK_FILE, read_result, run_lock
from hloss.runs.launch import build_fabric, check_devices, run_on_devices
from hloss.runs.loop import CHOOSE, REFIT, Loop, RunContext
from hloss.runs.models import batchnorms, build_network
from hloss.runs.process import default_dtype, gpu_arithmetic, peak_memory_mib, torch_threads
from hloss.runs.provenance import fingerprint, provenance
from hloss.runs.resident import ResidentDataset, place_images


def _print(line: str) -> None:
    """Print without buffering, so that the log of an unattended run is up to date."""
    print(line, flush=True)


def run(config: RunConfig, report: Callable[[str], None] = _print) -> dict[str, Any]:
    """Carry out a run, or return its result if it is complete.

    Under torchrun, every process calls this function. The first process reports progress and returns the result. The
    others report nothing and return an empty dict after training. Other processes can read in `status.json` of the
    run's folder how the run ended.

    Args:
        config: the settings of the run.
        report: called with a line of progress for each validation.

    Returns:
        The content of `result.json`. Metrics are fractions in [0, 1].

    Raises:
        ConfigError, DatasetError: before any training, if settings and data do not fit.
        RunError: another process has locked the run's folder, or the loss or a number in the result is not finite.
        GPUMemoryError: the GPU has too little memory. The run continues from its last checkpoint when it is started
            again.
        RunStopped: the process received SIGTERM or SIGINT; the state of the run is saved.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    try:
        dataset = open_dataset(config.data_folder)
        identity = _identity(config, dataset)
    except (ConfigError, DatasetError) as error:
        if is_first:
            _record_refusal(config.folder, error)
        raise
    config.folder.mkdir(parents=True, exist_ok=True)
    starts_processes = config.devices > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if starts_processes and not _matching_result(config, identity):
        try:
            check_devices(config)
        except ConfigError as error:
            _record_refusal(config.folder, error)
            raise
        return run_on_devices(config, report)
    lock = run_lock(config.folder) if is_first else nullcontext()
    # Restore the caller's CPU generator afterwards. GPU generators need no restoring: every step seeds them. Without
    # devices=[], torch would initialise all GPUs and warn if there are several.
    generator = torch.random.fork_rng(devices=[])
    with lock, StopSignals(is_first) as stop, generator, default_dtype(config.precision):
        result = _matching_result(config, identity)
        if result:
            if is_first:
                clean_up_complete_run(config.folder)
            return result
        try:
            fabric = build_fabric(config)
        except ConfigError as error:
            if is_first:
                _write_refused_status(config.folder, error)
            raise
        context = RunContext(config, dataset, identity, fabric, stop, report if is_first else lambda line: None)
        with torch_threads(config.threads), gpu_arithmetic(fabric.device, config.tf32):
            return _run_with_status(context) if is_first else _train_and_evaluate(context)


def _record_refusal(folder: Path, error: Exception) -> None:
    """Write the error of a run that did not start to `status.json`.

    Does nothing in three cases: the folder does not exist (a mistyped setting must not create a folder), another
    process has locked it, or it contains a result. A result stays valid if its dataset is removed.
    """
    if folder.is_dir() and read_result(folder) is None:
        with suppress(RunError, OSError), run_lock(folder, patience_seconds=0.0):
            _write_refused_status(folder, error)


def _write_refused_status(folder: Path, error: Exception) -> None:
    # the iteration of the last checkpoint, which stays usable
    iteration = (read_status(folder) or {"iteration": 0})["iteration"]
    write_status(folder, "failed", iteration, f"{type(error).__name__}: {error}")


def _identity(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Settings and hashes of this run; its result and its checkpoint must have the same values."""
    weights = config.weights_file
    if weights and not weights.is_file():
        raise ConfigError(f'weights={config.weights!r} is neither "none" nor "imagenet" nor a file that exists')
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None
    made_by = fingerprint(config, dataset.card_sha256)
    return {"config": config.resolved(), "fingerprint": made_by, "pretrained_sha256": sha256}


def _matching_result(config: RunConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result in the run's folder; None if its code, data or pretrained weights differ from this run's."""
    result = read_result(config.folder)
    same = result and all(result.get(key) == identity[key] for key in ("fingerprint", "pretrained_sha256"))
    return result if same else None


def _run_with_status(context: RunContext) -> dict[str, Any]:
    """Train and evaluate; write the outcome to `status.json`."""

    def write(state: str, message: str = "", retry: bool = False) -> None:
        write_status(context.config.folder, state, context.progress.get("iteration", 0), message, retry)

    write("running")
    try:
        result = _train_and_evaluate(context)
    except (RunStopped, KeyboardInterrupt) as error:
        write("stopped", str(error) or "interrupted", retry=True)
        raise
    except OSError as error:  # For example a full disk or a lost file system; a new attempt may succeed.
        write("failed", str(error), retry=True)
        raise
    except BaseException as error:
        # torch raises RuntimeError if memory is exhausted, or a device or process fails: a new attempt may succeed.
        lasting = isinstance(error, RunError) and not isinstance(error, GPUMemoryError)
        passing = isinstance(error, (RuntimeError, MemoryError)) and not lasting
        write("failed", f"{type(error).__name__}: {error}", retry=passing)
        raise
    write("complete")
    return result


def _train_and_evaluate(context: RunContext) -> dict[str, Any]:
    """Carry out the run in this process. GPUMemoryError if the memory of its GPU does not suffice."""
    try:
        return _carry_out(context)
    except RuntimeError as error:
        if isinstance(error, RunError) or "out of memory" not in str(error):
            raise
        raise GPUMemoryError(_memory_advice(context, error)) from error


def _memory_advice(context: RunContext, error: RuntimeError) -> str:
    """Build the message for a full GPU: settings that need less memory, and the first line of torch's error."""
    config = context.config
    at_once = config.slice_size or -(-config.batch_size // config.devices)
    images = ""
    if isinstance(context.dataset, ResidentDataset):
        images = f', or set images="host", which frees {context.dataset.resident.nbytes / 2**30:.1f} GiB'
    return (
        f"CUDA out of memory with {at_once} images embedded at once: set micro_batch to fewer (this keeps the "
        "gradient of the whole batch), or let fewer runs share the "
        f"GPU{images}. {str(error).partition(chr(10))[0]}"
    )


def _carry_out(context: RunContext) -> dict[str, Any]:
    """Start from a new network or the last checkpoint, train, evaluate, and return the result."""
    config, fabric = context.config, context.fabric
    network = new_network(context)
    _check_data_and_devices(context, network)
    context.dataset = place_images(context.dataset, config.images, fabric.device)
    for name in ("result.json", NETWORK_FILE, PROGRESS):  # These files are of other code or data.
        (config.folder / name).unlink(missing_ok=True)
    saved = load_checkpoint(config.folder, context.identity, context.report)
    if saved:
        context.progress.update(saved["progress"])
        if fabric.is_global_zero:
            write_status(config.folder, "running", context.progress["iteration"])
        context.report(f"continued from iteration {context.progress['iteration']} (stage {context.progress['stage']})")
    else:
        losses: dict[str, list[float]] = {CHOOSE: [], REFIT: []}
        context.progress.update(stage=CHOOSE, iteration=0, seconds=0.0, losses=losses, validations=[], best=None)
        context.progress["shorter"] = []  # the best network at each training length before the last
        context.progress["pairs"] = []  # with `record_pairs`, one record per validation
        context.progress["seconds_before_stage"] = 0.0
        if fabric.is_global_zero:
            found = split_embeddings(network, context.dataset, "test", config, fabric.device)
            context.progress["before"] = similarity_density(context.dataset, *found)
    if config.iterations:
        network = _train_network(context, network, saved)
    return _evaluate_and_write(context, network) if fabric.is_global_zero else {}


def new_network(context: RunContext) -> nn.Module:
    """The network as the seed initialises it, the same in every process."""
    config = context.config
    torch.manual_seed(config.seed)
    _, height, width, channels = context.dataset.images.shape
    network = network_for(config, (height, width, channels), str(config.weights_file or config.weights))
    return network.to(context.fabric.device)


def network_for(config: RunConfig, image_shape: tuple[int, int, int], weights: str) -> nn.Module:
    """Build the network that the settings of a run describe; torch's global generator initialises it.

    Args:
        config: the settings of the run.
        image_shape: height, width and channels of the dataset's images, before the crop.
        weights: initial weights of the backbone: none, imagenet, or the path of a file.

    Raises:
        ConfigError: the images are smaller than the crop, or the network does not accept the images or the weights.
    """
    height, width, channels = image_shape
    if config.crop is not None and config.crop > min(height, width):
        raise ConfigError(
            f"crop={config.crop} is larger than the images of {config.dataset}, {height} x {width} pixels; "
            f"allowed are 1 to {min(height, width)}"
        )
    shape = (config.crop or height, config.crop or width, channels)
    settings = config.network_settings()
    size, dropout, normalize = (settings[name] for name in ("embedding_dim", "dropout", "normalize_embeddings"))
    try:
        return build_network(config.network, shape, size, dropout, weights, normalize)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_data_and_devices(context: RunContext, network: nn.Module) -> None:
    """Raise ConfigError if the settings do not fit the dataset or the devices."""
    config, card = context.config, context.dataset.card
    if config.choose == BEST:
        _check_queries(
            context, "val", validation_protocol(context.dataset), '; or set choose to "last" (no validation)'
        )
    _check_queries(context, "test", card["protocol"], "")
    if config.refit and not card.get("val_from_train"):
        raise ConfigError(
            f"refit=True: the validation classes of {config.dataset!r} are not drawn from its training classes; "
            "set refit to False"
        )
    live = config.network_settings()["batchnorm"] == "live" and bool(batchnorms(network))
    if live and config.slice_size:
        raise ConfigError(
            f"micro_batch={config.micro_batch}: network {config.network!r} has BatchNorm, which cannot use statistics "
            'of the whole batch in slices; set batchnorm to "frozen" (running statistics) or "slices" (of each slice)'
        )
    if live and config.devices > 1 and context.fabric.device.type != "cuda":
        raise ConfigError(
            f"devices={config.devices}: live BatchNorm is synchronised over devices, which torch can do on CUDA only; "
            'set batchnorm to "frozen" or "slices"'
        )


def _check_queries(context: RunContext, split: str, protocol: str, remedy: str) -> None:
    """Raise ConfigError if no query of a split has both a match and a non-match."""
    dataset = context.dataset
    queries = query_counts(dataset.index.iloc[dataset.rows(split)], protocol)
    if ((queries.matches > 0) & (queries.rivals > 0)).any():
        return
    raise ConfigError(
        f"dataset {context.config.dataset!r}: no query of split {split} has both a match and a non-match by protocol "
        f"{protocol!r}: got {len(queries)} queries, of which {(queries.matches > 0).sum()} have a match and "
        f"{(queries.rivals > 0).sum()} a non-match; prepare the dataset with more images or classes "
        f"(`python -m data_prep check` shows their numbers){remedy}"
    )


def _train_network(context: RunContext, network: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
    """Train the network and return it with the chosen weights.

    With `refit`, train a new network on training and validation classes and return that one.
    """
    config, progress = context.config, context.progress
    if progress["stage"] == CHOOSE:
        Loop(context, network, context.dataset.rows("train"), config.iterations, saved).train()
        saved = None
        _report_tie(context)
        if not config.refit:
            if context.fabric.is_global_zero:
                network.load_state_dict(progress["best"]["network"])
            return network
        best = {k: v for k, v in (progress["best"] or {}).items() if k != "network"}
        progress |= {"stage": REFIT, "iteration": 0, "best": context.fabric.broadcast(best)}
        progress["seconds_before_stage"] = progress["seconds"]
    network = new_network(context)
    rows = np.sort(np.concatenate([context.dataset.rows("train"), context.dataset.rows("val")]))
    Loop(context, network, rows, progress["best"]["iteration"], saved).train()
    return network


def _report_tie(context: RunContext) -> None:
    """Report if all validations have the same Recall@1."""
    recalls = [recall for _, recall in context.progress["validations"]]
    if len(recalls) > 1 and len(set(recalls)) == 1:
        context.report(
            f"all {len(recalls)} validations have Recall@1 {100 * recalls[0]:.1f} %, so the first is chosen; use more "
            "validation classes or more iterations"
        )


def _evaluate_and_write(context: RunContext, network: nn.Module) -> dict[str, Any]:
    """Evaluate on the test set, once per training length, and write the files of the complete run."""
    config, dataset, progress, device = context.config, context.dataset, context.progress, context.fabric.device
    ranks, lengths = [], []
    for shorter in progress["shorter"]:
        network.load_state_dict(shorter["best"]["network"])
        entry, retrieval, _ = _test_at_length(context, network, **shorter)
        lengths.append(entry)
        ranks.append(retrieval.ranks)
    if progress["shorter"]:
        network.load_state_dict(progress["best"]["network"])
    whole, retrieval, embeddings = _test_at_length(
        context, network, config.iterations, progress["seconds"], progress["best"]
    )
    result = {
        "run_id": config.run_id,
        "study": config.study,
        "config": config.resolved(),
        "metrics": whole["metrics"],
        "protocol": retrieval.protocol,
        "n_queries": retrieval.n_queries,
        "n_unmatched": retrieval.n_unmatched,
        "validation_recall@1": whole["validation_recall@1"],
        "validation_protocol": validation_protocol(dataset),
        "chosen": {"iteration": whole["chosen_iteration"], "how": _how_chosen(config)},
        "trained_on": _training_classes(config),
        "similarity_density": {"before": progress["before"], "after": whole["similarity_density"]},
        "panel": whole["panel"],
        "training_seconds": progress["seconds"],
        "peak_memory_mib": peak_memory_mib(device),
        "network_sha256": whole["network_sha256"],
        "network_mib": sum(value.nbytes for value in network.state_dict().values()) / 2**20,
        "lengths": [*lengths, whole],
        "pretrained_sha256": context.identity["pretrained_sha256"],
        "fingerprint": context.identity["fingerprint"],
        "card": dataset.card,
        "provenance": provenance(device, config.threads) | {"tf32": config.tf32 if device.type == "cuda" else None},
    }
    kept = network if config.keep_network else None
    ranks.append(retrieval.ranks)
    write_run_files(
        config.folder, result, history_table(progress), torch.stack(ranks), retrieval.query_index, embeddings, kept
    )
    remove_checkpoints(config.folder)
    return result


def _test_at_length(
    context: RunContext, network: nn.Module, iterations: int, seconds: float, best: dict[str, Any] | None
) -> tuple[dict[str, Any], Retrieval, Tensor]:
    """Evaluate on the test set the network that was chosen up to a training length.

    Args:
        context: the run.
        network: the network with the chosen weights.
        iterations: the training length.
        seconds: training time up to this length.
        best: iteration and validation Recall@1 of the chosen network; None without training.

    Returns:
        The entry of this training length in `result.json`, the retrieval, and the embeddings of the test images.
    """
    config, dataset, device = context.config, context.dataset, context.fabric.device
    embeddings, labels = split_embeddings(network, dataset, "test", config, device)
    metric = config.metric or config.trained_metric
    retrieval = evaluate_test(dataset, embeddings, labels, metric)
    after = f" after {iterations} iterations" if len(config.lengths) > 1 else ""
    context.report(f"test Recall@1 {100 * retrieval.metrics['recall@1']:.1f} %{after}")
    density = similarity_density(dataset, embeddings, labels)
    entry = {
        "iterations": iterations,
        "chosen_iteration": best["iteration"] if best else 0,
        "still_improving": is_still_improving(context.progress["validations"], iterations),
        "validation_recall@1": best["recall"] if best else _validation_without_training(context, network),
        "metrics": retrieval.metrics,
        "similarity_density": density,
        "trained_overlap": trained_overlap(dataset, embeddings, labels, config.trained_metric, density),
        "panel": retrieval_panel(dataset, embeddings, labels, metric),
        "training_seconds": seconds,
        "network_sha256": weights_sha256(network),
    }
    return entry, retrieval, embeddings


def _validation_without_training(context: RunContext, network: nn.Module) -> float | None:
    if context.config.choose == LAST:
        return None
    validation = split_embeddings(network, context.dataset, "val", context.config, context.fabric.device)
    return validation_recall(context.dataset, context.config, *validation)


def _how_chosen(config: RunConfig) -> str:
    """How the iteration of the tested network was chosen."""
    if not config.iterations:
        return "no training"
    return "last iteration, without validation" if config.choose == LAST else "best Recall@1 on validation classes"


def _training_classes(config: RunConfig) -> str:
    """Which classes the tested network was trained on."""
    if not config.iterations:
        return "nothing"
    return "training and validation classes (refit)" if config.refit else "training classes"
