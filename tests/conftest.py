import logging
import os
from pathlib import Path
from uuid import uuid4

import pytest
import torch

# Models this small gain nothing from threads, and lose much where other processes use the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """This user's key is one of this session, which its processes share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: POPMTL_TEST_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POPMTL_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data: POPMTL_TEST_DATA is not set to its folder")
    return folder


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server on this machine with one bucket, `bucket`; gives what a URL of it has after the path."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="bucket")
        yield f"endpoint_override={address}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The URL of a storage on the S3 server that is this test's own."""
    return f"s3://bucket/{uuid4().hex}/runs?{s3_server}"
