import os
from pathlib import Path

import pytest
import torch

# Models this small gain nothing from threads, and lose much where other processes use the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: POPMTL_TEST_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POPMTL_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data: POPMTL_TEST_DATA is not set to its folder")
    return folder
