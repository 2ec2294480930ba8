"""The actor that owns the run: its course, its actors, its folder, and MLflow."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from secrets import token_hex
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayTaskError

from popmtl.distributed.crew import Crew, nodes_now, room
from popmtl.distributed.metrics import (
    GENERATION,
    HYPERVOLUME,
    HYPERVOLUME_ERROR,
    RECOVERIES,
    STEP,
    STEPS_PER_SECOND,
    Metrics,
)
from popmtl.distributed.placement import place
from popmtl.distributed.plan import DIVERGENCE, RunPlan, replan
from popmtl.distributed.profile import steps_needed
from popmtl.distributed.progress import Progress, Report, Stage
from popmtl.distributed.resumption import find_checkpoint
from popmtl.distributed.subproblem import Resumption, Steps
from popmtl.errors import ActorLost, CheckpointDamaged, FileDamaged, NoRoom, RunError
from popmtl.method.course import Course, Observation
from popmtl.method.delta_m import delta_m
from popmtl.method.fine_tuning import STABILITY, FineTuned
from popmtl.method.front import Hypervolume, measured_hypervolume, non_dominated
from popmtl.method.mtgd import Departure
from popmtl.method.population import metric_columns, objective_matrix
from popmtl.method.problem import Direction, Evaluation, Split
from popmtl.method.replica import Marks, first_difference
from popmtl.method.reseeding import Combination
from popmtl.method.stacked import Execution
from popmtl.runs import proof
from popmtl.runs.baseline import DELTA_M
from popmtl.runs.checkpoint import (
    checkpoint_name,
    checkpoints_at,
    commit,
    discard,
    keep_last,
    set_aside,
    whole,
)
from popmtl.runs.folder import COORDINATOR_LOCK, EVENTS, METRICS, RunFolder
from popmtl.runs.front import BEST, LAST, Figures, Front, Member
from popmtl.runs.reading import passing_over
from popmtl.runs.records import AnyEvent, Volume
from popmtl.runs.results import model_file, write_front, write_model
from popmtl.runs.storage import said
from popmtl.tracking.ending import conclude
from popmtl.tracking.mlflow_sink import MlflowSink, Status

STABILITY_METRICS: dict[str, Direction] = {
    f"aligned_mtl/median_{name}": "lower" if name == "condition" else "higher" for name in STABILITY
}
"""Names, in the front, of the medians over the steps of the Aligned-MTL stage."""

CHUNK_SECONDS = 2.0
"""Steps that actors take in one call: about this long. Shorter pays Ray's calls often, longer shows progress late."""

REPLAY_SECONDS = 5.0
"""Batches that actors draw again in one call: for about this long."""

ROOM_SECONDS = 10.0
"""How long a run that lost a node waits for another with as much room, before it goes on with fewer actors."""

LOOK_SECONDS = 5.0
"""Between two looks at the run's folder. One that is gone at two in a row is not waited for, as a full disk is."""

CLOSE_SECONDS = 5.0
"""How long an interrupted or failed run waits for MLflow, and a failed one for its last checkpoint."""


class Coordinator:
    """Runs a plan. An asynchronous actor, so that `exchange` and `progress` are answered while `run` waits."""

    def __init__(
        self,
        plan: RunPlan,
        folder: str | os.PathLike[str],
        config_name: str,
        resumes: bool = False,
        profile: int | None = None,
    ) -> None:
        self.plan, self.folder, self.config_name, self.resumes = plan, RunFolder(folder), config_name, resumes
        self.profile, self.metrics = profile, Metrics(self.folder.name)
        self.course = self._new_course()
        self.resumption: Resumption | None = None
        self.executions: list[Execution] | None = None
        self.constants: Marks | None = None
        self.generation, self.was_ready = 0, False
        self.meeting: str | None = None
        self.pending: tuple[str, dict[str, Any]] | None = None
        self.seen: tuple[int, list[Evaluation]] | None = None
        self.last_checkpoint = time.monotonic()
        self.now = Progress("starting", 0, 0)
        self.started: Crew | None = None
        self.sink: MlflowSink | None = None
        self.vanished: str | None = None
        self.task: asyncio.Task[Report] | None = None

    def __repr__(self) -> str:
        return f"{self.folder.name} coordinator"

    @property
    def crew(self) -> Crew:
        """The actors.

        Raises:
            ConnectionError: there are none: before the first start, and between a failure and the next.
        """
        if not self.started:
            raise ConnectionError("the actors have been let go")
        return self.started

    async def run(self) -> Report:
        """The whole run; its end, however it comes, is in the run folder and in MLflow.

        Raises:
            RunError: it failed; the message names the cause.
            asyncio.CancelledError: it was stopped.
        """
        # The coordinator that had this folder before may outlive its driver for a while.
        held = self.folder.held(COORDINATOR_LOCK, wait=self.plan.config.resources.start_timeout)
        with ExitStack() as alone:
            await asyncio.to_thread(alone.enter_context, held)
            alone.callback(asyncio.ensure_future(self.metrics.repeat()).cancel)
            alone.callback(asyncio.ensure_future(self._watch_folder()).cancel)
            return await self._run()

    async def _run(self) -> Report:
        kind = "resumed" if self.resumes else "started"
        self.folder.append_event(kind, actors=self.plan.placement.describe(), transport=asdict(self.plan.transport))
        self.task = asyncio.ensure_future(self._stages())
        try:
            report = await self.task
        except asyncio.CancelledError:
            if self.vanished:
                self.folder.append_event("failed", step=self.course.step, error=self.vanished)
                await self._end("FAILED", CLOSE_SECONDS)
                raise RunError(self.vanished) from None
            self.folder.append_event("interrupted", step=self.course.step)
            await self._end("KILLED", CLOSE_SECONDS)
            raise
        except Exception as error:  # noqa: BLE001  # of a user's problem, of Ray, of ours: each is recorded, and fails the run
            reason = describe_failure(error)
            if isinstance(error, FloatingPointError) and self.plan.may_diverge:
                reason += f"; {DIVERGENCE}"
            where = traceback.format_exc()
            with suppress(Exception):  # a checkpoint that is being written counts, if those who write it are there
                await asyncio.wait_for(self._commit(wait=True), CLOSE_SECONDS)
            self.folder.append_event("failed", step=self.course.step, error=reason, traceback=where)
            await self._end("FAILED", CLOSE_SECONDS)
            raise RunError(reason) from None
        self._release()
        ended = await asyncio.to_thread(
            conclude, self.folder, report.front, self.sink, self.plan.config.tracking.models
        )
        unwritten = self._unwritten()
        if gone := await asyncio.to_thread(self.folder.vanished):
            raise RunError(gone)
        return replace(report, location=ended.location, complaints=ended.complaints, unwritten=unwritten)

    async def _watch_folder(self) -> None:
        """Ends the run once its folder is gone: what it writes would be lost, or in the way of what comes back."""
        before = gone = None
        while not (before and gone):
            await asyncio.sleep(LOOK_SECONDS)
            before, gone = gone, await asyncio.to_thread(self.folder.vanished)
        self.vanished = gone
        await self.stop()

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
        return await self.crew.exchange.mix(number, rank, rows, M_rows, timeout)

    async def progress(self) -> Progress:
        """Where the run stands."""
        return self.now

    async def stop(self) -> None:
        """Ends the run as interrupted; `run` raises CancelledError."""
        if self.task:
            self.task.cancel()

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
                await asyncio.to_thread(set_aside, self.folder, self.resumption.checkpoint, describe_failure(error))
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
        return Course(plan.W, plan.M, plan.factors, every, plan.ideal_point, plan.reference_point, reseeds, plan.stop)

    async def _rewind(self) -> None:
        """Goes back to the last checkpoint that is whole, or to the start: rows of different steps do not mix."""

        def complain(what: str) -> None:
            self._event("damaged checkpoint", what=what)

        # The actors read the contents, once, and say if they are damaged.
        found = await asyncio.to_thread(find_checkpoint, self.folder, self.plan, complain, contents=False)
        self.course, self.resumption, self.pending, self.seen = self._new_course(), None, None, None
        step = -1
        if found:
            name, record, files = found
            step = record["step"]
            self.course.restore(record["course"], partial(self._volumes, step))
            self.constants = record["untrained"]
            assert self.course.ideal is not None  # a state has one
            self.resumption = Resumption(name, files, step, record["fine_tuned"], self.course.ideal)
            if len(record["executions"] or ()) == len(self.plan.placement.rows):
                self.executions = record["executions"]  # another choice would round otherwise
        damaged: list[str] = []
        await asyncio.to_thread(self.folder.forget_metrics_after, step, damaged.append)
        for what in damaged:
            self._event("damaged line", what=what)
        self._event("rewound", step=max(0, step), checkpoint=found.name if found else None)

    def _volumes(self, step: int) -> list[float]:
        """The hypervolumes of the evaluations up to a step, in order."""
        lines = self.folder.lines(METRICS, Volume, passing_over)  # they are told of when they are dropped
        found = [line["hypervolume"] for line in lines if line["step"] <= step and line["stage"] == "mtgd"]
        return [volume for volume in found if volume is not None]

    async def _start_checkpoint(self, fine_tuned: int | None) -> None:
        """Has the actors copy their rows, and write them while they go on.

        Args:
            fine_tuned: steps of the Aligned-MTL stage that are done; None before it.
        """
        await self._commit(wait=True)
        step = self.course.step + (fine_tuned or 0)
        name = checkpoint_name(step, self.generation)
        await self.crew.all("checkpoint", name)
        record = {
            "step": step,
            "fine_tuned": fine_tuned,
            "executions": self.executions,
            "untrained": self.constants,
            "course": self.course.state(),
            "best": self.course.best.step if self.course.best and self.plan.config.front.best else None,
            "identity": self.plan.identity,
        }
        self.pending, self.last_checkpoint = (name, record), time.monotonic()

    async def _commit(self, *, wait: bool) -> None:
        """Makes the checkpoint count that is being written, once it is there."""
        if not self.pending or not (wait or all(await self.crew.all("is_written"))):
            return
        (name, record), self.pending = self.pending, None
        written = await self.crew.all("files_written")
        failed = next((what for what in written if isinstance(what, str)), None)
        if failed is None:
            try:
                await asyncio.to_thread(commit, self.folder, name, _in_order(written), record)
            except OSError as error:
                failed = str(error)
        with suppress(OSError):  # what stays is removed after the next checkpoint
            if failed is None:
                keep = self.plan.config.checkpoint
                await asyncio.to_thread(keep_last, self.folder, keep.keep, best=keep.keep_best)
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
        starts = ("started", "resumed", "recovering")  # one of them precedes each start of actors
        kinds = [
            # A damaged line may have been one of them; who starts later must not write where one before did.
            starts[0] if isinstance(event, FileDamaged) else event["kind"]
            for event in self.folder.judged_lines(EVENTS, AnyEvent)
        ]
        self.generation = sum(kind in starts for kind in kinds) - 1
        self.metrics.tell(GENERATION, self.generation)
        self.metrics.tell(RECOVERIES, kinds.count("recovering"))
        self.started = crew = await self._find_room()
        self.now = replace(self.now, awaits=None)
        await self._fit_transport()
        hosts = crew.hosts
        await self._prove_storage()
        if len(set(hosts)) > 1 and self.plan.transport.name == "shared_memory":
            raise RunError(
                "transfer.transport: shared_memory needs all actors on one host, and they are on "
                f"{', '.join(sorted(set(hosts)))}; take collective"
            )
        if len(set(hosts)) == 1:  # what stays on a host need not be heard outside
            hosts = ["127.0.0.1"] * len(hosts)
        self.meeting = meeting = await crew.one(0, "meet", self.plan, hosts[0], limit="start_timeout")
        me = ray.get_runtime_context().current_actor
        arguments = (self.plan, me, hosts, meeting, self.resumption, self.executions, self.generation)
        executions = await self.crew.all("setup", *arguments, limit="start_timeout")
        self.executions = [execution.partition(":")[0] for execution in executions]
        self._start_alike(await self.crew.all("start"))
        if self.profile:
            await crew.one(0, "trace", self.profile)
        self.was_ready = True
        await self._catch_up()
        self.folder.append_event("ready", generation=self.generation, hosts=crew.hosts, executions=executions)
        if max(map(len, self.plan.placement.rows)) > 1:
            self.now = replace(self.now, execution=executions[-1])  # of the actor that has the most rows

    def _start_alike(self, starts: Sequence[tuple[Marks, Marks]]) -> None:
        """Makes sure that all actors have built the same initial model, and the one that a checkpoint goes on with.

        Raises:
            RunError: they have not, naming the parameter or buffer.
        """
        untrained = starts[0][1]
        known = [(0, self.constants, untrained)] if self.constants else []
        known += [(rank, untrained, start[1]) for rank, start in enumerate(starts)]
        if not self.resumption:
            known += [(rank, starts[0][0], start[0]) for rank, start in enumerate(starts)]
        for rank, expected, found in known:
            if name := first_difference(expected, found):
                raise RunError(
                    f"model() starts differently in actor {rank}, in {name}: all members must start alike, and as "
                    "before on resuming; draw initial values from torch, numpy or random, which are seeded, and not by "
                    "a set's order"
                )
        self.constants = untrained

    async def _catch_up(self) -> None:
        """Has streams without a state drawn again to where they were: in pieces, for as long as all of it takes."""
        if not self.resumption:
            return
        piece = min(REPLAY_SECONDS, self.plan.config.resources.chunk_timeout / 4)
        start, left = time.monotonic(), sum(await self.crew.all("catch_up", 0.0))
        total, examined = left, self.plan.examined
        why = (examined and examined.replays) or "the checkpoint has no state of theirs"
        while left:
            self._await(f"drawing batches again, {total - left} of {total}: {why}")
            left = sum(await self.crew.all("catch_up", piece))
        if total:
            self.folder.append_event("batches drawn again", draws=total, seconds=time.monotonic() - start)
        self.now = replace(self.now, awaits=None)

    async def _prove_storage(self) -> None:
        """Has every actor show that what it writes is read here, and what is written here is read there."""
        token = token_hex()

        def check(answers: Sequence[str | None]) -> None:
            for rank, (host, wrong) in enumerate(zip(self.crew.hosts, answers, strict=True)):
                proof.conclude(self.folder, token, rank, host, wrong)

        try:
            await asyncio.to_thread(proof.begin, self.folder, token)
            answers = await self.crew.all("prove_storage", self.folder, token, limit="start_timeout")
            await asyncio.to_thread(check, answers)
        finally:
            await asyncio.to_thread(proof.end, self.folder, token)

    async def _find_room(self) -> Crew:
        """Starts the actors; where a run that had them finds no room for as many any more, fewer."""
        resources, placement = self.plan.config.resources, self.plan.placement
        if not self.was_ready:
            return await Crew.start(self.folder.name, placement, resources, tell=self._await)
        deadline = time.monotonic() + resources.start_timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                return await Crew.start(
                    self.folder.name, placement, resources, min(left, ROOM_SECONDS), tell=self._await
                )
            except NoRoom:
                # What others have taken may become free again; a node that is gone is seldom back in seconds.
                actors = room(placement, free=left <= ROOM_SECONDS)
                if actors < len(placement.rows) or left <= ROOM_SECONDS:
                    break
        if 0 < actors < len(placement.rows):
            # Each with as much of the cluster as before.
            taken = {"gpus_per_actor": placement.gpus, "max_actors": actors, "autoscaling": False}
            fewer = place(len(self.plan.W), resources.model_copy(update=taken), nodes_now())
            self.plan = await asyncio.to_thread(replan, self.plan, fewer)
            execution = set(self.executions or ())
            self.executions = [*execution] * actors if len(execution) == 1 else None
            self._event(
                "fewer actors",
                were=placement.describe(),
                actors=self.plan.placement.describe(),
                transport=self.plan.transport.name,
            )
        return await Crew.start(self.folder.name, self.plan.placement, resources, tell=self._await)

    def _await(self, what: str) -> None:
        self.now = replace(self.now, awaits=what)

    async def _fit_transport(self) -> None:
        """Has the transport that serves the hosts where Ray has put the actors, whatever was expected."""
        addresses = sorted(set(self.crew.hosts))
        hosts, planned = tuple(addresses.index(host) for host in self.crew.hosts), self.plan.placement.hosts
        if [planned.index(host) for host in planned] == [hosts.index(host) for host in hosts]:
            return
        before, placement = self.plan.transport.name, replace(self.plan.placement, hosts=hosts)
        self.plan = await asyncio.to_thread(replan, self.plan, placement)
        if self.plan.transport.name != before:
            self._event("transport", was=before, now=self.plan.transport.name, why=self.plan.transport.why)

    async def _train(self) -> None:
        self._enter("training", len(self.plan.factors))
        if not self.course.last:
            await self._observe()
            if self._is_best():
                await self._start_checkpoint(None)
        counted = time.monotonic()
        longest, start, stepping, waited, control, first = 1, time.monotonic(), 0.0, 0.0, 0.0, self.course.step
        while chunk := self.course.next_chunk(self._until_checkpoint(self.course.step, longest)):
            asked = time.monotonic()
            steps: list[Steps] = await self.crew.all("run_steps", chunk)
            slowest = max(steps, key=lambda step: step.seconds)
            taken = slowest.seconds
            stepping, waited, control = (
                stepping + taken,
                waited + slowest.waited,
                control + time.monotonic() - asked - taken,
            )
            longest = max(1, round(CHUNK_SECONDS * len(chunk) / taken))
            since, counted = counted, time.monotonic()
            due = self.course.advance(chunk, counted - since)
            self._took(self.course.step, start, steps, chunk.first, first)
            self.course.leave([departed for step in steps for departed in step.departures])
            if due:
                self._left([one for left in await self.crew.all("inspect") for one in left])
                await self._reseed()
                await self._observe()
            if self.course.stopped:
                self._event("stopped early", step=self.course.step, why=self.course.stopped)
            await self._commit(wait=False)
            if self._checkpoint_due(self.course.step) or (due and self._is_best()):
                await self._start_checkpoint(None)
        steps_taken = self.course.step - first
        self.folder.append_event(
            "trained", steps=steps_taken, step_seconds=stepping, exchange_seconds=waited, control_seconds=control
        )
        if self.profile:
            self._profiled(f"none: fewer than {steps_needed(self.profile)} steps were left")

    def _is_best(self) -> bool:
        """Whether the rows are those of the best evaluation so far, which a front is to be made of."""
        return self.plan.config.front.best and self.course.best is self.course.last

    async def _reseed(self) -> None:
        """Has the rows that are out, and not for good, start again."""
        for start in self.course.reseedings():
            total = Combination()
            for j, share in start.shares.items():  # one at a time: the whole population may not fit in here
                total.add(share, await self._state(j))
            rank, i = self.crew.place(start.subproblem)
            await self.crew.one(rank, "reseed", i, total.model())
            self._event("reseeded", step=self.course.step, subproblem=start.subproblem)

    async def _state(self, subproblem: int) -> dict[str, NDArray[Any]]:
        """A subproblem's model."""
        rank, i = self.crew.place(subproblem)
        state: dict[str, NDArray[Any]] = await self.crew.one(rank, "state", i)
        return state

    async def _observe(self) -> None:
        evaluations = await self._evaluations("validation")
        self.seen = self.course.step, evaluations
        self._record("mtgd", self.course.observe(objective_matrix(evaluations), metric_columns(evaluations)))

    def _record(self, stage: str, seen: Observation, more: Mapping[str, Any] | None = None) -> None:
        """Writes an evaluation on the validation split to the run folder and to MLflow."""
        volume = Hypervolume(seen.hypervolume, seen.hypervolume_error)
        self.now = replace(self.now, hypervolume=volume)
        self.metrics.tell(HYPERVOLUME, volume.value)
        self.metrics.tell(HYPERVOLUME_ERROR, volume.error or 0.0)
        record = {"stage": stage, "step": seen.step, "hypervolume": volume.value, "hypervolume_error": volume.error}
        record["front_size"] = seen.front_size
        curves = self.course.means.take()
        figures = {"validation": seen.F.tolist(), "metrics": seen.metrics, "curves": curves}
        self.folder.append_metrics({**record, **figures, **(more or {})})
        if self.sink:
            self.sink.log_evaluation(
                seen.step, seen.hypervolume, seen.front_size, seen.F, seen.metrics, seen.hypervolume_error
            )
            if curves:
                self.sink.log_member_figures(seen.step, {f"train/{name}": means for name, means in curves.items()})

    async def _fine_tune(self) -> list[FineTuned]:
        assert self.plan.aligned is not None
        trained, total = self.course.step, self.plan.aligned.steps
        self._enter("fine-tuning", total)
        done = 0
        if self.resumption and self.resumption.fine_tuned is not None:
            done = self.resumption.fine_tuned
        else:
            self._left([one for left in await self.crew.all("start_fine_tuning", self.course.ideal) for one in left])
        longest, start, before = 1, time.monotonic(), done
        while done < total:
            n = min(self._until_checkpoint(trained + done, longest), total - done)
            steps: list[Steps] = await self.crew.all("fine_tune_steps", trained + done, n)
            longest = max(1, round(CHUNK_SECONDS * n / max(step.seconds for step in steps)))
            done += n
            self._took(done, start, steps, trained + done - n, before)
            await self._commit(wait=False)
            if self._checkpoint_due(trained + done):
                await self._start_checkpoint(done)
        finished = await self.crew.all("finish_fine_tuning")
        fine_tuned: list[FineTuned] = _in_order([tuned for tuned, _ in finished])
        self._tell_of([one for _, left in finished for one in left])  # back to what they were before
        figures: dict[str, list[float | None]] = {
            "scalarized_before": [one.before for one in fine_tuned],
            "scalarized_after": [one.after for one in fine_tuned],
        }
        stability = {name: [getattr(one, name) for one in fine_tuned] for name in STABILITY}
        evaluations = [one.evaluation for one in fine_tuned]
        seen = self.course.measure(objective_matrix(evaluations), trained + total, metric_columns(evaluations))
        self._record("aligned_mtl", seen, {**figures, **stability, "kept": [one.kept for one in fine_tuned]})
        if self.sink:
            named = {f"aligned_mtl/{name}": values for name, values in figures.items()}
            self.sink.log_member_figures(trained + total, named)
        return fine_tuned

    async def _write_results(self, fine_tuned: Sequence[FineTuned]) -> Report:
        self._enter("writing results", 0)
        await self._commit(wait=True)
        # What another process wrote here and did not come to the end of; the run may have gone on to other steps.
        if await asyncio.to_thread(self.folder.files.children, LAST):
            await asyncio.to_thread(self.folder.files.remove_folder, LAST)
        plan, course = self.plan, self.course
        evaluations = await self._evaluations("test")
        await self._write_models(course, LAST)
        steps = course.step + (plan.aligned.steps if plan.aligned else 0)
        validation = await self._final_validation(fine_tuned)
        front = self._front(course, evaluations, validation, steps, fine_tuned)
        if plan.config.front.best and course.best and course.best.step != steps:
            try:
                await self._write_best(course.best.step)
            except ActorLost:
                raise  # to be recovered from: the run would end without what another has
            except (RunError, OSError, GetTimeoutError, FloatingPointError) as error:  # the run itself is complete
                await asyncio.to_thread(self.folder.files.remove_folder, BEST)
                self._event("no best front", step=course.best.step, why=describe_failure(error))
        if self.sink:
            self.sink.log_rest()
        await asyncio.to_thread(write_front, self.folder, front)  # from here on, see `ending`
        return Report(front, fine_tuned, None, ())

    async def _write_best(self, step: int) -> None:
        """Writes the front of the models at the best evaluation; the actors' rows are those from here on."""
        found = await asyncio.to_thread(checkpoints_at, self.folder, step)
        why = f"there is no whole checkpoint of step {step}"
        for name in found:
            then = self._new_course()
            try:
                files, record = await asyncio.to_thread(whole, self.folder, name, contents=False)
                then.restore(record["course"])
                await self.crew.all("recall", name, files)
            except CheckpointDamaged as error:
                why = describe_failure(error)
                continue
            evaluations = await self._evaluations("test", then)
            validation = await self._evaluations("validation", then)
            await self._write_models(then, BEST)
            front = replace(self._front(then, evaluations, validation, step, ()), best=True)
            await asyncio.to_thread(write_front, self.folder, front)
            return
        self._event("no best front", step=step, why=why)

    async def _write_models(self, course: Course, place: str) -> None:
        for subproblem in range(len(self.plan.W)):
            if subproblem not in course.out:
                state = await self._state(subproblem)
                tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
                await asyncio.to_thread(write_model, self.folder, subproblem, tensors, place)

    def _front(
        self,
        course: Course,
        evaluations: Sequence[Evaluation],
        validation: Sequence[Evaluation],
        steps: int,
        fine_tuned: Sequence[FineTuned],
    ) -> Front:
        """The front of the rows as they are, evaluated on the test split and on validation."""
        plan, lost = self.plan, course.out
        validation = [replace_by_nan(one) if i in lost else one for i, one in enumerate(validation)]
        F = objective_matrix(evaluations)
        metrics = dict(plan.metrics)
        if plan.reference:
            metrics |= dict.fromkeys(DELTA_M, "lower")
        if fine_tuned:
            metrics |= STABILITY_METRICS
        figures = self._figures("test", evaluations, fine_tuned)
        validated = self._figures("validation", validation, fine_tuned)
        assert course.reference_point is not None
        volume = measured_hypervolume(F, course.reference_point)
        return Front(
            objectives=list(plan.objectives),
            reference_point=course.reference_point.tolist(),
            hypervolume=volume.value,
            hypervolume_error=volume.error,
            seed=plan.recipe.seed,
            steps=steps,
            members=[
                Member(
                    subproblem=i,
                    weights=plan.W[i].tolist(),
                    objectives=F[i].tolist(),
                    metrics=figures[i].metrics,
                    stage="aligned_mtl" if fine_tuned and fine_tuned[i].kept else "mtgd",
                    non_dominated=bool(best),
                    model=None if i in lost else model_file(i),
                    reseeds=course.reseeds[i],
                    lost=lost[i].why if i in lost else None,
                    validation=validated[i],
                )
                for i, best in enumerate(non_dominated(objective_matrix(validation)))
            ],
            metrics=metrics,
            baseline=(plan.reference or {}).get("test", {}),
        )

    async def _final_validation(self, fine_tuned: Sequence[FineTuned]) -> list[Evaluation]:
        """The models that the run ends with on the validation split, evaluated again only if nobody has yet."""
        if fine_tuned:
            return [one.evaluation for one in fine_tuned]
        if self.seen and self.seen[0] == self.course.step:
            return self.seen[1]
        return await self._evaluations("validation")

    def _figures(
        self, split: Split, evaluations: Sequence[Evaluation], fine_tuned: Sequence[FineTuned]
    ) -> list[Figures]:
        """The members' figures on a split, with Δm and the medians of the Aligned-MTL stage, where there are any."""
        plan = self.plan
        reference = (plan.reference or {}).get(split)
        directions: dict[str, Direction] = {**dict.fromkeys(plan.objectives, "lower"), **plan.metrics}
        found = []
        for i, evaluation in enumerate(evaluations):
            objectives, metrics = evaluation.objectives.tolist(), dict(evaluation.metrics)
            if reference:
                every = dict(zip(plan.objectives, objectives, strict=True)) | metrics
                metrics |= zip(DELTA_M, delta_m(every, reference, directions, plan.tasks), strict=True)
            if fine_tuned:
                medians = [getattr(fine_tuned[i], name) for name in STABILITY]
                metrics |= zip(STABILITY_METRICS, [math.nan if x is None else x for x in medians], strict=True)
            found.append(Figures(objectives, metrics))
        return found

    async def _end(self, status: Status, timeout: float) -> None:
        """Lets go of the actors and closes MLflow's runs."""
        self._release()
        if self.sink:
            await asyncio.to_thread(self.sink.close, status, timeout)
        self._unwritten()

    def _event(self, kind: str, **details: Any) -> None:
        """Something that a user wants to know of: in the run folder, on the screen, and in MLflow."""
        self.folder.append_event(kind, **details)
        text = ", ".join(f"{name} {value}" for name, value in details.items())
        self.now = self.now.noticing(f"{kind}: {text}")
        if self.sink:
            self.sink.log_event(kind, text)

    def _profiled(self, trace: str) -> None:
        """What has become of the trace that was asked for; a recovery need not take another."""
        self.profile = None
        self._event("profile", trace=trace)

    def _release(self) -> None:
        """Lets go of the actors."""
        if self.started:
            self.started.release()
        self.started = None
        if self.meeting and self.plan.transport.name == "shared_memory":  # left by actors that died while they met
            shutil.rmtree(self.meeting, ignore_errors=True)
            self.meeting = None

    async def _evaluations(self, split: str, course: Course | None = None) -> list[Evaluation]:
        """The members' figures on a split; rows that leave there leave the course, the run's own by default."""
        answers = await self.crew.all("evaluate", split)
        departures = [one for _, left in answers for one in left]
        self._tell_of(departures)
        (course or self.course).leave(departures)
        return _in_order([evaluations for evaluations, _ in answers])

    def _left(self, departures: Sequence[Departure]) -> None:
        """Rows have left the population.

        Raises:
            FloatingPointError: none is left.
        """
        self._tell_of(departures)
        self.course.leave(departures)

    def _tell_of(self, departures: Sequence[Departure]) -> None:
        for departed in departures:
            self._event("left", step=departed.step, subproblem=departed.subproblem, why=departed.why)

    def _enter(self, stage: Stage, steps: int) -> None:
        self.now = replace(self.now, stage=stage, step=0, steps=steps, steps_per_second=None)

    def _took(self, step: int, start: float, steps: Sequence[Steps], first: int, resumed: int) -> None:
        losses = np.concatenate([taken.losses for taken in steps], axis=1)
        for rows, taken in zip(self.plan.placement.rows, steps, strict=True):
            self.course.means.add(rows, taken.curves)
        if steps[0].traced:
            self._profiled(steps[0].traced)
        self._tell_of([one for taken in steps for one in taken.departures])
        finite = losses[np.isfinite(losses)]
        self.now = replace(
            self.now,
            step=step,
            losses=(float(finite.min()), float(finite.max())) if len(finite) else None,
            steps_per_second=(step - resumed) / (time.monotonic() - start),
        )
        self.metrics.tell(STEP, first + len(losses))
        self.metrics.tell(STEPS_PER_SECOND, self.now.steps_per_second or 0.0)
        if self.sink:
            taken_steps = np.arange(first, first + len(losses)) + 1
            self.sink.log_training_losses(taken_steps, losses)
            if stability := [taken.stability for taken in steps if taken.stability is not None]:
                self.sink.log_stability(taken_steps, np.concatenate(stability, axis=1))


def describe_failure(error: BaseException) -> str:
    """The cause of a failure in one line, without the layers that it came through."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RunError | FloatingPointError | ValueError | TimeoutError | ConnectionError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"


def replace_by_nan(evaluation: Evaluation) -> Evaluation:
    """That of a model which is no longer there."""
    return Evaluation(torch.full_like(evaluation.objectives, math.nan), dict.fromkeys(evaluation.metrics, math.nan))


def _in_order(results: Sequence[Sequence[Any]]) -> list[Any]:
    """One list over all rows, from one list for each actor."""
    return [one for block in results for one in block]
