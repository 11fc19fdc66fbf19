"""`python workflow/scripts/rename_results.py RESULTS.parquet [--title TITLE]`: rename settings in a table of results.

Use it for results from before settings were renamed (CHANGELOG.md lists the names), or for a new title of the study.
Values, run ids, code hashes and commits do not change, so the verified.json beside the table stays valid.
"""

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path

import pandas as pd

from hloss.runs.config import OLD_NAMES
from hloss.runs.errors import ConfigError
from hloss.runs.files import atomic_write
from hloss.study.input_files import read_table, write_table
from hloss.study.verified import read_verified, verified_file

OLD_PANEL_KEY, PANEL_KEY = "neighbours", "neighbors"


def main() -> None:
    """Rename the columns of a table of results, in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="table such as reports/sample/results.parquet")
    parser.add_argument("--title", help="new title of the study (default: the present one)")
    options = parser.parse_args()
    try:
        verified = read_verified(options.file) if options.file.is_file() else None
        table = renamed(read_table(options.file), options.title)
    except ConfigError as error:
        sys.exit(str(error))
    write_table(table, options.file)
    if verified:
        verified["results_sha256"] = sha256(options.file.read_bytes()).hexdigest()
        atomic_write(verified_file(options.file), lambda part: part.write_text(json.dumps(verified, indent=1) + "\n"))


def renamed(table: pd.DataFrame, title: str | None = None) -> pd.DataFrame:
    """Rename the columns of settings, and the keys of `panel`, to their current names.

    Args:
        table: a table of results.
        title: new title of the study; None: the title stays.

    Returns:
        The renamed table.
    """
    panels = table["panel"].map(_renamed_panel, na_action="ignore")
    table = table.rename(columns=OLD_NAMES).assign(panel=panels)
    return table if title is None else table.assign(title=title)


def _renamed_panel(text: str) -> str:
    panel = json.loads(text)
    return json.dumps({PANEL_KEY if key == OLD_PANEL_KEY else key: value for key, value in panel.items()})


if __name__ == "__main__":
    main()
