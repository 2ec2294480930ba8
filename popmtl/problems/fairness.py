"""Binary classification against its own unfairness towards a group: the COMPAS, credit-default and Adult tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from popmtl.errors import RequestError
from popmtl.method.problem import Direction, Problem, Split
from popmtl.models.perceptron import perceptron
from popmtl.problems.bounds import MOST_EXAMPLES, check_range
from popmtl.problems.columns import (
    Inputs,
    check_inputs,
    check_names,
    cosine_defaults,
    data_file,
    split_rows,
    told,
    usable_rows,
)
from popmtl.problems.table_files import read_columns
from popmtl.text import shown

Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs, shape (batch, inputs); labels, 0 or 1, and membership of the group, both of shape (batch,), as numbers."""

MEASURES = ("deo", "ddp")


@dataclass(frozen=True)
class Source:
    """Where a table's labels and groups are.

    Attributes:
        label: column of the labels.
        values: the values of it that are 0 and 1.
        groups: sensitive columns, each with the value that makes a row a member of the group.
        where: the original file is to be had.
        prepare: the rows and columns to use, of those that the file has.
        categorical: columns that are categories though they are numbers.
        names: of the columns, where the original file has no line of names.
    """

    label: str
    values: tuple[object, object]
    groups: dict[str, object]
    where: str
    prepare: Callable[[pd.DataFrame], pd.DataFrame]
    categorical: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def _compas(frame: pd.DataFrame) -> pd.DataFrame:
    """ProPublica's own selection of rows; hours in jail instead of the two moments."""
    columns = ["age", "c_charge_degree", "race", "age_cat", "score_text", "sex", "priors_count"]
    columns += ["days_b_screening_arrest", "decile_score", "is_recid", "two_year_recid", "c_jail_in", "c_jail_out"]
    check_names("path", columns, frame)
    near = frame["days_b_screening_arrest"].between(-30, 30)
    chosen = near & (frame["is_recid"] != -1) & (frame["c_charge_degree"] != "O") & frame["score_text"].notna()
    rows = frame.loc[chosen, columns].copy()
    stay = pd.to_datetime(rows.pop("c_jail_out")) - pd.to_datetime(rows.pop("c_jail_in"))
    return rows.assign(length_of_stay=np.floor(stay.dt.total_seconds() / 3600))


CREDIT = (
    *("LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE", "PAY_0"),
    *(f"PAY_{month}" for month in range(2, 7)),
    *(f"BILL_AMT{month}" for month in range(1, 7)),
    *(f"PAY_AMT{month}" for month in range(1, 7)),
    "default",
)
"""What archives call X1 to X23 and Y."""


def _credit(frame: pd.DataFrame) -> pd.DataFrame:
    """UCI's spreadsheet, whose second line may have the names, below a line of X1, X2 and so on, or none."""
    if "SEX" not in frame.columns:
        frame = frame.rename(columns=lambda name: name.upper())
        check_names("path", ["X2"], frame)
        if (frame["X2"] == "SEX").any():
            frame = frame.set_axis(frame.iloc[0].astype(str).tolist(), axis=1).iloc[1:].apply(pd.to_numeric)
        else:
            archived = [*(f"X{i}" for i in range(1, 24)), "Y"]
            check_names("path", archived, frame)
            frame = frame.rename(columns=dict(zip(archived, CREDIT, strict=True)))
    frame = frame.rename(columns={"default payment next month": "default", "default.payment.next.month": "default"})
    return frame.drop(columns=[name for name in frame.columns if name.upper() == "ID"])


ADULT = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)


def _adult(frame: pd.DataFrame) -> pd.DataFrame:
    """UCI's file; OpenML calls the label class, and the labels of adult.test end in a full stop."""
    frame = frame.rename(columns={"class": "income"})
    check_names("path", ["income"], frame)
    return frame.assign(income=frame["income"].astype(object).str.rstrip("."))


SOURCES = {
    "compas": Source(
        "two_year_recid",
        (0, 1),
        {"sex": "Female", "race": "African-American"},
        "compas-scores-two-years.csv of github.com/propublica/compas-analysis",
        _compas,
    ),
    "credit": Source(
        "default",
        (0, 1),
        {"SEX": 2},
        'UCI\'s "default of credit card clients", saved as CSV',
        _credit,
        ("SEX", "EDUCATION", "MARRIAGE"),
    ),
    "adult": Source(
        "income",
        ("<=50K", ">50K"),
        {"sex": "Female", "race": "Black"},
        "adult.data of UCI's Adult data set",
        _adult,
        names=ADULT,
    ),
}


class Fairness(Problem):
    """A classifier's cross-entropy against a smooth measure of its unfairness.

    Unfairness is the tanh relaxation of Padh, Antognini, Lejal Glaude, Faltings and Musat (2021), as
    github.com/ruchtem/cosmos takes it and published hypervolumes have it: with p the predicted probability,
    |Σ_{not of the group} tanh(c p) − Σ_{of the group} tanh(c p)| / n over the n rows of a batch, of positive label
    (deo: equal opportunity) or all (ddp: demographic parity). It compares sums and not rates: where one group is the
    larger, it is 0 at unequal rates. `per_group` divides each sum by its own number of rows instead.

    The sensitive column is no input. Metrics are of the decisions p > 1/2: accuracy, the differences of rates DEO and
    DDP, and what published hypervolumes take in place of the relaxation, the difference of counts over n.

    Args:
        data: "compas", "credit" or "adult".
        path: the original file.
        sensitive: the column that makes the group; None takes the first of those known.
        measure: "deo" or "ddp".
        sharpness: c.
        per_group: compares rates.
        hidden: widths of the hidden layers.
        batch_size: rows in a training batch.
        validation: share of the rows that validate.
        test: share of the rows that test.
        data_seed: decides which rows are in which split.

    Attributes:
        inputs: names of the model's inputs.

    Raises:
        RequestError: the file, or a column, is not there, or cannot be used; the message names it.
    """

    def __init__(
        self,
        data: str,
        path: str,
        sensitive: str | None = None,
        measure: str = "deo",
        sharpness: float = 1.0,
        per_group: bool = False,
        hidden: Sequence[int] = (60, 25),
        batch_size: int = 256,
        validation: float = 0.1,
        test: float = 0.2,
        data_seed: int = 0,
    ) -> None:
        if data not in SOURCES:
            raise RequestError(f"data is {data!r}, and must be one of: {', '.join(SOURCES)}")
        if measure not in MEASURES:
            raise RequestError(f"measure is {measure!r}, and must be one of: {', '.join(MEASURES)}")
        check_range("batch_size", batch_size, 1, MOST_EXAMPLES)
        if sharpness <= 0 or any(width < 1 for width in hidden):
            raise RequestError(f"sharpness {sharpness} and hidden {shown(hidden)} must be positive")
        source = SOURCES[data]
        file = read_columns(data_file(path, f"give {source.where}"), source.names)
        frame = source.prepare(file.dropna(how="all"))
        sensitive = sensitive or next(iter(source.groups))
        if sensitive not in source.groups:
            raise RequestError(f"sensitive is {sensitive!r}, and must be one of: {', '.join(source.groups)}")
        columns = [name for name in frame.columns if name not in (source.label, sensitive)]
        check_names("path", [source.label, sensitive, *columns], frame)
        check_inputs(frame, columns, source.categorical)
        frame, notices = usable_rows(frame, [source.label])
        if (known := frame[sensitive].notna()).sum() < len(frame):
            notices.append(f"{(~known).sum()} of {len(frame)} rows are without {sensitive}, and were dropped")
            frame = frame[known].reset_index(drop=True)
        if other := [value for value in frame[source.label].unique().tolist() if value not in source.values]:
            raise RequestError(
                f"path {path}: {source.label} is {other[0]!r}, and must be {source.values[0]} or {source.values[1]}"
            )
        labels = (frame[source.label] == source.values[1]).to_numpy()
        members = (frame[sensitive] == source.groups[sensitive]).to_numpy()
        if not (0 < labels.sum() < len(frame) and 0 < members.sum() < len(frame)):
            raise RequestError(f"path {path}: {source.label} or {sensitive} has one value only; is it {source.where}?")
        rows = split_rows(len(frame), validation, test, data_seed)
        encoded = Inputs(frame.iloc[rows["train"]], columns, [name for name in source.categorical if name in columns])
        far = told("inputs: numbers far outside of all training rows count as missing", encoded.far(frame))
        self.notices = [*notices, *encoded.notices, *([far] if far else [])]
        self.splits: dict[str, Rows] = {}
        for name, held in rows.items():
            arrays = (encoded.apply(frame.iloc[held]), labels[held], members[held])
            x, y, s = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
            self.splits[name] = (x, y, s)
        self.objectives = ("cross_entropy", measure)
        figures = ("decided_deo", "decided_ddp", f"counted_{measure}")
        self.metrics: dict[str, Direction] = {"accuracy": "higher", **dict.fromkeys(figures, "lower")}
        self.reference_point = (2.0, 2.0)
        self.ideal_point = (0.0, 0.0)
        self.inputs = encoded.names
        self.defaults = cosine_defaults(len(rows["train"]), batch_size, epochs=50, lr=1e-3)
        self._widths, self._batch_size = (len(encoded.names), *hidden), batch_size
        self._measure, self._sharpness, self._per_group = measure, sharpness, per_group

    def model(self) -> nn.Module:
        """A newly initialized perceptron; it takes inputs to a logit, shape (batch, 1)."""
        return perceptron(self._widths, 1)

    def batches(self, seed: int) -> Iterator[Rows]:
        """Batches of training rows, each row once an epoch, without end."""
        generator = torch.Generator().manual_seed(seed)
        x, y, s = self.splits["train"]
        while True:
            for drawn in torch.randperm(len(x), generator=generator).split(self._batch_size):
                yield x[drawn], y[drawn], s[drawn]

    def evaluation_batches(self, split: Split) -> Iterable[Rows]:
        """The whole split as one batch: a difference between groups is not the mean of those of parts."""
        return [self.splits[split]]

    def losses(self, model: nn.Module, batch: Rows) -> Tensor:
        """Cross-entropy and relaxed unfairness, shape (2,)."""
        return self.losses_at(model, self.representation(model, batch), batch)

    def representation(self, model: nn.Module, batch: Rows) -> Tensor:
        """The logits, shape (batch, 1): both losses are of them, so that no parameter is one loss's own."""
        logits: Tensor = model(batch[0])
        return logits

    def losses_at(self, model: nn.Module, representation: Tensor, batch: Rows) -> Tensor:
        """Cross-entropy and relaxed unfairness, shape (2,), from the logits."""
        _, y, s = batch
        logits = representation.squeeze(1)
        counted = self._counted(y)
        score = torch.tanh(self._sharpness * torch.sigmoid(logits))
        others, members = counted * (1 - s), counted * s
        if self._per_group:
            others, members = others / others.sum().clamp(min=1), members / members.sum().clamp(min=1)
        else:
            others, members = others / len(y), members / len(y)
        unfairness = ((others - members) * score).sum().abs()
        return torch.stack([functional.binary_cross_entropy_with_logits(logits, y), unfairness])

    def measure(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
        """Accuracy, the differences of the groups' rates of positive decisions, and that of their counts over n."""
        x, y, s = batch
        decided = (model(x).squeeze(1) > 0).to(y.dtype)

        def gap(counted: Tensor) -> Tensor:
            rates = [(decided * group).sum() / group.sum().clamp(min=1) for group in (counted * s, counted * (1 - s))]
            difference: Tensor = (rates[0] - rates[1]).abs()
            return difference

        right = (decided == y).double().mean()
        counts = (self._counted(y) * decided * (1 - 2 * s)).sum().abs() / len(y)
        return {
            "accuracy": right,
            "decided_deo": gap(y),
            "decided_ddp": gap(torch.ones_like(y)),
            f"counted_{self._measure}": counts,
        }

    def _counted(self, labels: Tensor) -> Tensor:
        """1 for the rows that the measure looks at."""
        return labels if self._measure == "deo" else torch.ones_like(labels)

    def example_input(self) -> Tensor:
        """Two rows of the validation split."""
        return self.splits["validation"][0][:1].expand(2, -1)
