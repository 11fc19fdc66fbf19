"""How one step of training is made: which rate for which weights, where a batch comes from, how its gradient is taken.

Randomness. Nothing drawn in a step depends on the steps before: dropout is seeded by the run's seed, the iteration, the
process and the slice (`seed_of`), crops and horizontal flips by seed and iteration. So a resumed run draws the same
without any generator's state but the sampler's, and a slice that is embedded twice meets the same dropout. A loss may
draw, too (triplets, say): several processes seed it alike, or each would take the gradient of another loss.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn

from hloss.numerics import NotFiniteError
from hloss.runs.config import RunConfig
from hloss.runs.datasets import Dataset
from hloss.runs.images import augment
from hloss.runs.models import batchnorms


def seed_of(*numbers: int) -> int:
    """A seed for a generator, another for every tuple of whole numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big")


def build_optimizer(network: nn.Module, config: RunConfig, loss: nn.Module | None = None) -> torch.optim.Adam:
    """Adam on `parameter_groups`; weight decay is added to the gradient, as the authors' solver does.

    Weights that the loss itself learns (class weights, proxies) have the learning rate and no weight decay.
    """
    groups = parameter_groups(network, config)
    learned = [] if loss is None else list(loss.parameters())
    if learned:
        rate = config.learning_rate
        groups.append({"params": learned, "lr": rate, "initial_lr": rate, "weight_decay": 0.0})
    return torch.optim.Adam(groups)


def parameter_groups(network: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The backbone apart from the embedding, and the weights that decay apart from those that do not.

    Exempt from weight decay are, with decay_exempt="biases", all parameters of one dimension: biases, and the scale and
    shift of BatchNorm.
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
    """The rates for an iteration (from 1): times lr_step_factor after every lr_step iterations."""
    steps = (iteration - 1) // config.lr_step if config.lr_step else 0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * config.lr_step_factor**steps


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """The batches of a run for ever: this process's share of the images, uint8 (n, c, h, w), and their labels, int64.

    Every process draws the whole batch alike and takes its part of it (`share`: number, of how many). `ahead` has a
    thread fetch the next batch meanwhile, for a GPU that would wait for it; a CPU would only share its time with that
    thread. `state_dict()` stands right after the last batch handed out.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        config: RunConfig,
        share: tuple[int, int] = (0, 1),
        ahead: bool = False,
    ) -> None:
        self.dataset, self.rows, self.config, self.share, self.ahead = dataset, rows, config, share, ahead
        classes, self.labels = dataset.labels(rows).unique(return_inverse=True)  # from 0, as class weights need them
        self.n_classes = len(classes)
        self.sampler = config.build_sampler(self.labels, torch.Generator().manual_seed(config.seed))
        self.iteration = 0  # of the last batch handed out
        self.current: list[int] = []  # its images, whole, as indices into `rows`
        self._drawn: list[int] = []  # the batch after it
        self._stream = iter(self.sampler)
        self._fetched: Future[tuple[Tensor, Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def __next__(self) -> tuple[Tensor, Tensor]:
        fetched = self._fetched.result() if self._fetched else self._fetch(self._draw(), self.iteration + 1)
        self.iteration += 1
        self.current, self._drawn = self._drawn, []
        if self.ahead:
            self._fetched = self._thread.submit(self._fetch, self._draw(), self.iteration + 1)
        return fetched

    def _draw(self) -> list[int]:
        self._drawn = self._drawn or next(self._stream)
        return self._drawn

    def _fetch(self, drawn: list[int], iteration: int) -> tuple[Tensor, Tensor]:
        number, shares = self.share
        own = np.array_split(np.arange(len(drawn)), shares)[number]
        batch = np.asarray(drawn)
        if self.config.crop or self.config.horizontal_flip:  # drawn for the whole batch, so that the shares make up one
            generator = torch.Generator().manual_seed(seed_of(self.config.seed, iteration))
            images = augment(
                self.dataset.pixels(self.rows[batch]), self.config.crop, self.config.horizontal_flip, generator
            )
            images = images[own]
        else:
            images = self.dataset.pixels(self.rows[batch[own]])
        pinned = self.ahead and torch.cuda.is_available()
        return (images.pin_memory() if pinned else images), self.labels[batch[own]]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next batch depends on, readable by `torch.load(weights_only=True)`."""
        return {"sampler": self.sampler.state_dict(), "drawn": list(self._drawn), "iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken."""
        self.sampler.load_state_dict(state["sampler"])
        self._stream = iter(self.sampler)
        self._drawn, self.iteration, self._fetched = list(state["drawn"]), state["iteration"], None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def gradient(
    fabric: Fabric,
    network: _FabricModule,
    criterion: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    micro_batch: int | None,
    seed: Callable[[int], int],
    loss_seed: int | None = None,
) -> float:
    """Add the loss's gradient to the network's parameters; returns the loss of the batch.

    network: as `fabric.setup` gave it. images, labels: this process's share, as `Batches` gives it. With `micro_batch`
    (in all processes or in none: it decides in which order they exchange embeddings and gradients) the gradient is the
    whole batch's, exactly, at the memory of one slice: all slices are embedded without a graph, the loss is derived
    with respect to the embeddings, and each slice is embedded again to carry its part of that to the weights.
    `seed(slice)` seeds a slice's dropout, both times. One more forward pass is its price. `loss_seed`, the same on all
    of several processes, seeds what the loss draws; None, for one process: it draws where dropout left off.

    BatchNorm in training mode sees one slice at a time (`batchnorm="slices"`; a run refuses "live" here): both passes
    normalise a slice by its own statistics, and the running ones take it in once.

    Raises, before any parameter's gradient, NotFiniteError if the loss is not finite, ValueError if it refuses the
    embeddings.
    """
    if micro_batch is None:
        _seed(images.device, seed(0))
        loss = _seeded(criterion, loss_seed, network(images), labels)
        value = _finite(loss)
        fabric.backward(loss)
        return value
    slices = images.split(micro_batch)
    with torch.no_grad(), _without_memory(network):
        embeddings = torch.cat([_embedded(network, part, seed(i)) for i, part in enumerate(slices)])
    embeddings.requires_grad_()
    loss = _seeded(criterion, loss_seed, embeddings, labels)
    value = _finite(loss)
    loss.backward()  # to the embeddings, and to what the loss itself learns
    wanted = embeddings.grad
    assert wanted is not None
    for i, (part, its) in enumerate(zip(slices, wanted.split(micro_batch), strict=True)):
        with fabric.no_backward_sync(network, enabled=i < len(slices) - 1):
            fabric.backward(_embedded(network, part, seed(i)), its)
    return value


def _embedded(network: nn.Module, images: Tensor, seed: int) -> Tensor:
    _seed(images.device, seed)
    return network(images)


def _seeded(
    criterion: Callable[[Tensor, Tensor], Tensor], seed: int | None, embeddings: Tensor, labels: Tensor
) -> Tensor:
    if seed is not None:
        _seed(embeddings.device, seed)
    return criterion(embeddings, labels)


def _seed(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed`, for what is used alone: asking after every other backend takes it half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value}")
    return value


@contextmanager
def _without_memory(network: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics stay as they are."""
    layers: list[Any] = batchnorms(network)
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
