"""What names a front in MLflow: the registered model, its aliases, and the note on the front's run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from popmtl.runs.choice import knee_of
from popmtl.runs.front import Front
from popmtl.tracking.outbox import Entry


def registered_name(opening: Entry) -> str:
    """The registered model of a run's config."""
    return re.sub(r"[^\w .-]", "-", opening["config_name"])


def named_members(front: Front) -> dict[str, int]:
    """Subproblems that a user may want by name: `knee`, and `best-<objective>` for each objective, on validation.

    Each alias as MLflow allows it. Empty where all objective values are not finite.
    """
    middle = knee_of(front)
    if middle is None:
        return {}
    named = {"knee": middle.subproblem}
    best = [member for member in front.members if member.non_dominated]
    values = {member.subproblem: front.figures(member).objectives for member in best}
    for k, name in enumerate(front.objectives):
        alias = re.sub(r"[^A-Za-z0-9_-]+", "-", f"best-{name}")
        named.setdefault(alias, min(values, key=lambda i: values[i][k]))
    return named


def note(front: Front, versions: Mapping[str, str]) -> str:
    """Markdown for the front's run: the members of interest, and how to load them.

    Args:
        front: the Pareto set.
        versions: URIs of the registered versions, by alias; those that there are.
    """
    best = sum(member.non_dominated for member in front.members)
    point = ", ".join(f"{x:.4g}" for x in front.reference_point)
    lines = [
        f"**{len(front.members)} models, {best} of them non-dominated on the {front.chosen_on} split; hypervolume "
        f"{front.volume:.5g}** at ({point}), on the test split.",
        "",
        "Choose one in *Artifacts* → `pareto/explorer.html`.",
    ]
    named = named_members(front)
    if named:
        header = ["", "member", *(_cell(f"{name}, test") for name in front.objectives), "model"]
        lines += ["", f"Chosen on the {front.chosen_on} split; figures are those on the test split.", ""]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    members = {member.subproblem: member for member in front.members}
    for alias, i in named.items():
        values = " | ".join(f"{x:.4g}" for x in members[i].objectives)
        model = f"`{versions[alias]}`" if alias in versions else ""
        lines.append(f"| {alias} | {i} | {values} | {model} |")
    if "front" in versions:
        preference = ", ".join(["1.0"] * len(front.objectives))
        lines += ["", "```python", "import mlflow", ""]
        if "knee" in versions:
            lines += [f'model = mlflow.pyfunc.load_model("{versions["knee"]}")', "model.predict(x)", ""]
        lines += [
            f'front = mlflow.pyfunc.load_model("{versions["front"]}")  # chooses by what matters',
            f'front.predict(x, params={{"preference": [{preference}]}})',
            "```",
        ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
