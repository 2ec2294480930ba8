"""A chosen model in a folder that stands alone: weights, a program, and a card that says what it is."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import popmtl
from popmtl.errors import RequestError, RunError
from popmtl.method.front import ideal_point, non_dominated
from popmtl.runs.choice import Choice, described, figures_of, in_words, objective_values
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.storage import URL, said
from popmtl.runs.trust import admit, settings_of

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import nn

logger = logging.getLogger(__name__)

# What tracing a model may raise, user code included; without the traced model, there still are the weights.
TRACING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def export(
    folder: RunFolder,
    front: Front,
    choice: Choice,
    directory: str,
    *,
    trust: bool = False,
    say: Callable[[str], object] = logger.info,
) -> list[str]:
    """Writes a new folder with the chosen model: its weights, a program that runs without our code, and its card.

    model.safetensors is a copy of the run's, compared by SHA-256. program.pt2 is for any number of examples at once; it
    is left out where the problem has no example input or the model cannot be exported. card.json holds where all of it
    comes from, README.md says it. The folder appears whole or not at all.

    Args:
        folder: the run's.
        front: its Pareto set.
        choice: the member.
        directory: the new folder, or an empty one.
        trust: whether the user trusts who made the run's folder.
        say: is told whose code is run, which builds the model.

    Returns:
        What is less than it could be, one message each.

    Raises:
        RequestError: the folder has something in it or cannot be written, the member's weights cannot be loaded, or the
            run's folder is a stranger's.
        RunError: the copy differs from the original.
    """
    if URL.match(directory):
        raise RequestError(f"--export {directory}: give a folder on this machine, not a URL")
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or target == Path.cwd()):
        raise RequestError(f"--export {directory}: is there already; give a new folder, or an empty one")
    folder.files.check(f"{front.place}/{choice.member.model}")
    changes = admit(folder, settings_of(folder)["problem"]["name"], trust, "--trust", say)
    model = _loaded(folder, front, choice.member)
    beside = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        beside.mkdir(parents=True)
        complaints = _fill(beside, folder, front, choice, model)
        beside.rename(target)
    except OSError as error:
        raise RequestError(f"--export {directory}: cannot be written ({error.filename}: {said(error)})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [*changes, *complaints]


def _loaded(folder: RunFolder, front: Front, member: Member) -> nn.Module:
    from safetensors import SafetensorError

    from popmtl.runs.results import load_model

    try:
        return load_model(folder.location, member.subproblem, best=front.best, trust=True)
    except SafetensorError as error:
        where = folder.files.where(f"{front.place}/{member.model}")
        raise RequestError(f"{where} is damaged: {said(error)}") from error


def _fill(place: Path, folder: RunFolder, front: Front, choice: Choice, model: nn.Module) -> list[str]:
    """Writes the files of an export; what is less than it could be."""
    import torch

    digests = {"model.safetensors": _copy(folder, f"{front.place}/{choice.member.model}", place / "model.safetensors")}
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

    from popmtl.method.problem import reference_of, to_model
    from popmtl.problems.registry import load_problem

    example = load_problem(problem["name"], problem["parameters"]).example_input()
    if example is None:
        raise ValueError("the problem gives no example_input")
    example = to_model(example.detach(), reference_of(model))
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
    splits = {split: figures for split, figures in figures_of(card).items() if figures}
    places = []
    for k, (name, value) in enumerate(splits[front.chosen_on]["objectives"].items()):
        rank = 1 + int((front_values[:, k] < value).sum())
        values = [figures["objectives"][name] for figures in splits.values()]
        figures = [f"{number:.6g}" for number in (*values, ideal[k], value - ideal[k], card["weights"][name])]
        places.append([name, *figures[:-3], f"{rank} of {len(front_values)}", *figures[-3:]])
    names = dict.fromkeys(name for figures in splits.values() for name in figures["metrics"])
    metrics = [
        [
            name,
            *(f"{figures['metrics'][name]:.6g}" if name in figures["metrics"] else "" for figures in splits.values()),
            front.metrics.get(name, ""),
        ]
        for name in names
    ]
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
        f"All objectives are minimized. {len(front_values)} of {len(front.members)} models are non-dominated on the "
        f"{front.chosen_on} split, by which this one was chosen; rank and best value are among these, on that split.",
        _markdown(["objective", *splits, "rank", "best", "distance to the best", "weight in training"], places),
    ]
    if metrics:
        parts.append(_markdown(["metric", *splits, "better"], metrics))
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
