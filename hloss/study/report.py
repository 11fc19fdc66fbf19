"""HTML of a report in a notebook: tables, links to files, lists of runs.

Display the strings with IPython.display.HTML. `hloss.study.report_page` makes a page of them, with scripts that sort
tables and enable links.
"""

import html
import os
import urllib.parse
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from hloss.runs.files import project_path
from hloss.study.statistics import headline
from hloss.study.tables import sortable_table

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


def listed_runs(run_ids: object, links: Mapping[str, str]) -> str:
    """HTML of run ids.

    Args:
        run_ids: "id, id, ..."; missing or empty: no runs.
        links: run id -> HTML, from `run_links`.
    """
    ids = run_ids.split(", ") if isinstance(run_ids, str) and run_ids else []
    return ", ".join(links.get(run_id, html.escape(run_id)) for run_id in ids)


def collapsed_runs(run_ids: pd.Series, links: Mapping[str, str]) -> list[str]:
    """HTML of collapsed lists of runs.

    Args:
        run_ids: cells of the form "id, id, ...".
        links: run id -> HTML, from `run_links`.

    Returns:
        One string per cell; empty for an empty cell.
    """
    cells = [listed_runs(ids, links) for ids in run_ids]
    return [f"<details><summary>runs</summary>{cell}</details>" if cell else "" for cell in cells]


def headline_table(table: pd.DataFrame, comparisons: Collection[str], metrics: list[str]) -> str:
    """HTML of `hloss.study.statistics.headline` with the runs of each row.

    Args:
        table: the table of `hloss.study.statistics.summary`.
        comparisons: comparisons to show.
        metrics: metrics to show; the interval is that of the first.
    """
    shown = headline(table, comparisons, metrics)
    return sortable_table(shown.assign(runs=collapsed_runs(table.loc[shown.index, "run_ids"], {})), ["runs"])
