"""Index pages of studies in each state, without training."""

from pathlib import Path

from hloss.runs.config import parse_config
from hloss.study.index_page import RunState, page
from tests.helpers.studies import study_of

NUMBERS = {"iteration": 300, "iterations": 600, "loss": 0.2512, "images_per_second": 1234.0, "seconds_left": 95.0}
CURVE = [[50, 0.41], [100, 0.55], [200, 0.61], [300, 0.66]]
RESULT = {"metrics": {"recall@1": 0.683}, "training_seconds": 190.0}
MESSAGE = "RunError: the loss is not finite in iteration 212: got nan; a smaller learning_rate may help"


def index_page(folder: Path, complete: int = 0, running: int = 0, failed: int = 0, to_do: int = 0) -> str:
    """HTML of the index page of a study with these numbers of runs.

    Args:
        folder: folder of the page.
        complete: number of complete runs.
        running: number of runs at work; the last is starting.
        failed: number of failed runs.
        to_do: number of runs to do.
    """
    names = ["complete"] * complete + ["running"] * running + ["failed"] * failed + ["to do"] * to_do
    losses = ("histogram", "binomial", "lifted", "triplet")
    settings = [{"loss": losses[n % 4], "seed": n, "runs_dir": str(folder)} for n in range(len(names))]
    study = study_of(*map(parse_config, settings))
    states = [
        RunState(
            run,
            name,
            MESSAGE if name == "failed" else "",
            {} if name == "to do" or n == complete + running - 1 else NUMBERS | {"validations": CURVE},
            RESULT if name == "complete" else None,
        )
        for n, (run, name) in enumerate(zip(study.runs, names, strict=True))
    ]
    return page(study, states, folder, 200.0 if running else None)
