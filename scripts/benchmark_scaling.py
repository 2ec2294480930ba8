"""How training scales with the number of subproblems, and what the actors' memory and the coordinator cost.

    python scripts/benchmark_scaling.py [--actors P]

Trains whole runs on a Ray that it starts, with transfer at every step and an evaluation at the start and at the end,
on random images with two labels: a LeNet and an MLP of about 1e6 parameters, batches of 64, N = 8, 16 and 32; and zdt1,
whose steps are so cheap that the coordinator's share is largest. With GPUs, each actor has one. The bound is the bytes
that a step moves for one row, over the bandwidth of a plain copy: parameters, gradients and moments read and written
once, and the exchange's three: rows read, displacements written and read again. The work of the layers is not in it.
Runs of different N are compared by their fastest chunk of steps, since others may use the machine: figures count only
where the actors had about a core each.
Memory is the actors' proportional set size (host memory), the most that was seen in training. The slope over N contains
all that comes with a row, activations and data included; the plan counts rows, gradients, moments and mixing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from benchmark_mixing import GPUS, ITEMSIZE, copy_bandwidth, cores, device_of, show
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from popmtl.config import Config
from popmtl.distributed import driver
from popmtl.distributed.placement import Nodes
from popmtl.distributed.plan import RunPlan, make_plan
from popmtl.distributed.progress import Progress
from popmtl.method.decomposition import weight_vectors
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.models.shared_trunk import lenet, mlp
from popmtl.problems import Problem
from popmtl.runs.folder import RunFolder

NS = (8, 16, 32)
ROW_STEPS = {"lenet": 960, "mlp": 1600}  # of a run: as many for each N
ZDT1_STEPS = 4000
CANVAS, CLASSES, IMAGES, BATCH = 36, 10, 512, 64


class RandomDigits(Problem):
    """Random images with two random labels."""

    objectives = ("left", "right")
    reference_point = (3.0, 3.0)
    ideal_point = (0.0, 0.0)

    def __init__(self, model: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(IMAGES, 1, CANVAS, CANVAS, generator=generator)
        self.labels = torch.randint(CLASSES, (IMAGES, 2), generator=generator)
        self.build = partial({"lenet": lenet, "mlp": mlp}[model], CANVAS, {"lenet": 50, "mlp": 540}[model], 2, CLASSES)

    def model(self) -> nn.Module:
        """A trunk and two heads."""
        return self.build()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images drawn by the seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(IMAGES, (BATCH,), generator=generator)
            yield self.images[rows], self.labels[rows]

    def evaluation_batches(self, split: str) -> list[tuple[Tensor, Tensor]]:
        """One small batch."""
        return [(self.images[:BATCH], self.labels[:BATCH])]

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy of each label."""
        logits = model(batch[0])
        return torch.stack([cross_entropy(logits[:, task], batch[1][:, task]) for task in range(2)])


def make(problem: dict, N: int, steps: int, actors: int | None, nodes: Nodes) -> RunPlan:
    train = {"steps": steps, "evaluate_every": steps, "execution": "loop", "optimizer": {"name": "Adam", "lr": 1e-4}}
    config = {
        "problem": problem,
        "population": {"subproblems": N},
        "train": train,
        "transfer": {"schedule": "constant"},
        "resources": {"max_actors": actors},
        "tracking": {"enabled": False},
        "recovery": {"max_failures": 0},
    }
    return make_plan(Config.model_validate(config), nodes)


class Watch:
    """Looks at a run whenever its progress is shown.

    Attributes:
        bytes: the most that its actors took in training, together.
        ends: of the chunks of steps that were seen: steps, and seconds until then.
        used: the clock, and the processor seconds of the actors, at each look.
    """

    def __init__(self) -> None:
        self.actors: list[int] = []
        self.bytes = 0
        self.ends: dict[int, float] = {}
        self.used: list[tuple[float, float]] = []

    def show(self, progress: Progress) -> None:
        """Looks."""
        if progress.stage == "training":
            self.actors = self.actors or actor_processes()
            self.bytes = max(self.bytes, sum(map(proportional_set_size, self.actors)))
            self.used.append((time.monotonic(), sum(map(processor_seconds, self.actors))))
            if progress.steps_per_second:
                self.ends[progress.step] = progress.step / progress.steps_per_second

    def best(self) -> float:
        """Seconds of a step in the fastest chunk that is not a short one."""
        chunks = [(b - a, self.ends[b] - self.ends[a]) for a, b in itertools.pairwise(sorted(self.ends))]
        longest = max((steps for steps, _ in chunks), default=0)
        return min((seconds / steps for steps, seconds in chunks if 2 * steps >= longest), default=math.nan)

    def cores(self) -> float:
        """That the actors had in training, on average."""
        (start, before), (end, after) = self.used[0], self.used[-1]
        return (after - before) / (end - start) if end > start else math.nan


def actor_processes() -> list[int]:
    """The ids of the actors that live below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith("ray::SubproblemActor"):
                found.append(process.pid)
    return found


def proportional_set_size(process: int) -> int:
    """Bytes of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def processor_seconds(process: int) -> float:
    """That a process has taken; 0 if it is gone."""
    try:
        times = psutil.Process(process).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def measure(name: str, plan: RunPlan, bandwidth: float, storage: str) -> dict:
    """Runs a plan; the table's row."""
    N, steps, watch = len(plan.W), len(plan.factors), Watch()
    folder = RunFolder.create(storage, f"{name}-{N}")
    driver.run(plan, folder.path, name, watch.show)
    trained = next(event for event in folder.events() if event["kind"] == "trained")
    passes = 4 + 2 * round(plan.rehearsal.memory_bytes / (plan.parameters * ITEMSIZE)) + (3 if plan.transfers else 0)
    ms = 1e3 * trained["step_seconds"] / steps / N
    bound = 1e3 * passes * plan.parameters * ITEMSIZE / bandwidth
    actors = len(plan.placement.rows)
    return {
        "model": name,
        "parameters": plan.parameters,
        "N": N,
        "actors": actors,
        "transport": plan.transport.name,
        "steps": steps,
        "step_ms": ms * N,
        "ms_per_row": ms,
        "best_ms_per_row": 1e3 * watch.best() / N,
        "bound_ms": bound,
        "of_bound": ms / bound,
        "cores": watch.cores(),
        "control_ms": 1e3 * trained["control_seconds"] / steps,
        "actors_bytes": watch.bytes,
        "planned_bytes": actors * plan.memory_per_actor(),
    }


def slopes(rows: list[dict]) -> list[dict]:
    """Bytes that one more row takes, by model: measured and planned, over those of its parameters."""
    found = []
    for model, of_model in itertools.groupby(rows, key=lambda row: row["model"]):
        group = list(of_model)
        row_bytes = group[0]["parameters"] * ITEMSIZE
        N = [row["N"] for row in group]
        measured, planned = (
            float(np.polyfit(N, [row[key] for row in group], 1)[0]) / row_bytes
            for key in ("actors_bytes", "planned_bytes")
        )
        more = {"measured": measured, "planned": planned, "of_planned": measured / planned}
        found.append({"model": model, "parameters": group[0]["parameters"], **more})
    return found


def executions(bandwidth: float) -> list[dict]:
    """One block of 16 LeNets, without Ray: its rows one after the other, and stacked."""
    N, steps, turns = 16, 20 if GPUS else 2, 4
    recipe = Recipe(partial(torch.optim.Adam, lr=1e-4))
    chunk = Chunk(0, np.ones(steps), np.eye(N), np.zeros(2))
    blocks = {}
    for execution in ("loop", "stacked"):
        block = Block(RandomDigits("lenet"), range(N), weight_vectors(N, 2), recipe, str(device_of(0)))
        block.execute(execution)
        blocks[execution] = block
    times: dict[str, list[float]] = {execution: [] for execution in blocks}
    for _ in range(1 + turns):
        for execution, block in blocks.items():
            start = time.perf_counter()
            block.run(chunk)  # ends with the losses on the CPU
            times[execution].append((time.perf_counter() - start) / steps)
    bound = 8 * N * blocks["loop"].layout.size * ITEMSIZE / bandwidth  # as above, without exchange
    rows = []
    for execution, taken in times.items():
        seconds = median(taken[1:])
        row = {"execution": execution, "ms": 1e3 * seconds, "rows_per_second": N / seconds}
        rows.append({**row, "bound_ms": 1e3 * bound, "of_bound": seconds / bound})
    return rows


def verdicts(rows: list[dict]) -> Iterator[str]:
    for row in rows:
        if row["N"] > NS[0]:
            yield f"{row['model']}, N={row['N']} / N={NS[0]}, of a row's best ms: {row['of_first']:.3f}; target ≤ 1.1"
    for row in rows:
        if row["N"] == NS[0]:
            yield f"{row['model']}, N={NS[0]}: coordinator {row['control_ms']:.3f} ms a step; target < 0.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, help="default: as many as there are cores, or GPUs")
    parser.add_argument("--json", type=Path, default=Path("benchmark_scaling.json"), metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, console, rows = time.monotonic(), Console(), []
    if not console.is_terminal:
        console = Console(width=140)
    bandwidth = copy_bandwidth(10**8)
    with tempfile.TemporaryDirectory() as storage, driver.cluster(None, cores()) as nodes:
        for name, row_steps in ROW_STEPS.items():
            problem = {"name": "benchmark_scaling:RandomDigits", "model": name}
            for N in NS:
                plan = make(problem, N, row_steps // N, options.actors, nodes)
                rows.append(measure(name, plan, bandwidth, storage))
        plan = make({"name": "zdt1"}, NS[0], ZDT1_STEPS, options.actors, nodes)
        rows.append(measure("zdt1", plan, bandwidth, storage))
    first = {row["model"]: row["best_ms_per_row"] for row in rows if row["N"] == NS[0]}
    rows = [{**row, "of_first": row["best_ms_per_row"] / first[row["model"]]} for row in rows]
    columns = {
        "model": lambda row: row["model"],
        "N": lambda row: str(row["N"]),
        "actors": lambda row: f"{row['actors']}, {row['transport']}",
        "steps": lambda row: str(row["steps"]),
        "ms a row": lambda row: f"{row['ms_per_row']:.3f}",
        "best chunk": lambda row: f"{row['best_ms_per_row']:.3f}",
        f"/ N={NS[0]}": lambda row: f"{row['of_first']:.3f}",
        "cores used": lambda row: f"{row['cores']:.2f}",
        "bound ms": lambda row: f"{row['bound_ms']:.2g}",
        "/ bound": lambda row: f"{row['of_bound']:.3g}",
        "coordinator ms": lambda row: f"{row['control_ms']:.3f}, {100 * row['control_ms'] / row['step_ms']:.1f} %",
        "actors MB": lambda row: f"{row['actors_bytes'] / 1e6:.0f}",
    }
    title = f"training, per step\nbound: bytes of a row that a step moves, at {bandwidth / 1e9:.1f} GB/s"
    show(console, title, columns, rows)
    memory = slopes([row for row in rows if row["model"] != "zdt1"])
    columns = {
        "model": lambda row: row["model"],
        "D": lambda row: f"{row['parameters']:,}",
        "bytes of a row / 4 D": lambda row: f"{row['measured']:.2f}",
        "planned": lambda row: f"{row['planned']:.2f}",
        "/ planned": lambda row: f"{row['of_planned']:.2f}",
    }
    show(console, "memory that one more row takes, activations and data included", columns, memory)
    blocks = executions(bandwidth)
    columns = {
        "execution": lambda row: row["execution"],
        "ms a step": lambda row: f"{row['ms']:.2f}",
        "rows / s": lambda row: f"{row['rows_per_second']:.0f}",
        "bound ms": lambda row: f"{row['bound_ms']:.2g}",
        "/ bound": lambda row: f"{row['of_bound']:.3g}",
    }
    show(console, f"one block of 16 LeNets on {device_of(0)}, without Ray", columns, blocks)
    said = list(verdicts(rows))
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)
    took = time.monotonic() - start
    console.print(f"{took:.0f} s on {cores()} cores and {GPUS} GPUs; written to {options.json}", highlight=False)
    results = {"cores": cores(), "gpus": GPUS, "seconds": took, "bytes_per_second": bandwidth, "runs": rows}
    results |= {"memory": memory, "executions": blocks, "verdicts": said}
    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
