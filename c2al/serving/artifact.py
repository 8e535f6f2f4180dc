"""The folder of a serving artifact: what its files say, and the strict reading of them.

schema.json      features, encodings, statistics, vocabularies, defaults: raw rows -> inputs of the programs
model.pt2        torch.export program (dense_BF, values, lengths) -> prediction_B, any batch size
model_int8.pt2   the same with embedding tables in eight bits
model_aoti.pt2   the same compiled by AOTInductor for processors like that of the export
proof.json       what was compared with the training model, and how far each variant is from it
metadata.json    training configuration, cohorts, versions, and size and SHA-256 of every other file

metadata.json is written last. The programs are code: load only artifacts of people you trust.
Needs torch, pyarrow and numpy only.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.cohorts import CohortSpec
from c2al.data.encode import Encoder
from c2al.data.statistics import Statistics
from c2al.errors import ConfigError, DataError, StateError
from c2al.state import read_state
from c2al.typed import Problems

METADATA, SCHEMA, PROOF = "metadata.json", "schema.json", "proof.json"
METADATA_FORMAT, SCHEMA_FORMAT, PROOF_FORMAT = "c2al.serving", "c2al.serving.schema", "c2al.serving.proof"
VERSION = 1
VARIANTS = {"float": "model.pt2", "int8": "model_int8.pt2", "aoti": "model_aoti.pt2"}
"""Variant -> its file. `float` is in every artifact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """How raw rows become the inputs of the programs (schema.json)."""

    label: str
    """Column with 0 or 1 in held-out rows; predicting needs none."""
    weight: str
    """Column with the sample weight in held-out rows; empty: every row weighs 1."""
    row_id: str
    """Column that names a row; predictions carry it where the rows have it."""
    batch_size: int
    """Rows of a step of training and scoring. A product of matrices rounds by its number of rows, so equal
    predictions, bit for bit, need equal steps."""
    dense: tuple[DenseFeature, ...]
    sparse: tuple[SparseFeature, ...]
    statistics: Statistics
    defaults: dict[str, Any]
    """Column -> the value of every row where the column is not there at all. Other columns must be there."""

    @property
    def data(self) -> DataConfig:
        """What an Encoder needs to know."""
        return DataConfig(
            label=self.label, weight=self.weight, row_id=self.row_id, dense=self.dense, sparse=self.sparse
        )

    def problems(self) -> Problems:
        columns = {f.column for f in self.dense} | {f.column for f in self.sparse}
        columns -= {c for f in self.sparse if f.weights for c in (f.column, f.weights)}
        for column in self.defaults:
            if column not in columns:
                yield f"defaults.{column}", "is the column of no feature that takes a default"
        if self.batch_size < 1:
            yield "batch_size", f"must be at least 1, is {self.batch_size}"
        if not self.sparse:
            yield "sparse", "has no feature"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantProof:
    """How far a variant is from the training model on the held-out rows."""

    bit_equal: bool
    max_difference: float
    """Largest absolute difference of a prediction."""
    ne: float | None
    """None: the held-out rows are of one class only."""
    ne_change: float
    """(NE - NE of the training model) / NE of the training model. The entropy of the labels cancels, so
    it exists for rows of one class, too."""
    ne_bound: float
    """Largest |ne_change| that the export allowed."""

    @property
    def within_bound(self) -> bool:
        """Whether the change of NE is allowed; never where it is NaN, as a prediction that is NaN makes it."""
        return abs(self.ne_change) <= self.ne_bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared when the artifact was made (proof.json)."""

    checkpoint: str
    rows_compared: int
    """Held-out rows, without padding."""
    predictions_sha256: str
    """Of the training model's predictions of these rows: float32, little-endian, in order."""
    ne: float | None
    """Of the training model."""
    parameters: tuple[str, ...]
    """Names in the float program; no auxiliary prediction head is among them."""
    parameter_count: int
    """Numbers in them."""
    variants: dict[str, VariantProof]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One file of the artifact."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "Stored":
        """Raises OSError."""
        with path.open("rb") as f:
            return Stored(bytes=path.stat().st_size, sha256=hashlib.file_digest(f, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """Where the artifact comes from and what belongs to it (metadata.json)."""

    config: str
    """The training configuration as TOML, without secrets. Predicting does not read it."""
    cohorts: tuple[CohortSpec, ...]
    """Those the auxiliary prediction heads were trained on; empty for a baseline."""
    versions: dict[str, str]
    files: dict[str, Stored]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact whose state files have been read."""

    folder: Path
    schema: Schema
    proof: Proof
    metadata: Metadata

    @property
    def variants(self) -> list[str]:
        return [v for v, name in VARIANTS.items() if name in self.metadata.files]

    def program(self, variant: str) -> Path:
        """File of a variant, with the checksum that metadata.json lists.

        Raises ConfigError for a variant that the artifact does not have, StateError for a damaged file.
        """
        if variant not in self.variants:
            raise ConfigError(f"{self.folder}: has no variant '{variant}', only {', '.join(self.variants)}")
        return _whole(self.folder, VARIANTS[variant], self.metadata)


def read_artifact(folder: Path) -> Artifact:
    """Reads the state files. Raises StateError naming the file that is missing, damaged or of another version."""
    metadata = read_state(folder / METADATA, Metadata, format=METADATA_FORMAT, version=VERSION)
    return Artifact(
        folder=folder,
        metadata=metadata,
        schema=read_state(_whole(folder, SCHEMA, metadata), Schema, format=SCHEMA_FORMAT, version=VERSION),
        proof=read_state(_whole(folder, PROOF, metadata), Proof, format=PROOF_FORMAT, version=VERSION),
    )


def _whole(folder: Path, name: str, metadata: Metadata) -> Path:
    path = folder / name
    if name not in metadata.files:
        raise StateError(f"{folder / METADATA}: damaged: it does not list {name}")
    try:
        found = Stored.of(path)
    except FileNotFoundError:
        raise StateError(f"{path}: no such file, but {METADATA} lists it") from None
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}") from e
    if found != (listed := metadata.files[name]):
        raise StateError(
            f"{path}: damaged: it has {found.bytes:,} bytes with SHA-256 {found.sha256[:12]}..., "
            f"but {METADATA} lists {listed.bytes:,} bytes with {listed.sha256[:12]}..."
        )
    return path


def default_column(schema: Schema, column: str, rows: int) -> pa.Array:
    """(rows,) the default of a column in the type that the column had in training. Raises pyarrow.ArrowException."""
    value = schema.defaults[column]
    kinds = {"integer": pa.int64(), "text": pa.string()}
    kind = pa.float64()
    if any(f.column == column and f.encoding != "bucketise" for f in schema.sparse):
        kind = kinds[schema.statistics.kinds.get(column, "integer")]
    return pa.array([value] * rows, pa.list_(kind) if isinstance(value, list) else kind)


def parse_defaults(words: list[str], schema: Schema) -> dict[str, Any]:
    """`--default COLUMN=VALUE` words; a VALUE is JSON, or a string where it is none.

    Raises ConfigError naming the word whose column is no feature's, or whose value the feature refuses.
    """
    defaults: dict[str, Any] = {}
    for word in words:
        column, equals, text = word.partition("=")
        if not equals or column in defaults:
            raise ConfigError(f"--default {word}: {'is there twice' if equals else 'write COLUMN=VALUE'}")
        try:
            defaults[column] = json.loads(text)
        except ValueError:
            defaults[column] = text
        dense = tuple(f for f in schema.dense if f.column == column)
        sparse = tuple(f for f in schema.sparse if f.column == column)
        for feature in schema.sparse:
            if feature.weights and column in (feature.column, feature.weights):
                raise ConfigError(
                    f"--default {word}: feature '{feature.key}' takes no default, since its values have weights"
                )
        if not dense and not sparse:
            raise ConfigError(f"--default {word}: no feature reads column '{column}'")
        one = dataclasses.replace(schema, dense=dense, sparse=sparse, defaults=defaults)
        try:
            table = pa.table({column: default_column(one, column, 1)})
            Encoder(one.data, one.statistics, (), (), labelled=False).encode(table, f"--default {word}")
        except (pa.ArrowException, DataError, TypeError, ValueError) as e:
            raise ConfigError(f"--default {word}: {e}") from e
    return defaults
