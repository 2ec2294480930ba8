"""Where a user's own modules are found: after everything that is installed, whose place no file may take.

`python -m popmtl` reads this before it has put the path in order, and so it imports nothing that is not always there.
"""

import os
import sys

FOLDERS = "POPMTL_FOLDERS"
"""What workers on other machines are told of the user's folders."""

_folders: list[str] = []


def look_in(*folders: str, before: bool = False) -> None:
    """Has modules be found in folders that exist, in this order, after all other places; "" is the current folder.

    The current folder, where Python puts it first, goes to the end; unless PopMTL itself comes from there.

    Args:
        folders: where to look.
        before: whether they come before those of earlier calls.
    """
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for folder in [os.path.abspath(folder) for folder in folders]:
        if not os.path.isdir(folder):
            continue
        if folder == os.getcwd() != ours:
            sys.path[:] = [entry for entry in sys.path if entry not in (folder, "")]
        if folder not in sys.path:
            earlier = [i for i, entry in enumerate(sys.path) if before and entry in _folders]
            sys.path.insert(min(earlier, default=len(sys.path)), folder)
        if folder not in _folders:
            _folders.append(folder)


def folders() -> str:
    """The user's folders, as FOLDERS holds them."""
    return os.pathsep.join(_folders)


def look_in_folders() -> None:
    """Has a worker find modules where its driver does."""
    look_in(*filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)))


def located(module: str) -> str | None:
    """The file of a module, found without running any of its code; None where there is none."""
    import importlib.machinery
    import importlib.util

    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    importlib.invalidate_caches()
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for part in parts:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{spec.name}.{part}"
            spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):  # an empty name, or a module that was put together by hand
        return None
    return spec.origin if spec and spec.has_location else None


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
