"""Every kind of model of the zoo, trained as by a plain torch loop, refused by the plan, or not stacked for a reason.

The matrix is kinds × execution × order × optimizer × recipe. Every kind meets every value of each in the everyday
tests; `-m slow` adds all other combinations. `python tests/method/test_plain_torch_matrix.py` prints a table of what
becomes of each kind.
"""

import itertools
import math
import re
import sys
import tempfile
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from method import plain_torch
from method.zoo import KINDS

from popmtl.config import Config
from popmtl.distributed.placement import local_nodes
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.errors import RequestError
from popmtl.method.mtgd import Block

W = np.array([[0.2, 0.8], [0.55, 0.45], [0.9, 0.1]])
M = np.array([[0.7, 0.2, 0.1], [0.25, 0.65, 0.1], [0.05, 0.35, 0.6]])
STEPS, EVERY, SEED = 4, 3, 5
SIGMA = np.array([1.0, 0.6, 0.2, 0.2])
"""Linear from 1 to a final 0.2, over two thirds of the steps: until step 2."""
TRANSFER = {"schedule": "linear", "final": 0.2, "until": 2 / 3}

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Of a difference, relative to the largest entry. In float32, four steps amplify rounding (6e-8) to less than this."""

EXECUTIONS = ("loop", "stacked")
ORDERS = ("consensus", "adapt_then_combine")
OPTIMIZERS = ("SGD", "AdamW", "Adafactor", "Muon")
RECIPES = {
    "clip": {"clip": {"norm": 0.3}},
    "accumulate": {"accumulate": 2, "clip": {"value": 0.1}},
    "sequence": {
        "lr_schedule": [
            {"name": "LinearLR", "start_factor": 0.5, "total_iters": "steps", "for": 2},
            {"name": "CosineAnnealingLR", "T_max": "steps"},
        ]
    },
}


def optimizer_section(name, kind):
    """The optimizer of a config, its groups by the names of a kind's parameters."""
    trained = {name: p for name, p in kind.problem().model().named_parameters() if p.requires_grad}
    if name == "SGD":
        return {"name": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    if name == "Adafactor":
        # The least eps is far above the rounding errors of gradients that are 0.
        return {"name": "Adafactor", "lr": 0.05, "eps": [1e-6, 1e-3], "weight_decay": 0.05}
    if name == "AdamW":
        match = "*bias" if any(n.endswith("bias") for n in trained) else next(iter(trained))
        return {
            "name": "AdamW",
            "lr": 0.01,
            "weight_decay": 0.1,
            "groups": [{"match": match, "weight_decay": 0.0, "lr": 0.02}],
        }
    lazy = torch.nn.parameter.UninitializedParameter
    others = [n for n, p in trained.items() if n.endswith("bias") if isinstance(p, lazy)]
    others += [n for n, p in trained.items() if not isinstance(p, lazy) and (p.ndim != 2 or not p.numel())]
    muon = {"name": "Muon", "lr": 0.02, "weight_decay": 0.1}
    if others:
        muon["groups"] = [{"match": others, "name": "AdamW", "lr": 0.01, "weight_decay": 0.05}]
    return muon


# --- PopMTL's side: the only part that knows how it is configured and called ---


@dataclass
class Ours:
    """What PopMTL made of a kind.

    Attributes:
        refused: what the plan said, where it refused.
        execution: "loop: why" or "stacked: why".
        states: of each subproblem's model, parameters and buffers by name.
        losses: of training, (steps, N, m).
        observed: step → validation losses, (N, m).
    """

    refused: str | None = None
    execution: str = ""
    states: list = field(default_factory=list)
    losses: np.ndarray | None = None
    observed: dict = field(default_factory=dict)


def popmtl(kind, optimizer, order, execution, recipe, dtype=torch.float64):
    """Plans and trains a kind in this process."""
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "M.npy"
        np.save(matrix, M)
        data = {
            "problem": kind.section,
            "population": {"weights": W.tolist()},
            "scalarization": {"name": "smooth_tchebycheff", "mu": 0.2},
            "train": {
                "steps": STEPS,
                "evaluate_every": EVERY,
                "optimizer": optimizer_section(optimizer, kind),
                "dtype": str(dtype).removeprefix("torch."),
                "execution": execution,
                **RECIPES.get(recipe, {}),
            },
            "transfer": {"order": order, "matrix": str(matrix), **TRANSFER},
            "resources": {"max_actors": 1, "gpus_per_actor": 0},
            "tracking": {"enabled": False},
            "seed": SEED,
        }
        config = Config.model_validate(data)
        try:
            plan = make_plan(config, local_nodes())
        except RequestError as error:
            return Ours(refused=str(error))
    ran, executions = [], []
    run, execute = Block.run, Block.execute

    def recorded_execute(block, asked):
        executions.append(execute(block, asked))
        return executions[-1]

    def recorded_run(block, *arguments):
        if not executions:  # the run in this process may leave this to its caller
            recorded_execute(block, execution)
        ran.append(run(block, *arguments))
        return ran[-1]

    with mock.patch.object(Block, "run", recorded_run), mock.patch.object(Block, "execute", recorded_execute):
        population = train_in_process(plan)
    return Ours(
        execution=executions[-1],
        states=[plain_torch.state_of(model) for model in population.block.models],
        losses=np.concatenate(ran),
        observed={seen.step: seen.F for seen in population.history},
    )


# --- the comparison ---


@cache
def plain(kind_name, optimizer, order, recipe, dtype):
    """The same by plain torch; or what plain torch raises."""
    kind = next(kind for kind in KINDS if kind.name == kind_name)
    settings = RECIPES.get(recipe, {})
    asked = plain_torch.Recipe(
        optimizer=optimizer_section(optimizer, kind),
        schedules=tuple(settings.get("lr_schedule", ())),
        clip=settings.get("clip"),
        accumulate=settings.get("accumulate", 1),
        order=order,
        steps=STEPS,
        evaluate_every=EVERY,
        dtype=dtype,
        seed=SEED,
    )
    try:
        trained = plain_torch.train(kind.problem, W, M, SIGMA, asked)
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    assert all(np.isfinite(trained.losses).ravel()), "plain torch diverges: nothing to compare with"
    moved = [not torch.equal(value, trained.states[0][name]) for name, value in trained.start.items()]
    assert any(moved), "plain torch trains nothing: nothing to compare with"
    return trained


def differences(ours, trained, dtype):
    """What differs, each with its difference relative to the largest entry, the largest first."""
    found = {"training losses": relative(ours.losses, trained.losses)}
    for step, F in trained.observed.items():
        found[f"validation losses at step {step}"] = relative(ours.observed[step], F)
    for i, (mine, theirs) in enumerate(zip(ours.states, trained.states, strict=True)):
        if set(mine) != set(theirs):
            return [(f"names of tensors of model {i}: {sorted(set(mine) ^ set(theirs))}", math.inf)]
        for name, value in theirs.items():
            found[f"{name} of model {i}"] = relative(mine[name], value)
            if dtype == torch.float32 and mine[name].dtype != value.dtype:  # nothing asks for another
                found[f"{mine[name].dtype} of {name}"] = math.inf
    return sorted(found.items(), key=lambda item: -item[1])


def relative(a, b):
    """The largest difference of two arrays over the largest entry of the second, or over 1 if that is smaller."""
    a, b = (value if isinstance(value, torch.Tensor) else torch.from_numpy(value) for value in (a, b))
    if a.shape != b.shape:
        return math.inf
    if not b.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    difference = float((a - b).abs().max() / b.abs().max().clamp(min=1))
    return difference if difference == difference else math.inf


def verdict(kind, optimizer, order, execution, recipe, dtype=torch.float64):
    """What becomes of a kind: "right", "refused: message" or "loop: reason".

    Raises:
        AssertionError: something else than it should.
    """
    trained = plain(kind.name, optimizer, order, recipe, dtype)
    ours = popmtl(kind, optimizer, order, execution, recipe, dtype)
    if ours.refused:
        plain_refuses = isinstance(trained, Exception)
        assert kind.expects != "right" or plain_refuses, f"refused: {ours.refused}"
        words = "|".join(filter(None, [kind.refusal, optimizer if plain_refuses and kind.expects != "refused" else ""]))
        assert re.search(words, without_names(ours.refused, kind), re.IGNORECASE), (
            f"refused without {words!r}: {ours.refused}"
        )
        return f"refused: {ours.refused}"
    assert not isinstance(trained, Exception), f"plain torch refuses: {trained}; and the plan does not"
    assert kind.expects != "refused", f"trained, where the plan should refuse it ({kind.refusal})"
    (what, worst), *_ = differences(ours, trained, dtype)
    assert worst <= TOLERANCE[dtype], f"{what}: {worst:.1e} off plain torch; {ours.execution}"
    if execution == "loop" or kind.loop == "?":
        return "right" if execution == "loop" or ours.execution.startswith("stacked") else ours.execution
    if kind.loop is None:
        assert ours.execution.startswith("stacked"), f"not stacked: {ours.execution}"
        return "right"
    assert ours.execution.startswith("loop: "), f"stacked, where it cannot be: {ours.execution}"
    assert re.search(kind.loop, ours.execution, re.IGNORECASE), f"reason without {kind.loop!r}: {ours.execution}"
    return ours.execution


def without_names(message, kind):
    """A refusal without the problem's name, in which any word may be."""
    return message.replace(kind.section["name"], "")


# --- the matrix ---


FULL = list(itertools.product(KINDS, OPTIMIZERS, ORDERS, EXECUTIONS, RECIPES))


def everyday():
    """Four combinations for each kind: with every optimizer, order, execution and recipe."""
    recipes = list(RECIPES)
    for k, kind in enumerate(KINDS):
        for j, optimizer in enumerate(OPTIMIZERS):
            a, b = ((0, 0), (1, 1), (1, 0), (0, 1))[(j + k) % 4]
            yield kind, optimizer, ORDERS[a], EXECUTIONS[b], recipes[(j + k // 4) % 3]


EVERYDAY = list(everyday())


def named(case):
    kind, *others = case
    return "-".join([kind.name, *others])


def test_the_everyday_cases_cover_all_pairs():
    for kind in KINDS:
        mine = [case for case in EVERYDAY if case[0] is kind]
        for axis, values in enumerate((OPTIMIZERS, ORDERS, EXECUTIONS, RECIPES), 1):
            assert {case[axis] for case in mine} == set(values)
    for a, b in itertools.combinations(range(1, 5), 2):
        assert {(case[a], case[b]) for case in EVERYDAY} == {(case[a], case[b]) for case in FULL}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EVERYDAY, ids=named)
def test_it_trains_as_by_plain_torch(case):
    verdict(*case)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_trains_as_by_plain_torch_in_float32(kind):
    k = KINDS.index(kind)
    verdict(kind, "SGD", ORDERS[k % 2], EXECUTIONS[k // 2 % 2], "plain", torch.float32)


REST = [case for case in FULL if case not in EVERYDAY]


@pytest.mark.endurance
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_trains_as_by_plain_torch_in_every_combination(kind):
    wrong = {named(case): complaint(case) for case in REST if case[0] is kind}
    assert not {name: said for name, said in wrong.items() if said}


def complaint(case):
    """What a combination does that it should not; None if it is as it should be."""
    try:
        verdict(*case)
    except Exception as error:  # noqa: BLE001 - whatever a run raises, the other combinations are to be seen too
        return f"{type(error).__name__}: {error}"
    return None


def table(kinds=KINDS, optimizer="SGD", order="consensus", recipe="plain"):
    """Prints what becomes of each kind, in Markdown; stacking is asked for, so that what cannot be stacked says why."""
    print("| kind | verdict |\n|---|---|")
    for kind in kinds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = verdict(kind, optimizer, order, "stacked", recipe)
        except AssertionError as error:
            said = f"WRONG: {error}"
        except Exception as error:  # noqa: BLE001 - whatever a run raises is what becomes of the kind
            said = f"FAILS: {type(error).__name__}: {error}"
        print(f"| {kind.name} | {' '.join(said.split())[:200].replace('|', '/')} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with redirect_stderr(None):
        table([kind for kind in KINDS if not sys.argv[1:] or any(word in kind.name for word in sys.argv[1:])])
