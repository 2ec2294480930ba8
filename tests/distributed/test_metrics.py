"""What Prometheus finds of a run where it scrapes Ray, and what Ray shows of its actors."""

import logging
import os
import signal
import urllib.request
from collections import defaultdict

import numpy as np
import pytest
import ray
from kill_trials import workers
from prometheus_client.parser import text_string_to_metric_families
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData
from running import run_in
from toy_problems import config

from popmtl.distributed import metrics
from popmtl.distributed.metrics import (
    BYTES_SENT,
    EXCHANGE_SECONDS,
    FIGURES,
    GENERATION,
    HYPERVOLUME,
    RECOVERIES,
    STEP,
    STEP_SECONDS,
    STEPS,
    STEPS_PER_SECOND,
    Metrics,
)

RUN, RUN_TAG = "a run: of ünits", r"a run: of \xfcnits"


class Scraper:
    """Scrapes Ray as Prometheus would, whenever a run shows its progress.

    Attributes:
        last: the latest value of each series, by the figure's name and the rank; of several processes, the sum.
        scrapes: the names found, with the stage of the run at the time.
    """

    def __init__(self, run):
        (node,) = ray.nodes()
        self.url = "http://{NodeManagerAddress}:{MetricsExportPort}/metrics".format(**node)
        self.run, self.last, self.scrapes = run, {}, []

    def __call__(self, progress):
        with urllib.request.urlopen(self.url, timeout=10) as page:
            families = [*text_string_to_metric_families(page.read().decode())]
        found = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith("ray_popmtl_") and sample.labels["run"] == self.run:
                found[sample.name, sample.labels.get("rank")] += sample.value
        self.last.update(found)
        self.scrapes.append((progress.stage, {name for name, _ in found}))

    def of(self, figure, rank=None):
        return self.last[figure.exported, rank]


@pytest.fixture(scope="module")
def watched(ray_of_four, tmp_path_factory):
    """A run, what was scraped while it went on, and the actors that Ray showed in its middle."""
    scrape, actors = Scraper(RUN_TAG), {}

    def show(progress):
        scrape(progress)
        if progress.stage == "writing results":
            for entry in state._connect_and_get_accessor().get_actor_table(None, "ALIVE"):
                actor = ActorTableData.FromString(entry)
                actors[actor.repr_name] = actor.name

    data = config(2, transfer={"transport": "collective"}) | {"problem": {"name": "toy_problems:Lingers"}}
    plan, folder, _ = run_in(tmp_path_factory.mktemp("runs"), RUN, ray_of_four, data, show)
    return plan, folder, scrape, actors


def test_prometheus_finds_the_figures_of_a_run(watched):
    _plan, folder, scrape, _ = watched
    assert scrape.of(HYPERVOLUME) == folder.metrics()[-1]["hypervolume"]
    assert [scrape.of(figure) for figure in (STEP, GENERATION, RECOVERIES)] == [50, 0, 0]
    assert scrape.of(STEPS_PER_SECOND) > 0


def test_prometheus_finds_the_figures_of_each_actor(watched):
    plan, folder, scrape, _ = watched
    mixed = np.count_nonzero(plan.factors)
    assert 0 < mixed < 50
    assert plan.bytes_sent_per_step() > 0
    for rank, each in enumerate(plan.bytes_sent_by_each()):
        assert scrape.of(STEPS, str(rank)) == 50
        assert scrape.of(BYTES_SENT, str(rank)) == mixed * each
        assert 0 < scrape.of(EXCHANGE_SECONDS, str(rank)) < scrape.of(STEP_SECONDS, str(rank))
    trained = next(event for event in folder.events() if event["kind"] == "trained")
    assert max(scrape.of(STEP_SECONDS, rank) for rank in "01") <= trained["step_seconds"] + 1e-9
    assert 0 < trained["exchange_seconds"] < trained["step_seconds"]


def test_figures_that_do_not_change_stay(watched):
    """Ray forgets a gauge within two seconds here, if it is not told again."""
    *_, scrape, _ = watched
    names = {figure.exported for figure in FIGURES}
    assert any(found == names for stage, found in scrape.scrapes if stage == "writing results")


def test_actors_show_the_run_and_what_they_hold(watched):
    *_, actors = watched
    named = {name: repr_name for repr_name, name in actors.items() if RUN in repr_name}
    assert sorted(named.values()) == [
        f"{RUN} actor 0 (subproblems 0 to 1)",
        f"{RUN} actor 1 (subproblems 2 to 3)",
        f"{RUN} coordinator",
    ]
    assert all(name.startswith(f"popmtl {RUN} ") for name in named)


@pytest.mark.endurance
def test_a_killed_actor_is_a_recovery_and_a_generation(run):
    scrape, killed = Scraper("run-1"), []

    def show(progress):
        scrape(progress)
        if progress.stage == "training" and progress.step and not killed:
            killed.append(workers(os.getpid(), "SubproblemActor")[0])
            os.kill(killed[0], signal.SIGKILL)

    data = config(2, train={"steps": 1500, "evaluate_every": 1500}) | {"problem": {"name": "toy_problems:Lingers"}}
    _, folder, _ = run(data, show)
    assert killed
    assert [event["generation"] for event in folder.events() if event["kind"] == "ready"] == [0, 1]
    assert [scrape.of(figure) for figure in (RECOVERIES, GENERATION, STEP)] == [1, 1, 1500]
    assert scrape.of(HYPERVOLUME) == folder.metrics()[-1]["hypervolume"]


def test_figures_that_cannot_be_told_are_logged_once_and_stop_nothing(monkeypatch, caplog):
    def refuse(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(metrics, "Gauge", refuse)
    told = Metrics("run")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            told.tell(STEP, step)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
