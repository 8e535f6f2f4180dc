"""The program that serving runs: the training model's encoder and primary prediction head in plain torch.

Its operators are torch's own, so the exported program loads where neither torchrec nor fbgemm is.

Letters: B rows, F dense features, K sparse features, D embedding dim.
"""

import io
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F

from c2al.config import Config
from c2al.data.rows import own_and_weighted
from c2al.errors import BackendError, OutputError
from c2al.files import output_errors
from c2al.training.compilation import cpu_kernels
from c2al.training.model import C2ALModel, primary_prediction

TRACED_ROWS = 3
"""Rows of the batch that torch.export traces. Made here: impressions may lack whatever a trace needs."""


class Serving(nn.Module):
    """(dense_BF, values, lengths) -> prediction_B, for any B, also 0 and 1.

    `values` are the ids of the sparse features, feature by feature in config order, and `lengths` (features * B)
    how many of them each row has, as in a KeyedJaggedTensor. Features whose table has weights are not among
    them: where there are any, three more arguments are their values, lengths, and the values' weights.
    """

    def __init__(self, config: Config, model: C2ALModel):
        super().__init__()
        self.model = model
        self.table_of = {f.key: f.table_name for f in config.data.sparse}
        own, weighted = own_and_weighted(config.data)
        self.own, self.weighted = ([config.data.sparse[i].key for i in keys] for keys in (own, weighted))

    def forward(self, dense_BF: Tensor, values: Tensor, lengths: Tensor, *weighted: Tensor) -> Tensor:
        over, rows = self.model.over, dense_BF.shape[0]
        sum_of = self.bags(self.own, rows, values, lengths, None)
        if self.weighted:
            sum_of |= self.bags(self.weighted, rows, *weighted)
        sums = [torch.stack([sum_of[key] for key in keys], dim=1) for _, keys in over.groups]
        return primary_prediction(over.logits(dense_BF, over.embeddings(sums, lengths)))

    def bags(
        self, keys: list[str], rows: int, values: Tensor, lengths: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Key -> (B, dim) sum of the embeddings of each bag."""
        if not keys:
            return {}
        lengths_KB = lengths.view(len(keys), rows).to(torch.int64)
        counts = lengths_KB.sum(1).tolist()
        weights_of = [None] * len(keys) if weights is None else torch.split_with_sizes(weights, counts)
        sums = {}
        for i, own in enumerate(torch.split_with_sizes(values, counts)):
            offsets = F.pad(lengths_KB[i].cumsum(0), (1, 0))
            sums[keys[i]] = self.sums(self.table_of[keys[i]], own, offsets, weights_of[i])
        return sums

    def sums(self, table: str, values: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """(B, dim) sum of the embedding rows of each bag, each times its weight."""
        weight = _bags_of(self.model)[table].weight
        return F.embedding_bag(
            values, weight, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
        )


def _bags_of(model: C2ALModel) -> dict[str, Any]:
    """Table -> its embedding bag."""
    collections = [ebc for ebc in (model.ebc, model.weighted_ebc) if ebc is not None]
    return {name: bag for ebc in collections for name, bag in ebc.embedding_bags.items()}


class Int8Serving(Serving):
    """Serving whose tables hold eight bits per number, with a float32 scale and offset per row.

    Takes the tables out of `model`.
    """

    def __init__(self, config: Config, model: C2ALModel):
        super().__init__(config, model)
        bags = _bags_of(model)
        self.buffer_of = {table: f"table_{i}" for i, table in enumerate(bags)}
        model.ebc = model.weighted_ebc = None
        for table, buffer in self.buffer_of.items():
            packed = torch.ops.quantized.embedding_bag_byte_prepack(bags.pop(table).weight.detach())
            self.register_buffer(buffer, packed)

    def sums(self, table: str, values: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        packed = self.get_buffer(self.buffer_of[table])
        sum_BD: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            packed, values, offsets, False, 0, False, weights, None, True
        )
        return sum_BD


def traced(serving: Serving, dense_features: int) -> ExportedProgram:
    """The program of torch.export, with any number of rows and ids, none and one among them."""
    rows = Dim("rows", min=0)
    own, weighted = (_bags_to_trace(keys, rows, name) for keys, name in ((serving.own, ""), (serving.weighted, "w_")))
    arguments = [torch.zeros(TRACED_ROWS, dense_features), *own[0][:2]]
    shapes: list[Any] = [{0: rows}, *own[1][:2]]
    # A variable number of arguments is one tuple of shapes.
    arguments += weighted[0] if serving.weighted else ()
    shapes += [tuple(weighted[1])] if serving.weighted else ()
    # Without this setting torch.export takes sizes 0 and 1 for constants: it traces with a size of 2 or more,
    # assumes that the size is never 0 or 1, and the program refuses an empty batch and a batch of one.
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        try:
            return torch.export.export(serving.eval(), tuple(arguments), dynamic_shapes=tuple(shapes))
        except UserError as e:
            reason = str(e).strip().splitlines()[0]
            raise BackendError(
                f"torch.export cannot make one program of this network for any number of rows: {reason}"
            ) from e


def _bags_to_trace(keys: list[str], rows: Any, name: str) -> tuple[list[Tensor], list[Any]]:
    """Values, lengths and weights of two ids per bag, and what of their sizes may vary."""
    ids = Dim(f"{name}ids", min=0)
    count = 2 * TRACED_ROWS * len(keys)
    values = torch.zeros(count, dtype=torch.int64)
    lengths = torch.full((TRACED_ROWS * len(keys),), 2, dtype=torch.int32)
    varies: Any = {0: len(keys) * rows} if keys else None
    return [values, lengths, torch.ones(count)], [{0: ids} if keys else None, varies, {0: ids} if keys else None]


def save_program(program: ExportedProgram, path: Path) -> None:
    """Writes a `traced` program. Raises OutputError when it cannot be written."""
    with _Sink(path) as sink:
        torch.export.save(program, cast(IO[bytes], sink))


def save_compiled(program: ExportedProgram, path: Path) -> None:
    """Compiles with AOTInductor for this processor and writes the package.

    Raises BackendError when there is no C++ compiler or it fails, OutputError when the package cannot
    be written.
    """
    from torch._inductor import aoti_compile_and_package, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as e:
        raise BackendError("variant 'aoti' needs a C++ compiler: install g++, or name one in CXX") from e
    with _Sink(path) as sink:
        try:
            aoti_compile_and_package(program, package_path=cast(IO[bytes], sink), inductor_configs=cpu_kernels())
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[0]
            raise BackendError(f"variant 'aoti': AOTInductor cannot compile this model here: {reason}") from e


class _Sink(io.RawIOBase):
    """A new file for torch's archive writer, which ends the process when a write raises.

    Keeps the first error of the file, takes and forgets what comes after it, and raises it at the end.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        with output_errors(path):
            self._file: BinaryIO = path.open("wb", buffering=0)
        self._error: OSError | None = None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if self._error is not None:
            raise OutputError(f"{self._path}: cannot be written: {self._error.strerror}") from self._error

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)  # torch goes back to the start once all is written

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        done = 0
        while self._error is None and done < len(view):
            try:
                done += self._file.write(view[done:])
            except OSError as e:
                self._error = e
        return len(view)
