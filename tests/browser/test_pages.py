"""The report and the notebooks as pages: scripts run, figures show something, links lead somewhere."""

import re
import shutil
import urllib.parse
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

from hloss.study.report import enable_links, relative_link

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
    alt: image.alt,
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
READY = "document.documentElement.dataset.ready !== undefined"  # the tables sort
HAS_ANCHOR = "name => Boolean(document.getElementById(name) || document.getElementsByName(name).length)"


def check_figures(page, least, has_alt=True):
    figures = page.evaluate(FIGURES)
    assert len(figures) >= least > 0
    for figure in figures:
        assert figure["wide"] > 0, figure
        assert figure["alt"] or not has_alt, figure
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
    assert {Path(urllib.parse.urlsplit(link).path).suffix for link in page.evaluate(LINKS) if "/tables/" in link} == {
        ".csv", ".tex", ".md"}  # fmt: skip
    runs = {link for link in page.evaluate(LINKS) if link.endswith("/run.ipynb")}
    assert len(runs) == 3
    assert page.locator("table").count() > 0


def texts(elements):
    """Texts of elements of a figure; matplotlib draws text as paths and writes it into a comment."""
    return [part.text.strip() for element in elements for part in element.iter() if part.tag is ElementTree.Comment]


def test_axes_with_numbers_have_a_label_and_recall_its_unit(report):
    labels = []
    for file in report.glob("*.svg"):
        reader = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
        groups = ElementTree.parse(file, reader).getroot().iter("{http://www.w3.org/2000/svg}g")
        for axis in (group for group in groups if str(group.get("id")).startswith("matplotlib.axis_")):
            ticks = texts(part for part in axis if str(part.get("id"))[1:5] == "tick")
            label = texts(part for part in axis if str(part.get("id")).startswith("text"))
            if any(re.fullmatch(r"[−\d.,]+", tick) for tick in ticks):
                assert label, (file.name, ticks)
                labels += label
    assert len(labels) > 20
    of_recall = [label for label in labels if "Recall" in label]
    assert all(("(points)" if "difference" in label else "(%)") in label for label in of_recall)


def test_a_report_mailed_alone_works_as_well(report, tmp_path, visit):
    shutil.copy(report / "report.html", tmp_path)
    page = visit.open(tmp_path / "report.html")
    assert visit.errors == visit.outside == []
    assert all("ERR_FILE_NOT_FOUND" in load for load in visit.missing)  # it asks whether its folder is there
    check_figures(page, number_of_figures(report / "90_report.ipynb"))
    check_links(page)
    assert not [link for link in page.evaluate(LINKS) if link.endswith("/run.ipynb")]


def test_tables_of_the_report_sort_and_filter(report, visit):
    page = visit.open(report / "report.html")
    table = page.locator("table.sortable", has=page.locator("th", has_text="recall@1 (%)")).first
    before, header = rows_of(table), table.locator("thead th", has_text="recall@1 (%)")
    column = [cell.strip() for cell in table.locator("thead th").all_inner_texts()].index("recall@1 (%)")
    header.click()
    upwards = rows_of(table)
    assert [float(row[column]) for row in upwards] == sorted(float(row[column]) for row in before)
    assert header.get_attribute("aria-sort") == "ascending"
    header.click()
    assert [float(row[column]) for row in rows_of(table)] == sorted(
        (float(row[column]) for row in before), reverse=True
    )
    assert sorted(rows_of(table)) == sorted(before)
    table.locator("xpath=ancestor::figure").locator("input[type=search]").fill("lifted")
    assert rows_of(table)
    assert all("lifted structure" in row for row in rows_of(table))
    assert visit.errors == visit.outside == []


def test_long_tables_of_the_report_have_pages(report, visit):
    page = visit.open(report / "report.html")
    table = page.locator("table.sortable").last
    assert len(rows_of(table)) == 25
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(rows_of(table)) > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_the_report_fits_its_window(report, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto((report / "report.html").resolve().as_uri())
    page.wait_for_function(READY)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    contents = page.locator("nav a").nth(1)
    assert contents.is_visible() == (width > 1000)
    assert page.locator("nav summary").is_visible()
    figure = page.locator("figure.losses figcaption").bounding_box()
    assert width < 1000 or figure["y"] + figure["height"] < 844
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == (scheme == "dark")
    assert (
        page.locator("figure > img").first.evaluate("i => getComputedStyle(i).backgroundColor") == "rgb(255, 255, 255)"
    )
    context.close()


@pytest.mark.parametrize("width", [390, 1300])
def test_figures_of_several_datasets_fit_the_window(report, browser, width):
    """The figure of the losses four times, as in the study paper, with the longest names of its datasets and losses."""
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto((report / "report.html").resolve().as_uri())
    page.wait_for_function(READY)
    names = {"on glyphs": "on market1501", "binomial deviance": "binomial deviance, C 25"}
    page.locator(".figures").evaluate(
        """(figures, names) => {
          let html = figures.innerHTML
          for (const [name, longer] of names) html = html.replaceAll(name, longer)
          figures.innerHTML = html.repeat(4)
        }""",
        list(names.items()),
    )
    assert page.get_by_role("columnheader", name="test Recall@1 on market1501 (%)").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_a_claim_unfolds_by_the_keyboard(report, visit):
    page = visit.page
    page.goto((report / "report.html").resolve().as_uri())
    claim = page.locator("details.claim").first
    assert not claim.locator("dl").is_visible()
    claim.locator("summary").focus()
    page.keyboard.press("Enter")
    assert claim.locator("dl").is_visible()
    assert page.locator("details.not-run ul").is_hidden()


def rows_of(table):
    return table.evaluate("t => [...t.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent.trim()))")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_committed_notebook_is_a_page_that_works(notebook, exported, visit):
    """Its formulas are drawn by a script from elsewhere; without it they stand as they were typed."""
    page = visit.open(exported(notebook))
    assert visit.errors == []
    assert len(visit.missing) <= len(visit.outside)
    check_figures(page, number_of_figures(ROOT / "notebooks" / f"{notebook}.ipynb"), has_alt=False)
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
