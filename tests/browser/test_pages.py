"""The report and the notebooks as pages: scripts run, figures show something, links lead somewhere."""

import shutil
import urllib.parse
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from hloss.study.report import enable_links, relative_link, sortable_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb") if file.stem != "90_report")

# Every image: whether it is drawn on the page, and in how many colours.
FIGURES = """() => [...document.images].map(image => {
  const box = image.getBoundingClientRect(), canvas = document.createElement("canvas");
  canvas.width = Math.max(1, image.naturalWidth); canvas.height = Math.max(1, image.naturalHeight);
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  const pixels = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return {
    source: image.src.slice(0, 60),
    wide: image.naturalWidth,
    colours: new Set(pixels).size,
    drawn: image.checkVisibility() && box.width > 20 && box.height > 20,
    on_page: box.left >= 0 && box.right <= document.documentElement.scrollWidth,
  };
})"""
# Links that can be seen, and those within the page, which a heading shows only under the mouse.
LINKS = """() => [...document.querySelectorAll("a[href]")]
  .filter(a => a.checkVisibility() || a.getAttribute("href").startsWith("#")).map(a => a.href)"""
HAS_ANCHOR = "name => Boolean(document.getElementById(name) || document.getElementsByName(name).length)"


def check_figures(page, least):
    figures = page.evaluate(FIGURES)
    assert len(figures) >= least > 0
    for figure in figures:
        assert figure["wide"] > 0, figure
        assert figure["drawn"], figure
        assert figure["on_page"], figure
        assert figure["colours"] > 10, figure


def check_links(page):
    """Follow every link as far as this machine goes; their number."""
    links = page.evaluate(LINKS)
    for link in links:
        parts = urllib.parse.urlsplit(link)
        assert parts.scheme in ("file", "http", "https", "mailto"), link
        if parts.scheme != "file":
            continue
        assert Path(urllib.request.url2pathname(parts.path)).exists(), link
        if parts.fragment and urllib.parse.urldefrag(link).url == urllib.parse.urldefrag(page.url).url:
            assert page.evaluate(HAS_ANCHOR, urllib.parse.unquote(parts.fragment)), link
    return len(links)


def number_of_figures(file):
    cells = nbformat.read(file, as_version=4).cells
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


def test_the_report_is_a_page_that_works_and_loads_nothing(report, visit):
    page = visit.open(report / "report.html")
    assert visit.errors == visit.missing == visit.outside == []
    check_figures(page, number_of_figures(report / "90_report.ipynb"))
    assert check_links(page) > 0
    runs = {link for link in page.evaluate(LINKS) if link.endswith("/run.ipynb")}
    assert len(runs) == 3
    assert page.locator("table").count() > 0


def test_a_report_mailed_alone_works_as_well(report, tmp_path, visit):
    shutil.copy(report / "report.html", tmp_path)
    page = visit.open(tmp_path / "report.html")
    assert visit.errors == visit.outside == []
    assert all("ERR_FILE_NOT_FOUND" in load for load in visit.missing)  # it asks whether its folder is there
    check_figures(page, number_of_figures(report / "90_report.ipynb"))
    check_links(page)
    assert not [link for link in page.evaluate(LINKS) if link.endswith("/run.ipynb")]


def test_every_sortable_table_of_the_report_sorts(report, visit):
    page = visit.open(report / "report.html")
    for table in page.locator("table.sortable").all():
        check_sorting(table)


def check_sorting(table):
    """Each header turns its column's order round, keeps the rows whole and touches no other row."""
    before = rows_of(table)
    for column in range(len(before[0])):
        button = table.locator("thead tr").last.locator("th").nth(column).locator("button")
        button.click()
        upwards = rows_of(table)
        button.click()
        downwards = rows_of(table)
        assert sorted(upwards) == sorted(downwards) == sorted(before)
        if len({row[column] for row in before}) == len(before) > 1:
            below = [up == down for up, down in zip(upwards[::-1], downwards[::-1], strict=True)].index(False)
            turned = len(before) - below  # the others are no numbers, or empty
            assert downwards[:turned] == upwards[:turned][::-1]


def rows_of(table):
    return table.evaluate("t => [...t.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent.trim()))")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_committed_notebook_is_a_page_that_works(notebook, exported, visit):
    """Its formulas are drawn by a script from elsewhere; without it they stand as they were typed."""
    page = visit.open(exported(notebook))
    assert visit.errors == []
    assert len(visit.missing) <= len(visit.outside)
    check_figures(page, number_of_figures(ROOT / "notebooks" / f"{notebook}.ipynb"))
    check_links(page)


@pytest.mark.parametrize("file", sorted((ROOT / "reports").glob("sample/*.html")), ids=lambda file: file.name)
def test_a_committed_report_works(file, visit):
    page = visit.open(file)
    assert visit.errors == visit.missing == visit.outside == []
    check_figures(page, number_of_figures(ROOT / "notebooks" / "90_report.ipynb"))
    check_links(page)


def page_of(folder, *parts):
    file = folder / "page.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + "\n".join(parts))
    return file


FRAME = pd.DataFrame(
    {
        "method": ["histogram, n_bins 50", "histogram, n_bins 400", "Binomial", "contrastive"],
        "recall@1 (%)": ["41.5 ± 0.8", "9.25", None, "1,041"],
        "difference": ["\N{MINUS SIGN}3.0", "-10", "0.5", "one run"],
        "run_id": ["1e5", "a41", "0b7", "c33"],
    }
)


def column(page, number):
    return [row[number] for row in rows_of(page.locator("table"))]


@pytest.mark.parametrize(
    ("number", "upwards", "last"),
    [
        (0, ["Binomial", "contrastive", "histogram, n_bins 50", "histogram, n_bins 400"], []),
        (1, ["9.25", "41.5 ± 0.8", "1,041"], [""]),
        (2, ["-10", "\N{MINUS SIGN}3.0", "0.5"], ["one run"]),
        (3, ["0b7", "1e5", "a41", "c33"], []),
    ],
)
def test_numbers_sort_as_numbers_and_what_is_none_stays_below(number, upwards, last, tmp_path, visit):
    page = visit.open(page_of(tmp_path, sortable_table(FRAME)))
    header = page.locator("th").nth(number)
    header.locator("button").click()
    assert column(page, number) == upwards + last
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").click()
    assert column(page, number) == upwards[::-1] + last
    assert header.get_attribute("aria-sort") == "descending"
    assert page.locator("th[aria-sort]").count() == 1
    check_sorting(page.locator("table"))
    assert visit.errors == visit.outside == []


def test_numbers_within_words_sort_as_numbers(tmp_path, visit):
    upwards = [f"margin {margin}" for margin in ("0", "0.01", "0.04", "0.1", "02", "2", "10", "10, alpha 1")]
    shuffled = pd.DataFrame({"method": [upwards[i] for i in (5, 3, 7, 0, 6, 1, 4, 2)]})
    page = visit.open(page_of(tmp_path, sortable_table(shuffled)))
    page.locator("button").click()
    assert column(page, 0) == upwards
    check_sorting(page.locator("table"))


def test_a_table_sorts_by_the_keyboard(tmp_path, visit):
    page = visit.open(page_of(tmp_path, sortable_table(FRAME)))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert column(page, 1) == ["9.25", "41.5 ± 0.8", "1,041", ""]
    page.keyboard.press("Space")
    assert column(page, 1) == ["1,041", "41.5 ± 0.8", "9.25", ""]


def test_equal_rows_keep_their_order(tmp_path, visit):
    frame = pd.DataFrame({"seed": [1, 0, 1, 0, 1], "run": list("abcde")})
    page = visit.open(page_of(tmp_path, sortable_table(frame)))
    for order in ("bdace", "acebd"):
        page.get_by_role("button", name="seed").click()
        assert "".join(column(page, 1)) == order


def test_tables_sort_each_for_itself(tmp_path, visit):
    page = visit.open(page_of(tmp_path, sortable_table(FRAME), sortable_table(FRAME)))
    first, second = page.locator("table").all()
    first.get_by_role("button", name="method").click()
    assert rows_of(first) != rows_of(second)
    assert first.locator("button").count() == second.locator("button").count() == 4


def test_links_appear_where_the_folder_of_the_report_is(tmp_path, new_visit):
    (tmp_path / "here").mkdir()
    shutil.copy(ROOT / "reports/sample/similarities.png", tmp_path / "here/figure one.png")
    (tmp_path / "here/run 1.ipynb").write_text("{}")
    link, script = relative_link("run 1.ipynb", "run 1"), enable_links("figure one.png")
    visit = new_visit()
    page = visit.open(page_of(tmp_path / "here", link, script))
    assert check_links(page) == 1
    assert visit.errors == visit.missing == visit.outside == []
    page = new_visit().open(page_of(tmp_path, link, script))
    assert check_links(page) == 0
    assert page.inner_text("body").strip() == "run 1"
