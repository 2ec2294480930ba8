"""From the printed link to the code that loads a model, in a real browser on a real MLflow server."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import chromium
from finished_runs import Settings, finished_folder
from mlflow import MlflowClient, pyfunc
from mlflow_server import Server
from tracked_problems import TwoHeadsModel

from popmtl.method.front import hypervolume, non_dominated, pick
from popmtl.runs.folder import RunFolder
from popmtl.runs.front import Figures, Front, Member
from popmtl.runs.results import model_file, write_front
from popmtl.tracking.links import explorer_url, view_url
from popmtl.tracking.mlflow_sink import MlflowSink
from popmtl.tracking.views import FRONTS, MEMBERS

NAMES = ["depth", "segmentation", "surface normals", "edges", "key points", "albedo", "shading"]
SIZES = [(2, 8), pytest.param(3, 16, marks=pytest.mark.endurance), pytest.param(7, 64, marks=pytest.mark.slow)]
# MLflow's page asks for the user of a server that has none.
NOISE = "users/current"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser):
    place = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, Server(place, f"sqlite:///{place}/served.db") as server:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield server


@pytest.fixture
def page(browser):
    """A page that notes what it asks for, and what its console complains of."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))

    def heard(message):
        if message.type == "error" and NOISE not in message.location.get("url", ""):
            page.errors.append(f"{message.text} {message.location}")

    page.on("console", heard)
    yield page
    page.close()


def assert_quiet(page, server):
    assert [url for url in page.asked if not url.startswith((server.uri, "data:", "blob:", "about:"))] == []
    assert page.errors == []


@pytest.fixture(scope="module")
def small(server, tmp_path_factory):
    """Three members with their models."""
    torch.manual_seed(0)
    models = [TwoHeadsModel().eval() for _ in range(3)]
    folder, front = finished_folder(tmp_path_factory.mktemp("small"), "run", models)
    sink = MlflowSink.open(
        Settings(server.uri), folder, folder.config(), front.objectives, [[0.5, 0.5]] * 3, 700, "small"
    )
    for step in range(100, 701, 100):
        sink.log_evaluation(step, 1 - 1 / step, 2, [[1.0, 2.0]] * 3)
        folder.append_metrics({"stage": "mtgd", "step": step, "hypervolume": 1 - 1 / step})
    sink.log_front(front, "front")
    assert sink.close("FINISHED", timeout=240) == []
    return SimpleNamespace(location=sink.location, models=models, front=front)


def explorer_in(page):
    """The explorer within MLflow's page."""
    frame = page.frame_locator("iframe")
    frame.locator("#code").wait_for(timeout=60_000)
    return frame


def test_from_the_link_to_a_models_code_in_one_interaction(page, server, small, monkeypatch, tmp_path):
    page.goto(explorer_url(small.location))
    explorer = explorer_in(page)
    page.screenshot(path=tmp_path / "opened.png")
    assert explorer.locator("#code").is_visible()  # a choice is made, and its code there, before any interaction
    explorer.locator("input[type=range]").first.fill("0")  # one: all that matters is the second objective
    text = explorer.locator("#code").inner_text()
    chosen = pick([member.objectives for member in small.front.members], [0.0, 1.0])
    assert chosen == 1
    assert explorer.locator("#chosen").inner_text() == "Subproblem 1"
    client = MlflowClient(server.uri)
    found = client.search_logged_models([small.location.experiment_id])
    (model,) = [model for model in found if model.name == "member-001"]
    line = f'mlflow.pyfunc.load_model("models:/{model.model_id}")'
    assert line in text.replace("\n", "")
    assert "load_model(" in text
    assert_quiet(page, server)
    # The code does what it says.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    x = torch.randn(5, 4)
    got = pyfunc.load_model(f"models:/{model.model_id}").predict(x.numpy())
    torch.testing.assert_close(torch.tensor(got), small.models[1](x), atol=1e-6, rtol=1e-6)


def curved(m, N):
    """Members on a curved front, some dominated, one lost."""
    rng = np.random.default_rng(m)
    W = rng.dirichlet(np.ones(m), N)
    F = (1 - W) ** 2 + 0.02 * rng.random((N, m))
    F[1] = F[0] + 0.05
    F[-1] = math.nan
    best = non_dominated(F)
    members = [
        Member(
            i,
            W[i].tolist(),
            F[i].tolist(),
            {"accuracy": 0.9 - 0.001 * i},
            "mtgd",
            bool(best[i]),
            None if i == N - 1 else model_file(i),
            lost="its losses were no longer finite" if i == N - 1 else None,
            validation=Figures(F[i].tolist(), {"accuracy": 0.9 - 0.001 * i}),
        )
        for i in range(N)
    ]
    reference = [1.1] * m
    return Front(NAMES[:m], reference, hypervolume(F, reference), 0, 1000, members, {"accuracy": "higher"})


@pytest.mark.parametrize(("m", "N"), SIZES)
def test_the_explorer_and_the_saved_views_show_any_front(page, server, tmp_path, m, N):
    folder = RunFolder.create(tmp_path, f"front-{m}-{N}")
    folder.write_config({"problem": {"name": "tracked_problems:TwoHeads"}, "seed": 3})
    front = curved(m, N)
    W = [member.weights for member in front.members]
    sink = MlflowSink.open(Settings(server.uri), folder, folder.config(), front.objectives, W, 1000, f"front-{m}")
    for step in range(100, 1001, 100):
        losses = [[1 + 10 / step] * m] * N
        sink.log_evaluation(step, front.hypervolume * (1 - 10 / step), N, losses)
        sink.log_training_losses([step], [losses])
        folder.append_metrics({"stage": "mtgd", "step": step, "hypervolume": front.hypervolume * (1 - 10 / step)})
    write_front(folder, front)
    sink.log_front(front, "none")
    assert sink.close("FINISHED", timeout=240) == []

    page.goto(explorer_url(sink.location))
    explorer = explorer_in(page)
    page.screenshot(path=tmp_path / "explorer.png")
    chosen = pick([member.objectives for member in front.members], [1.0] * m)
    assert explorer.locator("#chosen").inner_text() == f"Subproblem {chosen}"
    assert explorer.locator("tbody tr").count() == N
    assert f'load_model("{folder.location}", {chosen})' in explorer.locator("#code").inner_text().replace("\n", "")

    page.goto(view_url(sink.location, MEMBERS))
    page.get_by_text("Trade-offs, validation split").wait_for(timeout=60_000)
    page.locator(".js-plotly-plot").first.wait_for(timeout=60_000)
    page.screenshot(path=tmp_path / "members.png")
    assert page.get_by_text("validation/objective/depth vs. validation/objective/segmentation").count() >= 1
    assert page.get_by_text(f"{N} matching runs").count() == 1

    page.goto(view_url(sink.location, FRONTS))
    page.get_by_text("Quality of the front").wait_for(timeout=60_000)
    page.get_by_text(folder.name).first.wait_for(timeout=60_000)
    page.screenshot(path=tmp_path / "fronts.png")
    assert_quiet(page, server)
