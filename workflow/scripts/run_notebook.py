"""`run_notebook.py run STUDY RUN_ID [--attempt N] [--own-gpus] | report STUDY`: execute one notebook with papermill."""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys

# Formats of JSON Schema that notebooks do not have; their import takes a second.
UNUSED_FORMATS = ("rfc3987_syntax", "isoduration")


def main() -> None:
    """Execute a run or a report; if the notebook fails, print the last line of the error and exit with 1."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/run_notebook.py", description=__doc__)
    parser.add_argument("kind", choices=["run", "report"], help="one run of a study, or its report")
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("run_id", nargs="?", help="id of the run; required for run, ignored for report")
    parser.add_argument("--attempt", type=int, default=1, help="number of this attempt (default: 1)")
    parser.add_argument("--own-gpus", action="store_true", help="choose and lock GPUs of this machine")
    options = parser.parse_args()
    if options.kind == "run" and not options.run_id:
        parser.error("run needs the id of a run: got none; `make plan` and runs/STUDY/index.html list the runs")
    address = os.environ.pop("HLOSS_STARTER", None)
    status = ask_starter(address) if address else None
    if status is not None:
        sys.exit(status)
    sys.modules.update(dict.fromkeys(UNUSED_FORMATS))  # type: ignore[arg-type]  # None: as if not installed
    from hloss.study.jupyter_kernels import NOTEBOOK_IMPORTS, prepare_kernel

    prepare_kernel(NOTEBOOK_IMPORTS)  # the kernel starts while this process imports the rest
    from hloss.runs.errors import ConfigError, RunError
    from hloss.study.notebooks import execute_report, execute_run, stop_on_signals
    from hloss.study.processes import end_with_parent
    from hloss.study.spec import load_study
    from hloss.study.tuning import resolve_tuning

    end_with_parent()
    stop_on_signals()
    try:
        study = resolve_tuning(load_study(options.study))
        if options.kind == "run":
            execute_run(study, options.run_id, options.attempt, options.own_gpus)
        else:
            execute_report(study)
    except (ConfigError, RunError) as error:
        sys.exit(f"study {options.study}: {error}")


def ask_starter(address: str) -> int | None:
    """Let a process that has imported everything carry out this command (hloss/study/starter.py).

    Returns:
        Exit status of the command; None if no such process does it.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, lambda n, _: connection.send(bytes([n]))) for number in numbers}
        try:
            connection.connect(address)
            request = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
            socket.send_fds(connection, [len(request).to_bytes(8)], [0, 1, 2])
            connection.sendall(request)
            if connection.recv(1) != b"y":
                raise ConnectionRefusedError
        except OSError:
            for number, handler in before.items():
                signal.signal(number, handler)
            return None
        parent = os.getppid()
        connection.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                return ord(connection.recv(1) or b"\1")
    return 1


if __name__ == "__main__":
    main()
