"""Parts of a table of results: the tables of several studies that one report shows together.

A study with `part_of: sample` writes its table to reports/sample/parts/STUDY.parquet when all of its runs are complete.
`make verify RESULTS=reports/sample` repeats runs of each part, and writes STUDY.verified.json beside it.
"""

from collections import defaultdict
from pathlib import Path

import pandas as pd

from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.study.input_files import read_table, write_table
from hloss.study.spec import LOSS_COMPARISONS, STUDIES, load_study
from hloss.study.verified import is_confirmed, read_verified

IN_COMPARISONS = ("comparison", "method", "place")  # columns with one value per comparison of a run


def parts_of(results: Path) -> list[Path]:
    """The parts of a table of results; empty if it has none.

    Args:
        results: reports/NAME/results.parquet, which need not exist.

    Returns:
        The files in reports/NAME/parts, sorted by name.
    """
    return sorted((results.parent / "parts").glob("*.parquet"))


def write_part(name: str, part_of: str, table: pd.DataFrame) -> Path | None:
    """Write the table of a study as a part, if all of its runs are complete.

    Args:
        name: name of the study.
        part_of: name of the folder in reports.
        table: the table of `hloss.study.results.collect`.

    Returns:
        The file; None if a run is missing.
    """
    if not table["complete"].all():
        return None
    file = Path("reports") / part_of / "parts" / f"{name}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, file)
    return file


def merged_parts(results: Path) -> pd.DataFrame:
    """Merge the parts of a table of results.

    Args:
        results: reports/NAME/results.parquet, which need not exist.

    Returns:
        A table as `hloss.study.results.collect` returns it. Its title is that of the study NAME, or lists the parts if
        there is no such study. A run of several parts has one row per length, with all of its comparisons. Parts with
        comparisons between losses come first, others by name.

    Raises:
        ConfigError: if there is no part; if several versions of torch made the parts; if several versions of the code
            made them, and `make verify` has not compared one version with all parts; or if a run differs between two
            parts.
    """
    tables = {file: read_table(file) for file in parts_of(results)}
    if not tables:
        raise ConfigError(f"{results.parent / 'parts'} has no parts; run a study with part_of: {results.parent.name}")
    _check_torch(tables)
    _check_code(tables)
    order = sorted(tables, key=lambda file: (not _has_losses(tables[file]), file.name))
    placed = [_with_places(tables[file], number) for number, file in enumerate(order)]
    table = _concatenated(placed)
    return _joined_runs(table).assign(title=_title(results.parent.name, order))


def _concatenated(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables below each other. A column that is empty in one table has the type that it has in the others."""
    columns = list(dict.fromkeys(name for table in tables for name in table))
    known = {name for name in columns if any(name in table and table[name].notna().any() for table in tables)}
    filled = [table.drop(columns=[n for n in known & {*table} if table[n].isna().all()]) for table in tables]
    return pd.concat(filled, ignore_index=True).reindex(columns=columns)


def _title(name: str, parts: list[Path]) -> str:
    studies = project_path(str(STUDIES))
    if (studies / f"{name}.yaml").exists():
        return load_study(name, studies).title
    return f"Studies {', '.join(file.stem for file in parts)}"


def _has_losses(table: pd.DataFrame) -> bool:
    return bool(set(LOSS_COMPARISONS) & set(table["comparison"].explode()))


def _with_places(table: pd.DataFrame, number: int) -> pd.DataFrame:
    return table.assign(place=[[100_000 * number + place for place in places] for places in table["place"]])


def _check_torch(tables: dict[Path, pd.DataFrame]) -> None:
    versions = {file.stem: ", ".join(sorted(set(table["torch"]))) for file, table in tables.items()}
    if len(set(versions.values())) > 1:
        made = "; ".join(f"{name}: {version}" for name, version in versions.items())
        raise ConfigError(f"parts of several versions of torch cannot be merged: got {made}; run these parts again")


def _check_code(tables: dict[Path, pd.DataFrame]) -> None:
    """Refuse parts unless there is one version of the code that made or verified each of them."""
    compared = {file: set(table["code_sha256"]) for file, table in tables.items()}
    made = set().union(*compared.values())
    accepted = {file: set(codes) if len(codes) == 1 else set() for file, codes in compared.items()}
    for file, codes in accepted.items():
        verified = read_verified(file)
        if verified and is_confirmed(verified):
            codes.add(verified["code_sha256"])
    if not set.intersection(*accepted.values()):
        parts = "; ".join(f"{file.stem}: {', '.join(code[:8] for code in sorted(c))}" for file, c in compared.items())
        raise ConfigError(
            f"parts of {len(made)} versions of the code cannot be merged unless one version was compared with all: got "
            f"{parts}; repeat runs of the parts with `make verify RESULTS={next(iter(tables)).parents[1]}`"
        )


def _joined_runs(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run and length, with the comparisons of all of its rows."""
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position, key in enumerate(zip(table["run_id"], table["length"], strict=True)):
        rows[key].append(position)
    for (run_id, length), (first, *others) in rows.items():
        for other in others:
            _check_same(run_id, length, table.loc[first], table.loc[other])
        for name in IN_COMPARISONS if others else ():
            table.at[first, name] = [value for position in (first, *others) for value in table.at[position, name]]
    return table.loc[[first for first, *_ in rows.values()]].reset_index(drop=True)


def _check_same(run_id: str, length: int, a: pd.Series, b: pd.Series) -> None:
    """Refuse two results of a run with different metrics."""
    names = [name for name in a.index if name.startswith(("recall@", "validation_recall@"))]
    differing = [name for name in names if a[name] != b[name] and pd.notna(a[name])]
    if differing or a["card_sha256"] != b["card_sha256"]:
        raise ConfigError(
            f"run {run_id} at length {length} differs between two parts in {', '.join(differing) or 'its dataset'}: "
            f"run the parts again on one machine (study {b['study']})"
        )
