"""Optimizers that leave torch's compiler out do what they do with it, and do not import it."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import warnings
import torch
from popmtl.method.uncompiled import leave_the_compiler_out

if sys.argv[1] == "without":
    leave_the_compiler_out()
warnings.simplefilter("error")
for name, cls in sorted(vars(torch.optim).items()):
    if not isinstance(cls, type) or name in ("Optimizer", "LBFGS", "SparseAdam"):
        continue
    torch.manual_seed(0)
    rows = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    optimizer = cls([{"params": rows[:1], "lr": 0.1}, {"params": rows[1:]}], lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        sum((row**2).sum() for row in rows).backward()
        optimizer.step()
        schedule.step()
        optimizer.load_state_dict(optimizer.state_dict())
    print(name, *[number.hex() for row in rows for number in row.flatten().tolist()])
    assert not any(entry.requires_grad for state in optimizer.state.values() for entry in state.values()
                   if torch.is_tensor(entry))
rate = torch.tensor(0.1, requires_grad=True)
row = torch.ones(2, requires_grad=True).clone()
row.grad = torch.ones(2)
torch.optim.SGD([row], lr=rate, differentiable=True).step()
row.sum().backward()
print("differentiable", rate.grad.item())
print("torch._dynamo" in sys.modules, file=sys.stderr)
"""


def steps(how):
    command = [sys.executable, "-c", SCRIPT, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def without():
    return steps("without")


def test_every_optimizer_steps_as_it_does_with_the_compiler(without):
    plain = steps("with")
    assert plain.stderr == "True\n"
    assert len(plain.stdout.splitlines()) >= 12
    assert without.stdout == plain.stdout


def test_none_imports_the_compiler(without):
    assert without.stderr == "False\n"
