"""Tables: what is read, what is fitted to which rows, and what the losses are; the real river flow where it is."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from popmtl.errors import RequestError
from popmtl.method.fine_tuning import AlignedRecipe, FineTuning
from popmtl.method.mtgd import Block, Recipe
from popmtl.problems.columns import Inputs, check_inputs, split_rows
from popmtl.problems.registry import load_problem
from popmtl.problems.table import Table, _numbers
from popmtl.problems.table_files import read_columns

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
    pd.testing.assert_frame_equal(read.astype({"colour": object}), frame.astype({"colour": object}))


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
    assert inputs.names == ["a", "a is missing", "c=x", "c=y", "d=0", "d=1"]
    others = pd.DataFrame({"a": [4.0, np.nan], "b": [5.0, np.nan], "c": ["z", "y"], "d": [1, 2]})
    # a: mean 2, deviation 1. b does not vary, and is left out. What training has not seen is of no category.
    assert inputs.apply(others).tolist() == [[2, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 0]]


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
    spoilt["flag"] = np.isin(np.arange(200), wrong[:2])  # an interquartile range of 0: whatever it holds is possible
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
        ({"targets": ["price", "price"]}, "targets: 'price' is named twice"),
        ({"targets": "price"}, "targets: 'price' must be a list of two or more columns"),
        ({"inputs": "size"}, "inputs: 'size' must be a list of columns"),
        ({"inputs": ["size", "size"]}, "inputs: 'size' is named twice"),
        ({"inputs": []}, "inputs: no column varies in the training rows"),
        ({"inputs": ["size"], "categorical": ["floor"]}, "categorical: 'floor' is no input"),
        ({"path": "nowhere.csv"}, "path nowhere.csv: there is no such file; give the CSV, ARFF, Parquet or .xlsx file"),
        ({"batch_size": 0}, "batch_size is 0, and must be at least 1"),
        ({"outliers": 0}, "outliers is 0, and must be a number of interquartile ranges above 0"),
    ],
)
def test_what_cannot_be_used_is_named(written, parameters, message):
    with pytest.raises(RequestError, match=message):
        load_problem("table", {"path": written(), "targets": ["price", "age"], **parameters})


def table_of(written, **columns):
    """The problem of two good targets and these input columns, of 200 rows."""
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    frame = pd.DataFrame({"x": x, **columns, "price": x + 1, "age": random.normal(size=200)})
    return Table(written(table=frame), ["price", "age"])


TRAINING = split_rows(200, 0.1, 0.2, 0)["train"]


@pytest.mark.parametrize(
    "values",
    [
        np.full(200, 0.1),
        0.1 * (1 + 1e-8 * np.arange(200) / 200),  # what float32 makes of one number, for instance
        np.full(200, 1e9) + np.linspace(0, 1e-3, 200),
        np.full(200, 7),
        np.full(200, "same"),
    ],
)
def test_a_column_that_hardly_varies_in_training_is_left_out_whatever_it_is_elsewhere(written, values):
    values = values.copy()
    values[np.setdiff1d(np.arange(200), TRAINING)[::2]] = values[0] * 2 if values.dtype.kind != "U" else "else"
    problem = table_of(written, rate=values, empty=[np.nan] * 200)
    assert [x.shape[1] for x, _ in problem.splits.values()] == [1, 1, 1]
    assert problem.notices == [
        "inputs: columns that have no value in the training rows are left out: 'empty'",
        "inputs: columns that do not vary in the training rows are left out: 'rate'",
    ]


def test_small_and_large_numbers_that_vary_are_scaled(written):
    random = np.random.default_rng(0).normal(size=200)
    for scale in (1e-300, 1e-9, 1e9, 1e300):
        problem = table_of(written, a=scale * random, b=scale * (1e3 + random))
        x = problem.splits["train"][0]
        np.testing.assert_allclose(x.std(0, correction=0), 1, rtol=1e-4)
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
        assert not problem.notices


def test_numbers_far_outside_of_training_rows_count_as_missing_and_are_told(written):
    held = np.setdiff1d(np.arange(200), TRAINING)
    rate = 0.1 + 1e-6 * np.random.default_rng(0).random(200)
    rate[held[:3]] = 0.2
    problem = table_of(written, rate=rate)
    assert max(float(x.abs().max()) for x, _ in problem.splits.values()) < 20
    assert problem.notices == ["inputs: numbers far outside of all training rows count as missing: 'rate' (3)"]


def test_a_target_far_outside_of_training_rows_is_told(frame, written):
    frame.loc[split_rows(200, 0.1, 0.2, 0)["test"][0], "price"] = 1e6
    (notice,) = Table(written(table=frame), ["price", "age"]).notices
    assert notice == "targets: numbers far outside of all training rows decide the errors; see outliers: 'price' (1)"


def test_infinities_are_missing_values_and_counted(frame, written):
    frame.loc[[3, 7, 9], "size"] = [np.inf, -np.inf, np.inf]
    frame.loc[5, "price"] = np.inf
    problem = Table(written(table=frame), ["price", "age"])
    assert problem.notices == ["infinite values count as missing: 'size' (3), 'price' (1)"]
    frame = frame.replace([np.inf, -np.inf], np.nan)
    expected = Table(written(table=frame), ["price", "age"])
    for name, tensors in problem.splits.items():
        for found, wanted in zip(tensors, expected.splits[name], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_rows_that_are_empty_or_have_no_target_are_dropped_and_counted(frame, written, tmp_path):
    lines = frame.to_csv(index=False).splitlines()
    spoilt = [*lines[:5], "", ",,,,", *lines[5:9], "3.0,red,1,,", "3.0,red,1,inf,?", *lines[9:]]
    (tmp_path / "spoilt.csv").write_text("\n".join(spoilt) + "\n\n")
    problem = Table(str(tmp_path / "spoilt.csv"), ["price", "age"])
    assert problem.notices == [
        "infinite values count as missing: 'price' (1)",
        "2 of 204 rows are empty, and were dropped",
        "2 of 202 rows are without any target, and were dropped",
    ]
    expected = Table(written(table=frame), ["price", "age"])
    for name, tensors in problem.splits.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected.splits[name], strict=True))


@pytest.mark.parametrize("missing", ["training", "validation", "test"])
def test_a_target_without_a_value_in_a_split_is_refused(frame, written, missing):
    frame.loc[split_rows(200, 0.1, 0.2, 0)[missing.replace("training", "train")], "age"] = np.nan
    with pytest.raises(RequestError, match=f"targets: 'age' has no value among the {missing} rows"):
        Table(written(table=frame), ["price", "age"])


def test_ids_and_dates_are_told_with_their_count(written):
    days = pd.date_range("2020-01-01", periods=200).astype(str)
    columns = {"number": np.arange(200) + 1000, "code": [f"row {i}" for i in range(200)], "day": days}
    number, code, day = sorted(table_of(written, **columns).notices, key=lambda notice: "number' has" not in notice)
    assert number.startswith("inputs: column 'number' has another whole number in each row")
    assert code.startswith("inputs: column 'code' is of text, as ids are, which was taken as 140 categories")
    assert day.startswith("inputs: column 'day' is of dates, which were taken as 140 categories")
    frame = pd.DataFrame({"code": columns["code"], "price": np.arange(200), "age": np.arange(200)})
    assert not Table(written(table=frame), ["price", "age"], categorical=["code"]).notices  # it was said
    assert not table_of(written, colour=["red", "blue", "green", "grey"] * 50, year=[2019, 2020] * 100).notices


@pytest.mark.parametrize("day", ["1/2/2020", "2020-01-02 10:00", "02.01.20", "2-Jan-2020", "Jan 2, 2020", "2020/1/2"])
def test_a_date_is_one_as_people_write_it(written, day):
    (notice,) = table_of(written, day=[day, day.replace("2", "3", 1)] * 100).notices
    assert notice.startswith("inputs: column 'day' is of dates, which were taken as 2 categories")


def test_dates_of_a_parquet_file_are_categories_too(frame, written):
    frame["day"] = pd.date_range("2020-01-01", periods=4).repeat(50)
    problem = Table(written("t.parquet", frame), ["price", "age"], inputs=["size", "day"])
    assert problem.splits["train"][0].shape[1] == 5
    assert problem.splits["train"][0][:, 1:].sum(1).eq(1).all()


def test_columns_of_other_things_are_refused_only_where_they_are_used(frame, written):
    frame["parts"] = [[1, 2]] * 200
    path = written("t.parquet", frame)
    Table(path, ["price", "age"], inputs=["size"])
    with pytest.raises(RequestError, match="inputs: column 'parts' has values of more than one part"):
        Table(path, ["price", "age"])
    with pytest.raises(RequestError, match="inputs: column 'wave' is of complex numbers"):
        check_inputs(pd.DataFrame({"wave": [1j, 2j]}), ["wave"])


def test_a_column_of_numbers_and_words_asks_what_it_is(frame, written):
    frame["rooms"] = ["1", "2", "3", "unknown"] * 50
    path = written(table=frame)
    with pytest.raises(RequestError, match="inputs: column 'rooms' has 3 numbers among 4 different values, but not"):
        Table(path, ["price", "age"])
    problem = Table(path, ["price", "age"], inputs=["rooms"], categorical=["rooms"])
    assert problem.splits["train"][0].shape[1] == 4
    frame["rooms"] = ["1,000", "2,000"] * 100
    with pytest.raises(RequestError, match=r"column 'rooms' has 2 numbers among 2 .*, but '1,000' is no plain one"):
        Table(written(table=frame), ["price", "age"])


def test_a_last_line_of_words_is_named_whichever_split_it_is_in(frame, tmp_path):
    lines = frame[["size", "price", "age"]].to_csv(index=False)
    (tmp_path / "t.csv").write_text(lines + "Total: 200 rows\n")
    with pytest.raises(RequestError, match=r"'size' has 200 numbers among 201 .* but not 'Total: 200 rows'"):
        Table(str(tmp_path / "t.csv"), ["price", "age"])


def test_a_name_that_stands_twice_is_refused_only_where_it_is_used(tmp_path):
    rows = [f"{i},{i % 7},{i % 5},{i % 3}" for i in range(50)]
    (tmp_path / "t.csv").write_text("\n".join(["a,a,y,z", *rows]))
    with pytest.raises(RequestError, match="inputs: the file has 2 columns 'a'; rename them"):
        Table(str(tmp_path / "t.csv"), ["y", "z"])
    (tmp_path / "t.csv").write_text("\n".join(["y,b,y,z", *rows]))
    with pytest.raises(RequestError, match="targets: the file has 2 columns 'y'; rename them"):
        Table(str(tmp_path / "t.csv"), ["y", "z"])
    (tmp_path / "t.csv").write_text("\n".join(["c,c,y,z", *rows]).replace("c,c", "c, c ") + "\n")
    with pytest.raises(RequestError, match="2 columns 'c'"):
        Table(str(tmp_path / "t.csv"), ["y", "z"])
    (tmp_path / "t.csv").write_text("\n".join(["x,a,y,z", *rows]).replace("x,a", "x,z"))
    with pytest.raises(RequestError, match="targets: the file has 2 columns 'z'"):
        Table(str(tmp_path / "t.csv"), ["y", "z"], inputs=["x"])
    (tmp_path / "t.csv").write_text("a,a,x,y,z\n" + "\n".join(f"0,{row}" for row in rows))
    assert Table(str(tmp_path / "t.csv"), ["y", "z"], inputs=["x"]).splits["train"][0].shape[1] == 1


def test_defaults_are_epochs_of_the_training_rows(frame, written):
    steps = {size: Table(written(), ["price", "age"], batch_size=size).defaults["train"]["steps"] for size in (8, 64)}
    assert steps == {8: 525, 64: 100}


@pytest.mark.parametrize("values", [np.full(200, 3.0), 0.1 * (1 + 1e-9 * np.arange(200))])
def test_a_target_that_does_not_vary_is_refused(frame, written, values):
    frame["age"] = values
    with pytest.raises(RequestError, match="targets: 'age' does not vary in the training rows"):
        Table(written(table=frame), ["price", "age"])


@pytest.mark.parametrize("target", [pd.date_range("2020-01-01", periods=200), [[1]] * 200, np.arange(200) * 1j])
def test_a_target_of_another_kind_is_no_number(frame, target):
    frame["age"] = target
    with pytest.raises(RequestError, match="targets: 'age' is not a column of numbers"):
        _numbers(frame["age"])


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
