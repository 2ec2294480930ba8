"""A problem for the tests that Ray's workers import by name, and a config that runs it."""

import socket
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import torch
from torch import nn

from popmtl.method.mtgd import subproblem_seed
from popmtl.problems import Problem


class NoisyRegression(Problem):
    """Two regressions on noise, with everything that can go wrong in a distributed run: data drawn by seed, dropout,
    BatchNorm's buffers, heads that do not transfer, and an ideal point that is tracked."""

    objectives = ("left", "right")
    metrics = {"error": "lower"}  # noqa: RUF012

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def model(self):
        # A bias right before BatchNorm would have a gradient of rounding errors, which Adam makes large.
        trunk = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
        return nn.ModuleDict({"left": nn.Linear(5, 1), "trunk": trunk, "right": nn.Linear(5, 1)})

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = 0
        while True:
            x = torch.randn(4, 6, generator=generator)
            drawn += 1
            if self.fail_at is not None and drawn > self.fail_at:
                x = x * float("nan")
            yield {"x": x, "y": (x.sum(1), x[:, 0] - x[:, 1])}

    def evaluation_batches(self, split):
        generator = torch.Generator().manual_seed({"validation": 1, "test": 2}[split])
        for _ in range(2):
            x = torch.randn(8, 6, generator=generator)
            yield {"x": x, "y": (x.sum(1), x[:, 0] - x[:, 1])}

    def representation(self, model, batch):
        return model["trunk"](batch["x"])

    def losses_at(self, model, representation, batch):
        names = self.objectives
        return torch.stack(
            [(model[n](representation)[:, 0] - y).square().mean() for n, y in zip(names, batch["y"], strict=True)]
        )

    def losses(self, model, batch):
        return self.losses_at(model, self.representation(model, batch), batch)

    def measure(self, model, batch):
        return {"error": self.losses(model, batch).mean()}

    def transfers(self, parameter):
        return parameter.startswith("trunk")


class Measures(NoisyRegression):
    """Has a metric of torchmetrics besides, which it keeps; validation and test differ."""

    metrics = {"error": "lower", "rmse": "lower"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        from torchmetrics.regression import MeanSquaredError

        self.rmse = MeanSquaredError(squared=False)

    def measure(self, model, batch):
        self.rmse.update(model["left"](model["trunk"](batch["x"]))[:, 0].float(), batch["y"][0].float())
        return {**super().measure(model, batch), "rmse": self.rmse}


class Lingers(NoisyRegression):
    """Takes its time over the test split: what was told before, Ray has reported when the run ends."""

    def evaluation_batches(self, split):
        if split == "test":
            time.sleep(2)
        return super().evaluation_batches(split)


class TakesItsTime(NoisyRegression):
    """Waits before each draw after the first so many: the steps from there on last, however fast the machine is."""

    def __init__(self, after, seconds):
        super().__init__()
        self.after, self.seconds = after, seconds

    def batches(self, seed):
        for drawn, batch in enumerate(super().batches(seed)):
            if drawn >= self.after:
                time.sleep(self.seconds)
            yield batch


class Planted(NoisyRegression):
    """NaN in the batches of one subproblem at some of its steps; fails where it is to compute with a NaN row."""

    def __init__(self, subproblem, steps, seed=3):
        super().__init__()
        self.seed, self.steps = subproblem_seed(seed, subproblem), steps

    def batches(self, seed):
        for t, batch in enumerate(super().batches(seed)):
            planted = seed == self.seed and t in self.steps
            yield {**batch, "x": batch["x"] * float("nan")} if planted else batch

    def losses(self, model, batch):
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise AssertionError("a NaN has reached a row")
        return super().losses(model, batch)


KINDS = ("loss", "gradient", "parameter", "huge parameter", "buffer", "moment")


class PlantedInAllPlaces(NoisyRegression):
    """Subproblem i + 1 gets what the i-th of `KINDS` says, at some steps; fails where another row has anything of it.

    Args:
        steps: at which it is planted.
        seed: of the run.
        subproblems: of the run.
    """

    def __init__(self, steps, seed=3, subproblems=8):
        super().__init__()
        self.steps = steps
        self.row_of = {subproblem_seed(seed, i): i for i in range(subproblems)}

    def batches(self, seed):
        row = self.row_of.get(seed, 0)
        kind = KINDS[row - 1] if 1 <= row <= len(KINDS) else None
        for t, batch in enumerate(super().batches(seed)):
            yield {**batch, "row": row, "plant": kind if t in self.steps else None}

    def losses(self, model, batch):
        weight, mean = model["trunk"][0].weight, model["trunk"][1].running_mean
        for name, value in model.named_parameters():
            if not value.isfinite().all() or value.abs().max() > 1e3:
                raise AssertionError(f"{name} of subproblem {batch.get('row')} has something of another row")
        plant = batch.get("plant")
        if batch.get("row", 0) != KINDS.index("buffer") + 1 and not mean.isfinite().all():
            raise AssertionError(f"a buffer of subproblem {batch.get('row')} has something of another row")
        with torch.no_grad():
            if plant in ("parameter", "huge parameter"):
                weight[0, 0] = float("nan") if plant == "parameter" else 1e12
            if plant == "buffer":
                mean.fill_(float("nan"))
        f = super().losses(model, batch)
        if plant == "loss":
            return f * float("nan")
        if plant == "gradient":
            return f + (weight.sum() * 0).sqrt() * 0
        if plant == "moment":  # the square of this slope is beyond all bounds, Adam's step by it is none
            return f + 1e25 * (weight.sum() - weight.sum().detach())
        return f


class ReadsLate(NoisyRegression):
    """Its backward pass reads a parameter, the second layer of the trunk, after the gradient of that is complete."""

    def losses(self, model, batch):
        hidden = model["trunk"][0](batch["x"]) * model["trunk"][1].weight.detach()
        y = hidden * model["trunk"][1].weight
        return torch.stack([(model[name](y)[:, 0]).square().mean() for name in self.objectives])


class LosesItsConnections(NoisyRegression):
    """At the draw of a batch, once, every connection between the process that draws it and another actor breaks."""

    def __init__(self, marker, draw):
        super().__init__()
        self.marker, self.draw = Path(marker), draw

    def batches(self, seed):
        for drawn, batch in enumerate(super().batches(seed)):
            if drawn == self.draw and connections_to_actors():
                try:
                    self.marker.touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    for connection in connections_to_actors():
                        with closing(socket.fromfd(connection.fd, connection.family, connection.type)) as end:
                            end.shutdown(socket.SHUT_RDWR)
            yield batch


def connections_to_actors():
    """The TCP connections of this process with other actors'; what Ray needs of them is not among these."""
    me, ends = psutil.Process(), set()
    for process in me.parent().children():
        with suppress(psutil.Error):
            if process != me and "SubproblemActor" in "".join(process.cmdline()):
                ends |= {c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    return [c for c in me.net_connections("tcp") if c.raddr and c.raddr in ends]


def config(actors, order="consensus", optimizer=None, **more):
    """A run of four subproblems of NoisyRegression on so many actors, in float64, as plain data."""
    transfer = {"order": order, "strength": 0.6, "until": 0.9, **more.pop("transfer", {})}
    train = {
        "steps": 50,
        "evaluate_every": 20,
        "optimizer": optimizer or {"name": "Adam", "lr": 0.01},
        "dtype": "float64",
        **more.pop("train", {}),
    }
    return {
        "problem": {"name": "toy_problems:NoisyRegression"},
        "population": {"subproblems": 4},
        "train": train,
        "transfer": transfer,
        "resources": {"max_actors": actors},
        "seed": 3,
        **more,
    }
