"""Recipes of training in a config: optimizers, groups, schedules, clipping."""

import pytest
import torch

from popmtl.config import Config, build_schedule

PLAIN = {"problem": "vlmop2", "population": {"subproblems": 4}}


def config(**train):
    return Config.model_validate({**PLAIN, "train": train})


class Halved(torch.optim.SGD):
    """An optimizer of another package, so to speak."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.5 * group["lr"])


def rates(schedule, steps, lr=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    made = build_schedule(schedule, steps)(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


def test_schedules_follow_each_other_as_in_torch():
    given = config(
        steps=10,
        lr_schedule=[
            {"name": "LinearLR", "start_factor": 0.25, "total_iters": "steps", "for": 4},
            {"name": "CosineAnnealingLR", "T_max": "steps"},
        ],
    ).train.lr_schedule
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert rates(given, 10) == pytest.approx(expected)
    assert expected[:2] == pytest.approx([0.25, 0.4375])


WARM = {"name": "LinearLR", "start_factor": 0.1}


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([WARM, {"name": "StepLR", "step_size": 1}], "LinearLR: say `for` how many steps it lasts"),
        ([{**WARM, "for": 10}, {"name": "StepLR", "step_size": 1}], "last 10 steps, and the stage has 10"),
        (
            [{**WARM, "for": 3}, {"name": "StepLR", "step_size": 1, "for": 3}],
            "the last schedule, StepLR",
        ),
        ([{**WARM, "for": 3}, {"name": "ReduceLROnPlateau"}], "ReduceLROnPlateau goes by evaluations"),
        ([], "an empty sequence; give schedules, or null"),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 9}, "OneCycleLR does not take 10 steps"),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": "steps", "pct_start": 0.1}, "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "fine_tune"])
def test_a_schedule_that_cannot_take_the_steps_is_refused(schedule, says, stage):
    with pytest.raises(ValueError, match=says):
        Config.model_validate({**PLAIN, stage: {"steps": 10, "lr_schedule": schedule}})


def test_a_schedule_is_tried_at_the_stage_s_own_number_of_steps():
    config(steps=200, lr_schedule={"name": "OneCycleLR", "max_lr": 0.1, "total_steps": "steps", "pct_start": 0.1})


def test_a_plateau_is_of_evaluations():
    config(lr_schedule={"name": "ReduceLROnPlateau", "patience": 2})
    with pytest.raises(ValueError, match="this stage has none on its way"):
        Config.model_validate({**PLAIN, "fine_tune": {"steps": 3, "lr_schedule": {"name": "ReduceLROnPlateau"}}})


def test_an_optimizer_of_another_package_is_taken_by_its_path():
    made = config(optimizer={"name": f"{__name__}:Halved", "lr": 0.1}).train.optimizer
    parameter = torch.zeros(2)
    parameter.grad = torch.ones(2)
    made.build()([parameter]).step()
    assert parameter.tolist() == pytest.approx([-0.05, -0.05])


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"name": f"{__name__}:Missing"}, "has no torch.optim.Optimizer of the name 'Missing'"),
        ({"name": "no_such_module:Adam"}, "importing no_such_module failed"),
        (
            {"name": "Adam", "groups": [{"match": "*.bias", "weigth_decay": 0}]},
            "'weigth_decay'.*weight_decay",
        ),
        ({"name": "Adam", "groups": [{"match": "*.bias", "lr": -1.0}]}, "learning rate"),
        ({"name": "Adam", "groups": [{"match": "*.bias", "name": "Muonn"}]}, "no optimizer 'Muonn'"),
    ],
)
def test_a_mistake_in_an_optimizer_is_named(optimizer, says):
    with pytest.raises(ValueError, match=says):
        config(optimizer=optimizer)


@pytest.mark.parametrize(
    "clip", [{}, {"norm": 1.0, "value": 1.0}, {"norm": 0}, {"value": float("inf")}, {"norm": True}]
)
def test_clipping_is_by_one_bound(clip):
    with pytest.raises(ValueError, match="clip"):
        config(clip=clip)


def test_accumulation_needs_the_exact_variant():
    with pytest.raises(ValueError, match="accumulate needs variant: exact"):
        Config.model_validate({**PLAIN, "fine_tune": {"steps": 1, "variant": "ub", "accumulate": 2}})


def test_a_recipe_comes_back_from_what_a_run_records():
    given = config(
        steps=20,
        optimizer={"name": "AdamW", "lr": 0.1, "groups": [{"match": ["*.bias"], "weight_decay": 0}]},
        lr_schedule=[{**WARM, "for": 3}, {"name": "StepLR", "step_size": 1}],
        clip={"norm": 1.0},
        accumulate=2,
    )
    assert Config.model_validate(given.resolved()) == given
    assert given.resolved()["train"]["lr_schedule"][0]["for"] == 3
