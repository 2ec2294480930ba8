"""What a run shows: its plan, its progress, its front."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich import console as rich_console
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text

from popmtl.errors import RequestError
from popmtl.method.front import Hypervolume, exact_points
from popmtl.runs.baseline import SINGLE_TASK
from popmtl.runs.choice import chosen_on_test, figures_of, in_words, knee_of
from popmtl.runs.comparison import Comparison
from popmtl.runs.files import to_json
from popmtl.runs.folder import METRICS, RunFolder, states
from popmtl.runs.front import Front
from popmtl.runs.records import Volume
from popmtl.runs.storage import said
from popmtl.text import in_bytes, printable

if TYPE_CHECKING:  # they import Ray and torch
    from ray.job_submission import JobDetails

    from popmtl.config import LRScheduleConfig, OptimizerConfig
    from popmtl.distributed.plan import RunPlan
    from popmtl.distributed.progress import Progress

LINE_SECONDS = 10.0
"""Between two progress lines where there is no terminal."""


def _plain(shown: Any) -> Any:
    """Text as it is, without markup, and printable; anything else as it was."""
    return Text(printable(shown)) if isinstance(shown, str) else shown


class Console(rich_console.Console):
    """A console for text from outside: nothing in it is markup, or controls the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        super().print(*map(_plain, objects), **options)


class _Table(Table):
    def add_column(self, header: Any = "", *more: Any, **options: Any) -> None:
        super().add_column(_plain(header), *more, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line every ten seconds and at each new stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self.stage: str | None = None
        self.execution: str | None = None
        self.notices = 0
        self.shown = 0.0

    def __enter__(self) -> ProgressLine:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, progress: Progress) -> None:
        """Shows where the run stands."""
        line = progress_text(progress)
        if progress.execution != self.execution:
            self.execution = progress.execution
            self.console.print(f"rows of an actor: {self.execution}", highlight=False, soft_wrap=True)
        new = progress.noticed - self.notices
        if new > len(progress.notices):
            self.console.print(f"{new - len(progress.notices)} more are in events.jsonl", style="yellow")
        for notice in progress.notices[-new:] if new else ():
            self.console.print(notice, style="yellow", highlight=False, soft_wrap=True)
        self.notices = progress.noticed
        if self.live:
            self.live.update(_plain(line), refresh=True)
        elif progress.stage != self.stage or time.monotonic() - self.shown >= LINE_SECONDS:
            self.console.print(line, highlight=False, soft_wrap=True)
            self.stage, self.shown = progress.stage, time.monotonic()


def progress_text(progress: Progress) -> str:
    """One line: stage, step, losses, hypervolume, speed and time left, as far as they are known."""
    parts = [f"{progress.stage} {progress.step}/{progress.steps}" if progress.steps else progress.stage]
    if progress.awaits:
        parts.append(progress.awaits)
    if progress.losses:
        parts.append(f"loss {progress.losses[0]:.4g} to {progress.losses[1]:.4g}")
    if progress.hypervolume is not None:
        parts.append(f"hypervolume {progress.hypervolume:.5g}")
    if progress.steps_per_second:
        parts.append(f"{progress.steps_per_second:.3g} steps/s")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " · ".join(parts)


def print_plan(console: Console, plan: RunPlan) -> None:
    """The plan as `--dry-run` shows it."""
    config = plan.config
    dtype = str(plan.recipe.dtype).removeprefix("torch.")
    lines = [
        ("problem", f"{config.problem.name}: {', '.join(plan.objectives)}"),
        ("subproblems", f"{len(plan.W)}, {config.scalarization.name}"),
        ("steps", f"{len(plan.factors)} MTGD" + (f", {plan.aligned.steps} Aligned-MTL" if plan.aligned else "")),
        ("optimizer", _optimizer(plan)),
        ("actors", plan.placement.describe()),
        ("rows per actor", ", ".join(str(len(rows)) for rows in plan.placement.rows)),
        ("GPUs", f"{len(plan.placement.rows) * plan.placement.gpus:g}"),
        ("order", config.transfer.order),
        ("transport", f"{plan.transport.name}: {plan.transport.why}" if plan.transfers else "none: nothing transfers"),
        ("overlap", plan.transport.overlap if plan.transfers else "none: nothing transfers"),
        ("parameters", f"{plan.parameters:,} a model, {plan.transferring:,} of them transfer, {dtype}"),
        ("sent per step", _sent(plan)),
        ("memory per actor", _memory(plan)),
    ]
    if plan.rehearsal.stackable:
        lines.insert(-2, ("execution", f"loop: {plan.rehearsal.stackable}"))
    if plan.examined:
        lines.insert(-2, ("batches", plan.examined.describe(plan.draws)))
    if stop := plan.stop:
        patience = f"{stop.patience} evaluations without an improvement" if stop.patience else ""
        if stop.min_improvement:
            patience += f" by more than {stop.min_improvement:.3g} of the hypervolume"
        hours = f"{stop.max_hours:.3g} hours" if stop.max_hours else ""
        lines.insert(3, ("stops early", f"after {' or '.join(filter(None, (patience, hours)))}"))
    m, exact = len(plan.objectives), exact_points(len(plan.objectives))
    if len(plan.W) > exact:
        estimated = f"estimated, with its error, where more than {exact} of {len(plan.W)} models are non-dominated"
        lines.insert(3, ("hypervolume", f"{estimated}: the exact one of {m} objectives takes too long"))
    if plan.aligned and plan.aligned.variant == "exact":
        lines.insert(-2, ("aligned", f"{plan.shared:,} shared parameters"))
    if config.baseline:
        own = f"{len(plan.objectives)} models of one objective each, trained first"
        lines.insert(3, ("baseline", own if config.baseline == SINGLE_TASK else config.baseline))
    if plan.defaults:
        lines.append(("of the problem", ", ".join(f"{key}={to_json(value)}" for key, value in plan.defaults.items())))
    grid = _Table.grid(padding=(0, 2))
    for name, value in lines:
        grid.add_row(name, value)
    console.print(grid)
    table = _table()
    for name in ("subproblem", f"weights of {', '.join(plan.objectives)}", "keeps of its own"):
        table.add_column(name, justify="right")
    table.add_column("takes most from")
    for i, (w, row) in enumerate(zip(plan.W, plan.M, strict=True)):
        others = sorted((j for j in range(len(row)) if j != i and row[j] > 0), key=lambda j: -row[j])[:2]
        takes = ", ".join(f"{row[j]:.2f} of {j}" for j in others) if plan.transfers else "none"
        table.add_row(str(i), " ".join(f"{x:.3f}" for x in w), f"{row[i]:.2f}" if plan.transfers else "1.00", takes)
    console.print(table)
    print_warnings(console, plan.warnings)


def _component(section: OptimizerConfig | LRScheduleConfig) -> str:
    """A class and its arguments, as one would call it."""
    arguments = ", ".join(f"{key}={value}" for key, value in (section.model_extra or {}).items())
    return f"{section.name}({arguments})"


def _optimizer(plan: RunPlan) -> str:
    """The optimizer, its schedules one after the other, and what it steps."""
    train = plan.config.train
    given = train.lr_schedule or []
    schedules = given if isinstance(given, list) else [given]
    lasting = [_component(one) + (f" for {one.lasts}" if one.lasts else "") for one in schedules]
    of = "whole rows" if plan.rehearsal.stepping == "rows" else "the model's own parameters"
    groups = f" with {len(train.optimizer.groups)} groups" if train.optimizer.groups else ""
    return ", ".join([_component(train.optimizer) + groups, *([" then ".join(lasting)] if lasting else []), f"of {of}"])


def _memory(plan: RunPlan) -> str:
    """What an actor takes; apart what all its members share, where that is much."""
    constant = plan.rehearsal.constant_bytes
    once = f"; of it {in_bytes(constant)} of frozen parameters and buffers, once" if constant >= 2**20 else ""
    return f"{in_bytes(plan.memory_per_actor())} and activations, {in_bytes(plan.memory_per_row())} a member more{once}"


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """One line each."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def print_front(console: Console, front: Front) -> None:
    """The front as a table of figures on the test split, with marks of the split by which members are chosen.

    Dominated members are dim and have no star, the knee has a k.
    """
    point = ", ".join(f"{x:.3g}" for x in front.reference_point)
    size = sum(member.non_dominated for member in front.members)
    marks = f"{size} non-dominated on {front.chosen_on}" if front.chosen_on != "test" else f"{size} non-dominated"
    which = f" of the best evaluation, step {front.steps}" if front.best else ""
    title = f"Pareto front{which}, test split: {marks}, hypervolume {front.volume:.5g} at ({point})"
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    metrics = list(front.members[0].metrics)
    knee = knee_of(front)
    table = _table()
    table.add_column("model", justify="right")
    for name in ("weights", *front.objectives, *metrics):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("stage")
    for member in front.members:
        figures = [*member.objectives, *(member.metrics.get(name, math.nan) for name in metrics)]
        table.add_row(
            f"{'k' if member is knee else ''}{'*' if member.non_dominated else ' '} {member.subproblem}",
            " ".join(f"{w:.2f}" for w in member.weights),
            *(f"{figure:.4g}" for figure in figures),
            member.stage,
            style=None if member.non_dominated else "dim",
        )
    console.print(table)
    knee_mark = ", k knee (nearest to the best of all objectives at once)" if knee else ""
    split = f"on the {front.chosen_on} split, by which members are chosen"
    console.print(f"* non-dominated{knee_mark}: {split}", style="dim", highlight=False, soft_wrap=True)
    if front.chosen_on != "test":
        console.print("figures: on the test split; front.csv has both", style="dim", highlight=False)
    if warning := chosen_on_test(front):
        print_warnings(console, [warning])
    for member in front.members:
        if member.lost:
            again = f", and {member.reseeds} new starts did not help" if member.reseeds else ""
            print_warnings(console, [f"subproblem {member.subproblem} was lost: {member.lost}{again}"])


def print_choice(console: Console, choice: Mapping[str, Any]) -> None:
    """A chosen member, from `popmtl.runs.choice.described`, and the code that loads it."""
    by = in_words(choice["chosen"], list(choice["objectives"]))
    line = f"model {choice['subproblem']} of {choice['location']}, by {by}, on the {choice['chosen_on']} split"
    console.print(line, style="bold", highlight=False, soft_wrap=True, markup=False)
    splits = {split: figures for split, figures in figures_of(choice).items() if figures}
    table = _table()
    for name in ("figure", *splits, "weight"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name in choice["objectives"]:
        values = [f"{figures['objectives'][name]:.6g}" for figures in splits.values()]
        table.add_row(name, *values, f"{choice['weights'][name]:.3f}")
    for name in dict.fromkeys(name for figures in splits.values() for name in figures["metrics"]):
        known = [figures["metrics"].get(name) for figures in splits.values()]
        table.add_row(name, *("-" if value is None else f"{value:.6g}" for value in known))
    console.print(table)
    for line in (f"stage  {choice['stage']}", f"file   {choice['file']}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for line in ("", *choice["load"]):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The runs' figures as a table, and their coverage of each other as a matrix."""
    point = ", ".join(f"{x:.3g}" for x in comparison.reference_point)
    title = f"{len(comparison.names)} fronts, test split; hypervolume at ({point}), the worst of their reference points"
    marks = "non-dominated and best: of the models that are so on the validation split; their figures are those on test"
    if without := [name for name, split in zip(comparison.names, comparison.chosen_on, strict=True) if split == "test"]:
        marks += f" ({', '.join(without)}: no validation figures, so on test)"
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    table = _table()
    table.add_column("run", overflow="fold")
    for name in ("non-dominated", "hypervolume", "share", *(f"best {name}" for name in comparison.objectives)):
        table.add_column(name, justify="right", overflow="fold")
    for i, name in enumerate(comparison.names):
        best = [f"{value:.4g}" for value in comparison.best[i]]
        size, share = comparison.sizes[i], comparison.shares[i]
        volume = Hypervolume(comparison.hypervolumes[i], comparison.hypervolume_errors[i])
        table.add_row(f"{i + 1} {name}", str(size), f"{volume:.5g}", _share(share), *best)
    console.print(table)
    console.print(marks, style="dim", highlight=False, soft_wrap=True)
    console.print("share: of the models that no other run's dominates either", style="dim", highlight=False)
    table = _table()
    for name in ("coverage", *(f"of {i + 1}" for i in range(len(comparison.names)))):
        table.add_column(name, justify="right")
    for i, row in enumerate(comparison.coverage):
        table.add_row(f"by {i + 1}", *(_share(share) for share in row))
    console.print(table)
    what = "coverage: how much of the column's front is dominated by or equal to a model of the row's run"
    console.print(what, style="dim", highlight=False)


def print_runs(console: Console, folders: Sequence[RunFolder]) -> None:
    """One row a run: how it stands, and the last evaluation that it wrote; below, what is damaged."""
    table = _table()
    for name in ("run", "state", "step", "hypervolume"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    damaged: list[str] = []
    found = states(folders, damaged.append)
    for folder, state in zip(folders, found, strict=True):
        last: dict[str, Any] = {}
        try:
            last = folder.last(METRICS, Volume) or {}
        except RequestError as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{folder.location} cannot be read: {said(error)}")
        figure = last.get("hypervolume")
        shown = f"{Hypervolume(figure, last.get('hypervolume_error')):.5g}" if figure is not None else ""
        table.add_row(folder.name, state, str(last.get("step", "")), shown)
    console.print(table)
    for folder, state in zip(folders, found, strict=True):
        if state == "incomplete":
            command = f"popmtl train --resume {shlex.quote(folder.location)}"
            console.print(f"{command} brings what its end lacks", highlight=False, soft_wrap=True, markup=False)
    print_warnings(console, damaged)


def print_jobs(console: Console, jobs: Sequence[JobDetails]) -> None:
    """One row a job of a cluster: how it stands, since when, and for how long."""
    table = _table()
    for name in ("job", "state", "started", "took", "exit code"):
        table.add_column(name, justify="left" if name in ("job", "state") else "right")
    for job in jobs:
        start = (job.start_time or 0) / 1000
        seconds = round((job.end_time / 1000 if job.end_time else time.time()) - start)
        table.add_row(
            str(job.submission_id),
            job.status.value.lower(),
            f"{datetime.fromtimestamp(start):%Y-%m-%d %H:%M:%S}" if start else "",
            str(timedelta(seconds=seconds)) if start else "",
            "" if job.driver_exit_code is None else str(job.driver_exit_code),
        )
    console.print(table)


def _table() -> _Table:
    return _Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _share(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _sent(plan: RunPlan) -> str:
    hosts, between = len(set(plan.placement.hosts)), plan.bytes_between_hosts_per_step()
    sent = in_bytes(plan.bytes_sent_per_step())
    return f"{sent}, {in_bytes(between)} of it between {hosts} hosts" if between else sent
