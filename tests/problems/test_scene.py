"""Scene understanding on small generated scenes in MTAN's layout."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import write_scenes
from scipy.special import logsumexp
from torch.nn import functional

from popmtl.config import load_config
from popmtl.distributed.plan import NAME, check_problem, make_plan, train_in_process
from popmtl.errors import RequestError
from popmtl.method.fine_tuning import AlignedRecipe
from popmtl.method.mtgd import Recipe
from popmtl.problems.dense import Depth, Instance, Normals, Segmentation
from popmtl.problems.registry import load_problem
from popmtl.problems.scene import Cityscapes, Nyuv2
from popmtl.problems.scene_files import mirrored, zoomed

SMALL = {"width": 4, "validation": 0.34}
NODE = [{"CPU": 1.0}]


@pytest.fixture(scope="module")
def nyuv2(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("nyuv2"))


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("cityscapes"), classes=7, labels="label_7", instance=True)


@pytest.fixture
def spoiled(nyuv2, tmp_path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(nyuv2, tmp_path / "data"))


def problem_of(path, **parameters) -> Nyuv2:
    return Nyuv2(str(path), **{**SMALL, **parameters})


def raw(path: Path, split: str) -> list[dict[str, np.ndarray]]:
    """The files of a split as they are."""
    folders = list((path / split).iterdir())
    count = len(list(folders[0].iterdir()))
    return [{folder.name: np.load(folder / f"{i}.npy") for folder in folders} for i in range(count)]


def predictions(problem, model, split: str) -> dict[str, np.ndarray]:
    """Predictions and targets of a whole split, by objective, in float64: (outputs, targets)."""
    found: dict[str, list] = {}
    with torch.no_grad():
        for batch in problem.evaluation_batches(split):
            for name, output in model(batch["image"]).items():
                found.setdefault(name, []).append((output.double().numpy(), batch[name].numpy()))
    return {name: tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True)) for name, pairs in found.items()}


def scrambled(problem):
    """A model in eval mode whose outputs vary."""
    torch.manual_seed(0)
    model = problem.model()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def test_batches_have_their_shapes_and_types(nyuv2):
    batch = next(problem_of(nyuv2).batches(0))
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in batch.items()}
    assert shapes == {
        "image": ((2, 3, 32, 64), torch.float32),
        "segmentation": ((2, 32, 64), torch.int64),
        "depth": ((2, 1, 32, 64), torch.float32),
        "normals": ((2, 3, 32, 64), torch.float32),
    }


def test_files_are_read_as_they_are(nyuv2):
    problem = problem_of(nyuv2, batch_size=1)
    for batch, files in zip(problem.evaluation_batches("test"), raw(nyuv2, "val"), strict=True):
        np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0), files["image"])
        np.testing.assert_array_equal(batch["segmentation"][0], files["label"])
        np.testing.assert_array_equal(batch["depth"][0, 0], files["depth"][..., 0])
        np.testing.assert_array_equal(batch["normals"][0].permute(1, 2, 0), files["normal"])


def test_files_are_mapped_and_never_unpickled(nyuv2, monkeypatch):
    calls = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: calls.append(kwargs) or load(*args, **kwargs))
    next(problem_of(nyuv2).batches(0))
    assert calls
    assert all(kwargs == {"mmap_mode": "r", "allow_pickle": False} for kwargs in calls)


def test_each_image_is_in_one_split(nyuv2):
    problem = problem_of(nyuv2, augment=False)
    images = {
        "train": [b["image"] for b in itertools.islice(problem.batches(0), 2)],
        "validation": [b["image"] for b in problem.evaluation_batches("validation")],
        "test": [b["image"] for b in problem.evaluation_batches("test")],
    }
    keys = {split: [one.numpy().tobytes() for one in torch.cat(parts)] for split, parts in images.items()}
    assert {split: len(set(found)) for split, found in keys.items()} == {"train": 4, "validation": 2, "test": 2}
    # An epoch has every training image once; train and validation are the files of train, test those of val.
    files = {split: {np.moveaxis(m["image"], -1, 0).tobytes() for m in raw(nyuv2, split)} for split in ("train", "val")}
    assert {*keys["train"], *keys["validation"]} == files["train"]
    assert set(keys["test"]) == files["val"]
    held = {
        seed: next(problem_of(nyuv2, data_seed=seed).evaluation_batches("validation"))["image"] for seed in range(6)
    }
    assert torch.equal(held[0], images["validation"][0])
    assert any(not torch.equal(held[0], other) for other in held.values())


def test_the_seed_alone_decides_order_and_augmentation(nyuv2):
    problem = problem_of(nyuv2)
    before = torch.get_rng_state()
    streams = {}
    for name, seed in {"first": 3, "again": 3, "other": 4}.items():
        torch.manual_seed(len(streams))
        streams[name] = list(itertools.islice(problem.batches(seed), 6))
    torch.set_rng_state(before)
    for one, again in zip(streams["first"], streams["again"], strict=True):
        assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(
        not torch.equal(a["image"], b["image"]) for a, b in zip(*map(streams.get, ("first", "other")), strict=True)
    )
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(problem.batches(3))
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_keeps_targets_at_their_pixels(nyuv2):
    """The class is in the colour, and depth follows from class and row, whatever was done to the scene."""
    scales, signs = set(), set()
    plain = problem_of(nyuv2, augment=False)._files.read(0)
    for batch in itertools.islice(problem_of(nyuv2).batches(0), 30):
        for image, label, depth in zip(batch["image"], batch["segmentation"], batch["depth"], strict=True):
            valid = label >= 0
            assert ((image[0] * 13).round() == label)[valid].float().mean() > 0.75
            # Row and column in the image say how it was brought nearer and mirrored.
            step = float(image[2, 0, 1:].sub(image[2, 0, :-1]).mean()) / float(plain["image"][2, 0, 1])
            scale = min((1.0, 1.2, 1.5), key=lambda s: abs(abs(step) - 1 / s))
            scales.add(scale)
            signs.add(step > 0)
            expected = (1 + 2 * label / 13 + image[1]) / scale
            there = valid & (depth[0] > 0)
            assert ((depth[0] - expected).abs() < 1 / 32)[there].float().mean() > 0.95
    assert scales == {1.0, 1.2, 1.5}
    assert signs == {True, False}


def test_mirroring_turns_normals_and_offsets(cityscapes, nyuv2):
    scene = problem_of(nyuv2)._files.read(0)
    flipped = mirrored(scene)
    np.testing.assert_array_equal(flipped["normals"][0], -scene["normals"][0].numpy()[:, ::-1])
    np.testing.assert_array_equal(flipped["normals"][1:], scene["normals"][1:].numpy()[..., ::-1])
    np.testing.assert_array_equal(flipped["segmentation"], scene["segmentation"].numpy()[:, ::-1])
    again = mirrored(flipped)
    assert all(torch.equal(again[name], values) for name, values in scene.items())
    offsets = mirrored(Cityscapes(str(cityscapes), instance=True, batch_size=2, **SMALL)._files.read(0))["instance"]
    assert_centres(offsets, [3.5 + 8 * i for i in range(4)], [3.5 + 8 * i for i in range(8)], 1e-4)


def assert_centres(offsets, rows, columns, tolerance):
    """Each pixel less its offset is one of the known centres."""
    valid = (offsets != 250).all(0)
    assert valid.any()
    assert not (offsets == -250).any()
    for axis, centres in enumerate((rows, columns)):
        pixels = torch.arange(offsets.shape[axis + 1], dtype=torch.float32)
        pixels = pixels[:, None] if axis == 0 else pixels[None]
        found = (pixels - offsets[axis])[valid]
        assert (found[:, None] - torch.tensor(centres)).abs().amin(1).max() <= tolerance


@pytest.mark.parametrize("scale", [1.2, 1.5])
def test_bringing_nearer_divides_depth_and_multiplies_offsets(cityscapes, scale):
    scene = Cityscapes(str(cityscapes), instance=True, batch_size=2, **SMALL)._files.read(1)
    size = (32, 64)
    height, width = int(size[0] / scale), int(size[1] / scale)
    piece = {name: values[..., :height, :width] for name, values in scene.items()}
    near = zoomed(piece, size, scale)
    assert all(near[name].shape == values.shape for name, values in scene.items())
    # An independent nearest-neighbour enlargement.
    enlarge = {name: functional.interpolate(piece[name][None].double(), size)[0] for name in ("depth", "instance")}
    torch.testing.assert_close(near["depth"].double(), enlarge["depth"] / scale)
    classes = functional.interpolate(piece["segmentation"][None, None].double(), size)[0, 0]
    assert torch.equal(near["segmentation"].double(), classes)
    assert torch.equal(near["instance"] == 250, enlarge["instance"] == 250)
    there = near["instance"] != 250
    torch.testing.assert_close(near["instance"].double()[there], enlarge["instance"][there] * scale)
    # Pixels and centres move alike, to within the pixel that the nearest one is off.
    rows, columns = ([scale * (3.5 + 8 * i) for i in range(count)] for count in (4, 8))
    assert_centres(near["instance"], rows, columns, 2)


@pytest.mark.parametrize(
    ("task", "shape", "target"),
    [
        (Segmentation(4), (2, 4, 3, 5), lambda: torch.randint(-1, 4, (2, 3, 5))),
        (Depth(), (2, 1, 3, 5), lambda: torch.rand(2, 1, 3, 5) * torch.randint(2, (2, 1, 3, 5))),
        (Normals(), (2, 3, 3, 5), lambda: torch.randn(2, 3, 3, 5) * torch.randint(2, (2, 1, 3, 5))),
        (Instance(), (2, 2, 3, 5), lambda: torch.where(torch.rand(2, 1, 3, 5) < 0.5, 250.0, torch.randn(2, 2, 3, 5))),
    ],
    ids=["segmentation", "depth", "normals", "instance"],
)
def test_gradients_of_the_losses(task, shape, target):
    torch.manual_seed(0)
    truth = target()
    truth = truth.double() if truth.is_floating_point() else truth
    prediction = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: task.loss(p, truth), prediction)
    # Pixels without a truth have no gradient, whatever is predicted there.
    task.loss(prediction, truth).backward()
    invalid = {
        Segmentation: lambda: truth == -1,
        Depth: lambda: truth[:, 0] == 0,
        Normals: lambda: (truth == 0).all(1),
        Instance: lambda: truth[:, 0] == 250,
    }[type(task)]()
    assert 0 < invalid.sum() < invalid.numel()
    gradient = prediction.grad.abs().sum(1)
    assert (gradient[invalid] == 0).all()
    assert (gradient[~invalid] > 0).all()


@pytest.mark.parametrize(
    ("task", "channels", "truth"),
    [
        (Segmentation(4), 4, torch.full((1, 2, 2), -1)),
        (Depth(squared=True), 1, torch.zeros(1, 1, 2, 2)),
        (Normals(), 3, torch.zeros(1, 3, 2, 2)),
        (Instance(), 2, torch.full((1, 2, 2, 2), 250.0)),
    ],
    ids=["segmentation", "depth", "normals", "instance"],
)
def test_a_batch_without_a_valid_pixel_has_no_loss_and_no_figure(task, channels, truth):
    prediction = torch.randn(1, channels, 2, 2, requires_grad=True)
    loss = task.loss(prediction, truth)
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()
    tally = task.tally()
    tally.add(prediction.detach(), truth)
    figures = tally.figures()
    assert set(figures) == set(task.metrics)
    assert all(math.isnan(value) for value in figures.values())


def expected_segmentation(outputs, labels):
    """Loss, mIoU and pixel accuracy by loops over pixels' classes, in numpy."""
    valid = labels >= 0
    logits = np.moveaxis(outputs, 1, -1)[valid]
    truth = labels[valid]
    entropy = logsumexp(logits, -1) - logits[np.arange(len(truth)), truth]
    guess = logits.argmax(-1)
    overlaps = []
    for c in range(outputs.shape[1]):
        union = ((guess == c) | (truth == c)).sum()
        if union:
            overlaps.append(((guess == c) & (truth == c)).sum() / union)
    return entropy.mean(), {"miou": np.mean(overlaps), "pixel_accuracy": (guess == truth).mean()}


def expected_depth(outputs, truth):
    valid = truth != 0
    error = np.abs(outputs - truth)[valid]
    figures = {"absolute_error": error.mean(), "relative_error": (error / truth[valid]).mean()}
    return error.mean(), {**figures, "disparity_mse": (error**2).mean()}


def expected_normals(outputs, truth):
    p, t = (np.moveaxis(one, 1, -1)[(truth != 0).any(1)] for one in (outputs, truth.astype(np.float64)))
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    figures = {"angle_mean": angle.mean(), "angle_median": np.median(angle)}
    return (1 - cosine).mean(), figures | {f"within_{limit}": (angle < limit).mean() for limit in (11.25, 22.5, 30)}


def expected_instance(outputs, truth):
    valid = truth != 250
    figures = {"instance_l1": np.abs(outputs[valid].astype(int) - truth[valid].astype(int)).mean()}
    return np.abs(outputs - truth)[valid].mean(), figures


ORACLES = {
    "segmentation": expected_segmentation,
    "depth": expected_depth,
    "normals": expected_normals,
    "instance": expected_instance,
}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "cityscapes_small"])
def test_figures_are_those_of_the_whole_split(request, tmp_path, name, batch_size, split):
    """Against numpy; and they do not depend on how the split falls into batches."""
    if name == "nyuv2":
        write_scenes(tmp_path, train=9, val=5)
        problem = Nyuv2(str(tmp_path), batch_size=batch_size, width=4, validation=0.5)
    else:
        write_scenes(tmp_path, train=9, val=5, classes=7, instance=True)
        model = "pspnet" if name == "cityscapes_small" else "segnet"
        problem = Cityscapes(str(tmp_path), instance=True, model=model, batch_size=batch_size, width=4, validation=0.5)
    model = scrambled(problem)
    evaluation = problem.evaluate(model, split)
    assert set(evaluation.metrics) == set(problem.metrics)
    for k, (task, (outputs, truth)) in enumerate(predictions(problem, model, split).items()):
        if name == "cityscapes_small":
            assert outputs.shape[-2:] == (4, 8)
            truth = truth[..., ::8, ::8]
        loss, figures = ORACLES[task](outputs, truth)
        assert problem.objectives[k] == task
        assert float(evaluation.objectives[k]) == pytest.approx(loss, rel=1e-5)
        for figure, value in figures.items():
            if figure in problem.metrics:
                assert evaluation.metrics[figure] == pytest.approx(value, rel=1e-4, abs=1e-6), figure


def test_tasks_name_the_figures_that_measure_them(nyuv2, cityscapes):
    two, three = (Cityscapes(str(cityscapes), instance=instance, batch_size=2, **SMALL) for instance in (False, True))
    for problem in (problem_of(nyuv2), two, three):
        assert tuple(problem.tasks) == problem.objectives
        named = [figure for figures in problem.tasks.values() for figure in figures]
        assert len(set(named)) == len(named)
        assert set(named) <= set(problem.metrics)
        assert len(problem.reference_point) == len(problem.ideal_point) == len(problem.objectives)
        assert all(NAME.fullmatch(name) for name in (*problem.objectives, *problem.metrics))
    # The nine figures of NYUv2 (three tasks), and the four of Cityscapes with two.
    assert [len(figures) for figures in problem_of(nyuv2).tasks.values()] == [2, 2, 5]
    assert [len(figures) for figures in two.tasks.values()] == [2, 2]
    assert three.tasks == {"segmentation": ("miou",), "depth": ("disparity_mse",), "instance": ("instance_l1",)}


@pytest.mark.parametrize("model", ["segnet", "pspnet"])
def test_the_losses_continue_from_the_representation(nyuv2, model):
    problem = problem_of(nyuv2, model=model)
    network, batch = scrambled(problem), next(problem.batches(0))
    representation = problem.representation(network, batch)
    assert torch.equal(problem.losses_at(network, representation, batch), problem.losses(network, batch))


@pytest.mark.parametrize("model", ["segnet", "mtan", "pspnet"])
def test_heads_are_each_tasks_own_and_the_rest_is_shared(nyuv2, model):
    problem = problem_of(nyuv2, model=model)
    network, batch = scrambled(problem), next(problem.batches(0))
    named = dict(network.named_parameters())
    assert set(named) - problem.shared(network) == {name for name in named if name.startswith("heads.")}
    for k, loss in enumerate(problem.losses(network.train(), batch)):
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        reached = {name for name, g in zip(named, gradients, strict=True) if g is not None and g.any()}
        assert {name.split(".")[1] for name in reached if name.startswith("heads.")} == {problem.objectives[k]}
        assert all(problem.transfers(name) for name in named)


def test_mtan_has_no_representation_and_says_so(nyuv2):
    problem = problem_of(nyuv2, model="mtan")
    recipe = Recipe(optimizer=torch.optim.Adam)
    aligned = AlignedRecipe(1, torch.optim.Adam, variant="ub")
    with pytest.raises(
        RequestError, match=r"mtan has no one representation .*fine_tune.variant ub .*take variant exact"
    ):
        check_problem("nyuv2", problem, np.full((1, 3), 1 / 3), recipe, aligned)


def plan_of(path, *overrides):
    return make_plan(
        load_config("configs/nyuv2.yaml", [f"problem.path={path}", "problem.validation=0.34", *overrides]), NODE
    )


def test_batchnorm_trains_under_transfer(tmp_path):
    """Its running statistics stay with each model, while all its parameters are mixed at every step."""
    write_scenes(tmp_path, train=24, classes=3)
    overrides = [
        *(f"problem.path={tmp_path}", "problem.model=segnet", "problem.classes=3", "problem.batch_size=4"),
        *("problem.width=8", "population.subproblems=3", "train.steps=40", "train.evaluate_every=20"),
        *("train.optimizer.lr=0.01", "train.lr_schedule=null"),
        *("transfer.strength=0.5", "transfer.schedule=constant", "fine_tune.steps=0"),
    ]
    plan = make_plan(load_config("configs/cityscapes.yaml", overrides), NODE)
    assert plan.transferring == plan.parameters
    population = train_in_process(plan)
    F = np.stack([observation.F for observation in population.history])
    assert np.isfinite(F).all()
    # The losses in eval mode, hence with running statistics, on scenes that were not trained on.
    assert (F[-1] < 0.6 * F[0]).all()
    layout, models = population.block.layout, population.block.models
    statistics = [dict(model.named_buffers()) for model in models]
    means = [name for name in statistics[0] if name.endswith("running_mean")]
    assert means
    assert not any(name in layout.names for name in statistics[0])
    for one, other in itertools.combinations(statistics, 2):
        assert all(not torch.equal(one[name], other[name]) for name in means)
    assert all(int(one["trunk.encoder.0.first.1.num_batches_tracked"]) == 40 for one in statistics)


@pytest.mark.parametrize(
    ("model", "variant"),
    [("segnet", "exact"), ("segnet", "ub"), pytest.param("mtan", "exact", marks=pytest.mark.slow), ("pspnet", "ub")],
)
def test_every_model_goes_through_both_stages(nyuv2, model, variant):
    plan = plan_of(
        nyuv2,
        *(f"problem.model={model}", "problem.width=4", "population.subproblems=3"),
        *("train.steps=2", "train.evaluate_every=2", "fine_tune.steps=2", f"fine_tune.variant={variant}"),
    )
    population = train_in_process(plan)
    assert len(population.fine_tuned) == 3
    assert all(math.isfinite(one.after) and one.condition >= 1 for one in population.fine_tuned)
    assert np.isfinite(population.history[-1].F).all()


def test_a_plan_evaluates_one_batch(tmp_path, monkeypatch):
    """A whole split would take minutes on a CPU, before anything is trained."""
    write_scenes(tmp_path, train=10)
    sizes = []
    measure = Nyuv2.evaluate

    def evaluate(problem, model, split):
        sizes.append([len(batch["image"]) for batch in problem.evaluation_batches(split)])
        return measure(problem, model, split)

    monkeypatch.setattr(Nyuv2, "evaluate", evaluate)
    plan_of(tmp_path, "problem.model=segnet", "problem.width=2", "problem.validation=0.5")
    assert {tuple(found) for found in sizes} == {(2,)}


@pytest.mark.parametrize("instance", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_config_of_cityscapes_is_a_plan(cityscapes, instance):
    overrides = [f"problem.path={cityscapes}", "problem.validation=0.34", "problem.width=4", "problem.batch_size=2"]
    overrides += [f"problem.instance={str(instance).lower()}", "population.subproblems=3"]
    plan = make_plan(load_config("configs/cityscapes.yaml", overrides), NODE)
    assert plan.objectives == ("segmentation", "depth", "instance")[: 2 + instance]


def test_labels_of_cityscapes_come_by_the_number_of_classes_or_plain(tmp_path):
    write_scenes(tmp_path, classes=19, labels="label_19")
    shutil.copytree(write_scenes(tmp_path / "other", classes=7) / "train" / "label", tmp_path / "train" / "label")
    shutil.copytree(tmp_path / "other" / "val" / "label", tmp_path / "val" / "label")
    fine, coarse = (Cityscapes(str(tmp_path), classes=classes, batch_size=2, **SMALL) for classes in (19, 7))
    assert max(int(batch["segmentation"].max()) for batch in fine.evaluation_batches("test")) == 18
    assert max(int(batch["segmentation"].max()) for batch in coarse.evaluation_batches("test")) == 6


@pytest.mark.parametrize("void", [250, 255])
def test_cityscapes_own_void_is_ignored(spoiled, void):
    for file in spoiled.glob("*/label/*.npy"):
        labels = np.load(file)
        np.save(file, np.where(labels < 0, void, labels).astype(np.uint8))
    batch = next(problem_of(spoiled).evaluation_batches("test"))
    assert (batch["segmentation"] == -1).sum() == 128


def test_the_example_input_is_two_images_that_the_model_takes(nyuv2):
    problem = problem_of(nyuv2, model="pspnet")
    example = problem.example_input()
    assert example.shape == (2, 3, 32, 64)
    assert problem.model()(example)["normals"].shape == (2, 3, 32, 64)


def test_weights_start_the_trunk_of_pspnet(nyuv2, tmp_path):
    torch.manual_seed(5)
    network = problem_of(nyuv2, model="pspnet", width=64).model()
    torch.save(network.trunk.state_dict(), tmp_path / "resnet50.pth")
    torch.manual_seed(6)
    started = problem_of(nyuv2, model="pspnet", width=64, weights=str(tmp_path / "resnet50.pth")).model()
    assert torch.equal(started.trunk.layer4[2].conv3.weight, network.trunk.layer4[2].conv3.weight)
    assert not torch.equal(started.heads["depth"].last[0].weight, network.heads["depth"].last[0].weight)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "resnet"}, "model is 'resnet', and must be one of: segnet, mtan, pspnet"),
        ({"batch_size": 0}, "batch_size for segnet is 0, and must be at least 1"),
        ({"batch_size": 1, "model": "pspnet"}, "batch_size for pspnet is 1, and must be at least 2"),
        ({"width": 0}, "width is 0, and must be at least 1"),
        ({"weights": "resnet50.pth"}, "weights are those of ResNet-50: they need model pspnet and width 64"),
        ({"weights": "absent.pth", "model": "pspnet", "width": 64}, "weights absent.pth: there is no such file"),
        ({"validation": 0.0}, "validation 0.0 of 6 training images"),
        ({"validation": 0.9}, "a batch of 2 be left"),
    ],
)
def test_impossible_parameters_are_refused_by_name(nyuv2, parameters, message):
    with pytest.raises(RequestError, match=message):
        problem_of(nyuv2, **parameters)


def save(name, values):
    return lambda path: np.save(path / name, values)


def cut(path):
    file = path / "train/depth/0.npy"
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: shutil.rmtree(path),
            r"no folder .*train/image; get the preprocessed NYUv2 from github.com/lorenmt",
        ),
        (
            lambda path: shutil.rmtree(path / "val/normal"),
            r"no folder .*val/normal; get .*layout is <path>/\{train,val\}/",
        ),
        (lambda path: (path / "train/depth/3.npy").unlink(), r"train/depth must hold 0.npy to 5.npy, .* by 3.npy"),
        (lambda path: (path / "val/image/0.npy").unlink(), r"val/image must hold 0.npy to 0.npy, .* by 0.npy"),
        (lambda path: [f.unlink() for f in (path / "val/image").iterdir()], r"val/image holds no .npy file; get"),
        (
            save("train/depth/0.npy", np.zeros((32, 64))),
            r"0.npy has shape \(32, 64\), and must have \(height, width, 1\)",
        ),
        (save("train/image/0.npy", np.zeros((3, 32, 64))), r"\(3, 32, 64\), and must have \(height, width, 3\)"),
        (save("val/label/0.npy", np.zeros((32, 32))), r"val/label/0.npy is of 32 × 32 pixels, and the .* of 32 × 64"),
        (save("train/image/0.npy", np.zeros((32, 64, 3), np.uint8)), r"holds uint8; images are floating-point"),
        (save("val/label/0.npy", np.array([{}])), r"val/label/0.npy cannot be read as a .npy file"),
        (cut, r"train/depth/0.npy cannot be read as a .npy file"),
    ],
)
def test_data_of_another_layout_is_refused(spoiled, spoil, message):
    spoil(spoiled)
    with pytest.raises(RequestError, match=message):
        problem_of(spoiled)


def test_a_class_that_there_is_not_is_named(spoiled):
    np.save(spoiled / "val/label/1.npy", np.full((32, 64), 13))
    with pytest.raises(RequestError, match=r"val/label/1.npy has class 13; classes are 0 to 12, and -1"):
        list(problem_of(spoiled).evaluation_batches("test"))


def test_a_scene_of_another_size_is_named(spoiled):
    for folder, trailing in {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}.items():
        np.save(spoiled / "val" / folder / "1.npy", np.zeros((64, 64, *trailing), np.float32))
    with pytest.raises(RequestError, match=r"val/image/1.npy is of 64 × 64 pixels"):
        list(problem_of(spoiled).evaluation_batches("test"))


def test_images_that_a_model_cannot_halve_are_refused(tmp_path):
    write_scenes(tmp_path, size=(40, 64))
    with pytest.raises(RequestError, match=r"images of 40 × 64 .*; model mtan takes .* multiples of 32"):
        problem_of(tmp_path, model="mtan")
    assert problem_of(tmp_path, model="pspnet").example_input().shape[-2:] == (40, 64)


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_a_path_without_data_says_where_to_get_it(name, tmp_path):
    with pytest.raises(RequestError, match=r"no folder .*github.com/lorenmt/mtan; the layout is"):
        load_problem(name, {"path": str(tmp_path / "absent")})
