"""What README says works: its example is run, its table of keys is the config's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from popmtl.config import Config
from popmtl.distributed.metrics import FIGURES

ROOT = Path(__file__).resolve().parents[1]


def block(language: str, containing: str) -> str:
    """The one code block of a language that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def popmtl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from popmtl.cli import main; sys.exit(main())", *arguments]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_the_example_of_a_problem_is_short_and_trains(tmp_path):
    source = block("python", "class ClassifyAndReconstruct")
    assert len(source.splitlines()) < 40
    (tmp_path / "my_problem.py").write_text(source)
    (tmp_path / "my_problem.yaml").write_text(block("yaml", "my_problem:ClassifyAndReconstruct"))
    done = popmtl("train", "my_problem.yaml", "--run-name", "my_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    front = json.loads((tmp_path / "runs" / "my_run" / "pareto" / "front.json").read_text())
    assert [member["subproblem"] for member in front["members"]] == list(range(6))
    assert sum(member["non_dominated"] for member in front["members"]) >= 3
    # The trade-off is real and follows the weights: the ends are the best at their own objective.
    classify, reconstruct = zip(*(member["objectives"] for member in front["members"]), strict=True)
    assert classify[-1] < classify[0]
    assert reconstruct[0] < reconstruct[-1]

    lines = block("python", "popmtl.runs.results import load_model").strip().splitlines()
    use = "\n".join([*lines, "import torch", "print(model['encoder'](torch.zeros(1, 64)).shape, model.training)"])
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([1, 8]) False", done.stderr


def test_the_keys_and_defaults_of_the_readme_are_those_of_the_config():
    documented = yaml.safe_load(block("yaml", "min_weight"))
    given = {"problem": documented["problem"], "population": {"subproblems": documented["population"]["subproblems"]}}
    assert documented == Config.model_validate(given).resolved()


def test_the_figures_that_the_readme_names_are_those_that_runs_report():
    named = re.findall(r"`(ray_popmtl_\w+)`", (ROOT / "README.md").read_text())
    assert sorted(named) == sorted(figure.exported for figure in FIGURES)


def test_what_the_readme_points_to_exists():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    paths = [*re.findall(r"\]\((?!http)([^)]+)\)", prose), *re.findall(r"(?:bash|python) (s\S+\.(?:sh|py))", text)]
    assert len(paths) >= 4
    for path in paths:
        assert (ROOT / path).is_file(), path
