"""Files of tables: what the same columns look like in each format and dialect, and what no one can read."""

import datetime
import decimal
import gzip
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from popmtl.errors import RequestError
from popmtl.problems.table_files import read_columns

SIZES, COLOURS, PRICES = [1.5, 2.25, np.nan, 4.0], ["red", "deep blue", "red", None], [10, 20, 30, 40]
PLAIN = "size,colour,price\n1.5,red,10\n2.25,deep blue,20\n,red,30\n4,,40\n"


@pytest.fixture
def read(tmp_path):
    """Writes text or bytes as a file and reads its columns."""

    def read(content, name="table.csv", **options):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_columns(str(tmp_path / name), **options)

    return read


def same(frame, sizes=SIZES):
    assert list(frame.columns) == ["size", "colour", "price"]
    np.testing.assert_array_equal(frame["size"].to_numpy(float), sizes)
    assert [None if pd.isna(v) else v for v in frame["colour"]] == COLOURS
    assert frame["price"].tolist() == PRICES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", PLAIN.encode()),
        ("windows.csv", PLAIN.replace("\n", "\r\n").encode()),
        ("old_mac.csv", PLAIN.replace("\n", "\r").encode()),
        ("with_mark.csv", PLAIN.encode("utf-8-sig")),
        ("utf16.csv", PLAIN.encode("utf-16")),
        ("packed.csv.gz", gzip.compress(PLAIN.encode())),
        ("semicolons.csv", PLAIN.replace(",", ";").encode()),
        ("excel.csv", ("sep=;\n" + PLAIN.replace(",", ";")).encode()),
        ("decimal_commas.csv", PLAIN.replace(",", ";").replace(".", ",").encode()),
        ("tabs.tsv", PLAIN.replace(",", "\t").encode()),
        ("bars.txt", PLAIN.replace(",", "|").encode()),
        ("spaced.csv", PLAIN.replace(",", " , ").encode()),
        ("quoted.csv", b'"size","colour","price"\n"1.5","red","10"\n2.25,"deep blue",20\n"","red",30\n4,"?",40\n'),
        ("ends_in_separators.csv", PLAIN.replace("\n", ",\n").encode()),
        ("upper.CSV", PLAIN.encode()),
    ],
)
def test_dialects_of_csv_say_the_same(read, name, content):
    same(read(content, name))


def test_latin_1_is_read_where_it_is_no_utf_8(read):
    frame = read("größe;farbe\n1;weiß\n2;weiss\n".encode("latin-1"))
    assert list(frame.columns) == ["größe", "farbe"]
    assert frame["farbe"].tolist() == ["weiß", "weiss"]


def test_decimal_commas_go_with_points_between_thousands_and_dates_are_left_alone(read):
    frame = read("a;b;day\n1.234,5;1.000;01.02.2020\n0,25;20.500;03.02.2020\n")
    assert frame["a"].tolist() == [1234.5, 0.25]
    assert frame["b"].tolist() == [1000, 20500]
    assert frame["day"].tolist() == ["01.02.2020", "03.02.2020"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a;b\n1,234;2\n5,678;3\n", "column 'a': '1,234' could be two numbers"),
        ("a;b\n1,5;0.5\n2,5;0.7\n", "column 'b' has decimal points, and 'a' has decimal commas"),
        ("a,b\n1,2,3\n4,5,6\n", "rows have 3 fields, and the first line has 2 names"),
        ("a,b\n" + "1,2\n" * 30 + "1,2,3\n", "cannot be read: .*Expected 2 fields"),
        ("", "cannot be read"),
        (b"a\0b\0,\0c\0", "not text"),
        (b"\x89PNG\0\0", "not text"),
    ],
)
def test_text_that_could_mean_something_else_is_refused(read, content, message):
    with pytest.raises(RequestError, match=message):
        read(content)


def test_names_may_stand_twice_and_fields_may_have_none(read):
    assert list(read("x, x ,y\n1,2,3\n").columns) == ["x", "x", "y"]  # pandas alone makes one of them x.1
    assert list(read(",x,\n0,2,\n1,3,\n").columns) == ["Unnamed: 0", "x"]


def test_truth_values_are_numbers_and_mixed_columns_stay_text(read):
    frame = read("t,u,m,i\nTrue,yes,1,inf\nFALSE,no,a,1e400\n,yes,2,-Infinity\n")
    np.testing.assert_array_equal(frame["t"], [1, 0, np.nan])
    assert frame["u"].tolist() == ["yes", "no", "yes"]
    assert frame["m"].tolist() == ["1", "a", "2"]
    assert np.isinf(frame["i"]).all()


def test_a_column_keeps_one_type_however_long_it_is(read):
    frame = read("a,b\n" + "1,2\n" * 300_000 + "x,2\n")  # pandas reads in pieces, and makes numbers of the first ones
    assert set(frame["a"]) == {"1", "x"}


ARFF = """% a comment
@RELATION 'houses of 2020'

@Attribute 'size of it' REAL   % as Weka writes it
@attribute "it's" {red, 'deep blue',"x,y"}
@attribute count INTEGER
@attribute note string
@attribute day date "yyyy-MM-dd"
@DATA
% another
1.5, red, 2.5, 'a, b', '2020-01-02'
?,'deep blue',3,"it is",2020-01-03
1e3 ,"x,y", 0, ?, ?
"""


def test_arff_has_quotes_comments_and_dates(read):
    frame = read(ARFF, "t.arff")
    assert list(frame.columns) == ["size of it", "it's", "count", "note", "day"]
    np.testing.assert_array_equal(frame["size of it"], [1.5, np.nan, 1000])
    assert frame["it's"].tolist() == ["red", "deep blue", "x,y"]
    assert frame["count"].tolist() == [2.5, 3, 0]  # Weka's integers are numbers like others
    assert frame["note"].tolist()[:2] == ["a, b", "it is"]
    assert frame["day"].tolist()[:2] == ["2020-01-02", "2020-01-03"]
    assert frame[["note", "day"]].iloc[2].isna().all()


def test_what_sparse_arff_leaves_out_is_0_or_the_first_category(read):
    head = "@relation r\n@attribute a numeric\n@attribute b numeric\n@attribute c numeric\n@attribute d {x, a, 'b c'}\n"
    frame = read(head + "@data\n{0 1.5, 3 a}\n{}\n{1 ?,2 -2,3 'b c'}\n{ 3 ? }\n", "t.arff")
    np.testing.assert_array_equal(frame[["a", "b", "c"]], [[1.5, 0, 0], [0, 0, 0], [0, np.nan, -2], [0, 0, 0]])
    assert [None if pd.isna(v) else v for v in frame["d"]] == ["a", "x", "b c", None]


@pytest.mark.parametrize(
    ("attributes", "data", "message"),
    [
        ("@attribute bag relational\n@attribute f numeric\n@end bag", "1", "column 'bag' is of the type relational"),
        ("@attribute a numeric", "x", "column 'a' is numeric, and has values that are no numbers"),
        ("@attribute a {x,y}", "z", "column 'a' has 'z', which is none of its categories"),
        ("@attribute a numeric\n@attribute s string", "{0 1}", "leaves out column 's', a string"),
        ("@attribute a numeric", "{1 5}", "line 4 has a value 1, and there are 1 columns"),
        ("@attribute a numeric", "{0 5}, {2}", "line 4 is not one sparse row without a weight"),
        ("@attribute a numeric", "1,2", "line 4 has 2 values, and there are 1 columns"),
        ("@attribute a numeric", "", "no rows"),
    ],
)
def test_arff_that_cannot_be_read_names_the_column_or_the_line(read, attributes, data, message):
    with pytest.raises(RequestError, match=message):
        read(f"@relation r\n{attributes}\n@data\n{data}\n", "t.arff")


def test_parquet_has_types_of_its_own(tmp_path):
    days = [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2), None]
    table = pa.table(
        {
            "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")]),
            "whole": pa.array([1, None, 3], pa.int64()),
            "truth": pa.array([True, None, False]),
            "text": pa.array(["1", "2", None]),
            "code": pa.array(["a", "b", None]).dictionary_encode(),
            "bytes": pa.array([b"x", b"y", None]),
            "wait": pa.array([datetime.timedelta(minutes=1), None, datetime.timedelta(0)]),
            "day": pa.array(days),
            "parts": pa.array([[1, 2], [3], None]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    frame = read_columns(str(tmp_path / "t.parquet"))
    numbers = {"decimal": [1.5, np.nan, 2.25], "whole": [1, np.nan, 3], "truth": [1, np.nan, 0], "text": [1, 2, np.nan]}
    for name, values in (numbers | {"wait": [60, np.nan, 0]}).items():
        np.testing.assert_array_equal(frame[name].to_numpy(np.float64), values)
    assert frame["code"].tolist()[:2] == ["a", "b"]
    assert frame["bytes"].tolist()[:2] == ["x", "y"]
    assert frame["day"].tolist() == days
    nullable = pd.DataFrame({"n": pd.array([1, None, 3], "Int64"), "b": pd.array([True, None, False], "boolean")})
    nullable.to_parquet(tmp_path / "n.parquet")
    np.testing.assert_array_equal(read_columns(str(tmp_path / "n.parquet")), [[1, 1], [np.nan, np.nan], [3, 0]])


def test_spreadsheets_are_read_from_the_sheet_that_is_named(tmp_path):
    pytest.importorskip("openpyxl")
    path = str(tmp_path / "t.xlsx")
    table = pd.DataFrame({" size ": SIZES, "colour": COLOURS, "price": PRICES})
    with pd.ExcelWriter(path) as writer:
        table.to_excel(writer, sheet_name="houses", index=False, startrow=2)  # below empty rows
        pd.DataFrame().to_excel(writer, sheet_name="empty")
    same(read_columns(path))
    with pd.ExcelWriter(path) as writer:
        pd.DataFrame({"note": ["none"]}).to_excel(writer, sheet_name="notes", index=False)
        table.to_excel(writer, sheet_name="houses", index=False)
    same(read_columns(path, sheet="houses"))
    with pytest.raises(RequestError, match="has the sheets 'notes', 'houses'; name one as `sheet`"):
        read_columns(path)
    with pytest.raises(RequestError, match="no sheet 'house' with rows; it has 'notes', 'houses'"):
        read_columns(path, sheet="house")


def test_a_spreadsheet_without_openpyxl_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("openpyxl")
    pd.DataFrame({"a": [1]}).to_excel(tmp_path / "t.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(RequestError, match=r"t.xlsx: a spreadsheet needs openpyxl: pip install 'popmtl\[xlsx\]'"):
        read_columns(str(tmp_path / "t.xlsx"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "t.xls",
            "give a file that ends in .csv, .tsv, .txt or .data, perhaps with .gz, or in .arff, ",
        ),
        ("t.parquet", "cannot be read"),
        ("t.xlsx", "cannot be read"),
        ("t.csv.gz", "cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(read, name, message):
    with pytest.raises(RequestError, match=message):
        read(b"\0no", name)
