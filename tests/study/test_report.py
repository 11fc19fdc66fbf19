"""Links and lists of runs in a report; tests/browser opens them in a browser."""

from xml.etree import ElementTree

import pandas as pd

from hloss.study.report import collapsed_runs, enable_links, headline_table, listed_runs, relative_link


def test_relative_link_is_plain_text_until_enabled():
    link = relative_link('../../runs/a "b"/run.ipynb', "a & b")
    assert ElementTree.fromstring(link).attrib == {"data-beside": "../../runs/a%20%22b%22/run.ipynb"}
    assert ElementTree.fromstring(link).text == "a & b"
    assert 'src = "figures/a%20b.png"' in enable_links("figures/a b.png")


def test_runs_are_listed_with_their_links():
    links = {"a1": '<a data-beside="x">a1</a>'}
    assert listed_runs("a1, <b>", links) == '<a data-beside="x">a1</a>, &lt;b&gt;'
    assert listed_runs("", links) == listed_runs(float("nan"), links) == ""
    assert collapsed_runs(pd.Series(["a1", None]), links) == [
        '<details><summary>runs</summary><a data-beside="x">a1</a></details>', ""]  # fmt: skip


def test_headline_table_has_the_runs_of_each_row():
    row = {"dataset": "glyphs", "comparison": "losses", "method": "a", "length": 20, "n": 2, "of": 3,
           "run_ids": "r1, r2", "still improving": 1, "recall@1": 40.06, "recall@1 low": 38.0,
           "recall@1 high": 42.0}  # fmt: skip
    table = ElementTree.fromstring(headline_table(pd.DataFrame([row]), ["losses"], ["recall@1"]))
    cells = dict(zip([th.text for th in table.iter("th")], table.iter("td"), strict=True))
    assert cells["recall@1 (%)"].text == "40.1"
    assert cells["n"].text == "2 of 3"
    assert "".join(cells["runs"].itertext()) == "runsr1, r2"
