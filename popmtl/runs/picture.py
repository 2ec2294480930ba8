"""The picture of a Pareto set, front.png, and of several over each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from popmtl.method.front import measured_hypervolume
from popmtl.runs.front import Front
from popmtl.text import cut, printable

Points = NDArray[np.float64]

DOMINATED = "0.72"
AREA = "#dfe8f3"
# What is further than this many widths of the front away from it would squash the front, and is named instead of drawn.
REACH = 1.0
# Labels whose points are closer than this, in pixels, are written as one.
CROWDED = 13
MOST_NUMBERS = 5
# Of more objectives than these, names and ends of the axes stand upright.
MOST_LEVEL = 8
# Width and height of a label's character, in pixels.
CHARACTER = (10, 15)
# Of a name that is longer, which leaves no room for the picture, or takes minutes to lay out, the beginning is drawn.
LONGEST_NAME = 80
# What is larger has no place on an axis: matplotlib takes differences and squares.
LARGEST = 1e150
# A name is drawn as it is written: "$" in it begins no formula, which might be none.
AS_WRITTEN: Any = {"text.parse_math": False, "text.usetex": False}


@rc_context(AS_WRITTEN)
def draw_front(front: Front, file: Path | BinaryIO) -> None:
    """Draws the Pareto set, on the split by which members are chosen, to a PNG file of 1200 × 900 pixels.

    Two objectives: the members, the staircase of the non-dominated ones and the area up to the reference point that
    the hypervolume measures. Otherwise: parallel coordinates, each objective scaled to the range of the non-dominated
    members. Dominated members are grey, the others coloured by their first weight; each carries its subproblem's
    number. Members whose objectives are not finite, or beyond all bounds, are named in the title.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    split = front.chosen_on
    F = np.array([front.figures(member).objectives for member in front.members], dtype=np.float64)
    F = F.reshape(len(front.members), len(front.objectives))
    drawable = (np.abs(F) <= LARGEST).all(axis=1)
    best = np.array([member.non_dominated for member in front.members], dtype=bool) & drawable
    numbers = np.array([member.subproblem for member in front.members])
    notes = []
    if not drawable.all():
        why = "not finite" if not np.isfinite(F).all() else "too large"
        notes.append(f"not drawn, values {why}: {_listed(numbers[~drawable])}")
    if best.any():
        draw = _scatter if len(front.objectives) == 2 else _parallel
        notes += draw(axes, front, F, best, drawable & ~best, numbers)
        weights = ScalarMappable(Normalize(0, 1), colormaps["viridis"])
        figure.colorbar(weights, ax=axes, label=f"weight of {_name(front.objectives[0])}", shrink=0.7, pad=0.02)
    else:
        axes.set_axis_off()
    volume = measured_hypervolume(F, front.reference_point) if split == "validation" else front.volume
    test = f" (test: {front.volume:.4g})" if split == "validation" else ""
    axes.set_title(
        f"{split} split: {best.sum()} of {len(front.members)} members non-dominated, hypervolume {volume:.4g}{test}",
        loc="left",
        fontsize=11,
        pad=8 + 13 * len(notes),
    )
    for line, note in enumerate(notes):
        axes.annotate(
            note,
            (0, 1),
            (0, 7 + 13 * (len(notes) - 1 - line)),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            color="0.35",
        )
    figure.savefig(file, format="png")


@rc_context(AS_WRITTEN)
def draw_fronts(
    names: Sequence[str], objectives: Sequence[str], fronts: Sequence[Points], file: Path | BinaryIO
) -> None:
    """Draws the fronts of a comparison over each other to a PNG file of 1200 × 900 pixels.

    Each has a colour and a marker of its own. Two objectives: the points and their staircase. Otherwise: parallel
    coordinates, each objective scaled to the range of all fronts together.

    Args:
        names: of the fronts, for the legend.
        objectives: the m names.
        fronts: the points of each on the test split, shape (K, m) with a K of its own.
        file: where to write.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    columns = range(len(objectives))
    fronts = [F[(np.abs(F) <= LARGEST).all(axis=1)] for F in fronts]
    handles = []
    for i, F in enumerate(fronts):
        # Nine markers for ten colours: a colour that comes back has another marker.
        style: dict[str, Any] = {
            "color": f"C{i % 10}",
            "marker": "os^Dv<>PX"[i % 9],
            "markersize": 6.0,
            "linewidth": 1.2,
        }
        handles.append(Line2D([], [], **style))
        if len(objectives) == 2:
            steps = F[np.lexsort((F[:, 1], F[:, 0]))]
            axes.step(steps[:, 0], steps[:, 1], where="post", alpha=0.8, **style)
        else:
            together = np.vstack(fronts)
            if not len(together):
                continue
            low, spread = together.min(axis=0), np.ptp(together, axis=0)
            heights = np.where(spread > 0, (F - low) / np.where(spread > 0, spread, 1.0), 0.5)
            for row in heights:
                axes.plot(columns, row, alpha=0.8, **style)
    if len(objectives) == 2:
        axes.set_xlabel(f"{_name(objectives[0])}, test")
        axes.set_ylabel(f"{_name(objectives[1])}, test")
    else:
        axes.set_xticks(columns, [_name(one) for one in objectives], rotation=90 if len(objectives) > MOST_LEVEL else 0)
        axes.set_ylabel("objectives on the test split, lower is better, scaled to the range of all fronts")
    axes.legend(handles, [_name(name) for name in names], loc="best", fontsize=8.5, frameon=False)
    figure.savefig(file, format="png")


def _scatter(
    axes: Axes,
    front: Front,
    F: Points,
    best: NDArray[np.bool_],
    dominated: NDArray[np.bool_],
    numbers: NDArray[np.int_],
) -> list[str]:
    """Two objectives. Returns what is to be said beside the picture."""
    notes = []
    low, high = F[best].min(axis=0), F[best].max(axis=0)
    reference = np.clip(np.asarray(front.reference_point, dtype=np.float64), -LARGEST, LARGEST)
    # A front without width, such as one member's, is shown at the scale of what it leaves to the reference point.
    span = np.where(high > low, high - low, np.where(reference > high, reference - high, np.maximum(np.abs(high), 1.0)))
    limit = high + REACH * span
    shown = dominated & (limit >= F).all(axis=1)
    if (dominated & ~shown).any():
        notes.append(f"dominated, outside the picture: {_listed(numbers[dominated & ~shown])}")
    reached = bool((reference <= limit).all() and (reference >= low - REACH * span).all())
    place = f"({reference[0]:.4g}, {reference[1]:.4g})"
    if not reached:
        notes.append(f"hypervolume area goes on to the reference point {place}, outside the picture")
    drawn = np.vstack([F[best], F[shown], reference[None] if reached else np.empty((0, 2))])
    left, right = drawn.min(axis=0), drawn.max(axis=0)
    margin = 0.1 * np.maximum(right - left, span)
    axes.set_xlim(left[0] - margin[0], right[0] + margin[0])
    axes.set_ylim(left[1] - margin[1], right[1] + margin[1])

    inside = F[best & (reference > F).all(axis=1)]
    if len(inside):
        steps = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
        x, y = np.append(steps[:, 0], reference[0]), np.append(steps[:, 1], steps[-1, 1])
        axes.fill_between(x, y, reference[1], step="post", color=AREA, linewidth=0, zorder=0)
    steps = F[best][np.lexsort((F[best][:, 1], F[best][:, 0]))]
    axes.step(steps[:, 0], steps[:, 1], where="post", color="#5b7fae", linewidth=1, zorder=1)
    axes.scatter(F[shown, 0], F[shown, 1], s=34, color=DOMINATED, zorder=2, label="dominated" if shown.any() else None)
    axes.scatter(F[best, 0], F[best, 1], s=44, c=_colours(front)[best], edgecolors="white", linewidths=0.6, zorder=3)
    if reached:
        axes.scatter(
            reference[0], reference[1], marker="x", s=60, color="#b0413e", zorder=3, label=f"reference point {place}"
        )
    if shown.any() or reached:
        axes.legend(loc="best", fontsize=8.5, frameon=False)
    axes.set_xlabel(f"{_name(front.objectives[0])}, {front.chosen_on}")
    axes.set_ylabel(f"{_name(front.objectives[1])}, {front.chosen_on}")
    # Below and left of a non-dominated point there is no other point: that is where its number stands.
    left_out = _label(axes, F[best], numbers[best], (-4, -4), "right", "top", "0.15")
    left_out += _label(axes, F[shown], numbers[shown], (4, 4), "left", "bottom", "0.55")
    return notes + _unnumbered(left_out)


def _parallel(
    axes: Axes,
    front: Front,
    F: Points,
    best: NDArray[np.bool_],
    dominated: NDArray[np.bool_],
    numbers: NDArray[np.int_],
) -> list[str]:
    """Any number of objectives, one vertical axis each. Returns what is to be said beside the picture."""
    low, high = F[best].min(axis=0), F[best].max(axis=0)
    varies = high > low
    heights = np.where(varies, (F - low) / np.where(varies, high - low, 1.0), 0.5 + np.sign(F - low))
    top = 1.12
    columns = range(len(front.objectives))
    turned = len(columns) > MOST_LEVEL  # beside each other, texts would overlap
    for column in columns:
        axes.axvline(column, color="0.85", linewidth=1, zorder=0)
        ends = ((0, low), (1, high)) if varies[column] else ((0.5, low),)
        for height, values in ends:
            axes.annotate(
                f"{values[column]:.4g}",
                (column, height),
                ((0 if turned else -5), -7 if height == 0 else 7),
                textcoords="offset points",
                rotation=90 if turned else 0,
                ha="center" if turned else "right",
                va=("top" if height == 0 else "bottom") if turned else "center",
                fontsize=8.5,
                color="0.25",
                zorder=5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
    axes.plot(columns, heights[dominated].T, color=DOMINATED, linewidth=1, zorder=1)
    colours = _colours(front)
    for row in np.flatnonzero(best):
        axes.plot(columns, heights[row], color=colours[row], linewidth=1.5, marker="o", markersize=4, zorder=2)
    axes.set_xticks(columns, [_name(one) for one in front.objectives], rotation=90 if turned else 0)
    axes.set_xlim(-0.1 * max(1, len(columns) - 1), columns[-1] + 0.1 * max(1, len(columns) - 1))
    axes.set_ylim(-0.22 if turned else -0.1, top)
    axes.set_yticks([])
    axes.set_ylabel(f"objectives on the {front.chosen_on} split, lower is better")
    axes.spines[["top", "right", "left"]].set_visible(False)
    right = np.column_stack([np.full(len(F), columns[-1], dtype=np.float64), heights[:, -1]])
    shown = dominated & (right[:, 1] <= top)
    left_out = _label(axes, right[best | shown], numbers[best | shown], (8, 0), "left", "center", "0.15")
    notes = [f"dominated, grey: {_listed(numbers[dominated])}"] if dominated.any() else []
    if (heights[dominated] > top).any():
        notes.append("grey lines leave the picture where a value is worse than that of every non-dominated member")
    return notes + _unnumbered(left_out)


def _colours(front: Front) -> Points:
    """One colour a member, N×4, by its first weight."""
    return np.asarray(colormaps["viridis"](np.array([member.weights[0] for member in front.members], dtype=np.float64)))


def _label(
    axes: Axes, points: Points, numbers: NDArray[np.int_], offset: tuple[float, float], ha: str, va: str, colour: str
) -> int:
    """Writes the numbers beside their points; those of points that nearly coincide as one label.

    Returns how many members have no label, as it would have been written over another.
    """
    order = np.lexsort((points[:, 1], points[:, 0]))
    points, numbers = points[order], numbers[order]
    groups: list[tuple[Points, Points, list[int]]] = []
    for point, pixel, number in zip(points, axes.transData.transform(points), numbers, strict=True):
        near = next((group for group in groups if np.abs(group[1] - pixel).max() < CROWDED), None)
        if near is None:
            groups.append((point, pixel, [number]))
        else:
            near[2].append(number)
    left_out = 0
    written: list[tuple[Points, float]] = []
    # The ends of the front first: they must not be the ones that find no room.
    for point, pixel, members in [*groups[:1], *groups[-1:], *groups[1:-1]][: len(groups)]:
        text = _listed(sorted(members))
        width = CHARACTER[0] * (len(text) + 1)
        if any(
            abs(pixel[0] - at[0]) < max(width, wide) and abs(pixel[1] - at[1]) < CHARACTER[1] for at, wide in written
        ):
            left_out += len(members)
            continue
        written.append((pixel, width))
        axes.annotate(
            text,
            (point[0], point[1]),
            offset,
            textcoords="offset points",
            fontsize=8,
            ha=ha,
            va=va,
            color=colour,
            zorder=4,
        )
    return left_out


def _name(text: str) -> str:
    """A name as it is drawn."""
    return cut(printable(text), LONGEST_NAME)


def _unnumbered(count: int) -> list[str]:
    return [f"members without a number, for want of room: {count}"] if count else []


def _listed(numbers: NDArray[np.int_] | list[int]) -> str:
    """The first numbers, and how many more there are."""
    text = ", ".join(str(number) for number in numbers[:MOST_NUMBERS])
    more = len(numbers) - MOST_NUMBERS
    return f"{text} and {more} more" if more > 0 else text
