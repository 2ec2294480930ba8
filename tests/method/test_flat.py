"""Flat rows: where parameters stand in them, and that models, gradients and rows are the same memory."""

import numpy as np
import pytest
import torch
from torch import nn

from popmtl.method.flat import Layout
from popmtl.method.gradient_rows import GradientRows


class Tied(nn.Module):
    """An encoder and a decoder with one matrix, a frozen scale, and a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.head(self.norm(self.decoder(torch.tanh(self.encoder(x))) * self.scale))


def bound(model, transfers=lambda name: True):
    layout = Layout.of(model, transfers)
    row = torch.full((layout.size,), 7.0)
    layout.bind(model, row)
    return layout, row


def test_transferring_parameters_come_first_and_otherwise_in_the_models_order():
    layout = Layout.of(Tied(), lambda name: not name.startswith("head"))
    assert layout.names == ("encoder.weight", "norm.weight", "norm.bias", "head.weight", "head.bias")
    assert layout.transferring == 9 + 3 + 3
    assert layout.size == 9 + 3 + 3 + 3 + 1
    assert Layout.of(Tied(), lambda name: False).transferring == 0
    assert Layout.of(Tied(), lambda name: True).names[0] == "head.weight"


def test_binding_moves_the_values_and_keeps_what_the_model_computes():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 3)
    before, expected = {n: p.detach().clone() for n, p in model.named_parameters()}, model.eval()(x).detach()
    layout, row = bound(model, lambda name: "norm" in name)
    torch.testing.assert_close(model(x).detach(), expected)
    flat = torch.cat([before[name].flatten() for name in layout.names])
    torch.testing.assert_close(row, flat, rtol=0, atol=0)


def test_the_model_sees_the_row():
    model = Tied()
    layout, row = bound(model)
    row.copy_(torch.arange(layout.size))
    assert model.head.weight.tolist() == [[0, 1, 2]]
    assert model.head.bias.tolist() == [3]
    with torch.no_grad():
        model.head.bias.fill_(-1)
    assert row[3] == -1


def test_a_tied_parameter_stands_once_and_stays_tied():
    model = Tied()
    layout, row = bound(model)
    assert "decoder.weight" not in layout.names
    row[layout.columns({"encoder.weight"})] = 5
    assert (model.decoder.weight == 5).all()
    assert model.decoder.weight is model.encoder.weight
    x = torch.tensor([[1.0, 0, 0]])
    model.decoder(model.encoder(x)).sum().backward()
    gradient = torch.full((1, layout.size), 7.0)
    rows = GradientRows(layout, [model], gradient)
    rows.collect(0, rows.parameters[0])
    # W W x: both uses add up. With W = 5 everywhere, ∂/∂W of 1ᵀ W W x is 1 (W x)ᵀ + Wᵀ1 xᵀ.
    assert gradient[0, layout.columns({"encoder.weight"})].reshape(3, 3).tolist() == [[20, 5, 5]] * 3
    assert rows.there[0] == [name == "encoder.weight" for name in layout.names]
    assert not gradient[0, layout.columns({"head.weight"})].any()


def test_frozen_parameters_and_buffers_are_in_no_row():
    model = Tied()
    layout, row = bound(model)
    row.fill_(3)
    assert model.scale.item() == 2
    assert model.norm.running_var.tolist() == [1, 1, 1]
    assert not any("running" in name or "scale" in name for name in layout.names)


def test_columns_marks_the_named_parameters():
    layout = Layout.of(Tied(), lambda name: name == "norm.bias")
    marked = layout.columns({"norm.bias", "head.bias"})
    assert marked.dtype == torch.bool
    assert marked.nonzero().flatten().tolist() == [0, 1, 2, 6]  # norm.bias, head.weight, head.bias, …


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        Layout.of(nn.ReLU(), lambda name: True)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no trainable parameters"):
        Layout.of(frozen, lambda name: True)


def test_a_parameter_that_is_not_floating_point_is_refused():
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter phase is of torch\.complex64"):
        Layout.of(model, lambda name: True)


def test_one_parameter_of_two_names_transfers_or_does_not():
    with pytest.raises(ValueError, match="are one parameter"):
        Layout.of(Tied(), lambda name: not name.startswith("decoder"))


def test_transfers_must_answer():
    with pytest.raises(ValueError, match=r"transfers\('head.weight'\) must return True or False, and returned None"):
        Layout.of(Tied(), lambda name: None)
    assert Layout.of(Tied(), lambda name: np.bool_(name != "head.bias")).names[-1] == "head.bias"


def test_what_becomes_trainable_on_the_way_is_refused():
    model = Tied()
    layout, row = bound(model)
    layout.check_bound(model, row)
    model.scale.requires_grad_(True)
    with pytest.raises(ValueError, match="scale was frozen"):
        layout.check_bound(model, row)


def test_values_of_the_models_order_come_in_the_order_of_the_columns():
    model = Tied()
    layout = Layout.of(model, lambda name: not name.startswith("head"))
    trained = [p for p in model.parameters() if p.requires_grad]
    value = torch.arange(float(layout.size))
    torch.nn.utils.vector_to_parameters(value, trained)
    layout.bind(model, row := torch.zeros(layout.size))
    assert torch.equal(layout.in_columns(model, value), row)
    assert torch.equal(layout.in_columns(model, torch.tensor(2.0)), torch.tensor(2.0))
