"""Stanford Online Products: 22,634 products of twelve kinds. The split of Song et al. (2016) is in the archive."""

from pathlib import Path

import pandas as pd

from data_prep.archives import Source, table
from data_prep.conversion import Options, begin, convert
from data_prep.originals import Original
from data_prep.prepared import PreparationError, check_classes, check_counts, count, hold_out
from hloss.runs.datasets import COLUMNS
from hloss.runs.images import ImageSettings

ORIGINAL = Original(
    name="sop",
    title="Stanford Online Products (Song et al. 2016)",
    file="Stanford_Online_Products.zip",
    page="https://cvgl.stanford.edu/projects/lifted_struct/",
    licence="research; no licence is published, the photographs belong to their sellers on eBay",
    images=120_053,
    image_bytes=256 * 256 * 3,
    size=3_083_860_082,
    md5="7f73d41a2f44250d4779881525aea32e",
    sha256="b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
)
PUBLISHED = {"train classes": 11_318, "test classes": 11_316, "train images": 59_551, "test images": 60_502}
OPTIONS = Options(ImageSettings(256, 256, "pad"))
LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}


def prepare(source: Path, out: Path, options: Options = OPTIONS) -> dict:
    """Write the prepared Online Products to `out` from its archive or extracted folder; returns the card."""
    opened, found = begin(source, out, ORIGINAL, options, LISTS.values())
    opened = opened.below(LISTS["train"])
    index = hold_out(read_index(opened), options.val_fraction, options.seed)
    card = {
        "name": ORIGINAL.name,
        "source": f"{ORIGINAL.title}, {ORIGINAL.page}",
        "original": found,
        "licence": ORIGINAL.licence,
        "protocol": "all-vs-rest",
        "val_from_train": True,
        "recall_at": [1, 10, 100, 1000],
        "settings": {
            **options.settings(),
            "split": "Ebay_train.txt train and val, Ebay_test.txt test (Song et al. 2016)",
        },
        "published": PUBLISHED,
    }
    return convert(out, opened, index, options, card)


def read_index(source: Source) -> pd.DataFrame:
    """The index from the two lists, checked against the folders and the published counts. A label is the class_id."""
    rows = []
    kinds: dict[str, str] = {}
    for split, name in LISTS.items():
        for _, label, kind, path in table(source, name, 4, numbers=(0, 1, 2), header=True):
            folder = path.partition("/")[0]
            if kinds.setdefault(kind, folder) != folder or list(kinds.values()).count(folder) > 1:
                raise PreparationError(
                    f"{name} says super class {kind} of {path}, the folders of its other images say another; "
                    "get the original again"
                )
            rows.append((int(label), split, "both", -1, path))
    index = pd.DataFrame(rows, columns=list(COLUMNS))
    check_classes(
        "the lists", set(index.label), set(range(1, PUBLISHED["train classes"] + PUBLISHED["test classes"] + 1))
    )
    folders = {name.partition("/")[0] for name in source.files if "/" in name}
    check_classes("the archive", folders, set(kinds.values()))
    check_counts(ORIGINAL.title, count(index), PUBLISHED)
    return index
