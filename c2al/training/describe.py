"""What a configuration builds: layers, shapes, parameters and FLOPs, in training and at serving.

Nothing is trained and nothing is allocated: the model is made of fake tensors, which have shapes and no values.
FLOPs are those of matrix products, as torch.utils.flop_counter counts them, 2 per multiplication and addition;
sums, norms and lookups of embeddings are not among them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from c2al.config import Config
from c2al.data.parquet import check_sizes
from c2al.distributed.placement import Cluster
from c2al.distributed.sharding import planned
from c2al.errors import ConfigError
from c2al.nn.dhen import DHEN, DHENLayer
from c2al.nn.encoders import PLE, MMoE, SharedBottom
from c2al.nn.prediction_heads import Heads
from c2al.text import csv_text, table
from c2al.training.model import C2ALModel, OverArch

_OPENED = (OverArch, DHEN, DHENLayer, SharedBottom, MMoE, PLE, Heads, nn.ModuleList, nn.ModuleDict)
"""Modules that are shown as their parts."""

COLUMNS = ("layer", "output", "parameters", "bytes", "FLOPs training", "FLOPs serving", "served")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the description."""

    name: str
    """As in a checkpoint."""
    output: str
    """Shape of what it gives, B the batch."""
    parameters: int
    bytes: int
    """Of the parameters, without the optimizer's state."""
    training: int
    """FLOPs per sample of a forward and a backward pass."""
    serving: int
    """FLOPs per sample of a forward pass of what is served."""
    served: bool
    """False: export drops it."""

    @property
    def cells(self) -> tuple[str | int, ...]:
        return (self.name, self.output, self.parameters, self.bytes, self.training, self.serving, _yes(self.served))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A model with its auxiliary prediction heads, and what is left of it at serving."""

    cohorts: int
    tables: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    """Above the tables."""

    @property
    def totals(self) -> tuple[Layer, ...]:
        """Sums over the tables, the layers above them, all, what is served and what is not; `served` is meaningless."""
        every = (*self.tables, *self.layers)
        return (
            _sum("embedding tables", self.tables),
            _sum("above the tables", self.layers),
            _sum("in training", every),
            _sum("served", [layer for layer in every if layer.served]),
            _sum("dropped by export", [layer for layer in every if not layer.served]),
        )

    def table(self) -> str:
        """Text for a terminal."""
        rows = [COLUMNS, *map(_shown, self.tables), *map(_shown, self.layers)]
        totals = [(*_shown(total)[:-1], "") for total in self.totals]
        return table([*rows, ("",) * len(COLUMNS), *totals], left=2)

    def csv(self) -> str:
        """The layers, one per line."""
        return csv_text([COLUMNS, *(layer.cells for layer in (*self.tables, *self.layers))])


def describe(config: Config, cohorts: int) -> Description:
    """The model of `config` with `cohorts` auxiliary prediction heads.

    Example: ``describe(load_config("config.toml"), cohorts=2).totals[3].serving``

    Raises ConfigError when the configuration is of no model that can be built.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = C2ALModel(config, cohorts)
        serving = C2ALModel(config, cohorts, serving=True).eval()
        trained = _flops(training.over, config, backward=True)
        served = _flops(serving.over, config, backward=False)
    kept = {name for name, _ in serving.named_parameters()}
    layers = []
    for name, module in _parts("over", training.over):
        held = [(f"{name}.{n}", p) for n, p in module.named_parameters()]
        part = trained.get(name, _Part("", 0))
        if not held and not part.flops:
            continue
        layers.append(
            Layer(
                name=name,
                output=part.output,
                parameters=sum(p.numel() for _, p in held),
                bytes=sum(p.numel() * p.element_size() for _, p in held),
                training=part.flops,
                serving=served.get(name, _Part("", 0)).flops,
                served=all(n in kept for n, _ in held) if held else name in served,
            )
        )
    return Description(cohorts=cohorts, tables=tuple(_tables(training)), layers=tuple(layers))


def plan_for(config: Config, ranks: str) -> str:
    """The plan of the tables, the planner's or that of `dist.plan`, for `ranks`: hosts and ranks per host, e.g. "8x8",
    none of which need be here.

    `dist.device = "auto"` stands for what is here. Raises ConfigError for other text and for ranks that training
    would refuse, PlanError when nothing fits.
    """
    hosts, by, per_host = ranks.partition("x")
    if not (by and hosts.isdecimal() and per_host.isdecimal() and int(hosts) and int(per_host)):
        raise ConfigError(f"--ranks: expected HOSTSxRANKS, e.g. 8x8, is '{ranks}'")
    cuda = config.dist.device == "cuda" or (config.dist.device == "auto" and torch.cuda.is_available())
    local_size = config.dist.local_world_size or int(per_host)
    size = int(hosts) * int(per_host)
    if size % local_size:
        raise ConfigError(f"dist.local_world_size: {size} ranks are not a multiple of {local_size} ranks per host")
    check_sizes(config.train.batch_size, config.data.shards, size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = C2ALModel(config)
    return planned(model, config, Cluster(size, local_size, torch.device("cuda" if cuda else "cpu")))[1]


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one run of a module was."""

    output: str
    flops: int


def _flops(over: OverArch, config: Config, *, backward: bool) -> dict[str, _Part]:
    """Part -> FLOPs of a batch of one row.

    Every part is run once more alone, on inputs of the shapes that it had within the model and with gradients
    for the same ones: the counter's own modules lose track of who owns what in a backward pass.
    """
    inputs: dict[str, tuple[Any, ...]] = {}
    active: list[str] = []

    def entered(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not active:  # else it is a piece of another part
                inputs[name] = args
            active.append(name)

        return hook

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        active.pop()

    parts = dict(_parts("over", over))
    hooks = [m.register_forward_pre_hook(entered(n)) for n, m in parts.items()]
    hooks += [m.register_forward_hook(left) for m in parts.values()]
    with torch.set_grad_enabled(backward):
        widths = [over.dims[name] if name else over.dim for name, _ in over.groups]
        sums = [
            torch.zeros(1, len(keys), width, requires_grad=backward)
            for (_, keys), width in zip(over.groups, widths, strict=True)
        ]
        pooled_BND = over.embeddings(sums, None) if sums else None
        over.logits(torch.zeros(1, len(config.data.dense)), pooled_BND)
        for hook in hooks:
            hook.remove()
        return {name: _alone(parts[name], args, backward) for name, args in inputs.items()}


def _alone(module: nn.Module, args: tuple[Any, ...], backward: bool) -> _Part:
    leaves = [_leaf(arg) for arg in args]
    with FlopCounterMode(display=False) as counter:
        output = module(*leaves)
        tensors = [t for t in _tensors(output) if t.requires_grad]
        if backward and tensors:
            torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
    return _Part(_shape(output), counter.get_total_flops())


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    # Modules that are handed over are no values.
    return [_leaf(v) for v in value] if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _shape(output: Any) -> str:
    first = next(_tensors(output))
    return "(" + ", ".join(["B", *map(str, first.shape[1:])]) + ")"


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are shown, by their names in a checkpoint."""
    if not isinstance(module, _OPENED):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _parts(f"{name}.{child}", inner)


def _tables(model: C2ALModel) -> Iterator[Layer]:
    """Those without weights, then the weighted ones."""
    bags = {
        f"{where}.{name}": bag
        for where, collection in (("ebc", model.ebc), ("weighted_ebc", model.weighted_ebc))
        if collection is not None
        for name, bag in collection.embedding_bags.items()
    }
    for name, bag in bags.items():
        size = bag.weight.numel()
        yield Layer(
            name=name,
            output=f"(B, {bag.weight.shape[1]})",
            parameters=size,
            bytes=size * bag.weight.element_size(),
            training=0,
            serving=0,
            served=True,
        )


def _sum(name: str, layers: Sequence[Layer]) -> Layer:
    return Layer(
        name=name,
        output="",
        parameters=sum(v.parameters for v in layers),
        bytes=sum(v.bytes for v in layers),
        training=sum(v.training for v in layers),
        serving=sum(v.serving for v in layers),
        served=all(v.served for v in layers),
    )


def _shown(layer: Layer) -> tuple[str, ...]:
    return tuple(f"{cell:,}" if isinstance(cell, int) else cell for cell in layer.cells)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
