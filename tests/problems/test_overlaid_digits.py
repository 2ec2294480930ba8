import gzip
import itertools
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from popmtl.errors import RequestError
from popmtl.method.problem import to_model
from popmtl.models.shared_trunk import lenet, mlp
from popmtl.problems.overlaid_digits import MultiDigits, MultiMnist, OverlaidDigits


def batch(problem: OverlaidDigits, seed: int = 0) -> tuple[Tensor, Tensor]:
    return next(iter(problem.batches(seed)))


def parts(images: Tensor, size: int) -> tuple[list[bytes], list[bytes]]:
    """The left and right digits as keys, from a canvas on which they do not overlap."""
    assert images.shape[-1] == 2 * size
    left, right = images[:, 0, :size, :size], images[:, 0, size:, size:]
    return [d.numpy().tobytes() for d in left], [d.numpy().tobytes() for d in right]


def splits(problem: OverlaidDigits, train_batches: int) -> dict[str, tuple[Tensor, Tensor]]:
    """All overlays of the held-out splits, and many training batches, as one tensor of images and of labels each."""
    read = {
        "train": list(itertools.islice(problem.batches(0), train_batches)),
        "validation": list(problem.evaluation_batches("validation")),
        "test": list(problem.evaluation_batches("test")),
    }
    return {
        split: (torch.cat([images for images, _ in batches]), torch.cat([digits for _, digits in batches]))
        for split, batches in read.items()
    }


def write_idx(path, array: np.ndarray, magic: bytes | None = None, cut: int = 0) -> None:
    header = magic or bytes([0, 0, 8, array.ndim])
    content = header + b"".join(struct.pack(">I", n) for n in array.shape) + array.astype(np.uint8).tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, name: str = "t10k", count: int = 40, suffix: str = ".gz", seed: int = 0) -> np.ndarray:
    """Random images under random labels; returns the images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", rng.integers(0, 10, count))
    return images


@pytest.fixture(scope="module")
def apart() -> OverlaidDigits:
    """Digits on a canvas so large that they do not overlap, hence can be recovered."""
    return MultiDigits(canvas=16, batch_size=500)


def test_images_and_labels_have_their_shapes():
    images, digits = batch(MultiDigits(canvas=13, batch_size=7))
    assert images.shape == (7, 1, 13, 13)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert digits.shape == (7, 2)
    assert digits.dtype == torch.int64


def test_each_label_is_that_of_the_digit_at_its_place(apart):
    source = load_digits()
    known = {(d / 16).astype(np.float32).tobytes(): int(t) for d, t in zip(source.images, source.target, strict=True)}
    assert len(known) == len(source.images)
    for images, digits in splits(apart, train_batches=2).values():
        left, right = parts(images, 8)
        assert [known[d] for d in left] == digits[:, 0].tolist()
        assert [known[d] for d in right] == digits[:, 1].tolist()


def test_no_digit_image_is_in_two_splits(apart):
    sources = {}
    for split, (images, _) in splits(apart, train_batches=40).items():
        left, right = parts(images, 8)
        # Every source serves on both sides.
        assert len(set(left) & set(right)) > 100
        sources[split] = {*left, *right}
    assert not sources["train"] & sources["validation"]
    assert not sources["train"] & sources["test"]
    assert not sources["validation"] & sources["test"]
    # So many draws miss no training image: 70 % of 1797, and the two 15 % less at most a few.
    assert len(sources["train"]) == 1797 - 2 * 269
    assert 260 < len(sources["validation"]) <= 269
    assert 260 < len(sources["test"]) <= 269


def test_an_overlay_is_the_maximum_of_both_digits(apart):
    images, digits = batch(apart)
    closer, same_digits = batch(MultiDigits(canvas=11, batch_size=500))
    expected = torch.zeros(500, 1, 11, 11)
    expected[:, :, :8, :8] = images[:, :, :8, :8]
    expected[:, :, 3:, 3:] = torch.maximum(expected[:, :, 3:, 3:], images[:, :, 8:, 8:])
    assert torch.equal(digits, same_digits)
    assert torch.equal(closer, expected)


def test_a_seed_decides_its_stream_and_every_batch_is_new():
    first = list(itertools.islice(MultiDigits().batches(3), 5))
    again = list(itertools.islice(MultiDigits().batches(3), 5))
    for (images, digits), (same_images, same_digits) in zip(first, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(digits, same_digits)
    for (images, _), (others, _) in itertools.combinations(first, 2):
        assert not torch.equal(images, others)
    assert not torch.equal(first[0][0], batch(MultiDigits(), seed=4)[0])


def test_streams_do_not_touch_each_other_or_torchs_own_generator():
    problem = MultiDigits()
    alone = [digits for _, digits in itertools.islice(problem.batches(1), 4)]
    one, other = problem.batches(1), problem.batches(2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    beside = [pair[0][1] for pair in itertools.islice(zip(one, other, strict=True), 4)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(torch.stack(alone), torch.stack(beside))


def test_evaluation_is_the_same_at_every_call_and_in_every_instance():
    problem, twin, other = MultiDigits(pairs=2300), MultiDigits(pairs=2300), MultiDigits(pairs=2300, data_seed=1)
    first = list(problem.evaluation_batches("test"))
    assert [len(images) for images, _ in first] == [1000, 1000, 300]
    batch(problem)
    for again in (problem.evaluation_batches("test"), twin.evaluation_batches("test")):
        for (images, digits), (same_images, same_digits) in zip(first, again, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(digits, same_digits)
    assert not torch.equal(first[0][0], next(iter(problem.evaluation_batches("validation")))[0])
    assert not torch.equal(first[0][0], next(iter(other.evaluation_batches("test")))[0])


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_the_cross_entropies_and_continue_from_the_representation(name, dtype):
    problem = MultiDigits(model=name, hidden=24)
    model = problem.model().to(dtype)
    images, digits = moved = to_model(batch(problem), next(model.parameters()))
    logits = model(images)
    assert logits.shape == (16, 2, 10)
    losses = problem.losses(model, moved)
    expected = [functional.cross_entropy(logits[:, task], digits[:, task]) for task in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert losses.dtype == dtype

    representation = problem.representation(model, moved)
    assert representation.shape == (16, 24)
    assert torch.equal(problem.losses_at(model, representation, moved), losses)

    # The left loss reaches the trunk and the left head, not the right one.
    left = torch.autograd.grad(losses[0], list(model.parameters()))
    reached = {key for (key, _), g in zip(model.named_parameters(), left, strict=True) if g.any()}
    assert reached == {key for key, _ in model.named_parameters() if not key.startswith("heads.1.")}


class LeftOnly(nn.Module):
    """Knows the left digit of each image of a batch, and answers 0 for the right one."""

    def __init__(self, digits: Tensor) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, images: Tensor) -> Tensor:
        guess = torch.stack([self.digits[:, 0], torch.zeros(len(images), dtype=torch.int64)], 1)
        return functional.one_hot(guess, 10).float()


def test_accuracy_is_the_share_of_right_digits():
    problem = MultiDigits(batch_size=64)
    images, digits = batch(problem)
    measured = problem.measure(LeftOnly(digits), (images, digits))
    assert set(measured) == set(problem.metrics)
    assert measured["accuracy_left"] == 1
    assert 0 < measured["accuracy_right"] == (digits[:, 1] == 0).float().mean() < 1


def test_a_short_training_learns_both_tasks():
    torch.manual_seed(0)
    problem = MultiDigits(batch_size=64)
    model = problem.model()
    before = problem.evaluate(model, "test")
    assert (before.objectives < torch.tensor(problem.reference_point)).all()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for moved in itertools.islice(problem.batches(0), 300):
        optimizer.zero_grad()
        problem.losses(model, moved).mean().backward()
        optimizer.step()
    after = problem.evaluate(model, "test")
    assert min(after.metrics.values()) > 0.8
    assert (after.objectives < 0.7).all()


@pytest.mark.parametrize("architecture", [mlp, lenet])
@pytest.mark.parametrize("canvas", [4, 15, 16, 36])
def test_models_take_any_canvas_and_any_number_of_tasks(architecture, canvas):
    model = architecture(canvas, hidden=12, tasks=3, classes=7)
    images = torch.rand(5, 1, canvas, canvas)
    assert model(images).shape == (5, 3, 7)
    assert torch.equal(model(images), model.decode(model.encode(images)))


def test_the_example_input_is_two_images_that_the_model_takes():
    problem = MultiDigits(model="lenet", canvas=10)
    example = problem.example_input()
    assert example.shape == (2, 1, 10, 10)
    assert problem.model()(example).shape == (2, 2, 10)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"model": "lennet"}, "model is 'lennet', and must be one of: mlp, lenet"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"pairs": -1}, "pairs is -1"),
        ({"canvas": 7}, "canvas is 7, smaller than a digit, which has 8 pixels"),
    ],
)
def test_impossible_parameters_are_refused_by_name(parameters, named):
    with pytest.raises(RequestError, match=named):
        MultiDigits(**parameters)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_plain_and_packed(tmp_path, suffix):
    images = write_mnist(tmp_path, suffix=suffix)
    left, right = parts(batch(MultiMnist(str(tmp_path), canvas=56, batch_size=200))[0], 28)
    assert {*left, *right} < {(image / np.float32(255)).tobytes() for image in images}


def test_mnist_pools_both_sets(tmp_path):
    sets = [write_mnist(tmp_path, name="train", count=30, seed=1), write_mnist(tmp_path, count=40, seed=2)]
    left, right = parts(batch(MultiMnist(str(tmp_path), canvas=56, batch_size=500))[0], 28)
    for images in sets:
        assert {*left, *right} & {(image / np.float32(255)).tobytes() for image in images}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"no folder .*absent; it must hold IDX files such as t10k-images-idx3"):
        MultiMnist(str(tmp_path / "absent"))


def test_a_folder_without_mnist_is_named(tmp_path):
    with pytest.raises(RequestError, match=rf"{tmp_path.name} holds no MNIST; .*t10k-labels-idx1-ubyte.gz"):
        MultiMnist(str(tmp_path))


@pytest.mark.parametrize("missing", ["train-labels-idx1-ubyte", "train-images-idx3-ubyte"])
def test_half_a_set_is_refused(tmp_path, missing):
    write_mnist(tmp_path)
    write_mnist(tmp_path, name="train")
    (tmp_path / f"{missing}.gz").unlink()
    with pytest.raises(RequestError, match=rf"neither .*{missing} nor {missing}.gz"):
        MultiMnist(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fault", [{"cut": 1}, {"cut": 40 * 28 * 28 + 14}, {"magic": b"\0\0\x0d\x03"}])
def test_a_broken_idx_file_is_named(tmp_path, suffix, fault):
    images = write_mnist(tmp_path, suffix=suffix)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images, **fault)
    with pytest.raises(RequestError, match=f"t10k-images-idx3-ubyte{suffix} is not a whole IDX file"):
        MultiMnist(str(tmp_path))


@pytest.mark.parametrize("harm", [lambda content: content[:-9], lambda content: b"PK" + content[2:]])
def test_a_broken_gzip_file_is_named(tmp_path, harm):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(RequestError, match=r"t10k-images-idx3-ubyte.gz cannot be read"):
        MultiMnist(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [(np.zeros(39), "40 images, but 39 labels"), (np.full(40, 11), "labels up to 11, which are not digits")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, complaint):
    write_mnist(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    with pytest.raises(RequestError, match=complaint):
        MultiMnist(str(tmp_path))


def test_too_few_images_are_refused(tmp_path):
    write_mnist(tmp_path, count=3)
    with pytest.raises(RequestError, match="3 digit images are too few"):
        MultiMnist(str(tmp_path))


def test_the_real_mnist(shared_data):
    problem = MultiMnist(str(shared_data / "mnist"), canvas=56)
    assert batch(problem)[0].shape == (16, 1, 56, 56)
    evaluated = list(problem.evaluation_batches("validation"))
    assert [len(images) for images, _ in evaluated] == [1000, 1000]
    # Each digit of MNIST's test set is between 8.9 % and 11.4 % of it.
    share = torch.cat([digits for _, digits in evaluated]).flatten().bincount() / 4000
    assert share.shape == (10,)
    assert share.min() > 0.06
    assert share.max() < 0.15
    # A one is the digit with the least ink.
    ink = torch.cat([images[:, 0, :28, :28].mean((1, 2)) for images, _ in evaluated])
    left = torch.cat([digits[:, 0] for _, digits in evaluated])
    assert int(torch.stack([ink[left == digit].mean() for digit in range(10)]).argmin()) == 1
