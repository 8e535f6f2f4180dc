"""The program that serving runs: the training model's encoder and primary prediction head in plain torch.

Its operators are torch's own, so the exported program loads where neither torchrec nor fbgemm is.

Letters: B rows, F dense features, K sparse features, D embedding dim.
"""

import io
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F

from c2al.config import Config
from c2al.errors import BackendError, OutputError
from c2al.files import output_errors
from c2al.training.model import C2ALModel, primary_prediction

TRACED_ROWS = 3
"""Rows of the batch that torch.export traces. Made here: impressions may lack whatever a trace needs."""


class Serving(nn.Module):
    """(dense_BF, values, lengths) -> prediction_B, for any B, also 0 and 1.

    `values` are the ids of all sparse features, feature by feature in config order, and `lengths` (K * B)
    how many of them each row has, as in a KeyedJaggedTensor.
    """

    def __init__(self, config: Config, model: C2ALModel):
        super().__init__()
        self.model = model
        self.features = [f.key for f in config.data.sparse]

    def forward(self, dense_BF: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        lengths_KB = lengths.view(len(self.features), dense_BF.shape[0]).to(torch.int64)
        counts_K = lengths_KB.sum(1).tolist()
        pooled = []
        for i, of_feature in enumerate(torch.split_with_sizes(values, counts_K)):
            offsets = F.pad(lengths_KB[i].cumsum(0), (1, 0))
            pooled.append(self.sums(i, of_feature, offsets))
        return primary_prediction(self.model.over.logits(dense_BF, torch.stack(pooled, dim=1), lengths))

    def sums(self, feature: int, values: Tensor, offsets: Tensor) -> Tensor:
        """(B, D) sum of the embedding rows of each bag."""
        assert self.model.ebc is not None
        weight = self.model.ebc.embedding_bags[self.features[feature]].weight
        return F.embedding_bag(values, weight, offsets, mode="sum", include_last_offset=True)


class Int8Serving(Serving):
    """Serving whose tables hold eight bits per number, with a float32 scale and offset per row.

    Takes the tables out of `model`.
    """

    def __init__(self, config: Config, model: C2ALModel):
        super().__init__(config, model)
        assert model.ebc is not None
        for i, key in enumerate(self.features):
            packed = torch.ops.quantized.embedding_bag_byte_prepack(model.ebc.embedding_bags[key].weight.detach())
            self.register_buffer(f"table_{i}", packed)
            del model.ebc.embedding_bags[key]
        model.ebc = None

    def sums(self, feature: int, values: Tensor, offsets: Tensor) -> Tensor:
        sum_BD: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.get_buffer(f"table_{feature}"), values, offsets, False, 0, False, None, None, True
        )
        return sum_BD


def traced(serving: Serving, dense_features: int) -> ExportedProgram:
    """The program of torch.export, with any number of rows and ids, none and one among them."""
    features, rows = len(serving.features), Dim("rows", min=0)
    arguments = (
        torch.zeros(TRACED_ROWS, dense_features),
        torch.zeros(2 * TRACED_ROWS * features, dtype=torch.int64),
        torch.full((TRACED_ROWS * features,), 2, dtype=torch.int32),
    )
    shapes = ({0: rows}, {0: Dim("ids", min=0)}, {0: features * rows})
    # Without this setting torch.export takes sizes 0 and 1 for constants: it traces with a size of 2 or more,
    # assumes that the size is never 0 or 1, and the program refuses an empty batch and a batch of one.
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(serving.eval(), arguments, dynamic_shapes=shapes)


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
            aoti_compile_and_package(program, package_path=cast(IO[bytes], sink))
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
