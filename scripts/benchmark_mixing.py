"""How long the exchange of a step takes by each transport, and how much of it training hides.

    python scripts/benchmark_mixing.py [--columns 100000 1000000 10000000] [--slow-link]

Every worker is a process with one thread; with GPUs, the rows are there and `collective` is NCCL's, which needs two.
The bound of a product is the bytes that it must read and write, over the bandwidth of a plain copy of a matrix of the
same size, the best of a few in the same run, by one thread and by one for each core. As bytes count: every row read
once and every displacement written once, and every number that an actor sends to another, read once and written once.
`--slow-link` joins two network namespaces by a link of 1 Gbit/s; it needs root and iproute2.

What else runs on the machine counts: without a core to spare, an exchange is not hidden, only its waiting is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from popmtl.distributed.mixing import collective, shared_memory
from popmtl.distributed.mixing.collective import Collective, Group, find_routes
from popmtl.distributed.mixing.coordinator import CoordinatorMixing, Exchange
from popmtl.distributed.mixing.overlap import Background, SideStream
from popmtl.distributed.mixing.shared_memory import SharedMemory
from popmtl.method.decomposition import weight_vectors
from popmtl.method.mixing import LocalProduct, Mixing, Product, deferred
from popmtl.method.mtgd import Block, Chunk, Recipe
from popmtl.method.transfer import kernel_coefficients
from popmtl.problems import Problem

N, HOST, TIMEOUT, ITEMSIZE = 8, "127.0.0.1", 120.0, 4
ROUNDS = 5  # of products
TURNS, STEPS = 10, 3  # of training: rounds, and steps in each
GPUS = torch.cuda.device_count()
LINK_BITS = 1e9


@dataclass(frozen=True)
class Case:
    """One path of the N rows, and over how many actors."""

    path: str
    actors: int
    sparse: bool = False
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """As the table has it."""
        return self.path + " sparse" * self.sparse + " bfloat16" * self.bfloat16

    def coefficients(self) -> Tensor:
        """A = M − I."""
        M = kernel_coefficients(weight_vectors(N, 2), "nearest" if self.sparse else "gaussian", 0.5, nearest=2)
        return torch.tensor(M - np.eye(N), dtype=torch.float32)

    def bytes(self, columns: int) -> float:
        """Read and written by all together; see the head of this file."""
        sent = 0
        if self.path == "collective":
            routes = find_routes(self.coefficients().numpy() != 0, [N // self.actors] * self.actors)
            sent = routes.numbers_sent(columns)
        elif self.path == "all-gather":
            sent = N * (self.actors - 1) * columns
        elif self.path == "coordinator":
            sent = 2 * N * columns
        return 2.0 * N * columns * ITEMSIZE + 2.0 * sent * (2 if self.bfloat16 else ITEMSIZE)


REFERENCE = Case("GEMM", 1)
CPU_CASES = [
    *(Case("shared_memory", actors) for actors in (2, 4, 8)),
    *(Case("collective", actors) for actors in (2, 8)),
    Case("all-gather", 8),
    Case("collective", 8, bfloat16=True),
    Case("collective", 2, sparse=True),
]
COORDINATOR = Case("coordinator", 8)


def cases() -> list[Case]:
    """What processes can do here, the coordinator apart."""
    if not GPUS:
        return CPU_CASES
    actors = next((count for count in (8, 4, 2) if count <= GPUS), 1)
    paths = [Case("collective", actors), Case("all-gather", actors), Case("collective", actors, bfloat16=True)]
    return paths if actors > 1 else []


# What runs in the workers


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank % GPUS) if GPUS else torch.device("cpu")


def timed(call: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Seconds of a call, by rounds of so many; one more comes first, since its memory is new."""
    times = []
    for count in [1] + [steps] * ROUNDS:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / count)
    return times[1:]


def copy_bandwidth(numbers: int) -> float:
    """Bytes a second that a plain copy reads and writes: by one thread or by all cores, or by all GPUs."""
    source = torch.ones(numbers, device=device_of(0))
    target, best = torch.zeros_like(source), 0.0
    for threads in (1, cores()):
        torch.set_num_threads(threads)
        seconds = min(timed(lambda: target.copy_(source), max(3, int(3e8 / numbers)), source.device))
        best = max(best, 2 * numbers * ITEMSIZE / seconds)
    torch.set_num_threads(1)
    return best * max(1, GPUS)


def open_meeting(_: int, path: str) -> str:
    """On rank 0, who keeps the store."""
    if path == "shared_memory":
        return shared_memory.meeting_point()
    global store
    store, address = collective.meeting_point(HOST)
    return address


class AllGather:
    """The product by way of every row on every actor, for comparison."""

    def __init__(self, rows: slice, columns: int, device: torch.device) -> None:
        self.rows = rows
        self.everyones = torch.empty(N, columns, device=device)
        self.result = torch.empty(rows.stop - rows.start, columns, device=device)

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """See `popmtl.method.mixing.Product`."""
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its new name
        gather(self.everyones.view(-1), block.view(-1))
        return torch.mm(A[self.rows], self.everyones, out=self.result)


def product_times(rank: int, case: Case, columns: int, steps: int, meeting: str) -> list[float]:
    """One rank's part in the products of a case; seconds of one, by rounds."""
    k, device = N // case.actors, device_of(rank)
    sizes, own, A = [k] * case.actors, slice(rank * k, (rank + 1) * k), case.coefficients().to(device)
    block = torch.empty(0)
    with ExitStack() as ending:
        product: Product = LocalProduct()
        if case.path == "shared_memory":
            product = SharedMemory(rank, sizes, columns, columns, torch.float32, TIMEOUT, meeting)
            ending.callback(product.close)
            block = product.rows
        elif case.actors > 1:
            group = Group(meeting if rank else store, 0, rank, case.actors, HOST, device, TIMEOUT)
            ending.callback(group.close)
            wire = torch.bfloat16 if case.bfloat16 else None
            product = AllGather(own, columns, device)
            if case.path == "collective":
                product = Collective(group, find_routes(A.cpu().numpy() != 0, sizes), columns, torch.float32, wire)
        if not block.numel():
            block = torch.empty(k, columns, device=device)
        column = 1 + torch.arange(N, dtype=torch.float32, device=device)
        block.copy_(column[own, None].expand_as(block))
        times = timed(lambda: product(block, A), steps, device)
        check(product(block, A), (A @ column)[own])
    return times


def check(result: Tensor, expected: Tensor) -> None:
    """Every entry; bfloat16 keeps three digits."""
    error = float((result - expected[:, None]).abs_().max())
    assert error < 0.02, f"the product is wrong by {error}"


class Hub:
    """What of the coordinator the exchange needs; an asynchronous Ray actor."""

    def __init__(self) -> None:
        self.mixing = Exchange(COORDINATOR.actors)

    async def exchange(self, number: int, rank: int, rows: Any, A: Any, timeout: float) -> Any:
        """See `Exchange.mix`."""
        return await self.mixing.mix(number, rank, rows, A, timeout)


class Rank:
    """An actor with one row, on the CPU."""

    def __init__(self, rank: int, hub: Any) -> None:
        torch.set_num_threads(1)
        self.rank, self.mixing = rank, CoordinatorMixing(hub, rank, TIMEOUT)

    def times(self, columns: int, steps: int) -> list[float]:
        """One rank's part in the products; seconds of one, by rounds."""
        A, column = COORDINATOR.coefficients(), 1.0 + torch.arange(N)
        block = column[self.rank].repeat(1, columns)
        times = timed(lambda: self.mixing(block, A)(), steps, block.device)
        check(self.mixing(block, A)(), (A @ column)[self.rank, None])
        return times


# The products


class Workers:
    """As many processes as the most actors that any case has, kept from case to case."""

    def __init__(self) -> None:
        # Forks of a bare process that has imported what takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["popmtl.distributed.subproblem", "popmtl.method.decomposition"])
        start = partial(ProcessPoolExecutor, 1, context, torch.set_num_threads, (1,))
        self.pools = [start() for _ in range(max(case.actors for case in [*cases(), REFERENCE, *CPU_CASES]))]

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns on each rank."""
        calls = [pool.submit(function, rank, *arguments) for rank, pool in enumerate(self.pools[:ranks])]
        return [call.result() for call in calls]

    def times(self, case: Case, columns: int, steps: int) -> list[float]:
        """Seconds of a product, by rounds: of the slowest rank."""
        meeting = self.run(1, open_meeting, case.path)[0] if case.actors > 1 else ""
        return slowest(self.run(case.actors, product_times, case, columns, steps, meeting))

    def close(self) -> None:
        """Ends the processes."""
        for pool in self.pools:
            pool.shutdown()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def slowest(times: Sequence[Sequence[float]]) -> list[float]:
    """The seconds of each round, from those of each rank."""
    return [max(of_ranks) for of_ranks in zip(*times, strict=True)]


class Products:
    """Measures case after case, each between two measurements of the reference."""

    def __init__(self, workers: Workers, columns: Sequence[int]) -> None:
        self.workers, self.columns, self.rows = workers, columns, []
        self.bandwidths = {D: copy_bandwidth(N * D) for D in columns}

    def measure(self, case: Case, times: Callable[[int, int], list[float]], before: list[float], D: int) -> list[float]:
        """Adds the row of a case; returns the reference's times after it."""
        taken = times(D, max(2, min(20, int(2e7 / D))))
        after = self.reference(D)
        reference = median(before + after)
        self.add(case, D, taken, median(taken) / reference)
        return after

    def reference(self, D: int) -> list[float]:
        """Seconds of the product in one process, by rounds."""
        return self.workers.times(REFERENCE, D, max(2, int(2e7 / D)))

    def add(self, case: Case, D: int, taken: Sequence[float], of_reference: float) -> None:
        """Adds a row."""
        ms, bound = 1e3 * median(taken), 1e3 * case.bytes(D) / self.bandwidths[D]
        layout = f"{case.actors}x{N // case.actors}"
        row = {"path": case.name, "layout": layout, "columns": D, "ms": ms, "bound_ms": bound, "of_bound": ms / bound}
        self.rows.append({**row, "of_gemm": of_reference, "rounds_ms": [1e3 * seconds for seconds in taken]})

    def by_processes(self) -> None:
        """Every path but the coordinator's."""
        for D in self.columns:
            before = self.reference(D)
            self.add(REFERENCE, D, before, 1.0)
            for case in cases():
                before = self.measure(case, partial(self.workers.times, case), before, D)

    def by_ray(self) -> None:
        """The coordinator's path."""
        import ray

        from popmtl.distributed import driver

        with driver.cluster(None, cores()):
            small, ranks = {"num_cpus": 0}, range(COORDINATOR.actors)
            hub = ray.remote(Hub).options(**small).remote()
            actors = [ray.remote(Rank).options(**small).remote(rank, hub) for rank in ranks]

            def times(D: int, steps: int) -> list[float]:
                return slowest(ray.get([actor.times.remote(D, steps) for actor in actors]))

            for D in self.columns:
                self.measure(COORDINATOR, times, self.reference(D), D)

    def figure(self, name: str, D: int, layout: str = "8x1") -> float | None:
        """The ms of a row, if it is there."""
        wanted = (name, D, layout)
        return next((row["ms"] for row in self.rows if (row["path"], row["columns"], row["layout"]) == wanted), None)

    def verdicts(self) -> Iterator[str]:
        """The ratios that count, and what they should be."""
        D = max(self.columns)
        shared = [row for row in self.rows if row["path"] == "shared_memory" and row["columns"] == D]
        if shared:
            ratios = ", ".join(f"{row['of_gemm']:.2f} ({row['layout']})" for row in shared)
            yield f"shared_memory / GEMM at D={D:.0e}: {ratios}; target ≤ 1.5"
        for D, (name, target) in itertools.product(self.columns, [("all-gather", "≥ 4"), ("coordinator", "> 1")]):
            slow, fast = self.figure(name, D), self.figure("collective", D)
            if slow and fast and (D >= 1e6 or name == "coordinator"):
                yield f"{name} / collective, 8x1, at D={D:.0e}: {slow / fast:.2f}; target {target}"


# How much of an exchange training hides


class Tower(Problem):
    """Eight square layers, and a batch that is always the same: nothing but forward and backward passes."""

    objectives = ("up", "down")
    LAYERS = 8

    def __init__(self, width: int, batch_size: int) -> None:
        self.width, self.batch_size = width, batch_size

    def model(self) -> nn.Module:
        """A plain MLP."""
        layers = ([nn.Linear(self.width, self.width), nn.ReLU()] for _ in range(self.LAYERS))
        return nn.Sequential(*itertools.chain.from_iterable(layers))

    def batches(self, seed: int) -> Iterator[Tensor]:
        """One batch, over and over."""
        return itertools.repeat(torch.randn(self.batch_size, self.width, generator=torch.Generator().manual_seed(seed)))

    def evaluation_batches(self, split: str) -> list[Tensor]:
        """One batch."""
        return [next(self.batches(0))]

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Two squared distances."""
        y = model(batch)
        return torch.stack([(y - 1).square().mean(), (y + 1).square().mean()])


WIDTH = 354  # about 1e6 parameters
Variants = dict[str, Callable[[], float]]
"""By name, what takes a few steps and returns the seconds of one."""


class Link:
    """A product of all rows, after the time that a link would take for the columns."""

    def __init__(self, seconds: float, width: int, device: torch.device) -> None:
        self.seconds, self.results, self.used = seconds / width, torch.zeros(2, width, device=device), 0
        self.cycles = 0.0
        if device.type == "cuda":  # in a second
            self.cycles = 1e8 / min(timed(lambda: torch.cuda._sleep(10**8), 1, device))

    def __call__(self, block: Tensor, A: Tensor) -> Tensor:
        """See `popmtl.method.mixing.Product`."""
        columns = block.shape[1]
        if self.cycles:
            torch.cuda._sleep(int(self.seconds * columns * self.cycles))
        else:
            time.sleep(self.seconds * columns)
        self.used = self.used % self.results.shape[1] + columns
        return torch.mm(A, block, out=self.results[:, self.used - columns : self.used])


def tower_block(rows: Sequence[int], batch_size: int, device: str = "cpu", **more: Any) -> Block:
    recipe = Recipe(partial(torch.optim.Adam, lr=1e-6), order=more.pop("order", "consensus"))
    return Block(Tower(WIDTH, batch_size), rows, weight_vectors(2, 2), recipe, device, **more)


def training(block: Block, mix: Mixing | None = None, transfers: bool = True) -> Callable[[], float]:
    """Takes steps of a block with a transport."""
    chunk = Chunk(0, np.full(STEPS, float(transfers)), np.full((2, 2), 0.5), np.zeros(2))

    def take() -> float:
        start = time.perf_counter()
        block.run(chunk, mix)  # ends with the losses on the CPU
        return (time.perf_counter() - start) / STEPS

    return take


def alternate(variants: Variants, before: Callable[[], Any] = lambda: None) -> dict[str, list[float]]:
    """Seconds of a step of each variant, by short rounds in which they take turns; one more comes first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + TURNS):
        for name, take in variants.items():
            before()
            times[name].append(take())
    return {name: taken[1:] for name, taken in times.items()}


def gradient_seconds(block: Block) -> float:
    """Of the forward and backward passes of a step; with them begins what can hide an exchange."""
    z = torch.zeros(2, device=block.rows.device)
    return min(timed(lambda: block.differentiate(0, z, lambda _: None), 3, block.rows.device))


def overlap() -> list[dict]:
    """Steps of two rows with a link that is slow: its time hidden, and not."""
    device, batch_size = device_of(0), 8192 if GPUS else 256
    build = partial(tower_block, [0, 1], batch_size, str(device))
    beside: Callable[[Product], Mixing] = partial(SideStream, device=device) if GPUS else Background
    rows = []
    # Buckets hide behind the backward pass of the last row, which takes a third of the time.
    for order, share in (("consensus", 0.8), ("adapt_then_combine", 0.25)):
        block = hidden = build(order=order)
        name, seconds = order, share * gradient_seconds(block)
        if order == "adapt_then_combine":
            hidden = build(order=order, bucket_bytes=WIDTH * WIDTH * ITEMSIZE)  # one for each layer
            name += f", {len(hidden.buckets)} buckets"
        link = Link(seconds, block.layout.size, device)
        variants = {
            "without transfer": training(block, transfers=False),
            "overlapped": training(hidden, beside(link)),
            "not overlapped": training(block, deferred(link)),
        }
        rows += overlap_rows(name, alternate(variants), seconds)
    return rows


def overlap_rows(order: str, times: dict[str, list[float]], link: float) -> list[dict]:
    """The bound: the longer of training and link where they overlap, else both. Ratios are medians over turns."""
    without = times["without transfer"]
    bounds = {
        "without transfer": without,
        "overlapped": [max(seconds, link) for seconds in without],
        "not overlapped": [seconds + link for seconds in without],
        "exchange alone": [link] * len(without),
    }
    return [
        {
            "order": order,
            "variant": name,
            "link_ms": 1e3 * link,
            "ms": 1e3 * median(taken),
            "bound_ms": 1e3 * median(bounds[name]),
            "of_bound": median_ratio(taken, bounds[name]),
            "of_without": median_ratio(taken, without),
            "rounds_ms": [1e3 * seconds for seconds in taken],
        }
        for name, taken in times.items()
    ]


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def overlap_verdicts(rows: list[dict], where: str) -> Iterator[str]:
    for row in rows:
        if row["variant"] == "overlapped":
            yield f"{where}, {row['order']}: overlapped / without transfer: {row['of_without']:.3f}; target ≤ 1.10"
        elif row["variant"] == "not overlapped":
            yield f"{where}, {row['order']}: not overlapped / sum of step and link: {row['of_bound']:.3f}; about 1"


# The same between two hosts, or what looks like them


def train_on_link(rank: int, host: str, batch_size: int, meeting: str) -> None:
    """A process of one row. Rank 0 prints where to meet; both print their times."""
    torch.set_num_threads(1)
    place: Any = meeting
    if rank == 0:
        place, address = collective.meeting_point(host)
        print(address, flush=True)
    block = tower_block([rank], batch_size)
    group = Group(place, 0, rank, 2, host, torch.device("cpu"), TIMEOUT)
    product = Collective(group, find_routes(np.ones((2, 2), dtype=bool), [1, 1]), block.layout.size, torch.float32)
    A = torch.full((2, 2), 0.5)
    variants = {
        "exchange alone": lambda: median(timed(lambda: product(block.rows, A), 1, block.rows.device)),
        "without transfer": training(block, transfers=False),
        "overlapped": training(block, Background(product)),
        "not overlapped": training(block, deferred(product)),
    }
    times = alternate(variants, before=dist.barrier)
    print(json.dumps(times), flush=True)
    group.close()


def slow_link() -> list[dict]:
    """Steps of two rows, one in each of two network namespaces.

    Raises:
        OSError: it cannot be done here; says why.
    """
    if os.geteuid() != 0:
        raise OSError("it needs root")
    if not (shutil.which("ip") and shutil.which("tc")):
        raise OSError("it needs ip and tc, of iproute2")
    block = tower_block([0], 128)
    link = block.layout.size * ITEMSIZE * 8 / LINK_BITS
    batch_size = int(128 * 4 * link / gradient_seconds(block))  # the passes take longer than any exchange
    spaces = [f"popmtl-{os.getpid()}-{rank}" for rank in range(2)]
    ends = [f"pop{os.getpid()}{side}" for side in "ab"]
    hosts, processes = ["10.77.0.1", "10.77.0.2"], []
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", ends[0], "netns", spaces[0], "type", "veth", "peer", "name", ends[1], "netns", spaces[1])
        for space, end, host in zip(spaces, ends, hosts, strict=True):
            ip("-n", space, "address", "add", f"{host}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", space, "link", "set", device, "up")
            shape = f"qdisc add dev {end} root tbf rate {LINK_BITS:.0f}bit burst 256kb latency 100ms"
            ip("netns", "exec", space, "tc", *shape.split())
        meeting = ""
        for rank, (space, host) in enumerate(zip(spaces, hosts, strict=True)):
            call = f"import benchmark_mixing as b; b.train_on_link({rank}, {host!r}, {batch_size}, {meeting!r})"
            command = ["ip", "netns", "exec", space, sys.executable, "-c", call]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else it regrets that these hosts have no name
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
            if rank == 0:
                meeting = processes[0].stdout.readline().strip()
        of_ranks = [json.loads(process.communicate(timeout=TIMEOUT)[0]) for process in processes]
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
    times = {name: slowest([of_rank[name] for of_rank in of_ranks]) for name in of_ranks[0]}
    return overlap_rows("consensus", times, link)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


# What is shown


def show(console: Console, title: str, columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)


def show_products(console: Console, rows: list[dict], bandwidths: dict[int, float]) -> None:
    copies = ", ".join(f"{bandwidth / 1e9:.1f} GB/s at D={D:.0e}" for D, bandwidth in bandwidths.items())
    columns = {
        "path": lambda row: row["path"],
        "actors x rows": lambda row: row["layout"],
        "D": lambda row: f"{row['columns']:.0e}",
        "ms": lambda row: f"{row['ms']:.2f}",
        "bound ms": lambda row: f"{row['bound_ms']:.2f}",
        "ms / bound": lambda row: f"{row['of_bound']:.2f}",
        "ms / GEMM": lambda row: f"{row['of_gemm']:.2f}",
    }
    show(console, f"one product of {N} rows, float32\nbound: bytes read and written, at {copies}", columns, rows)


def show_overlap(console: Console, title: str, rows: list[dict]) -> None:
    columns = {
        "order": lambda row: row["order"],
        "variant": lambda row: row["variant"],
        "link ms": lambda row: f"{row['link_ms']:.1f}",
        "ms a step": lambda row: f"{row['ms']:.1f}",
        "bound ms": lambda row: f"{row['bound_ms']:.1f}",
        "ms / bound": lambda row: f"{row['of_bound']:.3f}",
        "ms / without": lambda row: f"{row['of_without']:.3f}",
    }
    show(console, f"{title}\nbound: the longer of step and link where they overlap, else both", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[10**5, 10**6, 10**7], metavar="D")
    parser.add_argument("--slow-link", action="store_true", help="needs root and iproute2")
    parser.add_argument("--json", type=Path, default=Path("benchmark_mixing.json"), metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, console = time.monotonic(), Console()
    if not console.is_terminal:
        console = Console(width=140)
    workers = Workers()
    try:
        products = Products(workers, options.columns)
        products.by_processes()
        products.by_ray()
    finally:
        workers.close()
    products.rows.sort(key=lambda row: row["columns"])
    show_products(console, products.rows, products.bandwidths)
    verdicts, overlapped, linked = list(products.verdicts()), overlap(), []
    show_overlap(console, f"two rows of {Tower.LAYERS} layers, a transport that takes as long as a link", overlapped)
    verdicts += overlap_verdicts(overlapped, "overlap")
    if options.slow_link:
        try:
            linked = slow_link()
            show_overlap(console, "two actors of one row on a link of 1 Gbit/s", linked)
            verdicts += overlap_verdicts(linked, "1 Gbit/s")
        except OSError as error:
            verdicts.append(f"1 Gbit/s: skipped: {error}")
    for verdict in verdicts:
        console.print(verdict, highlight=False, soft_wrap=True)
    took = time.monotonic() - start
    console.print(f"{took:.0f} s on {cores()} cores and {GPUS} GPUs; written to {options.json}", highlight=False)
    results = {
        "cores": cores(),
        "gpus": GPUS,
        "seconds": took,
        "bytes_per_second": products.bandwidths,
        "products": products.rows,
        "overlap": overlapped,
        "slow_link": linked,
        "verdicts": verdicts,
    }
    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
