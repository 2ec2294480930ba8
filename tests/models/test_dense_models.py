"""The networks of dense tasks: their shapes, and how many parameters they have by other people's count."""

import copy
import io

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from popmtl.errors import RequestError
from popmtl.method.flat import Layout
from popmtl.models.mtan import Mtan
from popmtl.models.pspnet import DilatedResNet50, PspNet
from popmtl.models.segnet import SegNet

NYUV2 = {"segmentation": 13, "depth": 1, "normals": 3}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolution(inputs: int, outputs: int, side: int) -> int:
    """Parameters of a convolution with a bias."""
    return outputs * (inputs * side**2 + 1)


def test_segnet_with_one_task_has_as_many_parameters_as_mtan_says():
    # Every model of github.com/lorenmt/mtan, im2im_pred, prints its size relative to this: the single-task SegNet.
    assert count(SegNet({"segmentation": 13})) == 24_981_069


def test_segnet_split_has_a_head_more_a_task():
    heads = sum(convolution(64, 64, 3) + convolution(64, channels, 1) for channels in (1, 3))
    assert count(SegNet(NYUV2)) == 24_981_069 + heads == 25_055_185


def test_mtan_has_the_attention_of_its_code_on_top():
    # No absolute figure is published; derived from the shapes in model_segnet_mtan.py, without its three logsigma.
    widths = (64, 128, 256, 512, 512)

    def mask(inputs: int, outputs: int) -> int:
        return convolution(inputs, outputs, 1) + convolution(outputs, outputs, 1) + 4 * outputs

    def link(inputs: int, outputs: int) -> int:
        return convolution(inputs, outputs, 3) + 2 * outputs

    encoder = mask(64, 64) + sum(mask(2 * w, w) for w in widths[1:])
    decoder = mask(128, 64) + sum(mask(a + b, b) for a, b in zip(widths[1:], widths, strict=False))
    links = [(64, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    links += [(64, 64), (128, 64), (256, 128), (512, 256), (512, 512)]
    expected = count(SegNet(NYUV2)) + 3 * (encoder + decoder) + sum(link(*one) for one in links)
    assert count(Mtan(NYUV2)) == expected == 44_229_073


def test_pspnet_is_resnet50_and_a_decoder_a_task():
    # torchvision documents 25,557,032 parameters of ResNet-50; its classifier has 2048 · 1000 + 1000 of them.
    trunk = 25_557_032 - 2_049_000
    assert count(DilatedResNet50()) == trunk == 23_508_032
    decoder = 4 * (2048 * 512 + 2 * 512) + 4096 * 512 * 9 + 2 * 512
    assert count(PspNet(NYUV2)) == trunk + sum(decoder + convolution(512, c, 1) for c in NYUV2.values()) == 92_738_129


def test_the_trunk_of_pspnet_has_torchvisions_names_and_dilations():
    trunk = DilatedResNet50()
    names = {"conv1.weight"} | {f"bn1.{part}" for part in ("weight", "bias")}
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}."
            names |= {f"{prefix}conv{i}.weight" for i in (1, 2, 3)}
            names |= {f"{prefix}bn{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
        names |= {f"layer{layer}.0.downsample.{part}" for part in ("0.weight", "1.weight", "1.bias")}
    assert {name for name, _ in trunk.named_parameters()} == names
    # Those of torchvision's resnet50(replace_stride_with_dilation=[False, True, True]).
    middle = [m for name, m in trunk.named_modules() if name.startswith("layer") and name.endswith("conv2")]
    assert [m.dilation[0] for m in middle] == [1] * 3 + [1] * 4 + [1] + [2] * 5 + [2] + [4] * 2
    assert [m.stride[0] for m in middle] == [1] * 3 + [2] + [1] * 3 + [1] * 9
    assert all(m.padding == m.dilation for m in middle)


def test_dilation_keeps_what_striding_would_compute():
    """With stride 1 and dilation 2, every second pixel of a layer is that of the layer with stride 2."""
    torch.manual_seed(0)
    dilated = DilatedResNet50(width=4).double().eval()
    strided = copy.deepcopy(dilated)
    for block in strided.layer3:
        block.conv2.dilation = block.conv2.padding = (1, 1)
    strided.layer3[0].conv2.stride = strided.layer3[0].downsample[0].stride = (2, 2)
    features = torch.rand(1, 32, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(dilated.layer3(features)[..., ::2, ::2], strided.layer3(features))


@pytest.mark.parametrize(("network", "size"), [(SegNet, (32, 96)), (Mtan, (64, 32)), (PspNet, (24, 40))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_have_the_size_of_the_image(network, size, dtype):
    model = network(NYUV2, width=8).to(dtype)
    images = torch.rand(2, 3, *size, dtype=dtype)
    outputs = model(images)
    assert {name: output.shape for name, output in outputs.items()} == {n: (2, c, *size) for n, c in NYUV2.items()}
    assert all(output.dtype == dtype for output in outputs.values())
    decoded = model.decode(model.encode(images))
    assert all(torch.equal(outputs[name], decoded[name]) for name in NYUV2)


def test_outputs_of_pspnet_may_stay_small():
    torch.manual_seed(0)
    large, small = PspNet(NYUV2, width=4), PspNet(NYUV2, width=4, enlarge=False)
    small.load_state_dict(large.state_dict())
    images = torch.rand(2, 3, 16, 24)
    outputs, enlarged = small(images), large(images)
    for name, output in outputs.items():
        assert output.shape[-2:] == (2, 3)
        assert torch.equal(output.repeat_interleave(8, -1).repeat_interleave(8, -2), enlarged[name])


def test_each_task_of_mtan_has_features_of_its_own():
    torch.manual_seed(0)
    model = Mtan(NYUV2, width=4)
    features = model.encode(torch.rand(2, 3, 32, 32))
    reached = {}
    for task, own in features.items():
        gradients = torch.autograd.grad(own.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        named = zip(model.named_parameters(), gradients, strict=True)
        reached[task] = {name for (name, _), g in named if g is not None and g.any()}
    for task, names in reached.items():
        assert {name.split(".")[1] for name in names if name.startswith("attention.")} == {task}
        assert any(name.startswith("encoder_links.") for name in names)
        assert any(name.startswith("decoder_links.") for name in names)
    assert not torch.equal(features["depth"], features["normals"])


@pytest.mark.parametrize("network", [SegNet, Mtan, PspNet])
def test_parameters_can_be_views_of_a_row(network):
    """In a row, as the population holds them, the network computes the same, and its gradient is the row's."""
    torch.manual_seed(0)
    model = network(NYUV2, width=4).double()
    bound = copy.deepcopy(model)
    layout = Layout.of(bound, lambda name: not name.startswith("heads."))
    row = torch.zeros(layout.size, dtype=torch.float64)
    layout.bind(bound, row)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for one in (model, bound):
        sum(output.square().mean() for output in one(images).values()).backward()
    found = dict(bound.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name].grad, p.grad)
    row.mul_(0)
    assert all((output == 0).all() for output in bound.eval()(images).values())


SLOW = [pytest.param(Mtan, marks=pytest.mark.slow), pytest.param(PspNet, marks=pytest.mark.slow)]


@pytest.mark.parametrize("network", [SegNet, *SLOW])
def test_networks_can_be_exported_for_any_batch_size(network):
    torch.manual_seed(0)
    model = network({"segmentation": 3, "depth": 1}, width=4).eval()
    images = torch.rand(2, 3, 32, 32)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=dynamic), program)
    program.seek(0)
    more = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(program).module()(more), model(more))


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Weights as in torchvision's file, whose first version had no num_batches_tracked."""
    torch.manual_seed(1)
    state = {k: v.clone() for k, v in DilatedResNet50().state_dict().items() if not k.endswith("num_batches_tracked")}
    return {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_trunk_starts_from_a_weights_file(tmp_path, published, suffix):
    path = tmp_path / f"resnet50{suffix}"
    if suffix == ".pth":
        torch.save(published, path)
    else:
        save_file(published, path)
    torch.manual_seed(2)
    model = PspNet({"depth": 1})
    model.load_trunk(str(path))
    loaded = model.trunk.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in published.items() if not name.startswith("fc."))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer3.5.conv2.weight"), "the file lacks layer3.5.conv2.weight"),
        (lambda state: state.update({"layer3.6.conv1.weight": torch.zeros(1)}), "has layer3.6.conv1.weight, unknown"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
            r"has conv1.weight of shape \(64, 3, 3",
        ),
        (lambda state: state.update({"epoch": 3}), "is not a state_dict"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, published, change, message):
    state = dict(published)
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match=message):
        PspNet({"depth": 1}).load_trunk(str(tmp_path / "weights.pth"))


class Command:
    def __reduce__(self):
        return print, ("code of a weights file",)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_is_never_run(tmp_path, suffix, capsys):
    path = tmp_path / f"weights{suffix}"
    torch.save({"conv1.weight": Command()}, path)
    with pytest.raises(RequestError, match="cannot be read as a torch or safetensors file"):
        PspNet({"depth": 1}, width=4).load_trunk(str(path))
    assert "code of a weights file" not in capsys.readouterr().out


def test_a_weights_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"weights .*absent.pth: No such file"):
        PspNet({"depth": 1}, width=4).load_trunk(str(tmp_path / "absent.pth"))
