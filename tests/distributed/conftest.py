import functools

import pytest
import ray

from popmtl.config import Config
from popmtl.distributed import driver
from popmtl.distributed.plan import make_plan
from popmtl.runs.folder import RunFolder


@pytest.fixture(scope="session")
def ray_of_four():
    """One Ray for all tests: it takes seconds to start. Four slots, however many cores there are.

    It also has three GPUs, which are not there: Ray does not look.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", functools.partial(ray.init, num_gpus=3))
        with driver.cluster(None, cpus=4) as resources:
            yield resources


@pytest.fixture
def run(ray_of_four, tmp_path):
    """Runs a config, given as plain data, and returns its plan, folder and report."""
    runs = 0

    def start(data, show=lambda progress: None):
        nonlocal runs
        runs += 1
        config = Config.model_validate({"tracking": {"enabled": False}, **data})
        plan = make_plan(config, {**ray_of_four, "GPU": 0.0})
        folder = RunFolder.create(tmp_path / "runs", f"run-{runs}")
        folder.write_config(config.resolved())
        return plan, folder, driver.run(plan, folder.path, "test", show)

    return start
