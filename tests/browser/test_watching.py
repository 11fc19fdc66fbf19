"""A study of 40 runs with two that fail, watched in a browser on its index page while it goes."""

import time

import pytest

from tests.helpers.copied_project import projects, wait_until
from tests.helpers.forty_runs import check_end, check_seen, counts, forty_runs, without_figures

pytestmark = pytest.mark.slow

NUMBERS = "document.querySelector('.key').innerText"


@pytest.fixture
def new_project(tmp_path):
    with projects(tmp_path) as new:
        yield new


def test_a_person_sees_a_study_go_and_what_failed(new_project, tiny_data, visit):
    project = new_project("project", forty_runs(tiny_data))
    without_figures(project)
    start = project.start("CORES=4", STEP_SECONDS="0.5")
    index = project.folder / "runs/short/index.html"
    wait_until("the index page", index.exists, during=start)
    page = visit.open(index)
    page.wait_for_function(
        f"text => {NUMBERS} !== text", arg=page.evaluate(NUMBERS), timeout=120_000
    )  # it reloads itself
    seen = []
    while start.poll() is None:
        page.reload()  # more often than it does itself
        seen.append(counts(page.inner_text("main")))
        time.sleep(1)
    page.reload()
    seen.append(counts(page.inner_text("main")))
    assert "No run is at work" in page.inner_text("main")

    check_seen(seen)
    assert start.returncode != 0
    check_end(project)
    assert visit.errors == visit.missing == visit.outside == []
