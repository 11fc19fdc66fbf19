"""Load a complete run with its trained network, to embed images; find the networks that the runs of a study kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hloss.runs.config import RunConfig, parse_config
from hloss.runs.errors import NetworkError
from hloss.runs.evaluation import weights_sha256
from hloss.runs.files import NETWORK_FILE, read_result
from hloss.runs.images import BadImage, ImageSettings, center_crop
from hloss.runs.models import NO_WEIGHTS, embed, has_pretrained_part
from hloss.runs.process import default_dtype, torch_threads
from hloss.runs.run import network_for

REMEDY = "delete the run's folder and run it again with keep_network=True"


@dataclass(frozen=True)
class LoadedRun:
    """A complete run and its trained network.

    Attributes:
        config: the run's settings.
        result: the content of its `result.json`.
        card: the card of its dataset.
        network: the trained network, on `device`.
        device: where it embeds.
    """

    config: RunConfig
    result: dict[str, Any]
    card: dict[str, Any]
    network: nn.Module
    device: torch.device

    def embed(self, images: np.ndarray | str | Path | Sequence[str | Path]) -> Tensor:
        """Embed images as the run embedded its test images.

        Args:
            images: uint8 (n, h, w, c), of the size and channels of the run's dataset; or one image file or several, of
                any size. Files are decoded and resized as those of the dataset were. For a dataset without files
                (glyphs) they are stretched to its size; for a grey dataset they become grey. The run's central crop
                follows in all cases.

        Returns:
            Embeddings, float32 (n, d) on the CPU.

        Raises:
            ValueError: there are no images, or the array has another shape or dtype.
            BadImage: a file is no image that can be used; the message names it.
        """
        chosen: Any = [images] if isinstance(images, str | Path) else images
        if not len(chosen):
            raise ValueError("images is empty: there is nothing to embed")
        read = self._copy if isinstance(chosen, np.ndarray) else self._read

        def batch(part: slice) -> Tensor:
            pixels = torch.from_numpy(read(chosen[part])).permute(0, 3, 1, 2)
            return center_crop(pixels, self.config.crop).to(self.device)

        with torch_threads(self.config.threads):  # the number of threads may change the last bits
            return embed(self.network, batch, len(chosen))

    def _copy(self, images: np.ndarray) -> np.ndarray:
        """The images, which may be read-only, as a new array. ValueError if they are not like those of the dataset."""
        height, width, channels = self.card["image_shape"]
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images must be uint8 of shape (n, {height}, {width}, {channels}): got {images.dtype} {images.shape}; "
                "give image files to have them resized"
            )
        return images.copy()

    def _read(self, files: Sequence[str | Path]) -> np.ndarray:
        """The pixels of image files as the dataset would hold them, uint8 (n, h, w, c)."""
        height, width, channels = self.card["image_shape"]
        given = self.card.get("settings", {})
        prepare = ImageSettings(height, width, given.get("fit", "stretch"), given.get("crop"))
        pixels = []
        for file in files:
            try:
                pixels.append(prepare(Path(file).read_bytes()))
            except BadImage as error:
                raise BadImage(f"{file}: {error}") from error
        if channels == 1:
            pixels = [np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in pixels]
        return np.stack(pixels)


def load_run(folder: str | Path, device: str = "cpu") -> LoadedRun:
    """Load a complete run with its trained network, also from a folder that was moved or without its dataset.

    Example:
        >>> run = load_run("runs/glyphs/0123456789ab")  # doctest: +SKIP
        >>> embeddings = run.embed(["one.png", "other.png"])  # doctest: +SKIP

    Args:
        folder: the run's folder, `runs/STUDY/RUN_ID`.
        device: where to embed: cpu, cuda or cuda:NUMBER. Embeddings equal the run's own bit for bit on the same kind of
            device.

    Raises:
        NetworkError: the run is not complete, or `network.pt` is missing or not the run's own network.
        ConfigError: this version of the code does not know a setting of the run.
    """
    folder = Path(folder)
    result = read_result(folder)
    if result is None:
        raise NetworkError(f"{folder} holds no result.json, so it is no complete run; complete it by running it again")
    if "card" not in result:
        raise NetworkError(f"{folder / 'result.json'} has no card of the dataset: an older version wrote it; {REMEDY}")
    config = _config_of(result)
    network = _own_network(config, result, folder / NETWORK_FILE)
    return LoadedRun(config, result, result["card"], network.to(device), torch.device(device))


def _config_of(result: dict[str, Any]) -> RunConfig:
    """The settings in a result, where those of execution have their defaults, but for the study and the threads."""
    settings = dict(result["config"])
    if not has_pretrained_part(settings["network"]):
        del settings["pretrained_lr_factor"]  # a default that cannot be given
    return parse_config({**settings, "study": result["study"], "threads": result["provenance"]["threads"]})


def _own_network(config: RunConfig, result: dict[str, Any], file: Path) -> nn.Module:
    """The network with the weights in `file`. NetworkError if they are not those that the result names."""
    if not file.exists():
        raise NetworkError(f"{file} does not exist: the run did not keep its network, or it was deleted; {REMEDY}")
    with torch.random.fork_rng(devices=[]), default_dtype(config.precision):
        network = network_for(config, tuple(result["card"]["image_shape"]), NO_WEIGHTS)
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises nearly anything on a truncated or foreign file
        raise NetworkError(f"{file} cannot be loaded ({type(error).__name__}: {error}); {REMEDY}") from error
    if weights_sha256(network) != result["network_sha256"]:
        raise NetworkError(f"{file} is not the network of run {result['run_id']}: its hash differs; {REMEDY}")
    return network


def kept_networks(study_folder: Path) -> list[Path]:
    """The files of the networks that the complete runs in a study's folder kept, by run id."""
    return sorted(file for file in study_folder.glob(f"*/{NETWORK_FILE}") if read_result(file.parent))
