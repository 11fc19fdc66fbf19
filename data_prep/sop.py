"""Prepare Stanford Online Products: photographs of 22,634 products.

A class is a product, and a super class one of twelve kinds of products. The
archive contains the split of Song et al. (2016).
"""

from pathlib import Path

import pandas as pd

from data_prep.archives import Source, read_table
from data_prep.conversion import Options, convert, open_original
from data_prep.originals import Original
from data_prep.prepared import DOWNLOAD_AGAIN, PreparationError, check_classes, check_counts, count, hold_out
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
    """Prepare Stanford Online Products from its archive or extracted folder.

    Args:
        source: The archive or its extracted folder.
        out: The folder to write.
        options: Options of the preparation.

    Returns:
        The card.

    Raises:
        PreparationError: the source is not the original, an image cannot be decoded, or `out` cannot be replaced.
    """
    opened, found = open_original(source, out, ORIGINAL, options, LISTS.values())
    opened = opened.relative_to(LISTS["train"])
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
    """Build the index from `Ebay_train.txt` and `Ebay_test.txt`.

    Args:
        source: The opened source.

    Returns:
        The index, one row per image, without validation split. A label is the column class_id.

    Raises:
        PreparationError: the lists contradict the folders or the published counts.
    """
    rows = []
    kinds: dict[str, str] = {}
    for split, name in LISTS.items():
        for _, label, kind, path in read_table(source, name, 4, numbers=(0, 1, 2), header=True):
            folder = path.partition("/")[0]
            if kinds.setdefault(kind, folder) != folder or list(kinds.values()).count(folder) > 1:
                raise PreparationError(
                    f"{name}: super class of {path} differs from that of the other images in its folder: got {kind}; "
                    f"{DOWNLOAD_AGAIN}"
                )
            rows.append((int(label), split, "both", -1, path))
    index = pd.DataFrame(rows, columns=list(COLUMNS))
    check_classes(
        " and ".join(LISTS.values()),
        set(index.label),
        set(range(1, PUBLISHED["train classes"] + PUBLISHED["test classes"] + 1)),
    )
    folders = {name.partition("/")[0] for name in source.files if "/" in name}
    check_classes("image folders", folders, set(kinds.values()))
    check_counts(ORIGINAL.title, count(index), PUBLISHED)
    return index
