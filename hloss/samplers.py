"""How a batch is drawn: endless batch samplers for `DataLoader(batch_sampler=...)`.

A sampler yields lists of exactly `batch_size` image indices for ever: iterations, not epochs, drive training.
Randomness comes from the passed generator alone, so that the same seed gives the same batches. `state_dict()` is the
position right after the last batch yielded, in plain tensors and lists; a sampler built alike that loads it continues
with the same batches (with DataLoader workers, which fetch ahead, take the state once the batches in flight are used).

Within a class every sampler walks through the images in a shuffled order and reshuffles at its end: no image is drawn
twice in one visit, and every image of a class of n is seen within ceil(n / images per visit) visits. (The authors' code
reshuffles after every visit, which promises nothing about an image of a class above the cap.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class _ClassSampler:
    """The walk through each class's images, and the state that the samplers share."""

    def __init__(self, labels: Tensor, batch_size: int, generator: torch.Generator) -> None:
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0:
            raise ValueError(f"labels must be integers of shape (n,), n > 0, got {labels.dtype} {tuple(labels.shape)}")
        self.batch_size = _at_least("batch_size", batch_size, 2)
        self.generator = generator
        self.labels = labels
        _, counts = labels.unique(return_counts=True)
        if counts.max() < 2:
            raise ValueError(f"none of the {len(counts)} classes has two images: no batch can have a positive pair")
        self.sizes: list[int] = counts.tolist()
        self._images = list(labels.argsort(stable=True).split(self.sizes))  # one shuffled tensor of indices per class
        self._position = self.sizes.copy()  # at the end: the first visit shuffles

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self._draw_batch()

    def _draw_batch(self) -> list[int]:
        raise NotImplementedError

    def _visit(self, label: int, n: int) -> list[int]:
        """The next n images of a class (all of it, if it has fewer), none of them twice."""
        images, start = self._images[label], self._position[label]
        n = min(n, len(images))
        taken = images[start : start + n]
        self._position[label] = start + n
        if len(taken) < n:  # begin another pass, with the images just taken at its end
            shuffled = images[self._permutation(len(images))]
            again = torch.isin(shuffled, taken)
            self._images[label] = torch.cat([shuffled[~again], shuffled[again]])
            self._position[label] = n - len(taken)
            taken = torch.cat([taken, self._images[label][: n - len(taken)]])
        return taken.tolist()

    def _permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Everything the next batch depends on, readable by `torch.load(weights_only=True)`."""
        return {
            "generator": self.generator.get_state(),
            "images": torch.cat(self._images),
            "position": self._position.copy(),
        }

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        """Continue after the batch at which `state` was taken; the sampler must have been built for the same labels."""
        images = torch.as_tensor(state["images"])
        own = torch.cat(self._images)
        if images.shape != own.shape or not torch.equal(self.labels[images], self.labels[own]):
            raise ValueError(f"the sampler's state is for {len(images)} other images than these {len(self.labels)}")
        self.generator.set_state(torch.as_tensor(state["generator"]))
        self._images = list(images.split(self.sizes))
        self._position = list(state["position"])


class ClassShuffleSampler(_ClassSampler):
    """The authors' sampler: shuffle the classes, visit each in turn, cut the stream of their images into batches.

    A visit yields up to `images_per_class` images (the authors' cap is 10 on CUB and Market-1501), so a class may
    straddle two batches, and every class is seen once per walk. A batch that spans two walks takes the classes it
    already holds last, so that no image is in it twice if a walk yields at least batch_size + images_per_class images.
    """

    def __init__(self, labels: Tensor, batch_size: int, images_per_class: int, generator: torch.Generator) -> None:
        super().__init__(labels, batch_size, generator)
        self.images_per_class = _at_least("images_per_class", images_per_class, 2)
        walk = sum(min(size, images_per_class) for size in self.sizes)
        if walk < batch_size:
            raise ValueError(
                f"batch_size {batch_size} cannot be filled: {len(self.sizes)} classes with at most {images_per_class} "
                f"images each yield {walk} in a walk; lower batch_size or raise images_per_class"
            )
        self._order: list[int] = []  # classes still to visit in this walk
        self._pending: list[int] = []  # images visited but not yet in a batch
        self._pending_class = -1

    def _draw_batch(self) -> list[int]:
        batch, held = self._pending, {self._pending_class}
        while len(batch) < self.batch_size:
            if not self._order:
                walk = self._permutation(len(self.sizes)).tolist()
                self._order = [c for c in walk if c not in held] + [c for c in walk if c in held]
            self._pending_class = self._order.pop(0)
            held.add(self._pending_class)
            batch = batch + self._visit(self._pending_class, self.images_per_class)
        self._pending = batch[self.batch_size :]
        return batch[: self.batch_size]

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        own = {"order": self._order.copy(), "pending": self._pending.copy(), "pending_class": [self._pending_class]}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        super().load_state_dict(state)
        self._order, self._pending = list(state["order"]), list(state["pending"])
        (self._pending_class,) = state["pending_class"]


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


SAMPLERS = {"class-shuffle": ClassShuffleSampler}
