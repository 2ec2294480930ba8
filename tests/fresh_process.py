"""Run as a program, with what a model's requirements name and nothing else: `fresh_process.py MODEL REQUEST RESULT`.

Packages of distributions that the model's requirements.txt does not name, nor what those require, cannot be imported.
MODEL is a URI, REQUEST a JSON file with `inputs` and a list of `params`; RESULT becomes an .npz file with the outputs.
"""

import importlib.abc
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names):
    """The distributions, and those that they require in turn; extras are left out."""
    found, waiting = set(), [normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = requires(name) or []
        except PackageNotFoundError:
            continue
        waiting += [normal(re.match(r"[\w.-]+", line)[0]) for line in required if "extra ==" not in line]
    return found


class Refuse(importlib.abc.MetaPathFinder):
    """Does not find what is not allowed."""

    def __init__(self, allowed):
        self.known, self.allowed = packages_distributions(), allowed

    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        owners = {normal(name) for name in self.known.get(top, [])}
        # torch._dynamo asks for hypothesis, which it does without where it is not installed.
        if top in ("popmtl", "hypothesis") or owners & self.allowed or not owners:
            return
        raise ModuleNotFoundError(f"No module named {fullname!r}: not among the requirements", name=fullname)


def main():
    model, request, result = sys.argv[1:]
    lines = (Path(model) / "requirements.txt").read_text().splitlines()
    allowed = with_requirements(line.partition("==")[0] for line in lines)
    sys.meta_path.insert(0, Refuse(allowed))
    import mlflow
    import numpy as np

    asked = json.loads(Path(request).read_text())
    loaded = mlflow.pyfunc.load_model(model)
    x = np.array(asked["inputs"], dtype="float32")
    # An editable installation of PopMTL is always on the path; the model's own copy must come before it.
    used = sys.modules.get("popmtl")
    assert used is None or Path(used.__file__).is_relative_to(Path(model).resolve()), used.__file__
    outputs = [loaded.predict(x, params=params) for params in asked["params"]]
    np.savez(result, *outputs)


if __name__ == "__main__":
    main()
