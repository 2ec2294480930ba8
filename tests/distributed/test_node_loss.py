"""A node that is lost costs time and nothing else, with room for its actor elsewhere and without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kill_trials
import pytest


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_and_ends_the_same(tmp_path):
    # In a process of its own: this one may be connected to another Ray.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, kill_trials.__file__, "--node", "--keep", str(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [clean.get("PYTHONPATH")])])
    ended = subprocess.run(command, env=clean | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    if "no cluster of several nodes can be started here" in ended.stderr:
        pytest.skip(ended.stderr.splitlines()[-1])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # Ray, too, prints to the standard output that a node is lost.
    replaced, fewer = (line for line in ended.stdout.splitlines() if line.startswith("a node lost"))
    assert "one with room" in replaced
    assert "actors 2, then 2; models differ by 0.0e+00" in replaced
    assert "actors 2, then 1; " in fewer
    assert "fewer actors" in fewer
    assert all(float(re.search(r"first step after it: ([\d.]+) s", line)[1]) < 120 for line in (replaced, fewer))
