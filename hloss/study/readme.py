"""The results in the README and docs/results.md, generated from a folder of committed results."""

import re
from pathlib import Path
from textwrap import fill

import pandas as pd

from hloss.runs.errors import ConfigError
from hloss.runs.files import atomic_write
from hloss.study.answer import counted_verdicts, reach_of_counts
from hloss.study.claims import conclusions, read_board
from hloss.study.criteria import NOT_RUN
from hloss.study.difficulty import in_words
from hloss.study.estimates import mean_over_runs
from hloss.study.findings import drops, findings, heading, lines, note
from hloss.study.results import at_length, better_settings, chosen_settings, distinct_runs, lengths_in, read_results
from hloss.study.spec import DIFFICULTY, INITIAL, LOSS_COMPARISONS, OF_TUNING
from hloss.study.statistics import EQUIVALENCE_MARGIN, late_gain, shown_mean, summary
from hloss.study.tables import listed

MADE = "made by workflow/scripts/write_readme_results.py"
BEGIN = f"<!-- results: begin ({MADE}) -->"
END = "<!-- results: end -->"
README, TABLE = "README.md", "docs/results.md"
DATASET = "glyphs"  # the section describes results on this dataset
FIXED, TUNED = LOSS_COMPARISONS
SETTINGS = {TUNED: "tuned", FIXED: "fixed"}
MARGIN = f"±{EQUIVALENCE_MARGIN:g} points"


def update_results(root: Path, folder: Path, check: bool = False) -> list[str]:
    """Write the results section of README.md, and docs/results.md.

    Args:
        root: folder with README.md, which has the two markers, and docs.
        folder: folder with results.parquet and claims.csv.
        check: only compare, write nothing.

    Returns:
        The files that were out of date.

    Raises:
        ConfigError: if a file or a marker is missing, or the results are of other data than `DATASET`.
    """
    if not (root / README).is_file():
        raise ConfigError(f"{root / README}: no such file; run the command in the root folder of the project")
    readme = with_section((root / README).read_text(), results_section(folder))
    outdated = []
    for name, text in ((README, readme), (TABLE, results_page(folder))):
        file = root / name
        if not file.exists() or file.read_text() != text:
            outdated.append(name)
            if not check:
                atomic_write(file, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
    return outdated


def with_section(text: str, section: str) -> str:
    """The text of a README with another results section.

    Args:
        text: the README, with the markers `BEGIN` and `END`.
        section: the new section, without the markers.

    Raises:
        ConfigError: unless each marker occurs once, in this order.
    """
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", text)
    if parts[1::2] != [BEGIN, END]:
        raise ConfigError(f"the README must contain the markers once each, in this order: {BEGIN} and {END}")
    return f"{parts[0]}{BEGIN}\n\n{section}\n\n{END}{parts[4]}"


def results_section(folder: Path) -> str:
    """The section in Markdown: limits of the results, the means of the losses, the claims and the difficulty in words.

    Args:
        folder: folder with results.parquet and claims.csv.

    Raises:
        ConfigError: if a file is missing, or the results are of other data than `DATASET`.
    """
    results, of_drawings, board = _read(folder)
    reach = [fill(str(part), width=120) for part in reach_of_counts(board)]
    return "\n\n".join(
        [_limits(results), *_means(results), _reading(board), *reach, *_findings(board), *_drawings(of_drawings)]
    )


def results_page(folder: Path) -> str:
    """The page in Markdown with a table of all claims: the verdicts at each length, and the difference that decides.

    Args:
        folder: folder with results.parquet and claims.csv.

    Raises:
        ConfigError: if a file is missing, or the results are of other data than `DATASET`.
    """
    results, _, board = _read(folder)
    title = f"<!-- {MADE} -->\n\n# Results on {DATASET}, claim by claim"
    return "\n\n".join([title, _limits(results), _table_reading(), _claims_table(conclusions(board))]) + "\n"


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Results, those of the comparison of easier and harder data apart, and board of a folder."""
    every = read_results(folder / "results.parquet")
    of_drawings = every["comparison"] == DIFFICULTY
    results = every[~of_drawings]
    datasets = sorted(results["dataset"].unique())
    if datasets != [DATASET]:
        raise ConfigError(f"{folder / 'results.parquet'}: got results on {', '.join(datasets)}; allowed is {DATASET}")
    if not (folder / "claims.csv").is_file():
        raise ConfigError(f"{folder / 'claims.csv'}: no such file; `make report STUDY={folder.name}` writes it")
    return results, every[of_drawings], read_board(folder / "claims.csv")


def _limits(results: pd.DataFrame) -> str:
    """The limits of these results: data, seeds and length of training."""
    trained = results[(results["iterations"] > 0) & results["complete"]]
    methods = trained[~trained["comparison"].str.endswith(OF_TUNING)]
    seeds = methods.groupby(["comparison", "method"])["seed"].nunique()
    runs = distinct_runs(trained)
    usual, improving = runs["iterations"].mode()[0], runs["still_improving"].sum()
    losses = at_length(trained[trained["comparison"].isin(LOSS_COMPARISONS)])
    gains = late_gain(losses).groupby([losses["comparison"], losses["method"]]).mean()
    return fill(
        f"These results are limited: one dataset of drawn characters (`{DATASET}`), {_range(seeds)} seeds per method, "
        f"{usual:,} iterations in {(runs['iterations'] == usual).sum()} of {len(runs)} trained runs. "
        f"{improving} of the {len(runs)} runs are still improving: their best validation Recall@1 lies in the last "
        "tenth of training. In the second half of training the best validation Recall@1 rises by "
        f"{gains.min():.1f} points ({_loss(*gains.idxmin())}) to {gains.max():.1f} points ({_loss(*gains.idxmax())}), "
        "mean over seeds. Longer training can change the order of the losses. "
        "A claim that fails here can still hold on the paper's data.",
        width=120,
    )


def _loss(comparison: str, method: str) -> str:
    return f"{method}, {SETTINGS[comparison]}"


def _range(numbers: pd.Series) -> str:
    low, high = numbers.min(), numbers.max()
    return str(low) if low == high else f"{low} to {high}"


def _reading(board: pd.DataFrame) -> str:
    return fill(
        "Each line below has a claim of the paper (in italics, in our words: the claims are from notes on the paper, "
        "whose text could not be opened when they were written) and the difference that decides its verdict after the "
        "longest training. Differences are in points of test Recall@1, with their confidence interval (CI). All runs "
        "are on glyphs, even if the claim names another dataset. Two losses are equivalent if the 90 % CI of their "
        f"difference lies within {MARGIN}; neither then counts as better. "
        "'Close' means less than 5 points below for two losses, and less than 2 points for values of C. Intervals have "
        "95 %, for equivalence and closeness 90 %, and more where a claim has several comparisons. "
        f"Verdicts after the longest training: {counted_verdicts(board)}. A line says which verdict the correction "
        "changes. [docs/results.md](docs/results.md) has the table of all verdicts; the report, "
        "`reports/sample/report.html`, has the criteria and all runs.",
        width=120,
    )


def _findings(board: pd.DataFrame) -> list[str]:
    """Title, list and note of each group of claims."""
    parts = []
    for name, group in findings(board).items():
        items = [_item(claim, told) for _, claim, told in lines(group)]
        parts += [f"**{heading(name, group)}**", "\n".join(items), fill(note(name, board), width=120)]
    return list(filter(None, parts))


def _item(claim: str, told: list[str]) -> str:
    """A claim and what is told about its verdicts, each in a sentence of its own if there are several."""
    sentences = f": {told[0]}." if len(told) == 1 else "".join(f". {part[0].upper()}{part[1:]}" for part in told) + "."
    return fill(f"- *{claim}*{sentences}", width=120, subsequent_indent="  ")


def _drawings(results: pd.DataFrame) -> list[str]:
    """What depends on the difficulty of the data, in words; none without the comparison."""
    if results.empty:
        return []
    items = [fill(f"- {short} {told}", width=120, subsequent_indent="  ") for short, told in in_words(results)]
    title = (
        "**An easier and a harder drawing of the same classes (less or more jitter, noise and occlusion), with the "
        "settings tuned on glyphs for the longest length**"
    )
    return [title, "\n".join(items)]


def _means(results: pd.DataFrame) -> list[str]:
    """Title, table and note of the means of the losses at each length."""
    losses = results[results["comparison"].isin(LOSS_COMPARISONS)]
    varies = mean_over_runs(losses[losses["method"] == losses["method"].iloc[0]].drop_duplicates("seed")).varies
    order = "tuned before fixed settings, the highest value after the longest training first"
    title = f"Mean test Recall@1 in % (95 % CI over {varies}), {order}:"
    return [title, _means_table(losses), _settings(results, losses), _edges(results)]


def _settings(results: pd.DataFrame, losses: pd.DataFrame) -> str:
    """What the fixed and the tuned settings are."""
    rates = losses.loc[(losses["comparison"] == FIXED) & (losses["iterations"] > 0), "learning_rate"].unique()
    told = (
        f"Fixed: a learning rate of {', '.join(f'{rate:g}' for rate in rates)} for all losses, and the other settings "
        "of the paper of each loss. Our choices are normalised embeddings and margin 1 (contrastive), and margin 0.1 "
        "(quadruplet, a loss of this project). This rate (the paper of the histogram loss: 0.0001, on its "
        "data) is not equally good for all losses."
    )
    grids = chosen_settings(at_length(results))
    grids = grids[grids["comparison"] == TUNED] if len(grids) else grids
    if len(grids):
        sizes = dict(zip(grids["method"], grids["runs of the grid"], strict=True))
        extended = [f"{method} {size}" for method, size in sizes.items() if "+" in size]
        initial = ", ".join(dict.fromkeys(size.partition(" ")[0] for size in sizes.values()))
        told += (
            f" Tuned: chosen on validation classes, from a grid of {initial} runs per loss"
            f"{f'. It is extended where the choice is at an edge: {listed(extended)}' * bool(extended)}. "
            f"{_before_extension(results)}"
            "The intervals do not include the variation of this choice, which rests on one run per setting."
            f"{_better_settings(results)}"
        )
    return fill(told, width=120)


def _before_extension(results: pd.DataFrame) -> str:
    """Means with the settings that the initial grids had chosen, where these are other settings; else ""."""
    tuned, initial = (at_length(results[results["comparison"] == name]) for name in (TUNED, TUNED + INITIAL))
    changed = initial[~initial["run_id"].isin(tuned["run_id"])]
    means = changed.groupby("method", sort=False)["recall@1"].mean()
    shown = [f"{method} {mean:.1f} %" for method, mean in means.items()]
    return f"With the settings that the initial grid chose: {listed(shown)}. " if shown else ""


def _better_settings(results: pd.DataFrame) -> str:
    """Settings that the grids did not choose and that are better on the test classes; else ""."""
    found = better_settings(results)
    shown = [
        f"{row['method']} with {row['better']} has {row['better: recall@1 (%)']:.1f} % after {row['length']:,} "
        f"iterations, with the chosen ones {row['chosen: recall@1 (%)']:.1f} %"
        for row in found[found["comparison"] == TUNED].to_dict("records")
    ]
    found_there = "They are found on the test classes, so the gain is overestimated"
    return f" Settings that were not chosen can be better: {listed(shown)}. {found_there}." if shown else ""


def _means_table(losses: pd.DataFrame) -> str:
    """One row per loss and comparison, and one column per length."""
    lengths = lengths_in(losses)
    means = {
        length: summary(at_length(losses, length), ["recall@1"]).set_index(["comparison", "method"])
        for length in lengths
    }
    last = means[lengths[-1]].sort_values("recall@1", ascending=False)
    columns = [f"after {length:,} iterations" for length in lengths]
    rows = [f"| loss | settings | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(lengths)}"]
    for comparison, settings in SETTINGS.items():
        for method in last.loc[[comparison]].index.get_level_values("method"):
            cells = [_mean(means[length].loc[(comparison, method)]) for length in lengths]
            rows.append(f"| {method} | {settings} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean(row: pd.Series) -> str:
    return shown_mean(row) if row["n"] else ""


def _edges(results: pd.DataFrame) -> str:
    """The losses whose tuned setting is at an edge of its grid."""
    shown = []
    columns = ["comparison", "method", "chosen", "at an edge of its grid"]
    found = chosen_settings(at_length(results)).reindex(columns=columns)
    for _, method, chosen, edges in found[found["comparison"] == TUNED].itertuples(index=False, name=None):
        at_edge = [setting for setting in chosen.split(", ") if setting.split()[0] in edges.split(", ")]
        shown += [f"{method}, {', '.join(at_edge)}"] if at_edge else []
    told = "Tuned values at an edge of the grid after the longest training, beyond which a better value may lie: "
    return fill(f"{told}{'; '.join(shown) or 'none'}.", width=120)


def _table_reading() -> str:
    return fill(
        "Each cell gives a verdict and the difference that decides it, in points of test Recall@1. All runs are on "
        "glyphs, even if the claim names another dataset. Two losses are equivalent if the 90 % confidence interval "
        f'(CI) of their difference lies within {MARGIN}; "A above B" is then not reproduced. Holm: the verdict after '
        "correction for the number of tests, if it differs. The [criteria](claims.md) are those of "
        "`reports/claims.yaml`. The report has all runs: `reports/sample/report.html`.",
        width=120,
    )


def _claims_table(board: pd.DataFrame) -> str:
    """One row per judged claim. A cell with several comparisons has one line each, with the comparison's name."""
    rows = ["| claim of the paper | fixed setting | tuned on validation classes |", "| --- | --- | --- |"]
    for text, verdicts in board[board["verdict"] != NOT_RUN].groupby("text", sort=False):
        tuned = verdicts["comparison"] == TUNED
        rows.append(f"| {str(text).removesuffix('.')} | {_cell(verdicts[~tuned])} | {_cell(verdicts[tuned])} |")
    return "\n".join(rows)


def _cell(verdicts: pd.DataFrame) -> str:
    lines = []
    for _, row in verdicts.iterrows():
        name = f"*{row['comparison']}*: " if len(verdicts) > 1 else ""
        adjusted = f"; Holm: {row['holm']}" * (row["holm"] != row["verdict"])
        lines.append(f"{name}{row['conclusion']}: {drops(row) or typeset(str(row['decisive']))}{adjusted}")
    return "<br>".join(lines)


def typeset(evidence: str) -> str:
    """A part of the evidence with typographic minus signs, and with the unit of its difference.

    Args:
        evidence: the column decisive of `hloss.study.claims.judge`.
    """
    unit = "% of the mass" if evidence.startswith("overlap") else "points"
    evidence = re.sub(r"(: [+-]\d+\.\d)(?= \()", rf"\1 {unit}", evidence)
    return re.sub(r"(?<!\S)-(?=\d)", "−", evidence)
