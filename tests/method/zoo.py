"""Small problems whose models, or losses, do what models of users do. Each says what may become of it.

A kind is expected to be "right" (trained as by a plain torch loop), "refused" (by the plan, in words that name the
cause) or "either" of the two; to be trained otherwise than by plain torch is never right. Every model has two or more
trainable parameters, one of them a matrix at least, and takes milliseconds a step.
"""

import functools
import random
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from popmtl.problems import Problem


@dataclass(frozen=True)
class Kind:
    """A problem of the zoo.

    Attributes:
        name: in words.
        cls: the problem's class.
        parameters: of its constructor.
        expects: "right", "refused" or "either".
        refusal: a regular expression that a refusal must match, case aside.
        loop: None for what stacks; else why it must not, a regular expression; "" where the reason is left open;
            "?" where both are right.
    """

    name: str
    cls: type
    parameters: dict
    expects: str
    refusal: str
    loop: str | None

    def problem(self):
        """A new one."""
        return self.cls(**self.parameters)

    @property
    def section(self):
        """The config's problem section."""
        return {"name": f"{self.cls.__module__}:{self.cls.__name__}", **self.parameters}


KINDS = []


def kind(name, expects="right", refusal="", loop=None, **parameters):
    """Adds a problem's class, with parameters, to the zoo."""

    def add(cls):
        assert (expects == "right") == (not refusal), "what may be refused has words for it, and nothing else has"
        # Decorators apply from the last to the first; the zoo has them as they are written.
        first = next((k for k, other in enumerate(KINDS) if other.cls is cls), len(KINDS))
        KINDS.insert(first, Kind(name, cls, parameters, expects, refusal, loop))
        return cls

    return add


class Animal(Problem):
    """Two regressions on random numbers of some shape, for a model with two outputs."""

    objectives = ("a", "b")
    ideal_point = (0.0, 0.0)
    shape = (6,)

    def examples(self, count, generator):
        x = torch.randn(count, *self.shape, generator=generator)
        flat = x.flatten(1)
        return x, torch.stack([flat[:, 0].sin() + 0.5, flat[:, 1] * flat[:, 2]], 1)

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        count = 0
        while True:
            yield self.batch(generator, count)
            count += 1

    def batch(self, generator, count):
        return self.examples(8, generator)

    def evaluation_batches(self, split):
        generator = torch.Generator().manual_seed({"validation": 1, "test": 2}[split])
        return [self.examples(n, generator) for n in (8, 4)]

    def losses(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean(0)


class Wordy(Animal):
    """Its inputs are words of 12, four at a time."""

    def examples(self, count, generator):
        words = torch.randint(12, (count, 4), generator=generator)
        return words, torch.stack([words[:, 0] / 6 - 1.0, (words[:, 1] % 3) - 1.0], 1)


def mlp(hidden=5):
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 2))


# --- layers ---


@kind("MLP")
class Mlp(Animal):
    def model(self):
        return mlp()


@kind("LeNet-like convolutions", loop="?")
@kind("convolutions in channels_last", loop="?", channels_last=True)
class LeNet(Animal):
    shape = (1, 8, 8)

    def __init__(self, channels_last=False):
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def model(self):
        features = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*features, nn.Linear(16, 2)).to(memory_format=self.format)


# No bias before a normalization: its gradient is rounding errors, which an optimizer may make large.
@kind("BatchNorm1d", loop="buffer")
@kind("BatchNorm1d, cumulative average", loop="buffer", momentum=None)
@kind("BatchNorm1d without statistics", track_running_stats=False)
class Batch1d(Animal):
    def __init__(self, **arguments):
        self.arguments = arguments

    def model(self):
        return nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, **self.arguments), nn.Tanh(), nn.Linear(5, 2)
        )


@kind("BatchNorm2d", loop="buffer")
class Batch2d(Animal):
    shape = (1, 6, 6)

    def model(self):
        features = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*features, nn.Linear(12, 2))


@kind("a module kept in eval mode")
class KeptInEval(Animal):
    def model(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2))
        model[1].running_mean += 0.3
        model[1].eval(), model[2].eval()
        return model


@kind("LayerNorm")
class Layer(Animal):
    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


@kind("GroupNorm", loop="?")
class Group(Animal):
    shape = (1, 6, 6)

    def model(self):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


@kind("GRU", loop="?", cell="GRU")
@kind("LSTM", loop="?", cell="LSTM")
class Recurrent(Animal):
    shape = (4, 3)

    def __init__(self, cell):
        self.cell = cell

    def model(self):
        return nn.ModuleDict({"cell": getattr(nn, self.cell)(3, 4, batch_first=True), "head": nn.Linear(4, 2)})

    def losses(self, model, batch):
        x, y = batch
        return (model["head"](model["cell"](x)[0][:, -1]) - y).square().mean(0)


@kind("transformer layer without dropout", loop="?", dropout=0.0)
@kind("transformer layer with dropout", loop="random", dropout=0.2)
class Transformer(Animal):
    shape = (3, 4)

    def __init__(self, dropout):
        self.dropout = dropout

    def model(self):
        layer = nn.TransformerEncoderLayer(4, 2, 8, self.dropout, batch_first=True)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


@kind("dropout", loop="random")
class Dropout(Animal):
    def model(self):
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))


@kind("scalar, stacked and nested parameters")
class Scalars(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.7))
            self.parts = nn.ParameterList([nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2))])
            self.named = nn.ParameterDict({"cube": nn.Parameter(torch.randn(2, 3, 2) / 3)})

        def forward(self, x):
            cube = torch.einsum("bi,aij->bj", x[:, :3], self.named["cube"])
            return self.temperature * (x @ self.parts[0] + self.parts[1]).tanh() + cube

    def model(self):
        return self.Net()


@kind("a parameter that is not contiguous")
class Transposed(Animal):
    def model(self):
        model = mlp()
        model[0].weight = nn.Parameter(torch.randn(6, 5).t() / 3)
        return model


# --- parameters that are not alone ---


@kind("one Parameter in two modules", loop="?")
class Tied(Wordy):
    def model(self):
        model = nn.ModuleDict({"embed": nn.Embedding(12, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 12)})
        model["out"].weight = model["embed"].weight
        return model

    def losses(self, model, batch):
        words, y = batch
        logits = model["out"](torch.tanh(model["mix"](model["embed"](words).mean(1))))
        return torch.stack([F.cross_entropy(logits, words[:, 0]), (logits[:, 1] - y[:, 1]).square().mean()])


@kind("two Parameters with the same .data", "either", "shar|tied|alias|overlap|same memory|view|storage", "?")
class TiedData(Animal):
    def model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        model[2].weight.data = model[0].weight.data
        return model


@kind("a Parameter that is a view of another", "either", "shar|tied|alias|overlap|same memory|view|storage", "?")
class View(Animal):
    def model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        model[2].weight = nn.Parameter(model[0].weight.detach()[:2])
        return model


@kind("frozen backbone with adapters")
class Lora(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)
            self.body.requires_grad_(False)
            self.down, self.up = nn.Parameter(torch.randn(2, 6) / 3), nn.Parameter(torch.zeros(5, 2))

        def forward(self, x):
            return self.head(torch.tanh(self.body(x) + x @ self.down.t() @ self.up.t()))

    def model(self):
        return self.Net()


@kind("partly frozen, its heads not transferred")
class PartlyFrozen(Animal):
    def model(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        model[0].weight.requires_grad_(False)
        return model

    def transfers(self, parameter):
        return not parameter.startswith("4.")


@kind("freezes a part of itself on the way", "either", "requires_grad|frozen|freez|unfr", "")
class Freezes(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out, self.calls = nn.Linear(6, 5), nn.Linear(5, 2), 0

        def forward(self, x):
            if self.training:
                self.calls += 1
                self.inner.requires_grad_(self.calls < 4)
            return self.out(torch.tanh(self.inner(x)))

    def model(self):
        return self.Net()


@kind("a frozen teacher that follows by moving averages", loop="")
class MeanTeacher(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = mlp(), mlp().requires_grad_(False)

        def forward(self, x):
            if self.training:
                for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    slow.data.lerp_(fast.data, 0.1)
            return self.student(x), self.teacher(x)

    def model(self):
        return self.Net()

    def losses(self, model, batch):
        x, y = batch
        mine, slow = model(x)
        return (mine - y).square().mean(0) + (mine - slow).square().mean()


@kind("a parameter without any loss")
class Spare(Animal):
    def model(self):
        return nn.ModuleDict({"used": mlp(), "spare": nn.Linear(3, 3), "end": nn.Linear(2, 2)})

    def losses(self, model, batch):
        x, y = batch
        return (model["end"](model["used"](x)) - y).square().mean(0)


@kind("experts that some batches reach", loop="branch|value|read")
class Experts(Animal):
    def model(self):
        return nn.ModuleDict({"body": nn.Linear(6, 4), "experts": nn.ModuleList(nn.Linear(4, 2) for _ in range(3))})

    def batch(self, generator, count):
        # The third expert first has work at batch 2 of the first row, and each row has its own turns.
        turn = (count + generator.initial_seed()) % 3
        return (*self.examples(8, generator), torch.tensor(turn))

    def evaluation_batches(self, split):
        return [(*batch, torch.tensor(0)) for batch in super().evaluation_batches(split)]

    def losses(self, model, batch):
        x, y, turn = batch
        return (model["experts"][int(turn)](torch.tanh(model["body"](x))) - y).square().mean(0)


@kind("a parameter of no entries", "either", "empty|no entries|no elements|0 entries", "?")
class Empty(Animal):
    def model(self):
        model = mlp()
        model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 4)))
        return model


# --- buffers ---


class Rotary(nn.Module):
    def __init__(self, learn):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)
        turn = torch.polar(torch.ones(3), torch.tensor([0.5, 1.0, 1.5]))
        if learn:
            self.turn = nn.Parameter(turn)
        else:
            self.register_buffer("turn", turn)

    def forward(self, x):
        pairs = torch.view_as_complex(self.inner(x).view(-1, 3, 2).contiguous())
        return self.out(torch.view_as_real(pairs * self.turn).flatten(1))


@kind("complex buffer", "either", "complex|turn", "?", learn=False)
@kind("complex parameter", "either", "complex|turn", "?", learn=True)
class Complex(Animal):
    def __init__(self, learn):
        self.learn = learn

    def model(self):
        return Rotary(self.learn)


@kind("an int buffer that counts, a bool one", loop="buffer")
class Counts(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))

        def forward(self, x):
            hidden = torch.tanh(self.inner(x))
            if self.training:
                self.calls += 1
                self.seen |= (hidden > 0.5).any(0)
            return self.out(hidden * torch.where(self.seen, 0.5, 1.0)) / (1 + 0.1 * self.calls)

    def model(self):
        return self.Net()


@kind("constant int and bool buffers, not persistent")
class Masks(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            self.register_buffer("order", torch.tensor([2, 0, 1, 4, 3]), persistent=False)
            self.register_buffer("mask", torch.tensor([True, True, False, True, True]), persistent=False)

        def forward(self, x):
            return self.out(torch.tanh(self.inner(x))[:, self.order] * self.mask)

    def model(self):
        return self.Net()


@kind("a buffer that is None until the first training batch", loop="")
class Lately(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.register_buffer("mean", None)

        def forward(self, x):
            if self.mean is None and self.training:
                self.mean = x.mean(0).detach().clone()
            return self.body(x if self.mean is None else x - self.mean)

    def model(self):
        return self.Net()


@kind("a cache that grows with the input", loop="?", depends=False)
@kind("a buffer that depends on the longest input", "either", "places|buffer|grow|shape|longest", "?", depends=True)
class Grows(Animal):
    class Net(nn.Module):
        def __init__(self, depends):
            super().__init__()
            self.body, self.depends = mlp(), depends
            self.register_buffer("places", self.made(8))

        def made(self, length):
            return torch.linspace(0, 1, length) if self.depends else torch.arange(length) / 8

        def forward(self, x):
            if len(x) > len(self.places):
                self.places = self.made(len(x)).to(x.dtype)
            return self.body(x) * self.places[: len(x), None]

    def __init__(self, depends):
        self.depends = depends

    def model(self):
        return self.Net(self.depends)

    def batch(self, generator, count):
        # What depends on the longest input first grows at a later batch than the first.
        return self.examples(7 + (count + 2 * (not self.depends)) % 4, generator)


@kind("a queue of past features with an int pointer", loop="buffer")
class Queue(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 4), nn.Linear(4, 2)
            self.register_buffer("past", torch.zeros(3, 4))
            self.register_buffer("next", torch.zeros(1, dtype=torch.long))

        def forward(self, x):
            hidden = torch.tanh(self.inner(x))
            similar = (hidden @ self.past.clone().t()).mean(1, keepdim=True)
            if self.training:
                self.past[self.next] = hidden[:1].detach()
                self.next[0] = (self.next[0] + 1) % 3
            return self.out(hidden) + similar

    def model(self):
        return self.Net()


@kind("a buffer in the memory of a parameter", "either", "shar|alias|overlap|same memory|view|storage", "?")
class BufferOfAParameter(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            self.register_buffer("fixed", self.out.weight.detach(), persistent=False)

        def forward(self, x):
            hidden = torch.tanh(self.inner(x))
            return self.out(hidden) + hidden @ self.fixed.clone().t()

    def model(self):
        return self.Net()


@kind("a float64 buffer whose precision matters", "either", "float64|precise|base|dtype")
class Precise(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.register_buffer("base", 1e9 + torch.tensor([0.25, 0.5], dtype=torch.float64))

        def forward(self, x):
            return self.body(x) * (self.base - 1e9).to(x.dtype)

    def model(self):
        return self.Net()


@kind("a float64 parameter among float32 ones", "either", "float64|gain|dtype|mixed")
class MixedDtypes(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.gain = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

        def forward(self, x):
            return self.body(x) * self.gain.to(x.dtype)

    def model(self):
        return self.Net()


class Extra(nn.Linear):
    """Has something to say of itself that no state_dict of tensors holds."""

    what = "dict"

    def get_extra_state(self):
        return {"dict": {"calls": 1}, "tensor": torch.arange(3.0), "set": frozenset({1j})}[self.what]

    def set_extra_state(self, state):
        pass


@kind("extra state: a dict", "either", "extra.state", "?", what="dict")
@kind("extra state: a tensor", "either", "extra.state", "?", what="tensor")
@kind("extra state: nothing plain", "either", "extra.state|plain", "?", what="set")
class ExtraState(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        layer = Extra(6, 5)
        layer.what = self.what
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2))


# --- initialization ---


@kind("lazy layers", "either", "lazy|uninitialized", "?")
class Lazy(Animal):
    class Same(nn.LazyLinear):
        """Initialized alike whenever that is."""

        def reset_parameters(self):
            if not self.has_uninitialized_params() and self.in_features:
                with torch.no_grad():
                    count = self.weight.numel()
                    self.weight.copy_(torch.linspace(-0.5, 0.5, count).view_as(self.weight).sin())
                    self.bias.fill_(0.1)

    def model(self):
        return nn.Sequential(self.Same(5), nn.Tanh(), nn.Linear(5, 2))


@kind("initialized by numpy", "either", "numpy|random|seed|initializ", what="numpy")
@kind("initialized by random", "either", "random|seed|initializ", what="random")
class Drawn(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        model = mlp()
        with torch.no_grad():
            if self.what == "numpy":
                model[0].weight.copy_(torch.from_numpy(np.random.randn(5, 6)) / 3)
            else:
                model[0].weight *= random.uniform(0.5, 1.5)
        return model


@kind("losses that draw from numpy", "either", "numpy|random|seed", "", what="numpy")
@kind("losses that draw from random", "either", "random|seed", "", what="random")
@kind("losses that draw from torch", loop="random", what="torch")
class Mixup(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        return mlp()

    def losses(self, model, batch):
        x, y = batch
        if model.training:
            draws = {"numpy": lambda: np.random.beta(2, 2), "random": random.random, "torch": lambda: torch.rand(())}
            share = draws[self.what]()
            x, y = share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)
        return super().losses(model, (x, y))


# --- modules with a life of their own ---


@kind("a Python counter that forward changes and reads", "either", "calls|keeps|read back|changes itself", "")
class PythonCounter(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = mlp(), 0

        def forward(self, x):
            self.calls += 1
            return self.body(x) * (1 + 1 / self.calls)

    def model(self):
        return self.Net()


@kind("a cached activation that the second loss uses", loop="?")
class Cached(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            self.features = torch.tanh(self.inner(x))
            return self.out(self.features)

    def model(self):
        return self.Net()

    def losses(self, model, batch):
        return super().losses(model, batch) + torch.stack([model.features.square().mean(), model.features.mean()])


@kind("an alias of a weight, kept from the first forward pass", "either", "alias|shar|copy|keeps|memory", "?")
class Alias(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out, self.kept = nn.Linear(6, 5), nn.Linear(5, 2), None

        def forward(self, x):
            if self.kept is None:
                self.kept = self.out.weight.detach()
            hidden = torch.tanh(self.inner(x))
            return self.out(hidden) + hidden @ self.kept.clone().t()

    def model(self):
        return self.Net()


@kind("features that a hook's closure keeps for the losses", "either", "cop|closure|hook|features|KeyError", "?")
class HookedFeatures(Animal):
    def model(self):
        model, kept = mlp(), {}
        model[1].register_forward_hook(lambda module, inputs, output: kept.update(hidden=output))
        model.kept = kept
        return model

    def losses(self, model, batch):
        return super().losses(model, batch) + 0.1 * model.kept["hidden"].square().mean()


@kind("a weak reference to another module", "either", "cop|weak|original|share|reach|gradient", "?")
class Weak(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            self.encoder = weakref.ref(self.inner)

        def forward(self, x):
            return self.out(torch.tanh(self.encoder()(x)))

    def model(self):
        return self.Net()


@kind("attributes of parameters that the losses read", "either", "attribute|decays", "?")
class Attributes(Animal):
    def model(self):
        model = mlp()
        model[0].weight.decays = 0.3
        return model

    def losses(self, model, batch):
        decay = sum(p.square().sum() * p.decays for p in model.parameters() if hasattr(p, "decays"))
        return super().losses(model, batch) + decay


@kind("a penalty on all parameters that require gradients", loop="?")
class Penalty(Animal):
    def model(self):
        model = mlp()
        model[0].bias.requires_grad_(False)
        return model

    def losses(self, model, batch):
        return super().losses(model, batch) + 0.1 * sum(p.abs().sum() for p in model.parameters() if p.requires_grad)


@kind("a module that cannot be copied (a lock)", "either", "cop|lock|pickle", "?")
class Locked(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lock = mlp(), threading.Lock()

        def forward(self, x):
            with self.lock:
                return self.body(x)

    def model(self):
        return self.Net()


@kind("noise of a generator of its own", "either", "cop|generator|pickle|random|read back", "")
class OwnGenerator(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.generator = mlp(), torch.Generator().manual_seed(4)

        def forward(self, x):
            return self.body(x + 0.3 * torch.randn(x.shape, generator=self.generator) if self.training else x)

    def model(self):
        return self.Net()


@kind("a closure over another module", "either", "cop|closure|original|share|reach|gradient", "?", by="closure")
@kind("a bound method of another module", "either", "cop|method|original|share|reach", "?", by="method")
class Captures(Animal):
    class Net(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            inner = self.inner
            self.encode = (lambda x: torch.tanh(inner(x))) if by == "closure" else inner.forward

        def forward(self, x):
            return self.out(self.encode(x))

    def __init__(self, by):
        self.by = by

    def model(self):
        return self.Net(self.by)


@kind("losses of a module on the problem, not of the model", "either", "model|parameter|depend|reach|gradient", "")
class OnTheProblem(Animal):
    def model(self):
        self.net = mlp()
        return self.net

    def losses(self, model, batch):
        return super().losses(self.net, batch)


@kind("one module for all, kept on the problem", "either", "model|same|new|share|twice|again", "")
class OneForAll(Animal):
    def __init__(self):
        self.net = None

    def model(self):
        self.net = self.net or mlp()
        return self.net

    def losses(self, model, batch):
        return super().losses(self.net, batch)


@kind("losses without a graph", "refused", "depend|gradient|detach|graph|no_grad")
class Graphless(Animal):
    def model(self):
        return mlp()

    def losses(self, model, batch):
        return super().losses(model, batch).detach()


@kind("a parameter on the meta device", "refused", "meta")
class Meta(Animal):
    def model(self):
        model = mlp()
        model[2].to("meta")
        return model


@kind("a frozen teacher on the problem", loop="?")
class TeacherOutside(Animal):
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.teacher = mlp().requires_grad_(False)

    def model(self):
        return mlp()

    def losses(self, model, batch):
        x, y = batch
        self.teacher.to(x.dtype)
        out = model(x)
        return torch.stack([(out - y).square().mean(), (out - self.teacher(x)).square().mean()])


@kind("zero_grad in losses", loop="?", what="zero_grad")
@kind("p.grad = None in losses", loop="?", what="None")
class Clears(Animal):
    clears_gradients = True

    def __init__(self, what):
        self.what = what

    def model(self):
        return mlp()

    def losses(self, model, batch):
        if self.what == "zero_grad":
            model.zero_grad()
        else:
            for p in model.parameters():
                p.grad = None
        return super().losses(model, batch)


@kind("TorchScript: scripted", "either", "script", "?", what="scripted")
@kind("TorchScript: a scripted part", "either", "script", "?", what="part")
@kind("TorchScript: traced", "either", "script|trace", "?", what="traced")
class Script(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        plain = mlp()
        if self.what == "scripted":
            return torch.jit.script(plain)
        if self.what == "traced":
            return torch.jit.trace(plain, torch.zeros(8, 6))
        return nn.Sequential(torch.jit.script(plain[:2]), plain[2])


@kind("a parameter made anew in forward", "either", "scale|anew|replac|new|reassign", "?", how="Parameter")
@kind("p.data assigned in forward", "either", "weight|data|replac|assign|chang|in place", "", how="data")
class Remakes(Animal):
    class Net(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.body, self.scale, self.how = mlp(), nn.Parameter(torch.ones(2)), how

        def forward(self, x):
            if self.how == "Parameter":
                self.scale = nn.Parameter(torch.full_like(self.scale, 0.9))
            else:
                weight = self.body[2].weight
                weight.data = weight.data / weight.data.norm(dim=1, keepdim=True)
            return self.body(x) * self.scale

    def __init__(self, how):
        self.how = how

    def model(self):
        return self.Net(self.how)


# --- parametrizations ---


@kind("orthogonal: matrix_exp", "either", "parametriz|cop", "?", by="matrix_exp")
@kind("orthogonal: cayley", "either", "parametriz|cop", "?", by="cayley")
@kind("orthogonal: householder", "either", "parametriz|cop", "?", by="householder")
class Orthogonal(Animal):
    def __init__(self, by):
        self.by = by

    def model(self):
        model = mlp()
        model[0] = parametrizations.orthogonal(model[0], orthogonal_map=self.by)
        return model


@kind("weight_norm, old", "either", "weight_norm|cop", "?", how="weight_norm", old=True)
@kind("weight_norm, as a parametrization", loop="?", how="weight_norm", old=False)
@kind("spectral_norm, old", "either", "spectral_norm|cop", "", how="spectral_norm", old=True)
@kind("spectral_norm, as a parametrization", loop="buffer|in place|inplace", how="spectral_norm", old=False)
class Normed(Animal):
    def __init__(self, how, old):
        self.normed = getattr(nn.utils if old else parametrizations, how)

    def model(self):
        model = mlp()
        model[0] = self.normed(model[0])
        return model


@kind("pruned by a mask", "either", "prun|cop|mask", "?")
class Pruned(Animal):
    def model(self):
        model = mlp()
        prune.l1_unstructured(model[0], "weight", 0.4)
        return model


@kind("embedding with max_norm, renormed in forward", "either", "max_norm|in place|chang|weight", "?")
class MaxNorm(Wordy):
    def model(self):
        embedding = nn.Embedding(12, 4, max_norm=1.0)
        return nn.Sequential(embedding, nn.Flatten(), nn.Linear(16, 2))


@kind("embedding with sparse gradients", "either", "sparse", "?")
class Sparse(Wordy):
    def model(self):
        return nn.Sequential(nn.Embedding(12, 4, sparse=True), nn.Flatten(), nn.Linear(16, 2))


# --- losses and backward passes ---


@kind("a loss that is detached where labels are missing", loop="branch|value|read", what="detached")
@kind("a loss that is 0 where labels are missing", loop="?", what="masked")
class Unlabelled(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        return nn.ModuleDict({"body": nn.Linear(6, 5), "a": nn.Linear(5, 1), "b": nn.Linear(5, 1)})

    def batch(self, generator, count):
        return (*self.examples(8, generator), torch.rand(8, generator=generator) < (0.0, 0.6, 0.0, 0.9)[count % 4])

    def evaluation_batches(self, split):
        return [(x, y, torch.ones(len(x), dtype=torch.bool)) for x, y in super().evaluation_batches(split)]

    def losses(self, model, batch):
        x, y, seen = batch
        hidden = torch.tanh(model["body"](x))
        first = (model["a"](hidden)[:, 0] - y[:, 0]).square().mean()
        second = ((model["b"](hidden)[:, 0] - y[:, 1]).square() * seen).sum() / seen.sum().clamp(min=1)
        if self.what == "detached" and not seen.any():
            second = second.detach()
        return torch.stack([first, second])


@kind("a hinge that is exactly 0")
class Hinge(Animal):
    def model(self):
        model = mlp()
        with torch.no_grad():
            model[2].bias[1] = 1.6  # most batches are beyond the hinge
        return model

    def losses(self, model, batch):
        out = model(batch[0])
        return torch.stack([(out[:, 0] - batch[1][:, 0]).square().mean(), torch.relu(1 - out[:, 1]).mean()])


@kind("gradient checkpointing", loop="?", reentrant=False)
@kind("gradient checkpointing, reentrant", "either", "checkpoint", "?", reentrant=True)
class Checkpointed(Animal):
    class Net(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.body, self.out = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.reentrant = reentrant

        def forward(self, x):
            part = lambda h: torch.tanh(self.body(h))  # noqa: E731
            return self.out(checkpoint(part, torch.tanh(self.first(x)), use_reentrant=self.reentrant))

    def __init__(self, reentrant):
        self.reentrant = reentrant

    def model(self):
        return self.Net(self.reentrant)


@kind("a gradient penalty (autograd.grad inside)", loop="")
class GradientPenalty(Animal):
    def model(self):
        return mlp()

    def losses(self, model, batch):
        x, y = batch
        with torch.enable_grad():  # also where it is evaluated
            x = x.clone().requires_grad_()
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (out - y).square().mean(0) + 0.1 * slope.square().mean()


@kind("a layer that is applied twice, learned weights of the losses")
class Twice(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.again, self.out = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.log_variance = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.out(torch.tanh(self.again(torch.tanh(self.again(self.inner(x))))))

    def model(self):
        return self.Net()

    def losses(self, model, batch):
        s = model.log_variance
        return super().losses(model, batch) * (-s).exp() + s


class StraightThrough(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@kind("a custom autograd.Function", loop="")
class Custom(Animal):
    def model(self):
        return mlp()

    def losses(self, model, batch):
        x, y = batch
        hidden = torch.tanh(model[0](x))
        return (model[2](hidden + 0.5 * StraightThrough.apply(hidden)) - y).square().mean(0)


def shift(module, inputs):
    return (inputs[0] * 0.5 + 1,)


def halve(gradient):
    return gradient / 2


def halve_input_gradient(module, gradients, outputs):
    return tuple(None if gradient is None else gradient / 2 for gradient in gradients)


def clamp_gradient(parameter):
    parameter.grad.clamp_(-0.01, 0.01)


@kind("a forward pre-hook that changes the input", loop="?", what="forward")
@kind("a backward hook of a module", "either", "hook", "?", what="backward")
@kind("a tensor hook on a parameter", "either", "hook", "?", what="tensor")
@kind("a hook after a parameter's gradient is there", "either", "hook", "?", what="accumulated")
class Hooked(Animal):
    def __init__(self, what):
        self.what = what

    def model(self):
        model = nn.Sequential(*mlp()[:2], nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        if self.what == "forward":
            model[2].register_forward_pre_hook(shift)
        elif self.what == "backward":
            model[2].register_full_backward_hook(halve_input_gradient)
        elif self.what == "tensor":
            model[2].weight.register_hook(halve)
        else:
            model[2].weight.register_post_accumulate_grad_hook(clamp_gradient)
        return model


@kind("weights made by a network (functional_call inside)", loop="?")
class Hypernetwork(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker, self.body = nn.Linear(3, 10), nn.Linear(6, 5)
            self.target = nn.Linear(5, 2).requires_grad_(False)

        def forward(self, x):
            made = self.maker(x.mean(0)[:3]).view(2, 5)
            return torch.func.functional_call(self.target, {"weight": made}, (torch.tanh(self.body(x)),))

    def model(self):
        return self.Net()


@kind("a forward pass patched on the instance", "either", "cop|forward|patch|reach|gradient", "?")
class Patched(Animal):
    def model(self):
        model = mlp()
        own = model[0].forward
        model[0].forward = functools.wraps(own)(lambda x: own(x) * 0.5)
        return model


@kind("integers as the first parameter", loop="?")
class Integers(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns = nn.Parameter(torch.tensor([3, 1, 4, 0, 5]), requires_grad=False)
            self.body, self.out = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.body(x[:, self.columns])))

    def model(self):
        return self.Net()


@kind("transfers() that forgets to return", "refused", "transfers.*must return", "")
class Forgets(Animal):
    def model(self):
        return mlp()

    def transfers(self, parameter):
        parameter.startswith("0")


@kind("a tied parameter that is to transfer and not to", "refused", "one parameter.*transfers", "")
class TiedAcross(Tied):
    def transfers(self, parameter):
        return not parameter.startswith("out")


@kind("one buffer of two modules", loop="")
class SharedBuffer(Animal):
    class Part(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.register_buffer("shift", shift)

    def model(self):
        shift = torch.zeros(2)
        return nn.ModuleDict({"net": mlp(), "writes": self.Part(shift), "reads": self.Part(shift)})

    def losses(self, model, batch):
        x, y = batch
        if model.training:
            model["writes"].shift.add_(0.1)
        return (model["net"](x) + model["reads"].shift - y).square().mean(0)


@kind("numpy in later batches alone", loop="?")
class LaterNumpy(Animal):
    def model(self):
        return mlp()

    def batch(self, generator, count):
        x, y = super().batch(generator, count)
        return (x + np.random.rand() if count >= 3 else x), y


@kind("random numbers in shorter batches alone", loop="?")
class RandomInShort(Animal):
    def model(self):
        return mlp()

    def batch(self, generator, count):
        return self.examples(4 if count >= 2 else 8, generator)

    def losses(self, model, batch):
        x, y = batch
        if model.training and len(x) == 4:
            x = x + torch.randn_like(x)
        return (model(x) - y).square().mean(0)


@kind("an expert for each member's batches", loop="")
class Routed(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.experts = nn.Linear(6, 5), nn.ModuleList([nn.Linear(5, 2) for _ in range(9)])

        def forward(self, x, expert):
            return self.experts[expert](torch.tanh(self.body(x)))

    def model(self):
        return self.Net()

    def batch(self, generator, count):
        return (*super().batch(generator, count), torch.tensor(generator.initial_seed() % 9))

    def losses(self, model, batch):
        x, y, *expert = batch
        return (model(x, int(expert[0]) if expert else 0) - y).square().mean(0)


@kind("a buffer that evaluation changes", loop="?")
class CountsEvaluations(Animal):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if not self.training:
                self.seen += 1
            return self.out(torch.tanh(self.body(x))) * (1 + self.seen / 8)

    def model(self):
        return self.Net()
