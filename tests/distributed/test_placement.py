import pytest

from popmtl.config import ResourcesConfig
from popmtl.distributed.placement import place
from popmtl.errors import RequestError


def rows(subproblems, available, **resources):
    return [list(r) for r in place(subproblems, ResourcesConfig(**resources), available).rows]


def test_one_actor_for_each_subproblem_where_there_is_room():
    assert rows(3, {"CPU": 8.0}) == [[0], [1], [2]]


def test_rows_are_packed_evenly_and_in_order_where_there_is_not():
    assert rows(7, {"CPU": 3.0}) == [[0, 1], [2, 3], [4, 5, 6]]
    assert rows(7, {"CPU": 64.0}, max_actors=2) == [[0, 1, 2], [3, 4, 5, 6]]


def test_every_actor_gets_a_gpu_where_there_are_some():
    placed = place(8, ResourcesConfig(), {"CPU": 16.0, "GPU": 4.0})
    assert (len(placed.rows), placed.gpus, placed.device) == (4, 1.0, "cuda:0")


def test_without_gpus_or_without_wanting_them_the_cpu_trains():
    assert place(2, ResourcesConfig(), {"CPU": 2.0}).device == "cpu"
    assert place(2, ResourcesConfig(gpus_per_actor=0), {"CPU": 2.0, "GPU": 4.0}).device == "cpu"


def test_fractions_of_a_gpu_and_several_cpus_count():
    assert len(rows(8, {"CPU": 16.0, "GPU": 1.0}, gpus_per_actor=0.25)) == 4
    assert len(rows(8, {"CPU": 16.0}, cpus_per_actor=4)) == 4
    assert len(rows(8, {"CPU": 3.0, "GPU": 8.0})) == 3


@pytest.mark.parametrize(
    ("available", "resources", "message"),
    [
        ({"CPU": 2.0}, {"max_actors": 3}, "resources.max_actors: 3 actors of 1 CPU do not fit.*has 2 CPU.*at most 2"),
        ({"CPU": 2.0}, {"cpus_per_actor": 4}, "an actor takes 4 CPU; the cluster has 2 CPU"),
        ({"CPU": 2.0}, {"gpus_per_actor": 1}, "an actor takes 1 CPU and 1 GPU; the cluster has 2 CPU and 0 GPU"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(available, resources, message):
    with pytest.raises(RequestError, match=message):
        rows(8, available, **resources)


def test_more_actors_than_subproblems_are_no_request():
    assert len(rows(2, {"CPU": 2.0}, max_actors=8)) == 2
