"""CUB-200-2011: birds, 200 classes. The zero-shot protocol of Song et al. (2016): train on 1-100, test on 101-200.

(The dataset's own `train_test_split.txt` divides the images of each class; it is another task and is not read.)
"""

from pathlib import Path

import pandas as pd

from data_prep.archives import Source, table
from data_prep.conversion import Options, begin, convert
from data_prep.originals import Original
from data_prep.prepared import PreparationError, check_classes, check_counts, count, hold_out
from hloss.runs.datasets import COLUMNS
from hloss.runs.images import ImageSettings

ORIGINAL = Original(
    name="cub",
    title="CUB-200-2011 (Wah et al. 2011)",
    file="CUB_200_2011.tgz",
    page="https://data.caltech.edu/records/65de6-vp158",
    licence="non-commercial research and education; the photographs belong to their authors on Flickr",
    images=11_788,
    image_bytes=256 * 256 * 3,
    size=1_150_585_339,
    md5="97eceeb196236b17998738112f37df78",
    sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
)
# What the original must hold; classes 1 to "train classes" are trained on, the others tested (Song et al.).
PUBLISHED = {"train classes": 100, "test classes": 100, "train images": 5_864, "test images": 5_924}
OPTIONS = Options(ImageSettings(256, 256, "pad"))
TEXTS = ("images.txt", "image_class_labels.txt")


def prepare(source: Path, out: Path, options: Options = OPTIONS) -> dict:
    """Write the prepared CUB-200-2011 to `out` from its archive or extracted folder; returns the card."""
    opened, found = begin(source, out, ORIGINAL, options, TEXTS)
    opened = opened.below("images.txt")
    index = read_index(opened)
    index = hold_out(index, options.val_fraction, options.seed)
    card = {
        "name": ORIGINAL.name,
        "source": f"{ORIGINAL.title}, {ORIGINAL.page}",
        "original": found,
        "licence": ORIGINAL.licence,
        "protocol": "all-vs-rest",
        "val_from_train": True,
        "recall_at": [1, 2, 4, 8, 16, 32],
        "settings": {**options.settings(), "split": "classes 1-100 train and val, 101-200 test (Song et al. 2016)"},
        "published": PUBLISHED,
    }
    return convert(out, opened, index, options, card)


def read_index(source: Source) -> pd.DataFrame:
    """The index from `images.txt` and `image_class_labels.txt`, checked against the folders and the published counts.

    A label is the class's number, 1 to 200.
    """
    paths = _by_image(source, "images.txt")
    labels = {image: int(label) for image, label in _by_image(source, "image_class_labels.txt").items()}
    if paths.keys() != labels.keys():
        image = min(paths.keys() ^ labels.keys())
        raise PreparationError(
            f"image {image} is in only one of images.txt and image_class_labels.txt; get the original again"
        )
    for image, path in paths.items():
        if _class_of(path) != labels[image]:
            raise PreparationError(
                f"image_class_labels.txt says class {labels[image]} of image {image}, its folder says another: {path}; "
                "get the original again"
            )
    n_train, n_test = PUBLISHED["train classes"], PUBLISHED["test classes"]
    expected = set(range(1, n_train + n_test + 1))
    check_classes("image_class_labels.txt", set(labels.values()), expected)
    folders = {name.split("/")[1] for name in source.files if name.startswith("images/")}
    check_classes("the folder images/", {_class_of(folder) for folder in folders}, expected)
    rows = [
        (labels[image], "train" if labels[image] <= n_train else "test", "both", -1, f"images/{path}")
        for image, path in paths.items()
    ]
    index = pd.DataFrame(rows, columns=list(COLUMNS))
    check_counts(ORIGINAL.title, count(index), PUBLISHED)
    return index


def _class_of(path: str) -> int:
    """The number in `001.Black_footed_Albatross/...`."""
    number = path.partition(".")[0]
    if not number.isdigit():
        raise PreparationError(f"images/{path} is not in a folder named NUMBER.CLASS; get the original again")
    return int(number)


def _by_image(source: Source, name: str) -> dict[str, str]:
    """Second column by first; the labels' second column is a number too."""
    lines = table(source, name, 2, numbers=(0, 1) if name != "images.txt" else (0,))
    return dict(lines)
