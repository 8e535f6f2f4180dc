"""One TOML file -> strict validation -> frozen dataclasses.

``load_config`` reports every problem at once, each with its dotted path. Nothing is read from
the environment, nothing is mutated after loading, and ``dump_config`` writes a file that loads
equal. A field's unit and effect stand in the docstring under it.
"""

import dataclasses
import difflib
import math
import os
import tempfile
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from c2al.errors import ConfigError

Problems = Iterator[tuple[str, str]]
"""(field name relative to the section, what is wrong with it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFeature:
    """One numeric column that enters the dense arch."""

    column: str
    transforms: tuple[Literal["log1p", "standardise"], ...] = ("standardise",)
    """Applied in order. log1p is sign(x) * log(1 + |x|); standardise uses the training split's
    mean and standard deviation, after the transforms before it."""
    null: float | None = None
    """Value that replaces a null before the transforms; without it a null is an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFeature:
    """One categorical column (single or list-valued) with its own embedding table."""

    column: str
    name: str = ""
    """Name of the feature and of its embedding table; empty: the column's name."""
    encoding: Literal["hash", "vocabulary", "identity", "bucketise"] = "hash"
    """hash: stable 64-bit hash modulo num_embeddings (int or string). vocabulary: index in the
    sorted set of training values, the most frequent num_embeddings - 1 of them, row 0 for unknown.
    identity: the integer itself, which must lie in [0, num_embeddings). bucketise: index of the
    bucket of a numeric column cut at `edges`; row 0 is null."""
    num_embeddings: int = 0
    """Rows of the embedding table; 0 only with bucketise, which needs len(edges) + 2."""
    edges: tuple[float, ...] = ()
    """Ascending cut points of bucketise; value x goes to 1 + #(edges <= x)."""
    max_length: int = 1
    """Values kept of a list-valued column, from the front; 1 for a scalar column."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a list-valued feature are combined."""

    @property
    def key(self) -> str:
        """Name of the feature in the KeyedJaggedTensor."""
        return self.name or self.column

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return len(self.edges) + 2 if self.encoding == "bucketise" else self.num_embeddings

    def problems(self) -> Problems:
        if self.encoding == "bucketise":
            if not self.edges or list(self.edges) != sorted(set(self.edges)):
                yield "edges", f"must be strictly ascending and not empty, is {list(self.edges)}"
            if self.num_embeddings:
                yield "num_embeddings", "is derived from edges with encoding = 'bucketise'; remove it"
        else:
            if self.num_embeddings < 2:
                yield "num_embeddings", f"must be at least 2, is {self.num_embeddings}"
            if self.edges:
                yield "edges", f"only with encoding = 'bucketise', not '{self.encoding}'"
        if self.max_length < 1:
            yield "max_length", f"must be at least 1, is {self.max_length}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One semantic axis along which impressions are cut into cohorts."""

    name: str
    column: str = ""
    """Column that holds the axis; empty for a cross."""
    kind: Literal["categorical", "percentiles", "edges", "cross"] = "categorical"
    percentiles: tuple[float, ...] = ()
    """Cut points in percent, from 0 to 100, e.g. [0, 5, 25, 50, 75, 95, 100]."""
    edges: tuple[float, ...] = ()
    """Cut points in the column's unit; cohorts are (-inf, e0), [e0, e1), ... [en, inf)."""
    cross: tuple[str, ...] = ()
    """Names of two or three other axes whose combinations are the cohorts."""

    def problems(self) -> Problems:
        wants = {"categorical": (), "percentiles": ("percentiles",), "edges": ("edges",), "cross": ("cross",)}[
            self.kind
        ]
        for field in ("percentiles", "edges", "cross"):
            value = getattr(self, field)
            if field in wants and not value:
                yield field, f"needed by kind = '{self.kind}'"
            if field not in wants and value:
                yield field, f"does not go with kind = '{self.kind}'"
        if (self.kind == "cross") == bool(self.column):
            yield "column", "a cross names axes, not a column" if self.column else f"needed by kind = '{self.kind}'"
        p = self.percentiles
        if p and (list(p) != sorted(set(p)) or p[0] != 0 or p[-1] != 100):
            yield "percentiles", f"must ascend strictly from 0 to 100, is {list(p)}"
        if self.edges and list(self.edges) != sorted(set(self.edges)):
            yield "edges", f"must ascend strictly, is {list(self.edges)}"
        if self.cross and not 2 <= len(self.cross) <= 3:
            yield "cross", f"takes two or three axes, has {len(self.cross)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the impressions lie and what their columns mean."""

    train: tuple[str, ...] = ()
    """Files, folders, globs or URIs (file://, s3://, gs://, hdfs://) of the training split."""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    label: str = "label"
    """Column with 0 or 1; anything else is an error."""
    row_id: str = "row_id"
    """int64 column that names an impression; scores of two runs are paired by it."""
    user_id: str = "user_id"
    """Column whose rows are not independent: the unit of bootstrap and jackknife."""
    time: str = ""
    """Column with the time of the impression (carried, never an input unless declared as one)."""
    weight: str = ""
    """Column with a positive sample weight; empty: every row weighs 1."""
    dense: tuple[DenseFeature, ...] = ()
    sparse: tuple[SparseFeature, ...] = ()
    shards: int = 8
    """Logical shards the training rows are dealt to. A global batch takes an equal share of every
    shard, so its rows do not depend on the world size, which must divide this."""
    shuffle_rows: int = 131072
    """Rows of the shuffle buffer over all shards; bounds the reader's memory. 0: file order."""
    workers: int = 1
    """Threads a rank that decode and encode Parquet in the background."""
    prefetch: int = 4
    """Batches kept ready a rank."""

    def problems(self) -> Problems:
        if not self.dense and not self.sparse:
            yield "sparse", "declare at least one dense or sparse feature"
        keys = [f.key for f in self.sparse]
        for key in sorted({k for k in keys if keys.count(k) > 1}):
            yield "sparse", f"two features are named '{key}'; give one of them a name of its own"
        columns = [f.column for f in self.dense]
        for column in sorted({c for c in columns if columns.count(c) > 1}):
            yield "dense", f"column '{column}' is declared twice"
        for section, used in (("dense", columns), ("sparse", [f.column for f in self.sparse])):
            for column in sorted(set(used) & {self.label, self.row_id, self.weight}):
                yield section, f"column '{column}' is the label, the row id or the weight and must not be an input"
        for field in ("shards", "workers", "prefetch"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        if self.shuffle_rows < 0:
            yield "shuffle_rows", f"must not be negative, is {self.shuffle_rows}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FMConfig:
    """FM attention G = X X^T Y (C2AL Eq. 3)."""

    layout: Literal["paper", "wukong"] = "paper"
    """paper: Y (d x k) mixes embedding dimensions. wukong: Y (n x k) mixes fields."""
    y: Literal["mlp", "static"] = "mlp"
    """mlp: Y per sample from an attention MLP. static: Y is a learned parameter."""
    k: int = 8
    """Columns of Y."""
    hidden: int = 64
    """Hidden units of the MLP that turns G into fields and, with y = 'mlp', of the attention MLP."""

    def problems(self) -> Problems:
        for field in ("k", "hidden"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """EmbeddingBagCollection -> dense arch -> DHEN -> heads."""

    embedding_dim: int = 16
    """d, of every embedding table; a multiple of 4 (fbgemm)."""
    dense_hidden: tuple[int, ...] = (64,)
    """Hidden units of the dense arch, which maps the dense features to `dense_tokens` fields."""
    dense_tokens: int = 1
    """Fields the dense arch contributes beside the sparse features."""
    layers: int = 2
    """DHEN layers."""
    interactions: tuple[Literal["fm_attention", "linear", "cross", "attention"], ...] = (
        "fm_attention",
        "linear",
        "cross",
    )
    """Interaction modules of every layer."""
    ensemble: Literal["concat", "sum"] = "concat"
    fields: int = 0
    """Fields every DHEN layer puts out; 0: as many as it takes in."""
    shortcut: Literal["identity", "linear"] = "identity"
    """identity needs fields = 0."""
    norm: Literal["layer", "rms"] = "layer"
    cross_rank: int = 16
    """Rank of the DCN-v2 cross weights."""
    attention_heads: int = 2
    """Heads of the multi-head self-attention; divides embedding_dim."""
    head_hidden: tuple[int, ...] = (64,)
    """Hidden units of the primary head."""
    auxiliary_hidden: tuple[int, ...] = ()
    """Hidden units of each auxiliary head; none: linear in the encoder's features."""
    dropout: float = 0.0
    """Probability, after every DHEN layer."""
    fm: FMConfig = FMConfig()

    def problems(self) -> Problems:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            yield "embedding_dim", f"must be a positive multiple of 4, is {self.embedding_dim}"
        for field in ("layers", "dense_tokens", "cross_rank", "attention_heads"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        for field in ("dense_hidden", "head_hidden", "auxiliary_hidden"):
            if any(h < 1 for h in getattr(self, field)):
                yield field, f"units must be at least 1, is {list(getattr(self, field))}"
        if self.fields < 0:
            yield "fields", f"must not be negative, is {self.fields}"
        if not self.interactions or len(set(self.interactions)) != len(self.interactions):
            yield "interactions", f"must name each module at most once and at least one, is {list(self.interactions)}"
        if self.attention_heads >= 1 and self.embedding_dim % self.attention_heads:
            yield "attention_heads", f"must divide embedding_dim = {self.embedding_dim}, is {self.attention_heads}"
        if self.fields and self.shortcut == "identity":
            yield "shortcut", "identity needs fields = 0 (a layer that keeps its number of fields)"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"must lie in [0, 1), is {self.dropout}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for the tables, Adam or AdamW for the rest, one schedule for both."""

    sparse_lr: float = 0.05
    sparse_eps: float = 1e-8
    sparse_weight_decay: float = 0.0
    """L2 penalty inside the fused row-wise Adagrad update."""
    dense: Literal["adam", "adamw"] = "adamw"
    dense_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Of the dense optimizer."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up, to final_lr_fraction at the last step."""
    final_lr_fraction: float = 0.0
    clip_norm: float = 0.0
    """Bound on the global L2 norm of the dense gradients; 0: none. The tables are updated inside
    backward, before a global norm exists, and are not part of it."""

    def problems(self) -> Problems:
        for field in ("sparse_lr", "dense_lr", "sparse_eps"):
            if not getattr(self, field) > 0 or not math.isfinite(getattr(self, field)):
                yield field, f"must be a positive number, is {getattr(self, field)}"
        for field in ("weight_decay", "sparse_weight_decay", "warmup_steps", "clip_norm"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"
        if not all(0 <= b < 1 for b in self.betas):
            yield "betas", f"must lie in [0, 1), is {list(self.betas)}"
        if not 0 <= self.final_lr_fraction <= 1:
            yield "final_lr_fraction", f"must lie in [0, 1], is {self.final_lr_fraction}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 0
    """Steps between checkpoints; 0: only at the end of training."""
    keep_last: int = 2
    keep_best: int = 1
    """Checkpoints of lowest validation NE kept besides the last ones."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def problems(self) -> Problems:
        if self.keep_last < 1:
            yield "keep_last", f"must be at least 1, is {self.keep_last}"
        for field in ("every_steps", "keep_best"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: C2AL Eq. 4 over the training split."""

    batch_size: int = 1024
    """Global batch: rows of one step over all ranks. A multiple of data.shards."""
    accumulate: int = 1
    """Batches whose dense gradients are summed before one optimizer step."""
    epochs: int = 1
    max_steps: int = 0
    """Steps after which training ends before its epochs are over; 0: no bound."""
    lambda_head: float = 0.0
    """Weight of the head cohort's auxiliary loss; 0 with lambda_tail = 0: no auxiliary heads."""
    lambda_tail: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the dense part; parameters and losses stay float32."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    y_every: int = 0
    """Steps between records of the distribution of Y; 0: only at the end."""
    profile_steps: int = 0
    """Steps recorded by torch.profiler after the tenth; 0: none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def auxiliary(self) -> bool:
        """Whether the model carries the head-cohort and tail-cohort heads."""
        return self.lambda_head > 0 or self.lambda_tail > 0

    def problems(self) -> Problems:
        for field in ("batch_size", "accumulate", "epochs", "log_every"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        if self.accumulate > 1 and self.checkpoint.every_steps % self.accumulate:
            yield (
                "checkpoint.every_steps",
                f"must be a multiple of accumulate = {self.accumulate}: half-summed "
                f"gradients are not saved; is {self.checkpoint.every_steps}",
            )
        for field in ("max_steps", "lambda_head", "lambda_tail", "eval_every", "y_every", "profile_steps"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"


Sharding = Literal[
    "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Sharding constraints of one embedding table."""

    name: str
    sharding: tuple[Sharding, ...] = ()
    """Types the planner may choose from; empty: dist.sharding."""
    min_partition: int = 0
    """Smallest column shard of column-wise types; 0: the planner's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Process group, sharding and communication."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: tuple[Sharding, ...] = ("table_wise", "row_wise")
    """Types the planner may choose from for every table not named in `tables`. data_parallel
    tables are trained by row-wise Adagrad outside the fused kernel."""
    tables: tuple[TableConfig, ...] = ()
    plan: str = ""
    """JSON plan file, as a run saves it; replaces the planner."""
    local_world_size: int = 0
    """Ranks a host in the planner's topology; 0: as launched."""
    hbm_gib: float = 0.0
    """Device memory a rank in the planner's topology; 0: the device's."""
    ddr_gib: float = 8.0
    """Host memory a rank in the planner's topology."""
    forward_comm: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    backward_comm: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    timeout_seconds: float = 600.0
    """Longest wait of a collective before the run ends with an error."""

    def problems(self) -> Problems:
        if not self.sharding:
            yield "sharding", "must name at least one type"
        if self.timeout_seconds <= 0:
            yield "timeout_seconds", f"must be positive, is {self.timeout_seconds}"
        for field in ("hbm_gib", "ddr_gib", "local_world_size"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"
        names = [t.name for t in self.tables]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "tables", f"table '{name}' is named twice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """Which pair of cohorts becomes head and tail."""

    rule: Literal["js", "wasserstein", "wasserstein_logit", "kl", "cosine"] = "js"
    """Divergence the pairs are ranked by, through its lower confidence bound."""
    axes: tuple[str, ...] = ()
    """Axes a pair may be chosen from; empty: all."""
    min_rows: int = 0
    """Rows both cohorts of the chosen pair must have."""
    min_positives: int = 0
    """Positives both cohorts of the chosen pair must have."""
    confidence: float = 0.95
    """Family-wise confidence of the lower bounds."""
    correction: Literal["holm", "bonferroni"] = "bonferroni"
    max_cohorts: int = 4096
    """Cohorts one axis may have."""
    prediction: str = "prediction"
    """Column with the baseline's predicted probability."""
    label: str = "label"
    """Column with 0 or 1; the score job names it so. The user's column is data.user_id."""
    jackknife: bool = True
    """False: divergences without intervals, and therefore no choice."""
    cut_tolerance: float = 0.05
    """How far the share of rows between two percentile cuts may be from the one asked for (ties)."""
    threads: int = 1
    """Worker threads a rank."""
    checkpoint_seconds: float = 60.0
    """Seconds between saves of the accumulators; a killed scan goes on from the last one."""

    def problems(self) -> Problems:
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"
        for field in ("max_cohorts", "threads"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        for field in ("min_rows", "min_positives", "checkpoint_seconds", "cut_tolerance"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Intervals of NE, NE_diff, calibration and AUC."""

    replicates: int = 1000
    """Bootstrap replicates over users."""
    confidence: float = 0.95
    """Two-sided, of every interval."""

    def problems(self) -> Problems:
        if self.replicates < 20:
            yield "replicates", f"must be at least 20, is {self.replicates}"
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Baseline and C2AL over paired seeds."""

    seeds: tuple[int, ...] = (0,)
    """Each seed trains a baseline and a C2AL model with the same data order and initialisation."""
    lambda_head: float = 0.2
    """Of the C2AL runs; train.lambda_head must be 0 in an experiment."""
    lambda_tail: float = 0.2
    discover_on: Literal["validation", "train"] = "validation"
    """Split whose baseline scores cohorts are discovered on."""

    def problems(self) -> Problems:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            yield "seeds", f"must be distinct and not empty, is {list(self.seeds)}"
        if self.lambda_head < 0 or self.lambda_tail < 0 or self.lambda_head + self.lambda_tail == 0:
            yield "lambda_head", "and lambda_tail must not be negative, nor both 0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a job needs besides the files it reads and writes."""

    seed: int = 0
    """Fixes data order, initialisation, dropout and resampling."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    dist: DistConfig = DistConfig()
    axes: tuple[Axis, ...] = ()
    discover: DiscoverConfig = DiscoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    experiment: ExperimentConfig = ExperimentConfig()

    def problems(self) -> Problems:
        if self.seed < 0:
            yield "seed", f"must not be negative, is {self.seed}"
        if self.train.batch_size % self.data.shards:
            yield (
                "train.batch_size",
                f"must be a multiple of data.shards = {self.data.shards}, is {self.train.batch_size}",
            )
        names = [a.name for a in self.axes]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "axes", f"axis '{name}' is declared twice"
        plain = {a.name for a in self.axes if a.kind != "cross"}
        for i, axis in enumerate(self.axes):
            for part in axis.cross:
                if part not in plain:
                    yield f"axes[{i}].cross", f"unknown axis '{part}'{_hint(part, plain)}"
        for name in self.discover.axes:
            if name not in names:
                yield "discover.axes", f"unknown axis '{name}'{_hint(name, names)}"
        keys = {f.key for f in self.data.sparse}
        for i, table in enumerate(self.dist.tables):
            if table.name not in keys:
                yield f"dist.tables[{i}].name", f"no sparse feature is named '{table.name}'{_hint(table.name, keys)}"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads and validates one TOML file.

    `overrides` are the words after the known flags: ``--train.batch_size 512`` or
    ``--train.batch_size=512``; a value is TOML, or a bare string.

    Raises ConfigError with every problem, each with file and dotted path.
    """
    try:
        with open(path, "rb") as f:
            tree = tomllib.load(f)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not a readable TOML file: {e}") from e
    return parse_config(tree, overrides, source=str(path))


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Validates a parsed TOML tree; `source` names it in messages. Raises ConfigError."""
    problems: list[str] = []
    for path, value in _parse_overrides(overrides, problems):
        _apply(tree, path, value, problems)
    config = _build(Config, tree, "", problems)
    if problems:
        raise ConfigError([f"{source}: {p}" for p in problems])
    return typing.cast(Config, config)


def dump_config(config: Any) -> str:
    """TOML text of a config dataclass that parses back equal to it."""
    lines: list[str] = []
    _dump(config, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the resolved config atomically."""
    write_atomically(path, dump_config(config))


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace(config: Config, **changes: Any) -> Config:
    """A copy with dotted fields changed, e.g. ``replace(c, **{"train.lambda_head": 0.1})``. Validated again."""
    tree = tomllib.loads(dump_config(config))
    problems: list[str] = []
    for path, value in changes.items():
        _apply(tree, path, list(value) if isinstance(value, tuple) else value, problems)
    if problems:
        raise ConfigError(problems)
    return parse_config(tree)


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _parse_overrides(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"command line: '{word}' is not an override; write --section.key value")
            continue
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                problems.append(f"command line: --{path} has no value")
                return
            text = rest.pop(0)
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        yield path, value


def _apply(tree: dict[str, Any], path: str, value: Any, problems: list[str]) -> None:
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            problems.append(f"{path}: '{part}' is not a section that an override can enter")
            return
        node = child
    node[last] = value


def _build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Turns a TOML value into `kind`; on a problem appends a line and returns None."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_section(typing.cast(type, kind), value, path, problems)
    if origin is types.UnionType:
        return _build(next(a for a in args if a is not type(None)), value, path, problems)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        problems.append(f"{path}: {value!r} is none of {', '.join(repr(a) for a in args)}{_hint(str(value), args)}")
        return None
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{path}: expected a list, got {_typename(value)} {value!r}")
            return None
        if args[-1] is not Ellipsis and len(value) != len(args):
            problems.append(f"{path}: expected {len(args)} values, got {value!r}")
            return None
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_build(k, v, f"{path}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        problems.append(f"{path}: expected {kind.__name__}, got {_typename(value)} {value!r}")
        return None
    if kind is float and not math.isfinite(value):
        problems.append(f"{path}: must be finite, is {value}")
        return None
    return value


def _build_section(kind: type, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a section, got {_typename(value)} {value!r}")
        return None
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(problems)
    for key in value:
        if key not in fields:
            problems.append(f"{prefix}{key}: unknown key{_hint(key, fields)}")
    built = {k: _build(hints[k], value[k], f"{prefix}{k}", problems) for k in fields if k in value}
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: missing")
    if len(problems) > before:
        return None
    section = kind(**built)
    if hasattr(section, "problems"):
        problems.extend(f"{prefix}{field}: {message}" for field, message in section.problems())
    return section


def _typename(value: Any) -> str:
    return {"dict": "section", "str": "string"}.get(type(value).__name__, type(value).__name__)


def _dump(section: Any, path: str, lines: list[str]) -> None:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    nested = {k: v for k, v in values.items() if dataclasses.is_dataclass(v) or _is_table_array(v)}
    for name, value in values.items():
        if name not in nested and value is not None:
            lines.append(f"{name} = {_toml(value)}")
    for name, value in nested.items():
        full = f"{path}.{name}" if path else name
        for item in value if isinstance(value, tuple) else (value,):
            lines.append(f"\n[[{full}]]" if isinstance(value, tuple) else f"\n[{full}]")
            _dump(item, full, lines)


def _is_table_array(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped)
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
