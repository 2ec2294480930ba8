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
from popmtl.problems.columns import Inputs, Scale, check_names, data_file, read_columns, split_rows, without_outliers

Rows = tuple[Tensor, Tensor]
"""Inputs, shape (batch, inputs), and standardized targets, (batch, m), NaN where missing."""


class Table(Problem):
    """Predicts several columns of a table from others, by one multilayer perceptron with an output for each.

    An objective is the mean squared error of a target, in standard deviations of the training rows: 1 is what their
    mean would get there. Rows without a value for a target count for the other targets. Whatever is fitted to the data,
    scales and categories, is fitted to the training rows.

    Args:
        path: a CSV, ARFF or Parquet file.
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
    ) -> None:
        if not isinstance(targets, list | tuple) or len(targets) < 2:
            raise RequestError(f"targets: {targets!r} must be a list of two or more columns")
        if batch_size < 1 or any(width < 1 for width in hidden):
            raise RequestError(f"batch_size {batch_size!r} and hidden {hidden!r} must be at least 1")
        if outliers is not None and not outliers > 0:
            raise RequestError(
                f"outliers is {outliers!r}, and must be a number of interquartile ranges above 0, or null"
            )
        frame = read_columns(data_file(path, "give the CSV, ARFF or Parquet file of the table"))
        frame.columns = frame.columns.map(str)
        check_names("targets", targets, frame)
        if inputs is None:
            inputs = [name for name in frame.columns if name not in targets]
        check_names("inputs", [*inputs, *categorical], frame)
        if both := [name for name in inputs if name in targets]:
            raise RequestError(f"inputs: {both[0]!r} is a target too")
        rows = split_rows(len(frame), validation, test, data_seed)
        frame = frame.assign(**frame[list(targets)].apply(_numbers))
        if outliers is not None:
            measured = [name for name in (*inputs, *targets) if name not in categorical]
            frame = without_outliers(frame, rows["train"], measured, outliers)
        encoded = Inputs(frame.iloc[rows["train"]], inputs, categorical)
        wanted = frame[list(targets)].to_numpy(np.float64)
        try:
            self.scale = Scale.of(wanted[rows["train"]])
        except ValueError as error:
            raise RequestError(f"targets: {targets[error.args[0]]!r} has no value among the training rows") from error
        scaled = self.scale.apply(wanted)
        self.splits = {
            name: (torch.from_numpy(encoded.apply(frame.iloc[held])), torch.from_numpy(scaled[held]).float())
            for name, held in rows.items()
        }
        self.objectives = tuple(targets)
        self.metrics = {f"mae/{name}": "lower" for name in targets}
        self.ideal_point = (0.0,) * len(targets)
        self.reference_point = (1.5,) * len(targets)
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
    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError) as error:
        raise RequestError(f"targets: {column.name!r} is not a column of numbers: {error}") from error
