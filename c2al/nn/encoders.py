"""What each prediction head reads: the encoder's features, or a gated mixture of experts over them.

Legend: B batch, F features of the DHEN's output, E experts, W features of an expert, C auxiliary cohorts,
T = 1 + C tasks: the primary one first.

Serving keeps what the primary task's features depend on. What only auxiliary tasks use has names that begin
with `auxiliary.`; it is created last, so that a seed gives the rest the same weights with and without it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2al.config import ExpertsConfig, ModelConfig


class SharedBottom(nn.Module):
    """Every prediction head reads the same features: (B, F) -> T times (B, F)."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features
        self.tasks = 1

    def add_auxiliary(self, cohorts: int, serving: bool = False) -> None:
        """`serving` leaves out what the primary task does not need."""
        self.tasks = 1 if serving else 1 + cohorts

    def forward(self, h_BF: Tensor) -> list[Tensor]:
        return [h_BF] * self.tasks


def expert(in_features: int, units: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU after each of them: (B, F) -> (B, W), W the last of `units`."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(in_features, width), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers)


def outputs(experts: nn.ModuleList, x_BF: Tensor) -> list[Tensor]:
    """E times (B, W)."""
    return [one(x_BF) for one in experts]


def mixture(logit_BE: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """sum_e softmax(logit)_e expert_e, (B, W)."""
    weight_BE = torch.softmax(logit_BE, dim=1)
    return (weight_BE[:, None] @ torch.stack(list(experts), dim=1).to(weight_BE.dtype))[:, 0]


class Gate(nn.Linear):
    """Logits of the experts: W_g x without a bias (MMoE, Eq. 7; PLE, Eq. 3), (B, F) -> (B, E)."""

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__(in_features, experts, bias=False)


class Own(nn.Module):
    """A task's own part of a level: its gate and, in PLE, its own experts."""

    def __init__(self, in_features: int, config: ExpertsConfig, own: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert(in_features, config.units) for _ in range(own))
        self.gate = Gate(in_features, own + config.shared)

    def forward(self, x_BF: Tensor, shared: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The task's mixture of its own and the shared experts, (B, W), and its own experts' outputs."""
        own = outputs(self.experts, x_BF)
        return mixture(self.gate(x_BF), [*own, *shared]), own


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018, Eq. 5-7): (B, F) -> T times (B, W).

    g_t = sum_e softmax(W_t h)_e E_e(h)

    All experts are shared, so all of them are served; a gate of an auxiliary task is not.
    """

    def __init__(self, in_features: int, config: ExpertsConfig) -> None:
        super().__init__()
        self._config, self._in_features = config, in_features
        self.out_features = config.units[-1]
        self.experts = nn.ModuleList(expert(in_features, config.units) for _ in range(config.shared))
        self.primary = Own(in_features, config, 0)
        self.auxiliary = nn.ModuleList()

    def add_auxiliary(self, cohorts: int, serving: bool = False) -> None:
        """Gates of `cohorts` auxiliary tasks; none with `serving`, since the primary task needs none."""
        for _ in range(0 if serving else cohorts):
            self.auxiliary.append(Own(self._in_features, self._config, 0))

    def forward(self, h_BF: Tensor) -> list[Tensor]:
        shared = outputs(self.experts, h_BF)
        return [task(h_BF, shared)[0] for task in (self.primary, *self.auxiliary)]


class Extraction(nn.Module):
    """One level of PLE below the last: every task's mixture, and one of all experts for the next shared experts."""

    def __init__(self, in_features: int, config: ExpertsConfig) -> None:
        super().__init__()
        self._config, self._in_features = config, in_features
        self.experts = nn.ModuleList(expert(in_features, config.units) for _ in range(config.shared))
        self.primary = Own(in_features, config, config.own)
        self.gate = Gate(in_features, config.shared + config.own)
        self.tasks = nn.ModuleList()
        """Experts of every auxiliary task. The gate above mixes them too, so they are served."""
        self.task_gate: Gate | None = None
        """The rest of the gate above: logits of the auxiliary tasks' experts."""

    def add_auxiliary(self, cohorts: int) -> None:
        config, in_features = self._config, self._in_features
        for _ in range(cohorts):
            self.tasks.append(nn.ModuleList(expert(in_features, config.units) for _ in range(config.own)))
        self.task_gate = Gate(in_features, config.own * cohorts) if cohorts else None

    def auxiliary_gate(self) -> Gate:
        """A new gate of an auxiliary task in this level."""
        return Gate(self._in_features, self._config.shared + self._config.own)

    def forward(
        self, x: Sequence[Tensor], shared_BF: Tensor, gates: Sequence[nn.Module]
    ) -> tuple[list[Tensor], Tensor]:
        """Inputs of the T tasks and of the shared experts -> theirs in the next level.

        `gates` are the auxiliary tasks'. Without them only the primary task has an input in the next level.
        """
        shared = outputs(self.experts, shared_BF)
        mixed_BW, own = self.primary(x[0], shared)
        mixtures, every = [mixed_BW], [*shared, *own]
        for i, (experts, x_BF) in enumerate(zip(self.tasks, x[1:], strict=True)):
            assert isinstance(experts, nn.ModuleList)
            own = outputs(experts, x_BF)
            every += own
            if gates:
                mixtures.append(mixture(gates[i](x_BF), [*own, *shared]))
        logit_BE = self.gate(shared_BF)
        if self.task_gate is not None:
            logit_BE = torch.cat([logit_BE, self.task_gate(shared_BF)], dim=1)
        return mixtures, mixture(logit_BE, every)


class AuxiliaryTask(nn.Module):
    """What serving drops of an auxiliary task: its part of the last level and its gate of the level below."""

    def __init__(self, own: Own, gate: Gate | None) -> None:
        super().__init__()
        self.own, self.gate_below = own, gate

    def forward(self, x_BF: Tensor, shared: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        found: tuple[Tensor, list[Tensor]] = self.own(x_BF, shared)
        return found


class PLE(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020): (B, F) -> T times (B, W).

    Level l, for task t (Eq. 4-7), of E_t own experts of the task and E_s shared ones:
        x_t^l = sum_e softmax(W_t^l x_t^{l-1})_e [E_t^l(x_t^{l-1}), E_s^l(x_s^{l-1})]_e,      x_t^0 = x_s^0 = h
        x_s^l = sum_e softmax(W_s^l x_s^{l-1})_e [E_s^l, E_1^l, ..., E_T^l]_e,                not in the last level
    One level is CGC (Eq. 1-3).

    With one level serving keeps the shared experts and the primary task's own. With more, x_s mixes the
    auxiliary tasks' experts of every level but the last, so these are served too, and with three or more the
    auxiliary tasks' gates of every level but the last two.
    """

    def __init__(self, in_features: int, config: ExpertsConfig) -> None:
        super().__init__()
        self._config = config
        self.out_features = width = config.units[-1]
        below = config.levels - 1
        self.levels = nn.ModuleList(Extraction(in_features if i == 0 else width, config) for i in range(below))
        """All but the last."""
        self._last = width if below else in_features
        self.experts = nn.ModuleList(expert(self._last, config.units) for _ in range(config.shared))
        self.primary = Own(self._last, config, config.own)
        self.gates = nn.ModuleList()
        """Of the auxiliary tasks in every level but the last two: level by level."""
        self.auxiliary = nn.ModuleList()
        self._cohorts = 0

    def add_auxiliary(self, cohorts: int, serving: bool = False) -> None:
        """Experts and gates of `cohorts` auxiliary tasks; with `serving` only those the primary task needs."""
        self._cohorts = cohorts
        levels = self._levels()
        for level in levels:
            level.add_auxiliary(cohorts)
        for level in levels[:-1]:
            self.gates.extend(level.auxiliary_gate() for _ in range(cohorts))
        for _ in range(0 if serving else cohorts):
            below = levels[-1].auxiliary_gate() if levels else None
            self.auxiliary.append(AuxiliaryTask(Own(self._last, self._config, self._config.own), below))

    def forward(self, h_BF: Tensor) -> list[Tensor]:
        x, shared_BF = [h_BF] * (1 + self._cohorts), h_BF
        gates = [*self.gates, *(task.gate_below for task in self.auxiliary)]
        for i, level in enumerate(self.levels):
            x, shared_BF = level(x, shared_BF, gates[i * self._cohorts : (i + 1) * self._cohorts])
        shared = outputs(self.experts, shared_BF)
        tasks = (self.primary, *self.auxiliary)  # serving has the primary one alone
        return [task(x_BF, shared)[0] for task, x_BF in zip(tasks, x, strict=False)]

    def _levels(self) -> list[Extraction]:
        return [level for level in self.levels if isinstance(level, Extraction)]


Encoder = SharedBottom | MMoE | PLE


def encoder_of(config: ModelConfig, in_features: int) -> Encoder:
    """The primary task's part of the encoder `config.encoder` over `in_features`; see `add_auxiliary`."""
    if config.encoder == "mmoe":
        return MMoE(in_features, config.experts)
    if config.encoder == "ple":
        return PLE(in_features, config.experts)
    return SharedBottom(in_features)
