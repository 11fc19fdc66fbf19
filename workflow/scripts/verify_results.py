"""`python workflow/scripts/verify_results.py FOLDER [--runs N] [--seed S]`: repeat runs of FOLDER/results.parquet.

Compares the measured values and writes FOLDER/verified.json, which the report cites. Exits with 1 if a run differs.
"""

import argparse
import sys
from pathlib import Path

from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.study.verify import DIFFERENT, verify


def main() -> None:
    """Verify the results of a folder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results.parquet, such as reports/sample")
    parser.add_argument("--runs", type=int, default=5, help="number of runs to repeat")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draw of these runs")
    options = parser.parse_args()
    file = options.folder / "results.parquet"
    if not file.is_file():
        sys.exit(f"RESULTS={options.folder} must be a folder with results.parquet, such as reports/sample")
    try:
        verified = verify(file, options.runs, options.seed, lambda line: print(line, flush=True))
    except (ConfigError, DatasetError, RunError) as error:
        sys.exit(f"verify: {error}")
    differing = [run_id for run_id, run in verified["runs"].items() if run["outcome"] == DIFFERENT]
    if differing:
        sys.exit(f"{len(differing)} of {len(verified['runs'])} runs differ from {file}: {', '.join(differing)}")
    print(f"{len(verified['runs'])} runs agree with {file}; wrote {file.with_name('verified.json')}")


if __name__ == "__main__":
    main()
