"""Tables of a report as text: equal decimals per column, as HTML, LaTeX and Markdown."""

import html
import math
import re
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import pandas as pd

MINUS = "\N{MINUS SIGN}"
MOST_DECIMALS = 6
LONG = 45  # characters; the text of a column with a longer cell wraps
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", MINUS: "$-$", "±": r"$\pm$",
}  # fmt: skip


def is_missing(value: object) -> bool:
    """Whether a value is None, NaN, NA or NaT.

    Args:
        value: a cell of a table.
    """
    return value is None or value is pd.NA or value != value


def number_columns(frame: pd.DataFrame) -> set[Any]:
    """The columns with at least one number and otherwise only numbers and missing values.

    Args:
        frame: the table.
    """
    found = set()
    for name in frame.columns:
        known = [value for value in frame[name] if not is_missing(value)]
        if known and all(isinstance(value, Real) and not _is_truth(value) for value in known):
            found.add(name)
    return found


def _is_truth(value: object) -> bool:
    return str(value) in ("True", "False")


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The values of a table as text: the numbers of a column have equal decimals, missing values are empty.

    Args:
        frame: the table; round its numbers first.
    """
    numbers = number_columns(frame)
    columns = [_numbers_as_text(frame[c]) if c in numbers else list(map(_as_text, frame[c])) for c in frame.columns]
    return pd.DataFrame(dict(enumerate(columns)), index=frame.index, dtype=object).set_axis(frame.columns, axis=1)


def _as_text(value: object) -> str:
    return "" if is_missing(value) else str(value)


def _numbers_as_text(values: pd.Series) -> list[str]:
    known = [float(value) for value in values if not is_missing(value)]
    decimals = max(map(_decimals, known))
    return ["" if is_missing(value) else signed(float(value), decimals) for value in values]


def _decimals(value: float) -> int:
    """Decimals of a number, at most `MOST_DECIMALS`."""
    if not math.isfinite(value):
        return 0
    return len(f"{value:.{MOST_DECIMALS}f}".rstrip("0").partition(".")[2])


def signed(value: float, decimals: int = 1, plus: bool = False) -> str:
    """A number with a typographic minus sign; zero has none.

    Args:
        value: the number.
        decimals: decimals to show.
        plus: whether a number that is not negative has a plus sign.

    Example:
        >>> signed(-3.14159, 2), signed(-0.01), signed(2, plus=True)
        ('−3.14', '0.0', '+2.0')
    """
    text = f"{value:.{decimals}f}"
    if text.startswith("-"):
        text = MINUS + text[1:] if text.strip("-0.") else text[1:]
    return f"+{text}" if plus and not text.startswith(MINUS) else text


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence.

    Args:
        words: the words, in order.

    Example:
        >>> listed(["20"]), listed(["20", "60", "200"])
        ('20', '20, 60 and 200')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def duration(seconds: float) -> str:
    """A time as text, in units that fit its size.

    Args:
        seconds: the time, 0 or more.

    Example:
        >>> duration(4.2), duration(250), duration(7260)
        ('4.2 s', '4 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min" + f" {whole % 60} s" * (whole < 600)
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def sortable_table(frame: pd.DataFrame, html_columns: Collection[str] = ()) -> str:
    """HTML of a table; the page of a report makes it sortable.

    Args:
        frame: the rows, without the index; numbers have equal decimals and are aligned right.
        html_columns: columns whose cells contain HTML; all other cells are escaped.

    Raises:
        ValueError: if a name in `html_columns` is not a column.
    """
    unknown = sorted(set(html_columns) - set(frame.columns))
    if unknown:
        raise ValueError(f"html_columns must be columns of the table: got {unknown}; allowed are {list(frame.columns)}")
    text, numbers = as_text(frame), number_columns(frame)
    longest = [max(map(len, text.iloc[:, place]), default=0) for place in range(len(frame.columns))]
    mark = [
        ' class="number"' if name in numbers else ' class="long"' * (n > LONG and name not in html_columns)
        for name, n in zip(frame.columns, longest, strict=True)
    ]
    header = "".join(f'<th scope="col"{m}>{html.escape(str(n))}</th>' for m, n in zip(mark, frame.columns, strict=True))
    cells = []
    for place, name in enumerate(frame.columns):
        shown = text.iloc[:, place]
        shown = shown if name in html_columns else shown.map(html.escape)
        keys = [""] * len(frame) if name in html_columns else _order_keys(frame[name], shown)
        cells.append([f"<td{mark[place]}{key}>{cell}</td>" for key, cell in zip(keys, shown, strict=True)])
    rows = [f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True)]
    lines = ['<table class="sortable">', f"<thead><tr>{header}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>"]
    return "\n".join(lines)


def _order_keys(values: pd.Series, shown: pd.Series) -> list[str]:
    """HTML attributes by which the page's script sorts the cells of a column.

    They are empty if the text of the cells sorts in the order of their values.
    """
    keys = [_natural(_as_text(value)) for value in values]
    ordered = sorted(set(keys))
    of_text = sorted(set(keys), key=lambda key: "".join(text for _, text in key))
    if MINUS not in "".join(shown) and (ordered == of_text or pd.api.types.is_numeric_dtype(values)):
        return [""] * len(keys)
    rank = {key: place for place, key in enumerate(ordered)}
    return [f' data-order="{rank[key]}"' for key in keys]


def _natural(text: str) -> tuple[tuple[float, str], ...]:
    """Sort key that orders the numbers in a text: "margin 0.04", "margin 0.1", "margin 10"."""
    parts = re.findall(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])|\D+|\d+", text)
    return tuple(_natural_part(part) for part in parts)


def _natural_part(part: str) -> tuple[float, str]:
    try:
        return float(part.replace(",", "")), part
    except ValueError:
        return math.inf, part.lower()


def latex_table(frame: pd.DataFrame, caption: str = "") -> str:
    r"""LaTeX of a table for the package booktabs; special characters are escaped.

    Args:
        frame: the rows, without the index.
        caption: caption as plain text; "": a tabular without a float.
    """
    text, numbers = as_text(frame), number_columns(frame)
    kinds = "".join("r" if name in numbers else "l" for name in frame.columns)
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", _latex_row(frame.columns), r"\midrule"]
    lines += [*map(_latex_row, text.itertuples(index=False, name=None)), r"\bottomrule", r"\end{tabular}"]
    if caption:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex_escape(caption)}}}", *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Collection[object]) -> str:
    return " & ".join(latex_escape(str(cell)) for cell in cells) + r" \\"


def latex_escape(text: str) -> str:
    """Text with the special characters of LaTeX escaped, on one line.

    Args:
        text: plain text.
    """
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def markdown_table(frame: pd.DataFrame) -> str:
    """Markdown of a table with pipes; numbers are aligned right.

    Args:
        frame: the rows, without the index.
    """
    numbers = number_columns(frame)
    rows = [frame.columns, ["---:" if name in numbers else "---" for name in frame.columns]]
    rows += as_text(frame).itertuples(index=False, name=None)
    return "".join(f"| {' | '.join(map(_markdown_cell, row))} |\n" for row in rows)


def _markdown_cell(cell: object) -> str:
    return " ".join(re.sub(r"([\\|*_`<])", r"\\\1", str(cell)).split())
