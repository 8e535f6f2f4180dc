"""The named models that the benchmarks of training measure. "demo" is
c2al/configs/conflict.toml, not what `make demo` runs. Imports torch alone."""

import dataclasses
import importlib.resources
from collections.abc import Callable

from c2al.config import Config, DataConfig, DenseFeature, FMConfig, ModelConfig, SparseFeature, TrainConfig, load_config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batch it trains on."""

    config: Config
    batch: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of every embedding table."""
        return tuple(feature.rows for feature in self.config.data.sparse)


def _made(batch: int, dense: int, rows: list[int], model: ModelConfig) -> Shape:
    """A shape of single-valued integer ids."""
    data = DataConfig(
        dense=tuple(DenseFeature(column=f"d{i}") for i in range(dense)),
        sparse=tuple(SparseFeature(column=f"s{i}", num_embeddings=n) for i, n in enumerate(rows)),
    )
    return Shape(Config(data=data, model=model, train=TrainConfig(batch_size=batch)), batch)


def _shipped(name: str) -> Shape:
    config = load_config(str(importlib.resources.files("c2al.configs") / f"{name}.toml"))
    return Shape(config, config.train.batch_size)


def _spread(smallest: int, largest: int, tables: int) -> list[int]:
    """Table sizes at equal steps of their logarithm."""
    return [round(smallest * (largest / smallest) ** (i / (tables - 1))) for i in range(tables)]


def wukong_26x16() -> Shape:
    """The peers' own shape: two layers of 16 linear-compressed and 16 FM tokens, no map over them."""
    model = ModelConfig(
        embedding_dim=16, dense_hidden=(64,), layers=2, interactions=("linear", "fm_attention"), tokens=(16, 16),
        ensemble="stack", shortcut="linear", head_hidden=(512, 64),
        fm=FMConfig(layout="wukong", y="static", k=24, hidden=512),
    )  # fmt: skip
    return _made(2048, 13, _spread(1_000, 100_000, 26), model)


def dhen_production() -> Shape:
    """64 features of 64 dimensions, three layers of four modules."""
    model = ModelConfig(
        embedding_dim=64, dense_hidden=(256, 128), dense_tokens=1, layers=3,
        interactions=("fm_attention", "linear", "cross", "attention"), cross_rank=64, attention_heads=4,
        head_hidden=(256, 128), fm=FMConfig(k=16, hidden=128),
    )  # fmt: skip
    return _made(4096, 16, _spread(100, 1_000_000, 63), model)


def tiny() -> Shape:
    """For tests and dry runs."""
    model = ModelConfig(
        embedding_dim=8, layers=1, interactions=("fm_attention", "linear", "cross", "attention"),
        cross_rank=2, head_hidden=(8,), fm=FMConfig(k=2, hidden=8),
    )  # fmt: skip
    return _made(16, 3, [50, 60, 70], model)


def tiny_wukong() -> Shape:
    """wukong-26x16 for tests and dry runs."""
    model = ModelConfig(
        embedding_dim=8, dense_hidden=(6,), layers=2, interactions=("linear", "fm_attention"), tokens=(3, 2),
        ensemble="stack", shortcut="linear", head_hidden=(8, 4),
        fm=FMConfig(layout="wukong", y="static", k=2, hidden=8),
    )  # fmt: skip
    return _made(16, 3, [50, 60, 70], model)


SHAPES: dict[str, Callable[[], Shape]] = {
    "wukong-26x16": wukong_26x16,
    "dhen-production": dhen_production,
    "demo": lambda: _shipped("conflict"),
    "kuairand": lambda: _shipped("kuairand"),
    "tiny": tiny,
    "tiny-wukong": tiny_wukong,
}
