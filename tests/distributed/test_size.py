"""Counts beyond reason are refused with what they would take, before anything of that size is made."""

import time
import tracemalloc

import pytest

from popmtl.config import Config
from popmtl.distributed.plan import make_plan
from popmtl.errors import RequestError

MACHINE = [{"CPU": 2.0, "GPU": 0.0}]
BASE = {"problem": {"name": "zdt1"}, "population": {"subproblems": 4}, "train": {"steps": 20}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"population": {"subproblems": 20_000}}, r"^population.subproblems: 20000 .*would take 16 GB"),
        ({"population": {"weights": [[0.5, 0.5]] * 5000}}, r"^population.subproblems: 5000 "),
        ({"population": {"subproblems": 2000, "weights": "energy"}}, r"^population.weights: energy takes minutes"),
        ({"train": {"steps": 10**30}}, r"^train.steps: 10+ is beyond reason: .*this machine has"),
        (
            {"train": {"steps": 5 * 10**7, "evaluate_every": 1}},
            r"^train.evaluate_every: 1 is beyond reason: the history",
        ),
        (
            {"problem": {"name": "zdt1", "variables": 10**9}},
            r"^problem zdt1: a model has 1,000,000,000 .*24 GB",
        ),
        ({"problem": {"name": "vlmop2", "variables": 10**30}}, r"^vlmop2: variables is 10+, and must be at most"),
        (
            {"problem": {"name": "dtlz2", "objectives": 10**6}},
            r"^dtlz2: objectives is 1000000, .*at most 100",
        ),
        (
            {"problem": {"name": "multidigits", "hidden": 10**6}},
            r"^problem multidigits: a model has 1,000,",
        ),
        ({"problem": {"name": "multidigits", "batch_size": 10**9}}, "batch_size is 1000000000, and must be at most"),
        ({"transfer": {"matrix": "/dev/zero"}}, "^transfer: matrix /dev/zero: "),
    ],
)
def test_what_no_machine_could_hold_is_refused_at_once(monkeypatch, data, says):
    monkeypatch.setattr("popmtl.distributed.size.room", lambda: 4e9)
    config = Config.model_validate(BASE | data)
    if config.problem.name == "multidigits":
        import sklearn.datasets  # noqa: F401
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(RequestError, match=says):
        make_plan(config, MACHINE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 2
    assert peak < 2**28


def test_a_matrix_whose_head_lies_is_not_believed(tmp_path):
    head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    (tmp_path / "m.npy").write_bytes(head.ljust(127) + b"\n" + b"\0" * 128)
    with pytest.raises(RequestError, match=r"m.npy: not a .npy"):
        make_plan(Config.model_validate(BASE | {"transfer": {"matrix": str(tmp_path / "m.npy")}}), MACHINE)
