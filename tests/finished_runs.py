"""Folders of finished runs, made without training."""

from dataclasses import dataclass

from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Figures, Front, Member
from popmtl.runs.results import model_file, write_front, write_model
from popmtl.tracking.mlflow_sink import MlflowSink

OBJECTIVES = ["left", "right digit"]
WEIGHTS = [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]
STEPS = 700
CONFIG = {
    "problem": {"name": "tracked_problems:TwoHeads", "sizes": [1, 2]},
    "seed": 3,
    "note": None,
    "long": "x" * 7000,
}


@dataclass(frozen=True)
class Settings:
    uri: str | None = None
    experiment: str | None = None


def members():
    objectives = [[0.2, 0.9], [0.5, 0.5], [0.6, 0.9]]
    validation = [Figures([x - 0.1 for x in objectives[i]], {"test/accuracy": 0.95}) for i in range(3)]
    return [
        Member(
            i,
            WEIGHTS[i],
            objectives[i],
            {"test/accuracy": 0.9 + i / 100},
            "aligned_mtl",
            i != 2,
            model_file(i),
            validation=validation[i],
        )
        for i in range(3)
    ]


def finished_folder(storage, name, trained, **parameters):
    folder = RunFolder.create(storage, name)
    problem = {"name": "tracked_problems:TwoHeads", **parameters}
    folder.write_config({**CONFIG, "problem": problem})
    for i, model in enumerate(trained):
        write_model(folder, i, model.state_dict())
    front = Front(OBJECTIVES, [1.0, 1.0], 0.3, 3, STEPS, members())
    write_front(folder, front)
    return folder, front


def log_run(storage, name, uri, trained):
    """Logs such a run from its first evaluation to its end; what was complained of, and where it is."""
    folder, front = finished_folder(storage, name, trained)
    sink = MlflowSink.open(Settings(uri), folder, CONFIG, OBJECTIVES, WEIGHTS, STEPS, config_name="digits")
    for step in range(100, STEPS + 1, 100):
        sink.log_evaluation(step, step / 1000, 2, [[1.0, 2.0]] * 3)
    sink.log_front(front, "front")
    return sink.close("FINISHED", timeout=240), sink.location
