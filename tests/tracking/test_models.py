"""Logged models, loaded where nothing is but what their requirements name."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import fresh_process
import mlflow
import numpy as np
import pytest
import torch
from finished_runs import OBJECTIVES, STEPS, WEIGHTS, Settings, finished_folder
from mlflow import MlflowClient
from mlflow.models import Model
from mlflow_server import free_port
from tracked_problems import BranchingModel, TwoHeadsModel

from popmtl.method.front import pick
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.models import Models, code_of

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
PREFERENCES = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [5.0, 4.9]]


WITH_CODE = pytest.param(BranchingModel, marks=pytest.mark.slow, id="with its code")


@pytest.fixture(scope="module", params=[pytest.param(TwoHeadsModel, id="exported"), WITH_CODE])
def front(request, tmp_path_factory):
    """A logged front of models that export, and of ones that do not."""
    storage = tmp_path_factory.mktemp("storage")
    torch.manual_seed(0)
    trained = [request.param() for _ in range(3)]
    for model in trained:
        model(torch.randn(16, 4))
    folder, front = finished_folder(storage, "run", trained, branching=request.param is BranchingModel)
    sink = MlflowSink.open(Settings(), folder, {}, OBJECTIVES, WEIGHTS, STEPS, config_name="two/heads")
    sink.log_front(front, "all")
    sink.close("FINISHED", timeout=240)
    client = MlflowClient(sink.uri)
    found = client.search_logged_models([sink.location.experiment_id])
    places = {model.name: Path(model.artifact_location.removeprefix("file://")) for model in found}
    return SimpleNamespace(
        client=client,
        places=places,
        models=[model.eval() for model in trained],
        front=front,
        uri=sink.uri,
        location=sink.location,
        ids={model.name: model.model_id for model in found},
    )


def outputs(place, params, tmp_path):
    """What a model of a folder predicts in a process of its own."""
    (tmp_path / "request.json").write_text(json.dumps({"inputs": X.tolist(), "params": params}))
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    environment = {**clean, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, fresh_process.__file__, str(place), "request.json", "outputs.npz"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "outputs.npz") as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(params))]


@pytest.mark.slow
def test_members_load_with_their_requirements_alone(front, tmp_path):
    for i in (0, 2):
        (got,) = outputs(front.places[f"member-00{i}"], [None], tmp_path)
        np.testing.assert_allclose(got, front.models[i](X).detach(), atol=1e-6)


def test_the_picker_loads_with_its_requirements_alone_and_chooses_as_pick_does(front, tmp_path):
    params = [{"preference": preference} for preference in PREFERENCES]
    params += [{"member": str(i)} for i in range(3)] + [{"member": "member-001", "preference": [1.0, 0.0]}, None]
    got = outputs(front.places["front"], params, tmp_path)
    F = [member.objectives for member in front.front.members]
    chosen = [*(pick(F, preference) for preference in PREFERENCES), 0, 1, 2, 1, pick(F, [1, 1])]
    assert set(chosen) == {0, 1, 2}
    for array, i in zip(got, chosen, strict=True):
        np.testing.assert_allclose(array, front.models[i](X).detach(), atol=1e-6)


def test_nothing_is_pickled(front):
    files = [file for place in front.places.values() for file in place.rglob("*")]
    assert not [file for file in files if file.suffix in (".pkl", ".pickle", ".pth", ".pt")]


def test_the_set_and_the_members_of_interest_are_registered(front):
    name = "two-heads"
    expected = {"front": "front", "knee": "member-000", "best-left": "member-000", "best-right-digit": "member-001"}
    registered = front.client.get_registered_model(name)
    assert {alias: str(number) for alias, number in registered.aliases.items()}.keys() == expected.keys()
    for alias, model in expected.items():
        version = front.client.get_model_version_by_alias(name, alias)
        assert version.status == "READY"
        assert front.ids[model] in version.source
    text = front.client.get_run(front.location.run_id).data.tags["mlflow.note.content"]
    number = front.client.get_model_version_by_alias(name, "knee").version
    assert f"| knee | 0 | 0.2 | 0.9 | `models:/{name}/{number}` |" in text
    assert f'mlflow.pyfunc.load_model("models:/{name}/{number}")' in text


def ask(port, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return np.array(json.load(answer)["predictions"])


@pytest.mark.slow
def test_the_picker_answers_over_http(front, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--model-uri", "models:/two-heads@front"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": front.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": "",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        F = [member.objectives for member in front.front.members]
        for preference in PREFERENCES:
            got = ask(port, {"inputs": X.tolist(), "params": {"preference": preference}})
            np.testing.assert_allclose(got, front.models[pick(F, preference)](X).detach(), atol=1e-5)
        got = ask(port, {"inputs": X.tolist(), "params": {"member": "2"}})
        np.testing.assert_allclose(got, front.models[2](X).detach(), atol=1e-5)
        for wrong in ({"preference": "much"}, {"member": "9"}, {"preference": [1.0]}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(port, {"inputs": X.tolist(), "params": wrong})
            assert refused.value.code == 400
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def test_search_finds_the_members_by_their_objectives(front):
    def names(text):
        found = front.client.search_logged_models([front.location.experiment_id], text)
        return sorted(model.name for model in found)

    assert names("metrics.`objective/left` < 0.4") == ["member-000"]
    assert names("metrics.`objective/left` < 0.55 AND metrics.`objective/right digit` < 0.6") == ["member-001"]
    assert names("metrics.`objective/left` < 1") == ["member-000", "member-001", "member-002"]
    assert names("metrics.`objective/left` < 0.1") == []


def test_a_set_is_saved_by_who_has_saved_no_member(tmp_path):
    """As `popmtl track` does for a run that was killed between its members and the model that chooses."""
    trained = [BranchingModel().eval() for _ in range(3)]
    folder, _ = finished_folder(tmp_path, "run", trained, branching=True)
    models = Models(folder)
    models.save_set([0, 2], tmp_path / "set", Model())
    assert models.why_no_program
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "set"))
    got = loaded.predict(X.numpy(), params={"member": "2"})
    np.testing.assert_allclose(got, trained[2](X).detach(), atol=1e-6)


def test_the_code_of_a_problem(tmp_path, monkeypatch):
    package = tmp_path / "mine_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "problem.py").write_text("import json\nfrom . import nets\n")
    (package / "nets.py").write_text("def build():\n    import sklearn.datasets\n    import torch\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code_of("mine_for_this_test.problem") == ([package], {"scikit-learn", "torch"})
    assert code_of("popmtl.problems.overlaid_digits") == ([], {"numpy", "torch", "scikit-learn"})
