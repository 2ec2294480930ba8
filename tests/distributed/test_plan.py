"""What a plan decides and states, each figure worked out by hand."""

import numpy as np
import pytest
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.plan import make_plan
from popmtl.errors import RequestError

# NoisyRegression: trunk 6·5 + 5 and BatchNorm 5 + 5 transfer; two heads of 5 + 1 do not.
TRUNK, HEADS = 45, 12


def plan(data, cpus=4.0):
    return make_plan(Config.model_validate(data), {"CPU": cpus})


def test_sizes_of_rows_and_of_what_moves():
    made = plan(config(2))
    assert (made.parameters, made.transferring) == (TRUNK + HEADS, TRUNK)
    assert made.transport == "coordinator"
    assert made.bytes_moved_per_step() == 2 * 4 * TRUNK * 8  # to the coordinator and back, four rows of float64
    # rows, gradients, two moments of Adam, two for mixing; blocks of two rows
    assert made.memory_per_actor() == 2 * 6 * (TRUNK + HEADS) * 8


def test_mixed_moments_move_too():
    data = config(2, "adapt_then_combine", transfer={"mix_moments": True})
    assert plan(data).bytes_moved_per_step() == 3 * plan(config(2)).bytes_moved_per_step()


def test_task_gradients_take_memory_in_the_exact_variant_only():
    sgd = {"name": "SGD", "lr": 0.1}
    base = plan(config(4, optimizer=sgd)).memory_per_actor()
    row = (TRUNK + HEADS) * 8
    assert base == 4 * row
    fine = {"steps": 3}
    exact = plan(config(4, optimizer=sgd, fine_tune=fine))
    assert exact.memory_per_actor() == base + 2 * row
    assert exact.shared == TRUNK
    assert plan(config(4, optimizer=sgd, fine_tune={**fine, "variant": "ub"})).memory_per_actor() == base


def test_nothing_moves_without_transfer_or_on_one_actor():
    assert plan(config(2, transfer={"strength": 0.0})).bytes_moved_per_step() == 0
    assert plan(config(1)).bytes_moved_per_step() == 0
    assert plan(config(1)).transport == "local"


def test_the_local_transport_puts_every_row_on_one_actor():
    data = config(None, transfer={"transport": "local"})
    assert [list(r) for r in plan(data).placement.rows] == [[0, 1, 2, 3]]
    data["resources"] = {"max_actors": 2}
    with pytest.raises(RequestError, match=r"transfer\.transport: local needs one actor"):
        plan(data)


def test_the_coordinator_transport_is_taken_where_it_is_asked_for():
    made = plan(config(1, transfer={"transport": "coordinator"}))
    assert (len(made.placement.rows), made.transport) == (1, "coordinator")
    assert made.bytes_moved_per_step() > 0


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
