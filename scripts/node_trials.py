"""What the loss of a node does to a run; `python scripts/kill_trials.py --node` prints it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from trial_runs import ACTORS, config, largest_difference, new_run

from popmtl.config import load_config
from popmtl.distributed import driver
from popmtl.distributed.plan import make_plan
from popmtl.distributed.progress import Progress
from popmtl.errors import RunError
from popmtl.runs.folder import RunFolder

NODE_STEPS = 2000
# Ray's own limits let a dead node pass for a living one for 15 s.
NODE_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass
class NodeLoss:
    """What the loss of a node did to a run.

    Attributes:
        seconds: from the loss to the first step after it; None if there was none.
        actors: after it, and before.
        events: kinds, in their order.
        difference: the largest of a model's numbers from those of the undisturbed run, relative to their largest.
    """

    seconds: float | None
    actors: tuple[int, int]
    events: list[str]
    difference: float


class NodeKiller:
    """Removes a node in the middle of the training, once.

    Args:
        cluster: of Ray.
        nodes: with an actor each; the first that is not this process's own goes.
        run: whose progress it is shown.
        spare: whether another node comes before.
    """

    def __init__(self, cluster: Any, nodes: list[Any], run: RunFolder, spare: bool) -> None:
        self.cluster, self.nodes, self.run, self.spare = cluster, nodes, run, spare
        self.lost: float | None = None
        self.back: float | None = None

    def __call__(self, progress: Progress) -> None:
        """Looks whether the time has come, or the run is back."""
        if self.lost is None and progress.stage == "training" and progress.step > NODE_STEPS // 4:
            if self.spare:
                self.nodes.append(self.cluster.add_node(num_cpus=1))
            here = ray.get_runtime_context().get_node_id()  # Ray connects this process to any of the nodes
            victim = next(node for node in self.nodes if node.node_id != here)
            self.nodes.remove(victim)
            self.cluster.remove_node(victim, allow_graceful=False)
            self.lost = time.monotonic()
        waits = self.lost is not None and self.back is None and progress.steps_per_second
        if waits and sum(event["kind"] == "ready" for event in self.run.events()) > 1:
            self.back = time.monotonic()


def lose_nodes(folder: Path) -> Iterator[tuple[str, NodeLoss]]:
    """Runs on a cluster of a head and two nodes with an actor each, one of which is lost: with a spare, and without.

    Raises:
        RunError: a cluster of several nodes cannot be started here.
    """
    from ray.cluster_utils import Cluster

    os.environ.update(NODE_ENVIRONMENT)
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(ACTORS)]
    except (OSError, RuntimeError, TimeoutError) as error:
        raise RunError(f"no cluster of several nodes can be started here: {error}") from error
    path = folder / "nodes.yaml"
    data = config(4, "collective")
    data["train"] |= {"steps": NODE_STEPS, "evaluate_every": 500, "dtype": "float64"}
    data["resources"] |= {"max_actors": None, "start_timeout": 60}
    path.write_text(yaml.safe_dump(data))
    try:
        with driver.cluster(cluster.address):
            plan = make_plan(load_config(path), [{"CPU": float(ACTORS)}])
            reference = new_run(path, folder, "undisturbed-nodes")
            driver.run(plan, reference.path, "nodes", lambda _: None)
            for name, spare in (("one with room", True), ("none with room", False)):
                run = new_run(path, folder, name.replace(" ", "-"))
                watch = NodeKiller(cluster, nodes, run, spare)
                driver.run(plan, run.path, "nodes", watch)
                ready = [event["hosts"] for event in run.events() if event["kind"] == "ready"]
                yield (
                    name,
                    NodeLoss(
                        seconds=watch.back - watch.lost if watch.lost and watch.back else None,
                        actors=(len(ready[-1]), len(ready[0])),
                        events=[event["kind"] for event in run.events() if event["kind"] != "checkpoint"],
                        difference=largest_difference(run, reference),
                    ),
                )
    finally:
        cluster.shutdown()


def node_trials(folder: Path) -> bool:
    """Prints what the loss of a node does; whether it does no more than it may."""
    good = True
    for name, loss in lose_nodes(folder):
        same = loss.actors[0] == loss.actors[1]
        fits = loss.difference == 0 if same else loss.difference < 1e-6
        good &= fits and loss.seconds is not None and "recovering" in loss.events
        seconds = "never" if loss.seconds is None else f"{loss.seconds:.1f} s"
        print(
            f"a node lost, in its place {name}; first step after it: {seconds}; actors {loss.actors[1]}, then "
            f"{loss.actors[0]}; models differ by {loss.difference:.1e} ({'as they may' if fits else 'TOO MUCH'}); "
            f"events {', '.join(loss.events)}",
            flush=True,
        )
    return good
