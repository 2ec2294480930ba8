"""The command line: `popmtl train CONFIG [key.path=value …]`, and what is done with the runs that it leaves."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from popmtl import __version__, modules
from popmtl.arguments import Parser, check_texts, cluster_address, message, numbers, port, steps
from popmtl.errors import RequestError, RunError
from popmtl.text import printable

if TYPE_CHECKING:
    from popmtl.config import Config
    from popmtl.display import Console
    from popmtl.distributed.placement import Nodes
    from popmtl.distributed.plan import RunPlan
    from popmtl.runs.baseline import SingleTask
    from popmtl.runs.folder import RunFolder

OK, FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130
COORDINATOR_SECONDS = 120.0
"""How long a coordinator that outlived its driver is waited for, where no setting says."""

LAST_LINES = 20
"""Of a job's output, that `popmtl status` shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code: 0, 1 for a failed run, 2 for a bad request, 130 when interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest and not hasattr(options, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest  # argparse leaves those that come after an option
    check_texts(parser, options)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal's encoding lacks a character
    try:
        if options.call is not runs:
            _check_current_folder()
        # The user's own problem lies beside the config, or where the command is given.
        modules.look_in(*([os.path.dirname(options.config)] if getattr(options, "config", None) else []), "")
        code: int | None = options.call(options)
    except RequestError as error:
        print(f"popmtl: {message(error)}", file=sys.stderr)
        return BAD_REQUEST
    except RunError as error:
        print(f"popmtl: {message(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("popmtl: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or OK


def _check_current_folder() -> None:
    """Neither torch nor Ray can do without it, and a path may be relative to it.

    Raises:
        RequestError: it was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise RequestError("the current folder is gone: it was removed; go to another") from error


def train(options: argparse.Namespace) -> None:
    """`popmtl train`: checks everything, runs it, and prints the front."""
    # Ray and torch take seconds to import, which --help and a misspelt option need not wait for.
    from popmtl.config import load_config, resumed_config
    from popmtl.display import ProgressLine, print_front, print_plan, print_warnings
    from popmtl.distributed import driver
    from popmtl.distributed.placement import local_nodes
    from popmtl.distributed.plan import make_plan
    from popmtl.distributed.profile import steps_needed
    from popmtl.distributed.resumption import find_checkpoint
    from popmtl.method.uncompiled import leave_the_compiler_out
    from popmtl.runs.baseline import SINGLE_TASK, baseline_name
    from popmtl.runs.folder import COORDINATOR_LOCK, RunFolder
    from popmtl.runs.front import BEST
    from popmtl.runs.names import check_run_name
    from popmtl.runs.reading import passing_over
    from popmtl.runs.storage import split
    from popmtl.tracking.links import where_to_look

    leave_the_compiler_out()
    if options.resume:
        _take_config_for_override(options)
        folder = RunFolder(options.resume)
        with _reading(options.resume):
            folder.files.check_links()
            if folder.lacks_config():
                if not options.config:
                    raise RequestError(
                        f"{folder.location} has no config.yaml: its process was killed as it made it; give CONFIG, too"
                    )
                if not (folder.is_begun() or options.trust):
                    raise RequestError(
                        f"{folder.location} has no config.yaml, so that nothing tells whose run it is: give --trust if "
                        "you trust who made it"
                    )
                config = load_config(options.config, options.overrides)
            elif folder.has_front():
                _complete_front(folder, options)
                return
            else:
                # Before the config is checked: that imports an optimizer's module.
                _admit_code(folder, options.trust)
                config = resumed_config(folder.config(), options.config, options.overrides)
                _admit_tracking(folder, config, options.trust)
        config = config.model_copy(update={"storage": split(folder.location)[0]})
        name = folder.name
    else:
        if not options.config:
            raise RequestError("train: give a CONFIG, or --resume RUN")
        config = load_config(options.config, options.overrides)
        name = printable(Path(options.config).stem)
        run_name = _name_of_new_run(options)
        if config.baseline == SINGLE_TASK:
            check_run_name(baseline_name(run_name))
        if options.storage:
            config = config.model_copy(update={"storage": options.storage})
    console = _console()
    with ExitStack() as session:
        # Without a cluster to ask, what is wrong is said before Ray takes its seconds to start.
        nodes = session.enter_context(driver.cluster(options.address)) if options.address else local_nodes()
        plan = make_plan(config, nodes)
        config = plan.config
        if options.profile and steps_needed(options.profile) > len(plan.factors):
            needed = steps_needed(options.profile)
            raise RequestError(
                f"--profile {options.profile}: needs {needed} steps, and train.steps is {len(plan.factors)}"
            )
        if options.dry_run:
            print_plan(console, plan)
            return
        if not options.resume:
            folder = RunFolder.create(config.storage, run_name)
        session.enter_context(folder.held())
        begins = ""
        if options.resume:
            damaged: list[str] = []
            with folder.held(COORDINATOR_LOCK, wait=config.resources.start_timeout):  # of a run that was just killed
                if folder.has_front():  # by now
                    raise RequestError(_has_front(folder))
                # Behind a URL the contents are read once, by the actors.
                contents = folder.files.path is not None
                checkpoint = find_checkpoint(folder, plan, damaged.append, contents=contents)
            damaged_lines: list[str] = []
            folder.events(damaged_lines.append)
            print_warnings(console, [f"damaged checkpoint, passed over: {what}" for what in damaged])
            print_warnings(console, [f"damaged line, passed over: {what}" for what in damaged_lines])
            begins = f" goes on from {checkpoint[0]}" if checkpoint else " has no checkpoint: starts from the beginning"
        folder.write_config(config.resolved(), new=not options.resume or folder.lacks_config())
        console.print(f"run {folder.location}{begins}", highlight=False, soft_wrap=True)
        if plan.transfers:
            console.print(f"transport {plan.transport.name}: {plan.transport.why}", highlight=False, soft_wrap=True)
        print_warnings(console, plan.warnings)
        if not options.address:
            session.enter_context(driver.cluster(None, int(nodes[0]["CPU"])))
        if config.baseline == SINGLE_TASK:
            plan = replace(plan, reference=_train_baseline(console, plan, nodes, folder, name, options.trust))
        with ProgressLine(console) as line:
            resumes = bool(options.resume)
            report = driver.run(plan, folder.location, name, line.show, resumes=resumes, profile=options.profile)
    print_front(console, report.front)
    events = folder.events(passing_over)  # it was said
    for event in [event for event in events if event["kind"] == "stopped early"][-1:]:
        if event["step"] + (plan.aligned.steps if plan.aligned else 0) == report.front.steps:  # and was not resumed
            at = f"step {event['step']} of {len(plan.factors)}"
            console.print(f"MTGD stopped early, at {at}: {event['why']}", highlight=False, soft_wrap=True)
    if report.fine_tuned:
        kept = sum(one.kept for one in report.fine_tuned)
        console.print(f"Aligned-MTL improved {kept} of {len(report.fine_tuned)} models; the others are as before it.")
    for what, file in (("explore", "explorer.html"), ("picture", "front.png"), ("models ", "models")):
        console.print(f"{what} {folder.files.where(f'pareto/{file}')}", highlight=False, soft_wrap=True)
    if folder.files.entry(f"{BEST}/front.json"):
        shown = f"popmtl front {shlex.quote(folder.location)} --from best"
        console.print(f"best    {folder.files.where(BEST)}: {shown}", highlight=False, soft_wrap=True)
    if options.profile:  # what was said while it ran may have come too late to be shown
        for event in [event for event in events if event["kind"] == "profile"][-1:]:
            console.print(f"profile {event['trace']}", highlight=False, soft_wrap=True)
    print_warnings(console, [*report.unwritten, *(f"MLflow: {complaint}" for complaint in report.complaints)])
    if report.location:
        for hint in where_to_look(report.location, folder.location):
            console.print(hint, highlight=False, soft_wrap=True)


def _admit_code(folder: RunFolder, trust: bool) -> None:
    """Checks that what the config of a run names may be imported and run here.

    Raises:
        RequestError: the folder is a stranger's, and `trust` was not given.
    """
    from popmtl.runs.trust import admit, problem_of

    config = folder.config()
    for change in admit(folder, problem_of(config), trust, "--trust", _note):
        _note(f"warning: {change}")


def _admit_tracking(folder: RunFolder, config: Config, trust: bool) -> None:
    """Checks that MLflow is where the user has named it.

    Raises:
        RequestError: the folder is a stranger's, and `trust` was not given.
    """
    from popmtl.tracking.mlflow_sink import check_opening

    if config.tracking.enabled:
        check_opening(folder, config.tracking.uri, trust)


def _note(text: str) -> None:
    print(f"popmtl: {printable(text)}", file=sys.stderr)


def _name_of_new_run(options: argparse.Namespace) -> str:
    """The name that was given, or one of the config's name and the time."""
    from popmtl.runs.names import check_run_name

    if options.run_name:
        return check_run_name(options.run_name)
    return check_run_name(f"{Path(options.config).stem}-{datetime.now():%Y%m%d-%H%M%S}", "; or give a --run-name")


def _train_baseline(
    console: Console, plan: RunPlan, nodes: Nodes, folder: RunFolder, name: str, trust: bool
) -> SingleTask:
    """Trains the single-task models of a run beside it, unless they are there; their figures.

    Args:
        console: to write to.
        plan: of the run.
        nodes: of the cluster.
        folder: the run's.
        name: what MLflow's experiment is named by.
        trust: whether the user trusts who made the folder of the single-task models, where it is there.

    Raises:
        RequestError: there is another run where they would be.
        RunError: the training failed.
    """
    from popmtl.config import decisive, single_task, validated
    from popmtl.display import ProgressLine, print_warnings
    from popmtl.distributed import driver
    from popmtl.distributed.plan import make_plan
    from popmtl.runs.baseline import baseline_name, single_task_figures
    from popmtl.runs.folder import RunFolder, last_word
    from popmtl.runs.storage import joined

    config = single_task(plan.config, len(plan.objectives))
    if os.environ.get("MLFLOW_RUN_ID"):  # that run is for the population
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    own = baseline_name(folder.name)
    beside = RunFolder(joined(config.storage, own))
    resumes = beside.files.entry("config.yaml") is not None
    if resumes:
        beside.files.check_links()
        _admit_code(beside, trust)
    if resumes and decisive(validated(beside.config(), f"config.yaml of {beside.location}")) != decisive(config):
        raise RequestError(f"{beside.location}: is of another config than this run's baseline; move it away")
    if not beside.has_front():
        if resumes:
            _admit_tracking(beside, config, trust)
        else:
            beside = RunFolder.create(config.storage, own)
        with beside.held():
            beside.write_config(config.resolved(), new=not resumes)
            console.print(f"baseline {beside.location}", highlight=False, soft_wrap=True)
            with ProgressLine(console) as line:
                report = driver.run(make_plan(config, nodes), beside.location, name, line.show, resumes=resumes)
        print_warnings(console, [f"MLflow: {complaint}" for complaint in report.complaints])
    elif last_word(beside) != "finished":
        _completed(beside, trust)
    return single_task_figures(beside, plan.objectives, plan.tasks)


def submit(options: argparse.Namespace) -> int:
    """`popmtl submit`: has a cluster run `popmtl train`, and follows it; its exit code."""
    from popmtl.config import load_config
    from popmtl.distributed.jobs import Jobs
    from popmtl.runs.storage import is_remote, split

    if options.resume:
        _take_config_for_override(options)
    working_dir = Path(options.working_dir).resolve()
    if not working_dir.is_dir():
        raise RequestError(f"--working-dir {options.working_dir}: is not a folder")
    shipped = []
    if options.config:
        config = load_config(options.config, options.overrides)  # what is wrong with it is said here and now
        path = Path(options.config).resolve()
        if not path.is_relative_to(working_dir):
            raise RequestError(f"config {options.config}: is not in {working_dir}, which is shipped; see --working-dir")
        shipped = [path.relative_to(working_dir).as_posix()]
    elif not options.resume:
        raise RequestError("submit: give a CONFIG, or --resume RUN")
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    if options.resume:
        run = options.resume
        name = f"{split(run)[1]}-resumed-{now}"
        where = ["--resume", run, *(["--trust"] if options.trust else [])]
    else:
        storage = options.storage or config.storage
        name = _name_of_new_run(options)
        where = ["--run-name", name, "--storage", storage]
        run = storage
    if not (is_remote(run) or Path(run).is_absolute()):
        what = f"--resume {run}" if options.resume else f"storage {run}"
        raise RequestError(f"{what}: on a cluster give a path that all its machines share, from the root, or a URL")
    jobs = Jobs(options.address)
    dry = ["--dry-run"] if options.dry_run else []
    job = jobs.submit(f"{name}-dry-run" if dry else name, [*shipped, *options.overrides, *where, *dry], working_dir)
    later = f"popmtl status {job} --address {jobs.address}\npopmtl stop {job} --address {jobs.address}"
    if options.detach:
        print(f"job {job} was submitted\n{later}")
        return OK
    print(f"job {job}", flush=True)

    def write(text: str) -> None:
        print(printable(text, "\n\t"), end="", flush=True)

    try:
        return jobs.follow(job, write)
    except KeyboardInterrupt:
        print(f"\nthe run goes on\n{later}", file=sys.stderr)
        return INTERRUPTED


def status(options: argparse.Namespace) -> None:
    """`popmtl status`: the runs among a cluster's jobs, or one of them with its last lines."""
    from popmtl.display import Console, print_jobs
    from popmtl.distributed.jobs import Jobs

    jobs = Jobs(options.address)
    print_jobs(Console(emoji=False), [jobs.details(options.job)] if options.job else jobs.all())
    if options.job:
        for line in jobs.last_lines(options.job, LAST_LINES):
            _say(line)


def stop(options: argparse.Namespace) -> None:
    """`popmtl stop`: interrupts a job's run."""
    from popmtl.distributed.jobs import Jobs

    jobs = Jobs(options.address)
    _say(f"{options.job} has been stopped" if jobs.stop(options.job) else f"{options.job} had ended")


def _take_config_for_override(options: argparse.Namespace) -> None:
    """With --resume the first override stands where CONFIG would, if none was given."""
    if options.config and "=" in options.config and not os.path.exists(options.config):
        options.config, options.overrides = None, [options.config, *options.overrides]


def _complete_front(folder: RunFolder, options: argparse.Namespace) -> None:
    """`popmtl train --resume` of a run that has its front: brings what is lacking of its end, without Ray.

    Raises:
        RequestError: nothing is, or the request changes what comes before the front.
        RunError: MLflow has not taken everything.
    """
    from popmtl.runs.folder import last_word

    if last_word(folder) == "finished":
        raise RequestError(f"{folder.location}: this run has finished")
    if (options.config or options.overrides) and _changes_what_is_done(folder, options):
        raise RequestError(f"{_has_front(folder)}; train, fine_tune and tracking cannot change any more")
    if options.dry_run:
        _say(_has_front(folder))
        return
    _complete_baseline(folder, options.trust)
    _completed(folder, options.trust)


def _changes_what_is_done(folder: RunFolder, options: argparse.Namespace) -> bool:
    """Whether a request asks for other settings of what comes before the front."""
    from popmtl.config import resumed_config, validated

    _admit_code(folder, options.trust)
    config = resumed_config(folder.config(), options.config, options.overrides)
    own = validated(folder.config(), f"config.yaml of {folder.location}")
    return (config.train, config.fine_tune, config.tracking) != (own.train, own.fine_tune, own.tracking)


def _has_front(folder: RunFolder) -> str:
    command = f"popmtl train --resume {shlex.quote(folder.location)}"
    return f"{folder.location} has its front, and may lack what comes after it: {command} brings it"


def _complete_baseline(folder: RunFolder, trust: bool) -> None:
    """Brings what is lacking of the single-task models' run beside a run, where there is one that has its front."""
    from popmtl.runs.baseline import SINGLE_TASK, baseline_name
    from popmtl.runs.folder import RunFolder, last_word
    from popmtl.runs.storage import joined, split

    if folder.config().get("baseline") == SINGLE_TASK:
        beside = RunFolder(joined(split(folder.location)[0], baseline_name(folder.name)))
        if beside.has_front() and last_word(beside) != "finished":
            _completed(beside, trust)


def _completed(folder: RunFolder, trust: bool, *, asked: bool = False) -> None:
    """Brings what is lacking of a run's end, and says where it is in MLflow.

    Args:
        folder: the run's.
        trust: whether the user trusts who made it.
        asked: for what MLflow has not got; also of a run without a front, and not of one that was never tracked.

    Raises:
        RequestError: another process works on the run, it was never tracked, or its front.json is damaged.
        RunError: MLflow has not taken everything.
    """
    from popmtl.runs.folder import COORDINATOR_LOCK
    from popmtl.tracking.ending import complete, complete_front, is_tracked
    from popmtl.tracking.links import where_to_look

    # The coordinator of a driver that was killed goes on for some seconds.
    with folder.held(), folder.held(COORDINATOR_LOCK, wait=COORDINATOR_SECONDS):
        tracked = asked or is_tracked(folder)
        ended = complete(folder, trust=trust, say=_note) if tracked else complete_front(folder, None)
    if ended.location:
        for line in where_to_look(ended.location, folder.location):
            _say(line)
    if not ended.complete:
        raise RunError("MLflow: " + "; ".join(ended.complaints))
    for complaint in ended.complaints:
        _note(f"warning: MLflow: {complaint}")


def runs(options: argparse.Namespace) -> None:
    """`popmtl runs`: the runs in a storage folder, the latest last."""
    from popmtl.display import Console, print_runs
    from popmtl.runs.folder import runs_in

    storage = options.storage or "runs"
    with _reading(storage):
        print_runs(Console(emoji=False), runs_in(storage))


def front(options: argparse.Namespace) -> None:
    """`popmtl front`: the front of a finished run."""
    from popmtl.display import print_front
    from popmtl.runs.choice import finished_front
    from popmtl.runs.folder import RunFolder
    from popmtl.runs.front import PLACES

    folder = RunFolder(options.run)
    with _reading(options.run):
        found = finished_front(folder, place := PLACES[options.source])
        content = folder.read(f"{place}/front.json").decode()
    if options.plot:
        from popmtl.runs.picture import draw_front

        _draw(options, lambda file: draw_front(found, file))
    if options.json:
        print(printable(content, "\n"), end="")
    else:
        print_front(_console(), found)


def pick(options: argparse.Namespace) -> None:
    """`popmtl pick`: chooses a model of a finished run, and exports it."""
    from popmtl.display import print_choice
    from popmtl.runs.choice import choose, chosen_on_test, described, finished_front
    from popmtl.runs.export import export
    from popmtl.runs.files import to_json
    from popmtl.runs.folder import RunFolder
    from popmtl.runs.front import PLACES

    if not (options.preference or options.knee or options.best or options.where):
        raise RequestError("pick: give --preference, --knee or --best, or --where alone")
    folder = RunFolder(options.run)
    with _reading(options.run):
        found = finished_front(folder, PLACES[options.source])
    choice = choose(found, preference=options.preference, at_knee=options.knee, best=options.best, where=options.where)
    member = choice.member.subproblem
    code: list[str] = []
    warnings = [warning] if (warning := chosen_on_test(found)) else []
    if choice.dominated_by:
        others = ", ".join(str(other) for other in choice.dominated_by)
        warnings.append(f"model {member} is dominated by {others}: no non-dominated model satisfies the constraints")
    if options.export:
        say = _note if options.trust else code.append
        with _reading(options.run):
            warnings += export(folder, found, choice, options.export, trust=options.trust, say=say)
    for warning in warnings:
        _note(f"warning: {warning}")
    if options.json:
        exported = {"exported": str(Path(options.export).resolve())} if options.export else {}
        print(printable(to_json(described(folder, found, choice) | exported, indent=2), "\n"))
        return
    print_choice(_console(), described(folder, found, choice))
    if options.export:
        for line in ("", *code, f"exported to {Path(options.export).resolve()}"):
            _say(line)


def compare(options: argparse.Namespace) -> None:
    """`popmtl compare`: the fronts of several runs against each other."""
    from popmtl.display import print_comparison
    from popmtl.runs.choice import finished_front
    from popmtl.runs.comparison import compare_fronts, front_points
    from popmtl.runs.files import to_json
    from popmtl.runs.folder import RunFolder

    folders = [RunFolder(run) for run in options.runs]
    fronts = []
    for folder in folders:
        with _reading(folder.location):
            fronts.append(finished_front(folder))
    places = [folder.location for folder in folders]
    names = [folder.name for folder in folders]
    comparison = compare_fronts(names if len(set(names)) == len(names) else places, fronts)
    if options.plot:
        from popmtl.runs.picture import draw_fronts

        points = [front_points(front) for front in fronts]
        _draw(options, lambda file: draw_fronts(comparison.names, comparison.objectives, points, file))
    if options.json:
        print(printable(to_json(asdict(comparison), indent=2), "\n"))
    else:
        print_comparison(_console(), comparison)


def _say(text: str) -> None:
    """Prints a line, whatever the names in it are made of."""
    print(printable(text), flush=True)


def _console() -> Console:
    from popmtl.display import Console

    console = Console(emoji=False)
    return (
        console if console.is_terminal else Console(width=120, emoji=False)
    )  # a file or a pipe has no width of its own


def _draw(options: argparse.Namespace, draw: Callable[[BinaryIO], None]) -> None:
    """Writes the picture that --plot asks for, and says where unless stdout is for --json."""
    from popmtl.runs.files import replacing
    from popmtl.runs.storage import said

    path = Path(options.plot).absolute()
    if path.suffix != ".png":
        raise RequestError(f"--plot {options.plot}: the picture is a PNG: give a file that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, beside.open("wb") as file:
            draw(file)
    except OSError as error:
        raise RequestError(f"--plot {options.plot}: cannot be written ({said(error)})") from error
    print(printable(f"picture {path}"), file=sys.stderr if options.json else sys.stdout)


def verify(options: argparse.Namespace) -> None:
    """`popmtl verify`: every file of a run's checkpoints against its manifest."""
    from popmtl.errors import CheckpointDamaged
    from popmtl.runs.checkpoint import checkpoints, hypervolume_of, set_aside_of, whole
    from popmtl.runs.folder import RunFolder
    from popmtl.runs.storage import split

    folder = RunFolder(options.run)
    folder.config()
    with _reading(options.run):
        found, aside = checkpoints(folder), set_aside_of(folder)
    damaged = len(aside)
    for name, why in aside.items():
        _say(f"{split(name)[1]}: set aside: {why}")
    for name in found:
        try:
            stands = f"whole, hypervolume {hypervolume_of(whole(folder, name)[1]):.5g}"
        except CheckpointDamaged as error:
            stands, damaged = str(error), damaged + 1
        _say(f"{split(name)[1]}: {stands}")
    if damaged:
        raise RunError(f"{folder.location}: {damaged} of {len(found) + len(aside)} checkpoints are damaged")
    if not found:
        _say(f"{folder.location} has no checkpoint")


@contextmanager
def _reading(location: str) -> Iterator[None]:
    """Says which storage it is that fails while it is read."""
    from popmtl.runs.storage import said

    try:
        yield
    except OSError as error:
        raise RequestError(f"storage {location}: cannot be read ({said(error)})") from error


def track(options: argparse.Namespace) -> None:
    """`popmtl track`: sends what MLflow has not got of a run."""
    from popmtl.runs.folder import RunFolder

    folder = RunFolder(options.run)
    folder.config()
    with _reading(options.run):
        _complete_baseline(folder, options.trust)
        _completed(folder, options.trust, asked=True)


def ui(options: argparse.Namespace) -> None:
    """`popmtl ui`: serves a run's tracking database and prints where to look; ends with Ctrl-C."""
    from popmtl.runs.folder import RunFolder
    from popmtl.runs.trust import with_credentials
    from popmtl.tracking.links import HOME, is_served, links
    from popmtl.tracking.mlflow_sink import location_of
    from popmtl.tracking.server import server

    location = None
    if options.run:
        folder = RunFolder(options.run)
        folder.config()
        with _reading(options.run):
            location = location_of(folder, trust=options.trust)
        if location is None:
            raise RequestError(f"{folder.location}: MLflow has nothing of this run yet; popmtl track sends it")
        if is_served(location.uri):
            for line in links(location):
                _say(line)
            return
        database = with_credentials(location.uri)
    else:
        path = Path(options.storage or "runs").resolve() / "mlflow.db"
        if not path.exists():
            raise RequestError(f"{path}: there is no tracking database; give a RUN, or --storage FOLDER")
        database = f"sqlite:///{path}"
    with server(database, options.port) as (base, process):
        for line in links(location, base) if location else [f"MLflow    {base}{HOME}"]:
            _say(line)
        print("Ctrl-C ends the server", flush=True)
        process.wait()
    raise RunError(f"the MLflow server ended with exit code {process.returncode}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="popmtl", description="Train a Pareto set of multi-task models in one run.")
    parser.add_argument("--version", action="version", version=f"popmtl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("runs", help="list the runs in a storage folder")
    command.add_argument("--storage", help="path or URL of the folder that holds the runs; default: ./runs")
    command.set_defaults(call=runs)
    command = commands.add_parser("front", help="show the front of a finished run")
    command.add_argument("run", metavar="RUN", help="path or URL of the run's folder")
    command.add_argument("--json", action="store_true", help="print front.json and nothing else")
    _add_from(command)
    command.add_argument(
        "--plot", nargs="?", const="front.png", metavar="FILE.png", help="draw it; default: front.png, here"
    )
    command.set_defaults(call=front)
    command = commands.add_parser(
        "pick",
        help="choose a model of a finished run, and export it",
        description="Choose a model by a preference, the knee, or the best value of a figure, among those that satisfy "
        "all --where; with --where alone, by equal preference. Dominated models come last.",
    )
    command.add_argument("run", metavar="RUN", help="path or URL of the run's folder")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--preference", type=numbers, metavar="P1,P2,...", help="how much each objective matters, such as 0.3,0.7"
    )
    choice.add_argument("--knee", action="store_true", help="nearest to the best of all objectives at once")
    choice.add_argument("--best", metavar="NAME", help="the best at this objective or metric")
    command.add_argument(
        "--where", action="append", default=[], metavar="CONSTRAINT", help="such as 'accuracy>=0.95'; may be repeated"
    )
    _add_from(command)
    command.add_argument("--export", metavar="DIR", help="write weights, torch.export program and model card there")
    _add_trust(command)
    command.add_argument("--json", action="store_true", help="print the choice as JSON and nothing else")
    command.set_defaults(call=pick)
    command = commands.add_parser("compare", help="compare the fronts of finished runs")
    command.add_argument("runs", nargs="+", metavar="RUN", help="paths or URLs of two or more runs' folders")
    command.add_argument("--plot", metavar="FILE.png", help="draw the fronts over each other")
    command.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    command.set_defaults(call=compare)
    command = commands.add_parser("verify", help="check a run's checkpoints against their manifests")
    command.add_argument("run", metavar="RUN", help="path or URL of the run's folder")
    command.set_defaults(call=verify)
    command = commands.add_parser("track", help="send what MLflow has not got of a run, which waits in its folder")
    command.add_argument("run", metavar="RUN", help="folder of the run")
    _add_trust(command)
    command.set_defaults(call=track)
    command = commands.add_parser("ui", help="serve MLflow to this machine's browsers, and print where to look")
    command.add_argument("run", nargs="?", metavar="RUN", help="path or URL of the run's folder; default: all runs")
    command.add_argument("--storage", help="folder that holds the runs, where no RUN is given; default: ./runs")
    command.add_argument("--port", type=port, default=5000, help="default: %(default)s")
    _add_trust(command)
    command.set_defaults(call=ui)
    command = commands.add_parser("train", help="train a Pareto set", description="Train a Pareto set from a config.")
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; with --resume the run's own if absent")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.steps=100")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    command.add_argument(
        "--address", type=cluster_address, help="join the Ray cluster at this address, or auto; default: start one here"
    )
    command.add_argument("--run-name", help="name of the run and its folder; default: the config's name and the time")
    command.add_argument("--storage", help="path or URL of the folder that holds the runs; default: the config's")
    command.add_argument(
        "--resume", metavar="RUN", help="go on with the run at this path or URL from its last checkpoint"
    )
    command.add_argument(
        "--profile",
        nargs="?",
        type=steps,
        const=20,
        metavar="STEPS",
        help="write a torch profiler's trace of so many MTGD steps of actor 0 to the run's folder; default: 20",
    )
    _add_trust(command)
    command.set_defaults(call=train)
    _add_job_commands(commands)
    return parser


def _add_job_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """What has to do with a cluster's jobs."""
    default = os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    address = Parser(add_help=False)
    address.add_argument(
        "--address", default=default, help="of Ray's dashboard; default: $RAY_API_SERVER_ADDRESS, or %(default)s"
    )
    command = commands.add_parser(
        "submit",
        parents=[address],
        help="have a Ray cluster train a Pareto set",
        description="Ship the working directory to a Ray cluster, have it run `popmtl train` there, and follow its "
        "output; exits with the run's code. Ctrl-C only ends the following.",
    )
    command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file in the working directory")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.steps=100")
    command.add_argument("--detach", action="store_true", help="do not follow the run")
    command.add_argument("--dry-run", action="store_true", help="check everything there, print the plan, train nothing")
    command.add_argument(
        "--working-dir", default=".", metavar="DIR", help="what is shipped, but for what .gitignore names; default: ."
    )
    command.add_argument(
        "--run-name", help="name of the run, its folder and the job; default: the config's and the time"
    )
    command.add_argument("--storage", help="path that the cluster's machines share, or URL; default: the config's")
    command.add_argument("--resume", metavar="RUN", help="go on with the run at this path or URL")
    _add_trust(command)
    command.set_defaults(call=submit)
    command = commands.add_parser("status", parents=[address], help="show the runs among a Ray cluster's jobs")
    command.add_argument("job", nargs="?", metavar="JOB", help="one of them, with its last lines")
    command.set_defaults(call=status)
    command = commands.add_parser("stop", parents=[address], help="interrupt a run that was submitted")
    command.add_argument("job", metavar="JOB", help="see popmtl status")
    command.set_defaults(call=stop)


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust",
        action="store_true",
        help="run the code and use the servers that the run's folder names, though you did not make it here",
    )


def _add_from(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source",
        choices=("last", "best"),
        default="last",
        help="the models of the end, or of the best evaluation on the validation split (front.best); default: last",
    )
