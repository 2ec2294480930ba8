"""What checkpoints, or tracking in MLflow, cost: stretches of steps with and without, side by side in one run.

    python scripts/measure_overhead.py checkpoints [CONFIG] [key.path=value …] [--pairs 12]
    python scripts/measure_overhead.py tracking [CONFIG] [key.path=value …] [--pairs 12]

Trains MTGD on the config (configs/multidigits.yaml with its LeNet), on a Ray that it starts, with a checkpoint at the
start of every other stretch: the copying of the rows, the writing beside the steps, and the commit are all in it. Or
tells MLflow (SQLite, or what tracking.uri names) of the losses of every other stretch, every five seconds as a run of
half an hour or more does, and of an evaluation in the middle of it. A stretch is timed from its first step to the
moment before the next.

Neighbours are compared, so that a machine that others use too slows both; the stretches with and without take turns at
coming first. Prints the ratio of each pair, their median and quartiles, and the load of the machine; and the same of
processor seconds, which others disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import ray
from kill_trials import workers

from popmtl.config import load_config
from popmtl.distributed import driver
from popmtl.distributed.coordinator import Coordinator
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import make_plan
from popmtl.runs.folder import RunFolder
from popmtl.tracking.mlflow_sink import _Curves
from popmtl.tracking.outbox import JOURNAL, Entry

STRETCHES = {"checkpoints": 100, "tracking": 1000}
"""Steps of a stretch."""
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "multidigits.yaml"


def has_it(stretch: int) -> bool:
    """Whether a stretch has what is measured: by pairs, and in each pair the other way round than in the one before."""
    return stretch % 4 in (1, 2)


def processor_seconds() -> float:
    """That the actors, and this process, have taken."""
    found = 0.0
    for pid in [os.getpid(), *workers(os.getppid(), "SubproblemActor")]:
        times = psutil.Process(pid).cpu_times()
        found += times.user + times.system
    return found


class Timed(Coordinator):
    """A coordinator that writes down when each stretch ends."""

    stretch = STRETCHES["checkpoints"]
    sent_seconds = 0.0

    def _until_checkpoint(self, step: int, longest: int) -> int:
        return min(longest, self.stretch - step % self.stretch)

    def _checkpoint_due(self, step: int) -> bool:
        if step % self.stretch:
            return False
        record = {"step": step, "time": time.monotonic(), "processor": processor_seconds(), "sink": self.sent_seconds}
        self.folder.append("stretches.jsonl", record)
        return self.checkpoints(step // self.stretch)

    def checkpoints(self, stretch: int) -> bool:
        """Whether a stretch begins with a checkpoint."""
        return has_it(stretch)


class Tracked(Timed):
    """Has a sink in every other stretch; what waits at its end is sent in the next one that has it."""

    stretch = STRETCHES["tracking"]
    real: Any = None
    sent_seconds = 0.0

    def checkpoints(self, stretch: int) -> bool:
        """None does; but the sink comes and goes."""
        if self.real is None and self.sink:
            self.real = self.sink
            self.real._curves = _Curves(10**9)  # whose shares of the steps take longer than five seconds
            self.take = self.real._outbox.next
            self.real._outbox.next = self._next
        self.sink = self.real if has_it(stretch) else None
        return False

    def _next(self, timeout: float, together: Collection[str] = ()) -> list[Entry]:
        self.sent_seconds = time.thread_time()  # it is the sink's thread that asks
        if self.sink is None:
            time.sleep(min(timeout, 0.5))
            return []
        return self.take(timeout, together)

    async def _end(self, *arguments: Any) -> list[str]:
        self.sink = self.real
        return await super()._end(*arguments)


def pairs_of(times: list[float]) -> list[tuple[float, float]]:
    """Seconds of neighbouring stretches: with a checkpoint, and without. The first pair warms up."""
    lengths = {number: after - before for number, (before, after) in enumerate(itertools.pairwise(times), 1)}
    pairs = [(number, number + 1) for number in range(2, max(lengths), 2)][1:]
    return [(lengths[a], lengths[b]) if has_it(a) else (lengths[b], lengths[a]) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoints", "tracking"])
    parser.add_argument("config", nargs="?", default=str(CONFIG))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if "=" in options.config:
        options.config, options.overrides = str(CONFIG), [options.config, *options.overrides]
    stretch = STRETCHES[options.what]
    steps = stretch * (2 * options.pairs + 4)
    own = ["problem.model=lenet"] if options.config == str(CONFIG) else []
    tracked = options.what == "tracking"
    fixed = [f"train.steps={steps}", "fine_tune.steps=0", f"tracking.enabled={str(tracked).lower()}"]
    fixed += [f"train.evaluate_every={stretch // 2 if tracked else steps}", "tracking.models=none"]
    config = load_config(options.config, [*own, *options.overrides, *fixed])
    plan = make_plan(config, local_nodes())
    load: list[float] = []
    driver._Coordinator = ray.remote(Tracked if tracked else Timed)
    with tempfile.TemporaryDirectory() as storage, driver.cluster(None, int(local_nodes()[0]["CPU"])):
        folder = RunFolder.create(storage, "run")
        folder.write_config(plan.config.resolved())
        driver.run(plan, folder.path, "run", lambda _: load.append(os.getloadavg()[0]))
        records = folder.lines("stretches.jsonl")
        kinds = Counter(
            [event["kind"] for event in folder.events()] + [entry["kind"] for entry in folder.lines(JOURNAL)]
        )
    pairs = pairs_of([record["time"] for record in records])
    worked = [a / b for a, b in pairs_of([record["processor"] for record in records])]
    ratios = [with_one / without for with_one, without in pairs]
    for (with_one, without), ratio in zip(pairs, ratios, strict=True):
        print(f"{stretch} steps: {with_one:.3f} s with, {without:.3f} s without: {ratio:.3f}")
    low, _, high = quantiles(ratios, n=4)
    least, _, most = quantiles(worked, n=4)
    ms = [1e3 * (with_one - without) for with_one, without in pairs]
    done = f"{kinds['training losses']} points of each curve" if tracked else f"{kinds['checkpoint']} checkpoints"
    print(
        f"{plan.placement.describe()}, {len(plan.W)} models of {plan.parameters} parameters, {done}; "
        f"median ratio {median(ratios):.3f}, quartiles {low:.3f} to {high:.3f}, from {len(ratios)} pairs; "
        f"of processor seconds {median(worked):.3f}, {least:.3f} to {most:.3f}; "
        f"{median(ms):.0f} ms more a stretch (median); load of the machine {min(load):.1f} to {max(load):.1f} "
        f"on {os.cpu_count()} cores; target ≤ {1.02 if tracked else 1.05}"
    )
    if tracked:
        first, last = records[2], records[-2]
        seconds, sent = last["time"] - first["time"], last["sink"] - first["sink"]
        print(f"the thread that sends took {2 * sent / seconds:.2%} of one processor while there was anything to send")
    if options.json:
        result: dict[str, Any] = {
            "pairs": pairs,
            "ratios": ratios,
            "processor": worked,
            "load": load,
            "parameters": plan.parameters,
        }
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
