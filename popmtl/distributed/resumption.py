"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Callable

from popmtl.distributed.plan import RunPlan
from popmtl.errors import RequestError
from popmtl.runs.checkpoint import Whole, last_of_run
from popmtl.runs.folder import RunFolder


def find_checkpoint(
    folder: RunFolder, plan: RunPlan, complain: Callable[[str], None], *, contents: bool = True
) -> Whole | None:
    """The latest whole checkpoint; None where the run never had one.

    Args:
        folder: of the run.
        plan: to go on with.
        complain: is told of every damaged checkpoint that is passed over; none of them counts any more.
        contents: as in `whole`.

    Raises:
        RequestError: all checkpoints are damaged, naming the files; or the latest whole one is of another run than the
            plan's, naming what differs.
    """
    found = last_of_run(folder, complain, contents=contents)
    if not found:
        return None
    record, path = found.record, folder.files.where(found.name)
    before, now = record["identity"], plan.identity
    if different := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        lines = [f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in different]
        raise RequestError(f"{path} is of a run with another config; these differ:\n" + "\n".join(lines))
    rows, objectives = len(record["course"]["reseeds"]), len(record["course"]["ideal"])
    if (rows, objectives) != plan.W.shape:
        N, m = plan.W.shape
        raise RequestError(f"{path} is of {rows} subproblems and {objectives} objectives, and the run has {N} and {m}")
    trained, fine_tuned = record["course"]["step"], record["fine_tuned"]
    if trained > len(plan.factors):
        raise RequestError(f"train.steps: {path} has {trained} steps, more than {len(plan.factors)}")
    if fine_tuned is not None:
        if trained != len(plan.factors) and not record["course"].get("stopped"):
            raise RequestError(
                f"train.steps: {path} is in the Aligned-MTL stage, after {trained} steps; they cannot be "
                f"{len(plan.factors)} any more"
            )
        steps = plan.aligned.steps if plan.aligned else 0
        if fine_tuned > steps:
            raise RequestError(f"fine_tune.steps: {path} has {fine_tuned} of them, more than {steps}")
    return found
