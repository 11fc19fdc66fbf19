"""`python workflow/scripts/watch_study.py STUDY [--once]`: keep runs/STUDY/index.html up to date until interrupted."""

import argparse
import sys
import time
from contextlib import suppress

from hloss.runs.errors import ConfigError, RunError
from hloss.study.index_page import RELOAD_SECONDS, IndexPage
from hloss.study.spec import load_study
from hloss.study.tuning import resolve_tuning


def main() -> None:
    """Write the index page of a study once, or every `RELOAD_SECONDS`."""
    parser = argparse.ArgumentParser(prog="workflow/scripts/watch_study.py", description=__doc__)
    parser.add_argument("study", help="name of a file in workflow/studies, without .yaml")
    parser.add_argument("--once", action="store_true", help="write the page once and exit")
    options = parser.parse_args()
    try:
        page = IndexPage(resolve_tuning(load_study(options.study)))
        page.write()
        print(page.file, flush=True)
        with suppress(KeyboardInterrupt):
            while not options.once:
                time.sleep(RELOAD_SECONDS)
                page.study = resolve_tuning(load_study(options.study))
                page.write()
    except (ConfigError, RunError) as error:
        sys.exit(f"study {options.study}: {error}")


if __name__ == "__main__":
    main()
