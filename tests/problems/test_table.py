"""Tables: what is read, what is fitted to which rows, and what the losses are; the real river flow where it is."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from popmtl.errors import RequestError
from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mtgd import Block, Recipe
from popmtl.problems.columns import Inputs, read_columns, split_rows
from popmtl.problems.registry import load_problem
from popmtl.problems.table import Table

RIVER = [f"{site}_48H__0" for site in ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")]


@pytest.fixture
def frame():
    random = np.random.default_rng(0)
    size, colour = random.normal(5, 3, 200), random.choice(["red", "green"], 200)
    return pd.DataFrame(
        {
            "size": size,
            "colour": colour,
            "floor": random.integers(1, 4, 200),
            "price": 2 * size + 3 * (colour == "red") + 100,
            "age": 7.0 - size,
        }
    )


@pytest.fixture
def written(frame, tmp_path):
    """Writes a table and returns its path."""

    def write(name="table.csv", table=frame):
        path = tmp_path / name
        table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
        return str(path)

    return write


def test_the_formats_say_the_same(frame, written, tmp_path):
    lines = ["@relation houses", "@attribute size numeric", "@attribute colour {red,green}", "@attribute floor numeric"]
    lines += ["@attribute price numeric", "@attribute age numeric", "@data"]
    lines += [",".join(map(str, row)) for row in frame.itertuples(index=False)]
    lines[-1] = lines[-1].replace("red", "?").replace("green", "?")
    (tmp_path / "table.arff").write_text("\n".join(lines) + "\n")
    frame.loc[199, "colour"] = np.nan
    for name in ("table.csv", "table.csv.gz", "table.parquet"):
        pd.testing.assert_frame_equal(read_columns(written(name)), frame, check_dtype=False)
    read = read_columns(str(tmp_path / "table.arff"))
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)


def test_splits_are_disjoint_of_the_shares_asked_for_and_those_of_the_published_runs():
    splits = split_rows(1000, 0.1, 0.2, 1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 700, "validation": 100, "test": 200}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1000))
    # numpy's legacy generator, as scikit-learn's train_test_split(test_size=0.2, random_state=1) takes it.
    assert (splits["test"] == np.random.RandomState(1).permutation(1000)[:200]).all()
    with pytest.raises(RequestError, match=r"validation 0.5 and test 0.6 of 10 rows"):
        split_rows(10, 0.5, 0.6, 0)


def test_inputs_are_fitted_to_training_rows_alone():
    training = pd.DataFrame({"a": [1.0, 3.0, np.nan], "b": [5.0, 5.0, 5.0], "c": ["x", "y", "x"], "d": [0, 1, 1]})
    inputs = Inputs(training, ["a", "b", "c", "d"], ["d"])
    assert inputs.names == ["a", "b", "a is missing", "c=x", "c=y", "d=0", "d=1"]
    others = pd.DataFrame({"a": [4.0, np.nan], "b": [5.0, np.nan], "c": ["z", "y"], "d": [1, 2]})
    # a: mean 2, deviation 1. b does not vary. What training has not seen is of no category.
    assert inputs.apply(others).tolist() == [[2, 0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]]


def test_losses_are_squared_errors_in_deviations_of_the_training_rows(frame, written):
    frame.loc[::3, "age"] = np.nan
    problem = Table(written(table=frame), ["price", "age"], data_seed=3)
    rows = split_rows(200, 0.1, 0.2, 3)
    train, test = frame.iloc[rows["train"]], frame.iloc[rows["test"]]
    torch.manual_seed(0)
    model = problem.model().double()
    x, _ = problem.splits["test"]
    predicted = model(x.double()).detach().numpy()
    evaluation = problem.evaluate(model, "test")
    for k, name in enumerate(["price", "age"]):
        mean, deviation = np.nanmean(train[name]), np.nanstd(train[name])
        errors = predicted[:, k] - (test[name].to_numpy() - mean) / deviation
        assert evaluation.objectives[k] == pytest.approx(np.nanmean(errors**2), rel=1e-5)
        assert evaluation.metrics[f"mae/{name}"] == pytest.approx(np.nanmean(abs(errors)) * deviation, rel=1e-5)
    # The mean of the training rows gets 1 on them, which is what the reference point is relative to.
    constant = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 2))
    torch.nn.init.zeros_(constant[0].weight)
    torch.nn.init.zeros_(constant[0].bias)
    np.testing.assert_allclose(problem.losses(constant, problem.splits["train"]).detach(), [1, 1], rtol=1e-5)


def test_targets_that_are_missing_reach_no_gradient(frame, written):
    frame.loc[:, "age"] = np.where(np.arange(200) % 2, frame["age"], np.nan)
    problem = Table(written(table=frame), ["price", "age"])
    model = problem.model()
    x, y = problem.splits["train"]
    losses = problem.losses(model, (x[:8], torch.full((8, 2), torch.nan)))
    assert losses.tolist() == [0, 0]
    problem.losses(model, (x, y)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_impossible_readings_count_as_missing(frame, written):
    rows = split_rows(200, 0.1, 0.2, 0)
    wrong = [rows["train"][0], rows["validation"][0], rows["test"][0]]
    spoilt = frame.astype({"floor": float})
    spoilt.loc[wrong, "price"] = 1e6
    spoilt.loc[wrong[1:], "size"] = -1e6  # as no training row has it
    spoilt["flag"] = np.arange(200) == wrong[1]  # an interquartile range of 0: whatever it holds is possible
    problem = Table(written("spoilt.csv", spoilt), ["price", "age"], outliers=10)

    there = spoilt.copy()
    there.loc[wrong, "price"] = np.nan
    there.loc[wrong[1:], "size"] = np.nan
    expected = Table(written("there.csv", there), ["price", "age"])
    for name, (x, y) in problem.splits.items():
        np.testing.assert_array_equal(x, expected.splits[name][0])
        np.testing.assert_array_equal(y, expected.splits[name][1])
    assert problem.splits["validation"][1].isnan().sum() == 1
    kept = Table(written("spoilt.csv", spoilt), ["price", "age"])
    assert not kept.splits["test"][1].isnan().any()
    # What lies within the ranges is as it was; the ranges are those of the training rows.
    clean = Table(written(table=frame), ["price", "age"], outliers=10)
    as_they_are = Table(written(table=frame), ["price", "age"])
    assert all(torch.equal(clean.splits[name][0], as_they_are.splits[name][0]) for name in rows)


def test_losses_continue_from_the_representation(frame, written):
    frame.loc[::3, "age"] = np.nan
    problem = Table(written(table=frame), ["price", "age"], hidden=[8, 5])
    model, batch = problem.model(), next(problem.batches(0))
    representation = problem.representation(model, batch)
    assert representation.shape == (64, 5)
    torch.testing.assert_close(problem.losses_at(model, representation, batch), problem.losses(model, batch))
    assert problem.shared(model) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_aligned_mtl_ub_trains_it(written):
    problem = Table(written(), ["price", "age"], hidden=[16])
    block = Block(problem, [0, 1], np.array([[0.3, 0.7], [0.8, 0.2]]), Recipe(partial(torch.optim.Adam, lr=0.01)))
    stage = FineTuning(block, AlignedRecipe(60, partial(torch.optim.Adam, lr=0.01), variant="ub"), np.zeros(2))
    stage.run(0, 60)
    for result in stage.finish():
        assert result.kept
        assert result.after < 0.5 * result.before


def test_it_learns_what_is_there_to_learn(written):
    problem = load_problem("table", {"path": written(), "targets": ["price", "age"], "hidden": [32]})
    torch.manual_seed(0)
    model, batches = problem.model(), problem.batches(0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(400):
        optimizer.zero_grad()
        problem.losses(model, next(batches)).sum().backward()
        optimizer.step()
    assert max(problem.evaluate(model, "test").objectives) < 0.01


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"targets": ["price"]}, "targets: .* must be a list of two or more columns"),
        ({"targets": ["price", "agee"]}, "targets: the file has no column 'agee': did you mean age?"),
        ({"inputs": ["size", "zzz"]}, "inputs: the file has no column 'zzz'; it has 'size', 'colour'"),
        ({"inputs": ["size", "age"]}, "inputs: 'age' is a target too"),
        ({"targets": ["price", "colour"]}, "targets: 'colour' is not a column of numbers"),
        ({"path": "nowhere.csv"}, "path nowhere.csv: there is no such file; give the CSV, ARFF or Parquet file"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"outliers": 0}, "outliers is 0, and must be a number of interquartile ranges above 0"),
    ],
)
def test_what_cannot_be_used_is_named(written, parameters, message):
    with pytest.raises(RequestError, match=message):
        load_problem("table", {"path": written(), "targets": ["price", "age"], **parameters})


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(RequestError, match=r"give a file that ends in .csv, .csv.gz, .arff or .parquet"):
        read_columns(str(tmp_path / "table.xlsx"))
    (tmp_path / "table.parquet").write_text("no")
    with pytest.raises(RequestError, match="cannot be read"):
        read_columns(str(tmp_path / "table.parquet"))


def test_the_river_flow_is_read_whole(shared_data):
    problem = Table(str(shared_data / "river_flow" / "rf1.arff"), RIVER)
    assert {name: len(x) for name, (x, _) in problem.splits.items()} == {"train": 6387, "validation": 913, "test": 1825}
    x, y = problem.splits["train"]
    assert y.shape[1] == 8
    assert x.isfinite().all()
    assert x[:, :64].mean(0).abs().max() < 1e-3
    # One reading of one hour, 78.9 between 3.53 and 3.54: a target of one row and an input of eight others.
    assert sum(int((y.abs() > 30).sum()) for _, y in problem.splits.values()) == 1
    checked = Table(str(shared_data / "river_flow" / "rf1.arff"), RIVER, outliers=20)
    assert sum(int(y.isnan().sum()) for _, y in checked.splits.values()) == 1
    assert max(float(x.abs().max()) for x, _ in checked.splits.values()) < 30
