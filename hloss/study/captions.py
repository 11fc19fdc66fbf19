"""Captions of the figures and tables of a report; names in braces are filled in."""

from hloss.study.levels import CATEGORIES, CURVES, GRID

PAPER = {"bins": "Figure 2", "batch": "Figure 2"}  # comparison -> figure of the paper with the same comparison
DRAWN = {
    CATEGORIES: "One grey point per seed; the mean with its 95 % interval.",
    CURVES: "One grey point per seed; the mean with its 95 % interval over the levels of the setting.",
    GRID: "The mean of each pair of levels, ± half its 95 % interval.",
}
OPEN_CIRCLE = "Open circle: a run is still improving."
STARS = " Stars: published values with the same protocol, network and dimensions."

VERDICTS = (
    "Verdicts with the difference that decides each, in its unit, and the bounds of its interval. Holm: the verdict "
    "with Holm's correction; confidence: of the interval, in %; n: seeds."
)
LOSSES = (
    "Test Recall@K (%) of the losses on {dataset}: mean over n seeds. The 95 % interval is that of Recall@1. length: "
    "iterations of training. still improving: runs whose best validation Recall@1 lies in the last tenth of the "
    "length."
)
PUBLISHED = (
    "Published values (%) by {kind}, beside the means of this study (ours, with the 95 % interval from low to high, "
    "over n seeds); difference: ours minus published, in points."
)
COMPARISON = "Test Recall@1 (%) of the comparison {comparison!r} on {dataset}{paper}. {drawn} " + OPEN_CIRCLE
BY_LENGTH = (
    "Mean test Recall@1 (%) of the comparison {comparison!r} on {dataset} over the training length (iterations). "
    + OPEN_CIRCLE
)
RECALL_AT_K = (
    "Test Recall@K (%) of {what} on {dataset} over K{paper}: mean over seeds, with the range from the lowest to the "
    "highest seed."
)
OVER_CLASSES = (
    "Test Recall@1 (%) of the run with the first seed of each loss, with its 95 % bootstrap interval over test classes."
)
TUNED = (
    "Settings chosen at each length on the validation classes, once for all seeds, and the number of runs of each "
    "grid (+ those of its extensions). If a choice is at an edge of the grid, a better value may lie beyond it. "
    "Intervals do not include the variation of this choice."
)
BETTER = (
    "Settings that a grid could choose and did not, with the test Recall@1 (%) of both: the best ones of each method "
    "and length, where the 95 % interval of the paired difference (points, over seeds and test classes) is above 0. "
    "They are found on the test classes, so the difference overestimates the gain. It shows how far off a choice by "
    "one run per setting can be."
)
GRIDS = (
    "Recall@1 (%) on the validation classes of each run of the grids, after the longest training: one run per cell. "
    "Empty: not run. The highest value of a method is the setting chosen after the longest training."
)
ABLATION = (
    "Test Recall@K (%) of the comparison {comparison!r} on {dataset} at each length: mean over n seeds; the 95 % "
    "interval is that of Recall@1."
)
DIFFICULTY = (
    "Differences in test Recall@1 (points) between {first} and other losses on each dataset, the easiest first, after "
    "{length:,} iterations: mean over seeds with its 95 % interval. Each loss has the same settings on all datasets "
    "and at all lengths, which are not tuned for each. " + OPEN_CIRCLE
)
DIFFICULTIES = (
    "Test Recall@1 (%) of {first} and of each other loss, and their difference (first minus other, in points) with the "
    "bounds of its 95 % interval, at each length (iterations); n: seeds. The last line of each length is the change of "
    "the difference between the datasets named. Intervals are not corrected for their number."
)
SIMILARITIES = (
    "Densities (per unit of cosine similarity) of positive and negative pairs of test images on {dataset}, before "
    "training and after training with each loss (the paper's Figure 5); shared: mass of both densities. One run per "
    "loss."
)
TRAINING = (
    "Recall@1 (%) on the validation classes of {dataset} over the iterations of training: mean and range over seeds; "
    "vertical lines: lengths at which the test is reported. The validation gallery is smaller than the test gallery, "
    "so its Recall@1 is higher. A line that still rises at the end has not converged."
)
PANEL = (
    "Test queries of {dataset} (left) and their nearest test images, nearest first: {method}, run {run_id} ({why}). "
    "Green frame: same class. Red frame and cross: another class."
)
RUNS = (
    "All runs at their longest length: settings that differ between runs, validation and test results (%), the 95 % "
    "bootstrap interval of Recall@1 over test classes, and the time of training (s)."
)


def of_paper(place: str | None) -> str:
    """A reference to the paper, as in " (the paper's Figure 2)"; "" for None.

    Args:
        place: the figure of the paper with the same content.
    """
    return f" (the paper's {place})" if place else ""
