"""Anyone's own images: a folder with one folder per class, or a CSV.

The CSV has the columns path (relative to its folder) and label, and optionally split (train/val/test), camera (a whole
number) and role (both/query/gallery/junk/distractor/pool; junk and distractors need no label). Where no split is given,
half of the classes are drawn for the test, and `val_fraction` of the others for validation; where train and test are
given but no val, only the latter.
"""

import io
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from data_prep.archives import Source, open_source
from data_prep.conversion import Options, convert
from data_prep.prepared import PreparationError, check_replaceable, hold_out
from hloss.runs.datasets import ROLES, SPLITS
from hloss.runs.images import EXTENSIONS, ImageSettings

OPTIONS = Options(ImageSettings(256, 256, "pad"))
TEST_SHARE = 0.5  # of the classes, as in CUB and Online Products
REQUIRED, OPTIONAL = ("path", "label"), ("split", "camera", "role")
NOBODY = ("junk", "distractor")
RECALL_AT = {"all-vs-rest": [1, 2, 4, 8, 16, 32], "market1501": [1, 5, 10, 15, 20]}


def prepare(source: Path, out: Path, options: Options = OPTIONS) -> dict:
    """Write the images of a folder or CSV as the prepared dataset `out`; returns the card."""
    source, out = Path(source), Path(out)
    check_replaceable(out, out.name)
    if source.is_file() and source.suffix.lower() == ".csv":
        opened, listed, kind = open_source(source.parent), read_csv(source), "a CSV of images"
    elif source.is_dir():
        opened = open_source(source)
        listed, kind = read_folders(opened), "class-named folders of images"
    else:
        raise PreparationError(f"--source {source} is neither a folder nor a .csv file")
    index, names = number_classes(listed)
    index = split(index, options)
    protocol = choose_protocol(index)
    card = {
        "name": out.name,
        "source": kind,
        "original": {"kind": kind, "checksum": "none is published"},
        "licence": "that of its images",
        "protocol": protocol,
        "val_from_train": "split" not in listed or not (listed.split == "val").any(),
        "recall_at": RECALL_AT[protocol],
        "settings": {**options.settings(), "test_share": TEST_SHARE if "split" not in listed else "given"},
        "class_names": names,
    }
    return convert(out, opened, index, options, card)


def read_folders(source: Source) -> pd.DataFrame:
    """path and label of each image: its label is the name of its folder."""
    images = [name for name in source.files if name.lower().endswith(EXTENSIONS)]
    wrong = [name for name in images if name.count("/") != 1]
    if wrong or not images:
        raise PreparationError(
            f"{source.path}: {wrong[0] if wrong else 'no image'} is directly in the folder of a class (CLASS/IMAGE); "
            "move the images, or name them in a CSV"
        )
    return pd.DataFrame({"path": images, "label": [name.partition("/")[0] for name in images]})


def read_csv(file: Path) -> pd.DataFrame:
    """The rows of a CSV as text, its columns and paths checked."""
    try:
        listed = pd.read_csv(io.BytesIO(file.read_bytes()), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:
        raise PreparationError(f"{file} cannot be read as CSV in UTF-8: {error}") from error
    lacking = [c for c in REQUIRED if c not in listed]
    unknown = [c for c in listed if c not in REQUIRED + OPTIONAL]
    if lacking or unknown or listed.empty:
        raise PreparationError(
            f"{file} {'lacks ' + ', '.join(lacking) if lacking else 'has the columns ' + ', '.join(listed)} "
            f"({len(listed)} rows); the columns are {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}"
        )
    for path in listed.path:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise PreparationError(f"{file}: path {path!r} leads out of the CSV's folder; give paths below it, with /")
    listed["path"] = [PurePosixPath(path).as_posix() for path in listed.path]
    _check_values(file, listed)
    return listed


def _check_values(file: Path, listed: pd.DataFrame) -> None:
    role = listed.role if "role" in listed else pd.Series("both", index=listed.index)
    rules = {
        "split": lambda v: v in SPLITS,
        "role": lambda v: v in ROLES,
        "camera": lambda v: v == "" or v.isdigit(),
    }
    for column, allowed in rules.items():
        if column in listed:
            wrong = [v for v in listed[column] if not allowed(v)]
            if wrong:
                meant = {"split": SPLITS, "role": ROLES, "camera": ("a whole number or nothing",)}[column]
                raise PreparationError(f"{file}: {column} is {wrong[0]!r} in a row, allowed are {', '.join(meant)}")
    unnamed = listed.path[(listed.label == "") & ~role.isin(NOBODY)]
    if len(unnamed):
        raise PreparationError(f"{file}: {unnamed.iloc[0]} has no label; only junk and distractors have none")
    twice = listed.path[listed.path.duplicated()]
    if len(twice):
        labels = sorted(set(listed.label[listed.path == twice.iloc[0]]))
        raise PreparationError(f"{file} names {twice.iloc[0]} twice, with labels {labels}; an image has one row")


def number_classes(listed: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The index, its classes numbered in the order of their names (no split yet where none is given), and the names."""
    role = listed.role if "role" in listed else pd.Series("both", index=listed.index)
    of_somebody = ~role.isin(NOBODY)
    names = sorted(set(listed.label[of_somebody]))
    numbers = {name: number for number, name in enumerate(names)}
    index = pd.DataFrame(
        {
            "label": [numbers[v] if some else -1 for v, some in zip(listed.label, of_somebody, strict=True)],
            "split": listed.split if "split" in listed else "",
            "role": role,
            "camera": [int(v or -1) for v in listed.camera] if "camera" in listed else -1,
            "source": listed.path,
        }
    )
    return index, names


def split(index: pd.DataFrame, options: Options) -> pd.DataFrame:
    """The index with every class in train, val or test."""
    if (index.split == "").all():
        classes = np.unique(index.label[index.label >= 0])
        if len(classes) < 4:
            raise PreparationError(
                f"{len(classes)} classes cannot be split for training, validation and test: give 4 or more"
            )
        tested = np.random.default_rng(options.seed).choice(classes, round(TEST_SHARE * len(classes)), replace=False)
        is_test = index.label.isin(tested) | (index.label < 0)  # junk and distractors belong to a gallery
        index = index.assign(split=np.where(is_test, "test", "train"))
    lacking = sorted({"train", "test"} - set(index.split))
    if lacking:
        raise PreparationError(f"the CSV's column split names no image of {' and none of '.join(lacking)}")
    crossing = index[index.label >= 0].groupby("label").split.nunique()
    if (crossing > 1).any():
        names = index.source[index.label == crossing.index[crossing > 1][0]]
        raise PreparationError(f"the class of {names.iloc[0]} is in more than one split; a class belongs to one")
    return index if (index.split == "val").any() else hold_out(index, options.val_fraction, options.seed)


def choose_protocol(index: pd.DataFrame) -> str:
    """all-vs-rest, or market1501 where the test has queries and a gallery."""
    test = index[index.split == "test"]
    others = index[(index.split != "test") & (index.role != "both")]
    if len(others):
        raise PreparationError(
            f"{others.source.iloc[0]} has the role {others.role.iloc[0]}: only test images have roles"
        )
    roles = set(test.role)
    if roles == {"both"}:
        return "all-vs-rest"
    if not {"query", "gallery"} <= roles or (test.camera < 0).any():
        raise PreparationError(
            f"the test images have the roles {', '.join(sorted(roles))}: with roles there must be query and gallery, "
            "and every test image needs its camera"
        )
    return "market1501"
