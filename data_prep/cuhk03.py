"""CUHK03: pedestrians seen by five pairs of cameras, in one MATLAB file (version 7.3, which is HDF5).

`single-shot` (the paper): identities of camera pairs 1-3, one of the file's 20 test sets of 100 identities, 100 others
held out for validation, 1,160 to train on. `767-700` (Zhong et al. 2017): all five pairs, divided by an index file of
its own; its numbers do not compare with the other's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.io import loadmat

from data_prep.archives import extract
from data_prep.conversion import Options, begin, fill
from data_prep.originals import Original
from data_prep.prepared import PreparationError, check_counts, count, hold_out, new_folder
from hloss.runs.datasets import COLUMNS
from hloss.runs.files import file_sha256
from hloss.runs.images import ImageSettings

ORIGINAL = Original(
    name="cuhk03",
    title="CUHK03 (Li et al. 2014)",
    file="cuhk03_release.zip",
    page="https://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html (by request)",
    licence="academic research only, not to be passed on; the images show people",
    images=14_097,
    image_bytes=160 * 60 * 3,
    md5="728939e58ad9f0ff53e521857dd8fb43",
)
PAIR_SIZES = (843, 440, 77, 58, 49)  # identities of the camera pairs; the paper's 1,360 are those of the first three
# Images of all five pairs: the sums of what the 767/700 protocol counts.
PUBLISHED = {"labeled": 14_096, "detected": 14_097}
PUBLISHED_767 = {
    "labeled": {"train images": 7_368, "query images": 1_400, "gallery images": 5_328},
    "detected": {"train images": 7_365, "query images": 1_400, "gallery images": 5_332},
}
CLASSES_767 = {"train classes": 767, "test classes": 700}
TEST_SETS, TEST_SIZE = 20, 100
SLOTS = 10  # images of an identity: five of each view
VAL_CLASSES = 100
OPTIONS = Options(ImageSettings(160, 60, "stretch"), val_fraction=VAL_CLASSES)
MAT = "cuhk-03.mat"


@dataclass(frozen=True)
class Choice:
    """Which of the dataset's variants is prepared. `test_set` counts from 1, as the file does."""

    boxes: str = "labeled"
    camera_pairs: int = 3
    test_set: int = 1
    index_file: Path | None = None

    def __post_init__(self) -> None:
        if self.boxes not in PUBLISHED:
            raise PreparationError(f"--boxes {self.boxes}: allowed are {', '.join(PUBLISHED)}")
        if self.camera_pairs not in (3, 5):
            raise PreparationError(f"--camera-pairs {self.camera_pairs}: 3 (as in the paper) or 5")
        if not 1 <= self.test_set <= TEST_SETS:
            raise PreparationError(f"--test-set {self.test_set}: the file has the test sets 1 to {TEST_SETS}")
        if self.index_file and (self.camera_pairs, self.test_set) != (3, 1):
            raise PreparationError("--index-file divides all five pairs: it takes no --camera-pairs and no --test-set")

    def settings(self) -> dict:
        """For the card."""
        if self.index_file:
            index = {"index_file": self.index_file.name, "index_sha256": file_sha256(self.index_file)}
            return {"boxes": self.boxes, "camera_pairs": 5, **index}
        return {"boxes": self.boxes, "camera_pairs": self.camera_pairs, "test_set": self.test_set}


PAPER = Choice()


def prepare(source: Path, out: Path, options: Options = OPTIONS, choice: Choice = PAPER) -> dict:
    """Write the prepared CUHK03 to `out` from its archive or extracted folder; returns the card."""
    _h5py()  # named if it is missing, before anything else
    opened, found = begin(source, out, ORIGINAL, options, texts=())
    opened = opened.below(MAT)
    with new_folder(out, ORIGINAL.name) as folder:
        # HDF5 is read from all over the file, which a packed archive does not allow: it is unpacked beside the output.
        file = extract(opened, MAT, folder)
        try:
            with _h5py().File(file, "r") as mat:
                images = read_images(mat, choice.boxes)
                if choice.index_file:
                    index = split_767(images, choice.index_file, choice)
                else:
                    index = split_single_shot(images, read_test_set(mat, choice.test_set), choice)
                index = hold_out(index, options.val_fraction, options.seed)
                card = _card(options, choice, found) | {"ignored_files": opened.ignored}
                fill(folder, _pixels(mat, index), index[list(COLUMNS)], options, card)
        except (OSError, KeyError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, not HDF5's
                raise
            raise PreparationError(
                f"{opened.path}: {MAT} is damaged or of another form ({error}); get it again"
            ) from error
        finally:
            if file.parent == folder:
                file.unlink(missing_ok=True)
    return json.loads((Path(out) / "card.json").read_text())


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise PreparationError("cuhk03 needs h5py: install the extra, pip install 'hloss[cuhk03]'") from None
    return h5py


def _card(options: Options, choice: Choice, found: dict) -> dict:
    return {
        "name": ORIGINAL.name,
        "source": f"{ORIGINAL.title}, {ORIGINAL.page}",
        "original": found,
        "licence": ORIGINAL.licence,
        "protocol": "cuhk03-767-700" if choice.index_file else "cuhk03-single-shot",
        "recall_at": [1, 5, 10, 15, 20],
        "settings": {**options.settings(), **choice.settings()},
        "published": published(choice),
    }


def published(choice: Choice) -> dict[str, int]:
    """What a choice must hold; of the old protocol only the identities are counted in print."""
    if choice.index_file:
        return {**CLASSES_767, **PUBLISHED_767[choice.boxes]}
    return {"train classes": sum(PAIR_SIZES[: choice.camera_pairs]) - TEST_SIZE, "test classes": TEST_SIZE}


def read_images(mat: Any, boxes: str) -> pd.DataFrame:
    """One row per image of the open file: pair and person (from 1), view (1 or 2), reference (where its pixels are).

    `label` numbers the identities through all pairs from 0; `source` is the name that the 767/700 index uses.
    MATLAB stores columns first, so every array reads transposed: a pair is (10 slots, M identities).
    """
    pairs = [mat[reference][()] for reference in mat[boxes][0]]
    sizes = tuple(pair.shape[1] for pair in pairs)
    if sizes != PAIR_SIZES or any(pair.shape[0] != SLOTS for pair in pairs):
        raise PreparationError(f"{MAT}: {boxes} has {sizes} identities in its camera pairs, published are {PAIR_SIZES}")
    rows = []
    for number, cells in enumerate(pairs, start=1):
        first = sum(sizes[: number - 1])
        for person in range(1, cells.shape[1] + 1):
            for slot in range(1, SLOTS + 1):
                reference = cells[slot - 1, person - 1]
                view = 1 if slot <= SLOTS // 2 else 2
                name = f"{number}_{person:03d}_{view}_{slot:02d}"
                if _is_image(mat[reference], name):
                    rows.append((first + person - 1, number, person, view, name, reference))
    images = pd.DataFrame(rows, columns=["label", "pair", "person", "camera", "source", "reference"])
    check_counts(ORIGINAL.title, {f"{boxes} images": len(images)}, {f"{boxes} images": PUBLISHED[boxes]})
    return images


def _is_image(cell: Any, name: str) -> bool:
    """Whether a cell holds an image; an empty cell is stored as the two numbers of its size."""
    if "MATLAB_empty" in cell.attrs or (cell.ndim < 3 and cell.size <= 2):
        return False
    if cell.ndim != 3 or cell.shape[0] != 3 or cell.dtype != np.uint8:
        raise PreparationError(f"{MAT}: image {name} is {cell.dtype} {cell.shape}, expected uint8 (3, width, height)")
    return True


def read_test_set(mat: Any, number: int) -> set[tuple[int, int]]:
    """Pair and person, both from 1, of a test set's identities."""
    references = mat["testsets"][0]
    if len(references) != TEST_SETS:
        raise PreparationError(f"{MAT} has {len(references)} test sets, published are {TEST_SETS}; get it again")
    listed = mat[references[number - 1]][()].T.astype(int)
    found = {(int(pair), int(person)) for pair, person in listed}
    wrong = sorted(p for p in found if not (1 <= p[0] <= len(PAIR_SIZES) and 1 <= p[1] <= PAIR_SIZES[p[0] - 1]))
    if wrong or len(found) != TEST_SIZE:
        raise PreparationError(
            f"{MAT}: test set {number} has {len(found)} identities (published: {TEST_SIZE}), {len(wrong)} of them of "
            f"nobody {wrong[:3]}; get it again"
        )
    return found


def split_single_shot(images: pd.DataFrame, tested: set[tuple[int, int]], choice: Choice) -> pd.DataFrame:
    """The paper's split: the identities of a test set, and all others of the camera pairs to train on."""
    beyond = sorted(p for p in tested if p[0] > choice.camera_pairs)
    if beyond:
        raise PreparationError(
            f"test set {choice.test_set} has identities of camera pair {beyond[0][0]}; pass --camera-pairs 5"
        )
    images = images[images.pair <= choice.camera_pairs].reset_index(drop=True)
    is_tested = [person in tested for person in zip(images.pair, images.person, strict=True)]
    index = images.assign(split=np.where(is_tested, "test", "train"), role="both")
    check_counts(ORIGINAL.title, count(index), published(choice))
    return index


def split_767(images: pd.DataFrame, index_file: Path, choice: Choice) -> pd.DataFrame:
    """The 767/700 split that `cuhk03_new_protocol_config_labeled.mat` (or `_detected`) describes."""
    names, identities, parts = _read_index_file(index_file)
    listed = pd.DataFrame({"source": names, "identity": identities, "part": ""})
    for part, rows in parts.items():
        listed.loc[rows, "part"] = part
    listed = listed[listed.part != ""]
    index = images.merge(listed, on="source", how="inner")
    if len(index) != len(listed) or listed.source.duplicated().any():
        raise PreparationError(
            f"{index_file} names {len(listed):,} images, of which {len(index):,} are in {MAT} ({choice.boxes}); "
            "is it the index of the other boxes?"
        )
    if (index.groupby("identity").label.nunique() > 1).any() or (index.groupby("label").identity.nunique() > 1).any():
        raise PreparationError(f"{index_file}: its labels contradict the identities that its file names state")
    index["split"] = np.where(index.part == "train", "train", "test")
    index["role"] = index.part.replace({"train": "both"})
    counts = count(index) | {f"{part} images": n for part, n in index.groupby("part").size().items()}
    check_counts(f"767/700 protocol ({choice.boxes})", counts, published(choice))
    return index


def _read_index_file(file: Path) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Image names, their identities, and the rows (from 0) of train, query and gallery."""
    try:
        content = loadmat(file)
        names = [str(cell[0]).rpartition(".")[0] for cell in content["filelist"].ravel()]
        parts = {part: content[f"{part}_idx"].ravel().astype(int) - 1 for part in ("train", "query", "gallery")}
        identities = content["labels"].ravel().astype(int)
    except (OSError, KeyError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise PreparationError(
            f"{file} is no index of the 767/700 protocol ({type(error).__name__}: {error}); give "
            "cuhk03_new_protocol_config_labeled.mat or cuhk03_new_protocol_config_detected.mat"
        ) from error
    rows = np.concatenate(list(parts.values()))
    if len(identities) != len(names) or len(set(rows)) != len(rows) or not ((rows >= 0) & (rows < len(names))).all():
        raise PreparationError(f"{file}: its lists of images, labels and rows do not fit together")
    return names, identities, parts


def _pixels(mat: Any, index: pd.DataFrame) -> Iterator[tuple[int, np.ndarray]]:
    for row, reference in enumerate(index.reference):
        yield row, mat[reference][()].T  # (3, width, height) to (height, width, 3)
