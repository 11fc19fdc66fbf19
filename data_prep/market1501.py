"""Prepare Market-1501: pedestrians seen by six cameras, cropped by a detector.

Roles in the test split: `query`; `gallery`; `distractor` (identity 0000, of
nobody; a wrong answer in the gallery); `junk` (identity -1, badly cropped;
neither right nor wrong); `pool` (hand-drawn boxes of the query identities, whose
features are averaged in the multi-query protocol).
"""

import re
from pathlib import Path

import pandas as pd

from data_prep.archives import Source
from data_prep.conversion import Options, convert, open_original
from data_prep.originals import Original
from data_prep.prepared import DOWNLOAD_AGAIN, PreparationError, check_classes, check_counts, hold_out
from hloss.runs.datasets import COLUMNS
from hloss.runs.images import EXTENSIONS, ImageSettings

ORIGINAL = Original(
    name="market1501",
    title="Market-1501 (Zheng et al. 2015)",
    file="Market-1501-v15.09.15.zip",
    page="https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
    licence="research; no licence is published, the images show people",
    images=36_036,  # without the hand-drawn boxes of the query identities
    image_bytes=160 * 60 * 3,
    md5="65005ab7d12ec1c44de4eeafe813e68a",
)
# bounding_box_test has 19,732 images, of which 15,913 are not junk. The published number of distractors, 2,793,
# contradicts other counts, and no number of hand-drawn boxes is published; so neither is required.
PUBLISHED = {
    "train classes": 751,
    "test classes": 750,
    "train images": 12_936,
    "query images": 3_368,
    "query classes": 750,
    "gallery and distractor images": 15_913,
    "junk images": 3_819,
}
IDENTITIES = 1_501  # numbered from 1
OPTIONS = Options(ImageSettings(160, 60, "stretch"))
FOLDERS = {"bounding_box_train": "both", "query": "query", "bounding_box_test": "gallery", "gt_bbox": "pool"}
NAME = re.compile(r"(-1|\d{4})_c([1-6])s\d.*\.jpg")


def prepare(source: Path, out: Path, options: Options = OPTIONS) -> dict:
    """Prepare Market-1501 from its archive or extracted folder.

    Args:
        source: The archive or its extracted folder.
        out: The folder to write.
        options: Options of the preparation.

    Returns:
        The card.

    Raises:
        PreparationError: the source is not the original, an image cannot be decoded, or `out` cannot be replaced.
    """
    opened, found = open_original(source, out, ORIGINAL, options, texts=())
    opened = opened.relative_to("bounding_box_train/")
    index = hold_out(read_index(opened), options.val_fraction, options.seed)
    card = {
        "name": ORIGINAL.name,
        "source": f"{ORIGINAL.title}, {ORIGINAL.page}",
        "original": found,
        "licence": ORIGINAL.licence,
        "protocol": "market1501",
        "val_from_train": True,
        "recall_at": [1, 5, 10, 15, 20],
        "settings": {**options.settings(), "split": "the archive's folders"},
        "published": PUBLISHED,
    }
    return convert(out, opened, index, options, card)


def read_index(source: Source) -> pd.DataFrame:
    """Build the index from the folders and file names.

    Args:
        source: The opened source.

    Returns:
        The index, one row per image, without validation split. A label is the number of the
        identity, 1 to 1501, or -1 for junk and distractors. A camera is 1 to 6.

    Raises:
        PreparationError: a folder or identity is missing, a file name is wrong, or a count is not the published one.
    """
    rows = []
    for folder, role in FOLDERS.items():
        names = [name for name in source.files if name.startswith(f"{folder}/") and name.lower().endswith(EXTENSIONS)]
        if not names:
            raise PreparationError(f"{source.path} contains no images in {folder}/; {DOWNLOAD_AGAIN}")
        split = "train" if folder == "bounding_box_train" else "test"
        rows += [(*_read_name(name, role), name, split) for name in sorted(names)]
    index = pd.DataFrame(rows, columns=["label", "role", "camera", "source", "split"])
    queried = index.label[index.role == "query"]
    index = index[(index.role != "pool") | index.label.isin(queried)].reset_index(drop=True)
    _check(index)
    return index[list(COLUMNS)]


def _read_name(name: str, role: str) -> tuple[int, str, int]:
    """Return label, role and camera of a name such as `0002_c1s1_000451_03.jpg`."""
    found = NAME.fullmatch(name.rpartition("/")[2])
    if not found:
        raise PreparationError(
            f"file name must have the form PPPP_cCsS_FFFFFF_BB.jpg: got {name}; remove the file, or {DOWNLOAD_AGAIN}"
        )
    identity, camera = int(found[1]), int(found[2])
    if identity <= 0:
        if role != "gallery":
            raise PreparationError(f"{name}: junk and distractors must be in bounding_box_test; {DOWNLOAD_AGAIN}")
        return -1, "junk" if identity < 0 else "distractor", camera
    return identity, role, camera


def _check(index: pd.DataFrame) -> None:
    by_role = {role: index[index.role == role] for role in ("both", "query", "gallery", "junk", "distractor")}
    both = sorted(set(by_role["both"].label) & set(index.label[index.split == "test"]))
    if both:
        raise PreparationError(
            f"identities {both[:10]} are in bounding_box_train and in a test folder; {DOWNLOAD_AGAIN}"
        )
    check_classes("image files", set(index.label[index.label > 0]), set(range(1, IDENTITIES + 1)))
    found = {
        "train classes": by_role["both"].label.nunique(),
        "test classes": by_role["gallery"].label.nunique(),
        "train images": len(by_role["both"]),
        "query images": len(by_role["query"]),
        "query classes": by_role["query"].label.nunique(),
        "gallery and distractor images": len(by_role["gallery"]) + len(by_role["distractor"]),
        "junk images": len(by_role["junk"]),
    }
    check_counts(ORIGINAL.title, found, PUBLISHED)
