"""Options of the training: model, augmentation, optimizer, strategy, teachers, and the search for values."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from components.fields import Duration, Pattern
from components.options.base import Count, Fraction, Options, Positive
from components.options.data import Augmentation


class ModelOptions(Options):
    """Exactly one of a name from the zoo, an import path to a builder, or a `.keras` file."""

    name: (
        Literal[
            "linear", "mlp", "cnn", "resnet8", "mobilenet", "transformer", "wide_and_deep", "text_encoder", "causal_lm"
        ]
        | None
    ) = None
    builder: str | None = Field(None, description="'package.module:function' or 'file.py:function'.")
    file: str | None = Field(None, description="A saved `.keras` model to start from.")
    options: dict[str, float | int | str | bool | list[int]] = Field(
        {}, description="Keyword arguments of the builder."
    )
    outputs: Literal["auto", "logits", "probabilities"] = Field(
        "auto", description="What a classifier returns; auto reads it from the last layer's activation."
    )

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> ModelOptions:
        given = [key for key in ("name", "builder", "file") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of name, builder, file; got {given or 'none'}")
        return self


class OptimizerOptions(Options):
    """Algorithm and its rates; defaults of Keras where not said."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Fraction = Field(0.0, description="sgd only.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled (adamw) or as an L2 pull on the update (sgd).")
    schedule: Literal["constant", "cosine", "exponential", "step"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0, description="Linear rise from zero.")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="exponential, step: factor each time.")
    decay_epochs: Positive = Field(10.0, description="exponential, step: epochs between factors.")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Momentum of a moving average of the weights, which is then what is judged and kept; 0.999, say, looks "
        "back on some thousand updates.",
    )


class EarlyStopping(Options):
    """Stops when the validation loss has not improved for `patience` epochs, and takes the best epoch's weights."""

    patience: Count = 10


BASE_ONLY = ("split", "tpu")
"""Strategies that take the base training alone: fine-tuning trains twins in tf_keras."""


class StrategyOptions(Options):
    """Where the training runs; see `pipeline/strategy.py`."""

    name: Literal["default", "mirrored", "multi_worker", "tpu", "split"] = "default"
    devices: Count | None = Field(None, description="mirrored, split: how many; null takes all.")
    layout: dict[Pattern, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="split: the device of each layer, by name or regular expression, 0 is the first; a layer that none "
        "names goes with the one before it. Empty: runs of layers that need about the same memory.",
    )
    tpu: str | None = Field(
        None,
        description="tpu: name of a Cloud TPU, or local on a TPU VM; null: TPU_NAME from the environment, else local.",
    )
    rescale: bool = Field(
        False,
        description="Multiply train.batch_size by the number of replicas, and the learning rate with it: by the number for sgd, "
        "by its square root for adam and adamw. false: the batch is shared out, and the result is that of one device.",
    )
    workers: Count | None = Field(
        None,
        description="multi_worker: how many processes train together, each with all its devices; trimline launch sets it.",
    )


class Distillation(Options):
    """Learns from a teacher's answers as well as from the labels (Hinton et al. 2015, arXiv 1503.02531)."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Share of the teacher in the loss; the labels have the rest."
    )
    temperature: Positive = Field(
        2.0,
        description="Classification: divides the logits of both; higher shows more of what the teacher deems unlikely.",
    )


class TrainDistillation(Distillation):
    """A trained model guides the base training (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Keras 3 `.keras` files; the answers of several are averaged."
    )
    teacher_model: ModelOptions | None = Field(
        None, description="A model that is trained in the same run first, as `train` says, and then teaches."
    )

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> TrainDistillation:
        if (self.teacher is None) == (self.teacher_model is None):
            given = "none" if self.teacher is None else "both"
            raise ValueError(f"give exactly one of teacher, teacher_model; got {given}")
        return self


class CompressDistillation(Distillation):
    """A trained model guides the fine-tuning of every step of the recipes (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: Literal["base"] | Annotated[list[str], Field(min_length=1)] = Field(
        "base",
        description="base: the run's own model before compression; or Keras 3 `.keras` files, whose answers are averaged.",
    )


class TransferOptions(Options):
    """For a model that is trained already, model.file or a builder that loads weights."""

    frozen: list[Pattern] = Field(
        [], description="Layers that do not train at first: names, or regular expressions for whole names."
    )
    unfreeze_epoch: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Epoch from which they train too, 1 is the first; null: they never do."
    )
    unfreeze_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Factor on the learning rate from that epoch on."
    )
    lora: Count | None = Field(
        None,
        description="Rank of corrections that are trained beside kernels, which stay (Hu et al. 2021, arXiv 2106.09685); the last "
        "layer trains whole. What is saved has them added in.",
    )


class PrivacyOptions(Options):
    """Differentially private training: no single row can move the model far (Abadi et al. 2016, arXiv 1607.00133)."""

    noise: Positive = Field(
        description="Standard deviation of the noise on the sum of a batch's gradients, in units of `clip`."
    )
    clip: Positive = Field(1.0, description="Greatest norm of one example's gradient; longer ones are shortened to it.")
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Chance that the promise fails; null: a tenth of one over the rows of the training split."
    )


class TrainOptions(Options):
    """The base training."""

    epochs: int = Field(20, ge=0, description="0: the model of model.file or model.builder is taken as it is.")
    batch_size: Count = 64
    optimizer: OptimizerOptions = OptimizerOptions()
    early_stopping: EarlyStopping | None = None
    label_smoothing: Fraction = 0.0
    augmentation: Augmentation = Augmentation()
    distill: TrainDistillation | None = None
    transfer: TransferOptions | None = None
    privacy: PrivacyOptions | None = None
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto",
        description="What activations and gradients are computed in; weights stay float32. auto: float32, unless a long training "
        "measures that another one is faster here.",
    )
    xla: bool | Literal["auto"] = Field(
        "auto", description="Compile the update with XLA; auto: on a GPU or TPU, not on a CPU, where it is slower."
    )
    accumulate: Count = Field(
        1, description="Parts that each replica computes one after the other for one update, to save memory."
    )
    rematerialize: bool = Field(
        False,
        description="Compute activations inside layers again for the gradient rather than keep them: less memory, more time.",
    )
    overlap: bool = Field(
        False,
        description="The first epoch reads the data while preprocessing writes them, in that order; trimline run --overlap "
        "sets it. It pays where preprocessing takes long.",
    )
    profile: tuple[Count, Count] | None = Field(
        None, description="First and last update that TensorBoard's profiler watches; 1 is the first of the training."
    )
    checkpoint_every: Duration = Field(
        "5m",
        description="Longest time between two checkpoints, as 90s, 30m or 2h; the end of an epoch writes one too, where that takes at most 0.1 s or 5 percent of the time.",
    )


class TuneRange(Options):
    """Numbers to choose from: whole ones where both ends are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="Every power of ten is as likely as the next.")

    @pydantic.model_validator(mode="after")
    def _rising(self) -> TuneRange:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low}")
        return self


class TuneOptions(Options):
    """What `trimline tune` searches; no part of a run."""

    space: Annotated[dict[str, TuneRange | list[float | int | str | bool]], Field(min_length=1)] = Field(
        description="Key of the configuration, 'train.optimizer.learning_rate' -> a range or a list of values."
    )
    trials: Count = 20
    algorithm: Literal["bayesian", "random"] = Field(
        "bayesian", description="bayesian: a Gaussian process over the trials so far proposes the next."
    )
