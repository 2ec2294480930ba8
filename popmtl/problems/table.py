"""Multi-target regression from a table: one objective a target column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from popmtl.errors import RequestError
from popmtl.method.problem import Problem, Split
from popmtl.models.perceptron import perceptron
from popmtl.problems.bounds import MOST_EXAMPLES, check_range
from popmtl.problems.columns import (
    Inputs,
    Scale,
    check_inputs,
    check_names,
    cosine_defaults,
    data_file,
    is_far,
    is_number,
    split_rows,
    told,
    usable_rows,
    without_outliers,
)
from popmtl.problems.table_files import read_columns
from popmtl.text import shown

Rows = tuple[Tensor, Tensor]
"""Inputs, shape (batch, inputs), and standardized targets, (batch, m), NaN where missing."""


class Table(Problem):
    """Predicts several columns of a table from others, by one multilayer perceptron with an output for each.

    An objective is the mean squared error of a target, in standard deviations of the training rows: 1 is what their
    mean would get there. Rows without a value for a target count for the other targets; those without any target are
    dropped. Infinite numbers are missing ones. Whatever is fitted to the data, scales and categories, is fitted to the
    training rows.

    Defaults are 30 epochs of Adam at 0.01 with a cosine: they come closest to gradient boosting on tables of 100 to
    9,000 rows; more epochs overfit the small ones.

    Args:
        path: a CSV, ARFF, Parquet or .xlsx file; see `read_columns`.
        targets: the m columns to predict, two or more.
        inputs: the columns to predict from; None takes all others.
        categorical: input columns that are categories though they are numbers.
        outliers: numbers, of inputs and targets, that lie further than this many interquartile ranges of the training
            rows from their quartiles count as missing; None takes all numbers as they are. A squared error, or a
            linear unit far outside of what it was trained on, is otherwise about a single wrong reading.
        hidden: widths of the hidden layers.
        batch_size: rows in a training batch.
        validation: share of the rows that validate.
        test: share of the rows that test.
        data_seed: decides which rows are in which split.
        sheet: of a spreadsheet, if it has several.

    Attributes:
        scale: of the targets.

    Raises:
        RequestError: the file, or a column, is not there, or cannot be used; the message names it.
    """

    ideal_point: Sequence[float] | None

    def __init__(
        self,
        path: str,
        targets: Sequence[str],
        inputs: Sequence[str] | None = None,
        categorical: Sequence[str] = (),
        outliers: float | None = None,
        hidden: Sequence[int] = (64, 64),
        batch_size: int = 64,
        validation: float = 0.1,
        test: float = 0.2,
        data_seed: int = 0,
        sheet: str | None = None,
    ) -> None:
        if not isinstance(targets, list | tuple) or len(targets) < 2:
            raise RequestError(f"targets: {targets!r} must be a list of two or more columns")
        for key, value in (("inputs", inputs), ("categorical", categorical)):
            if isinstance(value, str):
                raise RequestError(f"{key}: {value!r} must be a list of columns")
        check_range("batch_size", batch_size, 1, MOST_EXAMPLES)
        if any(width < 1 for width in hidden):
            raise RequestError(f"hidden {shown(hidden)} must be at least 1")
        if outliers is not None and not outliers > 0:
            raise RequestError(
                f"outliers is {outliers!r}, and must be a number of interquartile ranges above 0, or null"
            )
        file = data_file(path, "give the CSV, ARFF, Parquet or .xlsx file of the table")
        frame = read_columns(file, sheet=sheet)
        targets, categorical = [str(name) for name in targets], [str(name) for name in categorical]
        check_names("targets", targets, frame)
        inputs = [name for name in frame.columns if name not in targets] if inputs is None else [*map(str, inputs)]
        check_names("inputs", inputs, frame)
        check_names("categorical", categorical, frame)
        if both := [name for name in inputs if name in targets]:
            raise RequestError(f"inputs: {both[0]!r} is a target too")
        if unused := [name for name in categorical if name not in inputs]:
            raise RequestError(f"categorical: {unused[0]!r} is no input")
        frame = frame[[*inputs, *targets]].copy()
        frame[targets] = frame[targets].apply(_numbers)
        check_inputs(frame, inputs, categorical)
        frame, notices = usable_rows(frame, targets)
        rows = split_rows(len(frame), validation, test, data_seed)
        if outliers is not None:
            measured = [name for name in (*inputs, *targets) if name not in categorical]
            frame = without_outliers(frame, rows["train"], measured, outliers)
        encoded = Inputs(frame.iloc[rows["train"]], inputs, categorical)
        wanted = frame[targets].to_numpy(np.float64)
        for name, held in rows.items():
            if absent := [
                target for target, found in zip(targets, wanted[held].T, strict=True) if np.isnan(found).all()
            ]:
                called = "training" if name == "train" else name
                raise RequestError(f"targets: {absent[0]!r} has no value among the {called} rows")
        self.scale = Scale.of(wanted[rows["train"]])
        if not self.scale.varies.all():
            constant = targets[int(np.flatnonzero(~self.scale.varies)[0])]
            raise RequestError(f"targets: {constant!r} does not vary in the training rows: there is nothing to predict")
        low, high = np.nanmin(wanted[rows["train"]], axis=0), np.nanmax(wanted[rows["train"]], axis=0)
        far = dict(zip(targets, is_far(wanted, low, high).sum(0).tolist(), strict=True))
        self.notices = [
            *notices,
            *encoded.notices,
            *filter(
                None,
                (
                    told("inputs: numbers far outside of all training rows count as missing", encoded.far(frame)),
                    told("targets: numbers far outside of all training rows decide the errors; see outliers", far),
                ),
            ),
        ]
        scaled = self.scale.apply(wanted)
        self.splits = {
            name: (torch.from_numpy(encoded.apply(frame.iloc[held])), torch.from_numpy(scaled[held]).float())
            for name, held in rows.items()
        }
        self.objectives = tuple(targets)
        self.metrics = {f"mae/{name}": "lower" for name in targets}
        self.ideal_point = (0.0,) * len(targets)
        self.reference_point = (1.5,) * len(targets)
        self.defaults = cosine_defaults(len(rows["train"]), batch_size, epochs=30, lr=0.01)
        self._widths, self._batch_size = (len(encoded.names), *hidden), batch_size

    def model(self) -> nn.Module:
        """A newly initialized perceptron; it takes inputs to standardized targets, shape (batch, m)."""
        return perceptron(self._widths, len(self.objectives))

    def batches(self, seed: int) -> Iterator[Rows]:
        """An endless stream of training rows, drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.splits["train"]
        while True:
            drawn = torch.randint(len(x), (self._batch_size,), generator=generator)
            yield x[drawn], y[drawn]

    def evaluation_batches(self, split: Split) -> Iterable[Rows]:
        """The whole split as one batch, so that rows without a target do not weigh."""
        return [self.splits[split]]

    def losses(self, model: nn.Module, batch: Rows) -> Tensor:
        """The mean squared error of each target over the rows that have it, shape (m,); 0 where none has."""
        return _squared(model(batch[0]), batch[1])

    def measure(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
        """The mean absolute error of each target, in its own unit."""
        x, y = batch
        errors = _mean(_errors(model(x), y).abs(), y)
        own = errors.double().cpu() * torch.from_numpy(self.scale.deviation)
        return dict(zip(self.metrics, own, strict=True))

    def shared(self, model: nn.Module) -> set[str]:
        """All parameters but the last layer's, of which each row is one target's alone."""
        last = f"{len(cast(nn.Sequential, model)) - 1}."
        return {name for name, _ in model.named_parameters() if not name.startswith(last)}

    def representation(self, model: nn.Module, batch: Rows) -> Tensor:
        """What the last layer, of which each target has an output, is given: shape (batch, last of hidden)."""
        features: Tensor = cast(nn.Sequential, model)[:-1](batch[0])
        return features

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Rows) -> Tensor:
        """The losses, shape (m,), from what the last layer is given."""
        return _squared(cast(nn.Sequential, model)[-1](representation), batch[1])

    def example_input(self) -> Tensor:
        """Two rows of the validation split."""
        return self.splits["validation"][0][:1].expand(2, -1)


def _errors(predicted: Tensor, targets: Tensor) -> Tensor:
    """Predictions less targets, 0 where the target is missing; its NaN must reach no gradient, not even times 0."""
    return (predicted - targets.nan_to_num()) * ~targets.isnan()


def _squared(predicted: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of each target, shape (m,)."""
    return _mean(_errors(predicted, targets).square(), targets)


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    """The mean of each column, shape (m,), over the rows whose target is there."""
    return values.sum(0) / (~targets.isnan()).sum(0).clamp(min=1)


def _numbers(column: pd.Series) -> pd.Series:
    """A target as numbers, also where the file has them as categories.

    Raises:
        RequestError: it is not all numbers.
    """
    there = column.dropna()
    try:
        if not is_number(column):
            if not there.map(lambda value: isinstance(value, str)).all():
                raise ValueError(f"it has {there.iloc[0]!r}")
            column = pd.to_numeric(column.astype(object))
        return column.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise RequestError(f"targets: {column.name!r} is not a column of numbers: {error}") from error
