"""What a run is for: the default config learns both tasks, spreads over their trade-off, and gains by transfer."""

import numpy as np
import pytest

from popmtl.config import load_config
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.method.front import non_dominated
from popmtl.method.population import objective_matrix


def train(config, *overrides):
    """Trains a config in this process; the population and the evaluations on the test split."""
    plan = make_plan(load_config(config, overrides), [{"CPU": 1.0}])
    population = train_in_process(plan)
    return population, population.block.evaluate("test")


def accuracies(evaluations):
    return np.array([[e.metrics["accuracy_left"], e.metrics["accuracy_right"]] for e in evaluations])


def test_the_default_config_learns_a_front():
    population, test = train("configs/multidigits.yaml")
    F, accuracy = objective_matrix(test), accuracies(test)
    # 0.92 and 0.93 at the ends, 0.91 for both in the middle; single tasks alone reach 0.925 and 0.913.
    assert accuracy.max(0).min() > 0.90
    assert accuracy.mean(1).max() > 0.89
    # The weights are obeyed: the two ends are the best and the worst of each objective.
    assert non_dominated(F).sum() >= 5
    assert F[-1, 0] < F[0, 0] - 0.2
    assert F[0, 1] < F[-1, 1] - 0.2
    assert all(one.after <= one.before for one in population.fine_tuned if one.kept)
    assert sum(one.kept for one in population.fine_tuned) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 4])
def test_transfer_gains_where_the_data_is_noisy(batch):
    """At a rate that suits training without transfer; with it, higher ones are better still."""
    overrides = (f"problem.batch_size={batch}", "train.steps=600", "train.optimizer.lr=0.003", "fine_tune.steps=0")
    ends = []
    for transfer in ("transfer.strength=0.5", "transfer=none"):
        population, _ = train("configs/multidigits.yaml", *overrides, transfer)
        ends.append(population.history[-1].hypervolume)
    assert ends[0] > ends[1] + 0.3


@pytest.mark.slow
def test_multimnist_is_learned_from_real_images(shared_data):
    folder = shared_data / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}")
    _, test = train(
        "configs/multimnist.yaml",
        f"problem.folder={folder}",
        "population.subproblems=3",
        "train.steps=300",
        "train.evaluate_every=300",
        "fine_tune.steps=0",
    )
    assert accuracies(test).mean(1).max() > 0.8
