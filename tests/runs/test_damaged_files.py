"""Whatever the files of a run folder hold: one line that names the file, and no other run suffers."""

import hashlib
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from finished_runs import CONFIG, OBJECTIVES, STEPS, WEIGHTS, Settings, members
from run_records import evaluation, record

from popmtl.cli import BAD_REQUEST, FAILED, OK, main
from popmtl.errors import RequestError, RunError
from popmtl.runs.checkpoint import (
    checkpoint_name,
    checkpoints,
    commit,
    last_of_run,
    read_tensors,
    subproblem_file,
    whole,
    write_tensors,
)
from popmtl.runs.folder import RunFolder, runs_in, states
from popmtl.runs.front import Front
from popmtl.runs.records import FILE_BYTES
from popmtl.runs.storage import LocalStorage
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.outbox import CURSOR, JOURNAL, Outbox, read_journal

PLACE = ["sqlite:///none.db", "popmtl/run", None]
LAST, BEFORE = checkpoint_name(20), checkpoint_name(10)
LINES = ["metrics.jsonl", "events.jsonl", JOURNAL]
WHOLE_FILES = ["pareto/front.json", CURSOR, f"{LAST}/manifest.json", f"{LAST}/course.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with every kind of file, and another one, whole, beside it."""
    folder = RunFolder.create(tmp_path_factory.mktemp("storage"), "run")
    folder.write_config({"seed": 3})
    folder.append_event("started", actors="one")
    for step in (10, 20):
        folder.append_metrics(evaluation(step, validation=[[0.1, 0.2]] * 3, curves={"learning_rate": [0.1, None, 0.2]}))
        name = checkpoint_name(step)
        rows = [{"row": torch.full((3,), float(step + i))} for i in range(3)]
        files = [write_tensors(folder, f"{name}/{subproblem_file(i)}", row, {}) for i, row in enumerate(rows)]
        commit(folder, name, files, record(step, 3))
        folder.append_event("checkpoint", step=step, checkpoint=name)
    folder.write("pareto/front.json", Front(OBJECTIVES, [1.0, 1.0], 0.3, 3, STEPS, members()).to_json().encode())
    opening = {"id": "x", "uri": PLACE[0], "experiment": PLACE[1], "parent": None, "artifacts": None}
    opening |= {"run_name": "run", "config_name": "run", "objectives": OBJECTIVES, "weights": WEIGHTS}
    outbox = Outbox(folder, [], PLACE)
    outbox.add("opening", {**opening, "params": {}, "changed": {}})
    for step in (10, 20):
        figures = {"step": step, "hypervolume": 0.5, "front_size": 2, "losses": [[1.0, 2.0]] * 3}
        outbox.add("evaluation", figures, f"evaluation {step}")
    outbox.add("closing", {"status": "FINISHED"})
    outbox.sent.parent, outbox.sent.experiment_id = "p", "1"
    outbox.done()
    outbox.save()
    folder.append_event("finished", hypervolume=0.3)
    shutil.copytree(folder.path, folder.storage / "other")
    return folder.storage


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "storage")
    return RunFolder(tmp_path / "storage" / "run")


def call(command):
    """What a command or function says: nothing where it ends well, or one line."""
    try:
        command()
    except (RequestError, RunError) as error:
        return str(error)
    return ""


def cli(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code in (OK, FAILED, BAD_REQUEST)
    assert err.count("\n") == (code != OK), err
    return code, out, err


def everything(run, capsys):
    """All that reads a run's files; what was said."""
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert code == OK
    listed = [line.split() for line in out.splitlines()]
    assert ["other", "finished", "20", "0.5"] in listed, "the other run is not listed"
    said = [line for line in out.splitlines() if line.startswith("warning: ")]
    (state,) = states([run], said.append)
    assert [line for line in listed if line[:2] == ["run", state]]
    said.append(cli(capsys, "front", str(run.path))[2])
    said.append(cli(capsys, "pick", str(run.path), "--knee", "--json")[2])
    said += cli(capsys, "verify", str(run.path))[1].splitlines()

    def track():
        journal = read_journal(run)
        outbox = Outbox(run, journal, PLACE)
        said.extend(outbox.lost)
        while outbox.next(0):
            outbox.done()
        outbox.save()
        Outbox(run, read_journal(run), PLACE)

    said.append(call(track))
    said.append(call(lambda: last_of_run(run, said.append)))
    said.append(call(lambda: run.forget_metrics_after(15, said.append)))
    said.append(call(lambda: [run.append_metrics(evaluation(20)), run.append_event("resumed")]))
    assert run.metrics(pytest.fail)[-1]["step"] == 20
    assert run.events(said.append)[-1]["kind"] == "resumed"
    assert not [what for what in said if "\n" in what.strip()]
    return "\n".join(said)


FOREIGN = {
    "garbage": b"garbage\n",
    "not UTF-8": b"\xff\xfe{\n",
    "half of it": None,
    "nothing": b"",
    "a list": b"[1, 2]\n",
    "an empty object": b"{}\n",
    "a text": b'"text"\n',
    "null": b"null\n",
    "zeros": b"\0" * 4096 + b"\n",
    "wrong types": b'{"stage": 5, "step": "x", "hypervolume": [], "kind": null, "time": 3, "files": {}}\n',
    "NaN": b'{"stage": "mtgd", "step": NaN, "hypervolume": NaN, "time": NaN, "kind": NaN}\n',
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "a number of 4,000 digits": b'{"kind": "event", "time": ' + b"9" * 4000 + b', "step": ' + b"9" * 4000 + b"}\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"\n",
    "half a character": b'{"kind": "\\ud800", "time": "x"}\n',
    "a truth for a number": b'{"stage": "mtgd", "step": true, "hypervolume": 0.5}\n',
    "an infinite number": b'{"stage": "mtgd", "step": 1e999, "hypervolume": 1e999, "kind": "event", "time": 1e999}\n',
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", LINES + WHOLE_FILES)
def test_what_is_no_record_is_one_line_that_names_the_file(run, name, what, capsys):
    before = run.read(name)
    content = FOREIGN[what]
    if content is None:
        content = (
            before[: len(before) // 2].rpartition(b"\n")[0] + b"\n" if name in LINES else before[: len(before) // 2]
        )
    if name in LINES and content:
        lines = before.splitlines(keepends=True)
        content = b"".join([lines[0], content, *lines[1:]]) if what != "half of it" else content
    run.write(name, content)
    said = everything(run, capsys)
    if name in LINES and what not in ("nothing", "half of it"):
        assert f"{run.path}/{name}, line 2: " in said
    elif name not in (CURSOR, *LINES):
        assert f"{run.path}/{name} " in said
    whole(run, BEFORE)


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a device", "a link to nothing", "a link to itself"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "pareto/front.json", f"{LAST}/manifest.json"])
def test_what_is_no_file_is_not_read(run, name, what, capsys):
    path = run.path / name
    path.unlink()
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a link to nothing":
            path.symlink_to(path.parent / "nothing")
        case _:
            path.symlink_to(path)
    start = time.monotonic()
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert (code, "other" in out) == (OK, True)
    for command in ("front", "verify"):
        cli(capsys, command, str(run.path))
    said = []
    call(lambda: last_of_run(run, said.append))
    if name.endswith("manifest.json") and what != "a device":  # a link that leads out of the folder is refused at once
        assert name in said[0]
        assert checkpoints(run) == [BEFORE]
    if name.endswith("jsonl"):
        with pytest.raises((RequestError, OSError), match=None if what == "a link to itself" else name):
            run.lines(name)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["metrics.jsonl", "pareto/front.json", f"{LAST}/course.json", "config.yaml"])
def test_a_file_without_an_end_is_refused(run, name, capsys):
    with (run.path / name).open("wb") as file:
        file.truncate(2**40)  # takes no room
    start = time.monotonic()
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert (code, "other" in out) == (OK, True)
    command = {"config.yaml": "front", "pareto/front.json": "front"}.get(name, "verify")
    _, out, err = cli(capsys, command, str(run.path))
    if name == "metrics.jsonl":
        with pytest.raises(RequestError, match=f"metrics.jsonl is damaged: it has a line of {FILE_BYTES} bytes"):
            run.lines(name)
    else:
        assert name in out + err
    assert time.monotonic() - start < 10


def test_a_file_of_nothing_but_damaged_lines_is_refused_as_a_whole(run, capsys):
    for name in LINES:
        run.write(name, b"\n" * 2**24)
    start = time.monotonic()
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert (code, "other" in out, "more than 10000 lines of it are" in out) == (OK, True, True)
    assert cli(capsys, "track", str(run.path))[0] == BAD_REQUEST
    with pytest.raises(RequestError, match="more than 10000 lines of it are"):
        run.forget_metrics_after(10, pytest.fail)
    assert time.monotonic() - start < 10


def test_a_cut_last_line_is_no_record_and_goes_when_the_file_is_appended_to(run, capsys):
    for name in LINES:
        run.write(name, run.read(name) + b'{"time": "2026-1')
    assert cli(capsys, "runs", "--storage", str(run.storage))[1].count("finished") == 2
    said = everything(run, capsys)
    assert "line" not in said
    assert [line["step"] for line in run.metrics()] == [10, 20]
    assert run.events()[-1]["kind"] == "resumed"
    assert len(read_journal(run)) == 4


def test_a_run_goes_on_without_the_damaged_lines_of_its_metrics_and_keeps_what_the_file_was(run):
    lines = run.read("metrics.jsonl").splitlines(keepends=True)
    harmed = b"".join([lines[0], b"[]\n", *[b"x\n"] * 8, lines[1]])
    run.write("metrics.jsonl", harmed)
    said = []
    run.forget_metrics_after(15, said.append)
    assert run.read("metrics.jsonl") == lines[0]
    assert run.read("metrics.jsonl.damaged") == harmed
    assert [what.partition(", ")[2].partition(":")[0] for what in said[:5]] == [f"line {n}" for n in range(2, 7)]
    assert said[5:] == ["and 4 more lines of this file"]
    run.forget_metrics_after(15, pytest.fail)


def test_a_damaged_line_of_the_journal_keeps_its_number(run):
    """The cursor counts lines: without its place, the one after it would not be sent."""
    lines = run.read(JOURNAL).splitlines(keepends=True)
    run.write(JOURNAL, b"".join([lines[0], b"{}\n", *lines[2:]]))
    outbox = Outbox(run, read_journal(run), PLACE)
    assert outbox.lost == [f"{run.path}/{JOURNAL}, line 2: time: field required"]
    sent = []
    while entries := outbox.next(0):
        sent += entries
        outbox.done()
    assert [entry["kind"] for entry in sent] == ["evaluation", "closing"]
    outbox.save()
    again = Outbox(run, read_journal(run), PLACE)
    assert (again.next(0), again.lost, again.refused) == ([], outbox.lost, []), "it is not forgotten"
    run.write(JOURNAL, b"".join(lines))
    mended = Outbox(run, read_journal(run), PLACE)
    assert ([entry["step"] for entry in mended.next(0)], mended.lost) == ([10], [])
    mended.done()
    assert (mended.next(0), mended.sent.refused) == ([], [])


def test_a_run_that_mlflow_cannot_be_told_to_know_is_not_begun_there_again(run):
    lines = run.read(JOURNAL).splitlines(keepends=True)
    run.write(JOURNAL, b"".join([b"x\n", *lines[1:]]))
    with pytest.raises(RequestError, match=r"outbox\.jsonl, line 1: it is not JSON.*nobody knows the run in MLflow"):
        MlflowSink.open(Settings(), run, CONFIG, OBJECTIVES, WEIGHTS, STEPS)


@pytest.mark.parametrize("change", [{"count": 3, "parent": None}, {"members": {"x": "y"}}, {"count": -1}, {"more": 1}])
def test_a_damaged_cursor_has_everything_sent_again(run, change, caplog):
    run.write(CURSOR, json.dumps(json.loads(run.read(CURSOR)) | change).encode())
    outbox = Outbox(run, read_journal(run), PLACE)
    assert (len(outbox), outbox.sent.parent) == (4, None)
    assert f"{CURSOR} is damaged: " in caplog.text


MANIFESTS = {
    "lists subproblem-00000.safetensors twice": lambda files: [*files, files[0]],
    "does not list subproblem-00001.safetensors": lambda files: [files[0], *files[2:]],
    "lists 2 subproblems, and the run has 3": lambda files: [files[0], files[1], files[3]],
    "does not list course.json": lambda files: files[:3],
    "does not list subproblem-00003.safetensors": lambda files: [
        *files,
        files[0] | {"name": "subproblem-00099.safetensors"},
    ],
    "files.4.name: string should match": lambda files: [*files, files[0] | {"name": "../../course.json"}],
    "files.0.size: input should be greater than or equal to 0": lambda files: [files[0] | {"size": -1}, *files[1:]],
    "files.0.size: input should be less than": lambda files: [files[0] | {"size": 10**400}, *files[1:]],
    "files.0.sha256: string should match": lambda files: [files[0] | {"sha256": "0" * 63}, *files[1:]],
    "files.0.x: extra inputs are not permitted": lambda files: [files[0] | {"x": 1}, *files[1:]],
    "subproblem-00000.safetensors has ": lambda files: [files[0] | {"size": 9}, *files[1:]],
    "subproblem-00001.safetensors is not what was written": lambda files: [
        files[0],
        files[1] | {"sha256": files[0]["sha256"]},
        *files[2:],
    ],
}


@pytest.mark.parametrize("why", MANIFESTS)
def test_a_manifest_that_is_not_that_of_the_run_is_set_aside(run, why, capsys):
    files = json.loads(run.read(f"{LAST}/manifest.json"))["files"]
    run.write(f"{LAST}/manifest.json", json.dumps({"files": MANIFESTS[why](files)}).encode())
    code, out, err = cli(capsys, "verify", str(run.path))
    assert (code, why in out) == (FAILED, True), out
    assert "1 of 2 checkpoints are damaged" in err
    said = []
    assert last_of_run(run, said.append)[0] == BEFORE
    assert len(said) == 1
    assert why in said[0]
    assert last_of_run(run, pytest.fail)[0] == BEFORE
    assert why in run.read(f"{LAST}/damaged").decode()


def test_of_checkpoints_that_are_all_damaged_none_is_set_aside(run):
    for name in (LAST, BEFORE):
        run.write(f"{name}/manifest.json", b"{}")
    for _ in range(2):
        with pytest.raises(RequestError, match=r"no checkpoint is whole: .*manifest\.json is damaged.*manifest\.json"):
            last_of_run(run, lambda what: None)


def test_a_file_that_is_whole_and_not_ours_is_said_to_be_so(run):
    files, saved = whole(run, LAST)
    saved.pop("version")
    for content in (b"", b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"):
        forged = write_tensors(run, f"{LAST}/x", {}, {})
        run.write(f"{LAST}/{files[1].name}", content)
        forged = type(forged)(files[1].name, len(content), hashlib.sha256(content).hexdigest())
        commit(run, LAST, [files[0], forged, files[2]], saved)
        whole(run, LAST)
        with pytest.raises(RunError, match=r"subproblem-00001.safetensors is not a file of PopMTL's: ") as refusal:
            read_tensors(run, LAST, forged)
        assert "\n" not in str(refusal.value)


def test_an_unreadable_run_does_not_keep_the_others_from_being_listed(run, capsys, monkeypatch):
    (run.path / ".lock").unlink(missing_ok=True)
    os.mkfifo(run.path / ".lock")
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert (code, out.count("finished"), out.count("damaged")) == (OK, 1, 1)
    assert ".lock: is not a regular file" in out
    (run.path / ".lock").unlink()
    real = RunFolder.last

    def fails(self, *arguments):
        if self.name == "run":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments)

    monkeypatch.setattr(RunFolder, "last", fails)
    code, out, _ = cli(capsys, "runs", "--storage", str(run.storage))
    assert (code, out.count("finished"), out.count("damaged")) == (OK, 1, 1)
    assert "Permission denied" in out
    entry = LocalStorage.entry

    def forbids(self, name):
        if (self.path.name, name) == ("run", "config.yaml"):
            raise PermissionError(13, "Permission denied")
        return entry(self, name)

    monkeypatch.setattr(LocalStorage, "entry", forbids)
    assert [one.name for one in runs_in(run.storage)] == ["other"]


def harmed(content, other, random):
    """The content with a seeded harm."""
    match random.randrange(5):
        case 0:
            content = bytearray(content)
            for _ in range(random.choice((1, 1, 3))):
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            return bytes(content)
        case 1:
            return content[: random.randrange(len(content))]
        case 2:
            start, length = random.randrange(len(content)), random.randrange(64)
            return content[:start] + random.randbytes(length) + content[start + length :]
        case 3:
            lines = content.splitlines(keepends=True)
            random.shuffle(lines)
            return b"".join(lines[: random.randrange(1, len(lines) + 1)])
        case _:
            return other


def check_harms(run, capsys, seeds):
    names = LINES + WHOLE_FILES + [f"{LAST}/{subproblem_file(1)}"]
    contents = {name: run.read(name) for name in names}
    for seed in seeds:
        source = random.Random(seed)
        name = source.choice(names)
        run.write(name, harmed(contents[name], contents[source.choice(names)], source))
        try:
            everything(run, capsys)
            (there,) = [found for found in [last_of_run(run, lambda what: None)] if found]
            same = run.read(name) == contents[name]
            if name.startswith(LAST) and not same and there[0] == LAST:
                assert name.endswith("manifest.json"), "only blanks of a manifest may change"
                assert json.loads(run.read(name)) == json.loads(contents[name])
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {name}") from error
        for known, content in contents.items():
            run.write(known, content)
        run.files.remove(f"{LAST}/damaged")


def test_random_harms_of_every_file_are_one_line(run, capsys):
    check_harms(run, capsys, range(30))


@pytest.mark.slow
def test_a_thousand_random_harms_of_every_file_are_one_line(run, capsys):
    check_harms(run, capsys, range(1000, 2000))


def test_numbers_come_back_exactly(run):
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.random.default_rng(1).integers(-300, 300, 1000)
    run.append_metrics(evaluation(30, validation=[values], more=values))
    last = run.metrics()[-1]
    assert last["validation"] == [values.tolist()] == [last["more"]]
