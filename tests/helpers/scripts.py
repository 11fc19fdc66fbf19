"""Execute a script of `workflow/scripts` in this process: imports, which take seconds in a new one, are done."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


def run_script(name: str, *arguments: str) -> CompletedProcess[str]:
    """Return the exit status and the output of `python workflow/scripts/NAME ARGUMENTS...`."""
    command = [str(SCRIPTS / name), *arguments]
    code: object = 0
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
        try:
            with patch.object(sys, "argv", command):
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    return CompletedProcess(command, code if isinstance(code, int) else 1, printed.getvalue(), errors.getvalue())
