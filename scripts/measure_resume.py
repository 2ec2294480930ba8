"""Seconds from `popmtl train --resume` to the first new step of a killed run, whose batches take a while to make.

    python scripts/measure_resume.py [--steps 2000] [--milliseconds 20] [--workers 2] [--loaders stateful,plain]

Each loader trains two models, on one actor; the command is killed (SIGKILL, with all that it started) after the
checkpoint at the given step, and resumed. The models are compared with those of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from popmtl.problems import Problem
from popmtl.runs.checkpoint import checkpoint_name, checkpoints
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

BATCH, MORE = 4, 100


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows that each take their time."""

    def __init__(self, rows: int, seconds: float) -> None:
        self.rows, self.seconds = rows, seconds

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        x = torch.randn(6, generator=torch.Generator().manual_seed(row))
        return x, torch.stack([x.sum(), x[0] - x[1]])


class Slow(Problem):
    """Two regressions on them; the first loss of each process adds the time to a file."""

    objectives = ("sum", "difference")
    ideal_point = (0.0, 0.0)
    epochs = True

    def __init__(self, loader: str, seconds: float, workers: int, clock: str) -> None:
        self.loader, self.seconds, self.workers, self.clock = loader, seconds, workers, clock
        self.told = False

    def model(self) -> nn.Module:
        return nn.Linear(6, 2)

    def batches(self, seed: int) -> Any:
        rows, generator = Rows(BATCH * 300, self.seconds / BATCH), torch.Generator().manual_seed(seed)
        kind = StatefulDataLoader if self.loader == "stateful" else DataLoader
        return kind(rows, BATCH, shuffle=True, num_workers=self.workers, generator=generator)

    def evaluation_batches(self, split: str) -> Iterator[Any]:
        rows = Rows(8, 0.0)
        yield tuple(torch.stack(part) for part in zip(*map(rows.__getitem__, range(8)), strict=True))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and not self.told:
            self.told = True
            with open(self.clock, "a") as file:
                file.write(f"{time.time()}\n")
        return (model(batch[0]) - batch[1]).square().mean(0)


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command that can be killed with all that it starts."""
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "popmtl", "train", *arguments]
    out = (folder / "out").open("ab")
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=out, stderr=out)


def kill(process: subprocess.Popen[bytes]) -> None:
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.Error):
            one.send_signal(signal.SIGKILL)
    process.wait()


def measure(loader: str, steps: int, seconds: float, workers: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock = folder / "clock"
        config = {
            "problem": {
                "name": "measure_resume:Slow", "loader": loader, "seconds": seconds, "workers": workers,
                "clock": str(clock),
            },
            "population": {"subproblems": 2},
            "train": {"steps": steps + MORE, "evaluate_every": steps, "execution": "loop"},
            "checkpoint": {"every_steps": steps},
            "resources": {"max_actors": 1, "gpus_per_actor": 0},
            "tracking": {"enabled": False},
        }  # fmt: skip
        (folder / "slow.yaml").write_text(json.dumps(config))
        if start(folder, "slow.yaml", "--run-name", "undisturbed").wait():
            raise SystemExit((folder / "out").read_text())
        process, run = start(folder, "slow.yaml", "--run-name", "killed"), folder / "runs" / "killed"
        while not ((run / "events.jsonl").exists() and checkpoints(RunFolder(run))):
            if process.poll() is not None:
                raise SystemExit((folder / "out").read_text())
            time.sleep(0.01)
        kill(process)
        assert checkpoints(RunFolder(run)) == [checkpoint_name(steps)]
        clock.write_text("")
        began = time.time()
        if start(folder, "--resume", "runs/killed").wait():
            raise SystemExit((folder / "out").read_text())
        plan, first = (float(line) for line in clock.read_text().split())
        events = {event["kind"]: event for event in RunFolder(run).events()}
        resumed, ready = (datetime.fromisoformat(events[kind]["time"]).timestamp() for kind in ("resumed", "ready"))
        again = events.get("batches drawn again", {"draws": 0, "seconds": 0.0})
        files = [
            f"runs/{which}/pareto/models/{i}/model.safetensors" for i in range(2) for which in ("undisturbed", "killed")
        ]
        a, b, c, d = (load_state(folder / file) for file in files)
        same = all(torch.equal(x[key], y[key]) for x, y in ((a, b), (c, d)) for key in x)
        return (
            f"{loader}: {first - began:.1f} s from the command to the first new step, of which the plan takes "
            f"{plan - began:.1f}; {first - resumed:.1f} from coordinator's start, {first - ready:.2f} from actors on; "
            f"{again['draws']} draws again in {again['seconds']:.1f} s; {'bit for bit' if same else 'DIFFERENT'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loaders", default="stateful,plain")
    options = parser.parse_args()
    for loader in options.loaders.split(","):
        print(measure(loader, options.steps, options.milliseconds / 1000, options.workers), flush=True)


if __name__ == "__main__":
    main()
