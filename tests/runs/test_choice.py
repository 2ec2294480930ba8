"""Choosing one model of a front: by what, within which constraints, and what is refused."""

import numpy as np
import pytest

from popmtl.errors import RequestError
from popmtl.method.front import hypervolume, non_dominated
from popmtl.runs.choice import choose, finished_front, in_words, knee_of
from popmtl.runs.folder import LOCK, RunFolder
from popmtl.runs.front import Front, Member

NAN = np.nan


def front(F, directions=None, lost=(), **metrics):
    """A front with these objective values and, by name, N values of each metric."""
    F = np.asarray(F, dtype=float)
    best = non_dominated(F)
    members = [
        Member(
            subproblem=i,
            weights=[1 / F.shape[1]] * F.shape[1],
            objectives=F[i].tolist(),
            metrics={name: values[i] for name, values in metrics.items()},
            stage="mtgd",
            non_dominated=bool(best[i]),
            model=None if i in lost else "models",
            lost="diverged" if i in lost else None,
        )
        for i in range(len(F))
    ]
    names = ["left digit", "depth/abs-rel.", "third"][: F.shape[1]]
    reference = np.full(F.shape[1], 10.0)
    return Front(names, reference, hypervolume(F, reference), 0, 10, members, directions or {})


# 3 is dominated by 1 and 2, 4 by all; 5 and 6 would be the best of all.
F = [[0.0, 1.0], [0.2, 0.5], [0.3, 0.3], [0.4, 0.6], [5.0, 5.0], [NAN, 0.0], [-1.0, -1.0], [1.0, 0.0]]
ACCURACY = [0.7, 0.8, 0.8, 0.9, 0.99, 1.0, 1.0, NAN]
SOME = front(F, {"accuracy": "higher", "error": "lower"}, lost=[6], accuracy=ACCURACY, error=[-x for x in ACCURACY])


def chosen(*where, **by):
    return choose(SOME, where=where, **by).member.subproblem


def test_each_way_to_choose():
    assert chosen(preference=[1, 0]) == 0
    assert chosen(preference=[0, 1]) == 7
    assert chosen(preference=[0.5, 0.5]) == 2
    assert chosen(at_knee=True) == 2
    assert knee_of(SOME) is SOME.members[2]
    assert chosen(best="left digit") == 0
    assert chosen(best="depth/abs-rel.") == 7
    # 1 and 2 are equal in it, and 2 is the better compromise; 3 is better, but dominated.
    assert chosen(best="accuracy") == chosen(best="error") == 2
    assert chosen("left digit < 0.25", best="accuracy") == 1
    assert chosen("accuracy > 0") == 2


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("left digit<0.2", 0),
        ("left digit<=0.2", 1),
        ("  left digit  <=  2e-1 ", 1),
        ("depth/abs-rel.<.3", 7),
        ("depth/abs-rel. > 0.3", 1),
        ("depth/abs-rel.>=0.3", 2),
        ("left digit>-1", 2),
    ],
)
def test_constraints_on_names_of_all_kinds(where, expected):
    assert chosen(where) == expected


def test_only_dominated_members_are_left():
    for by in ({"preference": [1, 1]}, {"at_knee": True}, {"best": "left digit"}, {"best": "depth/abs-rel."}):
        choice = choose(SOME, where=["accuracy>=0.9"], **by)
        assert (choice.member.subproblem, choice.dominated_by) == (3, [1, 2])
    assert choose(SOME, where=["accuracy>0.9"]).dominated_by == [0, 1, 2, 7]
    assert choose(SOME).dominated_by == []


def test_diverged_and_lost_members_are_never_chosen():
    assert chosen("accuracy>=0.95") == 4
    with pytest.raises(RequestError, match=r"excludes 6 of 6 \(the best is 0.99\)"):
        chosen("accuracy>=0.995")
    nothing = front([[NAN, 1.0], [0.0, 0.0]], lost=[1])
    assert knee_of(nothing) is None
    with pytest.raises(RequestError, match="no member has finite objective values"):
        choose(nothing)


def test_a_constraint_that_the_choice_satisfies_changes_nothing():
    random = np.random.default_rng(0)
    for _ in range(100):
        # Few distinct values: many ties.
        values = random.integers(0, 5, size=(10, 3)).astype(float)
        accuracy = random.integers(0, 3, size=10).astype(float)
        one = front(values, {"accuracy": "higher"}, accuracy=accuracy)
        for by in ({"preference": random.random(3)}, {"at_knee": True}, {"best": "accuracy"}, {"best": "third"}):
            member = choose(one, **by).member
            limits = [f"accuracy>={member.metrics['accuracy']}", f"left digit<={member.objectives[0]}"]
            assert choose(one, where=limits, **by).member is member


def test_the_best_within_constraints_equals_a_search():
    random = np.random.default_rng(1)
    dominated = 0
    for _ in range(100):
        values = random.random((10, 2))
        accuracy = random.random(10)
        one = front(values, accuracy=accuracy)
        allowed = [i for i in range(10) if accuracy[i] > 0.6 and values[i, 1] <= 0.7]
        search = [i for i in allowed if one.members[i].non_dominated] or allowed
        where = ["accuracy > 0.6", "depth/abs-rel. <= 0.7"]
        if not search:
            with pytest.raises(RequestError, match="no member satisfies"):
                choose(one, best="left digit", where=where)
            continue
        choice = choose(one, best="left digit", where=where)
        assert choice.member.subproblem == min(search, key=lambda i: values[i, 0])
        dominates = [
            (values[i] < values[choice.member.subproblem]).all() and one.members[i].non_dominated for i in range(10)
        ]
        assert choice.dominated_by == np.flatnonzero(dominates).tolist()
        dominated += bool(choice.dominated_by)
    assert dominated > 5


def test_a_refusal_counts_what_each_constraint_excludes():
    with pytest.raises(RequestError) as refusal:
        chosen("accuracy>=0.8", "left digit < 0.2", "depth/abs-rel.<-1")
    assert str(refusal.value) == (
        "no member satisfies all of --where: 'accuracy>=0.8' excludes 2 of 6 (the best is 0.99); "
        "'left digit < 0.2' excludes 5 of 6 (the best is 0); 'depth/abs-rel.<-1' excludes 6 of 6 (the best is 0)"
    )


@pytest.mark.parametrize(
    ("where", "by", "says"),
    [
        (["acuracy>=0.8"], {}, "--where 'acuracy>=0.8': there are left digit, depth/abs-rel., accuracy, error, and no"),
        (["acuracy>=0.8"], {}, "no 'acuracy': did you mean accuracy?"),
        (["accuracy=0.8"], {}, "--where 'accuracy=0.8': give a name, one of >=, <=, > and <, and a number"),
        ([">=0.8"], {}, "--where '>=0.8': give a name"),
        (["accuracy>=high"], {}, "--where 'accuracy>=high': 'high' is no number"),
        (["accuracy>=nan"], {}, "'nan' is no number"),
        ([], {"best": "left"}, "--best: there are left digit, depth/abs-rel., accuracy, error, and no 'left'"),
        ([], {"preference": [0.5]}, "--preference 0.5: give 2 numbers, one for each of left digit, depth/abs-rel."),
        ([], {"preference": [0, 0]}, "--preference: preference must be non-negative numbers, not all zero"),
        ([], {"preference": [-1, 2]}, "--preference: preference must be non-negative"),
    ],
)
def test_wrong_requests_are_named(where, by, says):
    with pytest.raises(RequestError) as refusal:
        choose(SOME, where=where, **by)
    assert says in str(refusal.value)


def test_a_metric_needs_a_direction_and_a_value_to_be_the_best_of():
    values = [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(RequestError, match=r"--best speed: front.json does not say whether higher or lower is better"):
        choose(front(values, speed=[1.0, 2.0]), best="speed")
    with pytest.raises(RequestError, match=r"--best speed: no member to choose from has a finite value"):
        choose(front(values, {"speed": "higher"}, speed=[NAN, NAN]), best="speed")
    with pytest.raises(RequestError, match=r"excludes 2 of 2 \(none has a value\)"):
        choose(front(values, speed=[NAN, NAN]), where=["speed>0"])


def test_how_it_was_chosen_in_words():
    choice = choose(SOME, preference=[0.25, 0.75], where=["accuracy>0.1", "left digit < 9"])
    assert in_words({**choice.by, "where": choice.where}, SOME.objectives) == (
        "preference 0.25 for left digit, 0.75 for depth/abs-rel., where accuracy > 0.1 and left digit < 9"
    )


def test_a_run_without_a_front_is_refused_with_the_way_on(tmp_path):
    with pytest.raises(RequestError, match="is not a run folder"):
        finished_front(RunFolder(tmp_path / "none"))
    folder = RunFolder.create(tmp_path, "my run")
    folder.write_config({"seed": 1})
    folder.append_event("started")
    with folder.held(LOCK), pytest.raises(RequestError, match=r"has no front yet: it is running$"):
        finished_front(folder)
    folder.append_event("interrupted")
    way = (
        rf"has no front yet: it has not finished \(interrupted\); popmtl train --resume '{folder.path}' goes on with it"
    )
    with pytest.raises(RequestError, match=way):
        finished_front(folder)
    for damaged in ("{", "[]", '{"objectives": []}'):
        folder.write("pareto/front.json", damaged.encode())
        with pytest.raises(RequestError, match=r"front\.json is damaged"):
            finished_front(folder)
    folder.write("pareto/front.json", SOME.to_json().encode())
    assert len(finished_front(folder).members) == len(F)
