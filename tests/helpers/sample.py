"""The committed results: one table, or the tables of several parts."""

import shutil
from pathlib import Path

import pandas as pd

from hloss.study.parts import merged_parts, parts_of

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "reports" / "sample"
RESULTS = SAMPLE / "results.parquet"  # need not exist if there are parts
PARTS = parts_of(RESULTS)
STUDY = "sample" if PARTS else "glyphs"  # the study that made the results


def sample_table() -> pd.DataFrame:
    """The table as `make study` writes it, one row per run and length; parts are merged."""
    return merged_parts(RESULTS) if PARTS else pd.read_parquet(RESULTS)


def sample_rows() -> pd.DataFrame:
    """One row per run, comparison and length on glyphs, read with pandas alone; metrics are fractions."""
    table = pd.concat([pd.read_parquet(file) for file in PARTS or [RESULTS]], ignore_index=True)
    if "length" not in table:  # an older table
        table["length"] = table["iterations"]
    rows = table[table["dataset"] == "glyphs"].explode(["comparison", "method"], ignore_index=True)
    return rows.drop_duplicates(["comparison", "method", "run_id", "length"])


def copy_results(folder: Path) -> None:
    """Copy the sample without its page and figures.

    Args:
        folder: an existing folder.
    """
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("*.html", "*.png", "tables"), dirs_exist_ok=True)


def number(value: float, decimals: int = 1, plus: bool = False) -> str:
    """A number as reports show it, with a typographic minus sign; zero has none.

    Args:
        value: the number.
        decimals: decimals to show.
        plus: whether a number that is not negative has a plus sign.
    """
    rounded = round(value, decimals) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:{'+' * plus}.{decimals}f}".replace("-", "−")
