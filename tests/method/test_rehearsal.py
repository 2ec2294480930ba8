"""What a plan finds by taking the first steps of real rows beside plain torch; the zoo of models is in the matrix."""

import math
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mtgd import Recipe
from popmtl.method.optimizers import Clip, ParameterGroup
from popmtl.method.problem import Problem
from popmtl.method.rehearsal import Mismatch, rehearse

W = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]])
ADAM = partial(torch.optim.Adam, lr=0.01)
ALL = ("torch", "numpy", "random")


class Two(Problem):
    """Two regressions by whatever network a test gives."""

    objectives = ("left", "right")

    def __init__(self, network):
        self.network = network

    def model(self):
        return self.network()

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(8, 6, generator=generator)

    def evaluation_batches(self, split):
        return [torch.linspace(-1, 1, 48).view(8, 6)]

    def losses(self, model, x):
        y = model(x)
        return torch.stack([(y[:, 0] - x[:, 0].sin()).square().mean(), (y[:, 1] - x[:, 1]).square().mean()])

    def representation(self, model, x):
        return model[0](x)

    def losses_at(self, model, representation, x):
        y = model[1:](representation)
        return torch.stack([(y[:, 0] - x[:, 0].sin()).square().mean(), (y[:, 1] - x[:, 1]).square().mean()])


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def found(network=mlp, recipe=None, problem=Two, **more):
    return rehearse(problem(network), W, recipe or Recipe(ADAM), **more)


def test_a_plain_model_has_nothing_to_tell():
    told = found(stack=True, aligned=AlignedRecipe(2, ADAM))
    assert (told.replication, told.generators, told.stepping, told.stackable) == ("copy", ALL, "rows", None)
    assert (told.unreached, told.warnings, told.scalars) == ((), (), ())
    assert told.shared == told.layout.names
    assert (told.constant_bytes, told.own_bytes) == (0, 0)
    assert told.memory_bytes == 2 * 4 * told.layout.size + 4  # Adam's moments, and its count of steps


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(ADAM, clip=Clip(norm=0.1), accumulate=3),
        Recipe(ADAM, clip=Clip(value=0.01), order="adapt_then_combine"),
        Recipe(partial(torch.optim.SGD, lr=0.1), groups=(ParameterGroup(("*.bias",), {"lr": 0.0}),)),
        Recipe(ADAM, precision="bf16"),
        Recipe(partial(torch.optim.Adafactor, lr=0.01), dtype=torch.float64),
        Recipe(ADAM, partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)),
    ],
    ids=["clip and accumulate", "clip value", "groups", "bf16", "Adafactor", "plateau"],
)
def test_recipes_are_rehearsed(recipe):
    assert found(recipe=recipe).warnings == ()


@pytest.mark.parametrize("variant", ["exact", "ub"])
def test_the_last_stage_is_rehearsed_too(variant):
    aligned = AlignedRecipe(
        1, ADAM, variant=variant, groups=(ParameterGroup(("*.bias",), {"lr": 0.0}),), clip=Clip(0.1)
    )
    assert found(aligned=aligned).warnings == ()


def test_frozen_parameters_and_constant_buffers_are_counted_once():
    def network():
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        model[0].requires_grad_(False)
        model.register_buffer("table", torch.zeros(100))
        return model

    told = found(network)
    assert told.own_bytes == 2 * 5 * 4 + 8, "BatchNorm's statistics, and their count"
    assert told.constant_bytes == (6 * 5 + 5) * 4 + 100 * 4


def test_what_no_loss_reaches_is_named_and_stays():
    def network():
        model = mlp()
        model.spare = nn.Linear(2, 2)
        return model

    class Reaches(Two):
        def losses(self, model, x):
            return super().losses(model[:3], x)

    told = found(network, Recipe(partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)), Reaches)
    assert told.unreached == ("spare.weight", "spare.bias")
    assert told.warnings == (
        "no loss reaches spare.weight, spare.bias; as in torch, what has no gradient stays as it is",
    )


@pytest.mark.parametrize(
    "draw",
    [lambda: np.random.default_rng().normal(), lambda: random.SystemRandom().random()],
    ids=["numpy", "the system"],
)
def test_models_that_start_differently_are_refused(draw):
    def network():
        model = mlp()
        model[0].bias.data.fill_(draw())
        return model

    with pytest.raises(ValueError, match=r"model\(\) starts differently at each call, in 0\.bias"):
        found(network)


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["numpy", "random"])
def test_generators_that_losses_draw_from_are_seeded(draw):
    class Noisy(Two):
        def losses(self, model, x):
            return super().losses(model, x) * (1 + draw())

    assert found(problem=Noisy).generators == ALL


def test_a_model_that_cannot_be_copied_is_built_for_each_row():
    def network():
        model = mlp()
        model.lock = threading.Lock()
        return model

    assert found(network).replication == "build"


def test_a_closure_over_another_module_is_built_for_each_row():
    def network():
        model = mlp()
        other = model[2]
        model[0].register_forward_hook(lambda module, inputs, output: output + other.weight.mean())
        return model

    assert found(network).replication == "build"


def test_losses_of_another_model_are_refused():
    class Kept(Two):
        def model(self):
            self.kept = mlp()
            return self.kept

        def losses(self, model, x):
            return super().losses(self.kept, x)

    with pytest.raises(Mismatch, match=r"losses\(\) uses a module that the problem keeps"):
        found(problem=Kept)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_parameter_that_keeps_signs_cannot_be_averaged(mixes):
    def network():
        by = {"orthogonal_map": "householder", "use_trivialization": False}
        return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), **by), nn.Linear(6, 2))

    if not mixes:
        assert found(network, mixes=False).unreached == ()
        return
    with pytest.raises(ValueError, match=r"the losses jump when parameter 0\.parametrizations\.weight\.original"):
        found(network)


def test_a_double_parameter_is_not_cut_in_silence():
    def network():
        model = mlp()
        model[0].weight = nn.Parameter(model[0].weight.double())
        return model

    with pytest.raises(ValueError, match=r"parameter 0\.weight is of torch\.float64, and would be trained in float32"):
        found(network)
    found(lambda: mlp().double(), Recipe(ADAM, dtype=torch.float64))


def test_a_buffer_whose_precision_the_losses_need_is_not_cut_in_silence():
    class Clock(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.register_buffer("time", torch.tensor(1e9 + 0.25, dtype=torch.float64))

        def forward(self, x):
            return self.net(x) + (self.time - 1e9).to(x.dtype)

    with pytest.raises(ValueError, match=r"the cast changes time \(from torch\.float64\)"):
        found(Clock)


def test_what_a_step_usually_does_and_which_buffers_become_infinite_is_known():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(6, 2)
            self.register_buffer("mask", torch.zeros(2))

        def forward(self, x):
            self.mask[1] = -torch.inf
            return super().forward(x) + 0 * self.mask[0]

    slow, fast = (Recipe(lambda p, lr=lr: torch.optim.SGD(p, lr=lr)) for lr in (1e-4, 1e-2))
    rehearsed = [found(Masked, recipe) for recipe in (slow, fast)]
    assert [one.unbounded for one in rehearsed] == [("mask",)] * 2
    sizes = [one.largest_step for one in rehearsed]
    assert 0 < sizes[0] < 3 * sizes[1] < 9 * sizes[0], "in proportion to the rate"
    assert rehearsed[0].cast(slow).unbounded == ("mask",)


def test_what_a_model_keeps_in_python_is_told():
    class Counts(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            self.calls += self.training
            return self.net(x) / (1 + self.calls)

    (warning,) = found(Counts).warnings
    assert warning.startswith("the model keeps calls in Python, in no checkpoint: a resumed run begins it anew")


@pytest.mark.parametrize(
    ("scalars", "says"),
    [
        ({"entropy": torch.zeros(2)}, r"losses reports entropy, of shape \(2,\), and must report single numbers"),
        ({"entropy": "high"}, "losses reports entropy, of str"),
        ({"learning_rate": 1.0}, "losses reports learning_rate, a name that PopMTL uses itself"),
    ],
)
def test_scalars_that_are_none_are_refused(scalars, says):
    class Reports(Two):
        def losses(self, model, x):
            return super().losses(model, x), scalars

    with pytest.raises(ValueError, match=says):
        found(problem=Reports)


def test_scalars_are_found():
    class Reports(Two):
        def losses(self, model, x):
            return super().losses(model, x), {"size": x.abs().mean(), "half": 0.5}

    assert found(problem=Reports).scalars == ("half", "size")


def test_an_objective_that_ignores_the_representation_is_refused_in_the_ub_variant():
    class Past(Two):
        def losses_at(self, model, representation, x):
            f = super().losses_at(model, representation, x)
            return torch.stack([f[0], self.losses(model, x)[1]])

    with pytest.raises(ValueError, match="objective right does not depend on the representation"):
        found(problem=Past, aligned=AlignedRecipe(1, ADAM, variant="ub"))


def test_a_dead_objective_is_told():
    class Dead(Two):
        def losses(self, model, x):
            f = super().losses(model, x)
            return torch.stack([f[0], f[1].detach()])

    told = found(problem=Dead, aligned=AlignedRecipe(1, ADAM))
    assert told.shared == told.layout.names
    assert told.warnings == ("objective right has no gradient on any of the first batches; is it constant?",)


def test_random_states_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_losses_that_are_not_finite_later_do_not_stop_the_plan():
    class Later(Two):
        def batches(self, seed):
            for t, x in enumerate(super().batches(seed)):
                yield x * math.nan if t == 2 else x

    assert found(problem=Later).stepping == "rows"


def test_buffers_in_memory_that_is_not_torchs_own_are_taken():
    kept = np.arange(6, dtype=np.float32)

    def network():
        model = mlp()
        model[0].register_buffer("mean", torch.from_numpy(kept))
        model[0].register_forward_pre_hook(lambda module, inputs: inputs[0] - module.mean)
        return model

    assert found(network).constant_bytes == 6 * 4
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]


def test_normal_numbers_that_numpy_has_in_store_are_those_of_the_row():
    class Odd(Two):
        def batches(self, seed):
            for x in super().batches(seed):
                yield x + np.random.randn()  # of a pair, the other of which numpy keeps for the next call

        def losses(self, model, x):
            return super().losses(model, x) * (1.5 + np.tanh(np.random.randn()))

    assert found(problem=Odd).generators == ALL


@pytest.mark.parametrize("without", [1, 3])
def test_a_first_batch_without_any_label_is_one_like_others(without):
    class Late(Two):
        def batches(self, seed):
            for t, x in enumerate(super().batches(seed)):
                yield x, t >= without

        def evaluation_batches(self, split):
            return [(super().evaluation_batches(split)[0], True)]

        def losses(self, model, batch):
            f = super().losses(model, batch[0])
            return f if batch[1] else f.detach() * 0

    assert set(found(problem=Late).unreached) == (set() if without == 1 else set(found().layout.names))
