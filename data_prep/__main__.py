"""`python -m data_prep NAME [--out data/NAME]`: turn a source into a prepared dataset."""

import argparse
import sys
from pathlib import Path

from data_prep import glyphs
from data_prep.prepared import PreparationError


def main() -> None:
    """Prepare one dataset from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    parser.add_argument("name", choices=["glyphs"])
    parser.add_argument("--out", type=Path, help="folder to write (default data/NAME)")
    options = parser.parse_args()
    out = options.out or Path("data") / options.name
    try:
        card = glyphs.prepare(out)
    except PreparationError as error:
        sys.exit(f"data_prep {options.name}: {error}")
    print(f"{out}: {card['images']} images of {sum(card['classes'].values())} classes, {card['classes']}")


if __name__ == "__main__":
    main()
