"""What it takes to log a front: seconds a member, end to end, in SQLite and through a server on this machine.

    python scripts/measure_logging.py [--members 32] [--parameters 1000000]

Makes the folder of a finished run of models of that size, and logs it as a run does: weights, exported program and
figures of each member, the model that chooses among them all, registered versions, the explorer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from popmtl.config import TrackingConfig
from popmtl.problems import Problem
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.results import model_file, write_front, write_model
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.server import server

OBJECTIVES = ("left", "right")


class Wide(Problem):
    """Only its model is used: an MLP of about so many parameters, with two heads."""

    objectives = OBJECTIVES

    def __init__(self, parameters: int) -> None:
        self.width = max(1, round(parameters**0.5) - 50)

    def model(self) -> nn.Module:
        layers = nn.Linear(100, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(self.width, 2))

    def example_input(self) -> Tensor:
        return torch.zeros(2, 100)

    def batches(self, seed: int) -> Any:
        raise NotImplementedError

    def evaluation_batches(self, split: str) -> Any:
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError


def finished(storage: Path, members: int, parameters: int) -> tuple[RunFolder, Front]:
    """The folder of a run whose members are all non-dominated."""
    folder = RunFolder.create(storage, "run")
    folder.write_config({"problem": {"name": "measure_logging:Wide", "parameters": parameters}, "seed": 0})
    problem, made = Wide(parameters), []
    for i in range(members):
        write_model(folder, i, problem.model().state_dict())
        share = i / max(1, members - 1)
        made.append(Member(i, [share, 1 - share], [share, 1 - share], {}, "mtgd", True, model_file(i)))
    front = Front(OBJECTIVES, [2.0, 2.0], 2.5, 0, 1000, made)
    write_front(folder, front)
    return folder, front


def log(folder: RunFolder, front: Front, uri: str) -> float:
    """Seconds from the sink's opening to its end."""
    start = time.monotonic()
    weights = [member.weights for member in front.members]
    sink = MlflowSink.open(TrackingConfig(uri=uri), folder, folder.config(), OBJECTIVES, weights, front.steps, "wide")
    sink.log_front(front, "all")
    if complaints := sink.close("FINISHED"):
        raise SystemExit("; ".join(complaints))
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    options = parser.parse_args()
    size = sum(parameter.numel() for parameter in Wide(options.parameters).model().parameters())
    print(f"{options.members} members of {size:,} parameters; load of the machine {os.getloadavg()[0]:.1f}")
    for served in (False, True):
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)  # where a server keeps its artifacts
            storage = Path(place) / "runs"
            folder, front = finished(storage, options.members, options.parameters)
            if served:
                with server(f"sqlite:///{place}/served.db", 5017) as (uri, _):
                    seconds = log(folder, front, uri)
            else:
                log_first = finished(storage.with_name("first"), 1, 1000)  # imports, and the database
                log(*log_first, f"sqlite:///{place}/mlflow.db")
                seconds = log(folder, front, f"sqlite:///{place}/mlflow.db")
            per = seconds / options.members
            print(f"{'server' if served else 'SQLite'}: {seconds:.1f} s in all, {per:.2f} s a member", flush=True)


if __name__ == "__main__":
    main()
