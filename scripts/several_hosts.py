"""Several hosts on one machine: network namespaces with addresses of their own, Ray in each, runs that are submitted.

    python scripts/several_hosts.py front     # the same run on three hosts and on one: the same models, bit for bit?
    python scripts/several_hosts.py cut       # one host's link goes down while it trains: the run recovers and ends
    python scripts/several_hosts.py slow      # 100 Mbit/s: bytes on the wire against the plan's, and what overlap hides
    python scripts/several_hosts.py table     # steps, exchanges and bytes of N models on 1, 2 and 3 hosts; a cost model

Needs root and iproute2, and says so. It ends what it started, and nothing else, by process id, however it is left.
Ray's token authentication is on. All hosts share this machine's processors: times tell of the network and of the order
of things, not of what three machines would take.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from trial_runs import differences, largest_difference, poll

from popmtl.config import Config
from popmtl.distributed.plan import RunPlan, make_plan
from popmtl.runs.folder import RunFolder

START_SECONDS, RUN_SECONDS, END_SECONDS = 120.0, 600.0, 20.0
LINK_BITS = 100e6
SAMPLE_SECONDS, IDLE_SECONDS = 0.2, 5.0
NS, HOSTS = (4, 8, 16, 32), (1, 2, 3)
CALIBRATION = ((32, 1), (32, 3))
"""N and hosts that the model of the time is taken from."""


class Hosts:
    """Namespaces joined by a bridge, and one Ray over all of them. The first is the head.

    Args:
        cpus: of each host, as Ray is told.
        folder: for logs, the token, and the runs.

    Raises:
        OSError: namespaces cannot be made here; says why.
    """

    def __init__(self, cpus: Sequence[int], folder: Path) -> None:
        if os.geteuid() != 0:
            raise OSError("network namespaces need root")
        if not (shutil.which("ip") and shutil.which("tc")):
            raise OSError("network namespaces need ip and tc, of iproute2")
        self.cpus, self.folder, self.work = list(cpus), folder, folder / "work"
        self.work.mkdir()
        mark = f"{os.getpid() % 10_000}{secrets.token_hex(1)}"
        self.bridge = f"pmb{mark}"
        self.spaces = [f"popmtl-{mark}-{i}" for i in range(len(cpus))]
        self.outside = [f"pmo{mark}{i}" for i in range(len(cpus))]
        self.inside = [f"pmi{mark}{i}" for i in range(len(cpus))]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(len(cpus))]
        self.processes: list[subprocess.Popen[bytes]] = []
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        # Without what belongs to a Ray that the caller may be connected to, or to its network.
        others = ("RAY_", "MLFLOW_", "GLOO_", "NCCL_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        self.environment = own | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # else it regrets that these hosts have no name
        }

    def __enter__(self) -> Hosts:
        try:
            self._connect()
            self._start_ray()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _connect(self) -> None:
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for space, outside, inside, address in zip(
                self.spaces, self.outside, self.inside, self.addresses, strict=True
            ):
                ip("netns", "add", space)
                ip("link", "add", outside, "type", "veth", "peer", "name", inside)
                ip("link", "set", inside, "netns", space)
                ip("link", "set", outside, "master", self.bridge)
                ip("link", "set", outside, "up")
                ip("-n", space, "address", "add", f"{address}/24", "dev", inside)
                for device in ("lo", inside):
                    ip("-n", space, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error

    def _start_ray(self) -> None:
        meeting = f"{self.addresses[0]}:6379"
        for i, cpus in enumerate(self.cpus):
            role = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder / 'ray'}"]
            start = ["ray", "start", *(role if i == 0 else [f"--address={meeting}"])]
            start += [f"--node-ip-address={self.addresses[i]}", f"--num-cpus={cpus}", "--block"]
            start += ["--object-store-memory=200000000", "--disable-usage-stats"]
            with (self.folder / f"host-{i}.log").open("wb") as log:
                self.processes.append(self.start(i, start, stdout=log, stderr=log))
            wait = f"""
import ray, time
deadline = time.monotonic() + {START_SECONDS}
while True:
    try:
        ray.init(address={meeting!r}, logging_level="ERROR", log_to_driver=False)
        break
    except Exception:  # whatever a Ray that is starting answers
        if time.monotonic() > deadline:
            raise
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < {i + 1}:
    assert time.monotonic() < deadline
    time.sleep(0.2)
"""
            # One after the other: they take the names of their sockets from the same folder.
            done = self.run(0, [sys.executable, "-c", wait], START_SECONDS + END_SECONDS)
            if done.returncode:
                logs = "\n".join(path.read_text() for path in sorted(self.folder.glob("host-*.log")))
                raise RuntimeError(f"Ray did not start: {done.stderr}\n{logs}")

    def _end(self) -> None:
        """Ends every process in the namespaces, then the namespaces."""
        found = []
        for space in self.spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in map(int, listed.stdout.split()):
                with suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self.processes:
            started.wait(END_SECONDS)
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        for device in [*self.outside, self.bridge]:
            subprocess.run(["ip", "link", "delete", device], capture_output=True, check=False)

    def start(self, host: int, command: Sequence[str], **more: Any) -> subprocess.Popen[Any]:
        """Starts a command on a host."""
        inside = ["ip", "netns", "exec", self.spaces[host], *command]
        return subprocess.Popen(inside, env=self.environment, start_new_session=True, **more)

    def run(self, host: int, command: Sequence[str], seconds: float, **more: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        inside = ["ip", "netns", "exec", self.spaces[host], *command]
        return subprocess.run(
            inside, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False, **more
        )

    def popmtl(self, *arguments: str, seconds: float = RUN_SECONDS) -> subprocess.CompletedProcess[str]:
        """A popmtl command on the head, in the folder with the configs."""
        return self.run(0, [sys.executable, "-m", "popmtl", *arguments], seconds, cwd=self.work)

    def train(self, config: dict[str, Any], name: str) -> RunFolder:
        """Submits a run, and waits for its end.

        Raises:
            RuntimeError: it did not end well.
        """
        done = self.popmtl("submit", self.write(config, name), "--run-name", name)
        if done.returncode:
            raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return self.folder_of(name)

    def write(self, config: dict[str, Any], name: str) -> str:
        """Writes a config to where commands are given; its name there."""
        (self.work / f"{name}.yaml").write_text(yaml.safe_dump({"storage": str(self.folder / "runs"), **config}))
        return f"{name}.yaml"

    def folder_of(self, name: str) -> RunFolder:
        """A run's folder."""
        return RunFolder(self.folder / "runs" / name)

    def cut(self, host: int) -> None:
        """Takes a host's link down."""
        ip("link", "set", self.outside[host], "down")

    def slow(self, bits: float) -> None:
        """Lets every link take so many bits a second, each way."""
        shape = f"root tbf rate {bits:.0f}bit burst 256kb latency 200ms"
        for space, outside, inside in zip(self.spaces, self.outside, self.inside, strict=True):
            subprocess.run(["tc", "qdisc", "replace", "dev", outside, *shape.split()], check=True)
            ip("netns", "exec", space, "tc", "qdisc", "replace", "dev", inside, *shape.split())

    def bytes_sent(self) -> int:
        """Bytes that hosts have sent over their links so far."""
        counters = (Path(f"/sys/class/net/{outside}/statistics/rx_bytes") for outside in self.outside)
        return sum(int(counter.read_text()) for counter in counters)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def hosts(*cpus: int) -> Iterator[Hosts]:
    """Hosts with a folder of their own. Its name is short: there are sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
    try:
        with Hosts(cpus, folder) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def config_of(N: int, steps: int, hidden: int, actors: int | None = None, **transfer: Any) -> dict[str, Any]:
    """A run of N models that read two digits; every step transfers."""
    return {
        "problem": {"name": "multidigits", "hidden": hidden},
        "population": {"subproblems": N},
        "train": {
            "steps": steps,
            "evaluate_every": steps,
            "execution": "loop",
            "optimizer": {"name": "SGD", "lr": 0.05},
        },
        "transfer": {"schedule": "constant", "transport": "collective", **transfer},
        "resources": {"max_actors": actors, "gpus_per_actor": 0},
        "tracking": {"enabled": False},
    }


def plan_of(config: dict[str, Any], cpus: Sequence[int]) -> RunPlan:
    """What the run will do on such hosts."""
    return make_plan(Config.model_validate(config), [{"CPU": float(count)} for count in cpus])


def event(run: RunFolder, kind: str) -> dict[str, Any]:
    """The last event of a kind."""
    return next(event for event in reversed(run.events()) if event["kind"] == kind)


def moment(record: dict[str, Any]) -> float:
    """When an event was."""
    return datetime.fromisoformat(record["time"]).timestamp()


class Wire:
    """Counts what goes over the links, with times."""

    def __init__(self, made: Hosts) -> None:
        self.made, self.samples = made, [(time.time(), made.bytes_sent())]
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._count)

    def __enter__(self) -> Wire:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    def _count(self) -> None:
        while not self.ends.wait(SAMPLE_SECONDS):
            self.samples.append((time.time(), self.made.bytes_sent()))

    def between(self, start: float, end: float) -> float:
        """Bytes between two moments."""
        times, counts = zip(*self.samples, strict=True)
        before, after = np.interp([start, end], times, counts)
        return float(after - before)


def front() -> bool:
    """Six models on three hosts and on one."""
    config = config_of(6, 300, 64, 6)
    with tempfile.TemporaryDirectory() as kept:
        start = time.monotonic()
        with hosts(2, 2, 2) as three:
            ready = time.monotonic()
            run = three.train(config, "front")
            print(f"three hosts: Ray in {ready - start:.0f} s, the run in {time.monotonic() - ready:.0f} s")
            where = event(run, "ready")["hosts"]
            shutil.copytree(run.path, Path(kept) / "three")
        with hosts(6) as one:
            shutil.copytree(one.train(config, "front").path, Path(kept) / "one")
        ours, reference = RunFolder(Path(kept) / "three"), RunFolder(Path(kept) / "one")
        different = [name for name in differences(ours, reference) if name != "metrics.jsonl"]
        found = largest_difference(ours, reference)
        print(f"actors on {', '.join(where)}")
        print(f"models and front differ: {different or 'nowhere, bit for bit'}; largest difference {found:.1e}")
        print(f"hypervolume {ours.front().volume:.6f} and {reference.front().volume:.6f}")
        return len(set(where)) == 3 and found <= 1e-6


def cut() -> bool:
    """A host's link goes down while it trains."""
    config = config_of(6, 3000, 64, 6) | {"checkpoint": {"every_steps": 200}}
    with hosts(2, 2, 2) as made:
        name = made.write(config, "cut")
        follower = made.start(
            0, [sys.executable, "-m", "popmtl", "submit", name, "--run-name", "cut"], cwd=made.work,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        run = made.folder_of("cut")

        def checkpointed() -> bool:
            return run.path.exists() and any(one["kind"] == "checkpoint" for one in run.events())

        if not poll(checkpointed, lambda: follower.poll() is None, RUN_SECONDS):
            print(follower.communicate(timeout=END_SECONDS)[0])
            return False
        at = time.time()
        made.cut(2)
        output = follower.communicate(timeout=RUN_SECONDS)[0]
        kinds = [one["kind"] for one in run.events()]
        again = next((moment(one) - at for one in run.events() if one["kind"] == "ready" and moment(one) > at), None)
        print(f"cut after a checkpoint; events {', '.join(kind for kind in kinds if kind != 'checkpoint')}")
        print(f"exit code {follower.returncode}; actors ready again after {again and round(again, 1)} s")
        print(f"then on {', '.join(event(run, 'ready')['hosts'])}, {event(run, 'trained')['steps']} steps")
        good = follower.returncode == 0 and "recovering" in kinds and again is not None
        if not good:
            print(output)
        else:
            print(f"hypervolume {run.front().volume:.5f}")
        return good


def slow() -> bool:
    """What goes over slow links, and what of it the passes hide."""
    cpus, hidden, steps = (2, 2, 2), 256, 60
    with hosts(*cpus) as made:
        made.slow(LINK_BITS)
        time.sleep(IDLE_SECONDS)
        rows = []
        with Wire(made) as wire:
            time.sleep(IDLE_SECONDS)
            begun = wire.samples[0][0]
            idle = wire.between(begun, begun + IDLE_SECONDS) / IDLE_SECONDS
            for batch in (16, 1024):
                for transfers in (True, False):
                    config = config_of(6, steps, hidden, 6)
                    config["problem"]["batch_size"] = batch
                    if not transfers:
                        config["transfer"] = {"strength": 0.0}
                    run = made.train(config, f"slow-{batch}-{transfers}".lower())
                    ready, trained = event(run, "ready"), event(run, "trained")
                    sent = wire.between(moment(ready), moment(trained))
                    seconds = moment(trained) - moment(ready)
                    rows.append((batch, transfers, trained["step_seconds"] / steps, sent, seconds))
        plan = plan_of(config_of(6, steps, hidden, 6), cpus)
        predicted = plan.bytes_between_hosts_per_step()
        link = 8 * predicted / len(cpus) / LINK_BITS
        print(
            f"{plan.parameters} parameters a model; the plan: {plan.bytes_sent_per_step()} bytes a step, "
            f"{predicted} of them between hosts; idle, the links carry {idle / 1e3:.1f} kB/s"
        )
        good = True
        for (batch, _, with_it, sent, seconds), (_, _, without, *_) in zip(rows[::2], rows[1::2], strict=True):
            measured = (sent - idle * seconds) / steps
            off = measured / predicted - 1
            good &= abs(off) <= 0.05
            print(
                f"batch {batch}: {measured:.0f} bytes a step on the wire ({off:+.1%}); {1e3 * with_it:.0f} ms a step, "
                f"without transfer {1e3 * without:.0f} ms, the links alone {1e3 * link:.0f} ms: "
                f"{with_it / max(without, link):.2f} times the longer of both"
            )
        return good


def table() -> bool:
    """Steps of N models on several hosts; a model of their time from two of the figures."""
    hidden, steps = 128, 200
    found: dict[tuple[int, int], dict[str, float]] = {}
    for count in HOSTS:
        with hosts(*[2] * count) as made, Wire(made) as wire:
            for N in NS:
                run = made.train(config_of(N, steps, hidden), f"with-{N}")
                ready, trained = event(run, "ready"), event(run, "trained")
                config = config_of(N, steps, hidden) | {"transfer": {"strength": 0.0}}
                alone = event(made.train(config, f"without-{N}"), "trained")
                plan = plan_of(config_of(N, steps, hidden), [2] * count)
                found[N, count] = {
                    "step": trained["step_seconds"] / steps,
                    "waits": trained["exchange_seconds"] / steps,
                    "alone": alone["step_seconds"] / steps,
                    "actors": len(plan.placement.rows),
                    "rows": max(map(len, plan.placement.rows)),
                    "bytes": plan.bytes_sent_per_step(),
                    "between": plan.bytes_between_hosts_per_step(),
                    "wire": wire.between(moment(ready), moment(trained)) / steps,
                }
                print(json.dumps({"N": N, "hosts": count, **found[N, count]}), flush=True)
    cores = os.cpu_count() or 1
    # The processors share the rows' passes; actors beyond one a processor wait for their turn in each exchange.
    design = np.array([[N / cores, max(0, one["actors"] - cores)] for (N, _), one in found.items()])
    taken = np.array([one["step"] for one in found.values()])
    chosen = [list(found).index(key) for key in CALIBRATION]
    weights = np.linalg.solve(design[chosen], taken[chosen])
    predicted = design @ weights
    print(
        f"model, from N and hosts {CALIBRATION}: {1e3 * weights[0]:.2f} ms a row and processor, {1e3 * weights[1]:.2f} "
        "ms for each actor beyond the processors"
    )
    times, sizes = ["step", "waits for exchange", "without transfer"], ["sent", "between hosts", "on the wire"]
    names = ["N", "hosts", "actors", *(f"{name} ms" for name in times), *(f"{name} kB" for name in sizes)]
    print("| " + " | ".join([*names, "model ms", "error"]) + " |")
    print("|---" * (len(names) + 2) + "|")
    for (N, count), one, guess in zip(found, found.values(), predicted, strict=True):
        times = " | ".join(f"{1e3 * one[key]:.2f}" for key in ("step", "waits", "alone"))
        sizes = f"{one['bytes'] / 1e3:.0f} | {one['between'] / 1e3:.0f} | {one['wire'] / 1e3:.0f}"
        error = f"{1e3 * guess:.2f} | {guess / one['step'] - 1:+.0%}"
        print(f"| {N} | {count} | {one['actors']:.0f} | {times} | {sizes} | {error} |")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["front", "cut", "slow", "table"])
    what = {"front": front, "cut": cut, "slow": slow, "table": table}[parser.parse_args().what]
    try:
        return 0 if what() else 1
    except OSError as error:
        print(f"cannot be done here: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
