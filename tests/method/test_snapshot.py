"""A block that is taken down and built again goes on bit for bit, in either stage and cut into other buckets."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_problems import NoisyRegression

from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.gradients import gradient_method
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.optimizers import ParameterGroup, assign
from popmtl.method.problem import Problem
from popmtl.method.rehearsal import rehearse
from popmtl.method.snapshot import RowState, put, take

W = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]])
M = np.array([[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
STEPS, CUT = 24, 10
OPTIMIZERS = {
    "sgd": lambda rows: torch.optim.SGD(rows, lr=0.05),
    "momentum": lambda rows: torch.optim.SGD(rows, lr=0.05, momentum=0.9),
    "adam": lambda rows: torch.optim.Adam(rows, lr=0.02),
    "adamw": lambda rows: torch.optim.AdamW(rows, lr=0.02, amsgrad=True),
    "nadam": lambda rows: torch.optim.NAdam(rows, lr=0.02),
    "adagrad": lambda rows: torch.optim.Adagrad(rows, lr=0.02),
    "adafactor": lambda rows: torch.optim.Adafactor(rows, lr=0.02),
}
SCHEDULES = {
    "none": None,
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "milestones": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15]),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, STEPS, cycle_momentum=False),
}


def chunk(first, end):
    return Chunk(first, np.linspace(1, 0.3, STEPS)[first:end], M, np.array([-0.1, -0.1]))


def through_json(states):
    """As a file would give them back."""
    return [RowState({k: v.clone() for k, v in s.tensors.items()}, json.loads(json.dumps(s.numbers))) for s in states]


def same(a, b):
    assert torch.equal(a.rows, b.rows)
    for one, other in zip(a.models, b.models, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.buffers(), other.buffers(), strict=True))


def resumed(block, states, buckets=math.inf):
    """A block built anew, as another process would."""
    new = Block(NoisyRegression(), range(3), W, block.recipe, bucket_bytes=buckets)
    put(new, new.optimizers, through_json(states))
    return new


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_block_goes_on_bit_for_bit(optimizer, schedule):
    recipe = Recipe(OPTIMIZERS[optimizer], SCHEDULES[schedule], dtype=torch.float32, seed=4)
    straight = Block(NoisyRegression(), range(3), W, recipe)
    straight.run(chunk(0, CUT))
    states = take(straight, straight.optimizers)
    expected = straight.run(chunk(CUT, STEPS))
    new = resumed(straight, states)
    np.testing.assert_array_equal(new.run(chunk(CUT, STEPS)), expected)
    same(new, straight)


@pytest.mark.parametrize(("before", "after"), [(math.inf, 64), (64, math.inf)])
def test_what_buckets_remember_is_that_of_whole_rows(before, after):
    recipe = Recipe(OPTIMIZERS["adam"], order="adapt_then_combine", mix_moments=True, dtype=torch.float32, seed=4)
    straight = Block(NoisyRegression(), range(3), W, recipe, bucket_bytes=before)
    straight.run(chunk(0, CUT))
    states = take(straight, straight.optimizers)
    straight.run(chunk(CUT, STEPS))
    new = resumed(straight, states, after)
    assert len(new.buckets) != len(straight.buckets)
    new.run(chunk(CUT, STEPS))
    torch.testing.assert_close(new.rows, straight.rows, rtol=1e-5, atol=1e-6)


def test_a_snapshot_does_not_change_with_the_block():
    block = Block(NoisyRegression(), range(3), W, Recipe(OPTIMIZERS["adam"], dtype=torch.float32))
    block.run(chunk(0, CUT))
    states = take(block, block.optimizers)
    before = [{name: value.clone() for name, value in state.tensors.items()} for state in states]
    block.run(chunk(CUT, STEPS))
    for state, kept in zip(states, before, strict=True):
        assert all(torch.equal(state.tensors[name], kept[name]) for name in kept)


@pytest.mark.parametrize("variant", ["exact", "ub"])
@pytest.mark.parametrize("done", [0, 4])
def test_fine_tuning_goes_on_bit_for_bit(variant, done):
    recipe = Recipe(OPTIMIZERS["adam"], dtype=torch.float32, seed=4)
    aligned = AlignedRecipe(9, OPTIMIZERS["adam"], SCHEDULES["cosine"], variant=variant)
    ideal = np.array([-0.1, -0.1])
    straight = Block(NoisyRegression(), range(3), W, recipe)
    straight.run(chunk(0, CUT))
    stage = FineTuning(straight, aligned, ideal)
    stage.run(CUT, done)
    states = stage.snapshot()
    expected = stage.run(CUT + done, 9 - done)[0]
    results = stage.finish()

    new = Block(NoisyRegression(), range(3), W, recipe)
    again = FineTuning(new, aligned, ideal, through_json(states))
    np.testing.assert_array_equal(again.run(CUT + done, 9 - done)[0], expected)
    for one, other in zip(again.finish(), results, strict=True):
        assert (one.before, one.after, one.kept) == (other.before, other.after, other.kept)
        assert (one.condition, one.cosine) == (other.condition, other.cosine)
    same(new, straight)


def test_a_state_of_another_model_is_refused():
    block = Block(NoisyRegression(), range(3), W, Recipe(OPTIMIZERS["sgd"], dtype=torch.float32))
    states = take(block, block.optimizers)
    states[1].tensors["row"] = states[1].tensors["row"][:-1]
    with pytest.raises(ValueError, match="subproblem 1: row is not that of this model"):
        put(block, block.optimizers, states)
    block.run(chunk(0, 1))
    states = take(block, block.optimizers)
    del states[0].tensors["buffers/trunk.1.running_mean"]
    with pytest.raises(ValueError, match=r"subproblem 0: buffers/trunk\.1\.running_mean is not that of this model"):
        put(block, block.optimizers, states)


class Counting(torch.optim.SGD):
    """Takes larger steps from the 14th on; counts them in an attribute, or in a place of its own in the state."""

    def __init__(self, parameters, where):
        super().__init__(parameters, lr=0.01)
        self.where, self.steps = where, 0

    def step(self, closure=None):
        if self.where == "attribute":
            self.steps += 1
        else:
            self.state["steps"] = self.state.get("steps", 0) + 1
        taken = self.steps if self.where == "attribute" else self.state["steps"]
        self.param_groups[0]["lr"] = 0.01 if taken < 14 else 0.1
        super().step(closure)


@pytest.mark.parametrize("where", ["attribute", "state"])
def test_what_an_optimizer_remembers_of_no_parameter_is_kept(where):
    recipe = Recipe(lambda parameters: Counting(parameters, where), dtype=torch.float32, seed=4)
    straight = Block(NoisyRegression(), range(3), W, recipe)
    straight.run(chunk(0, CUT))
    states = take(straight, straight.optimizers)
    expected = straight.run(chunk(CUT, STEPS))
    np.testing.assert_array_equal(resumed(straight, states).run(chunk(CUT, STEPS)), expected)


class Hiding(torch.optim.SGD):
    """Keeps a list, of every step or of none."""

    def __init__(self, parameters, every):
        super().__init__(parameters, lr=0.01)
        self.every, self.history = every, []

    def step(self, closure=None):
        super().step(closure)
        self.history += [0.0] * self.every


def test_an_optimizer_with_a_memory_that_cannot_be_kept_is_refused_and_one_that_may_get_one_is_named():
    def plan(every):
        return rehearse(NoisyRegression(), W, Recipe(lambda parameters: Hiding(parameters, every)))

    with pytest.raises(ValueError, match=r"Hiding\.history changes from step to step, and is in no checkpoint"):
        plan(1)
    assert any("Hiding.history is empty" in warning for warning in plan(0).warnings)


@pytest.mark.parametrize("group", [{"momentum": 0.0}, "Adam"])
def test_moments_that_a_group_lacks_cannot_be_mixed(group):
    other = group == "Adam"
    groups = (ParameterGroup(("*bias",), {} if other else group, OPTIMIZERS["adam"] if other else None),)

    def rmsprop(parameters):
        return torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9)

    recipe = Recipe(rmsprop, order="adapt_then_combine", mix_moments=True, groups=groups)
    with pytest.raises(ValueError, match=r"mix_moments: parameter .*bias is in a group whose optimizer does not keep"):
        rehearse(NoisyRegression(), W, recipe)


class Routed(Problem):
    """Each batch takes one of three heads, another one from the tenth on."""

    objectives = ("a", "b")

    def model(self):
        return nn.ModuleList([nn.Linear(4, 2) for _ in range(4)])

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for k in range(STEPS):
            yield torch.randn(8, 4, generator=generator), (seed + (k >= 9)) % 3

    def evaluation_batches(self, split):
        return [(torch.ones(2, 4), 0)]

    def losses(self, model, batch):
        x, head = batch
        return (model[3](x) + model[head](x) - x[:, :2]).square().mean(0)


def test_moments_that_others_sent_for_a_parameter_without_one_are_not_sent_on():
    recipe = Recipe(OPTIMIZERS["adam"], order="adapt_then_combine", mix_moments=True, dtype=torch.float64, seed=4)
    straight = Block(Routed(), range(3), W, recipe)
    straight.run(chunk(0, 6))
    states = take(straight, straight.optimizers)
    expected = straight.run(chunk(6, STEPS))
    new = Block(Routed(), range(3), W, recipe)
    put(new, new.optimizers, through_json(states))
    np.testing.assert_array_equal(new.run(chunk(6, STEPS)), expected)


class Alias(NoisyRegression):
    """Two modules with one buffer; one writes to it."""

    def model(self):
        model = super().model()
        model.writes, model.reads = nn.Module(), nn.Module()
        model.writes.register_buffer("shift", shift := torch.zeros(2))
        model.reads.register_buffer("shift", shift)
        return model

    def losses(self, model, batch):
        if model.training:
            model.writes.shift.add_(0.1)
        return super().losses(model, batch) + model.reads.shift


def test_a_buffer_of_two_modules_stays_one_when_it_is_put_back():
    block = Block(Alias(), range(3), W, Recipe(OPTIMIZERS["sgd"], dtype=torch.float64))
    states = take(block, block.optimizers)
    block.run(chunk(0, 3))
    put(block, block.optimizers, states)
    for model in block.models:
        assert model.writes.shift is model.reads.shift
        assert not model.reads.shift.any()


class Lists(torch.optim.Optimizer):
    """Keeps its latest gradients in a list, and decays them in place."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            latest = self.state[p].setdefault("latest", [])
            latest[:] = [*latest, p.grad.clone()][-3:]
            p -= 0.01 * sum(latest)
            for gradient in latest:
                gradient.mul_(0.9)


def test_a_state_that_is_put_twice_does_not_change():
    block = Block(NoisyRegression(), range(3), W, Recipe(Lists, dtype=torch.float32, seed=4))
    block.run(chunk(0, CUT))
    states = take(block, block.optimizers)
    put(block, block.optimizers, states)
    expected = block.run(chunk(CUT, STEPS))
    put(block, block.optimizers, states)
    np.testing.assert_array_equal(block.run(chunk(CUT, STEPS)), expected)


class Hooked(NoisyRegression):
    def model(self):
        model = super().model()
        next(model.parameters()).register_post_accumulate_grad_hook(halve)
        return model


def halve(parameter):
    parameter.grad /= 2


def test_hooks_on_accumulated_gradients_are_refused_where_none_accumulate():
    aligned = AlignedRecipe(3, OPTIMIZERS["sgd"])
    for recipe, stage, what in (
        (Recipe(OPTIMIZERS["sgd"], accumulate=2), None, "accumulate"),
        (Recipe(OPTIMIZERS["sgd"]), aligned, "fine_tune"),
        (Recipe(OPTIMIZERS["sgd"], gradient=lambda: gradient_method("aligned_mtl", 2)), None, "train.gradient"),
    ):
        with pytest.raises(ValueError, match=f"has a hook on its accumulated gradient, which {what} cannot serve"):
            rehearse(Hooked(), W, recipe, stage)


class Keeps(NoisyRegression):
    """Has learned weights of the losses, and counts its batches, itself."""

    def __init__(self):
        super().__init__()
        self.log_variances, self.calls = nn.Parameter(torch.zeros(2)), 0

    def losses(self, model, batch):
        self.calls += 1
        return super().losses(model, batch) * (-self.log_variances).exp() + self.log_variances


def test_what_a_problem_keeps_itself_is_named():
    warnings = rehearse(Keeps(), W, Recipe(OPTIMIZERS["sgd"])).warnings
    assert any("gradients in log_variances of the problem, which no optimizer has" in one for one in warnings)
    assert any("the problem changes calls with each batch" in one for one in warnings)
    assert not rehearse(NoisyRegression(), W, Recipe(OPTIMIZERS["sgd"])).warnings


def test_a_pattern_that_is_the_name_of_a_parameter_means_that_one():
    names = ["d.w[0]", "d.w*", "d.w0"]
    groups = [ParameterGroup((pattern,), {}) for pattern in ("d.w[0]", "d.w*")]
    assert assign(names, groups) == [["d.w[0]"], ["d.w*"], ["d.w0"]]


class Distance(torch.optim.Optimizer):
    """Adapts its rate in the options of its group, counts in an attribute, and remembers where it began."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05, "d": 0.1})
        self.steps = 0
        for p in self.param_groups[0]["params"]:
            self.state[p]["start"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        (group,) = self.param_groups
        group["d"] = 0.9 * group["d"] + 0.1 * float(sum(p.grad.norm() for p in group["params"]))
        for p in group["params"]:
            p.add_(p.grad, alpha=-group["lr"] * group["d"]).lerp_(self.state[p]["start"], 0.01)


def distance(steps):
    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    return Recipe(Distance, cosine, dtype=torch.float32, seed=4)


def test_a_longer_schedule_loses_nothing_of_what_a_group_remembers():
    block = Block(NoisyRegression(), range(3), W, distance(STEPS))
    block.run(chunk(0, CUT))
    new = Block(NoisyRegression(), range(3), W, distance(2 * STEPS))
    put(new, new.optimizers, through_json(take(block, block.optimizers)))
    for a, b in zip(new.optimizers.members, block.optimizers.members, strict=True):
        (one,), (other,) = a.optimizers[0].param_groups, b.optimizers[0].param_groups
        assert one["d"] == other["d"] != 0.1
        assert one["lr"] == pytest.approx(0.025 * (1 + math.cos(math.pi * CUT / (2 * STEPS))))


def test_a_row_that_starts_again_has_an_optimizer_without_any_memory():
    block = Block(NoisyRegression(), range(3), W, distance(STEPS))
    block.run(chunk(0, CUT))
    (optimizer,) = block.optimizers.members[0].optimizers
    rate, optimizer.param_groups[0]["d"] = optimizer.param_groups[0]["lr"], math.nan
    block.reseed(0, block.state(1))
    (optimizer,) = block.optimizers.members[0].optimizers
    assert (optimizer.param_groups[0]["d"], optimizer.param_groups[0]["lr"], optimizer.steps) == (0.1, rate, 0)
    for p in block.optimizers.members[0].parameters:
        assert torch.equal(optimizer.state[p]["start"], p)
    assert np.isfinite(block.run(chunk(CUT, STEPS))).all()


class Unsaved(NoisyRegression):
    def model(self):
        model = super().model()
        model.register_buffer("shift", torch.zeros(2), persistent=False)
        return model

    def losses(self, model, batch):
        return super().losses(model, batch) + model.shift


def test_a_row_that_starts_again_has_no_nan_left_in_buffers_that_are_not_saved():
    block = Block(Unsaved(), range(3), W, Recipe(OPTIMIZERS["sgd"], dtype=torch.float32))
    block.models[0].shift.fill_(math.nan)
    block.reseed(0, block.state(1))
    assert np.isfinite(block.run(chunk(0, 2))).all()


class SparseBuffer(NoisyRegression):
    def model(self):
        model = super().model()
        model.register_buffer("adjacency", torch.eye(6).to_sparse())
        return model


def test_a_sparse_buffer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"adjacency is of layout torch\.sparse_coo"):
        rehearse(SparseBuffer(), W, Recipe(OPTIMIZERS["sgd"]))
