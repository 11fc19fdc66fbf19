"""Anyone's own images: a folder with one folder per class, or a CSV.

The CSV has the columns path (relative to its folder) and label, and optionally split (train/val/test), camera (a whole
number) and role (both/query/gallery/junk/distractor/pool; junk and distractors need no label). Commas, semicolons, tabs
or bars separate its columns. Where no split is given, half of the classes are drawn for the test, and `val_fraction` of
the others for validation; where train and test are given but no val, only the latter. Where `val_fraction` would be too
few classes to choose a checkpoint by, up to half of them are held out.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from data_prep.archives import Source, open_source
from data_prep.check import MIN_VAL_CLASSES, MIN_VAL_QUERIES, can_choose, usable
from data_prep.conversion import Options, convert
from data_prep.image_csv import NOBODY, check_present, read_csv
from data_prep.prepared import PreparationError, check_replaceable, hold_out
from hloss.runs.datasets import query_counts
from hloss.runs.images import EXTENSIONS, ImageSettings

OPTIONS = Options(ImageSettings(256, 256, "pad"))
TEST_SHARE = 0.5  # of the classes, as in CUB and Online Products
RECALL_AT = {"all-vs-rest": [1, 2, 4, 8, 16, 32], "market1501": [1, 5, 10, 15, 20]}


def prepare(source: Path, out: Path, options: Options = OPTIONS, last_folder: bool = False) -> dict:
    """Write the images of a folder or CSV as the prepared dataset `out`.

    Args:
        source: the folder or the CSV.
        out: the folder to write.
        options: size of the images, validation classes, accepted faults.
        last_folder: whether images may lie deeper than CLASS/IMAGE; their last folder is the class.

    Returns:
        The card.

    Raises:
        PreparationError: the images, the classes or the CSV cannot become a dataset; nothing is written.
    """
    source, out = Path(source), Path(out)
    check_replaceable(out, out.name)
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        listed, kind = read_csv(source), "a CSV of images"
        opened = open_source(source.parent, wanted=set(listed.path))
        check_present(source, listed.path, opened)
        unused = {}
    elif source.is_dir():
        opened = open_source(source)
        listed, kind = read_folders(opened, last_folder), "class-named folders of images"
        unused = unread_files(opened)
    else:
        raise PreparationError(f"--source {source} is neither a folder nor a .csv file")
    index, names = number_classes(listed)
    index = split(index, options)
    protocol = choose_protocol(index)
    check_test(index, protocol)
    index, options = choose_validation(index, protocol, options)
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
        **({"unused_files": unused} if unused else {}),
    }
    return convert(out, opened, index, options, card)


def read_folders(source: Source, last_folder: bool = False) -> pd.DataFrame:
    """path and label of each image: its label is the name of its folder."""
    images = [name for name in source.files if is_image(name)]
    loose = [name for name in images if "/" not in name]
    deep = [name for name in images if name.count("/") > 1 and not last_folder]
    if not images:
        raise PreparationError(
            f"{source.path} holds no image in a folder of its class (CLASS/IMAGE); the names of images end in "
            f"{', '.join(EXTENSIONS)}"
        )
    if loose:
        raise PreparationError(
            f"{source.path}: {len(loose)} of {len(images)} images are in no folder of a class, the first is "
            f"{loose[0]}; move the images (CLASS/IMAGE), or name them in a CSV"
        )
    if deep:
        raise PreparationError(
            f"{source.path}: {len(deep)} of {len(images)} images are deeper than CLASS/IMAGE, the first is {deep[0]}; "
            f"pass --last-folder to take the last folder as the class (here {PurePosixPath(deep[0]).parent.name!r}; "
            "folders of one name are one class), or name the images in a CSV"
        )
    return pd.DataFrame({"path": images, "label": [PurePosixPath(name).parent.name.strip() for name in images]})


def is_image(name: str) -> bool:
    """Whether a file has an extension of the image formats that are read."""
    return name.lower().endswith(EXTENSIONS)


def unread_files(source: Source) -> dict[str, dict]:
    """The files that are no images: for each extension their number and the first names."""
    found: dict[str, list[str]] = {}
    for name in source.files:
        if not is_image(name):
            found.setdefault(PurePosixPath(name).suffix.lower() or "no extension", []).append(name)
    return {suffix: {"files": len(names), "first": names[:3]} for suffix, names in sorted(found.items())}


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
    """The index with every class in train or test, or in val where that is given."""
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
    return index


def check_test(index: pd.DataFrame, protocol: str) -> None:
    """Refuse a test without any query that has both a match and a rival."""
    test = index[index.split == "test"]
    queries = query_counts(test, protocol)
    if ((queries.matches > 0) & (queries.rivals > 0)).any():
        return
    gallery = set(test.label[test.role.isin(["gallery", "both"])])
    remedy = (
        "give at least two test classes, with two images or more"
        if protocol == "all-vs-rest"
        else "a match is a gallery image of the query's class under another camera"
    )
    raise PreparationError(
        f"the test would measure nothing: of {len(queries)} queries {(queries.matches > 0).sum()} have a match and "
        f"{(queries.rivals > 0).sum()} a rival ({queries.label.nunique()} query classes, "
        f"{len(gallery & set(queries.label))} of them in the gallery, {test.camera.nunique()} cameras, protocol "
        f"{protocol}); {remedy}"
    )


def choose_validation(index: pd.DataFrame, protocol: str, options: Options) -> tuple[pd.DataFrame, Options]:
    """The index with validation classes that can choose a checkpoint, and the options that hold them out of train."""
    if (index.split == "val").any():
        if can_choose(index, protocol):
            return index, options
        raise PreparationError(f"{_few(index, protocol)}; name more in the CSV's column split")
    held = hold_out(index, options.val_fraction, options.seed)
    if can_choose(held, protocol):
        return held, options
    total, least = index.label[index.split == "train"].nunique(), held.label[held.split == "val"].nunique() + 1
    remedy = f"give more classes or images (there are {total} classes for training and validation)"
    for n in range(least, total - 1):
        more = hold_out(index, n, options.seed)
        if can_choose(more, protocol):
            if n <= total / 2:
                return more, replace(options, val_fraction=n)
            remedy += f", or hold out {n} of them with --val-fraction {n}"
            break
    raise PreparationError(f"{_few(held, protocol)}; {remedy}")


def _few(index: pd.DataFrame, protocol: str) -> str:
    classes, queries = usable(index, "val", protocol)
    return (
        f"validation cannot choose a checkpoint: {queries} queries of {classes} classes have a match and a rival, "
        f"{MIN_VAL_QUERIES} of {MIN_VAL_CLASSES} are needed"
    )


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
