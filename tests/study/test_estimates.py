"""Estimates over seeds and test classes: compared with scipy and statsmodels, and their error rates in simulations."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from hloss.study.estimates import (
    SEEDS,
    SEEDS_AND_CLASSES,
    Estimate,
    corrected_for_shared_training,
    crossed_error,
    holm,
    mean_over_runs,
    paired_difference,
)

# Standard deviations over seeds, classes, and seeds by classes of differences in points of Recall@1, measured on glyphs
# after 200 iterations of five seeds (histogram minus binomial deviance, histogram minus semi-hard triplet, binomial
# deviance minus semi-hard triplet), and a case with large effects of classes.
EFFECTS = [(1.0, 4.2, 15.2), (0.0, 3.4, 14.8), (1.5, 5.0, 15.6), (0.2, 20.0, 12.0)]
FOLD_CLASSES, SHARED_CLASSES = 250, 417  # test classes of glyphs-0 and of glyphs
MARGIN = 2.0


def runs(values, split="glyphs", first=0, **columns):
    rows = [{"seed": first + i, "recall@1": float(v), "split": split.format(first + i)} for i, v in enumerate(values)]
    return pd.DataFrame(rows).assign(**columns)


def with_ranks(hits, sizes, split="glyphs"):
    """Runs with these hits (seeds, classes) among queries of classes of these sizes."""
    classes = np.repeat(np.arange(len(sizes)), sizes)
    ranks = [
        np.concatenate([np.where(np.arange(n) < h, 1, 2) for h, n in zip(row, sizes, strict=True)]) for row in hits
    ]
    table = runs([100 * (r == 1).mean() for r in ranks], split)
    return table.assign(ranks=ranks, query_classes=[classes] * len(ranks))


def test_shared_training_classes_widen_intervals_of_seeds_with_their_own_test_classes():
    a, b = [(50.0, 53.0, 51.0, 52.5, 51.5), (48.0, 50.5, 50.0, 49.0, 50.5)]
    gaps = np.subtract(a, b)
    own, common = [(runs(a, split), runs(b, split)) for split in ("glyphs-{}", "glyphs")]
    plain = paired_difference(*own)
    with corrected_for_shared_training():
        wider = paired_difference(*own)
        assert paired_difference(*common).error == pytest.approx(stats.sem(gaps))
    variance = gaps.var(ddof=1) * (1 / 5 + 1 / 4)  # test classes are a fifth, training classes four fifths
    low, high = stats.t.interval(0.95, 4, gaps.mean(), np.sqrt(variance))
    assert wider.interval() == pytest.approx((low, high))
    assert plain == paired_difference(*own) == wider._replace(error=stats.sem(gaps))


@given(
    st.lists(st.integers(-300, 300), min_size=3, max_size=6, unique=True), st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_tests_over_seeds_equal_statsmodels(hundredths, margin):
    a, b = runs(50 + np.array(hundredths) / 100), runs([50.0] * len(hundredths))
    found = paired_difference(a, b)
    p, (_, p_above, _), (_, p_below, _) = ttost_paired(a["recall@1"], b["recall@1"], -margin, margin)
    assert found.p_within(margin) == pytest.approx(p, abs=1e-12)
    assert found.p_above(-margin) == pytest.approx(p_above, abs=1e-12)
    assert found.p_below(margin) == pytest.approx(p_below, abs=1e-12)
    interval = stats.ttest_rel(a["recall@1"], b["recall@1"]).confidence_interval(0.9)
    assert found.interval(0.9) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.varies == SEEDS


@pytest.mark.parametrize("n", [1, 2, 12])
def test_holm_equals_statsmodels(n):
    p_values = np.random.default_rng(n).beta(0.2, 1, n)
    adjusted = holm(pd.Series(p_values, index=range(5, 5 + len(p_values))))
    assert adjusted.tolist() == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


def test_difference_over_the_common_seeds():
    found = paired_difference(runs([41, 43, 42, 50]), runs([40, 40, 40], first=1))
    assert (found.mean, found.n) == (pytest.approx(5.0), 3)
    assert found.error == pytest.approx(stats.sem([3, 2, 10]))
    back = paired_difference(runs([40, 40, 40], first=1), runs([41, 43, 42, 50]))
    assert (back.mean, back.error) == pytest.approx((-found.mean, found.error))


@pytest.mark.parametrize(("first", "n"), [(2, 1), (9, 0)])
def test_fewer_than_two_common_seeds_decide_nothing(first, n):
    found = paired_difference(runs([40, 41, 43]), runs([39, 38, 40], first=first))
    assert found.n == n
    assert np.isnan(found.interval()).all()
    assert (found.p_above(-99), found.p_below(99), found.p_within(99), found.p_outside(0)) == (1, 1, 1, 1)
    assert np.isnan(found.mean) == (n == 0)


def test_equal_differences_are_certain():
    found = paired_difference(runs([40.5, 41.5]), runs([40, 41]))
    assert (found.p_above(0), found.p_above(0.5), found.p_below(0.5), found.p_within(2)) == (0, 1, 1, 0)


def test_refuses_a_repeated_seed_and_a_value_that_is_not_finite():
    with pytest.raises(ValueError, match=r"b must have one value per seed: got several for \[1\]"):
        paired_difference(runs([1, 2]), pd.concat([runs([1, 2]), runs([3], first=1)]))
    with pytest.raises(ValueError, match="a must be finite: got"):
        paired_difference(runs([1, float("nan")]), runs([1, 2]))


def test_seeds_with_their_own_test_classes_include_classes():
    found = paired_difference(runs([41, 43, 42], "glyphs-{}"), runs([40, 40, 40], "glyphs-{}"))
    assert found == Estimate(2.0, stats.sem([1, 3, 2]), 3, SEEDS_AND_CLASSES)


def test_shared_test_classes_widen_the_interval():
    """Every seed has the same differences of classes, so the seeds alone would be certain."""
    sizes = np.full(40, 10)
    hits = np.tile(np.random.default_rng(0).integers(0, 11, 40), (3, 1))
    found = paired_difference(with_ranks(hits, sizes), with_ranks(np.full((3, 40), 5), sizes))
    differences = 10.0 * (hits[0] - 5)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.varies, found.error) == (SEEDS_AND_CLASSES, pytest.approx(stats.sem(differences)))
    assert (found.share, found.classes) == (0, 40)
    assert found.interval() == pytest.approx(stats.ttest_1samp(differences, 0).confidence_interval())
    assert found.p_above(1) == pytest.approx(stats.ttest_1samp(differences, 1, alternative="greater").pvalue)


def test_error_of_crossed_seeds_and_classes_equals_naive_sums_of_squares():
    """Classes of different sizes; the table of variances is computed with loops, from the ranks."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 17, 30)
    of_classes = [rng.integers(0, sizes + 1) for _ in range(2)]  # hits of each method
    ours, theirs = (with_ranks(np.minimum(hits + rng.integers(0, 2, (4, 30)), sizes), sizes) for hits in of_classes)
    found = paired_difference(ours, theirs)
    scores = np.empty((4, 30))
    for s in range(4):
        for c in range(30):
            of_class = ours["query_classes"][s] == c
            gap = (ours["ranks"][s][of_class] == 1).mean() - (theirs["ranks"][s][of_class] == 1).mean()
            scores[s, c] = 30 * sizes[c] / sizes.sum() * (100 * gap - found.mean)
    seeds, classes = scores.mean(1), scores.mean(0)
    rest = sum((scores[s, c] - seeds[s] - classes[c] + scores.mean()) ** 2 for s in range(4) for c in range(30)) / 87
    expected = seeds.var(ddof=1) / 4 + classes.var(ddof=1) / 30 - rest / 120
    assert expected > seeds.var(ddof=1) / 4
    assert found.error**2 == pytest.approx(expected, rel=1e-9)
    assert found.share == pytest.approx(seeds.var(ddof=1) / 4 / expected)


@given(st.floats(0, 1), st.integers(2, 6), st.integers(2, 400), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_contains_the_values_that_the_test_does_not_reject(share, n, classes, confidence):
    found = Estimate(1.0, 0.5, n, SEEDS_AND_CLASSES, share, classes)
    low, high = found.interval(confidence)
    assert (low + high) / 2 == pytest.approx(1.0)
    assert found.p_above(low) == pytest.approx((1 - confidence) / 2, rel=1e-6)
    assert found.p_below(high) == pytest.approx((1 - confidence) / 2, rel=1e-6)


def test_unmatched_queries_do_not_count():
    sizes = np.full(12, 6)
    hits = np.random.default_rng(2).integers(0, 7, (3, 12))
    whole = with_ranks(hits, sizes)
    more = whole.assign(
        ranks=[np.append(ranks, 0) for ranks in whole["ranks"]],
        query_classes=[np.append(classes, 99) for classes in whole["query_classes"]],
    )
    assert mean_over_runs(more) == mean_over_runs(whole)


def test_mean_of_another_k_counts_its_own_ranks():
    table = with_ranks(np.random.default_rng(3).integers(0, 7, (3, 12)), np.full(12, 6)).assign(**{"recall@2": 100.0})
    found = mean_over_runs(table, "recall@2")  # every match is first or second
    assert (found.mean, found.error, found.varies) == (100.0, 0.0, SEEDS_AND_CLASSES)
    assert mean_over_runs(table.assign(map=[1.0, 2.0, 3.0]), "map").varies == SEEDS


def drawn(rng, effects, n, is_shared, cases):
    """Scores (cases, seeds, classes) of a true difference of 0: effects of seeds, of classes and of both."""
    of_seed, of_class, of_both = effects
    m = SHARED_CLASSES if is_shared else FOLD_CLASSES
    classes = rng.normal(0, of_class, (cases, 1 if is_shared else n, m))
    return rng.normal(0, of_seed, (cases, n, 1)) + classes + rng.normal(0, of_both, (cases, n, m))


def estimates(rng, effects, n, is_shared, cases):
    for scores in drawn(rng, effects, n, is_shared, cases):
        seeds = scores.mean(1)
        rest = (*crossed_error(scores), scores.shape[1]) if is_shared else (stats.sem(seeds), n)
        yield Estimate(seeds.mean(), *rest)


@pytest.mark.parametrize("effects", EFFECTS)
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_and_tests_err_as_stated(n, is_shared, effects):
    """2,000 cases: the standard error of a share of 5 % is 0.5 %."""
    found = list(estimates(np.random.default_rng(4), effects, n, is_shared, 2_000))
    covered = [low <= 0 <= high for low, high in (one.interval() for one in found)]
    assert 0.93 < np.mean(covered) < 0.97
    at_margin = [one._replace(mean=one.mean + MARGIN) for one in found]
    assert np.mean([one.p_within(MARGIN) < 0.05 for one in at_margin]) < 0.065  # equivalence
    inferior = [one._replace(mean=one.mean - MARGIN) for one in found]
    assert 0.035 < np.mean([one.p_above(-MARGIN) < 0.05 for one in inferior]) < 0.065  # non-inferiority


def test_seeds_alone_do_not_cover_if_they_share_their_test_classes():
    """Intervals over five seeds that leave out the classes have too low coverage, so the simulation can fail."""
    found = drawn(np.random.default_rng(5), EFFECTS[3], 5, True, 1_000).mean(2)
    half = stats.t.ppf(0.975, 4) * stats.sem(found, axis=1)
    assert np.mean(abs(found.mean(1)) <= half) < 0.7
