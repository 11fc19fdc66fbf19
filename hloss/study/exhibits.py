"""Numbered figures and tables of a report: shown in the notebook, and written beside the report."""

import base64
import html
import io
from collections.abc import Collection, Mapping

import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from hloss.runs.files import atomic_write, project_path
from hloss.study.report import collapsed_runs, enable_links, relative_link
from hloss.study.tables import latex_table, markdown_table, sortable_table

RUN_IDS = "run_ids"  # a column of tables: "id, id, ...", shown as a list that unfolds
RUN_ID = "run_id"  # a column of tables, shown as a link
KEPT = "similarities.png"  # end of the name of the image that the page looks for, to know whether its folder exists
LONG = 30  # rows; a longer table is folded
PRINTED = 200  # rows; a longer table is written as CSV only, not as LaTeX and Markdown for a paper


class Exhibits:
    """Shows figures and tables with captions, and writes their files.

    `FOLDER/NAME.png` and `.svg` for a figure, `FOLDER/tables/NAME.csv`, `.tex` and `.md` for a table;
    a table of more than 200 rows has no `.tex` and `.md`.

    Args:
        folder: folder of the report, from the project's root; "": write nothing.
        links: run id -> HTML, from `hloss.study.report.run_links`.
    """

    def __init__(self, folder: str, links: Mapping[str, str]) -> None:
        self.folder, self.links = folder, links
        self.figures = self.tables = 0
        self.images: list[str] = []  # names of the PNG files

    def figure(self, figure: Figure, name: str, caption: str, alt: str) -> None:
        """Show a figure.

        Args:
            figure: the figure.
            name: name of its files; spaces become underscores.
            caption: what is drawn, with units.
            alt: what the figure shows, for screen readers.
        """
        for kind in ("png", "svg") if self.folder else ():
            file = project_path(self.folder) / f"{_file_name(name)}.{kind}"
            atomic_write(file, lambda part, kind=kind: figure.savefig(part, format=kind, dpi=150))  # type: ignore[misc]
        self.images += [f"{_file_name(name)}.png"] if self.folder else []
        png = {"image/png": base64.b64encode(indexed_png(figure)).decode(), "text/plain": alt}
        display(png, raw=True, metadata={"image/png": {"alt": alt}})
        display(HTML(self.caption(caption)))

    def link_script(self) -> str:
        """HTML of the script that enables the links to runs and files; "" if no figure was written."""
        return enable_links(min(self.images, key=lambda name: not name.endswith(KEPT))) if self.images else ""

    def caption(self, caption: str) -> str:
        """HTML of a figure's caption, with the next number.

        Args:
            caption: the caption as plain text.
        """
        self.figures += 1
        number = f"Figure {self.figures}"
        return f'<figcaption id="figure-{self.figures}"><b>{number}.</b> {html.escape(caption)}</figcaption>'

    def table(self, table: pd.DataFrame, name: str, caption: str) -> None:
        """Show a table.

        Args:
            table: the rows, without the index. Numbers are shown as they are: round them first. The column "run_ids"
                is shown as a list that unfolds, and "run_id" as a link.
            name: name of its files; spaces become underscores.
            caption: what the table has, with units.
        """
        self.tables += 1
        shown, html_columns = self._with_links(table)
        label = f"<figcaption><b>Table {self.tables}.</b> {html.escape(caption)}</figcaption>"
        files = self._write_table(table, _file_name(name), caption)
        inside = f'{label}<div class="scroll" tabindex="0">{sortable_table(shown, html_columns)}</div>{files}'
        if len(table) > LONG:
            inside = f"{label}<details><summary>{len(table):,} rows</summary>{inside.removeprefix(label)}</details>"
        display(HTML(f'<figure class="table" id="table-{self.tables}">{inside}</figure>'))

    def _with_links(self, table: pd.DataFrame) -> tuple[pd.DataFrame, Collection[str]]:
        """The table with HTML in the columns of runs, and the names of these columns."""
        shown = table.copy()
        if RUN_IDS in shown:
            shown["runs"] = collapsed_runs(shown.pop(RUN_IDS), self.links)
        if RUN_ID in shown:
            shown[RUN_ID] = [self.links.get(run_id, html.escape(run_id)) for run_id in shown[RUN_ID]]
        return shown, {"runs", RUN_ID} & set(shown.columns)

    def _write_table(self, table: pd.DataFrame, name: str, caption: str) -> str:
        """Write the files of a table; HTML of links to them."""
        if not self.folder:
            return ""
        plain = table.drop(columns=RUN_IDS, errors="ignore")
        texts = {"csv": table.to_csv(index=False)}
        if len(table) <= PRINTED:
            texts |= {"tex": latex_table(plain, caption), "md": markdown_table(plain)}
        folder = project_path(self.folder) / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            atomic_write(folder / f"{name}.{kind}", lambda part, text=text: part.write_text(text))  # type: ignore[misc]
        names = {"csv": "CSV", "tex": "LaTeX", "md": "Markdown"}
        links = (relative_link(f"tables/{name}.{kind}", names[kind]) for kind in texts)
        return f'<p class="files">{" · ".join(links)}</p>'


def _file_name(name: str) -> str:
    return name.replace(" ", "_")


def indexed_png(figure: Figure) -> bytes:
    """PNG of a figure in 256 colours, which has a third of the size.

    Args:
        figure: the figure.
    """
    full, indexed = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(indexed, "PNG", optimize=True)
    return indexed.getvalue()
