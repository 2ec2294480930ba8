"""Problems as a user may write them, right and wrong; the command line finds them by name."""

import itertools
import time

import torch
from torch import nn

from popmtl.problems import VectorProblem
from popmtl.problems.synthetic import Vlmop2


class Parabolas(VectorProblem):
    """Two distances, and nothing wrong with it."""

    objectives = ("left", "right")
    variables = 3
    bounds = (-2.0, 2.0)

    def values(self, x):
        return torch.stack([(x - 1).square().sum(-1), (x + 1).square().sum(-1)], -1)


class Unhurried(Vlmop2):
    """Waits before each step: a run of it lasts some seconds, however fast the machine is."""

    def batches(self, seed):
        while True:
            time.sleep(0.002)
            yield None


class Advised(Parabolas):
    """Has defaults, and something to say of its data."""

    notices = ("3 rows were dropped",)

    def __init__(self, defaults):
        self.defaults = defaults


class One(Parabolas):
    """Has the name of an emoji."""


class LeavesOut(Parabolas):
    """Has a parameter in none of its groups."""

    def model(self):
        return nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in ("stepped", "left_out")})

    def losses(self, model, batch):
        return self.values(model["stepped"] + model["left_out"])

    def parameter_groups(self, model):
        return [{"params": [model["stepped"]]}]


class LacksALoss(Parabolas):
    def values(self, x):
        return super().values(x)[..., :1]


class SumsItsLosses(Parabolas):
    def values(self, x):
        return super().values(x).sum(-1)


class NanFromTheStart(Parabolas):
    def values(self, x):
        return super().values(x) * torch.tensor([1.0, float("nan")])


class NanLater(Parabolas):
    """The second objective turns NaN in the training batch of step 5, the sixth."""

    def batches(self, seed):
        return (torch.tensor(float("nan") if t == 5 else 1.0) for t in itertools.count())

    def losses(self, model, batch):
        values = self.values(model())
        return values if batch is None else values * torch.stack([torch.ones_like(batch), batch])


class NoParameters(Parabolas):
    def model(self):
        return nn.Identity()


class IgnoresTheModel(Parabolas):
    def losses(self, model, batch):
        return torch.ones(2)


class NoBatches(Parabolas):
    def batches(self, seed):
        return iter(())


class FewBatches(Parabolas):
    def batches(self, seed):
        return itertools.repeat(None, 3)


class EndsUnseen(Parabolas):
    def batches(self, seed):
        return (None for _ in range(30))
