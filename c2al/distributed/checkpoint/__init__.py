"""Checkpoints that load on another number of ranks and under another sharding plan.

A checkpoint holds tensors in a form no plan appears in: every table as rows x columns, its row-wise
Adagrad moments as one vector of rows for each range of columns that had its own, and the dense part
with Adam's state. A rank writes the blocks it owns (torch.distributed.checkpoint) and reads those it
wants. The rule for moments: a block's moment is the mean of the saved ones over the block's columns,
each weighted by the columns it shares with the block. It follows from what a moment is (the mean of
g^2 over columns), is exact whenever the column ranges are the same, and exact from a split table to
a whole one; from a whole one to a split one it is the best estimate there is.

    DIRECTORY/step-00000200/   .metadata, __RANK_N.distcp (DCP), complete.json

complete.json is written last and carries step, NE, the caller's `extra`, the model's signature, and
size and SHA-256 of every other file. The folder gets its name only then, so a name means a whole
checkpoint, at whatever instant the writer was killed.
"""

from c2al.distributed.checkpoint.checkpointer import Checkpointer, load_unsharded
from c2al.distributed.checkpoint.manifest import MARKER

__all__ = ["MARKER", "Checkpointer", "load_unsharded"]
