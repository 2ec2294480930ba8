"""YAML is read as plain data, within bounds, and what readers of YAML differ about is refused."""

import math
import os
import socket
import time

import pytest

from popmtl.yaml_files import DEEPEST, MOST_BYTES, MOST_VALUES, read_yaml, read_yaml_file, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("+1", 1),
        ("-12", -12),
        ("0", 0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("~", None),
        ("", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("2001-12-14", "2001-12-14"),
        ("2001-99-99", "2001-99-99"),
        ("1e3x", "1e3x"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("=", "="),
        ("'0100'", "0100"),
        ("!!str 5", "5"),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_words_and_numbers_are_read_as_yaml_1_2_has_them(text, value):
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


def test_not_a_number_is_read_as_one():
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0100", "line 1: 0100 begins with 0: write 100"),
        ("a:\n- -007", "line 2: -007 begins with 0: write -7"),
        ("10:00", "line 1: 10:00 is a number to some readers of YAML, and not to others"),
        ("1_000", "1_000 is a number to some"),
        ("1_0.5e3", "1_0.5e3 is a number to some"),
        ("0x1F", "0x1F is a number to some"),
        ("-0b11", "-0b11 is a number to some"),
        ("0o17", "0o17 is a number to some"),
        ("1e999", "larger than any number"),
        ("9" * 5000, "a number of 5,000 digits; the longest have 40"),
        ("{a: 1, b: {c: 1, c: 2}}", "the key 'c' stands there twice"),
        ("a: 1\n'a': 2", "line 2: the key 'a' stands there twice"),
        ("1: 2", "the key 1 is no word"),
        ("true: 2", "the key true is no word"),
        ("~: 2", "the key ~ is no word"),
        ("? [a]\n: b", "a key must be a word"),
        ("a: {<<: {b: 1}}", "merge keys"),
        ("!!binary YQ==", "the tag !!binary is not read"),
        ("!!set {a}", "the tag !!set is not read"),
        ("!!timestamp 2001-12-14", "the tag !!timestamp is not read"),
        ("!!python/object/apply:os.abort []", "the tag !!python/object/apply:os.abort is not read"),
        ("!own 1", "the tag !own is not read"),
        ("a: &a [*a]", r"\*a stands for nothing that is complete before it"),
        ("*b", r"\*b stands for nothing"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ('"\\0"', "control character"),
        ('"\\e[31m"', "control character"),
        ('"\\ud800"', "is not YAML: line 1"),
        ("a: \udc80", "is not UTF-8"),
        (b"\xff\xfea\x00", "is not UTF-8"),
        ("a: 1".encode("utf-16-le"), "is not YAML"),
        ("[1", "is not YAML: line 2: did not find expected"),
        ("a: b: c", "is not YAML: line 1"),
        ("[" * 10_000, f"more than {DEEPEST} levels"),
        ("- " * 10_000, f"more than {DEEPEST} levels"),
        ("{a: " * 10_000, f"more than {DEEPEST} levels"),
        ("\n".join(f"k{n}: &a{n} {'[' * 20}{f'*a{n - 1}' if n else 1}{']' * 20}" for n in range(60)), "more than"),
        ("x" * (MOST_BYTES + 1), "is larger than"),
        ("[" + "1," * (MOST_VALUES + 1) + "]", f"more than {MOST_VALUES:,} values"),
        (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]", "more than"),
    ],
)
def test_the_rest_is_refused_by_one_line(text, says):
    began = time.process_time()
    with pytest.raises(ValueError, match=says) as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert time.process_time() - began < 2


def test_aliases_count_as_what_they_stand_for():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(ValueError, match="aliases counted"):
        read_yaml(bomb)


def test_what_an_alias_gives_can_be_changed_alone():
    read = read_yaml("a: &a {b: 1}\nc: *a")
    read["a"]["b"] = 2
    assert read["c"] == {"b": 1}


AWKWARD = {
    "words": ["on", "null", "true", "0100", "10:00", "1_0", "1e5", "0o17", ".5", "5.", "-1e3", "=", "<<", "~", ""],
    "numbers": [1, -2, 0.1, 1e-5, 1e22, 5e-324, math.inf],
    "1e3": {"é\u202e": None, ".nan": True, "a: b": "x\ny", "2001-12-14": "2001-12-14", "- a": "#"},
}


def test_what_is_written_is_read_again():
    assert read_yaml(to_yaml(AWKWARD)) == AWKWARD


def test_only_a_file_is_read(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path, kind in (("/dev/zero", "a device"), (pipe, "a pipe"), (folder, "a folder")):
        with pytest.raises(ValueError, match=f"is {kind}, and must be a file"):
            read_yaml_file(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(ValueError, match="is a socket"):
            read_yaml_file(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        read_yaml_file(tmp_path / "absent")
    (tmp_path / "c.yaml").write_bytes(b"x" * (MOST_BYTES + 5))
    with pytest.raises(ValueError, match="is larger than"):
        read_yaml_file(tmp_path / "c.yaml")
