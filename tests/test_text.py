"""Text from outside neither controls a terminal nor forges a line, and a value in a message is short."""

import io
import json

from popmtl.display import Console, _table
from popmtl.text import printable, shown

HOSTILE = "a\x1b[31m\r\n\u202eb\x07\x85\u2028\udc80[red]\U000e0001"
ESCAPED = r"a\u001b[31m\r\n\u202eb\u0007\u0085\u2028\udc80[red]\udb40\udc01"


def test_what_is_not_printable_is_escaped():
    assert printable(HOSTILE) == ESCAPED
    assert printable("Größe\u00a0日本 → é") == "Größe\u00a0日本 → é"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_json_stays_the_same_json():
    data = {"a\u202e": "\x85\U000e0001", "b": ["é"]}
    text = printable(json.dumps(data, ensure_ascii=False, indent=1), keep="\n")
    assert json.loads(text) == data
    assert text.replace("\n", "").isprintable()


def test_tables_and_lines_show_it_escaped_and_without_markup():
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=False)
    console.print(f"run {HOSTILE}", soft_wrap=True)
    table = _table()
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    assert file.getvalue().count(ESCAPED) == 3
    assert all(line.isprintable() for line in file.getvalue().split("\n"))


def test_values_are_cut():
    for value in ("x" * 10_000, 10**5000, -(10**9999), ["a" * 300] * 10, "\u202e" * 50, b"\0" * 500):
        assert len(shown(value)) < 150
        assert shown(value).isprintable()
