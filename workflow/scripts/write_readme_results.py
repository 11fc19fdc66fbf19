"""`python workflow/scripts/write_readme_results.py [--check]`: write the results of README.md and docs/results.md.

They are generated from reports/sample. With --check nothing is written, and the exit status is 1 if a file is out of
date.
"""

import argparse
import sys
from pathlib import Path

from hloss.runs.errors import ConfigError
from hloss.study.readme import update_results

SAMPLE = Path("reports/sample")


def main() -> None:
    """Write or check the results, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare: exit with 1 if a file is out of date")
    check = parser.parse_args().check
    try:
        outdated = update_results(Path(), SAMPLE, check)
    except ConfigError as error:
        sys.exit(str(error))
    if check and outdated:
        sys.exit(f"{', '.join(outdated)}: the results are out of date; run workflow/scripts/write_readme_results.py")


if __name__ == "__main__":
    main()
