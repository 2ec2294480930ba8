"""A run that stops early, and leaves a front of its best evaluation too; also when it was interrupted on the way."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import run_in
from toy_problems import config

from popmtl.cli import main
from popmtl.config import Config
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.method.population import objective_matrix
from popmtl.runs.results import load_model

FINE_TUNE = 300


def data(**more):
    train = {"steps": 400, "evaluate_every": 10, "stop": {"patience": 4}, "execution": "loop", **more.pop("train", {})}
    return config(2, train=train, fine_tune={"steps": FINE_TUNE}, front={"best": True}, checkpoint={"keep": 1}, **more)


@pytest.fixture(scope="module")
def stopped(ray_of_four, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), "stopped", ray_of_four, data())


@pytest.fixture(scope="module")
def population():
    plan = make_plan(Config.model_validate(data()), [{"CPU": 2.0}])
    return plan, train_in_process(plan)


def test_a_run_stops_early_where_training_in_one_process_does(stopped, population):
    _, folder, report = stopped
    _, trained = population
    last, best = trained.history[-1].step, max(trained.history, key=lambda seen: seen.hypervolume).step
    assert best == last - 40 < last < 400
    mtgd = [line for line in folder.metrics() if line["stage"] == "mtgd"]
    assert [line["step"] for line in mtgd] == [seen.step for seen in trained.history]
    (event,) = [event for event in folder.events() if event["kind"] == "stopped early"]
    assert (event["step"], event["why"]) == (last, "no improvement of the hypervolume in 4 evaluations")
    # The Aligned-MTL stage followed from there.
    assert report.front.steps == last + FINE_TUNE
    F = objective_matrix(trained.block.evaluate("test"))
    np.testing.assert_allclose([member.objectives for member in report.front.members], F, rtol=1e-10)


def test_the_best_front_is_that_of_a_run_of_so_many_steps(stopped, population, capsys):
    _, folder, _ = stopped
    plan, trained = population
    best = trained.history[-1].step - 40
    front = folder.front("pareto/best")
    assert (front.steps, front.best, {member.stage for member in front.members}) == (best, True, {"mtgd"})
    block = train_in_process(replace(plan, factors=plan.factors[:best], aligned=None)).block
    F = objective_matrix(block.evaluate("test"))
    np.testing.assert_allclose([member.objectives for member in front.members], F, rtol=1e-10)
    for i, theirs in enumerate(block.models):
        ours = load_model(folder.path, i, best=True).state_dict()
        torch.testing.assert_close(ours, {key: value.to(ours[key].dtype) for key, value in theirs.state_dict().items()})
    assert {path.name for path in (folder.pareto / "best").iterdir()} == {
        *("front.json", "front.csv", "front.png", "explorer.html", "models")
    }
    assert main(["front", str(folder.path), "--from", "best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(front.to_json())
    assert main(["front", str(folder.path), "--from", "best"]) == 0
    assert f"front of the best evaluation, step {best}" in capsys.readouterr().out
    assert main(["pick", str(folder.path), "--knee", "--from", "best", "--json"]) == 0
    picked = json.loads(capsys.readouterr().out)
    assert "/pareto/best/models/" in picked["file"]
    names = {}
    exec("\n".join(picked["load"]), names)
    theirs = block.models[picked["subproblem"]].state_dict()["left.weight"]
    torch.testing.assert_close(names["model"].state_dict()["left.weight"].to(theirs), theirs)


@pytest.mark.parametrize("stage", ["training", pytest.param("fine-tuning", marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_the_same(ray_of_four, stopped, tmp_path, stage):
    _, theirs, _ = stopped

    def interrupt(progress):
        if progress.stage == stage and progress.step >= (100 if stage == "training" else 0):
            raise KeyboardInterrupt

    # So slow a run is interrupted in the middle; a checkpoint now and then makes it go on from there.
    own = data(problem={"name": "toy_problems:NoisyRegression"}) | {"checkpoint": {"keep": 1, "every_steps": 30}}
    try:
        run_in(tmp_path, "run", ray_of_four, own, interrupt)
    except KeyboardInterrupt:
        _, folder, _ = run_in(tmp_path, "run", ray_of_four, own, resumes=True)
        assert "resumed" in [event["kind"] for event in folder.events()]
    else:
        pytest.skip("the run was over before it could be interrupted")
    for ours, other in zip(folder.metrics(), theirs.metrics(), strict=True):
        # Means are summed by the chunks, whose lengths the clock decides: they differ in the last digits.
        assert ours.pop("curves").keys() == other.pop("curves").keys()
        assert ours == other
    for place in ("pareto", "pareto/best"):
        assert folder.front(place) == theirs.front(place)
