"""The fairness problems: their files, their rows, their losses against sums in float64."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from popmtl.errors import RequestError
from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mtgd import Block, Recipe
from popmtl.method.problem import to_model
from popmtl.problems.fairness import ADULT, CREDIT, Fairness

COMPAS = """age,c_charge_degree,race,age_cat,score_text,sex,priors_count,days_b_screening_arrest,decile_score,is_recid,\
two_year_recid,c_jail_in,c_jail_out
69,F,Other,Greater than 45,Low,Male,0,-1,1,0,0,2013-08-13 06:03:42,2013-08-14 05:41:20
34,F,African-American,25 - 45,Low,Female,0,-1,3,1,1,2013-01-26 03:45:27,2013-02-05 05:36:53
24,O,African-American,Less than 25,Low,Male,4,-1,4,1,1,2013-04-13 04:58:34,2013-04-14 07:02:04
23,F,African-American,Less than 25,High,Male,1,,8,0,0,,
21,F,Caucasian,Less than 25,Low,Male,1,428,3,1,1,2015-01-06 03:55:34,2015-01-07 03:38:44
"""


def compas(tmp_path, times=20):
    head, *lines = COMPAS.strip().split("\n")
    (tmp_path / "compas.csv").write_text("\n".join([head, *lines * times]) + "\n")
    return str(tmp_path / "compas.csv")


def test_the_rows_of_compas_are_those_that_propublica_chose(tmp_path):
    problem = Fairness("compas", compas(tmp_path))
    x, y, s = (torch.cat(parts) for parts in zip(*problem.splits.values(), strict=True))
    assert len(x) == 40  # the first two lines, twenty times
    assert y.sum() == s.sum() == 20  # the second line, which is a woman's
    assert torch.equal(y, s)
    assert not any("sex" in name or "recid=" in name for name in problem.inputs)
    assert "length_of_stay" in problem.inputs


@pytest.mark.parametrize("measure", ["deo", "ddp"])
@pytest.mark.parametrize("per_group", [False, True])
def test_unfairness_is_the_difference_that_is_written_down(tmp_path, measure, per_group):
    problem = Fairness("compas", compas(tmp_path), measure=measure, per_group=per_group, sharpness=3.0, hidden=[5])
    torch.manual_seed(0)
    model, n = problem.model().double(), 50
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, problem._widths[0], generator=generator, dtype=torch.float64)
    y, s = (torch.randint(2, (n,), generator=generator).double() for _ in range(2))
    got = problem.losses(model, (x, y, s)).detach().numpy()
    z = model(x).detach().numpy()[:, 0]
    p = 1 / (1 + np.exp(-z))
    label, member = y.numpy() == 1, s.numpy() == 1
    assert got[0] == pytest.approx(-np.where(label, np.log(p), np.log(1 - p)).mean(), rel=1e-12)
    counted = label if measure == "deo" else np.full(n, fill_value=True)
    mean = np.mean if per_group else lambda values: values.sum() / n
    scores = np.tanh(3.0 * p)
    expected = abs(mean(scores[counted & ~member]) - mean(scores[counted & member]))
    assert got[1] == pytest.approx(expected, rel=1e-12)
    decided = p > 0.5
    figures = problem.measure(model, (x, y, s))
    assert figures["accuracy"] == pytest.approx((decided == label).mean())
    assert figures["decided_deo"] == pytest.approx(
        abs(decided[label & member].mean() - decided[label & ~member].mean())
    )
    counts = (decided & counted & ~member).sum() - (decided & counted & member).sum()
    assert figures[f"counted_{measure}"] == pytest.approx(abs(counts) / n)
    assert figures["decided_ddp"] == pytest.approx(abs(decided[member].mean() - decided[~member].mean()))


def test_aligned_mtl_ub_takes_the_gradients_of_the_logits(tmp_path):
    problem = Fairness("compas", compas(tmp_path), hidden=[5])
    recipe = Recipe(partial(torch.optim.SGD, lr=0.1), dtype=torch.float64)
    block = Block(problem, [0, 1], np.array([[0.3, 0.7], [0.8, 0.2]]), recipe)
    stage = FineTuning(block, AlignedRecipe(1, partial(torch.optim.SGD, lr=0.1), variant="ub"), np.zeros(2))
    batch = to_model(next(problem.batches(0)), block.rows)
    block.gradients.zero_()
    found, aligned = stage.align_ub(1, [batch], 0)
    model = block.models[1]
    torch.testing.assert_close(found, problem.losses(model, batch).detach())
    # No parameter is left out: the update is a combination of the two losses' gradients.
    G = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in problem.losses(model, batch)
    ]
    expected = sum(a * torch.cat([g.flatten() for g in row]) for a, row in zip(aligned.coefficients, G, strict=True))
    torch.testing.assert_close(block.gradients[1], expected)


def test_an_epoch_has_each_row_once(tmp_path):
    problem = Fairness("compas", compas(tmp_path), batch_size=8)
    stream, size = problem.batches(0), len(problem.splits["train"][0])
    drawn = sum(len(next(stream)[0]) for _ in range(-(-size // 8)))
    assert drawn == size


def test_adult_and_credit_are_read_as_uci_gives_them(tmp_path):
    lines = [
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
        "United-States, <=50K",
        "50, ?, 83311, Bachelors, 13, Married-civ-spouse, ?, Husband, White, Female, 0, 0, 13, United-States, >50K.",
    ]
    (tmp_path / "adult.data").write_text("\n".join(lines * 10) + "\n")
    problem = Fairness("adult", str(tmp_path / "adult.data"))
    x, y, s = (torch.cat(parts) for parts in zip(*problem.splits.values(), strict=True))
    assert (len(x), y.sum(), s.sum()) == (20, 10, 10)  # the first line too is a row
    assert "workclass=State-gov" in problem.inputs
    assert not any("?" in name for name in problem.inputs)
    assert len(ADULT) == 15
    credit = pd.DataFrame({"ID": range(20), "LIMIT_BAL": 1.0, "SEX": [1, 2] * 10, "EDUCATION": [1, 2, 3, 4] * 5})
    credit["default payment next month"] = [0, 0, 1, 1] * 5
    credit.to_csv(tmp_path / "credit.csv", index=False)
    plain = Fairness("credit", str(tmp_path / "credit.csv"))
    assert "EDUCATION=4" in plain.inputs
    assert not any("ID" in name or "SEX" in name for name in plain.inputs)
    # As archives name the columns, and OpenML in lower case.
    archived = {name: f"X{i}" for i, name in enumerate(CREDIT[:-1], 1)} | {"default payment next month": "Y"}
    named = credit.reindex(columns=["ID", *archived], fill_value=0.0).rename(columns=archived)
    named.assign(X1=range(20)).to_csv(tmp_path / "archived.csv", index=False)
    named.assign(X1=range(20)).rename(columns=str.lower).to_csv(tmp_path / "openml.csv", index=False)
    for file in ("archived.csv", "openml.csv"):
        other = Fairness("credit", str(tmp_path / file))
        assert [name for name in other.inputs if "=" in name] == [name for name in plain.inputs if "=" in name]
        assert "LIMIT_BAL" in other.inputs
        for name, (_, y, s) in plain.splits.items():
            assert torch.equal(y, other.splits[name][1])
            assert torch.equal(s, other.splits[name][2])
    # Saved from the spreadsheet with its line of X1, X2, …
    text = (tmp_path / "credit.csv").read_text()
    (tmp_path / "credit.csv").write_text(",X1,X2,X3,Y\n" + text)
    again = Fairness("credit", str(tmp_path / "credit.csv"))
    for name, tensors in plain.splits.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again.splits[name], strict=True))


def test_adult_test_has_a_comment_stops_and_equal_fields_in_its_first_row(tmp_path):
    lines = ["|1x3 Cross validator"]
    between = "11th, 7, Never-married, ?, Own-child, Black"
    lines += [
        f"{20 + i}, Private, {i}, {between}, {sex}, 0, 0, 40, United-States, {income}"
        for i in range(10)
        for sex in ("Male", "Female")
        for income in ("<=50K.", ">50K.")
    ]
    (tmp_path / "adult.test").write_text("\n".join(lines) + "\n\n")
    problem = Fairness("adult", str(tmp_path / "adult.test"))
    y, s = (torch.cat(parts) for parts in list(zip(*problem.splits.values(), strict=True))[1:])
    assert (len(y), y.sum(), s.sum()) == (40, 20, 20)
    assert "inputs: columns that do not vary in the training rows are left out: " in " ".join(problem.notices)
    assert not any("0.1" in notice for notice in problem.notices)
    # The same with OpenML's names.
    header = ", ".join([*ADULT[:-1], "class"])
    (tmp_path / "named.csv").write_text("\n".join([header, *lines[1:]]).replace("K.", "K"))
    named = Fairness("adult", str(tmp_path / "named.csv"))
    for name, tensors in problem.splits.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, named.splits[name], strict=True))


def test_rows_without_a_label_or_group_are_dropped_and_counted(tmp_path):
    path = compas(tmp_path)
    head, *lines = Path(path).read_text().splitlines()
    names = head.split(",")
    for row, column in ((0, "two_year_recid"), (5, "two_year_recid"), (10, "sex")):
        fields = lines[row].split(",")
        fields[names.index(column)] = ""
        lines[row] = ",".join(fields)
    (tmp_path / "spoilt.csv").write_text("\n".join([head, *lines]) + "\n")
    problem = Fairness("compas", str(tmp_path / "spoilt.csv"))
    assert sum(len(x) for x, *_ in problem.splits.values()) == 37
    assert problem.notices[:2] == [
        "2 of 40 rows are without any target, and were dropped",
        "1 of 38 rows are without sex, and were dropped",
    ]


def test_a_label_that_is_neither_of_the_two_is_refused(tmp_path):
    path = compas(tmp_path)
    text = Path(path).read_text().replace(",1,1,2013-01-26", ",1,2,2013-01-26", 1)
    (tmp_path / "spoilt.csv").write_text(text)
    with pytest.raises(RequestError, match="two_year_recid is 2, and must be 0 or 1"):
        Fairness("compas", str(tmp_path / "spoilt.csv"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"data": "compass"}, "data is 'compass', and must be one of: compas, credit, adult"),
        ({"measure": "dep"}, "measure is 'dep', and must be one of: deo, ddp"),
        ({"sensitive": "age"}, "sensitive is 'age', and must be one of: sex, race"),
        ({"path": "nowhere.csv"}, "path nowhere.csv: there is no such file; give compas-scores-two-years.csv"),
        ({"hidden": [0]}, "must be positive"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, parameters, message):
    with pytest.raises(RequestError, match=message):
        Fairness(**{"data": "compas", "path": compas(tmp_path), **parameters})


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match="path: the file has no column 'age'"):
        Fairness("compas", str(tmp_path / "other.csv"))


def test_compas_itself(shared_data):
    problem = Fairness("compas", str(shared_data / "compas" / "compas.csv"), data_seed=1)
    assert {name: len(x) for name, (x, *_) in problem.splits.items()} == {
        "train": 4319,
        "validation": 618,
        "test": 1235,
    }
    assert problem.splits["train"][0].shape[1] == 20
