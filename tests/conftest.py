"""A small prepared dataset for the tests of runs and studies."""

import multiprocessing
import signal

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from data_prep.prepared import create_images, finish, new_folder

settings.register_profile("hloss", deadline=None)  # a busy machine is no error
settings.load_profile("hloss")

# A shell makes programs in the background ignore Ctrl-C, and processes that tests start and interrupt would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that tests start are forked from one that has imported these modules, which would take each some seconds.
PRELOADED = ["hloss.runs.__main__", "pytorch_metric_learning.losses", "pytest", "torchvision.transforms.v2"]
multiprocessing.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder with the dataset `tiny`: 30 classes of 6 noisy 16 x 16 patterns."""
    rng = np.random.default_rng(0)
    data = tmp_path_factory.mktemp("data")
    label = np.repeat(np.arange(30), 6)
    split = np.where(label < 16, "train", np.where(label < 22, "val", "test"))
    patterns = rng.uniform(60, 200, (30, 4, 4)).repeat(4, 1).repeat(4, 2)
    pixels = patterns[label] + rng.normal(0, 40, (180, 16, 16))
    with new_folder(data / "tiny") as folder:
        images = create_images(folder, 180, 16, 16, 1)
        images[:] = pixels.clip(0, 255).astype(np.uint8)[..., None]
        images.flush()
        index = {"label": label, "split": split, "role": "both", "camera": -1, "source": "pattern"}
        card = {"name": "tiny", "protocol": "all-vs-rest", "recall_at": [1, 2, 4], "val_from_train": True}
        finish(folder, pd.DataFrame(index), card)
    return data
