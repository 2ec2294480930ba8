"""A run's folder may be anyone's: what it can have no command read, write, run or send."""

import errno
import json
import os
import shutil
import sys
import threading
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from finished_runs import CONFIG, OBJECTIVES, STEPS, WEIGHTS, Settings, finished_folder
from mlflow import MlflowClient
from tracked_problems import TwoHeadsModel

from popmtl import modules
from popmtl.cli import BAD_REQUEST, FAILED, OK, main
from popmtl.config import validated
from popmtl.errors import RequestError
from popmtl.problems.registry import load_problem
from popmtl.runs.folder import LOCK, RunFolder, runs_in, states
from popmtl.runs.results import load_model, model_file
from popmtl.runs.storage import LocalStorage, open_storage
from popmtl.runs.trust import ORIGIN, admit, default_database, origin_of, without_credentials
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.outbox import CURSOR, JOURNAL, Outbox, read_journal
from popmtl.tracking.target import Target

SECRET = "what only the user knows"
ESCAPES = [
    "..",
    "../secret",
    "a/../../secret",
    "/etc/hostname",
    "//host/x",
    "a//b",
    "./a",
    "a/.",
    "a/",
    "\0",
    "file:///x",
]
CALLS = {
    "read": lambda files, name: files.read(name),
    "write": lambda files, name: files.write(name, b"x"),
    "append": lambda files, name: files.append(name, b"x\n"),
    "open": lambda files, name: files.open(name),
    "fetched": lambda files, name: files.fetched(name).__enter__(),
    "entry": lambda files, name: files.entry(name),
    "children": lambda files, name: files.children(name),
    "remove": lambda files, name: files.remove(name),
    "remove_folder": lambda files, name: files.remove_folder(name),
    "check": lambda files, name: files.check(name),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-the-user")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(modules, "_folders", [])
    monkeypatch.setattr(modules, "_used", [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, without a journal."""
    return finished_folder(tmp_path_factory.mktemp("storage"), "run", [TwoHeadsModel() for _ in range(3)])[0].path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, which is as its user made it."""
    return RunFolder(shutil.copytree(finished, tmp_path / "runs" / "run"))


@pytest.fixture
def secret(tmp_path):
    """A file of the user's, outside of the run."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "secret"
    path.write_text(SECRET)
    return path


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """The one line of a command that is refused, and leaks nothing into the folder where it is given."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        assert main([str(argument) for argument in arguments]) == BAD_REQUEST
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert SECRET not in out + err
        return err

    return refuse


@pytest.fixture
def recorder():
    """A server that writes down what it is asked, and knows nothing."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append((self.command, self.path, dict(self.headers), body))
            self.send_response(getattr(self.server, "status", 404))
            if hasattr(self.server, "elsewhere"):
                self.send_header("Location", self.server.elsewhere + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer  # noqa: N815

        def log_message(self, *_):
            pass

    servers = []

    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        server.asked, server.uri = asked, f"http://127.0.0.1:{server.server_port}"
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def stranger(folder):
    """Makes a folder another user's."""
    (folder.path / ORIGIN).unlink()
    return folder


def journal(folder, *entries, **opening):
    """Writes a journal that opens a run and then holds these entries."""
    opening = {
        "kind": "opening",
        "id": "1",
        "uri": default_database(folder),
        "experiment": "popmtl/e",
        "parent": None,
        "artifacts": None,
        "run_name": "run",
        "config_name": "e",
        "objectives": OBJECTIVES,
        "weights": WEIGHTS,
        "params": {},
        "changed": {},
    } | opening
    lines = [opening, *entries, {"kind": "closing", "status": "FINISHED"}]
    folder.files.write(JOURNAL, "".join(json.dumps({"time": 1, **line}) + "\n" for line in lines).encode())


def problem_module(folder, name, body=""):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(
        f"from tracked_problems import TwoHeads\n{body}\nclass Mine(TwoHeads):\n    pass\n"
    )
    return folder / f"{name}.py"


def own_run(storage, module):
    """A finished run of a problem in a module of the user's."""
    folder, _ = finished_folder(storage, "run", [TwoHeadsModel() for _ in range(3)])
    folder.write_config({**CONFIG, "problem": {"name": f"{module}:Mine"}})
    return folder


# Names and links.


@pytest.mark.parametrize("call", CALLS)
def test_no_name_leads_out_of_a_folder(storage, tmp_path, call):
    files = open_storage(f"{storage.partition('?')[0]}/run{''.join(storage.partition('?')[1:])}")
    for name in ESCAPES:
        with pytest.raises(RequestError, match="is not the name of a file in this folder"):
            CALLS[call](files, name)
        with pytest.raises(RequestError, match="is not the name of a file in this folder"):
            files.where(name)


@pytest.mark.parametrize("depth", ["linked", "linked/secret", "a/b/linked", "a/b/linked/secret", "a/b/linked/new"])
@pytest.mark.parametrize("call", CALLS)
def test_no_link_leads_out_of_a_folder(tmp_path, secret, call, depth):
    files = LocalStorage(tmp_path / "run")
    link = files.path / depth.partition("linked")[0] / "linked"
    link.parent.mkdir(parents=True)
    link.symlink_to(secret.parent if "linked/" in depth else secret)
    with pytest.raises(RequestError, match=rf"{depth}: leads out of .*run, to {secret.parent}"):
        CALLS[call](files, depth)
    with pytest.raises(RequestError, match="leads out of"):
        files.check_links()
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]
    assert secret.read_text() == SECRET


def test_nothing_is_written_through_a_link_that_waits_for_it(tmp_path, secret):
    files = LocalStorage(tmp_path / "run")
    files.path.mkdir()
    (files.path / ".front.json.part").symlink_to(secret)
    files.write("front.json", b"new")
    assert (files.read("front.json"), secret.read_text()) == (b"new", SECRET)


def test_the_folder_and_its_storage_may_be_links_and_links_may_stay_inside(run, tmp_path):
    (tmp_path / "linked").symlink_to(run.path.parent)
    (run.path.parent / "alias").symlink_to(run.path)
    (run.path / "pareto" / "again.json").symlink_to("front.json")
    for location in (tmp_path / "linked" / "run", run.path.parent / "alias"):
        folder = RunFolder(location)
        folder.files.check_links()
        assert folder.front().objectives == OBJECTIVES
        assert folder.read("pareto/again.json") == folder.read("pareto/front.json")
        assert origin_of(folder)
    assert {folder.name for folder in runs_in(tmp_path / "linked")} == {"run", "alias"}


def test_a_pipe_keeps_no_one_waiting(run):
    for name in ("pareto/front.json", LOCK):
        (run.path / name).unlink(missing_ok=True)
        os.mkfifo(run.path / name)
    with pytest.raises(RequestError, match=r"front\.json: is not a regular file"):
        run.read("pareto/front.json")
    said = []
    assert states([run], said.append) == ["damaged"]
    assert ".lock: is not a regular file" in said[0]


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("config.yaml", ["front RUN", "pick RUN --knee", "verify RUN", "track RUN --trust", "ui RUN --trust"]),
        ("pareto", ["front RUN", "pick RUN --knee", "pick RUN --knee --export out --trust", "compare RUN RUN"]),
        ("pareto/front.json", ["front RUN", "pick RUN --knee --from last"]),
        ("checkpoints", ["verify RUN", "train --resume RUN --trust"]),
        ("events.jsonl", ["train --resume RUN --trust"]),
        ("tracking", ["track RUN --trust", "ui RUN --trust"]),
        (LOCK, ["track RUN --trust", "train --resume RUN --trust"]),
    ],
)
def test_no_command_reads_through_a_link(run, secret, refused, name, commands):
    place, outside = run.path / name, secret
    if place.is_dir():
        outside = shutil.move(place, secret.parent / "moved")
    elif name in ("checkpoints", "tracking"):
        outside = secret.parent
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    for command in commands:
        assert "leads out of" in refused(*command.replace("RUN", str(run.path)).split())
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("model", ["{secret}", "../../../home/secret", "models/../../../../home/secret", "link"])
def test_weights_outside_of_the_run_are_not_shown_nor_exported(run, secret, refused, tmp_path, model):
    front = json.loads(run.read("pareto/front.json"))
    for member in front["members"]:
        member["model"] = model.format(secret=secret) if model != "link" else model_file(member["subproblem"])
        if model == "link":
            (run.path / "pareto" / member["model"]).unlink()
            (run.path / "pareto" / member["model"]).symlink_to(secret)
    run.write("pareto/front.json", json.dumps(front).encode())
    for more in ([], ["--json"], ["--export", "out"], ["--export", "out", "--trust"]):
        said = refused("pick", run.path, "--knee", *more)
        assert "leads out of" in said or "is not the name of a file" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["{secret}", "../../home/secret", "pareto/link", "linked/secret"])
def test_no_file_outside_of_the_run_is_sent(run, secret, tmp_path, capsys, monkeypatch, name):
    (run.path / "pareto" / "link").symlink_to(secret)
    (run.path / "linked").symlink_to(secret.parent)
    journal(run, {"kind": "file", "name": name.format(secret=secret)})
    assert main(["track", str(run.path)]) == FAILED
    assert "leads out of" in (said := capsys.readouterr().err) or "is not the name of a file" in said
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert {path.resolve() for path in kept} == {secret}


# Servers.


@pytest.mark.parametrize("way", ["journal", "config"])
@pytest.mark.parametrize("command", ["track RUN", "ui RUN", "train --resume RUN"])
def test_no_server_is_asked_that_only_the_folder_names(run, recorder, refused, way, command):
    server = recorder()
    config = {"problem": {"name": "vlmop2"}, "population": {"subproblems": 4}}
    run.write_config(config)
    if way == "config":
        config["tracking"] = {"uri": server.uri}
        (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    journal(run, {"kind": "file", "name": "config.yaml"}, uri=server.uri)
    (run.path / "pareto" / "front.json").unlink()
    said = refused(*command.replace("RUN", str(run.path)).split())
    if (way, command) == ("config", "train --resume RUN"):
        assert "was not made by this user" in said
    else:
        assert f"names the tracking server {server.uri}, and you did not: give MLFLOW_TRACKING_URI={server.uri}" in said
    assert "--trust" in said
    assert server.asked == []


def test_a_server_that_the_user_names_is_asked(run, recorder, monkeypatch, capsys):
    server = recorder()
    journal(stranger(run), uri=server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert main(["track", str(run.path)]) == FAILED
    assert server.asked
    assert server.asked[0][2]["Authorization"] == "Bearer token-of-the-user"


def test_what_a_strangers_journal_names_on_the_users_server_is_asked_for(run, monkeypatch, refused, recorder):
    server = recorder()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    journal(stranger(run), uri=server.uri, parent="abc")
    assert "names the run abc as the parent" in refused("track", run.path)
    journal(run, uri=server.uri, experiment="production")
    assert "names the experiment 'production'" in refused("track", run.path)
    journal(run, {"kind": "picker", "step": 1}, uri=server.uri)
    assert "runs tracked_problems:TwoHeads of" in refused("track", run.path)
    assert server.asked == []


@pytest.mark.parametrize("place", ["elsewhere", "link", "artifacts"])
def test_a_stranger_names_no_file_to_write_to(run, secret, refused, tmp_path, place):
    storage = run.path.parent
    if place == "elsewhere":
        journal(stranger(run), uri=f"sqlite:///{secret}")
    else:
        journal(stranger(run), {"kind": "file", "name": "config.yaml"})
        (storage / ("mlflow.db" if place == "link" else "mlartifacts")).symlink_to(secret)
    assert "names the tracking server sqlite:///" in refused("track", run.path)
    assert secret.read_text() == SECRET


def test_a_redirect_is_not_followed(run, recorder, capsys):
    elsewhere, server = recorder(), recorder()
    elsewhere.asked = server.asked
    server.status, server.elsewhere = 307, elsewhere.uri
    sink = MlflowSink.open(Settings(server.uri), run, CONFIG, OBJECTIVES, WEIGHTS, STEPS, "digits")
    sink.close("FINISHED", timeout=5)
    hosts = {headers["Host"] for _, _, headers, _ in server.asked}
    assert hosts == {server.uri.removeprefix("http://")}


def test_files_go_to_no_server_that_the_database_names(run, recorder):
    server = recorder()
    uri = default_database(run)
    MlflowClient(uri).create_experiment("popmtl/digits", artifact_location=f"{server.uri}/api/files")
    sink = MlflowSink.open(Settings(uri), run, CONFIG, OBJECTIVES, WEIGHTS, STEPS, "digits")
    assert any("which nothing is sent to" in message for message in sink.close("FINISHED", timeout=60))
    assert server.asked == []


@pytest.mark.parametrize(
    ("uri", "artifacts", "within", "right"),
    [
        ("http://host:5000", "mlflow-artifacts:/1/2/artifacts", None, True),
        ("http://host:5000", "mlflow-artifacts://host:5000/1", None, True),
        ("http://host:5000", "mlflow-artifacts://evil:5000/1", None, False),
        ("http://host:5000", "http://host:5000/api/2.0/mlflow-artifacts/artifacts/1", None, True),
        ("https://user:password@host", "https://host:443/1", None, True),
        ("https://host", "http://host:443/1", None, False),
        ("http://host:5000", "http://host:5001/1", None, False),
        ("http://host", "http://host@evil/1", None, False),
        ("http://host", "ftp://user:password@evil/1", None, False),
        ("http://host", "s3://bucket/1", None, True),
        ("http://host", "file:///home/user", None, False),
        ("http://host", "/home/user", None, False),
        ("http://127.0.0.1:5000", "/srv/mlruns/1", None, True),
        ("sqlite:////s/mlflow.db", "file:///elsewhere/1", None, True),
        ("sqlite:////s/mlflow.db", "file:///s/mlartifacts/1", "/s", True),
        ("sqlite:////s/mlflow.db", "file:///s/%2e%2e/elsewhere", "/s", False),
        ("sqlite:////s/mlflow.db", "file:///elsewhere/1", "/s", False),
        ("sqlite:////s/mlflow.db", "s3://evil/1", "/s", False),
        ("sqlite:////s/mlflow.db", "mlflow-artifacts:/1", None, False),
        ("sqlite:////s/mlflow.db", "http://evil/1", None, False),
    ],
)
def test_where_files_may_go(uri, artifacts, within, right):
    target = Target(uri, None, Path(within) if within else None)
    if right:
        assert target.check(artifacts) == artifacts
    else:
        with pytest.raises(RequestError, match="which nothing is sent to"):
            target.check(artifacts)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("https://user:p%40ss@host/x", "https://host/x"),
        ("https://token@host", "https://host"),
        (
            "request to http://u:p@host:5/api failed, http://u:p@host:5",
            "request to http://host:5/api failed, http://host:5",
        ),
        ("postgresql+psycopg2://u:p/w@host/db", "postgresql+psycopg2://host/db"),
        ("postgresql://host/db?user=u&password=p%26q&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        ("http://host?access_token=abc", "http://host?access_token=***"),
    ],
)
def test_credentials_are_taken_out_of_a_text(text, masked):
    assert without_credentials(text) == masked
    assert without_credentials(masked) == masked


def test_a_password_is_used_and_written_nowhere(tmp_path, recorder, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    server = recorder()
    server.status = 500
    uri = server.uri.replace("//", "//me:pass5e1c7@")
    folder = RunFolder.create(tmp_path, "run")
    config = {**CONFIG, "tracking": {"uri": uri}}
    folder.write_config(config)
    sink = MlflowSink.open(Settings(uri), folder, config, OBJECTIVES, WEIGHTS, STEPS, "digits")
    messages = sink.close("FINISHED", timeout=4)
    assert {headers["Authorization"] for _, _, headers, _ in server.asked} == {"Basic bWU6cGFzczVlMWM3"}
    said = "".join(messages) + caplog.text
    assert server.uri in said
    for text in (said, *(path.read_text() for path in folder.path.rglob("*") if path.is_file())):
        assert "pass5e1c7" not in text
    assert folder.config()["tracking"]["uri"] == server.uri


def test_a_storage_url_has_no_password():
    with pytest.raises(RequestError, match=r"^storage s3://\*\*\*@bucket/x: has a password in it"):
        open_storage("s3://key:secret@bucket/x")


# Whose code.


def test_a_run_is_its_users_wherever_it_is_moved_to(run, tmp_path):
    moved = RunFolder(shutil.move(run.path, tmp_path / "elsewhere"))
    assert load_model(moved.path, 0)


@pytest.mark.parametrize("change", ["no record", "config", "record", "key", "no key", "open key"])
def test_a_strangers_code_runs_only_with_trust(run, tmp_path, monkeypatch, refused, change):
    state = Path(os.environ["XDG_STATE_HOME"])
    if change == "no record":
        stranger(run)
    elif change == "config":
        (run.path / "config.yaml").write_text(run.read("config.yaml").decode() + "# mine\n")
    elif change == "record":
        record = json.loads(run.read(ORIGIN))
        record["origin"]["file"] = "/elsewhere/tracked_problems.py"
        run.write(ORIGIN, json.dumps(record).encode())
    else:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        if change != "no key":
            shutil.copytree(state, tmp_path / "state")
            key = tmp_path / "state" / "popmtl" / "key"
            key.write_bytes(b"k" * 32) if change == "key" else key.chmod(0o644)
    with pytest.raises(RequestError, match=r"was not made by this user.*tracked_problems\.py: give trust=True"):
        load_model(run.path, 0)
    assert load_model(run.path, 0, trust=True)
    assert "was not made by this user" in refused("pick", run.path, "--knee", "--export", "out")
    assert main(["pick", str(run.path), "--knee", "--export", "out", "--trust"]) == OK


def test_what_reads_data_alone_asks_for_no_trust(run, capsys):
    stranger(run)
    for arguments in (["front", "RUN"], ["pick", "RUN", "--knee"], ["compare", "RUN", "RUN"], ["verify", "RUN"]):
        assert main([str(run.path) if argument == "RUN" else argument for argument in arguments]) == OK
    assert main(["runs", "--storage", str(run.path.parent)]) == OK


def test_a_strangers_run_is_not_resumed(run, refused):
    (run.path / "pareto" / "front.json").unlink()
    config = {"problem": {"name": "no_such_module:Evil"}, "population": {"subproblems": 4}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    said = refused("train", "--resume", run.path)
    assert "runs no_such_module:Evil of a module that is not here: give --trust if you trust who did" in said
    config["problem"] = {"name": "table", "path": "/etc/passwd", "targets": ["a", "b"]}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "builds table as the run says: give --trust" in refused("train", "--resume", run.path)


@pytest.mark.parametrize("ended", [True, False])
def test_no_module_of_an_optimizer_is_imported_before_the_user_trusts(run, tmp_path, refused, ended):
    ran = tmp_path / "ran"
    (tmp_path / "evil_optimizer.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ImportError\n")
    config = run.config() | {"train": {"optimizer": {"name": "evil_optimizer:Opt"}}}
    run.write("config.yaml", yaml.safe_dump(config).encode())
    if not ended:
        (run.pareto / "front.json").unlink()
    else:
        run.append_event("incomplete")
    says = refused("train", "--resume", run.path, *(["train.steps=9"] if ended else []))
    assert "give --trust if you trust who did" in says
    assert f"and evil_optimizer:Opt of {tmp_path}/evil_optimizer.py: give" in says
    assert not ran.exists()
    main(["train", "--resume", str(run.path), "--trust", "train.steps=9"])
    assert ran.exists()


@pytest.mark.parametrize("name", ["evil_a:", "evil_b:Opt-x", "evil_c:a.b:c"])
def test_every_module_that_a_config_has_imported_is_named(run, tmp_path, name):
    ran, module = tmp_path / "ran", name.partition(":")[0]
    (tmp_path / f"{module}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    modules.look_in(str(tmp_path))
    config = run.config() | {"train": {"optimizer": {"groups": [{"match": "*", "name": name}]}}}
    run.write("config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(RequestError, match=f"and {name} of {tmp_path}/{module}.py: give --trust"):
        admit(run, "vlmop2", False, "--trust", print)
    assert not ran.exists()
    with pytest.raises(RequestError, match=f"{module} has no torch.optim.Optimizer"):
        validated(config, "config.yaml")
    assert ran.exists(), "it is imported, though there is no such class"


def test_a_config_that_names_many_modules_is_refused_in_one_short_line(run):
    groups = [{"match": "*", "name": f"evil{i}.{'x' * 200}:Opt"} for i in range(500)]
    config = {"problem": {"name": "x" * 10_000 + ":P"}, "train": {"optimizer": {"groups": groups}}}
    run.write("config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(RequestError, match="and 495 more: give --trust") as refused:
        admit(run, config["problem"]["name"], False, "--trust", print)
    assert len(str(refused.value)) < 2000


def test_a_folder_without_a_config_is_nobodys(run, refused, recorder, tmp_path):
    """Its journal would decide where the run is sent."""
    server = recorder()
    (run.path / "config.yaml").unlink()
    (run.pareto / "front.json").unlink()
    run.append_event("started")
    journal(run, uri=server.uri)
    config = tmp_path / "mine.yaml"
    config.write_text("problem: vlmop2\npopulation: {subproblems: 4}\n")
    assert "nothing tells whose run it is: give --trust" in refused("train", config, "--resume", run.path)
    assert server.asked == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"problem": None}, "problem: input should be a valid dictionary, not None"),
        ({"problem": "vlmop2"}, "problem: input should be a valid dictionary, not 'vlmop2'"),
        ({"problem": {"name": 5}}, "problem.name: input should be a valid string, not 5"),
        ({"problem": {"x": 1}}, "problem.name: field required"),
        ({"tracking": [1]}, "tracking: input should be a valid dictionary, not a list"),
        ({"tracking": {"models": [1]}}, "tracking.models: input should be 'front', 'all' or 'none', not a list"),
    ],
)
def test_settings_of_a_stranger_that_are_none_are_one_line(run, refused, tmp_path, settings, says):
    run.write("config.yaml", yaml.safe_dump(run.config() | settings).encode())
    journal(run)
    run.append_event("incomplete")
    for command in ("track RUN", "track RUN --trust", "train --resume RUN --trust", "pick RUN --knee --export out"):
        assert f"config.yaml is damaged: {says}" in refused(*command.replace("RUN", str(run.path)).split())


@pytest.mark.parametrize("name", [JOURNAL, CURSOR])
def test_a_link_to_itself_is_one_line(run, refused, name):
    journal(run)
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(Path(name).name)
    for command in ("track", "ui"):
        assert "cannot be read (Too many levels of symbolic links)" in refused(command, run.path)


def test_a_strangers_cursor_names_no_run(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    journal(run, uri="http://127.0.0.1:9")
    place = ["http://127.0.0.1:9", "popmtl/e", None]
    named = Outbox(run, read_journal(run), place)
    named.sent.parent, named.sent.members, named.sent.count = "a run of the user's", {"0": "another"}, 1
    named.sent.experiment_id = "1"
    named.save()
    assert MlflowSink.reopen(run)._outbox.sent.parent == "a run of the user's"
    sent = MlflowSink.reopen(stranger(run), trust=True)._outbox.sent
    assert sent.parent == "a run of the user's"
    sent = MlflowSink.reopen(run)._outbox.sent
    assert (sent.parent, sent.members, sent.count) == (None, {}, 0)


@pytest.mark.parametrize("what", ["a folder", "no end", "a pipe", "a link to itself", "a link", "deep", "another kind"])
def test_an_origin_that_is_none_is_a_strangers(run, refused, what, secret):
    path = stranger(run).path / ORIGIN
    if what == "a folder":
        path.mkdir()
    elif what.startswith("a link"):
        path.symlink_to(path if what == "a link to itself" else secret)
    elif what == "no end":
        with path.open("wb") as file:
            file.truncate(2**34)
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path.write_text("[" * 100_000 if what == "deep" else '{"origin": {"servers": 1}, "hmac": ["x"]}')
    journal(run, uri="http://127.0.0.1:9")
    for command in ("track", "ui"):
        assert "names the tracking server" in refused(command, run.path)


def test_an_origin_that_may_not_be_read_is_a_strangers(run, refused, monkeypatch):
    opened = LocalStorage.open

    def denied(files, name):
        if name == ORIGIN:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(files, name)

    monkeypatch.setattr(LocalStorage, "open", denied)
    journal(run, uri="http://127.0.0.1:9")
    for command in ("track", "ui"):
        assert "names the tracking server" in refused(command, run.path)


@pytest.fixture
def zipped(tmp_path, monkeypatch):
    """A finished run of a problem in an archive that is no longer on the path, and the module's file in it."""
    file = problem_module(tmp_path / "project", "zipped_problem")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.write(file, "zipped_problem.py")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "own.zip"))
        folder = own_run(tmp_path / "runs", "zipped_problem")
    yield folder, tmp_path / "own.zip" / "zipped_problem.py", file
    sys.modules.pop("zipped_problem", None)


def test_a_problem_in_an_archive_is_found_there_and_its_source_is_kept(zipped):
    folder, inside, file = zipped
    assert origin_of(folder).file == str(inside)
    assert (folder.path / "problem" / "zipped_problem.py").read_bytes() == file.read_bytes()
    assert load_model(folder.path, 1)
    assert sys.modules["zipped_problem"].__file__ == str(inside)


def test_another_module_is_not_taken_for_one_in_an_archive(zipped, tmp_path, monkeypatch):
    folder, inside, _ = zipped
    (tmp_path / "own.zip").unlink()
    with pytest.raises(RequestError, match=rf"the run's was {inside}, of which .* is a copy"):
        load_model(folder.path, 0)
    other = problem_module(tmp_path / "other", "zipped_problem", body=f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(other.parent)
    with pytest.raises(RequestError, match=rf"{other} is not the {inside} that the run was made with"):
        load_model(folder.path, 0)
    assert not (tmp_path / "ran").exists()


def test_a_module_that_could_not_be_read_is_known_by_its_place_alone(tmp_path, monkeypatch):
    file = problem_module(tmp_path / "project", "own_problem_k")
    monkeypatch.syspath_prepend(file.parent)
    folder = RunFolder.create(tmp_path / "runs", "run")
    with monkeypatch.context() as patch:
        patch.setattr(modules, "content", lambda module, file: None)
        folder.write_config({"problem": {"name": "own_problem_k:Mine"}}, new=True)
    assert admit(folder, "own_problem_k:Mine", False, "--trust", lambda what: None) == []
    file.unlink()
    with pytest.raises(RequestError, match=r"no module 'own_problem_k' on Python's path; the run's was [^,]*$"):
        admit(folder, "own_problem_k:Mine", False, "--trust", lambda what: None)
    monkeypatch.syspath_prepend(problem_module(tmp_path / "other", "own_problem_k").parent)
    with pytest.raises(RequestError, match="is not the"):
        admit(folder, "own_problem_k:Mine", False, "--trust", lambda what: None)


def test_the_module_is_not_imported_before_the_user_trusts(run, tmp_path, monkeypatch):
    problem_module(tmp_path / "evil", "evil_problem", body=f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path / "evil")
    (run.path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "problem": {"name": "evil_problem:Mine"}}))
    with pytest.raises(RequestError, match=r"runs evil_problem:Mine of .*evil_problem\.py"):
        load_model(run.path, 0)
    assert "evil_problem" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("os:system", "is not a subclass"), ("subprocess:Popen", "is not a subclass")]
)
def test_what_is_no_problem_is_not_called(tmp_path, name, says):
    with pytest.raises(RequestError, match=says):
        load_problem(name, {"args": ["touch", str(tmp_path / "ran")], "command": f"touch {tmp_path / 'ran'}"})
    assert not (tmp_path / "ran").exists()


def test_a_modules_file_is_found_without_running_a_package(tmp_path, monkeypatch):
    package = tmp_path / "quiet_package"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("raise AssertionError('it was run')")
    (package / "inner" / "problem.py").write_text("raise AssertionError('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert modules.located("quiet_package.inner.problem") == str(package / "inner" / "problem.py")
    assert modules.located("quiet_package.inner") == str(package / "inner" / "__init__.py")
    assert modules.root_of("quiet_package.inner.problem", str(package / "inner" / "problem.py")) == str(tmp_path)
    assert modules.root_of("quiet_package.inner", str(package / "inner" / "__init__.py")) == str(tmp_path)
    for name in (
        "quiet_package.none",
        "quiet_package.inner.problem.none",
        "no_such_package.x",
        "",
        "a..b",
        "..",
        "sys",
    ):
        assert modules.located(name) is None


def test_a_model_is_loaded_from_any_folder_by_the_module_of_its_run(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    file = problem_module(tmp_path / "project", "own_problem_a")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(file.parent)
        folder = own_run(tmp_path / "runs", "own_problem_a")
    assert (folder.path / "problem" / "own_problem_a.py").read_bytes() == file.read_bytes()
    assert "own_problem_a" not in sys.modules
    moved = shutil.move(folder.path, tmp_path / "moved")
    file.write_text(file.read_text() + "# changed\n")
    assert load_model(moved, 1)
    assert sys.modules["own_problem_a"].__file__ == str(file)
    assert f"runs own_problem_a:Mine of {file}" in caplog.text
    assert f"{file} has changed since the run was made; {moved}/problem/own_problem_a.py is as it was" in caplog.text


def test_another_module_of_the_name_is_not_taken_for_the_runs(tmp_path, monkeypatch):
    file = problem_module(tmp_path / "project", "own_problem_b")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(file.parent)
        folder = own_run(tmp_path / "runs", "own_problem_b")
    file.unlink()
    with pytest.raises(RequestError, match=rf"no module 'own_problem_b' .*the run's was {file}, of which .* is a copy"):
        load_model(folder.path, 0)
    monkeypatch.syspath_prepend(problem_module(tmp_path / "other", "own_problem_b", body="# another").parent)
    with pytest.raises(RequestError, match=rf"other/own_problem_b.py is not the {file} that the run was made with"):
        load_model(folder.path, 0)
    assert load_model(folder.path, 0, trust=True)


def test_the_copy_of_the_source_is_never_imported(tmp_path, monkeypatch):
    file = problem_module(tmp_path / "project", "own_problem_c")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(file.parent)
        folder = own_run(tmp_path / "runs", "own_problem_c")
    file.unlink()
    monkeypatch.chdir(folder.path)
    with pytest.raises(RequestError, match="no module"):
        load_model(folder.path, 0, trust=True)


def test_a_home_that_cannot_be_written_to_leaves_runs_unsigned(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    folder, _ = finished_folder(tmp_path / "runs", "run", [TwoHeadsModel() for _ in range(3)])
    assert json.loads(folder.read(ORIGIN))["hmac"] == []
    assert origin_of(folder) is None


def test_a_new_config_is_signed_before_it_is_there(run, monkeypatch):
    write = run.files.write

    def killed(name, content):
        if name == "config.yaml":
            raise KeyboardInterrupt
        write(name, content)

    monkeypatch.setattr(run.files, "write", killed)
    with suppress(KeyboardInterrupt):
        run.write_config({**CONFIG, "seed": 9})
    assert run.config()["seed"] == 3
    assert origin_of(run)
    monkeypatch.undo()
    run.write_config({**CONFIG, "seed": 9})
    assert origin_of(run)


def test_the_key_is_its_users_alone(run):
    key = Path(os.environ["XDG_STATE_HOME"]) / "popmtl" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    assert list(key.parent.iterdir()) == [key]
