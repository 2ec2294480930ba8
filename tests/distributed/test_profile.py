"""A trace of some steps is written, and changes nothing."""

import gzip
import itertools
import json

import numpy as np
import pytest
import torch
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.plan import make_plan
from popmtl.distributed.profile import TRACE, Profile, steps_needed
from popmtl.method.mtgd import Block, Chunk
from popmtl.problems.registry import load_problem
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state

STEPS = 5


def traced(content):
    """The steps of a trace, and the threads in which it has seen products of matrices."""
    events = json.loads(gzip.decompress(content))["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    threads = {event["tid"] for event in events if event.get("name") in ("aten::mm", "aten::addmm_")}
    return len(steps), threads


def states(folder):
    return [load_state(folder.pareto / "models" / str(i) / "model.safetensors") for i in range(4)]


@pytest.mark.slow
def test_a_run_that_is_profiled_ends_as_it_would_without(run):
    data = config(2, train={"execution": "loop", "dtype": "float32"}, transfer={"transport": "collective"})
    (_, plain, first), (_, folder, second) = run(data), run(data, profile=STEPS)
    assert second.front == first.front
    assert folder.metrics() == plain.metrics()
    for ours, theirs in zip(states(folder), states(plain), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps, threads = traced((folder.path / TRACE).read_bytes())
    assert steps == STEPS
    assert len(threads) > 1, "the exchange, in the background, is in it too"
    told = [event["trace"] for event in folder.events() if event["kind"] == "profile"]
    assert told == [str(folder.path / TRACE)]
    assert not (plain.path / "profile").exists()


def blocks():
    """Two blocks of the same rows, and a chunk of steps for them."""
    data = config(1, train={"dtype": "float32"}) | {"tracking": {"enabled": False}}
    plan = make_plan(Config.model_validate(data), [{"CPU": 1.0}])
    problem = load_problem(plan.config.problem.name, plan.config.problem.parameters)
    chunk = Chunk(0, plan.factors, plan.M, np.zeros(2))
    return *(Block(problem, range(4), plan.W, plan.recipe) for _ in range(2)), chunk


def test_a_trace_goes_to_a_storage_behind_a_url(s3):
    block, same, chunk = blocks()
    folder = RunFolder.create(s3, "run")
    profile = Profile(STEPS, folder)
    losses = profile.run(block, chunk, block.mix_locally)
    assert profile.outcome == folder.files.where(TRACE)
    assert traced(folder.read(TRACE))[0] == STEPS
    np.testing.assert_array_equal(losses, same.run(chunk))
    assert torch.equal(block.rows, same.rows)


def test_a_trace_that_cannot_be_written_says_so_and_ends_nothing(tmp_path):
    block, _, chunk = blocks()
    folder = RunFolder.create(tmp_path, "run")
    (folder.path / "profile").write_text("in the way")
    profile = Profile(STEPS, folder)
    assert len(profile.run(block, chunk, block.mix_locally)) == len(chunk)
    assert profile.outcome.startswith("not written (")


def test_steps_come_in_chunks_of_any_length(tmp_path):
    block, same, chunk = blocks()
    profile = Profile(STEPS, RunFolder.create(tmp_path, "run"))
    cuts = [0, 1, 4, steps_needed(STEPS), steps_needed(STEPS) + 1, len(chunk)]
    losses = []
    for first, end in itertools.pairwise(cuts):
        assert (profile.outcome is None) == (first < steps_needed(STEPS))
        losses.append(
            profile.run(block, Chunk(first, chunk.factors[first:end], chunk.M, chunk.ideal), block.mix_locally)
        )
    np.testing.assert_array_equal(np.concatenate(losses), same.run(chunk))
