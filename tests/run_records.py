"""Records as a run writes them, for tests that need a run's files and no run."""


def record(step, n=2, *, hypervolume=1.0, best=None, **more):
    """A checkpoint's record after so many steps of n subproblems."""
    seen = {"step": step, "hypervolume": hypervolume, "hypervolume_error": None}
    course = {
        "step": step,
        "ideal": [0.0, 0.0],
        "reference_point": [2.0, 2.0],
        "last": seen,
        "best": seen,
        "improved": hypervolume,
        "stale": 0,
        "out": [],
        "reseeds": [0] * n,
        "curves": {},
        "seconds": 1.0,
        "stopped": None,
        "stop": {"patience": None, "min_improvement": 0.0, "max_hours": None},
    }
    rest = {"fine_tuned": None, "executions": None, "untrained": None, "best": best, "identity": {}}
    return {"step": step, "course": course, **rest, **more}


def evaluation(step, stage="mtgd", hypervolume=0.5, **more):
    """A line of metrics.jsonl."""
    return {"stage": stage, "step": step, "hypervolume": hypervolume, **more}
