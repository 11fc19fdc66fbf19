"""Market-1501: pedestrians before six cameras, cut out by a detector. Junk and distractors are kept and named.

Roles of the test split: `query`; `gallery`; `distractor` (0000: of nobody, stays in the gallery as a wrong answer);
`junk` (-1: badly cut, neither right nor wrong); `pool` (hand-drawn boxes of the query identities, from which the
features of several queries of one identity and camera are pooled).
"""

import re
from pathlib import Path

import pandas as pd

from data_prep.archives import Source
from data_prep.conversion import Options, begin, convert
from data_prep.originals import Original
from data_prep.prepared import PreparationError, check_classes, check_counts, hold_out
from hloss.runs.datasets import COLUMNS
from hloss.runs.images import EXTENSIONS, ImageSettings

ORIGINAL = Original(
    name="market1501",
    title="Market-1501 (Zheng et al. 2015)",
    file="Market-1501-v15.09.15.zip",
    page="https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
    licence="research; no licence is published, the images show people",
    images=36_036,  # and the hand-drawn boxes of the query identities
    image_bytes=160 * 60 * 3,
    md5="65005ab7d12ec1c44de4eeafe813e68a",
)
# 19,732 images in bounding_box_test, 15,913 of them not junk. How many of these are distractors is published as 2,793,
# which other counts contradict; the hand-drawn boxes are not counted in print. Neither is required.
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
    """Write the prepared Market-1501 to `out` from its archive or extracted folder; returns the card."""
    opened, found = begin(source, out, ORIGINAL, options, texts=())
    opened = opened.below("bounding_box_train/")
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
    """The index from the folders and file names, checked against the published counts.

    A label is the identity's number, 1 to 1501, or -1 for junk and distractors; a camera is 1 to 6.
    """
    rows = []
    for folder, role in FOLDERS.items():
        names = [name for name in source.files if name.startswith(f"{folder}/") and name.lower().endswith(EXTENSIONS)]
        if not names:
            raise PreparationError(f"{source.path} lacks {folder}/ or its images; get the original again")
        split = "train" if folder == "bounding_box_train" else "test"
        rows += [(*_read_name(name, role), name, split) for name in sorted(names)]
    index = pd.DataFrame(rows, columns=["label", "role", "camera", "source", "split"])
    queried = index.label[index.role == "query"]
    index = index[(index.role != "pool") | index.label.isin(queried)].reset_index(drop=True)
    _check(index)
    return index[list(COLUMNS)]


def _read_name(name: str, role: str) -> tuple[int, str, int]:
    """Label, role and camera from `0002_c1s1_000451_03.jpg`."""
    found = NAME.fullmatch(name.rpartition("/")[2])
    if not found:
        raise PreparationError(
            f"{name} is not named like PPPP_cCsS_FFFFFF_BB.jpg; take it out or get the original again"
        )
    identity, camera = int(found[1]), int(found[2])
    if identity <= 0:
        if role != "gallery":
            raise PreparationError(f"{name}: only bounding_box_test holds junk and distractors; get the original again")
        return -1, "junk" if identity < 0 else "distractor", camera
    return identity, role, camera


def _check(index: pd.DataFrame) -> None:
    of = {role: index[index.role == role] for role in ("both", "query", "gallery", "junk", "distractor")}
    both = sorted(set(of["both"].label) & set(index.label[index.split == "test"]))
    if both:
        raise PreparationError(
            f"identities {both[:10]} are in bounding_box_train and in a test folder; get the original"
        )
    check_classes("the archive", set(index.label[index.label > 0]), set(range(1, IDENTITIES + 1)))
    found = {
        "train classes": of["both"].label.nunique(),
        "test classes": of["gallery"].label.nunique(),
        "train images": len(of["both"]),
        "query images": len(of["query"]),
        "query classes": of["query"].label.nunique(),
        "gallery and distractor images": len(of["gallery"]) + len(of["distractor"]),
        "junk images": len(of["junk"]),
    }
    check_counts(ORIGINAL.title, found, PUBLISHED)
