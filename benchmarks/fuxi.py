"""FuxiCTR beside c2al: its preprocessing, Parquet loader, embedding, MLPs and training step.

Only its public API is used, but for one attribute that its train_step reads (see wukong()).

Its package on PyPI holds no Wukong: its WuKong is in the model zoo of its repository alone. So WukongLayer joins
the package's blocks to the layer that the shape wukong-26x16 names. A test holds it against the plain stack of
benchmarks/stack.py: it is the same function. What is FuxiCTR's own and differs:

tables      torch.nn.Embedding of the shape's rows and two more, under the same dense Adam as all else: a step
            updates every row. Ids are ranks by frequency, so that lookups meet the caches better than hashes do
step        BaseModel.train_step, which clips the gradient of all parameters, tables included
reader      ParquetDataLoader, which holds the file in memory as float64 and collates a batch row by row; in the
            training process (num_workers = 0), so that CPU seconds are of everything

requirements/benchmark.txt says which version, and why.

Letters: B batch, F dense features, N sparse features, M fields in, L fields out, D embedding dim,
K columns of Y.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import Shape
from torch import Tensor, nn

from c2al.config import ModelConfig

FOLDER = "fuxictr-data"
"""Where prepare() writes, beside the folder `data` of the impressions."""
NORM_EPS = 1e-5


def reason_to_skip(shape: Shape, bfloat16: bool) -> str:
    """Why FuxiCTR has no row for this shape and precision; empty where it has one."""
    if importlib.util.find_spec("fuxictr") is None:
        return "fuxictr is not installed: pip install 'c2al[benchmark]'"
    try:
        import fuxictr.preprocess
        import fuxictr.pytorch.dataloaders
        import fuxictr.pytorch.models  # noqa: F401
    except ImportError as error:
        return f"fuxictr cannot be imported: {error}"
    model = shape.config.model
    if not _wukong(model):
        return f"it has no model for this shape, whose layers are {' + '.join(model.interactions)} ({model.ensemble})"
    if any((f.encoding, f.max_length, f.table) != ("hash", 0, "") for f in shape.config.data.sparse):
        return "this benchmark prepares for it only features of one hashed id with a table of their own"
    return "its training step knows float32 alone" if bfloat16 else ""


def _wukong(model: ModelConfig) -> bool:
    """Whether the layers are WukongLayer's."""
    return (
        (model.interactions, model.ensemble, model.shortcut) == (("linear", "fm_attention"), "stack", "linear")
        and (model.norm, model.dropout, model.fm.layout, model.fm.y) == ("layer", 0.0, "wukong", "static")
        and (model.encoder, model.wide, model.dense_tokens) == ("shared-bottom", False, 1)
        and all(model.tokens)
    )


def prepare(shape: Shape, parent: Path) -> None:
    """Fits FuxiCTR's vocabularies and scalers on the Parquet of `parent`/data and writes its own Parquet.

    Its users do so once for a data set, so no timing has it in.
    """
    from fuxictr.preprocess import FeatureProcessor, build_dataset

    data = shape.config.data
    dense = {"name": [d.column for d in data.dense], "dtype": "float", "type": "numeric"}
    sparse = {"name": [s.column for s in data.sparse], "dtype": "int", "type": "categorical"}
    columns = [dense | {"active": True, "normalizer": "StandardScaler"}, sparse | {"active": True}]
    label = {"name": data.label, "dtype": "float"}
    processor = FeatureProcessor(columns, label, dataset_id=FOLDER, data_root=str(parent))
    build_dataset(processor, train_data=str(parent / "data"), data_format="parquet")


def model_and_batches(shape: Shape, parent: Path) -> tuple[Any, Iterator[dict[str, Tensor]]]:
    """(a BaseModel of FuxiCTR, shuffled batches of what prepare() wrote, one epoch of them)."""
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader

    data, folder = shape.config.data, parent / FOLDER
    features = FeatureMap(FOLDER, str(folder))
    # Its vocabularies hold the values that the data has. The tables have the shape's rows all the same, beside one
    # for padding and one for unknown values.
    sizes = [{"name": s.column, "vocab_size": n + 2} for s, n in zip(data.sparse, shape.rows, strict=True)]
    features.load(str(folder / "feature_map.json"), {"feature_specs": sizes})
    loader = RankDataLoader(
        features,
        stage="train",
        train_data=str(folder / "train"),
        batch_size=shape.batch,
        shuffle=True,
        data_format="parquet",
        num_workers=0,
    )
    batches, _ = loader.make_iterator()
    return wukong(shape, features, str(parent)), iter(batches)


class WukongLayer(nn.Module):
    """LayerNorm(concat(FM(X), linear compression of X) + linear shortcut of X): Wukong, arXiv 2403.02545, Eq. 4-7.

    (B, M, D) -> (B, L, D). FM(X) = MLP(LayerNorm(X X^T Y)), its MLP a block of FuxiCTR.
    """

    def __init__(self, config: ModelConfig, fields: int) -> None:
        from fuxictr.pytorch.layers import MLP_Block

        super().__init__()
        dim, k, (compressed, crossed) = config.embedding_dim, config.fm.k, config.tokens
        self.compress = nn.Linear(fields, compressed)
        self.y_MK = nn.Parameter(torch.randn(fields, k) / fields**0.5)
        self.mlp = MLP_Block(fields * k, [config.fm.hidden], output_dim=crossed * dim)
        self.shortcut = nn.Linear(fields, compressed + crossed)
        self.norm = nn.LayerNorm(dim, NORM_EPS)

    def forward(self, x_BMD: Tensor) -> Tensor:
        x_BDM = x_BMD.mT
        g_BMK = x_BMD @ (x_BDM @ self.y_MK)  # X (X^T Y): X X^T is never formed
        g_BMK = nn.functional.layer_norm(g_BMK, g_BMK.shape[-1:], eps=NORM_EPS)
        crossed_BLD = self.mlp(g_BMK.flatten(1)).view(len(x_BMD), -1, x_BMD.shape[2])
        tokens_BLD = torch.cat([self.compress(x_BDM).mT, crossed_BLD], dim=1)
        out_BLD: Tensor = self.norm(tokens_BLD + self.shortcut(x_BDM).mT)
        return out_BLD


class Over(nn.Module):
    """Everything above the tables: (B, F) and (B, N, D) to logits (B, 1)."""

    def __init__(self, config: ModelConfig, dense: int, sparse: int) -> None:
        from fuxictr.pytorch.layers import MLP_Block

        super().__init__()
        dim, fields = config.embedding_dim, sum(config.tokens)
        self.dense = MLP_Block(dense, list(config.dense_hidden), output_dim=dim)
        self.layers = nn.Sequential(
            *(WukongLayer(config, fields if i else sparse + 1) for i in range(config.layers)),
        )
        self.top = MLP_Block(fields * dim, list(config.head_hidden), output_dim=1)

    def forward(self, dense_BF: Tensor, pooled_BND: Tensor) -> Tensor:
        x_BMD = torch.cat([self.dense(dense_BF)[:, None], pooled_BND], dim=1)
        logit_B1: Tensor = self.top(self.layers(x_BMD).flatten(1))
        return logit_B1


def wukong(shape: Shape, features: Any, model_root: str) -> Any:
    """The shape as a BaseModel of FuxiCTR, compiled with its Adam and its cross-entropy."""
    from fuxictr.pytorch.layers import FeatureEmbedding
    from fuxictr.pytorch.models import BaseModel

    data, config = shape.config.data, shape.config.model
    dense = [d.column for d in data.dense]

    class Wukong(BaseModel):
        def __init__(self) -> None:
            super().__init__(features, verbose=0, model_root=model_root, metrics=["AUC"])
            self.embedding = FeatureEmbedding(features, config.embedding_dim, not_required_feature_columns=dense)
            self.over = Over(config, len(dense), len(data.sparse))
            self.compile("adam", "binary_crossentropy", shape.config.train.optimizer.dense_lr)
            # train_step reads it. fit() sets it, but needs a validation set, and here a NumPy before version 2.
            self._max_gradient_norm = 10.0

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            columns = self.get_inputs(inputs)
            dense_BF = torch.stack([columns[name] for name in dense], dim=1).float()
            logit_B1 = self.over(dense_BF, self.embedding(columns))
            return {"y_pred": self.output_activation(logit_B1)}

    model = Wukong()
    model.train()
    return model
