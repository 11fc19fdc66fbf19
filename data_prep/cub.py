"""Prepare CUB-200-2011: birds of 200 classes.

Classes 1-100 are for training, 101-200 for testing, as in Song et al. (2016).
The dataset's `train_test_split.txt` splits the images of each class, which is
another task; it is not read.
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
# Counts that the original must have. Classes 1 to "train classes" are for training, the others for testing.
PUBLISHED = {"train classes": 100, "test classes": 100, "train images": 5_864, "test images": 5_924}
OPTIONS = Options(ImageSettings(256, 256, "pad"))
TEXTS = ("images.txt", "image_class_labels.txt")


def prepare(source: Path, out: Path, options: Options = OPTIONS) -> dict:
    """Prepare CUB-200-2011 from its archive or extracted folder.

    Args:
        source: The archive or its extracted folder.
        out: The folder to write.
        options: Options of the preparation.

    Returns:
        The card.

    Raises:
        PreparationError: the source is not the original, an image cannot be decoded, or `out` cannot be replaced.
    """
    opened, found = open_original(source, out, ORIGINAL, options, TEXTS)
    opened = opened.relative_to("images.txt")
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
    """Build the index from `images.txt` and `image_class_labels.txt`.

    Args:
        source: The opened source.

    Returns:
        The index, one row per image, without validation split. A label is the number of the class, 1 to 200.

    Raises:
        PreparationError: the files contradict each other, the folders or the published counts.
    """
    paths = _by_image(source, "images.txt")
    labels = {image: int(label) for image, label in _by_image(source, "image_class_labels.txt").items()}
    if paths.keys() != labels.keys():
        image = min(paths.keys() ^ labels.keys())
        raise PreparationError(
            f"image {image} is in only one of images.txt and image_class_labels.txt; {DOWNLOAD_AGAIN}"
        )
    for image, path in paths.items():
        if _class_of(path) != labels[image]:
            raise PreparationError(
                f"image_class_labels.txt: class of image {image} differs from its folder: got {labels[image]} for "
                f"{path}; {DOWNLOAD_AGAIN}"
            )
    n_train, n_test = PUBLISHED["train classes"], PUBLISHED["test classes"]
    expected = set(range(1, n_train + n_test + 1))
    check_classes("image_class_labels.txt", set(labels.values()), expected)
    folders = {name.split("/")[1] for name in source.files if name.startswith("images/")}
    check_classes("folder images/", {_class_of(folder) for folder in folders}, expected)
    rows = [
        (labels[image], "train" if labels[image] <= n_train else "test", "both", -1, f"images/{path}")
        for image, path in paths.items()
    ]
    index = pd.DataFrame(rows, columns=list(COLUMNS))
    check_counts(ORIGINAL.title, count(index), PUBLISHED)
    return index


def _class_of(path: str) -> int:
    """Return the class number, the first part of `001.Black_footed_Albatross/...`."""
    number = path.partition(".")[0]
    if not number.isdigit():
        raise PreparationError(f"class folder must be named NUMBER.CLASS: got images/{path}; {DOWNLOAD_AGAIN}")
    return int(number)


def _by_image(source: Source, name: str) -> dict[str, str]:
    """Return the second column of a list by the first, the image number."""
    lines = read_table(source, name, 2, numbers=(0, 1) if name != "images.txt" else (0,))
    return dict(lines)
