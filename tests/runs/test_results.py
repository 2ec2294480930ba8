"""The Pareto set on disk."""

import csv
import json
import math
import os
import re
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.errors import RequestError
from popmtl.runs.files import replacing
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Figures, Front, Member
from popmtl.runs.results import load_model, load_state, write_front, write_model

MEMBERS = [
    Member(
        0,
        [0.25, 0.75],
        [0.5, 0.4],
        {"accuracy": 0.9},
        "mtgd",
        True,
        "models/0/model.safetensors",
        validation=Figures([0.45, 0.35], {"accuracy": 0.95}),
    ),
    Member(
        1,
        [0.75, 0.25],
        [0.1, 0.8],
        {"accuracy": 0.8, "b": 2.0},
        "aligned_mtl",
        False,
        "models/1/model.safetensors",
        validation=Figures([0.05, 0.75], {"accuracy": 0.85}),
    ),
]
FRONT = Front(["left", "right"], [1.0, 1.0], 0.36, 7, 1200, MEMBERS, {"accuracy": "higher"})


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path, "run")


class Net(nn.Module):
    """Batch normalization has an integer buffer; the two embeddings are one parameter."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.decode(self.norm(self.encode(x)))


def trained():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 3))
    return model


def test_front_json_has_exactly_the_keys_of_the_design(folder):
    write_front(folder, FRONT)
    assert json.loads((folder.path / "pareto" / "front.json").read_text()) == {
        "objectives": ["left", "right"],
        "reference_point": [1.0, 1.0],
        "hypervolume": 0.36,
        "hypervolume_error": None,
        "best": False,
        "metrics": {"accuracy": "higher"},
        "baseline": {},
        "seed": 7,
        "steps": 1200,
        "members": [
            {
                "subproblem": 0,
                "weights": [0.25, 0.75],
                "objectives": [0.5, 0.4],
                "metrics": {"accuracy": 0.9},
                "stage": "mtgd",
                "non_dominated": True,
                "model": "models/0/model.safetensors",
                "reseeds": 0,
                "lost": None,
                "validation": {"objectives": [0.45, 0.35], "metrics": {"accuracy": 0.95}},
            },
            {
                "subproblem": 1,
                "weights": [0.75, 0.25],
                "objectives": [0.1, 0.8],
                "metrics": {"accuracy": 0.8, "b": 2.0},
                "stage": "aligned_mtl",
                "non_dominated": False,
                "model": "models/1/model.safetensors",
                "reseeds": 0,
                "lost": None,
                "validation": {"objectives": [0.05, 0.75], "metrics": {"accuracy": 0.85}},
            },
        ],
    }


def test_a_front_reads_back_as_written(folder):
    write_front(folder, FRONT)
    assert folder.front() == FRONT
    assert sorted(os.listdir(folder.pareto)) == ["explorer.html", "front.csv", "front.json", "front.png"]


def test_numpy_and_values_that_are_not_finite():
    member = Member(
        0, np.array([0.5, 0.5]), np.array([np.nan, np.inf]), {"a": np.float32(math.nan)}, "mtgd", np.bool_(False), "m"
    )
    text = Front(("a", "b"), np.ones(2), np.float64(0), np.int64(1), 2, [member]).to_json()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["members"][0]["objectives"] == [None, None]
    assert content["members"][0]["non_dominated"] is False
    read = Front.from_json(text).members[0]
    assert all(math.isnan(value) for value in (*read.objectives, read.metrics["a"]))


HOSTILE = ("=1+1", "@SUM(A1)", "+A1", "-A1", "\t=1", "\r=1", " =1", '"=1', "＝1", "nan; =1+1", "a\n-1", "a|@b", "a\t+1")


def test_no_cell_of_csv_is_a_formula(folder):
    lost = [replace(MEMBERS[0], subproblem=i, lost=text, stage=text, model=text) for i, text in enumerate(HOSTILE)]
    named = replace(FRONT, objectives=["=1", "a;=2"], members=lost)
    write_front(folder, named)
    with (folder.pareto / "front.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    for text in [*header, *(row[header.index(name)] for row in rows for name in ("lost", "stage", "model"))]:
        for cell in re.split("[;,|]", text):  # as other spreadsheets part it
            assert not re.match(r"[\s\"']*[=+@＝-]", cell) or cell.lstrip().startswith("'"), text
        assert text.isprintable()
    assert "w/a;'=2" in header
    assert [row[header.index("lost")] for row in rows[4:10]] == [
        "\\t=1",
        "\\r=1",
        "' =1",
        "'\"=1",
        "'＝1",
        "nan;' =1+1",
    ]


def test_csv(folder):
    write_front(folder, FRONT)
    with (folder.pareto / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "subproblem": "0",
        "w/left": "0.25",
        "w/right": "0.75",
        "validation/objective/left": "0.45",
        "validation/objective/right": "0.35",
        "validation/accuracy": "0.95",
        "test/objective/left": "0.5",
        "test/objective/right": "0.4",
        "test/accuracy": "0.9",
        "test/b": "nan",
        "stage": "mtgd",
        "non_dominated": "True",
        "model": "models/0/model.safetensors",
        "reseeds": "0",
        "lost": "",
    }
    assert [row["test/b"] for row in rows] == ["nan", "2.0"]


def test_model_round_trip_with_integer_buffers_and_tied_parameters(folder):
    model = trained()
    assert write_model(folder, 3, model.state_dict()) == "models/3/model.safetensors"
    state = load_state(folder.pareto / "models" / "3" / "model.safetensors")
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["norm.num_batches_tracked"].item() == 1
    other = Net()
    other.load_state_dict(state, strict=True)
    assert other.decode.weight is other.encode.weight
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_rows_of_a_population_and_strided_tensors_are_written_alone(folder):
    population = torch.arange(12.0).reshape(2, 6)
    state = {"a": population[1, :4].view(2, 2).T, "b": population[1, 2:], "c": torch.tensor(2.0, requires_grad=True)}
    path = folder.pareto / write_model(folder, 0, state)
    for name, value in load_state(path).items():
        torch.testing.assert_close(value, state[name].detach())
    assert path.stat().st_size < 1000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with replacing(path) as beside:
            beside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "old"
    with replacing(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def registry(monkeypatch):
    """A registry with one problem in place of the real one."""
    asked = []

    class ToyProblem:
        def model(self):
            return Net()

    def load_problem(name, parameters):
        asked.append((name, parameters))
        return ToyProblem()

    module = ModuleType("popmtl.problems.registry")
    module.load_problem = load_problem
    monkeypatch.setitem(sys.modules, "popmtl.problems.registry", module)
    return asked


def test_load_model(folder, registry):
    folder.write_config({"problem": {"name": "toy", "width": 3}})
    model = trained().eval()
    write_model(folder, 1, model.state_dict())
    loaded = load_model(folder.path, 1)
    assert registry == [("toy", {"width": 3})]
    assert not loaded.training
    x = torch.randn(5, 3)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_load_model_names_what_is_wrong(folder, registry, tmp_path):
    with pytest.raises(RequestError, match="not a run folder"):
        load_model(tmp_path / "elsewhere", 0)
    folder.write_config({"problem": {"name": "toy"}})
    write_model(folder, 1, {"other": torch.zeros(1)})
    with pytest.raises(RequestError, match=r"no model of subproblem 0; it has those of \[1\]"):
        load_model(folder.path, 0)
    with pytest.raises(RequestError, match=r"has no front of its best evaluation: front.best was not asked for"):
        load_model(folder.path, 0, best=True)
    with pytest.raises(RequestError, match=r"does not fit the model of problem 'toy'"):
        load_model(folder.path, 1)
    file = folder.pareto / "models" / "1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(RequestError, match=f"{file} is damaged: ") as refused:
        load_model(folder.path, 1)
    assert "\n" not in str(refused.value)
    (file.parent.parent / "notes").mkdir()
    with pytest.raises(RequestError, match=r"it has those of \[1\]"):
        load_model(folder.path, 0)
