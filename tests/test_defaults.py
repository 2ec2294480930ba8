"""A problem's defaults: what a config says wins, a component is taken whole, and a run keeps what it began with."""

import json

import pytest
import yaml

from popmtl.cli import OK, main
from popmtl.config import Config, load_config, resumed_config, single_task
from popmtl.distributed.plan import make_plan
from popmtl.errors import RequestError

DEFAULTS = {
    "train": {
        "steps": 300,
        "optimizer": {"name": "SGD", "lr": 0.3, "momentum": 0.5},
        "lr_schedule": {"name": "CosineAnnealingLR", "T_max": "steps"},
    },
    "fine_tune": {"steps": 7},
    "scalarization": {"mu": 0.5},
    "transfer": {"until": 0.9},
    "population": {"weights": "energy", "min_weight": 0.02},
    "front": {"reference_point": [9.0, 9.0]},
}


def plan(defaults=DEFAULTS, **config):
    problem = {"name": "user_problems:Advised", "defaults": defaults}
    return make_plan(
        Config.model_validate(
            {"problem": problem, "population": {"subproblems": 3, "weights": "das_dennis"}, **config}
        ),
        [{"CPU": 1.0}],
    )


def test_they_stand_where_the_config_says_nothing():
    made = plan()
    resolved = made.config.resolved()
    assert (resolved["train"]["steps"], len(made.factors)) == (300, 300)
    assert resolved["train"]["optimizer"] == {"name": "SGD", "lr": 0.3, "momentum": 0.5}
    assert made.recipe.optimizer.keywords == {"lr": 0.3, "momentum": 0.5}
    assert made.recipe.lr_schedule.keywords == {"T_max": 300}
    assert made.aligned.steps == 7
    assert made.recipe.scalarization.mu == 0.5
    assert made.reference_point == (9, 9)
    assert resolved["population"] == {"subproblems": 3, "weights": "das_dennis", "min_weight": 0.02}
    assert resolved["transfer"]["until"] == 0.9
    assert resolved["train"]["evaluate_every"] == 50  # of which the problem says nothing


def test_what_the_config_says_wins_and_a_component_is_taken_whole():
    said = plan(
        train={"steps": 20, "optimizer": {"name": "SGD", "lr": 1.0}},
        fine_tune={"steps": 0},
        scalarization={"name": "smooth_tchebycheff"},
        front={"reference_point": None},
        transfer="none",
    ).config
    assert said.train.steps == 20
    assert said.train.optimizer.model_dump() == {"name": "SGD", "lr": 1.0}
    assert said.train.lr_schedule.name == "CosineAnnealingLR"
    assert said.fine_tune.steps == 0
    assert said.scalarization.mu == 0.05
    assert said.front.reference_point is None
    assert said.transfer.strength == 0
    # To say what is the default anyway is to say it.
    assert plan(train={"lr_schedule": None, "steps": 1000}).config.train.lr_schedule is None
    assert plan(train={"steps": 1000}).config.train.steps == 1000
    assert plan(train={"optimizer": {}}).config.train.optimizer.model_dump() == {"name": "Adam"}
    assert plan(scalarization={"rho": 0.1}).config.scalarization.mu == 0.5


@pytest.mark.parametrize(
    ("defaults", "says"),
    [
        ({"trian": {}}, r"defaults: 'trian' must be one of: population, .*front"),
        ({"resources": {"max_actors": 1}}, r"defaults: 'resources' must be one of"),
        ({"seed": 3}, r"defaults: 'seed' must be one of"),
        ({"train": {"stepz": 3}}, r"defaults: train.stepz: unknown key: did you mean steps\?"),
        ({"train": {"steps": "many"}}, r"defaults: train.steps: .*not 'many'"),
        ({"train": {"optimizer": {"name": "Adamm"}}}, r"defaults: train.optimizer: .*did you mean Adam\?"),
        ({"train": 3}, r"defaults: train: "),
        ({"population": {"weights": [[0.5, 0.5]]}}, r"defaults: population: subproblems is 3, but 1 weight"),
        ([("train", {})], r"defaults must be sections of a config, not \["),
    ],
)
def test_bad_ones_are_refused_by_problem_and_key(defaults, says):
    with pytest.raises(RequestError, match=f"^problem user_problems:Advised: {says}"):
        plan(defaults)


def test_defaults_that_contradict_the_config_are_said_to():
    with pytest.raises(RequestError, match=r"user_problems:Advised: defaults do not go with this config: train: "):
        plan({"train": {"precision": "bf16"}}, train={"dtype": "float64"})


def test_the_effective_config_is_shown_and_notices_are_warnings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problem = {"name": "user_problems:Advised", "defaults": DEFAULTS}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"problem": problem, "population": {"subproblems": 3}}))
    assert main(["train", "one.yaml", "--dry-run", "fine_tune.steps=0"]) == OK
    out = " ".join(capsys.readouterr().out.split())
    assert "300 MTGD" in out
    assert "SGD(lr=0.3, momentum=0.5), CosineAnnealingLR(T_max=steps)" in out
    assert "train.steps=300" in out
    assert "fine_tune.steps=7" not in out
    assert "warning: 3 rows were dropped" in out


def test_a_plan_of_its_own_config_changes_nothing():
    made = plan()
    problem = made.config.problem.model_copy(update={"defaults": {"train": {"steps": 5}, "fine_tune": {"steps": 1}}})
    again = make_plan(made.config.model_copy(update={"problem": problem}), [{"CPU": 1.0}])
    assert again.config.train == made.config.train
    assert not again.defaults
    # Nor does the run of single tasks take the problem's fine-tuning.
    alone = make_plan(single_task(made.config, 2), [{"CPU": 1.0}])
    assert (alone.aligned, len(alone.factors), alone.transfers) == (None, 307, False)


def test_a_resumed_run_keeps_its_config_and_a_file_may_say_less(tmp_path):
    made = plan(train={"steps": 20})
    own = json.loads(json.dumps(made.config.resolved()))
    assert resumed_config(own, None, []).resolved() == own
    given = {"problem": own["problem"], "population": {"subproblems": 3}, "train": {"steps": 20}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert resumed_config(own, path, []).resolved() == own
    path.write_text(yaml.safe_dump(given | {"train": {"optimizer": {"name": "SGD", "lr": 0.3}}}))
    with pytest.raises(RequestError, match=r"train.optimizer.momentum: 0.5 in the run, None now"):
        resumed_config(own, path, [])
    path.write_text(yaml.safe_dump(given | {"problem": {"name": "user_problems:Parabolas"}}))
    with pytest.raises(RequestError, match=r"problem.name: 'user_problems:Advised' in the run"):
        resumed_config(own, path, [])


def test_configs_of_the_repository_say_what_they_did():
    for name in ("river_flow", "compas"):
        config = load_config(f"configs/{name}.yaml")
        assert {"steps", "optimizer", "lr_schedule"} <= config.train.model_fields_set
