"""`python workflow/scripts/write_readme_results.py [--check]`: write the results section of README.md.

The section is generated from reports/sample. With --check nothing is written, and the exit status is 1 if the section
is out of date.
"""

import argparse
import sys
from pathlib import Path

from hloss.runs.errors import ConfigError
from hloss.study.readme import update_readme

SAMPLE = Path("reports/sample")


def main() -> None:
    """Write or check the results section, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare: exit with 1 if the section is out of date")
    check = parser.parse_args().check
    try:
        up_to_date = update_readme(Path("README.md"), SAMPLE, check)
    except ConfigError as error:
        sys.exit(str(error))
    if check and not up_to_date:
        sys.exit("README.md: the results section is out of date; run workflow/scripts/write_readme_results.py")


if __name__ == "__main__":
    main()
