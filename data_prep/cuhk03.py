"""Prepare CUHK03: pedestrians seen by five pairs of cameras.

The images are in one MATLAB file (version 7.3, which is HDF5). Two protocols:

single-shot (the paper): the identities of camera pairs 1-3. One of the file's
20 test sets of 100 identities is tested, 100 other identities are for
validation and 1,160 for training.

767/700 (Zhong et al. 2017): all five camera pairs, split by an index file
(--index-file). Its results are not comparable with single-shot.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data_prep.archives import extract
from data_prep.conversion import Options, open_original, write_images
from data_prep.originals import Original
from data_prep.prepared import DOWNLOAD_AGAIN, PreparationError, check_counts, count, hold_out, new_folder
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
PAIR_SIZES = (843, 440, 77, 58, 49)  # identities per camera pair; the paper uses the 1,360 of the first three
# Images of all five pairs: the sums of the counts of the 767/700 protocol.
PUBLISHED = {"labeled": 14_096, "detected": 14_097}
PUBLISHED_767 = {
    "labeled": {"train images": 7_368, "query images": 1_400, "gallery images": 5_328},
    "detected": {"train images": 7_365, "query images": 1_400, "gallery images": 5_332},
}
CLASSES_767 = {"train classes": 767, "test classes": 700}
TEST_SETS, TEST_SIZE = 20, 100
SLOTS = 10  # at most five images of each of two views per identity
VAL_CLASSES = 100
OPTIONS = Options(ImageSettings(160, 60, "stretch"), val_fraction=VAL_CLASSES)
MAT = "cuhk-03.mat"


@dataclass(frozen=True)
class Variant:
    """Variant of the dataset to prepare.

    Attributes:
        boxes: "labeled" (drawn by people) or "detected" (by an algorithm).
        camera_pairs: 3 (as in the paper) or 5.
        test_set: Number of the test set, 1 to 20.
        index_file: Index file of the 767/700 protocol; None for single-shot. It replaces `camera_pairs` and `test_set`.
    """

    boxes: str = "labeled"
    camera_pairs: int = 3
    test_set: int = 1
    index_file: Path | None = None

    def __post_init__(self) -> None:
        if self.boxes not in PUBLISHED:
            raise PreparationError(f"--boxes must be one of {', '.join(PUBLISHED)}: got {self.boxes}")
        if self.camera_pairs not in (3, 5):
            raise PreparationError(f"--camera-pairs must be 3 (as in the paper) or 5: got {self.camera_pairs}")
        if not 1 <= self.test_set <= TEST_SETS:
            raise PreparationError(f"--test-set must be from 1 to {TEST_SETS}: got {self.test_set}")
        if self.index_file and not self.index_file.is_file():
            raise PreparationError(f"--index-file must be an existing file: got {self.index_file}")
        if self.index_file and (self.camera_pairs, self.test_set) != (3, 1):
            raise PreparationError(
                "--index-file cannot be combined with --camera-pairs or --test-set: it splits all five camera pairs"
            )

    def settings(self) -> dict:
        """Return the settings that the card records."""
        if self.index_file:
            index = {"index_file": self.index_file.name, "index_sha256": file_sha256(self.index_file)}
            return {"boxes": self.boxes, "camera_pairs": 5, **index}
        return {"boxes": self.boxes, "camera_pairs": self.camera_pairs, "test_set": self.test_set}


PAPER_VARIANT = Variant()


def prepare(source: Path, out: Path, options: Options = OPTIONS, variant: Variant = PAPER_VARIANT) -> dict:
    """Prepare CUHK03 from its archive or extracted folder.

    Args:
        source: The archive or its extracted folder.
        out: The folder to write.
        options: Options of the preparation.
        variant: Variant of the dataset.

    Returns:
        The card.

    Raises:
        PreparationError: the source is not the original, an image cannot be decoded, or `out` cannot be replaced.
    """
    _h5py()  # A missing package is reported before the archive is read.
    opened, found = open_original(source, out, ORIGINAL, options, texts=())
    opened = opened.relative_to(MAT)
    with new_folder(out, ORIGINAL.name) as folder:
        # HDF5 needs random access, which a packed archive does not allow; the file is unpacked beside the output.
        # It is read without a lock, which some network file systems refuse.
        file = extract(opened, MAT, folder)
        try:
            with _h5py().File(file, "r", locking=False) as mat:
                images = read_images(mat, variant.boxes)
                if variant.index_file:
                    index = split_767(images, variant.index_file, variant)
                else:
                    index = split_single_shot(images, read_test_set(mat, variant.test_set), variant)
                index = hold_out(index, options.val_fraction, options.seed)
                card = _card(options, variant, found) | {"ignored_files": opened.ignored}
                write_images(folder, _pixels(mat, index), index[list(COLUMNS)], options, card)
        except (OSError, KeyError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno:  # an error of the disk, not of HDF5
                raise
            raise PreparationError(
                f"{opened.path}: {MAT} is damaged or of another form ({error}); {DOWNLOAD_AGAIN}"
            ) from error
        finally:
            if file.parent == folder:
                file.unlink(missing_ok=True)
    return json.loads((Path(out) / "card.json").read_text())


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise PreparationError("package h5py is not installed; run pip install 'hloss[cuhk03]'") from None
    return h5py


def _card(options: Options, variant: Variant, found: dict) -> dict:
    return {
        "name": ORIGINAL.name,
        "source": f"{ORIGINAL.title}, {ORIGINAL.page}",
        "original": found,
        "licence": ORIGINAL.licence,
        "protocol": "cuhk03-767-700" if variant.index_file else "cuhk03-single-shot",
        "recall_at": [1, 5, 10, 15, 20],
        "settings": {**options.settings(), **variant.settings()},
        "published": published(variant),
    }


def published(variant: Variant) -> dict[str, int]:
    """Return the published counts of a variant.

    Args:
        variant: Variant of the dataset.

    Returns:
        Counts by name; for single-shot only the identities, because no image counts are published.
    """
    if variant.index_file:
        return {**CLASSES_767, **PUBLISHED_767[variant.boxes]}
    return {"train classes": sum(PAIR_SIZES[: variant.camera_pairs]) - TEST_SIZE, "test classes": TEST_SIZE}


def read_images(mat: Any, boxes: str) -> pd.DataFrame:
    """List the images of the MATLAB file.

    MATLAB stores columns first, so every array is transposed here: a camera pair is (10 slots, identities).

    Args:
        mat: The open HDF5 file.
        boxes: "labeled" or "detected".

    Returns:
        One row per image: label (number of the identity over all pairs, from 0), pair and person (from 1), camera
        (the view, 1 or 2), source (the name in the 767/700 index file) and reference (HDF5 reference of the pixels).

    Raises:
        PreparationError: the numbers of identities or images are not the published ones, or an image has another form.
    """
    pairs = [mat[reference][()] for reference in mat[boxes][0]]
    sizes = tuple(pair.shape[1] for pair in pairs)
    if sizes != PAIR_SIZES or any(pair.shape[0] != SLOTS for pair in pairs):
        raise PreparationError(
            f"{MAT}: identities per camera pair ({boxes}) must be {PAIR_SIZES}: got {sizes}; {DOWNLOAD_AGAIN}"
        )
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
    """Return whether a cell contains an image; an empty cell is stored as its two dimensions."""
    if "MATLAB_empty" in cell.attrs or (cell.ndim < 3 and cell.size <= 2):
        return False
    if cell.ndim != 3 or cell.shape[0] != 3 or cell.dtype != np.uint8:
        raise PreparationError(
            f"{MAT}: image {name} must be uint8 (3, width, height): got {cell.dtype} {cell.shape}; {DOWNLOAD_AGAIN}"
        )
    return True


def read_test_set(mat: Any, number: int) -> set[tuple[int, int]]:
    """Return the identities of a test set.

    Args:
        mat: The open HDF5 file.
        number: Number of the test set, from 1.

    Returns:
        Camera pair and person of each identity, both from 1.

    Raises:
        PreparationError: the test sets have another form.
    """
    references = mat["testsets"][0]
    if len(references) != TEST_SETS:
        raise PreparationError(f"{MAT} must have {TEST_SETS} test sets: got {len(references)}; {DOWNLOAD_AGAIN}")
    listed = mat[references[number - 1]][()].T.astype(int)
    found = {(int(pair), int(person)) for pair, person in listed}
    wrong = sorted(p for p in found if not (1 <= p[0] <= len(PAIR_SIZES) and 1 <= p[1] <= PAIR_SIZES[p[0] - 1]))
    if wrong or len(found) != TEST_SIZE:
        raise PreparationError(
            f"{MAT}: test set {number} must have {TEST_SIZE} existing identities: got {len(found)}, of which "
            f"{len(wrong)} do not exist; {DOWNLOAD_AGAIN}"
        )
    return found


def split_single_shot(images: pd.DataFrame, tested: set[tuple[int, int]], variant: Variant) -> pd.DataFrame:
    """Split by a test set, as in the paper: its identities for testing, all others of the camera pairs for training.

    Args:
        images: Table of `read_images`.
        tested: Camera pair and person of each test identity.
        variant: Variant of the dataset.

    Returns:
        The index without validation split.

    Raises:
        PreparationError: the test set needs other camera pairs, or the counts are not the published ones.
    """
    beyond = sorted(p for p in tested if p[0] > variant.camera_pairs)
    if beyond:
        raise PreparationError(
            f"--test-set {variant.test_set} contains identities of camera pair {beyond[0][0]}; pass --camera-pairs 5"
        )
    images = images[images.pair <= variant.camera_pairs].reset_index(drop=True)
    is_tested = [person in tested for person in zip(images.pair, images.person, strict=True)]
    index = images.assign(split=np.where(is_tested, "test", "train"), role="both")
    check_counts(ORIGINAL.title, count(index), published(variant))
    return index


def split_767(images: pd.DataFrame, index_file: Path, variant: Variant) -> pd.DataFrame:
    """Split by an index file of the 767/700 protocol.

    Args:
        images: Table of `read_images`.
        index_file: `cuhk03_new_protocol_config_labeled.mat` or `cuhk03_new_protocol_config_detected.mat`.
        variant: Variant of the dataset.

    Returns:
        The index without validation split.

    Raises:
        PreparationError: the file is not such an index, or it contradicts the images or the published counts.
    """
    names, identities, parts = _read_index_file(index_file)
    listed = pd.DataFrame({"source": names, "identity": identities, "part": ""})
    for part, rows in parts.items():
        listed.loc[rows, "part"] = part
    listed = listed[listed.part != ""]
    index = images.merge(listed, on="source", how="inner")
    if len(index) != len(listed) or listed.source.duplicated().any():
        raise PreparationError(
            f"{index_file} lists {len(listed):,} images, of which {len(index):,} are in {MAT} ({variant.boxes}); "
            "check that --boxes fits the index file"
        )
    if (index.groupby("identity").label.nunique() > 1).any() or (index.groupby("label").identity.nunique() > 1).any():
        raise PreparationError(f"{index_file}: labels contradict the identities in the file names; {DOWNLOAD_AGAIN}")
    index["split"] = np.where(index.part == "train", "train", "test")
    index["role"] = index.part.replace({"train": "both"})
    counts = count(index) | {f"{part} images": n for part, n in index.groupby("part").size().items()}
    check_counts(f"767/700 protocol ({variant.boxes})", counts, published(variant))
    return index


def _read_index_file(file: Path) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Return image names, identities, and the rows (from 0) of train, query and gallery."""
    try:
        content = loadmat(file)
        names = [str(cell[0]).rpartition(".")[0] for cell in content["filelist"].ravel()]
        parts = {part: content[f"{part}_idx"].ravel().astype(int) - 1 for part in ("train", "query", "gallery")}
        identities = content["labels"].ravel().astype(int)
    except (OSError, KeyError, ValueError, TypeError, IndexError, NotImplementedError, MatReadError) as error:
        raise PreparationError(
            f"{file} is not an index file of the 767/700 protocol ({type(error).__name__}: {error}); give "
            "cuhk03_new_protocol_config_labeled.mat or cuhk03_new_protocol_config_detected.mat"
        ) from error
    rows = np.concatenate(list(parts.values()))
    if len(identities) != len(names) or len(set(rows)) != len(rows) or not ((rows >= 0) & (rows < len(names))).all():
        raise PreparationError(
            f"{file}: its lists of images, labels and rows differ in length or overlap; {DOWNLOAD_AGAIN}"
        )
    return names, identities, parts


def _pixels(mat: Any, index: pd.DataFrame) -> Iterator[tuple[int, np.ndarray]]:
    for row, reference in enumerate(index.reference):
        yield row, mat[reference][()].T  # (3, width, height) to (height, width, 3)
