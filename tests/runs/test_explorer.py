"""The Pareto explorer in a real browser, framed as MLflow frames it: scripts allowed, nothing else."""

import ast
import math
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from browser import chromium

from popmtl.method.front import AUGMENTATION, hypervolume, knee, non_dominated, normalized_front, pick
from popmtl.runs.explorer import Loading, explorer_page
from popmtl.runs.front import Figures, Front, Member

NAN = math.nan
LOADING = Loading("runs/my run", {i: f"models:/m-{i:032x}" for i in range(64)}, "models:/popmtl-digits@front")
HISTORY = [(15 * n, 0.2 * (1 - math.exp(-n / 30))) for n in range(1, 201)]
NAMES = [
    "loss_left",
    "loss_right",
    "reconstruction error",
    "depth of the scene",
    "normals",
    "edges",
    "key points (all)",
]


def front_of(F, names=NAMES, metrics=(), directions=None, reference=None, lost=()):
    """`metrics`: one mapping a row."""
    F = np.asarray(F, dtype=float)
    N, m = F.shape
    best = non_dominated(F)
    W = np.random.default_rng(1).dirichlet(np.ones(m), N)
    reference = np.full(m, 1.2) if reference is None else reference
    members = [
        Member(
            subproblem=i,
            weights=W[i].tolist(),
            objectives=F[i].tolist(),
            metrics=metrics[i] if metrics else {},
            stage="mtgd",
            non_dominated=bool(best[i]),
            model=None if i in lost else f"models/{i}/model.safetensors",
            lost="its losses were not finite" if i in lost else None,
        )
        for i in range(N)
    ]
    return Front(list(names[:m]), list(reference), hypervolume(F, reference), 0, 3000, members, directions or {})


def curved(m, N, seed=0, hard=False):
    """A front with dominated rows; `hard`: rows that are equal, that tie, and that are not finite."""
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.ones(m), N)
    F = 0.1 + (1 - W) ** 2
    if N >= 8:
        F[1] *= 1.3
        F[2] *= 3
    if hard and N >= 8:
        F[4:] = np.round(F[4:], 1)
        F[3] = F[5]
        F[6, 0] = NAN
        F[7, -1] = np.inf
    return F


def with_metrics(F):
    metrics = [
        {"accuracy_left": 1 - row[0] / 3, "accuracy_right": 1 - row[1] / 3, "latency": 5.0 + i}
        for i, row in enumerate(F)
    ]
    return front_of(
        F, metrics=metrics, directions={"accuracy_left": "higher", "accuracy_right": "higher", "latency": "lower"}
    )


def with_both_splits(F):
    """`with_metrics`, whose figures are those on validation; those on test are others. Its hypervolume is estimated."""
    front = with_metrics(F)
    members = [
        replace(
            member,
            objectives=[1.25 * value for value in member.objectives],
            metrics={name: 0.75 * value for name, value in member.metrics.items()},
            validation=Figures(member.objectives, member.metrics),
        )
        for member in front.members
    ]
    return replace(front, members=members, hypervolume=0.5, hypervolume_error=0.0123)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site():
    """A server of `site.page` and of a host that frames it as MLflow's artifact view does."""
    site = SimpleNamespace(page="")
    host = (
        '<!doctype html><link rel="icon" href="data:,"><style>body {margin: 0} iframe {border: 0; width: 100vw; '
        'height: 100vh; display: block}</style><iframe sandbox="allow-scripts" src="/page"></iframe>'
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((site.page if self.path == "/page" else host).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}/"
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(browser):
    """One page for all tests: to start one takes longer than most of them."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.seen = []
    page.on("console", lambda message: page.seen.append(message.text))
    page.on("pageerror", lambda error: page.seen.append(str(error)))
    page.on("request", lambda request: page.seen.append(request.url))
    return page


@pytest.fixture
def opened(page, site):
    """Opens the explorer of a front; gives its frame. It may neither complain nor ask for anything else."""
    page.seen.clear()

    def open_(front, title="A run", history=HISTORY, loading=LOADING, width=900, height=650, scheme="light"):
        site.page = explorer_page(front, title, history, loading)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.goto(site.url)
        frame = page.frames[1]
        # The pictures are drawn, and the choice with them, once the frame has a size.
        frame.wait_for_function("document.getElementById('chosen')?.textContent")
        return frame

    yield open_
    assert site.url + "page" in page.seen
    assert {entry for entry in page.seen if not entry.startswith("data:")} == {site.url, site.url + "page"}


def resize(frame, width):
    frame.page.set_viewport_size({"width": width, "height": 650})
    frame.wait_for_function(
        """width => {
            const drawn = document.querySelector("#parallel svg").clientWidth;
            return innerWidth === width && width - 80 < drawn && drawn <= width;
        }""",
        arg=width,
    )


def chosen(frame):
    text = frame.locator("#chosen").text_content()
    found = re.fullmatch(r"Subproblem (\d+)", text)
    return int(found[1]) if found else text


def numbers(frame, selector):
    """The members that the selected elements stand for."""
    return frame.locator(selector).evaluate_all("elements => elements.map(element => Number(element.dataset.member))")


def prefer(frame, preferences):
    """The choice for each preference, set by the sliders."""
    script = """preferences => preferences.map(preference => {
        preference.forEach((value, k) => {
            const slider = document.getElementById(`slider-${k}`);
            slider.value = value;
            slider.dispatchEvent(new Event("input"));
        });
        return document.getElementById("chosen").textContent;
    })"""
    return [int(text.removeprefix("Subproblem ")) for text in frame.evaluate(script, preferences)]


def pick_among(F, preference, admitted):
    """`pick`'s formula, with the scale of the whole front, for the admitted rows alone."""
    rows, z = normalized_front(F)
    p = np.asarray(preference) / np.sum(preference)
    distance = (p * z).max(axis=1) + AUGMENTATION * z.sum(axis=1)
    distance[~np.isin(rows, admitted)] = np.inf
    assert np.isfinite(distance).any()
    return int(rows[np.argmin(distance)])


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("m", [2, 3, 7])
@pytest.mark.parametrize("N", [1, 8, 64])
def test_sliders_choose_as_pick_does(opened, m, N):
    rng = np.random.default_rng(m * N)
    F = curved(m, N, hard=True)
    preferences = [[1.0] * m, *np.eye(m).tolist(), *(rng.integers(0, 101, (18, m)) / 100).tolist()]
    frame = opened(front_of(F))
    picks = [pick(F, preference) for preference in preferences]
    assert prefer(frame, preferences) == picks
    assert N == 1 or len(set(picks)) > 2


def test_shortcuts(opened):
    F = curved(3, 16, hard=True)
    frame = opened(front_of(F))
    frame.get_by_role("button", name="best loss_right", exact=True).click()
    assert chosen(frame) == pick(F, [0, 1, 0])
    assert frame.locator("#slider-1").input_value() == "1"
    frame.get_by_role("button", name="knee").click()
    assert chosen(frame) == knee(F)
    assert "knee" in frame.locator("#reason").text_content()
    frame.get_by_role("button", name="equal").click()
    assert chosen(frame) == pick(F, [1, 1, 1])
    assert len({pick(F, [0, 1, 0]), knee(F), pick(F, [1, 1, 1])}) > 1


def test_preferences_that_are_all_zero_count_as_equal(opened):
    F = curved(2, 8)
    frame = opened(front_of(F))
    assert not frame.locator("#zero").is_visible()
    assert prefer(frame, [[1, 0.0], [0, 0]])[1] == pick(F, [1, 1])
    assert frame.locator("#zero").is_visible()
    assert '"preference": [1.0, 1.0]' in frame.locator("#code").text_content()


def test_limits_on_objectives_and_metrics(opened):
    F = curved(2, 12, seed=3)
    frame = opened(with_metrics(F))
    best = np.flatnonzero(non_dominated(F))
    free = pick(F, [1, 1])
    # The limit that leaves out what was chosen, and lets others in.
    limit = float(np.sort(F[best, 0])[list(np.sort(F[best, 0])).index(F[free, 0]) - 1])
    frame.get_by_label("loss_left at most").fill(repr(limit))
    expected = pick_among(F, [1, 1], np.flatnonzero(F[:, 0] <= limit))
    assert chosen(frame) == expected != free
    assert "outside the limits" in frame.locator(f'tr[data-member="{free}"]').text_content()
    assert "faded" in frame.locator(f'#scatter [data-member="{free}"]').get_attribute("class")
    frame.get_by_label("loss_left at most").fill("")
    assert chosen(frame) == free
    accuracy = 1 - F[:, 1] / 3
    least = float(np.sort(accuracy[best])[list(np.sort(accuracy[best])).index(accuracy[free]) + 1])
    frame.get_by_label("accuracy_right at least").fill(repr(least))
    assert chosen(frame) == pick_among(F, [1, 1], np.flatnonzero(accuracy >= least)) != free
    frame.get_by_role("button", name="best loss_left").click()
    assert chosen(frame) == pick_among(F, [1, 0], np.flatnonzero(accuracy >= least))


def test_without_a_feasible_member_the_tightest_limit_is_named(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1], [NAN, 0.1]]
    frame = opened(front_of(F))
    frame.get_by_label("loss_left at most").fill("0.2")
    frame.get_by_label("loss_right at most").fill("0.01")
    assert chosen(frame) == "No member is within the limits"
    assert "“loss_right at most 0.01” excludes the most: 3 of 3 members" in frame.locator("#reason").text_content()
    assert not frame.locator("#code").is_visible()
    frame.get_by_role("button", name="Clear all limits").click()
    assert not frame.locator("#h-limits ~ .clear").is_visible()
    assert chosen(frame) == 1


def test_a_dominated_member_is_chosen_only_where_no_other_is_within_the_limits(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1], [0.5, 0.5], [0.45, 0.7]]
    metrics = [{"accuracy": value} for value in (0.5, 0.3, 0.2, 0.9, 0.9)]
    frame = opened(front_of(F, metrics=metrics, directions={"accuracy": "higher"}))
    assert chosen(frame) == 1
    frame.get_by_label("accuracy at least").fill(".4")
    assert chosen(frame) == 0  # although 3 is nearer to the preferences
    assert "dominated" not in frame.locator("#reason").text_content()
    frame.get_by_label("accuracy at least").fill(".8")
    assert chosen(frame) == 3
    assert "is dominated" in frame.locator("#reason").text_content()


def test_a_member_without_the_metric_does_not_satisfy_its_limit(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1]]
    frame = opened(front_of(F, metrics=[{"a": 0.1}, {}, {"a": NAN}], directions={"a": "lower"}))
    frame.get_by_label("a at most").fill("5")
    assert chosen(frame) == 0


def test_brushing_by_keyboard(opened):
    F = curved(3, 16, seed=2)
    frame = opened(front_of(F))
    free = chosen(frame)
    best = non_dominated(F)
    low, high = F[best, 0].min(), F[best, 0].max()
    handle = frame.get_by_role("slider", name="loss_left, worst admitted")
    handle.focus()
    steps = 0
    while chosen(frame) == free:
        handle.press("ArrowLeft")
        steps += 1
        assert steps < 50
    admitted = np.flatnonzero((F[:, 0] - low) / (high - low) <= 1 - steps / 50)
    assert free not in admitted
    assert chosen(frame) == pick_among(F, [1, 1, 1], admitted)
    assert set(numbers(frame, "#parallel .mark.faded")) == set(range(16)) - set(admitted)
    handle.press("Escape")
    assert chosen(frame) == free
    assert frame.locator(".faded").count() == 0


def test_what_is_better_than_the_whole_front_stays_within_a_brush(opened):
    F = [[0.1, 0.9], [0.9, 0.1], [0.95, 0.95]]
    frame = opened(front_of(F, metrics=[{"ms": 5}, {"ms": 6}, {"ms": 1}], directions={"ms": "lower"}))
    frame.get_by_role("slider", name="ms, worst admitted").press("ArrowLeft")
    assert numbers(frame, "#parallel .mark.faded") == [1]


def test_brushing_by_dragging(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1]]
    frame = opened(front_of(F))
    rail = frame.locator("#parallel .rail").first
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    mouse, y = frame.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + 0.9 * box["width"], y)
    mouse.down()
    mouse.move(box["x"] + 0.6 * box["width"], y, steps=3)
    mouse.move(box["x"] + 0.5 * box["width"], y)
    mouse.up()
    assert "No member is within" in chosen(frame)
    assert "the brush on loss_left (0.5" in frame.locator("#reason").text_content()
    mouse.click(box["x"] + 0.2 * box["width"], y)
    assert chosen(frame) == 1


# ---------------------------------------------------------------- choosing by hand


def test_a_member_is_chosen_by_clicking_it(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1], [0.95, 0.95]]
    frame = opened(front_of(F))
    frame.locator('#scatter [data-member="0"] .point').click()
    assert chosen(frame) == 0
    assert "Your preferences lead to 1" in frame.locator("#reason").text_content()
    frame.locator('#scatter [data-member="3"] .point').click()
    assert chosen(frame) == 3
    assert "It is dominated" in frame.locator("#reason").text_content()
    # The middle of the line, between the two axes.
    line = frame.locator('#parallel [data-member="0"] .hit')
    line.scroll_into_view_if_needed()
    box = line.bounding_box()
    frame.page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    assert chosen(frame) == 0
    frame.locator('tr[data-member="2"] td').last.click()
    assert chosen(frame) == 2
    frame.locator("#slider-0").press("ArrowLeft")
    assert chosen(frame) == pick(F, [0.49, 0.5])


def test_from_load_to_another_member_by_keyboard_alone(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1]]
    frame = opened(front_of(F))
    keyboard = frame.page.keyboard

    def tab_to(selector):
        for _ in range(40):
            keyboard.press("Tab")
            if frame.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"the Tab key does not lead to {selector}")

    tab_to("#slider-0")
    keyboard.press("End")
    assert frame.locator("#slider-0").input_value() == "1"
    keyboard.press("Home")
    assert chosen(frame) == pick(F, [0, 0.5]) == 2
    tab_to("#scatter .mark")
    keyboard.press("ArrowLeft")
    assert "loss_left 0.4" in frame.locator("#tip").text_content()
    keyboard.press("Enter")
    assert chosen(frame) == 1
    tab_to("#parallel .mark")
    keyboard.press("ArrowUp")
    keyboard.press(" ")
    assert chosen(frame) == 0
    tab_to('tr[data-member="2"] button')
    keyboard.press("Enter")
    assert chosen(frame) == 2


# ---------------------------------------------------------------- the code


def strings(code):
    return [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_the_code_loads_the_chosen_model(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1]]
    loading = Loading('C:\\runs\\"mine"', {1: "models:/m-0123"}, "models:/digits@front")
    frame = opened(front_of(F), loading=loading)
    mlflow, local, picker = frame.locator("#code code").all_text_contents()
    assert mlflow == 'import mlflow\nmodel = mlflow.pyfunc.load_model("models:/m-0123")'
    assert local.startswith("from popmtl.runs.results import load_model\nmodel = load_model(")
    assert strings(local) == ['C:\\runs\\"mine"', 1]
    assert picker == 'mlflow.pyfunc.load_model("models:/digits@front").predict(x, params={"preference": [0.5, 0.5]})'
    prefer(frame, [[0.3, 0.7]])
    assert 'params={"preference": [0.3, 0.7]}' in frame.locator("#code code").last.text_content()
    # A choice that preferences do not lead to is asked for by number; what is not in MLflow is loaded from the folder.
    prefer(frame, [[1.0, 0.0]])
    frame.locator('tr[data-member="1"]').click()
    assert frame.locator("#code code").last.text_content().endswith('predict(x, params={"member": "1"})')
    frame.locator('tr[data-member="2"]').click()
    (local,) = frame.locator("#code code").all_text_contents()
    assert strings(local) == ['C:\\runs\\"mine"', 2]


def test_without_mlflow_the_folder_remains(opened):
    frame = opened(front_of([[0.1, 0.9], [0.9, 0.1]]), loading=Loading("runs/mine"))
    assert frame.locator("#code code").all_text_contents() == [
        'from popmtl.runs.results import load_model\nmodel = load_model("runs/mine", 0)'
    ]


def test_copying_selects_the_code(opened):
    frame = opened(front_of([[0.1, 0.9], [0.9, 0.1]]))
    frame.get_by_role("button", name="Copy").nth(1).click()
    assert frame.evaluate("getSelection().toString()") == frame.locator("#code code").nth(1).text_content()
    assert re.search("Copied|Ctrl\\+C", frame.locator("#copied").text_content())


@pytest.mark.parametrize(("width", "height"), [(900, 650), (1280, 800)])
@pytest.mark.parametrize("m", [2, 7])
@pytest.mark.parametrize("kind", [with_metrics, with_both_splits])
def test_sliders_scatter_and_code_are_on_the_first_screen(opened, kind, m, width, height):
    frame = opened(kind(curved(m, 12)), width=width, height=height)
    for selector in (f"#slider-{m - 1}", "#scatter svg", "#chosen", "#code .snippet:last-child"):
        box = frame.locator(selector).bounding_box()
        assert box["y"] + box["height"] <= height, selector


# ---------------------------------------------------------------- pictures and table


def test_the_table_sorts(opened):
    F = [[0.4, 0.4], [NAN, 0.5], [0.1, 0.9], [0.9, 0.1]]
    frame = opened(front_of(F, lost=[1]))

    def order():
        return numbers(frame, "#rows tr")

    def sorted_by():
        heads = "heads => heads.map(head => [head.textContent.replace(/ [▲▼]/, ''), head.ariaSort])"
        return dict(frame.locator("#columns th").evaluate_all(heads))

    assert order() == [0, 1, 2, 3]
    frame.locator("#columns").get_by_role("button", name="loss_left").click()
    assert order() == [2, 0, 3, 1]
    assert sorted_by()["loss_left, test"] == "ascending"
    frame.locator("#columns").get_by_role("button", name="loss_left").click()
    assert order() == [3, 0, 2, 1]
    assert sorted_by()["loss_left, test"] == "descending"
    assert sorted_by()["Subproblem"] == "none"
    assert "lost: its losses were not finite" in frame.locator('tr[data-member="1"]').text_content()


def test_the_header_says_what_there_is(opened):
    F = [[0.1, 0.9], [0.4, 0.4], [0.9, 0.1], [0.95, 0.95], [NAN, 1], [1, NAN]]
    frame = opened(front_of(F, lost=[5]), title="digits-1")
    assert frame.locator("h1").text_content() == "digits-1"
    facts = frame.locator("#facts").text_content()
    assert facts.startswith("6 members · 2 objectives · 3 non-dominated · 1 lost · 1 not finite · hypervolume ")
    assert " at (1.2, 1.2) · 3000 steps · figures and choices: test split, as this front has no validation" in facts
    assert "Not drawn, values not finite: 4, 5." in frame.locator("#scatter-note").text_content()


def test_test_figures_stand_beside_those_on_validation(opened):
    F = np.array([[0.1, 0.9], [0.4, 0.4], [0.8, 0.2]])
    frame = opened(with_both_splits(F))
    assert chosen(frame) == 1
    rows = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    objectives, metrics = (frame.locator(f"#{name} tr").evaluate_all(rows) for name in ("objectives", "metrics"))
    assert objectives == [
        ["objective", "validation", "test"],
        ["loss_left", "0.4", "0.5"],
        ["loss_right", "0.4", "0.5"],
    ]
    assert metrics[0] == ["metric", "validation", "test"]
    assert metrics[-1] == ["latency", "6", "4.5"]
    (heads,) = frame.locator("#columns").evaluate_all(rows)
    (cells,) = frame.locator('tr[data-member="2"]').evaluate_all(rows)
    assert heads[2:6] == ["loss_left, validation", "loss_left, test", "loss_right, validation", "loss_right, test"]
    assert cells[2:6] == ["0.8", "1", "0.2", "0.25"]
    facts = frame.locator("#facts").text_content()
    exact = f"{hypervolume(F, [1.2, 1.2]):.4g}"
    assert f"hypervolume validation {exact}, test ≈ 0.5 ± 0.012 (estimate), at (1.2, 1.2)" in facts
    assert "figures and choices: validation split; test figures only report" in facts
    assert "loss_left, validation (lower is better)" in frame.locator("#scatter svg").text_content()


def test_estimates_over_steps_have_their_intervals(opened):
    history = [(10, 0.2, 0.05), (20, 0.4, None), (30, 0.5, 0.05)]
    frame = opened(front_of([[0.1, 0.9], [0.9, 0.1]]), history=history)
    bars = "bars => bars.map(bar => Math.abs(bar.getAttribute('y2') - bar.getAttribute('y1')))"
    first, last = frame.locator("#progress .interval").evaluate_all(bars)
    low, high = (
        float(frame.locator("#progress .interval").nth(n).get_attribute(end)) for n, end in ((0, "y1"), (1, "y2"))
    )
    # From 0.15 to 0.55 is all that is drawn; each bar is 0.1 long.
    assert first == pytest.approx(last) == pytest.approx(abs(high - low) / 4)
    assert "bars: 95 % intervals of values that are estimates" in frame.locator("#progress-note").text_content()


def test_two_objectives_have_an_area_and_more_have_none(opened):
    frame = opened(front_of(curved(2, 8)))
    assert frame.locator("#scatter .area").count() == 1
    frame.locator("#x").select_option(label="loss_right")  # which swaps the axes
    assert frame.locator("#y").input_value() == "0"
    assert frame.locator("#scatter .area").count() == 1
    frame = opened(with_metrics(curved(3, 8)))
    assert frame.locator("#scatter .area").count() == 0
    assert "projection of 3 objectives" in frame.locator("#scatter-note").text_content()
    frame.locator("#y").select_option(label="accuracy_left")
    assert "accuracy_left, test (higher is better)" in frame.locator("#scatter svg").text_content()


def test_a_far_member_and_a_far_reference_point_do_not_squash_the_front(opened):
    F = [[0.30, 0.50], [0.40, 0.35], [0.55, 0.30], [40.0, 30.0]]
    frame = opened(front_of(F, reference=[2.5, 2.5]))
    width = frame.locator("#scatter svg").bounding_box()["width"]
    left, right = (
        float(frame.locator(f'#scatter [data-member="{i}"] circle.point').get_attribute("cx")) for i in (0, 2)
    )
    assert right - left > 0.5 * width
    assert "goes on to the reference point (2.5, 2.5)" in frame.locator("#legend").text_content()
    frame.locator('#scatter [data-member="3"] path.point').click()
    assert chosen(frame) == 3


def test_ticks_are_round(opened):
    frame = opened(front_of(curved(2, 8)), width=1400)
    for picture in ("#progress", "#scatter"):
        for anchor in ("end", "middle"):
            texts = frame.locator(f'{picture} text[text-anchor="{anchor}"]:not(.axis)').all_text_contents()
            values = [float(text) for text in texts if text != "step"]
            assert len(values) > 2
            step = values[1] - values[0]
            np.testing.assert_allclose(np.diff(values), step)
            assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
    const boxes = [...svg.querySelectorAll("text")].filter(text => text.textContent).map(text => {
        const {left, top, right, bottom} = text.getBoundingClientRect();
        return {text: text.textContent, left, top: top + 1.5, right, bottom: bottom - 1.5};
    });
    const frame = svg.getBoundingClientRect();
    const outside = boxes.filter(box => box.left < frame.left - 1 || box.right > frame.right + 1);
    const pairs = boxes.flatMap((a, i) => boxes.slice(0, i)
        .filter(b => a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom && b.top < a.bottom)
        .map(b => [a.text, b.text]));
    return [...outside.map(box => ["outside", box.text]), ...pairs];
})"""


def overlaps(frame):
    """What overlaps once the page, which may have been resized just now, has drawn itself anew."""
    deadline = time.monotonic() + 5
    while (found := frame.evaluate(OVERLAPS)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


# What is wider than its box. Names may be, as dots say so.
CUT = """() => [...document.querySelectorAll("section, .bar, .figures td, .figures [scope=col], pre, button")]
    .filter(element => element.scrollWidth > element.clientWidth + 1).map(element => element.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("kind", [with_metrics, with_both_splits])
@pytest.mark.parametrize(("m", "N"), [(2, 8), (3, 12), (7, 12), (2, 64), (7, 64)])
def test_nothing_overlaps_or_overflows(opened, kind, m, N):
    frame = opened(kind(curved(m, N)))
    for width in (900, 420, 1400):
        resize(frame, width)
        assert frame.locator("#scatter .label").count() > 3
        assert overlaps(frame) == []
        assert frame.evaluate(OVERFLOW) <= 0
        assert frame.evaluate(CUT) == []


def test_a_frame_may_start_without_a_width(opened):
    frame = opened(with_metrics(curved(3, 8)), width=1)
    frame.wait_for_selector("#parallel svg", state="attached")
    resize(frame, 900)
    assert overlaps(frame) == []


# The lowest ratio of contrast (WCAG 2) between a text and what is behind it, and whose it is.
CONTRAST = """() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = rgb => rgb.slice(0, 3).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((total, value, k) => total + value * [0.2126, 0.7152, 0.0722][k], 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
    };
    const texts = [...document.querySelectorAll("body *")].filter(element => element.tagName !== "SCRIPT" &&
        element.checkVisibility() && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
    return texts.map(element => {
        const style = getComputedStyle(element);
        const [a, b] = [parse(element.ownerSVGElement ? style.fill : style.color), behind(element)].map(luminance);
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened, scheme):
    F = curved(2, 8, hard=True)
    frame = opened(with_both_splits(F), scheme=scheme)
    frame.get_by_role("button", name="knee").click()
    frame.get_by_label("loss_left at most").fill(repr(float(np.median(F[non_dominated(F), 0]))))
    background = frame.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    ratio, where = frame.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    frame.get_by_label("loss_left at most").fill("-1")
    ratio, where = frame.evaluate(CONTRAST)
    assert ratio >= 4.5, where


# ---------------------------------------------------------------- size, hostile names, strange fronts


def test_the_page_is_small():
    history = [(step, volume, volume / 17) for step, volume in HISTORY]
    for front in (with_metrics(curved(7, 64)), with_both_splits(curved(7, 64))):
        assert len(explorer_page(front, "A run", history, LOADING).encode()) < 100_000


def test_names_are_text_whatever_they_hold(opened):
    names = [
        "</script><script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked = 1'>",
        "損失 \u2028\u2029 \"quoted\" 'and' \\ & {{data}} a very long name without an end",
    ]
    title = "<b onclick=hacked()>" + names[0] + "{{data}}"
    F = curved(3, 8)
    metrics = [{names[1]: 0.5 + i / 10} for i in range(8)]
    loading = Loading(names[0], dict.fromkeys(range(8), names[1]), names[2])
    frame = opened(front_of(F, names, metrics, {names[1]: "higher"}), title=title, loading=loading)
    assert frame.evaluate("typeof window.hacked") == "undefined"
    assert frame.locator("script").count() == 2
    assert frame.locator("img, b").count() == 0
    assert frame.locator("h1").text_content() == title
    assert frame.locator("#sliders label").all_text_contents() == names
    shown = [value for code in frame.locator("#code code").all_text_contents() for value in strings(code)]
    assert set(names) <= set(shown)
    for width in (420, 900):
        resize(frame, width)
        assert frame.evaluate(OVERFLOW) <= 0
        assert overlaps(frame) == []


STRANGE = {
    "one member": [[0.3, 0.4]],
    "one member worse than the reference point": [[3, 4]],
    "one member, three objectives": [[0.3, 0.4, 0.5]],
    "equal values": [[0.3, 0.4]] * 3,
    "zeros": [[0, 0, 0]] * 3,
    "a diverged member": [[NAN, 1], [0.5, 0.8], [np.inf, 0]],
    "huge and negative": [[-1e12, 1e9], [-2e12, 2e9]],
    "tiny differences": [[1.00000001, 2.0], [1.0, 2.00000002]],
    "tiny": [[1e-9, 3e-9], [2e-9, 1e-9]],
    "one objective": [[0.2], [0.1]],
}


@pytest.mark.parametrize("shape", STRANGE)
def test_strange_fronts(opened, shape):
    F = np.asarray(STRANGE[shape], dtype=float)
    frame = opened(front_of(F, metrics=[{"a": 0.5}, {}, {"a": NAN}], directions={"a": "higher", "never": "lower"}))
    assert chosen(frame) == pick(F, np.ones(F.shape[1]))
    assert overlaps(frame) == []
    drawn = int(np.isfinite(F).all(axis=1).sum())
    assert frame.locator("#parallel .mark").count() == drawn
    assert "NaN" not in frame.evaluate("document.body.innerHTML.replace(/<script[^]*?<\\/script>/g, '')")


def test_no_member_is_finite(opened):
    frame = opened(front_of([[NAN, 1], [0, NAN]], lost=[0]), history=[(10, NAN)])
    assert chosen(frame) == "No member to choose"
    assert not frame.locator("#code").is_visible()
    assert frame.locator("#rows tr").count() == 2
    frame.locator('tr[data-member="1"] button').click()
    assert chosen(frame) == 1
    assert "not finite" in frame.locator("#reason").text_content()
    frame.locator('tr[data-member="0"] button').click()
    assert "Its weights were not kept" in frame.locator("#reason").text_content()
    assert 'load_model("runs/my run"' not in frame.locator("#code").text_content()


@pytest.mark.parametrize("history", [[], [(10, NAN), (20, math.inf)], [(10, 0.5)], [(10, 0.5), (20, NAN), (30, 0.5)]])
def test_strange_histories(opened, history):
    frame = opened(front_of([[0.1, 0.9], [0.9, 0.1]]), history=history)
    finite = any(math.isfinite(value) for _, value in history)
    assert frame.locator("#progress .curve").count() == finite
    assert ("No evaluation was recorded." in frame.locator("#progress").text_content()) != finite
