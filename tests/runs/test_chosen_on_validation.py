"""Validation and test figures that disagree: every choice follows validation, and the test split only reports."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from popmtl.cli import OK, main
from popmtl.display import print_comparison, print_front
from popmtl.errors import RequestError
from popmtl.method.front import hypervolume, knee, non_dominated, pick
from popmtl.runs.choice import choose, described, knee_of
from popmtl.runs.comparison import compare_fronts, front_points
from popmtl.runs.explorer import Loading, explorer_page
from popmtl.runs.export import _readme
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Figures, Front, Member
from popmtl.runs.results import model_file, write_front
from popmtl.tracking.note import named_members, note

VALIDATION = np.array([[0.1, 0.9], [0.3, 0.3], [0.9, 0.1], [0.5, 0.6]])
# On test the members' places are other ones: 3 is the knee, 2 is dominated.
TEST = np.array([[0.8, 0.15], [0.85, 0.5], [0.9, 0.55], [0.2, 0.2]])
ACCURACY = {"validation": [0.6, 0.7, 0.95, 0.8], "test": [0.99, 0.7, 0.5, 0.9]}


def front(with_validation=True):
    reference, best = [1.0, 1.0], non_dominated(VALIDATION if with_validation else TEST)
    members = [
        Member(
            subproblem=i,
            weights=[0.2 + 0.2 * i, 0.8 - 0.2 * i],
            objectives=TEST[i].tolist(),
            metrics={"accuracy": ACCURACY["test"][i], "delta_m/tasks": 1.0 * i},
            stage="mtgd",
            non_dominated=bool(best[i]),
            model=model_file(i),
            validation=Figures(VALIDATION[i].tolist(), {"accuracy": ACCURACY["validation"][i]}),
        )
        for i in range(4)
    ]
    if not with_validation:
        members = [replace(member, validation=None) for member in members]
    directions = {"accuracy": "higher", "delta_m/tasks": "lower"}
    return Front(["left", "right"], reference, hypervolume(TEST, reference), 3, 700, members, directions)


FRONT = front()
PREFERENCES = [[1, 1], [1, 0], [0, 1], [0.3, 0.7]]


def test_the_orders_disagree():
    assert knee(VALIDATION) == 1 != knee(TEST)
    assert not any(pick(VALIDATION, p) == pick(TEST, p) for p in PREFERENCES)


def test_each_choice():
    assert knee_of(FRONT).subproblem == choose(FRONT, at_knee=True).member.subproblem == 1
    for preference in PREFERENCES:
        assert choose(FRONT, preference=preference).member.subproblem == pick(VALIDATION, preference)
    assert choose(FRONT, best="left").member.subproblem == 0
    assert choose(FRONT, best="accuracy").member.subproblem == 2
    assert choose(FRONT, where=["accuracy>=0.9"]).member.subproblem == 2
    assert choose(FRONT, where=["left<0.2"]).member.subproblem == 0
    choice = choose(FRONT, where=["accuracy>0.7", "left<0.6"])
    assert (choice.member.subproblem, choice.dominated_by) == (3, [1])
    with pytest.raises(
        RequestError, match="delta_m/tasks is known on the test split only, and choices are made on val"
    ):
        choose(FRONT, best="delta_m/tasks")


def test_the_names_and_the_note_in_mlflow():
    assert named_members(FRONT) == {"knee": 1, "best-left": 0, "best-right": 2}
    text = note(FRONT, {})
    assert "4 models, 3 of them non-dominated on the validation split" in text
    assert "Chosen on the validation split; figures are those on the test split." in text
    assert "| | member | left, test | right, test | model |" in text.replace("|  |", "| |")
    assert "| knee | 1 | 0.85 | 0.5 |" in text


def test_the_picker_model(tmp_path):
    from popmtl.tracking.pareto_model import ParetoModel

    (tmp_path / "front.json").write_text(FRONT.to_json())
    for i in (0, 1, 2):
        (tmp_path / model_file(i)).parent.mkdir(parents=True)
        (tmp_path / model_file(i)).touch()
    model = ParetoModel()
    model.load_context(SimpleNamespace(artifacts={"pareto": str(tmp_path)}))
    for preference in PREFERENCES:
        assert model.chosen(preference, "") == pick(VALIDATION[:3], preference)


def test_files_and_commands(tmp_path, capsys):
    folder = RunFolder.create(tmp_path, "run")
    folder.write_config({"problem": {"name": "none"}, "seed": 3})
    write_front(folder, FRONT)
    assert folder.front() == FRONT
    with (folder.pareto / "front.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[1]
    assert [row[f"{split}/objective/left"] for split in ("validation", "test")] == ["0.3", "0.85"]
    assert main(["pick", str(folder.path), "--knee", "--json"]) == OK
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert (found["subproblem"], found["chosen_on"]) == (1, "validation")
    assert found["objectives"] == {"left": 0.85, "right": 0.5}
    assert found["validation"] == {"objectives": {"left": 0.3, "right": 0.3}, "metrics": {"accuracy": 0.7}}
    assert main(["pick", str(folder.path), "--where", "accuracy>=0.9"]) == OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["figure", "validation", "test", "weight"] in lines
    assert ["left", "0.9", "0.9", "0.600"] in lines
    assert ["accuracy", "0.95", "0.5"] in lines
    assert ["delta_m/tasks", "-", "2"] in lines


def printed(print_, what):
    console = Console(width=200, record=True)
    print_(console, what)
    return console.export_text()


def test_the_front_as_a_table():
    text = printed(print_front, FRONT)
    volume = f"{hypervolume(TEST, [1, 1]):.5g}"
    assert f"Pareto front, test split: 3 non-dominated on validation, hypervolume {volume} at (1, 1)" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["k*", "1", "0.40", "0.60", "0.85", "0.5", "0.7", "1", "mtgd"] in lines
    assert ["3", "0.80", "0.20", "0.2", "0.2", "0.9", "3", "mtgd"] in lines
    assert "on the validation split, by which members are chosen" in text


def test_a_comparison_reports_the_test_figures_of_what_validation_chooses():
    comparison = compare_fronts(["a", "b"], [FRONT, front(with_validation=False)])
    assert front_points(FRONT).tolist() == TEST[:3].tolist()
    assert comparison.sizes == [3, 2]
    assert comparison.best == [[0.8, 0.55], [0.2, 0.15]]
    assert comparison.hypervolumes == [pytest.approx(hypervolume(TEST, [1, 1]))] * 2
    text = printed(print_comparison, comparison)
    assert "2 fronts, test split" in text
    assert "so on the validation split; their figures are those on test (b: no validation figures" in text


def test_the_card_of_an_export():
    choice = choose(FRONT, at_knee=True)
    folder = SimpleNamespace(name="run", location="run", files=SimpleNamespace(where=str, check=str))
    card = described(folder, FRONT, choice)
    card |= {"problem": {"name": "p", "parameters": {}}, "program": None, "exported_with": {}, "sha256": {}}
    text = _readme({**card, "steps": 1, "seed": 0, "config_sha256": ""}, FRONT)
    assert "3 of 4 models are non-dominated on the validation split, by which this one was chosen" in text
    assert "| objective | validation | test | rank | best | distance to the best | weight in training |" in text
    assert "| left | 0.3 | 0.85 | 2 of 3 | 0.1 | 0.2 | 0.4 |" in text
    assert "| accuracy | 0.7 | 0.7 | higher |" in text


def test_a_front_without_validation_figures_is_chosen_from_by_test_and_says_so(tmp_path, capsys):
    folder = RunFolder.create(tmp_path, "run")
    folder.write_config({"problem": {"name": "none"}, "seed": 3})
    old = json.loads(front(with_validation=False).to_json())
    for member in old["members"]:
        del member["validation"]
    folder.write("pareto/front.json", json.dumps(old).encode())
    assert folder.front() == front(with_validation=False)
    assert main(["pick", str(folder.path), "--knee", "--json"]) == OK
    out, err = capsys.readouterr()
    assert json.loads(out)["subproblem"] == knee(TEST)
    assert (json.loads(out)["chosen_on"], json.loads(out)["validation"]) == ("test", None)
    warning = "front.json has no validation figures: members are compared and chosen on the test split"
    assert err == f"popmtl: warning: {warning}\n"
    assert main(["front", str(folder.path)]) == OK
    assert f"warning: {warning}" in capsys.readouterr().out


PAGE = """
const element = () => new Proxy(function () {}, {
  get: (_, name) => name === Symbol.toPrimitive ? () => "" : name === "textContent" ? TEXT : name === "length" ? 0
    : name === Symbol.iterator ? function* () {} : name === "clientWidth" ? 900 : element(),
  set: () => true, apply: () => element(), construct: () => element(),
});
globalThis.document = element();
globalThis.getComputedStyle = element();
globalThis.ResizeObserver = function () { this.observe = () => {}; };
"""


@pytest.mark.skipif(not shutil.which("node"), reason="Node.js is not installed")
def test_the_explorers_sliders_and_limits(tmp_path):
    """The page's own script without a browser; test_explorer looks at the page in one, where there is one."""
    page = explorer_page(FRONT, "A run", [(1, 0.5)], Loading("run"))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    asks = f"""
const found = [];
for (const wish of {json.dumps(PREFERENCES)}) {{
  [state.sliders, state.mode] = [wish, "preference"];
  found.push(decide().chosen);
}}
state.mode = "knee";
found.push(decide().chosen);
const accuracy = columns.find(column => column.name === "accuracy");
state.mode = "preference";
accuracy.limit = 0.9;
found.push(decide().chosen);
console.log(JSON.stringify([found, describe(1)]));
"""
    start = PAGE.replace("TEXT", json.dumps(data))
    (tmp_path / "page.js").write_text(start + script.replace("build();\nlet", "let") + asks)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found, text = json.loads(done.stdout)
    assert found == [*(pick(VALIDATION, preference) for preference in PREFERENCES), knee(VALIDATION), 2]
    assert text[1:4] == ["left 0.3 (test 0.85)", "right 0.3 (test 0.5)", "accuracy 0.7 (test 0.7)"]
    content = json.loads(data)
    assert content["split"] == "validation"
    assert content["hypervolume"] == pytest.approx(hypervolume(VALIDATION, [1, 1]))
    assert content["test_hypervolume"] == pytest.approx(hypervolume(TEST, [1, 1]))
