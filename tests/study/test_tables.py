"""Tables as HTML, LaTeX and Markdown, read back."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from hloss.study.tables import as_text, duration, latex_escape, latex_table, markdown_table, signed, sortable_table

FRAME = pd.DataFrame(
    {
        "method": ["margin 2", "margin 0.04 & <c>", "margin 10"],
        "recall@1 (%)": [41.5, np.nan, -3.25],
        "n": [5, 3, 10],
        "50 % | x_1": ["a_b", None, r"c\d"],
    }
)


def cells_of(table):
    root = ElementTree.fromstring(table)
    return [cell.text for cell in root.iter("th")], [[c.text or "" for c in r.iter("td")] for r in root.find("tbody")]


def test_numbers_of_a_column_have_equal_decimals():
    text = as_text(FRAME)
    assert text["recall@1 (%)"].tolist() == ["41.50", "", "−3.25"]
    assert text["n"].tolist() == ["5", "3", "10"]
    assert as_text(pd.DataFrame({"rate": [0.001, 0.01]}))["rate"].tolist() == ["0.001", "0.010"]
    assert as_text(pd.DataFrame({"flag": [True, False]}))["flag"].tolist() == ["True", "False"]


def test_html_equals_the_frame_and_marks_numbers():
    header, rows = cells_of(sortable_table(FRAME))
    assert header == list(FRAME.columns)
    assert rows == as_text(FRAME).to_numpy().tolist()
    root = ElementTree.fromstring(sortable_table(FRAME))
    marked = [[cell.get("class") for cell in row] for row in root.iter("tr")]
    assert marked == [[None, "number", "number", None]] * 4


def test_cells_sort_by_their_values_and_not_by_their_text():
    root = ElementTree.fromstring(sortable_table(FRAME))
    orders = [[cell.get("data-order") for cell in row] for row in root.find("tbody")]
    assert [order[0] for order in orders] == ["1", "0", "2"]  # 0.04, 2, 10
    assert sorted(range(3), key=lambda i: int(orders[i][1])) == [1, 2, 0]  # none, -3.25, 41.5
    assert [order[2] for order in orders] == [None, None, None]


def test_long_cells_are_broken_into_lines():
    table = sortable_table(pd.DataFrame({"evidence": ["word " * 20], "n": ["short"]}))
    assert table.count('class="long"') == 2  # header and cell


def test_escapes_all_but_html_columns():
    frame = pd.DataFrame({"<b>": ["<script>x</script>"], "run": ['<a href="#r1">r1</a>']})
    table = sortable_table(frame, html_columns=["run"])
    assert "<script>x" not in table
    assert "<b>" not in table
    assert '<td><a href="#r1">r1</a></td>' in table


def test_refuses_an_unknown_html_column():
    with pytest.raises(ValueError, match=r"got \['runs'\]; allowed are \['run'\]"):
        sortable_table(pd.DataFrame({"run": ["r1"]}), html_columns=["runs"])


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_missing_values_are_empty_cells(missing):
    assert cells_of(sortable_table(pd.DataFrame({"x": ["here", missing]}, dtype=object)))[1] == [["here"], [""]]


def test_an_empty_table_has_a_header():
    assert cells_of(sortable_table(pd.DataFrame({"a": [], "b": []}))) == (["a", "b"], [])
    assert markdown_table(pd.DataFrame({"a": []})) == "| a |\n| --- |\n"


def read_latex(text):
    """Kinds of the columns, and rows of cells without escapes, of a tabular."""
    kinds = re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1)
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0].replace("\\midrule\n", "")
    rows = [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body.strip().splitlines()]
    plain = {r"\&": "&", r"\%": "%", r"\_": "_", r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|",
             r"\textbackslash{}": "\\", "$-$": "−"}  # fmt: skip

    def unescape(cell):
        for escaped, sign in plain.items():
            cell = cell.replace(escaped, sign)
        return cell

    return kinds, [[unescape(cell) for cell in row] for row in rows]


def test_latex_is_read_back():
    text = latex_table(FRAME, "50 % of a_b")
    assert r"\caption{50 \% of a\_b}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    kinds, rows = read_latex(text)
    assert kinds == "lrrl"
    assert rows == [list(FRAME.columns), *as_text(FRAME).to_numpy().tolist()]
    assert latex_table(FRAME).startswith(r"\begin{tabular}")


def test_latex_escapes_every_special_character():
    assert latex_escape("#$%&_{}~^\\") == (r"\#\$\%\&\_\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}")
    assert latex_escape("two\nlines") == "two lines"


def test_markdown_is_read_back():
    head, rule, *rows = markdown_table(FRAME).splitlines()
    assert rule == "| --- | ---: | ---: | --- |"
    read = [[re.sub(r"\\(.)", r"\1", cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (head, *rows)]
    expected = [list(FRAME.columns), *as_text(FRAME).to_numpy().tolist()]
    assert [[cell.strip() for cell in row] for row in read] == expected


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (0.31, "0.3 s"), (42, "42 s"), (59.6, "60 s"), (250, "4 min 10 s"), (3599.7, "1 h 0 min"),
     (3006, "50 min"), (7260, "2 h 1 min"), (3600 * 1234, "1,234 h 0 min")],
)  # fmt: skip
def test_durations_have_a_unit_that_suits_them(seconds, shown):
    assert duration(seconds) == shown


def test_signs():
    assert (signed(-0.04), signed(0.0, plus=True), signed(-2.25, 2), signed(3, 0, plus=True)) == (
        "0.0", "+0.0", "−2.25", "+3")  # fmt: skip
