"""A study of 40 short runs of which two fail, and the index page that shows it."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from tests.helpers.copied_project import Project

LOSSES = ("histogram", "binomial", "triplet", "contrastive")
RUNS, FAILING = 40, 2
MESSAGES = {"diverges, seed 0": "hold NaN or infinity", "small classes, seed 0": "at least images_per_class=64 images"}


def forty_runs(data: Path) -> dict[str, Any]:
    """The content of the study's file: 38 runs of two iterations, and two that fail while they run.

    Args:
        data: folder of the dataset `tiny`.
    """
    fixed = {"dataset": "tiny", "data_dir": str(data), "batch_size": 16, "images_per_class": 4}
    fixed |= {"iterations": 2, "validate_every": 1}
    failing = [
        {"name": "diverges", "set": {"loss": "binomial", "learning_rate": 1e30}, "seeds": [0]},
        {
            "name": "small classes",
            "set": {"loss": "binomial", "sampler": "balanced", "images_per_class": 64, "batch_size": 64},
            "seeds": [0],
        },
    ]
    entries = [{"name": loss, "set": {"loss": loss}} for loss in LOSSES]
    entries[0]["seeds"] = list(range(8))
    return {
        "title": "Forty short runs, two of which fail",
        "fixed": fixed,
        "seeds": list(range(10)),
        "resources": {"gpus": 0, "memory_gb": 4, "hours": 0.2},
        "runs": [entries[0], *failing, *entries[1:]],
    }


def without_figures(project: Project) -> None:
    """Let the notebook of a run end with its result: drawing takes half the time of such a short run.

    Args:
        project: the copy whose notebook changes.
    """
    file = project.folder / "notebooks" / "20_train.ipynb"
    notebook = nbformat.read(file, as_version=4)
    last = next(n for n, cell in enumerate(notebook.cells) if "run(config)" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    nbformat.write(notebook, file)


class Counts(NamedTuple):
    """Numbers of runs that an index page states."""

    complete: int
    total: int
    working: int
    failed: int


def counts(page: str) -> Counts:
    """Read the numbers of a page's first paragraph.

    Args:
        page: HTML or text of an index page.
    """
    words = re.sub(r"<[^>]*>", "", page)
    complete, total = map(int, re.search(r"(\d+) of (\d+) runs complete", words).groups())
    working, failed = (
        int(found[1]) if (found := re.search(rf"(\d+) {w}", words)) else 0 for w in ("at work", "failed")
    )
    return Counts(complete, total, working, failed)


def check_seen(seen: list[Counts]) -> None:
    """Check that the page moved while the study went, told of failures before the end, and ended with all runs.

    Args:
        seen: what the page said, from the first time to the last.
    """
    for number in ("complete", "failed"):
        said = [getattr(state, number) for state in seen]
        assert said == sorted(said)
    assert len({state.complete for state in seen}) > 3
    assert any(state.failed and state.working and state.complete for state in seen)
    assert seen[-1] == (RUNS - FAILING, RUNS, 0, FAILING)


def check_end(project: Project) -> None:
    """Check what the page and the terminal say at the end.

    Args:
        project: the copy in which the study has ended.
    """
    folder = project.folder / "runs" / "short"
    page = (folder / "index.html").read_text()
    printed = project.printed()
    runs = project.runs()
    for name, message in MESSAGES.items():
        row = next(row for row in page.split("<li>") if f">tiny: {name}<" in row)
        assert message in row
        (log,) = re.findall('href="([^"]*run.log)"', row)
        assert (folder / log).resolve() == runs[name] / "run.log"
        assert message in (folder / log).read_text()
        assert f"  failed  {name}: " in printed
    assert printed.count("test Recall@1") == RUNS - FAILING
    assert "study short is not complete; run the same command again to continue" in printed
    assert {name for name, run in runs.items() if not (run / "result.json").exists()} == set(MESSAGES)
