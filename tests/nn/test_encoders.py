"""MMoE and PLE against their equations, written again here, and what serving keeps of them."""

import pytest
import torch

from c2al.config import ExpertsConfig, ModelConfig
from c2al.nn.encoders import encoder_of

F = 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def made(kind, cohorts, serving=False, **experts):
    experts = {"units": (5, 4), "shared": 3, "own": 2, **experts}
    encoder = encoder_of(ModelConfig(encoder=kind, experts=ExpertsConfig(**experts)), F)
    encoder.add_auxiliary(cohorts, serving)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                parameter += 0.5  # few units: without it some expert is 0 on every row
    return encoder.double()


def features(batch=7):
    return torch.randn(batch, F, dtype=torch.float64, requires_grad=True)


def e(expert, x_BF):
    """Linear, ReLU, linear, ReLU."""
    first, _, last, _ = expert
    hidden = (x_BF @ first.weight.T + first.bias).clamp_min(0)
    return (hidden @ last.weight.T + last.bias).clamp_min(0)


def mixed(w_EF, x_BF, outputs):
    """sum_e softmax(W x)_e output_e, a sample and an expert at a time."""
    rows = []
    for b, x_F in enumerate(x_BF):
        score = torch.stack([(w_F * x_F).sum().exp() for w_F in w_EF])
        rows.append(sum(s / score.sum() * out[b] for s, out in zip(score, outputs, strict=True)))
    return torch.stack(rows)


def mmoe_by_hand(m, h_BF):
    shared = [e(expert, h_BF) for expert in m.experts]
    return [mixed(task.gate.weight, h_BF, shared) for task in (m.primary, *m.auxiliary)]


def ple_by_hand(m, h_BF):
    cohorts, levels = len(m.auxiliary), len(m.levels)
    x, s = [h_BF] * (1 + cohorts), h_BF
    for i, level in enumerate((*m.levels, m)):
        shared = [e(expert, s) for expert in level.experts]
        experts = [level.primary.experts, *([a.own.experts for a in m.auxiliary] if level is m else level.tasks)]
        own = [[e(expert, x_BF) for expert in mine] for mine, x_BF in zip(experts, x, strict=True)]
        if level is m:
            gates = [a.own.gate for a in m.auxiliary]
        else:
            w = [level.gate.weight] + ([] if level.task_gate is None else [level.task_gate.weight])
            s = mixed(torch.cat(w), s, [*shared, *(out for outs in own for out in outs)])
            last_below = i == levels - 1
            gates = [a.gate_below for a in m.auxiliary] if last_below else m.gates[i * cohorts : (i + 1) * cohorts]
        w = [level.primary.gate.weight, *(gate.weight for gate in gates)]
        x = [mixed(w_EF, x_BF, [*mine, *shared]) for w_EF, x_BF, mine in zip(w, x, own, strict=True)]
    return x


BY_HAND = {
    "mmoe": (mmoe_by_hand, {}),
    "cgc": (ple_by_hand, {"levels": 1}),
    "ple": (ple_by_hand, {"levels": 3}),
}


@pytest.mark.parametrize("cohorts", [0, 1, 3])
@pytest.mark.parametrize("case", BY_HAND)
def test_outputs_and_gradients_are_those_of_the_equations(case, cohorts):
    by_hand, experts = BY_HAND[case]
    encoder = made("mmoe" if case == "mmoe" else "ple", cohorts, **experts)
    h_BF = features()
    actual, expected = encoder(h_BF), by_hand(encoder, h_BF)
    assert len(actual) == len(expected) == 1 + cohorts
    grads = [torch.randn_like(out) for out in actual]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    wanted = [h_BF, *encoder.parameters()]
    for a, b in zip(
        torch.autograd.grad(actual, wanted, grads), torch.autograd.grad(expected, wanted, grads), strict=True
    ):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", ["shared-bottom", "mmoe", "ple"])
def test_one_row_and_no_row(kind, batch):
    encoder = made(kind, 2)
    out = encoder(features(batch))
    assert [tuple(o.shape) for o in out] == [(batch, encoder.out_features)] * 3
    whole = features(5)
    for one, every in zip(encoder(whole[2:3]), encoder(whole), strict=True):
        torch.testing.assert_close(one, every[2:3], rtol=1e-12, atol=1e-12)


def test_one_expert_is_the_expert_itself():
    encoder, h_BF = made("mmoe", 1, shared=1), features()
    for out in encoder(h_BF):
        torch.testing.assert_close(out, encoder.experts[0](h_BF), rtol=0, atol=0)


def test_shared_bottom_hands_every_head_the_features_themselves():
    encoder, h_BF = made("shared-bottom", 2), features()
    assert all(out is h_BF for out in encoder(h_BF))
    assert not list(encoder.parameters())


SERVED = [("shared-bottom", {}), ("mmoe", {}), *(("ple", {"levels": n}) for n in (1, 2, 3, 4))]


@pytest.mark.parametrize(("kind", "experts"), SERVED)
def test_serving_keeps_exactly_what_the_primary_task_depends_on(kind, experts):
    training, serving = made(kind, 2, **experts), made(kind, 2, serving=True, **experts)
    h_BF = features()
    primary = training(h_BF)[0]
    names = [n for n, _ in training.named_parameters()]
    grads = torch.autograd.grad(primary.sum(), [h_BF, *training.parameters()], allow_unused=True)[1:]
    needed = {n for n, g in zip(names, grads, strict=True) if g is not None}
    assert needed == {n for n, _ in serving.named_parameters()} == {n for n in names if not n.startswith("auxiliary.")}
    serving.load_state_dict({n: v for n, v in training.state_dict().items() if n in needed})
    (served,) = serving(h_BF)
    assert torch.equal(served, primary)


@pytest.mark.parametrize("kind", ["shared-bottom", "mmoe", "ple"])
def test_the_primary_path_is_initialised_alike_with_and_without_auxiliary_tasks(kind):
    states = []
    for cohorts in (0, 1, 4):
        torch.manual_seed(3)
        states.append(made(kind, cohorts).state_dict())
    without, *others = states
    for state in others:
        assert {n for n in state if not n.startswith("auxiliary.")} == without.keys()
        assert all(torch.equal(state[n], value) for n, value in without.items())
