"""Whose a run's folder is: what a stranger's may make a command do is asked for first.

A run that is made here is signed. In origin.json stand the file that the problem's code was in and the MLflow servers
that its user named, and an HMAC (RFC 2104, SHA-256) of these and of config.yaml, by a key that only this user can read:
$XDG_STATE_HOME/popmtl/key, or ~/.local/state/popmtl/key. A folder without it, or with another's, is a stranger's. The
source beside it, in the folder problem, is a record; nothing imports it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popmtl import modules
from popmtl.errors import FileDamaged, RequestError
from popmtl.runs.records import Origin, OriginFile, Settings, check
from popmtl.text import LONGEST_SHOWN, cut
from popmtl.yaml_files import MOST_BYTES

if TYPE_CHECKING:
    from popmtl.runs.folder import RunFolder

ORIGIN = "origin.json"
SQLITE = "sqlite:///"
URI, PARENT = "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"

KEY_BYTES = 32

SAID = 5
"""So many classes that a config names are said."""

BESIDE = ("mlflow.db", "mlflow.db-journal", "mlflow.db-shm", "mlflow.db-wal", ".mlflow.db.lock", "mlartifacts")
"""What is written to, in the storage, when a run is sent to the database there."""

CREDENTIALS = re.compile(
    r"((?:https?|s3|gs|gcs|abfss?|hdfs)://)[^/?#\s]*@"
    r"|((?:postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)[^@\s]*@"
)
SECRET = re.compile(r"([?&][^=&\s]*(?:passw|pwd|token|secret)[^=&\s]*=)[^&\s]*", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """A text without the users, passwords and tokens of the URIs in it."""
    return SECRET.sub(r"\1***", CREDENTIALS.sub(lambda found: found[1] or found[2], text))


def with_credentials(uri: str) -> str:
    """A tracking URI with the credentials that MLFLOW_TRACKING_URI has for it."""
    named = os.environ.get(URI, "")
    return named if without_credentials(named) == uri else uri


def sign(folder: RunFolder, config: Mapping[str, Any], content: bytes) -> None:
    """Writes origin.json and a copy of the problem's source, just before config.yaml is written.

    Without a key, in a home that cannot be written to, they are written all the same: for the record.

    Args:
        folder: of the run.
        config: what config.yaml is to hold.
        content: the same as it is written.

    Raises:
        OSError: the folder cannot be written to.
    """
    before = origin_of(folder)
    name = str(config.get("problem", {}).get("name", ""))
    module, colon, _ = name.partition(":")
    file = modules.located(module) if colon else None
    source = modules.content(module, file) if file else None
    named = [config.get("tracking", {}).get("uri"), os.environ.get(URI)]
    if folder.files.path:
        named.append(default_database(folder))
    servers = [without_credentials(uri) for uri in named if uri]
    parent = os.environ.get(PARENT)
    origin = Origin(
        file=file and os.path.abspath(file),
        sha256=hashlib.sha256(source).hexdigest() if source is not None else None,
        servers=sorted({*servers, *(before.servers if before else ())}),
        parents=sorted({*([parent] if parent else ()), *(before.parents if before else ())}),
    )
    key = _key(make=True)
    # Until config.yaml is the new one, the folder is signed with the old one too.
    contents = [content, folder.read("config.yaml")] if before else [content]
    signatures = [_hmac(key, one, origin) for one in dict.fromkeys(contents)] if key else []
    record = OriginFile(origin=origin, hmac=signatures)
    if file and source is not None and file.endswith(".py"):
        folder.write(_copy(module), source)
    folder.write(ORIGIN, (record.model_dump_json(indent=1) + "\n").encode())


def origin_of(folder: RunFolder) -> Origin | None:
    """Where a run comes from that this user made; None of a stranger's."""
    key = _key()
    if key is None:
        return None
    try:
        record: OriginFile = folder.record(ORIGIN, OriginFile)
        content = folder.bounded("config.yaml", MOST_BYTES)
    except (OSError, RequestError):  # whatever it is that cannot be read, it is no signature
        return None
    wanted = _hmac(key, content, record.origin)
    return record.origin if any(hmac.compare_digest(wanted.encode(), one.encode()) for one in record.hmac) else None


def admit(folder: RunFolder, name: str, trust: bool, flag: str, say: Callable[[str], object]) -> list[str]:
    """Checks that a run's problem may be imported and built here; has its module be found where it was.

    Args:
        folder: of the run.
        name: of its problem, as its config has it.
        trust: whether the user trusts who made the folder.
        flag: how one says so.
        say: is told whose code will run.

    Returns:
        What has changed since the run was made, one message each.

    Raises:
        RequestError: the folder is a stranger's, and `trust` was not given; or the module is not where it was, and
            nowhere else, or another than it was.
    """
    origin = origin_of(folder)
    module, colon, _ = name.partition(":")
    if origin and origin.file and modules.content(module, origin.file) is not None:
        modules.look_in(modules.root_of(module, origin.file), before=True)
    file = modules.located(module) if colon else None
    short = cut(name, LONGEST_SHOWN)
    runs = f"runs {short} of {_place(name)}" if colon else f"builds {short} as the run says"
    if others := _code_beside_the_problem(folder.config()):
        runs += f", and {' and '.join(others)}"
    if origin is None and not trust:
        raise RequestError(
            f"{folder.location} was not made by this user on this machine, or its config was changed, and this {runs}: "
            f"give {flag} if you trust who did"
        )
    if others:
        say(runs)
    if not colon:
        return []
    recorded = origin.file if origin else None
    if file is None:
        made = f"; the run's was {recorded}" if recorded else ""
        if recorded and folder.files.entry(_copy(module)):
            made += f", of which {folder.files.where(_copy(module))} is a copy"
        raise RequestError(f"problem {name}: there is no module {module!r} on Python's path{made}")
    if not others:
        say(runs)
    if origin and recorded and (origin.sha256 is None or _digest(module, file) != origin.sha256):
        if os.path.realpath(file) == os.path.realpath(recorded):
            copy = folder.files.where(_copy(module))
            return [f"{file} has changed since the run was made; {copy} is as it was"] if origin.sha256 else []
        if not trust:
            raise RequestError(f"problem {name}: {file} is not the {recorded} that the run was made with: give {flag}")
    return []


def settings_of(folder: RunFolder) -> dict[str, Any]:
    """A run's config, with a problem and settings of the tracking that are what they should be; no more is checked.

    Raises:
        FileDamaged: they are not.
        RequestError: see `RunFolder.config`.
    """
    config = folder.config()
    try:
        check(Settings, config)
    except FileDamaged as error:
        raise FileDamaged(f"{folder.files.where('config.yaml')} is damaged: {error}") from None
    return config


def problem_of(config: Mapping[str, Any]) -> str:
    """The name of the problem in a config that has not been checked."""
    problem = config.get("problem")
    return str(problem.get("name") if isinstance(problem, Mapping) else problem)


def _code_beside_the_problem(config: Mapping[str, Any]) -> list[str]:
    """What a config has imported beside its problem, such as an optimizer (see `components`), and from which files."""
    found: dict[str, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            name = value.get("name")
            if isinstance(name, str) and ":" in name:  # whatever follows it, the module is imported
                found[name] = None
        for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            look(item)

    look({key: value for key, value in config.items() if key != "problem"})
    named = [f"{cut(name, LONGEST_SHOWN)} of {_place(name)}" for name in list(found)[:SAID]]
    return named + ([f"{len(found) - SAID} more"] if len(found) > SAID else [])


def check_tracking(folder: RunFolder, opening: Mapping[str, Any], trust: bool, named: str | None = None) -> None:
    """Checks that what a run's journal names in MLflow is what its user named.

    Args:
        folder: of the run.
        opening: the journal's last entry that opened the run.
        trust: whether the user trusts who made the folder.
        named: tracking URI that the user names, beside MLFLOW_TRACKING_URI.

    Raises:
        RequestError: it is a stranger's word.
    """
    if trust:
        return
    origin, uri, parent = origin_of(folder), str(opening["uri"]), opening["parent"]
    known = {without_credentials(one) for one in (named, os.environ.get(URI)) if one}
    known |= set(origin.servers if origin else ())
    if folder.files.path and not any(_is_link(folder, name) for name in BESIDE):
        known.add(default_database(folder))
    if without_credentials(uri) not in known:
        shown = without_credentials(uri)
        raise RequestError(
            f"{folder.location}: its journal names the tracking server {shown}, and you did not: give {URI}={shown}, "
            f"or --trust if you trust who made it"
        )
    if parent and parent not in {*(origin.parents if origin else ()), os.environ.get(PARENT)}:
        raise RequestError(
            f"{folder.location}: its journal names the run {parent} as the parent, and you did not: give "
            f"{PARENT}={parent}, or --trust if you trust who made it"
        )
    experiment = str(opening["experiment"])
    if not (origin or experiment.startswith("popmtl/") or experiment == os.environ.get("MLFLOW_EXPERIMENT_NAME")):
        raise RequestError(
            f"{folder.location}: its journal names the experiment {experiment!r}, and you did not: give "
            "MLFLOW_EXPERIMENT_NAME, or --trust if you trust who made it"
        )


def default_database(folder: RunFolder) -> str:
    """The tracking URI of a run in a local folder whose user names none: of a database beside it."""
    return f"{SQLITE}{folder.storage.resolve()}/mlflow.db"


def _is_link(folder: RunFolder, name: str) -> bool:
    return (folder.storage.resolve() / name).is_symlink()


def _place(name: str) -> str:
    """The file that `module:Class` is in."""
    return modules.located(name.partition(":")[0]) or "a module that is not here"


def _copy(module: str) -> str:
    return f"problem/{module}.py"


def _digest(module: str, file: str) -> str | None:
    content = modules.content(module, file)
    return None if content is None else hashlib.sha256(content).hexdigest()


def _hmac(key: bytes, config: bytes, origin: Origin) -> str:
    parts = [hashlib.sha256(config).hexdigest(), origin.model_dump()]
    return hmac.new(key, json.dumps(parts, sort_keys=True).encode(), "sha256").hexdigest()


def _key(*, make: bool = False) -> bytes | None:
    """This user's key; None where there is none, it cannot be made, or others can read it."""
    base = os.environ.get("XDG_STATE_HOME", "")
    path = Path(base if os.path.isabs(base) else os.path.expanduser("~/.local/state")) / "popmtl" / "key"
    try:
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # 0600
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                with suppress(FileExistsError):  # another process was quicker
                    os.link(file.name, path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
            key = file.read(KEY_BYTES) if own else b""
    except OSError:
        return None
    return key if len(key) == KEY_BYTES else None
