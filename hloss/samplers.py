"""How a batch is drawn: endless batch samplers for `DataLoader(batch_sampler=...)`.

A sampler yields lists of exactly `batch_size` image indices for ever: iterations, not epochs, drive training.
Randomness comes from the passed generator alone, so that the same seed gives the same batches. `state_dict()` is the
position right after the last batch yielded, in plain tensors and lists; a sampler built alike that loads it continues
with the same batches (with DataLoader workers, which fetch ahead, take the state once the batches in flight are used).

Within a class every sampler walks through the images in a shuffled order and reshuffles at its end: no image is drawn
twice in one visit, and every image of a class of n is seen within ceil(n / images per visit) visits. (The authors' code
reshuffles after every visit, which promises nothing about an image of a class above the cap.)
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class ClassSampler:
    """The walk through each class's images, and the state that the samplers share."""

    def __init__(self, labels: Tensor, batch_size: int, images_per_class: int, generator: torch.Generator) -> None:
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0:
            raise ValueError(f"labels must be integers of shape (n,), n > 0, got {labels.dtype} {tuple(labels.shape)}")
        self.batch_size = _at_least("batch_size", batch_size, 2)
        self.images_per_class = _at_least("images_per_class", images_per_class, 2)
        self.generator = generator
        self.labels = labels
        _, counts = labels.unique(return_counts=True)
        if counts.max() < 2:
            raise ValueError(f"none of the {len(counts)} classes has two images: no batch can have a positive pair")
        self.sizes: list[int] = counts.tolist()
        by_class = labels.argsort(stable=True).split(self.sizes)
        self._images = [images.tolist() for images in by_class]  # shuffled; lists, for so few at a time, are faster
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
            shuffled = [images[i] for i in self._permutation(len(images)).tolist()]
            again = set(taken)
            self._images[label] = [i for i in shuffled if i not in again] + [i for i in shuffled if i in again]
            self._position[label] = n - len(taken)
            taken = taken + self._images[label][: n - len(taken)]
        return taken

    def _permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Everything the next batch depends on, readable by `torch.load(weights_only=True)`."""
        return {
            "generator": self.generator.get_state(),
            "images": torch.tensor(list(chain.from_iterable(self._images))),
            "position": self._position.copy(),
        }

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        """Continue after the batch at which `state` was taken; the sampler must have been built for the same labels."""
        images = torch.as_tensor(state["images"])
        own = torch.tensor(list(chain.from_iterable(self._images)))
        if images.shape != own.shape or not torch.equal(self.labels[images], self.labels[own]):
            raise ValueError(f"the sampler's state is for {len(images)} other images than these {len(self.labels)}")
        self.generator.set_state(torch.as_tensor(state["generator"]))
        self._images = [part.tolist() for part in images.split(self.sizes)]
        self._position = list(state["position"])


class ClassShuffleSampler(ClassSampler):
    """The authors' sampler: shuffle the classes, visit each in turn, cut the stream of their images into batches.

    A visit yields up to `images_per_class` images (the authors' cap is 10 on CUB and Market-1501), so a class may
    straddle two batches, and every class is seen once per walk. A batch that spans two walks takes the classes it
    already holds last, so that no image is in it twice if a walk yields at least batch_size + images_per_class images.
    """

    def __init__(self, labels: Tensor, batch_size: int, images_per_class: int, generator: torch.Generator) -> None:
        super().__init__(labels, batch_size, images_per_class, generator)
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


class BalancedSampler(ClassSampler):
    """P x K: every batch holds batch_size / images_per_class classes with exactly images_per_class images of each.

    The classes are walked in a shuffled order, every class once per walk; a batch that spans two walks takes the
    classes it already holds last, so that it never holds a class twice. Every class must have images_per_class images:
    to draw some twice would make positive pairs of an image with itself.
    """

    def __init__(self, labels: Tensor, batch_size: int, images_per_class: int, generator: torch.Generator) -> None:
        super().__init__(labels, batch_size, images_per_class, generator)
        self.classes_per_batch, rest = divmod(batch_size, images_per_class)
        if rest:
            raise ValueError(f"batch_size {batch_size} is no multiple of images_per_class {images_per_class}")
        if self.classes_per_batch > len(self.sizes):
            raise ValueError(
                f"batch_size {batch_size} with {images_per_class} images per class needs {self.classes_per_batch} "
                f"classes, there are {len(self.sizes)}; lower batch_size or raise images_per_class"
            )
        small = sum(size < images_per_class for size in self.sizes)
        if small:
            raise ValueError(
                f"{small} of {len(self.sizes)} classes have fewer than images_per_class {images_per_class} images "
                f"(the smallest {min(self.sizes)}); lower images_per_class, or use another sampler"
            )
        self._order: list[int] = []  # classes still to visit in this walk

    def _draw_batch(self) -> list[int]:
        chosen, self._order = self._order[: self.classes_per_batch], self._order[self.classes_per_batch :]
        if len(chosen) < self.classes_per_batch:
            walk = self._permutation(len(self.sizes)).tolist()
            walk = [c for c in walk if c not in chosen] + [c for c in walk if c in chosen]
            missing = self.classes_per_batch - len(chosen)
            chosen, self._order = chosen + walk[:missing], walk[missing:]
        return [image for label in chosen for image in self._visit(label, self.images_per_class)]

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        return super().state_dict() | {"order": self._order.copy()}

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        super().load_state_dict(state)
        self._order = list(state["order"])


class RandomClassSampler(ClassSampler):
    """Random classes, and of each a random number of images between min_images_per_class and images_per_class.

    A batch draws its classes without replacement, each equally likely whatever its size, independently of the batches
    before: nothing promises when a class comes. A class that has fewer images gives all of them; the last class of a
    batch is cut to the batch size.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        images_per_class: int,
        generator: torch.Generator,
        min_images_per_class: int = 5,
    ) -> None:
        super().__init__(labels, batch_size, images_per_class, generator)
        self.min_images_per_class = _at_least("min_images_per_class", min_images_per_class, 2)
        if min_images_per_class > images_per_class:
            raise ValueError(
                f"min_images_per_class {min_images_per_class} is above images_per_class {images_per_class}"
            )
        certain = sum(min(size, min_images_per_class) for size in self.sizes)
        if certain < batch_size:
            raise ValueError(
                f"batch_size {batch_size} may not be filled: {len(self.sizes)} classes with {min_images_per_class} "
                f"images each yield {certain}; lower batch_size or raise min_images_per_class"
            )

    def _draw_batch(self) -> list[int]:
        batch: list[int] = []
        for label in self._permutation(len(self.sizes)).tolist():
            n = int(torch.randint(self.min_images_per_class, self.images_per_class + 1, (1,), generator=self.generator))
            batch += self._visit(label, min(n, self.batch_size - len(batch)))
            if len(batch) == self.batch_size:
                break
        return batch


class Coverage(NamedTuple):
    """What a number of batches held."""

    batches: int
    classes_seen: float  # fraction of the classes, in [0, 1]
    images_seen: float  # fraction of the images, in [0, 1]
    classes_per_batch: float  # mean
    min_positives: int  # positive pairs i < j in the batch with the fewest
    mean_positives: float


def coverage(labels: Tensor, batches: Iterable[list[int]]) -> Coverage:
    """How much of the images a sampler shows, and how many positive pairs a batch has.

    labels (n,) integers; batches of indices into them, for example one epoch:
    `coverage(labels, itertools.islice(sampler, len(labels) // batch_size))`. ValueError if there is no batch.
    """
    labels = torch.as_tensor(labels)
    seen = torch.zeros(len(labels), dtype=torch.bool)
    classes, positives = [], []
    for batch in batches:
        seen[batch] = True
        _, counts = labels[batch].unique(return_counts=True)
        classes.append(len(counts))
        positives.append(int((counts * (counts - 1) // 2).sum()))
    if not positives:
        raise ValueError("there is no batch to summarise")
    return Coverage(
        len(positives),
        len(labels[seen].unique()) / len(labels.unique()),
        seen.double().mean().item(),
        sum(classes) / len(classes),
        min(positives),
        sum(positives) / len(positives),
    )


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


SAMPLERS: dict[str, type[ClassSampler]] = {
    "class-shuffle": ClassShuffleSampler,
    "balanced": BalancedSampler,
    "random-class": RandomClassSampler,
}
