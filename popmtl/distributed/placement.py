"""Which actor holds which rows, what each takes of the cluster, and where there is room for it."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from popmtl.config import ResourcesConfig
from popmtl.errors import RequestError

Nodes = Sequence[Mapping[str, float]]
"""What each machine of a cluster has, by Ray's names: "CPU", "GPU", and its own, "node:<address>"."""


@dataclass(frozen=True)
class Placement:
    """Actors and their rows.

    Attributes:
        rows: for each actor the subproblems that it holds; contiguous, and as even as can be.
        cpus: that each actor takes.
        gpus: that each actor takes; 0 trains on the CPU.
        hosts: the host of each actor as it is to be expected, counted from 0; empty where its nodes are yet to come.
    """

    rows: tuple[range, ...]
    cpus: int
    gpus: float
    hosts: tuple[int, ...] = ()

    @property
    def device(self) -> str:
        """The device of an actor. Ray shows it none but its own GPUs, so that the first is the right one."""
        return "cuda:0" if self.gpus else "cpu"

    def describe(self) -> str:
        """In words, for a plan or an error."""
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{len(self.rows)} actors of {self.cpus} CPU{gpus} each"

    def fit(self, node: Mapping[str, float]) -> int:
        """How many of the actors such resources hold."""
        by_cpu = int(node.get("CPU", 0.0) / self.cpus + 1e-9)
        return min(by_cpu, int(node.get("GPU", 0.0) / self.gpus + 1e-9)) if self.gpus else by_cpu


def describe_actor(rank: int, rows: range) -> str:
    """An actor in words, for errors, logs and Ray's dashboard."""
    return f"actor {rank} (subproblems {rows.start} to {rows.stop - 1})"


def place(subproblems: int, resources: ResourcesConfig, nodes: Nodes) -> Placement:
    """Spreads N rows over as many actors as there is room for, or over `max_actors` of them.

    Args:
        subproblems: N.
        resources: what the config asks for. Without `gpus_per_actor` each actor gets a GPU if there are any.
        nodes: the cluster's. Where it is `autoscaling`, they do not count.

    Raises:
        RequestError: not one actor fits, or fewer than `max_actors` asks for.
    """
    cpus, gpus = resources.cpus_per_actor, resources.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0.0) >= 1 for node in nodes) else 0.0
    if resources.autoscaling:
        assert resources.max_actors is not None  # the config has checked it
        return Placement(_blocks(subproblems, min(subproblems, resources.max_actors)), cpus, gpus)
    room = [Placement((), cpus, gpus).fit(node) for node in nodes]
    slots = sum(room)
    asks = f"{cpus} CPU and {gpus:g} GPU" if gpus else f"{cpus} CPU"
    if not slots:
        raise RequestError(f"resources: an actor takes {asks}; {in_words(nodes)}")
    wanted = min(subproblems, resources.max_actors or slots)
    if wanted > slots:
        raise RequestError(
            f"resources.max_actors: {resources.max_actors} actors of {asks} do not fit, {in_words(nodes)}; "
            f"at most {slots} would"
        )
    # As Ray packs them: on as few hosts as can be.
    taken, left = [0] * len(nodes), wanted
    for i in sorted(range(len(nodes)), key=lambda i: -room[i]):
        taken[i] = min(room[i], left)
        left -= taken[i]
    hosts = tuple(i for i, count in enumerate(taken) for _ in range(count))
    return Placement(_blocks(subproblems, wanted), cpus, gpus, hosts)


def _blocks(subproblems: int, actors: int) -> tuple[range, ...]:
    """The rows of each actor."""
    bounds = [subproblems * rank // actors for rank in range(actors + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


def in_words(nodes: Nodes) -> str:
    """What a cluster has, for an error: machines that have the same are counted."""
    kinds = Counter((int(node.get("CPU", 0)), node.get("GPU", 0.0)) for node in nodes)
    if len(nodes) <= 1:
        cpus, gpus = next(iter(kinds), (0, 0.0))
        return f"the cluster has {cpus} CPU and {gpus:g} GPU"
    listed = ", ".join(f"{count} with {cpus} CPU and {gpus:g} GPU" for (cpus, gpus), count in sorted(kinds.items()))
    return f"the cluster has {len(nodes)} hosts: {listed}"


def rank_order(bundle_nodes: Sequence[str], addresses: Mapping[str, str]) -> list[int]:
    """The bundle of each rank: ranks of one host stand together, hosts in the order of their addresses.

    Ray numbers bundles as it likes; this order is the same whenever the same hosts hold as many.

    Args:
        bundle_nodes: the node of each bundle.
        addresses: of the nodes.
    """

    def key(bundle: int) -> tuple[bool, list[int], str, str, int]:
        address, node = addresses[bundle_nodes[bundle]], bundle_nodes[bundle]
        parts = address.split(".")
        numbers = [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []
        return not numbers, numbers, address, node, bundle

    return sorted(range(len(bundle_nodes)), key=key)


def local_nodes() -> Nodes:
    """This machine: its processors, as far as this process may use them, and GPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}]
