"""Results in words: which claims are reproduced, not reproduced, inconclusive, or depend on the training length.

Each verdict of the board is in one group. A verdict that differs between lengths is in the group `DEPENDS`; the others
are described at the longest length.
"""

import html
import re
from typing import NamedTuple

import pandas as pd

from hloss.study.answer import reach_of_counts
from hloss.study.board import VERDICTS, compared, counted, groups, outcome, reason, shown_difference
from hloss.study.claims import DEPENDS
from hloss.study.criteria import OPEN, REFUTED, REPRODUCED
from hloss.study.spec import LOSS_COMPARISONS
from hloss.study.tables import listed, signed

TITLES = {  # outcome -> title of its group, in the order of the groups
    REPRODUCED: "Reproduced",
    REFUTED: "Not reproduced",
    DEPENDS: "Depends on the training length",
    OPEN: "Inconclusive",
}
EVERY = {REPRODUCED: " at every length", REFUTED: " at any length", OPEN: " at every length"}
SETTINGS = dict(zip(LOSS_COMPARISONS, ("fixed setting", "tuned"), strict=True))
ESTIMATE = (
    "The number of seeds is an estimate from the present mean and spread. The mean changes with more seeds, so up to "
    "half of the studies with this number would be inconclusive again. Plan for more seeds. Seeds with test classes of "
    "their own are limited by the number of classes; more of them need another dataset."
)


class Finding(NamedTuple):
    """A verdict in words.

    Attributes:
        number: place on the board, from 1.
        claim: the claim, without its full stop.
        name: dataset and comparison, if other verdicts on the claim have another one; "fixed setting" or "tuned" if the
            board has both; else "".
        told: the decisive difference in words; for an open verdict, the estimated number of seeds that it needs; and
            other verdicts on the claim that are in another group.
        verdict: the verdict after the longest length.
        lengths: number of lengths.
        is_improving: whether runs of the longest length are still improving; None for a verdict without runs.
    """

    number: int
    claim: str
    name: str
    told: str
    verdict: str
    lengths: int
    is_improving: bool | None


def findings(board: pd.DataFrame) -> dict[str, list[Finding]]:
    """The verdicts of a board in groups.

    Args:
        board: the table of `hloss.study.claims.judge`, or that of `hloss.study.claims.read_board`.

    Returns:
        Each key of `TITLES`, with its verdicts in the order of the board. Claims that were not run are left out.
    """
    judged = groups(board)
    both = set(LOSS_COMPARISONS) <= {rows["comparison"].iloc[-1] for rows in judged}
    found: dict[str, list[Finding]] = {name: [] for name in TITLES}
    for number, rows in enumerate(judged, 1):
        last = rows.iloc[-1]
        of_claim = [other for other in judged if other.iloc[-1]["text"] == last["text"]]
        lasts = [other.iloc[-1] for other in of_claim]
        other_verdicts = [
            f"{_name(other, lasts, both)}: {other['verdict']}"
            for of_other, other in zip(of_claim, lasts, strict=True)
            if outcome(of_other) != outcome(rows) and other["verdict"] != last["verdict"]
        ]
        found[outcome(rows)].append(
            Finding(
                number,
                last["text"].removesuffix("."),
                _name(last, lasts, both),
                _told(rows) + f". But {'; '.join(other_verdicts)}" * bool(other_verdicts),
                last["verdict"],
                len(rows),
                bool(last["still improving"]) if last["run_ids"] else None,
            )
        )
    return found


def _name(row: pd.Series, others: list[pd.Series], both: bool) -> str:
    """Dataset and comparison of a verdict, as in `Finding`; `both`: the board has fixed and tuned settings."""
    differ = {column: len({other[column] for other in others}) > 1 for column in ("dataset", "comparison")}
    name = [row["dataset"]] if differ["dataset"] else []
    if differ["comparison"] or (both and row["comparison"] in SETTINGS):
        name += [SETTINGS.get(row["comparison"], row["comparison"])]
    return ", ".join(name)


def _told(rows: pd.DataFrame) -> str:
    last = rows.iloc[-1]
    verdicts = f"{_verdicts(rows)}. At the longest length " if outcome(rows) == DEPENDS else ""
    take = f"; needed to decide it: {last['needed']}" * bool(last["needed"])
    take += f"; Holm: {last['holm']}" * (last["holm"] != last["verdict"])
    told = drops(last) or f"{compared(last)}: {shown_difference(last)}{reason(last)}"
    return f"{verdicts}{told}{take}"


def drops(row: pd.Series) -> str:
    """For a claim on little tuning, the drop of each loss, as its parts are refuted in opposite directions; else "".

    Args:
        row: a row of the table of `hloss.study.claims.judge`.
    """
    found = re.findall(r"([^;]+), (best of \d+ random settings .*?): (-?[\d.]+) \(", str(row["evidence"]))
    if not found:
        return ""
    points = [f"{loss.strip()} {signed(float(drop), plus=True)} points" for loss, _, drop in found]
    method, measured, _ = found[0]
    rule = f"Reproduced if {method} alone drops by less than {row['margin']:g} points"
    return f"{measured}: {listed(points)}. {rule}; the condition on the other loss is ours, not the paper's"


def _verdicts(rows: pd.DataFrame) -> str:
    """Each verdict with its lengths, as in "reproduced after 200 and 600 iterations, not reproduced after 2,000"."""
    numbers, units = zip(*(text.split() for text in rows["length"]), strict=True)
    by_verdict = rows.assign(length=numbers).groupby("verdict", sort=False)["length"].agg(list)
    told = [f"{verdict} after {listed(lengths)}" for verdict, lengths in by_verdict.items()]
    return ", ".join([f"{told[0]} {units[0]}", *told[1:]])


def heading(name: str, group: list[Finding]) -> str:
    """Title of a group with the number of its verdicts.

    Args:
        name: a key of `TITLES`.
        group: its verdicts.
    """
    title = TITLES[name] + EVERY.get(name, "") * any(found.lengths > 1 for found in group)
    number = f"{len(group) or 'no'} verdict{'s' * (len(group) != 1)}"
    claims = len({found.claim for found in group})
    number += f" on {claims} claim{'s' * (claims != 1)}" * (claims != len(group))
    still = _improving(group)
    which = "" if len(group) == 1 else "each " if still == len(group) else f"{still} "
    if name == DEPENDS and group:
        number += f" (at the longest length {counted(pd.Series([found.verdict for found in group]))})"
    return f"{title}: {number}{f', {which}with runs that are still improving' * bool(still)}"


def _improving(group: list[Finding]) -> int:
    return sum(found.is_improving is True for found in group)


def lines(group: list[Finding]) -> list[tuple[int, str, list[str]]]:
    """A line per claim of a group.

    Args:
        group: a value of `findings`.

    Returns:
        The number of the claim's first verdict on the board, the claim, and each of its verdicts in words.
    """
    of_claim: dict[str, list[Finding]] = {}
    for found in group:
        of_claim.setdefault(found.claim, []).append(found)
    usual = _improving(group) > len(group) / 2
    return [
        (several[0].number, claim, [_part(found, usual) for found in several]) for claim, several in of_claim.items()
    ]


def _part(found: Finding, usual: bool) -> str:
    """A verdict in words, with its name; and whether runs are still improving, unless it is as usual in its group."""
    name = f"{found.name}: " * bool(found.name)
    told = "; runs are still improving" if found.is_improving else "; no run is still improving"
    return f"{name}{found.told}{told * (found.is_improving is not None and found.is_improving != usual)}"


def note(name: str, board: pd.DataFrame) -> str:
    """A note below a group; "" if it needs none.

    Args:
        name: a key of `TITLES`.
        board: the table of `findings`.
    """
    judged = groups(board)
    if name == DEPENDS and judged and all(len(rows) == 1 for rows in judged):
        return "One length was measured."
    takes = any(outcome(rows) == name and rows["needed"].iloc[-1] for rows in judged)
    return ESTIMATE if takes else ""


def findings_html(board: pd.DataFrame) -> str:
    """HTML of the groups, each a list that can be closed, below what limits their counts.

    Args:
        board: the table of `hloss.study.claims.judge`.
    """
    found = findings(board)
    if not any(found.values()):
        return '<p class="findings">No claim can be judged by these runs. The list below has the missing runs.</p>'
    limits = [f"<p>{html.escape(str(part))}</p>" for part in reach_of_counts(board)]
    return "\n".join([*limits, *(_group_html(name, group, note(name, board)) for name, group in found.items())])


def _group_html(name: str, group: list[Finding], note: str) -> str:
    kind, sign = VERDICTS[name]
    title = f'<b><span aria-hidden="true">{sign}</span> {html.escape(heading(name, group))}</b>'
    items = "".join(
        f'<li><a href="#claim-{number}">{html.escape(claim)}</a>: {html.escape("; ".join(told))}</li>'
        for number, claim, told in lines(group)
    )
    told = f'<p class="soft">{html.escape(note)}</p>' * bool(note)
    if not group:
        return f'<div class="findings {kind}">{title}{told}</div>'
    return f'<details class="findings {kind}" open><summary>{title}</summary><ul>{items}</ul>{told}</details>'
