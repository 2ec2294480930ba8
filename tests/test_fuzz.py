"""Nonsense of every kind ends in an exit code and one short message: configs, overrides, flags, and run folders.

The examples are the same in every run of the tests. No example starts a run, reaches a network, or leaves this process.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path

import psutil
import pytest
import ray
from finished_runs import Settings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import popmtl.tracking.mlflow_sink
import popmtl.tracking.server
from popmtl.cli import main
from popmtl.config import Config
from popmtl.errors import RequestError
from popmtl.runs.choice import finished_front
from popmtl.runs.folder import RunFolder
from popmtl.text import is_printable
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.outbox import CURSOR, Sent

EXAMPLES = [20, pytest.param(60, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.endurance)]
"""Of each of the five tests."""
SECONDS, HANGS, MEMORY, LONGEST = 2.0, 60.0, 2**30, 12_000
"""Processor time of a refusal, time after which anything hangs, bytes beyond what is there, characters of a message."""

BASE = {
    "problem": {"name": "zdt1", "variables": 3},
    "population": {"subproblems": 3},
    "train": {"steps": 20, "evaluate_every": 10, "execution": "loop"},
    "fine_tune": {"steps": 2},
    "checkpoint": {"every_steps": 10},
    "tracking": {"enabled": False},
    "resources": {"max_actors": 1, "gpus_per_actor": 0, "start_timeout": 300},
    "front": {"best": True},
}


class Hung(BaseException):
    """An example that does not end."""


@contextmanager
def limited():
    """Memory and time of an example."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, old[1]))

    def hung(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


def attempt(*arguments):
    """Runs a command as a user would, and sees that it ends as it should; its exit code."""
    out, err = (TextIOWrapper(BytesIO(), encoding="utf-8") for _ in range(2))
    path, began = list(sys.path), time.process_time()
    with limited(), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            sys.path[:] = path
    took = time.process_time() - began
    said, complained = ((stream.seek(0) and None) or stream.read() for stream in (out, err))
    if "--version" in arguments or "--help" in arguments or "-h" in arguments:
        return code
    assert code in (0, 1, 2), (code, complained)
    assert "Traceback" not in said + complained
    lines = [line for line in complained.splitlines() if not line.startswith(("popmtl: warning: ", "  ", "usage: "))]
    assert len(lines) <= 1 or code == 0, complained
    if code:
        assert len(lines) == 1, (code, complained)
        assert lines[0].startswith("popmtl"), complained
        assert len(complained) < LONGEST
        assert took < SECONDS, (took, complained)
    assert all(is_printable(line) for line in (said + complained).split("\n"))
    return code


def examples(count, strategies, body):
    """Runs a body with so many examples, the same ones every time."""
    options = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # shrinking takes minutes; the first example that fails is printed as it is
        suppress_health_check=list(HealthCheck),
    )

    def example(drawn):
        body(*drawn)

    options(given(st.tuples(*strategies))(example))()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a folder of its own, where no Ray starts, nothing is sent, and no server is started."""

    def refuse(*_, **__):
        raise RequestError("not in this test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(MlflowSink, "close", lambda sink, *_: [])  # which is what sends
    monkeypatch.setattr(popmtl.tracking.server, "server", refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Everything that commands import, which takes its own time."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "c.yaml").write_text(json.dumps(BASE))
    assert main(["train", str(folder / "c.yaml"), "--dry-run"]) == 0
    for command in ("verify", "track", "ui", "front", "runs"):
        assert main([command, *(["--storage"] if command == "runs" else []), str(folder / "absent")]) == 2


def keys_of(model, path=()):
    """All dotted keys of the config, and some that are arguments."""
    for name, field in model.model_fields.items():
        yield ".".join((*path, field.alias or name))
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in parts:
            if isinstance(part, type) and hasattr(part, "model_fields"):
                yield from keys_of(part, (*path, name))


ARGUMENTS = (
    *(f"train.optimizer.{key}" for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "momentum", "nesterov")),
    *(f"train.lr_schedule.{key}" for key in ("step_size", "gamma", "T_max", "max_lr", "total_steps", "milestones")),
    *(f"train.gradient.{key}" for key in ("scale", "c", "epsilon", "max_iters")),
    *("problem.variables", "problem.objectives", "problem.k", "problem.start", "train.optimizer.groups.match"),
)
# Compiling and other machines' storage are no matter of what a config may hold; they take long, or a network.
KEYS = sorted({*keys_of(Config), *ARGUMENTS} - {"train.compile"})
VALUES = (
    *("", "~", "true", "false", "on", "no", "0", "-1", "1", "2", "3", "0.5", "-0.0", "1e-3", "1e3", "1e999", "1e-320"),
    *(".nan", ".inf", "-.inf", "nan", "inf", "0100", "0x10", "0b1", "0o7", "1_000", "10:00", "2001-99-99", "9" * 5000),
    *("1" + "0" * 30, "1" + "0" * 12, "1000000000", "20000", "4611686018427387904", "-9223372036854775809", "1e300"),
    *("[]", "{}", "[[]]", "[1, 2]", "[.nan, 1]", "[true, 0.9]", "[[0.5, 0.5], [1, 0], [.nan, 1]]", "[" * 100, "{a: 1}"),
    *("{name: Adam}", "{name: SGD, lr: 0.1}", "{name: StepLR, step_size: 2}", "{name: OneCycleLR, max_lr: 1}"),
    *("{name: MGDA, epsilon: 0, max_iters: 1000000000}", "{name: aligned_mtl}", "{name: CAGrad, c: 0.5}", "{norm: 1}"),
    *("[{name: StepLR, step_size: 1, for: 3}, {name: ExponentialLR, gamma: 1e300}]", "{match: ['*'], lr: -1}"),
    *("&a [*a]", "*a", "!!binary YQ==", "!!set {a}", "!!python/object/apply:os.abort []", "!x y", "{<<: {a: 1}}"),
    *(
        "{a: 1, a: 2}",
        "{1: 2}",
        "{null: 1}",
        "? [a]",
        '"\\0"',
        '"\\ud800"',
        '"\\e[31m"',
        '"\u202e"',
        "'",
        '"',
        "%",
        "@",
    ),
    *("zdt1", "zdt2", "vlmop2", "dtlz2", "aligned_toy", "os:system", ".x:Y", ":", "a:b:c", "json:JSONEncoder", "steps"),
    *("linear", "energy", "das_dennis", "geometric", "pbi", "weighted_sum", "adapt_then_combine", "float64", "bf16"),
    *(
        "/dev/zero",
        "/dev/null",
        "/",
        "/proc/self/mem",
        "a/b.npy",
        "x" * 5000,
        "../" * 500,
        "ray://",
        "foo://x",
        "file:",
    ),
)
STEP = st.sampled_from(VALUES) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(repr)
OVERRIDE = st.tuples(st.sampled_from(KEYS), STEP).map("=".join)
BROKEN = (
    st.sampled_from(
        ["=", "a", "..=1", "train=5", "problem=", "a.b.c.d=", "=1", "train.optimizer.groups.0=1", "seed==1"]
    )
    | st.text(max_size=20)
    | st.text(max_size=10).map(lambda text: f"problem.{text}=1")
    | st.integers(1, 100_000).map(lambda depth: ".".join("a" * depth) + "=1")
)


def rendered(tree):
    """YAML of nested keys whose leaves are YAML already."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {rendered(value)}" for key, value in tree.items()) + "}"
    return tree


@pytest.mark.parametrize("count", EXAMPLES)
def test_configs_with_nonsense_in_their_places(count):
    def check(changes):
        tree = {section: {key: json.dumps(value) for key, value in keys.items()} for section, keys in BASE.items()}
        for key, value in changes:
            *parents, last = key.split(".")
            place = tree
            for parent in parents:
                place[parent] = place[parent] if isinstance(place.get(parent), dict) else {}
                place = place[parent]
            place[last] = value
        lines = [f"{section}: {rendered(keys)}\n" for section, keys in tree.items()]
        Path("c.yaml").write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
        attempt("train", "c.yaml", "--dry-run")

    examples(count, [st.lists(st.tuples(st.sampled_from(KEYS), STEP), min_size=1, max_size=3)], check)


EDIT = st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.integers(0, 255))
PIECES = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"---\n", b"...\n", b"&a ", b"*a ", b"!!", b"<<: ", b"\t", b"\r", b": ")


def edited(content, edits):
    """Bytes with bits flipped, ends cut off, and pieces put in."""
    for kind, where, which in edits:
        at = int(where * len(content))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << which % 8]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + PIECES[which % len(PIECES)] + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 20] * which + content[at:]
    return content


@pytest.mark.parametrize("count", EXAMPLES)
def test_configs_of_any_bytes(count):
    own = [json.dumps(BASE, indent=1).encode(), b"problem: zdt1\npopulation:\n  subproblems: 3\ntrain:\n  steps: 5\n"]
    special = [b"[" * 10_000, b"{a: " * 10_000, b"- " * 10_000, b"a: " + b"9" * 10_000, b"x" * 3_000_000, b"\0" * 9]
    content = st.tuples(st.sampled_from(own), st.lists(EDIT, min_size=1, max_size=4)).map(lambda given: edited(*given))

    def check(content):
        Path("c.yaml").write_bytes(content)
        attempt("train", "c.yaml", "--dry-run")

    examples(count, [content | st.binary(max_size=200) | st.sampled_from(special)], check)


@pytest.mark.parametrize("count", EXAMPLES)
def test_overrides(count):
    Path("c.yaml").write_text(json.dumps(BASE))

    def check(overrides):
        attempt("train", "c.yaml", "--dry-run", *overrides)

    # A word that begins with a dash is a flag.
    words = (OVERRIDE | BROKEN).filter(lambda text: not text.startswith("-"))
    examples(count, [st.lists(words, min_size=1, max_size=3)], check)


PLACES = (
    "absent",
    "c.yaml",
    "/dev/null",
    "/dev/zero",
    "/",
    "/proc",
    "pipe",
    "foo://x",
    "ray://",
    "s3://",
    "x" * 300,
    "a/" * 1000,
    "x" * 5000,
    "",
)
NONSENSE = st.text(max_size=20) | st.sampled_from(
    (*PLACES, *VALUES, "a\0b", "\udc80", "\x1b[31m", "-", "--", "..", "~")
)
ADDRESSES = (
    "ray://",
    "ray://:1",
    "127.0.0.1:99999999",
    "x",
    "http://",
    "http://[",
    "http://127.0.0.1:9",
    "[::",
    ":",
    "=",
)
VALUES_OF = {
    "--preference": ("nan,inf", "0.5,0.5", "1", "", ",", "1e400,1", "-1,2", "0,0", "1,2,3", "a,b"),
    "--best": ("f1", "absent", "\u202e", "test/x", ""),
    "--where": ("f1>=0", "f1<nan", "f1<=1e400", "<", "f1", "f1>=f2", ">=1", "f1<1<2", "x" * 999 + "<1", "f1 < -1"),
    "--from": ("last", "best", "x"),
    "--plot": ("a.png", "/dev/null", "/dev/full.png", "c.yaml", "pipe.png", "/absent/a.png", "/proc/a.png", ""),
    "--export": ("c.yaml", "/", ".", "/proc/x", "/dev/null", "s3://x", "\0", ""),
    "--port": ("99999999", "-1", "0", "x", "1e3", "٣", "5000"),
    "--profile": ("1" + "0" * 30, "-1", "0", "x", "20", "3"),
    "--storage": PLACES,
    "--run-name": (
        "a\nb",
        "a\x1b[31m",
        "\u202ex",
        ".",
        "..",
        ".x",
        "mlflow.db",
        "a/b",
        " a",
        "x" * 300,
        "é" * 200,
        "ok",
    ),
    "--resume": ("absent", "r", "/", "/dev/null", "c.yaml", "\udc80"),
    "--address": ADDRESSES,
    "--working-dir": ("absent", "c.yaml", "/dev/null", "."),
}
COMMANDS = {
    "train": ("--run-name", "--storage", "--resume", "--profile", "--address"),
    "submit": ("--run-name", "--storage", "--resume", "--working-dir", "--address"),
    "runs": ("--storage",),
    "front": ("--from", "--plot", "--json"),
    "pick": ("--preference", "--best", "--where", "--from", "--export", "--knee", "--json"),
    "compare": ("--plot", "--json"),
    "verify": (),
    "track": (),
    "ui": ("--storage", "--port"),
    "status": ("--address",),
    "stop": ("--address",),
}


@st.composite
def requests(draw):
    """A command with what it takes, and what it does not."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = draw(st.lists(st.sampled_from(("r", "c.yaml", *PLACES)) | NONSENSE, max_size=2))
    if command == "train":  # which is to start nothing
        arguments.insert(0, "c.yaml")
    flags = draw(st.lists(st.sampled_from(COMMANDS[command] or ("--json",)), max_size=3))
    for flag in flags:
        values = VALUES_OF.get(flag)
        arguments += [flag, draw(st.sampled_from(values) | NONSENSE)] if values else [flag]
    if draw(st.integers(0, 9)) == 0:
        arguments.append(draw(st.sampled_from(["--", "--absent", "-x", "--json=1", "--storage", "--storage="])))
    return [command, *arguments, *(["--dry-run"] if command == "train" else [])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with three checkpoints, and a journal for MLflow that no MLflow has seen."""
    place = tmp_path_factory.mktemp("whole")
    (place / "c.yaml").write_text(json.dumps(BASE))
    command = [sys.executable, "-m", "popmtl", "train", "c.yaml", "--run-name", "r"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(place / "runs" / "r")
    front = finished_front(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowSink, "_work", lambda sink: None)
        weights = [member.weights for member in front.members]
        where = Settings("http://127.0.0.1:9", "e")
        sink = MlflowSink.open(where, folder, folder.config(), front.objectives, weights, 20)
        for line in folder.metrics():
            sink.log_evaluation(line["step"], line["hypervolume"], line["front_size"], line["validation"])
        sink.log_event("recovered", "an actor")
        sink.log_front(front, "front")
    sent = Sent([where.uri, where.experiment, None], 3, [1], "1", "a" * 32, {"0": "b" * 32})
    folder.write(CURSOR, json.dumps(asdict(sent)).encode())
    return folder.path


@pytest.mark.parametrize("count", EXAMPLES)
def test_flags(run, count):
    Path("c.yaml").write_text(json.dumps(BASE))
    os.mkfifo("pipe")
    os.mkfifo("pipe.png")
    shutil.copytree(run, "r")
    examples(count, [requests()], lambda arguments: attempt(*arguments))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "a\x1b[31m\u202e", "x" * 3000, "", "nan", 10**400, "[red]"])
)
FOREIGN = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def planted(value, foreign, where):
    """JSON with another value in one of its places."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[where % len(keys)]
        where //= len(keys)
        if where % 3 == 0 or not isinstance(value[key], dict | list):
            value[key] = foreign
            return
        value = value[key]


def damage(path, kind, edits, foreign, where):
    content = path.read_bytes()
    if kind == "edit":
        path.write_bytes(edited(content, edits))
    elif kind == "foreign":
        path.write_bytes(json.dumps(foreign).encode())
    elif kind == "planted" and path.suffix in (".json", ".jsonl"):
        lines = content.split(b"\n") if path.suffix == ".jsonl" else [content]
        at = where % max(1, len(lines) - 1)
        with suppress(ValueError):
            value = json.loads(lines[at])
            planted(value, foreign, where)
            lines[at] = json.dumps(value).encode()
        path.write_bytes(b"\n".join(lines))
    elif kind == "planted":
        path.write_bytes(content[: where % 50] + json.dumps(foreign).encode() + b"\n" + content[where % 50 :])
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


READERS = (
    ("runs", "--storage", "runs"),
    ("front", "runs/r"),
    ("front", "runs/r", "--json"),
    ("front", "runs/r", "--from", "best"),
    ("pick", "runs/r", "--knee"),
    ("pick", "runs/r", "--preference", "0.3,0.7", "--json"),
    ("pick", "runs/r", "--best", "f1", "--where", "f2<=1e9"),
    ("compare", "runs/r", "runs/r"),
    ("verify", "runs/r"),
    ("track", "runs/r", "--trust"),
    ("ui", "runs/r", "--trust"),
    ("train", "--resume", "runs/r", "--dry-run"),
    ("train", "c.yaml", "--dry-run", "baseline=runs/r"),
)


@pytest.mark.parametrize("count", EXAMPLES)
def test_run_folders(run, count):
    Path("c.yaml").write_text(json.dumps(BASE))
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml", ".safetensors")]
    kinds = st.sampled_from(["edit", "edit", "edit", "foreign", "planted", "planted", "planted", "gone", "folder"])
    what = st.tuples(
        st.sampled_from(files), kinds, st.lists(EDIT, min_size=1, max_size=3), FOREIGN, st.integers(0, 10**6)
    )

    def check(damages, unfinished, commands):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(run, "runs/r")
        if unfinished:
            shutil.rmtree("runs/r/pareto")
        for path, *how in damages:
            with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                damage(Path("runs/r") / path, *how)
        for command in commands:
            attempt(*command)

    commands = st.lists(st.sampled_from(READERS), min_size=2, max_size=3, unique=True)
    examples(count, [st.lists(what, min_size=1, max_size=2), st.booleans(), commands], check)


def test_what_is_not_damaged_is_read(run):
    shutil.copytree(run, "runs/r")
    Path("c.yaml").write_text(json.dumps(BASE))
    codes = {command: attempt(*command) for command in READERS}
    expected = dict.fromkeys(READERS, 0)
    # MLflow, which nothing is sent to here, lacks something, so that the run is incomplete; it trained no model alone.
    expected |= {READERS[-4]: 1, READERS[-1]: 2}
    assert codes == expected
    assert Config.model_validate(RunFolder("runs/r").config()).resolved() == RunFolder("runs/r").config()
