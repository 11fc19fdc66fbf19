"""`python workflow/scripts/rename_results.py RESULTS.parquet`: rename old settings in a table of results.

For results that were made before settings were renamed (CHANGELOG.md lists the names). Run ids, code hashes and commits
keep their recorded values. A table with current names does not change.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from hloss.runs.config import OLD_NAMES
from hloss.runs.files import atomic_write

OLD_PANEL_KEY, PANEL_KEY = "neighbours", "neighbors"


def main() -> None:
    """Rename the columns of a table of results, in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    table = renamed(pd.read_parquet(file))
    atomic_write(file, lambda part: table.to_parquet(part, index=False))


def renamed(table: pd.DataFrame) -> pd.DataFrame:
    """Rename the columns of settings, and the keys of `panel`, to their current names.

    Args:
        table: a table of results.
    """
    panels = table["panel"].map(_renamed_panel, na_action="ignore")
    return table.rename(columns=OLD_NAMES).assign(panel=panels)


def _renamed_panel(text: str) -> str:
    panel = json.loads(text)
    return json.dumps({PANEL_KEY if key == OLD_PANEL_KEY else key: value for key, value in panel.items()})


if __name__ == "__main__":
    main()
