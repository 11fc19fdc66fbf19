"""Claims: every committed one reads, and verdicts follow from the runs and from nothing else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hloss.claims import CLAIMS, Claim, judge, overlap, read_claims
from hloss.experiment import ConfigError

SEEDS = [0, 1, 2, 3, 4]
NOISE = [0.1, -0.2, 0.15, 0.05, -0.1]  # of single seeds, in points


def runs(means, comparison="bins", axis="n_bins", dataset="glyphs", loss="histogram", spread=1.0, **settings):
    """Made-up results: levels of an axis with these means of Recall@1."""
    rows = []
    for level, mean in means.items():
        for i, seed in enumerate(SEEDS):
            value = mean + spread * NOISE[(i + len(rows) // 5) % 5]
            rows.append({"comparison": comparison, "method": f"{loss} {level}", "dataset": dataset, "loss": loss,
                         "seed": seed, axis: level, "recall@1": value, "complete": True, "run_id": f"{level}-{seed}",
                         **settings})  # fmt: skip
    return pd.DataFrame(rows)


def claim(check="equivalent", **given):
    settings = {"name": "a", "section": "1", "claim": "b", "criterion": "c", "data": ["cub"], "comparison": ["bins"]}
    return Claim(**settings | {"check": check} | given)


def verdict(results, asked):
    (row,) = judge(results, claims=[asked]).to_dict("records")
    return row["verdict"]


def test_every_committed_claim_reads_and_can_be_judged():
    claims = read_claims()
    assert len({c.name for c in claims}) == len(claims) >= 18
    board = judge(runs({50: 40.0, 100: 40.0, 200: 40.0, 400: 40.0}))
    assert set(board["claim"]) == {c.name for c in claims}
    assert board.set_index("claim").loc["bins", "verdict"] == "reproduced"
    assert set(board[board["claim"] != "bins"]["verdict"]) == {"not run"}


@pytest.mark.parametrize(
    ("check", "means", "expected"),
    [
        ("equivalent", {50: 40.0, 200: 40.3, 400: 39.8}, "reproduced"),
        ("equivalent", {50: 35.0, 200: 40.3, 400: 39.8}, "not reproduced"),
        ("equivalent", {50: 38.0, 200: 40.0}, "inconclusive"),
        ("rising", {50: 30.0, 200: 35.0, 400: 40.0}, "reproduced"),
        ("rising", {50: 30.0, 200: 35.0, 400: 34.0}, "not reproduced"),
        ("rising", {50: 30.0, 200: 35.0, 400: 35.0}, "not reproduced"),
        ("sensitive", {50: 30.0, 200: 35.0, 400: 31.0}, "reproduced"),
        ("sensitive", {50: 30.0, 200: 30.5, 400: 31.0}, "not reproduced"),
        ("sensitive", {50: 30.0, 200: 32.0, 400: 31.0}, "inconclusive"),
        ("best", {50: 30.0, 200: 35.0, 400: 31.0}, "reproduced"),
        ("best", {50: 36.0, 200: 35.0, 400: 31.0}, "not reproduced"),
        ("no_gain", {50: 30.0, 200: 35.0, 400: 36.0}, "reproduced"),
        ("no_gain", {50: 30.0, 200: 35.0, 400: 38.0}, "not reproduced"),
    ],
)
def test_a_verdict_over_levels(check, means, expected):
    assert verdict(runs(means), claim(check, axis="n_bins", reference=200)) == expected


@pytest.mark.parametrize(("gap", "expected"), [(3.0, "reproduced"), (-3.0, "not reproduced"), (0.0, "not reproduced")])
def test_a_verdict_over_methods(gap, expected):
    results = pd.concat([runs({200: 40.0 + gap}), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    assert verdict(results, claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])) == expected


def test_a_noisy_difference_is_inconclusive():
    results = pd.concat([runs({200: 41.0}, spread=20), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    assert verdict(results, claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])) == "inconclusive"


def test_nothing_is_concluded_from_half_a_study():
    results = runs({50: 40.0, 200: 40.3, 400: 39.8})
    results.loc[3, ["complete", "recall@1"]] = False, np.nan
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    assert (row["verdict"], row["evidence"], row["run_ids"]) == ("not run", "1 of 15 runs are missing", "")


def test_a_claim_waits_for_its_own_runs_alone():
    results = pd.concat(
        [runs({200: 43.0}), runs({0: 40.0}, loss="lifted"), runs({1: 1.0}, loss="triplet")], ignore_index=True
    )
    asked = claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])
    for loss, expected in (("triplet", "reproduced"), ("lifted", "not run")):
        half = results.assign(complete=(results["loss"] != loss) | (results["seed"] > 0))
        assert verdict(half, asked) == expected


def test_a_claim_of_one_method_is_not_judged_by_two():
    results = pd.concat([runs({50: 43.0, 200: 43.0}), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    asked = claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])
    (row,) = judge(results, claims=[asked]).to_dict("records")
    assert (row["verdict"], row["evidence"]) == ("not run", "several methods, not one: histogram 50; histogram 200")


def test_levels_within_groups_are_compared_within_them():
    results = pd.concat(
        [runs({50: 20.0, 200: 20.2}, batch_size=32), runs({50: 40.0, 200: 40.1}, batch_size=128)], ignore_index=True
    )
    asked = claim(axis="n_bins", reference=200, within="batch_size")
    assert verdict(results, asked) == "reproduced"
    with pytest.raises(ValueError, match="more than one value for seed"):
        verdict(results, claim(axis="n_bins", reference=200))


def test_the_numbers_are_those_of_scipy_and_the_runs_are_named():
    results = runs({50: 40.0, 200: 41.0})
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    a, b = (results[results["n_bins"] == level]["recall@1"] for level in (50, 200))
    low, high = stats.ttest_rel(a, b).confidence_interval()
    assert row["evidence"] == f"50 less 200: {a.mean() - b.mean():+.1f} ({low:+.1f} to {high:+.1f}, n = 5)"
    assert row["run_ids"].split(", ") == sorted(results["run_id"])
    assert row["asked"] == "other data"


def test_overlap_is_the_mass_below_both_densities():
    frame = pd.DataFrame({"positive_after": [[0.5, 0.5, 0.0]], "negative_after": [[0.0, 0.25, 0.75]]})
    assert overlap(frame).tolist() == [25.0]


def test_less_overlap_is_asked_of_the_densities():
    ours, rival = runs({200: 40.0}), runs({0: 40.0}, loss="lifted")
    for frame, share in ((ours, 0.1), (rival, 0.3)):
        frame["positive_after"] = [[1 - share - s / 1000, share + s / 1000] for s in NOISE]
        frame["negative_after"] = [[0.0, 1.0]] * len(frame)
    asked = claim("less_overlap", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])
    assert verdict(pd.concat([ours, rival], ignore_index=True), asked) == "reproduced"


@pytest.mark.parametrize(("power", "expected"), [(2, "reproduced"), (4, "not reproduced"), (2.8, "inconclusive")])
def test_the_cost_is_judged_by_its_exponent(power, expected):
    sizes = np.array([1024, 2048, 4096])
    cost = pd.DataFrame({"batch_size": sizes, "seconds": 1e-9 * sizes**power})
    (row,) = judge(runs({200: 40.0}), cost, [claim("quadratic", comparison=[])]).to_dict("records")
    assert row["verdict"] == expected
    assert f"exponent {power:.2f}" in row["evidence"]


def test_a_wrong_claim_is_refused_by_name(tmp_path):
    file = tmp_path / "claims.yaml"
    file.write_text(Path(CLAIMS).read_text().replace("check: rising", "check: growing"))
    with pytest.raises(ConfigError, match=r"claim 'batch': check: Input should be 'above'"):
        read_claims(str(file))
