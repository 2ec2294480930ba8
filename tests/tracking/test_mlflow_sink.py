"""The MLflow sink against real SQLite stores."""

import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import CONFIG, OBJECTIVES, STEPS, WEIGHTS, Settings, finished_folder
from mlflow import MlflowClient, pyfunc, pytorch
from tracked_problems import BranchingModel, TwoHeadsModel

from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_state, write_front
from popmtl.tracking import mlflow_sink, models
from popmtl.tracking.links import Location, links, where_to_look
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.outbox import JOURNAL


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("a storage")


@pytest.fixture(scope="module")
def logged(storage, environment, tmp_path_factory):
    """A whole run, logged once for all tests that only look."""
    cwd = tmp_path_factory.mktemp("cwd")
    environment.chdir(cwd)
    torch.manual_seed(0)
    models = [TwoHeadsModel() for _ in range(3)]
    for model in models:
        model(torch.randn(16, 4))  # moves the BatchNorm statistics
    folder, front = finished_folder(storage, "run-a", models)
    sink = MlflowSink.open(Settings(), folder, CONFIG, OBJECTIVES, WEIGHTS, STEPS, config_name="digits")
    losses = np.arange(STEPS * 6, dtype=float).reshape(STEPS, 3, 2)
    losses[:, 2, 1][10] = np.nan
    for start in range(0, STEPS, 50):
        sink.log_training_losses(np.arange(start + 1, start + 51), losses[start : start + 50])
    sink.log_evaluation(350, 0.1, 2, [[0.4, 1.0], [0.7, 0.7], [np.inf, 0.5]])
    metrics = {"accuracy": [0.5, 0.6, np.nan]}
    sink.log_evaluation(700, 0.2, 3, [[0.3, 0.9], [0.6, 0.6], [0.8, 0.4]], metrics)
    members = [replace(one, metrics={**one.metrics, "undefined": np.nan}) for one in front.members]
    sink.log_front(replace(front, members=members), "front")
    messages = sink.close("FINISHED", timeout=120)
    assert messages == []
    client = MlflowClient(sink.uri)
    parent = client.get_run(sink.location.run_id)
    children = client.search_runs(
        [sink.location.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        order_by=["attributes.run_name"],
    )
    return SimpleNamespace(
        cwd=cwd,
        sink=sink,
        client=client,
        folder=folder,
        models=models,
        parent=parent,
        children=children,
        losses=losses,
    )


def history(logged, run, key):
    return [(point.step, point.value) for point in logged.client.get_metric_history(run.info.run_id, key)]


def artifacts(client, run, place=None):
    return {file.path for file in client.list_artifacts(run.info.run_id, place)}


def test_store_and_experiment_are_found_from_the_storage(logged, storage):
    assert logged.sink.uri == f"sqlite:///{storage.resolve()}/mlflow.db"
    experiment = logged.client.get_experiment(logged.sink.location.experiment_id)
    assert experiment.name == "popmtl/digits"
    assert experiment.artifact_location == (storage / "mlartifacts").as_uri()
    assert (storage / "mlartifacts" / logged.parent.info.run_id / "artifacts" / "config.yaml").exists()


def test_parent_run(logged):
    parent = logged.parent
    assert (parent.info.run_name, parent.info.status) == ("run-a", "FINISHED")
    assert parent.data.tags["popmtl.kind"] == "front"
    assert parent.data.tags["popmtl.version"]
    params = parent.data.params
    assert {key: params[key] for key in ("problem.name", "problem.sizes", "seed", "note")} == {
        "problem.name": "tracked_problems:TwoHeads",
        "problem.sizes": "[1, 2]",
        "seed": "3",
        "note": "null",
    }
    assert params["long"] == "x" * 5999 + "…"
    assert history(logged, parent, "hypervolume") == [(350, 0.1), (700, 0.2)]
    assert history(logged, parent, "front/size") == [(350, 2), (700, 3)]
    assert history(logged, parent, "objective/hypervolume") == [(700, 0.3)]
    kinds = ("explorer.html", "front.json", "front.csv", "front.png")
    assert artifacts(logged.client, parent, "pareto") == {f"pareto/{kind}" for kind in kinds}


def test_member_runs(logged):
    assert [run.info.run_name for run in logged.children] == ["member-000", "member-001", "member-002"]
    assert [run.info.status for run in logged.children] == ["FINISHED"] * 3
    assert [run.data.tags["popmtl.kind"] for run in logged.children] == ["member"] * 3
    assert [run.data.tags["popmtl.nondominated"] for run in logged.children] == ["true", "true", "false"]
    assert {run.data.tags["popmtl.chosen_on"] for run in logged.children} == {"validation"}
    assert logged.children[0].data.params == {"subproblem": "0", "w/left": "0.1", "w/right digit": "0.9"}
    assert history(logged, logged.children[1], "val/loss/left") == [(350, 0.7), (700, 0.6)]
    assert history(logged, logged.children[1], "val/metric/accuracy") == [(700, 0.6)]
    assert history(logged, logged.children[2], "val/metric/accuracy") == []
    assert history(logged, logged.children[1], "objective/right digit") == [(700, 0.5)]
    assert history(logged, logged.children[1], "validation/objective/right digit") == [(700, 0.4)]
    assert history(logged, logged.children[1], "test/accuracy") == [(700, 0.91)]


def test_training_curves_are_means_over_windows(logged):
    curve = history(logged, logged.children[1], "train/loss/left")
    assert [step for step, _ in curve] == [*range(3, 700, 3), 700]
    assert curve[0][1] == pytest.approx(logged.losses[:3, 1, 0].mean())
    assert curve[-1][1] == logged.losses[699, 1, 0]


def test_a_late_start_adds_no_point_to_the_curves(storage, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "CURVE_SECONDS", 0.3)
    folder = RunFolder.create(storage, "late")
    sink = MlflowSink.open(Settings(uri="http://127.0.0.1:9"), folder, {}, OBJECTIVES, WEIGHTS, 10_000)
    time.sleep(0.4)  # as a run takes to start
    losses = np.zeros((1, len(WEIGHTS), len(OBJECTIVES)))
    told = []
    for step, pause in ((1, 0.0), (2, 0.4)):
        time.sleep(pause)
        sink.log_training_losses([step], losses)
        told.append([line["steps"] for line in folder.lines(JOURNAL) if line["kind"] == "training losses"])
    sink.close("KILLED", timeout=0.0)
    assert told == [[], [[2]]]


def test_values_that_are_not_finite_are_left_out_and_tagged(logged):
    assert history(logged, logged.children[2], "val/loss/left") == [(700, 0.8)]
    assert 12 not in [step for step, _ in history(logged, logged.children[2], "train/loss/right digit")]
    diverged = [run.data.tags.get("popmtl.diverged") for run in (*logged.children, logged.parent)]
    assert diverged == [None, None, "true", None]


def test_models_of_the_front_load_and_predict_the_same(logged):
    experiment = logged.sink.location.experiment_id
    found = {model.name: model for model in logged.client.search_logged_models([experiment])}
    assert sorted(found) == ["front", "member-000", "member-001"]
    x = torch.randn(7, 4)
    for i, model in enumerate(logged.models[:2]):
        entity = found[f"member-00{i}"]
        assert entity.status == "READY"
        assert entity.source_run_id == logged.children[i].info.run_id
        assert {metric.key: metric.value for metric in entity.metrics} == {
            "objective/left": [0.2, 0.5][i],
            "objective/right digit": [0.9, 0.5][i],
            "test/accuracy": 0.9 + i / 100,
            "validation/objective/left": pytest.approx([0.1, 0.4][i]),
            "validation/objective/right digit": pytest.approx([0.8, 0.4][i]),
            "validation/test/accuracy": 0.95,
        }
        loaded = pytorch.load_model(entity.artifact_location)
        torch.testing.assert_close(loaded(x), model.eval()(x))
        requirements = Path(entity.artifact_location.removeprefix("file://").replace("%20", " ")) / "requirements.txt"
        assert f"torch=={torch.__version__.split('+')[0]}\n" in requirements.read_text()


def test_weights_are_logged_for_further_training(logged):
    path = logged.client.download_artifacts(logged.children[1].info.run_id, "model/model.safetensors")
    state = load_state(path)
    for name, value in logged.models[1].state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert artifacts(logged.client, logged.children[2]) == set()


def test_global_state_is_left_alone(logged):
    import mlflow

    assert not mlflow.is_tracking_uri_set()
    assert mlflow.active_run() is None
    assert not list(logged.cwd.iterdir())


def test_given_run_and_experiment_and_failure(logged, storage, environment):
    client = logged.client
    given = client.create_run(client.create_experiment("mine", artifact_location=(storage / "m").as_uri()))
    folder = RunFolder.create(storage, "run-b")
    folder.write_config({"seed": 1})
    with environment.context() as patch:
        patch.setenv("MLFLOW_RUN_ID", given.info.run_id)
        sink = MlflowSink.open(Settings(uri=logged.sink.uri), folder, {"seed": 1}, OBJECTIVES, WEIGHTS[:1], 10)
        assert sink.close("FAILED", timeout=60) == []
    assert sink.location == Location(sink.uri, given.info.experiment_id, given.info.run_id)
    (child,) = client.search_runs([given.info.experiment_id], f"tags.`mlflow.parentRunId` = '{given.info.run_id}'")
    assert client.get_run(given.info.run_id).info.status == child.info.status == "FAILED"


def test_a_model_that_cannot_be_exported_is_logged_with_the_code_that_builds_it(logged, storage):
    models = [BranchingModel() for _ in range(3)]
    folder, front = finished_folder(storage, "run-c", models, branching=True)
    sink = MlflowSink.open(Settings(experiment="c"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_front(front, "all")
    (message,) = sink.close("KILLED", timeout=120)
    assert message.startswith("models are logged: not as an exported program, but with the code that builds them: ")
    children = logged.client.search_runs([sink.location.experiment_id], "tags.`popmtl.kind` = 'member'")
    assert all(artifacts(logged.client, run, "model") == {"model/model.safetensors"} for run in children)
    assert {run.info.status for run in children} == {"KILLED"}
    found = {model.name: model for model in logged.client.search_logged_models([sink.location.experiment_id])}
    assert sorted(found) == ["front", "member-000", "member-001", "member-002"]
    for sign in (1, -1):  # both branches
        x = (sign * torch.rand(7, 4)).numpy()
        for i, model in enumerate(models):
            loaded = pyfunc.load_model(found[f"member-00{i}"].artifact_location)
            np.testing.assert_allclose(loaded.predict(x), model.eval()(torch.tensor(x)).detach(), atol=1e-6)


def test_a_model_that_cannot_be_logged_at_all_keeps_its_figures(logged, storage, monkeypatch):
    folder, front = finished_folder(storage, "run-g", [TwoHeadsModel() for _ in range(3)])
    monkeypatch.setattr(models.Models, "save_member", lambda *_: 1 / 0)
    sink = MlflowSink.open(Settings(experiment="g"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_front(front, "front")
    messages = sink.close("FINISHED", timeout=120)
    assert [message.partition(":")[0] for message in messages] == [
        "subproblem 0",
        "subproblem 1",
    ]
    runs = logged.client.search_runs([sink.location.experiment_id], "metrics.`objective/left` < 1")
    assert len(runs) == 3
    parent = logged.client.get_run(sink.location.run_id)
    assert "pareto/explorer.html" in artifacts(logged.client, parent, "pareto")


def test_without_example_or_models(logged, storage):
    models = [TwoHeadsModel() for _ in range(3)]
    folder, front = finished_folder(storage, "run-d", models, example=False)
    sink = MlflowSink.open(Settings(experiment="d"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_front(front, "front")
    assert sink.close("FINISHED", timeout=60) == []
    assert logged.client.search_logged_models([sink.location.experiment_id]) == []
    children = logged.client.search_runs([sink.location.experiment_id], "tags.`popmtl.nondominated` = 'true'")
    assert [artifacts(logged.client, run, "model") for run in children] == [{"model/model.safetensors"}] * 2


@pytest.mark.parametrize(
    ("uri", "about"),
    [
        ("nonsense://somewhere", "opening: "),
        ("sqlite:////proc/none/mlflow.db", "opening: "),
        pytest.param("http://127.0.0.1:9", "", marks=pytest.mark.slow),
    ],
)
def test_a_broken_store_does_not_raise_but_is_reported(tmp_path, uri, about, caplog):
    folder, front = finished_folder(tmp_path, "run", [TwoHeadsModel() for _ in range(3)])
    sink = MlflowSink.open(Settings(uri=uri), folder, CONFIG, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_evaluation(1, 0.0, 1, np.zeros((3, 2)))
    sink.log_front(front, "none")
    *messages, unsent = sink.close("FINISHED", timeout=10)
    assert unsent == f"10 entries were not sent to {uri}; popmtl track {folder.path} sends them"
    assert [message.startswith(about) for message in messages] == ([True] if about else [])
    assert sink.location is None
    assert len([record for record in caplog.records if record.name == mlflow_sink.__name__]) == 1


def test_a_mistake_in_one_record_does_not_stop_the_others(logged, storage, caplog):
    folder, _ = finished_folder(storage, "run-e", [TwoHeadsModel() for _ in range(3)])
    sink = MlflowSink.open(Settings(experiment="e"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_evaluation(1, 0.0, 1, np.zeros((2, 2)))  # a member is missing
    sink.log_evaluation(2, 0.5, 1, np.zeros((3, 2)))
    (message,) = sink.close("FINISHED", timeout=60)
    assert message.startswith("evaluation at step 1: IndexError")
    run = logged.client.get_run(sink.location.run_id)
    assert (run.data.metrics["hypervolume"], run.info.status) == (0.5, "FINISHED")


def test_an_estimated_hypervolume_has_its_error_and_a_tag(logged, storage):
    folder, front = finished_folder(storage, "run-estimated", [TwoHeadsModel() for _ in range(3)])
    sink = MlflowSink.open(Settings(experiment="estimated"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_evaluation(1, 0.5, 1, np.zeros((3, 2)), hypervolume_error=0.01)
    write_front(folder, replace(front, best=True))
    sink.log_end(replace(front, hypervolume_error=0.02), "none")
    assert sink.close("FINISHED", timeout=60) == []
    run = logged.client.get_run(sink.location.run_id)
    assert (run.data.metrics["hypervolume"], run.data.metrics["hypervolume_error"]) == (0.5, 0.01)
    assert run.data.metrics["objective/hypervolume_error"] == 0.02
    kinds = ("explorer.html", "front.json", "front.csv", "front.png")
    assert artifacts(logged.client, run, "pareto/best") == {f"pareto/best/{kind}" for kind in kinds}
    assert run.data.tags["popmtl.hypervolume"].startswith("estimated")
    assert "hypervolume_error" not in logged.parent.data.metrics
    assert "popmtl.hypervolume" not in logged.parent.data.tags


def test_close_waits_no_longer_than_told(logged, storage, monkeypatch):
    folder, front = finished_folder(storage, "run-f", [TwoHeadsModel() for _ in range(3)])
    answered = threading.Event()
    monkeypatch.setattr(models, "load_model", lambda *_: answered.wait(30) and TwoHeadsModel())
    sink = MlflowSink.open(Settings(experiment="f"), folder, {}, OBJECTIVES, WEIGHTS, STEPS)
    sink.log_front(front, "front")
    (message,) = sink.close("FINISHED", timeout=0.1)
    assert f"entries were not sent to {sink.uri}; popmtl track {folder.path} sends them" in message
    answered.set()
    sink._thread.join(60)  # it writes to a database that other tests use


def test_links(monkeypatch):
    page = "#/experiments/1/runs"
    served = Location("https://mlflow.example/", "1", "abc")
    assert where_to_look(served, "runs/my run") == [
        f"choose    https://mlflow.example/{page}/abc/artifacts/pareto/explorer.html?workflowType=machine_learning",
        f"members   https://mlflow.example/{page}?workflowType=machine_learning"
        "&viewStateShareKey=popmtl-members&compareRunsMode=CHART",
        f"run       https://mlflow.example/{page}/abc?workflowType=machine_learning",
    ]
    local = Location("sqlite:////data/my runs/mlflow.db", "1", "abc")
    monkeypatch.setattr(shutil, "which", {"popmtl": "/somewhere/popmtl"}.get)
    assert where_to_look(local, "runs/my run") == ["MLflow  popmtl ui 'runs/my run'"]
    monkeypatch.setattr(shutil, "which", {}.get)
    assert where_to_look(local, "runs/one") == [f"MLflow  {Path(sys.executable).parent}/popmtl ui runs/one"]
    assert (
        links(local, "http://127.0.0.1:7")[2]
        == f"run       http://127.0.0.1:7/{page}/abc?workflowType=machine_learning"
    )
