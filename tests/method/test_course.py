"""The course of a run: its chunks, what it keeps of the observations, and where it ends."""

import json

import numpy as np
import pytest

from popmtl.method.course import Course, Seen, Stop

W = np.array([[0.3, 0.7], [0.7, 0.3]])
M = np.array([[0.7, 0.3], [0.3, 0.7]])
F = np.array([[1.0, -3.0], [2.0, -5.0]])


def walk(course, longest=None):
    """The chunks of a run as (first, length, evaluated afterwards)."""
    course.observe(F)
    taken = []
    while chunk := course.next_chunk(longest):
        evaluated = course.advance(chunk)
        taken.append((chunk.first, len(chunk), evaluated))
    return taken


@pytest.mark.parametrize(
    ("steps", "every", "longest", "expected"),
    [
        (10, 4, None, [(0, 4, True), (4, 4, True), (8, 2, True)]),
        (8, 4, None, [(0, 4, True), (4, 4, True)]),
        (7, 4, 3, [(0, 3, False), (3, 1, True), (4, 3, True)]),
        (3, 50, None, [(0, 3, True)]),
        (3, 1, 9, [(0, 1, True), (1, 1, True), (2, 1, True)]),
        (0, 4, None, []),
    ],
)
def test_chunks_end_where_the_population_is_evaluated_and_at_the_end(steps, every, longest, expected):
    course = Course(W, M, np.ones(steps), every)
    assert walk(course, longest) == expected
    assert course.step == steps
    assert course.next_chunk() is None


def test_chunks_carry_their_own_factors_and_the_ideal_point_of_their_time():
    course = Course(W, M, np.arange(5) / 10, 3)
    course.observe(F)
    first = course.next_chunk()
    course.advance(first)
    course.observe(F - 1)
    second = course.next_chunk()
    assert (first.factors.tolist(), second.factors.tolist()) == ([0, 0.1, 0.2], [0.3, 0.4])
    assert (first.ideal.tolist(), second.ideal.tolist()) == ([1, -5], [0, -6])
    assert second.M is M


def test_a_tracked_ideal_point_keeps_the_least_of_all_observations():
    course = Course(W, M, np.ones(5), 1)
    for offset in (0, -2, 3):
        course.observe(F + np.array([offset, -offset]))
    assert course.ideal.tolist() == [-1, -8]


def test_a_given_ideal_point_stays():
    course = Course(W, M, np.ones(5), 1, ideal_point=[0.5, 0])
    assert course.next_chunk().ideal.tolist() == [0.5, 0]  # before any observation, too
    course.observe(F - 100)
    assert course.ideal.tolist() == [0.5, 0]


def test_without_an_ideal_point_the_first_step_needs_an_observation():
    with pytest.raises(ValueError, match="observed once before its first step"):
        Course(W, M, np.ones(5), 1).next_chunk()


def test_the_reference_point_lies_a_tenth_beyond_the_first_observation_and_stays():
    course = Course(W, M, np.ones(5), 1)
    course.observe(np.array([[40.0, -0.2, -30.0], [10.0, -0.5, -20.0]]))
    # A tenth of 40, of 1 at least, and of |−20|.
    assert course.reference_point.tolist() == pytest.approx([44, -0.1, -18])
    course.observe(np.full((2, 3), 1000.0))
    assert course.reference_point.tolist() == pytest.approx([44, -0.1, -18])


def test_observations_are_recorded_with_hypervolume_and_front():
    course = Course(W, M, np.ones(4), 2, reference_point=[3, 0])
    first = course.observe(F)
    # Boxes to (3, 0): 2 × 3 and 1 × 5, sharing 1 × 3.
    assert (first.step, first.hypervolume, first.front_size) == (0, pytest.approx(8), 2)
    course.advance(course.next_chunk())
    second = course.observe(np.array([[1.0, -3.0], [2.0, -2.0]]))
    assert (second.step, second.hypervolume, second.front_size) == (2, pytest.approx(6), 1)
    assert (course.last, course.best) == (Seen(2, second.hypervolume, None), Seen(0, first.hypervolume, None))
    assert course.reference_point.tolist() == [3, 0]


def stopping(volumes, steps=100, every=1, **rule):
    """A course whose evaluations have these hypervolumes: one model's, (1 − v, 0) from (1, 1)."""
    course = Course(np.ones((1, 2)) / 2, np.eye(1), np.ones(steps), every, [0, 0], [1, 1], stop=Stop(**rule))
    for volume in volumes:
        course.observe(np.array([[1 - volume, 0.0]]))
        chunk = course.next_chunk()
        if chunk is None:
            break
        course.advance(chunk)
    return course


@pytest.mark.parametrize(
    ("volumes", "rule", "step"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.9], {"patience": 2}, 3),
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.3, 0.9], {"patience": 2}, 5),  # to come back to the best is no improvement
        ([0.5, 0.1, 0.9], {"patience": 1}, 1),
        ([0.5, 0.52, 0.54, 0.56, 0.58], {"patience": 2, "min_improvement": 0.1}, 2),  # each small, of the last one
        ([0.5, 0.52, 0.56, 0.57, 0.62], {"patience": 2, "min_improvement": 0.1}, None),
        ([0.0, 0.0, 0.0, 0.1], {"patience": 3}, None),
        ([0.5] * 20, {}, None),
    ],
)
def test_a_course_stops_after_so_many_evaluations_without_an_improvement(volumes, rule, step):
    course = stopping(volumes, **rule)
    if step is None:
        assert course.stopped is None
        assert course.next_chunk() is not None
    else:
        assert course.step == step
        assert course.stopped == f"no improvement of the hypervolume in {rule['patience']} evaluations"
        assert course.next_chunk() is None


def test_a_course_that_ends_anyway_did_not_stop_early():
    course = stopping([0.5] * 3, steps=2, patience=2)
    assert (course.step, course.stopped, course.next_chunk()) == (2, None, None)


def test_a_course_stops_when_its_hours_are_over_and_is_evaluated_there():
    course = Course(W, M, np.ones(100), 10, stop=Stop(max_hours=1.0))
    course.observe(F)
    assert not course.advance(course.next_chunk(3), 3000.0)
    assert course.next_chunk() is not None
    again = Course(W, M, np.ones(100), 10, stop=Stop(max_hours=1.0))
    again.restore(json.loads(json.dumps(course.state())))  # the time before an interruption counts
    assert again.advance(again.next_chunk(3), 600.0)
    assert (again.step, again.next_chunk(), again.stopped) == (6, None, "1 hours of training")


def test_a_course_that_goes_on_stops_where_it_would_have_and_knows_its_best():
    volumes = [0.1, 0.4, 0.4, 0.3, 0.2, 0.6]
    for interrupted in range(1, 4):
        course = Course(np.ones((1, 2)) / 2, np.eye(1), np.ones(9), 1, [0, 0], [1, 1], stop=Stop(patience=3))
        for n, volume in enumerate(volumes):
            course.observe(np.array([[1 - volume, 0.0]]))
            if n == interrupted:
                state = json.loads(json.dumps(course.state()))
                course = Course(np.ones((1, 2)) / 2, np.eye(1), np.ones(9), 1, [0, 0], [1, 1], stop=Stop(patience=3))
                course.restore(state)
            if (chunk := course.next_chunk()) is None:
                break
            course.advance(chunk)
        assert (course.step, course.best.step) == (4, 1)  # of equals the first
        course.restore(json.loads(json.dumps(course.state())))
        assert course.next_chunk() is None


def figures(course):
    return course.last, course.best, course.improved, course.stale, course.stopped


def test_running_figures_are_those_of_the_whole_history_wherever_it_is_cut():
    draw = np.random.default_rng(0)
    for _ in range(20):
        rule = {"patience": 4, "min_improvement": float(draw.choice([0.0, 0.05]))}
        volumes = draw.choice([0.1, 0.2, 0.21, 0.3, 0.5], 12).tolist()
        course, improved, stale = stopping(volumes, **rule), volumes[0], 0
        seen = volumes[: course.step + 1]
        for volume in seen[1:]:
            better = volume - improved > rule["min_improvement"] * abs(improved)
            improved, stale = (volume, 0) if better else (improved, stale + 1)
        assert course.best.step == seen.index(max(seen))
        assert (course.improved, course.stale) == (pytest.approx(improved), stale)
        cut = int(draw.integers(0, len(seen)))
        again = stopping([], **rule)
        first = stopping(volumes[: cut + 1], **rule)
        again.restore(json.loads(json.dumps(first.state())))
        while len(seen) > cut + 1 and again.step < course.step:
            again.observe(np.array([[1 - volumes[again.step], 0.0]]))
            if chunk := again.next_chunk():
                again.advance(chunk)
        if len(seen) > cut + 1:
            again.observe(np.array([[1 - volumes[again.step], 0.0]]))
        assert figures(again) == figures(course)


def test_with_another_rule_for_improvements_they_are_counted_anew():
    volumes = [0.5, 0.51, 0.53, 0.54]
    course = stopping(volumes, patience=9)
    assert course.stale == 0
    again = stopping([], patience=2, min_improvement=0.1)
    again.restore(course.state(), lambda: volumes)
    assert (again.improved, again.stale) == (0.5, 3)
    same = stopping([], patience=2)
    same.restore(course.state(), pytest.fail)
    assert same.stale == 0


def test_a_state_is_as_large_after_many_observations_as_after_one():
    course = Course(W, M, np.ones(2000), 1, [0, 0], [3, 3])
    sizes = []
    for n in range(1000):
        course.observe(np.array([[2.0, 1 / (n + 1)], [1 / (n + 1), 2.0]]))
        sizes.append(len(json.dumps(course.state())))
        course.advance(course.next_chunk())
    assert max(sizes) < 1000
    assert {name for name, value in vars(course).items() if isinstance(value, list | dict) and len(value) > 2} == set()


def test_a_course_that_was_not_observed_has_no_state():
    with pytest.raises(ValueError, match="observed once"):
        Course(W, M, np.ones(2), 1).state()
