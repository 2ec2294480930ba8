"""Whatever happens to a file of a checkpoint, a run goes on right, or says what is wrong. Without Ray."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from toy_problems import config

from popmtl.config import Config
from popmtl.distributed.plan import make_plan, train_in_process
from popmtl.distributed.resumption import find_checkpoint
from popmtl.distributed.subproblem import Resumption, SubproblemActor
from popmtl.errors import RequestError, RunError
from popmtl.method.course import Course
from popmtl.method.population import objective_matrix
from popmtl.runs.checkpoint import (
    checkpoint_name,
    checkpoints,
    commit,
    read_tensors,
    subproblem_file,
    whole,
    write_tensors,
)
from popmtl.runs.folder import RunFolder
from popmtl.runs.results import load_model

STEPS, FINE_TUNE = 30, 10
FILES = ["manifest.json", "course.json", *map(subproblem_file, range(4))]


def plan_of(**more):
    data = config(1, train={"steps": STEPS, "evaluate_every": 10, "dtype": "float32", "execution": "loop"})
    data |= {"transfer": {"transport": "local", "schedule": "constant"}, "fine_tune": {"steps": FINE_TUNE}}
    data |= {"tracking": {"enabled": False}}
    return make_plan(Config.model_validate(data | more), [{"CPU": 1.0}])


def train(plan, folder, found=None, *, until=None):
    """What the coordinator does, with one actor in this process: a checkpoint every 10 steps of MTGD, and at half of
    the fine-tuning."""
    course = Course(plan.W, plan.M, plan.factors, 10, plan.ideal_point, plan.reference_point)
    actor, resumption, done = SubproblemActor("run", 0, range(4)), None, 0
    if found:
        name, record, files = found
        course.restore(record["course"])
        resumption = Resumption(name, files, record["step"], record["fine_tuned"], course.ideal)
        done = record["fine_tuned"] or 0
    actor.prove_storage(folder, "token")
    actor.setup(plan, None, ["127.0.0.1"], None, resumption, ["loop"], 0)

    def checkpoint(fine_tuned):
        step = course.step + (fine_tuned or 0)
        name = checkpoint_name(step)
        actor.checkpoint(name)
        record = {"step": step, "fine_tuned": fine_tuned, "executions": ["loop"], "course": course.state()}
        record |= {"untrained": {}, "best": None, "identity": plan.identity}
        commit(folder, name, actor.files_written(), record)
        folder.append_event("checkpoint", step=step, checkpoint=name)
        return step == until

    if not course.last:
        course.observe(objective_matrix(actor.evaluate("validation")[0]))
    while chunk := course.next_chunk(10):
        actor.run_steps(chunk)
        if course.advance(chunk):
            course.observe(objective_matrix(actor.evaluate("validation")[0]))
        if checkpoint(None):
            return None
    if not (found and found[1]["fine_tuned"]):
        actor.start_fine_tuning(course.ideal)
    while done < FINE_TUNE:
        actor.fine_tune_steps(STEPS + done, 5)
        done += 5
        if checkpoint(done):
            return None
    actor.finish_fine_tuning()
    return [actor.state(i) for i in range(4)]


@pytest.fixture(scope="module")
def plan():
    return plan_of()


@pytest.fixture(scope="module")
def broken_off(plan, tmp_path_factory):
    """The end of the run that nothing disturbs, and folders of runs that ended at a step."""
    storage = tmp_path_factory.mktemp("runs")
    end, folders = train(plan, RunFolder.create(storage, "straight")), {}
    for step in (20, STEPS + 5):
        folders[step] = RunFolder.create(storage, f"until-{step}")
        assert train(plan, folders[step], until=step) is None
    return end, folders


@pytest.fixture
def ended(broken_off, tmp_path):
    """The end of the undisturbed run, and a copy of the folder of one that ended at a step."""

    def copy(step):
        end, folders = broken_off
        shutil.copytree(folders[step].path, tmp_path / "run")
        return end, RunFolder(tmp_path / "run")

    return copy


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARMS = [remove, empty, cut, flip]


def assert_ends_equal(plan, folder, found, end):
    for ours, theirs in zip(train(plan, folder, found), end, strict=True):
        assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("step", [20, STEPS + 5])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_equal(plan, ended, step, name, harm):
    end, folder = ended(step)
    last, before = checkpoints(folder)[:2]
    harm(folder.path / last / name)
    complaints = []
    found = find_checkpoint(folder, plan, complaints.append)
    assert found[0] == before
    if (name, harm) != ("manifest.json", remove):  # without it, it never was one
        assert len(complaints) == 1
        assert f"{last}/{name}" in complaints[0] or name == "manifest.json"
    assert_ends_equal(plan, folder, found, end)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_with_every_checkpoint_damaged_the_files_are_named_and_nothing_begins_again(plan, ended, name, harm):
    _, folder = ended(20)
    damaged = [folder.path / checkpoint / name for checkpoint in checkpoints(folder)]
    for file in damaged:
        harm(file)
    with pytest.raises(RequestError, match="no checkpoint is whole") as refusal:
        find_checkpoint(folder, plan, lambda what: None)
    for file in damaged:
        assert str(file if name != "manifest.json" else file.parent) in str(refusal.value)


def test_a_run_that_had_checkpoints_and_has_none_does_not_begin_again(plan, ended):
    _, folder = ended(20)
    shutil.rmtree(folder.path / "checkpoints")
    with pytest.raises(RequestError, match="holds none of those that were written"):
        find_checkpoint(folder, plan, pytest.fail)


def test_a_run_that_had_none_begins_again(plan, tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    folder.append_event("started")
    write_tensors(folder, f"{checkpoint_name(10)}/{subproblem_file(0)}", {"row": torch.zeros(1)}, {})  # begun
    assert find_checkpoint(folder, plan, pytest.fail) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 in the checkpoint, 4 now"),
        ({"population": {"subproblems": 4, "min_weight": 0.02}}, "weight vectors"),
        ({"transfer": {"transport": "local", "schedule": "constant", "strength": 0.3}}, "transfer coefficients"),
        ({"problem": {"name": "toy_problems:ReadsLate"}}, "problem.name"),
        ({"fine_tune": {"steps": FINE_TUNE, "optimizer": {"name": "SGD"}}}, "fine_tune.optimizer.name"),
    ],
)
def test_another_config_is_refused_and_what_differs_named(ended, change, named):
    _, folder = ended(20)
    with pytest.raises(RequestError, match="these differ") as refusal:
        find_checkpoint(folder, plan_of(**change), pytest.fail)
    assert named in str(refusal.value)


def test_coefficients_whose_file_has_changed_are_refused(tmp_path, plan):
    matrix = tmp_path / "M.csv"

    def with_matrix(own):
        rows = [[own if i == j else (1 - own) / 3 for j in range(4)] for i in range(4)]
        matrix.write_text("\n".join(",".join(map(str, row)) for row in rows))
        return plan_of(transfer={"transport": "local", "matrix": str(matrix)})

    first, folder = with_matrix(0.7), RunFolder.create(tmp_path, "run")
    train(first, folder, until=10)
    assert find_checkpoint(folder, with_matrix(0.7), pytest.fail)
    with pytest.raises(RequestError, match="transfer coefficients"):
        find_checkpoint(folder, with_matrix(0.6), pytest.fail)


def test_steps_may_change_as_long_as_none_of_them_is_done(ended):
    def of(**steps):
        return plan_of(train={**plan_of().config.resolved()["train"], "steps": steps["train"]},
                       fine_tune={"steps": steps["fine_tune"]})  # fmt: skip

    _, folder = ended(20)
    assert find_checkpoint(folder, of(train=40, fine_tune=0), pytest.fail)
    with pytest.raises(RequestError, match=r"train.steps: .* has 20 steps, more than 10"):
        find_checkpoint(folder, of(train=10, fine_tune=0), pytest.fail)


def test_steps_of_a_stage_that_is_done_cannot_change(ended):
    _, folder = ended(STEPS + 5)
    longer = {**plan_of().config.resolved()["train"], "steps": 40}
    with pytest.raises(RequestError, match="is in the Aligned-MTL stage, after 30 steps"):
        find_checkpoint(folder, plan_of(train=longer), pytest.fail)
    with pytest.raises(RequestError, match=r"fine_tune.steps: .* has 5 of them, more than 3"):
        find_checkpoint(folder, plan_of(fine_tune={"steps": 3}), pytest.fail)
    assert find_checkpoint(folder, plan_of(fine_tune={"steps": 20}), pytest.fail)


@pytest.mark.parametrize("content", [{"version": 1, "step": 20}, {"some": "thing"}, ["a list"], "text"])
def test_an_older_format_or_a_foreign_file_is_named(plan, ended, content):
    """Whole by its manifest, and yet nothing that this version wrote."""
    _, folder = ended(20)
    for name in checkpoints(folder):
        path = folder.path / name
        commit(folder, name, whole(folder, name)[0], {})
        written = json.dumps(content).encode()
        (path / "course.json").write_bytes(written)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][-1] |= {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match=r"course.json is (damaged|of version 1)"):
        find_checkpoint(folder, plan, lambda what: None)


def forge(folder, name, subproblem, change):
    """Has a checkpoint hold another file of a subproblem, by a manifest that is right for it."""
    files, record = whole(folder, name)
    record.pop("version")
    tensors, numbers = read_tensors(folder, name, files[subproblem])
    tensors, numbers = change(dict(tensors), numbers)
    files[subproblem] = write_tensors(folder, f"{name}/{subproblem_file(subproblem)}", tensors, numbers)
    commit(folder, name, files, record)


FORGERIES = {
    r"row, of \[3\] torch.float32, is not": lambda t, n: (t | {"row": torch.zeros(3)}, n),
    r"row, of .* torch.float64, is not": lambda t, n: (t | {"row": t["row"].double()}, n),
    r"sneaked/in, of .* is not": lambda t, n: (t | {"sneaked/in": torch.zeros(1)}, n),
    r"there is no row": lambda t, n: ({k: v for k, v in t.items() if k != "row"}, n),
    r"KeyError: 'optimizer": lambda t, n: ({k: v for k, v in t.items() if not k.startswith("optimizer")}, n),
    r"out: input should be a valid boolean, not 1": lambda t, n: (t, n | {"out": 1}),
    r"stream: field required": lambda t, n: (t, {k: v for k, v in n.items() if k != "stream"}),
    r"optimizer: input should be a valid dict": lambda t, n: (t, n | {"optimizer": []}),
    r"buffers/none is not that of this model": lambda t, n: (t, n | {"buffers": ["buffers/none"]}),
}


@pytest.mark.parametrize("why", FORGERIES)
@pytest.mark.parametrize("step", [20, STEPS + 5])
def test_a_checkpoint_of_another_model_is_refused_and_its_file_named(plan, ended, step, why):
    _, folder = ended(step)
    found = find_checkpoint(folder, plan, pytest.fail)
    forge(folder, found[0], 2, FORGERIES[why])
    found = find_checkpoint(folder, plan, pytest.fail)  # its manifest is right
    with pytest.raises(RunError, match=r"step-000000\d\d.*: these rows cannot go on from it: .*" + why) as refusal:
        train(plan, folder, found)
    assert "\n" not in str(refusal.value)


def test_what_was_passed_over_is_not_judged_again(plan, ended):
    _, folder = ended(20)
    last, before = checkpoints(folder)[:2]
    original = (folder.path / last / "manifest.json").read_bytes()
    (folder.path / last / "manifest.json").write_bytes(b"[]")
    complaints = []
    assert find_checkpoint(folder, plan, complaints.append)[0] == before
    assert len(complaints) == 1
    (folder.path / last / "manifest.json").write_bytes(original)  # whole again, and the run has gone on without it
    assert find_checkpoint(folder, plan, pytest.fail)[0] == before
    assert (folder.path / last / "damaged").read_text() == complaints[0] + "\n"


def test_a_checkpoint_of_another_number_of_subproblems_is_refused(plan, ended):
    _, folder = ended(20)
    name = checkpoints(folder)[0]
    files, record = whole(folder, name)
    record.pop("version")
    record["course"]["reseeds"].pop()
    record["course"]["curves"] = {}
    commit(folder, name, files[:3], record)
    with pytest.raises(RequestError, match="is of 3 subproblems and 2 objectives, and the run has 4 and 2"):
        find_checkpoint(folder, plan, pytest.fail)


def test_the_plan_of_a_resumed_config_is_of_the_same_identity(plan, tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    folder.write_config(plan.config.resolved())
    read = Config.model_validate(yaml.safe_load((folder.path / "config.yaml").read_text()))
    again = make_plan(read.model_copy(update={"storage": "elsewhere"}), [{"CPU": 8.0}])
    assert json.loads(json.dumps(again.identity)) == json.loads(json.dumps(plan.identity))


def test_a_model_is_loaded_from_a_checkpoint_as_it_was_then(plan, ended):
    _, folder = ended(20)
    folder.write_config(plan.config.resolved())
    block = train_in_process(replace(plan, factors=plan.factors[:20], aligned=None)).block
    for subproblem, theirs in enumerate(block.models):
        ours = load_model(folder.path, subproblem, "step-00000020")
        assert not ours.training
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(RequestError, match="no checkpoint step-00000021 of subproblem 0"):
        load_model(folder.path, 0, "step-00000021")
    file = folder.path / "checkpoints/step-00000020/subproblem-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for damaged, says in ((content, "its SHA-256 differs"), (content[:50], "has 50 bytes, not")):
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match=says):
            load_model(folder.path, 0, "step-00000020")
