"""HTML of a report: sortable tables, links to files, saved figures.

Display the strings with IPython.display.HTML. Without scripts (on GitHub, in an untrusted notebook) tables do not sort
and links are plain text.
"""

import html
import os
import urllib.parse
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from hloss.runs.files import atomic_write, project_path
from hloss.study.statistics import headline

# The script sorts every <table class="sortable"> above it. A column is numeric if most of its cells begin with a number
# ("41.5", "41.5 +- 0.8", "-3 %"). Its other cells, and empty cells of any column, come last in both directions.
SORTING = """<style>
table.sortable th button { all: unset; cursor: pointer; font-weight: bold; }
table.sortable th button:focus-visible { outline: 2px solid; }
table.sortable th button::after { content: " \\2195"; opacity: 0.4; }
table.sortable th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
table.sortable th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
</style>
<script>
for (const table of document.querySelectorAll("table.sortable:not([data-sorts])")) {
  table.dataset.sorts = "";
  const body = table.tBodies[0], headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const start = /^[-+]?(\\d+\\.?\\d*|\\.\\d+)(e[-+]?\\d+)?(?![\\w.])/i;
  const number = text => Number((text.replaceAll(",", "").replace("\\u2212", "-").match(start) || [NaN])[0]);
  const natural = (a, b) => {  // "margin 0.04" before "margin 0.1" before "margin 10"
    const [p, q] = [a, b].map(t => t.match(/\\d+(\\.\\d+)?|\\D+/g) || []), isNumber = t => /^\\d/.test(t);
    const differs = p.findIndex((t, i) => t !== q[i]);
    if (differs < 0 || differs >= q.length) return p.length - q.length;
    const [x, y] = [p[differs], q[differs]];
    return (isNumber(x) && isNumber(y) ? x - y : x.localeCompare(y, "en")) || a.localeCompare(b, "en");
  };
  headers.forEach((header, column) => {
    const text = row => row.cells[column].textContent.trim();
    const filled = [...body.rows].map(text).filter(t => t);
    const numeric = filled.filter(t => !isNaN(number(t))).length > filled.length / 2;
    if (!numeric) for (const row of body.rows) row.cells[column].style.textAlign = "left";
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const way = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const last = t => numeric ? isNaN(number(t)) : !t;
      const order = (a, b) => last(a) || last(b) ? last(a) - last(b)
        : way * ((numeric ? number(a) - number(b) : 0) || natural(a, b));
      body.append(...[...body.rows].sort((a, b) => order(text(a), text(b))));
      headers.forEach(h => h.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    });
  });
}
</script>"""
# The image loads only if the report is in its folder. In a report that was sent alone, links stay plain text.
LINKS = """<script>
{
  const probe = new Image();
  probe.onload = () => {
    for (const link of document.querySelectorAll("a[data-beside]")) link.href = link.dataset.beside;
  };
  probe.src = "PROBE";
}
</script>"""


def relative_link(target: str, text: str) -> str:
    """HTML of a link to a file; it is plain text until the script of `enable_links` finds the files.

    Args:
        target: path of the file, relative to the report.
        text: text of the link.
    """
    return f'<a data-beside="{html.escape(urllib.parse.quote(target))}">{html.escape(text)}</a>'


def enable_links(probe: str) -> str:
    """HTML of the script that enables every `relative_link` above it.

    Args:
        probe: path of an image, relative to the report; links are enabled if it loads.
    """
    return LINKS.replace("PROBE", urllib.parse.quote(probe))


def sortable_table(frame: pd.DataFrame, html_columns: Collection[str] = ()) -> str:
    """HTML of a table that sorts by a click, Enter or Space on a header; a second time reverses the order.

    Args:
        frame: the rows, without the index. Values are converted with `str`; missing ones are empty cells.
        html_columns: columns whose cells contain HTML; all other cells are escaped.

    Raises:
        ValueError: if a name in `html_columns` is not a column.
    """
    unknown = sorted(set(html_columns) - set(frame.columns))
    if unknown:
        raise ValueError(f"html_columns must be columns of the table: got {unknown}; allowed are {list(frame.columns)}")
    header = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in frame.columns)
    rows = []
    for values in frame.astype(object).itertuples(index=False, name=None):
        cells = (_cell(value, name in html_columns) for name, value in zip(frame.columns, values, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    lines = ['<table class="sortable">', f"<thead><tr>{header}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>"]
    return "\n".join([*lines, SORTING])


def _cell(value: object, is_html: bool) -> str:
    text = "" if value is None or value is pd.NA or value != value else str(value)
    return f"<td>{text if is_html else html.escape(text)}</td>"


def save_figure(figure: Figure, name: str, folder: str) -> Figure:
    """Write a figure as PNG and SVG.

    Args:
        figure: the figure.
        name: name of the files; spaces become underscores.
        folder: path from the project's root; "": write nothing.

    Returns:
        The figure, to be displayed.
    """
    for kind in ("png", "svg") if folder else ():
        file = project_path(folder) / f"{name.replace(' ', '_')}.{kind}"
        atomic_write(file, lambda part, kind=kind: figure.savefig(part, format=kind, dpi=150))  # type: ignore[misc]
    return figure


def run_links(runs: pd.DataFrame, report_dir: str) -> dict[str, str]:
    """HTML of run ids with links to the notebooks of the runs.

    Args:
        runs: runs with the columns study and run_id.
        report_dir: folder of the report, from the project's root; "": no links.

    Returns:
        Run id -> HTML; an id without a notebook is plain text.
    """
    links = {}
    for study, run_id in runs[["study", "run_id"]].itertuples(index=False, name=None):
        notebook = Path("runs") / study / run_id / "run.ipynb"
        exists = report_dir and project_path(str(notebook)).exists()
        links[run_id] = relative_link(os.path.relpath(notebook, report_dir), run_id) if exists else html.escape(run_id)
    return links


def collapsed_runs(run_ids: pd.Series, links: Mapping[str, str]) -> list[str]:
    """HTML of collapsed lists of runs.

    Args:
        run_ids: cells of the form "id, id, ...".
        links: run id -> HTML, from `run_links`.

    Returns:
        One string per cell; empty for an empty cell.
    """
    cells = (", ".join(links.get(i, html.escape(i)) for i in ids.split(", ")) for ids in run_ids.fillna(""))
    return [f"<details><summary>runs</summary>{cell}</details>" if cell else "" for cell in cells]


def headline_table(
    table: pd.DataFrame, comparisons: Collection[str], metrics: list[str], links: Mapping[str, str] | None = None
) -> str:
    """HTML of `hloss.study.statistics.headline` as a sortable table with the runs of each row.

    Args:
        table: the table of `hloss.study.statistics.summary`.
        comparisons: comparisons to show.
        metrics: metrics to show; the interval is that of the first.
        links: run id -> HTML, from `run_links`.
    """
    shown = headline(table, comparisons, metrics)
    shown["runs"] = collapsed_runs(table.loc[shown.index, "run_ids"], links or {})
    return sortable_table(shown, ["runs"])
