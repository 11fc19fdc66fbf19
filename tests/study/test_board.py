"""The board of claims: verdicts, differences and details of made-up judgements."""

import math

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from hloss.study.board import board_html, compared, groups, outcome, reason, shown_difference
from hloss.study.criteria import METHOD_CRITERIA, sensitive
from hloss.study.estimates import Estimate

ROW = {
    "claim": "a", "text": "A beats B.", "section": "4", "criterion": "A is above B & C.", "dataset": "glyphs",
    "asked": "other data", "comparison": "losses", "length": "200 iterations", "verdict": "not reproduced",
    "conclusion": "", "holm": "inconclusive", "initial grid": "", "shared training": "", "grids": "",
    "still improving": "3 of 10 runs",
    "parts": ["A minus B: -3.3 (95 % CI -4.1 to -2.4 over seeds, n = 5)", "A; B minus C: +1.0 (one seed)"],
    "evidence": "one seed", "published": "50; 60", "needed": "",
    "decisive": "A minus B: -3.3 (95 % CI -4.1 to -2.4 over seeds, n = 5)", "difference": -3.3, "low": -4.1,
    "high": -2.4, "confidence": 95.0, "n": 5, "unit": "points", "margin": 2.0, "holds above": 0.0,
    "holds below": math.nan, "p holds": 1.0, "p refuted": 0.01, "run_ids": "r1, r2",
}  # fmt: skip


def soup_of(*rows, links=None):
    board = pd.DataFrame([ROW | row for row in rows])
    return BeautifulSoup(board_html(board, links or {}), "html.parser")


def test_a_claim_shows_verdict_difference_and_data():
    (claim,) = soup_of({}).select("details.claim")
    assert claim.select_one(".verdict").text == "✗ not reproduced"
    assert claim.select_one(".what").text == "A beats B. glyphs · losses · 200 iterations · still improving"
    assert [line.text for line in claim.select(".difference")] == ["A minus B", "−3.3 points (95 % CI −4.1 to −2.4)"]
    assert claim.svg["aria-label"] == (
        "A minus B: 200 iterations: −3.3 points (95 % CI −4.1 to −2.4). The claim holds above 0.0."
    )


def test_details_have_criterion_evidence_and_runs():
    (claim,) = soup_of({}, links={"r2": '<a data-beside="x">r2</a>'}).select("details.claim")
    details = {dt.text: dd for dt, dd in zip(claim.select("dt"), claim.select("dd"), strict=True)}
    assert details["Criterion"].text == "A is above B & C."
    assert details["Published"].text == "50; 60"
    assert details["Holm"].text == "inconclusive"
    assert details["Region"].text == "The claim holds above 0.0. Margin: 2 points."
    parts = [item.text for item in details["Evidence, 200 iterations"].select("li")]
    assert parts == ["A minus B: -3.3 (95 % CI -4.1 to -2.4 over seeds, n = 5)", "A; B minus C: +1.0 (one seed)"]
    assert details["Runs"].text == "r1, r2"
    assert details["Runs"].a.text == "r2"
    assert not {"Initial grid", "Wider intervals"} & set(details)
    (claim,) = soup_of({"shared training": "inconclusive"}).select("details.claim")
    assert claim.find("dt", string="Wider intervals").find_next("dd").text == "inconclusive"


def test_verdicts_that_depend_on_the_length_have_a_line_each():
    later = {"length": "2,000 iterations", "verdict": "reproduced", "difference": 4.0, "low": 3.0, "high": 5.0,
             "still improving": ""}  # fmt: skip
    (claim,) = soup_of({}, later).select("details.claim")
    assert claim.select_one(".verdict").text == ("⇄ depends on the length200: not reproduced2,000: reproduced")
    assert "200 and 2,000 iterations" in claim.select_one(".what").text
    lines = [line.text for line in claim.select(".plot .difference")]
    assert lines == [
        "A minus B, points",
        "200 iterations: −3.3 (−4.1 to −2.4)",
        "2,000 iterations: +4.0 (+3.0 to +5.0)",
    ]
    assert len(claim.svg.select("circle")) == 2
    board = pd.DataFrame([ROW, ROW | later])
    assert [outcome(rows) for rows in groups(board)] == ["depends on the length"]


def test_another_pair_that_decides_at_another_length_is_named():
    later = {"length": "2,000 iterations", "decisive": "A minus C: +4.0 (n = 5)", "difference": 4.0, "low": 3.0,
             "high": 5.0}  # fmt: skip
    (claim,) = soup_of({}, later).select("details.claim")
    assert [line.text for line in claim.select(".plot .difference")] == [
        "200 iterations, A minus B: −3.3 points (95 % CI −4.1 to −2.4)",
        "2,000 iterations, A minus C: +4.0 points (95 % CI +3.0 to +5.0)",
    ]
    assert "A minus B: 200 iterations: −3.3 points" in claim.svg["aria-label"]
    assert "A minus C: 2,000 iterations: +4.0 points" in claim.svg["aria-label"]


def test_claims_that_were_not_run_are_one_closed_line_at_the_end():
    missing = {"claim": "b", "text": "C matters.", "verdict": "not run", "evidence": "runs are missing", "run_ids": ""}
    soup = soup_of(missing, {}, missing | {"dataset": "cub"})
    last = soup.select(".board > details")[-1]
    assert last["class"] == ["not-run"]
    assert not last.has_attr("open")
    assert last.summary.text == "2 verdicts of claims not run"
    assert [item.text for item in last.select("li")] == [
        "C matters. glyphs · losses · runs are missing", "C matters. cub · losses · runs are missing"]  # fmt: skip
    assert len(soup.select("details.claim")) == 1


def test_ids_are_unique_and_claims_have_no_word_by_colour_alone():
    soup = soup_of({}, {"claim": "b", "verdict": "reproduced"}, {"claim": "c", "verdict": "inconclusive"})
    identities = [tag["id"] for tag in soup.select("[id]")]
    assert len(identities) == len(set(identities)) == 3
    assert [tag.text for tag in soup.select(".verdict")] == ["✗ not reproduced", "✓ reproduced", "? inconclusive"]


OUTSIDE = {"verdict": "inconclusive"}
EQUIVALENT = {"decisive": "A minus B: +0.5 (95 % CI -0.1 to +1.1 over seeds, n = 5, equivalent)",
              "difference": 0.5, "low": -0.1, "high": 1.1}  # fmt: skip
CLOSE = {"verdict": "reproduced", "difference": 22.4, "low": 21.6, "high": 23.1, "holds above": -2.0}
CORRECTED = ", not significant when corrected for the comparisons of this claim"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, ""),
        (OUTSIDE, CORRECTED),
        (OUTSIDE | {"high": 1.0}, ""),
        (OUTSIDE | {"holds above": math.nan, "holds below": 0.0}, ""),
        (OUTSIDE | {"holds above": math.nan, "holds below": -5.0}, CORRECTED),
        (EQUIVALENT, ", equivalent"),
        (EQUIVALENT | OUTSIDE, ", equivalent, but not when corrected for the comparisons of this claim"),
        (EQUIVALENT | {"verdict": "reproduced"}, ""),
        (CLOSE, ", above by more than the margin"),
        (CLOSE | {"low": 1.9}, ""),
        (CLOSE | {"holds above": 0.0}, ""),
        (CLOSE | {"holds below": 2.0}, ""),
        (
            CLOSE | {"low": -9.0, "high": -5.0, "holds above": math.nan, "holds below": 2.0},
            ", below by more than the margin",
        ),
    ],
)
def test_a_verdict_that_the_interval_does_not_suggest_has_its_reason(row, expected):
    assert reason(ROW | row) == expected
    (line,) = soup_of(row).select(".plot .difference")[1:]
    assert line.text.endswith(f"){expected}")


def test_data_that_a_claim_does_not_name_is_told_beside_data_that_it_names():
    told = [
        [tag.text for tag in soup_of({}, {"claim": "b", "asked": asked, "dataset": "cub"}).select(".what > .soft")]
        for asked in ("other data", "the paper's data")
    ]
    assert [["not data of the claim" in text for text in texts] for texts in told] == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"low": math.nan, "high": math.nan}, "−3.3 points (no interval)"),
        ({"unit": "exponent", "difference": 1.843}, "exponent 1.84"),
        ({"unit": "% of the mass", "confidence": 99.5}, "−3.3 % of the mass (99.5 % CI −4.1 to −2.4)"),
    ],
)
def test_differences_have_their_unit(row, shown):
    assert shown_difference(ROW | row) == shown


def test_what_is_compared_may_have_colons():
    at_batch = "batch_size 9: n_bins 200 minus 25: +0.0 (n = 5)"
    assert compared({"decisive": at_batch}) == "n_bins 200 minus 25 at batch_size 9"
    assert compared({"decisive": "exponent 1.84"}) == "the time grows as a power of the batch size"


@pytest.mark.parametrize(
    ("check", "bounds", "margin"),
    [
        ("above", (0, None), 2),
        ("equivalent", (-2, 2), 2),
        ("not_below", (-2, None), 2),
        ("less_overlap", (None, 0), None),
    ],
)
def test_numbers_of_a_part_are_those_of_its_evidence(check, bounds, margin):
    part = METHOD_CRITERIA[check]("a minus b", Estimate(3.0, 0.5, 5), 2.0)
    numbers = {name: None if value != value else value for name, value in part.numbers().items()}
    assert (numbers["holds above"], numbers["holds below"], numbers["margin"]) == (*bounds, margin)
    assert f"{numbers['confidence']:g} % CI {numbers['low']:+.1f} to {numbers['high']:+.1f}" in str(part)
    assert f": {numbers['difference']:+.1f} " in str(part)
    assert numbers["n"] == 5


def test_a_part_of_one_seed_has_no_interval():
    runs = {1: pd.DataFrame({"seed": [0], "recall@1": [40.0]}), 2: pd.DataFrame({"seed": [0], "recall@1": [30.0]})}
    (part,) = sensitive("C", runs, None, 5.0, "recall@1")
    numbers = part.numbers()
    assert (numbers["difference"], numbers["holds above"], numbers["n"]) == (10.0, 5.0, 1)
    assert math.isnan(numbers["low"])
    assert math.isnan(numbers["confidence"])
