"""Storage while a run goes on: that every actor shares it, and what a full disk does."""

import os
import subprocess
import sys
from contextlib import suppress

import apart
import pytest
import ray
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed import driver
from popmtl.distributed.plan import make_plan
from popmtl.errors import RunError
from popmtl.runs.checkpoint import checkpoints
from popmtl.runs.folder import RunFolder


@pytest.mark.slow
def test_an_actor_that_does_not_share_the_storage_is_named_with_its_host(run, tmp_path, monkeypatch):
    tries = [sys.executable, "-c", f"import apart; apart.cover({str(tmp_path)!r})"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if subprocess.run(tries, env=environment, capture_output=True).returncode:
        pytest.skip("no mounting here")
    monkeypatch.setattr(driver, "_Coordinator", ray.remote(apart.Coordinator))
    says = (
        rf"^storage {tmp_path}/runs: actor 1 on host [\d.]+ does not see there what the coordinator writes .*; "
        "use a path that all nodes share, or a URL"
    )
    with pytest.raises(RunError, match=says):
        run(config(2))
    folder = RunFolder(tmp_path / "runs" / "run-1")
    assert [event["kind"] for event in folder.events()] == ["started", "failed"], "it is not tried again"
    left = [name for name in os.listdir(folder.path) if not name.startswith(".coordinator")]
    assert sorted(left) == ["config.yaml", "events.jsonl", "origin.json", "problem"], "the proof leaves nothing"


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_no_lines(ray_of_four, small_disk):
    """It is full after the first checkpoint, and has room again after the first that fails."""
    train, checkpoint = {"steps": 4000, "evaluate_every": 250}, {"every_steps": 250}
    data = {**config(2, train=train, checkpoint=checkpoint), "tracking": {"enabled": False}}
    folder = RunFolder.create(small_disk, "run")
    filler, full_at = small_disk / "filler", []

    def show(progress):
        if not full_at and checkpoints(folder):
            full_at.append(progress.step)
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
        elif filler.exists() and progress.step >= full_at[0] + 750:
            filler.unlink()

    plan = make_plan(Config.model_validate(data), [{**node, "GPU": 0.0} for node in ray_of_four])
    folder.write_config(plan.config.resolved(), new=True)
    report = driver.run(plan, folder.path, "test", show)
    kinds = [event["kind"] for event in folder.events()]
    assert kinds.index("checkpoint") < kinds.index("checkpoint failed") < len(kinds) - kinds[::-1].index("checkpoint")
    assert kinds[-1] == "finished"
    (failed, *_) = [event for event in folder.events() if event["kind"] == "checkpoint failed"]
    assert "No space left on device" in failed["error"]
    assert [record["step"] for record in folder.metrics()] == list(range(0, 4001, 250))
    assert folder.front() == report.front
    assert report.unwritten == []
