"""`python tests/helpers/killing.py CONFIG.json KILLS SEED`: kill a run repeatedly with SIGKILL, then let it finish.

Each attempt is a child forked from this process, which has imported everything and computed nothing. A quarter of them
is killed from outside after a random time; the others kill themselves at a random checkpoint: amid its bytes, or before
or after one of its renames. Prints a line of JSON per attempt and per line of the run that is let go to its end.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms.v2  # noqa: F401  # Each child would import it.

from hloss.runs import checkpoints
from hloss.runs.config import RunConfig, parse_config
from hloss.runs.run import run

MOMENTS = ("at a random time", "in a checkpoint's bytes", "before a rename", "after a rename")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, count: int) -> None:
    """Make this process kill itself at the `count`-th such event."""
    left = count

    def is_time() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    whole_save, whole_replace = torch.save, Path.replace

    def save(content: object, file: Path) -> None:
        whole_save(content, file)
        if is_time():
            os.truncate(file, random.randrange(file.stat().st_size))
            die()

    def replace(path: Path, target: Path) -> Path:
        now = "checkpoint" in path.name and is_time()
        if now and moment == "before a rename":
            die()
        answer = whole_replace(path, target)
        if now:
            die()
        return answer

    if moment == "in a checkpoint's bytes":
        checkpoints.torch.save = save
    elif moment != "at a random time":
        Path.replace = replace


def attempt(config: RunConfig, moment: str, random_moment: random.Random) -> int:
    """Execute the run in a child process that is killed; return the wait status."""
    child = os.fork()
    if child == 0:
        random.seed(random_moment.random())
        arm(moment, random_moment.randint(1, 8))
        with open(config.folder.parent / "lines", "a") as lines:
            run(config, lambda line: print(line, file=lines, flush=True))
        os._exit(0)
    if moment == "at a random time":
        time.sleep(random_moment.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Kill the run several times, then let it finish."""
    config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
    random_moment = random.Random(int(sys.argv[3]))
    config.folder.parent.mkdir(parents=True)
    for number in range(int(sys.argv[2])):
        moment = MOMENTS[number % len(MOMENTS)]
        status = attempt(config, moment, random_moment)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        left = sorted(file.name for file in config.folder.glob("*checkpoint*"))
        print(json.dumps({"moment": moment, "killed": killed, "left": left}), flush=True)
    run(config, lambda line: print(json.dumps({"line": line}), flush=True))


if __name__ == "__main__":
    main()
