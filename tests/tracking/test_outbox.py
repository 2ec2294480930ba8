"""MLflow away, locked, or cut off in the middle: everything is there once in the end, and training never waited."""

import shutil
import sqlite3
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow_server import Server
from tracked_problems import TwoHeadsModel

from popmtl.cli import main
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front, Member
from popmtl.runs.results import model_file, write_front, write_model
from popmtl.tracking import mlflow_sender, mlflow_sink
from popmtl.tracking.mlflow_sink import MlflowSink, _Curves
from popmtl.tracking.outbox import CURSOR, JOURNAL, Outbox

OBJECTIVES = ["left", "right digit"]
WEIGHTS = [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]
STEPS, EVERY = 60, 10
CONFIG = {"problem": {"name": "tracked_problems:TwoHeads"}, "seed": 3}
LOSSES = np.random.default_rng(0).random((STEPS, 3, 2))


@dataclass(frozen=True)
class Settings:
    uri: str | None = None
    experiment: str | None = None


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mlflow_sink, "SEND_SECONDS", 0.1)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty store, which takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def server(tmp_path, database):
    shutil.copy(database, tmp_path / "served.db")
    server = Server(tmp_path, f"sqlite:///{tmp_path}/served.db")
    yield server
    server.stop()


def make_folder(storage, name="run"):
    torch.manual_seed(0)
    folder = RunFolder.create(storage, name)
    folder.write_config(CONFIG)
    for i in range(3):
        write_model(folder, i, TwoHeadsModel().state_dict())
    members = [
        Member(i, WEIGHTS[i], [i, 1 - i], {"test/accuracy": 0.9}, "mtgd", i != 2, model_file(i)) for i in range(3)
    ]
    write_front(folder, Front(OBJECTIVES, [1.0, 1.0], 0.3, 3, STEPS, members))
    return folder


def open_sink(folder, uri, experiment=None, config=CONFIG):
    return MlflowSink.open(Settings(uri, experiment), folder, config, OBJECTIVES, WEIGHTS, STEPS, "test")


def train(sink, first, last):
    """Steps first + 1 to last as a run takes them; the longest call's seconds."""
    longest = 0.0

    def timed(call, *arguments):
        nonlocal longest
        start = time.monotonic()
        call(*arguments)
        longest = max(longest, time.monotonic() - start)

    for step in range(first + 5, last + 1, 5):
        timed(sink.log_training_losses, np.arange(step - 4, step + 1), LOSSES[step - 5 : step])
        if step % EVERY == 0:
            timed(sink.log_evaluation, step, step / 100, 2, LOSSES[step - 1], {"accuracy": [step, np.nan, 1.0]})
            timed(sink.log_member_figures, step, {"cosine": [step, None, 1.0]})
    return longest


def settle(sink, seconds=60):
    """Waits until everything has been sent."""
    deadline = time.monotonic() + seconds
    while len(sink._outbox):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def curve(client, run, key):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def assert_everything_once(uri, experiment, models=("member-000", "member-001"), name="run", status="FINISHED"):
    """Each point of each curve of each run, each run, each model and each event: there, right, and there once."""
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([experiment_id])
    (parent,) = [run for run in runs if run.data.tags["popmtl.kind"] == "front"]
    members = sorted((run for run in runs if run is not parent), key=lambda run: run.info.run_name)
    assert parent.info.run_name == name
    assert [run.info.run_name for run in members] == ["member-000", "member-001", "member-002"]
    assert {run.info.status for run in runs} == {status}
    assert {run.data.tags["mlflow.parentRunId"] for run in members} == {parent.info.run_id}
    evaluated = range(EVERY, STEPS + 1, EVERY)
    expected = {"hypervolume": [(t, t / 100) for t in evaluated], "front/size": [(t, 2) for t in evaluated]}
    assert {key: curve(client, parent, key) for key in parent.data.metrics} == {
        **expected,
        "objective/hypervolume": [(STEPS, 0.3)],
    }
    for i, run in enumerate(members):
        expected = {"test/accuracy": [(STEPS, 0.9)]}
        for k, objective in enumerate(OBJECTIVES):
            expected[f"train/loss/{objective}"] = [(t, LOSSES[t - 1, i, k]) for t in range(1, STEPS + 1)]
            expected[f"val/loss/{objective}"] = [(t, LOSSES[t - 1, i, k]) for t in evaluated]
            expected[f"objective/{objective}"] = [(STEPS, [i, 1 - i][k])]
        if i != 1:
            expected["cosine"] = [(t, t if i == 0 else 1.0) for t in evaluated]
            expected["val/metric/accuracy"] = expected["cosine"]
        assert {key: sorted(curve(client, run, key)) for key in run.data.metrics} == expected
        left, right = map(str, WEIGHTS[i])
        assert run.data.params == {"subproblem": str(i), "w/left": left, "w/right digit": right}
    found = client.search_logged_models([experiment_id])
    assert sorted(model.name for model in found) == sorted({*models, *(["front"] if models else [])})
    assert {model.status for model in found} <= {"READY"}
    for model in found:
        assert len(model.metrics or ()) == (0 if model.name == "front" else 3)
        run = client.get_run(model.source_run_id)
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
        assert {"MLmodel", "requirements.txt"} <= files
        if model.name == "front":
            continue
        assert "data" in files
        assert [file.path for file in client.list_artifacts(run.info.run_id, "model")] == ["model/model.safetensors"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "pareto")} == {
        f"pareto/{name}" for name in ("explorer.html", "front.json", "front.csv", "front.png")
    }
    return parent


def events(parent):
    found = {key: text for key, text in parent.data.tags.items() if key.startswith("popmtl.event.")}
    return [found[f"popmtl.event.{n}"].split(" ", 1)[1] for n in range(1, len(found) + 1)]


@pytest.mark.slow
def test_a_server_that_is_away_for_a_third_of_the_run(server, tmp_path, caplog):
    server.start()
    folder = make_folder(tmp_path)
    sink = open_sink(folder, server.uri)
    train(sink, 0, 20)
    settle(sink)
    server.stop()
    longest = train(sink, 20, 40)
    start = time.monotonic()
    sink.log_event("recovering", "actor 1 died")
    sink.log_event("rewound", "step 30")
    longest = max(longest, time.monotonic() - start)
    longest = max(longest, train(sink, 30, 40))
    time.sleep(3)  # the thread tries in vain
    assert len(sink._outbox) >= 8
    server.start()
    train(sink, 40, STEPS)
    sink.log_front(folder.front(), "front")
    assert sink.close("FINISHED") == []
    print(f"longest call while away: {longest * 1000:.1f} ms")
    assert longest < 0.1
    parent = assert_everything_once(server.uri, "popmtl/test")
    assert events(parent) == ["recovering: actor 1 died", "rewound: step 30"]
    assert parent.data.tags["popmtl.recoveries"] == "1"
    away, back = [record.getMessage() for record in caplog.records if record.name == mlflow_sink.__name__]
    assert away.startswith("MLflow does not answer, the run goes on")
    assert back.startswith("MLflow answers again")


@pytest.mark.slow
def test_a_locked_database(tmp_path, database, caplog):
    shutil.copy(database, tmp_path / "mlflow.db")
    folder = make_folder(tmp_path)
    held = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False, isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")  # longer than SQLite's own five seconds
    threading.Timer(8, lambda: held.execute("COMMIT")).start()
    sink = open_sink(folder, None)
    longest = train(sink, 0, 40)
    time.sleep(7)
    longest = max(longest, train(sink, 40, STEPS))
    sink.log_front(folder.front(), "none")
    assert sink.close("FINISHED") == []
    held.close()
    print(f"longest call while locked: {longest * 1000:.1f} ms")
    assert_everything_once(sink.uri, "popmtl/test", models=())
    assert "MLflow does not answer" in caplog.text  # it was retried by us, and not waited for by SQLite


@pytest.mark.slow
def test_what_is_left_is_sent_by_popmtl_track(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlflow_sink, "AWAY_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # or the folder's word for it would not do
    folder = make_folder(tmp_path)
    sink = open_sink(folder, server.uri)
    train(sink, 0, STEPS)
    sink.log_front(folder.front(), "front")
    start = time.monotonic()
    (complaint,) = sink.close("FINISHED")
    assert time.monotonic() - start < 5
    count = len(folder.lines(JOURNAL))
    assert complaint == f"{count} entries were not sent to {server.uri}; popmtl track {folder.path} sends them"
    assert main(["track", str(folder.path)]) == 1
    assert complaint in capsys.readouterr().err
    server.start()
    sent = []
    real = mlflow_sender.Sender.send
    monkeypatch.setattr(mlflow_sender.Sender, "send", lambda self, entries: sent.extend(entries) or real(self, entries))
    with folder.held():
        assert main(["track", str(folder.path)]) == 2
    assert sent == []
    assert main(["track", str(folder.path)]) == 0
    parent = assert_everything_once(server.uri, "popmtl/test")
    assert len(sent) == count
    assert f"/runs/{parent.info.run_id}?" in capsys.readouterr().out
    assert main(["track", str(folder.path)]) == 0
    assert len(sent) == count
    assert len(folder.lines(JOURNAL)) == count
    assert f"/runs/{parent.info.run_id}?" in capsys.readouterr().out


def test_what_a_damaged_line_held_is_named_whenever_the_run_is_brought_to_its_end(tmp_path, monkeypatch, capsys):
    uri, sent = "http://127.0.0.1:9", []

    class Taking(mlflow_sender.Sender):
        def send(self, entries):
            self._sent.parent, self._sent.experiment_id = "parent", "1"
            sent.extend(entries)

    monkeypatch.setattr(mlflow_sender, "Sender", Taking)
    monkeypatch.setattr(mlflow_sink, "SEND_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = make_folder(tmp_path)
    sink = open_sink(folder, uri)
    settle(sink)
    sink._abandoned.set()  # as if killed before it sent the next ones
    sink._outbox.wake()
    sink._thread.join()
    for step in (10, 20):
        sink.log_evaluation(step, step / 100, 2, LOSSES[step - 1])
    whole = folder.read(JOURNAL)
    folder.write(JOURNAL, whole.replace(b'"step": 10', b'"step": '))
    number = whole[: whole.index(b'"step": 10')].count(b"\n") + 1
    says = f"{folder.path}/{JOURNAL}, line {number}: it is not JSON"
    for _ in range(3):
        assert main(["track", str(folder.path)]) == 0
        err = capsys.readouterr().err
        assert says in err
        assert "what this line held is lost, and not in MLflow" in err
        assert folder.state() == "finished"
    (end,) = [event for event in folder.events() if event["kind"] == "finished"]
    assert says in end["tracking"][0]
    assert [entry["step"] for entry in sent if entry["kind"] == "evaluation"] == [20]
    folder.write(JOURNAL, whole + b"".join(folder.read(JOURNAL).splitlines(keepends=True)[whole.count(b"\n") :]))
    assert main(["track", str(folder.path)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert sent[-1]["step"] == 10


def test_track_of_no_run_and_of_an_untracked_one(tmp_path, capsys):
    assert main(["track", str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["track", str(make_folder(tmp_path).path)]) == 2
    assert "its tracking was not enabled" in capsys.readouterr().err


class Mortal(MlflowClient):
    """Ends its thread in the middle of a call, as if the process were killed."""

    method, times = "", 0

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name != Mortal.method:
            return found

        def call(*arguments, **named):
            Mortal.times -= 1
            if Mortal.times == 0 and name == "log_model_artifacts":
                raise SystemExit  # half of its files may be there
            answer = found(*arguments, **named)
            if Mortal.times == 0:
                raise SystemExit  # done, and nobody knows
            return answer

        return call


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is what kills
@pytest.mark.parametrize(
    ("method", "times"),
    [
        pytest.param("create_experiment", 1, marks=pytest.mark.slow),
        pytest.param("create_run", 1, marks=pytest.mark.slow),
        ("create_run", 3),
        ("log_batch", 6),
        pytest.param("log_artifact", 3, marks=pytest.mark.slow),
        pytest.param("create_logged_model", 1, marks=pytest.mark.slow),
        pytest.param("log_model_artifacts", 2, marks=pytest.mark.slow),
        ("finalize_logged_model", 1),
        pytest.param("log_outputs", 2, marks=pytest.mark.slow),
        pytest.param("set_terminated", 2, marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_in_the_middle(tmp_path, database, monkeypatch, method, times):
    uri, experiment = f"sqlite:///{database}", f"killed/{method}/{times}"
    folder = make_folder(tmp_path)
    monkeypatch.setattr(mlflow_sender, "MlflowClient", Mortal)
    monkeypatch.setattr(mlflow_sink, "SAVE_SECONDS", 0.05)
    monkeypatch.setattr(Mortal, "method", method)
    monkeypatch.setattr(Mortal, "times", times)
    sink = open_sink(folder, uri, experiment)
    train(sink, 0, 40)
    late = method in ("log_artifact", "create_logged_model", "log_model_artifacts", "finalize_logged_model")
    if late or method in ("log_outputs", "set_terminated"):
        train(sink, 40, STEPS)
        sink.log_front(folder.front(), "front")
    if method == "set_terminated":
        sink._outbox.add("closing", {"status": "FINISHED"})
    sink._thread.join(60)
    assert not sink._thread.is_alive()
    assert Mortal.times == 0
    assert len(sink._outbox)
    again = open_sink(folder, uri, experiment)
    train(again, 20, STEPS)
    again.log_front(folder.front(), "front")
    assert again.close("FINISHED") == []
    assert_everything_once(uri, experiment)


def test_a_resumed_run_goes_on_with_its_runs_and_points(tmp_path, database):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    sink = open_sink(folder, uri, "resumed")
    train(sink, 0, 40)
    train(sink, 10, 30)  # the coordinator has gone back
    assert sink.close("KILLED") == []
    client = MlflowClient(uri)
    assert client.get_run(sink.location.run_id).info.status == "KILLED"
    with folder.path.joinpath(JOURNAL).open("a") as journal:
        journal.write('{"kind": "cut short by a cra')
    again = open_sink(folder, None, None, {**CONFIG, "seed": 4, "new": 1})
    settle(again)
    assert client.get_run(sink.location.run_id).info.status == "RUNNING"
    train(again, 20, STEPS)
    again.log_front(folder.front(), "none")
    assert again.close("FINISHED") == []
    assert again.location == sink.location
    parent = assert_everything_once(uri, "resumed", models=())
    assert {key: parent.data.params[key] for key in ("seed", "new")} == {"seed": "3", "new": "1"}
    assert events(parent) == ["changed setting: seed from 3 to 4"]


def test_a_resumed_run_with_another_experiment_is_sent_there_as_a_whole(tmp_path, database):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    sink = open_sink(folder, uri, "before")
    train(sink, 0, 40)
    assert sink.close("KILLED") == []
    again = open_sink(folder, uri, "after")
    train(again, 20, STEPS)
    again.log_front(folder.front(), "none")
    assert again.close("FINISHED") == []
    assert_everything_once(uri, "after", models=())


def test_a_run_that_was_deleted_in_mlflow_is_begun_anew_and_said_to_be(tmp_path, database):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    sink = open_sink(folder, uri, "deleted")
    train(sink, 0, 20)
    assert sink.close("KILLED") == []
    client = MlflowClient(uri)
    for run in client.search_runs([sink.location.experiment_id]):
        client.delete_run(run.info.run_id)
    again = open_sink(folder, uri, "deleted")
    train(again, 20, STEPS)
    again.log_front(folder.front(), "none")
    (message,) = again.close("FINISHED")
    assert f"run {sink.location.run_id} is there no more" in message
    (folder.path / "tracking" / "sent.json").unlink()
    assert main(["track", str(folder.path), "--trust"]) == 0
    assert_everything_once(uri, "deleted", models=())


@pytest.mark.slow
def test_two_runs_at_once_make_one_database_and_lose_nothing(tmp_path):
    sinks = [open_sink(make_folder(tmp_path, name), None, name) for name in ("one", "two")]
    for sink in sinks:
        train(sink, 0, STEPS)
        sink.log_front(sink._folder.front(), "none")
    assert [sink.close("FINISHED") for sink in sinks] == [[], []]
    assert sinks[0].uri == sinks[1].uri
    for name in ("one", "two"):
        assert_everything_once(sinks[0].uri, name, models=(), name=name)


def test_what_was_refused_is_sent_again_by_popmtl_track(tmp_path, database, capsys):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    picture = (folder.pareto / "front.png").rename(tmp_path / "aside.png")
    sink = open_sink(folder, uri, "refused")
    train(sink, 0, STEPS)
    sink.log_front(folder.front(), "none")
    (message,) = sink.close("FINISHED")
    assert message.startswith("front at step 60: ")
    assert "front.png" in message
    assert main(["track", str(folder.path), "--trust"]) == 1
    assert message in capsys.readouterr().err
    picture.rename(folder.pareto / "front.png")
    assert main(["track", str(folder.path), "--trust"]) == 0
    assert_everything_once(uri, "refused", models=())


def test_a_run_that_was_killed_is_ended_by_popmtl_track(tmp_path, database, monkeypatch):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    sink = open_sink(folder, uri, "lost")
    train(sink, 0, STEPS)
    sink.log_front(folder.front(), "none")
    settle(sink)
    sink._abandoned.set()
    sink._thread.join(10)
    assert main(["track", str(folder.path), "--trust"]) == 0
    assert_everything_once(uri, "lost", models=())


def test_an_entry_that_mlflow_always_fails_on_does_not_hold_up_the_others(tmp_path, database, monkeypatch):
    uri, folder = f"sqlite:///{database}", make_folder(tmp_path)
    monkeypatch.setattr(mlflow_sink, "FIRST_PAUSE", 0.01)
    broken = lambda self, entry: (_ for _ in ()).throw(ConnectionError("500"))  # noqa: E731
    monkeypatch.setattr(mlflow_sender.Sender, "_log_event", broken)
    sink = open_sink(folder, uri, "poison")
    sink.log_event("recovering", "x")
    train(sink, 0, STEPS)
    sink.log_front(folder.front(), "none")
    assert sink.close("FINISHED") == ["event: 500"]
    monkeypatch.undo()
    assert main(["track", str(folder.path), "--trust"]) == 0
    assert events(assert_everything_once(uri, "poison", models=())) == ["recovering: x"]


def test_curves_grow_however_long_the_run_is(tmp_path, database, monkeypatch):
    """A point stands for a three hundredth of the run; who watches a long one does not wait for that."""
    monkeypatch.setattr(mlflow_sink, "CURVE_SECONDS", 0.2)
    uri = f"sqlite:///{database}"
    sink = MlflowSink.open(Settings(uri), make_folder(tmp_path), CONFIG, OBJECTIVES, WEIGHTS, 10**6, "growing")
    client, ends = MlflowClient(uri), []
    for first in range(1, 60, 20):
        time.sleep(0.25)
        sink.log_training_losses(np.arange(first, first + 20), LOSSES[first - 1 : first + 19])
        settle(sink)
        (run,) = client.search_runs([sink.location.experiment_id], "tags.`popmtl.subproblem` = '1'")
        ends.append(curve(client, run, "train/loss/left"))
    # The first steps start the clock.
    means = [(last, LOSSES[first:last, 1, 0].mean()) for first, last in ((0, 40), (40, 60))]
    for seen, expected in zip(ends, ([], means[:1], means), strict=True):
        assert [step for step, _ in seen] == [step for step, _ in expected]
        np.testing.assert_allclose([value for _, value in seen], [value for _, value in expected])
    assert sink.close("FINISHED", timeout=60) == []


def test_points_of_curves_are_sent_together_in_one_call_a_run(tmp_path, database, monkeypatch):
    uri, calls = f"sqlite:///{database}", []

    class Counted(MlflowClient):
        def log_batch(self, run_id, metrics=(), **named):
            calls.extend([run_id] if metrics else [])
            return super().log_batch(run_id, metrics=metrics, **named)

    monkeypatch.setattr(mlflow_sender, "MlflowClient", Counted)
    monkeypatch.setattr(mlflow_sink, "SEND_SECONDS", 60.0)
    sink = open_sink(make_folder(tmp_path), uri, "together")
    train(sink, 0, EVERY)
    deadline = time.monotonic() + 30
    while not calls:  # the first are sent at once
        assert time.monotonic() < deadline
        time.sleep(0.05)
    train(sink, EVERY, STEPS)
    time.sleep(0.5)
    assert len(calls) <= 4
    sink.log_front(sink._folder.front(), "none")
    assert sink.close("FINISHED", timeout=60) == []
    assert len(calls) <= 2 * 4 + 4  # the rest, and the front's own figures
    assert_everything_once(uri, "together", models=())


def test_curves_count_each_step_once():
    curves = _Curves(3)
    losses = np.arange(1.0, 21.0).reshape(20, 1, 1)

    def add(first, last):
        steps, means = curves.add(np.arange(first, last + 1), losses[first - 1 : last])
        return list(zip(steps.tolist(), means[:, 0, 0].tolist(), strict=True))

    assert add(1, 8) == [(3, 2.0), (6, 5.0)]
    assert add(5, 7) == []  # gone back
    assert add(5, 10) == [(9, 8.0)]
    assert curves.rest()[1].tolist() == [[[10.0]]]
    curves = _Curves(3, logged=10)  # a new process
    assert add(7, 12) == [(12, 11.5)]


def test_a_cursor_ahead_of_a_journal_that_lost_lines(tmp_path):
    folder, place = make_folder(tmp_path), ["uri", "experiment", None]
    outbox = Outbox(folder, [], place)
    for n in range(3):
        outbox.add("event", {"n": n})
        outbox.done()
    outbox.sent.experiment_id, outbox.sent.parent = "1", "2"
    outbox.save()
    (folder.path / JOURNAL).write_text((folder.path / JOURNAL).read_text().partition("\n")[0] + "\n")
    outbox = Outbox(folder, folder.lines(JOURNAL), place)
    outbox.add("event", {"n": 5})
    assert [entry["n"] for entry in folder.lines(JOURNAL)] == [0, 5]
    assert [entry["n"] for entry in outbox.next(0)] == [5]


@pytest.mark.parametrize(
    "harm",
    [b"[]", *(pytest.param(one, marks=pytest.mark.slow) for one in (b"{", b'{"place": 1, "count": 3}', b"\xff"))],
)
def test_a_damaged_cursor_doubles_nothing_and_loses_nothing(tmp_path, database, harm, capsys):
    shutil.copy(database, tmp_path / "mlflow.db")
    folder = make_folder(tmp_path)
    sink = open_sink(folder, None)
    train(sink, 0, STEPS)
    sink.log_front(folder.front(), "none")
    assert sink.close("FINISHED") == []
    assert_everything_once(sink.uri, "popmtl/test", models=())
    (folder.path / CURSOR).write_bytes(harm)
    assert main(["track", str(folder.path)]) == 0
    assert_everything_once(sink.uri, "popmtl/test", models=())
    (folder.path / JOURNAL).write_bytes((folder.path / JOURNAL).read_bytes() + b"[1]\n")
    assert main(["track", str(folder.path)]) == 0, "what is there has been sent"
    assert f"warning: MLflow: journal: {folder.path}/{JOURNAL}, line " in capsys.readouterr().err


def test_a_row_that_another_run_has_made_in_the_same_moment_is_tried_again():
    raced = "(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint"
    assert mlflow_sender._may_pass(MlflowException(raced, BAD_REQUEST))
    assert not mlflow_sender._may_pass(MlflowException("no such column", BAD_REQUEST))
