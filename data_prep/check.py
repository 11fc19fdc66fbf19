"""`python -m data_prep check data/NAME`: what is in a prepared dataset, what was left out, and what may go wrong."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from hloss.runs.datasets import Dataset, open_dataset, query_counts

MIN_VAL_CLASSES, MIN_VAL_QUERIES = 5, 50  # with a match and a rival: fewer do not tell a better checkpoint from a worse
SMALL_CLASSES = (2, 5, 10)  # images a sampler needs: for a positive pair, and the usual images_per_class
NAMED = 3  # examples in a line


def can_choose(index: pd.DataFrame, protocol: str) -> bool:
    """Whether validation has enough classes and queries with a match and a rival to choose a checkpoint."""
    classes, queries = usable(index, "val", protocol)
    return classes >= MIN_VAL_CLASSES and queries >= MIN_VAL_QUERIES


def usable(index: pd.DataFrame, split: str, protocol: str) -> tuple[int, int]:
    """Classes and queries of a split that have both a match and a rival."""
    queries = query_counts(index[index.split == split], protocol)
    queries = queries[(queries.matches > 0) & (queries.rivals > 0)]
    return queries.label.nunique(), len(queries)


def summary(folder: Path) -> str:
    """The warnings about a prepared dataset and what was left out of it: how a preparation ends."""
    dataset = open_dataset(folder)
    return "\n".join([*_marked(warnings(dataset)), *left_out(dataset.card)])


def page(folder: Path) -> str:
    """All that is worth knowing about a prepared dataset, warnings first."""
    dataset = open_dataset(folder)
    dataset.check_pixels()
    card = dataset.card
    size = " x ".join(map(str, card["image_shape"]))
    n_classes = sum(card["classes"].values())
    blocks = [
        f"{folder}: {card['images']:,} images of {n_classes:,} classes, {size}, {card['protocol']}",
        "\n".join(_marked(warnings(dataset))) or "no warnings",
        dataset.counts().to_string(),
        query_table(dataset).to_string(),
        small_classes(dataset),
        "\n".join(left_out(card)) or "nothing was left out",
    ]
    published = dataset.against_published()
    return "\n\n".join([*blocks, *([published.to_string()] if len(published) else [])])


def _marked(lines: Sequence[str]) -> list[str]:
    return [f"WARNING: {line}" for line in lines]


def warnings(dataset: Dataset) -> list[str]:
    """What may go wrong with a dataset, one line each."""
    return [*query_warnings(dataset), *training_warnings(dataset), *repeated_pictures(dataset), *similar_names(dataset)]


def query_warnings(dataset: Dataset) -> list[str]:
    """Splits whose queries cannot measure or choose, and queries that are left out of the means."""
    found = []
    for split, counts in query_table(dataset).to_dict("index").items():
        queries, unmatched = counts["queries"], counts["queries"] - counts["matched"]
        if not counts["usable"]:
            found.append(f"{split} measures nothing: none of its {queries:,} queries has a match and a rival")
        elif unmatched:
            found.append(f"{split}: {unmatched:,} of {queries:,} queries have no match and do not count")
    classes, queries = usable(dataset.index, "val", dataset.card["protocol"])
    if classes < MIN_VAL_CLASSES or queries < MIN_VAL_QUERIES:
        found.append(
            f"validation is too small to choose a checkpoint well: {queries} queries of {classes} classes "
            f"({MIN_VAL_QUERIES} of {MIN_VAL_CLASSES} or more are advised)"
        )
    return found


def query_table(dataset: Dataset) -> pd.DataFrame:
    """Per split that is measured: queries, those with a match, those with a rival too, and the median of both."""
    rows = {}
    for split in ("val", "test"):
        counts = query_counts(dataset.index[dataset.index.split == split], dataset.card["protocol"])
        matched = counts.matches > 0
        rows[split] = {
            "queries": len(counts),
            "matched": int(matched.sum()),
            "usable": int((matched & (counts.rivals > 0)).sum()),
            "median matches": counts.matches.median(),
            "median rivals": counts.rivals.median(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype({"queries": int, "matched": int, "usable": int})


def training_warnings(dataset: Dataset) -> list[str]:
    """Training classes of one image, which make no positive pair."""
    sizes = _training_sizes(dataset)
    single = int((sizes < 2).sum())
    return [f"train: {single:,} of {len(sizes):,} classes have one image and make no positive pair"] if single else []


def small_classes(dataset: Dataset) -> str:
    """How many training classes are too small for samplers."""
    sizes = _training_sizes(dataset)
    counts = ", ".join(f"{int((sizes < n).sum()):,} have fewer than {n}" for n in SMALL_CLASSES)
    return f"images per training class, for a run's images_per_class: of {len(sizes):,} classes {counts}"


def _training_sizes(dataset: Dataset) -> pd.Series:
    return dataset.index[dataset.index.split == "train"].groupby("label").size()


def repeated_pictures(dataset: Dataset) -> list[str]:
    """Pictures, equal in each pixel, that stand in two splits or in two classes."""
    names = dict(enumerate(dataset.card.get("class_names", ())))
    classes = [names.get(label, f"class {label}" if label >= 0 else "no class") for label in dataset.index.label]
    index = dataset.index.assign(digest=pixel_digests(dataset), label=classes)
    repeated = index[index.digest.duplicated(keep=False)]
    found = []
    for column, what in (("split", "splits"), ("label", "classes")):
        groups = [rows for _, rows in repeated.groupby("digest", sort=False) if rows[column].nunique() > 1]
        if groups:
            examples = "; ".join(_example(rows.drop_duplicates(column), column) for rows in groups[:NAMED])
            found.append(f"{len(groups):,} pictures are in two {what}: {examples}{_more(groups)}")
    return found


def _example(rows: pd.DataFrame, column: str) -> str:
    return " = ".join(f"{source} ({value})" for source, value in zip(rows.source, rows[column], strict=True))


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - NAMED:,} more" if len(items) > NAMED else ""


def pixel_digests(dataset: Dataset) -> list[bytes]:
    """A hash of each image's pixels, read in order: through the map they would all count as this process's memory."""
    row_bytes = int(np.prod(dataset.images.shape[1:]))
    with open(dataset.folder / "images.npy", "rb") as file:
        file.seek(dataset.images.offset)  # type: ignore[attr-defined]
        bar = tqdm(range(len(dataset.images)), desc="looking for equal pictures", unit="images", mininterval=1)
        return [hashlib.blake2b(file.read(row_bytes), digest_size=16).digest() for _ in bar]


def similar_names(dataset: Dataset) -> list[str]:
    """Names of classes that differ only in blanks, case, number form or Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in dataset.card.get("class_names", ()):
        groups.setdefault(plain(name), []).append(name)
    alike = [names for names in groups.values() if len(names) > 1]
    examples = "; ".join(" and ".join(map(repr, names)) for names in alike[:NAMED])
    return [f"{len(alike)} times classes have nearly the same name: {examples}{_more(alike)}"] if alike else []


def plain(name: str) -> str:
    """A class name without blanks, case, leading zeros and a zero fraction."""
    name = re.sub(r"\s", "", unicodedata.normalize("NFKC", name).casefold())
    name = re.sub(r"^[+]?(\d+)([.,]0*)?$", r"\1", name)
    return re.sub(r"(?<![\d.,])0+(?=\d)", "", name)


def left_out(card: dict) -> list[str]:
    """What the source held and the dataset does not, one line for each kind."""
    found = []
    ignored = card.get("ignored_files", {})
    if ignored:
        names = ", ".join(f"{n:,} in {name}" if name.endswith("/") else f"{n:,} {name}" for name, n in ignored.items())
        found.append(f"ignored: {sum(ignored.values()):,} hidden and system files ({names})")
    for suffix, some in card.get("unused_files", {}).items():
        more = ", ..." if some["files"] > len(some["first"]) else ""
        found.append(f"not read: {some['files']:,} of {suffix} ({', '.join(some['first'])}{more})")
    if card.get("unused_images"):
        found.append(f"not used: {card['unused_images']:,} images that the index does not name")
    if card.get("skipped_images"):
        found.append(f"skipped: {len(card['skipped_images']):,} images that cannot be decoded; card.json names them")
    return found
