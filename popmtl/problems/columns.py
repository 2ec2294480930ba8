"""Columns of a file as numbers that a network can take, by what the training rows alone tell."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from popmtl.errors import RequestError, nearest

CONSTANT = 1e-7
"""A column whose standard deviation is no more than this share of its largest magnitude does not vary: what is left may
be rounding, of float32 for instance."""

FAR = 10.0
"""Times the range of the training rows: a number further outside of it tells a model nothing but that it is far."""


def usable_rows(frame: pd.DataFrame, targets: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows that have a value, and one of the targets, with infinities as missing values; and what was left out.

    Raises:
        RequestError: no row is left.
    """
    numbers = [name for name in frame.columns if pd.api.types.is_float_dtype(frame[name].dtype)]
    infinite = {name: int(np.isinf(frame[name]).sum()) for name in numbers}
    frame = frame.copy()
    frame[numbers] = frame[numbers].replace([np.inf, -np.inf], np.nan)
    notices = [told("infinite values count as missing", infinite)]
    for what, columns in (("empty", list(frame.columns)), ("without any target", list(targets))):
        left = frame.dropna(how="all", subset=columns)
        if len(left) < len(frame):
            notices.append(f"{len(frame) - len(left)} of {len(frame)} rows are {what}, and were dropped")
        frame = left
    if frame.empty:
        raise RequestError(f"no row has a value for {', '.join(map(repr, targets))}")
    return frame.reset_index(drop=True), [notice for notice in notices if notice]


def told(what: str, counts: Mapping[str, int]) -> str:
    """What was found in columns, with the number of values in each; nothing where nothing was."""
    found = [f"{name!r} ({count})" for name, count in counts.items() if count]
    return f"{what}: {listed(found)}" if found else ""


def listed(names: Sequence[str]) -> str:
    """The first few of names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 6 else ""
    return ", ".join(names[:5] if more else names) + more


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of columns; a column that does not vary, see `CONSTANT`, has the deviation 1.

    Attributes:
        varies: which columns do.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    varies: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Scale:
        """That of columns, shape (rows, columns), each with a value; those that are missing do not count."""
        largest = np.nanmax(np.abs(values), axis=0, initial=np.finfo(np.float64).tiny)
        deviation = np.nanstd(values / largest, axis=0)  # the squares of large numbers would overflow
        varies = deviation > CONSTANT
        mean = np.nanmean(values / largest, axis=0) * largest
        return cls(mean, np.where(varies, deviation * largest, 1.0), varies)

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
    frame = frame.copy()
    frame[columns] = values.where((values >= low - reach) & (values <= high + reach))
    return frame


class Inputs:
    """How columns become inputs: numbers scaled, categories one-hot.

    A missing number is the mean, and says that it was missing in a column of its own if numbers were missing in
    training; a category that training has not seen, or that is missing, is none of those that it has. A number that
    lies further from those of the training rows than `FAR` times their range counts as missing. Columns that do not
    vary in the training rows are left out.

    Args:
        training: the rows to learn from.
        columns: to take.
        categorical: which of them are categories, though they may look like numbers. Text is in any case.

    Attributes:
        names: of the inputs.
        notices: what is allowed, and may yet be a mistake.

    Raises:
        RequestError: a column would be too many categories, or none varies.
    """

    def __init__(self, training: pd.DataFrame, columns: Sequence[str], categorical: Sequence[str] = ()) -> None:
        def is_category(name: str) -> bool:
            return name in categorical or not is_number(training[name])

        seen = {name: _seen(training[name]) for name in columns if is_category(name)}
        there = [name for name in columns if training[name].notna().any()]
        numbers = [name for name in there if name not in seen]
        scale = Scale.of(training[numbers].to_numpy(np.float64))
        varying = {name: bool(varies) for name, varies in zip(numbers, scale.varies, strict=True)}
        varying |= {
            name: len(found) > 1 or training[name].isna().any() for name, found in seen.items() if name in there
        }
        self.categories = {name: found for name, found in seen.items() if varying.get(name)}
        self.numbers = [name for name in numbers if varying[name]]
        if not (self.categories or self.numbers):
            raise RequestError(f"inputs: no column varies in the training rows: {listed([*map(repr, columns)])}")
        values = training[self.numbers].to_numpy(np.float64)
        self.scale = Scale.of(values)
        self.missing = np.flatnonzero(np.isnan(values).any(0))
        self._low, self._high = np.nanmin(values, axis=0, initial=np.inf), np.nanmax(values, axis=0, initial=-np.inf)
        self.names = [
            *self.numbers,
            *(f"{self.numbers[i]} is missing" for i in self.missing),
            *(f"{name}={category}" for name, found in self.categories.items() for category in found),
        ]
        left_out = {
            "have no value": [name for name in columns if name not in there],
            "do not vary": [name for name, varies in varying.items() if not varies],
        }
        self.notices = [
            f"inputs: columns that {what} in the training rows are left out: {listed([*map(repr, names)])}"
            for what, names in left_out.items()
            if names
        ]
        found = [self._about_category(training[name]) for name in self.categories if name not in categorical]
        self.notices += [notice for notice in found if notice]
        self.notices += [
            f"inputs: column {name!r} has another whole number in each row, as an id has; leave it out if it is one"
            for name in self.numbers
            if _is_id(training[name])
        ]

    def _about_category(self, column: pd.Series) -> str:
        """What to say of a column that makes more categories than a model can learn about, or of one of dates."""
        count = len(self.categories[str(column.name)])
        if count > MOST_CATEGORIES:
            raise RequestError(
                f"inputs: column {column.name!r} would be {count} categories, more than {MOST_CATEGORIES}; leave it out"
            )
        if _is_date(column):
            kind = "dates, which were"
        elif count > 20 and count > len(column) / 5:
            kind = "text, as ids are, which was"
        else:
            return ""
        return f"inputs: column {column.name!r} is of {kind} taken as {count} categories; leave it out, or give numbers"

    def apply(self, rows: pd.DataFrame) -> NDArray[np.float32]:
        """The inputs of rows, shape (rows, len(names))."""
        values = rows[self.numbers].to_numpy(np.float64)
        values = self.scale.apply(np.where(self._is_far(values), np.nan, values))
        absent = np.isnan(values)
        parts = [np.where(absent, 0.0, values), absent[:, self.missing]]
        for name, seen in self.categories.items():
            parts.append(rows[name].to_numpy(object)[:, None] == np.array(seen, dtype=object)[None])
        return np.concatenate(parts, axis=1).astype(np.float32)

    def far(self, rows: pd.DataFrame) -> dict[str, int]:
        """How many numbers of each column count as missing since they are far from all of the training rows."""
        counts = self._is_far(rows[self.numbers].to_numpy(np.float64)).sum(0)
        return {name: int(count) for name, count in zip(self.numbers, counts, strict=True)}

    def _is_far(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        return is_far(values, self._low, self._high)


def is_far(values: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which numbers lie further than `FAR` ranges outside of a range."""
    reach = FAR * (high - low)
    far: NDArray[np.bool_] = (values < low - reach) | (values > high + reach)
    return far


MOST_CATEGORIES = 10_000
"""Of a column: each is an input of its own, for all rows."""

_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}\b.*|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})\b.*"
    r"|\d{1,2}[- ][a-z]{3,9}\.?[- ]\d{2,4}\b.*|[a-z]{3,9}\.? \d{1,2},? \d{4}\b.*",
    re.IGNORECASE,
)
_LIKE_NUMBER = re.compile(r"[-+]?[\d.,]*\d([eE][-+]?\d+)?")


def is_number(column: pd.Series) -> bool:
    """Whether a column is one of real numbers."""
    kind = column.dtype
    return bool(pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_complex_dtype(kind))


def _is_id(column: pd.Series) -> bool:
    values = column.dropna()
    whole = (values % 1 == 0) & (values.abs() < 1e15)  # all floats above are whole
    return len(values) >= 20 and values.is_unique and bool(whole.all())


def _is_date(column: pd.Series) -> bool:
    values = column.dropna()
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        return True
    return all(isinstance(value, datetime.date) or _DATE.fullmatch(str(value)) for value in values.unique())


def _seen(column: pd.Series) -> list[object]:
    return sorted(column.dropna().unique().tolist(), key=str)


def check_inputs(frame: pd.DataFrame, columns: Sequence[str], categorical: Sequence[str] = ()) -> None:
    """Raises a RequestError for a column that is neither numbers nor categories, by all rows of the file.

    A column of which half the values or more are numbers is neither, if nobody said that it is of categories.
    """
    for name in columns:
        column = frame[name]
        if is_number(column):
            continue
        if pd.api.types.is_complex_dtype(column.dtype):
            raise RequestError(f"inputs: column {name!r} is of complex numbers")
        try:
            values = column.dropna().unique().tolist()
        except TypeError as error:
            raise RequestError(f"inputs: column {name!r} has values of more than one part: {error}") from error
        if name in categorical or isinstance(column.dtype, pd.CategoricalDtype) or _is_date(column):
            continue
        other = [value for value in values if not _LIKE_NUMBER.fullmatch(str(value))]
        if len(other) <= len(values) / 2:
            example = f"not {other[0]!r}" if other else f"{values[0]!r} is no plain one"
            raise RequestError(
                f"inputs: column {name!r} has {len(values) - len(other)} numbers among {len(values)} different "
                f"values, but {example}; mend it, name it in categorical, or leave it out"
            )


def cosine_defaults(rows: int, batch_size: int, epochs: int, lr: float) -> dict[str, Any]:
    """A config's `train` for perceptrons on tables: Adam with a cosine, for so many epochs of the training rows.

    At least 100 steps, at most 5,000: small tables are soon learned by heart, and large ones need no whole epochs.
    """
    return {
        "train": {
            "steps": min(5000, max(100, round(epochs * rows / batch_size))),
            "optimizer": {"name": "Adam", "lr": lr},
            "lr_schedule": {"name": "CosineAnnealingLR", "T_max": "steps"},
        }
    }


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
    """Raises a RequestError for a column that the file does not have, or has twice, or that is named twice."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"{key}: {name!r} is named twice")
        if (frame.columns == name).sum() > 1:
            raise RequestError(f"{key}: the file has {(frame.columns == name).sum()} columns {name!r}; rename them")
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
