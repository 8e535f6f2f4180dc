"""Attentional FM, dot products, the cross network and layers without norm and shortcut, against their formulas."""

import dataclasses
import itertools

import pytest
import torch

from c2al.config import ModelConfig
from c2al.errors import ConfigError
from c2al.nn.dhen import DHEN, DHENLayer
from c2al.nn.interactions import AttentionalFM, CrossNetwork, DotInteraction


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def afm_by_hand(m, x_BMD, tokens):
    rows = []
    for x_MD in x_BMD:
        products = [x_MD[i] * x_MD[j] for i, j in itertools.combinations(range(len(x_MD)), 2)]
        score = [(m.score.weight[0] * (m.hidden.weight @ p + m.hidden.bias).clamp_min(0)).sum().exp() for p in products]
        pooled = sum(s / sum(score) * p for s, p in zip(score, products, strict=True))
        rows.append((m.out.weight @ pooled + m.out.bias).view(tokens, -1))
    return torch.stack(rows)


def dot_by_hand(m, x_BMD, tokens):
    rows = []
    for x_MD in x_BMD:
        z = torch.stack([(x_MD[i] * x_MD[j]).sum() for i, j in itertools.combinations(range(len(x_MD)), 2)])
        rows.append((m.out.weight @ z + m.out.bias).view(tokens, -1))
    return torch.stack(rows)


def cross_by_hand(m, x_BMD, tokens):
    x0_BF = x_BF = x_BMD.reshape(len(x_BMD), -1)
    for layer in m.layers:
        x_BF = x0_BF * (x_BF @ (layer.u.weight @ layer.v.weight).T + layer.u.bias) + x_BF
    return x_BF.view_as(x_BMD)


MODULES = {
    "afm": (lambda fields, tokens: AttentionalFM(fields, 4, tokens, 5), afm_by_hand),
    "dot": (lambda fields, tokens: DotInteraction(fields, 4, tokens), dot_by_hand),
    "cross": (lambda fields, tokens: CrossNetwork(fields, 4, 2, 3), cross_by_hand),
}


@pytest.mark.parametrize(("fields", "tokens", "batch"), [(2, 1, 1), (2, 2, 3), (7, 3, 5)])
@pytest.mark.parametrize("name", MODULES)
def test_output_and_gradients_are_those_of_the_formula(name, fields, tokens, batch):
    make, by_hand = MODULES[name]
    module = make(fields, tokens).double()
    x_BMD = torch.randn(batch, fields, 4, dtype=torch.float64, requires_grad=True)
    actual, expected = module(x_BMD), by_hand(module, x_BMD, tokens)
    assert actual.shape == (batch, module.out_fields, 4)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad, wanted = torch.randn_like(actual), [x_BMD, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_no_row(name):
    module = MODULES[name][0](3, 2)
    assert module(torch.zeros(0, 3, 4)).shape == (0, module.out_fields, 4)


@pytest.mark.parametrize("name", ["afm", "dot"])
def test_one_field_has_no_pairs_and_is_refused_by_name(name):
    config = ModelConfig(embedding_dim=4, interactions=(name,))
    with pytest.raises(ConfigError, match=rf"model\.interactions: {name} multiplies pairs of fields, .* takes in 1"):
        DHEN(config, fields=1)


def test_a_cross_network_works_on_one_field():
    module = CrossNetwork(1, 4, 2, 2).double()
    x_BMD = torch.randn(3, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x_BMD), cross_by_hand(module, x_BMD, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ensemble", ["concat", "sum", "stack"])
@pytest.mark.parametrize(("norm", "shortcut"), [("layer", "linear"), ("none", "linear"), ("none", "none")])
def test_every_module_reaches_every_parameter_with_widths_of_its_own(ensemble, norm, shortcut):
    config = ModelConfig(
        embedding_dim=4, interactions=("afm", "dot", "cross"), tokens=(1, 2, 0), cross_layers=2, cross_rank=2,
        ensemble=ensemble, norm=norm, shortcut=shortcut,
    )  # fmt: skip
    assert not list(config.problems())
    dhen = DHEN(config, fields=5)
    assert dhen.out_fields == (1 + 2 + (1 + 2 + 5) if ensemble == "stack" else 5)
    x_BMD = torch.randn(3, 5, 4, requires_grad=True)
    out_BLD = dhen(x_BMD)
    (out_BLD * torch.randn_like(out_BLD)).sum().backward()
    for name, tensor in [("x", x_BMD), *dhen.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_a_layer_without_norm_and_shortcut_is_its_interaction():
    config = ModelConfig(embedding_dim=4, interactions=("dot",), ensemble="sum", norm="none", shortcut="none")
    layer, x_BMD = DHENLayer(config, fields=5), torch.randn(3, 5, 4)
    torch.testing.assert_close(layer(x_BMD), layer.interactions["dot"](x_BMD), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["afm", "dot", "cross"])
def test_exports_with_a_dynamic_batch_and_keeps_indices_out_of_the_state(name):
    config = ModelConfig(embedding_dim=4, interactions=(name,), cross_layers=2)
    dhen, x_BMD = DHEN(config, fields=5), torch.randn(3, 5, 4)
    assert all(tensor.is_floating_point() for tensor in dhen.state_dict().values())
    program = torch.export.export(dhen, (x_BMD,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(torch.cat([x_BMD] * 3)), dhen(torch.cat([x_BMD] * 3)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["afm", "dot"])
def test_bfloat16_autocast_trains(name):
    dhen = DHEN(dataclasses.replace(ModelConfig(embedding_dim=4), interactions=(name,)), fields=5)
    with torch.autocast("cpu", torch.bfloat16):
        out_BLD = dhen(torch.randn(3, 5, 4))
    out_BLD.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in dhen.parameters())
