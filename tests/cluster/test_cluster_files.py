"""The files in `cluster/`: what can be said of them without a cloud, a Kubernetes, a Docker or a Slurm.

They are held against Ray's schema and the options of `ray start`, the fields of Kubernetes and of KubeRay, the pins in
constraints.txt, and against what must not be: a cluster that runs what it is sent without asking for the token.
"""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import click
import jsonschema
import psutil
import pytest
import yaml

import popmtl
from popmtl.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws", "gcp", "onprem")
RAYCLUSTER, RAYJOB, STORAGE = (f"kuberay/{name}.yaml" for name in ("raycluster", "rayjob", "storage"))
TOKEN = "/home/ray/.ray/auth_token"


def text(name: str) -> str:
    return (CLUSTER / name).read_text()


def data(name: str) -> dict:
    return yaml.safe_load(text(name))


@cache
def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


@cache
def ray_command(name: str) -> click.Command:
    """A command of Ray's own command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its import of Ray Serve
        from ray.scripts.scripts import cli

    return cli.commands[name]


def parsed_by_ray(command: str) -> dict:
    """The options of the `ray …` in a shell command; click exits at one that this Ray does not have."""
    words = shlex.split(command)
    words = words[words.index("ray") + 1 :]
    words = words[: words.index("&&")] if "&&" in words else words
    return ray_command(words[0]).make_context(words[0], words[1:]).params


# ---- ray up


def ray_starts(config: dict) -> dict[str, list[str]]:
    both = {who: config[f"{who}_start_ray_commands"] for who in ("head", "worker")}
    return {who: [command for command in commands if "ray start" in command] for who, commands in both.items()}


def complaints(config: dict) -> list[str]:
    """What would make a cluster of Ray's launcher unsafe, or slow without a word."""
    found = []
    for who, commands in ray_starts(config).items():
        if len(commands) != 1:
            found.append(f"{who}: {len(commands)} commands start Ray")
        for command in commands:
            variables = command.partition("ray start")[0].split()
            if "RAY_AUTH_MODE=token" not in variables:
                found.append(f"{who}: Ray asks for no token")
            if "RAY_worker_niceness=0" not in variables:
                found.append(f"{who}: workers run at Ray's low priority")
            options = parsed_by_ray(command)
            if options["head"] and options["dashboard_host"] != "127.0.0.1":
                found.append(f"the dashboard listens at {options['dashboard_host']}")
    if config.get("file_mounts", {}).get(TOKEN) != "~/.ray/auth_token":
        found.append("the token is not mounted")
    run_options = config["docker"]["run_options"]
    if "--env RAY_AUTH_MODE=token" not in run_options:
        found.append("shells in the container do not use the token")
    if not any(option.startswith("--shm-size=") for option in run_options):
        found.append("/dev/shm has Docker's 64 MB")
    if re.search(r"AUTH_TOKEN=|(?i:secret|password)\S*=\S", yaml.safe_dump(config)):
        found.append("a secret is written down")
    if "0.0.0.0" in yaml.safe_dump(config):
        found.append("something listens at all addresses")
    return found


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_cluster_files(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = data(f"{name}.yaml")
    config = prepare_config(copy.deepcopy(given))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="dokcer"):
        validate_config({**config, "dokcer": {}})
    # Ray fills in whole keys only: its own commands would ask for no token and let the dashboard listen everywhere.
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts", "docker"):
        assert config[key] == given[key]
    for commands in ray_starts(given).values():
        for command in commands:
            parsed_by_ray(command)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_cluster_files_are_safe(name):
    assert complaints(data(f"{name}.yaml")) == []


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("RAY_AUTH_MODE=token RAY_worker", "RAY_worker", "asks for no token"),
        ("RAY_AUTH_MODE=token RAY_worker", "RAY_AUTH_MODE=disabled RAY_worker", "asks for no token"),
        ("RAY_AUTH_MODE=token RAY_worker", "RAY_AUTH_TOKEN=abc RAY_AUTH_MODE=token RAY_worker", "secret"),
        ("RAY_worker_niceness=0 ", "", "low priority"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "the dashboard listens at 0.0.0.0"),
        ("--host 127.0.0.1 --port 5000", "--host 0.0.0.0 --port 5000", "something listens at all addresses"),
        (f"{TOKEN}: ", "/home/ray/token: ", "the token is not mounted"),
        ("--shm-size=16g", "--rm", "64 MB"),
        ("--env RAY_AUTH_MODE=token", "--env A=b", "shells"),
    ],
)
def test_an_unsafe_cluster_file_would_be_noticed(name, before, after, complaint):
    unsafe = yaml.safe_load(text(f"{name}.yaml").replace(before, after))
    assert any(complaint in found for found in complaints(unsafe))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_gpus_are_counted_as_the_comment_says(name):
    config = data(f"{name}.yaml")
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    (options,) = (parsed_by_ray(command) for command in ray_starts(config)["head"])
    assert options["num_cpus"] == head["resources"]["CPU"] == 0
    workers, each = config["max_workers"], gpu["resources"]["GPU"]
    assert gpu["max_workers"] == workers
    # An actor takes a CPU and a GPU.
    assert gpu["resources"]["CPU"] >= each
    assert f"here at most {workers} × {each} = {workers * each}" in text(f"{name}.yaml")


@pytest.mark.slow
def test_ray_starts_machines_on_a_simulated_aws(tmp_path, monkeypatch):
    """Ray fills in network, keys and roles, and starts the head and a worker; EC2 and IAM are moto's."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray leaves the private key in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setattr(aws.time, "sleep", lambda seconds: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2, iam = boto3.client("ec2", "us-west-2"), boto3.client("iam", "us-west-2")
        profile = iam.create_instance_profile(InstanceProfileName="popmtl-worker")["InstanceProfile"]["Arn"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        given = yaml.safe_load(text("aws.yaml").replace("YOUR_AMI", image).replace("YOUR_WORKER_PROFILE_ARN", profile))
        counted = given["available_node_types"]["gpu"].pop("resources")
        given["available_node_types"]["gpu"]["resources"] = {}
        config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(given))
        # What the file says of the machine is what EC2 says of it.
        found = config["available_node_types"]["gpu"]["resources"]
        assert {kind: found[kind] for kind in ("CPU", "GPU")} == counted
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], "popmtl")
        for kind in ("head", "gpu"):
            node = copy.deepcopy(config["available_node_types"][kind]["node_config"])
            if kind == "head":
                node |= config["head_node"]
            provider.create_node(node, {"ray-node-type": kind, "ray-node-name": kind}, 1)
        reservations = ec2.describe_instances()["Reservations"]
        profiles = [
            (instance["InstanceType"], instance["IamInstanceProfile"]["Arn"].rpartition("/")[2])
            for reservation in reservations
            for instance in reservation["Instances"]
        ]
        assert sorted(profiles) == [("g6.12xlarge", "popmtl-worker"), ("m6i.2xlarge", "ray-autoscaler-v1")]


# ---- Kubernetes

QUANTITIES = {"additionalProperties": {"type": "string"}}
STRINGS = {"type": "object", **QUANTITIES}
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["spec"]}  # `unknown_fields` looks into it
RAYCLUSTER_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "mode": {"enum": ["disabled", "token"]},
                "secretName": {"type": "string"},
                "enableK8sTokenAuth": {"type": "boolean"},
            },
        },
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "version": {"enum": ["v1", "v2"]},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template"],
            "properties": {
                "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                "enableIngress": {"type": "boolean"},
                "rayStartParams": STRINGS,
                "template": POD,
            },
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "numOfHosts": COUNT,
                    "idleTimeoutSeconds": COUNT,
                    "rayStartParams": STRINGS,
                    "template": POD,
                },
            },
        },
    },
}
RAYJOB_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "runtimeEnvYAML": {"type": "string"},
        "jobId": {"type": "string"},
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": COUNT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterConfig": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"backoffLimit": COUNT},
        },
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "suspend": {"type": "boolean"},
        "rayClusterSpec": RAYCLUSTER_SPEC,
    },
}
SPECS = {"RayCluster": RAYCLUSTER_SPEC, "RayJob": RAYJOB_SPEC}


def unknown_fields(value: object, kind: str, path: str = "") -> list[str]:
    """The fields of a Kubernetes object that its API does not have, or that are of another type.

    The official client knows every field and its type; its own checks look at neither when it is given plain data.
    """
    from kubernetes.client import models

    if listed := re.fullmatch(r"List\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [problem for i, item in enumerate(value) for problem in unknown_fields(item, listed[1], f"{path}[{i}]")]
    if mapped := re.fullmatch(r"Dict\[str, (.+)\]", kind):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no mapping"]
        return [problem for key in value for problem in unknown_fields(value[key], mapped[1], f"{path}.{key}")]
    if kind in ("str", "int", "float", "bool"):
        return [] if type(value).__name__ == kind else [f"{path}: {value!r} is no {kind}"]
    if kind == "object":
        return []
    model = getattr(models, kind)
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no {kind}"]
    names = {field: attribute for attribute, field in model.attribute_map.items()}
    problems = [f"{path}.{key}: no such field of {kind}" for key in value if key not in names]
    for key in names.keys() & value.keys():
        problems += unknown_fields(value[key], model.openapi_types[names[key]], f"{path}.{key}")
    return problems


def cluster_spec(name: str) -> dict:
    spec = data(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_templates(spec: dict) -> list[dict]:
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def kubernetes_problems(document: dict) -> list[str]:
    """What KubeRay or Kubernetes would refuse, or drop."""
    spec = document["spec"]
    problems = [error.message for error in jsonschema.Draft7Validator(SPECS[document["kind"]]).iter_errors(spec)]
    problems += unknown_fields(document["metadata"], "V1ObjectMeta", "metadata")
    for template in pod_templates(spec.get("rayClusterSpec", spec)):
        problems += unknown_fields(template, "V1PodTemplateSpec", "template")
    return problems


@pytest.mark.parametrize("name", [RAYCLUSTER, RAYJOB])
def test_kuberay_takes_the_manifests(name):
    """The manifests have no field that KubeRay or Kubernetes does not know, and values of the right types.

    The pods are held against the models of Kubernetes' own Python client. For KubeRay's own fields no schema can be
    installed: no package on PyPI or npm that was found has its CRD. The schemas above are therefore written by hand
    from the fields as KubeRay 1.7 declares them (ray-operator/apis/ray/v1/*_types.go, from which the CRD is made), and
    only as far as they are used here. What the CRD says besides, such as its rules in CEL, is not checked.
    """
    document = data(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert kubernetes_problems(document) == []


@pytest.mark.parametrize("name", [RAYCLUSTER, RAYJOB])
@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("authOptions:", "authOption:", "'authOption' was unexpected"),
        ("mode: token", "mode: tokens", "'tokens' is not one of"),
        ('num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
        ("volumeMounts:", "volumesMounts:", "no such field of V1Container"),
        ("claimName: popmtl-shared", "claim: popmtl-shared", "no such field of V1PersistentVolumeClaimVolumeSource"),
        ("containerPort: 8265", "containerPort: '8265'", "is no int"),
        ("maxReplicas:", "maxReplica:", "'maxReplica' was unexpected"),
    ],
)
def test_a_wrong_manifest_would_be_noticed(name, before, after, problem):
    wrong = yaml.safe_load(text(name).replace(before, after))
    assert any(problem in found for found in kubernetes_problems(wrong))


@pytest.mark.parametrize("name", [RAYCLUSTER, RAYJOB])
def test_the_manifests_are_safe_and_share_their_storage(name):
    spec = cluster_spec(name)
    # The dashboard must listen at the pod's address here: so the token, and no way in from outside.
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    assert "runtimeEnvYAML" not in data(name)["spec"]  # secrets would be shown there
    # Ray's start command is made of these.
    parameters = [f"--{key}={value}" for key, value in spec["headGroupSpec"]["rayStartParams"].items()]
    options = ray_command("start").make_context("start", ["--head", *parameters]).params
    assert options["num_cpus"] == 0
    claim = yaml.safe_load(text(STORAGE))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert unknown_fields(claim, "V1PersistentVolumeClaim") == []
    for template in pod_templates(spec):
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in template["spec"]["volumes"]
        }
        assert set(volumes.values()) == {claim["metadata"]["name"]}
        ray = template["spec"]["containers"][0]
        assert {variable["name"]: variable["value"] for variable in ray["env"]}["RAY_worker_niceness"] == "0"
        mounts = {mount["mountPath"] for c in template["spec"]["containers"] for mount in c["volumeMounts"]}
        assert mounts == {"/mnt/shared"}
    for group in spec["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    if name == RAYCLUSTER:
        mlflow = spec["headGroupSpec"]["template"]["spec"]["containers"][1]
        assert "--host 127.0.0.1" in mlflow["args"][0]


# ---- versions


def test_the_image_has_the_pinned_versions():
    lines = [line for line in text("Dockerfile").splitlines() if line and not line.startswith("#")]
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text("Dockerfile"), re.MULTILINE))
    (base,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    for key, value in arguments.items():
        base = base.replace(f"${{{key}}}", value)
    assert base == f"rayproject/ray:{pinned('ray')}-py311-gpu"
    assert not [line for line in lines if line.startswith("USER")]  # the base image's own, which is not root
    sources = re.findall(r"^COPY --chown=ray:users (.+) \S+$", text("Dockerfile"), re.MULTILINE)
    assert all((ROOT / source).exists() for several in sources for source in several.split())
    assert "--constraint /home/ray/src/constraints.txt" in text("Dockerfile")
    assert re.search(r"^ENV RAY_AUTH_MODE=token\b", text("Dockerfile"), re.MULTILINE)


def test_every_file_names_the_one_image():
    image = f"YOUR_REGISTRY/popmtl:{popmtl.__version__}-ray{pinned('ray')}-py311-gpu"
    for name in (*(f"{name}.yaml" for name in LAUNCHER), RAYCLUSTER, RAYJOB, "Dockerfile", "README.md"):
        named = re.findall(r"\S*popmtl:\S+", text(name))
        assert named, name
        assert set(named) == {image}, name
    for name in (RAYCLUSTER, RAYJOB):
        assert str(cluster_spec(name)["rayVersion"]) == pinned("ray")


# ---- Slurm

ARGUMENTS = ["configs/multidigits.yaml", "--storage", "/shared/runs", "--run-name", "first"]


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh with stand-ins for Slurm that execute steps here; programs in `bin` go before all others."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name: str, body: str) -> None:
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)

    program("scontrol", '[ "$1 $2" = "show hostnames" ] && tr , "\\n" <<<"$3"')
    # A step is the command, as often as it has tasks; a signal to it goes to them.
    program(
        "srun",
        """
        echo "$*" >>"$SRUN_LOG"
        tasks=1
        while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#*=}; shift; done
        pids=()
        for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
        trap 'kill "${pids[@]}" 2>/dev/null' TERM
        for pid in "${pids[@]}"; do while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done; done
        """,
    )
    home = tmp_path / "home"
    home.mkdir()
    job = 10000 + os.getpid() % 90000
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "POPMTL_"))}
    environment = {
        **inherited,
        "HOME": str(home),
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_CPUS_PER_TASK": "1",
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "POPMTL_START_SECONDS": "120",
    }

    started = []

    def start(nodes: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        command = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "SLURM_JOB_NODELIST": nodes, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    start.program, start.home, start.job, start.folder = program, home, job, tmp_path
    yield start
    for process in started:
        if process.poll() is None:  # a test that failed
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def stand_ins(slurm) -> None:
    """In place of Ray and Python: they write down what they were called with, and listen as a head does."""
    slurm.program(
        "ray",
        f"""
        echo "$*" >>ray.log
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >>modes.log
        echo "$RAY_AUTH_MODE $RAY_worker_niceness" >>environment.log
        [[ $* == *--head* ]] || exec sleep 60
        exec {sys.executable} -c "if True:
            import socket, time
            server = socket.create_server(('127.0.0.1', $(sed 's/.*--port=\\([0-9]*\\).*/\\1/' <<<"$*")))
            time.sleep(60)"
        """,
    )
    slurm.program(
        "python",
        f"""
        case "$*" in
            *get_node_ip_address*) echo 127.0.0.1 ;;
            *secrets*) exec {sys.executable} "$@" ;;
            "- "*) cat >/dev/null; echo "$*" >>waited.log
                until [ "$(cat environment.log | wc -l)" -ge "$3" ]; do sleep 0.05; done; exit ${{WAIT_CODE:-0}} ;;
            *popmtl*) trap 'echo told >>run.log; kill %1; exit 130' TERM; echo "$*" >>run.log
                sleep "${{RUN_SECONDS:-0}}" & wait; exit ${{RUN_CODE:-0}} ;;
        esac
        """,
    )


def read(slurm, name: str) -> list[str]:
    file = slurm.folder / name
    return file.read_text().splitlines() if file.exists() else []


def left_of(group: int) -> list[str]:
    """The processes of a group that have not ended within five seconds; what is dead waits for its parent only."""
    deadline = time.monotonic() + 5
    while True:
        there = []
        for process in psutil.process_iter(["status", "cmdline"]):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                    there.append(" ".join(process.info["cmdline"] or []))
        if not there or time.monotonic() > deadline:
            return there
        time.sleep(0.1)


@pytest.mark.parametrize("nodes", ["a", "a,b,c"])
def test_slurm_starts_every_node_runs_and_leaves_nothing(slurm, nodes):
    stand_ins(slurm)
    running = slurm(nodes, *ARGUMENTS, RUN_CODE="1")
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 1, output  # the run's own
    head, *workers = read(slurm, "ray.log")
    options = parsed_by_ray(f"ray {head}")
    assert options["head"]
    assert options["block"]
    assert options["include_dashboard"] is False
    assert options["num_cpus"] == 1
    address = f"127.0.0.1:{options['port']}"
    assert len(workers) == nodes.count(",")
    for worker in workers:
        assert parsed_by_ray(f"ray {worker}")["address"] == address
    steps = read(slurm, "srun.log")
    assert "--nodelist=a " in steps[0]
    assert [step for step in steps[1:] if "--nodes=2 --ntasks=2 --nodelist=b,c " in step] == steps[1:]
    assert read(slurm, "waited.log") == [f"- {address} {nodes.count(',') + 1} 120"]
    assert read(slurm, "run.log") == [f"-m popmtl train {' '.join(ARGUMENTS)} --address {address}"]
    # The token: for nobody else, and gone.
    assert set(read(slurm, "modes.log")) == {"600"}
    assert set(read(slurm, "environment.log")) == {"token 0"}
    assert stat.S_IMODE((slurm.home / ".popmtl").stat().st_mode) == 0o700
    assert list((slurm.home / ".popmtl").iterdir()) == []
    assert not re.search(r"[0-9a-f]{64}", output + "".join(steps))
    assert left_of(running.pid) == []


def test_slurm_gives_up_where_nodes_are_missing_or_ray_does_not_start(slurm):
    stand_ins(slurm)
    running = slurm("a,b", *ARGUMENTS, WAIT_CODE="1")
    running.communicate(timeout=30)
    assert running.returncode == 1
    assert read(slurm, "run.log") == []
    assert left_of(running.pid) == []
    slurm.program("ray", "exit 1")
    running = slurm("a", *ARGUMENTS)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "Ray did not start on a" in output
    assert list((slurm.home / ".popmtl").iterdir()) == []


def test_slurm_tells_the_run_when_the_time_is_up(slurm):
    stand_ins(slurm)
    running = slurm("a", *ARGUMENTS, RUN_SECONDS="60")
    while not read(slurm, "run.log"):
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    running.communicate(timeout=30)
    assert read(slurm, "run.log")[1:] == ["told"]
    assert running.returncode == 143
    assert left_of(running.pid) == []


@pytest.mark.slow
def test_slurm_trains_on_two_nodes(slurm):
    """With Ray and PopMTL themselves; the two nodes are two of Ray's on this machine."""
    arguments = [str(ROOT / "configs/zdt1.yaml"), "train.steps=20", "train.evaluate_every=20"]
    arguments += ["--storage", str(slurm.folder / "runs"), "--run-name", "first"]
    running = slurm("a,b", *arguments)
    output, _ = running.communicate(timeout=240)
    assert running.returncode == 0, output
    assert "Ray on 2 nodes" in output
    front = json.loads((slurm.folder / "runs" / "first" / "pareto" / "front.json").read_text())
    assert len(front["members"]) == 10
    assert list((slurm.home / ".popmtl").iterdir()) == []
    assert left_of(running.pid) == []
    # Ray's processes have groups of their own.
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in commands if f"/tmp/ray-{slurm.job}/" in command] == []


def test_slurm_script_is_sound():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, str(CLUSTER / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    commands = [line for line in text("slurm.sh").splitlines() if not line.lstrip().startswith("#")]
    assert "ray stop" not in "\n".join(commands)


def test_slurm_refuses_to_be_run_by_hand(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    command = ["bash", str(CLUSTER / "slurm.sh"), "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


@pytest.mark.slow
def test_mlflow_takes_the_commands_that_start_it():
    """Slow for MLflow's import alone."""
    from mlflow.cli import server

    commands = [command for name in LAUNCHER for command in data(f"{name}.yaml")["head_start_ray_commands"]]
    commands += [
        container["args"][0] for container in pod_templates(cluster_spec(RAYCLUSTER))[0]["spec"]["containers"][1:]
    ]
    commands += [line for line in shell_commands(text("README.md")) if line.startswith("mlflow server")]
    commands = [command for command in commands if "mlflow server" in command]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(re.split(r" > ", command.partition("mlflow server ")[2])[0])
        options = server.make_context("server", words).params
        assert (options["host"], options["port"]) == ("127.0.0.1", 5000)


# ---- README


def shell_commands(readme: str) -> list[str]:
    """The commands of its blocks of shell, lines that go on joined, and of its prose, in backticks."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", readme, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
    inline = [" ".join(command.split()) for command in re.findall(r"`([^`]+)`", prose)]
    return [line.strip() for line in lines] + inline


def popmtl_problem(command: str) -> str | None:
    """Why PopMTL's parser would refuse a command; None also for a subcommand that it does not have yet."""
    parser = _parser()
    (action,) = [action for action in parser._actions if hasattr(action, "choices") and action.choices]
    words = shlex.split(command, comments=True)[1:]
    if not words or words[0] not in action.choices:
        return None
    try:
        options, rest = parser.parse_known_args(words)
    except SystemExit:
        return f"refused: {command}"
    if any(word.startswith("-") or not hasattr(options, "overrides") for word in rest):
        return f"{rest} is not known: {command}"
    return None


def test_commands_of_the_readme_are_those_of_popmtl():
    commands = [command for command in shell_commands(text("README.md")) if command.startswith("popmtl ")]
    commands += [data(RAYJOB)["spec"]["entrypoint"].removeprefix("python -m ")]
    commands += [f"popmtl train {' '.join(ARGUMENTS)} --address 127.0.0.1:20000"]
    assert len(commands) > 10
    known = {"submit", "status", "stop", "train", "front", "pick", "ui"}
    assert {shlex.split(command)[1] for command in commands} <= known
    assert [problem for command in commands if (problem := popmtl_problem(command))] == []
    assert popmtl_problem("popmtl front runs/first --jsno")
    assert popmtl_problem("popmtl front")


def test_commands_of_the_readme_are_those_of_ray():
    commands = [command for command in shell_commands(text("README.md")) if re.match(r"ray [a-z]", command)]
    checked = 0
    for command in commands:
        words = shlex.split(command.partition(">")[0], comments=True)
        if "cluster/" in command or words[1] == "get-auth-token":  # the others are names, in a sentence
            ray_command(words[1]).make_context(words[1], words[2:])
            checked += 1
        else:
            ray_command(words[1])
    assert checked >= 10


def test_what_the_readme_names_exists():
    readme = text("README.md")
    named = set(re.findall(r"\b((?:cluster|configs|scripts)/[\w./-]*\w)", readme))
    named -= {"cluster/grafana.json"}  # is made elsewhere
    assert len(named) >= 9
    assert [name for name in named if not (ROOT / name).exists()] == []
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", readme))
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", readme, re.M)}
    assert anchors
    assert anchors <= headings
    for name in re.findall(r"configs/\S+\.yaml", text(RAYJOB)):
        assert (ROOT / name).exists()


def test_the_readme_says_how_to_fill_in_every_blank():
    blanks = set()
    for file in (*CLUSTER.glob("*.yaml"), *CLUSTER.glob("kuberay/*.yaml")):
        lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
        blanks |= set(re.findall(r"\bYOUR_[A-Z_0-9]+", "\n".join(lines)))
    # Hosts and users of one's own explain themselves, where they stand.
    blanks -= {"YOUR_HEAD", "YOUR_WORKER_1", "YOUR_WORKER_2", "YOUR_USER"}
    assert blanks
    assert [blank for blank in blanks if blank not in text("README.md")] == []
