"""Settings of a small run."""

import pytest


@pytest.fixture
def settings(tiny_data, tmp_path):
    """A run of 12 iterations, which saves a checkpoint after each."""
    return {
        "dataset": "tiny",
        "batch_size": 24,
        "images_per_class": 4,
        "iterations": 12,
        "validate_every": 4,
        "data_dir": str(tiny_data),
        "runs_dir": str(tmp_path / "runs"),
        "device": "cpu",
        "checkpoint_seconds": 0.0,
    }
