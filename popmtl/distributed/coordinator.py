"""The actor that owns the run: its course, its actors, its folder, and MLflow."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from secrets import token_hex
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, NodeDiedError, ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from popmtl.distributed.mixing.coordinator import Exchange
from popmtl.distributed.placement import Placement, rank_order
from popmtl.distributed.plan import DIVERGENCE, RunPlan, replan
from popmtl.distributed.resumption import find_checkpoint
from popmtl.distributed.subproblem import Resumption, Steps, SubproblemActor
from popmtl.errors import ActorLost, CheckpointDamaged, NoRoom, RequestError, RunError
from popmtl.method.course import Course, Observation
from popmtl.method.fine_tuning import FineTuned
from popmtl.method.front import hypervolume, non_dominated
from popmtl.method.population import objective_matrix
from popmtl.method.problem import Evaluation
from popmtl.method.reseeding import Combination
from popmtl.method.stacked import Execution
from popmtl.runs import proof
from popmtl.runs.checkpoint import checkpoint_name, checkpoints, commit, discard, files_of, keep_last, set_aside
from popmtl.runs.folder import COORDINATOR_LOCK, RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.results import model_file, write_front, write_model
from popmtl.runs.storage import said
from popmtl.tracking.links import Location
from popmtl.tracking.mlflow_sink import MlflowSink, Status

Stage = Literal["starting", "training", "fine-tuning", "writing results"]

CHUNK_SECONDS = 2.0
"""Steps that actors take in one call: about this long. Shorter pays Ray's calls often, longer shows progress late."""

CAUSE_SECONDS = 10.0
"""How long a failure that may follow from another waits for that one; Ray takes seconds to see that a process died."""

ROOM_SECONDS = 10.0
"""How long a run that lost a node waits for another with as much room, before it goes on with fewer actors."""

CLOSE_SECONDS = 5.0
"""How long an interrupted or failed run waits for MLflow."""

_Actor: Any = ray.remote(SubproblemActor)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: what it is doing.
        step: steps done in this stage.
        steps: of the stage.
        hypervolume: of the last evaluation on the validation split; None before the first.
        losses: least and greatest training loss of the last chunk; None before it.
        steps_per_second: in this stage; None at its start.
        execution: how the actors take the gradients of several rows, and why; None where each has one, or before.
        notices: what else happened since the run started, such as lost actors.
    """

    stage: Stage
    step: int
    steps: int
    hypervolume: float | None = None
    losses: tuple[float, float] | None = None
    steps_per_second: float | None = None
    execution: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Of this stage, at its speed so far."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else None


@dataclass(frozen=True)
class Report:
    """What a run leaves.

    Attributes:
        front: the Pareto set, evaluated on the test split.
        fine_tuned: what Aligned-MTL did to each model; empty without that stage.
        location: the run in MLflow; None without tracking, or where MLflow could not be reached.
        complaints: what could not be logged to MLflow.
        unwritten: what could not be written to the run folder, and is not needed to use the front.
    """

    front: Front
    fine_tuned: Sequence[FineTuned]
    location: Location | None
    complaints: Sequence[str]
    unwritten: Sequence[str] = ()


class Coordinator:
    """Runs a plan. An asynchronous actor, so that `exchange` and `progress` are answered while `run` waits."""

    def __init__(self, plan: RunPlan, folder: str | os.PathLike[str], config_name: str, resumes: bool = False) -> None:
        self.plan, self.folder, self.config_name, self.resumes = plan, RunFolder(folder), config_name, resumes
        self.course = self._new_course()
        self.resumption: Resumption | None = None
        self.executions: list[Execution] | None = None
        self.generation, self.was_ready = 0, False
        self.meeting: str | None = None
        self.pending: tuple[str, dict[str, Any]] | None = None
        self.last_checkpoint = time.monotonic()
        self.now = Progress("starting", 0, 0)
        self.mixing = Exchange(len(plan.placement.rows))
        self.actors: list[ActorHandle[Any]] = []
        self.group: PlacementGroup | None = None
        self.sink: MlflowSink | None = None
        self.task: asyncio.Task[Report] | None = None

    async def run(self) -> Report:
        """The whole run; its end, however it comes, is in the run folder and in MLflow.

        Raises:
            RunError: it failed; the message names the cause.
            asyncio.CancelledError: it was stopped.
        """
        async with self._alone():
            return await self._run()

    async def _run(self) -> Report:
        kind = "resumed" if self.resumes else "started"
        self.folder.append_event(kind, actors=self.plan.placement.describe(), transport=asdict(self.plan.transport))
        self.task = asyncio.ensure_future(self._stages())
        try:
            report = await self.task
        except asyncio.CancelledError:
            self.folder.append_event("interrupted", step=self.course.step)
            await self._end("KILLED", CLOSE_SECONDS)
            raise
        except Exception as error:  # noqa: BLE001  # of a user's problem, of Ray, of ours: each is recorded, and fails the run
            reason = describe_failure(error)
            if isinstance(error, FloatingPointError) and self.plan.may_diverge:
                reason += f"; {DIVERGENCE}"
            self.folder.append_event("failed", step=self.course.step, error=reason, traceback=traceback.format_exc())
            await self._end("FAILED", CLOSE_SECONDS)
            raise RunError(reason) from None
        complaints = await self._end("FINISHED")
        self.folder.append_event("finished", hypervolume=report.front.hypervolume, tracking=complaints)
        location = self.sink.location if self.sink else None
        return replace(report, location=location, complaints=complaints, unwritten=self._unwritten())

    def _unwritten(self) -> list[str]:
        """Writes the lines that wait; what is wrong, if they cannot be written."""
        try:
            self.folder.flush()
        except OSError as error:
            return [f"{self.folder.location}: the last metrics and events could not be written: {said(error)}"]
        return []

    async def exchange(
        self, number: int, rank: int, rows: NDArray[Any], M_rows: NDArray[Any], timeout: float
    ) -> NDArray[Any]:
        """The data plane of the coordinator transport; see `Exchange.mix`."""
        return await self.mixing.mix(number, rank, rows, M_rows, timeout)

    async def progress(self) -> Progress:
        """Where the run stands."""
        return self.now

    async def stop(self) -> None:
        """Ends the run as interrupted; `run` raises CancelledError."""
        if self.task:
            self.task.cancel()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Waits for the end of the coordinator that had this folder before: its driver may have died before it."""
        limit = self.plan.config.resources.start_timeout
        deadline = time.monotonic() + limit
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(self.folder.held(COORDINATOR_LOCK))
                    break
                except RequestError as error:
                    if time.monotonic() > deadline:
                        raise RunError(f"{error}, since {limit:g} s (resources.start_timeout)") from None
                await asyncio.sleep(0.1)
            yield

    async def _stages(self) -> Report:
        if self.plan.config.tracking.enabled:
            self.sink = MlflowSink.open(
                self.plan.config.tracking,
                self.folder,
                self.plan.config.resolved(),
                self.plan.objectives,
                self.plan.W,
                len(self.plan.factors) + (self.plan.aligned.steps if self.plan.aligned else 0),
                self.config_name,
            )
        if self.resumes:
            await self._rewind()
        failures = 0
        while True:
            try:
                await self._start_actors()
                await self._train()
                fine_tuned = await self._fine_tune() if self.plan.aligned else []
                return await self._write_results(fine_tuned)
            except CheckpointDamaged as error:  # noqa: PERF203  # seldom
                assert self.resumption is not None  # an actor has read it
                self._event("damaged checkpoint", what=describe_failure(error))
                self._release()
                await asyncio.to_thread(set_aside, self.folder, self.resumption.checkpoint)
                await self._rewind()
            except (ActorLost, ConnectionError, TimeoutError, GetTimeoutError) as error:
                failures += 1
                # Actors that never came to be ready would not the next time either.
                if failures > self.plan.config.recovery.max_failures or not self.was_ready:
                    raise
                reason = describe_failure(error)
                self._event("recovering", failure=failures, step=self.course.step, error=reason)
                self._release()
                await self._rewind()

    def _new_course(self) -> Course:
        plan = self.plan
        every = plan.config.train.evaluate_every
        reseeds = plan.config.recovery.max_reseeds
        return Course(plan.W, plan.M, plan.factors, every, plan.ideal_point, plan.reference_point, reseeds)

    async def _rewind(self) -> None:
        """Goes back to the last checkpoint that is whole, or to the start: rows of different steps do not mix."""

        def complain(what: str) -> None:
            self._event("damaged checkpoint", what=what)

        # The actors read the contents, once, and say if they are damaged.
        found = await asyncio.to_thread(find_checkpoint, self.folder, self.plan, complain, contents=False)
        self.course, self.resumption, self.pending = self._new_course(), None, None
        step = -1
        if found:
            name, record = found
            for later in await asyncio.to_thread(checkpoints, self.folder):
                if later > name:  # damaged; what follows is written later, and may be of earlier steps
                    await asyncio.to_thread(set_aside, self.folder, later)
            step = record["step"]
            self.course.restore(record["course"])
            assert self.course.ideal is not None  # observed before the first step
            files = await asyncio.to_thread(files_of, self.folder, name)
            self.resumption = Resumption(name, files, step, record["fine_tuned"], self.course.ideal)
            if len(record["executions"]) == len(self.plan.placement.rows):
                self.executions = record["executions"]  # another choice would round otherwise
        await asyncio.to_thread(self.folder.forget_metrics_after, step)
        self._event("rewound", step=max(0, step), checkpoint=found[0] if found else None)

    async def _start_checkpoint(self, fine_tuned: int | None) -> None:
        """Has the actors copy their rows, and write them while they go on.

        Args:
            fine_tuned: steps of the Aligned-MTL stage that are done; None before it.
        """
        await self._commit(wait=True)
        step = self.course.step + (fine_tuned or 0)
        name = checkpoint_name(step, self.generation)
        await self._all("checkpoint", name)
        course, executions = self.course.state(), self.executions
        record = {"step": step, "fine_tuned": fine_tuned, "executions": executions, "course": course}
        record["identity"] = self.plan.identity
        self.pending, self.last_checkpoint = (name, record), time.monotonic()

    async def _commit(self, *, wait: bool) -> None:
        """Makes the checkpoint count that is being written, once it is there."""
        if not self.pending or not (wait or all(await self._all("is_written"))):
            return
        (name, record), self.pending = self.pending, None
        written = await self._all("files_written")
        failed = next((what for what in written if isinstance(what, str)), None)
        if failed is None:
            try:
                await asyncio.to_thread(commit, self.folder, name, _in_order(written), record)
            except OSError as error:
                failed = str(error)
        with suppress(OSError):  # what stays is removed after the next checkpoint
            if failed is None:
                await asyncio.to_thread(keep_last, self.folder, self.plan.config.checkpoint.keep)
            else:  # what there is of it takes room that the next one may need
                await asyncio.to_thread(discard, self.folder, name)
        if failed is None:
            self.folder.append_event("checkpoint", step=record["step"], checkpoint=name)
        else:
            self._event("checkpoint failed", step=record["step"], checkpoint=name, error=failed)

    def _checkpoint_due(self, step: int) -> bool:
        checkpoint = self.plan.config.checkpoint
        minutes = (time.monotonic() - self.last_checkpoint) / 60
        return bool(checkpoint.every_steps and step % checkpoint.every_steps == 0) or (
            checkpoint.every_minutes is not None and minutes >= checkpoint.every_minutes
        )

    def _until_checkpoint(self, step: int, longest: int) -> int:
        """So many steps at most, and none beyond the next checkpoint."""
        every = self.plan.config.checkpoint.every_steps
        return min(longest, every - step % every) if every else longest

    async def _start_actors(self) -> None:
        limit = self.plan.config.resources.start_timeout
        starts = ("started", "resumed", "recovering")  # one of them precedes each start of actors
        self.generation = sum(event["kind"] in starts for event in self.folder.events()) - 1
        crew = await self._find_room(limit)
        self.mixing = Exchange(len(self.plan.placement.rows))
        self.group, self.actors, hosts = crew.group, crew.actors, crew.hosts
        await self._prove_storage(hosts, limit)
        if len(set(hosts)) > 1 and self.plan.transport.name == "shared_memory":
            raise RunError(
                "transfer.transport: shared_memory needs all actors on one host, and they are on "
                f"{', '.join(sorted(set(hosts)))}; take collective"
            )
        if len(set(hosts)) == 1:  # what stays on a host need not be heard outside
            hosts = ["127.0.0.1"] * len(hosts)
        meet: Any = self.actors[0].meet.remote(self.plan, hosts[0])
        self.meeting = meeting = await self._within(_awaitable(meet), 0, "meet", limit, "start_timeout")
        me = ray.get_runtime_context().current_actor
        arguments = (self.plan, me, hosts, meeting, self.resumption, self.executions, self.generation)
        executions = await self._all("setup", *arguments, timeout=limit, setting="start_timeout")
        self.executions = [execution.partition(":")[0] for execution in executions]
        self.was_ready = True
        self.folder.append_event("ready", generation=self.generation, hosts=crew.hosts, executions=executions)
        if max(map(len, self.plan.placement.rows)) > 1:
            self.now = replace(self.now, execution=executions[-1])  # of the actor that has the most rows

    async def _prove_storage(self, hosts: Sequence[str], limit: float) -> None:
        """Has every actor show that what it writes is read here, and what is written here is read there."""
        token = token_hex()

        def check(answers: Sequence[str | None]) -> None:
            for rank, (host, wrong) in enumerate(zip(hosts, answers, strict=True)):
                proof.conclude(self.folder, token, rank, host, wrong)

        try:
            await asyncio.to_thread(proof.begin, self.folder, token)
            answers = await self._all("prove_storage", self.folder, token, timeout=limit, setting="start_timeout")
            await asyncio.to_thread(check, answers)
        finally:
            await asyncio.to_thread(proof.end, self.folder, token)

    async def _find_room(self, limit: float) -> Crew:
        """Starts the actors; where a run that had them finds no room for as many any more, fewer."""
        placement, deadline = self.plan.placement, time.monotonic() + limit
        if not self.was_ready:
            return await start_actors(placement, limit)
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                return await start_actors(placement, min(left, ROOM_SECONDS))
            except NoRoom:
                # What others have taken may become free again; a node that is gone is seldom back in seconds.
                actors = room(placement, free=left <= ROOM_SECONDS)
                if actors < len(placement.rows) or left <= ROOM_SECONDS:
                    break
        if 0 < actors < len(placement.rows):
            self.plan = await asyncio.to_thread(replan, self.plan, actors, ray.cluster_resources())
            execution = set(self.executions or ())
            self.executions = [*execution] * actors if len(execution) == 1 else None
            self._event(
                "fewer actors",
                were=placement.describe(),
                actors=self.plan.placement.describe(),
                transport=self.plan.transport.name,
            )
        return await start_actors(self.plan.placement, limit)

    async def _train(self) -> None:
        self._enter("training", len(self.plan.factors))
        if not self.course.history:
            await self._observe()
        longest, start, stepping, control, first = 1, time.monotonic(), 0.0, 0.0, self.course.step
        while chunk := self.course.next_chunk(self._until_checkpoint(self.course.step, longest)):
            asked = time.monotonic()
            steps: list[Steps] = await self._all("run_steps", chunk)
            taken = max(step.seconds for step in steps)
            stepping, control = stepping + taken, control + time.monotonic() - asked - taken
            longest = max(1, round(CHUNK_SECONDS * len(chunk) / taken))
            due = self.course.advance(chunk)
            self._took(self.course.step, start, steps, chunk.first, first)
            self.course.leave([departed for step in steps for departed in step.departures])
            if due:
                await self._reseed()
                await self._observe()
            await self._commit(wait=False)
            if self._checkpoint_due(self.course.step):
                await self._start_checkpoint(None)
        steps_taken = self.course.step - first
        self.folder.append_event("trained", steps=steps_taken, step_seconds=stepping, control_seconds=control)

    async def _reseed(self) -> None:
        """Has the rows that are out, and not for good, start again."""
        for start in self.course.reseedings():
            total = Combination()
            for j, share in start.shares.items():  # one at a time: the whole population may not fit in here
                total.add(share, await self._state(j))
            rank, i = self._place(start.subproblem)
            call: Any = self.actors[rank].reseed.remote(i, total.model())
            await self._within(_awaitable(call), rank, "reseed")
            self._event("reseeded", step=self.course.step, subproblem=start.subproblem)

    async def _state(self, subproblem: int) -> dict[str, NDArray[Any]]:
        """A subproblem's model."""
        rank, i = self._place(subproblem)
        call: Any = self.actors[rank].state.remote(i)
        state: dict[str, NDArray[Any]] = await self._within(_awaitable(call), rank, "state")
        return state

    def _place(self, subproblem: int) -> tuple[int, int]:
        """The rank that holds a subproblem, and which of its rows that is."""
        return next(
            (r, subproblem - rows.start) for r, rows in enumerate(self.plan.placement.rows) if subproblem in rows
        )

    async def _observe(self) -> None:
        self._record("mtgd", self.course.observe(objective_matrix(await self._evaluations("validation"))))

    def _record(self, stage: str, seen: Observation, more: Mapping[str, Any] | None = None) -> None:
        """Writes an evaluation on the validation split to the run folder and to MLflow."""
        self.now = replace(self.now, hypervolume=seen.hypervolume)
        record = {"stage": stage, "step": seen.step, "hypervolume": seen.hypervolume, "front_size": seen.front_size}
        self.folder.append_metrics({**record, "validation": seen.F.tolist(), **(more or {})})
        if self.sink:
            self.sink.log_evaluation(seen.step, seen.hypervolume, seen.front_size, seen.F)

    async def _fine_tune(self) -> list[FineTuned]:
        assert self.plan.aligned is not None
        trained, total = len(self.plan.factors), self.plan.aligned.steps
        self._enter("fine-tuning", total)
        done = 0
        if self.resumption and self.resumption.fine_tuned is not None:
            done = self.resumption.fine_tuned
        else:
            await self._all("start_fine_tuning", self.course.ideal)
        longest, start, before = 1, time.monotonic(), done
        while done < total:
            n = min(self._until_checkpoint(trained + done, longest), total - done)
            steps: list[Steps] = await self._all("fine_tune_steps", trained + done, n)
            longest = max(1, round(CHUNK_SECONDS * n / max(step.seconds for step in steps)))
            done += n
            self._took(done, start, steps, trained + done - n, before)
            await self._commit(wait=False)
            if self._checkpoint_due(trained + done):
                await self._start_checkpoint(done)
        fine_tuned: list[FineTuned] = _in_order(await self._all("finish_fine_tuning"))
        figures: dict[str, list[float | None]] = {
            "scalarized_before": [one.before for one in fine_tuned],
            "scalarized_after": [one.after for one in fine_tuned],
            "condition": [one.condition for one in fine_tuned],
            "cosine": [one.cosine for one in fine_tuned],
            "magnitude_similarity": [one.magnitude_similarity for one in fine_tuned],
        }
        seen = self.course.measure(objective_matrix([one.evaluation for one in fine_tuned]), trained + total)
        self._record("aligned_mtl", seen, {**figures, "kept": [one.kept for one in fine_tuned]})
        if self.sink:
            named = {f"aligned_mtl/{name}": values for name, values in figures.items()}
            self.sink.log_member_figures(trained + total, named)
        return fine_tuned

    async def _write_results(self, fine_tuned: Sequence[FineTuned]) -> Report:
        self._enter("writing results", 0)
        await self._commit(wait=True)
        plan = self.plan
        evaluations = await self._evaluations("test")
        lost = self.course.out
        for subproblem in range(len(plan.W)):
            if subproblem not in lost:
                state = await self._state(subproblem)
                tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
                await asyncio.to_thread(write_model, self.folder, subproblem, tensors)
        F = objective_matrix(evaluations)
        assert self.course.reference_point is not None
        front = Front(
            objectives=list(plan.objectives),
            reference_point=self.course.reference_point.tolist(),
            hypervolume=hypervolume(F, self.course.reference_point),
            seed=plan.recipe.seed,
            steps=len(plan.factors) + (plan.aligned.steps if plan.aligned else 0),
            members=[
                Member(
                    subproblem=i,
                    weights=plan.W[i].tolist(),
                    objectives=F[i].tolist(),
                    metrics=evaluations[i].metrics,
                    stage="aligned_mtl" if fine_tuned and fine_tuned[i].kept else "mtgd",
                    non_dominated=bool(best),
                    model=None if i in lost else model_file(i),
                    reseeds=self.course.reseeds[i],
                    lost=lost[i].why if i in lost else None,
                )
                for i, best in enumerate(non_dominated(F))
            ],
        )
        await asyncio.to_thread(write_front, self.folder, front)
        if self.sink:
            self.sink.log_front(front, plan.config.tracking.models)
        return Report(front, fine_tuned, None, ())

    async def _end(self, status: Status, timeout: float | None = None) -> list[str]:
        """Lets go of the actors and closes MLflow's runs; what could not be logged."""
        self._release()
        complaints = await asyncio.to_thread(self.sink.close, status, timeout) if self.sink else []
        self._unwritten()
        return complaints

    def _event(self, kind: str, **details: Any) -> None:
        """Something that a user wants to know of: in the run folder, on the screen, and in MLflow."""
        self.folder.append_event(kind, **details)
        text = ", ".join(f"{name} {value}" for name, value in details.items())
        self.now = replace(self.now, notices=(*self.now.notices, f"{kind}: {text}"))
        if self.sink:
            self.sink.log_event(kind, text)

    def _release(self) -> None:
        """Lets go of the actors."""
        self.mixing.fail("the run has ended")
        for actor in self.actors:
            ray.kill(actor)
        if self.group:
            remove_placement_group(self.group)
        self.actors, self.group = [], None
        if self.meeting and self.plan.transport.name == "shared_memory":  # left by actors that died while they met
            shutil.rmtree(self.meeting, ignore_errors=True)
            self.meeting = None

    async def _evaluations(self, split: str) -> list[Evaluation]:
        return _in_order(await self._all("evaluate", split))

    async def _all(
        self, method: str, *arguments: Any, timeout: float | None = None, setting: str = "chunk_timeout"
    ) -> list[Any]:
        """Calls a method on every actor; the first failure ends the wait and is the one that counts."""
        calls = [
            asyncio.ensure_future(
                self._within(_awaitable(getattr(actor, method).remote(*arguments)), rank, method, timeout, setting)
            )
            for rank, actor in enumerate(self.actors)
        ]
        done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        failures = [error for call in done if (error := call.exception())]
        if failures:
            self.mixing.fail("another actor failed")
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

    async def _within(
        self, call: Any, rank: int, method: str, timeout: float | None = None, setting: str = "chunk_timeout"
    ) -> Any:
        limit = self.plan.config.resources.chunk_timeout if timeout is None else timeout
        rows = self.plan.placement.rows[rank]
        name = f"actor {rank} (subproblems {rows.start} to {rows.stop - 1})"
        try:
            return await asyncio.wait_for(call, limit)
        except asyncio.TimeoutError:
            raise ActorLost(f"{name} did not answer {method} within {limit:g} s (resources.{setting})") from None
        except (RayActorError, ObjectLostError, NodeDiedError) as error:
            raise ActorLost(f"{name} died: {error}") from error

    def _enter(self, stage: Stage, steps: int) -> None:
        self.now = replace(self.now, stage=stage, step=0, steps=steps, steps_per_second=None)

    def _took(self, step: int, start: float, steps: Sequence[Steps], first: int, resumed: int) -> None:
        losses = np.concatenate([taken.losses for taken in steps], axis=1)
        for departed in (departed for taken in steps for departed in taken.departures):
            self._event("left", step=departed.step, subproblem=departed.subproblem, why=departed.why)
        finite = losses[np.isfinite(losses)]
        self.now = replace(
            self.now,
            step=step,
            losses=(float(finite.min()), float(finite.max())) if len(finite) else None,
            steps_per_second=(step - resumed) / (time.monotonic() - start),
        )
        if self.sink:
            self.sink.log_training_losses(np.arange(first, first + len(losses)) + 1, losses)


@dataclass(frozen=True)
class Crew:
    """Started actors.

    Attributes:
        group: what they take of the cluster.
        actors: by rank.
        hosts: their addresses.
    """

    group: PlacementGroup
    actors: list[ActorHandle[Any]]
    hosts: list[str]


async def start_actors(placement: Placement, limit: float, actor: Any = _Actor) -> Crew:
    """Starts an actor for each block of rows, ranks of one host side by side.

    Args:
        placement: of the rows.
        limit: seconds to wait for room.
        actor: class of the actors, made with their rank.

    Raises:
        NoRoom: there was none in time; what is free.
    """
    bundle = {"CPU": float(placement.cpus)} | ({"GPU": placement.gpus} if placement.gpus else {})
    name = f"{group_prefix(ray.get_runtime_context().get_actor_id())}{uuid4().hex}"
    group = placement_group([bundle] * len(placement.rows), strategy="PACK", name=name)
    try:
        await asyncio.wait_for(_awaitable(group.ready()), limit)
    except asyncio.TimeoutError:
        remove_placement_group(group)
        raise NoRoom(
            f"no room for {placement.describe()} within {limit:g} s (resources.start_timeout); "
            f"free now: {_resources(ray.available_resources())}"
        ) from None
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    order = rank_order([nodes[index] for index in range(len(placement.rows))], addresses)
    actors = []
    for rank, index in enumerate(order):
        scheduling = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        options = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "scheduling_strategy": scheduling}
        actors.append(actor.options(**options).remote(rank))
    return Crew(group, actors, [addresses[nodes[index]] for index in order])


def group_prefix(creator: str | None) -> str:
    """What the names of the placement groups begin with that an actor of this id makes."""
    return f"popmtl-{creator}-"


def room(placement: Placement, *, free: bool) -> int:
    """How many actors of a placement the nodes that are there could hold; or, if `free`, can beside what they do."""

    def fit(resources: Mapping[str, float]) -> int:
        by_cpu = int(resources.get("CPU", 0.0) / placement.cpus + 1e-9)
        return min(by_cpu, int(resources.get("GPU", 0.0) / placement.gpus + 1e-9)) if placement.gpus else by_cpu

    whole = sum(fit(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return min(whole, fit(ray.available_resources())) if free else whole


def _is_collateral(error: BaseException) -> bool:
    """Whether an actor failed for want of another: never the cause where there is a different failure."""
    return isinstance(error, TimeoutError | GetTimeoutError | ConnectionError)


def describe_failure(error: BaseException) -> str:
    """The cause of a failure in one line, without the layers that it came through."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RunError | FloatingPointError | ValueError | TimeoutError | ConnectionError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


def _in_order(results: Sequence[Sequence[Any]]) -> list[Any]:
    """One list over all rows, from one list for each actor."""
    return [one for block in results for one in block]


async def _awaitable(reference: Any) -> Any:
    """A Ray reference as a coroutine, which asyncio can put a time limit on."""
    return await reference


def _resources(resources: dict[str, Any]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
