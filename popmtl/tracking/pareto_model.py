"""A Pareto set, or one member of it, as an MLflow model: `mlflow.pyfunc.load_model(…).predict(x, params=…)`.

MLflow keeps this file with the model and runs it to load the model ("models from code"), so that nothing is pickled.
Beside it lie the package popmtl, and in the folder `pareto`:

    front.json                      the members
    models/<i>/model.safetensors    the weights of those that can be chosen
    program/                        the model as an exported program, which takes anyone's weights; or else
    problem.json                    the name and parameters of the problem, whose code builds the model
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors.torch import load_file

from popmtl.method.front import pick
from popmtl.runs.front import Front


class ParetoModel(PythonModel):
    """Predicts with the member that suits a preference, or with the one that is asked for."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the front; the models follow as they are asked for."""
        self.folder = Path(context.artifacts["pareto"])
        self.front = Front.from_json((self.folder / "front.json").read_text())
        found = (int(path.parent.name) for path in self.folder.glob("models/*/model.safetensors"))
        self.members = sorted(found)
        self.models: dict[int, torch.nn.Module] = {}

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """A member's outputs for a batch.

        Args:
            context: MLflow's; not used.
            model_input: what the model takes, an array with the batch first.
            params: `member`, a subproblem's number such as "3"; or, where that is "", `preference`: how much each
                objective matters, by its values on the validation split. See `popmtl.method.front.pick`.

        Returns:
            An array; where the model has several outputs, a dict of them, by name or by number.

        Raises:
            ValueError: there is no such member, or the preference is none.
        """
        given = params or {}
        chosen = self.chosen(given.get("preference"), given.get("member") or "")
        dtype = next((p.dtype for p in self.model(chosen).parameters()), torch.float32)
        x = torch.as_tensor(np.asarray(model_input))
        with torch.no_grad():
            outputs = self.model(chosen)(x.to(dtype) if x.is_floating_point() else x)
        return to_arrays(outputs)

    def chosen(self, preference: Any, member: str) -> int:
        """The subproblem of the member that is asked for."""
        if member:
            number = str(member).removeprefix("member-")
            if not number.isdecimal() or int(number) not in self.members:
                raise ValueError(f"member must be one of {', '.join(map(str, self.members))}; got {member!r}")
            return int(number)
        if len(self.members) == 1:
            return self.members[0]
        if preference is None:
            preference = np.ones(len(self.front.objectives))
        objectives = {one.subproblem: self.front.figures(one).objectives for one in self.front.members}
        return self.members[pick([objectives[i] for i in self.members], preference)]

    def model(self, member: int) -> torch.nn.Module:
        """A member's model, in eval mode; it is kept."""
        if member not in self.models:
            state = load_file(self.folder / "models" / str(member) / "model.safetensors")
            if (self.folder / "program").exists():
                model = mlflow.pytorch.load_model(str(self.folder / "program"))
                set_weights(model, state)
            else:
                from popmtl.problems.registry import load_problem

                problem = json.loads((self.folder / "problem.json").read_text())
                model = load_problem(problem.pop("name"), problem).model()
                model.load_state_dict(state)
                model.eval()
            self.models[member] = model
        return self.models[member]


def set_weights(program: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Gives an exported program a model's weights; what the program does not use of them is left out."""
    used = program.state_dict().keys()
    program.load_state_dict({name: value for name, value in state.items() if name in used})


def to_arrays(outputs: Any) -> Any:
    """A model's outputs, which are a tensor, or several in a dict, list or tuple, as arrays."""
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().cpu().numpy()
    named = outputs if isinstance(outputs, dict) else {str(i): output for i, output in enumerate(outputs)}
    return {name: to_arrays(output) for name, output in named.items()}


mlflow.models.set_model(ParetoModel())
