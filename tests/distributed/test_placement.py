import asyncio
import itertools
import os

import pytest
import ray

from popmtl.config import ResourcesConfig
from popmtl.distributed.crew import Crew
from popmtl.distributed.placement import Placement, place, rank_order
from popmtl.errors import RequestError


def rows(subproblems, *nodes, **resources):
    return [list(r) for r in place(subproblems, ResourcesConfig(**resources), nodes).rows]


def test_one_actor_for_each_subproblem_where_there_is_room():
    assert rows(3, {"CPU": 8.0}) == [[0], [1], [2]]


def test_rows_are_packed_evenly_and_in_order_where_there_is_not():
    assert rows(7, {"CPU": 3.0}) == [[0, 1], [2, 3], [4, 5, 6]]
    assert rows(7, {"CPU": 64.0}, max_actors=2) == [[0, 1, 2], [3, 4, 5, 6]]


def test_every_actor_gets_a_gpu_where_there_are_some():
    placed = place(8, ResourcesConfig(), [{"CPU": 16.0, "GPU": 4.0}])
    assert (len(placed.rows), placed.gpus, placed.device) == (4, 1.0, "cuda:0")


def test_without_gpus_or_without_wanting_them_the_cpu_trains():
    assert place(2, ResourcesConfig(), [{"CPU": 2.0}]).device == "cpu"
    assert place(2, ResourcesConfig(gpus_per_actor=0), [{"CPU": 2.0, "GPU": 4.0}]).device == "cpu"


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


def test_an_actor_fits_on_a_machine_not_on_the_sum_of_several():
    three = [{"CPU": 3.0}] * 3
    assert len(rows(8, *three, cpus_per_actor=2)) == 3
    with pytest.raises(RequestError, match=r"3 actors of 4 CPU.*the cluster has 2 hosts: 2 with 6 CPU.*at most 2"):
        rows(8, {"CPU": 6.0}, {"CPU": 6.0}, cpus_per_actor=4, max_actors=3)
    with pytest.raises(RequestError, match="takes 4 CPU; the cluster has 3 hosts: 3 with 3 CPU and 0 GPU"):
        rows(8, *three, cpus_per_actor=4)


def test_machines_may_differ_and_those_without_a_gpu_hold_no_actor_where_others_have_some():
    head, small, large = {"CPU": 16.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 4.0}
    placed = place(8, ResourcesConfig(), [head, small, large])
    assert (len(placed.rows), placed.gpus) == (3, 1.0)  # the large one has processors for two
    assert placed.hosts == (1, 2, 2)
    assert place(2, ResourcesConfig(), [head, small, large]).hosts == (2, 2)


def test_an_autoscaling_cluster_is_asked_for_what_is_not_there_yet():
    asked = place(8, ResourcesConfig(autoscaling=True, max_actors=4, gpus_per_actor=1), [{"CPU": 1.0}])
    assert (len(asked.rows), asked.gpus, asked.hosts) == (4, 1.0, ())
    with pytest.raises(ValueError, match="autoscaling needs max_actors and gpus_per_actor"):
        ResourcesConfig(autoscaling=True, max_actors=4)


def test_ranks_of_a_host_stand_together_in_an_order_that_does_not_depend_on_the_bundles():
    addresses = {"a": "10.0.0.10", "b": "10.0.0.9", "c": "10.0.1.1"}
    for bundles in itertools.permutations(["a", "a", "b", "c", "c"]):
        order = rank_order(bundles, addresses)
        assert sorted(order) == list(range(5))
        assert [bundles[bundle] for bundle in order] == ["b", "a", "a", "c", "c"]


def test_ranks_of_hosts_with_names_have_an_order_too():
    addresses = {"x": "worker-2", "y": "worker-1", "z": "10.0.0.1"}
    assert rank_order(["x", "y", "z", "x"], addresses) == [2, 1, 0, 3]


class Where:
    def __init__(self, run, rank, rows):
        self.rank = rank

    def here(self):
        return self.rank, [str(gpu) for gpu in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(("subproblems", "packed"), [(7, [2, 2, 3]), pytest.param(2, [1, 1], marks=pytest.mark.slow)])
def test_each_actor_has_a_gpu_to_itself_and_rows_are_packed_where_gpus_are_few(ray_of_four, subproblems, packed):
    placement = place(subproblems, ResourcesConfig(), ray_of_four)
    assert [len(held) for held in placement.rows] == packed
    assert placement.device == "cuda:0"
    crew = asyncio.run(Crew.start("run", placement, ResourcesConfig(), actor=ray.remote(Where)))
    try:
        found = asyncio.run(crew.all("here"))
    finally:
        crew.release()
    assert [rank for rank, _, _ in found] == list(range(len(packed)))
    seen = [visible for _, _, visible in found]
    assert [gpus for _, gpus, _ in found] == [[visible] for visible in seen], "one each, and Ray shows it no other"
    assert len(set(seen)) == len(packed)
    assert len(crew.hosts) == len(packed)


def test_two_runs_of_one_name_may_be_in_one_namespace(ray_of_four):
    placement, where = Placement((range(1),), 1, 0.0), ray.remote(Where)
    crews = [asyncio.run(Crew.start("run", placement, ResourcesConfig(), actor=where)) for _ in range(2)]
    try:
        assert [asyncio.run(crew.all("here"))[0][0] for crew in crews] == [0, 0]
    finally:
        for crew in crews:
            crew.release()
