"""What a run says while it goes on."""

import io

from rich.console import Console

from popmtl.display import ProgressLine
from popmtl.distributed.progress import NOTICES, Progress


def test_each_notice_is_shown_once_and_of_many_at_once_the_last():
    console = Console(file=io.StringIO(), width=200)
    now = Progress("training", 0, 10).noticing("left: 1").noticing("left: 2")
    with ProgressLine(console) as line:
        line.show(now)
        line.show(now)
        line.show(now := now.noticing("reseeded: 3"))
        for n in range(NOTICES + 50):
            now = now.noticing(f"left: {100 + n}")
        line.show(now)
    assert len(now.notices) == NOTICES, "what the driver is sent twice a second stays small"
    shown = console.file.getvalue().splitlines()
    assert [text for text in shown if text.endswith((" 1", " 2", " 3"))] == ["left: 1", "left: 2", "reseeded: 3"]
    assert "50 more are in events.jsonl" in shown
    assert shown[-1] == f"left: {100 + NOTICES + 49}"
    assert "left: 149" not in shown
