"""Which transport moves the rows, why, and what hides its time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from popmtl.distributed.mixing import shared_memory
from popmtl.distributed.placement import Placement
from popmtl.errors import RequestError
from popmtl.method.buckets import BUCKET_BYTES, bucket_bounds
from popmtl.method.mtgd import Recipe
from popmtl.method.rehearsal import Rehearsal

TransportName = Literal["local", "shared_memory", "collective", "coordinator"]


@dataclass(frozen=True)
class Transport:
    """How rows reach each other.

    Attributes:
        name: of the transport.
        why: it was taken.
        overlap: what its time hides behind, in words.
        bucket_bytes: see `popmtl.method.buckets`; infinite where columns step all together.
    """

    name: TransportName
    why: str
    overlap: str
    bucket_bytes: float


def choose_transport(
    asked: TransportName | Literal["auto"],
    placement: Placement,
    shared_bytes: int,
) -> tuple[TransportName, str]:
    """A transport, and why it is the one.

    Args:
        asked: in the config.
        placement: of the rows.
        shared_bytes: that the shared_memory transport would take.

    Raises:
        RequestError: the one that is asked for cannot serve this placement.
    """
    shares_gpus = 0 < placement.gpus < 1 and len(placement.rows) > 1
    room = shared_memory.free_bytes()
    if asked != "auto":
        if asked == "collective" and shares_gpus:
            raise RequestError(
                f"transfer.transport: collective needs a GPU for each actor (resources.gpus_per_actor is "
                f"{placement.gpus:g}); take max_actors lower and let actors hold more rows, or coordinator"
            )
        if asked == "shared_memory" and placement.gpus:
            raise RequestError("transfer.transport: shared_memory is for actors without GPUs; take collective")
        if asked == "shared_memory" and room < shared_bytes:
            raise RequestError(
                f"transfer.transport: shared_memory takes {shared_bytes / 1e6:.0f} MB in {shared_memory.FOLDER}, which "
                f"has {room / 1e6:.0f} MB; take collective"
            )
        return asked, "asked for"
    if len(placement.rows) == 1:
        return "local", "one actor holds every row"
    if shares_gpus:
        return "coordinator", "actors share a GPU, which NCCL does not allow"
    if placement.gpus:
        return "collective", "actors on GPUs"
    if not placement.hosts:
        return "collective", "the hosts are yet to come"
    if len(set(placement.hosts)) > 1:
        return "collective", "several hosts"
    if room < shared_bytes:
        return "collective", f"{shared_memory.FOLDER} has {room / 1e6:.0f} MB of the {shared_bytes / 1e6:.0f} MB needed"
    return "shared_memory", "all actors on one host"


def choose_overlap(name: TransportName, recipe: Recipe, rehearsal: Rehearsal) -> tuple[str, float]:
    """What hides the exchange, in words, and the size of the buckets for it.

    Args:
        name: of the transport.
        recipe: of the rows.
        rehearsal: of the run.
    """
    layout = rehearsal.layout
    if name == "local":
        return "none: nothing is sent", math.inf
    if recipe.order == "consensus":
        return "behind the forward and backward passes", math.inf
    if recipe.gradient:
        return "none: a gradient method needs the whole gradient of every loss", math.inf
    if recipe.clip and recipe.clip.norm is not None:
        return "none: clipping by norm needs the whole gradient", math.inf
    if not rehearsal.leaves_alone:
        return "none: the backward pass reads parameters after their gradients are complete", math.inf
    if rehearsal.stepping != "rows":
        return "none: the optimizer does not treat each entry of a row alone, and all alike", math.inf
    if rehearsal.unreached:
        return f"none: parameters without gradients, such as {rehearsal.unreached[0]}, step on their own", math.inf
    bounds = bucket_bounds(layout, recipe.dtype.itemsize, BUCKET_BYTES)
    moving = sum(first < layout.transferring for first, _ in bounds)
    if moving < 2:
        return f"none: what transfers fits one bucket of {BUCKET_BYTES / 2**20:g} MiB", math.inf
    return f"behind the backward pass, by {moving} buckets", float(BUCKET_BYTES)
