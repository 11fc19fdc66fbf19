"""`python workflow/scripts/run_study.py STUDY [OPTION...]`: run the incomplete runs of a study.

Invalid settings and missing data are refused before any training. One study runs at a time in a clone.
"""

import argparse
import os
import sys

from hloss.runs.errors import ConfigError, DatasetError, RunError
from hloss.study.processes import end_with_parent
from hloss.study.results import write_results
from hloss.study.runner import run_study
from hloss.study.slurm_queue import SlurmError
from hloss.study.spec import load_study
from hloss.study.tuning import resolve_tuning


def main() -> None:
    """Run a study, or collect its results, from the command line."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/run_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--profile", default="local", help="name of a folder in workflow/profiles (default: local)")
    help = "number of CPU threads at once on this machine (default: number of its CPUs)"
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help=help)
    parser.add_argument("--keep", action="store_true", help="keep results of other code or data; the report says so")
    parser.add_argument("--collect", action="store_true", help="run nothing, only write reports/STUDY/results.parquet")
    options = parser.parse_args()
    if options.cores < 1:
        parser.error(f"CORES (--cores) must be at least 1: got {options.cores}")
    if "MAKELEVEL" in os.environ:
        end_with_parent()
    try:
        study = resolve_tuning(load_study(options.study))
        if options.collect:
            write_results(study, options.keep)
        else:
            run_study(study, options.profile, options.cores, options.keep)
    except (ConfigError, DatasetError, RunError, SlurmError) as error:
        sys.exit(f"study {options.study}: {error}")


if __name__ == "__main__":
    main()
