"""A small run and a small study."""

import pytest

from hloss.runs.config import parse_config
from tests.helpers.studies import SmallStudy


@pytest.fixture
def config(tiny_data, tmp_path):
    settings = {"dataset": "tiny", "batch_size": 24, "images_per_class": 4, "iterations": 4, "validate_every": 2}
    return parse_config({**settings, "data_dir": str(tiny_data), "runs_dir": str(tmp_path / "runs"), "device": "cpu"})


@pytest.fixture
def study(tiny_data, tmp_path):
    content = {
        "title": "a test",
        "fixed": {
            "dataset": "tiny",
            "batch_size": 24,
            "images_per_class": 4,
            "iterations": 4,
            "validate_every": 2,
            "data_dir": str(tiny_data),
            "runs_dir": str(tmp_path / "runs"),
        },
        "seeds": [0, 1],
        "runs": [
            {"name": "histogram", "set": {"loss": "histogram"}, "cross": {"n_bins": [20, 50]}},
            {"name": "raw pixels", "set": {"loss": "none", "iterations": 0, "network": "pixels"}, "seeds": [0]},
        ],
    }
    return SmallStudy(content, tmp_path)
