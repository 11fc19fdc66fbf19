"""One run: train, validate, choose the iteration on the validation classes, test once, write the run folder.

`run(config)` is what the notebook, `python -m hloss.training CONFIG.json` and a study all call. A run that was killed
continues from its checkpoint to the same numbers; a finished run of the same code and data is returned as it is. With
several devices it starts the command under torchrun, one process each, and passes on what that prints; every batch is
then shared out among the processes, and its loss is the whole batch's.
"""

import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from hloss.checkpoints import (
    RunError,
    RunStopped,
    StopSignals,
    held,
    load_checkpoint,
    read_status,
    remove_checkpoints,
    save_checkpoint,
    save_whole,
    signals_passed_on,
    stopped_by,
    write_status,
)
from hloss.datasets import Dataset, DatasetError, open_dataset
from hloss.distributed import global_batch
from hloss.experiment import (
    ConfigError,
    RunConfig,
    fingerprint,
    parse_config,
    provenance,
    read_result,
    write_whole,
)
from hloss.histogram import NotFiniteError
from hloss.networks import batchnorms, build_network, training_mode
from hloss.outcome import (
    embeddings_of,
    history_of,
    retrieval_panel,
    similarity_density,
    tested,
    validation_protocol,
    validation_recall,
    weights_sha256,
    write_outcome,
)
from hloss.recipe import Batches, build_optimizer, gradient, seed_of, set_learning_rates

CHOOSE, REFIT = "choose", "refit"  # the stages: a training that is validated, and one on all classes without


@dataclass
class Work:
    """What the parts of a run share. `progress` is what a checkpoint holds beside weights, optimiser and batches."""

    config: RunConfig
    dataset: Dataset
    identity: dict[str, Any]
    fabric: Fabric
    stop: StopSignals
    report: Callable[[str], None]
    progress: dict[str, Any] = field(default_factory=dict)


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
        return _run_by_torchrun(config, report)
    holding = held(config.folder) if first else nullcontext()
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
            fabric = _fabric(config)
        except ConfigError as error:
            if first:
                _write_refusal(config.folder, error)
            raise
        work = Work(config, dataset, identity, fabric, stop, report if first else lambda line: None)
        with _threads(config.threads):
            return _watched(work) if first else _carried_out(work)


def _note_refusal(folder: Path, error: Exception) -> None:
    """Let `status.json` say that a run was refused before it had its folder to itself.

    Not where there is no folder, which a typo must not make; nor where another process is at work; nor beside a result,
    which stays one without its data.
    """
    if folder.is_dir() and read_result(folder) is None:
        with suppress(RunError, OSError), held(folder, patience_seconds=0.0):
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
    """What a result and a checkpoint must share: settings, code, data and the file of the pretrained weights."""
    weights = config.weights_file
    if weights and not weights.is_file():
        raise ConfigError(f'weights={config.weights!r} is neither "none" nor "imagenet" nor a file that exists')
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None
    made_by = fingerprint(dataset.card_sha256)
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


def _fabric(config: RunConfig) -> Fabric:
    """Fabric on the devices of the run. ConfigError where they are not."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != config.devices:
        raise ConfigError(f"devices={config.devices}, but this run was started as {processes} processes")
    found = torch.cuda.device_count()
    if config.device == "cuda" and found < config.devices:
        raise ConfigError(f'device="cuda" with devices={config.devices}: torch finds {found} CUDA devices here')
    # The shares may differ in their number of slices: nothing may be exchanged on each forward pass.
    name = max({"forward_sync_buffers", "broadcast_buffers"} & set(signature(DistributedDataParallel).parameters))
    exchange: dict[str, Any] = {name: False}
    strategy = DDPStrategy(**exchange) if config.devices > 1 else "auto"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind: dict[str, Any] = {"accelerator": config.device, "precision": config.precision}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # torchrun starts the processes of a run
        fabric = Fabric(devices=config.devices, strategy=strategy, **kind)
        fabric.launch()
    return fabric


def _watched(work: Work) -> dict[str, Any]:
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


def _carried_out(work: Work) -> dict[str, Any]:
    """Everything of a run from its first network to its result."""
    config, fabric = work.config, work.fabric
    network = _new_network(work)
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


def _new_network(work: Work) -> nn.Module:
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


def _check(work: Work, network: nn.Module) -> None:
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


def _trained(work: Work, network: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
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
    network = _new_network(work)
    rows = np.sort(np.concatenate([work.dataset.rows("train"), work.dataset.rows("val")]))
    Loop(work, network, rows, progress["best"]["iteration"], saved).train()
    return network


class Loop:
    """The training of one network on the images `rows` until iteration `until`, from where `saved` stands."""

    def __init__(
        self, work: Work, network: nn.Module, rows: np.ndarray, until: int, saved: dict[str, Any] | None
    ) -> None:
        config, fabric = work.config, work.fabric
        batchnorm = config.network_settings()["batchnorm"]
        if fabric.world_size > 1 and batchnorm == "live":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        training_mode(network, batchnorm)
        self.work, self.network, self.until = work, network, until
        share = (fabric.global_rank, fabric.world_size)
        self.batches = Batches(work.dataset, rows, config, share, ahead=fabric.device.type == "cuda")
        loss = config.build_loss(self.batches.n_classes)
        assert loss is not None
        self.loss = loss.to(fabric.device)
        self.loss_of = global_batch(self.loss)
        self.wrapped, self.optimizer = fabric.setup(network, build_optimizer(network, config, self.loss))
        if saved:
            network.load_state_dict(saved["network"])
            self.loss.load_state_dict(saved["loss"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.batches.load_state_dict(saved["batches"])
        self.saved_at = time.monotonic()

    def train(self) -> None:
        """Step, validate and save until the end, or until a signal asks to stop: RunStopped, with everything saved."""
        work, progress = self.work, self.work.progress
        started = time.perf_counter() - progress["seconds"]
        with closing(self.batches), self._bar() as bar:
            work.stop.inside_loop()
            while progress["iteration"] < self.until:
                self._step()
                progress["seconds"] = time.perf_counter() - started
                self._show(bar)
                if self._is_due(work.config.validate_every):
                    if progress["stage"] == CHOOSE:
                        self._validate()
                        progress["seconds"] = time.perf_counter() - started
                    self._report()
                stopped = self._stopped()
                due = time.monotonic() - self.saved_at >= work.config.checkpoint_seconds
                if stopped or due or progress["iteration"] == self.until:
                    self._save()
                if stopped:
                    raise RunStopped(stopped_by(stopped))
        work.stop.outside_loop()

    def _step(self) -> None:
        work, progress = self.work, self.work.progress
        config, fabric = work.config, work.fabric
        iteration = progress["iteration"] + 1
        # Without the rank; a third number, since seed and iteration alone draw the crops.
        loss_seed = seed_of(config.seed, iteration, fabric.world_size) if fabric.world_size > 1 else None
        images, labels = (part.to(fabric.device, non_blocking=True) for part in next(self.batches))
        set_learning_rates(self.optimizer, config, iteration)
        self.optimizer.zero_grad()
        try:
            value = gradient(
                fabric,
                self.wrapped,
                self.loss_of,
                images,
                labels,
                config.slice_size,
                lambda part: seed_of(config.seed, iteration, fabric.global_rank, part),
                loss_seed,
            )
        except ValueError as error:
            self._give_up(f"{error} at iteration {iteration}", error)
        self.optimizer.step()
        progress["iteration"] = iteration
        progress["losses"][progress["stage"]].append(value)

    def _give_up(self, why: str, error: Exception) -> None:
        """Leave the last checkpoint as it is, and beside it the state that failed, for whoever wants to see why.

        `failed.pt` is a checkpoint with one more key: `batch`, the dataset's rows of the last batch, on which the loss
        failed (before a validation that failed, the last that was trained on).
        """
        file = self.work.config.folder / "failed.pt"
        left = f"Weights and batch are in {file}"
        if self.work.fabric.is_global_zero:
            try:
                save_whole(file, {**self._state(), "batch": self.batches.rows[self.batches.current].tolist()})
            except OSError as full:  # a full disk must not hide why the run ends, nor have it started again
                left = f"Weights and batch are lost: {full}"
        advice = "; try a lower learning_rate" if isinstance(error, NotFiniteError) else ""
        raise RunError(f"{why}{advice}. {left}") from error

    def _is_due(self, every: int) -> bool:
        return self.work.progress["iteration"] % every == 0 or self.work.progress["iteration"] == self.until

    def _validate(self) -> None:
        """Add the validation Recall@1 of this iteration; keep the network if it is the best, earliest of equals."""
        work, progress = self.work, self.work.progress
        if not work.fabric.is_global_zero:
            return
        try:
            recall = validation_recall(self.network, work.dataset, work.config, work.fabric.device)
        except NotFiniteError as error:
            self._give_up(f"validation: {error} after iteration {progress['iteration']}", error)
        progress["validations"].append([progress["iteration"], recall])
        if progress["best"] is None or recall > progress["best"]["recall"]:
            kept = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            progress["best"] = {"iteration": progress["iteration"], "recall": recall, "network": kept}

    def _report(self) -> None:
        work, progress = self.work, self.work.progress
        if not work.fabric.is_global_zero:
            return
        stage, done = progress["stage"], progress["iteration"]
        validated = f"validation Recall@1 {100 * progress['validations'][-1][1]:.1f} %  "
        work.report(
            f"{'' if stage == CHOOSE else 'refit '}iteration {done}/{self.until}  "
            f"loss {np.mean(progress['losses'][stage][-work.config.validate_every :]):.4f}  "
            f"{validated if stage == CHOOSE else ''}"
            f"{self._images_per_second():.0f} images/s  "
            f"about {self._seconds() / done * (self.until - done):.0f} s left"
        )
        write_status(work.config.folder, "running", done)

    def _seconds(self) -> float:
        """Of this stage alone: a refit tells its own rate, not the mean with the training before it."""
        return self.work.progress["seconds"] - self.work.progress["seconds_before_stage"]

    def _images_per_second(self) -> float:
        return self.work.progress["iteration"] * self.work.config.batch_size / max(self._seconds(), 1e-9)

    def _stopped(self) -> str | None:
        """The signal that asked to stop; that of one process stops all, at the same iteration."""
        received = self.work.stop.received
        if self.work.fabric.world_size == 1:
            return received
        asked = torch.tensor(float(received is not None), device=self.work.fabric.device)
        dist.all_reduce(asked)
        return (received or "a signal to another process") if asked.item() else None

    def _state(self) -> dict[str, Any]:
        return {
            **self.work.identity,
            "network": self.network.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "progress": self.work.progress,
        }

    def _save(self) -> None:
        """Checkpoint. A full disk does not end the training: the checkpoint before is whole, and room may come."""
        work = self.work
        self.saved_at = time.monotonic()
        if not work.fabric.is_global_zero:
            return
        try:
            save_checkpoint(work.config.folder, self._state())
        except OSError as error:
            work.report(f"iteration {work.progress['iteration']}: no checkpoint, the one before stays: {error}")
        write_status(work.config.folder, "running", work.progress["iteration"])

    def _bar(self) -> Any:
        """A bar for who is watching; a log has the lines of the validations."""
        shell = sys.modules.get("IPython")
        watched = sys.stderr.isatty() or (shell is not None and shell.get_ipython() is not None)
        hidden = not watched or not self.work.fabric.is_global_zero
        done, stage = self.work.progress["iteration"], self.work.progress["stage"]
        return tqdm(total=self.until, initial=done, desc=stage, disable=hidden, mininterval=1, leave=False)

    def _show(self, bar: Any) -> None:
        if bar.disable:
            return
        progress = self.work.progress
        rate = self._images_per_second()
        recall = f"{100 * progress['validations'][-1][1]:.1f} %" if progress["validations"] else "-"
        loss = progress["losses"][progress["stage"]][-1]
        bar.set_postfix_str(f"loss {loss:.4f}, validation Recall@1 {recall}, {rate:.0f} images/s", refresh=False)
        bar.update()


def _result(work: Work, network: nn.Module) -> dict[str, Any]:
    """Test once, and write what a run leaves."""
    config, dataset, progress = work.config, work.dataset, work.progress
    embeddings, labels = _embeddings(work, network, "test")
    metric = config.metric or config.trained_metric
    retrieval = tested(dataset, embeddings, labels, metric)
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
    write_outcome(config.folder, result, history_of(progress), retrieval, embeddings)
    remove_checkpoints(config.folder)
    return result


def _trained_on(config: RunConfig) -> str:
    """Which classes the tested network was trained on."""
    if not config.iterations:
        return "nothing"
    return "training and validation classes (refit)" if config.refit else "training classes"


def _embeddings(work: Work, network: nn.Module, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return embeddings_of(network, work.dataset, split, work.config, work.fabric.device)


def _peak_memory_mib(device: torch.device) -> float:
    """Most memory in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the peak of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _run_by_torchrun(config: RunConfig, report: Callable[[str], None]) -> dict[str, Any]:
    """Start the command of this run under torchrun, one process per device, and pass on its reports.

    What else the processes say goes to `devices.log` in the run's folder.
    """
    file = config.folder / "config.json"
    write_whole(file, lambda part: part.write_text(config.model_dump_json(indent=1) + "\n"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"]
    command = [*torchrun, "-m", "hloss.training", str(file)]
    environment = {"OMP_NUM_THREADS": str(config.threads), **os.environ, "HLOSS_STDIN": "open while the starter lives"}
    log = config.folder / "devices.log"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        _continued(log, config.devices) as errors,
        subprocess.Popen(command, env=environment, text=True, stderr=errors, **pipes) as child,
        signals_passed_on(child),
    ):
        assert child.stdout is not None
        for line in child.stdout:
            report(line.rstrip())
    result = read_result(config.folder)
    if child.returncode == 0 and result:
        return result
    status = read_status(config.folder) or {"state": "failed", "message": ""}
    if status["state"] == "stopped":
        raise RunStopped(status["message"])
    raise RunError(f"the run on {config.devices} devices ended with {child.returncode}, see {log}. {status['message']}")


@contextmanager
def _continued(log: Path, devices: int) -> Iterator[IO[str]]:
    """The log, with a line for this attempt. Never emptied: a process at work on this run may be writing to it."""
    with open(log, "a") as errors:
        errors.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} started on {devices} devices\n")
        errors.flush()  # before the processes write
        yield errors


def _stop_with_starter() -> None:
    """Ask this process to stop when the one that started torchrun is gone, and with it the other end of stdin."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: this returns at the end of the file
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """`python -m hloss.training CONFIG.json`: one run from a file of its settings."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hloss.training CONFIG.json")
    if "HLOSS_STDIN" in os.environ:
        _stop_with_starter()
    try:
        config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
        result = run(config)
    except (ConfigError, DatasetError, RunError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"hloss.training: {error}")
    if dist.is_initialized():  # not after an error: NCCL would wait there for processes that wait for this one
        dist.destroy_process_group()
    if result and "HLOSS_STDIN" not in os.environ:
        print(config.folder / "result.json")


if __name__ == "__main__":
    main()
