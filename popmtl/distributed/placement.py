"""Which actor holds which rows, and what each takes of the cluster."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from popmtl.config import ResourcesConfig
from popmtl.errors import RequestError


@dataclass(frozen=True)
class Placement:
    """Actors and their rows.

    Attributes:
        rows: for each actor the subproblems that it holds; contiguous, and as even as can be.
        cpus: that each actor takes.
        gpus: that each actor takes; 0 trains on the CPU.
    """

    rows: tuple[range, ...]
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """The device of an actor. Ray shows it none but its own GPUs, so that the first is the right one."""
        return "cuda:0" if self.gpus else "cpu"

    def describe(self) -> str:
        """In words, for a plan or an error."""
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{len(self.rows)} actors of {self.cpus} CPU{gpus} each"


def describe_actor(rank: int, rows: range) -> str:
    """An actor in words, for errors, logs and Ray's dashboard."""
    return f"actor {rank} (subproblems {rows.start} to {rows.stop - 1})"


def place(subproblems: int, resources: ResourcesConfig, available: Mapping[str, float]) -> Placement:
    """Spreads N rows over as many actors as there is room for, or over `max_actors` of them.

    Args:
        subproblems: N.
        resources: what the config asks for. Without `gpus_per_actor` each actor gets a GPU if there are any.
        available: the cluster's total resources by Ray's names, "CPU" and "GPU".

    Raises:
        RequestError: not one actor fits, or fewer than `max_actors` asks for.
    """
    cpus, gpus = resources.cpus_per_actor, resources.gpus_per_actor
    cluster_cpus, cluster_gpus = int(available.get("CPU", 0)), available.get("GPU", 0.0)
    if gpus is None:
        gpus = 1.0 if cluster_gpus >= 1 else 0.0
    slots = cluster_cpus // cpus
    if gpus:
        slots = min(slots, int(cluster_gpus / gpus + 1e-9))
    has = f"the cluster has {cluster_cpus} CPU and {cluster_gpus:g} GPU"
    asks = f"{cpus} CPU and {gpus:g} GPU" if gpus else f"{cpus} CPU"
    if not slots:
        raise RequestError(f"resources: an actor takes {asks}; {has}")
    wanted = min(subproblems, resources.max_actors or slots)
    if wanted > slots:
        raise RequestError(
            f"resources.max_actors: {resources.max_actors} actors of {asks} do not fit, {has}; at most {slots} would"
        )
    bounds = [subproblems * rank // wanted for rank in range(wanted + 1)]
    rows = tuple(range(a, b) for a, b in itertools.pairwise(bounds))
    return Placement(rows, cpus, gpus)


def hosts(available: Mapping[str, float]) -> int:
    """How many hosts a cluster of such resources has; Ray counts one "node:<address>" for each."""
    addresses = [count for name, count in available.items() if name.startswith("node:") and "__" not in name]
    return max(1, round(sum(addresses)))


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


def local_resources() -> dict[str, float]:
    """This machine's processors, as far as this process may use them, and GPUs, by Ray's names."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CPU": float(cpus), "GPU": float(torch.cuda.device_count())}
