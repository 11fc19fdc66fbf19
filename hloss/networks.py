"""The networks that embed images: each maps uint8 images (n, channels, height, width) to embeddings (n, d), float32.

A network scales its own input, so that whoever holds one can feed it images. The loss and the retrieval normalise.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GlyphNet(nn.Module):
    """The small network of the embedded dataset: four 3x3 convolutions with BatchNorm and pooling, then linear."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64, 64)
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2 if i == 0 else 1, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2) if i else nn.Identity(),
            )
            for i, (before, after) in enumerate(pairwise(widths))
        ]
        self.features = nn.Sequential(*blocks)
        self.embedding = nn.LazyLinear(embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.features(images.float() / 127.5 - 1).flatten(1))


class Pixels(nn.Module):
    """The raw-pixels baseline: an image less its own mean, flattened (so that the cosine is a correlation)."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float().flatten(1)
        return F.pad(pixels - pixels.mean(1, keepdim=True), (0, 1), value=1e-3)  # a blank image has a direction too


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "glyphnet": GlyphNet,
    "pixels": lambda channels, embedding_dim: Pixels(),
}


def build_network(name: str, image_shape: tuple[int, int, int], embedding_dim: int) -> nn.Module:
    """A network by name for images of (height, width, channels), initialised from torch's generator."""
    height, width, channels = image_shape
    network = NETWORKS[name](channels, embedding_dim)
    network.eval()
    with torch.no_grad():
        network(torch.zeros(1, channels, height, width, dtype=torch.uint8))  # settles the lazy layers
    return network.train()


def embed(network: nn.Module, images: Callable[[slice], Tensor], n: int, batch: int = 512) -> Tensor:
    """Embeddings (n, d) on the CPU of `images(slice)` in evaluation mode, batch by batch."""
    was_training = network.training
    network.eval()
    with torch.no_grad():
        found = [network(images(slice(i, min(i + batch, n)))).float().cpu() for i in range(0, n, batch)]
    network.train(was_training)
    return torch.cat(found)
