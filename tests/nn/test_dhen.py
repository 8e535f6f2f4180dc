"""DHEN and its interaction modules against their formulas, written again here."""

import dataclasses
import itertools

import pytest
import torch

from c2al.config import FMConfig, ModelConfig
from c2al.nn.dhen import DHEN, DHENLayer
from c2al.nn.interactions import MLPY, Cross, FMAttention, LinearCompression, SelfAttention, StaticY, YSource

ALL = ("fm_attention", "linear", "cross", "attention")
CONFIG = ModelConfig(embedding_dim=8, interactions=ALL, layers=2, cross_rank=3, fm=FMConfig(k=3, hidden=12))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("fields", "shortcut"), [(0, "identity"), (0, "linear"), (4, "linear")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("ensemble", ["concat", "sum"])
@pytest.mark.parametrize(("layout", "y"), itertools.product(("paper", "wukong"), ("mlp", "static")))
def test_every_configuration_reaches_every_parameter(layout, y, ensemble, norm, fields, shortcut):
    config = dataclasses.replace(
        CONFIG, ensemble=ensemble, norm=norm, fields=fields, shortcut=shortcut, fm=FMConfig(layout=layout, y=y, k=3)
    )
    dhen = DHEN(config, fields=6)
    assert dhen.out_fields == (fields or 6)
    x_BMD = torch.randn(5, 6, 8, requires_grad=True)
    out_BLD = dhen(x_BMD)
    assert out_BLD.shape == (5, dhen.out_fields, 8)
    (out_BLD * torch.randn_like(out_BLD)).sum().backward()
    for name, tensor in [("x", x_BMD), *dhen.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_concat_layer_is_its_formula():
    layer = DHENLayer(CONFIG, fields=6)
    x_BMD = torch.randn(5, 6, 8)
    tokens = torch.cat([i(x_BMD) for i in layer.interactions.values()], dim=1)
    mixed = torch.einsum("ln,bnd->bld", layer.concat.linear.weight, tokens) + layer.concat.linear.bias[:, None]
    total = mixed + x_BMD
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x_BMD), expected, rtol=1e-4, atol=1e-5)


def test_sum_layer_is_its_formula():
    layer = DHENLayer(dataclasses.replace(CONFIG, ensemble="sum", norm="rms"), fields=6)
    x_BMD = torch.randn(5, 6, 8)
    total = x_BMD.clone()
    for interaction in layer.interactions.values():
        total += interaction(x_BMD)
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x_BMD), expected, rtol=1e-4, atol=1e-5)


WUKONG = ModelConfig(
    embedding_dim=8,
    interactions=("linear", "fm_attention"),
    tokens=(4, 3),
    ensemble="stack",
    shortcut="linear",
    layers=2,
    fm=FMConfig(layout="wukong", y="static", k=3, hidden=12),
)


def test_stacked_layer_is_wukongs_formula():
    """LN([LCB(X); FMB(X)] + W X), arXiv 2403.02545 Eq. 4: no map over what stands side by side."""
    layer = DHENLayer(WUKONG, fields=6).double()
    x_BMD = torch.randn(5, 6, 8, dtype=torch.float64)
    w_LM, bias_L = layer.interactions["linear"].linear.weight, layer.interactions["linear"].linear.bias
    compressed = torch.einsum("lm,bmd->bld", w_LM, x_BMD) + bias_L[:, None]
    fm = layer.interactions["fm_attention"]
    g_BMK = x_BMD @ x_BMD.mT @ fm.y.y_PK
    centred = g_BMK - g_BMK.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    first, last = fm.mlp[0], fm.mlp[2]
    hidden = (normed.flatten(1) @ first.weight.T + first.bias).clamp_min(0)
    tokens = (hidden @ last.weight.T + last.bias).view(5, 3, 8)
    shortcut = torch.einsum("lm,bmd->bld", layer.shortcut.linear.weight, x_BMD) + layer.shortcut.linear.bias[:, None]
    total = torch.cat([compressed, tokens], 1) + shortcut
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert layer.out_fields == 7
    torch.testing.assert_close(layer(x_BMD), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ensemble", ["concat", "sum", "stack"])
def test_interactions_have_widths_of_their_own(ensemble):
    tokens = (4, 3, 0, 0)
    config = dataclasses.replace(CONFIG, tokens=tokens, ensemble=ensemble, shortcut="linear")
    dhen = DHEN(config, fields=6)
    # Cross and attention put out what they take in: 4 + 3 + 6 + 6, then 4 + 3 + 19 + 19.
    assert dhen.out_fields == (45 if ensemble == "stack" else 6)
    x_BMD = torch.randn(5, 6, 8, requires_grad=True)
    out_BLD = dhen(x_BMD)
    assert out_BLD.shape == (5, dhen.out_fields, 8)
    (out_BLD * torch.randn_like(out_BLD)).sum().backward()
    for name, tensor in [("x", x_BMD), *dhen.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": (4,)}, "tokens"),
        ({"tokens": (4, -1)}, "tokens"),
        ({"interactions": ("cross", "linear"), "tokens": (4, 0)}, "tokens"),
        ({"fields": 4}, "fields"),
        ({"shortcut": "identity"}, "shortcut"),
    ],
)
def test_widths_that_do_not_fit_are_named(change, field):
    assert list(WUKONG.problems()) == []
    assert field in [name for name, _ in dataclasses.replace(WUKONG, **change).problems()]


def test_cross_is_dcn_v2():
    cross = Cross(fields=3, dim=4, rank=2)
    x_BMD = torch.randn(5, 3, 4)
    x_BF = x_BMD.reshape(5, 12)
    w_FF = cross.u.weight @ cross.v.weight
    expected = x_BF * (x_BF @ w_FF.T + cross.u.bias) + x_BF
    torch.testing.assert_close(cross(x_BMD), expected.reshape(5, 3, 4), rtol=1e-5, atol=1e-6)


def test_linear_compression_mixes_fields_only():
    linear = LinearCompression(3, 2)
    x_BMD = torch.randn(5, 3, 4)
    expected = torch.einsum("lm,bmd->bld", linear.linear.weight, x_BMD) + linear.linear.bias[:, None]
    torch.testing.assert_close(linear(x_BMD), expected, rtol=1e-5, atol=1e-6)


def test_self_attention_is_softmax_of_scaled_products():
    attention = SelfAttention(fields=3, dim=8, heads=2)
    x_BMD = torch.randn(5, 3, 8)
    q, k, v = attention.qkv(x_BMD).split(8, dim=-1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = torch.softmax(torch.einsum("bmd,bnd->bmn", q[..., part], k[..., part]) / 2.0, dim=-1)
        heads.append(torch.einsum("bmn,bnd->bmd", weights, v[..., part]))
    torch.testing.assert_close(attention(x_BMD), attention.out(torch.cat(heads, -1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "p"), [("paper", 8), ("wukong", 6)])
def test_fm_attention_is_equation_3_then_norm_then_mlp(layout, p):
    module = FMAttention(fields=6, dim=8, out_fields=4, config=FMConfig(layout=layout, k=3, hidden=12))
    x_BMD = torch.randn(5, 6, 8)
    y_BPK = module.y(x_BMD)
    assert y_BPK.shape == (5, p, 3)
    a_BPQ = x_BMD.transpose(1, 2) if layout == "paper" else x_BMD
    g_BPK = a_BPQ @ a_BPQ.transpose(1, 2) @ y_BPK
    expected = module.mlp(torch.nn.functional.layer_norm(g_BPK, (3,)).reshape(5, -1)).reshape(5, 4, 8)
    torch.testing.assert_close(module(x_BMD), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "static"])
def test_hooks_see_y_of_every_layer(kind):
    dhen = DHEN(dataclasses.replace(CONFIG, fm=FMConfig(y=kind, k=3)), fields=6)
    seen = []
    for module in dhen.modules():
        if isinstance(module, YSource):
            assert isinstance(module, MLPY if kind == "mlp" else StaticY)
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    dhen(torch.randn(5, 6, 8))
    assert seen == [(5, 8, 3) if kind == "mlp" else (8, 3)] * CONFIG.layers


def test_dropout_acts_in_training_only():
    dhen = DHEN(dataclasses.replace(CONFIG, dropout=0.5), fields=6)
    x_BMD = torch.randn(5, 6, 8)
    assert (dhen(x_BMD) == 0).float().mean() > 0.2
    dhen.eval()
    assert torch.equal(dhen(x_BMD), dhen(x_BMD))
    assert (dhen(x_BMD) == 0).float().mean() < 0.01


def test_compiles_to_one_graph_and_exports_with_a_dynamic_batch():
    dhen = DHEN(CONFIG, fields=6)
    x_BMD = torch.randn(5, 6, 8)
    torch.testing.assert_close(torch.compile(dhen, fullgraph=True, backend="aot_eager")(x_BMD), dhen(x_BMD))
    program = torch.export.export(dhen, (x_BMD,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(torch.cat([x_BMD] * 3)), dhen(torch.cat([x_BMD] * 3)), rtol=0, atol=0)


def test_bfloat16_autocast_trains():
    dhen = DHEN(CONFIG, fields=6)
    x_BMD = torch.randn(5, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out_BLD = dhen(x_BMD)
    out_BLD.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in dhen.parameters())
    torch.testing.assert_close(out_BLD.float(), dhen(x_BMD), rtol=0.1, atol=0.1)


def test_learns_a_pairwise_interaction():
    """The label is the sign of a product of two fields: no additive model can fit it."""
    torch.manual_seed(1)
    dhen = DHEN(CONFIG, fields=6)
    head = torch.nn.Linear(6 * 8, 1)
    x_BMD = torch.randn(512, 6, 8)
    label_B = ((x_BMD[:, 0] * x_BMD[:, 1]).sum(-1) > 0).float()
    optimizer = torch.optim.Adam([*dhen.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(dhen(x_BMD).flatten(1))[:, 0], label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35


@pytest.mark.parametrize("y", ["mlp", "static"])
def test_penalties_on_y_are_their_formula(y):
    """Gradients of L + y_l1 mean_b sum |Y_b| + y_l2 mean_b sum Y_b^2; the output and eval mode know nothing of it."""
    torch.manual_seed(0)
    plain = FMAttention(4, 8, 3, FMConfig(y=y, k=2, hidden=6)).double()
    penalised = FMAttention(4, 8, 3, FMConfig(y=y, k=2, hidden=6, y_l1=0.3, y_l2=0.7)).double()
    penalised.load_state_dict(plain.state_dict())
    x_BMD = torch.randn(5, 4, 8, dtype=torch.float64)
    a, b = (x_BMD.clone().requires_grad_() for _ in range(2))
    y_BPK = plain.y(a)
    per_sample = y_BPK if y_BPK.dim() == 3 else y_BPK[None]
    penalty = (0.3 * per_sample.abs() + 0.7 * per_sample**2).sum(dim=(1, 2)).mean()
    (plain(a).sin().sum() + penalty).backward()
    out = penalised(b)
    assert torch.equal(out, plain(a))
    out.sin().sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    for (name, p), q in zip(plain.named_parameters(), penalised.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    penalised.eval()
    penalised.zero_grad()
    penalised(b).sin().sum().backward()
    plain.zero_grad()
    plain(a).sin().sum().backward()
    for p, q in zip(plain.parameters(), penalised.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
