"""A local run listens on the loopback address only: Ray, the exchange of every transport, and what else it starts."""

import ipaddress
import socket

import psutil
import pytest
import ray
from toy_problems import config

UNHURRIED = {"name": "toy_problems:TakesItsTime", "after": 20, "seconds": 0.02}


def listening():
    """Where this process and all below it listen, or take datagrams: (name of the process, address) each."""
    me, found = psutil.Process(), []
    for process in [me, *me.children(recursive=True)]:
        try:
            name, connections = process.name(), process.net_connections("inet")
        except psutil.Error:  # it has just ended
            continue
        waiting = [
            c for c in connections if c.status == psutil.CONN_LISTEN or (c.type == socket.SOCK_DGRAM and c.laddr)
        ]
        found += [(name, ipaddress.ip_address(c.laddr.ip)) for c in waiting]
    return found


def outside(found):
    """Those that another machine reaches."""
    own = [(name, getattr(address, "ipv4_mapped", None) or address) for name, address in found]
    return [f"{name} at {address}" for name, address in own if not address.is_loopback]


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_socket_at_every_address_is_seen(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family):
        assert [one for one in outside(listening()) if one.endswith(f"at {address}")]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["collective", "shared_memory", "coordinator"])
def test_a_local_run_listens_on_loopback_only(run, transport):
    seen = []

    def show(progress):
        if progress.stage == "training":
            seen.append(listening())

    train = {"steps": 120, "evaluate_every": 60}
    run(config(2, problem=UNHURRIED, train=train, transfer={"transport": transport}), show)
    assert seen, "the run was over before it was seen to train"
    names = {name for name, _ in seen[-1]}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::Coord") for name in names)
    assert [one for found in seen for one in outside(found)] == []


def test_ray_knows_the_node_by_the_loopback_address(ray_of_four):
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
