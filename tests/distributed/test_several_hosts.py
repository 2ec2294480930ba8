"""A run on several hosts: network namespaces where they may be made, and several Rays of one host everywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from popmtl.runs.folder import RunFolder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "several_hosts.py"
NODES = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
from popmtl.cli import main

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
for _ in range(2):
    cluster.add_node(num_cpus=2)
code = main(["train", sys.argv[1], "--address", cluster.address, "--run-name", "run"])
cluster.shutdown()
sys.exit(code)
"""

GROWS = """
import subprocess
import sys
import time
from pathlib import Path
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
said = Path(sys.argv[2])
command = [sys.executable, "-m", "popmtl", "train", sys.argv[1], "--address", cluster.address, "--run-name", "run"]
with said.open("w") as file:
    run = subprocess.Popen(command, stdout=file, stderr=file)
while "waiting for 3 actors of 1 CPU each; free now: 1 CPU" not in said.read_text() and run.poll() is None:
    time.sleep(0.2)
for _ in range(2):
    cluster.add_node(num_cpus=1)
code = run.wait()
cluster.shutdown()
sys.exit(code)
"""


def several_hosts(what):
    done = subprocess.run([sys.executable, str(SCRIPT), what], capture_output=True, text=True, timeout=900)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    return done


@pytest.mark.slow
def test_three_hosts_give_what_one_gives():
    done = several_hosts("front")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models and front differ: nowhere, bit for bit" in done.stdout


@pytest.mark.slow
def test_a_host_that_is_cut_off_does_not_end_the_run():
    done = several_hosts("cut")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "then on 10.77.0.1, 10.77.0.1, 10.77.0.2, 10.77.0.2" in done.stdout


@pytest.mark.endurance
def test_three_nodes_of_one_host_train_together(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"problem: vlmop2\npopulation: {{subproblems: 6}}\ntrain: {{steps: 20}}\nstorage: {tmp_path}\n"
        "resources: {max_actors: 6}\ntransfer: {transport: collective}\ntracking: {enabled: false}\n"
    )
    command = [sys.executable, "-c", NODES, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "run" / "pareto" / "models").iterdir())) == 6


@pytest.mark.slow
def test_a_cluster_that_grows_is_asked_and_awaited(tmp_path):
    config = tmp_path / "config.yaml"
    resources = "{autoscaling: true, max_actors: 3, gpus_per_actor: 0}"
    config.write_text(
        f"problem: vlmop2\npopulation: {{subproblems: 6}}\ntrain: {{steps: 20}}\nstorage: {tmp_path}\n"
        f"resources: {resources}\ntracking: {{enabled: false}}\n"
    )
    said = tmp_path / "said"
    said.touch()
    command = [sys.executable, "-c", GROWS, str(config), str(said)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, said.read_text() + done.stderr
    assert "collective: the hosts are yet to come" in said.read_text()
    kinds = {event["kind"]: event for event in RunFolder(tmp_path / "run").events()}
    assert len(kinds["ready"]["hosts"]) == 3
    # They came on one host, as Ray's addresses tell, and memory serves them better than the network.
    assert (kinds["transport"]["was"], kinds["transport"]["now"]) == ("collective", "shared_memory")
