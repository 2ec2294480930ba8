"""`popmtl front`, `pick` and `compare` on the folders of finished runs."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tracked_problems import BranchingModel, TwoHeadsModel

from popmtl.cli import BAD_REQUEST, FAILED, OK, main
from popmtl.method.front import hypervolume, non_dominated
from popmtl.runs import export
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Figures, Front, Member
from popmtl.runs.results import load_model, load_state, model_file, write_front, write_model

NAN = np.nan
ROOT = Path(__file__).resolve().parents[1]
# 3 is dominated by 1 and 2; 4 has diverged.
F = [[0.1, 0.9], [0.2, 0.5], [0.5, 0.2], [0.6, 0.6], [NAN, 0.0]]


def finished(storage, name, F=F, objectives=("left", "right digit"), model=TwoHeadsModel, **parameters):
    """The folder of a run with one model for each row of F."""
    folder = RunFolder.create(storage, name)
    folder.write_config({"problem": {"name": "tracked_problems:TwoHeads", **parameters}, "seed": 3})
    F = np.array(F, dtype=float)
    best, weights = non_dominated(F), np.linspace(0.1, 0.9, len(F))
    members = []
    for i, row in enumerate(F):
        torch.manual_seed(i)
        trained = model()
        trained.body(torch.randn(16, 4))  # moves the BatchNorm statistics
        write_model(folder, i, trained.state_dict())
        share = [weights[i], *[(1 - weights[i]) / (len(row) - 1)] * (len(row) - 1)]
        metrics = {"acc | left": 0.9 + i / 100}
        same = Figures(row.tolist(), metrics)
        members.append(Member(i, share, **vars(same), stage="mtgd", non_dominated=bool(best[i]), model=model_file(i)))
        members[-1] = replace(members[-1], validation=same)
    reference = [1.0] * F.shape[1]
    directions = {"acc | left": "higher"}
    write_front(folder, Front(list(objectives), reference, hypervolume(F, reference), 3, 700, members, directions))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs"), "one", sizes=[1, 2])


@pytest.fixture
def said(capsys):
    """Runs a command that must end with this code; its stdout and stderr."""

    def say(code, *arguments):
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if code != OK:
            assert out == ""
            assert len(err.splitlines()) == 1
            assert err.startswith("popmtl: ")
        return out, err

    return say


def test_the_front_is_shown_as_training_shows_it(run, said):
    out, err = said(OK, "front", run.path)
    assert err == ""
    assert "Pareto front, test split: 3 non-dominated on validation, hypervolume 0.56 at (1, 1)" in out
    rows = [line.split() for line in out.splitlines() if line.rstrip().endswith("mtgd")]
    assert [row[:-6] for row in rows] == [["*", "0"], ["k*", "1"], ["*", "2"], ["3"], ["4"]]
    assert "* non-dominated, k knee" in out


def test_front_json_is_the_file_and_nothing_else(run, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = said(OK, "front", run.path, "--json", "--plot")
    assert out.encode() == (run.pareto / "front.json").read_bytes()
    assert json.loads(out)["members"][4]["objectives"] == [None, 0.0]
    assert err == f"picture {tmp_path / 'front.png'}\n"
    assert (tmp_path / "front.png").read_bytes() == (run.pareto / "front.png").read_bytes()
    assert os.listdir(tmp_path) == ["front.png"]
    _, err = said(BAD_REQUEST, "front", run.path, "--plot", "front.pdf")
    assert "--plot front.pdf: the picture is a PNG" in err
    (tmp_path / "file").touch()
    _, err = said(BAD_REQUEST, "front", run.path, "--plot", "file/front.png")
    assert "--plot file/front.png: cannot be written" in err


@pytest.mark.parametrize("command", [["front"], ["pick", "--knee"], ["compare"]])
def test_a_run_that_has_not_finished_is_refused_with_the_way_on(command, run, said, tmp_path):
    folder = RunFolder.create(tmp_path, "two")
    folder.write_config({"seed": 1})
    others = [run.path] if command == ["compare"] else []
    _, err = said(BAD_REQUEST, *command, *others, folder.path)
    assert f"{folder.path} has no front yet" in err
    assert f"popmtl train --resume {folder.path}" in err
    _, err = said(BAD_REQUEST, *command, *others, tmp_path / "none")
    assert f"{tmp_path / 'none'} is not a run folder" in err


def test_a_choice_is_shown_with_its_figures_and_the_code_that_loads_it(run, said):
    out, err = said(OK, "pick", run.path, "--preference", "0.1,0.9", "--where", "acc | left >= 0.91")
    assert err == ""
    assert "by preference 0.1 for left, 0.9 for right digit, where acc | left >= 0.91" in out
    file = run.pareto / "models" / "2" / "model.safetensors"
    assert any(line.split() == ["file", str(file)] for line in out.splitlines())
    assert ["acc", "|", "left", "0.92", "0.92"] in [line.split() for line in out.splitlines()]
    scope = {}
    exec("\n".join(out.splitlines()[-2:]), scope)
    assert torch.equal(scope["model"].heads[1].weight, load_state(file)["heads.1.weight"])


def test_a_choice_as_json(run, said):
    out, _ = said(OK, "pick", run.path, "--best", "acc | left", "--json", "--where", "left<0.5", "--where", "left>0")
    assert json.loads(out) == {
        "run": "one",
        "location": str(run.path),
        "subproblem": 1,
        "chosen": {"best": "acc | left", "where": ["left < 0.5", "left > 0"]},
        "non_dominated": True,
        "dominated_by": [],
        "weights": {"left": pytest.approx(0.3), "right digit": pytest.approx(0.7)},
        "objectives": {"left": 0.2, "right digit": 0.5},
        "metrics": {"acc | left": 0.91},
        "validation": {"objectives": {"left": 0.2, "right digit": 0.5}, "metrics": {"acc | left": 0.91}},
        "chosen_on": "validation",
        "stage": "mtgd",
        "file": str(run.pareto / "models" / "1" / "model.safetensors"),
        "load": [
            "from popmtl.runs.results import load_model",
            f'model = load_model("{run.path}", 1)',
        ],
    }
    out, err = said(OK, "pick", run.path, "--where", "acc | left >= 0.93", "--json")
    assert json.loads(out)["dominated_by"] == [1, 2]
    assert err == ("popmtl: warning: model 3 is dominated by 1, 2: no non-dominated model satisfies the constraints\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "pick: give --preference, --knee or --best, or --where alone"),
        (["--where", "left<0.1"], "'left<0.1' excludes 4 of 4 (the best is 0.1)"),
        (["--best", "rigth digit"], "no 'rigth digit': did you mean right digit?"),
        (["--preference", "1,2,3"], "--preference 1,2,3: give 2 numbers, one for each of left, right digit"),
        (["--knee", "--export", "s3://bucket/model"], "--export s3://bucket/model: give a folder on this machine"),
        (["--knee", "--export", __file__], f"--export {__file__}: is there already"),
        (["--knee", "--export", str(ROOT / "tests")], "is there already; give a new folder, or an empty one"),
    ],
)
def test_wrong_requests_are_refused(arguments, says, run, said):
    _, err = said(BAD_REQUEST, "pick", run.path, *arguments)
    assert says in err


@pytest.mark.parametrize("arguments", [["--knee", "--best", "left"], ["--preference", "a,b"]])
def test_misuse_of_the_options_shows_the_usage(arguments, run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["pick", str(run.path), *arguments])
    assert end.value.code == BAD_REQUEST
    assert "usage: popmtl pick" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """An export of model 2, into a folder that is there and empty."""
    folder = tmp_path_factory.mktemp("exported")
    assert (
        main(["pick", str(run.path), "--preference", "0.1,0.9", "--where", "left < 0.6", "--export", str(folder)]) == OK
    )
    return folder


def test_an_export_has_the_weights_and_a_card_that_is_true(run, exported):
    assert sorted(os.listdir(exported)) == ["README.md", "card.json", "model.safetensors", "program.pt2"]
    assert not list(exported.parent.glob(f".{exported.name}*"))
    original = run.pareto / "models" / "2" / "model.safetensors"
    assert (exported / "model.safetensors").read_bytes() == original.read_bytes()
    card = json.loads((exported / "card.json").read_text())
    assert card["sha256"] == {
        name: hashlib.sha256((exported / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "program.pt2", "README.md")
    }
    assert card["config_sha256"] == hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest()
    expected = {
        "run": "one",
        "location": str(run.path),
        "subproblem": 2,
        "objectives": {"left": 0.5, "right digit": 0.2},
        "metrics": {"acc | left": 0.92},
        "chosen": {"preference": [0.1, 0.9], "where": ["left < 0.6"]},
        "stage": "mtgd",
        "seed": 3,
        "steps": 700,
        "problem": {"name": "tracked_problems:TwoHeads", "parameters": {"sizes": [1, 2]}},
        "program": {"input": ["batch", 4], "dtype": "float32"},
    }
    assert {key: card[key] for key in expected} == expected
    assert card["exported_with"]["torch"] == torch.__version__
    text = (exported / "README.md").read_text()
    assert "| left | 0.5 | 0.5 | 3 of 3 | 0.1 | 0.4 | 0.5 |" in text
    assert "| right digit | 0.2 | 0.2 | 1 of 3 | 0.2 | 0 | 0.5 |" in text
    assert r"| acc \| left | 0.92 | 0.92 | higher |" in text
    assert "preference 0.1 for left, 0.9 for right digit, where left < 0.6" in text


def test_the_code_on_the_card_gives_the_models_outputs_in_a_fresh_process(run, exported, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = [
        "import sys",
        "import torch",
        "inputs, outputs = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 7)], {}",
        blocks[0],
        "assert not any(name.startswith(('popmtl', 'tracked')) for name in sys.modules)",
        "outputs['program'] = [program(x) for x in inputs]",
        blocks[1],
        "outputs['model'] = [model(x) for x in inputs]",
        f"torch.save((inputs, outputs), {str(tmp_path / 'outputs.pt')!r})",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=exported,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    inputs, outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    model = load_model(run.path, 2)
    for which in ("program", "model"):
        for x, y in zip(inputs, outputs[which], strict=True):
            torch.testing.assert_close(y, model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "parameters", "why"),
    [
        (BranchingModel, {"branching": True}, "Could not guard on data-dependent expression"),
        (TwoHeadsModel, {"example": False}, "the problem gives no example_input"),
    ],
)
def test_a_model_that_cannot_be_exported_leaves_its_program_out_and_says_why(model, parameters, why, said, tmp_path):
    run = finished(tmp_path, "run", model=model, **parameters)
    folder = tmp_path / "not" / "there"
    out, err = said(OK, "pick", run.path, "--knee", "--export", folder, "--json")
    assert json.loads(out)["exported"] == str(folder)
    assert err.startswith(f"popmtl: warning: program.pt2 is left out: {why}")
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir(folder)) == ["README.md", "card.json", "model.safetensors"]
    assert json.loads((folder / "card.json").read_text())["program"] is None
    assert "program.pt2" not in (folder / "README.md").read_text()


def test_an_export_that_fails_leaves_nothing(said, tmp_path, monkeypatch):
    run = finished(tmp_path / "runs", "run", example=False)
    target = tmp_path / "exports" / "model"
    target.parent.mkdir()

    def full(*arguments):
        raise OSError(28, "No space left on device", "README.md")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_readme", full)
        _, err = said(BAD_REQUEST, "pick", run.path, "--knee", "--export", target)
        assert f"--export {target}: cannot be written (README.md: No space left on device)" in err
    with monkeypatch.context() as patch:
        write = Path.write_bytes
        patch.setattr(Path, "write_bytes", lambda path, content: write(path, content[:-1] + b"\0"))
        _, err = said(FAILED, "pick", run.path, "--knee", "--export", target)
        assert "is not what was copied from" in err
    file = run.pareto / "models" / "1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    _, err = said(BAD_REQUEST, "pick", run.path, "--knee", "--export", target)
    assert f"{file} is damaged" in err
    file.unlink()
    _, err = said(BAD_REQUEST, "pick", run.path, "--knee", "--export", target)
    assert "has no model of subproblem 1" in err
    assert os.listdir(target.parent) == []


def test_runs_are_compared(run, said, tmp_path):
    other = finished(tmp_path, "two", [[0.1, 0.9], [0.3, 0.5], [0.4, 0.1]])
    out, err = said(OK, "compare", run.path, other.path, "--plot", tmp_path / "fronts.png")
    assert err == ""
    assert "hypervolume at (1, 1), the worst of their reference points" in out
    lines = [line.split() for line in out.splitlines()]
    # 0.9·0.1 + 0.8·0.4 + 0.5·0.3, and 0.9·0.1 + 0.7·0.4 + 0.6·0.4. Each keeps two of its three models, one of them in
    # both runs.
    assert ["1", "one", "3", "0.56", "50%", "0.1", "0.2"] in lines
    assert ["2", "two", "3", "0.61", "50%", "0.1", "0.1"] in lines
    assert ["by", "1", "100%", "67%"] in lines
    assert ["by", "2", "67%", "100%"] in lines
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    out, _ = said(OK, "compare", run.path, other.path, "--json")
    figures = json.loads(out)
    assert figures["names"] == ["one", "two"]
    assert figures["hypervolumes"] == pytest.approx([0.56, 0.61])
    assert figures["coverage"] == [[1, pytest.approx(2 / 3)], [pytest.approx(2 / 3), 1]]


def test_runs_of_one_name_are_told_apart_by_their_paths(run, said, tmp_path):
    other = finished(tmp_path, "one", [[NAN, 1.0]])
    out, _ = said(OK, "compare", run.path, other.path, run.path, "--json")
    figures = json.loads(out)
    assert figures["names"] == [str(run.path), str(other.path), str(run.path)]
    assert figures["coverage"] == [[1, None, 1], [0, None, 0], [1, None, 1]]
    assert figures["best"][1] == [None, None]
    out, _ = said(OK, "compare", run.path, other.path)
    assert ["by", "1", "100%", "-"] in [line.split() for line in out.splitlines()]


def test_runs_with_different_objectives_are_not_compared(run, said, tmp_path):
    other = finished(tmp_path, "two", [[0.0, 0.0, 0.0]], ["left", "right", "sum"])
    _, err = said(BAD_REQUEST, "compare", run.path, other.path)
    assert "one has the objectives left, right digit, but two has left, right, sum" in err
    _, err = said(BAD_REQUEST, "compare", run.path)
    assert "compare: give two runs or more" in err


def test_runs_behind_urls_are_read_too(said, s3):
    run = finished(s3, "one", [[0.1, 0.9], [0.2, 0.2]], example=False)
    assert run.location in said(OK, "pick", run.location, "--knee")[0]
    assert "k* 0" in said(OK, "front", run.location)[0]


def test_a_front_of_the_best_evaluation_that_is_not_there_is_missed_by_name(run, said):
    for command in (["front"], ["pick", "--knee"]):
        _, err = said(BAD_REQUEST, *command, run.path, "--from", "best")
        assert "has no front of its best evaluation: front.best was not asked for" in err


def test_the_front_of_the_best_evaluation_is_exported_with_its_own_models(tmp_path, said):
    run, other = finished(tmp_path, "two", sizes=[1, 2]), finished(tmp_path, "three", F=[[0.2, 0.3]], sizes=[1, 2])
    torch.manual_seed(9)
    write_model(run, 0, (best := TwoHeadsModel()).state_dict(), "pareto/best")
    write_front(run, replace(other.front(), best=True))
    _, err = said(BAD_REQUEST, "pick", run.path, "--knee", "--from", "last", "--export", tmp_path / "two")
    assert "is there already" in err
    said(OK, "pick", run.path, "--knee", "--from", "best", "--export", tmp_path / "exported")
    exported = load_state(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in best.state_dict().items())
    assert "best=True" in json.dumps(json.loads((tmp_path / "exported" / "card.json").read_text()))
