"""HTML of a report as text; tests/browser tests it in a browser."""

from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from hloss.study.report import enable_links, relative_link, sortable_table


def test_table_equals_the_frame():
    frame = pd.DataFrame({"method": ["a & b", "<c>"], "recall": [41.5, np.nan], "n": [5, 3]})
    table = ElementTree.fromstring(sortable_table(frame).partition("<style>")[0])
    assert table.attrib == {"class": "sortable"}
    assert [cell.text for cell in table.iter("th")] == ["method", "recall", "n"]
    rows = [[cell.text for cell in row.iter("td")] for row in table.find("tbody")]
    assert rows == [["a & b", "41.5", "5"], ["<c>", None, "3"]]


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
    assert "<td></td>" in sortable_table(pd.DataFrame({"x": ["here", missing]}, dtype=object))


def test_table_loads_nothing_from_other_hosts():
    assert "://" not in sortable_table(pd.DataFrame({"x": [1]}))
    assert "src=" not in sortable_table(pd.DataFrame({"x": [1]}))


def test_relative_link_is_plain_text_until_enabled():
    link = relative_link('../../runs/a "b"/run.ipynb', "a & b")
    assert ElementTree.fromstring(link).attrib == {"data-beside": "../../runs/a%20%22b%22/run.ipynb"}
    assert ElementTree.fromstring(link).text == "a & b"
    assert 'src = "figures/a%20b.png"' in enable_links("figures/a b.png")
