"""Twenty objectives and a hundred models, from training to the choice: in seconds, with estimates that say so."""

import io
import json
import time

import numpy as np
import pytest
from rich.console import Console
from run_records import record

from popmtl.cli import main
from popmtl.config import Config
from popmtl.display import print_plan, print_runs, progress_text
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.distributed.progress import Progress
from popmtl.method.course import Course, Seen
from popmtl.method.front import Hypervolume, measured_hypervolume, non_dominated
from popmtl.method.population import objective_matrix
from popmtl.runs.checkpoint import checkpoint_name, commit, subproblem_file, write_tensors
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.results import write_front
from popmtl.tracking.note import note

M, N = 20, 100


@pytest.fixture(scope="module")
def trained():
    weights = np.random.default_rng(0).dirichlet(np.ones(M), N)
    config = Config.model_validate(
        {
            "problem": {"name": "dtlz2", "objectives": M},
            "population": {"weights": weights.tolist()},
            "train": {"steps": 4, "evaluate_every": 2, "optimizer": {"name": "Adam", "lr": 0.05}},
            "resources": {"gpus_per_actor": 0},
            "tracking": {"enabled": False},
        }
    )
    plan = make_plan(config, local_nodes())
    start = time.process_time()
    population = train_in_process(plan)
    assert time.process_time() - start < 20
    return config, plan, population


def test_the_plan_and_every_evaluation_say_that_the_hypervolume_is_estimated(trained):
    _, plan, population = trained
    console = Console(file=io.StringIO(), width=200)
    print_plan(console, plan)
    assert "estimated, with its error, where more than 12 of 100 models are non-dominated" in console.file.getvalue()
    last = population.history[-1]
    assert last.front_size > 50
    assert 0 < last.hypervolume_error < 0.2 * last.hypervolume
    line = progress_text(Progress("training", 4, 4, Hypervolume(last.hypervolume, last.hypervolume_error)))
    assert f"hypervolume ≈ {last.hypervolume:.5g} ± {last.hypervolume_error:.2g} (estimate)" in line


def test_a_course_goes_on_with_its_estimates_and_takes_none_again(trained, monkeypatch):
    _, plan, population = trained
    course = Course(plan.W, plan.M, plan.factors, 2, plan.ideal_point, plan.reference_point)
    seen = course.observe(population.history[-1].F)
    state = json.loads(json.dumps(course.state()))
    monkeypatch.setattr("popmtl.method.course.measured_hypervolume", None)
    again = Course(plan.W, plan.M, plan.factors, 2, plan.ideal_point, plan.reference_point)
    again.restore(state)
    assert again.last == again.best == Seen(0, seen.hypervolume, seen.hypervolume_error)
    assert seen.hypervolume_error is not None


def test_the_front_is_drawn_printed_compared_and_chosen_from(trained, tmp_path, capsys):
    config, plan, population = trained
    F = objective_matrix(population.block.evaluate("test"))
    volume = measured_hypervolume(F, plan.reference_point)
    rows = zip(plan.W.tolist(), F.tolist(), non_dominated(F).tolist(), strict=True)
    members = [Member(i, w, f, {}, "mtgd", best, f"models/{i}") for i, (w, f, best) in enumerate(rows)]
    front = Front(plan.objectives, plan.reference_point, volume.value, 0, 4, members, hypervolume_error=volume.error)
    shown = f"≈ {volume.value:.5g} ± {volume.error:.2g} (estimate)"
    start = time.process_time()
    for name in ("one", "two"):
        folder = RunFolder.create(tmp_path, name)
        folder.write_config(config.resolved())
        for seen in population.history:
            figures = {"hypervolume": seen.hypervolume, "hypervolume_error": seen.hypervolume_error}
            folder.append_metrics({"stage": "mtgd", "step": seen.step, **figures})
            state = record(seen.step, n=1)
            state["course"]["last"] |= figures
            name = checkpoint_name(seen.step)
            commit(folder, name, [write_tensors(folder, f"{name}/{subproblem_file(0)}", {}, {})], state)
        write_front(folder, front)
    assert main(["front", str(folder.path)]) == 0
    assert shown in capsys.readouterr().out
    assert main(["pick", str(folder.path), "--knee"]) == 0
    assert main(["pick", str(folder.path), "--preference", ",".join(["1"] * M)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["hypervolume_errors"] == [volume.error] * 2
    assert main(["verify", str(folder.path)]) == 0
    assert f"hypervolume ≈ {seen.hypervolume:.5g} ± {seen.hypervolume_error:.2g} (estimate)" in capsys.readouterr().out
    assert time.process_time() - start < 20
    console = Console(file=io.StringIO(), width=200)
    print_runs(console, [folder])
    assert f"≈ {seen.hypervolume:.5g} ± {seen.hypervolume_error:.2g} (estimate)" in console.file.getvalue()
    assert folder.front().volume == volume
    assert json.loads(folder.read("pareto/front.json"))["hypervolume_error"] == volume.error
    assert shown in note(front, {})
    page = folder.read("pareto/explorer.html").decode()
    assert f'"hypervolumeError": {volume.error}' in page
    assert f"[{seen.step}, {seen.hypervolume}, {seen.hypervolume_error}]" in page
