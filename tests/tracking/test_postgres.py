"""A server on PostgreSQL does what one on SQLite does."""

import multiprocessing
import os
import pwd
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from glob import glob
from pathlib import Path

import pytest
import torch
from finished_runs import STEPS, log_run
from mlflow import MlflowClient, pyfunc
from mlflow_server import Server, free_port
from tracked_problems import TwoHeadsModel

FOUND = shutil.which("pg_ctl") or next(iter(sorted(glob("/usr/lib/postgresql/*/bin/pg_ctl"), reverse=True)), None)


def account():
    """PostgreSQL refuses root: another account then, or None for one's own."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody", "daemon") if name in names)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The URI of a database of a PostgreSQL server that listens on this machine alone."""
    if FOUND is None:
        pytest.skip("PostgreSQL is not installed (README names the packages)")
    pytest.importorskip("psycopg2")
    folder, user, port = tmp_path_factory.mktemp("postgres"), account(), free_port()
    if user:
        for place in (folder, *folder.parents[:2]):
            place.chmod(0o755)
        shutil.chown(folder, user)
    bin_folder = Path(os.path.realpath(FOUND)).parent

    def call(*command):
        done = subprocess.run(command, cwd=folder, user=user, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    call(str(bin_folder / "initdb"), "-D", data, "-U", "popmtl", "--auth=trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    call(str(bin_folder / "pg_ctl"), "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://popmtl@127.0.0.1:{port}/postgres"
    finally:
        call(str(bin_folder / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="module")
def uri(database, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), database) as server:
        yield server.uri


@pytest.mark.slow
def test_two_runs_at_once_lose_nothing_and_the_front_is_browsed_and_served_from_there(uri, tmp_path):
    torch.manual_seed(0)
    trained = [TwoHeadsModel().eval() for _ in range(3)]
    names = ("one", "two")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        runs = [processes.submit(log_run, tmp_path, name, uri, trained) for name in names]
        ended = {name: run.result(timeout=300) for name, run in zip(names, runs, strict=True)}
    client = MlflowClient(uri)
    for name in names:
        messages, location = ended[name]
        assert messages == []
        run = client.get_run(location.run_id)
        assert (run.info.run_name, run.info.status) == (name, "FINISHED")
        points = client.get_metric_history(location.run_id, "hypervolume")
        assert [(point.step, point.value) for point in points] == [(t, t / 1000) for t in range(100, STEPS + 1, 100)]
        members = client.search_runs([location.experiment_id], f"tags.`mlflow.parentRunId` = '{location.run_id}'")
        assert len(members) == 3
        better = "metrics.`objective/left` < 0.4"
        found = client.search_logged_models([location.experiment_id], better)
        assert sorted(model.name for model in found) == ["member-000", "member-000"]  # of either run
        assert "knee" in run.data.tags["mlflow.note.content"]
    assert {str(version.version) for version in client.search_model_versions("name = 'digits'")} == set("12345678")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        x = torch.randn(5, 4)
        picked = pyfunc.load_model("models:/digits@front").predict(x.numpy(), params={"preference": [1.0, 0.0]})
        torch.testing.assert_close(torch.tensor(picked), trained[0](x), atol=1e-6, rtol=1e-6)
