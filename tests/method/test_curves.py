import math

import numpy as np
import pytest
import torch

from popmtl.method.curves import Curves, Means


def test_what_steps_tell_is_by_step_and_row():
    curves = Curves(2)
    curves.gradient_norms([3.0, 1.0])
    curves.gradient_norms([4.0, 0.0])  # of another bucket of the same step
    curves.report(0, {"entropy": torch.tensor(1.0)})
    curves.report(0, {"entropy": 3.0})  # of a second batch
    curves.count([0.1, 0.2])
    curves.report(slice(None), {"entropy": torch.tensor([5.0, 6.0])})
    curves.count([0.1, 0.2])
    taken = curves.take()
    assert taken["gradient_norm"].tolist() == [[5.0, 1.0], [0.0, 0.0]]
    assert taken["learning_rate"].tolist() == [[0.1, 0.2], [0.1, 0.2]]
    np.testing.assert_array_equal(taken["entropy"], [[2.0, math.nan], [5.0, 6.0]])
    assert curves.take() == {}


def test_means_do_not_depend_on_how_the_steps_come():
    values = np.random.default_rng(0).standard_normal((60, 3))
    values[5, 1] = math.nan
    whole, parts = Means(3), Means(3)
    whole.add([0, 1, 2], {"x": values})
    for first, last in ((0, 7), (7, 8), (8, 60)):
        parts.add([0, 1], {"x": values[first:last, :2]})
        parts.add([2], {"x": values[first:last, 2:]})
    means = whole.take()
    assert means == parts.take(), "to the last bit"
    assert means["x"] == pytest.approx(np.nanmean(values, 0).tolist())
    assert whole.take() == {}
