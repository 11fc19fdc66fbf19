"""A study of 40 runs with two that fail, watched in a browser on its index page while it goes."""

import time

import pytest

from tests.helpers.copied_project import projects, wait_until
from tests.helpers.forty_runs import FAILING, RUNS, check_end, counts, forty_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def new_project(tmp_path):
    with projects(tmp_path) as new:
        yield new


def test_a_person_sees_a_study_go_and_what_failed(new_project, tiny_data, visit):
    project = new_project("project", forty_runs(tiny_data))
    start = project.start("CORES=2")
    index = project.folder / "runs" / "short" / "index.html"
    wait_until("the index page", index.exists, during=start)
    page = visit.open(index)
    seen = [counts(page.inner_text("main"))]
    while start.poll() is None:
        time.sleep(1)
        page.wait_for_load_state()  # it reloads itself
        seen.append(counts(page.inner_text("main")))
    page.wait_for_function("text => document.body.innerText.includes(text)", arg="No run is at work", timeout=30_000)
    seen.append(counts(page.inner_text("main")))

    assert [state.complete for state in seen] == sorted(state.complete for state in seen)
    assert [state.failed for state in seen] == sorted(state.failed for state in seen)
    assert len({state.complete for state in seen}) > 5  # it reloaded, and the numbers moved
    assert any(state.failed and state.working and state.complete < state.total for state in seen)
    assert seen[-1] == (RUNS - FAILING, RUNS, 0, FAILING)
    assert start.returncode != 0
    check_end(project)
    assert visit.errors == visit.missing == visit.outside == []
