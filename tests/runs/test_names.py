"""A run's name can be a folder's, can be shown, and is none that the storage uses."""

import pytest

from popmtl.errors import RequestError
from popmtl.runs.folder import RunFolder
from popmtl.runs.names import check_run_name


@pytest.mark.parametrize(
    "name", ["a", "digits-20261126-080000", "Größe 2", "日本", "a.b", "x" * 255, "a'b\"[red]", "-a"]
)
def test_names_of_runs(name):
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *(
            (name, "printable")
            for name in ("a\nb", "a\x1b[31m", "a\rb", "\u202egnp", "a\u200bb", "\udc80", "\ue000", "a\0")
        ),
        *((name, "printable") for name in ("a\u2028b", "a\x85b", "\u2066a", "\ufeffa", "a\tb", "\x7f", "a\0")),
        *((name, "without /") for name in ("", ".", "..", "a/b", "/")),
        *((name, "spaces at its ends") for name in (" a", "a ", "\u3000a")),
        *((name, "storage's own") for name in (".a", ".lock", "mlflow.db", "MLflow.db-wal", "mlartifacts", "mlruns")),
        *((name, "255 bytes") for name in ("x" * 256, "é" * 128)),
    ],
)
def test_other_names_are_refused_before_anything_is_made(tmp_path, name, says):
    with pytest.raises(RequestError, match=says) as refused:
        RunFolder.create(tmp_path / "runs", name)
    assert str(refused.value).isprintable()
    assert not (tmp_path / "runs").exists()
