"""The Pareto set on disk: front.json, front.csv, front.png and the members' weights."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popmtl.errors import RequestError
from popmtl.runs.files import replacing
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front
from popmtl.runs.picture import draw_front


def write_front(folder: RunFolder, front: Front) -> None:
    """Writes front.json, front.csv and front.png into the run's pareto folder.

    Raises:
        OSError: a file cannot be written.
    """
    with replacing(folder.pareto / "front.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(_table(front))
    with replacing(folder.pareto / "front.png") as beside:
        draw_front(front, beside)
    # Last: a reader takes the presence of front.json for the end of the run.
    with replacing(folder.pareto / "front.json") as beside:
        beside.write_text(front.to_json(), encoding="utf-8")


def model_file(subproblem: int) -> str:
    """Where a subproblem's weights are, relative to the pareto folder."""
    return f"models/{subproblem}/model.safetensors"


def write_model(folder: RunFolder, subproblem: int, state: Mapping[str, Tensor]) -> str:
    """Writes a model's parameters and buffers, each with its own dtype, as safetensors.

    Args:
        folder: the run's folder.
        subproblem: the number of the subproblem that the model solves.
        state: the model's `state_dict()`, on any device.

    Returns:
        The file, relative to the pareto folder.

    Raises:
        OSError: the file cannot be written.
    """
    # safetensors refuses tensors that share memory: tied parameters, and rows of the population.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(folder.pareto / model_file(subproblem)) as beside:
        save_file(copies, beside, metadata={"format": "pt"})
    return model_file(subproblem)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers in a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: the file is damaged.
    """
    return load_file(path)


def load_model(run_folder: str | Path, subproblem: int) -> nn.Module:
    """A trained member of a run's Pareto set, on the CPU and in evaluation mode.

    Args:
        run_folder: the run's folder.
        subproblem: the member's number.

    Returns:
        The model that the run's problem builds, with the member's weights.

    Raises:
        RequestError: the folder is no run's, the member has no weights there, or they do not fit the model that
            the problem builds now.
    """
    # Here and not above: reading a front needs no problem, and the folder module imports this one.
    from popmtl.problems.registry import load_problem
    from popmtl.runs.folder import RunFolder

    folder = RunFolder(run_folder)
    parameters = dict(folder.config()["problem"])
    name = parameters.pop("name")
    path = folder.pareto / model_file(subproblem)
    if not path.exists():
        present = sorted(int(file.parent.name) for file in folder.pareto.glob("models/*/model.safetensors"))
        raise RequestError(f"{folder.path} has no model of subproblem {subproblem}; it has those of {present}")
    model = load_problem(name, parameters).model()
    try:
        model.load_state_dict(load_state(path), strict=True)
    except RuntimeError as error:
        raise RequestError(f"{path} does not fit the model of problem {name!r}: {error}") from error
    return model.eval()


def _table(front: Front) -> list[list[Any]]:
    """The rows of front.csv, its header first."""
    metrics = list(dict.fromkeys(name for member in front.members for name in member.metrics))
    header = [
        "subproblem",
        *(f"w/{name}" for name in front.objectives),
        *(f"obj/{name}" for name in front.objectives),
        *metrics,
        "stage",
        "non_dominated",
        "model",
        "reseeds",
        "lost",
    ]
    rows: list[list[Any]] = [header]
    for member in front.members:
        figures = [*member.weights, *member.objectives, *(member.metrics.get(name, math.nan) for name in metrics)]
        rows.append(
            [
                member.subproblem,
                *(float(figure) for figure in figures),
                member.stage,
                member.non_dominated,
                member.model,
                member.reseeds,
                member.lost,
            ]
        )
    return rows
