"""The training loop of a run: steps, validation, checkpoints, signals."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import distributed as dist
from torch import nn
from tqdm.auto import tqdm

from hloss.losses.distributed import global_batch
from hloss.numerics import NotFiniteError
from hloss.runs.checkpoints import StopSignals, atomic_save, save_checkpoint, stopped_by, write_status
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.errors import RunError, RunStopped
from hloss.runs.evaluation import validation_recall
from hloss.runs.models import training_mode
from hloss.runs.step import Batches, build_optimizer, gradient, seed_of, set_learning_rates

CHOOSE, REFIT = "choose", "refit"  # the stages: a training that is validated, and one on all classes without


@dataclass
class RunContext:
    """What the parts of a run share. `progress` is what a checkpoint holds beside weights, optimiser and batches."""

    config: RunConfig
    dataset: Dataset
    identity: dict[str, Any]
    fabric: Fabric
    stop: StopSignals
    report: Callable[[str], None]
    progress: dict[str, Any] = field(default_factory=dict)


class Loop:
    """The training of one network on the images `rows` until iteration `until`, from where `saved` stands."""

    def __init__(
        self, work: RunContext, network: nn.Module, rows: np.ndarray, until: int, saved: dict[str, Any] | None
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
        self.criterion = global_batch(self.loss)
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
                self.criterion,
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
                atomic_save(file, {**self._state(), "batch": self.batches.rows[self.batches.current].tolist()})
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
