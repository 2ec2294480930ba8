"""The Pareto set on disk: front.json, front.csv, front.png, explorer.html and the members' weights."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from popmtl.errors import CheckpointDamaged, FileDamaged, RequestError, RunError
from popmtl.runs.checkpoint import read_tensors, subproblem_file, whole
from popmtl.runs.explorer import Loading, explorer_page
from popmtl.runs.folder import METRICS, RunFolder
from popmtl.runs.front import BEST, LAST, NO_BEST, Front, Split
from popmtl.runs.records import Volume
from popmtl.runs.storage import said
from popmtl.runs.trust import admit
from popmtl.text import printable

logger = logging.getLogger(__name__)

FORMULA = re.compile(r"(^|[;,|])(?=[\s\"']*[=+\-@＝＋－＠])")
"""Where an apostrophe has to stand in text (https://owasp.org/www-community/attacks/CSV_Injection)."""


def write_front(folder: RunFolder, front: Front) -> None:
    """Writes front.json, front.csv, front.png and explorer.html into the front's folder, `pareto` or `pareto/best`.

    front.json is the last: with that of `pareto` a run has its front, and can no longer go on from a checkpoint. So
    everything that it is made of, and each line that was written before, is there by then.

    Raises:
        RunError: a file cannot be written.
    """
    from popmtl.runs.picture import draw_front  # matplotlib takes most of a second to import

    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(_table(front))
    write_result(folder, f"{front.place}/front.csv", table.getvalue().encode())
    picture = io.BytesIO()
    draw_front(front, picture)
    write_result(folder, f"{front.place}/front.png", picture.getvalue())
    title = f"{folder.name}, best evaluation" if front.best else folder.name
    page = explorer_page(front, title, hypervolumes(folder), Loading(folder.location))
    write_result(folder, f"{front.place}/explorer.html", page.encode())
    with _must(folder.location):
        folder.flush()
    write_result(folder, f"{front.place}/front.json", front.to_json().encode())


def hypervolumes(folder: RunFolder) -> list[tuple[int, float, float | None]]:
    """For each evaluation of a run, its step, the hypervolume on the validation split, and the error of an estimate."""
    lines = folder.lines(METRICS, Volume, logger.warning)  # the picture lacks what is damaged, and the run ends
    return [(line["step"], line["hypervolume"], line.get("hypervolume_error")) for line in lines]


def write_result(folder: RunFolder, name: str, content: bytes) -> None:
    """Writes what a run ends with.

    Raises:
        RunError: it cannot be written.
    """
    with _must(folder.files.where(name)):
        folder.write(name, content)


@contextmanager
def _must(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{where} cannot be written ({said(error)}); when it can be, --resume goes on from the last checkpoint"
        ) from error


def model_file(subproblem: int) -> str:
    """Where a subproblem's weights are, relative to the pareto folder."""
    return f"models/{subproblem}/model.safetensors"


def write_model(folder: RunFolder, subproblem: int, state: Mapping[str, Tensor], place: str = LAST) -> str:
    """Writes a model's parameters and buffers, each with its own dtype, as safetensors.

    Args:
        folder: the run's folder.
        subproblem: the number of the subproblem that the model solves.
        state: the model's `state_dict()`, on any device.
        place: the front's folder in that of the run.

    Returns:
        The file, relative to the front's folder.

    Raises:
        RunError: the file cannot be written.
    """
    # safetensors refuses tensors that share memory: tied parameters, and rows of the population.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_result(folder, f"{place}/{model_file(subproblem)}", save(copies, {"format": "pt"}))
    return model_file(subproblem)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers in a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: the file is damaged.
    """
    return load_file(path)


def load_model(
    run_folder: str | Path, subproblem: int, checkpoint: str | None = None, *, best: bool = False, trust: bool = False
) -> nn.Module:
    """A trained member of a run's Pareto set, on the CPU and in evaluation mode.

    This imports and runs the problem's module, from where it was when the run was made.

    Args:
        run_folder: the run's folder, a path or a URL.
        subproblem: the member's number.
        checkpoint: name of a checkpoint, such as "step-00000300", to take the model from as it was then; None takes
            the result.
        best: take the result of the evaluation with the largest validation hypervolume (`front.best`), and not of the
            run's end.
        trust: whether you trust who made the folder, where it was not you on this machine; see `popmtl.runs.trust`.

    Returns:
        The model that the run's problem builds, with the member's weights.

    Raises:
        RequestError: the folder is no run's, or a stranger's, the member has no weights there, or damaged ones, or they
            do not fit the model that the problem builds now.
    """
    # Here and not above: reading a front needs no problem.
    from popmtl.method.flat import Layout
    from popmtl.method.replica import initial_constants, initial_model, load_exported, set_constants
    from popmtl.problems.registry import load_problem

    folder = RunFolder(run_folder)
    config = folder.config()
    parameters = dict(config["problem"])
    name = parameters.pop("name")
    for change in admit(folder, str(name), trust, "trust=True", logger.info):
        logger.warning(change)
    problem = load_problem(name, parameters)
    place = BEST if best else LAST
    file = f"{place}/{model_file(subproblem)}"
    if checkpoint:
        file = f"checkpoints/{checkpoint}/{subproblem_file(subproblem)}"
    if checkpoint:
        state = _checked_state(folder, checkpoint, subproblem)
    elif folder.files.entry(file):
        state = _result_state(folder, file)
    else:
        present = sorted(int(n) for n in folder.files.children(f"{place}/models") if n.isdecimal())
        if best and not present:
            raise RequestError(f"{folder.location} {NO_BEST}")
        raise RequestError(
            f"{folder.files.where(place)} has no model of subproblem {subproblem}; it has those of {present}"
        )
    try:
        if checkpoint:
            # What is not trained is in no checkpoint.
            model = initial_model(problem, config["seed"], state["row"].dtype)
            buffers = {key.partition("/")[2]: value for key, value in state.items() if key.startswith("buffers/")}
            layout = Layout.of(model, problem.transfers)
            if state["row"].shape != (layout.size,):
                raise RuntimeError(f"it has {len(state['row'])} parameters, and the model {layout.size}")
            for name, value in layout.views(state["row"]).items():
                model.get_parameter(name).data.copy_(value)
            set_constants(model, buffers, initial_constants(model, layout.names), layout.names)
        else:
            model = problem.model()
            load_exported(model, state)
    except RuntimeError as error:
        raise RequestError(f"{folder.files.where(file)} does not fit the model of problem {name!r}: {error}") from error
    return model.eval()


def _checked_state(folder: RunFolder, checkpoint: str, subproblem: int) -> dict[str, Tensor]:
    """The tensors of a subproblem in a checkpoint, compared with its manifest."""
    place = f"checkpoints/{checkpoint}"
    try:
        files = whole(folder, place, contents=False)[0] if folder.files.children(place) else []
        for file in files:
            if file.name == subproblem_file(subproblem):
                return read_tensors(folder, place, file)[0]
    except CheckpointDamaged as error:
        raise FileDamaged(str(error)) from error
    raise RequestError(f"{folder.location} has no checkpoint {checkpoint} of subproblem {subproblem}")


def _result_state(folder: RunFolder, file: str) -> dict[str, Tensor]:
    try:
        with folder.fetched(file) as path:
            return load_state(path)
    except SafetensorError as error:
        raise FileDamaged(f"{folder.files.where(file)} is damaged: {error}") from error


def _text(cell: str | None) -> str | None:
    """A cell in one line that no spreadsheet takes for a formula, nor what it may take for the cell behind it."""
    return cell and FORMULA.sub(r"\1'", printable(cell))


def _table(front: Front) -> list[list[Any]]:
    """The rows of front.csv, its header first."""
    splits: list[Split] = ["validation", "test"] if front.chosen_on == "validation" else ["test"]
    figures = {split: [front.figures(member, split) for member in front.members] for split in splits}
    metrics = {split: list(dict.fromkeys(name for of in figures[split] for name in of.metrics)) for split in splits}
    header = [
        "subproblem",
        *(f"w/{name}" for name in front.objectives),
        *(
            f"{split}/{name}"
            for split in splits
            for name in (*(f"objective/{name}" for name in front.objectives), *metrics[split])
        ),
        "stage",
        "non_dominated",
        "model",
        "reseeds",
        "lost",
    ]
    rows: list[list[Any]] = [[_text(name) for name in header]]
    for i, member in enumerate(front.members):
        values = [*member.weights]
        for split in splits:
            own = figures[split][i]
            values += [*own.objectives, *(own.metrics.get(name, math.nan) for name in metrics[split])]
        rows.append(
            [
                member.subproblem,
                *(float(value) for value in values),
                _text(member.stage),
                member.non_dominated,
                _text(member.model),
                member.reseeds,
                _text(member.lost),
            ]
        )
    return rows
