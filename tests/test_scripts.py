"""Every script finds what it imports, in the package and beside it."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.rglob("*.py")))
def test_a_script_finds_what_it_imports(script):
    importlib.import_module(script)
