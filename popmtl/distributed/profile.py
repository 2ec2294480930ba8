"""A torch profiler's trace of some steps of one actor."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from popmtl.method.mixing import Mixing
from popmtl.method.mtgd import Block, Chunk
from popmtl.runs.folder import RunFolder
from popmtl.runs.storage import said

TRACE = "profile/actor-0.json.gz"
"""In the run folder: Chrome's format, which Perfetto reads too."""

SETTLING, WARM_UP = 10, 3
"""Steps before the trace: those in which a run settles, and those in which the profiler does."""


def steps_needed(steps: int) -> int:
    """How many steps a run must take for a trace of so many."""
    return SETTLING + WARM_UP + steps


class Profile:
    """Takes the steps of a block as it would itself, and writes a trace of some of them.

    Args:
        steps: to trace.
        folder: of the run.

    Attributes:
        outcome: where the trace is, or why it is not there; None before its last step.
    """

    def __init__(self, steps: int, folder: RunFolder) -> None:
        # Not torch's public interface: a torch without it trains none the less.
        from torch._C._profiler import _ExperimentalConfig

        self.folder, self.left = folder, steps_needed(steps)
        self.outcome: str | None = None
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=SETTLING, warmup=WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._write,
            # Exchanges go on in a thread of their own.
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self.profiler.start()

    def run(self, block: Block, chunk: Chunk, mix: Mixing) -> NDArray[np.float64]:
        """Takes the steps of a chunk; see `Block.run`."""
        first = min(self.left, len(chunk))
        losses = []
        for i in range(first):
            losses.append(block.run(replace(chunk, first=chunk.first + i, factors=chunk.factors[i : i + 1]), mix))
            self.profiler.step()
        self.left -= first
        if first and not self.left:
            self.profiler.stop()
        if first < len(chunk):
            losses.append(block.run(replace(chunk, first=chunk.first + first, factors=chunk.factors[first:]), mix))
        return np.concatenate(losses)

    def _write(self, profiler: torch.profiler.profile) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="popmtl-") as folder:
                path = Path(folder) / Path(TRACE).name
                profiler.export_chrome_trace(str(path))
                self.folder.files.write(TRACE, path.read_bytes())
        except OSError as error:
            self.outcome = f"not written ({said(error)})"
        else:
            self.outcome = self.folder.files.where(TRACE)
