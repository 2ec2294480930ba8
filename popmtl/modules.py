"""Where a user's own modules are found: after everything that is installed, whose place no file may take.

`python -m popmtl` reads this before it has put the path in order, and so it imports nothing that is not always there.
"""

import os
import sys

FOLDERS = "POPMTL_FOLDERS"
"""What workers on other machines are told of the user's folders."""

_folders: list[str] = []
_used: list[str] = []
"""Those that are on Python's path because they are the user's."""


def look_in(*folders: str, before: bool = False) -> None:
    """Has the user's modules be looked for in folders that exist, in this order; "" is the current folder.

    Nothing else is imported from there: they are not on Python's path before `use_folders`. The current folder, where
    Python puts it first, leaves the path; unless PopMTL itself comes from there.

    Args:
        folders: where to look.
        before: whether they come before those of earlier calls.
    """
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        current = os.getcwd()
    except FileNotFoundError:  # it was removed
        current = ""
    place = 0 if before else len(_folders)
    for folder in [os.path.abspath(folder) if folder else current for folder in folders if folder or current]:
        if not os.path.exists(folder):  # or an archive
            continue
        if folder == current != ours:
            sys.path[:] = [entry for entry in sys.path if entry not in (folder, "")]
        if folder not in _folders:
            _folders.insert(place, folder)
            place += 1


def use_folders() -> None:
    """Puts the user's folders at the end of Python's path: code of theirs is about to be imported."""
    others = [entry for entry in sys.path if entry not in _used]
    _used[:] = [folder for folder in _folders if folder not in others]
    sys.path[:] = others + _used


def folders() -> str:
    """The user's folders, as FOLDERS holds them."""
    return os.pathsep.join(_folders)


def look_in_folders() -> None:
    """Has a worker find modules where its driver does."""
    look_in(*filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)))
    use_folders()


def located(module: str) -> str | None:
    """The file of a module, found without running any of its code; None where there is none."""
    import importlib.machinery
    import importlib.util

    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    importlib.invalidate_caches()
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top) or importlib.machinery.PathFinder.find_spec(top, _folders)
        for part in parts:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{spec.name}.{part}"
            spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):  # an empty name, or a module that was put together by hand
        return None
    return spec.origin if spec and spec.has_location else None


def content(module: str, file: str) -> bytes | None:
    """What is in a module's file, which may be in an archive; None where it cannot be read."""
    import zipimport

    try:
        if os.path.isfile(file):
            with open(file, "rb") as stream:
                return stream.read()
        return zipimport.zipimporter(root_of(module, file)).get_data(file)
    except (OSError, zipimport.ZipImportError):
        return None


def passed_over(module: str) -> str | None:
    """The user's own file of a module's name that an installed one is found instead of; None where it is not so."""
    found = located(module)
    path = module.replace(".", "/")
    own = [f"{folder}/{path}{end}" for folder in _folders for end in (".py", "/__init__.py")]
    own = [file for file in own if os.path.isfile(file)]
    if found is None or os.path.realpath(found) in map(os.path.realpath, own):
        return None
    return next(iter(own), None)


def root_of(module: str, file: str) -> str:
    """The folder on Python's path that a file is found in as a module."""
    levels = module.count(".") + 1 + os.path.basename(file).startswith("__init__.")
    for _ in range(levels):
        file = os.path.dirname(file)
    return file
