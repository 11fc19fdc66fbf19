"""`python workflow/scripts/check_notebooks.py NOTEBOOK...`: exit with 1 if a notebook was not run in order."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print each notebook whose cells were not executed once and in order."""
    wrong = [file for file in sys.argv[1:] if not is_executed_in_order(Path(file))]
    for file in wrong:
        print(f"{file}: cells are not executed from top to bottom; restart the kernel, run all cells and save")
    sys.exit(bool(wrong))


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
