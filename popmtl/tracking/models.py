"""The members of a Pareto set, and the set itself, as MLflow models without pickles.

A model that `torch.export` takes becomes an exported program, which loads with MLflow and torch alone. Any other goes
as its weights and the code that builds it, which `pareto_model` puts together; so does the whole set, the picker.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from torch import Tensor, nn

import popmtl
from popmtl import modules
from popmtl.problems.registry import BUILT_IN, load_problem
from popmtl.runs.export import TRACING_ERRORS
from popmtl.runs.files import to_json
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front
from popmtl.runs.results import load_model, model_file
from popmtl.tracking import pareto_model

# What an exported program may differ by from the model, relative and absolute.
TOLERANCE = 1e-6


class Models:
    """Makes MLflow models of a run's members.

    Attributes:
        example: two inputs of the model, shape (2, …), or None if the problem has none: then no models can be made.
        why_no_program: why models are not exported programs; None as long as they are.
        code: the problem and the file that its code is in, which goes along where they are not.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._parameters: dict[str, Any] = dict(folder.config()["problem"])
        self._name = str(self._parameters.pop("name"))
        example = load_problem(self._name, self._parameters).example_input()
        # Two: with one, the exported program would take batches of one only.
        self.example = None if example is None else example[:2].detach().cpu()
        self.why_no_program: str | None = None
        self.code = f"{self._name} of {modules.located(BUILT_IN.get(self._name, self._name).partition(':')[0])}"

    def save_member(self, subproblem: int, path: Path, description: Model) -> None:
        """Writes a member as an MLflow model to a new folder.

        Raises:
            MlflowException: MLflow does not take the model.
            RequestError: the member's weights are not there, or fit the problem's model no more.
        """
        if self._save_program(self._model(subproblem), path, description):
            return
        front = self._folder.front()
        alone = replace(front, members=[member for member in front.members if member.subproblem == subproblem])
        self._save_set(alone, [subproblem], path, description)

    def save_set(self, subproblems: Sequence[int], path: Path, description: Model) -> None:
        """Writes the picker, which can choose among some members, as an MLflow model to a new folder.

        Raises:
            MlflowException: MLflow does not take the model.
            RequestError: a member's weights are not there, or fit the problem's model no more.
        """
        self._save_set(self._folder.front(), subproblems, path, description)

    def _model(self, subproblem: int) -> nn.Module:
        return load_model(self._folder.location, subproblem, trust=True).cpu().eval()

    def _save_program(self, model: nn.Module, path: Path, description: Model) -> bool:
        """Writes a model as an exported program, if it can be one; whether it is."""
        assert self.example is not None
        if self.why_no_program is not None:
            return False
        try:
            with torch.no_grad():
                outputs = model(self.example)
            # MLflow's own wrapper predicts with models of one output only, and has no schema for others.
            predicted = outputs.numpy() if isinstance(outputs, Tensor) else None
            mlflow.pytorch.save_model(
                model,
                str(path),
                mlflow_model=description,
                signature=infer_signature(self.example.numpy(), predicted),
                input_example=self.example.numpy(),
                # Otherwise MLflow starts a process to find them, which takes seconds.
                pip_requirements=_requirements("mlflow", "torch", "numpy"),
                serialization_format="pt2",
            )
        except (MlflowException, *TRACING_ERRORS) as error:
            self.why_no_program = str(error).strip().split("\n")[0]
            shutil.rmtree(path, ignore_errors=True)
            return False
        return True

    def _save_set(self, front: Front, subproblems: Sequence[int], path: Path, description: Model) -> None:
        assert self.example is not None
        with tempfile.TemporaryDirectory() as folder:
            pareto = Path(folder) / "pareto"
            self._copy_weights(subproblems, pareto)
            (pareto / "front.json").write_text(front.to_json())
            code, requirements = [Path(popmtl.__file__).parent], {"mlflow", "torch", "numpy", "safetensors", "moocore"}
            if not self._write_program(subproblems, pareto / "program"):
                (pareto / "problem.json").write_text(to_json({"name": self._name, **self._parameters}))
                own_code, own_requirements = code_of(BUILT_IN.get(self._name, self._name).partition(":")[0])
                code += own_code
                requirements |= own_requirements
            with torch.no_grad():
                outputs = pareto_model.to_arrays(self._model(subproblems[0])(self.example))
            preference = [1.0] * len(front.objectives)
            signature = infer_signature(self.example.numpy(), outputs, {"preference": preference, "member": ""})
            mlflow.pyfunc.save_model(
                str(path),
                python_model=pareto_model.__file__,
                artifacts={"pareto": str(pareto)},
                code_paths=[str(path) for path in code],
                mlflow_model=description,
                signature=signature,
                input_example=self.example.numpy(),
                pip_requirements=_requirements(*sorted(requirements)),
            )

    def _copy_weights(self, subproblems: Sequence[int], folder: Path) -> None:
        for subproblem in subproblems:
            file = folder / model_file(subproblem)
            file.parent.mkdir(parents=True)
            with self._folder.fetched(f"pareto/{model_file(subproblem)}") as path:
                shutil.copyfile(path, file)

    def _write_program(self, subproblems: Sequence[int], path: Path) -> bool:
        """Writes the program that computes any of these members once it is given its weights; whether there is one."""
        if not self._save_program(self._model(subproblems[0]), path, Model()):
            return False
        program = mlflow.pytorch.load_model(str(path))
        for subproblem in subproblems:
            model = self._model(subproblem)
            with torch.no_grad():
                pareto_model.set_weights(program, model.state_dict())
                ours, theirs = (pareto_model.to_arrays(run(self.example)) for run in (program, model))
            if not close(ours, theirs):  # the program has something of the first member's that is not in its weights
                shutil.rmtree(path)
                return False
        return True


def close(ours: Any, theirs: Any) -> bool:
    """Whether two outputs, as `pareto_model.to_arrays` gives them, are the same but for rounding."""
    if isinstance(ours, dict):
        return all(close(ours[name], theirs[name]) for name in theirs)
    return np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def code_of(module: str) -> tuple[list[Path], set[str]]:
    """What a module needs where PopMTL is, and the module is not: files or folders of code, and distributions.

    The code is that of the module, or of the package that it is in, unless that is installed from a distribution.
    """
    top = module.partition(".")[0]
    file = importlib.import_module(module).__file__
    own = importlib.import_module(top)
    assert file is not None
    files, code = [Path(file)], []
    if top != "popmtl" and not Path(file).is_relative_to(sysconfig.get_path("purelib")):
        package = [Path(folder) for folder in getattr(own, "__path__", [])]
        code = package or files
        files += [found for folder in package for found in folder.rglob("*.py")]
    return code, _distributions({name for file in files for name in _imports(file)} | {top})


def _imports(file: Path) -> Iterator[str]:
    """The top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _distributions(packages: set[str]) -> set[str]:
    """The distributions that packages are installed from; those of the standard library, and PopMTL, have none."""
    known = packages_distributions()
    return {name for package in packages - {"popmtl"} for name in known.get(package, [])[:1]}


def _requirements(*distributions: str) -> list[str]:
    # Without a local suffix such as +cpu, which no package index has.
    return [f"{name}=={version(name).partition('+')[0]}" for name in distributions]
