"""A whole run for a test, on the Ray that is connected."""

from popmtl.config import Config
from popmtl.distributed import driver
from popmtl.distributed.plan import make_plan
from popmtl.runs.folder import RunFolder


def run_in(storage, name, resources, data, show=lambda progress: None, *, resumes=False, profile=None):
    """Runs a config, given as plain data, in a new folder, or goes on with it; its plan, folder and report."""
    config = Config.model_validate({"tracking": {"enabled": False}, **data})
    plan = make_plan(config, [{**node, "GPU": 0.0} for node in resources])
    folder = RunFolder(storage / name) if resumes else RunFolder.create(storage, name)
    folder.write_config(plan.config.resolved())
    return plan, folder, driver.run(plan, folder.path, "test", show, resumes=resumes, profile=profile)
