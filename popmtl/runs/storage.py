"""A folder of files on a local path or behind a URL, with what a run needs of one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote

from popmtl.errors import RequestError
from popmtl.runs.files import replacing

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PASSWORD = re.compile(r"(\w[\w+.-]*://)[^/?#@]*:[^/?#]*@")
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Where a put shows the whole object or none of it, and nothing can be appended to."""

GCS_SECONDS = 30
"""How long Google's client tries again; its default is a quarter of an hour."""

PART_BYTES = 2**24


class Entry(NamedTuple):
    """A file: its size in bytes, and when it was last written, in seconds since the epoch."""

    size: int
    time: float


class Storage(ABC):
    """Files by their names below a folder; make one with `open_storage`.

    Everything raises an OSError where the storage fails, a FileNotFoundError where there is no such file, and a
    RequestError where a name leads out of the folder: names may come from the folder's own files, which anyone may have
    written.

    Attributes:
        location: the folder's absolute path or its URL.
        path: the folder, if it is a local one.
        delay: seconds to gather lines for before they are appended.
    """

    location: str
    path: Path | None = None
    delay = 0.0

    @abstractmethod
    def make(self) -> None:
        """Makes the folder, and those above it.

        Raises:
            FileExistsError: it is there.
            NotADirectoryError: one above it is a file.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file: a reader finds the old content or the new, whole."""

    @abstractmethod
    def append(self, name: str, lines: bytes) -> None:
        """Adds whole lines to a file, all of them or none. There is one writer; a line that a crash cut short goes."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to be read in parts."""

    @abstractmethod
    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A file as one on this machine's disk."""

    @abstractmethod
    def entry(self, name: str) -> Entry | None:
        """Size and time of a file; None where there is none."""

    @abstractmethod
    def children(self, name: str) -> list[str]:
        """The names in a folder, "" for this one; none where there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Removes a folder, "" for this one, with what is in it, as far as that is possible."""

    def sync(self, name: str) -> None:  # noqa: B027  # only local folders need it
        """Has the names in a folder outlast a power failure, as its files do."""

    def check(self, name: str) -> None:
        """Raises a RequestError unless a name is relative, normalized and inside of the folder; "" is the folder."""
        if "\0" in name or (name and not {"", ".", ".."}.isdisjoint(name.split("/"))):
            raise RequestError(f"{self.location}: {name!r} is not the name of a file in this folder")

    def check_links(self) -> None:  # noqa: B027  # only local folders have them
        """Raises a RequestError where any link in the folder leads out of it."""

    def where(self, name: str) -> str:
        """The path or URL of a file."""
        Storage.check(self, name)
        return joined(self.location, name)


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """The storage at a local path or a URL, which need not be there yet.

    Raises:
        RequestError: the URL is none that can be read, or has a password, which all would see who see the run.
    """
    text = os.fspath(location)
    if not URL.match(text):
        return LocalStorage(Path(text))
    if PASSWORD.match(text):
        shown = PASSWORD.sub(r"\1***@", text)
        raise RequestError(f"storage {shown}: has a password in it; give it as the store's own tools take it")
    # Here and not above: it takes a quarter of a second, and a local path needs none of it.
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, LocalFileSystem

    url = text
    if text.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in text:
        url += f"{'&' if '?' in text else '?'}retry_limit_seconds={GCS_SECONDS}"
    try:
        filesystem, root = FileSystem.from_uri(url)
    except (OSError, ArrowException) as error:
        raise RequestError(f"storage {text}: {said(error)}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalStorage(Path(root))
    if not root and filesystem.type_name in OBJECT_STORES:
        raise RequestError(f"storage {text}: names no bucket")
    return RemoteStorage(text, filesystem, root.rstrip("/"))


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL, and not one of a local path."""
    text = os.fspath(location)
    return bool(URL.match(text)) and not text.lower().startswith("file:")


def joined(location: str, name: str) -> str:
    """The path or URL of a name below that of a folder; what a URL has after its `?` stays at its end."""
    if not URL.match(location):
        return str(Path(location) / name)
    base, mark, query = location.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def split(location: str) -> tuple[str, str]:
    """The path or URL of the folder that holds a location, and the name there."""
    if not URL.match(location):
        return str(Path(location).parent), Path(location).name
    base, mark, query = location.partition("?")
    parent, _, name = base.rstrip("/").rpartition("/")
    return f"{parent}{mark}{query}", unquote(name)


def said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


class LocalStorage(Storage):
    """A folder on a disk, whether or not other machines share it."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path.absolute()
        self.location = str(self.path)

    def at(self, name: str) -> Path:
        """The path of a file or folder in this one, which itself may be a link.

        Raises:
            RequestError: the name, or a link on the way, leads out of the folder.
        """
        super().check(name)
        path = self.path / name
        root, target = os.path.realpath(self.path), os.path.realpath(path)
        if os.path.commonpath([root, target]) != root:
            raise RequestError(f"{path}: leads out of {self.path}, to {target}")
        return path

    def file(self, name: str) -> Path:
        """The path of a file to be read; see `at`.

        Raises:
            RequestError: it is a device or a pipe, which might never end.
        """
        path = self.at(name)
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder says by itself that it is none
            raise RequestError(f"{path}: is not a regular file")
        return path

    def check(self, name: str) -> None:  # noqa: D102
        self.at(name)

    def check_links(self) -> None:  # noqa: D102
        for folder, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    self.at(os.path.relpath(path, self.path))

    def make(self) -> None:  # noqa: D102
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path.parent)) from None
        self.path.mkdir()

    def write(self, name: str, content: bytes) -> None:  # noqa: D102
        with replacing(self._place(name)) as beside:
            beside.write_bytes(content)

    def append(self, name: str, lines: bytes) -> None:  # noqa: D102
        path = self._place(name)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                size = path.read_bytes().rfind(b"\n") + 1
                os.ftruncate(descriptor, size)
            rest = memoryview(lines)
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                os.ftruncate(descriptor, size)  # they will all be tried again
                raise
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:  # noqa: D102
        return self.file(name).read_bytes()

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:  # noqa: D102
        return self.file(name).open("rb")

    def fetched(self, name: str) -> AbstractContextManager[Path]:  # noqa: D102
        return nullcontext(self.file(name))

    def entry(self, name: str) -> Entry | None:  # noqa: D102
        try:
            found = self.at(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def children(self, name: str) -> list[str]:  # noqa: D102
        try:
            return os.listdir(self.at(name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:  # noqa: D102
        self.at(name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:  # noqa: D102
        shutil.rmtree(self.at(name), ignore_errors=True)

    def sync(self, name: str) -> None:  # noqa: D102
        descriptor = os.open(self.at(name), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _place(self, name: str) -> Path:
        """Where a file goes, see `at`; folders are made below this one, but never this one, which may be gone."""
        path, folder = self.at(name), self.path
        for part in Path(name).parts[:-1]:
            folder /= part
            folder.mkdir(exist_ok=True)
        return path


class RemoteStorage(Storage):
    """A folder of a file system that pyarrow reads: object stores and HDFS."""

    delay = 2.0

    def __init__(self, location: str, filesystem: FileSystem, root: str) -> None:
        self.location, self.filesystem, self.root = location, filesystem, root
        self.puts_whole = filesystem.type_name in OBJECT_STORES
        self.appended: dict[str, bytes] = {}

    def make(self) -> None:  # noqa: D102
        from pyarrow.fs import FileType

        # An object store would keep files below a file.
        above, here = self.filesystem.get_file_info([self.root.rpartition("/")[0] or "/", self.root])
        if above.type == FileType.File:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.location)
        if here.type != FileType.NotFound:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.location)
        if not self.puts_whole:
            self.filesystem.create_dir(self.root)

    def write(self, name: str, content: bytes) -> None:  # noqa: D102
        self.appended.pop(name, None)
        self._write(name, content)

    def append(self, name: str, lines: bytes) -> None:  # noqa: D102
        if name not in self.appended:
            try:
                content = self.read(name)
            except FileNotFoundError:
                content = b""
            if not content.endswith(b"\n"):
                content = content[: content.rfind(b"\n") + 1]
                self._write(name, content)
            self.appended[name] = content
        if self.puts_whole:  # all of it, every time: README says what that costs
            content = self.appended[name] + lines
            self._write(name, content)
            self.appended[name] = content
        else:
            with self.filesystem.open_append_stream(self._at(name), compression=None) as stream:
                stream.write(lines)

    def read(self, name: str) -> bytes:  # noqa: D102
        with self.filesystem.open_input_file(self._at(name)) as stream:
            return bytes(stream.read())

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:  # noqa: D102
        return cast(AbstractContextManager[BinaryIO], self.filesystem.open_input_file(self._at(name)))

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:  # noqa: D102
        with tempfile.TemporaryDirectory(prefix="popmtl-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            with self.open(name) as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file, PART_BYTES)
            yield path

    def entry(self, name: str) -> Entry | None:  # noqa: D102
        found = self.filesystem.get_file_info(self._at(name))
        return Entry(found.size, (found.mtime_ns or 0) / 1e9) if found.is_file else None

    def children(self, name: str) -> list[str]:  # noqa: D102
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._at(name), allow_not_found=True)
        return [found.base_name for found in self.filesystem.get_file_info(selector)]

    def remove(self, name: str) -> None:  # noqa: D102
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self._at(name))

    def remove_folder(self, name: str) -> None:  # noqa: D102
        with suppress(OSError):
            self.filesystem.delete_dir(self._at(name))

    def _write(self, name: str, content: bytes) -> None:
        if self.puts_whole:
            self._put(self._at(name), content)
            return
        folder, _, last = self._at(name).rpartition("/")
        beside = f"{folder}/.{last}.{token_hex(4)}.part"  # two may be writing: the lease is taken so
        self.filesystem.create_dir(folder)
        try:
            self._put(beside, content)
            self.filesystem.move(beside, self._at(name))
        except OSError:
            with suppress(OSError):
                self.filesystem.delete_file(beside)
            raise

    def _put(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def _at(self, name: str) -> str:
        self.check(name)
        return f"{self.root}/{name}" if name else self.root
