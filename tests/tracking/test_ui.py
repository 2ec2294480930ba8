"""`popmtl ui`, as a user calls it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import asdict

import psutil
import pytest
import torch
from finished_runs import CONFIG, OBJECTIVES, STEPS, WEIGHTS, Settings, finished_folder
from mlflow_server import free_port
from tracked_problems import TwoHeadsModel

from popmtl.cli import main
from popmtl.runs.folder import RunFolder
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.outbox import Sent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        torch.manual_seed(0)
        folder, front = finished_folder(tmp_path_factory.mktemp("storage") / "runs", "one", [TwoHeadsModel()] * 3)
        sink = MlflowSink.open(Settings(), folder, CONFIG, OBJECTIVES, WEIGHTS, STEPS)
        sink.log_front(front, "none")
        assert sink.close("FINISHED", timeout=120) == []
        yield folder, sink


def ui(*arguments, cwd):
    command = [sys.executable, "-c", "import sys; from popmtl.cli import main; sys.exit(main())", "ui", *arguments]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def test_it_serves_on_this_machine_alone_prints_the_links_and_ends_with_ctrl_c(run):
    folder, sink = run
    port = free_port()
    process = ui(str(folder.path), "--port", str(port), cwd=folder.storage)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        base = f"http://127.0.0.1:{port}"
        place = f"/#/experiments/{sink.location.experiment_id}/runs"
        explorer = f"{place}/{sink.location.run_id}/artifacts/pareto/explorer.html"
        assert lines[0] == f"choose    {base}{explorer}?workflowType=machine_learning\n"
        assert re.match(rf"members   {base}{place}\?.*viewStateShareKey=popmtl-members", lines[1])
        assert lines[3] == "Ctrl-C ends the server\n"
        artifact = f"{base}/get-artifact?run_uuid={sink.location.run_id}&path=pareto/explorer.html"
        with urllib.request.urlopen(artifact, timeout=30) as page:
            assert b"<html" in page.read()
        listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
        assert {address.ip for address in listening} == {"127.0.0.1"}
    finally:
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))  # the server is gone


def test_a_port_that_is_taken_and_runs_that_are_not_there_are_refused(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        assert main(["ui", *arguments]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot be listened at" in refused(str(folder.path), "--port", str(port))
    assert "runs/none" in refused("runs/none")
    assert f"{tmp_path}/runs/mlflow.db: there is no tracking database" in refused()
    untracked = RunFolder.create(tmp_path, "untracked")
    untracked.write_config(CONFIG)
    assert "tracking was not enabled" in refused(str(untracked.path))


def test_a_run_on_a_server_needs_none(tmp_path, capsys):
    folder, _ = finished_folder(tmp_path, "served", [TwoHeadsModel()] * 3)
    opening = {"time": 1, "kind": "opening", "id": "i", "uri": "http://mlflow:5000", "experiment": "e", "parent": None}
    names = {"run_name": "served", "config_name": "c", "objectives": ["a"], "weights": [[1.0]], "artifacts": None}
    folder.append("tracking/outbox.jsonl", opening | names | {"params": {}, "changed": {}})
    sent = Sent(["http://mlflow:5000", "e", None], experiment_id="4", parent="abc")
    folder.write("tracking/sent.json", json.dumps(asdict(sent)).encode())
    assert main(["ui", str(folder.path), "--trust"]) == 0
    assert "choose    http://mlflow:5000/#/experiments/4/runs/abc/artifacts/pareto/" in capsys.readouterr().out
