"""The answer of a report: sentences of made-up results, with the numbers of independent formulas."""

import html
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hloss.study.answer import answers, best_comparison, data_words, length_answer, rankings, reach_of_counts
from hloss.study.claims import Claim, judge
from hloss.study.findings import findings_html
from hloss.study.head import facts, hardware, head_html, losses_caption, losses_figure
from hloss.study.statistics import summary

NOISE = np.array([0.4, -0.5, 0.2, 0.1, -0.2])
ABOVE = {"name": "a", "section": "4", "claim": "b", "criterion": "c", "check": "above", "data": ["cub"],
         "comparison": ["losses"], "method": {"loss": "histogram"}, "rivals": [{"loss": "triplet"}]}  # fmt: skip


def table_of(means, length=200, comparison="losses", dataset="glyphs", seeds=5, **settings):
    """Runs of methods with these means of Recall@1."""
    rows = []
    for i, (method, mean) in enumerate(means.items()):
        for seed in range(seeds):
            rows.append({"dataset": dataset, "comparison": comparison, "method": method, "loss": method, "seed": seed,
                         "recall@1": mean + NOISE[(seed + i) % 5] - NOISE[:seeds].mean(), "complete": True,
                         "run_id": f"{dataset}-{comparison}-{method}-{seed}", "length": length, "iterations": length,
                         "still_improving": False, "training_seconds": 30.0, "device": "x86_64", "threads": 1,
                         "title": "A & B"} | settings)  # fmt: skip
    return pd.DataFrame(rows)


def told(results, *claims):
    """The parts of the answer, and its text as a whole."""
    board = judge(results, claims=[Claim(**claim) for claim in claims or (ABOVE,)])
    parts = answers(results, summary(results, ["recall@1"]), board)
    return parts, " ".join(map(str, parts))


def limits(results, *claims):
    """What limits the counts of verdicts, as section 1 of the report says it above the lists."""
    board = judge(results, claims=[Claim(**claim) for claim in claims or (ABOVE,)])
    told = " ".join(map(str, reach_of_counts(board)))
    if told:
        assert findings_html(board).startswith(f"<p>{html.escape(told)}</p>\n")
    return told


def interval(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def difference(results, a, b):
    by_seed = results.pivot(index="seed", columns="method", values="recall@1")
    return by_seed[a] - by_seed[b]


def test_a_clear_leader_is_named_with_its_lead():
    results = table_of({"triplet": 40.0, "histogram": 36.0, "lifted": 38.0})
    parts, text = told(results)
    lead, last = difference(results, "triplet", "lifted"), difference(results, "triplet", "histogram")
    assert parts[0].short == f"Triplet leads by {lead.mean():.1f} points; the histogram loss is number 3 of 3."
    low, high = interval(results.loc[results["method"] == "triplet", "recall@1"])
    assert f"triplet has the highest test Recall@1, 40.0 % (95 % CI {low:.1f} to {high:.1f})" in text
    low, high = interval(lead)
    assert f"2.0 points above the next, lifted (95 % CI +{low:.1f} to +{high:.1f})." in text
    low, high = interval(last)
    assert "The difference of the histogram loss from the first is −4.0 points" in text
    assert not rankings(results, summary(results, ["recall@1"]), "glyphs")[0].absent
    assert f"−4.0 points (95 % CI −{high:.1f} to −{low:.1f})." in text
    assert "After 200 iterations on glyphs (one fixed setting, mean of five seeds)" in text
    assert "chance" not in text


def test_counts_of_verdicts_tell_on_how_many_comparisons_they_rest():
    results = table_of({"triplet": 40.0, "histogram": 36.0, "lifted": 38.0})
    other = ABOVE | {"name": "b", "method": {"loss": "triplet"}, "rivals": [{"loss": "histogram"}]}
    third = ABOVE | {"name": "c", "rivals": [{"loss": "lifted"}]}
    contradict = "Claims of the paper about different datasets can contradict each other on one dataset."
    text = limits(results, ABOVE, other, third)
    shown = "The 3 verdicts rest on 2 different comparisons; one (histogram minus triplet) decides 2 of them."
    assert f"The counts do not measure how reliable the paper is. {shown} {contradict}" in text
    assert "The counts do not measure how reliable the paper is. Section 1 says why." in told(results, ABOVE, third)[1]
    text = limits(results, ABOVE, third)
    assert "different comparisons" not in text
    assert contradict in text
    text = limits(results, ABOVE)
    assert contradict not in text
    assert "share training classes" not in text


def test_counts_of_verdicts_are_given_with_intervals_corrected_for_shared_training_classes():
    results = table_of({"triplet": 40.5, "histogram": 41.65})
    results["split"] = [f"glyphs-{seed}" for seed in results["seed"]]
    gaps = difference(results, "histogram", "triplet")
    wider = gaps.mean() / np.sqrt(gaps.var(ddof=1) * (1 / 5 + 1 / 4))
    assert stats.ttest_1samp(gaps, 0).pvalue < 0.05 < 2 * stats.t.sf(wider, 4)
    _, text = told(results)
    assert "1 reproduced" in text
    assert limits(results).endswith("without Holm's correction, the counts are 1 inconclusive.")


def test_a_tie_is_no_lead():
    results = table_of({"triplet": 40.0, "lifted": 40.1})
    parts, text = told(results)
    low, high = interval(difference(results, "lifted", "triplet"))
    assert parts[0].short == "No loss clearly leads."
    assert f"0.1 points above the next, triplet (95 % CI −{-low:.1f} to +{high:.1f}), which can be chance." in text
    assert "histogram" not in text


def test_equal_means_are_less_than_a_tenth_of_a_point_apart():
    _, text = told(table_of({"triplet": 40.0, "lifted": 40.0}))
    assert "less than 0.1 points above the next" in text
    assert "which can be chance" in text


def test_the_histogram_loss_as_first_or_second_is_not_said_twice():
    for means in ({"histogram": 40.0, "triplet": 36.0}, {"histogram": 36.0, "triplet": 40.0}):
        assert "histogram loss is number" not in told(table_of(means))[1]


def test_one_loss_has_no_rival():
    parts, text = told(table_of({"histogram": 40.0}))
    assert parts[0].short == "Only histogram was measured."
    assert "it has a test Recall@1 of 40.0 % (95 % CI" in text
    assert "above" not in text


def test_one_seed_has_no_interval_and_may_be_chance():
    parts, text = told(table_of({"triplet": 40.0, "histogram": 36.0}, seeds=1))
    assert parts[0].short == "No loss clearly leads."
    assert "one seed" in text
    assert "which can be chance" in text
    assert "CI" not in parts[0].text
    assert "The counts of verdicts have limits. Section 1 says why." in text
    assert limits(table_of({"triplet": 40.0, "histogram": 36.0}, seeds=1)).endswith(
        "No verdict is decided by a statistical test."
    )
    assert "Holm" not in text


def test_an_incomplete_study_says_so_first():
    results = table_of({"triplet": 40.0, "histogram": 36.0})
    results.loc[results["seed"] > 2, "complete"] = False
    parts, text = told(results)
    assert str(parts[0]) == (
        "This study is not complete. 4 runs of its comparisons are missing and can change the answer."
    )
    assert parts[1].short.startswith("So far, triplet leads by ")
    assert "mean of three seeds" in text
    assert str(parts[-1]) == "No claim of the paper can be judged. The runs that a claim needs are missing."


def test_the_highest_mean_can_be_below_the_next_on_the_seeds_of_both():
    results = table_of({"triplet": 40.0, "lifted": 39.0, "histogram": 38.0})
    easy, missing = results["seed"] == 0, results["seed"] > 0
    results.loc[easy, "recall@1"] += 10
    results.loc[easy & (results["method"] == "lifted"), "recall@1"] += 3
    results.loc[easy & (results["method"] == "histogram"), "recall@1"] += 5
    results.loc[missing & (results["method"] == "triplet"), "complete"] = False
    triplet, lifted, histogram = results.loc[easy, "recall@1"]
    text = told(results)[1]
    assert f"triplet has the highest test Recall@1, {triplet:.1f} %. On the one seed that both have, it is " in text
    assert f"it is {lifted - triplet:.1f} points below the next, lifted, which can be chance." in text
    assert (
        f"The difference of the histogram loss from the first is +{histogram - triplet:.1f} points, which can" in text
    )
    assert "(one fixed setting, mean of one to five seeds)" in text


def test_without_a_trained_run_there_is_no_answer():
    parts, text = told(table_of({"histogram": 40.0}).assign(complete=False))
    assert "There is no answer yet." in text
    assert len(parts) == 3


def test_two_datasets_have_an_answer_each():
    results = pd.concat([table_of({"triplet": 40.0, "histogram": 36.0}),
                         table_of({"triplet": 50.0, "histogram": 56.0}, dataset="cub")])  # fmt: skip
    parts, text = told(results)
    assert [part.short for part in parts[:3]] == [
        "glyphs (drawn characters): Triplet leads by 4.0 points. One training length was measured.",
        "cub (birds): Histogram leads by 6.0 points. One training length was measured.",
        "2 verdicts on one claim of the paper: 1 reproduced, 1 not reproduced; with Holm's correction for the number "
        "of tests: the same.",
    ]
    assert not any(part.text for part in parts[:3])
    assert not any(part.short for part in parts[3:])
    for part, dataset in zip(parts[3:5], ("glyphs", "cub"), strict=True):
        assert part.text.startswith(f"After 200 iterations on {dataset} (one fixed setting")
        assert part.text.endswith(". No run is still improving at its end.")
    assert head_html("A", results, parts, []).count("<strong>") == 3
    assert "two datasets (glyphs, cub; some claims name other data)" in text
    assert "not data of the paper" not in text


@pytest.mark.parametrize(
    ("later", "short"),
    [
        ({"triplet": 44.0, "histogram": 50.0, "lifted": 45.0}, "The order depends on the training length."),
        ({"triplet": 44.0, "histogram": 42.0, "lifted": 40.0}, "The same loss has the highest mean at every length."),
        ({"triplet": 44.0, "histogram": 40.0, "lifted": 42.0}, "The order is the same at every length."),
    ],
)
def test_the_effect_of_the_length_is_said(later, short):
    results = pd.concat([table_of({"triplet": 40.0, "histogram": 36.0, "lifted": 38.0}),
                         table_of(later, length=2000, still_improving=True)])  # fmt: skip
    found = length_answer(rankings(results, summary(results, ["recall@1"]), "glyphs"))
    assert found.short == short
    assert "After 2,000 iterations 15 of the 15 runs of these losses are still improving" in found.text
    if "depends" in short:
        assert "At shorter lengths the highest mean is that of triplet after 200 (40.0 %)." in found.text


def test_a_loss_that_is_first_at_several_lengths_is_named_once():
    means = {20: (40.0, 30.0), 60: (41.0, 30.0), 200: (30.0, 42.0)}
    results = pd.concat([table_of({"triplet": a, "histogram": b}, length=n) for n, (a, b) in means.items()])
    found = length_answer(rankings(results, summary(results, ["recall@1"]), "glyphs"))
    assert found.text.startswith(
        "At shorter lengths the highest mean is that of triplet after 20 (40.0 %) and 60 (41.0 %)."
    )


def test_one_length_with_improving_runs_warns():
    parts, _ = told(table_of({"triplet": 40.0, "lifted": 36.0}, still_improving=True))
    assert parts[1].short == "Longer training can change the order."
    assert "10 of the 10 runs of these losses are still improving" in parts[1].text


def test_verdicts_are_counted_with_what_they_rest_on():
    results = pd.concat([table_of({"histogram": 40.0, "triplet": 36.0}, still_improving=True),
                         table_of({"histogram": 40.0, "triplet": 44.0}, length=2000)])  # fmt: skip
    best = {**ABOVE, "name": "z", "method": {"loss": "triplet"}, "rivals": [{"loss": "lifted"}]}
    parts, _ = told(results, ABOVE, best)
    assert parts[-1].short == (
        "One verdict on a claim of the paper at the longest length: 1 not reproduced; with Holm's correction for the "
        "number of tests: the same."
    )
    assert parts[-1].text.startswith("It has another verdict at a shorter length. The verdicts rest on one dataset of ")
    assert "The verdicts rest on one dataset of drawn characters (glyphs), not data of the paper and" in parts[-1].text
    assert parts[-1].text.endswith("1 other verdict needs runs that are not part of this study.")


def test_the_claim_with_the_most_rivals_is_told():
    results = table_of({"histogram": 40.0, "triplet": 36.0, "lifted": 50.0})
    broad = {**ABOVE, "name": "b", "claim": "It is the best.", "rivals": [{"loss": "triplet"}, {"loss": "lifted"}]}
    parts, _ = told(results, ABOVE, broad)
    assert parts[-2].text.startswith('"It is the best": not reproduced. ')
    assert "most others" not in told(results, ABOVE)[1]


def test_claims_that_are_not_in_the_paper_are_counted():
    results = table_of({"histogram": 40.0, "triplet": 36.0})
    parts, _ = told(results, ABOVE, {**ABOVE, "name": "own", "data": []})
    assert parts[-2].short == (
        "2 verdicts on 2 claims (1 not of the paper): 2 reproduced; with Holm's correction for the number of tests: "
        "the same."
    )


def test_verdicts_are_counted_before_and_after_holms_correction():
    results = table_of({"histogram": 40.0, "triplet": 39.05}, dataset="cub")
    results["recall@1"] = 10 * results["recall@1"] - 360  # beyond the margin of equivalence
    p = stats.ttest_1samp(difference(results, "histogram", "triplet"), 0).pvalue
    assert 0.025 < p < 0.05  # significant as the only test, not as one of two
    assert told(results)[0][-1].short.endswith(
        ": 1 reproduced; with Holm's correction for the number of tests: the same."
    )
    parts, _ = told(results, ABOVE, {**ABOVE, "name": "again"})
    assert parts[-2].short == (
        "2 verdicts on 2 claims of the paper: 2 reproduced; with Holm's correction for the number of tests: "
        "2 inconclusive."
    )


def test_the_answer_is_taken_from_tuned_losses_once_they_are_complete():
    fixed, tuned = (table_of({"histogram": 40.0}, comparison=name) for name in ("losses", "tuned losses"))
    results = pd.concat([fixed, tuned], ignore_index=True)
    assert best_comparison(results, "glyphs") == "tuned losses"
    caption = losses_caption(rankings(results, summary(results, ["recall@1"]), "glyphs"))
    assert caption.endswith("over seeds, not over the choice of the settings.")
    results.loc[len(results) - 1, "complete"] = False
    assert best_comparison(results, "glyphs") == "losses"
    assert best_comparison(tuned.assign(complete=False), "glyphs") == ""


def test_facts_have_data_runs_lengths_time_and_hardware():
    results = table_of({"histogram": 40.0, "triplet": 36.0})
    assert facts(results) == (
        "Data: one dataset of drawn characters (glyphs) · all 10 planned runs, of which 10 train a network · at most "
        "five seeds per method · training of 200 iterations · 5 min 0 s of training on x86_64 CPU, 1 thread per run"
    )
    results.loc[results["seed"] > 2, "complete"] = False
    assert " · 6 runs so far, of which 6 train a network · at most three seeds per method · " in facts(results)
    assert data_words(results.assign(dataset="own")) == "one dataset (own)"


@pytest.mark.parametrize(
    ("device", "processor", "shown"),
    [
        ("NVIDIA H100", "EPYC", "NVIDIA H100"),
        ("x86_64", "EPYC", "EPYC, 2 threads per run"),
        ("x86_64", "", "x86_64 CPU, 2"),
    ],
)
def test_hardware_is_named(device, processor, shown):
    assert hardware(pd.DataFrame({"device": [device], "processor": [processor], "threads": [2.0]})).startswith(shown)


def test_different_numbers_of_seeds_have_a_column():
    results = table_of({"triplet": 50.0, "histogram": 40.0})
    results.loc[(results["method"] == "triplet") & (results["seed"] > 2), "complete"] = False
    of_lengths = rankings(results, summary(results, ["recall@1"]), "glyphs")
    figure = losses_figure(of_lengths, "")
    assert "seeds</th>" in figure
    assert re.findall(r'number">(\d+)<', figure) == ["3", "5"]
    assert "mean over seeds with its 95 %" in losses_caption(of_lengths)


def test_losses_without_a_run_and_the_choice_of_the_setting_are_named():
    fixed = table_of({"triplet": 50.0, "histogram": 40.0, "lifted": 30.0})
    fixed.loc[fixed["method"] == "lifted", "complete"] = False
    tuned = table_of({"triplet": 60.0}, comparison="tuned losses")
    tuned.loc[tuned["seed"] > 1, "complete"] = False
    results = pd.concat([fixed, tuned], ignore_index=True)
    (ranking,) = rankings(results, summary(results, ["recall@1"]), "glyphs")
    assert ranking.absent == ["lifted"]
    assert losses_caption([ranking]).endswith(" Without a complete run: lifted.")
    assert "Runs of the tuned losses are among them, so the answer is that at one fixed setting." in told(results)[1]
    assert "tuned" not in told(fixed)[1]


def test_the_comparisons_that_decide_verdicts_after_holms_correction_are_named():
    results = table_of({"histogram": 40.0, "triplet": 36.0, "lifted": 39.0})
    asked = [Claim(**{**ABOVE, "name": f"above {rival} {i}", "rivals": [{"loss": rival}]})
             for i, rival in enumerate(("triplet", "triplet", "lifted"))]  # fmt: skip
    board = judge(results, None, asked)
    board["holm"] = ["reproduced", "reproduced", "inconclusive"]
    board["verdict"] = ["reproduced", "reproduced", "not reproduced"]
    (part,) = reach_of_counts(board)
    after = "After this correction these comparisons decide the others. "
    assert f"{after}Reproduced: histogram minus triplet (2). Claims" in part.text
    board["holm"] = board["verdict"]
    assert after not in reach_of_counts(board)[0].text


def test_verdicts_without_a_test_are_counted():
    results = table_of({"histogram": 40.0, "triplet": 36.0})
    cost = pd.DataFrame({"batch_size": [1024, 2048, 4096], "seconds": [0.1, 0.4, 1.6]})
    asked = [Claim(**ABOVE), Claim(**{**ABOVE, "name": "c", "check": "quadratic", "comparison": [], "method": None,
                                      "rivals": None})]  # fmt: skip
    board = judge(results, cost, asked)
    (part,) = reach_of_counts(board)
    assert str(part) == (
        "The counts of verdicts have limits. 1 of the verdicts rests on no statistical test; Holm's correction does "
        "not change it."
    )
    (*_, of_claims, _) = answers(results, summary(results, ["recall@1"]), board)
    assert "data of the paper" in of_claims.text


def test_data_that_only_some_claims_name_are_said_to_be_so():
    results = pd.concat([table_of({"triplet": 40.0, "histogram": 36.0}),
                         table_of({"triplet": 50.0, "histogram": 56.0}, dataset="cub")])  # fmt: skip
    text = told(results)[1]
    assert "The verdicts rest on two datasets (glyphs, cub; some claims name other data) and" in text


def test_the_head_has_the_answer_and_a_line_per_loss():
    results = pd.concat([table_of({"triplet": 40.0, "histogram": 36.0}), table_of({"triplet": 50.0}, length=2000)])
    table = summary(results, ["recall@1"])
    of_lengths = rankings(results, table, "glyphs")
    figure = losses_figure(of_lengths, "")
    names, means = re.findall(r'<th scope="row">(\w+)', figure), re.findall(r'number">([\d.]+)<', figure)
    assert (names, means) == (["triplet"], ["50.0"])  # histogram has no run of the longest length
    assert "seeds</th>" not in figure
    assert "mean over five seeds with its 95 % confidence interval over seeds." in losses_caption(of_lengths)
    assert "triplet: 50.0 %, 95 % CI" in figure
    assert "; after 200 iterations 40.0 %" in figure
    assert "Small points: after 200 iterations, the shortest the smallest." in losses_caption(of_lengths)
    page = head_html("A & B", results, told(results)[0], [figure])
    assert "<h1>A &amp; B</h1>" in page
    assert page.count("<li><strong>") == 3


def test_the_rank_of_the_histogram_loss_is_a_range_if_a_neighbour_is_not_separated():
    results = table_of({"triplet": 40.0, "lifted": 36.3, "histogram": 36.0, "contrastive": 35.8, "quadruplet": 30.0})
    gaps = {name: difference(results, "histogram", name) for name in ("lifted", "contrastive", "quadruplet")}
    assert [interval(gap)[0] < 0 < interval(gap)[1] for gap in gaps.values()] == [True, True, False]
    parts, text = told(results)
    assert parts[0].short.endswith("; the histogram loss is number 2 to 4 of 5.")
    assert "The difference from lifted and contrastive can be chance." in text
    results = table_of({"triplet": 40.0, "lifted": 38.0, "histogram": 36.0, "quadruplet": 30.0})
    parts, text = told(results)
    assert parts[0].short.endswith("; the histogram loss is number 3 of 4.")
    assert "can be chance" not in text


def test_reproduced_verdicts_that_compare_the_histogram_loss_are_counted():
    results = table_of({"histogram": 40.0, "triplet": 36.0, "lifted": 30.0})
    other = ABOVE | {"name": "b", "method": {"loss": "triplet"}, "rivals": [{"loss": "lifted"}]}
    beside = ABOVE | {"name": "c", "rivals": [{"loss": "lifted"}]}
    assert (
        "1 of the 2 reproduced verdicts compares the histogram loss with another loss."
        in told(results, ABOVE, other)[1]
    )
    assert "2 of the 2 reproduced verdicts compare the histogram loss" in told(results, ABOVE, beside)[1]
    text = told(results, other, other | {"name": "d"})[1]
    assert "None of the 2 reproduced verdicts compares the histogram loss with another loss." in text
