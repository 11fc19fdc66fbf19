"""Images of a dataset on the device of a run, so that a training step copies no pixels from main memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hloss.runs.datasets import Dataset
from hloss.runs.images import Views

COPIED_BYTES = 2**26  # copied to the device at once
FREE_SHARE = 0.5  # of the GPU's free memory: the most that images="auto" takes


@dataclass(frozen=True)
class ResidentDataset(Dataset):
    """A prepared dataset with a copy of all its images on a device.

    Attributes:
        resident: the images, uint8 (n, height, width, channels).
    """

    resident: Tensor

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images of the given rows, uint8 (n, channels, height, width), on the device, channels last."""
        (index,) = send(np.asarray(rows)[None], self.resident.device)
        return self.resident[index].permute(0, 3, 1, 2)

    def batch(self, rows: np.ndarray, labels: np.ndarray, views: Views | None) -> tuple[Tensor, Tensor]:
        """A batch of training images and its labels on the device, with one copy to it, which the host does not await.

        Args:
            rows: of the dataset's index, int64 (n,).
            labels: int64 (n,).
            views: the crops and flips of these images; None for whole images.

        Returns:
            uint8 (n, channels, rows, columns), channels last, equal to `augment`'s; and int64 (n,).
        """
        if views is None:
            index, found = send(np.stack([rows, labels]), self.resident.device)
            return self.resident[index].permute(0, 3, 1, 2), found
        tops, lefts, flips = (part.numpy() for part in views[:3])
        starts, steps = lefts + (views.columns - 1) * flips, 1 - 2 * flips.astype(np.int64)
        index, found, top, start, step = send(np.stack([rows, labels, tops, starts, steps]), self.resident.device)
        down = top[:, None] + torch.arange(views.rows, device=top.device)
        across = torch.addcmul(start[:, None], step[:, None], torch.arange(views.columns, device=top.device))
        return self.resident[index[:, None, None], down[:, :, None], across[:, None]].permute(0, 3, 1, 2), found


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A small array as a tensor on a device; the host does not wait for a GPU."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def place_images(dataset: Dataset, where: str, device: torch.device) -> Dataset:
    """The dataset with its images where the setting `images` wants them.

    Args:
        dataset: the prepared dataset.
        where: "device", "host", or "auto": on a GPU if they take at most FREE_SHARE of its free memory.
        device: the device of the run.
    """
    if where == "host" or (where == "auto" and not fits(dataset.images.nbytes, device)):
        return dataset
    resident = torch.empty(dataset.images.shape, dtype=torch.uint8, device=device)
    step = max(COPIED_BYTES // max(dataset.images[:1].nbytes, 1), 1)
    for start in range(0, len(resident), step):
        resident[start : start + step] = torch.from_numpy(np.array(dataset.images[start : start + step])).to(device)
    return ResidentDataset(**vars(dataset), resident=resident)


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether the images take at most FREE_SHARE of the free memory of a GPU."""
    return device.type == "cuda" and n_bytes <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]
