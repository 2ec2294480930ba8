"""What a plan decides and states, each figure worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_problems
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.mixing.collective import Routes
from popmtl.distributed.plan import make_plan, replan
from popmtl.errors import RequestError

# NoisyRegression: trunk 6·5 and BatchNorm 5 + 5 transfer; two heads of 5 + 1 do not.
TRUNK, HEADS = 40, 12
BUFFERS = (5 + 5) * 8 + 8  # BatchNorm's statistics, which each row has of its own
ADAM = 2 * (TRUNK + HEADS) * 8 + 4  # two moments, and a count of steps


def plan(data, cpus=4.0):
    return make_plan(Config.model_validate(data), [{"CPU": cpus}])


def test_sizes_of_rows_and_of_what_is_sent():
    made = plan(config(2, transfer={"transport": "coordinator"}))
    assert (made.parameters, made.transferring) == (TRUNK + HEADS, TRUNK)
    assert made.bytes_sent_per_step() == 2 * 4 * TRUNK * 8  # to the coordinator and back, four rows of float64
    # Blocks of two rows: each with its gradient, Adam's memory, buffers, and what comes and goes of the columns that
    # transfer; and once what a backward pass leaves.
    row = 2 * (TRUNK + HEADS) * 8 + ADAM + BUFFERS
    assert made.memory_per_actor() == 2 * (row + 2 * TRUNK * 8) + (TRUNK + HEADS) * 8
    # Two actors send each other their two rows.
    assert plan(config(2, transfer={"transport": "collective"})).bytes_sent_per_step() == 2 * 2 * TRUNK * 8
    shared = plan(config(2))
    assert (shared.transport.name, shared.bytes_sent_per_step()) == ("shared_memory", 0)
    # The rows as they were before a step of consensus, besides.
    assert shared.memory_per_actor() == 2 * (row + 2 * TRUNK * 8) + (TRUNK + HEADS) * 8


def test_rows_that_are_taken_by_few_are_sent_to_few():
    neighbours = {"kernel": "nearest", "nearest": 1, "transport": "collective"}
    made = plan(config(2, transfer=neighbours))
    assert made.routes.direct
    assert made.bytes_sent_per_step() == sum(map(len, made.routes.takes)) * TRUNK * 8
    assert made.bytes_sent_per_step() < plan(config(2, transfer={"transport": "collective"})).bytes_sent_per_step()


def test_what_hosts_send_each_other_is_stated_apart():
    def between(rooms):
        data = config(4, transfer={"transport": "collective"})
        made = make_plan(Config.model_validate(data), [{"CPU": room} for room in rooms])
        assert made.placement.hosts == tuple(i for i, room in enumerate(rooms) for _ in range(int(room)))
        return made.bytes_sent_per_step(), made.bytes_between_hosts_per_step()

    # Four actors with a row each give three others a quarter of it, and get as much back; two are on the other host.
    assert between([4.0]) == (2 * 4 * 3 * TRUNK // 4 * 8, 0)
    assert between([2.0, 2.0]) == (2 * 4 * 3 * TRUNK // 4 * 8, 2 * 4 * 2 * TRUNK // 4 * 8)
    assert between([1.0, 3.0]) == (2 * 4 * 3 * TRUNK // 4 * 8, 2 * 2 * 3 * TRUNK // 4 * 8)
    takes = tuple(np.array(rows) for rows in ([1], [0, 2], [3, 1], [2]))
    neighbours = Routes((1, 1, 1, 1), takes, direct=True)
    assert neighbours.numbers_sent(TRUNK) == 6 * TRUNK
    assert neighbours.numbers_sent(TRUNK, [0, 0, 1, 1]) == 2 * TRUNK


def test_mixed_moments_are_sent_too_and_a_rounded_wire_halves_the_bytes():
    collective = {"transport": "collective"}
    rows = plan(config(2, "adapt_then_combine", transfer=collective)).bytes_sent_per_step()
    moments = config(2, "adapt_then_combine", transfer={"mix_moments": True, **collective})
    assert plan(moments).bytes_sent_per_step() == 3 * rows
    single = config(2, transfer=collective, train={"dtype": "float32"})
    rounded = config(2, transfer={"wire_dtype": "bfloat16", **collective}, train={"dtype": "float32"})
    assert plan(rounded).bytes_sent_per_step() == plan(single).bytes_sent_per_step() / 2 == rows / 4


def test_task_gradients_take_memory_in_the_exact_variant_only():
    sgd = {"name": "SGD", "lr": 0.1}
    base = plan(config(4, optimizer=sgd)).memory_per_actor()
    row = (TRUNK + HEADS) * 8
    assert base == 3 * row + 2 * TRUNK * 8 + BUFFERS
    fine = {"steps": 3}
    exact = plan(config(4, optimizer=sgd, fine_tune=fine))
    assert exact.memory_per_actor() == base + row  # gradients of two tasks in place of one
    assert exact.shared == TRUNK
    assert plan(config(4, optimizer=sgd, fine_tune={**fine, "variant": "ub"})).memory_per_actor() == base
    first = plan(config(4, optimizer=sgd, train={"gradient": {"name": "aligned_mtl"}}))
    assert first.memory_per_actor() == base + row
    assert first.shared == TRUNK


def test_nothing_is_sent_without_transfer_or_on_one_actor():
    assert plan(config(2, transfer={"strength": 0.0, "transport": "collective"})).bytes_sent_per_step() == 0
    assert plan(config(1)).bytes_sent_per_step() == 0
    assert plan(config(1)).transport.name == "local"


def chosen(data, *nodes):
    made = make_plan(Config.model_validate(data), nodes)
    return made.transport.name, made.transport.why


def test_the_transport_follows_from_where_the_actors_are(monkeypatch):
    assert chosen(config(1), {"CPU": 4.0}) == ("local", "one actor holds every row")
    assert chosen(config(2), {"CPU": 4.0}) == ("shared_memory", "all actors on one host")
    assert chosen(config(2), {"CPU": 1.0}, {"CPU": 1.0}) == ("collective", "several hosts")
    assert chosen(config(2), {"CPU": 1.0}, {"CPU": 2.0}) == ("shared_memory", "all actors on one host")
    yet = config(2)
    yet["resources"] |= {"autoscaling": True, "gpus_per_actor": 0}
    assert chosen(yet) == ("collective", "the hosts are yet to come")
    assert chosen(config(2), {"CPU": 4.0, "GPU": 2.0}) == ("collective", "actors on GPUs")
    half = config(2)
    half["resources"]["gpus_per_actor"] = 0.5
    assert chosen(half, {"CPU": 4.0, "GPU": 1.0}) == ("coordinator", "actors share a GPU, which NCCL does not allow")
    assert chosen(config(2, transfer={"transport": "collective"}), {"CPU": 4.0}) == ("collective", "asked for")
    monkeypatch.setattr("popmtl.distributed.mixing.shared_memory.free_bytes", lambda: 10**3)
    name, why = chosen(config(2), {"CPU": 4.0})
    assert name == "collective"
    assert why.endswith("has 0 MB of the 0 MB needed")


def test_a_transport_that_cannot_serve_is_refused(monkeypatch):
    half = config(2, transfer={"transport": "collective"})
    half["resources"]["gpus_per_actor"] = 0.5
    with pytest.raises(
        RequestError, match=r"collective needs a GPU for each actor \(resources.gpus_per_actor is 0.5\)"
    ):
        chosen(half, {"CPU": 4.0, "GPU": 1.0})
    shared = config(2, transfer={"transport": "shared_memory"})
    with pytest.raises(RequestError, match="shared_memory is for actors without GPUs; take collective"):
        chosen(shared, {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr("popmtl.distributed.mixing.shared_memory.free_bytes", lambda: 10**3)
    with pytest.raises(RequestError, match=r"shared_memory takes 0 MB in /dev/shm, which has 0 MB; take collective"):
        chosen(shared, {"CPU": 4.0})


def test_what_hides_the_exchange_is_said(monkeypatch):
    def overlap(order, optimizer=None, name="NoisyRegression", actors=2):
        data = config(actors, order, optimizer)
        data["problem"] = {"name": f"toy_problems:{name}"}
        transport = plan(data).transport
        return transport.overlap, transport.bucket_bytes

    whole = float("inf")
    assert overlap("consensus") == ("behind the forward and backward passes", whole)
    assert overlap("consensus", actors=1) == ("none: nothing is sent", whole)
    assert overlap("adapt_then_combine") == ("none: what transfers fits one bucket of 8 MiB", whole)
    monkeypatch.setattr("popmtl.distributed.transport.BUCKET_BYTES", 64)
    assert overlap("adapt_then_combine") == ("behind the backward pass, by 2 buckets", 64)
    entries, _ = overlap("adapt_then_combine", {"name": "Adafactor", "lr": 0.01})
    assert entries == "none: the optimizer does not treat each entry of a row alone, and all alike"
    late, _ = overlap("adapt_then_combine", name="ReadsLate")
    assert late == "none: the backward pass reads parameters after their gradients are complete"


def test_the_local_transport_puts_every_row_on_one_actor():
    data = config(None, transfer={"transport": "local"})
    assert [list(r) for r in plan(data).placement.rows] == [[0, 1, 2, 3]]
    data["resources"] = {"max_actors": 2}
    with pytest.raises(RequestError, match=r"transfer\.transport: local needs one actor"):
        plan(data)


def test_the_coordinator_transport_is_taken_where_it_is_asked_for():
    made = plan(config(1, transfer={"transport": "coordinator"}))
    assert (len(made.placement.rows), made.transport.name) == (1, "coordinator")
    assert made.bytes_sent_per_step() > 0


def test_a_matrix_from_a_file_is_taken_and_checked(tmp_path):
    M = np.array([[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25]])
    np.save(tmp_path / "M.npy", M)
    np.savetxt(tmp_path / "M.csv", M, delimiter=",")
    for name in ("M.npy", "M.csv"):
        np.testing.assert_array_equal(plan(config(2, transfer={"matrix": str(tmp_path / name)})).M, M)
    np.save(tmp_path / "bad.npy", 2 * M)
    with pytest.raises(RequestError, match="transfer: row 0 of the transfer coefficients sums to 2"):
        plan(config(2, transfer={"matrix": str(tmp_path / "bad.npy")}))
    with pytest.raises(RequestError, match=r"transfer: matrix .*none\.npy: No such file"):
        plan(config(2, transfer={"matrix": str(tmp_path / "none.npy")}))


def test_a_coefficient_that_may_diverge_is_a_warning_and_no_error():
    assert not plan(config(2, transfer={"strength": 0.5})).warnings
    (warning,) = plan(config(2, transfer={"strength": 0.6})).warnings
    assert "m_ii is 0.40" in warning
    assert "below m_ii = 1/2" in warning
    assert not plan(config(2, "adapt_then_combine")).warnings


def test_a_plan_on_fewer_actors_gives_each_what_it_had_and_takes_the_transport_for_them():
    made = plan(config(4, transfer={"transport": "auto"}))
    two = plan(config(2)).placement
    fewer = replan(made, two)
    assert fewer.placement == two
    assert fewer.transport == made.transport
    assert replan(made, replace(two, hosts=(0, 1))).transport.name == "collective"
    alone = replan(made, plan(config(1)).placement)
    assert (alone.transport.name, alone.placement.rows) == ("local", (range(4),))
    assert alone.identity == made.identity


def test_what_the_held_out_batches_and_measure_must_not_be_is_refused_before_training(monkeypatch):
    def refusal(**attributes):
        with monkeypatch.context() as patch:
            for name, value in attributes.items():
                patch.setattr(toy_problems.NoisyRegression, name, value)
            with pytest.raises(RequestError) as refused:
                plan(config(1))
        return str(refused.value)

    about = "problem toy_problems:NoisyRegression: "
    assert refusal(metrics={"accuracy": "higher", "error": "lower"}) == (
        about + "measure does not return accuracy, which metrics declares"
    )
    assert refusal(metrics={}).startswith(about + "measure returns error, which metrics does not declare")

    def loaders(sizes, split):
        """Two arrays with other lengths, and the last batch of a split with others yet."""

        def batches(self, asked):
            rows = sizes if asked == split else sizes[:1] * 3
            return [{"x": torch.ones(n, 6), "y": (torch.ones(n), torch.ones(n)), "other": torch.ones(3)} for n in rows]

        return batches

    for split in ("validation", "test"):
        assert refusal(evaluation_batches=loaders([8, 8, 4], split)).startswith(
            about + "the first dimensions of an evaluation batch differ (3, 8); define size(batch): how many examples"
        )
    monkeypatch.setattr(toy_problems.NoisyRegression, "evaluation_batches", loaders([8, 8, 8], "test"))
    assert plan(config(1)).metrics == {"error": "lower"}


@pytest.mark.parametrize("name", ["/lead", "trail/", "a//b", "a/../b", ".", "..", "price ($)", "", "x" * 201])
@pytest.mark.parametrize("what", ["objectives", "metrics"])
def test_names_that_mlflow_refuses_are_refused(name, what, monkeypatch):
    names = ("left", name) if what == "objectives" else {name: "lower"}
    monkeypatch.setattr(toy_problems.NoisyRegression, what, names)
    with pytest.raises(RequestError, match="cannot be logged"):
        plan(config(1))


def test_an_error_in_the_users_code_says_where_it_is(monkeypatch):
    def losses(self, model, batch):
        return {}["missing"]

    monkeypatch.setattr(toy_problems.NoisyRegression, "losses", losses)
    with pytest.raises(RequestError, match=r"KeyError: 'missing' \(test_plan\.py, line \d+\)"):
        plan(config(1))
