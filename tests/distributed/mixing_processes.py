"""Processes that tests of a transport run its ranks in: started once, and torch, which takes seconds, imported once."""

import importlib.util
import multiprocessing
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait

import numpy as np
import torch


class Processes:
    """Worker processes; rank r of a run is a function in the r-th of them that is alive. Leave with `close`."""

    def __init__(self, count):
        # Forks of a bare process that has imported torch: a fork of this one could inherit a lock that a thread holds.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch"])
        self.workers = [self.start() for _ in range(count)]

    def start(self):
        here, there = self.context.Pipe()
        process = self.context.Process(target=serve, args=(there,), daemon=True)
        process.start()
        there.close()  # the child's is then the only one, and its death the end of the pipe
        return process, here

    def run(self, function, ranks, *arguments, timeout=20.0, lost=()):
        """What `function(rank, *arguments)`, a function of any module's top level, returns on each rank.

        Ranks in `lost` need not return: they may die, and are killed once all others have returned; their result is
        None. Whatever else raises, dies or takes longer than `timeout` seconds fails the test.
        """
        self.workers += [self.start() for _ in range(ranks - len(self.workers))]
        running = {connection: rank for rank, (_, connection) in enumerate(self.workers[:ranks])}
        for connection, rank in running.items():
            connection.send((function.__module__, function.__code__.co_filename, function.__qualname__))
            connection.send((rank, *arguments))
        results, failures, dead, deadline = [None] * ranks, [], [], time.monotonic() + timeout
        while set(running.values()) - set(lost):
            ready = wait(running, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures += [f"rank {rank} had not returned after {timeout:g} s" for rank in running.values()]
                break
            for connection in ready:
                rank = running.pop(connection)
                try:
                    results[rank], failure = connection.recv()
                except EOFError:
                    dead.append(rank)
                    failure = None if rank in lost else f"rank {rank} died"
                failures += [failure] if failure else []
        self.stop([*dead, *running.values()])
        assert not failures, "\n".join(failures)
        return results

    def stop(self, ranks):
        for process, connection in [self.workers.pop(rank) for rank in sorted(ranks, reverse=True)]:
            process.kill()
            process.join()
            connection.close()

    def close(self):
        self.stop(range(len(self.workers)))


def serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            name, file, function = connection.recv()
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(module_of(name, file), function)(*arguments), None
        except Exception:  # noqa: BLE001  # the test's own process shows it
            answer = None, f"rank {arguments[0]}: {traceback.format_exc()}"
        connection.send(answer)


def product_without(A, X, gone):
    """A X without the rows of X that are gone, entry by entry: they do not move, and nobody moves towards them."""
    N = len(A)
    result = np.zeros(X.shape)
    for i in range(N):
        for j in range(N):
            if not gone[i] and not gone[j]:
                result[i] += A[i, j] * X[j]
            elif not gone[i]:
                result[i] += A[i, j] * X[i]
    return result


def module_of(name: str, file: str):
    """Pytest imports test modules by path; so must who is to know them by the same name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
