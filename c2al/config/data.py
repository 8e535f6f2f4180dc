"""The sections that say what the impressions are: features, axes, splits."""

import dataclasses
from typing import Literal

from c2al.typed import Problems


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
    max_length: int = 0
    """Values kept of a list-valued column, from the front. 0: the column holds one value per row, and a
    list is refused."""
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
        if self.max_length < 0:
            yield "max_length", f"must not be negative, is {self.max_length}"


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
