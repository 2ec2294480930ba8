"""From a problem's name and parameters, as a config gives them, to the problem."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from popmtl import modules
from popmtl.errors import RequestError, nearest
from popmtl.method.problem import Problem
from popmtl.text import shown

logger = logging.getLogger(__name__)

BUILT_IN = {
    "aligned_toy": "popmtl.problems.aligned_toy:AlignedToy",
    "cityscapes": "popmtl.problems.scene:Cityscapes",
    "fairness": "popmtl.problems.fairness:Fairness",
    "dtlz2": "popmtl.problems.synthetic:Dtlz2",
    "multidigits": "popmtl.problems.overlaid_digits:MultiDigits",
    "multimnist": "popmtl.problems.overlaid_digits:MultiMnist",
    "nyuv2": "popmtl.problems.scene:Nyuv2",
    "table": "popmtl.problems.table:Table",
    "vlmop2": "popmtl.problems.synthetic:Vlmop2",
    "zdt1": "popmtl.problems.synthetic:Zdt1",
    "zdt2": "popmtl.problems.synthetic:Zdt2",
}


def load_problem(name: str, parameters: Mapping[str, Any]) -> Problem:
    """Builds a problem.

    Args:
        name: a key of `BUILT_IN`, or `package.module:Class` for a subclass of `Problem` that can be imported.
        parameters: the keyword arguments of its constructor.

    Raises:
        RequestError: there is no such problem, its constructor does not take these parameters, or it failed.
    """
    problem = _find_class(name)
    _check_parameters(name, problem, parameters)
    try:
        return problem(**parameters)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"problem {name}: its constructor failed: {type(error).__name__}: {error}") from error


def _find_class(name: str) -> type[Problem]:
    module_name, colon, class_name = BUILT_IN.get(name, name).partition(":")
    if not colon:
        raise RequestError(
            f"there is no built-in problem {shown(name)}; there are {', '.join(BUILT_IN)}, and your own as "
            f"package.module:Class{nearest(name, BUILT_IN)}"
        )
    other = modules.passed_over(module_name)
    note = f"; it is {modules.located(module_name)}, which is installed, and not {other}: rename yours" if other else ""
    if name not in BUILT_IN:
        modules.use_folders()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there may lack one that it imports; only the error's name tells the two apart.
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise RequestError(f"problem {name}: there is no module {error.name!r} on Python's path") from error
        raise RequestError(f"problem {name}: importing {module_name} failed: {error}{note}") from error
    except (Exception, SystemExit) as error:
        raise RequestError(
            f"problem {name}: importing {module_name} failed: {type(error).__name__}: {error}{note}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise RequestError(
            f"problem {name}: module {module_name} has no {class_name!r}{note or nearest(class_name, vars(module))}"
        )
    if not (inspect.isclass(found) and issubclass(found, Problem)):
        raise RequestError(f"problem {name}: {class_name} is not a subclass of popmtl.problems.Problem{note}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise RequestError(f"problem {name}: {class_name} does not define {missing}")
    if note:
        logger.warning("problem %s%s", name, note)
    return found


def _check_parameters(name: str, problem: type[Problem], parameters: Mapping[str, Any]) -> None:
    signature = inspect.signature(problem).parameters.values()
    named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    if not any(p.kind is p.VAR_KEYWORD for p in signature):
        for given in parameters:
            if given not in known:
                raise RequestError(f"problem {name}: no parameter {given!r}; {takes}{nearest(str(given), known)}")
    try:
        hints = get_type_hints(problem.__init__)
    except (AttributeError, NameError, TypeError):  # of names that are imported for type checkers alone
        hints = {}
    for key, value in parameters.items():
        if says := _no_number(value, _kinds(hints.get(key))):
            raise RequestError(f"problem {name}: {key} must be {says}, not {shown(value)}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in parameters]
    if missing:
        raise RequestError(f"problem {name}: needs {', '.join(missing)}; {takes}")


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint names, also those of a sequence's items."""
    return {kind for part in get_args(hint) for kind in _kinds(part)} | ({hint} if isinstance(hint, type) else set())


def _no_number(value: Any, kinds: set[Any]) -> str:
    """What a parameter that is declared as a number, or numbers, must be and is not; "" where it may be right."""
    if not kinds & {int, float}:
        return ""
    if isinstance(value, list):
        return next(filter(None, (_no_number(item, kinds) for item in value)), "")
    if isinstance(value, bool):
        return "" if bool in kinds else "a number"
    if isinstance(value, str):
        return "" if str in kinds else "a number"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "finite"
        return "" if float in kinds else "a whole number, without a point or an exponent"
    return ""
