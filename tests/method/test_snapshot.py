"""A block that is taken down and built again goes on bit for bit, in either stage and cut into other buckets."""

import json
import math

import numpy as np
import pytest
import torch
from toy_problems import NoisyRegression

from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mtgd import Block, Chunk, Recipe
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
