"""Datasets whose images are in the memory of the device, so that a training step copies no pixels from the host."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hloss.runs.datasets import Dataset
from hloss.runs.images import Views

Choice = tuple[np.ndarray, np.ndarray, Views | None]  # row and class numbers (n,) of a batch; its crops and flips
CHUNK_BYTES = 2**26  # size of one copy to the device
FREE_SHARE = 0.5  # largest share of a GPU's free memory that images="auto" uses


@dataclass(frozen=True)
class ResidentDataset(Dataset):
    """A prepared dataset with a copy of all its images on a device.

    Attributes:
        resident: the images, uint8 (n, height, width, channels).
    """

    resident: Tensor

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Return the images of the given rows.

        Args:
            rows: row numbers of the index, int64 (n,).

        Returns:
            uint8 (n, channels, height, width) on the device, channels last.
        """
        (index,) = send(np.asarray(rows)[None], self.resident.device)
        return self.resident[index].permute(0, 3, 1, 2)

    def batches(self, chosen: list[Choice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut batches of training images on the device.

        All indices of all batches are sent in one copy, for which the host does not wait. The pixels equal those of
        `hloss.runs.images.augment` with the same draws.

        Args:
            chosen: rows, labels, and crops and flips of each batch; either all batches have crops and flips or none
                has.

        Yields:
            Images, uint8 (n, channels, height, width) of the crops, channels last, and labels, int64 (n,), on the
            device.
        """
        numbers = np.concatenate([_numbers_of(*each) for each in chosen], 1)
        sent = send(numbers, self.resident.device).split([len(rows) for rows, *_ in chosen], 1)
        for indices, (*_, views) in zip(sent, chosen, strict=True):
            yield self._cut(indices, views)

    def _cut(self, indices: Tensor, views: Views | None) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch from the numbers of `_numbers_of`."""
        if views is None:
            index, labels = indices
            return self.resident[index].permute(0, 3, 1, 2), labels
        index, labels, top, start, step = indices
        down = top[:, None] + _whole_numbers(views.rows, top.device)
        across = torch.addcmul(start[:, None], step[:, None], _whole_numbers(views.columns, top.device))
        return self.resident[index[:, None, None], down[:, :, None], across[:, None]].permute(0, 3, 1, 2), labels


def _numbers_of(rows: np.ndarray, labels: np.ndarray, views: Views | None) -> np.ndarray:
    """Numbers with which the device cuts a batch: rows and labels; with views also first row, first column and step."""
    if views is None:
        return np.stack([rows, labels])
    tops, lefts, flips = (part.numpy() for part in views[:3])
    return np.stack([rows, labels, tops, lefts + (views.columns - 1) * flips, 1 - 2 * flips.astype(np.int64)])


@lru_cache
def _whole_numbers(n: int, device: torch.device) -> Tensor:
    """The whole numbers below n, int64 (n,)."""
    return torch.arange(n, device=device)


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small array to a device; the host does not wait for a GPU.

    Args:
        numbers: the array.
        device: the device. On the CPU the tensor shares the array's memory.

    Returns:
        A tensor of the array's shape and dtype.
    """
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def place_images(dataset: Dataset, where: str, device: torch.device) -> Dataset:
    """Copy the images of a dataset to the device if the setting `images` asks for it.

    Args:
        dataset: the prepared dataset.
        where: "device"; "host"; or "auto", which means "device" if `fits` returns True, else "host".
        device: the device of the run.

    Returns:
        A ResidentDataset, or `dataset` itself if its images stay on the host.
    """
    if where == "host" or (where == "auto" and not fits(dataset.images.nbytes, device)):
        return dataset
    resident = torch.empty(dataset.images.shape, dtype=torch.uint8, device=device)
    step = max(CHUNK_BYTES // max(dataset.images[:1].nbytes, 1), 1)
    for start in range(0, len(resident), step):
        resident[start : start + step] = torch.from_numpy(np.array(dataset.images[start : start + step])).to(device)
    return ResidentDataset(**vars(dataset), resident=resident)


def fits(n_bytes: int, device: torch.device) -> bool:
    """Return whether images are kept on a device by default.

    Args:
        n_bytes: size of the images.
        device: the device.

    Returns:
        True if the device is a GPU and the images take at most FREE_SHARE of its free memory.
    """
    return device.type == "cuda" and n_bytes <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]
