"""N subproblems trained by a plain torch loop: what PopMTL must equal.

Written without anything of popmtl.method but the Problem interface and the derivation of seeds. Every subproblem has a
problem, a model, optimizers and schedules of its own; the transfer is taken parameter by parameter, by name.
"""

import importlib
import random
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from popmtl.method.mtgd import subproblem_seed


@dataclass(frozen=True)
class Recipe:
    """How to train, in the words of a config.

    Attributes:
        optimizer: the section `train.optimizer`.
        schedules: the parts of `train.lr_schedule`, each a section; none keeps the rate.
        clip: the section `train.clip`, or None.
        accumulate: batches a step.
        order: "consensus" or "adapt_then_combine".
        scalarization: "weighted_sum" or "smooth_tchebycheff".
        mu: of smooth_tchebycheff.
        steps: how many.
        evaluate_every: steps between evaluations, which also come before the first step and after the last.
        dtype: of parameters and batches.
        seed: of the run.
    """

    optimizer: dict
    schedules: tuple = ()
    clip: dict | None = None
    accumulate: int = 1
    order: str = "consensus"
    scalarization: str = "smooth_tchebycheff"
    mu: float = 0.2
    steps: int = 6
    evaluate_every: int = 3
    dtype: torch.dtype = torch.float64
    seed: int = 0


@dataclass
class Trained:
    """What became of the N subproblems.

    Attributes:
        start: parameters and buffers of one by name, before training.
        states: parameters and buffers of each by name, at the end.
        losses: of the training batches, those of one step averaged, (steps, N, m), float64.
        observed: step → losses on the validation split, (N, m), float64.
    """

    start: dict
    states: list
    losses: np.ndarray
    observed: dict


def train(make_problem, W, M, sigma, recipe):
    """Trains N subproblems.

    Args:
        make_problem: makes a problem; called once for each subproblem.
        W: weight vectors, (N, m).
        M: transfer coefficients, (N, N).
        sigma: the factor of M − I at each step.
        recipe: all else.
    """
    seeds = [subproblem_seed(recipe.seed, i) for i in range(len(W))]
    members = [Member(make_problem(), w, seed, recipe) for w, seed in zip(W, seeds, strict=True)]
    start, losses, observed = members[0].state(), [], {}
    for step in range(recipe.steps):
        if step % recipe.evaluate_every == 0:
            observed[step] = np.stack([member.evaluate() for member in members])
        before = [member.moving() for member in members]
        losses.append(np.stack([member.step(step) for member in members]))
        if recipe.order == "adapt_then_combine":
            before = [member.moving() for member in members]
        for i, member in enumerate(members):
            member.receive([(sigma[step] * (M[i, j] - (i == j)), other) for j, other in enumerate(before)])
    observed[recipe.steps] = np.stack([member.evaluate() for member in members])
    return Trained(start, [member.state() for member in members], np.stack(losses), observed)


def seed_all(seed):
    """Seeds whatever a problem on the CPU may draw from."""
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed, without what that does for accelerators
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Member:
    """One subproblem: a plain training loop, one step at a time."""

    def __init__(self, problem, w, seed, recipe):
        self.problem, self.w, self.seed, self.recipe = problem, w, seed, recipe
        seed_all(recipe.seed)
        self.model = problem.model()
        self.stream = problem.batches(seed)
        if recipe.dtype == torch.float64:
            to_double(self.model)
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in self.model.parameters()):
            with torch.no_grad():  # the dry run that torch's documentation asks for
                problem.losses(self.model, to_dtype(next(problem.batches(seed)), recipe.dtype))
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = optimizers(self.parameters, recipe.optimizer)
        self.schedules = [schedule(optimizer, recipe) for optimizer in self.optimizers if recipe.schedules]
        self.distinct = distinct({name: p for name, p in self.parameters.items() if problem.transfers(name)})

    def step(self, step):
        """One step, without transfer; its losses, (m,)."""
        n = self.recipe.accumulate
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        seen, gradients = [], defaultdict(list)
        for d in range(step * n, step * n + n):
            seed_all(self.seed + d)
            f = self.problem.losses(self.model, to_dtype(next(self.stream), self.recipe.dtype))
            (self.scalar(f) / n).backward()
            seen.append(f.detach().double().numpy())
            if getattr(self.problem, "clears_gradients", False):  # the mean is meant all the same
                for name, p in self.parameters.items():
                    gradients[name] += [] if p.grad is None else [p.grad.clone()]
        for name, parts in gradients.items():
            self.parameters[name].grad = sum(parts) if parts else None
        for p in self.parameters.values():
            if p.grad is not None and p.grad.is_sparse:  # the same, for every optimizer
                p.grad = p.grad.to_dense()
        for kind, bound in (self.recipe.clip or {}).items():
            clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[kind]
            clip(list(self.parameters.values()), bound)
        for optimizer in self.optimizers:
            optimizer.step()
        for one in self.schedules:
            one.step()
        return np.mean(seen, axis=0)

    def scalar(self, f):
        """Of the losses f, (m,); the ideal point is that of the problem."""
        weighted = torch.as_tensor(self.w, dtype=f.dtype) * (f - torch.tensor(self.problem.ideal_point, dtype=f.dtype))
        if self.recipe.scalarization == "weighted_sum":
            return weighted.sum()
        mu, largest = self.recipe.mu, weighted.detach().max()
        return largest + mu * ((weighted - largest) / mu).exp().sum().log()

    def moving(self):
        """The values of what takes part in the transfer, by name."""
        return {name: self.parameters[name].detach().clone() for name in self.distinct}

    @torch.no_grad()
    def receive(self, shares):
        """Adds shares of the values of all members, of its own too."""
        for name in self.distinct:
            self.parameters[name] += sum(share * values[name] for share, values in shares)

    def evaluate(self):
        """Mean losses over the validation split, (m,)."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        total, count = 0, 0
        with torch.no_grad():
            for batch in self.problem.evaluation_batches("validation"):
                f = self.problem.losses(self.model, to_dtype(batch, self.recipe.dtype)).double().numpy()
                total, count = total + len(batch[0]) * f, count + len(batch[0])
        for module, training in modes:
            module.training = training
        return total / count

    def state(self):
        """Parameters and buffers by name, also those under second names and those that no state_dict has."""
        return state_of(self.model)


def state_of(model):
    """Copies of a model's parameters and buffers by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: value.detach().clone() for name, value in named}


def distinct(parameters):
    """Names of parameters that share no memory with a larger, or an earlier, one of them."""
    taken, names = [], []
    for name, p in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        first = p.data_ptr()
        end = first + p.numel() * p.element_size()
        if not any(first < b and a < end for a, b in taken):
            names.append(name)
            taken.append((first, end))
    return names


def optimizers(parameters, section):
    """The optimizers of an optimizer section: that of its own class, then one for each further class of its groups."""
    own = {key: value for key, value in section.items() if key not in ("name", "groups")}
    groups = [dict(group) for group in section.get("groups", ())]
    patterns = [[p] if isinstance(p := group.pop("match"), str) else p for group in groups]
    members = [[] for _ in range(len(groups) + 1)]
    for name, p in parameters.items():
        matching = (k for k, some in enumerate(patterns) if any(fnmatchcase(name, pattern) for pattern in some))
        members[next(matching, len(groups))].append(p)
    of_class = defaultdict(list)
    for group, params in [({}, members[-1]), *zip(groups, members, strict=False)]:
        name = group.pop("name", section["name"])
        if params:
            of_class[name].append({**group, "params": params})
    return [
        optimizer_class(name)(params, **(own if name == section["name"] else {})) for name, params in of_class.items()
    ]


def optimizer_class(name):
    """By its name in torch.optim, or package.module:Class."""
    module, colon, cls = name.partition(":")
    return getattr(importlib.import_module(module), cls) if colon else getattr(torch.optim, name)


def schedule(optimizer, recipe):
    """A schedule of the recipe's parts, one after the other."""
    made, milestones, past = [], [], 0
    for part in recipe.schedules:
        lasts = part.get("for", recipe.steps - past)
        own = {key: lasts if value == "steps" else value for key, value in part.items() if key not in ("name", "for")}
        made.append(getattr(torch.optim.lr_scheduler, part["name"])(optimizer, **own))
        past += lasts
        milestones.append(past)
    return made[0] if len(made) == 1 else torch.optim.lr_scheduler.SequentialLR(optimizer, made, milestones[:-1])


def to_double(model):
    """A model in float64, its complex tensors in complex128; in place, so that what shares memory goes on to."""
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    memory, done = {}, []
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype not in wider or any(tensor is other for other in done):
                continue
            done.append(tensor)
            if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                tensor.data = tensor.data.to(wider[tensor.dtype])
                continue
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), tensor.dtype)
            if key not in memory:
                memory[key] = torch.empty(0, dtype=tensor.dtype).set_(storage).to(wider[tensor.dtype])
            tensor.data = memory[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def to_dtype(batch, dtype):
    """A tuple of tensors, the floating-point ones in a dtype."""
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in batch)
