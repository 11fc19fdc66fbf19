"""`python workflow/scripts/plan_study.py STUDY [--profile P] [--cores N]`: print the runs left and their cost."""

import argparse
import os
import sys
from pathlib import Path

import torch

from hloss.runs.errors import ConfigError, RunError
from hloss.study.devices import visible_devices
from hloss.study.plan import gpu_hours_text, measured_costs, plan_runs, plan_text, read_costs
from hloss.study.profiles import profile_folder, uses_slurm
from hloss.study.results import refuse_mixed_settings
from hloss.study.spec import load_study
from hloss.study.throughput import read_throughput
from hloss.study.tuning import resolve_tuning


def main() -> None:
    """Print the plan of a study."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/plan_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--profile", default="local", help="name of a folder in workflow/profiles (default: local)")
    help = "number of CPU threads at once on this machine (default: number of its CPUs)"
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help=help)
    options = parser.parse_args()
    if options.cores < 1:
        parser.error(f"CORES (--cores) must be at least 1: got {options.cores}")
    try:
        study = resolve_tuning(load_study(options.study))
        refuse_mixed_settings(study)
        cluster = uses_slurm(profile_folder(options.profile))
        known, costs = read_throughput(), read_costs()
    except (ConfigError, RunError) as error:
        sys.exit(f"study {options.study}: {error}")
    gpus = None if cluster else len(visible_devices())
    throughput = known.get(torch.cuda.get_device_name()) if gpus else next(iter(known.values()), None)
    planned = plan_runs(study, gpus, costs | measured_costs(Path("runs")), throughput)
    print(plan_text(study, planned))
    if gpus == 0 and throughput and (estimate := gpu_hours_text(planned, throughput)):
        print(f"\n{estimate}")
    parallel = "the cluster decides how many run at once" if cluster else f"CORES={options.cores} and {gpus} GPUs"
    parallel += f", at most {max(run.resources.runs_per_gpu for run in study.runs)} runs per GPU" if gpus else ""
    print(f"The hours are for runs in sequence; parallel runs divide them ({parallel}).")


if __name__ == "__main__":
    main()
