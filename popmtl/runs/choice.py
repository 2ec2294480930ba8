"""Choosing one model of a finished run's Pareto set, and exporting it to a folder that stands alone."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

import popmtl
from popmtl.errors import RequestError, RunError
from popmtl.method.front import ideal_point, knee, non_dominated, pick
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.storage import URL, said

if TYPE_CHECKING:  # torch takes seconds to import, and choosing needs none of it
    from torch import nn

CONSTRAINT = re.compile(r"\s*(.+?)\s*(>=|<=|>|<)\s*([^<>=]+?)\s*")
COMPARE = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}

# What tracing a model may raise, user code included; without the traced model, there still are the weights.
TRACING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Choice:
    """A chosen member.

    Attributes:
        member: the member.
        by: what it was chosen by: preference (m numbers), knee (true) or best (a name).
        where: the constraints that it satisfies.
        dominated_by: the subproblems of the non-dominated members that dominate it.
    """

    member: Member
    by: Mapping[str, Any]
    where: Sequence[str]
    dominated_by: Sequence[int]


def finished_front(folder: RunFolder) -> Front:
    """The front of a run that has ended.

    Raises:
        RequestError: this is no run's folder, the run has no front yet, or its front.json is damaged.
        OSError: the storage cannot be read.
    """
    folder.config()
    if not folder.files.entry("pareto/front.json"):
        state = folder.state()
        way = f"it has not finished ({state}); popmtl train --resume {shlex.quote(folder.location)} goes on with it"
        raise RequestError(f"{folder.location} has no front yet: {'it is running' if state == 'running' else way}")
    try:
        return folder.front()
    except (KeyError, TypeError, ValueError) as error:
        where = folder.files.where("pareto/front.json")
        raise RequestError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def objective_values(front: Front) -> NDArray[np.float64]:
    """The members' objective values, shape (N, m); NaN for a member that was lost."""
    rows = [[np.nan] * len(front.objectives) if member.lost else member.objectives for member in front.members]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(front.objectives))


def knee_of(front: Front) -> Member | None:
    """The knee among the non-dominated members; None where no member is."""
    F = objective_values(front)
    return front.members[knee(F)] if non_dominated(F).any() else None


def choose(
    front: Front,
    *,
    preference: Sequence[float] | None = None,
    at_knee: bool = False,
    best: str | None = None,
    where: Sequence[str] = (),
) -> Choice:
    """Chooses a member: by one of preference, knee and best; by equal preference if none is given.

    It is one of the members that satisfy the constraints; a dominated one only if no other does. The objectives are
    scaled by the whole front, so that a constraint which the chosen member satisfies anyway changes nothing.

    Args:
        front: the Pareto set.
        preference: how much each objective matters, m numbers; see `popmtl.method.front.pick`.
        at_knee: takes `popmtl.method.front.knee`.
        best: an objective or a metric; equal preference decides between members that are equally good at it.
        where: constraints such as "accuracy >= 0.95" on objectives and metrics.

    Raises:
        RequestError: a constraint, a name or the preference is wrong, or no member satisfies the constraints.
    """
    F = objective_values(front)
    finite = np.asarray(np.isfinite(F).all(axis=1))
    if not finite.any():
        raise RequestError("there is no model to choose: no member has finite objective values")
    allowed = _satisfying(front, where, finite)
    candidates = allowed & non_dominated(F)
    if not candidates.any():
        candidates = allowed
    by: dict[str, Any]
    if at_knee:
        by, row = {"knee": True}, knee(F, candidates)
    elif best is not None:
        values = _values(front, best, "--best")
        values = -values if _direction(front, best) == "higher" else values
        if not np.isfinite(values[candidates]).any():
            raise RequestError(f"--best {best}: no member to choose from has a finite value of it")
        top = values == values[candidates & np.isfinite(values)].min()
        by, row = {"best": best}, pick(F, np.ones(F.shape[1]), candidates & top)
    else:
        weights = list(preference) if preference is not None else [1.0] * F.shape[1]
        if len(weights) != F.shape[1]:
            given, names = ",".join(f"{weight:g}" for weight in weights), ", ".join(front.objectives)
            raise RequestError(f"--preference {given}: give {F.shape[1]} numbers, one for each of {names}")
        try:
            by, row = {"preference": weights}, pick(F, weights, candidates)
        except ValueError as error:
            raise RequestError(f"--preference: {error}") from error
    gap = F[row] - F
    dominating = non_dominated(F) & (gap >= 0).all(axis=1) & (gap > 0).any(axis=1)
    dominated_by = [member.subproblem for member, dominates in zip(front.members, dominating, strict=True) if dominates]
    return Choice(front.members[row], by, [" ".join(_constraint(text)) for text in where], dominated_by)


def described(folder: RunFolder, front: Front, choice: Choice) -> dict[str, Any]:
    """A choice as plain data: the member, how it was chosen, where its weights are, and the code that loads it."""
    member = choice.member
    return {
        "run": folder.name,
        "location": folder.location,
        "subproblem": member.subproblem,
        "chosen": {**choice.by, "where": list(choice.where)},
        "non_dominated": not choice.dominated_by,
        "dominated_by": list(choice.dominated_by),
        "weights": dict(zip(front.objectives, member.weights, strict=True)),
        "objectives": dict(zip(front.objectives, member.objectives, strict=True)),
        "metrics": dict(member.metrics),
        "stage": member.stage,
        "file": folder.files.where(f"pareto/{member.model}"),
        "load": [
            "from popmtl.runs.results import load_model",
            f"model = load_model({json.dumps(folder.location, ensure_ascii=False)}, {member.subproblem})",
        ],
    }


def in_words(chosen: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """How a model was chosen: what `described` says of it, in words."""
    if "preference" in chosen:
        shares = zip(objectives, chosen["preference"], strict=True)
        rule = "preference " + ", ".join(f"{share:g} for {name}" for name, share in shares)
    else:
        rule = "knee" if "knee" in chosen else f"best {chosen['best']}"
    return f"{rule}, where {' and '.join(chosen['where'])}" if chosen["where"] else rule


def export(folder: RunFolder, front: Front, choice: Choice, directory: str) -> list[str]:
    """Writes a new folder with the chosen model: its weights, a program that runs without our code, and its card.

    model.safetensors is a copy of the run's, compared by SHA-256. program.pt2 is for any number of examples at once; it
    is left out where the problem has no example input or the model cannot be exported. card.json holds where all of it
    comes from, README.md says it. The folder appears whole or not at all.

    Args:
        folder: the run's.
        front: its Pareto set.
        choice: the member.
        directory: the new folder, or an empty one.

    Returns:
        What is less than it could be, one message each.

    Raises:
        RequestError: the folder has something in it or cannot be written, or the member's weights cannot be loaded.
        RunError: the copy differs from the original.
    """
    if URL.match(directory):
        raise RequestError(f"--export {directory}: give a folder on this machine, not a URL")
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or target == Path.cwd()):
        raise RequestError(f"--export {directory}: is there already; give a new folder, or an empty one")
    model = _loaded(folder, choice.member)
    beside = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        beside.mkdir(parents=True)
        complaints = _fill(beside, folder, front, choice, model)
        beside.rename(target)
    except OSError as error:
        raise RequestError(f"--export {directory}: cannot be written ({error.filename}: {said(error)})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return complaints


def _satisfying(front: Front, where: Sequence[str], finite: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the members that are finite satisfy all constraints, shape (N,); at least one does."""
    allowed = finite.copy()
    excluded = []
    for text in where:
        name, operator, bound = _constraint(text)
        values = _values(front, name, f"--where {text!r}")
        holds = COMPARE[operator](values, float(bound))  # a NaN satisfies nothing
        allowed &= holds
        seen = values[finite & np.isfinite(values)]
        best = f"the best is {seen.max() if '>' in operator else seen.min():.6g}" if len(seen) else "none has a value"
        excluded.append(f"{text!r} excludes {(finite & ~holds).sum()} of {finite.sum()} ({best})")
    if not allowed.any():
        raise RequestError(f"no member satisfies all of --where: {'; '.join(excluded)}")
    return allowed


def _constraint(text: str) -> tuple[str, str, str]:
    """Name, operator and bound, which is a finite number."""
    parts = CONSTRAINT.fullmatch(text)
    if not parts:
        raise RequestError(f"--where {text!r}: give a name, one of >=, <=, > and <, and a number: accuracy>=0.95")
    name, operator, bound = parts.groups()
    with suppress(ValueError):
        if np.isfinite(float(bound)):
            return name, operator, bound
    raise RequestError(f"--where {text!r}: {bound!r} is no number to compare with")


def _values(front: Front, name: str, option: str) -> NDArray[np.float64]:
    """An objective's or a metric's values, shape (N,); NaN where a member has none."""
    if name in front.objectives:
        return objective_values(front)[:, list(front.objectives).index(name)]
    metrics = dict.fromkeys(metric for member in front.members for metric in member.metrics)
    if name not in metrics:
        from popmtl.config import nearest  # here and not above: it imports torch

        known = [*front.objectives, *metrics]
        raise RequestError(f"{option}: there are {', '.join(known)}, and no {name!r}{nearest(name, known)}")
    return np.array([member.metrics.get(name, np.nan) for member in front.members], dtype=np.float64)


def _direction(front: Front, name: str) -> str:
    """Which values of an objective or a metric are better."""
    if name in front.objectives:
        return "lower"
    if name not in front.metrics:
        raise RequestError(f"--best {name}: front.json does not say whether higher or lower is better; use --where")
    return front.metrics[name]


def _loaded(folder: RunFolder, member: Member) -> nn.Module:
    from safetensors import SafetensorError

    from popmtl.runs.results import load_model

    try:
        return load_model(folder.location, member.subproblem)
    except SafetensorError as error:
        where = folder.files.where(f"pareto/{member.model}")
        raise RequestError(f"{where} is damaged: {said(error)}") from error


def _fill(place: Path, folder: RunFolder, front: Front, choice: Choice, model: nn.Module) -> list[str]:
    """Writes the files of an export; what is less than it could be."""
    import torch

    digests = {"model.safetensors": _copy(folder, f"pareto/{choice.member.model}", place / "model.safetensors")}
    config = folder.read("config.yaml")
    parameters = dict(folder.config()["problem"])
    problem = {"name": parameters.pop("name"), "parameters": parameters}
    complaints = []
    program = None
    try:
        program = _export_program(model, problem, place / "program.pt2")
        digests["program.pt2"] = _digest(place / "program.pt2")
    except TRACING_ERRORS as error:
        (place / "program.pt2").unlink(missing_ok=True)
        summary = str(error).strip().split("\n")[0] or type(error).__name__
        complaints.append(f"program.pt2 is left out: {summary}")
    card = {
        **described(folder, front, choice),
        "problem": problem,
        "seed": front.seed,
        "steps": front.steps,
        "exported_with": {"popmtl": popmtl.__version__, "torch": torch.__version__},
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "program": program,
        "sha256": digests,
    }
    (place / "README.md").write_text(_readme(card, front), encoding="utf-8")
    digests["README.md"] = _digest(place / "README.md")
    (place / "card.json").write_text(to_json(card, indent=2) + "\n", encoding="utf-8")
    return complaints


def _copy(folder: RunFolder, name: str, path: Path) -> str:
    """Copies a file of the run; its SHA-256, which original and copy share."""
    content = folder.read(name)
    path.write_bytes(content)
    if _digest(path) != hashlib.sha256(content).hexdigest():
        raise RunError(f"{path} is not what was copied from {folder.files.where(name)}")
    return _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _export_program(model: nn.Module, problem: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Writes the model as a torch.export program; what it takes: a tensor's shape and dtype."""
    import torch

    from popmtl.method.problem import to_model
    from popmtl.problems.registry import load_problem

    example = load_problem(problem["name"], problem["parameters"]).example_input()
    if example is None:
        raise ValueError("the problem gives no example_input")
    example = to_model(example.detach(), next(model.parameters()))
    with torch.no_grad():
        outputs = model(example)
    with redirect_stderr(StringIO()):  # where it fails, torch prints the whole graph
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)
    torch.testing.assert_close(torch.export.load(path).module()(example), outputs)
    return {"input": ["batch", *example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")}


LOAD_WEIGHTS = """\
import json
from pathlib import Path

from safetensors.torch import load_file

from popmtl.problems.registry import load_problem

problem = json.loads(Path("card.json").read_text("utf-8"))["problem"]
model = load_problem(problem["name"], problem["parameters"]).model()
model.load_state_dict(load_file("model.safetensors"))
model.eval()
"""

LOAD_PROGRAM = """\
import torch

program = torch.export.load("program.pt2").module()
"""


def _readme(card: Mapping[str, Any], front: Front) -> str:
    """The card for a human reader."""
    F = objective_values(front)
    front_values = F[non_dominated(F)]
    ideal = ideal_point(F)
    dominated = ", ".join(str(number) for number in card["dominated_by"])
    places = []
    for k, (name, value) in enumerate(card["objectives"].items()):
        rank = 1 + int((front_values[:, k] < value).sum())
        figures = [f"{number:.6g}" for number in (value, ideal[k], value - ideal[k], card["weights"][name])]
        places.append([name, *figures[:1], f"{rank} of {len(front_values)}", *figures[1:]])
    metrics = [[name, f"{value:.6g}", front.metrics.get(name, "")] for name, value in card["metrics"].items()]
    problem, program = card["problem"], card["program"]
    facts = [
        ["run", f"{card['run']}, {card['location']}"],
        ["problem", f"{problem['name']} {to_json(problem['parameters'])}"],
        ["training", f"{card['steps']} steps, seed {card['seed']}, kept from {card['stage']}"],
        ["exported with", ", ".join(f"{name} {version}" for name, version in card["exported_with"].items())],
        ["SHA-256 of the run's config.yaml", card["config_sha256"]],
        *([f"SHA-256 of {name}", digest] for name, digest in card["sha256"].items()),
    ]
    parts = [
        f"# Model {card['subproblem']} of {card['run']}",
        f"One model of a Pareto set for {' and '.join(front.objectives)}, which PopMTL trained: that of subproblem "
        f"{card['subproblem']}, chosen by {in_words(card['chosen'], front.objectives)}.",
    ]
    if dominated:
        parts.append(f"It is dominated by {dominated}: as good in every objective, and better in one.")
    parts += [
        "## Its place in the front",
        f"All objectives are minimized; values are of the test split. {len(front_values)} of {len(front.members)} "
        "models are non-dominated; rank and best value are among these.",
        _markdown(["objective", "value", "rank", "best", "distance to the best", "weight in training"], places),
    ]
    if metrics:
        parts.append(_markdown(["metric", "value", "better"], metrics))
    parts.append("## Use, in this folder")
    if program:
        shape = ", ".join(str(size) for size in program["input"])
        parts.append(f"The program needs torch alone, and takes {program['dtype']} of shape ({shape}).")
        parts.append(f"```python\n{LOAD_PROGRAM}```")
    parts += [
        "The weights need PopMTL and the problem: its module on Python's path, and its data.",
        f"```python\n{LOAD_WEIGHTS}```",
        "## Where it comes from",
        _markdown(["", ""], facts),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
