"""Claims: every committed one reads, and verdicts follow from the runs and from nothing else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from scipy import optimize, stats

from hloss.claims import CLAIMS, Claim, judge, overlap, read_claims
from hloss.experiment import ConfigError
from hloss.published import read_published
from hloss.statistics import summary
from hloss.studies import read_results, recall_names

SEEDS = [0, 1, 2, 3, 4]
README = {
    ("C = 10", "C"): "not reproduced",
    ("C = 25", "C"): "not reproduced",
    ("C matters", "C"): "reproduced",
    ("batch", "batch"): "reproduced",
    ("batch", "batch at equal images"): "not reproduced",
    ("binomial deviance, C = 10", "losses"): "reproduced",
    ("binomial deviance, both C", "losses"): "reproduced",
    ("bins", "bins"): "reproduced",
    ("bins by batch", "bins by batch"): "inconclusive",
    ("close to binomial deviance", "losses"): "not reproduced",
    ("close to tuned binomial deviance", "tuned losses"): "reproduced",
    ("contrastive", "tuned losses"): "inconclusive",
    ("kernel", "kernel"): "reproduced",
    ("learning rate", "learning rate"): "reproduced",
    ("lifted structure", "losses"): "not reproduced",
    ("lifted structure", "tuned losses"): "not reproduced",
    ("margin", "margin"): "reproduced",
    ("overlap", "losses"): "reproduced",
    ("overlap", "tuned losses"): "reproduced",
    ("quadratic cost", ""): "reproduced",
    ("semi-hard triplet", "losses"): "not reproduced",
    ("semi-hard triplet", "tuned losses"): "not reproduced",
}
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
        ("rising", {50: 30.0, 200: 35.0}, "not run"),
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
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    assert row["verdict"] == "not run"
    assert "more than one run of a seed" in row["evidence"]


def test_the_numbers_are_those_of_scipy_and_the_runs_are_named():
    results = runs({50: 40.0, 200: 41.0})
    (row,) = judge(results, claims=[claim(axis="n_bins", reference=200)]).to_dict("records")
    a, b = (results[results["n_bins"] == level]["recall@1"] for level in (50, 200))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.9)  # two one-sided tests at 5 %
    assert row["evidence"] == f"50 less 200: {a.mean() - b.mean():+.1f} (90 %: {low:+.1f} to {high:+.1f}, n = 5)"
    assert row["run_ids"].split(", ") == sorted(results["run_id"])
    assert row["asked"] == "other data"


def test_a_claim_needs_every_level_that_it_names():
    asked = claim(axis="n_bins", levels=[50, 200, 400], reference=200)
    (row,) = judge(runs({50: 40.0, 200: 40.3, 100: 1.0}), claims=[asked]).to_dict("records")
    assert (row["verdict"], row["evidence"]) == ("not run", "n_bins 50, 200 without 400")


def paired(differences, base=40.0):
    """A histogram and a lifted run per seed, this many points apart."""
    rows = [
        {"comparison": "bins", "method": loss, "dataset": "glyphs", "loss": loss, "seed": seed, "complete": True,
         "recall@1": base + (gap if loss == "histogram" else 0.0), "run_id": f"{loss}-{seed}", "n_bins": bins}
        for seed, gap in enumerate(differences) for loss, bins in (("histogram", 50), ("lifted", 200))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def with_p(wanted, mean, alternative, against=0.0):
    """Five differences of this mean, whose one-sample t test against a value has this p."""
    shape = stats.zscore(np.array([-1.0, -0.5, 0.1, 0.5, 1.4]))

    def error(spread):
        return stats.ttest_1samp(mean + spread * shape, against, alternative=alternative).pvalue - wanted

    return mean + optimize.brentq(error, 1e-3, 1e3) * shape


ABOVE = {"check": "above", "method": {"loss": "histogram"}, "rivals": [{"loss": "lifted"}]}
BINS = {"axis": "n_bins", "reference": 200}


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
        ({**BINS, "check": "no_gain"}, 0.04, 1.5, "less", 2.0, "reproduced"),
        ({**BINS, "check": "no_gain"}, 0.06, 1.5, "less", 2.0, "inconclusive"),
        ({**BINS, "check": "no_gain"}, 0.04, 4.0, "two-sided", 2.0, "not reproduced"),
    ],
)
def test_a_verdict_turns_at_its_level(asked, p, mean, alternative, against, expected):
    assert verdict(paired(with_p(p, mean, alternative, against)), claim(**asked)) == expected


def three_levels(p):
    """Level 50 below 200 with this p, level 400 far above: one refutation is looked for among two."""
    low = paired(with_p(p, -3.0, "two-sided"))
    high = low[low["n_bins"] == 200].assign(n_bins=400, method="high")
    high["recall@1"] += 20
    return pd.concat([low, high], ignore_index=True)


@pytest.mark.parametrize(("p", "expected"), [(0.02, "not reproduced"), (0.03, "inconclusive")])
def test_one_refutation_among_two_is_at_half_the_level(p, expected):
    """The reference is level 50, and "best" asks it to be above both others; above 400 it is by 20 less."""
    results = three_levels(p)
    results.loc[results["n_bins"] == 400, "recall@1"] -= 40
    assert verdict(results, claim("best", axis="n_bins", reference=50)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.012, "reproduced"), (0.02, "inconclusive")])
def test_the_widest_gap_of_three_levels_is_at_a_third_of_the_level(p, expected):
    """Of three pairs; the middle level lies between, so that the first and the last are the ones furthest apart."""
    results = paired(with_p(p, 6.0, "two-sided", 2.0))
    middle = results[results["n_bins"] == 50].assign(n_bins=100, method="middle")
    middle["recall@1"] = (middle["recall@1"].to_numpy() + results[results["n_bins"] == 200]["recall@1"].to_numpy()) / 2
    together = pd.concat([results, middle], ignore_index=True)
    assert verdict(together, claim("sensitive", axis="n_bins")) == expected


TABLE = {"check": "table", "comparison": ["batch"], "among": {"loss": "histogram", "batch_size": 256}}


def of_table(dataset, protocol, offsets, splits):
    """Runs whose Recall@K are those of the paper's Table 1 and so many points more, one offset per run."""
    published = read_published()
    ours = published[(published["dataset"] == dataset) & (published["place"] == "Table 1")]
    rows = [
        {"comparison": "batch", "method": "histogram, batch_size 256", "dataset": dataset, "split": split, "seed": seed,
         "loss": "histogram", "batch_size": 256, "network": "parts", "embedding_dim": 500, "protocol": protocol,
         "complete": True, "run_id": f"r{seed}", **{v.metric: v.value + offset for v in ours.itertuples()}}
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
def test_table_1_is_compared_with_its_own_values_alone(dataset, offsets, expected):
    protocol = {"cuhk03": "cuhk03-single-shot"}.get(dataset, dataset)
    splits = [f"cuhk03-{i}" for i in range(1, 6)] if dataset == "cuhk03" else [dataset] * 5
    (row,) = judge(of_table(dataset, protocol, offsets, splits), claims=[claim(**TABLE)]).to_dict("records")
    assert row["verdict"] == expected
    assert row["evidence"].count("less the published") == 5  # and not those of the authors' notebook
    other = judge(of_table(dataset, "another protocol", offsets, splits), claims=[claim(**TABLE)])
    assert other["verdict"].tolist() == ["not run"]


def test_runs_in_slices_are_no_level_of_the_batch():
    batch = next(c for c in read_claims() if c.name == "batch")
    results = runs({32: 30.0, 64: 35.0, 128: 40.0}, "batch", "batch_size", micro_batch=None)
    slices = runs({1024: 1.0}, "batch", "batch_size", micro_batch=256)
    board = judge(pd.concat([results, slices], ignore_index=True), claims=[batch])
    assert board["verdict"].tolist() == ["reproduced", "not run"]


def test_the_verdicts_on_the_sample_are_those_of_the_readme():
    """The README's table of what holds on glyphs, which is written by hand."""
    results = read_results(Path("reports/sample/results.parquet"))
    board = judge(results, pd.read_csv("reports/sample/loss_cost.csv"))
    found = board[board["verdict"] != "not run"].groupby(["claim", "comparison"])["verdict"].first().to_dict()
    assert found == README


def test_the_committed_report_is_that_of_the_committed_results():
    results = read_results(Path("reports/sample/results.parquet"))
    board = judge(results, pd.read_csv("reports/sample/loss_cost.csv"))
    told = pd.read_csv("reports/sample/claims.csv", keep_default_na=False)
    assert_frame_equal(told.astype(str), board.astype(str), check_dtype=False)
    means = pd.read_csv("reports/sample/summary.csv")
    assert_frame_equal(means, summary(results, recall_names(results)), check_dtype=False)


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
