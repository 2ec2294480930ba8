"""What is not finite, or beyond all proportion, planted in every place between real actors: no other row has it.

PYTHONPATH=tests python tests/distributed/test_bad_rows_in_all_places.py    prints the table of what left, and when
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from running import run_in
from toy_problems import KINDS, config

from popmtl.distributed import driver
from popmtl.runs.results import load_state

STEPS, EVERY, N = (0, 24, 49), 10, 8
TRANSPORTS = ("local", "coordinator", "shared_memory", "collective")
WAYS = {
    "consensus": {"order": "consensus"},
    "adapt_then_combine": {"order": "adapt_then_combine"},
    "with moments": {"order": "adapt_then_combine", "mix_moments": True},
}


def planted(transport, transfer):
    return config(
        1 if transport == "local" else 3,
        problem={"name": "toy_problems:PlantedInAllPlaces", "steps": list(STEPS), "subproblems": N},
        population={"subproblems": N},
        transfer={"transport": transport, "schedule": "constant", "strength": 0.4, **transfer},
        train={"steps": 50, "evaluate_every": EVERY, "dtype": "float32", "execution": "loop"},
    )


def left(folder):
    """The steps at which each subproblem left, by its number."""
    found = {}
    for event in folder.events():
        if event["kind"] == "left":
            found.setdefault(event["subproblem"], []).append(event["step"])
    return found


def expected(kind, way):
    """At once where it would be mixed, or is seen by the loss; else before others start again from the row."""
    at_evaluation = kind == "buffer" or (kind == "moment" and way != "with moments")
    return [(step // EVERY + 1) * EVERY - 1 if at_evaluation else step for step in STEPS]


SELECTED = {("local", "consensus"), ("shared_memory", "consensus"), ("coordinator", "with moments")}
SELECTED |= {("collective", "adapt_then_combine")}


@pytest.mark.parametrize(
    ("transport", "way"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SELECTED else pytest.mark.endurance)
        for case in itertools.product(TRANSPORTS, WAYS)
    ],
)
def test_no_other_row_has_anything_of_it(run, transport, way):
    _, folder, report = run(planted(transport, WAYS[way]))
    assert left(folder) == {i + 1: expected(kind, way) for i, kind in enumerate(KINDS)}
    check(folder, report)


def check(folder, report):
    """All models are there and finite, and of the size of those of rows that nothing was planted in."""
    assert all(np.isfinite(record["validation"]).all() for record in folder.metrics())
    assert all(np.isfinite(member.objectives).all() for member in report.front.members)
    assert [member.reseeds for member in report.front.members] == [3 if 1 <= i <= len(KINDS) else 0 for i in range(N)]
    for i in range(N):
        for value in load_state(folder.pareto / "models" / str(i) / "model.safetensors").values():
            assert value.isfinite().all()
            assert value.abs().max() < 100


def main():
    print(f"planted at steps {STEPS}; evaluated every {EVERY}; each cell: the steps at which the row left\n")
    print(f"| transport | way | {' | '.join(KINDS)} | other rows |")
    print("|" + "---|" * (len(KINDS) + 3))
    with driver.cluster(None, cpus=4) as nodes, tempfile.TemporaryDirectory() as storage:
        for transport in TRANSPORTS:
            for way, transfer in WAYS.items():
                name = f"{transport}-{way.replace(' ', '-')}"
                _, folder, report = run_in(Path(storage), name, nodes, planted(transport, transfer))
                check(folder, report)
                cells = [", ".join(map(str, left(folder).get(i + 1, []))) for i in range(len(KINDS))]
                print(f"| {transport} | {way} | {' | '.join(cells)} | none left, all finite |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
