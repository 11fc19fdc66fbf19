"""Load a complete run with its trained network, and list the saved networks of a study."""

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
from hloss.runs.process import default_dtype, gpu_arithmetic, torch_threads
from hloss.runs.run import network_for

REMEDY = "delete the run's folder and start the run again with keep_network=True"


@dataclass(frozen=True)
class LoadedRun:
    """A complete run and its trained network.

    Attributes:
        config: the run's settings.
        result: the content of the run's `result.json`.
        card: the card of the run's dataset.
        network: the trained network, on `device`.
        device: the device of the network.
    """

    config: RunConfig
    result: dict[str, Any]
    card: dict[str, Any]
    network: nn.Module
    device: torch.device

    def embed(self, images: np.ndarray | str | Path | Sequence[str | Path]) -> Tensor:
        """Embed images as the run embedded its test images.

        Args:
            images: pixels or files. Pixels are uint8 (n, h, w, c), with the size and channels of the run's dataset.
                Files are one path or a list of paths, of images of any size. They are decoded and resized like the
                files of the dataset. For a dataset without image files (glyphs), they are stretched to the dataset's
                image size; for a grey dataset, they are converted to grey. Pixels and files are cropped at the centre
                as in the run.

        Returns:
            Embeddings, float32 (n, d) on the CPU.

        Raises:
            ValueError: there are no images, or the array has another shape or dtype.
            BadImage: a file is not a supported image; the message names it.
            OSError: a file cannot be read.
        """
        chosen: Any = [images] if isinstance(images, str | Path) else images
        if not len(chosen):
            raise ValueError("images is empty: got 0 images; give at least one")
        read = self._copy if isinstance(chosen, np.ndarray) else self._read

        def batch(part: slice) -> Tensor:
            pixels = torch.from_numpy(read(chosen[part])).permute(0, 3, 1, 2)
            return center_crop(pixels, self.config.crop).to(self.device)

        # The number of threads and the precision of matrix products may change the last bits.
        with torch_threads(self.config.threads), gpu_arithmetic(self.device, self.config.tf32):
            return embed(self.network, batch, len(chosen)).cpu()

    def _copy(self, images: np.ndarray) -> np.ndarray:
        """Check shape and dtype of images, and copy them because they may be read-only."""
        height, width, channels = self.card["image_shape"]
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images must be uint8 of shape (n, {height}, {width}, {channels}): got {images.dtype} {images.shape}; "
                "give the paths of image files to have them resized"
            )
        return images.copy()

    def _read(self, files: Sequence[str | Path]) -> np.ndarray:
        """Decode image files as for the dataset, uint8 (n, h, w, c)."""
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
    """Load a complete run with its trained network.

    Only the run's folder is read; it may have been moved, and the dataset is not needed.

    Example:
        >>> run = load_run("runs/glyphs/0123456789ab")  # doctest: +SKIP
        >>> embeddings = run.embed(["one.png", "other.png"])  # doctest: +SKIP

    Args:
        folder: the run's folder, `runs/STUDY/RUN_ID`.
        device: device for embedding: "cpu", "cuda" or "cuda:NUMBER". On the same kind of device, embeddings equal those
            of the run bit for bit.

    Returns:
        The run with its network; the method `embed` embeds images.

    Raises:
        NetworkError: the run is not complete, or `network.pt` is missing or is not the network of the run.
        ConfigError: this version of the code does not know a setting of the run.
    """
    folder = Path(folder)
    result = read_result(folder)
    if result is None:
        raise NetworkError(f"{folder} is not a complete run: it has no result.json; start the run again to complete it")
    if "card" not in result:
        raise NetworkError(f"{folder / 'result.json'} has no dataset card: an older version wrote it; {REMEDY}")
    config = _config_of(result)
    network = _own_network(config, result, folder / NETWORK_FILE)
    return LoadedRun(config, result, result["card"], network.to(device), torch.device(device))


def _config_of(result: dict[str, Any]) -> RunConfig:
    """Settings of a result, with the defaults for execution settings except study and threads."""
    settings = dict(result["config"])
    if not has_pretrained_part(settings["network"]):
        # A network without pretrained weights accepts no value, not even the default.
        del settings["pretrained_lr_factor"]
    return parse_config({**settings, "study": result["study"], "threads": result["provenance"]["threads"]})


def _own_network(config: RunConfig, result: dict[str, Any], file: Path) -> nn.Module:
    """Build the network and load its weights from `file`; NetworkError if their hash differs from the result's."""
    if not file.exists():
        raise NetworkError(
            f"{file} does not exist: the run did not save its network, or the file was deleted; {REMEDY}"
        )
    with torch.random.fork_rng(devices=[]), default_dtype(config.precision):
        network = network_for(config, tuple(result["card"]["image_shape"]), NO_WEIGHTS)
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many types on a truncated or foreign file.
        raise NetworkError(f"{file} cannot be loaded ({type(error).__name__}: {error}); {REMEDY}") from error
    if weights_sha256(network) != result["network_sha256"]:
        raise NetworkError(f"{file} is not the network of run {result['run_id']}: its hash differs; {REMEDY}")
    return network


def kept_networks(study_folder: Path) -> list[Path]:
    """List the saved networks of a study.

    Args:
        study_folder: the folder of the study, `runs/STUDY`.

    Returns:
        Paths of the files `network.pt` of complete runs, sorted by run id.
    """
    return sorted(file for file in study_folder.glob(f"*/{NETWORK_FILE}") if read_result(file.parent))
