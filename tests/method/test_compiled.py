"""Losses through torch.compile, whose backward pass may be taken once."""

import pytest
import torch
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.plan import make_plan


class Once(torch.autograd.Function):
    """Has one backward pass, as a compiled graph whose buffers are donated."""

    @staticmethod
    def forward(ctx, x):
        ctx.passes = 0
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.passes += 1
        assert ctx.passes == 1, "a second backward pass"
        return gradient


@pytest.fixture
def calls(monkeypatch):
    """Which losses were taken through torch.compile, that gives a graph of one backward pass."""
    calls = []

    def compiled(function, backend):
        def call(*arguments):
            calls.append(function.__name__)
            return Once.apply(function(*arguments))

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


def plan(**train):
    data = config(2, train={"compile": True, "execution": "loop", **train}, fine_tune={"steps": 2})
    return make_plan(Config.model_validate(data), [{"CPU": 2.0}])


def test_losses_with_a_backward_pass_each_are_not_compiled(calls):
    assert not any("train.compile" in warning for warning in plan().warnings)
    assert calls  # the first stage is compiled
    calls.clear()
    assert any(
        "train.compile: train.gradient" in warning for warning in plan(gradient={"name": "aligned_mtl"}).warnings
    )
    assert not calls
