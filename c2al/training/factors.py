"""Which settings a loss that is not finite may come from."""

import contextlib
from collections.abc import Iterator

from c2al.config import Config
from c2al.errors import NotFiniteError


@contextlib.contextmanager
def naming_factors(config: Config) -> Iterator[None]:
    """Adds to a NotFiniteError of the block the settings that make losses and steps large."""
    try:
        yield
    except NotFiniteError as e:
        raise NotFiniteError(f"{e}; settings that make losses and steps larger: {', '.join(factors(config))}") from e


def factors(config: Config) -> list[str]:
    """The learning rates, and what else multiplies losses or steps and is set: ["train.cohort_weight = 100.0", ...]."""
    train, optimizer, fm = config.train, config.train.optimizer, config.model.fm
    values = {"train.optimizer.sparse_lr": optimizer.sparse_lr, "train.optimizer.dense_lr": optimizer.dense_lr}
    optional = {
        "train.optimizer.sparse_weight_decay": optimizer.sparse_weight_decay,
        "train.optimizer.weight_decay": optimizer.weight_decay,
        "model.fm.y_l1": fm.y_l1,
        "model.fm.y_l2": fm.y_l2,
    }
    values |= {name: value for name, value in optional.items() if value}
    values |= {f"data.sparse.{f.key}.init_scale": f.init_scale for f in config.data.sparse if f.init_scale > 1}
    return [*train.cohort_settings, *(f"{name} = {value}" for name, value in values.items())]
