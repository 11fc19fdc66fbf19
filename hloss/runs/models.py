"""Networks that map uint8 images (n, channels, height, width) to embeddings (n, d).

A network scales its RGB or grey input and L2-normalises its output. With `normalize=False` it does not normalise;
lifted structure is defined on such embeddings. A network consists of `scale`, `backbone`, `dropout` and `embedding`.
Only the backbone can have pretrained weights.

The networks of the paper have no BatchNorm. GoogLeNet of torchvision has a BatchNorm layer after every convolution, and
the glyph network has four. The setting `batchnorm` selects the statistics that they use in training (`BATCHNORMS`):

- live: statistics of the whole batch, synchronised over devices. A batch cannot be embedded in slices.
- frozen: running statistics of the initial weights; scale and shift are trained. The embedding of an image does not
  depend on other images, so slices and devices do not change it. This is the default with pretrained weights: batches
  of few classes have other statistics than ImageNet, with which the weights were trained.
- slices: statistics of each slice of `micro_batch` images; without slices, of each device's share of the batch. The
  result differs from live. The gradient is exact for the loss that was computed.
"""

from collections.abc import Callable
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hloss.runs.images import channels_last, stripes

NETWORKS = ("glyphnet", "parts", "googlenet", "pixels")
TORCHVISION = "torchvision:"
BATCHNORMS = ("live", "frozen", "slices")
NO_WEIGHTS, IMAGENET = "none", "imagenet"
# The weights of these models in torchvision come from other authors, who scaled images to [-1, 1]. The models have
# auxiliary classifiers.
INCEPTIONS = ("googlenet", "inception_v3")


class Embedder(nn.Module):
    """Network of a backbone and a linear layer: scale, backbone, dropout, linear layer, L2 normalisation.

    Args:
        scale: module that maps uint8 images to the input of the backbone.
        backbone: module whose output, flattened, has `n_features` features per image.
        n_features: number of features of the backbone.
        embedding_dim: dimensions of the embedding.
        dropout: dropout probability of the features.
        normalize: whether embeddings are L2-normalised.
    """

    def __init__(
        self,
        scale: nn.Module,
        backbone: nn.Module,
        n_features: int,
        embedding_dim: int,
        dropout: float,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Linear(n_features, embedding_dim)
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: uint8 (n, c, h, w).

        Returns:
            Embeddings (n, embedding_dim), of dtype float32 or higher precision.
        """
        return normalized(self.embedding(self.dropout(self.backbone(self.scale(images)).flatten(1))), self.normalize)


def normalized(embeddings: Tensor, normalize: bool = True) -> Tensor:
    """L2-normalise embeddings in float32 or higher precision; half precision would give norms of 1 +- 0.004.

    Args:
        embeddings: floating-point (n, d).
        normalize: if False, only convert half precision to float32.

    Returns:
        (n, d), float32 for half-precision embeddings, else of the same dtype.
    """
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    return F.normalize(embeddings) if normalize else embeddings


class Scale(nn.Module):
    """Scale pixels to (pixel / 255 - mean) / std per channel, in the dtype of the network.

    A grey image is broadcast to the number of channels of `mean`.

    Args:
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (n, c, h, w) to floating-point (n, channels of `mean`, h, w)."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


class PartsScale(nn.Module):
    """Cut RGB images into three stripes with channels in BGR order, and divide pixels by 256."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1 / 256), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (n, 3, 160, 60) to floating-point (n, 9, 60, 60)."""
        return stripes(images.flip(1)).to(self.factor.dtype) * self.factor


class PartsBackbone(nn.Module):
    """Convolutions of the network for re-identification (DML, Yi et al. 2014), as the paper's authors released it.

    The three stripes of an image share `conv1`, and each has its own `conv2`. Images of both cameras use the same
    weights. With a 500-dimensional embedding the network has 21.9 M parameters, 98.5 % of them in the linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, padding=3)
        self.conv2 = nn.ModuleList(nn.Conv2d(64, 64, 5, padding=2) for _ in range(3))
        for convolution in (self.conv1, *self.conv2):
            _gaussian(convolution, 0.01)

    def forward(self, parts: Tensor) -> Tensor:
        """Map stripes (n, 9, 60, 60) to features (n, 192, 15, 15)."""
        pairs = zip(parts.chunk(3, dim=1), self.conv2, strict=True)
        return torch.cat([_relu_pool(own(_relu_pool(self.conv1(part)))) for part, own in pairs], dim=1)


def _relu_pool(features: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(features, inplace=True), 2)


def _gaussian(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw weights and biases from a normal distribution with mean 0, as in the released network."""
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.normal_(layer.bias, std=std)


def glyph_backbone(channels: int) -> nn.Sequential:
    """Backbone for the built-in dataset glyphs: four 3x3 convolutions with BatchNorm, ReLU and pooling.

    Args:
        channels: number of channels of the images.

    Returns:
        A module that maps (n, channels, 32, 32) to (n, 64, 2, 2).
    """
    widths = (channels, 16, 32, 64, 64)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2 if i == 0 else 1, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2) if i else nn.Identity(),
            )
            for i, (before, after) in enumerate(pairwise(widths))
        )
    )


class Pixels(nn.Module):
    """Raw-pixels baseline: pixels minus the mean of the image, so that the cosine similarity is a correlation."""

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (n, c, h, w) to unit vectors, float32 (n, c h w + 1)."""
        pixels = images.float().flatten(1)
        pixels = F.pad(
            pixels - pixels.mean(1, keepdim=True), (0, 1), value=1e-3
        )  # The constant gives a uniform image a direction.
        return F.normalize(pixels)


def is_known_network(name: str) -> bool:
    """Whether `name` is one of NETWORKS, or `torchvision:NAME` for a classification model of torchvision."""
    return name in NETWORKS or name.removeprefix(TORCHVISION) in (torchvision_names() if _is_torchvision(name) else ())


def torchvision_names() -> list[str]:
    """Names of the classification models in the installed torchvision."""
    from torchvision import models  # Imported here because the import takes a second and most runs do not need it.

    return models.list_models(module=models)


def has_pretrained_part(name: str) -> bool:
    """Whether the backbone of a network can have pretrained weights."""
    return name == "googlenet" or _is_torchvision(name)


def network_defaults(name: str, weights: str) -> dict[str, Any]:
    """Default settings of a network: those of the paper, adapted to pretrained weights.

    Args:
        name: name of the network.
        weights: initial weights of the backbone: "none", "imagenet" or the path of a file.

    Returns:
        `embedding_dim` (glyphnet 128, parts 500, others 512), `dropout` (parts 0.5, others 0), `batchnorm` (frozen with
        pretrained weights, else live) and `pretrained_lr_factor` (0.1 with pretrained weights, else 1).
    """
    pretrained = weights != NO_WEIGHTS
    return {
        "embedding_dim": {"glyphnet": 128, "parts": 500}.get(name, 512),
        "dropout": 0.5 if name == "parts" else 0.0,
        "batchnorm": "frozen" if pretrained else "live",
        "pretrained_lr_factor": 0.1 if pretrained else 1.0,
    }


def build_network(
    name: str,
    image_shape: tuple[int, int, int],
    embedding_dim: int,
    dropout: float = 0.0,
    weights: str = NO_WEIGHTS,
    normalize: bool = True,
) -> nn.Module:
    """Build a network, initialised from torch's global generator and set to training mode.

    Args:
        name: name of the network; see `is_known_network`.
        image_shape: height, width and channels of the images.
        embedding_dim: dimensions of the embedding.
        dropout: dropout probability of the features, in [0, 1).
        weights: initial weights of the backbone: "none" (random), "imagenet" (torchvision downloads them), or the path
            of a file with a state dict of the torchvision model.
        normalize: whether embeddings are L2-normalised.

    Returns:
        A module that maps uint8 (n, channels, height, width) to embeddings (n, embedding_dim). The network "pixels"
        ignores all arguments but its name.

    Raises:
        ValueError: the network does not accept images of this shape, or the weights are missing or do not fit.
    """
    if name == "pixels":
        return Pixels()
    scale, backbone = _scale_and_backbone(name, image_shape, weights)
    height, width, channels = image_shape
    backbone.eval()
    with torch.no_grad():
        try:
            features = backbone(scale(torch.zeros(1, channels, height, width, dtype=torch.uint8))).flatten(1)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"network={name!r} does not accept images of {height} x {width} pixels: {error}") from None
    network = Embedder(scale, backbone, features.shape[1], embedding_dim, dropout, normalize)
    if name == "parts":
        _gaussian(network.embedding, 0.001)
    # Channels last saves a third of the time of convolutions and pooling on a CPU; torch 2.6 does not declare it.
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    network.to(**layout)
    return network.train()


def _scale_and_backbone(name: str, image_shape: tuple[int, int, int], weights: str) -> tuple[nn.Module, nn.Module]:
    """The input scaling and the backbone of a network."""
    channels = image_shape[2]
    if name == "glyphnet":
        return Scale((0.5,) * channels, (0.5,) * channels), glyph_backbone(channels)
    if name == "parts":
        if image_shape != (160, 60, 3):
            raise ValueError(f'network="parts" requires images of shape (160, 60, 3): got {image_shape}')
        return PartsScale(), PartsBackbone()
    if channels not in (1, 3):
        raise ValueError(f"network={name!r} requires images with 1 or 3 channels: got {channels}")
    return torchvision_backbone(name.removeprefix(TORCHVISION), weights)


def torchvision_backbone(name: str, weights: str) -> tuple[nn.Module, nn.Module]:
    """Build the input scaling and the backbone from a torchvision model.

    The last linear layer, the dropout layers directly before it and the auxiliary classifiers are removed. The input is
    scaled as the model's ImageNet weights require, also if the weights are random.

    Args:
        name: name of a classification model of torchvision.
        weights: "none" (random), "imagenet", or the path of a file with a state dict of the model.

    Returns:
        The scaling and the backbone.

    Raises:
        ValueError: the model has no linear layer, or the weights are missing or do not fit.
    """
    from torchvision import models

    own = {"aux_logits": False, "init_weights": True, "transform_input": False} if name in INCEPTIONS else {}
    backbone = models.get_model(name, weights=None, **own)
    heads = [key for key, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise ValueError(
            f"network='{TORCHVISION}{name}' has no linear layer that the embedding can replace; use another model"
        )
    for key in [heads[-1], *_dropouts_before(backbone, heads[-1])]:
        backbone.set_submodule(key, nn.Identity())
    if weights != NO_WEIGHTS:
        _load_backbone(backbone, load_weights(name, weights), heads[-1], f"{weights!r} for network {name!r}")
    if name in INCEPTIONS:
        return Scale((0.5,) * 3, (0.5,) * 3), backbone
    preset = models.get_model_weights(name).DEFAULT.transforms()
    return Scale(tuple(preset.mean), tuple(preset.std)), backbone


def _dropouts_before(backbone: nn.Module, head: str) -> list[str]:
    """Names of the dropout layers directly before a layer, in the order in which torchvision registers layers."""
    leaves = [key for key, module in backbone.named_modules() if not any(module.children())]
    before = reversed(leaves[: leaves.index(head)])
    return list(takewhile(lambda key: isinstance(backbone.get_submodule(key), nn.Dropout), before))


def load_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Load a state dict for a torchvision model.

    Args:
        name: name of a classification model of torchvision.
        weights: "imagenet" (torchvision downloads the weights or reads them from its cache), or the path of a file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: the weights cannot be downloaded, or the file does not exist or is not a state dict.
    """
    if weights == IMAGENET:
        from torchvision import models

        try:
            return models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ValueError(
                f'weights="imagenet" cannot be downloaded ({error}); '
                "download the file on another machine and set weights to its path"
            ) from None
    if not Path(weights).is_file():
        raise ValueError(f'weights={weights!r} does not exist; allowed are "none", "imagenet" and the path of a file')
    try:
        return dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many types on a truncated or foreign file.
        raise ValueError(f"weights={weights!r} is not a readable state dict: {error}") from None


def _load_backbone(backbone: nn.Module, given: dict[str, Tensor], head: str, weights: str) -> None:
    """Load all tensors of the backbone; `given` may contain other tensors only of classifiers."""
    own = backbone.state_dict()
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    unknown = [k for k in given if k not in own and not k.startswith((f"{head}.", "aux", "AuxLogits"))]
    reshaped = [k for k in own if k in given and own[k].shape != given[k].shape]
    if missing or unknown or reshaped:
        raise ValueError(
            f"weights={weights} do not fit: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}, {len(reshaped)} have another shape {reshaped[:3]}; "
            "use the state dict of the same torchvision model"
        )
    backbone.load_state_dict({k: given.get(k, own[k]) for k in own})


def _is_torchvision(name: str) -> bool:
    return name.startswith(TORCHVISION)


def batchnorms(network: nn.Module) -> list[nn.Module]:
    """BatchNorm layers of a network."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def training_mode(network: nn.Module, batchnorm: str) -> None:
    """Set a network to training mode.

    Args:
        network: the network.
        batchnorm: one of BATCHNORMS; "frozen" sets the BatchNorm layers to evaluation mode.
    """
    network.train()
    if batchnorm == "frozen":
        for layer in batchnorms(network):
            layer.eval()


def _for_gpu(images: Tensor) -> Tensor:
    """Copy GPU images to channels last, because cuDNN chooses algorithms by memory layout; return CPU images as is."""
    return channels_last(images) if images.is_cuda else images


def embed(network: nn.Module, images: Callable[[slice], Tensor], n: int, batch: int = 128) -> Tensor:
    """Embed images in evaluation mode, batch by batch; the modes of the network's modules are restored afterwards.

    Args:
        network: maps uint8 images (n, c, h, w) to embeddings (n, d).
        images: called with slices of range(n); returns these images on the network's device.
        n: number of images, at least 1.
        batch: images per batch.

    Returns:
        Embeddings, float32 (n, d) on the network's device.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        found = [network(_for_gpu(images(slice(i, min(i + batch, n))))).float() for i in range(0, n, batch)]
    for module, mode in modes:
        module.training = mode
    return torch.cat(found)
