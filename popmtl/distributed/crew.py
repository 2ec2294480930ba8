"""The actors of a run: their start, calls to all of them, and which of them is to blame when one fails."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from popmtl.config import ResourcesConfig
from popmtl.distributed.mixing.coordinator import Exchange
from popmtl.distributed.placement import Nodes, Placement, describe_actor, in_words, rank_order
from popmtl.distributed.subproblem import SubproblemActor
from popmtl.errors import ActorLost, NoRoom

TELL_SECONDS = 5.0
REMOVE_SECONDS = 2.0
CAUSE_SECONDS = 10.0
"""How long a failure that may follow from another waits for that one; Ray takes seconds to see that a process died."""

_Actor: Any = ray.remote(SubproblemActor)


class Crew:
    """Actors that hold the rows of a placement, ranks of one host side by side. Make it with `start`.

    Attributes:
        placement: of the rows.
        hosts: the actors' addresses, by rank.
        exchange: the coordinator transport's, which a failure of one actor ends for all.
    """

    def __init__(
        self,
        placement: Placement,
        group: PlacementGroup,
        actors: Sequence[ActorHandle[Any]],
        hosts: Sequence[str],
        resources: ResourcesConfig,
    ) -> None:
        self.placement, self.group, self.actors, self.hosts, self.resources = placement, group, actors, hosts, resources
        self.exchange = Exchange(len(actors))

    @classmethod
    async def start(
        cls,
        run: str,
        placement: Placement,
        resources: ResourcesConfig,
        patience: float = math.inf,
        actor: Any = _Actor,
        tell: Callable[[str], object] = str,
    ) -> Crew:
        """Starts an actor for each block of rows.

        Args:
            run: its name, which the actors show.
            placement: of the rows.
            resources: says how long to wait for room and, later, for the actors' answers.
            patience: seconds to wait for room, if that is shorter.
            actor: class of the actors, made with the run's name, their rank and their rows.
            tell: is told what is awaited, every few seconds.

        Raises:
            NoRoom: there was none in time; what there is, and what would fit.
        """
        bundle = {"CPU": float(placement.cpus)} | ({"GPU": placement.gpus} if placement.gpus else {})
        name = f"{group_prefix(ray.get_runtime_context().get_actor_id())}{uuid4().hex}"
        group = placement_group([bundle] * len(placement.rows), strategy="PACK", name=name)
        limit = min(patience, resources.start_timeout)
        ready, deadline = asyncio.ensure_future(_awaitable(group.ready())), time.monotonic() + limit
        while not (await asyncio.wait([ready], timeout=min(TELL_SECONDS, max(0.0, deadline - time.monotonic()))))[0]:
            if time.monotonic() >= deadline:
                ready.cancel()
                remove_placement_group(group)
                raise NoRoom(
                    f"no room for {placement.describe()} within {limit:g} s (resources.start_timeout); "
                    f"{in_words(nodes_now())}, with room for {room(placement, free=False)} of them; free now: "
                    f"{_resources(ray.available_resources())}, for {room(placement, free=True)} (resources.max_actors)"
                )
            tell(f"waiting for {placement.describe()}; free now: {_resources(ray.available_resources())}")
        ready.result()
        nodes = placement_group_table(group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        order = rank_order([nodes[index] for index in range(len(placement.rows))], addresses)
        actors = []
        for rank, index in enumerate(order):
            scheduling = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "scheduling_strategy": scheduling}
            # Unique: two actors of a name in a namespace are an error, and runs of a name need not know of each other.
            options["name"] = f"popmtl {run} actor {rank} {uuid4().hex[:12]}"
            actors.append(actor.options(**options).remote(run, rank, placement.rows[rank]))
        hosts = [addresses[nodes[index]] for index in order]
        return cls(placement, group, actors, hosts, resources)

    async def all(self, method: str, *arguments: Any, limit: str = "chunk_timeout") -> list[Any]:
        """Calls a method on every actor; the first failure ends the wait and is the one that counts.

        Args:
            method: its name.
            arguments: of the call.
            limit: the setting under resources that says how long it may take.

        Raises:
            ActorLost: an actor died, or did not answer in time.
            Exception: whatever the method raised.
        """
        calls = [
            asyncio.ensure_future(self.one(rank, method, *arguments, limit=limit)) for rank in range(len(self.actors))
        ]
        done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        failures = [error for call in done if (error := call.exception())]
        if failures:
            self.exchange.fail("another actor failed")
            # An actor that misses another in a transfer fails too, often before Ray says what became of that one.
            deadline = time.monotonic() + CAUSE_SECONDS
            while pending and all(map(_is_collateral, failures)) and time.monotonic() < deadline:
                done, pending = await asyncio.wait(
                    pending, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
                )
                failures += [error for call in done if (error := call.exception())]
            for call in pending:
                call.cancel()
            raise min(failures, key=_is_collateral)
        return [call.result() for call in calls]

    async def one(self, rank: int, method: str, *arguments: Any, limit: str = "chunk_timeout") -> Any:
        """Calls a method on one actor; see `all`."""
        seconds, name = getattr(self.resources, limit), describe_actor(rank, self.placement.rows[rank])
        try:
            return await asyncio.wait_for(_awaitable(getattr(self.actors[rank], method).remote(*arguments)), seconds)
        except asyncio.TimeoutError:
            raise ActorLost(f"{name} did not answer {method} within {seconds:g} s (resources.{limit})") from None
        except (RayActorError, ObjectLostError, NodeDiedError) as error:
            raise ActorLost(f"{name} died: {error}") from error

    def place(self, subproblem: int) -> tuple[int, int]:
        """The rank that holds a subproblem, and which of its rows that is."""
        return next((r, subproblem - rows.start) for r, rows in enumerate(self.placement.rows) if subproblem in rows)

    def release(self) -> None:
        """Lets go of the actors."""
        self.exchange.fail("the run has ended")
        for actor in self.actors:
            ray.kill(actor)
        # Of a Ray whose control server is gone, the answer would not come.
        remove = threading.Thread(target=remove_placement_group, args=(self.group,), daemon=True)
        remove.start()
        remove.join(REMOVE_SECONDS)


def group_prefix(creator: str | None) -> str:
    """What the names of the placement groups begin with that an actor of this id makes."""
    return f"popmtl-{creator}-"


def room(placement: Placement, *, free: bool) -> int:
    """How many actors of a placement the nodes that are there could hold; or, if `free`, can beside what they do."""
    whole = sum(map(placement.fit, nodes_now()))
    return min(whole, placement.fit(ray.available_resources())) if free else whole


def nodes_now() -> Nodes:
    """The nodes that are there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _is_collateral(error: BaseException) -> bool:
    """Whether an actor failed for want of another: never the cause where there is a different failure."""
    return isinstance(error, TimeoutError | GetTimeoutError | ConnectionError)


async def _awaitable(reference: Any) -> Any:
    """A Ray reference as a coroutine, which asyncio can put a time limit on."""
    return await reference


def _resources(resources: dict[str, Any]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
