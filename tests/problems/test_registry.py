import textwrap

import pytest

from popmtl.errors import RequestError
from popmtl.problems import Problem
from popmtl.problems.aligned_toy import AlignedToy
from popmtl.problems.overlaid_digits import MultiDigits, MultiMnist
from popmtl.problems.registry import BUILT_IN, load_problem
from popmtl.problems.synthetic import Dtlz2, Vlmop2, Zdt1, Zdt2


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module of a name of this test's own, on Python's path, and returns the name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in request.node.name)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


OWN = """
    import torch
    from popmtl.problems import VectorProblem

    class Own(VectorProblem):
        objectives = ("a", "b")
        bounds = (0.0, 1.0)
        variables = 2

        def __init__(self, slope, offset=0.0):
            self.slope, self.offset = 1 / slope, offset

        def values(self, x):
            return self.slope * x + self.offset

    class Open(Own):
        def __init__(self, **options):
            self.options = options

    class Half(VectorProblem):
        pass

    class Unrelated:
        pass
"""


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("vlmop2", {"variables": 4}, Vlmop2),
        ("zdt1", {}, Zdt1),
        ("zdt2", {}, Zdt2),
        ("dtlz2", {"objectives": 4}, Dtlz2),
        ("aligned_toy", {"start": [0.0, 0.0]}, AlignedToy),
        ("multidigits", {"batch_size": 2}, MultiDigits),
    ],
)
def test_built_in_problems_are_found(name, parameters, expected):
    assert type(load_problem(name, parameters)) is expected


def test_multimnist_is_found(shared_data):
    assert type(load_problem("multimnist", {"folder": str(shared_data / "mnist")})) is MultiMnist


def test_parameters_arrive():
    assert load_problem("zdt1", {"variables": 5}).variables == 5


def test_ones_own_problem_is_found(module):
    problem = load_problem(f"{module(OWN)}:Own", {"slope": 2, "offset": 3.0})
    assert isinstance(problem, Problem)
    assert (problem.slope, problem.offset) == (0.5, 3.0)


def test_a_constructor_may_take_any_keywords(module):
    assert load_problem(f"{module(OWN)}:Open", {"anything": 1}).options == {"anything": 1}


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match=r"no built-in problem 'ztd1'; .*: did you mean zdt1\?") as refusal:
        load_problem("ztd1", {})
    assert all(name in str(refusal.value) for name in BUILT_IN)


def test_an_unknown_module_is_named():
    with pytest.raises(RequestError, match="no module 'no_such_package' on Python's path"):
        load_problem("no_such_package.problems:Own", {})


def test_a_module_that_lacks_another_is_not_called_missing(module):
    name = module("import no_such_dependency")
    with pytest.raises(RequestError, match=f"importing {name} failed: No module named 'no_such_dependency'"):
        load_problem(f"{name}:Own", {})


@pytest.mark.parametrize("text", ["1 / 0", "def broken(:"])
def test_a_module_that_fails_is_reported(module, text):
    name = module(text)
    with pytest.raises(RequestError, match=f"importing {name} failed: (ZeroDivisionError|SyntaxError)") as refusal:
        load_problem(f"{name}:Own", {})
    assert isinstance(refusal.value.__cause__, ZeroDivisionError | SyntaxError)


@pytest.mark.parametrize("name", [":Own", ".relative:Own"])
def test_a_name_that_no_module_can_have_is_refused(name):
    with pytest.raises(RequestError, match=f"problem {name}: importing"):
        load_problem(name, {})


def test_an_unknown_class_is_answered_with_the_nearest(module):
    with pytest.raises(RequestError, match=r"has no 'Unrelatd': did you mean Unrelated\?"):
        load_problem(f"{module(OWN)}:Unrelatd", {})


@pytest.mark.parametrize("name", ["Unrelated", "torch"])
def test_something_else_than_a_problem_is_refused(module, name):
    with pytest.raises(RequestError, match=f"{name} is not a subclass of popmtl.problems.Problem"):
        load_problem(f"{module(OWN)}:{name}", {})


def test_an_unfinished_problem_is_told_what_it_lacks(module):
    with pytest.raises(RequestError, match="Half does not define values"):
        load_problem(f"{module(OWN)}:Half", {})


def test_an_unknown_parameter_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match=r"zdt1: no parameter 'variabels'; .*: did you mean variables\?"):
        load_problem("zdt1", {"variabels": 30})


def test_a_parameter_that_is_not_a_word_is_refused():
    with pytest.raises(RequestError, match="zdt1: no parameter 1; it takes variables"):
        load_problem("zdt1", {1: 30})


def test_a_missing_parameter_is_named(module):
    with pytest.raises(RequestError, match="needs slope; it takes slope, offset"):
        load_problem(f"{module(OWN)}:Own", {"offset": 1.0})


def test_a_failing_constructor_is_named_and_chained(module):
    name = f"{module(OWN)}:Own"
    with pytest.raises(RequestError, match=f"{name}: its constructor failed: ZeroDivisionError") as refusal:
        load_problem(name, {"slope": 0})
    assert isinstance(refusal.value.__cause__, ZeroDivisionError)


def test_a_refusal_by_the_constructor_passes_as_it_is():
    with pytest.raises(RequestError, match=r"^zdt1: variables is 1, and must be at least 2$"):
        load_problem("zdt1", {"variables": 1})


def test_a_parameter_of_the_wrong_type_is_refused():
    with pytest.raises(RequestError, match="problem zdt1: variables must be a number, not 'many'"):
        load_problem("zdt1", {"variables": "many"})
