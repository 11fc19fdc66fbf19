"""`python workflow/scripts/verify_results.py RESULTS [--runs N] [--seed S]`: repeat runs of a table of results.

RESULTS is a folder with results.parquet or with parts, or the file of a part. Compares the measured values and writes
verified.json, or PART.verified.json for each part, which the report cites. Exits with 1 if a run differs.
"""

import argparse
import sys
from pathlib import Path

from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.study.parts import parts_of
from hloss.study.verified import DIFFERENT, RESULTS, verified_file
from hloss.study.verify import verify


def main() -> None:
    """Verify a table of results, or all of its parts, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder such as reports/sample, or the file of a part")
    parser.add_argument("--runs", type=int, default=5, help="number of runs to repeat, of each part (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draw of these runs (default: 0)")
    options = parser.parse_args()
    whole = options.results / RESULTS
    files = [options.results] if options.results.is_file() else parts_of(whole) or [whole]
    if not files[0].is_file():
        sys.exit(f"RESULTS={options.results} must be a folder with results.parquet or parts, such as reports/sample")
    problems = [problem for file in files if (problem := verify_file(file, options.runs, options.seed))]
    if problems:
        sys.exit("\n".join(problems))


def verify_file(file: Path, runs: int, seed: int) -> str:
    """Verify one table.

    Args:
        file: a results.parquet or a part.
        runs: number of runs to repeat.
        seed: seed of the random draw of these runs.

    Returns:
        The runs that differ as text, or "".

    Raises:
        SystemExit: the table cannot be verified; the message says why.
    """
    try:
        verified = verify(file, runs, seed, lambda line: print(line, flush=True))
    except (ConfigError, DatasetError, RunError) as error:
        sys.exit(f"verify: {error}")
    differing = [run_id for run_id, run in verified["runs"].items() if run["outcome"] == DIFFERENT]
    if differing:
        return f"{len(differing)} of {len(verified['runs'])} runs differ from {file}: {', '.join(differing)}"
    print(f"{len(verified['runs'])} runs agree with {file}; wrote {verified_file(file)}")
    return ""


if __name__ == "__main__":
    main()
