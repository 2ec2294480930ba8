"""front.png: that every kind of front is drawn, and that the marks are where they belong."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from popmtl.method.front import hypervolume, non_dominated
from popmtl.runs import picture
from popmtl.runs.front import Front, Member
from popmtl.runs.picture import draw_front, draw_fronts

NAN = np.nan


def front(F, reference):
    F = np.asarray(F, dtype=float)
    best = non_dominated(F)
    weights = np.linspace(0, 1, len(F))
    return Front(
        [f"objective {k}" for k in range(F.shape[1])],
        reference,
        hypervolume(F, reference),
        0,
        10,
        [
            Member(i, [w] + [(1 - w) / (F.shape[1] - 1)] * (F.shape[1] - 1), list(F[i]), {}, "mtgd", bool(best[i]), "m")
            for i, w in enumerate(weights)
        ],
    )


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a front; gives the pixels and the axes."""

    def draw(F, reference):
        figures = []
        make = picture.Figure
        monkeypatch.setattr(picture, "Figure", lambda **how: figures.append(make(**how)) or figures[-1])
        draw_front(front(F, reference), tmp_path / "front.png")
        return imread(tmp_path / "front.png"), figures[0].axes[0]

    return draw


def texts(axes):
    return [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]


SHAPES = {
    "two objectives": ([[0, 1], [0.5, 0.8], [1, 0], [0.9, 0.9]], [1.1, 1.1]),
    "three objectives": ([[0, 1, 5], [0.5, 0.8, 4], [1, 0, 3], [1, 1, 6]], [2, 2, 7]),
    "eight objectives": (np.random.default_rng(0).uniform(size=(64, 8)), np.ones(8)),
    "one member": ([[0.3, 0.4]], [1, 1]),
    "one member worse than the reference": ([[3, 4]], [1, 1]),
    "one member, three objectives": ([[0.3, 0.4, 0.5]], [1, 1, 1]),
    "equal values": ([[0.3, 0.4]] * 3, [1, 1]),
    "equal values of zero": ([[0, 0, 0]] * 3, [0, 0, 0]),
    "a diverged member": ([[NAN, 1], [0.5, 0.8], [np.inf, 0]], [1, 1]),
    "none that is finite": ([[NAN, 1], [0, NAN]], [1, 1]),
    "huge and negative": ([[-1e12, 1e9], [-2e12, 2e9]], [0, 1e10]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_a_picture(drawn, shape):
    pixels, axes = drawn(*SHAPES[shape])
    assert pixels.shape[:2] == (900, 1200)
    assert (pixels[..., :3] < 0.9).any()
    assert axes.get_title(loc="left")


def test_two_objectives_show_numbers_reference_and_dominated(drawn):
    pixels, axes = drawn(*SHAPES["two objectives"])
    assert {"0", "1", "2", "3"} <= set(texts(axes))
    assert [entry.get_text() for entry in axes.get_legend().get_texts()] == ["dominated", "reference point (1.1, 1.1)"]
    assert texts(axes)[0] == "test split: 3 of 4 members non-dominated, hypervolume 0.31"
    # The dominated region is shaded, right of and above the staircase, and only there.
    area = matplotlib.colors.to_rgb(picture.AREA)

    def colour(x, y):
        column, row = axes.transData.transform((x, y))
        return pixels[pixels.shape[0] - 1 - int(row), int(column), :3]

    np.testing.assert_allclose(colour(1.05, 1.05), area, atol=0.01)
    np.testing.assert_allclose(colour(0.7, 0.9), area, atol=0.01)
    np.testing.assert_allclose(colour(0.3, 0.6), 1.0, atol=0.01)


def test_a_far_reference_point_and_a_far_member_do_not_squash_the_front(drawn):
    F = [[0.30, 0.50], [0.40, 0.35], [0.55, 0.30], [40.0, 30.0]]
    _, axes = drawn(F, [2.5, 2.5])
    low, high = axes.get_xlim()
    assert (0.55 - 0.30) / (high - low) > 0.5
    assert any("reference point (2.5, 2.5), outside the picture" in text for text in texts(axes))
    assert any("dominated, outside the picture: 3" in text for text in texts(axes))


def test_diverged_members_are_named(drawn):
    _, axes = drawn(*SHAPES["a diverged member"])
    assert "not drawn, values not finite: 0, 2" in texts(axes)


def test_parallel_coordinates_show_the_range_of_each_objective(drawn):
    _, axes = drawn(*SHAPES["three objectives"])
    assert {"0", "1", "3", "5"} <= set(texts(axes))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["objective 0", "objective 1", "objective 2"]
    assert "dominated, grey: 3" in texts(axes)


def test_members_that_coincide_share_a_label(drawn):
    _, axes = drawn([[0.3, 0.4]] * 7, [1, 1])
    assert "0, 1, 2, 3, 4 and 2 more" in texts(axes)


def test_numbers_are_not_written_over_each_other(drawn):
    x = np.linspace(0.05, 1, 64)
    _, axes = drawn(np.column_stack([x, 0.02 / x]), [1.2, 0.5])
    written = [text for text in axes.texts if text.get_text()[0].isdigit()]
    boxes = [text.get_window_extent() for text in written]
    assert not any(a.shrunk(0.9, 0.9).overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "0" in texts(axes)
    assert any(text.get_text().endswith("63") for text in written)
    assert any("for want of room" in text for text in texts(axes))


def test_pyplot_is_not_used(drawn, monkeypatch):
    monkeypatch.setattr(matplotlib, "use", lambda *a, **k: pytest.fail("the caller's backend was changed"))
    drawn(*SHAPES["two objectives"])


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("name", ["$\\no_formula$ in $", "W" * 200_000, "a\n" * 5000, "\0\x1b]0;x\a\u202e", "€ 質量"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_is_drawn_as_it_is_written_and_not_without_end(tmp_path, m, name):
    F = np.eye(m)
    named = replace(front(F, np.full(m, 1.1)), objectives=[name] * m)
    for file in (tmp_path / "front.png", tmp_path / "fronts.png"):
        if file.stem == "front":
            draw_front(named, file)
        else:
            draw_fronts([name, "b"], named.objectives, [F, F], file)
        assert imread(file).shape[:2] == (900, 1200)


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("reference", [1.1, 1.7e308, -1.7e308])
@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e200, 5e-324])
def test_numbers_beyond_all_bounds_are_left_out(tmp_path, m, reference, value):
    F = np.eye(m)
    F[0] = value
    draw_front(front(F, np.full(m, reference)), tmp_path / "front.png")
    draw_fronts(["a", "b"], ["f"] * m, [F, -F], tmp_path / "fronts.png")
    draw_fronts(["a", "b"], ["f"] * m, [F[:1], F[:1]], tmp_path / "fronts.png")
    for file in ("front.png", "fronts.png"):
        assert imread(tmp_path / file).shape[:2] == (900, 1200)
