"""The dashboard asks Prometheus for what there is."""

import json
import re
from pathlib import Path

import pytest

from popmtl.distributed.metrics import FIGURES

DASHBOARD = Path(__file__).resolve().parents[1] / "cluster" / "grafana.json"


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(DASHBOARD.read_text())


def names(query):
    return set(re.findall(r"\bray_\w+", query))


def test_every_figure_has_a_panel_and_no_panel_asks_for_another(dashboard):
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set().union(*map(names, queries)) == {figure.exported for figure in FIGURES}
    for query in queries:
        assert query.count('{run=~"$run"}') == len(re.findall(r"\bray_\w+", query)), f"of all runs: {query}"


def test_figures_of_actors_are_shown_by_rank_and_those_that_count_as_rates(dashboard):
    figures = {figure.exported: figure for figure in FIGURES}
    for target in (target for panel in dashboard["panels"] for target in panel["targets"]):
        for name in names(target["expr"]):
            assert ("{{rank}}" in target["legendFormat"]) == figures[name].by_rank
            assert (f"rate({name}{{" in target["expr"]) == figures[name].counts


def test_the_runs_to_choose_from_are_those_of_a_figure(dashboard):
    (run,) = [variable for variable in dashboard["templating"]["list"] if variable["name"] == "run"]
    assert names(run["query"]["query"]) <= {figure.exported for figure in FIGURES}
    assert run["query"]["query"].endswith(", run)")


def test_panels_do_not_overlap(dashboard):
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
