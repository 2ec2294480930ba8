"""Storage on a path and behind URLs: what it holds, who may work in it, and what is said where it fails."""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from run_records import evaluation, record

from popmtl.errors import RequestError, RunError
from popmtl.runs import checkpoint, lease, proof
from popmtl.runs.folder import RunFolder, runs_in, states
from popmtl.runs.results import load_state, write_model
from popmtl.runs.storage import RemoteStorage, is_remote, joined, open_storage, split


@pytest.mark.parametrize(
    ("location", "run", "remote"),
    [
        ("/data/runs", "/data/runs/a b", False),
        ("file:///data/runs/", "file:///data/runs/a%20b", False),
        ("s3://bucket/runs/?scheme=http&x=a/b", "s3://bucket/runs/a%20b?scheme=http&x=a/b", True),
        ("s3://bucket", "s3://bucket/a%20b", True),
    ],
)
def test_a_run_is_found_below_a_path_or_url(location, run, remote):
    assert joined(location, "a b") == run
    assert split(run) == (location.replace("runs/", "runs"), "a b")
    assert is_remote(location) == remote


def test_a_storage_holds_files_by_name(storage):
    RunFolder.create(storage, "one run").write("deep/below/file.gz", b"content")
    files = open_storage(joined(str(storage), "one run"))
    assert files.read("deep/below/file.gz") == b"content"
    files.write("deep/below/file.gz", b"other")
    assert files.children("deep/below") == ["file.gz"], "and nothing beside it"
    with files.open("deep/below/file.gz") as stream:
        assert (stream.read(2), stream.read(9)) == (b"ot", b"her")
    with files.fetched("deep/below/file.gz") as path:
        assert (path.name, path.read_bytes()) == ("file.gz", b"other")
    size, written = files.entry("deep/below/file.gz")
    assert size == 5
    assert abs(written - time.time()) < 60
    assert files.entry("deep/below") is files.entry("deep/none") is None
    assert files.children("none") == []
    with pytest.raises(FileNotFoundError):
        files.read("none")
    files.remove("none")
    files.remove("deep/below/file.gz")
    assert files.entry("deep/below/file.gz") is None
    files.write("deep/a", b"")
    files.remove_folder("deep")
    assert files.children("deep") == []


def test_lines_reach_the_file_by_themselves_and_a_torn_one_goes(storage):
    folder = RunFolder.create(storage, "run")
    folder.files.write("metrics.jsonl", json.dumps(evaluation(0)).encode() + b'\n{"step": 1')
    other = RunFolder(folder.location)
    for step in (1, 2):
        folder.append_metrics(evaluation(step))
    assert [record["step"] for record in folder.metrics()] == [0, 1, 2], "the writer reads its own lines at once"
    deadline = time.monotonic() + 10
    while len(other.metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [record["step"] for record in other.metrics()] == [0, 1, 2]
    folder.append_metrics(evaluation(3))
    folder.append_event("finished")
    assert other.metrics()[-1] == evaluation(3), "an end writes all that waits"


def test_an_object_is_not_written_again_for_every_line(s3, monkeypatch):
    folder, writes = RunFolder.create(s3, "run"), []
    write = RemoteStorage._write
    monkeypatch.setattr(RemoteStorage, "_write", lambda self, *file: writes.append(file[0]) or write(self, *file))
    start = time.monotonic()
    while time.monotonic() - start < 4.5:
        folder.append_metrics(evaluation(1))
        time.sleep(0.01)
    assert 1 <= writes.count("metrics.jsonl") <= 3


def test_metrics_from_before_a_checkpoint_are_written_before_it_counts(storage):
    folder = RunFolder.create(storage, "run")
    folder.append_metrics(evaluation(10))
    file = checkpoint.write_tensors(folder, "checkpoints/step-00000010/a", {"row": torch.zeros(2)}, {})
    checkpoint.commit(folder, "checkpoints/step-00000010", [file], record(10, n=1))
    other = RunFolder(folder.location)
    assert other.metrics() == [evaluation(10)]
    folder.append_metrics(evaluation(20))
    folder.forget_metrics_after(10, pytest.fail)
    folder.append_metrics(evaluation(15))
    folder.flush()
    assert [record["step"] for record in other.metrics()] == [10, 15]


def test_models_are_written_and_fetched(storage):
    folder = RunFolder.create(storage, "run")
    write_model(folder, 3, {"a": torch.arange(4.0)})
    with folder.fetched("pareto/models/3/model.safetensors") as path:
        assert torch.equal(load_state(path)["a"], torch.arange(4.0))


def test_one_process_at_a_time(storage):
    folder, again = RunFolder.create(storage, "run"), []
    other = RunFolder(folder.location)
    with folder.held():
        time.sleep(0.2)
        assert other.state() == "running"
        with pytest.raises(RequestError, match="being worked on by another process"), other.held():
            again.append("both have it")
    assert again == []
    assert other.state() == "lost"
    with other.held():
        assert folder.state() == "running"


HOLDER = """
import os, sys
from popmtl.runs import lease
from popmtl.runs.folder import RunFolder
lease.RENEW_SECONDS = 0.2
with RunFolder(sys.argv[1]).held():
    print("held", flush=True)
    sys.stdin.readline()
    os._exit(9)  # as if killed
"""


@pytest.mark.slow
def test_a_lease_is_respected_while_its_process_lives_and_goes_with_it(s3, monkeypatch):
    monkeypatch.setattr(lease, "WAIT_SECONDS", 3.0)
    folder, done = RunFolder.create(s3, "run"), RunFolder.create(s3, "done")
    done.append_event("finished")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder.location], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match="another process"), folder.held():
            pass
        assert states([done, folder]) == ["finished", "running"]
        process.communicate("\n")
    start = time.monotonic()
    assert states([folder, done, folder]) == ["lost", "finished", "lost"]
    assert time.monotonic() - start < 5, "it waits once for all runs"
    with folder.held():
        assert json.loads(folder.read(".lock"))["count"] == 0


@pytest.mark.parametrize("storage", ["hdfs", "s3"], indirect=True)
def test_who_loses_the_lease_ends(storage):
    folder = RunFolder.create(storage, "run")

    def work():
        with folder.held():
            folder.write(".lock", json.dumps({"owner": "another", "count": 0}).encode())
            time.sleep(10)

    start = time.monotonic()
    with pytest.raises(RunError, match="another process has taken this run over"):
        work()
    assert time.monotonic() - start < 8
    assert json.loads(folder.read(".lock"))["owner"] == "another", "it is not removed"


@pytest.mark.parametrize("storage", ["hdfs", "s3"], indirect=True)
def test_two_may_write_one_file_at_once(storage):
    RunFolder.create(storage, "run")
    failed, gate = [], threading.Barrier(2)

    def write(content):
        files = open_storage(joined(str(storage), "run"))
        gate.wait()
        try:
            for _ in range(100):
                files.write("file", content)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(bytes([i]) * 1000,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    files = open_storage(joined(str(storage), "run"))
    assert files.read("file") in (b"\0" * 1000, b"\1" * 1000)
    assert files.children("") == ["file"]


def test_of_two_that_start_the_same_name_at_once_one_works_on_it(storage):
    started, refused, gate = [], [], threading.Barrier(2)

    def start():
        gate.wait()
        try:
            folder = RunFolder.create(storage, "run")
            with folder.held():
                folder.write_config({"seed": 1}, new=True)
                started.append(folder)
                time.sleep(1)
        except RequestError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(started), len(refused)) == (1, 1)
    assert "exists already" in refused[0] or "another process" in refused[0]
    with pytest.raises(RequestError, match=r"run.* exists already.*--run-name"):
        RunFolder.create(storage, "run")


def test_runs_are_listed_in_the_order_of_their_configs(storage):
    with pytest.raises(RequestError, match="no such folder"):
        runs_in(storage)
    for name in ("b", "a", "c d"):
        RunFolder.create(storage, name).write_config({"seed": 1})
        time.sleep(1.01 if str(storage).startswith("s3") else 0.02)  # S3 knows seconds
    RunFolder.create(storage, "none")
    assert [folder.name for folder in runs_in(storage)] == ["b", "a", "c d"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("foo://bucket/runs", "Unrecognized filesystem type"),
        ("s3://", "names no bucket"),
        ("s3://bucket/runs?regoin=us-east-1", "Unexpected query parameter"),
        ("s3://nobucket/runs?{}", "cannot be written to (.*bucket does not exist"),
        ("hdfs://127.0.0.1:1/runs", ""),
        ("file://elsewhere/runs", "Unsupported hostname"),
    ],
)
def test_a_storage_that_cannot_be_is_refused_in_one_line(s3_server, url, says):
    url = url.format(s3_server)
    with pytest.raises(RequestError) as refusal:
        RunFolder.create(url, "run")
    message = str(refusal.value)
    assert message.startswith(f"storage {url}: ")
    assert "\n" not in message
    assert all(part in message for part in says.split(".*"))


def test_a_folder_that_is_a_file_is_refused(storage):
    RunFolder.create(storage, "run").write("file", b"")
    with pytest.raises(RequestError, match=r"storage .*/file.*: not a folder"):
        RunFolder.create(joined(str(storage), "run/file"), "below")


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs with options, and gives its path."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "mounted"
    path.mkdir()

    def mount(options, flags=0):
        if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode()):
            pytest.skip(f"no mounting here: {os.strerror(ctypes.get_errno())}")
        return path

    yield mount
    while libc.umount(os.fsencode(path)) == 0:
        pass


MS_RDONLY = 1


def test_a_read_only_folder_is_refused(mounted):
    path = mounted("size=1m", MS_RDONLY)
    with pytest.raises(RequestError, match=rf"storage {path}: cannot be written to \(Read-only file system\)"):
        RunFolder.create(path, "run")


def fill(path):
    """Leaves no byte on the disk; gives the file to remove to have room again."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler


def test_a_full_disk_is_refused_and_nothing_is_left_there(mounted):
    path = mounted("size=1m")
    fill(path)
    with pytest.raises(RequestError, match=rf"storage {path}: cannot be written to \(No space left on device\)"):
        RunFolder.create(path, "run")
    assert os.listdir(path) == ["filler"]


def test_of_lines_that_find_no_room_none_is_written(mounted):
    folder = RunFolder.create(mounted("size=1m"), "run")
    folder.append_metrics({"step": 0})
    fill(folder.storage)
    with pytest.raises(OSError, match="No space left"):
        folder.files.append("metrics.jsonl", b'{"step": 1}\n' + b"x" * 5000 + b"\n")
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n', "or the first would be written twice"


def test_on_a_full_disk_lines_wait_checkpoints_fail_and_results_say_how_to_go_on(mounted, caplog):
    path = mounted("size=1m")
    folder = RunFolder.create(path, "run")
    folder.append_metrics(evaluation(0))
    filler = fill(path)
    long = "x" * 5000
    for step in (1, 2):
        folder.append_metrics(evaluation(step, long=long))
    assert [record["step"] for record in RunFolder(folder.path).metrics()] == [0], "and no half of a line"
    assert [record["step"] for record in folder.metrics()] == [0, 1, 2]
    assert len([record for record in caplog.records if "its lines wait" in record.message]) == 1
    with pytest.raises(OSError, match="No space left"):
        checkpoint.commit(folder, "checkpoints/step-00000002", [], record(2))
    assert checkpoint.checkpoints(folder) == []
    with pytest.raises(RunError, match=r"models/0/model\.safetensors cannot be written \(No space left.*--resume"):
        write_model(folder, 0, {"a": torch.zeros(5000)})
    filler.unlink()
    folder.flush()
    other = RunFolder(folder.path)
    assert [record["step"] for record in other.metrics()] == [0, 1, 2]
    assert [event["kind"] for event in other.events()] == ["lines wait"]


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_lines_wait_for_an_object_store_that_fails(storage, monkeypatch):
    folder = RunFolder.create(storage, "run")
    put, failures = RemoteStorage._put, iter([OSError(28, "No space left on device")])

    def fails_once(self, *arguments):
        for failure in failures:
            raise failure
        put(self, *arguments)

    monkeypatch.setattr(RemoteStorage, "_put", fails_once)
    folder.append_metrics(evaluation(1))
    with pytest.raises(OSError, match="No space"):
        folder.flush()
    folder.flush()
    other = RunFolder(folder.location)
    assert other.metrics() == [evaluation(1)]
    assert [event["kind"] for event in other.events()] == ["lines wait"]


def test_the_proof_holds_where_the_storage_is_one(storage):
    folder = RunFolder.create(storage, "run")
    proof.begin(folder, "token")
    wrong = proof.answer(RunFolder(folder.location), "token", 2)
    proof.conclude(folder, "token", 2, "host", wrong)
    proof.end(folder, "token")
    assert folder.files.children("") == []


def test_the_proof_names_what_is_wrong_and_where(tmp_path):
    folder, elsewhere = (RunFolder.create(tmp_path / storage, "run") for storage in "ab")
    proof.begin(folder, "token")
    assert "does not see there what the coordinator writes" in proof.answer(elsewhere, "token", 2)
    proof.begin(elsewhere, "token")  # as if it saw that, and wrote into its own
    assert proof.answer(elsewhere, "token", 2) is None
    says = rf"storage {tmp_path}/a: actor 2 on host 10\.0\.0\.7 writes there what the coordinator does not see .*s3://"
    with pytest.raises(RunError, match=says):
        proof.conclude(folder, "token", 2, "10.0.0.7", None)
