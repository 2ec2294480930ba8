"""Killed at any instant after the last step, a run is brought to its end by one command; everything is there once."""

import itertools
import json
import os
import shutil
from collections import Counter

import pytest
from dying import Death, Killed, plan_of, run
from mlflow import MlflowClient

from popmtl.cli import BAD_REQUEST, OK, main
from popmtl.runs.folder import RunFolder
from popmtl.tracking import mlflow_sender, mlflow_sink
from popmtl.tracking.outbox import CURSOR, JOURNAL

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # they were killed


@pytest.fixture(scope="module")
def quick():
    """A run that tells MLflow what there is at once, as longer runs do in their course."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setattr(mlflow_sink, "SEND_SECONDS", 0.05)
        patch.setattr(mlflow_sink, "SAVE_SECONDS", 0.05)
        patch.setattr(mlflow_sink, "CURVE_SECONDS", 3600.0)  # a busy machine adds points otherwise
        yield patch


@pytest.fixture(scope="module")
def death(quick):
    return Death(quick)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty store, which takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class Undisturbed:
    """What a run of a plan leaves that nothing disturbs."""

    def __init__(self, storage, database, models):
        self.plan, self.database = plan_of(tracking={"models": models}), database
        shutil.copy(database, storage / "mlflow.db")
        assert run(self.plan, storage / "run").complaints == []
        self.left = left_by(storage / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, quick, database):
    return Undisturbed(tmp_path_factory.mktemp("plain"), database, "none")


@pytest.fixture(scope="module")
def modelled(tmp_path_factory, quick, database):
    return Undisturbed(tmp_path_factory.mktemp("modelled"), database, "front")


def left_by(path, uri=None):
    """All that a run leaves but for times, ids and what happened to it on the way."""
    folder, here = RunFolder(path), str(path).encode()
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "tracking" not in file.parts}
    named = {str(file.relative_to(path)): content.replace(here, b"HERE") for file, content in files.items()}
    kept = {
        name: content
        for name, content in named.items()
        if not name.startswith((".", "checkpoints", "events", "origin"))
    }
    kinds = Counter(event["kind"] for event in folder.events())
    journal = folder.lines(JOURNAL)
    keys = Counter(entry["key"] for entry in journal if "key" in entry)
    assert set(keys.values()) == {1}
    client = MlflowClient(uri or f"sqlite:///{path.parent}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name.startswith("popmtl/")]
    names, ids, runs, aliases = {}, {}, {}, {}
    for one in client.search_runs([experiment.experiment_id]):
        name = one.data.tags.get("popmtl.subproblem", "front")
        assert name not in runs, "there is one of each"
        models = [output.model_id for output in (one.outputs.model_outputs if one.outputs else ())]
        names |= dict.fromkeys(models, name)
        ids[one.info.run_id] = name
        tags = ("popmtl.kind", "popmtl.nondominated", "popmtl.stage", "popmtl.chosen_on", "popmtl.lost")
        runs[name] = {
            "status": one.info.status,
            "params": {key: value for key, value in one.data.params.items() if key != "storage"},
            "tags": {key: one.data.tags.get(key) for key in tags},
            "points": {key: points(client, one, key) for key in one.data.metrics},
            "artifacts": sorted(artifacts(client, one.info.run_id)),
            "models": len(models),
        }
    found = client.search_logged_models([experiment.experiment_id])
    assert sorted(model.model_id for model in found) == sorted(names), "each model is of one run"
    versions = client.search_model_versions("name = 'dying'")
    for version in versions:
        (alias,) = client.get_model_version("dying", version.version).aliases
        aliases[alias] = ids[version.run_id]
    assert len(versions) == len(aliases)
    return {
        "files": kept,
        "events": {kind: kinds[kind] for kind in ("trained", "finished", "incomplete")} | {"trained": 1},
        "state": folder.state(),
        "journal": (sorted(keys), journal[-1]["kind"], journal[-1]["status"]),
        "unsent": len(journal) - json.loads(folder.read(CURSOR))["count"],
        "models": sorted((model.name, model.status.value) for model in found),
        "runs": runs,
        "aliases": aliases,
    }


def differences(ours, theirs, where="left"):
    """Each place where two nested contents differ, with both sides in short."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted({*ours, *theirs}, key=str)
        return [one for key in keys for one in differences(ours.get(key), theirs.get(key), f"{where}/{key}")]
    return [] if ours == theirs else [f"{where}: {str(ours)[:300]} instead of {str(theirs)[:300]}"]


def points(client, run, key):
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def artifacts(client, run_id, place=None):
    for file in client.list_artifacts(run_id, place):
        yield from artifacts(client, run_id, file.path) if file.is_dir else (file.path,)


def content(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "mlflow.db" not in file.name}


def bring(plan, path, number):
    """The command that the run's folder calls for; front.json says whether it is there yet."""
    if not (path / "pareto" / "front.json").exists():
        run(plan, path, resumes=True)
    else:
        command = ["track"] if number % 2 else ["train", "--resume"]
        assert main([*command, str(path)]) == OK


def die_everywhere(death, undisturbed, storage, instants, capsys):
    """Trials that die at each of the instants; those that there were, by what they were in the middle of."""
    died_at = {}
    for number in instants:
        storage_of_one = storage / str(number)
        storage_of_one.mkdir()
        shutil.copy(undisturbed.database, storage_of_one / "mlflow.db")
        path = storage_of_one / "run"
        with death.at(number) as died:
            run(undisturbed.plan, path)
        if died:
            died_at[number] = died[0]
            said = capsys.readouterr()
            assert main(["runs", "--storage", str(storage_of_one)]) == OK
            said = capsys.readouterr().out
            if (path / "pareto" / "front.json").exists() and "finished" not in said:
                assert "incomplete" in said
                assert f"popmtl train --resume {path} brings what its end lacks" in said
            bring(undisturbed.plan, path, number)
        assert differences(left_by(path), undisturbed.left) == [], f"died at {number}: {died}"
        before = content(storage_of_one)
        assert main(["track", str(path)]) == OK
        assert main(["train", "--resume", str(path)]) == BAD_REQUEST
        assert "this run has finished" in capsys.readouterr().err
        assert content(storage_of_one) == before, "once more changes nothing"
        assert differences(left_by(path), undisturbed.left) == []
        shutil.rmtree(storage_of_one)
        if not died:
            break
    return died_at


def test_a_death_after_the_last_step_is_mended(death, plain, tmp_path, capsys):
    died_at = die_everywhere(death, plain, tmp_path, range(29, 100, 15), capsys)
    assert len(died_at) >= 3


@pytest.mark.parametrize(
    ("first", "every"),
    [
        pytest.param(1, 11, marks=pytest.mark.slow),
        *(pytest.param(first, 2, marks=pytest.mark.endurance) for first in (1, 2)),
    ],
)
def test_a_death_at_any_instant_after_the_last_step_is_mended(death, modelled, tmp_path, first, every, capsys):
    died_at = die_everywhere(death, modelled, tmp_path, itertools.count(first, every), capsys)
    print(f"{len(died_at)} instants: {Counter(what.split()[0] for what in died_at.values())}")
    assert len(died_at) > 60 / every


@pytest.mark.parametrize("number", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (8, 14, 30))])
def test_a_death_while_it_is_mended_is_mended(death, plain, tmp_path, number):
    shutil.copy(plain.database, tmp_path / "mlflow.db")
    path = tmp_path / "run"
    with death.at(2, after="write pareto/front.json") as first:
        run(plain.plan, path)
    with death.at(number, after=None) as second:
        main(["track", str(path)])
    assert first
    assert second
    assert main(["track", str(path)]) == OK
    assert differences(left_by(path), plain.left) == []


def test_a_lock_beside_the_database_that_is_no_file_keeps_no_one_waiting(tmp_path):
    lock = tmp_path / ".mlflow.db.lock"
    os.mkfifo(lock)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(OSError, match=f"{lock} is not a regular file"), mlflow_sender._one_creator(uri):
        pass
    assert os.listdir(tmp_path) == [".mlflow.db.lock"]


def test_a_database_is_there_whole_or_not_at_all(quick, tmp_path, monkeypatch):
    """MLflow cannot go on with one that was killed while MLflow made it."""

    def die(*arguments):
        raise Killed

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with monkeypatch.context() as patch:
        patch.setattr("popmtl.tracking.mlflow_sender.os.replace", die)
        with pytest.raises(Killed), mlflow_sender._one_creator(uri):
            pass
    (left,) = tmp_path.glob(".mlflow.db.*.new")
    left.with_name(f"{left.name}-journal").write_bytes(b"of a table that was not finished")
    assert not (tmp_path / "mlflow.db").exists()
    with mlflow_sender._one_creator(uri):
        assert [one.name for one in MlflowClient(uri).search_experiments()] == ["Default"]
    assert sorted(os.listdir(tmp_path)) == [".mlflow.db.lock", "mlflow.db"]
