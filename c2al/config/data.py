"""The sections that say what the impressions are: features, axes, splits."""

import dataclasses
from typing import Literal

from c2al.config.bounds import LARGEST_FACTOR
from c2al.config.names import table_name_problem
from c2al.typed import Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFeature:
    """One numeric column that enters the dense arch."""

    column: str
    """Column with the values; any number type, one value per row."""
    transforms: tuple[Literal["log1p", "standardise"], ...] = ("standardise",)
    """Applied in order. log1p is sign(x) * log(1 + |x|); standardise uses the training split's
    mean and standard deviation, after the transforms before it."""
    null: float | None = None
    """Value that replaces a null before the transforms; without it a null is an error."""

    def problems(self) -> Problems:
        if not self.column:
            yield "column", "must not be empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFeature:
    """One categorical column (single or list-valued) with its own embedding table, or with one that it shares."""

    column: str
    """Column with the values: integers or strings, one or a list per row."""
    name: str = ""
    """Name of the feature; empty: the column's name. A name with a dot, or one that torch uses itself (type, items,
    keys, values, ...), is refused."""
    table: str = ""
    """Name of the feature's embedding table, which checkpoints and plans know it by; empty: the feature's name.
    Features that name one table share it. They must agree in everything that describes a table: encoding,
    num_embeddings, edges, pooling, dim, init, init_scale and min_count. Their vocabulary and counts are fitted over
    all their columns."""
    encoding: Literal["hash", "vocabulary", "identity", "bucketise"] = "hash"
    """hash: stable 64-bit hash modulo num_embeddings (int or string). vocabulary: index in the
    sorted set of training values, the most frequent num_embeddings - 1 of them, row 0 for unknown.
    identity: the integer itself, which must lie in [0, num_embeddings). bucketise: index of the
    bucket of a numeric column cut at `edges`; row 0 is null."""
    num_embeddings: int = 0
    """Rows of the embedding table; 0 only with bucketise, which needs len(edges) + 2."""
    edges: tuple[float, ...] = ()
    """Cut points of bucketise in the column's unit, ascending. Row 1 holds values below the first edge, row 2
    those from the first edge on and below the second, and so on."""
    max_length: int = 0
    """Values kept of a list-valued column, from the front. 0: the column holds one value per row, and a
    list is refused."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a list-valued feature are combined."""
    weights: str = ""
    """A second list column: the weight of each value of the first, by which its row is multiplied before the sum. It
    must be as long as the first in every row. Only with pooling = 'sum'. Empty: every value weighs 1."""
    dim: int = 0
    """Columns of the embedding table; 0: model.embedding_dim. Another dim is projected to it by a linear layer."""
    init: Literal["uniform", "normal"] = "uniform"
    """What the table's initial weights are drawn from, around 0."""
    init_scale: float = 0.0
    """Bound of uniform initial weights, 0: 1 / sqrt(rows); standard deviation of normal ones."""
    min_count: int = 0
    """Values that the training split holds fewer times share one row; 0: every value has its own. vocabulary: they are
    left out, so they share row 0 with the unknown. hash and identity: the table has one more row, the last, for
    them. With hash, what is counted is an embedding row, so values that collide count together."""

    @property
    def key(self) -> str:
        """Name of the feature in the KeyedJaggedTensor."""
        return self.name or self.column

    @property
    def table_name(self) -> str:
        """Name of the embedding table."""
        return self.table or self.key

    @property
    def counts_rows(self) -> bool:
        """Whether admission goes by how often each embedding row occurs (a vocabulary counts values)."""
        return self.min_count > 0 and self.encoding in ("hash", "identity")

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        if self.encoding == "bucketise":
            return len(self.edges) + 2
        return self.num_embeddings + self.counts_rows

    def problems(self) -> Problems:
        if not self.column:
            yield "column", "must not be empty"
        if problem := table_name_problem(self.key):
            yield ("name" if self.name else "column"), problem
        if self.table and (problem := table_name_problem(self.table)):
            yield "table", problem
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
        if self.max_length < 0:
            yield "max_length", f"must not be negative, is {self.max_length}"
        yield from self._table_problems()
        yield from self._weights_problems()

    def _table_problems(self) -> Problems:
        if self.dim < 0 or self.dim % 4:
            yield "dim", f"must be a positive multiple of 4, or 0 for model.embedding_dim, is {self.dim}"
        if not 0 <= self.init_scale <= LARGEST_FACTOR:
            yield "init_scale", f"must lie in [0, {LARGEST_FACTOR:g}], is {self.init_scale}"
        if self.init == "normal" and not self.init_scale:
            yield "init_scale", "needed by init = 'normal': the standard deviation"
        if self.min_count < 0:
            yield "min_count", f"must not be negative, is {self.min_count}"
        if self.min_count and self.encoding == "bucketise":
            yield "min_count", "does not go with encoding = 'bucketise'"

    def _weights_problems(self) -> Problems:
        if not self.weights:
            return
        if self.encoding == "bucketise" or not self.max_length:
            yield "weights", "needs a list-valued column: set max_length (and no encoding = 'bucketise')"
        if self.pooling != "sum":
            yield "weights", f"only with pooling = 'sum', not '{self.pooling}'"
        if self.weights == self.column:
            yield "weights", f"column '{self.column}' cannot be its own weights"


TABLE_FIELDS = ("encoding", "num_embeddings", "edges", "pooling", "dim", "init", "init_scale", "min_count")
"""Fields of a SparseFeature that describe its table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One semantic axis along which impressions are cut into cohorts."""

    name: str
    """Name of the axis in results, in `discover.axes` and in crosses."""
    column: str = ""
    """Column that holds the axis; empty for a cross."""
    kind: Literal["categorical", "percentiles", "edges", "cross"] = "categorical"
    """categorical: a cohort per value. percentiles: a numeric column cut at shares of its rows. edges: a numeric
    column cut at given values. cross: a cohort per combination of cohorts of other axes."""
    percentiles: tuple[float, ...] = ()
    """Cut points in percent, from 0 to 100, e.g. [0, 5, 25, 50, 75, 95, 100]."""
    edges: tuple[float, ...] = ()
    """Cut points in the column's unit; cohorts are (-inf, e0), [e0, e1), ... [en, inf)."""
    cross: tuple[str, ...] = ()
    """Names of two or three other axes whose combinations are the cohorts."""

    def problems(self) -> Problems:
        if not self.name:
            yield "name", "must not be empty"
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
        for name in sorted({n for n in self.cross if self.cross.count(n) > 1}):
            yield "cross", f"names axis '{name}' twice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the impressions lie and what their columns mean."""

    train: tuple[str, ...] = ()
    """Files, folders, globs or URIs (file://, s3://, gs://, hdfs://) of the training split."""
    validation: tuple[str, ...] = ()
    """The same for the validation split: NE during training, the best checkpoints, discovery in an experiment.
    Empty: none."""
    test: tuple[str, ...] = ()
    """The same for the test split, which an experiment evaluates on. Training never reads it. Empty: none."""
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
    """Numeric inputs, one `[[data.dense]]` each."""
    sparse: tuple[SparseFeature, ...] = ()
    """Categorical inputs, one `[[data.sparse]]` each; at least one."""
    shards: int = 8
    """Logical shards the training rows are dealt to. A global batch takes an equal share of every
    shard, so its rows do not depend on the world size, which must divide this."""
    shuffle_rows: int = 131072
    """Rows of the shuffle buffer over all shards; bounds the reader's memory. 0: file order."""
    workers: int = 1
    """Threads per rank that decode and encode Parquet in the background."""
    prefetch: int = 4
    """Batches kept ready per rank."""

    @property
    def tables(self) -> dict[str, tuple[SparseFeature, ...]]:
        """Embedding table -> the features that share it, both in config order."""
        tables: dict[str, tuple[SparseFeature, ...]] = {}
        for feature in self.sparse:
            tables[feature.table_name] = (*tables.get(feature.table_name, ()), feature)
        return tables

    @property
    def weighted_tables(self) -> frozenset[str]:
        """Tables of which some feature has weights; the values of their other features weigh 1."""
        return frozenset(f.table_name for f in self.sparse if f.weights)

    def problems(self) -> Problems:
        # Discovery and evaluation read scores: their configuration need not describe a model.
        if self.train and not self.sparse:
            yield "sparse", "at least one sparse feature is needed: TorchRec shards and trains embedding tables"
        for field in ("label", "row_id", "user_id"):
            if not getattr(self, field):
                yield field, "must name a column"
        keys = [f.key for f in self.sparse]
        for key in sorted({k for k in keys if keys.count(k) > 1}):
            yield "sparse", f"two features are named '{key}'; give one of them a name of its own"
        columns = [f.column for f in self.dense]
        for column in sorted({c for c in columns if columns.count(c) > 1}):
            yield "dense", f"column '{column}' is declared twice"
        for name, features in self.tables.items():
            for feature in features[1:]:
                for field in TABLE_FIELDS:
                    before, now = getattr(features[0], field), getattr(feature, field)
                    if before != now:
                        yield (
                            "sparse",
                            f"features '{features[0].key}' and '{feature.key}' share the table '{name}' and must agree "
                            f"in {field}, which is {_shown(before)} and {_shown(now)}",
                        )
            if name in self.weighted_tables and features[0].pooling != "sum":
                yield "sparse", f"table '{name}' has weights, which go with pooling = 'sum' only"
        sparse = [column for f in self.sparse for column in (f.column, f.weights)]
        for section, used in (("dense", columns), ("sparse", sparse)):
            for column in sorted((set(used) & {self.label, self.row_id, self.weight}) - {""}):
                yield section, f"column '{column}' is the label, the row id or the weight and must not be an input"
        for field in ("shards", "workers", "prefetch"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        if self.shuffle_rows < 0:
            yield "shuffle_rows", f"must not be negative, is {self.shuffle_rows}"


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)
