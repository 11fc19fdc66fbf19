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
        (index,) = send(torch.from_numpy(np.asarray(rows))[None], self.resident.device)
        return self.resident[index].permute(0, 3, 1, 2)

    def batch(self, rows: np.ndarray, labels: Tensor, views: Views | None) -> tuple[Tensor, Tensor]:
        """A batch of training images and its labels on the device, with one copy to it, which the host does not await.

        Args:
            rows: of the dataset's index, (n,).
            labels: int64 (n,), on the CPU.
            views: the crops and flips of these images; None for whole images.

        Returns:
            uint8 (n, channels, rows, columns), channels last, equal to `augment`'s; and int64 (n,).
        """
        numbers = [torch.from_numpy(rows), labels]
        if views is None:
            index, labels = send(torch.stack(numbers), self.resident.device)
            return self.resident[index].permute(0, 3, 1, 2), labels
        starts = torch.where(views.flips, views.lefts + views.columns - 1, views.lefts)
        numbers += [views.tops, starts, 1 - 2 * views.flips.long()]
        index, labels, tops, starts, steps = send(torch.stack(numbers), self.resident.device)[:, :, None]
        down = tops + torch.arange(views.rows, device=index.device)
        across = torch.addcmul(starts, steps, torch.arange(views.columns, device=index.device))
        cut = self.resident[index[:, :, None], down[:, :, None], across[:, None]]
        return cut.permute(0, 3, 1, 2), labels[:, 0]


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy of a small CPU tensor on a device; the host does not wait for a GPU."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


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
