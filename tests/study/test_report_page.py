"""The page of a report: made from a small notebook, and the committed one compared with its tables."""

import re

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from hloss.study.claims import read_board
from hloss.study.exhibits import PRINTED
from hloss.study.findings import findings, heading, lines
from hloss.study.report_page import report_page, with_contents
from hloss.study.results import distinct_runs, read_results
from hloss.study.spec import OF_TUNING
from tests.helpers.sample import RESULTS, SAMPLE, number

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def output(kind, data, **metadata):
    return nbformat.v4.new_output("display_data", {kind: data}, metadata=metadata)


@pytest.fixture(scope="module")
def small():
    caption = '<figcaption id="figure-1"><b>Figure 1.</b> A line.</figcaption>'
    outputs = [
        output("text/html", "<h1>Title</h1>"),
        output("image/png", PNG, **{"image/png": {"alt": 'a "line"'}}),
        output("text/html", caption),
        output("text/markdown", "**bold** & `code`"),
        nbformat.v4.new_output("stream", name="stdout", text="a < b\n"),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("secret", metadata={"tags": ["notebook-only"]}),
        nbformat.v4.new_markdown_cell("## One & two\n\n<details><summary>More</summary>\n\n- item\n\n</details>"),
        nbformat.v4.new_code_cell("hidden = 1", outputs=outputs),
        nbformat.v4.new_markdown_cell("### bins\n\n### bins\n\n## Last"),
    ]
    return BeautifulSoup(report_page(nbformat.v4.new_notebook(cells=cells), "A & B"), "html.parser")


def test_the_page_has_text_and_outputs_without_code(small):
    text = small.main.text
    assert small.title.text == "A & B"
    assert "hidden" not in text
    assert "secret" not in text
    assert "bold & code" in text
    assert small.main.pre.text == "a < b\n"
    assert small.main.details.li.text.strip() == "item"


def test_an_image_and_its_caption_are_one_figure(small):
    (figure,) = small.main.select("figure")
    assert figure.img["alt"] == 'a "line"'
    assert figure.figcaption.text == "Figure 1. A line."
    assert len(small.select("figcaption")) == 1


def test_the_contents_link_to_every_section(small):
    links = [(link["href"], link.text) for link in small.nav.select("a")]
    assert links == [("#top", "The answer"), ("#one-two", "One & two"), ("#bins", "bins"), ("#bins-2", "bins"),
                     ("#last", "Last")]  # fmt: skip
    assert all(small.find(id=href[1:]) for href, _ in links[1:])
    assert [len(item.select("a")) for item in small.nav.ul.find_all("li", recursive=False)] == [1, 1, 2, 1]


def test_contents_that_end_deep_are_closed():
    _, contents = with_contents("<h2>A</h2><h3>B</h3>")
    assert contents.count("<ul>") == contents.count("</ul>") == 2
    assert contents.count("<li>") == contents.count("</li>")


@pytest.fixture(scope="module")
def page():
    return BeautifulSoup((SAMPLE / "report.html").read_text(), "html.parser")


@pytest.fixture(scope="module")
def means():
    return pd.read_csv(SAMPLE / "summary.csv")


@pytest.fixture(scope="module")
def runs():
    """The runs of the sample, once each."""
    return distinct_runs(read_results(RESULTS))


@pytest.fixture(scope="module")
def board():
    return pd.read_csv(SAMPLE / "claims.csv")


@pytest.fixture(scope="module")
def judged(board):
    """The judged claims, each with its rows at all lengths."""
    rows = board[board["verdict"] != "not run"]
    return [group for _, group in rows.groupby(["claim", "dataset", "comparison"], sort=False, dropna=False)]


def check_page(page):
    """Every figure has alternative text and a caption, ids are unique, and nothing comes from another host."""
    identities = [tag["id"] for tag in page.select("[id]")]
    assert len(identities) == len(set(identities))
    for image in page.select("img"):
        assert image["alt"].strip()
        assert image["src"].startswith("data:image/png;base64,")
        assert image.parent.name == "figure"
        assert image.parent.figcaption.text.strip()
    assert all(svg["aria-label"].strip() and svg["role"] == "img" for svg in page.select("svg"))
    numbers = [int(re.match(r"Figure (\d+)\.", c.text)[1]) for c in page.select('figcaption[id^="figure-"]')]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(page.select("figure")) == len(page.select("figure > figcaption"))
    assert not page.select("link, iframe, [srcset]")
    assert all(script.get("src") is None for script in page.select("script"))
    assert all(link["href"].startswith("#") for link in page.select("a[href]"))
    styles = "".join(style.text for style in page.select("style"))
    assert all(url.startswith("data:") for url in re.findall(r"url\(([^)]*)\)", styles))
    assert "@import" not in styles
    assert not re.search(r"\b0\.0 h", page.main.text)


def test_a_page_is_complete_in_itself(small, page):
    check_page(small)
    check_page(page)
    assert (SAMPLE / "report.html").stat().st_size <= 3_000_000
    assert len(page.select("script#datatables")) == 1
    assert len(page.select("table.sortable")) > 10


def test_captions_of_figures_name_the_unit(page):
    captions = [caption.text for caption in page.select('figcaption[id^="figure-"]')]
    numbers = [text for text in captions if not re.match(r"Figure \d+\. Test queries", text)]  # pictures
    assert len(numbers) >= len(captions) - 1
    recall = r"(Test |Mean test )?Recall@[\dK]+ \(%\)|Differences in test Recall@1 \(points\)"
    assert all(re.match(rf"Figure \d+\. ({recall}|Densities \(per )", text) for text in numbers)


def is_same(rows):
    """Whether the verdict is the same at all lengths."""
    return rows["verdict"].nunique() == 1


@pytest.fixture(scope="module")
def tuned(means):
    """The means of the tuned losses at each length, the shortest first."""
    return [rows for _, rows in means[means["comparison"] == "tuned losses"].groupby("length")]


def counted(text):
    """The numbers of verdicts in a text such as "2 reproduced, 1 inconclusive"."""
    return {name: int(n) for n, name in re.findall(r"(\d+) (reproduced|not reproduced|inconclusive)", text)}


def test_the_answer_has_the_numbers_of_the_tables(page, tuned, board, judged, runs):
    text = page.select_one(".answer").text
    losses = tuned[-1].sort_values("recall@1")
    first, second = losses.iloc[-1], losses.iloc[-2]
    shown = f"{first['method']} has the highest test Recall@1, {first['recall@1']:.1f} % "
    shown += f"(95 % CI {first['recall@1 low']:.1f} to {first['recall@1 high']:.1f}), "
    shown += f"{number(first['recall@1'] - second['recall@1'])} points above the next, {second['method']}"
    assert shown in text
    assert f"After {losses['length'].iloc[0]:,} iterations on glyphs (tuned settings, mean of " in text
    last = pd.DataFrame([rows.iloc[-1] for rows in judged])
    at_length = " at the longest length" * any(len(rows) > 1 for rows in judged)
    assert f"{len(judged)} verdicts on {last['claim'].nunique()} claims of the paper{at_length}: " in text
    (short,) = (tag.text for tag in page.select(".answer strong") if " verdicts on " in tag.text)
    before, after = short.split("; with Holm's correction for the number of tests: ")
    assert counted(before) == last["verdict"].value_counts().to_dict()
    assert counted(before if after == "the same." else after) == last["holm"].value_counts().to_dict()
    changed = [rows for rows in judged if not is_same(rows)]
    assert (f"{len(changed)} of the {len(judged)} verdicts differ" in text) == bool(changed)
    only = sum("reproduced" in rows["verdict"].tolist()[:-1] and rows["verdict"].iloc[-1] != "reproduced"
               for rows in changed)  # fmt: skip
    assert bool(re.search(rf"; {only} (was|were) reproduced earlier in training only", text)) == bool(only)
    untested = (last["p holds"].isna() & (last["verdict"] != "inconclusive")).sum()
    limits = page.select_one("p:has(+ .findings)").text
    assert bool(re.search(rf"{untested} of the verdicts rests? on no statistical test", limits)) == bool(untested)
    never = (board["verdict"] == "not run").groupby([board["claim"], board["comparison"].fillna("")]).all().sum()
    assert (f"{never} other verdict" in text) == bool(never)
    improving = int(losses["still improving"].sum())
    told = f"{improving} of the {losses['n'].sum()} runs of these losses are still improving"
    assert (told in text) == (improving > 0)
    used = {run_id for rows in judged for ids in rows["run_ids"] for run_id in str(ids).split(", ")}
    trained = runs[runs["length"] > 0]
    of_claims = trained[trained["run_id"].isin(used)]
    improving = int(of_claims["still_improving"].sum())
    told = f"{len(of_claims)} of the {len(trained)} trained runs; "
    assert (f"{told}{improving} of these {len(of_claims)} are still improving" in text) == (improving > 0)
    assert f"all {len(runs)} planned runs, of which {len(trained)} train a network" in page.header.text
    assert "one dataset of drawn characters (glyphs), not data of the paper" in text
    assert "at most five seeds per method" in text


def test_the_figure_of_the_answer_has_the_means_and_intervals(page, tuned):
    rows = page.select("table.losses tbody tr")
    ordered = tuned[-1].sort_values("recall@1", ascending=False)
    assert len(rows) == len(ordered)
    for line, row in zip(rows, ordered.to_dict("records"), strict=True):
        (narrow,) = line.select("td.number .narrow")
        cells = [line.th.text, narrow.previous_sibling, line.select_one("td.wide").text]
        interval = f"{row['recall@1 low']:.1f} to {row['recall@1 high']:.1f}"
        assert cells == [row["method"], f"{row['recall@1']:.1f}", interval]
        assert narrow.text == interval
        before = [rows.set_index("method").loc[row["method"]] for rows in tuned[:-1]]
        steps = "".join(f"; after {told['length']:,} iterations {told['recall@1']:.1f} %" for told in before)
        shown = f"{row['method']}: {row['recall@1']:.1f} %, 95 % CI {interval}{steps}"
        assert line.svg["aria-label"].startswith(shown)


def test_the_claims_in_words_link_to_their_line_of_the_board(page):
    board = read_board(SAMPLE / "claims.csv")
    for group, (name, of_group) in zip(page.select(".findings"), findings(board).items(), strict=True):
        assert heading(name, of_group) in group.text
        told = [f"{claim}: {'; '.join(verdicts)}" for _, claim, verdicts in lines(of_group)]
        assert [item.text for item in group.select("li")] == told
        for link in group.select("li a"):
            assert link.text in page.select_one(link["href"]).summary.text


def told_of(row, with_unit=True):
    """The difference of a verdict as the board shows it, with the reason of a verdict that it does not suggest."""
    equivalent = row["decisive"].endswith(", equivalent)")
    outside = row["high"] < row["holds above"] or row["low"] > row["holds below"]
    reason = ", equivalent" * (equivalent and row["verdict"] == "not reproduced")
    if row["verdict"] == "reproduced":
        low, high = (pd.isna(row[f"holds {side}"]) for side in ("above", "below"))
        beyond = row["low"] > row["margin"], row["high"] < -row["margin"]
        if high and row["holds above"] == -row["margin"] and beyond[0]:
            reason = ", above by more than the margin"
        if low and row["holds below"] == row["margin"] and beyond[1]:
            reason = ", below by more than the margin"
    if row["verdict"] == "inconclusive" and (equivalent or outside):
        reason = f", {'equivalent, but not' if equivalent else 'not significant'} when corrected"
        reason += " for the comparisons of this claim"
    return difference_of(row, with_unit) + reason


def difference_of(row, with_unit=True):
    """The difference of a verdict with its interval."""
    if row["unit"] == "exponent":
        return f"exponent {row['difference']:.2f}"
    difference = number(row["difference"], plus=True) + f" {row['unit']}" * with_unit
    if pd.isna(row["low"]):
        return f"{difference} (no interval)"
    confidence = f"{row['confidence']:.3g} % CI " * with_unit
    return f"{difference} ({confidence}{number(row['low'], plus=True)} to {number(row['high'], plus=True)})"


def test_the_board_has_the_verdicts_and_differences_of_the_claims(page, board, judged):
    claims = page.select("details.claim")
    assert len(claims) == len(judged)
    for claim, rows in zip(claims, judged, strict=True):
        last = rows.iloc[-1]
        told = last["verdict"]
        if not is_same(rows):
            lengths = rows["length"].str.removesuffix(" iterations")
            told = "depends on the length" + "".join(lengths + ": " + rows["verdict"])
        assert claim.select_one(".verdict").text.split(" ", 1)[1] == told
        assert last["text"] in claim.select_one(".what").text
        pair, *lines = [line.text for line in claim.select(".plot .difference")]
        if len(rows) == 1:
            assert lines == [told_of(last)]
        elif rows["decisive"].str.rpartition(": ")[0].nunique() == 1:
            assert pair.endswith(f", {last['unit']}")
            assert lines == [f"{row['length']}: {told_of(row, False)}" for _, row in rows.iterrows()]
        else:
            assert all(line.startswith(f"{row['length']}, ") and line.endswith(f": {told_of(row)}")
                       for line, (_, row) in zip([pair, *lines], rows.iterrows(), strict=True))  # fmt: skip
        parts = [part for evidence in rows["evidence"] for part in evidence.split("; ")]
        assert [item.text for item in claim.select("dd li")] == parts
    never = (board["verdict"] == "not run").groupby([board["claim"], board["comparison"].fillna("")]).all()
    assert len(page.select(".not-run li")) == never.sum()


def test_numbers_of_the_claims_are_those_of_their_evidence(board):
    for row in board[board["low"].notna()].to_dict("records"):
        difference, low, high = (f"{row[name]:+.1f}".replace("-0.0", "+0.0") for name in ("difference", "low", "high"))
        interval = f"{row['confidence']:.3g} % CI {low} to {high}"
        assert f": {difference} ({interval} over" in row["decisive"]
        assert f"n = {row['n']}" in row["decisive"]


def rows_of(table):
    header = [cell.text for cell in table.select("thead th")]
    return [dict(zip(header, (c.text for c in row.select("td")), strict=True)) for row in table.select("tbody tr")]


def test_every_mean_of_the_tables_is_that_of_the_summary(page, means):
    means = means[~means["comparison"].str.endswith(OF_TUNING) & (means["comparison"] != "difficulty")]
    known = {(row["comparison"], row["method"], row["length"]): row for row in means.to_dict("records")}
    assert len(known) == len(means)
    shown = set()
    for table in page.select("table.sortable"):
        for row in rows_of(table):
            if {"comparison", "method", "length", "recall@1 (%)"} <= row.keys():
                key = (row["comparison"], row["method"], int(row["length"]))
                for name in ("recall@1", "recall@2", "recall@4", "recall@8"):
                    assert float(row[f"{name} (%)"]) == pytest.approx(known[key][name], abs=0.051)
                low, high = known[key]["recall@1 low"], known[key]["recall@1 high"]
                assert row["95 % interval"] == ("no interval" if pd.isna(low) else f"{low:.1f} to {high:.1f}")
                shown.add(key)
    longest = means.groupby(["comparison", "method"])["length"].transform("max")
    of_losses = means["comparison"].isin(["losses", "tuned losses"])  # whose table has the longest length alone
    expected = means[~of_losses | (means["length"] == longest)]
    assert shown == set(expected[["comparison", "method", "length"]].itertuples(index=False, name=None))


def test_tables_beside_the_page_have_its_rows(page):
    for figure in page.select("figure.table"):
        csv, *others = (SAMPLE / link["data-beside"] for link in figure.select("p.files a"))
        table = pd.read_csv(csv)
        assert len(table) == len(figure.select("tbody tr"))
        if len(table) > PRINTED:
            assert others == []
        else:
            latex, markdown = (file.read_text() for file in others)
            assert latex.count(r" \\") == len(table) + 1
            assert len(markdown.splitlines()) == len(table) + 2
