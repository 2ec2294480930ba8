"""The run folder: creating, writing and reading back."""

import fcntl
import json
import os
import socket
import threading
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import yaml
from run_records import evaluation

from popmtl.errors import RequestError
from popmtl.runs.folder import COORDINATOR_LOCK, LOCK, RunFolder
from popmtl.yaml_files import DEEPEST


@pytest.fixture
def folder(storage):
    return RunFolder.create(storage, "first")


@pytest.mark.parametrize("storage", ["path", "file"], indirect=True)
def test_create_makes_storage_and_folder(folder, tmp_path):
    assert folder.path == tmp_path / "storage" / "first"
    assert folder.path.is_dir()
    assert (folder.name, folder.storage, folder.pareto) == ("first", tmp_path / "storage", folder.path / "pareto")


def test_create_refuses_an_existing_run(folder, storage):
    folder.write_config({"seed": 1})
    with pytest.raises(RequestError, match=r"/first.* exists already.*--run-name"):
        RunFolder.create(storage, "first")
    assert folder.config() == {"seed": 1}


@pytest.mark.parametrize("storage", ["hdfs", "s3"], indirect=True)
def test_a_folder_behind_a_url_has_no_path(folder):
    assert folder.name == "first"
    with pytest.raises(ValueError, match=r"first.* is not on this machine's disk"):
        _ = folder.pareto


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_create_refuses_names_that_leave_the_storage(tmp_path, name):
    with pytest.raises(RequestError, match="run name"):
        RunFolder.create(tmp_path, name)


def test_create_names_a_storage_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match=f"storage {storage}: "):
            RunFolder.create(storage, "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_create_names_a_storage_without_permission(tmp_path):
    storage = tmp_path / "locked"
    storage.mkdir(mode=0o500)
    with pytest.raises(RequestError, match=f"storage {storage}: cannot be written to"):
        RunFolder.create(storage, "run")


def test_a_relative_path_stays_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("storage", "run")
    monkeypatch.chdir("/")
    folder.write_config({"seed": 1})
    assert RunFolder(tmp_path / "storage" / "run").config() == {"seed": 1}


def test_config_keeps_its_order_and_types(folder):
    config = {"problem": {"name": "vlmop2", "variables": 2}, "a": [1.5, None, "é"], "rate": 1e-05}
    folder.write_config(config)
    assert folder.config() == config
    assert list(folder.config()) == ["problem", "a", "rate"]
    assert sorted(folder.files.children("")) == ["config.yaml", "origin.json"]


def test_config_refuses_what_only_python_can_read(folder):
    folder.write_config({"seed": 1})
    with pytest.raises(yaml.representer.RepresenterError, match="cannot represent"):
        folder.write_config({"rate": np.float64(1.0)})
    assert folder.config() == {"seed": 1}
    assert sorted(folder.files.children("")) == ["config.yaml", "origin.json"]


@pytest.mark.parametrize("storage", ["path"], indirect=True)
def test_a_config_that_is_too_large_when_all_is_said_is_refused(storage):
    weights = [[1 / 3] * 12 for _ in range(8000)]
    folder = RunFolder.create(storage, "large")
    with pytest.raises(RequestError, match=r"with all defaults written out it has 2,[0-9,]+ bytes"):
        folder.write_config({"population": {"weights": weights}}, new=True)
    assert RunFolder.create(storage, "large").is_begun()
    folder.write_config({"population": {"weights": weights[:4000]}}, new=True)
    assert folder.config()["population"]["weights"] == weights[:4000]


@pytest.mark.parametrize("storage", ["path"], indirect=True)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (json.loads("[" * 40 + "]" * 40), f"line .*: more than {DEEPEST} levels"),
        ("\udc80", "'utf-8' codec can't encode"),
    ],
)
def test_a_config_that_its_run_could_not_read_again_is_refused(folder, value, says):
    with pytest.raises(RequestError, match=f"config: with all defaults written out: {says}"):
        folder.write_config({"a": {"b": value}}, new=True)
    assert folder.files.children("") == []


@pytest.mark.parametrize("storage", ["path"], indirect=True)
def test_a_folder_whose_process_died_as_it_signed_it_is_begun_again(storage, tmp_path, monkeypatch):
    """After each of the writes that precede config.yaml."""
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "signed_problem.py").write_text("")
    config = {"problem": {"name": "signed_problem:P"}}
    written = []

    class Died(BaseException):
        pass

    for deaths in range(3):
        folder = RunFolder.create(storage, f"run-{deaths}")
        real, left = folder.files.write, [deaths]

        def write(name, content, real=real, left=left):
            if not left[0]:
                raise Died
            left[0] -= 1
            written.append(name)
            real(name, content)

        folder.files.write = write
        with pytest.raises(Died):
            folder.write_config(config, new=True)
        assert RunFolder(folder.location).lacks_config()
        again = RunFolder.create(storage, f"run-{deaths}")
        again.write_config(config, new=True)
        assert again.config() == config
    assert written[-2:] == ["problem/signed_problem.py", "origin.json"]


@pytest.mark.parametrize("storage", ["path"], indirect=True)
@pytest.mark.parametrize("lock", [LOCK, COORDINATOR_LOCK])
@pytest.mark.parametrize("what", ["a pipe", "a folder", "a socket", "a link", "a link to nothing", "a link elsewhere"])
def test_a_lock_that_is_no_file_keeps_no_one_waiting(folder, tmp_path, monkeypatch, lock, what):
    path = folder.path / lock
    match what:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a socket":
            monkeypatch.chdir(folder.path)  # the name of one is short
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(lock)
        case "a link":
            (folder.path / "file").touch()
            path.symlink_to("file")
        case "a link to nothing":
            path.symlink_to("nothing")
        case _:
            path.symlink_to(tmp_path / "elsewhere")
    says = f"leads out of {folder.path}" if what == "a link elsewhere" else "is not a regular file"
    with pytest.raises(RequestError, match=f"{path}(:| ){{1,2}}{says}"), folder.held(lock):
        pass
    assert not (tmp_path / "elsewhere").exists()
    assert not (folder.path / "nothing").exists()


@pytest.mark.parametrize("storage", ["path"], indirect=True)
def test_a_look_at_the_lock_keeps_no_run_from_starting(folder):
    with folder.held():
        pass
    with (folder.path / LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, fcntl.flock, [file, fcntl.LOCK_UN])
        timer.start()
        with folder.held():
            pass
        timer.join()


def test_config_of_no_run_folder(storage):
    with pytest.raises(RequestError, match="is not a run folder"):
        RunFolder(storage).config()


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_config_that_is_damaged(folder, text):
    folder.write("config.yaml", text.encode())
    with pytest.raises(RequestError, match=r"config\.yaml"):
        folder.config()


def test_metrics_are_json_lines_with_null_for_what_is_not_finite(folder):
    losses = np.array([[1.0, np.nan], [np.inf, 2.0]])
    folder.append_metrics(evaluation(1, hypervolume=np.float64(0.5), losses=losses))
    folder.append_metrics(evaluation(np.int64(2), hypervolume=float("nan"), name="é"))
    folder.flush()
    lines = folder.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == folder.metrics()
    assert folder.metrics() == [
        evaluation(1, hypervolume=0.5, losses=[[1.0, None], [None, 2.0]]),
        evaluation(2, hypervolume=None, name="é"),
    ]


@pytest.mark.parametrize("storage", ["path", "file"], indirect=True)
def test_a_line_is_there_as_soon_as_it_is_appended_and_a_torn_one_is_not_read(folder):
    folder.append_metrics(evaluation(1))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert folder.metrics() == [evaluation(1)]


def test_events_carry_their_time(folder):
    folder.append_event("started", actors=4)
    (event,) = folder.events()
    assert list(event) == ["time", "kind", "actors"]
    assert (event["kind"], event["actors"]) == ("started", 4)
    time = datetime.fromisoformat(event["time"])
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - time) < timedelta(minutes=1)


def test_a_new_folder_has_no_records_and_no_front(folder):
    assert folder.metrics() == folder.events() == []
    with pytest.raises(RequestError, match="no front yet"):
        folder.front()


def test_what_follows_a_line_that_a_crash_cut_short_is_a_line_of_its_own(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    folder.append("events.jsonl", {"a": 1})
    with (folder.path / "events.jsonl").open("a") as stream:
        stream.write('{"b": "an error that was being wri')
    assert folder.lines("events.jsonl") == [{"a": 1}]
    folder.append("events.jsonl", {"c": "é"})
    assert folder.lines("events.jsonl") == [{"a": 1}, {"c": "é"}]
    (folder.path / "metrics.jsonl").write_text("{")
    folder.append("metrics.jsonl", {"d": 4})
    assert folder.lines("metrics.jsonl") == [{"d": 4}]
