"""HTML of a report: sortable tables and links to files, and figures that are saved as files.

Display the strings by IPython.display.HTML. Without scripts (on GitHub, in an untrusted notebook) a table does not sort
and a link is plain text.
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

# Works on every <table class="sortable"> above it. A column is one of numbers if most of its cells begin with one
# ("41.5", "41.5 +- 0.8", "-3 %"); its other cells, and the empty cells of any column, come last in both directions.
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
# The image loads only where the report is in its folder; in a report that was mailed alone, links stay plain text.
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
    """A link to a file by its path from the report; plain text until the script of `enable_links` finds the files."""
    return f'<a data-beside="{html.escape(urllib.parse.quote(target))}">{html.escape(text)}</a>'


def enable_links(probe: str) -> str:
    """The script that enables each `relative_link` above it, if the image `probe` (path from the report) exists."""
    return LINKS.replace("PROBE", urllib.parse.quote(probe))


def sortable_table(frame: pd.DataFrame, html_columns: Collection[str] = ()) -> str:
    """A frame, without its index, as a table that sorts by a click, Enter or Space on a header.

    Values are shown as `str` converts them, so round or format them first; missing ones are empty. Cells are escaped,
    except in `html_columns`, which hold HTML (links). Sorting a second time reverses the order; equal rows keep theirs.
    ValueError if a name in `html_columns` is not a column.
    """
    unknown = sorted(set(html_columns) - set(frame.columns))
    if unknown:
        raise ValueError(f"html_columns {unknown} are no columns of the table, which has {list(frame.columns)}")
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
    """The figure, written as PNG and SVG into a folder of the project ("": nowhere)."""
    for kind in ("png", "svg") if folder else ():
        file = project_path(folder) / f"{name.replace(' ', '_')}.{kind}"
        atomic_write(file, lambda part, kind=kind: figure.savefig(part, format=kind, dpi=150))  # type: ignore[misc]
    return figure


def run_links(runs: pd.DataFrame, report_dir: str) -> dict[str, str]:
    """HTML of each run's id: a link to its notebook, if that exists and the report is written to a folder.

    runs: with the columns study and run_id; report_dir: of the project.
    """
    links = {}
    for study, run_id in runs[["study", "run_id"]].itertuples(index=False, name=None):
        notebook = Path("runs") / study / run_id / "run.ipynb"
        exists = report_dir and project_path(str(notebook)).exists()
        links[run_id] = relative_link(os.path.relpath(notebook, report_dir), run_id) if exists else html.escape(run_id)
    return links


def collapsed_runs(run_ids: pd.Series, links: Mapping[str, str]) -> list[str]:
    """HTML of each "id, id, ...": a collapsed list of the ids. links: of `run_links`."""
    cells = (", ".join(links.get(i, html.escape(i)) for i in ids.split(", ")) for ids in run_ids.fillna(""))
    return [f"<details><summary>runs</summary>{cell}</details>" if cell else "" for cell in cells]


def headline_table(
    table: pd.DataFrame, comparisons: Collection[str], metrics: list[str], links: Mapping[str, str] | None = None
) -> str:
    """`hloss.study.statistics.headline` as a sortable HTML table, with the runs of each row.

    links: of `run_links`.
    """
    shown = headline(table, comparisons, metrics)
    shown["runs"] = collapsed_runs(table.loc[shown.index, "run_ids"], links or {})
    return sortable_table(shown, ["runs"])
