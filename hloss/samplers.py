"""Endless batch samplers for `DataLoader(batch_sampler=...)`.

A sampler yields lists of exactly `batch_size` image indices without end; training is counted in iterations, not epochs.
The same seed of the generator gives the same batches. Every sampler takes the arguments of `ClassSampler`, and raises
ValueError if the labels cannot fill the batches.

Each class has a shuffled order of its images. A visit to a class draws the next images in this order. At the end of the
order, the images are shuffled again. No image is drawn twice in one visit, and the first ceil(n / images per visit)
visits draw all n images of a class. (The authors' code shuffles after every visit, so an image of a large
class may never be drawn.)
"""

from collections.abc import Container, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from hloss.numerics import integers, whole_number


class ClassSampler:
    """Base class of the samplers: draws images of a class, and saves and restores the state.

    Args:
        labels: integer class labels of all images, (n,).
        batch_size: images in a batch, at least 2.
        images_per_class: largest number of images of a class in a visit, at least 2.
        generator: the source of randomness.
    """

    # Names of the lists that a subclass adds to its state, without their leading underscore.
    kept_lists: tuple[str, ...] = ()

    def __init__(self, labels: Tensor, batch_size: int, images_per_class: int, generator: torch.Generator) -> None:
        labels = integers("labels", labels)
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels must be integers of shape (n,), n > 0: got {labels.dtype} {tuple(labels.shape)}")
        self.batch_size = whole_number("batch_size", batch_size, 2)
        self.images_per_class = whole_number("images_per_class", images_per_class, 2)
        self.generator = generator
        self.labels = labels
        counts = labels.unique(return_counts=True)[1]
        if counts.max() < 2:
            raise ValueError(
                f"labels must have a class with at least two images: got {len(counts)} classes with one image each"
            )
        self.sizes: list[int] = counts.tolist()
        self._classes = range(len(self.sizes))
        by_class = labels.argsort(stable=True).split(self.sizes)
        self._images = [images.tolist() for images in by_class]  # Lists are faster than tensors for so few elements.
        self._position = self.sizes.copy()  # The end of the order, so that the first visit shuffles.
        self._order: list[int] = []  # Classes that remain in the current pass over the classes.
        self._check_classes()

    def _check_classes(self) -> None:
        """Raise ValueError if the classes cannot fill the batches."""
        self._check_filled("images_per_class", self.images_per_class)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self._draw_batch()

    def __len__(self) -> int:
        """Return the number of images divided by the batch size, rounded down. Iteration does not end there."""
        return len(self.labels) // self.batch_size

    def _draw_batch(self) -> list[int]:
        raise NotImplementedError

    def _check_filled(self, name: str, n: int) -> None:
        """Raise ValueError if all classes together, with at most n images of each, do not fill a batch."""
        most = sum(min(size, n) for size in self.sizes)
        if most < self.batch_size:
            classes = f"{len(self.sizes)} classes with {name}={n}"
            raise ValueError(f"batch_size must be at most {most} for {classes}: got {self.batch_size}")

    def _visit(self, label: int, n: int) -> list[int]:
        """Draw the next n distinct images of a class, or all of them if it has fewer."""
        images, start = self._images[label], self._position[label]
        n = min(n, len(images))
        taken = images[start : start + n]
        self._position[label] = start + n
        if len(taken) < n:  # Begin a new order; it ends with the images just drawn.
            images = self._images[label] = self._shuffled(images, last=set(taken))
            self._position[label] = n - len(taken)
            taken = taken + images[: n - len(taken)]
        return taken

    def _shuffled(self, items: Sequence[int], last: Container[int] = ()) -> list[int]:
        """Return the items (images or classes) in a random order; those in `last` come after all others."""
        shuffled = [items[i] for i in torch.randperm(len(items), generator=self.generator).tolist()]
        return [i for i in shuffled if i not in last] + [i for i in shuffled if i in last]

    def state_dict(self) -> dict[str, Tensor | list[int]]:
        """Return the state after the last batch, in tensors and lists.

        Batches that the workers of a DataLoader have prefetched count as drawn.
        """
        return {
            "generator": self.generator.get_state(),
            "images": torch.tensor(list(chain.from_iterable(self._images))),
            "position": self._position.copy(),
        } | {name: list(getattr(self, f"_{name}")) for name in self.kept_lists}

    def load_state_dict(self, state: dict[str, Tensor | list[int]]) -> None:
        """Continue after the batch at which `state` was saved; raise ValueError if `state` has other labels."""
        images, own = torch.as_tensor(state["images"]), torch.tensor(list(chain.from_iterable(self._images)))
        if images.shape != own.shape or not torch.equal(self.labels[images], self.labels[own]):
            raise ValueError(
                f"the state belongs to other labels: it has {len(images)} images, this sampler has {len(own)}; "
                "use the labels with which the state was saved"
            )
        self.generator.set_state(torch.as_tensor(state["generator"]))
        self._images = [part.tolist() for part in images.split(self.sizes)]
        self._position = list(state["position"])
        for name in self.kept_lists:
            setattr(self, f"_{name}", list(state[name]))


class ClassShuffleSampler(ClassSampler):
    """The authors' sampler: visit the classes in a shuffled order and cut the sequence of their images into batches.

    A visit draws up to `images_per_class` images (10 for CUB and Market-1501 in the authors' code). If a batch ends
    within a visit, the remaining images begin the next batch. A pass visits every class once; it must fill a batch.

    If a new pass begins within a batch, the classes that are already in the batch come last in that pass. Therefore,
    no image is twice in a batch if a pass draws at least batch_size + images_per_class images.

    Example:
        >>> labels, generator = torch.tensor([0, 0, 1, 1, 2, 2]), torch.Generator().manual_seed(0)
        >>> next(iter(ClassShuffleSampler(labels, 4, 2, generator)))
        [5, 4, 0, 1]
    """

    kept_lists = ("order", "pending", "pending_class")
    _pending: Sequence[int] = ()  # Images that were drawn and are in no batch yet.
    _pending_class: Sequence[int] = (-1,)  # The class of these images.

    def _draw_batch(self) -> list[int]:
        batch, visited = list(self._pending), set(self._pending_class)
        while len(batch) < self.batch_size:
            self._order = self._order or self._shuffled(self._classes, last=visited)
            self._pending_class = [self._order.pop(0)]
            visited.update(self._pending_class)
            batch += self._visit(self._pending_class[0], self.images_per_class)
        self._pending = batch[self.batch_size :]
        return batch[: self.batch_size]


class BalancedSampler(ClassSampler):
    """P x K sampling: every batch has batch_size / images_per_class classes with images_per_class images each.

    Each pass visits every class once, in a shuffled order, and no class is twice in a batch. A class with fewer than
    `images_per_class` images raises ValueError, because an image drawn twice would be a positive pair with itself.

    Example:
        >>> labels, generator = torch.tensor([0, 0, 1, 1, 2, 2]), torch.Generator().manual_seed(0)
        >>> next(iter(BalancedSampler(labels, 4, 2, generator)))
        [5, 4, 0, 1]
    """

    kept_lists = ("order",)

    def _check_classes(self) -> None:
        per_class = f"images_per_class={self.images_per_class}"
        self.classes_per_batch, rest = divmod(self.batch_size, self.images_per_class)
        if rest:
            raise ValueError(f"batch_size must be a multiple of {per_class}: got {self.batch_size}")
        if self.classes_per_batch > len(self.sizes):
            needed = f"batch_size={self.batch_size} with {per_class} needs {self.classes_per_batch} classes"
            raise ValueError(f"{needed}: got {len(self.sizes)}; lower batch_size")
        small = sum(size < self.images_per_class for size in self.sizes)
        if small:
            raise ValueError(
                f"each class needs at least {per_class} images: got {small} of {len(self.sizes)} classes with "
                f"fewer, the smallest with {min(self.sizes)}; lower images_per_class, or use another sampler"
            )

    def _draw_batch(self) -> list[int]:
        if len(self._order) < self.classes_per_batch:
            self._order += self._shuffled(self._classes, last=self._order)
        chosen, self._order = self._order[: self.classes_per_batch], self._order[self.classes_per_batch :]
        return [image for label in chosen for image in self._visit(label, self.images_per_class)]


class RandomClassSampler(ClassSampler):
    """Random classes, with a random number of images of each.

    A batch draws classes uniformly, without replacement, independently of other batches and of the class sizes. A class
    with fewer images than the random number adds all its images. The last class adds only as many as the batch needs.

    Args:
        min_images_per_class: smallest random number of images of a class, at least 2, at most `images_per_class`.

    Example:
        >>> labels, generator = torch.tensor([0, 0, 1, 1, 2, 2]), torch.Generator().manual_seed(0)
        >>> next(iter(RandomClassSampler(labels, 4, 2, generator, min_images_per_class=2)))
        [4, 5, 1, 0]
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        images_per_class: int,
        generator: torch.Generator,
        min_images_per_class: int = 5,
    ) -> None:
        self.min_images_per_class = whole_number("min_images_per_class", min_images_per_class, 2)
        super().__init__(labels, batch_size, images_per_class, generator)

    def _check_classes(self) -> None:
        least, most = self.min_images_per_class, self.images_per_class
        if least > most:
            raise ValueError(f"min_images_per_class must be at most images_per_class={most}: got {least}")
        self._check_filled("min_images_per_class", least)

    def _draw_batch(self) -> list[int]:
        batch: list[int] = []
        for label in self._shuffled(self._classes):
            n = int(torch.randint(self.min_images_per_class, self.images_per_class + 1, (1,), generator=self.generator))
            batch += self._visit(label, min(n, self.batch_size - len(batch)))
            if len(batch) == self.batch_size:
                break
        return batch


SAMPLERS: dict[str, type[ClassSampler]] = {
    "class-shuffle": ClassShuffleSampler,
    "balanced": BalancedSampler,
    "random-class": RandomClassSampler,
}
