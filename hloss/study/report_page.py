"""The page of a report: one self-contained HTML file, made from the executed notebook.

The page shows Markdown cells and outputs, but no code. An image and the caption that follows it become one figure.
"""

import html
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import mistune
import nbformat
from itables.utils import read_package_file

NOTEBOOK_ONLY = "notebook-only"  # tag of cells that are not on the page
CAPTION = "<figcaption"


def report_page(notebook: nbformat.NotebookNode, title: str) -> str:
    """Convert an executed report to one HTML page without code that loads nothing from other hosts.

    Args:
        notebook: the executed notebook; cells with the tag "notebook-only" are left out.
        title: title of the page.
    """
    blocks = [block for cell in notebook.cells for block in _blocks_of_cell(cell)]
    body, contents = with_contents("\n".join(_with_captions(blocks)))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{read_package_file('html/dt_bundle.css')}</style>",
            f"<style>{_asset('report.css')}</style></head>",
            f'<body><nav aria-label="Contents"><details><summary>Contents</summary>{contents}</details></nav>',
            f'<main id="top">{body}</main>',
            f'<script type="text/plain" id="datatables">{read_package_file("html/dt_bundle.js")}</script>',
            f'<script type="module">{_asset("report.js")}</script></body></html>\n',
        ]
    )


def _asset(name: str) -> str:
    return resources.files("hloss.study").joinpath(name).read_text()


def _blocks_of_cell(cell: nbformat.NotebookNode) -> Iterator[str]:
    """HTML of a cell's text or of its outputs."""
    if NOTEBOOK_ONLY in cell.metadata.get("tags", []):
        return
    if cell.cell_type == "markdown":
        yield markdown_html(cell.source)
    elif cell.cell_type == "code":
        yield from (_output_html(output) for output in cell.outputs)


def markdown_html(text: str) -> str:
    """HTML of Markdown; HTML in it is kept.

    Args:
        text: the Markdown.
    """
    return str(mistune.html(text))


def _output_html(output: nbformat.NotebookNode) -> str:
    data: dict[str, Any] = output.get("data", {})
    if "text/html" in data:
        return data["text/html"]
    if "image/png" in data:
        alt = output.metadata.get("image/png", {}).get("alt", "")
        png = data["image/png"].replace("\n", "")
        return f'<img src="data:image/png;base64,{png}" alt="{html.escape(alt, quote=True)}">'
    if "text/markdown" in data:
        return markdown_html(data["text/markdown"])
    return f"<pre>{html.escape(output.get('text', '') or data.get('text/plain', ''))}</pre>"


def _with_captions(blocks: list[str]) -> Iterator[str]:
    """The blocks, with each image and its caption as one figure."""
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        if block.startswith("<img"):
            yield f"<figure>{block}{following if following.startswith(CAPTION) else ''}</figure>"
        elif not block.startswith(CAPTION):
            yield block


def with_contents(body: str) -> tuple[str, str]:
    """A page with ids on its headings, and HTML of its table of contents.

    Args:
        body: HTML with the sections as h2 and h3.

    Returns:
        The HTML with ids, and a nested list of links.
    """
    entries: list[tuple[int, str, str]] = []

    def with_id(heading: re.Match[str]) -> str:
        level, text = heading.groups()
        plain = re.sub(r"<[^>]*>", "", text)
        name = re.sub(r"[^a-z0-9]+", "-", html.unescape(plain).lower()).strip("-")
        taken = [identity for _, identity, _ in entries]
        identity = next(f"{name}{n}" for n in ("", *(f"-{i}" for i in range(2, 1000))) if f"{name}{n}" not in taken)
        entries.append((int(level), identity, plain))
        return f'<h{level} id="{identity}">{text}</h{level}>'

    body = re.sub(r"<h([23])>(.*?)</h\1>", with_id, body, flags=re.S)
    return body, _contents_list(entries)


def _contents_list(entries: list[tuple[int, str, str]]) -> str:
    lines, depth = ['<ul><li><a href="#top">The answer</a></li>'], 2
    for level, identity, text in entries:
        if level > depth:
            lines.append("<li><ul>")
        elif level < depth:
            lines.append("</ul></li>")
        depth = level
        lines.append(f'<li><a href="#{identity}">{text}</a></li>')
    return "".join([*lines, "</ul></li>" * (depth == 3), "</ul>"])
