"""Describe a prepared dataset (`python -m data_prep check data/NAME`): warnings, counts, and what was left out.

A query's *matches* are the gallery images that the protocol counts as correct, its *non-matches* those that it counts
as wrong. A query without a match is left out of the metrics; without a non-match it is always correct.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from data_prep.originals import card_summary
from data_prep.prepared import PreparationError
from hloss.runs.datasets import Dataset, open_dataset, query_counts

MIN_VAL_CLASSES, MIN_VAL_QUERIES = 5, 50  # fewer usable classes or queries do not separate good and bad checkpoints
SMALL_CLASSES = (2, 5, 10)  # 2 images form a positive pair; 5 and 10 are usual values of images_per_class
MAX_EXAMPLES = 3  # examples in a line
NO_VALIDATION = 'runs train without validation if their setting choose is "last"'
MATCHES = {  # what the protocols count as a match
    "all-vs-rest": "a match is another image of the query's class",
    "query-gallery": "a match is a gallery image of the query's class",
    "cuhk03-single-shot": "a match is an image of the query's class from the other of two cameras",
}
REMEDIES = {"val": "pass a larger --val-fraction", "test": "add images or classes to the test split"}
OTHER_CAMERAS = "a match is a gallery image of the query's class from another camera"


def can_select_checkpoint(index: pd.DataFrame, protocol: str) -> bool:
    """Return whether the validation split has enough usable classes and queries to select a checkpoint.

    Args:
        index: The index of a prepared dataset.
        protocol: The evaluation protocol.

    Returns:
        True for at least MIN_VAL_CLASSES classes and MIN_VAL_QUERIES queries with a match and a non-match.
    """
    classes, queries = usable_counts(index, "val", protocol)
    return classes >= MIN_VAL_CLASSES and queries >= MIN_VAL_QUERIES


def check_measurable(index: pd.DataFrame, split: str, protocol: str, condition: str = "") -> None:
    """Refuse a split without any query that has both a match and a non-match.

    Args:
        index: The index of a prepared dataset.
        split: "val" or "test".
        protocol: The evaluation protocol.
        condition: Begin of the message.

    Raises:
        PreparationError: no query can be evaluated; the message has the counts and a remedy.
    """
    rows = index[index.split == split]
    queries = query_counts(rows, protocol)
    if ((queries.matches > 0) & (queries.rivals > 0)).any():
        return
    gallery = set(rows.label[rows.role.isin(["gallery", "both"])])
    matched, with_rivals = (queries.matches > 0).sum(), (queries.rivals > 0).sum()
    raise PreparationError(
        f"{condition}the {split} split cannot be evaluated: of {len(queries)} queries, {matched} have a match and "
        f"{with_rivals} a non-match; {match_rule(protocol)} (query classes: "
        f"{queries.label.nunique()}, {len(gallery & set(queries.label))} of them in the gallery; cameras: "
        f"{rows.camera[rows.camera >= 0].nunique()}; protocol: {protocol}); {REMEDIES[split]}"
    )


def match_rule(protocol: str) -> str:
    """Return what a protocol counts as a match, as a part of a message."""
    return MATCHES.get(protocol.removesuffix("-two-way"), OTHER_CAMERAS)


def too_small(index: pd.DataFrame, protocol: str) -> str:
    """Return a message about a validation split that is too small to select a checkpoint.

    Args:
        index: The index of a prepared dataset.
        protocol: The evaluation protocol.

    Returns:
        The counts, the needed counts, and what the protocol counts as a match.
    """
    classes, queries = usable_counts(index, "val", protocol)
    return (
        f"the validation split is too small to select a checkpoint: got {queries} queries of {classes} classes that "
        f"have a match and a non-match; at least {MIN_VAL_QUERIES} queries of {MIN_VAL_CLASSES} classes are needed "
        f"(protocol {protocol}: {match_rule(protocol)})"
    )


def usable_counts(index: pd.DataFrame, split: str, protocol: str) -> tuple[int, int]:
    """Count the classes and queries of a split that have both a match and a non-match.

    Args:
        index: The index of a prepared dataset.
        split: "train", "val" or "test".
        protocol: The evaluation protocol.

    Returns:
        The number of classes and the number of queries.
    """
    queries = query_counts(index[index.split == split], protocol)
    queries = queries[(queries.matches > 0) & (queries.rivals > 0)]
    return queries.label.nunique(), len(queries)


def summary(folder: Path) -> str:
    """Return the warnings about a prepared dataset and what was left out of it.

    Args:
        folder: The folder of the prepared dataset.

    Returns:
        One line per warning or kind of file; empty if there is nothing to say.

    Raises:
        DatasetError: the folder is not a prepared dataset, or its files contradict its card.
    """
    dataset = open_dataset(folder)
    return "\n".join([*_marked(warnings(dataset)), *left_out_lines(dataset.card)])


def describe(folder: Path) -> str:
    """Return the text of `check`: warnings, counts per split, query counts, small classes and what was left out.

    Args:
        folder: The folder of the prepared dataset.

    Returns:
        Blocks of lines, separated by blank lines.

    Raises:
        DatasetError: the folder is not a prepared dataset, or its pixels or index contradict its card.
    """
    dataset = open_dataset(folder)
    dataset.check_pixels()
    card = dataset.card
    size = " x ".join(map(str, card["image_shape"]))
    blocks = [
        f"{folder}: {card_summary(card)}, {size} pixels, protocol {card['protocol']}",
        "\n".join(_marked(warnings(dataset))) or "no warnings",
        dataset.counts().to_string(),
        query_table(dataset).to_string(),
        small_classes(dataset),
        "\n".join(left_out_lines(card)) or "nothing was left out",
    ]
    published = dataset.against_published()
    return "\n\n".join([*blocks, *([published.to_string()] if len(published) else [])])


def _marked(lines: Sequence[str]) -> list[str]:
    return [f"WARNING: {line}" for line in lines]


def warnings(dataset: Dataset) -> list[str]:
    """Return all warnings about a dataset, one line each.

    Args:
        dataset: The prepared dataset.

    Returns:
        Warnings about a partial release, queries, validation, training classes, identical images and similar class
        names.
    """
    return [
        *partial_release(dataset.card),
        *query_warnings(dataset),
        *training_warnings(dataset),
        *duplicate_images(dataset),
        *similar_class_names(dataset),
    ]


def partial_release(card: dict) -> list[str]:
    """Return a warning about a dataset that was prepared from a part of the original, or nothing."""
    partial = card.get("settings", {}).get("partial")
    if not partial:
        return []
    counts = " and ".join(f"{n:,} of {of:,} {what}" for what, (n, of) in partial.items())
    return [f"this is a part of the original: {counts}; its results are not comparable with published ones"]


def query_warnings(dataset: Dataset) -> list[str]:
    """Return warnings about splits that cannot be evaluated, queries without a match, and a small validation split.

    Args:
        dataset: The prepared dataset.

    Returns:
        One line per warning.
    """
    has_validation = (dataset.index.split == "val").any()
    found = [] if has_validation else [f"val: there are no validation classes; {NO_VALIDATION}"]
    for split, counts in query_table(dataset).to_dict("index").items():
        queries, unmatched = counts["queries"], counts["queries"] - counts["matched"]
        if not counts["usable"]:
            found.append(
                f"{split}: retrieval cannot be measured, none of {queries:,} queries has a match and a non-match"
            )
        elif unmatched:
            found.append(f"{split}: {unmatched:,} of {queries:,} queries have no match and are left out of the metrics")
    classes, queries = usable_counts(dataset.index, "val", dataset.card["protocol"])
    if has_validation and (classes < MIN_VAL_CLASSES or queries < MIN_VAL_QUERIES):
        found.append(
            f"val: only {queries} queries of {classes} classes have a match and a non-match; checkpoint selection is "
            f"unreliable below {MIN_VAL_QUERIES} queries of {MIN_VAL_CLASSES} classes; prepare the dataset again with "
            "more validation classes (--val-fraction)"
        )
    return found


def query_table(dataset: Dataset) -> pd.DataFrame:
    """Count the queries of the validation and test splits; without validation images, of the test split alone.

    Args:
        dataset: The prepared dataset.

    Returns:
        One row per split: queries, those with a match, those that also have a non-match (usable), and the median
        numbers of matches and non-matches per query.
    """
    rows = {}
    for split in [split for split in ("val", "test") if (dataset.index.split == split).any()]:
        counts = query_counts(dataset.index[dataset.index.split == split], dataset.card["protocol"])
        matched = counts.matches > 0
        rows[split] = {
            "queries": len(counts),
            "matched": int(matched.sum()),
            "usable": int((matched & (counts.rivals > 0)).sum()),
            "median matches": counts.matches.median(),
            "median non-matches": counts.rivals.median(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype({"queries": int, "matched": int, "usable": int})


def training_warnings(dataset: Dataset) -> list[str]:
    """Return a warning about training classes with one image, which form no positive pair.

    Args:
        dataset: The prepared dataset.

    Returns:
        One line, or none.
    """
    sizes = _training_sizes(dataset)
    single = int((sizes < 2).sum())
    return [f"train: {single:,} of {len(sizes):,} classes have one image and form no positive pair"] if single else []


def small_classes(dataset: Dataset) -> str:
    """Return the numbers of training classes with fewer than 2, 5 and 10 images.

    Args:
        dataset: The prepared dataset.

    Returns:
        One line.
    """
    sizes = _training_sizes(dataset)
    counts = ", ".join(f"{int((sizes < n).sum()):,} with fewer than {n} images" for n in SMALL_CLASSES)
    return f"training classes (to choose images_per_class of a run): {len(sizes):,}, of which {counts}"


def _training_sizes(dataset: Dataset) -> pd.Series:
    return dataset.index[dataset.index.split == "train"].groupby("label").size()


def duplicate_images(dataset: Dataset) -> list[str]:
    """Return warnings about images with identical pixels in different splits or different classes.

    Args:
        dataset: The prepared dataset.

    Returns:
        At most two lines, each with up to three examples.
    """
    names = dict(enumerate(dataset.card.get("class_names", ())))
    classes = [names.get(label, f"class {label}" if label >= 0 else "no class") for label in dataset.index.label]
    index = dataset.index.assign(digest=pixel_digests(dataset), label=classes)
    repeated = index[index.digest.duplicated(keep=False)]
    found = []
    for column, plural in (("split", "splits"), ("label", "classes")):
        groups = [rows for _, rows in repeated.groupby("digest", sort=False) if rows[column].nunique() > 1]
        if groups:
            examples = "; ".join(_example(rows.drop_duplicates(column), column) for rows in groups[:MAX_EXAMPLES])
            found.append(f"identical images in different {plural} ({len(groups):,}): {examples}{_more(groups)}")
    return found


def _example(rows: pd.DataFrame, column: str) -> str:
    return " = ".join(f"{source} ({value})" for source, value in zip(rows.source, rows[column], strict=True))


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - MAX_EXAMPLES:,} more" if len(items) > MAX_EXAMPLES else ""


def pixel_digests(dataset: Dataset) -> list[bytes]:
    """Hash the pixels of each image.

    The file is read in order, not through the memory map, whose pages would count as memory of this process.

    Args:
        dataset: The prepared dataset.

    Returns:
        The 16-byte BLAKE2b digest of each image, by row.
    """
    row_bytes = int(np.prod(dataset.images.shape[1:]))
    with open(dataset.folder / "images.npy", "rb") as file:
        file.seek(dataset.images.offset)  # type: ignore[attr-defined]
        bar = tqdm(range(len(dataset.images)), desc="finding identical images", unit="images", mininterval=1)
        return [hashlib.blake2b(file.read(row_bytes), digest_size=16).digest() for _ in bar]


def similar_class_names(dataset: Dataset) -> list[str]:
    """Return a warning about class names that differ only in spaces, case, number format or Unicode form.

    Args:
        dataset: The prepared dataset.

    Returns:
        One line with up to three examples, or none.
    """
    groups: dict[str, list[str]] = {}
    for name in dataset.card.get("class_names", ()):
        groups.setdefault(normalized_name(name), []).append(name)
    alike = [names for names in groups.values() if len(names) > 1]
    examples = "; ".join(" and ".join(map(repr, names)) for names in alike[:MAX_EXAMPLES])
    return [f"class names that may mean the same class ({len(alike)}): {examples}{_more(alike)}"] if alike else []


def normalized_name(name: str) -> str:
    """Return a class name without spaces, case, leading zeros and zero decimals, in Unicode form NFKC."""
    name = re.sub(r"\s", "", unicodedata.normalize("NFKC", name).casefold())
    name = re.sub(r"^[+]?(\d+)([.,]0*)?$", r"\1", name)
    return re.sub(r"(?<![\d.,])0+(?=\d)", "", name)


def left_out_lines(card: dict) -> list[str]:
    """Return what the source contains and the dataset does not.

    Args:
        card: The card of the prepared dataset.

    Returns:
        One line each for ignored files, unsupported file types, images that the CSV or the original's lists do not
        contain, and images that cannot be decoded.
    """
    found = []
    ignored = card.get("ignored_files", {})
    if ignored:
        names = ", ".join(f"{n:,} in {name}" if name.endswith("/") else f"{n:,} {name}" for name, n in ignored.items())
        found.append(f"hidden and system files, ignored: {sum(ignored.values()):,} ({names})")
    for suffix, some in card.get("unused_files", {}).items():
        more = ", ..." if some["files"] > len(some["first"]) else ""
        found.append(f"files of an unsupported type ({suffix}): {some['files']:,} ({', '.join(some['first'])}{more})")
    if card.get("unused_images"):
        found.append(f"unlisted images, not used: {card['unused_images']:,}")
    if card.get("skipped_images"):
        found.append(f"images that cannot be decoded, skipped: {len(card['skipped_images']):,} (listed in card.json)")
    return found
