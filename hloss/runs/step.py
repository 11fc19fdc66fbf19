"""One step of training: the optimiser and its learning rates, the batches, the gradient of a batch.

Random numbers of a step do not depend on earlier steps. Dropout is seeded by the run's seed, the iteration, the process
and the slice (`seed_of`). Crops and horizontal flips are seeded by the run's seed and the iteration. A resumed run
therefore needs only the state of the sampler, and a slice that is embedded twice gets the same dropout. Some losses
also draw random numbers (triplets, for example): all processes seed the loss alike and so differentiate the same loss.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hloss.numerics import NotFiniteError
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.engine import Fabric, FabricModule
from hloss.runs.images import augment, draw_views
from hloss.runs.models import batchnorms
from hloss.runs.resident import Choice, ResidentDataset


def seed_of(*numbers: int) -> int:
    """A seed for a generator, different for every tuple of whole numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big")


def build_optimizer(network: nn.Module, config: RunConfig, loss: nn.Module | None = None) -> torch.optim.Adam:
    """Build Adam with `parameter_groups`; weight decay is added to the gradient, as in the authors' solver.

    Weights of the loss itself (class weights, proxies) have the learning rate of the embedding and no weight decay.
    """
    groups = parameter_groups(network, config)
    learned = [] if loss is None else list(loss.parameters())
    if learned:
        rate = config.learning_rate
        groups.append({"params": learned, "lr": rate, "initial_lr": rate, "weight_decay": 0.0})
    on_gpu = all(parameter.is_cuda for parameter in (*network.parameters(), *learned))
    return torch.optim.Adam(groups, fused=on_gpu or None)  # one kernel for many parameters


def parameter_groups(network: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The parameters grouped by learning rate and weight decay.

    The backbone has `pretrained_lr_factor` times the learning rate. With decay_exempt="biases" all parameters of one
    dimension (biases, scale and shift of BatchNorm) have no weight decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factor = config.network_settings()["pretrained_lr_factor"]
    for name, parameter in network.named_parameters():
        rate = config.learning_rate * (factor if name.startswith("backbone.") else 1.0)
        exempt = config.decay_exempt == "biases" and parameter.ndim <= 1
        groups.setdefault((rate, 0.0 if exempt else config.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, config: RunConfig, iteration: int) -> None:
    """Set the learning rates of an iteration, counted from 1.

    Every `lr_step` iterations, the learning rates are multiplied by `lr_step_factor`.
    """
    steps = (iteration - 1) // config.lr_step if config.lr_step else 0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * config.lr_step_factor**steps


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """An endless iterator over the batches of a run.

    Each item is this process's share of a batch: images, uint8 (n, c, h, w), and labels, int64 (n,), from 0. Every
    process draws the same whole batch and takes its share. Images and labels are on the device for a ResidentDataset,
    else on the CPU. `state_dict()` is the state after the last batch that was returned.

    Args:
        dataset: the prepared dataset.
        rows: row numbers of the images to draw from, in the dataset's index.
        config: the settings of the run.
        share: this process's number, from 0, and the number of processes.
        ahead: whether a thread fetches the next batch while a GPU computes. This saves no time on a CPU, or if the
            images are on the device.
        at_once: number of batches drawn together if the images are on the device, to send their indices in one copy.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        config: RunConfig,
        share: tuple[int, int] = (0, 1),
        ahead: bool = False,
        at_once: int = 1,
    ) -> None:
        self.dataset, self.rows, self.config, self.share = dataset, rows, config, share
        self.ahead, self.at_once = ahead, at_once
        classes, self.labels = dataset.labels(rows).unique(return_inverse=True)  # from 0, as class weights need them
        self.n_classes, self.class_numbers = len(classes), self.labels.numpy()
        self.sampler = config.build_sampler(self.labels, torch.Generator().manual_seed(config.seed))
        self.iteration = 0  # of the last batch returned
        self.current: list[int] = []  # all images of that batch, as indices into `rows`
        self._drawn: list[list[int]] = []  # images of the next batches, already drawn
        self._sent: Iterator[tuple[Tensor, Tensor]] = iter(())  # the next batches whose indices are on the device
        self._stream = iter(self.sampler)
        self._fetched: Future[tuple[Tensor, Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def __next__(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.dataset, ResidentDataset):
            fetched = next(self._sent, None) or self._send(self.dataset)
        else:
            fetched = self._fetched.result() if self._fetched else self._fetch(self._draw(1)[0], self.iteration + 1)
        self.iteration += 1
        self.current = self._drawn.pop(0)
        if self.ahead:
            self._fetched = self._thread.submit(self._fetch, self._draw(1)[0], self.iteration + 1)
        return fetched

    def _draw(self, n: int) -> list[list[int]]:
        """The next n batches."""
        while len(self._drawn) < n:
            self._drawn.append(next(self._stream))
        return self._drawn[:n]

    def _send(self, dataset: ResidentDataset) -> tuple[Tensor, Tensor]:
        """Send the indices of the next batches to the device, and cut the first."""
        drawn = self._draw(self.at_once)
        self._sent = dataset.batches([self._choice(dataset, *each) for each in enumerate(drawn, self.iteration + 1)])
        return next(self._sent)

    def _fetch(self, drawn: list[int], iteration: int) -> tuple[Tensor, Tensor]:
        config, batch, own = self.config, np.asarray(drawn), slice(*self._bounds(len(drawn)))
        generator = self._generator(iteration)
        if generator is not None:
            pixels = self.dataset.pixels(self.rows[batch])
            images = augment(pixels, config.crop, config.horizontal_flip, generator)[own]
        else:
            images = self.dataset.pixels(self.rows[batch[own]])
        labels = self.labels[batch[own]]
        pinned = self.ahead and torch.cuda.is_available()
        return (images.pin_memory(), labels.pin_memory()) if pinned else (images, labels)

    def _bounds(self, n: int) -> tuple[int, int]:
        """First and last (exclusive) position of this process's share of n images: as even as possible, in order."""
        number, shares = self.share
        size, longer = divmod(n, shares)  # the first `longer` shares have one image more
        start = number * size + min(number, longer)
        return start, start + size + (number < longer)

    def _generator(self, iteration: int) -> torch.Generator | None:
        """Generator of the crops and flips of the whole batch, equal for all shares; None without crops and flips."""
        if not (self.config.crop or self.config.horizontal_flip):
            return None
        return torch.Generator().manual_seed(seed_of(self.config.seed, iteration))

    def _choice(self, dataset: ResidentDataset, iteration: int, drawn: list[int]) -> Choice:
        """Rows, class numbers and views of this process's share of a batch."""
        config, batch, own = self.config, np.asarray(drawn), slice(*self._bounds(len(drawn)))
        views, generator = None, self._generator(iteration)
        if generator is not None:
            size = dataset.resident.shape[1], dataset.resident.shape[2]
            views = draw_views(len(batch), size, config.crop, config.horizontal_flip, generator).share(own)
        return self.rows[batch[own]], self.class_numbers[batch[own]], views

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batch depends on, readable by `torch.load(weights_only=True)`."""
        return {"sampler": self.sampler.state_dict(), "drawn": list(self._drawn), "iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that follows the saved state."""
        self.sampler.load_state_dict(state["sampler"])
        self._stream = iter(self.sampler)
        self._drawn, self.iteration = list(state["drawn"]), state["iteration"]
        self._fetched, self._sent = None, iter(())

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def gradient(
    fabric: Fabric,
    network: FabricModule,
    criterion: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    micro_batch: int | None,
    seed: Callable[[int], int],
    loss_seed: int | None = None,
    check: bool = True,
) -> Tensor:
    """Add the gradient of the loss to the network's parameters, and return the loss, a scalar on its device.

    With `micro_batch` the gradient equals that of the whole batch, and only one slice at a time needs memory for its
    graph. All slices are embedded without a graph, and the loss is differentiated with respect to the embeddings. Each
    slice is then embedded again to propagate its part of the gradient to the weights. This takes one additional forward
    pass.

    With batchnorm="slices", both passes normalise a slice by its own statistics, and the running statistics are updated
    once. A run with batchnorm="live" and slices raises ConfigError.

    Args:
        fabric: as `build_fabric` returns it.
        network: as `fabric.setup` returns it.
        criterion: the loss of embeddings and labels.
        images: this process's share of the batch, uint8 (n, c, h, w).
        labels: int64 (n,).
        micro_batch: images per slice; None for no slices. All processes must have the same choice, because slices
            change the order in which processes exchange embeddings and gradients.
        seed: function of a slice's number that returns the seed of its dropout.
        loss_seed: seed of the loss, the same in all processes. None for one process: the loss then draws from the
            generator that dropout uses.
        check: whether to raise NotFiniteError for a non-finite loss before its gradient is computed; on a GPU, the host
            then waits. If False, the caller must check the returned loss.

    Raises:
        NotFiniteError: the loss is not finite and `check` is true; no parameter's gradient has changed.
        ValueError: the loss does not accept the embeddings; no parameter's gradient has changed.
    """
    if micro_batch is None:
        _seed(images.device, seed(0))
        loss = _loss_of(criterion, loss_seed, network(images), labels)
        if check:
            check_loss(loss.item())
        fabric.backward(loss)
        return loss.detach()
    slices = images.split(micro_batch)
    with torch.no_grad(), _constant_running_statistics(network):
        embeddings = torch.cat([_embed_slice(network, part, seed(i)) for i, part in enumerate(slices)])
    embeddings.requires_grad_()
    loss = _loss_of(criterion, loss_seed, embeddings, labels)
    if check:
        check_loss(loss.item())
    loss.backward()  # to the embeddings and the weights of the loss itself
    assert embeddings.grad is not None
    for i, (part, grad) in enumerate(zip(slices, embeddings.grad.split(micro_batch), strict=True)):
        with fabric.no_backward_sync(network, enabled=i < len(slices) - 1):
            fabric.backward(_embed_slice(network, part, seed(i)), grad)
    return loss.detach()


def _embed_slice(network: nn.Module, images: Tensor, seed: int) -> Tensor:
    _seed(images.device, seed)
    return network(images)


def _loss_of(
    criterion: Callable[[Tensor, Tensor], Tensor], seed: int | None, embeddings: Tensor, labels: Tensor
) -> Tensor:
    if seed is not None:
        _seed(embeddings.device, seed)
    return criterion(embeddings, labels)


def _seed(device: torch.device, seed: int) -> None:
    """Seed torch's generators. `torch.manual_seed` takes half a millisecond longer, as it seeds all backends."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def check_loss(value: float) -> None:
    """Raise NotFiniteError if a loss is NaN or infinite."""
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value}")


@contextmanager
def _constant_running_statistics(network: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are during a forward pass."""
    layers: list[Any] = batchnorms(network)
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
