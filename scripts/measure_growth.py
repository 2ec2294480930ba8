"""What a long run's files and memory grow by: checkpoints, the course, the journal for MLflow, and reading them.

    python scripts/measure_growth.py [--evaluations 20000] [--subproblems 2]

Follows a course through so many evaluations without training anything, as a coordinator does: it writes metrics.jsonl
and the journal, of which MLflow takes each entry at once, and ten checkpoints.
"""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from popmtl.display import print_runs
from popmtl.method.course import Course
from popmtl.runs import checkpoint
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import hypervolumes
from popmtl.tracking.outbox import Outbox

M, CHECKPOINTS = 2, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--subproblems", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        measure(RunFolder.create(storage, "run"), options.evaluations, options.subproblems)


def measure(folder: RunFolder, evaluations: int, n: int) -> None:
    folder.write_config({"seed": 0})
    W = np.full((n, M), 1 / M)
    course = Course(W, np.eye(n), np.ones(evaluations), 1, [0.0] * M, [2.0] * M)
    outbox = Outbox(folder, [], ["sqlite:///none.db", "experiment", None])
    draw = np.random.default_rng(0)
    evaluating, before = 0.0, len(pickle.dumps(course))
    print(f"{evaluations} evaluations of {n} subproblems\nevaluations  JSON of a checkpoint  to write it  course")
    for number in range(1, evaluations + 1):
        F = draw.random((n, M)) + 1 / (1 + number)
        start = time.process_time()
        seen = course.observe(F)
        evaluating += time.process_time() - start
        figures = {"hypervolume": seen.hypervolume, "hypervolume_error": None, "front_size": seen.front_size}
        folder.append_metrics({"stage": "mtgd", "step": seen.step, **figures, "validation": F, "metrics": {}})
        outbox.add("evaluation", {"step": seen.step, **figures, "losses": F, "metrics": {}}, f"evaluation {number}")
        outbox.done()
        if number % (evaluations // CHECKPOINTS) == 0:
            size, seconds = write_checkpoint(folder, course, number)
            memory = len(pickle.dumps(course)) - before
            figures = f"{size / 1000:17.1f} kB {seconds * 1000:8.1f} ms {memory / 1000:7.1f} kB"
            print(f"{number:11d} {figures}", flush=True)
        if chunk := course.next_chunk():
            course.advance(chunk)
    print(f"an evaluation: {evaluating / evaluations * 1000:.2f} ms of a processor, with the hypervolume")
    journal = (folder.path / "tracking" / "outbox.jsonl").stat().st_size
    outbox.save()
    cursor = (folder.path / "tracking" / "sent.json").stat().st_size
    print(f"journal: {journal / evaluations:.0f} bytes an evaluation; cursor: {cursor} bytes")
    for what, read in (
        ("the explorer's hypervolumes", lambda: hypervolumes(folder)),
        ("all lines of metrics.jsonl", folder.metrics),
        ("the run in a list of runs", lambda: print_runs(Console(file=io.StringIO()), [folder])),
    ):
        read()  # what is imported or made once
        start = time.process_time()
        read()
        print(f"{what}: {(time.process_time() - start) * 1000:.0f} ms of a processor")


def write_checkpoint(folder: RunFolder, course: Course, step: int) -> tuple[int, float]:
    """Writes a checkpoint; its bytes of JSON, and the seconds that its commit took."""
    name = checkpoint.checkpoint_name(step)
    files = [
        checkpoint.write_tensors(folder, f"{name}/{checkpoint.subproblem_file(i)}", {"row": torch.zeros(1)}, {})
        for i in range(len(course.W))
    ]
    start = time.perf_counter()
    record = {"step": course.step, "fine_tuned": None, "executions": ["loop"], "untrained": {}, "best": None}
    checkpoint.commit(folder, name, files, {**record, "course": course.state(), "identity": {}})
    seconds = time.perf_counter() - start
    return sum(path.stat().st_size for path in Path(folder.path / name).glob("*.json")), seconds


if __name__ == "__main__":
    main()
