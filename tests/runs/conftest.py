from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pyarrow.fs
import pytest

from popmtl.runs import lease


@pytest.fixture
def hdfs(tmp_path, monkeypatch):
    """A URL of a file system that appends and moves; a local one behind pyarrow stands in for HDFS."""

    def from_uri(url):
        local = pyarrow.fs.LocalFileSystem()
        return pyarrow.fs.SubTreeFileSystem(str(tmp_path), local), unquote(urlsplit(url).path).strip("/")

    monkeypatch.setattr(pyarrow.fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    return "hdfs://cluster/storage"


@pytest.fixture(params=["path", "file", "hdfs", "s3"])
def storage(request, tmp_path, monkeypatch):
    """A storage of each kind, which is not there yet."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    if request.param in ("path", "file"):
        return str(tmp_path / "storage") if request.param == "path" else (tmp_path / "storage").as_uri()
    return request.getfixturevalue(request.param)
