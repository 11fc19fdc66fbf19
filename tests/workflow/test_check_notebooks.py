"""The check that committed notebooks were executed from top to bottom."""

import json
import subprocess
import sys

import pytest


def check(file):
    command = [sys.executable, "workflow/scripts/check_notebooks.py", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def written(file, *counts):
    cells = [{"cell_type": "markdown"}, *({"cell_type": "code", "execution_count": count} for count in counts)]
    file.write_text(json.dumps({"cells": cells}))
    return file


def test_refuses_no_notebook():
    done = subprocess.run([sys.executable, "workflow/scripts/check_notebooks.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the following arguments are required: NOTEBOOK" in done.stderr


def test_accepts_cells_that_were_executed_in_order(tmp_path):
    done = check(written(tmp_path / "a.ipynb", 1, 2, 3))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("counts", [(2, 1), (1, None), (1, 3)])
def test_refuses_cells_that_were_not_executed_in_order(counts, tmp_path):
    done = check(written(tmp_path / "a.ipynb", *counts))
    assert (done.returncode, done.stderr) == (1, "")
    assert "a.ipynb: cells are not executed from top to bottom; restart the kernel" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.ipynb: the file cannot be read: No such file"),
        ("# Title\n", "a.ipynb: the file is not a Jupyter notebook"),
        ("[]", "a.ipynb: the file is not a Jupyter notebook"),
    ],
)
def test_names_a_file_that_is_no_notebook(text, message, tmp_path):
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    done = check(tmp_path / "a.ipynb")
    assert (done.returncode, done.stderr) == (1, "")
    assert message in done.stdout
