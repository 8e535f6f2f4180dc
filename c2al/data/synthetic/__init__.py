"""Synthetic impressions, whose true click probability is known.

`SynthConfig` describes the world `conflict`, `LatentConfig` the worlds `privileged`, `visible` and
`homogeneous`; see the modules of the same names. `synthesise` writes any of them::

    synthesise(LatentConfig(world="privileged", seed=1), "data/privileged")
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from c2al.data.ingest.splits import SplitWriter
from c2al.data.synthetic.base import CHUNK_ROWS, TRUE_P, TRUE_P_WITHOUT_LATENT, Entropy, LatentTruth, Truth
from c2al.data.synthetic.conflict import COHORTS, SURFACES, ConflictWorld, SynthConfig
from c2al.data.synthetic.latent import LATENT_WORLDS, SEGMENTS, LatentConfig, LatentWorld, WorldName
from c2al.files import new_folder, write_atomically

__all__ = [
    "CHUNK_ROWS",
    "COHORTS",
    "LATENT_WORLDS",
    "SEGMENTS",
    "SURFACES",
    "LatentConfig",
    "LatentTruth",
    "SynthConfig",
    "Truth",
    "WorldName",
    "synthesise",
]

OVERALL = "overall"
"""Name of the group that holds every row."""


def synthesise(config: SynthConfig | LatentConfig, output: str | Path) -> dict[str, dict[str, Truth]]:
    """Writes <output>/{train,validation,test}/*.parquet and truth.json; returns split -> group -> truth.

    Column `true_p` (float32, the click probability that the label was drawn from) is known only after
    the fact and must never be an input; neither must `true_p_without_latent`. Their normalized
    entropies are what no model can beat but by luck. Memory does not depend on rows; the same config
    gives the same bytes.

    Raises OutputError when `output` exists or cannot be written; then nothing is left.
    """
    world = LatentWorld(config) if isinstance(config, LatentConfig) else ConflictWorld(config)
    entropy = {split: {name: Entropy() for name in (OVERALL, *world.groups)} for split in world.splits}
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        for part in world.parts():
            writer.write(part.split, part.table)
            label_N = part.table["label"].to_numpy()
            p_N = {
                name: part.table[name].to_numpy().astype(np.float64)
                for name in (TRUE_P, TRUE_P_WITHOUT_LATENT)
                if name in part.table.column_names
            }
            entropy[part.split][OVERALL].add(label_N, p_N)
            for code, name in enumerate(world.groups):
                in_N = part.group_N == code
                entropy[part.split][name].add(label_N[in_N], {k: p[in_N] for k, p in p_N.items()})
        writer.close()
        truth = {split: {name: e.truth() for name, e in groups.items()} for split, groups in entropy.items()}
        text: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            **world.description(),
            "splits": {s: {n: dataclasses.asdict(t) for n, t in groups.items()} for s, groups in truth.items()},
        }
        write_atomically(folder / "truth.json", json.dumps(text, indent=1) + "\n")
    return truth
