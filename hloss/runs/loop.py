"""The training loop of a run: steps, validation, checkpoints, signals."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from hloss.losses.checks import DeferredChecks, deferred_checks
from hloss.losses.distributed import global_batch
from hloss.numerics import NotFiniteError
from hloss.runs.checkpoints import StopSignals, save_checkpoint, stopped_by, write_progress, write_status
from hloss.runs.config import LAST, RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.engine import Fabric
from hloss.runs.errors import RunError, RunStopped
from hloss.runs.evaluation import pair_record, split_embeddings, validation_recall
from hloss.runs.files import atomic_save
from hloss.runs.images import channels_last
from hloss.runs.models import training_mode
from hloss.runs.resident import ResidentDataset
from hloss.runs.step import Batches, build_optimizer, check_loss, gradient, seed_of, set_learning_rates
from hloss.runs.unread import UnreadLoss, UnreadLosses

# Stages. CHOOSE trains on the training classes with validation, REFIT on training and validation classes without it.
CHOOSE, REFIT = "choose", "refit"
READ_EVERY = 10  # on a GPU, losses of this many iterations are read together


@dataclass
class RunContext:
    """Objects that the parts of a run share.

    Checkpoints contain `progress`, and the states of the network, the loss, the optimiser and the batches.
    """

    config: RunConfig
    dataset: Dataset
    identity: dict[str, Any]
    fabric: Fabric
    stop: StopSignals
    report: Callable[[str], None]
    progress: dict[str, Any] = field(default_factory=dict)


def reading_interval(device: torch.device) -> int:
    """Number of iterations whose losses are read from the device together."""
    return READ_EVERY if device.type == "cuda" else 1


class Loop:
    """The training of one network.

    Args:
        context: the run.
        network: the initial network; training changes it in place.
        rows: row numbers of the training images in the dataset's index.
        until: the last iteration.
        saved: the checkpoint to continue from; None for a new training.
    """

    def __init__(
        self, context: RunContext, network: nn.Module, rows: np.ndarray, until: int, saved: dict[str, Any] | None
    ) -> None:
        config, fabric = context.config, context.fabric
        batchnorm = config.network_settings()["batchnorm"]
        if fabric.world_size > 1 and batchnorm == "live":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        training_mode(network, batchnorm)
        self.context, self.network, self.until = context, network, until
        share = (fabric.global_rank, fabric.world_size)
        on_gpu = fabric.device.type == "cuda"
        self.on_host = on_gpu and not isinstance(context.dataset, ResidentDataset)  # whether images are on the host
        interval = reading_interval(fabric.device)
        self.batches = Batches(context.dataset, rows, config, share, ahead=self.on_host, at_once=interval)
        self.unread, self.checks = UnreadLosses(interval), DeferredChecks(sys.maxsize)
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
        """Train until the last iteration, validate and save. After a signal, save and raise RunStopped."""
        context, progress = self.context, self.context.progress
        started = time.perf_counter() - progress["seconds"]
        with closing(self.batches), self._progress_bar() as bar, deferred_checks(sys.maxsize) as self.checks:
            context.stop.inside_loop()
            while progress["iteration"] < self.until:
                self.step()
                due = self._is_due(context.config.validate_every)
                if due:
                    self._read_losses()
                progress["seconds"] = time.perf_counter() - started
                self._update(bar)
                if due:
                    if progress["stage"] == CHOOSE:
                        self._validate()
                        progress["seconds"] = time.perf_counter() - started
                    self._report()
                stopped = self._stop_signal()
                checkpoint = time.monotonic() - self.saved_at >= context.config.checkpoint_seconds
                if stopped or checkpoint or progress["iteration"] == self.until:
                    self._save()
                if stopped:
                    raise RunStopped(stopped_by(stopped))
        context.stop.outside_loop()

    def step(self) -> None:
        """Execute one iteration: fetch a batch, compute its gradient, update the weights.

        On a GPU, the loss may be read after a later iteration.
        """
        context, progress = self.context, self.context.progress
        config, fabric = context.config, context.fabric
        iteration = progress["iteration"] + 1
        # All processes seed the loss alike. The third number distinguishes this seed from the seed of the crops.
        loss_seed = seed_of(config.seed, iteration, fabric.world_size) if fabric.world_size > 1 else None
        images, labels = next(self.batches)
        if self.on_host:
            images, labels = (part.to(fabric.device, non_blocking=True) for part in (images, labels))
            images = channels_last(images)
        set_learning_rates(self.optimizer, config, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = gradient(
                fabric,
                self.wrapped,
                self.criterion,
                images,
                labels,
                config.slice_size,
                lambda part: seed_of(config.seed, iteration, fabric.global_rank, part),
                loss_seed,
                check=self.unread.every == 1,
            )
        except ValueError as error:
            self._read_losses()  # an earlier loss may be the cause
            self._fail(f"{error} at iteration {iteration}", error, self.batches.current)
        self.optimizer.step()
        progress["iteration"] = iteration
        checks, self.checks.pending = self.checks.pending, []
        self.unread.add(UnreadLoss(iteration, self.batches.current, loss, checks))
        if self.unread.is_full:
            self._read_losses()

    def _read_losses(self) -> None:
        """Append the unread losses to the progress; raise RunError at a non-finite loss or failed check."""
        progress = self.context.progress
        for unread, value, numbers in self.unread.read():
            try:
                for (_, verify), found in zip(unread.checks, numbers, strict=True):
                    verify(found)
                check_loss(value)
            except ValueError as error:
                began, seen = unread.iteration, progress["iteration"]
                later = f" (detected after iteration {seen})" if seen > began else ""
                self._fail(f"{error} at iteration {began}{later}", error, unread.batch)
            progress["losses"][progress["stage"]].append(value)

    def _fail(self, why: str, error: Exception, batch: list[int]) -> NoReturn:
        """Save the failed state for inspection, and raise RunError. The last checkpoint does not change.

        `failed.pt` is a checkpoint with the additional key `batch`: row numbers, in the dataset's index, of the batch
        with the invalid loss. If a validation failed, `batch` is the last training batch. On a GPU, losses are read
        every READ_EVERY iterations, so the weights may be those of a later iteration, `progress["iteration"]`.
        """
        file = self.context.config.folder / "failed.pt"
        left = f"Weights and batch are in {file}"
        if self.context.fabric.is_global_zero:
            try:
                atomic_save(file, {**self._state(), "batch": self.batches.rows[batch].tolist()})
            except OSError as full:  # A full disk must neither hide the cause nor cause a retry.
                left = f"Weights and batch are lost: {full}"
        advice = "; try a lower learning_rate" if isinstance(error, NotFiniteError) else ""
        raise RunError(f"{why}{advice}. {left}") from error

    def _is_due(self, every: int) -> bool:
        return self.context.progress["iteration"] % every == 0 or self.context.progress["iteration"] == self.until

    def _validate(self) -> None:
        """Measure validation Recall@1; keep the network if its Recall@1 is higher than at all earlier validations.

        With `choose="last"` there is no validation: the current network replaces the kept one.
        """
        context, progress = self.context, self.context.progress
        if not context.fabric.is_global_zero:
            return
        config, execution = context.config, (context.config, context.fabric.device)
        is_embedded = config.choose != LAST or (config.record_pairs and len(context.dataset.rows("val")))
        validation = split_embeddings(self.network, context.dataset, "val", *execution) if is_embedded else None
        recall = self._validation_recall(*validation) if validation and config.choose != LAST else None
        if recall is not None:
            progress["validations"].append([progress["iteration"], recall])
        if recall is None or progress["best"] is None or recall > progress["best"]["recall"]:
            kept = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            progress["best"] = {"iteration": progress["iteration"], "recall": recall, "network": kept}
        if progress["iteration"] in config.lengths[:-1]:
            at_length = {"iterations": progress["iteration"], "seconds": progress["seconds"], "best": progress["best"]}
            progress["shorter"].append(at_length)
        if config.record_pairs:
            rows = self.batches.rows[self.batches.current]
            record = pair_record(self.network, context.dataset, rows, validation, *execution)
            progress["pairs"].append({"iteration": progress["iteration"], **record})

    def _validation_recall(self, embeddings: Tensor, labels: Tensor) -> float:
        context = self.context
        try:
            return validation_recall(context.dataset, context.config, embeddings, labels)
        except NotFiniteError as error:
            iteration = context.progress["iteration"]
            self._fail(f"validation: {error} after iteration {iteration}", error, self.batches.current)

    def _report(self) -> None:
        context, progress = self.context, self.context.progress
        if not context.fabric.is_global_zero:
            return
        stage, done = progress["stage"], progress["iteration"]
        loss = float(np.mean(progress["losses"][stage][-context.config.validate_every :]))
        rate, left = self._images_per_second(), self._seconds() / done * (self.until - done)
        validations = progress["validations"]  # none with `choose` "last"
        validated = f"validation Recall@1 {100 * validations[-1][1]:.1f} %  " if validations else ""
        context.report(
            f"{'' if stage == CHOOSE else 'refit '}iteration {done}/{self.until}  "
            f"loss {loss:.4f}  "
            f"{validated if stage == CHOOSE else ''}"
            f"{rate:.0f} images/s  "
            f"about {left:.0f} s left"
        )
        write_status(context.config.folder, "running", done)
        write_progress(
            context.config.folder,
            iteration=done,
            iterations=self.until,
            loss=loss,
            images_per_second=rate,
            seconds_left=left,
            validations=validations,
        )

    def _seconds(self) -> float:
        """Training time of this stage alone, so that a refit reports its own rate."""
        return self.context.progress["seconds"] - self.context.progress["seconds_before_stage"]

    def _images_per_second(self) -> float:
        return self.context.progress["iteration"] * self.context.config.batch_size / max(self._seconds(), 1e-9)

    def _stop_signal(self) -> str | None:
        """Return the signal that stops the run, or None. A signal to one process stops all at the same iteration.

        Several processes exchange signals only when losses are read, because the exchange waits for the GPUs.
        """
        received = self.context.stop.received
        if self.context.fabric.world_size == 1:
            return received
        iteration = self.context.progress["iteration"]
        if iteration % self.unread.every and iteration != self.until:
            return None
        asked = torch.tensor(float(received is not None), device=self.context.fabric.device)
        dist.all_reduce(asked)
        return (received or "a signal to another process") if asked.item() else None

    def _state(self) -> dict[str, Any]:
        return {
            **self.context.identity,
            "network": self.network.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "progress": self.context.progress,
        }

    def _save(self) -> None:
        """Save a checkpoint. A full disk does not end the training: the previous checkpoint stays usable."""
        context = self.context
        self._read_losses()
        self.saved_at = time.monotonic()
        if not context.fabric.is_global_zero:
            return
        try:
            save_checkpoint(context.config.folder, self._state())
        except OSError as error:
            iteration = context.progress["iteration"]
            context.report(f"iteration {iteration}: cannot write a checkpoint ({error}); the previous one is kept")
        write_status(context.config.folder, "running", context.progress["iteration"])

    def _progress_bar(self) -> Any:
        """Create a progress bar, visible in a terminal or a notebook but not in a log."""
        from tqdm.auto import tqdm  # The import selects a bar for a terminal or a notebook.

        shell = sys.modules.get("IPython")
        interactive = sys.stderr.isatty() or (shell is not None and shell.get_ipython() is not None)
        hidden = not interactive or not self.context.fabric.is_global_zero
        done, stage = self.context.progress["iteration"], self.context.progress["stage"]
        return tqdm(total=self.until, initial=done, desc=stage, disable=hidden, mininterval=1, leave=False)

    def _update(self, bar: Any) -> None:
        if bar.disable:
            return
        progress = self.context.progress
        rate = self._images_per_second()
        recall = f"{100 * progress['validations'][-1][1]:.1f} %" if progress["validations"] else "-"
        losses = progress["losses"][progress["stage"]]
        loss = f"{losses[-1]:.4f}" if losses else "-"
        bar.set_postfix_str(f"loss {loss}, validation Recall@1 {recall}, {rate:.0f} images/s", refresh=False)
        bar.update()
