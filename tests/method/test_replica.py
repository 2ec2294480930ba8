"""Models of the rows: copy-on-write memory, and what processes compare."""

import torch
from torch import nn

from popmtl.method.replica import copied, exported, first_difference, load_exported, marks, own_constants
from popmtl.method.replica import initial_constants as constants_of


def backbone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


TRAINED = ("1.weight", "1.bias", "2.weight", "2.bias")


def test_what_nobody_writes_to_is_shared_and_what_one_writes_to_is_its_own():
    model = backbone()
    initial = constants_of(model, TRAINED)
    one, other = copied(model), copied(model)
    assert own_constants(one, initial, TRAINED) == {}
    one(torch.randn(8, 4))
    assert set(own_constants(one, initial, TRAINED)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert own_constants(other, initial, TRAINED) == {}
    with torch.no_grad():
        other[0].weight.zero_()
    assert set(own_constants(other, initial, TRAINED)) == {"0.weight"}
    assert model[0].weight.any()
    assert one[0].weight.any()


def test_a_state_that_is_loaded_leaves_shared_what_is_equal():
    model = backbone()
    initial = constants_of(model, TRAINED)
    source, target = copied(model), copied(model)
    source(torch.randn(8, 4))
    load_exported(target, {name: value.clone() for name, value in exported(source).items()})
    assert "0.weight" not in own_constants(target, initial, TRAINED)
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_marks_tell_another_order_of_entries_and_not_rounding():
    value = torch.randn(1000)
    assert first_difference(marks({"x": value}), marks({"x": value * (1 + 1e-6)})) is None
    assert first_difference(marks({"x": value}), marks({"x": value.flip(0)})) == "x"
    assert first_difference(marks({"x": value}), marks({"x": value, "y": value})) == "y"
