"""The networks that embed images: each maps uint8 images (n, channels, height, width) to embeddings (n, d).

A network scales its own input, so that whoever holds one can feed it images, RGB or grey. Its last step is the L2
normalisation, unless it was built without: lifted structure is defined on raw embeddings. Three parts in all:
`backbone` (what may come pretrained), `dropout`, `embedding` (always new).

BatchNorm. The networks of the paper have none; torchvision's GoogLeNet has one behind every convolution, and the small
glyph network has four. Three ways to treat them are told apart (`BATCHNORMS`):

live    statistics of the whole batch. Over several devices they are synchronised; a batch embedded in slices has none.
frozen  the running statistics that came with the weights, scale and shift still trained. No image depends on another,
        so slices and devices change nothing. The default with pretrained weights: the sampler's batches hold few
        classes, and statistics of ImageNet stand behind the weights.
slices  each slice of a micro-batch, and each device, by its own statistics: another network than live, cheap and exact
        in the sense that its gradient is the gradient of what was computed.
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
# torchvision's weights for these were trained by others on images scaled to [-1, 1], and have auxiliary classifiers.
INCEPTIONS = ("googlenet", "inception_v3")


class Embedder(nn.Module):
    """Scaled images -> backbone -> dropout -> linear -> L2 norm 1 (unless `normalize` is False)."""

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
        """Embeddings (n, d) of uint8 images (n, c, h, w)."""
        return normalized(self.embedding(self.dropout(self.backbone(self.scale(images)).flatten(1))), self.normalize)


def normalized(embeddings: Tensor, normalize: bool = True) -> Tensor:
    """Embeddings at L2 norm 1, in float32 at least: half precision would leave norms of 1 +- 0.004."""
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    return F.normalize(embeddings) if normalize else embeddings


class Scale(nn.Module):
    """(pixel / 255 - mean) / std per channel, in the network's dtype; a grey image gets as many channels as `mean`."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


class PartsScale(nn.Module):
    """Of an RGB image (n, 3, 160, 60) its three stripes in BGR, (n, 9, 60, 60), divided by 256; no mean is taken."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1 / 256), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return stripes(images.flip(1)).to(self.factor.dtype) * self.factor


class PartsBackbone(nn.Module):
    """The convolutions of the three-part re-ID network (DML, Yi et al. 2014) as the authors released it.

    (n, 9, 60, 60), three stripes of three channels -> (n, 192, 15, 15). conv1 is one for all stripes, conv2 one for
    each; both cameras share everything. With 500 dimensions 21.9 M parameters, 98.5 % of them in the inner product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, padding=3)
        self.conv2 = nn.ModuleList(nn.Conv2d(64, 64, 5, padding=2) for _ in range(3))
        for convolution in (self.conv1, *self.conv2):
            _gaussian(convolution, 0.01)

    def forward(self, parts: Tensor) -> Tensor:
        pairs = zip(parts.chunk(3, dim=1), self.conv2, strict=True)
        return torch.cat([_relu_pool(own(_relu_pool(self.conv1(part)))) for part, own in pairs], dim=1)


def _relu_pool(features: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(features, inplace=True), 2)


def _gaussian(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Weights and biases from N(0, std): the released network draws its biases, too."""
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.normal_(layer.bias, std=std)


def glyph_backbone(channels: int) -> nn.Sequential:
    """The small network of the embedded dataset: four 3x3 convolutions with BatchNorm and pooling."""
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
    """The raw-pixels baseline: an image less its own mean, flattened (so that the cosine is a correlation)."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float().flatten(1)
        pixels = F.pad(pixels - pixels.mean(1, keepdim=True), (0, 1), value=1e-3)  # a blank image has a direction too
        return F.normalize(pixels)


def is_known_network(name: str) -> bool:
    """Whether a network goes by this name; `torchvision:NAME` for every classification model of torchvision."""
    return name in NETWORKS or name.removeprefix(TORCHVISION) in (torchvision_names() if _is_torchvision(name) else ())


def torchvision_names() -> list[str]:
    """The classification models of the installed torchvision."""
    from torchvision import models  # here, because it takes a second that most runs need not spend

    return models.list_models(module=models)


def has_pretrained_part(name: str) -> bool:
    """Whether weights can be given for the network's backbone."""
    return name == "googlenet" or _is_torchvision(name)


def network_defaults(name: str, weights: str) -> dict[str, Any]:
    """The settings a network has unless told otherwise: the paper's, and what the weights ask for."""
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
    """A network by name for images of (height, width, channels), initialised from torch's generator.

    weights: `none`, `imagenet` (torchvision's, fetched by torchvision where there is a network), or the path of a file
    with a state dict of torchvision's model. ValueError for images that the network cannot take and for other weights.
    """
    if name == "pixels":
        return Pixels()
    scale, backbone = _parts_of(name, image_shape, weights)
    height, width, channels = image_shape
    backbone.eval()
    with torch.no_grad():
        try:
            features = backbone(scale(torch.zeros(1, channels, height, width, dtype=torch.uint8))).flatten(1)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"network={name!r} cannot take images of {height} x {width} pixels: {error}") from None
    network = Embedder(scale, backbone, features.shape[1], embedding_dim, dropout, normalize)
    if name == "parts":
        _gaussian(network.embedding, 0.001)
    network.to(memory_format=torch.channels_last)  # a third less time for convolutions and pooling on a CPU
    return network.train()


def _parts_of(name: str, image_shape: tuple[int, int, int], weights: str) -> tuple[nn.Module, nn.Module]:
    """The input scaling and the backbone of a network."""
    channels = image_shape[2]
    if name == "glyphnet":
        return Scale((0.5,) * channels, (0.5,) * channels), glyph_backbone(channels)
    if name == "parts":
        if image_shape != (160, 60, 3):
            raise ValueError(f'network="parts" takes RGB images of 160 x 60 pixels, these are {image_shape}')
        return PartsScale(), PartsBackbone()
    if channels not in (1, 3):
        raise ValueError(f"network={name!r} takes images of 1 or 3 channels, these have {channels}")
    return torchvision_backbone(name.removeprefix(TORCHVISION), weights)


def torchvision_backbone(name: str, weights: str) -> tuple[nn.Module, nn.Module]:
    """The input scaling and the body of a torchvision model: its last linear layer and auxiliary heads are left out.

    So is torchvision's dropout of what that layer sees: only the run's own setting drops any. The input is scaled as
    the model's ImageNet weights require, also where there are none.
    """
    from torchvision import models

    own = {"aux_logits": False, "init_weights": True, "transform_input": False} if name in INCEPTIONS else {}
    backbone = models.get_model(name, weights=None, **own)
    heads = [key for key, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise ValueError(f"network='{TORCHVISION}{name}' has no linear layer that an embedding could replace")
    for key in [heads[-1], *_dropouts_before(backbone, heads[-1])]:
        backbone.set_submodule(key, nn.Identity())
    if weights != NO_WEIGHTS:
        _load(backbone, weights_of(name, weights), heads[-1], f"{weights} for network {name!r}")
    if name in INCEPTIONS:
        return Scale((0.5,) * 3, (0.5,) * 3), backbone
    preset = models.get_model_weights(name).DEFAULT.transforms()
    return Scale(tuple(preset.mean), tuple(preset.std)), backbone


def _dropouts_before(backbone: nn.Module, head: str) -> list[str]:
    """The names of the dropouts right before a layer; torchvision's models hold their last layers in order."""
    leaves = [key for key, module in backbone.named_modules() if not any(module.children())]
    before = reversed(leaves[: leaves.index(head)])
    return list(takewhile(lambda key: isinstance(backbone.get_submodule(key), nn.Dropout), before))


def weights_of(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of torchvision's ImageNet weights, or of a local file."""
    if weights == IMAGENET:
        from torchvision import models

        try:
            return models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise ValueError(
                f'weights="imagenet" could not be fetched ({error}); fetch the file elsewhere and give its path'
            ) from None
    if not Path(weights).is_file():
        raise ValueError(f'weights={weights!r} is neither "none" nor "imagenet" nor a file that exists')
    try:
        return dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a file that is no state dict makes torch say
        raise ValueError(f"weights={weights!r} cannot be read as a state dict: {error}") from None


def _load(backbone: nn.Module, given: dict[str, Tensor], head: str, what: str) -> None:
    """Load all of the backbone; what is left over may only be the classifiers."""
    wanted = backbone.state_dict()
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    other = [k for k in given if k not in wanted and not k.startswith((f"{head}.", "aux", "AuxLogits"))]
    shapes = [k for k in wanted if k in given and wanted[k].shape != given[k].shape]
    if missing or other or shapes:
        raise ValueError(
            f"weights={what} are another network's: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(other)} have no place {other[:3]}, {len(shapes)} have another shape {shapes[:3]}"
        )
    backbone.load_state_dict({k: given.get(k, wanted[k]) for k in wanted})


def _is_torchvision(name: str) -> bool:
    return name.startswith(TORCHVISION)


def batchnorms(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that have statistics of a batch."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def training_mode(network: nn.Module, batchnorm: str) -> None:
    """Set a network to train, its BatchNorm layers as `batchnorm` says."""
    network.train()
    if batchnorm == "frozen":
        for layer in batchnorms(network):
            layer.eval()


def _for_gpu(images: Tensor) -> Tensor:
    """Images on a GPU in one memory layout, which may decide how a convolution is computed; on a CPU as they are."""
    return channels_last(images) if images.is_cuda else images


def embed(network: nn.Module, images: Callable[[slice], Tensor], n: int, batch: int = 128) -> Tensor:
    """Embeddings (n, d), float32 on the network's device, of `images(slice)` in evaluation mode, batch by batch."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        found = [network(_for_gpu(images(slice(i, min(i + batch, n))))).float() for i in range(0, n, batch)]
    for module, mode in modes:
        module.training = mode
    return torch.cat(found)
