"""Columns of a file as numbers that a network can take, by what the training rows alone tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from popmtl.errors import RequestError, nearest


def read_columns(path: str) -> pd.DataFrame:
    """The rows of a CSV (or .csv.gz), ARFF or Parquet file; a field that is empty, NA or ? is missing.

    Raises:
        RequestError: there is no such file, or it is none of these.
    """
    name = path.lower()
    try:
        if name.endswith(".parquet"):
            return pd.read_parquet(path)
        if name.endswith(".arff"):
            return _read_arff(path)
        if name.endswith((".csv", ".csv.gz", ".data", ".test", ".txt")):
            return pd.read_csv(path, na_values=["?", " ?"], skipinitialspace=True)
    except OSError as error:
        raise RequestError(f"path {path}: {error.strerror or error}") from error
    except (ValueError, NotImplementedError) as error:
        raise RequestError(f"path {path}: cannot be read: {error}") from error
    raise RequestError(f"path {path}: give a file that ends in .csv, .csv.gz, .arff or .parquet")


def _read_arff(path: str) -> pd.DataFrame:
    from scipy.io import arff

    # scipy's, which takes no URLs and gives nominal values as bytes.
    rows, _ = arff.loadarff(path)
    frame = pd.DataFrame(rows)
    for column in frame.select_dtypes(object).columns:
        frame[column] = frame[column].str.decode("utf-8").replace("?", np.nan)
    return frame


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of columns; a column that does not vary has the deviation 1."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Scale:
        """That of columns, shape (rows, columns); missing values do not count.

        Raises:
            ValueError: a column has no value at all.
        """
        there = ~np.isnan(values)
        if not there.any(0).all():
            raise ValueError(int(np.flatnonzero(~there.any(0))[0]))
        deviation = np.nanstd(values, axis=0)
        return cls(np.nanmean(values, axis=0), np.where(deviation > 0, deviation, 1.0))

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Columns of mean 0 and deviation 1, where values are those it was taken of; what is missing stays so."""
        return (values - self.mean) / self.deviation


def without_outliers(
    frame: pd.DataFrame, training: NDArray[np.intp], columns: Sequence[str], ranges: float
) -> pd.DataFrame:
    """The rows, with the impossible readings in columns of numbers made missing ones.

    Args:
        frame: the rows.
        training: which of them tell what is possible.
        columns: to look at; those of text stay as they are, and those whose interquartile range is 0.
        ranges: a number is impossible if it lies further than this many interquartile ranges from the quartiles.
    """
    columns = [name for name in columns if pd.api.types.is_numeric_dtype(frame[name].dtype)]
    values = frame[columns].astype(np.float64)
    low, high = (values.iloc[training].quantile(share) for share in (0.25, 0.75))
    reach = (ranges * (high - low)).where(high > low, np.inf)
    return frame.assign(**values.where((values >= low - reach) & (values <= high + reach)))


class Inputs:
    """How columns become inputs: numbers scaled, categories one-hot.

    A missing number is the mean, and says that it was missing in a column of its own if numbers were missing in
    training; a category that training has not seen, or that is missing, is none of those that it has.

    Args:
        training: the rows to learn from.
        columns: to take.
        categorical: which of them are categories, though they may look like numbers. Text is in any case.

    Attributes:
        names: of the inputs.
    """

    def __init__(self, training: pd.DataFrame, columns: Sequence[str], categorical: Sequence[str] = ()) -> None:
        def is_category(name: str) -> bool:
            return name in categorical or not pd.api.types.is_numeric_dtype(training[name].dtype)

        self.categories = {name: _seen(training[name]) for name in columns if is_category(name)}
        self.numbers = [name for name in columns if name not in self.categories]
        values = training[self.numbers].to_numpy(np.float64)
        try:
            self.scale = Scale.of(values)
        except ValueError as error:
            name = self.numbers[error.args[0]]
            raise RequestError(f"inputs: column {name!r} has no value among the training rows") from error
        self.missing = np.flatnonzero(np.isnan(values).any(0))
        self.names = [
            *self.numbers,
            *(f"{self.numbers[i]} is missing" for i in self.missing),
            *(f"{name}={category}" for name, seen in self.categories.items() for category in seen),
        ]

    def apply(self, rows: pd.DataFrame) -> NDArray[np.float32]:
        """The inputs of rows, shape (rows, len(names))."""
        values = self.scale.apply(rows[self.numbers].to_numpy(np.float64))
        absent = np.isnan(values)
        parts = [np.where(absent, 0.0, values), absent[:, self.missing]]
        for name, seen in self.categories.items():
            parts.append(rows[name].to_numpy(object)[:, None] == np.array(seen, dtype=object)[None])
        return np.concatenate(parts, axis=1).astype(np.float32)


def _seen(column: pd.Series) -> list[object]:
    return sorted(column.dropna().unique().tolist(), key=str)


def split_rows(rows: int, validation: float, test: float, seed: int) -> dict[str, NDArray[np.intp]]:
    """The rows of "train", "validation" and "test", as scikit-learn's `train_test_split` draws them, called twice.

    Args:
        rows: how many there are.
        validation: share of them.
        test: share of them, which is taken away first.
        seed: of both draws.

    Raises:
        RequestError: a split would be empty.
    """
    try:
        rest, asked = train_test_split(np.arange(rows), test_size=test, random_state=seed)
        train, held = train_test_split(rest, test_size=validation / (1 - test), random_state=seed)
    except (ValueError, ZeroDivisionError) as error:
        raise RequestError(f"validation {validation} and test {test} of {rows} rows: {error}") from error
    return {"train": train, "validation": held, "test": asked}


def check_names(key: str, names: Sequence[str], frame: pd.DataFrame) -> None:
    """Raises a RequestError for a column that the file does not have, with one that is close to it."""
    for name in names:
        if name not in frame.columns:
            hint = nearest(name, frame.columns) or f"; it has {', '.join(map(repr, frame.columns))}"
            raise RequestError(f"{key}: the file has no column {name!r}{hint}")


def data_file(path: str, what: str) -> str:
    """The path, once there is a file.

    Raises:
        RequestError: there is none; what to give.
    """
    if not Path(path).is_file():
        raise RequestError(f"path {path}: there is no such file; {what}")
    return path
