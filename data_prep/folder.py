"""Prepare your own images: a folder with one folder per class, or a CSV file.

The CSV has the columns path (relative to its folder) and label, and optionally
split (train, val or test), camera (a whole number) and role (both, query,
gallery, junk, distractor or pool). Junk and distractors need no label. Commas,
semicolons, tabs or vertical bars separate the columns.

Splits: without the column split, half of the classes are drawn for the test,
and --val-fraction of the other half for validation. With train and test only,
validation classes are drawn from train. Validation needs at least 50 queries
of 5 classes that have a match and a non-match. If --val-fraction gives fewer,
the smallest sufficient number of classes is drawn instead, at most half of
them.

Validation classes are not needed to train without validation (choose="last"
of a run): --val-fraction 0.

Protocol: all-vs-rest, where every test image queries all others. If the test
images have the roles query and gallery: market1501 if they have cameras, and
query-gallery if not. --protocol chooses another one.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from data_prep.archives import Source, existing_source, open_source
from data_prep.check import NO_VALIDATION, can_select_checkpoint, check_measurable, too_small
from data_prep.conversion import Options, convert
from data_prep.image_csv import UNLABELED_ROLES, check_present, read_csv
from data_prep.prepared import PreparationError, check_replaceable, hold_out
from hloss.runs.images import EXTENSIONS, ImageSettings

OPTIONS = Options(ImageSettings(256, 256, "pad"))
TEST_SHARE = 0.5  # share of the classes, as in CUB-200-2011 and Online Products
CMC_AT = (1, 5, 10, 15, 20)
RECALL_AT = {  # K of the Recall@K of each protocol
    "all-vs-rest": (1, 2, 4, 8, 16, 32),
    "query-gallery": CMC_AT,
    "market1501": CMC_AT,
    "cuhk03-single-shot": CMC_AT,
    "cuhk03-single-shot-two-way": CMC_AT,
}


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate the test images.

    Attributes:
        protocol: One of RECALL_AT; None for the one that fits roles and cameras.
        recall_at: Increasing K of Recall@K, from 1; None for the protocol's.
    """

    protocol: str | None = None
    recall_at: tuple[int, ...] | None = None


DEFAULT_EVALUATION = Evaluation()


def prepare(
    source: Path,
    out: Path,
    options: Options = OPTIONS,
    last_folder: bool = False,
    evaluation: Evaluation = DEFAULT_EVALUATION,
) -> dict:
    """Prepare the images of a folder or of a CSV file.

    Args:
        source: The folder or the CSV file.
        out: The folder to write; its name becomes the dataset's name.
        options: Options of the preparation.
        last_folder: Whether images may be in nested folders, of which the innermost one is the class.
        evaluation: How to evaluate the test images.

    Returns:
        The card.

    Raises:
        PreparationError: the images, classes or splits cannot be used; nothing is written.
    """
    source, out = existing_source(source), Path(out)
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
        raise PreparationError(f"--source must be a folder, a .csv file or a .tsv file: got {source}")
    index, names = number_classes(listed)
    index = assign_splits(index, options)
    protocol = evaluation.protocol or choose_protocol(index)
    index = fit_protocol(index, protocol)
    check_measurable(index, "test", protocol)
    index, options = choose_validation(index, protocol, options)
    card = {
        "name": out.name,
        "source": kind,
        "original": {"kind": kind, "checksum": "none is published"},
        "licence": "that of its images",
        "protocol": protocol,
        "val_from_train": "split" not in listed or not (listed.split == "val").any(),
        "recall_at": list(evaluation.recall_at or RECALL_AT[protocol]),
        "settings": {**options.settings(), "test_share": TEST_SHARE if "split" not in listed else "given"},
        "class_names": names,
        **({"unused_files": unused} if unused else {}),
    }
    return convert(out, opened, index, options, card)


def read_folders(source: Source, last_folder: bool = False) -> pd.DataFrame:
    """List the images of class folders.

    Args:
        source: The opened folder.
        last_folder: Whether images may be in nested folders, of which the innermost one is the class.

    Returns:
        Path and label (the class folder's name) of each image.

    Raises:
        PreparationError: there is no image, or an image is not in a class folder.
    """
    images = [name for name in source.files if is_image(name)]
    loose = [name for name in images if "/" not in name]
    deep = [name for name in images if name.count("/") > 1 and not last_folder]
    if not images:
        raise PreparationError(
            f"{source.path} contains no images in class folders (CLASS/IMAGE); file names of images end in "
            f"{', '.join(EXTENSIONS)}"
        )
    if loose:
        raise PreparationError(
            f"{source.path}: {len(loose)} of {len(images)} images are not in a class folder, the first is {loose[0]}; "
            "move them to CLASS/IMAGE, or list the images in a CSV file"
        )
    if deep:
        raise PreparationError(
            f"{source.path}: {len(deep)} of {len(images)} images are in nested folders, the first is {deep[0]}; pass "
            f"--last-folder to use the innermost folder as the class (here {PurePosixPath(deep[0]).parent.name!r}; "
            "folders of the same name are one class), or list the images in a CSV file"
        )
    return pd.DataFrame({"path": images, "label": [PurePosixPath(name).parent.name.strip() for name in images]})


def is_image(name: str) -> bool:
    """Return whether a file name has the extension of a supported image format."""
    return name.lower().endswith(EXTENSIONS)


def unread_files(source: Source) -> dict[str, dict]:
    """Count the files that are not images.

    Args:
        source: The opened folder.

    Returns:
        Number of files and their first three names, by extension.
    """
    found: dict[str, list[str]] = {}
    for name in source.files:
        if not is_image(name):
            found.setdefault(PurePosixPath(name).suffix.lower() or "no extension", []).append(name)
    return {suffix: {"files": len(names), "first": names[:3]} for suffix, names in sorted(found.items())}


def number_classes(listed: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Number the classes in the order of their names.

    Args:
        listed: Path and label of each image, and optionally split, camera and role, as text.

    Returns:
        The index (split is empty where none is given; label is -1 for junk and distractors), and the class names.
    """
    role = listed.role if "role" in listed else pd.Series("both", index=listed.index)
    has_class = ~role.isin(UNLABELED_ROLES)
    names = sorted(set(listed.label[has_class]))
    numbers = {name: number for number, name in enumerate(names)}
    index = pd.DataFrame(
        {
            "label": [numbers[v] if known else -1 for v, known in zip(listed.label, has_class, strict=True)],
            "split": listed.split if "split" in listed else "",
            "role": role,
            "camera": [int(v or -1) for v in listed.camera] if "camera" in listed else -1,
            "source": listed.path,
        }
    )
    return index, names


def assign_splits(index: pd.DataFrame, options: Options) -> pd.DataFrame:
    """Draw the test classes where the index has no splits, and check the splits.

    Args:
        index: The index; split is empty in all rows or in none.
        options: Options with the seed of the draw.

    Returns:
        The index with every class in train or test, or in the given splits.

    Raises:
        PreparationError: too few classes, no training or test images, or a class in two splits.
    """
    if (index.split == "").all():
        classes = np.unique(index.label[index.label >= 0])
        if len(classes) < 4:
            raise PreparationError(
                f"at least 4 classes are needed for training, validation and test: got {len(classes)}; add classes"
            )
        tested = np.random.default_rng(options.seed).choice(classes, round(TEST_SHARE * len(classes)), replace=False)
        is_test = index.label.isin(tested) | (index.label < 0)  # junk and distractors are gallery images
        index = index.assign(split=np.where(is_test, "test", "train"))
    lacking = sorted({"train", "test"} - set(index.split))
    if lacking:
        raise PreparationError(
            f"column split of the CSV has no image of {' and '.join(lacking)}; train and test are required"
        )
    crossing = index[index.label >= 0].groupby("label").split.nunique()
    if (crossing > 1).any():
        images = index[index.label == crossing.index[crossing > 1][0]]
        raise PreparationError(
            f"the class of {images.source.iloc[0]} has images in {' and '.join(sorted(set(images.split)))}; put all "
            "images of a class in one split"
        )
    return index


def choose_validation(index: pd.DataFrame, protocol: str, options: Options) -> tuple[pd.DataFrame, Options]:
    """Draw validation classes, unless the index has some, that are sufficient to select a checkpoint.

    Args:
        index: The index with train and test, and possibly val.
        protocol: The evaluation protocol.
        options: Options with `val_fraction` and the seed of the draw.

    Returns:
        The index with validation classes, and the options with the `val_fraction` that was used. If the given one is
        too small, the smallest sufficient number of classes is used, at most half of the training classes. With
        `val_fraction` 0, there are no validation classes.

    Raises:
        PreparationError: no such choice is sufficient.
    """
    if (index.split == "val").any():
        if can_select_checkpoint(index, protocol):
            return index, options
        raise PreparationError(
            f"{too_small(index, protocol)}; add classes or images of split val to the CSV, or give these images the "
            f"split train and pass --val-fraction 0: {NO_VALIDATION}"
        )
    held = hold_out(index, options.val_fraction, options.seed)
    if options.val_fraction == 0 or can_select_checkpoint(held, protocol):
        return held, options
    total, least = index.label[index.split == "train"].nunique(), held.label[held.split == "val"].nunique() + 1
    remedy = f"add classes or images (training and validation have {total} classes)"
    for n in range(least, total - 1):
        more = hold_out(index, n, options.seed)
        if can_select_checkpoint(more, protocol):
            if n <= total / 2:
                return more, replace(options, val_fraction=n)
            remedy += f", or pass --val-fraction {n}"
            break
    raise PreparationError(f"{too_small(held, protocol)}; {remedy}, or pass --val-fraction 0: {NO_VALIDATION}")


def choose_protocol(index: pd.DataFrame) -> str:
    """Return the evaluation protocol that fits the roles and cameras of the test images.

    Args:
        index: The index with splits.

    Returns:
        "all-vs-rest" if all roles are both; for queries and gallery, "market1501" with cameras and "query-gallery"
        without.

    Raises:
        PreparationError: the test has neither queries nor gallery.
    """
    test = index[index.split == "test"]
    roles = set(test.role)
    if roles == {"both"}:
        return "all-vs-rest"
    if not {"query", "gallery"} <= roles:
        raise PreparationError(
            f"roles of the test images must include query and gallery: got {', '.join(sorted(roles))}; leave the role "
            "out to let every image query all others"
        )
    return "market1501" if (test.camera >= 0).any() else "query-gallery"


def fit_protocol(index: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Check that roles and cameras fit a protocol, and give all images the role both if it has no other roles.

    Args:
        index: The index with splits.
        protocol: The evaluation protocol.

    Returns:
        The index.

    Raises:
        PreparationError: a training or validation image has a role, or the protocol cannot use a role or a camera.
    """
    others = index[(index.split != "test") & (index.role != "both")]
    if len(others):
        raise PreparationError(
            f"role of {others.source.iloc[0]} must be both: got {others.role.iloc[0]}; other roles are for test images"
        )
    single_shot = "single-shot" in protocol
    if single_shot or protocol == "all-vs-rest":
        index = index.assign(role=index.role.replace({"query": "both", "gallery": "both"}))
        unused = index[index.role != "both"]
        if len(unused):
            raise PreparationError(
                f"role of {unused.source.iloc[0]} must be both, query or gallery with protocol {protocol}: got "
                f"{unused.role.iloc[0]} ({len(unused):,} images); remove these rows or choose another --protocol"
            )
    test = index[index.split == "test"]
    missing = test.source[test.camera < 0]
    if len(missing) and (single_shot or protocol == "market1501"):
        raise PreparationError(
            f"camera of {missing.iloc[0]} is empty; protocol {protocol} needs the camera of every test image (missing "
            f"in {len(missing):,} of {len(test):,}); add them, or choose another --protocol"
        )
    if single_shot and test.camera.nunique() != 2:
        raise PreparationError(
            f"protocol {protocol} needs exactly two cameras among the test images: got "
            f"{', '.join(map(str, sorted(set(test.camera))))}; choose another --protocol"
        )
    return index
