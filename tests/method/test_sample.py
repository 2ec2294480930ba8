"""A sample of a series is bounded, even, and the same whenever it is saved and read."""

import json

import numpy as np
import pytest

from popmtl.method.sample import MOST, Sample


@pytest.mark.parametrize("count", [0, 1, MOST, MOST + 1, 2 * MOST + 1, 20 * MOST + 7])
def test_every_nth_value_is_kept(count):
    sample = Sample()
    for number in range(count):
        sample.add([number, -number])
        if number % 777 == 0:
            sample = Sample(**json.loads(json.dumps(sample.state())))
    assert sample.seen == count
    assert sample.values == [[number, -number] for number in range(0, count, sample.every)]
    assert len(sample.values) <= MOST
    assert count <= MOST or len(sample.values) > MOST / 2 - 1
    assert sample.every == 1 or count > MOST


def test_the_median_is_that_of_the_series_or_near_it():
    values = np.random.default_rng(0).normal(size=(20 * MOST, 3))
    sample = Sample()
    for value in values[:MOST].tolist():
        sample.add(value)
    assert sample.medians() == np.median(values[:MOST], axis=0).tolist()
    for value in values[MOST:].tolist():
        sample.add(value)
    assert np.abs(sample.medians() - np.median(values, axis=0)).max() < 0.1
    assert Sample().medians() is None
