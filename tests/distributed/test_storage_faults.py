"""Storage that fails under a run: full at every kind of write, read-only, locked; and what twenty runs leave."""

import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from finished_runs import members
from mlflow_contents import mlflow_contents, mlflow_differences
from running import run_in
from toy_problems import config
from trial_runs import SECONDS, Command, differences, poll, reached, workers
from trial_runs import config as digits

from popmtl.config import Config
from popmtl.distributed import driver
from popmtl.distributed.plan import make_plan
from popmtl.errors import RequestError, RunError
from popmtl.runs.checkpoint import MANIFEST, checkpoints, commit, write_tensors
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Front
from popmtl.runs.results import write_front, write_model
from popmtl.tracking.outbox import CURSOR, JOURNAL, Outbox

PAGE = 4096
TRACKED = {"enabled": True, "models": "none"}


def fill(disk, leave=0):
    """Fills a disk but for so many bytes; gives the file that does."""
    assert os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize < 100 * 2**20, "not the machine's own disk"
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(b"\0" * PAGE)
        file.truncate(max(0, file.tell() - leave))
    return filler


@contextmanager
def full(disk, leave=0):
    filler = fill(disk, leave)
    yield
    filler.unlink()


@pytest.fixture
def folder(small_disk):
    return RunFolder.create(small_disk, "run")


def files(folder):
    return {path.relative_to(folder.path) for path in folder.path.rglob("*") if path.is_file()}


def front():
    return Front(["left", "right digit"], [1.0, 1.0], 0.3, 3, 700, members())


def write_tensor_file(folder):
    return write_tensors(folder, "checkpoints/step-00000001/subproblem-00000.safetensors", {"a": torch.zeros(2000)}, {})


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda folder: RunFolder.create(folder.path.parent, "other"), RequestError),
        (lambda folder: folder.write_config({"a": 1}, new=True), RequestError),
        (write_tensor_file, OSError),
        (lambda folder: write_model(folder, 0, {"a": torch.zeros(2000)}), RunError),
        (lambda folder: Outbox(folder, [], ["there"]).save(), OSError),
    ],
    ids=["folder", "config", "tensors of a checkpoint", "model", "cursor"],
)
def test_a_file_that_finds_no_room_is_said_and_leaves_nothing(folder, write, error):
    with full(folder.path.parent):
        before = files(folder)
        with pytest.raises(error, match="No space left on device"):
            write(folder)
        assert files(folder) == before
        assert not (folder.path.parent / "other").exists()
    write(folder)


def test_a_cursor_that_finds_no_room_stays_as_it_was(folder):
    outbox = Outbox(folder, [], ["there"])
    outbox.save()
    whole = folder.read(CURSOR)
    outbox.sent.members = {str(i): "x" * 100 for i in range(100)}
    with full(folder.path.parent), pytest.raises(OSError, match="No space left on device"):
        outbox.save()
    assert folder.read(CURSOR) == whole


def test_a_manifest_that_finds_no_room_makes_no_checkpoint(folder):
    file = write_tensor_file(folder)
    with full(folder.path.parent), pytest.raises(OSError, match="No space left on device"):
        commit(folder, "checkpoints/step-00000001", [file], {"step": 1})
    assert checkpoints(folder) == []
    assert not (folder.path / "checkpoints/step-00000001" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("name", "add"),
    [
        ("metrics.jsonl", lambda folder, record: folder.append_metrics(record)),
        ("events.jsonl", lambda folder, record: folder.append_event("something", **record)),
        (JOURNAL, lambda folder, record: Outbox(folder, folder.lines(JOURNAL), ["there"]).add("something", record)),
    ],
    ids=["metrics", "events", "journal"],
)
def test_lines_that_find_no_room_wait_and_are_there_once(folder, name, add):
    add(folder, {"number": 0, "long": "x" * PAGE})
    with full(folder.path.parent):
        for number in (1, 2, 3):
            add(folder, {"number": number, "long": "x" * 2 * PAGE})
        kept = RunFolder(folder.path).lines(name)
        assert [line["number"] for line in kept] == [0], "a reader finds whole lines only"
    folder.flush()
    own = [line["number"] for line in RunFolder(folder.path).lines(name) if "number" in line]
    assert own == [0, 1, 2, 3]


@pytest.mark.parametrize("which", ["front.csv", "front.png", "explorer.html", "front.json"])
def test_each_file_of_a_front_may_find_no_room(folder, which):
    write_front(folder, front())
    names = ["front.csv", "front.png", "explorer.html", "front.json"]
    pages = [-(-(folder.pareto / name).stat().st_size // PAGE) for name in names]
    before = sum(pages[: names.index(which)])
    for path in folder.pareto.iterdir():
        path.unlink()
    says = rf"pareto/{which} cannot be written \(No space left on device\); when it can be, --resume goes on"
    with full(folder.path.parent, leave=before * PAGE), pytest.raises(RunError, match=says):
        write_front(folder, front())
    assert not folder.has_front()
    assert sorted(path.name for path in folder.pareto.iterdir()) == sorted(names[: names.index(which)])


def start(resources, folder, data, show=lambda progress: None, *, resumes=False):
    plan = make_plan(
        Config.model_validate({"tracking": {"enabled": False}} | data), [{**n, "GPU": 0.0} for n in resources]
    )
    if not resumes:
        folder.write_config(plan.config.resolved(), new=True)
    return driver.run(plan, folder.path, "test", show, resumes=resumes)


@pytest.mark.slow
def test_a_run_whose_results_find_no_room_goes_on_from_its_last_checkpoint(ray_of_four, folder):
    data = config(2, problem={"name": "toy_problems:Lingers"}, checkpoint={"every_steps": 20}, train={"steps": 60})
    fillers = []

    def show(progress):
        if progress.stage == "writing results" and not fillers:
            fillers.append(fill(folder.path.parent))

    with pytest.raises(RunError, match=r"pareto/.* cannot be written \(No space left on device\)"):
        start(ray_of_four, folder, data, show)
    fillers[0].unlink()
    report = start(ray_of_four, folder, data, resumes=True)
    assert folder.front() == report.front
    kinds = [event["kind"] for event in folder.events()]
    assert "failed" not in kinds, "there was no room for that either"
    assert kinds[-1] == "finished"
    assert [event["step"] for event in folder.events() if event["kind"] == "rewound"] == [60], (
        "nothing was trained again"
    )


def tracked(**train):
    return config(2, train=train) | {"tracking": TRACKED}


def assert_same_in_mlflow(folder, reference):
    assert mlflow_differences(*(plain(mlflow_contents(one)) for one in (folder, reference))) == []


def plain(contents):
    return yaml.safe_load(yaml.safe_dump(contents))


@pytest.mark.endurance
def test_a_full_disk_under_the_tracking_database_loses_no_point(ray_of_four, small_disk, tmp_path):
    train = {"steps": 4000, "evaluate_every": 250}
    reference = RunFolder.create(tmp_path / "runs", "run")
    start(ray_of_four, reference, tracked(**train))
    folder, filler, full_at = RunFolder.create(small_disk, "run"), small_disk / "filler", []

    def show(progress):
        if not full_at and progress.step > 250:
            full_at.append(progress.step)
            fill(small_disk)
        elif filler.exists() and progress.step >= full_at[0] + 1000:
            filler.unlink()

    report = start(ray_of_four, folder, tracked(**train), show)
    assert full_at
    assert (report.complaints, report.unwritten) == ([], [])
    assert_same_in_mlflow(folder, reference)


@pytest.mark.endurance
def test_a_database_that_another_process_locks_for_a_minute_loses_no_point(ray_of_four, tmp_path):
    train = {"steps": 1500, "evaluate_every": 100}
    reference, folder = (RunFolder.create(tmp_path / name, "run") for name in ("reference", "runs"))
    start(ray_of_four, reference, tracked(**train))
    code = (
        "import sqlite3, sys, time\n"
        "held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)\n"
        "held.execute('BEGIN EXCLUSIVE')\ntime.sleep(60)\nheld.execute('COMMIT')"
    )
    lockers = []

    def show(progress):
        if not lockers and progress.step >= 100:
            lockers.append(subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "runs" / "mlflow.db")]))

    unhurried = {"problem": {"name": "toy_problems:TakesItsTime", "after": 100, "seconds": 0.05}}
    began = time.monotonic()
    report = start(ray_of_four, folder, tracked(**train) | unhurried, show)
    assert lockers[0].wait(60) == 0
    assert time.monotonic() - began > 60
    assert report.complaints == []
    ours, theirs = plain(mlflow_contents(folder)), plain(mlflow_contents(reference))
    for _, one in ours["runs"] + theirs["runs"]:  # the problem differs, in what it waits for
        one["params"] = {key: value for key, value in one["params"].items() if not key.startswith("problem")}
    assert mlflow_differences(ours, theirs) == []


@pytest.fixture
def disk_with_errors(tmp_path):
    """A folder on an ext4 of its own, and functions that have the kernel make it read-only, and mend it."""
    image, path = tmp_path / "image", tmp_path / "errors"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    loop = None
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
        found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        loop = found.stdout.strip()
        mount = ["mount", "-o", "errors=remount-ro", loop, path]
        subprocess.run(mount, check=True, capture_output=True)
        trigger = Path("/sys/fs/ext4") / Path(loop).name / "trigger_fs_error"
        if not trigger.exists():
            raise FileNotFoundError(trigger)
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["umount", path], capture_output=True, check=False)
        if loop:
            subprocess.run(["losetup", "--detach", loop], check=False)
        pytest.skip(f"no file system of our own here: {error}")

    def mend():
        subprocess.run(["umount", path], check=True)
        assert subprocess.run(["fsck.ext4", "-fy", loop], capture_output=True, check=False).returncode < 4
        subprocess.run(mount, check=True)

    yield path, lambda: trigger.write_text("1"), mend
    subprocess.run(["umount", "--lazy", path], check=False)
    subprocess.run(["losetup", "--detach", loop], check=False)


@pytest.mark.endurance
def test_a_storage_that_turns_read_only_fails_the_run_at_its_end_and_is_gone_on_from(ray_of_four, disk_with_errors):
    disk, break_it, mend = disk_with_errors
    unhurried = {"name": "toy_problems:TakesItsTime", "after": 60, "seconds": 0.02}
    train = {"steps": 200, "evaluate_every": 20}
    data = config(2, problem=unhurried, checkpoint={"every_steps": 20}, train=train)
    folder, broken = RunFolder.create(disk, "run"), []

    def show(progress):
        if progress.step >= 60 and not broken:
            broken.append(progress.step)
            break_it()

    with pytest.raises(
        RunError, match=r"cannot be written \(Read-only file system\); when it can be, --resume goes on"
    ):
        start(ray_of_four, folder, data, show)
    assert broken
    assert not folder.has_front()
    mend()
    folder = RunFolder(folder.path)
    assert folder.state() == "lost", "even this could not be written"
    report = start(ray_of_four, folder, data, resumes=True)
    assert folder.front() == report.front
    # Lines are not forced to the disk: a file system that breaks down takes those of its last seconds along.
    steps = [record["step"] for record in folder.metrics()]
    assert steps == list(range(steps[0], 201, 20))
    (rewound,) = [event["step"] for event in folder.events() if event["kind"] == "rewound"]
    assert 40 <= rewound < 200


@pytest.mark.endurance
def test_twenty_runs_in_one_storage_leave_nothing(ray_of_four, tmp_path):
    me, counts = psutil.Process(), []
    data = config(2, train={"steps": 20}) | {"tracking": TRACKED}
    before = set(os.listdir("/dev/shm"))
    for number in range(20):
        transport = ("shared_memory", "collective", "coordinator")[number % 3]
        run_in(tmp_path / "runs", f"run-{number}", ray_of_four, data | {"transfer": {"transport": transport}})
        assert not poll_gone(lambda: workers(me.pid, "SubproblemActor") + workers(me.pid, "Coordinator"))
        counts.append((me.num_fds(), me.num_threads(), len(threading.enumerate())))
    print("file handles, threads, Python's threads after each run:", counts)
    assert max(counts[10:])[0] <= max(counts[:5])[0], "file handles"
    assert max(count[1] for count in counts[10:]) <= max(count[1] for count in counts[:5]), "threads"
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("popmtl-")} == set()
    left = {path.name for path in (tmp_path / "runs").rglob("*") if path.name.endswith((".part", ".probe"))}
    assert left == set()
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (number,) = database.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone()
    assert number == 20 * (1 + 4)


def poll_gone(found, seconds=20):
    """What there still is after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.endurance
def test_commands_leave_no_file_of_ray_and_no_process(tmp_path):
    data = digits(2, "collective") | {"tracking": {"enabled": False}, "fine_tune": {"steps": 0}}
    data["train"] |= {"steps": 20, "evaluate_every": 10}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    for number in range(2):
        command = Command(tmp_path, "run.yaml", "--run-name", f"run-{number}")
        try:
            assert command.wait() == 0, command.log.read_text()
            assert command.survivors() == []
            assert list(Path("/tmp/ray").glob(f"session_*_{command.process.pid}")) == []
            latest = Path("/tmp/ray/session_latest")
            assert not os.path.lexists(latest) or not os.readlink(latest).endswith(f"_{command.process.pid}")
        finally:
            command.end()


JUMPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

/* Seconds that the clock is wrong by: those in the file that all processes map. */
static time_t jump(void) {
    static volatile long *seconds;
    if (!seconds) {
        int file = open(getenv("POPMTL_TEST_JUMP"), O_RDONLY);
        void *found = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        if (found == MAP_FAILED) abort();
        seconds = found;
    }
    return *seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    now->tv_sec += jump();
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
DAY = 86400


def has_reached(folder, step):
    return reached(folder) >= step


def is_alive(command):
    return command.alive


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Has the clock of every process that is started from now on be wrong by as many seconds as it is called with."""
    source, library, file = tmp_path / "jumps.c", tmp_path / "jumps.so", tmp_path / "jump"
    source.write_text(JUMPS)
    file.write_bytes(struct.pack("l", 0))
    try:
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiler: {error}")
    monkeypatch.setenv("POPMTL_TEST_JUMP", str(file))
    monkeypatch.setenv("LD_PRELOAD", str(library))

    def be_wrong_by(seconds):
        with file.open("r+b") as opened:
            opened.write(struct.pack("l", seconds))

    be_wrong_by(DAY)
    shows = [sys.executable, "-c", "import time; print(time.time())"]
    if float(subprocess.run(shows, capture_output=True, text=True, check=True).stdout) < time.time() + DAY / 2:
        pytest.skip("the clock cannot be set for single processes here")
    be_wrong_by(0)
    return be_wrong_by


@pytest.mark.endurance
def test_clocks_that_jump_change_nothing(tmp_path, clock, monkeypatch):
    data = digits(2, "collective") | {"tracking": TRACKED}
    data["train"] |= {"steps": 400}
    data["fine_tune"] |= {"steps": 100}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    runs = []
    for name in ("jumping", "steady"):
        command = Command(tmp_path, "run.yaml", "--run-name", name, "--storage", str(tmp_path / name))
        runs.append(folder := RunFolder(tmp_path / name / name))
        try:
            if name == "jumping":
                for step, seconds in ((50, DAY), (150, -DAY), (250, 0), (350, DAY), (450, -DAY)):
                    came = poll(partial(has_reached, folder, step), partial(is_alive, command), SECONDS)
                    assert came, (step, command.log.read_text())
                    clock(seconds)
            assert command.wait() == 0, command.log.read_text()
        finally:
            command.end()
        monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "recovering" not in [event["kind"] for event in runs[0].events()]
    times = [event["time"] for event in runs[0].events()]
    assert times != sorted(times), "it did jump"
    assert differences(*runs) == []
    assert_same_in_mlflow(*runs)
