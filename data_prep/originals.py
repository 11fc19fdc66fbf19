"""What is known of the original archives, and the listing of what is prepared."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Original:
    """A published dataset: its archive, where it is had on which terms, and what it takes when prepared.

    `size` is in bytes; None where it, or a checksum, is not published. `images` and `image_bytes` (of one prepared
    image) are those of the default settings.
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
        """Those that are known, by algorithm."""
        known = {"md5": self.md5, "sha256": self.sha256}
        return {name: digest for name, digest in known.items() if digest}

    def describe(self) -> list[str]:
        """For `list`: what to get, from where, on which terms."""
        size = f"{self.size:,} bytes" if self.size else "size not published"
        return [
            f"{self.title}: {self.images:,} images",
            f"get      {self.file} ({size}) from {self.page}",
            *(f"{name:<8} {digest}" for name, digest in self.checksums().items()),
            f"terms    {self.licence}",
            f"prepare  python -m data_prep {self.name} --source {self.file}",
            f"takes    {self.images * self.image_bytes / 1e9:.1f} GB prepared",
        ]


def state(folder: Path) -> str:
    """In one line, what a folder of `data/` holds."""
    file = folder / "card.json"
    if not file.exists():
        return "not prepared"
    card = json.loads(file.read_text())
    size = (folder / "images.npy").stat().st_size if (folder / "images.npy").exists() else 0
    classes = ", ".join(f"{split} {n:,}" for split, n in card["classes"].items())
    return f"prepared in {folder}: {card['images']:,} images ({size / 1e9:.1f} GB), classes: {classes}"


def listing(originals: dict[str, list[str]], data: Path) -> str:
    """Every dataset that can be prepared, with its state, and every other one that is prepared."""
    others = {p.parent.name for p in data.glob("*/card.json") if not p.parent.name.startswith(".")} - set(originals)
    blocks = []
    for name, lines in [*originals.items(), *((name, []) for name in sorted(others))]:
        blocks.append("\n".join([f"{name}: {state(data / name)}", *(f"    {line}" for line in lines)]))
    return "\n\n".join(blocks)
