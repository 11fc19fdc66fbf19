"""Small studies for tests."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hloss.runs.config import RunConfig
from hloss.study.spec import Entry, Resources, Study, StudyRun, load_study


class SmallStudy(NamedTuple):
    """The content of a study's file, which tests change before loading, and the folder of the file."""

    content: dict[str, Any]
    folder: Path

    def load(self) -> Study:
        """Write small.yaml and load it."""
        (self.folder / "small.yaml").write_text(yaml.safe_dump(self.content))
        return load_study("small", self.folder)

    def tune(self) -> dict[str, Any]:
        """Tune the first entry of the study, in the comparison "tuned losses"; returns its content."""
        self.content["tuning_seed"] = 9
        self.content["runs"][0] |= {"tune": True, "comparison": "tuned losses"}
        return self.content


def study_of(*configs: RunConfig, **resources: Any) -> Study:
    """A study with these runs; their methods are "method 0", "method 1", ..."""
    runs = [
        StudyRun(config, Resources(**{"gpus": 0, **resources}), {"losses": f"method {n}"}, config.dataset)
        for n, config in enumerate(configs)
    ]
    return Study("some", "a title", (), (Entry(tuple(runs)),))
