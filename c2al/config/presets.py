"""Known stacks: what `model.preset` stands for.

Every preset sets the same fields, so that one can take the place of another. From weak to strong: the defaults,
a preset in the file, fields in the file, a preset in an override, fields in overrides. The resolved configuration
holds the fields, not only the name, so it reads back equal whatever a later version makes of the name.

wukong          Wukong (arXiv 2403.02545): linear compression and optimised FM side by side, linear shortcut, norm.
dcnv2           Stacked DCN-v2 (arXiv 2008.13535): three cross layers on x_0, then the prediction head as deep network.
dlrm            DLRM (arXiv 1906.00091): dot products of all pairs. Where DLRM's top MLP reads them beside the dense
                vector, this adds a linear map of all fields (of which the dense tokens are some) to a map of them.
attention-only  Self-attention with shortcut and norm, two layers (AutoInt, arXiv 1810.11921, is its relative).
"""

from collections.abc import Iterable
from typing import Any

_STACK: dict[str, Any] = {
    "layers": 2,
    "interactions": ["fm_attention", "linear", "cross"],
    "ensemble": "concat",
    "fields": 0,
    "tokens": [],
    "shortcut": "identity",
    "norm": "layer",
    "cross_layers": 1,
    "fm.layout": "paper",
    "fm.y": "mlp",
}
"""The default stack; a test holds it to the defaults of the fields."""

PRESETS: dict[str, dict[str, Any]] = {
    "": _STACK,
    "wukong": _STACK
    | {
        "interactions": ["linear", "fm_attention"],
        "tokens": [16, 16],
        "ensemble": "stack",
        "shortcut": "linear",
        "fm.layout": "wukong",
        "fm.y": "static",
    },
    "dcnv2": _STACK
    | {
        "layers": 1,
        "interactions": ["cross"],
        "cross_layers": 3,
        "ensemble": "sum",
        "shortcut": "none",
        "norm": "none",
    },
    "dlrm": _STACK | {"layers": 1, "interactions": ["dot"], "ensemble": "sum", "shortcut": "linear", "norm": "none"},
    "attention-only": _STACK | {"interactions": ["attention"], "ensemble": "sum"},
}
"""Fields of `model` by dotted name."""


def expand(tree: dict[str, Any]) -> None:
    """Sets what the preset in a parsed file stands for, where the file does not set it itself."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return
    preset = model.get("preset")
    if not preset or not isinstance(preset, str):  # a value of the wrong type is reported where all are
        return
    for path, value in PRESETS.get(preset, {}).items():
        section, _, field = path.rpartition(".")
        inner = model.setdefault(section, {}) if section else model
        if isinstance(inner, dict):
            inner.setdefault(field, value)


def with_presets(changes: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Overrides (dotted name, value), with what a preset among them stands for in front of the others."""
    listed = list(changes)
    chosen = [value for path, value in listed if path == "model.preset" and isinstance(value, str)]
    fields = [(f"model.{name}", value) for preset in chosen for name, value in PRESETS.get(preset, {}).items()]
    return fields + listed
