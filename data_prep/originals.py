"""Descriptions of the original archives, and the list of prepared datasets."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Original:
    """A published dataset and its original archive.

    Attributes:
        name: Name on the command line, and default folder name.
        title: Title with authors and year.
        file: File name of the archive.
        page: Download page.
        licence: Terms of use.
        images: Number of prepared images with the default settings.
        image_bytes: Bytes of one prepared image with the default settings.
        size: Bytes of the archive; None if not published.
        md5: MD5 checksum in hexadecimal; None if not published.
        sha256: SHA-256 checksum in hexadecimal; None if not published.
    """

    name: str
    title: str
    file: str
    page: str
    licence: str
    images: int
    image_bytes: int
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    def checksums(self) -> dict[str, str]:
        """Return the published checksums by algorithm."""
        known = {"md5": self.md5, "sha256": self.sha256}
        return {name: digest for name, digest in known.items() if digest}

    def describe(self) -> list[str]:
        """Return the lines that `list` prints: archive, download page, checksums, terms, command and disk space."""
        size = f"{self.size:,} bytes" if self.size else "size not published"
        return [
            f"{self.title}: {self.images:,} images",
            f"download {self.file} ({size}) from {self.page}",
            *(f"{name:<8} {digest}" for name, digest in self.checksums().items()),
            f"terms    {self.licence}",
            f"prepare  python -m data_prep {self.name} --source {self.file}",
            f"space    {self.images * self.image_bytes / 1e9:.1f} GB prepared",
        ]


def card_summary(card: dict) -> str:
    """Return the numbers of images and of classes per split, in one line."""
    per_split = ", ".join(f"{split} {n:,}" for split, n in card["classes"].items())
    return f"{card['images']:,} images of {sum(card['classes'].values()):,} classes ({per_split})"


def status(folder: Path) -> str:
    """Return, in one line, whether a folder is a prepared dataset, with its counts and size in GB."""
    file = folder / "card.json"
    if not file.exists():
        return "not prepared"
    size = (folder / "images.npy").stat().st_size if (folder / "images.npy").exists() else 0
    try:
        return f"prepared in {folder}: {card_summary(json.loads(file.read_text()))}, {size / 1e9:.2f} GB"
    except (ValueError, KeyError):
        return f"damaged: {file} is not a valid card; prepare the dataset again"


def dataset_list(descriptions: dict[str, list[str]], data: Path) -> str:
    """Return the text of `list`: every dataset that can be prepared, then the other prepared ones.

    Args:
        descriptions: Lines about each dataset that can be prepared, by name.
        data: The folder of the prepared datasets.

    Returns:
        One block of lines per dataset, each starting with its name and status.
    """
    others = {p.parent.name for p in data.glob("*/card.json") if not p.parent.name.startswith(".")} - set(descriptions)
    blocks = []
    for name, lines in [*descriptions.items(), *((name, []) for name in sorted(others))]:
        blocks.append("\n".join([f"{name}: {status(data / name)}", *(f"    {line}" for line in lines)]))
    return "\n\n".join(blocks)
