"""The sections of one training run."""

import dataclasses
import math
from typing import Any, Literal

from c2al.config.bounds import LARGEST_FACTOR
from c2al.typed import Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for the tables, Adam or AdamW for the rest, one decay for both."""

    sparse_lr: float = 0.05
    """Learning rate of the embedding tables, before the schedule."""
    sparse_eps: float = 1e-8
    """Added to the root of the sum of squared gradients in row-wise Adagrad, against division by 0."""
    sparse_weight_decay: float = 0.0
    """L2 penalty inside the fused row-wise Adagrad update."""
    dense: Literal["adam", "adamw"] = "adamw"
    """Optimizer of everything but the tables. adam adds weight_decay to the gradient, adamw to the step."""
    dense_lr: float = 1e-3
    """Learning rate of the dense optimizer, before the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the dense optimizer's first and second moments, each in [0, 1)."""
    weight_decay: float = 0.0
    """Weight decay of the dense optimizer."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 of the dense optimizer."""
    sparse_warmup_steps: int = 0
    """Steps of linear warm-up from 0 of the tables. Row-wise Adagrad never forgets: gradients that arrive while the
    rate is near zero move nothing, fill its sums and slow a table down for the rest of training."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates fall after warm-up, to final_lr_fraction at the last step; constant: not at all."""
    final_lr_fraction: float = 0.0
    """Share of the learning rates that is left at the last step, in [0, 1]."""
    clip_norm: float = 0.0
    """Bound on the global L2 norm of the dense gradients; 0: none. The tables are updated inside
    backward, before a global norm exists, and are not part of it."""

    def problems(self) -> Problems:
        for field in ("sparse_lr", "dense_lr", "sparse_eps"):
            if not getattr(self, field) > 0 or not math.isfinite(getattr(self, field)):
                yield field, f"must be a positive number, is {getattr(self, field)}"
        for field in ("weight_decay", "sparse_weight_decay", "warmup_steps", "sparse_warmup_steps", "clip_norm"):
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
    """Newest checkpoints that are kept; older ones are deleted."""
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
class EarlyStoppingConfig:
    """When training ends before its steps are done. The result of the run is then its best checkpoint."""

    patience: int = 0
    """Evaluations in a row without a better validation NE after which training ends; 0: never. Every evaluation that
    is better is saved, and score and export take the best checkpoint."""
    min_delta: float = 0.0
    """By how much an NE must be below the best one to be better."""

    def problems(self) -> Problems:
        if self.patience < 0:
            yield "patience", f"must not be negative, is {self.patience}"
        if self.min_delta < 0 or not math.isfinite(self.min_delta):
            yield "min_delta", f"must be a number from 0 on, is {self.min_delta}"
        if self.min_delta and not self.patience:
            yield "min_delta", f"is {self.min_delta} without effect: patience is 0"


OF_AUXILIARY_LOSSES = ("combine", "auxiliary_target", "lambda_schedule", "uncertainty_weighting")
"""Fields of TrainConfig that say how auxiliary losses are made and weighed. Without any they are refused where
training begins, and not with the configuration: one file serves the baseline and what lambda makes of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: C2AL Eq. 4 over the training split."""

    batch_size: int = 1024
    """Global batch: rows of one step over all ranks. A multiple of data.shards."""
    accumulate: int = 1
    """Batches whose dense gradients are summed before one optimizer step."""
    epochs: int = 1
    """Passes over the training split."""
    max_steps: int = 0
    """Steps after which training ends before its epochs are over; 0: no bound."""
    auxiliary_lambda: float = 0.0
    """lambda of Eq. 4: weight of the auxiliary loss of every chosen cohort that `lambdas` does not name. All 0: no
    auxiliary prediction heads."""
    lambdas: dict[str, float] = dataclasses.field(default_factory=dict)
    """Chosen cohorts with a lambda of their own, by name, e.g. {head = 0.3, tail = 0.1}."""
    auxiliary_target: Literal["label", "membership"] = "label"
    """What an auxiliary prediction head learns. label: y 1[x in cohort] (Eq. 4). membership: 1[x in cohort]."""
    lambda_schedule: Literal["constant", "warmup", "decay", "early"] = "constant"
    """Factor on every lambda over the steps of training. warmup: rises from 0 to 1 over the first lambda_share of
    them. decay: falls from 1 to 0 over the last lambda_share. early: 1 over the first lambda_share, then 0."""
    lambda_share: float = 0.2
    """Share of the steps, in (0, 1]; without effect on a constant schedule."""
    combine: Literal[
        "sum",
        "pcgrad-feat",
        "cagrad-feat",
        "mgda-ub",
        "upgrad-feat",
        "imtl-g-feat",
        "aligned-mtl-feat",
        "gradvac-feat",
        "cosine-gate-feat",
        "selective-groups",
    ] = "sum"
    """How the tasks' gradients at the encoder's output become one (docs/methods.md). Only sum, cagrad-feat,
    gradvac-feat and cosine-gate-feat do without the extra `methods`. selective-groups is refused, with the reason."""
    cohort_weight: float = 1.0
    """Factor on the primary loss of the rows of the chosen cohorts. Needs cohorts, no auxiliary loss."""
    group_dro: float = 0.0
    """Step size of GroupDRO's weights over the chosen cohorts and the rest in the primary loss; 0: off. Needs cohorts,
    no auxiliary loss."""
    uncertainty_weighting: bool = False
    """Learned weights exp(-s) of the tasks' losses, which start at 1 and at lambda, instead of lambda."""
    prime_biases: bool = True
    """Every prediction head's last bias starts at the log-odds of its task's base rate in training. From 0, the
    first gradients of every embedding row carry the base rate and fill Adagrad's sums with it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the dense part; parameters and losses stay float32."""
    ema: float = 0.0
    """Decay of the exponential moving average of everything but the tables, e.g. 0.999; 0: none. Training goes on from
    the weights themselves; evaluation, score and export use the average."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of what stands above the tables, in training steps; evaluation, scoring and export run the plain
    lines. auto: where training is long enough to pay for compiling, which takes a minute once; plain lines where no
    C++ compiler is; a run that goes on stays as it began. on: always, and an error where that fails. Both round
    differently."""
    log_every: int = 50
    """Steps between records in metrics.jsonl. Where stderr is no terminal, each is also a line there."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    y_every: int = 0
    """Steps between records of the distribution of Y; 0: only at the end."""
    profile_steps: int = 0
    """Steps recorded by torch.profiler after the tenth; 0: none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Learning rates and their schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """When training ends before its steps are done."""

    @property
    def auxiliary(self) -> bool:
        """Whether the model carries auxiliary prediction heads."""
        return self.auxiliary_lambda > 0 or any(value > 0 for value in self.lambdas.values())

    @property
    def cohort_settings(self) -> tuple[str, ...]:
        """The settings that need cohorts, as one would write them: ("train.cohort_weight = 2.0",)."""
        lambdas = {f"lambdas.{name}": value for name, value in self.lambdas.items()}
        weights = {"auxiliary_lambda": self.auxiliary_lambda, **lambdas, "group_dro": self.group_dro}
        found = [f"train.{name} = {value}" for name, value in weights.items() if value > 0]
        return (*found, *([f"train.cohort_weight = {self.cohort_weight}"] if self.cohort_weight != 1 else []))

    @property
    def needs_cohorts(self) -> bool:
        """Whether training must know who is in which cohort."""
        return bool(self.cohort_settings)

    @property
    def auxiliary_settings(self) -> dict[str, tuple[Any, Any]]:
        """Field -> (value, default) of what acts on auxiliary losses alone and is not at its default."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return {n: (value, default) for n, value, default in fields if n in OF_AUXILIARY_LOSSES and value != default}

    def lambda_of(self, cohort: str) -> float:
        """lambda of the chosen cohort of that name, before the schedule."""
        return self.lambdas.get(cohort, self.auxiliary_lambda)

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
        for field in ("max_steps", "eval_every", "y_every", "profile_steps"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"
        for name, value in self.lambdas.items():
            if not 0 <= value <= LARGEST_FACTOR:
                yield f"lambdas.{name}", f"must lie in [0, {LARGEST_FACTOR:g}], is {value}"
        if not 0 <= self.ema < 1:
            yield "ema", f"must lie in [0, 1), is {self.ema}"
        if self.early_stopping.patience:
            if not self.eval_every or self.eval_every % self.accumulate:
                yield (
                    "eval_every",
                    "must be a positive multiple of accumulate with early stopping, whose patience "
                    f"counts evaluations and which saves the best; is {self.eval_every}",
                )
            if not self.checkpoint.keep_best:
                yield "checkpoint.keep_best", "must be at least 1 with early stopping, whose result is the best one"
        if not 0 < self.lambda_share <= 1:
            yield "lambda_share", f"must lie in (0, 1], is {self.lambda_share}"
        yield from self._method_problems()

    def _method_problems(self) -> Problems:
        if self.combine == "selective-groups":
            yield (
                "combine",
                "selective task-group updates (Jeong and Yoon, ICLR 2025) move the shared weights once per task group "
                "within a batch, and take each group's gradient where the group before left them: several backward "
                "passes per batch. The tables are updated inside backward, so they would move once per group; "
                "with one backward it would be another method",
            )
        for field in ("auxiliary_lambda", "cohort_weight", "group_dro"):
            if not 0 <= getattr(self, field) <= LARGEST_FACTOR:
                yield field, f"must lie in [0, {LARGEST_FACTOR:g}], is {getattr(self, field)}"
        if self.cohort_weight != 1 and self.group_dro > 0:
            yield "group_dro", f"sets the rows' weights itself, so cohort_weight must be 1, is {self.cohort_weight}"
        if self.uncertainty_weighting and self.lambda_schedule != "constant":
            yield "lambda_schedule", f"must be 'constant' where weights are learned, is '{self.lambda_schedule}'"
