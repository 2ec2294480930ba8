import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from popmtl.method.trees import pack, unpack


def test_nested_state_comes_back_through_json():
    generator = np.random.default_rng(3)
    tree = {
        "step": 3,
        2: [True, None, 1.5, "text", b"\x00\xff", {}, [], ()],
        "best": math.inf,
        "worst": -math.inf,
        "tensors": (torch.arange(3), {"deep": torch.zeros(2, 2, dtype=torch.float64)}),
        "numpy": [np.float64(0.1), np.int64(4), np.arange(3, dtype=np.int16)],
        "python": random.Random(1).getstate(),
        "generator": generator.bit_generator.state,
    }
    plain, tensors = pack(tree, "stream")
    back = unpack(json.loads(json.dumps(plain, allow_nan=False)), tensors)
    assert repr(back) == repr(tree)
    assert set(tensors) == {f"stream/{i}" for i in range(3)}


def test_tensors_are_copies():
    original = torch.zeros(3)
    _, tensors = pack([original], "state")
    original.fill_(1)
    assert tensors["state/0"].tolist() == [0, 0, 0]


def test_nan_comes_back():
    plain, tensors = pack({"x": math.nan}, "state")
    assert math.isnan(unpack(json.loads(json.dumps(plain)), tensors)["x"])


def test_what_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match=r"state\.sampler\[0\] holds a .*RandomSampler, which cannot be saved"):
        pack({"sampler": [RandomSampler(range(3))]}, "state")


def test_foreign_kind_is_refused():
    with pytest.raises(ValueError, match="pickle is no kind"):
        unpack({"pickle": "gASV"}, {})
