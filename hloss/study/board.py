"""HTML of the board of claims: verdict, claim and decisive difference of each, with details that unfold."""

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd

from hloss.study.claims import DEPENDS, conclusions
from hloss.study.criteria import NOT_RUN, OPEN, REFUTED, REPRODUCED
from hloss.study.intervals import Interval, difference_plot
from hloss.study.report import listed_runs
from hloss.study.tables import listed, signed

# verdict -> class of the style sheet, sign
VERDICTS = {REPRODUCED: ("good", "✓"), REFUTED: ("bad", "✗"), OPEN: ("open", "?"), DEPENDS: ("depends", "⇄")}
# Minimal style for a notebook, which lacks the style sheet of the report's page.
STYLE = """<style>
:where(.claim summary) { display: grid; grid-template-columns: 8.5rem 1fr 18rem; gap: 0 1rem; align-items: start; }
:where(.claim .plot svg, .difference) { display: block; overflow: visible; }
</style>"""


def groups(board: pd.DataFrame) -> list[pd.DataFrame]:
    """The judged rows of each claim, dataset and comparison, the shortest length first; claims not run are left out.

    Args:
        board: the table of `hloss.study.claims.judge`.
    """
    judged = board[board["verdict"] != NOT_RUN]
    return [rows for _, rows in judged.groupby(["claim", "dataset", "comparison"], sort=False, dropna=False)]


def outcome(rows: pd.DataFrame) -> str:
    """The verdict of a claim if it is the same at all lengths, else `DEPENDS`.

    Args:
        rows: an entry of `groups`.
    """
    verdicts = rows["verdict"].unique()
    return DEPENDS if len(verdicts) > 1 else str(verdicts[0])


def counted(verdicts: pd.Series) -> str:
    """Numbers of verdicts, as in "2 reproduced, 1 inconclusive".

    Args:
        verdicts: verdicts other than "not run".
    """
    counts = {name: int((verdicts == name).sum()) for name in (REPRODUCED, REFUTED, OPEN)}
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def board_html(board: pd.DataFrame, links: Mapping[str, str]) -> str:
    """HTML of the board.

    Args:
        board: the table of `hloss.study.claims.judge`.
        links: run id -> HTML, from `hloss.study.report.run_links`.
    """
    judged = groups(board)
    mixed = any((rows["asked"] == "the paper's data").any() for rows in judged)
    claims = [_claim(number, rows, links, mixed) for number, rows in enumerate(judged, 1)]
    return "\n".join([STYLE, '<div class="board">', *claims, _not_run(board), "</div>"])


def _claim(number: int, rows: pd.DataFrame, links: Mapping[str, str], mixed: bool) -> str:
    """A line of the board; `mixed`: some lines are about data that the claim names, and the others say so."""
    last, found = rows.iloc[-1], outcome(rows)
    kind, sign = VERDICTS[found]
    plot = difference_plot(
        [Interval(row.difference, row.low, row.high, bool(row.improving)) for row in _plain(rows)],
        (last["holds above"], last["holds below"]),
        last["margin"],
        _description(rows),
    )
    return (
        f'<details class="claim {kind}" id="claim-{number}"><summary>'
        f'<span class="verdict"><span aria-hidden="true">{sign}</span> {found}{_verdicts(rows)}</span>'
        f'<span class="what">{html.escape(last["text"])} <span class="soft">{_place(rows, mixed)}</span></span>'
        f'<span class="plot">{plot}{_numbers(rows)}</span></summary>{_details(rows, links)}</details>'
    )


def _verdicts(rows: pd.DataFrame) -> str:
    """The verdict at each length, if they differ."""
    if rows["verdict"].nunique() == 1:
        return ""
    lines = (f"{length}: {verdict}" for length, verdict in zip(_lengths(rows), rows["verdict"], strict=True))
    return "".join(f'<span class="difference">{line}</span>' for line in lines)


def _lengths(rows: pd.DataFrame) -> list[str]:
    return [str(text).removesuffix(" iterations") for text in rows["length"] if text]


def _plain(rows: pd.DataFrame) -> list[Any]:
    """The rows with names that are attributes."""
    return list(rows.rename(columns={"still improving": "improving"}).itertuples())


def shown_difference(row: Mapping[Any, Any] | pd.Series, with_unit: bool = True) -> str:
    """A difference with its interval, as in "−3.7 points (95 % CI −4.5 to −2.9)".

    Args:
        row: a row of the table of `hloss.study.claims.judge`.
        with_unit: whether the unit and the confidence are shown: "−3.7 (−4.5 to −2.9)" without them.
    """
    if row["unit"] == "exponent":
        return f"exponent {row['difference']:.2f}"
    text = signed(row["difference"], plus=True) + f" {row['unit']}" * with_unit
    if pd.isna(row["low"]):
        return f"{text} (no interval)"
    low, high = signed(row["low"], plus=True), signed(row["high"], plus=True)
    confidence = f"{row['confidence']:.3g} % CI " * with_unit
    return f"{text} ({confidence}{low} to {high})"


def reason(row: Mapping[Any, Any] | pd.Series) -> str:
    """Why the verdict is not the one that the shown interval suggests, as in ", equivalent"; "" if it is that one.

    Args:
        row: a row of the table of `hloss.study.claims.judge`.
    """
    if row["verdict"] == REPRODUCED:
        return _beyond(row)
    is_equivalent = str(row["decisive"]).endswith(", equivalent)")
    if row["verdict"] == REFUTED:
        return ", equivalent" * is_equivalent
    if row["verdict"] == OPEN and is_equivalent:
        return ", equivalent, but not when corrected for the comparisons of this claim"
    is_outside = row["high"] < row["holds above"] or row["low"] > row["holds below"]
    return ", not significant when corrected for the comparisons of this claim" * (
        row["verdict"] == OPEN and bool(is_outside)
    )


def _beyond(row: Mapping[Any, Any] | pd.Series) -> str:
    """For a claim that only a difference in one direction refutes: that it is large in the other direction."""
    if row["holds above"] == -row["margin"] and row["low"] > row["margin"] and pd.isna(row["holds below"]):
        return ", above by more than the margin"
    if row["holds below"] == row["margin"] and row["high"] < -row["margin"] and pd.isna(row["holds above"]):
        return ", below by more than the margin"
    return ""


def _numbers(rows: pd.DataFrame) -> str:
    """The compared pair and the difference at each length, in the order of the plot's lines."""
    last, several = rows.iloc[-1], rows.to_dict("records")
    if len(several) == 1:
        lines = [compared(last), f"{shown_difference(last)}{reason(last)}"]
    elif len({compared(row) for row in several}) == 1:
        lines = [f"{compared(last)}, {last['unit']}"]
        lines += [f"{row['length']}: {shown_difference(row, with_unit=False)}{reason(row)}" for row in several]
    else:
        lines = [f"{row['length']}, {compared(row)}: {shown_difference(row)}{reason(row)}" for row in several]
    return "".join(f'<span class="difference">{html.escape(line)}</span>' for line in lines)


def compared(row: Mapping[Any, Any] | pd.Series) -> str:
    """The compared pair of the part that decides a verdict, as in "n_bins 200 minus 25 at batch_size 512".

    Args:
        row: a row of the table of `hloss.study.claims.judge`.
    """
    place, _, pair = str(row["decisive"]).rpartition(": ")[0].rpartition(": ")
    return f"{pair}{f' at {place}' * bool(place)}" or "the time grows as a power of the batch size"


def _description(rows: pd.DataFrame) -> str:
    """The plot in words."""
    values = "; ".join(
        f"{compared(row)}: {row['length']}{': ' * bool(row['length'])}{shown_difference(row)}"
        for row in rows.to_dict("records")
    )
    return f"{values}. {_condition(rows.iloc[-1])}"


def _condition(row: pd.Series) -> str:
    low, high = row["holds above"], row["holds below"]
    bounds = [f"above {signed(low)}"] if pd.notna(low) else []
    bounds += [f"below {signed(high)}"] if pd.notna(high) else []
    return f"The claim holds {' and '.join(bounds)}."


def _place(rows: pd.DataFrame, mixed: bool) -> str:
    """Dataset, comparison, lengths and whether runs are still improving, in one line."""
    last = rows.iloc[-1]
    lengths = _lengths(rows)
    suffix = " iterations" * last["length"].endswith(" iterations")
    parts = [last["dataset"]] if last["dataset"] != "any" else ["measured on this machine's CPU"]
    parts[0] += ", not data of the claim" * (mixed and last["asked"] == "other data")
    parts += [last["comparison"]] if last["comparison"] else []
    parts += [f"{listed(lengths)}{suffix}"] if lengths else []
    parts += ["still improving"] if last["still improving"] else []
    return html.escape(" · ".join(parts))


def _details(rows: pd.DataFrame, links: Mapping[str, str]) -> str:
    """The details that unfold: criterion, evidence at each length, corrections, grids and runs."""
    last = rows.iloc[-1]
    items = [
        ("Place in the paper", html.escape(last["section"])),
        ("Asked by the paper about", html.escape(_asked(last))),
        ("Criterion", html.escape(last["criterion"])),
        ("Published", html.escape(last["published"])),
        ("Region", html.escape(f"{_condition(last)}{_margin(last)}")),
        *[(f"Evidence{f', {r.length}' if r.length else ''}", _evidence(r)) for r in _plain(rows)],
        ("Holm", html.escape("; ".join(dict.fromkeys(rows["holm"])))),
        ("Initial grid", html.escape("; ".join(filter(None, dict.fromkeys(rows["initial grid"]))))),
        ("Wider intervals", html.escape("; ".join(filter(None, dict.fromkeys(rows["shared training"]))))),
        ("Runs of the grids", html.escape(last["grids"])),
        ("Still improving", html.escape(last["still improving"])),
        ("Runs", listed_runs(last["run_ids"], links)),
    ]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in items if text)}</dl>"


def _asked(row: pd.Series) -> str:
    return {"the paper's data": "this dataset", "other data": "other data"}.get(row["asked"], "")


def _margin(row: pd.Series) -> str:
    return f" Margin: {row['margin']:g} points." if pd.notna(row["margin"]) else ""


def _evidence(row: Any) -> str:
    """Verdict and every part at one length."""
    return f"<b>{row.verdict}</b><ul>{''.join(f'<li>{html.escape(part)}</li>' for part in row.parts)}</ul>"


def _not_run(board: pd.DataFrame) -> str:
    """The claims that were not judged at any length, as one closed line."""
    known = {(row["claim"], row["dataset"], row["comparison"]) for rows in groups(board) for row in [rows.iloc[-1]]}
    rows = conclusions(board).to_dict("records")
    missing = [row for row in rows if (row["claim"], row["dataset"], row["comparison"]) not in known]
    if not missing:
        return ""
    items = "".join(
        f'<li>{html.escape(row["text"])} <span class="soft">'
        f"{html.escape(' · '.join(filter(None, (row['dataset'], row['comparison'], row['evidence']))))}</span></li>"
        for row in missing
    )
    plural = "verdicts of claims" if len(missing) > 1 else "verdict of a claim"
    return f'<details class="not-run"><summary>{len(missing)} {plural} not run</summary><ul>{items}</ul></details>'
