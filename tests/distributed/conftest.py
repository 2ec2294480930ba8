import ctypes
import functools
import os

import pytest
import ray
from running import run_in

from popmtl.distributed import driver


@pytest.fixture(scope="session")
def ray_of_four():
    """One Ray for all tests: it takes seconds to start. Four slots, however many cores there are.

    It also has three GPUs, which are not there: Ray does not look. It reports figures as often as it ever does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setattr(ray, "init", functools.partial(ray.init, num_gpus=3))
        with driver.cluster(None, cpus=4) as resources:
            yield resources


@pytest.fixture
def run(ray_of_four, tmp_path):
    """Runs a config, given as plain data, and returns its plan, folder and report."""
    runs = 0

    def start(data, show=lambda progress: None, **options):
        nonlocal runs
        runs += 1
        return run_in(tmp_path / "runs", f"run-{runs}", ray_of_four, data, show, **options)

    return start


@pytest.fixture
def resume(ray_of_four, tmp_path):
    """Goes on with the run of a name, which `run` started."""
    return lambda name, data: run_in(tmp_path / "runs", name, ray_of_four, data, resumes=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=8m"):
        pytest.skip(f"no mounting here: {os.strerror(ctypes.get_errno())}")
    yield path
    libc.umount2(os.fsencode(path), 2)
