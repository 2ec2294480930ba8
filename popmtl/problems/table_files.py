"""Tables as files: CSV with its variants, ARFF, Parquet and spreadsheets, read into named columns."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from popmtl.errors import RequestError

TEXT = (".csv", ".tsv", ".tab", ".data", ".test", ".txt")
MISSING = ["?", "#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"]
"""What stands for no value, besides an empty field and the words that pandas knows, such as NA and null."""

_QUOTED = r"""'((?:\\.|[^'\\])*)'|"((?:\\.|[^"\\])*)\""""
_VALUE = re.compile(rf"\s*(?:{_QUOTED}|([^,]*?))\s*(?:,|$)")
_ENTRY = re.compile(rf"\s*(\d+)\s+(?:{_QUOTED}|([^,]*?))\s*(?:,|$)")
_ATTRIBUTE = re.compile(rf"@attribute\s+(?:{_QUOTED}|([^\s{{]+))\s*(\{{.*\}}|\w+)", re.IGNORECASE)
_GROUPS = re.compile(r"[-+]?[1-9]\d{0,2}([.,]\d{3})+")
_COMMA = re.compile(r"[-+]?(\d+|[1-9]\d{0,2}(\.\d{3})+)(,\d+)?([eE][-+]?\d+)?|[-+]?,\d+([eE][-+]?\d+)?")


def read_columns(path: str, names: Sequence[str] = (), sheet: str | None = None) -> pd.DataFrame:
    """The rows of a file, with columns of numbers, of text, or of what else the file holds.

    Text is UTF-8, UTF-16 with its mark, or Latin-1; fields are separated by comma, semicolon, tab or bar. Names and
    text lose the spaces around them. A column whose text is all numbers is one of numbers, with decimal commas too
    where commas do not separate. Names that stand twice are kept, as `check_names` refuses them, and so are empty rows.

    Args:
        path: one that ends in .csv, .tsv, .tab, .data, .test or .txt, perhaps with .gz, or in .arff, .parquet, .xlsx.
        names: of the columns of a text file that may have no line of names; then lines that begin with a bar are
            comments, as in the archives of UCI.
        sheet: of a spreadsheet; None takes the only one that is not empty.

    Raises:
        RequestError: there is no such file, or it is none of these, or not as it should be; naming the column, if it is
            about one.
    """
    kind = path.lower().removesuffix(".gz")
    try:
        if kind.endswith(".parquet"):
            frame = pd.read_parquet(path)
        elif kind.endswith(".arff"):
            frame = _read_arff(_text(path))
        elif kind.endswith(".xlsx"):
            frame = _read_spreadsheet(path, sheet)
        elif kind.endswith(TEXT):
            frame = _read_text(_text(path), names)
        else:
            raise RequestError(
                f"path {path}: give a file that ends in .csv, .tsv, .txt or .data, perhaps with .gz, or in .arff, "
                ".parquet or .xlsx"
            )
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"path {path}: {error.strerror or error}") from error
    except (ValueError, NotImplementedError, csv.Error, zipfile.BadZipFile, KeyError) as error:
        raise RequestError(f"path {path}: cannot be read: {error}") from error
    except ImportError as error:
        raise RequestError(
            f"path {path}: a spreadsheet needs openpyxl: pip install 'popmtl[xlsx]' ({error})"
        ) from error
    return _tidy(frame)


def _text(path: str) -> str:
    raw = Path(path).read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        raw = gzip.decompress(raw)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16")
    elif b"\0" in raw[:4096]:
        raise ValueError("it is not text, or UTF-16 without a byte order mark")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")  # each byte a character: what differs stays different
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_text(text: str, names: Sequence[str]) -> pd.DataFrame:
    separator = None
    if told := re.match(r"sep=(.)\n", text):  # Excel's first line
        separator, text = told[1], text[told.end() :]
    if names:
        text = re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)
    text = text.strip("\n")
    separator = separator or max(",;\t|", key=lambda one: _fits(text, one))
    records = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    header = next(records, [])
    rest = "".join(text.splitlines(keepends=True)[records.line_num :])  # a quoted name may span lines
    first = list(itertools.islice(records, 20))
    if names and not {name.strip() for name in header} & set(names):
        first, header, rest = [header, *first], list(names), text
    width = max(len(header), *(len(record) for record in first)) if first else len(header)
    frame = pd.read_csv(
        io.StringIO(rest),
        sep=separator,
        header=None,
        names=range(width),  # the names themselves may stand twice
        index_col=False,
        skip_blank_lines=False,
        skipinitialspace=True,
        na_values=MISSING,
        dtype=str,
    )
    for extra in range(len(header), width):
        if frame[extra].notna().any():
            raise ValueError(f"rows have {width} fields, and the first line has {len(header)} names")
    frame = frame.iloc[:, : len(header)].apply(_stripped)
    return (frame if separator == "," else _without_decimal_commas(frame, header)).set_axis(header, axis=1)


def _without_decimal_commas(frame: pd.DataFrame, header: Sequence[str]) -> pd.DataFrame:
    """Numbers with a point where the file has a comma, and without separators of thousands.

    Raises:
        RequestError: a column could be read in two ways.
    """
    numbers = {}
    for i in frame:
        values = frame[i].dropna().unique().tolist()
        if values and all(_COMMA.fullmatch(value) for value in values):
            numbers[i] = values
    commas = [(i, value) for i, values in numbers.items() for value in values if "," in value]
    if not commas:
        return frame
    if all(_GROUPS.fullmatch(value) for _, value in commas):
        i, value = commas[0]
        raise RequestError(f"column {header[i]!r}: {value!r} could be two numbers; write it without the comma")
    for i in frame:
        if (
            i not in numbers
            and frame[i].str.contains(".", regex=False, na=False).any()
            and _numeric(frame[i]) is not None
        ):
            raise RequestError(
                f"column {header[i]!r} has decimal points, and {header[commas[0][0]]!r} has decimal commas; write all "
                "of the file's numbers in one way"
            )
    plain = {i: frame[i].str.replace(".", "", regex=False).str.replace(",", ".", regex=False) for i in numbers}
    return pd.concat([plain.get(i, frame[i]) for i in frame], axis=1)


def _fits(text: str, separator: str) -> tuple[bool, float, int]:
    """How well a separator does for the first rows: more than one column, and as many in all of them."""
    head = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        widths = [len(record) for record in itertools.islice(head, 20) if record]
    except csv.Error:
        return False, 0.0, 0
    if not widths or widths[0] < 2:
        return False, 0.0, 0
    return True, widths.count(widths[0]) / len(widths), widths[0]


def _read_spreadsheet(path: str, sheet: str | None) -> pd.DataFrame:
    """The sheet's rows; the first one that is not empty has the names."""
    sheets = pd.read_excel(path, sheet_name=None, header=None, dtype=object, na_values=MISSING)
    filled = {str(name): frame for name, frame in sheets.items() if frame.notna().any(axis=None)}
    if sheet is None and len(filled) > 1:
        raise RequestError(
            f"path {path}: has the sheets {', '.join(map(repr, filled))}; name one as `sheet`, or keep one alone"
        )
    if sheet is not None and sheet not in filled:
        raise RequestError(f"sheet: {path} has no sheet {sheet!r} with rows; it has {', '.join(map(repr, filled))}")
    if not filled:
        raise ValueError("it is empty")
    frame = filled[sheet] if sheet is not None else next(iter(filled.values()))
    begin = int(np.flatnonzero(frame.notna().any(axis=1))[0])
    names = ["" if pd.isna(name) else str(name) for name in frame.iloc[begin]]
    return frame.iloc[begin + 1 :].set_axis(names, axis=1).reset_index(drop=True)


def _read_arff(text: str) -> pd.DataFrame:
    """Dense and sparse ARFF; a value that a sparse row leaves out is 0, or the first of its column's categories."""
    names: list[str] = []
    kinds: list[list[str] | str] = []
    rows: list[list[str | None]] = []
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    for _, line in lines:
        if line.lower().startswith("@data"):
            break
        if not line.lower().startswith("@attribute"):
            continue
        found = _ATTRIBUTE.match(line)
        if not found:
            raise ValueError(f"not an attribute: {line!r}")
        names.append(_plain(found.groups()[:3]))
        kind = found[4]
        kinds.append([_plain(value) for value in _values(kind[1:-1])] if kind.startswith("{") else kind.lower())
        if kinds[-1] not in ("numeric", "real", "integer", "string", "date") and isinstance(kinds[-1], str):
            raise ValueError(f"column {names[-1]!r} is of the type {kind}, which is no number, text, date or category")
    absent = [
        kind[0] if isinstance(kind, list) else ("0" if kind in ("numeric", "real", "integer") else None)
        for kind in kinds
    ]
    for number, line in lines:
        if not line or line.startswith("%"):
            continue
        if line.startswith("{"):
            if not line.endswith("}") or line.count("{") > 1:
                raise ValueError(f"line {number} is not one sparse row without a weight")
            row = list(absent)
            given = set()
            for index, *value in _ENTRY.findall(line[1:-1]):
                if int(index) >= len(names):
                    raise ValueError(f"line {number} has a value {index}, and there are {len(names)} columns from 0")
                row[int(index)] = _given(value)
                given.add(int(index))
            for column, kind in enumerate(kinds):
                if kind in ("string", "date") and column not in given:
                    raise ValueError(f"line {number}, a sparse row, leaves out column {names[column]!r}, a {kind}")
        else:
            row = [_given(value) for value in _values(line)]
            if len(row) != len(names):
                raise ValueError(f"line {number} has {len(row)} values, and there are {len(names)} columns")
        rows.append(row)
    if not rows:
        raise ValueError("it has no rows")
    columns = []
    for name, kind, values in zip(names, kinds, zip(*rows, strict=True), strict=True):
        column = pd.Series(values, dtype=object)
        if isinstance(kind, list):
            if unknown := set(column.dropna()) - set(kind):
                raise ValueError(f"column {name!r} has {sorted(unknown)[0]!r}, which is none of its categories")
            column = column.astype(pd.CategoricalDtype(list(dict.fromkeys(kind))))
        elif kind not in ("string", "date"):
            numbers = _numeric(column)
            if numbers is None:
                raise ValueError(f"column {name!r} is {kind}, and has values that are no numbers")
            column = numbers
        columns.append(column)
    return pd.concat(columns, axis=1).set_axis(names, axis=1)


def _values(text: str) -> list[tuple[str, ...]]:
    if "'" in text or '"' in text:
        return _VALUE.findall(text)[:-1]  # the last is what stands behind the end
    return [("", "", value.strip()) for value in text.split(",")]


def _plain(groups: Sequence[str | None]) -> str:
    """The text of a value that is in single quotes, double quotes or none."""
    single, double, bare = (group or "" for group in groups)
    return re.sub(r"\\(.)", r"\1", single or double) or bare


def _given(groups: Sequence[str]) -> str | None:
    return None if groups[2] in ("?", "") and not (groups[0] or groups[1]) else _plain(groups)


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Names and text without spaces around them, numbers as numpy has them; no columns without name and value."""
    made = []
    for i, given in enumerate(frame.columns):
        column, name = _stripped(frame.iloc[:, i]), str(given).strip()
        if not name and column.isna().all():
            continue
        numbers = _numeric(column)
        made.append((column if numbers is None else numbers).rename(name or f"Unnamed: {i}"))
    return pd.concat(made, axis=1).reset_index(drop=True) if made else frame.iloc[:, :0]


def _is_text(column: pd.Series) -> bool:
    return bool(pd.api.types.is_object_dtype(column.dtype) or pd.api.types.is_string_dtype(column.dtype))


def _stripped(column: pd.Series) -> pd.Series:
    """A column of text without spaces around it, and what then stands for no value; others as they are."""
    if isinstance(column.dtype, pd.CategoricalDtype) or not _is_text(column):
        return column

    def strip(value: Any) -> Any:
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if not isinstance(value, str):
            return value
        value = value.strip()
        return None if value == "" or value in MISSING else value

    return column.astype(object).map(strip).where(column.notna(), None)


def _numeric(column: pd.Series) -> pd.Series | None:
    """A column as numpy's numbers, if all its values are numbers, or truth values, or text of either; else None."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype) or pd.api.types.is_complex_dtype(kind):
        return None
    if pd.api.types.is_timedelta64_dtype(kind):
        return column.dt.total_seconds()
    if pd.api.types.is_numeric_dtype(kind):
        return column if isinstance(kind, np.dtype) else pd.Series(column.to_numpy(np.float64, na_value=np.nan))
    if not _is_text(column):
        return None
    there = column.dropna()
    found = pd.api.types.infer_dtype(there)
    if found == "string" and there.str.lower().isin(["true", "false"]).all():
        column, found = there.str.lower().eq("true").reindex(column.index), "boolean"
    if found in ("boolean", "decimal", "empty"):
        return column.astype(object).where(column.notna(), np.nan).astype(np.float64)
    if found not in ("string", "integer", "floating", "mixed-integer-float"):
        return None
    try:
        return pd.to_numeric(column)
    except ValueError:
        return None
