"""Checkpoints that load on another number of ranks and under another sharding plan.

A checkpoint holds tensors in a form that does not depend on the plan: every table as rows x columns,
its row-wise Adagrad moments as one vector of rows for each range of columns that had its own, and the
dense part with Adam's state. A rank writes the blocks it owns and reads those it wants, through
torch.distributed.checkpoint (DCP).

A loaded moment is the mean of the saved moments over the columns of its block, each weighted by the
number of columns it shares with the block. A moment sums the mean of g^2 over columns, so the rule is
exact where the column ranges are the same, and from a split table to a whole one. From a whole table
to a split one it is an estimate.

    DIRECTORY/step-00000200/   rank-00000.bin, rank-00001.bin, ..., tensors.json, complete.json

A rank's file holds raw little-endian numbers; tensors.json says where each block lies; complete.json
is written last and has the step, the NE, the caller's `extra`, the shapes of the model, and size and
SHA-256 of every other file. The folder gets its name only then, so a folder of that name is a whole
checkpoint, whenever the writer was killed.

Nothing in a checkpoint is a program: both JSON files are read strictly, and the rest is numbers. The
checksums find damage. They do not prove who wrote a checkpoint, since whoever can change a file can
change its checksum.
"""

from c2al.distributed.checkpoint.manifest import MARKER, TENSORS
from c2al.distributed.checkpoint.reader import CheckpointReader, load_unsharded
from c2al.distributed.checkpoint.writer import CheckpointWriter

__all__ = ["MARKER", "TENSORS", "CheckpointReader", "CheckpointWriter", "load_unsharded"]
