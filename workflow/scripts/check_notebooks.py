"""`python workflow/scripts/check_notebooks.py NOTEBOOK...`: exit with 1 if a notebook was not run in order."""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """Print each notebook that cannot be read, or whose cells were not executed once and in order."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/check_notebooks.py", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="file of an executed notebook")
    problems = [problem for file in parser.parse_args().notebooks if (problem := problem_of(file))]
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


def problem_of(file: Path) -> str:
    """What is wrong with a notebook; "" if its cells were executed in order.

    Args:
        file: the notebook.
    """
    try:
        if is_executed_in_order(file):
            return ""
    except OSError as error:
        return f"{file}: the file cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError):
        return f"{file}: the file is not a Jupyter notebook; name files that end in .ipynb"
    return f"{file}: cells are not executed from top to bottom; restart the kernel, run all cells and save"


def is_executed_in_order(file: Path) -> bool:
    """Whether the code cells of a notebook have the execution counts 1, 2, 3, ...

    Args:
        file: the notebook.
    """
    cells = json.loads(file.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    return counts == list(range(1, len(counts) + 1))


if __name__ == "__main__":
    main()
