"""The figures of a comparison against pymoo and brute force, and its picture."""

import math

import numpy as np
import pytest
from matplotlib.image import imread
from pymoo.indicators.hv import HV

from popmtl.errors import RequestError
from popmtl.runs import picture
from popmtl.runs.comparison import compare_fronts, front_points
from popmtl.runs.front import Front, Member
from popmtl.runs.picture import draw_fronts

NAN = math.nan


def front(F, reference, lost=()):
    F = np.asarray(F, dtype=float)
    names = ["left", "right", "third", "fourth"][: F.shape[1]]
    # What a comparison says of dominance must be worked out and not read.
    members = [
        Member(i, list(row), list(row), {}, "mtgd", False, "m", lost="gone" if i in lost else None)
        for i, row in enumerate(F)
    ]
    return Front(names, reference, NAN, 0, 10, members)


def random_front(random, m):
    """Ties and duplicates by few distinct values, and rows that are not finite."""
    F = random.integers(0, 5, size=(random.integers(1, 12), m)).astype(float)
    F[random.random(len(F)) < 0.2, random.integers(m)] = random.choice([NAN, np.inf, -np.inf])
    return front(F, random.uniform(3, 6, size=m).tolist())


def front_of(one):
    """The non-dominated rows, by comparing each with each."""
    rows = [member.objectives for member in one.members if np.isfinite(member.objectives).all()]
    return [a for a in rows if not any(all(x <= y for x, y in zip(b, a, strict=True)) and b != a for b in rows)]


def covers(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_figures_equal_pymoo_and_brute_force(m):
    random = np.random.default_rng(m)
    empty = 0
    for _ in range(40):
        fronts = [random_front(random, m) for _ in range(3)]
        comparison = compare_fronts(["a", "b", "c"], fronts)
        reference = [max(one.reference_point[k] for one in fronts) for k in range(m)]
        assert comparison.reference_point == reference
        rows = [front_of(one) for one in fronts]
        empty += sum(not one for one in rows)
        assert comparison.sizes == [len(one) for one in rows]
        for i in range(3):
            volume = HV(ref_point=np.array(reference))(np.array(rows[i])) if rows[i] else 0.0
            assert comparison.hypervolumes[i] == pytest.approx(volume, rel=1e-9)
            least = [min(row[k] for row in rows[i]) for k in range(m)] if rows[i] else [NAN] * m
            np.testing.assert_array_equal(comparison.best[i], least)
            for j in range(3):
                whole = [member.objectives for member in fronts[i].members if np.isfinite(member.objectives).all()]
                covered = sum(any(covers(a, b) for a in whole) for b in rows[j])
                expected = covered / len(rows[j]) if rows[j] else NAN
                assert comparison.coverage[i][j] == pytest.approx(expected, nan_ok=True)
        every = [row for one in rows for row in one]
        left = [sum(not any(covers(b, a) and b != a for b in every) for a in one) for one in rows]
        np.testing.assert_allclose(comparison.shares, [count / sum(left) if every else NAN for count in left])
    assert empty


def test_a_run_against_itself():
    one = front([[0, 1], [1, 0], [1, 1], [NAN, 0]], [2, 2])
    comparison = compare_fronts(["a", "a"], [one, one])
    assert comparison.coverage == [[1, 1], [1, 1]]
    assert comparison.shares == [0.5, 0.5]
    assert comparison.sizes == [2, 2]


def test_lost_members_count_for_nothing():
    one, other = front([[0, 0], [1, 1]], [2, 2], lost=[0]), front([[0.5, 0.5]], [2, 2])
    comparison = compare_fronts(["a", "b"], [one, other])
    assert comparison.coverage == [[1, 0], [1, 1]]
    assert comparison.best == [[1, 1], [0.5, 0.5]]
    assert comparison.shares == [0, 1]


def test_different_objectives_are_refused_and_both_named():
    two, three = front([[0, 0]], [1, 1]), front([[0, 0, 0]], [1, 1, 1])
    with pytest.raises(RequestError) as refusal:
        compare_fronts(["mine", "again", "yours"], [two, two, three])
    assert str(refusal.value) == "compare: mine has the objectives left, right, but yours has left, right, third"
    with pytest.raises(RequestError, match="two runs or more"):
        compare_fronts(["mine"], [two])


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws fronts; gives the pixels and the axes."""

    def draw(*values):
        figures = []
        make = picture.Figure
        monkeypatch.setattr(picture, "Figure", lambda **how: figures.append(make(**how)) or figures[-1])
        points = [front_points(front(F, [9] * len(F[0]))) for F in values]
        names = [f"run {i}" for i in range(len(values))]
        draw_fronts(names, ["f", "g", "h"][: points[0].shape[1]], points, tmp_path / "fronts.png")
        return imread(tmp_path / "fronts.png"), figures[0].axes[0]

    return draw


def test_two_objectives_are_drawn_as_staircases(drawn):
    pixels, axes = drawn([[2, 0], [0, 2], [1, 1], [2, 2]], [[0, 1], [NAN, 0]], [[NAN, 0]])
    assert pixels.shape[:2] == (900, 1200)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run 0", "run 1", "run 2"]
    first, second, third = axes.get_lines()
    assert first.get_xydata().tolist() == [[0, 2], [1, 1], [2, 0]]
    assert first.get_drawstyle() == "steps-post"
    assert second.get_xydata().tolist() == [[0, 1]]
    assert len(third.get_xydata()) == 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("f, test", "g, test")


def test_more_objectives_share_one_scale(drawn):
    _, axes = drawn([[0, 5, 1], [2, 3, 1]], [[4, 4, 1]])
    heights = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert heights == [[0, 1, 0.5], [0.5, 0, 0.5], [1, 0.5, 0.5]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["f", "g", "h"]


def test_every_run_has_a_look_of_its_own(drawn):
    _, axes = drawn(*([[i, -i]] for i in range(30)))
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == 30
