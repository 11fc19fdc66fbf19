"""Verdicts on the claims: criteria, levels of significance, evidence and the committed report."""

import html
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from scipy import optimize, stats

from hloss.runs.errors import ConfigError
from hloss.study.claims import CLAIMS, Claim, conclusions, judge, missed_by_budget, overlap, read_board, read_claims
from hloss.study.published import read_published
from hloss.study.results import read_results, recall_names
from hloss.study.spec import load_study
from hloss.study.statistics import summary
from tests.helpers.sample import RESULTS, STUDY

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
                         "length": 200, "still_improving": False, **settings})  # fmt: skip
    return pd.DataFrame(rows)


def claim(check="equivalent", **given):
    settings = {"name": "a", "section": "1", "claim": "b", "criterion": "c", "data": ["cub"], "comparison": ["bins"]}
    return Claim(**settings | {"check": check} | given)


def verdict(results, asked):
    (row,) = judge(results, claims=[asked]).to_dict("records")
    return row["verdict"]


def test_reads_and_judges_every_committed_claim():
    claims = read_claims()
    assert len({c.name for c in claims}) == len(claims) >= 30
    board = judge(runs({50: 40.0, 100: 40.0, 200: 40.0, 400: 40.0}))
    assert set(board["claim"]) == {c.name for c in claims}
    assert board.set_index("claim").loc["bins", "verdict"] == "reproduced"
    assert set(board[board["comparison"] != "bins"]["verdict"]) == {"not run"}


@pytest.mark.parametrize(
    ("check", "means", "expected"),
    [
        ("equivalent", {50: 40.0, 200: 40.3, 400: 39.8}, "reproduced"),
        ("equivalent", {50: 35.0, 200: 40.3, 400: 39.8}, "not reproduced"),
        ("equivalent", {50: 38.0, 200: 40.0}, "inconclusive"),
        ("not_below", {50: 39.0, 200: 40.0, 400: 50.0}, "reproduced"),
        ("not_below", {50: 37.0, 200: 40.0, 400: 50.0}, "not reproduced"),
        ("not_below", {50: 38.0, 200: 40.0}, "inconclusive"),
        ("near_best", {50: 30.0, 200: 40.0, 400: 41.0}, "reproduced"),
        ("near_best", {50: 30.0, 200: 40.0, 400: 43.0}, "not reproduced"),
        ("near_best", {50: 30.0, 200: 40.0, 400: 42.0}, "inconclusive"),
        ("sensitive", {50: 30.0, 200: 35.0, 400: 31.0}, "reproduced"),
        ("sensitive", {50: 30.0, 200: 30.5, 400: 31.0}, "not reproduced"),
        ("sensitive", {50: 30.0, 200: 32.0, 400: 31.0}, "inconclusive"),
        ("best", {50: 30.0, 200: 35.0, 400: 31.0}, "reproduced"),
        ("best", {50: 36.0, 200: 35.0, 400: 31.0}, "not reproduced"),
        ("no_gain", {50: 30.0, 200: 35.0, 400: 36.0}, "reproduced"),
        ("no_gain", {50: 30.0, 200: 35.0, 400: 38.0}, "not reproduced"),
    ],
)
def test_verdict_over_levels(check, means, expected):
    assert verdict(runs(means), claim(check, axis="n_bins", reference=200)) == expected


@pytest.mark.parametrize(("gap", "expected"), [(3.0, "reproduced"), (-3.0, "not reproduced"), (0.0, "not reproduced")])
def test_verdict_over_methods(gap, expected):
    results = pd.concat([runs({200: 40.0 + gap}), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    assert verdict(results, claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])) == expected


def test_noisy_difference_is_inconclusive():
    results = pd.concat([runs({200: 41.0}, spread=20), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    assert verdict(results, claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])) == "inconclusive"


def test_verdict_needs_every_run():
    results = runs({50: 40.0, 200: 40.3, 400: 39.8})
    results.loc[3, ["complete", "recall@1"]] = False, np.nan
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    assert (row["verdict"], row["evidence"], row["run_ids"]) == ("not run", "1 of 15 runs are missing", "")


def test_verdict_does_not_need_runs_of_other_losses():
    results = pd.concat(
        [runs({200: 43.0}), runs({0: 40.0}, loss="lifted"), runs({1: 1.0}, loss="triplet")], ignore_index=True
    )
    asked = claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])
    for loss, expected in (("triplet", "reproduced"), ("lifted", "not run")):
        half = results.assign(complete=(results["loss"] != loss) | (results["seed"] > 0))
        assert verdict(half, asked) == expected


def test_refuses_two_methods_for_one():
    results = pd.concat([runs({50: 43.0, 200: 43.0}), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    asked = claim("above", method={"loss": "histogram"}, rivals=[{"loss": "lifted"}])
    (row,) = judge(results, claims=[asked]).to_dict("records")
    message = "the settings of one method match several methods: histogram 50; histogram 200"
    assert (row["verdict"], row["evidence"]) == ("not run", message)


def test_within_compares_levels_inside_each_group():
    results = pd.concat(
        [runs({50: 20.0, 200: 20.2}, batch_size=32), runs({50: 40.0, 200: 40.1}, batch_size=128)], ignore_index=True
    )
    asked = claim(axis="n_bins", reference=200, within="batch_size")
    assert verdict(results, asked) == "reproduced"
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    assert row["verdict"] == "not run"
    assert "a level has several runs of one seed" in row["evidence"]


def test_evidence_equals_scipy_and_names_the_runs():
    results = runs({50: 40.0, 200: 41.0})
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    a, b = (results[results["n_bins"] == level]["recall@1"] for level in (50, 200))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.9)  # two one-sided tests at 5 %
    interval = f"(90 % CI {low:+.1f} to {high:+.1f} over seeds, n = 5)"
    assert row["evidence"] == row["decisive"] == f"n_bins 50 minus 200: {a.mean() - b.mean():+.1f} {interval}"
    assert row["run_ids"].split(", ") == sorted(results["run_id"])
    assert row["asked"] == "other data"


@pytest.mark.parametrize(
    ("check", "means", "pair"),
    [
        ("equivalent", {50: 40.0, 200: 40.3, 400: 40.9}, "400 minus 200"),
        ("equivalent", {50: 40.1, 200: 40.3, 400: 30.0}, "400 minus 200"),
        ("equivalent", {50: 50.0, 200: 40.3, 400: 38.3}, "50 minus 200"),
        ("not_below", {50: 40.0, 200: 35.0, 400: 34.0}, "400 minus 200"),
        ("near_best", {50: 20.0, 200: 35.0, 400: 35.5}, "200 minus 400"),
        ("best", {50: 30.0, 200: 35.0, 400: 31.0}, "200 minus 400"),
        ("no_gain", {50: 20.0, 200: 35.0, 400: 35.5}, "400 minus 200"),
    ],
)
def test_the_decisive_part_is_the_worst_of_those_that_decide(check, means, pair):
    (row,) = judge(runs(means), claims=[claim(check, axis="n_bins", reference=200)]).to_dict("records")
    assert row["decisive"] in row["evidence"].split("; ")
    assert row["decisive"].startswith(f"n_bins {pair}: ")


def test_published_values_stand_beside_the_data_of_the_claim_only():
    asked = claim(axis="n_bins", reference=200, published="52.8", data=["cub"])
    boards = [judge(runs({50: 40.0, 200: 40.0}, dataset=dataset), claims=[asked]) for dataset in ("cub", "glyphs")]
    assert [board["published"].tolist() for board in boards] == [["52.8"], [""]]
    assert "52.8" not in str(boards[1]["evidence"].iloc[0])


def test_the_evidence_says_when_two_methods_are_equivalent():
    results = pd.concat([runs({200: 40.0}), runs({0: 40.0}, loss="lifted")], ignore_index=True)
    (row,) = judge(results, claims=[claim(**ABOVE)]).to_dict("records")
    assert row["verdict"] == "not reproduced"
    assert row["evidence"].endswith(", n = 5, equivalent)")


def test_verdict_needs_every_named_level():
    asked = claim(axis="n_bins", levels=[50, 200, 400], reference=200)
    (row,) = judge(runs({50: 40.0, 200: 40.3, 100: 1.0}), claims=[asked]).to_dict("records")
    assert (row["verdict"], row["evidence"]) == ("not run", "n_bins 400 is missing: got n_bins 50, 200")


def paired(differences, base=40.0):
    """One histogram run and one lifted run per seed, with these differences in points."""
    rows = [
        {"comparison": "bins", "method": loss, "dataset": "glyphs", "loss": loss, "seed": seed, "complete": True,
         "recall@1": base + (gap if loss == "histogram" else 0.0), "run_id": f"{loss}-{seed}", "n_bins": bins,
         "length": 200, "still_improving": False}
        for seed, gap in enumerate(differences) for loss, bins in (("histogram", 50), ("lifted", 200))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def with_p(wanted, mean, alternative, against=0.0):
    """Five differences with this mean, whose one-sample t test against a value has this p value."""
    shape = stats.zscore(np.array([-1.0, -0.5, 0.1, 0.5, 1.4]))

    def error(spread):
        return stats.ttest_1samp(mean + spread * shape, against, alternative=alternative).pvalue - wanted

    return mean + optimize.brentq(error, 1e-3, 1e3) * shape


ABOVE = {"check": "above", "method": {"loss": "histogram"}, "rivals": [{"loss": "lifted"}]}
BINS = {"axis": "n_bins", "reference": 200}
NO_GAIN, NOT_BELOW = BINS | {"check": "no_gain"}, BINS | {"check": "not_below"}
SENSITIVE = BINS | {"check": "sensitive", "margin": 5.0}


@pytest.mark.parametrize(
    ("asked", "p", "mean", "alternative", "against", "expected"),
    [
        (ABOVE, 0.04, 1.0, "two-sided", 0.0, "reproduced"),
        (ABOVE, 0.06, 3.0, "two-sided", 0.0, "inconclusive"),
        (ABOVE, 0.06, 1.0, "two-sided", 0.0, "not reproduced"),  # equivalent
        (ABOVE, 0.04, -3.0, "two-sided", 0.0, "not reproduced"),
        (ABOVE, 0.06, -3.0, "two-sided", 0.0, "inconclusive"),
        (BINS, 0.04, 1.5, "less", 2.0, "reproduced"),  # each one-sided test at 5 %
        (BINS, 0.06, 1.5, "less", 2.0, "inconclusive"),
        (BINS, 0.04, 4.0, "two-sided", 2.0, "not reproduced"),
        (BINS, 0.06, 4.0, "two-sided", 2.0, "inconclusive"),
        (NO_GAIN, 0.04, 1.5, "less", 2.0, "reproduced"),
        (NO_GAIN, 0.06, 1.5, "less", 2.0, "inconclusive"),
        (NO_GAIN, 0.04, 4.0, "two-sided", 2.0, "not reproduced"),
        (NOT_BELOW, 0.04, -1.5, "greater", -2.0, "reproduced"),
        (NOT_BELOW, 0.06, -1.5, "greater", -2.0, "inconclusive"),
        (NOT_BELOW, 0.04, -4.0, "two-sided", -2.0, "not reproduced"),
        (NOT_BELOW, 0.06, -4.0, "two-sided", -2.0, "inconclusive"),
        (SENSITIVE, 0.04, 8.0, "two-sided", 5.0, "reproduced"),
        (SENSITIVE, 0.06, 8.0, "two-sided", 5.0, "inconclusive"),
        (SENSITIVE, 0.04, 4.0, "less", 5.0, "not reproduced"),
    ],
)
def test_verdict_changes_at_its_significance_level(asked, p, mean, alternative, against, expected):
    assert verdict(paired(with_p(p, mean, alternative, against)), claim(**asked)) == expected


def three_levels(p):
    """Level 50 is below 200 with this p value, level 400 is far above: two parts, one of which can be refuted."""
    low = paired(with_p(p, -3.0, "two-sided"))
    high = low[low["n_bins"] == 200].assign(n_bins=400, method="high")
    high["recall@1"] += 20
    return pd.concat([low, high], ignore_index=True)


@pytest.mark.parametrize(("p", "expected"), [(0.02, "not reproduced"), (0.03, "inconclusive")])
def test_refutation_of_one_of_two_levels_is_tested_at_half_the_level(p, expected):
    """The reference 50 must be above both others; it is above 400 by a wide margin."""
    results = three_levels(p)
    results.loc[results["n_bins"] == 400, "recall@1"] -= 40
    assert verdict(results, claim("best", axis="n_bins", reference=50)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.012, "reproduced"), (0.02, "inconclusive")])
def test_widest_of_three_differences_is_tested_at_a_third_of_the_level(p, expected):
    """The middle level lies between the others, so the first and the last differ most."""
    results = paired(with_p(p, 6.0, "two-sided", 2.0))
    middle = results[results["n_bins"] == 50].assign(n_bins=100, method="middle")
    middle["recall@1"] = (middle["recall@1"].to_numpy() + results[results["n_bins"] == 200]["recall@1"].to_numpy()) / 2
    together = pd.concat([results, middle], ignore_index=True)
    assert verdict(together, claim("sensitive", axis="n_bins")) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.02, "not reproduced"), (0.03, "inconclusive")])
def test_refutation_in_one_of_two_groups_is_tested_at_half_the_level(p, expected):
    apart = paired(with_p(p, 4.0, "two-sided", 2.0)).assign(batch_size=32)
    alike = paired(NOISE).assign(batch_size=128)
    both = pd.concat([apart, alike], ignore_index=True)
    assert verdict(both, claim(**BINS, within="batch_size")) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.02, "not reproduced"), (0.03, "inconclusive")])
def test_refutation_by_one_of_two_rivals_is_tested_at_half_the_level(p, expected):
    above = paired(with_p(p, -3.0, "two-sided"))
    below = above[above["loss"] == "lifted"].assign(loss="triplet", method="triplet")
    below["recall@1"] -= 20
    asked = ABOVE | {"rivals": [{"loss": "lifted"}, {"loss": "triplet"}]}
    assert verdict(pd.concat([above, below], ignore_index=True), claim(**asked)) == expected


HISTOGRAM, LIFTED, SEMI_HARD = {"loss": "histogram"}, {"loss": "lifted"}, {"loss": "semi-hard-triplet"}
CONTRASTIVE, TRIPLET = {"loss": "contrastive"}, {"loss": "triplet"}
C_2, C_5, C_10, C_25, C_50 = ({"loss": "binomial", "C": c} for c in (2.0, 5.0, 10.0, 25.0, 50.0))


@pytest.mark.parametrize(
    ("name", "comparison", "above", "others"),
    [
        ("lifted structure", "losses", HISTOGRAM, [LIFTED]),
        ("lifted structure", "tuned losses", HISTOGRAM, [LIFTED]),
        ("semi-hard triplet", "losses", HISTOGRAM, [SEMI_HARD]),
        ("semi-hard triplet", "tuned losses", HISTOGRAM, [SEMI_HARD]),
        ("binomial deviance, C = 10", "losses", HISTOGRAM, [C_10]),
        ("binomial deviance, both C", "losses", HISTOGRAM, [C_10, C_25]),
        ("best on re-identification", "losses", HISTOGRAM, [C_10, C_25, LIFTED, SEMI_HARD]),
        ("best on re-identification, tuned", "tuned losses", HISTOGRAM, [C_10, LIFTED, SEMI_HARD]),
        ("binomial deviance best", "losses", C_25, [HISTOGRAM, C_10, LIFTED, CONTRASTIVE, TRIPLET]),
        ("next after binomial deviance", "losses", HISTOGRAM, [LIFTED, CONTRASTIVE, TRIPLET]),
        ("contrastive, trained here", "tuned losses", C_2, [CONTRASTIVE]),
        ("smaller C worse", "C", C_25, [C_2, C_5, C_10]),
        ("C = 25 on CUB-200-2011", "C", C_25, [C_2, C_10, C_50]),
        ("C = 25 on Market-1501", "C", C_25, [C_10]),
        ("C = 10 on CUHK03", "C", C_10, [C_2, C_25]),
    ],
)
def test_committed_claim_names_the_better_method(name, comparison, above, others):
    """The claim holds if all others are below, and is refuted if one of them is above (written a second time here)."""

    unrelated = [who for who in (HISTOGRAM, LIFTED, SEMI_HARD) if who not in (above, *others) and comparison != "C"]

    def judged(*recalls):
        means = [*zip((above, *others), recalls, strict=True), *((who, 70.0) for who in unrelated)]
        results = [
            runs({0: mean}, comparison, "level", **{"C": np.nan, **who}).assign(method=str(who)) for who, mean in means
        ]
        (asked,) = (c for c in read_claims() if c.name == name)
        board = judge(pd.concat(results, ignore_index=True), claims=[asked]).set_index("comparison")
        return board.loc[comparison, "verdict"]

    assert judged(50.0, *[40.0] * len(others)) == "reproduced"
    for i in range(len(others)):
        assert judged(50.0, *[60.0 if i == k else 40.0 for k in range(len(others))]) == "not reproduced"


@pytest.mark.parametrize(
    ("name", "comparison", "axis", "true", "false", "settings"),
    [
        ("bins", "bins", "n_bins", dict.fromkeys((25, 50, 100, 200, 400), 40.0) | {25: 1.0},
         dict.fromkeys((25, 50, 100, 200), 40.0) | {400: 50.0}, {}),
        ("bins, any dataset", "bins at a higher rate", "n_bins", dict.fromkeys((50, 100, 200, 400), 40.0),
         dict.fromkeys((50, 100, 200), 40.0) | {400: 30.0}, {}),
        ("bins by batch", "bins by batch", "n_bins", {25: 40.0, 200: 40.0}, {25: 50.0, 200: 40.0}, {"batch_size": 32}),
        ("batch", "batch", "batch_size", {64: 30.0, 128: 40.0, 256: 42.0}, {64: 43.0, 128: 40.0, 256: 42.0}, {}),
        ("C matters", "C", "C", {2.0: 30.0, 10.0: 40.0, 25.0: 35.0, 50.0: 35.0},
         {2.0: 40.0, 10.0: 42.5, 25.0: 41.0, 50.0: 5.0}, {"loss": "binomial"}),
        ("C = 25 on Online Products and CUB-200-2011", "C", "C", {10.0: 40.5, 25.0: 40.0}, {10.0: 44.0, 25.0: 40.0},
         {"loss": "binomial"}),
        ("C = 10 on re-identification", "C", "C", {10.0: 40.0, 25.0: 40.5}, {10.0: 40.0, 25.0: 44.0},
         {"loss": "binomial"}),
        ("margin", "margin", "margin", {0.0: 40.0, 0.1: 30.0}, {0.0: 40.0, 0.1: 50.0}, {}),
        ("kernel", "kernel", "kernel", {"triangular": 40.0, "gaussian": 50.0}, {"triangular": 40.0, "gaussian": 30.0},
         {"bandwidth": None}),
        ("learning rate", "learning rate", "learning_rate", {0.001: 40.0, 0.01: 20.0}, {0.001: 40.0, 0.01: 42.5}, {}),
        ("learning rate on CUB-200-2011", "learning rate", "learning_rate", {0.00001: 40.0, 0.0001: 20.0},
         {0.00001: 20.0, 0.0001: 40.0}, {}),
    ],
)  # fmt: skip
def test_committed_claim_about_a_setting(name, comparison, axis, true, false, settings):
    (asked,) = (c for c in read_claims() if c.name == name)
    for means, expected in ((true, "reproduced"), (false, "not reproduced")):
        results = runs(means, comparison, axis, **settings)
        other = results.assign(loss="lifted")  # runs of another loss must not matter
        other["recall@1"] = np.arange(len(other)) * 7.0 % 50
        among = {"loss"} & asked.among.keys()
        board = judge(pd.concat([results, other]) if among else results, claims=[asked])
        assert board.set_index("comparison").loc[comparison, "verdict"] == expected


TABLE = {"check": "table", "comparison": ["batch"], "among": {"loss": "histogram", "batch_size": 256}}


def of_table(dataset, protocol, offsets, splits):
    """Runs whose Recall@K equals the paper's Table 1 plus an offset in points per run."""
    published = read_published()
    ours = published[(published["dataset"] == dataset) & (published["place"] == "Table 1")]
    rows = [
        {"comparison": "batch", "method": "histogram, batch_size 256", "dataset": dataset, "split": split, "seed": seed,
         "loss": "histogram", "batch_size": 256, "network": "parts", "embedding_dim": 500, "protocol": protocol,
         "complete": True, "prepared": '{"boxes": "labeled", "camera_pairs": 3}',
         "run_id": f"r{seed}", "length": 200, "still_improving": False,
         **{v.metric: v.value + offset for v in ours.itertuples()}}
        for seed, (offset, split) in enumerate(zip(offsets, splits, strict=True))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("dataset", "offsets", "expected"),
    [
        ("market1501", NOISE, "reproduced"),
        ("market1501", [-3.0, 3.0, -3.0, 3.0, 0.0], "inconclusive"),
        ("market1501", [-5.0 + n for n in NOISE], "not reproduced"),
        ("cuhk03", [-3.0, 3.0, -3.0, 3.0, 0.0], "reproduced"),  # the splits differ, their mean is the published one
        ("cuhk03", [-6.0, 0.0, -6.0, 0.0, -3.0], "inconclusive"),
        ("cuhk03", [-5.0 + n for n in NOISE], "not reproduced"),
    ],
)
def test_compares_table_1_with_its_own_values_only(dataset, offsets, expected):
    protocol = {"cuhk03": "cuhk03-single-shot"}.get(dataset, dataset)
    splits = [f"cuhk03-{i}" for i in range(1, 6)] if dataset == "cuhk03" else [dataset] * 5
    (row,) = judge(of_table(dataset, protocol, offsets, splits), claims=[claim(**TABLE)]).to_dict("records")
    assert row["verdict"] == expected
    assert row["evidence"].count("minus the published") == 5  # the values of the authors' notebook are left out
    other = judge(of_table(dataset, "another protocol", offsets, splits), claims=[claim(**TABLE)])
    assert other["verdict"].tolist() == ["not run"]


def test_runs_in_slices_are_no_level_of_the_batch_size():
    batch = next(c for c in read_claims() if c.name == "batch")
    results = runs({64: 30.0, 128: 35.0, 256: 40.0}, "batch", "batch_size", micro_batch=None)
    slices = runs({256: 1.0}, "batch", "batch_size", micro_batch=64)
    board = judge(pd.concat([results, slices], ignore_index=True), claims=[batch])
    assert board["verdict"].tolist() == ["reproduced"]


def test_committed_report_equals_the_committed_results():
    results = read_results(RESULTS)
    board = judge(results, pd.read_csv("reports/sample/loss_cost.csv"))
    assert_frame_equal(read_board(Path("reports/sample/claims.csv")), board.drop(columns="parts"), check_dtype=False)
    page = Path("reports/sample/report.html").read_text()
    assert f"<title>{html.escape(load_study(STUDY).title)}</title>" in page
    assert f"<h1>{html.escape(results['title'][0])}</h1>" in page
    assert all(html.escape(part) in page for parts in board["parts"] for part in parts)
    assert all(run_id in page for run_ids in board["run_ids"] for run_id in run_ids.split(", "))
    means = pd.read_csv("reports/sample/summary.csv")
    assert_frame_equal(means, summary(results, recall_names(results)), check_dtype=False)


def at_lengths(gaps, **settings):
    """Histogram minus lifted structure at each length, in points."""
    tables = [
        pd.concat([runs({200: 40.0 + gap}, length=length), runs({0: 40.0}, loss="lifted", length=length)])
        for length, gap in gaps.items()
    ]
    return pd.concat(tables, ignore_index=True).assign(**settings)


def test_a_verdict_that_depends_on_the_length_says_so_first():
    board = judge(at_lengths({200: 3.0, 600: -3.0, 2000: -4.0}), claims=[claim(**ABOVE)])
    assert board["length"].tolist() == ["200 iterations", "600 iterations", "2,000 iterations"]
    assert board["verdict"].tolist() == ["reproduced", "not reproduced", "not reproduced"]
    told = "reproduced after 200 iterations, not reproduced after 600 iterations, not reproduced after 2,000 iterations"
    assert set(board["conclusion"]) == {f"depends on the length: {told}"}
    (last,) = conclusions(board).to_dict("records")
    assert (last["length"], last["verdict"]) == ("2,000 iterations", "not reproduced")


def test_a_verdict_says_which_runs_are_still_improving():
    results = at_lengths({200: 3.0, 600: 3.0})
    results["still_improving"] = (results["length"] == 200) & (results["seed"] < 2)
    board = judge(results, claims=[claim(**ABOVE)])
    assert board["still improving"].tolist() == ["4 of 10 runs", ""]
    told = "reproduced: after 200 iterations (still improving), after 600 iterations"
    assert set(board["conclusion"]) == {told}


def test_untrained_baselines_belong_to_every_length():
    results = at_lengths({200: 3.0, 600: 3.0})
    baseline = runs({1: 1.0}, loss="none", length=0)
    asked = claim("above", method={"loss": "histogram"}, rivals=[{"loss": "none"}])
    board = judge(pd.concat([results, baseline], ignore_index=True), claims=[asked])
    assert board[["length", "verdict"]].values.tolist() == [
        ["200 iterations", "reproduced"], ["600 iterations", "reproduced"]
    ]  # fmt: skip


def test_equal_images_compares_lengths_with_the_same_number_of_images():
    """Larger batches see fewer iterations; 128 has a length whose number of images the others lack."""
    tables = [
        runs({size: mean}, "bins", "batch_size", length=length)
        for size, length, mean in ((64, 400, 40.0), (128, 200, 43.0), (128, 50, 99.0), (256, 100, 46.0))
    ]
    asked = claim("best", axis="batch_size", reference=256, equal="images")
    board = judge(pd.concat(tables, ignore_index=True), claims=[asked])
    assert board[["length", "verdict"]].values.tolist() == [["25,600 images", "reproduced"]]


def test_every_k_needs_every_recall():
    results = runs({64: 30.0, 256: 40.0}, "bins", "batch_size")
    asked = claim("best", axis="batch_size", reference=256, every_k=True)
    assert verdict(results.assign(**{"recall@2": results["recall@1"] + 5}), asked) == "reproduced"
    assert verdict(results.assign(**{"recall@2": 70 - results["recall@1"]}), asked) == "not reproduced"


def test_holm_adjusts_for_all_verdicts_of_a_dataset_and_length():
    """p = 0.04 is significant alone, and not beside a second test that is not significant."""
    results = paired(with_p(0.04, 3.0, "two-sided"))
    alone = judge(results, claims=[claim(**ABOVE)])
    assert (alone["verdict"].item(), alone["holm"].item()) == ("reproduced", "reproduced")
    assert alone["p holds"].item() == pytest.approx(0.04)
    both = judge(results, claims=[claim(**ABOVE), claim(name="c", **ABOVE), claim(name="d", **BINS)])
    assert both["verdict"].tolist() == ["reproduced", "reproduced", "inconclusive"]
    assert both["holm"].tolist() == ["inconclusive"] * 3
    cost = pd.DataFrame({"batch_size": [1024, 2048, 4096], "seconds": [1.0, 4.0, 16.0]})
    beside = judge(results, cost, [claim(**ABOVE), claim("quadratic", name="cost", comparison=[])])
    assert beside["holm"].tolist() == ["reproduced", "reproduced"]


def test_shows_the_verdict_with_intervals_corrected_for_shared_training_classes():
    """p = 0.02 is significant; an error that is 1.5 times as large is not. One test set has no such correction."""
    results = paired(with_p(0.02, 3.0, "two-sided"))
    own = results.assign(split=[f"glyphs-{seed}" for seed in results["seed"]])
    board = judge(pd.concat([own, own.assign(comparison="other", split="glyphs")]), claims=[
        claim(**ABOVE), claim(name="d", **ABOVE | {"comparison": ["other"]})])  # fmt: skip
    assert board["verdict"].tolist() == ["reproduced", "reproduced"]
    assert board["shared training"].tolist() == ["inconclusive", ""]
    clear = paired(with_p(0.001, 3.0, "two-sided"))
    clear = clear.assign(split=[f"glyphs-{seed}" for seed in clear["seed"]])
    assert judge(clear, claims=[claim(**ABOVE)])["shared training"].tolist() == ["reproduced"]


def test_shows_the_verdict_on_the_initial_grid():
    """Lifted structure is better with a value beyond its first grid; the histogram loss keeps its choice."""
    final = at_lengths({200: -3.0}, comparison="tuned losses")
    before = runs({0: 30.0}, "tuned losses, initial grid", loss="lifted").assign(run_id="before")
    before["method"] = "lifted 0"
    grids = [("histogram 200", "tuned losses: choice", 20), ("lifted 0", "tuned losses: choice", 20),
             ("lifted 0", "tuned losses, extended: choice", 5)]  # fmt: skip
    tried = pd.DataFrame(
        {"comparison": name, "method": f"{method}, margin {i}", "dataset": "glyphs", "run_id": f"{name} {method} {i}",
         "length": 200} for method, name, n in grids for i in range(n)
    )  # fmt: skip
    asked = claim(**ABOVE | {"comparison": ["tuned losses"]})
    board = judge(pd.concat([final, before, tried], ignore_index=True), claims=[asked])
    assert board["grids"].tolist() == ["histogram 200 20, lifted 0 20 + 5"]
    assert board[["verdict", "initial grid"]].values.tolist() == [["not reproduced", "reproduced"]]
    assert judge(final, claims=[asked])["initial grid"].tolist() == [""]


def test_compares_a_method_with_a_published_value_of_its_dataset():
    asked = claim("above_value", method={"loss": "histogram"}, values={"cub": 40.0})
    assert verdict(runs({200: 43.0}, dataset="cub"), asked) == "reproduced"
    assert verdict(runs({200: 37.0}, dataset="cub"), asked) == "not reproduced"
    assert verdict(runs({200: 43.0}), asked) == "not run"


@pytest.mark.parametrize(
    ("ours", "rival", "expected"),
    [(0, 9, "reproduced"), (0, 3, "reproduced"), (9, 9, "not reproduced"), (0, 0, "not reproduced")],
)
def test_little_tuning_compares_a_quarter_of_the_grid_with_its_best(ours, rival, expected):
    """A grid of eight settings, whose best is `ours` or `rival` points above the others."""
    grids = [
        pd.DataFrame({"comparison": "bins: choice", "method": f"{loss} {i}", "dataset": "glyphs", "loss": loss,
                      "seed": 9, "complete": True, "run_id": f"{loss}-{i}", "length": 200, "still_improving": False,
                      "validation_recall@1": 50.0 + gap * (i == 3)} for i in range(8))
        for loss, gap in (("histogram", ours), ("binomial", rival))
    ]  # fmt: skip
    asked = claim("budget", method={"loss": "histogram"}, rivals=[{"loss": "binomial"}])
    (row,) = judge(pd.concat(grids, ignore_index=True), claims=[asked]).to_dict("records")
    assert row["verdict"] == row["holm"] == expected
    assert "best of 2 random settings minus best of all 8" in row["evidence"]
    if expected == "reproduced":  # the part nearest to its bound decides: at most, or more than, 2 points
        nearest = "histogram" if 2 - 0.75 * ours < 0.75 * rival - 2 else "binomial"
        assert row["decisive"].startswith(nearest)


def test_missed_by_budget_equals_the_mean_over_all_draws():
    values = np.random.default_rng(0).normal(40, 3, 8)
    missed, k = missed_by_budget(values, 0.4)
    best = [max(draw) for draw in combinations(values, 3)]
    assert (missed, k) == (pytest.approx(values.max() - np.mean(best)), 3)


def test_overlap_equals_the_mass_below_both_densities():
    frame = pd.DataFrame({"positive_after": [[0.5, 0.5, 0.0]], "negative_after": [[0.0, 0.25, 0.75]]})
    assert overlap(frame).tolist() == [25.0]


def test_overlap_claim_compares_the_densities():
    ours, rival = runs({200: 40.0}), runs({0: 40.0}, loss="lifted")
    for frame, share in ((ours, 0.1), (rival, 0.3)):
        frame["positive_after"] = [[1 - share - s / 1000, share + s / 1000] for s in NOISE]
        frame["negative_after"] = [[0.0, 1.0]] * len(frame)
    (asked,) = (c for c in read_claims() if c.name == "overlap")
    ours["trained_overlap"], rival["trained_overlap"] = 30.0 + np.array(NOISE), 10.0 + np.array(NOISE)
    named = [ours.assign(loss="histogram", method="h"), rival.assign(loss="lifted", method="l")]
    results = pd.concat(named, ignore_index=True).assign(comparison="losses")
    (row, _) = judge(results, claims=[asked]).to_dict("records")  # overlaps in the trained distances take precedence
    assert (row["verdict"], row["evidence"].split(":")[0]) == ("not reproduced", "overlap, h minus l")
    ours, rival = ours.drop(columns="trained_overlap"), rival.drop(columns="trained_overlap")
    for first, second, expected in ((ours, rival, "reproduced"), (rival, ours, "not reproduced")):
        named = [first.assign(loss="histogram", method="h"), second.assign(loss="lifted", method="l")]
        results = pd.concat(named, ignore_index=True).assign(comparison="losses")
        assert judge(results, claims=[asked])["verdict"].tolist() == [expected, "not run"]


@pytest.mark.parametrize(("power", "expected"), [(2, "reproduced"), (4, "not reproduced"), (2.8, "inconclusive")])
def test_judges_the_cost_by_its_exponent(power, expected):
    sizes = np.array([1024, 2048, 4096])
    cost = pd.DataFrame({"batch_size": sizes, "seconds": 1e-9 * sizes**power})
    (row,) = judge(runs({200: 40.0}), cost, [claim("quadratic", comparison=[])]).to_dict("records")
    assert row["verdict"] == expected
    assert f"exponent {power:.2f}" in row["evidence"]


def test_refuses_a_method_without_rivals():
    with pytest.raises(ValueError, match="only allowed together"):
        claim("above", method={"loss": "histogram"})


def test_table_over_splits_needs_every_split():
    few = of_table("cuhk03", "cuhk03-single-shot", NOISE[:2], ["cuhk03-1", "cuhk03-2"])
    (row,) = judge(few, claims=[claim(**TABLE)]).to_dict("records")
    assert (row["verdict"], row["evidence"]) == (
        "not run", "the values of Table 1 are means over 5 splits: got runs of 2"
    )  # fmt: skip


def test_refuses_an_invalid_claim_by_name(tmp_path):
    file = tmp_path / "claims.yaml"
    file.write_text(Path(CLAIMS).read_text().replace("check: sensitive", "check: growing"))
    with pytest.raises(ConfigError, match=r"claim 'C matters': check: got 'growing'; must be 'above', "):
        read_claims(str(file))
