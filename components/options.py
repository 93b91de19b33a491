"""Everything that a user may set, one frozen model per stage; a leaf that every stage and the configuration import.

Unknown keys are refused, defaults are right for a small model on a laptop, and each description is what
`trimline schema` shows in an editor. Paths are absolute here: `pipeline.config` resolved them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from components.fields import Duration, Pattern

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
AUTO = "auto"  # in the place of a list of recipes: they are searched for (`pipeline.search`)
Pixels = Literal["zero_to_one", "minus_one_to_one", "zero_to_255"]


class Options(pydantic.BaseModel):
    """Base: frozen, unknown keys and infinite numbers refused, defaults checked like input."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# --- where raw records come from ---------------------------------------------------------------------------------


class DigitsSource(Options):
    """The embedded default: scikit-learn's 1,797 digits of 8 x 8 pixels; no network."""

    kind: Literal["digits"] = "digits"


class ArraysSource(Options):
    """NumPy `.npz` files with arrays `x` (rows, ...) and `y` (rows,)."""

    kind: Literal["arrays"]
    train: str
    test: str | None = Field(None, description="null: the test split is drawn from `train` by hash.")


class IdxSource(Options):
    """idx files, plain or gzip, as MNIST and Fashion-MNIST ship."""

    kind: Literal["idx"]
    train_images: str
    train_labels: str
    test_images: str | None = None
    test_labels: str | None = None


class CsvSource(Options):
    """Delimited text, UTF-8, plain or gzip; quoted fields may hold delimiters and newlines."""

    kind: Literal["csv"]
    train: list[str] = Field(min_length=1, description="Files of one layout.")
    test: list[str] | None = Field(None, description="null: the test split is drawn from `train` by hash.")
    label: str = Field(description="Column to predict.")
    columns: list[str] | None = Field(None, description="Names, where the files have no header line.")
    delimiter: str = Field(",", min_length=1, max_length=1)
    missing: list[str] = Field(["", "?", "NA", "NaN", "null"], description="Cells that mean: no value.")
    comment: str | None = Field(None, description="Leading lines that start with this are skipped (Adult's test file).")
    label_strip: str = Field("", description="Characters removed from the end of a label (Adult's test file: '.').")


class ImagesSource(Options):
    """Folders of JPEG, PNG, BMP or GIF, one folder a class; pictures of any size."""

    kind: Literal["images"]
    train: str
    test: str | None = Field(None, description="null: the test split is drawn from `train` by hash.")


class LineSource(Options):
    """The textbook regression, made on the spot and always the same: y = 2x + 1 + noise, x uniform on [0, 1)."""

    kind: Literal["line"]
    rows: int = Field(1000, ge=10, le=10_000_000)
    noise: float = Field(1.0, ge=0, description="The noise is uniform on [0, noise): its mean lifts the line by half.")


class TextSource(Options):
    """Folders of `.txt` files in UTF-8, one folder a class; or any texts, of which the next token is learned."""

    kind: Literal["text"]
    train: str
    test: str | None = Field(None, description="null: the test split is drawn from `train` by hash.")
    tokens: Literal["words", "bytes"] = Field("words", description="words: hashed into `vocabulary` numbers.")
    length: Count = Field(128, description="Tokens of one row: a text's first ones, or a window.")
    vocabulary: int = Field(
        8192, ge=257, le=1 << 20, description="Different token numbers, padding among them; bytes take 257 of them."
    )
    learn: Literal["class", "next"] = Field(
        "class", description="class: the folder's name; next: the token behind each window, for model.name: causal_lm."
    )


Source = Annotated[
    DigitsSource | ArraysSource | IdxSource | CsvSource | ImagesSource | LineSource | TextSource,
    Field(discriminator="kind"),
]


class SplitOptions(Options):
    """Shares drawn by a stable hash of the row's content, so a duplicate never straddles two splits.

    `test` is drawn only where the source names no test files; `validation` and `calibration` come out of the training
    split in every case.
    """

    test: Fraction = 0.2
    validation: Fraction = 0.1
    calibration: Fraction = Field(0.05, description="Representative data set: fixes int8 ranges, is not trained on.")
    group: str | None = Field(None, description="CSV column whose rows must stay together (a user, a patient).")
    salt: str = Field("", description="Change it to draw other splits.")

    @pydantic.model_validator(mode="after")
    def _leave_something_to_train_on(self) -> SplitOptions:
        taken = self.test + self.validation + self.calibration
        if taken >= 1:
            raise ValueError(f"test + validation + calibration must be below 1, got {taken:g}; lower one of them")
        return self


# --- preprocessing -----------------------------------------------------------------------------------------------


class ColumnOptions(Options):
    """How one CSV column becomes features."""

    kind: Literal["auto", "number", "category", "ignore"] = "auto"
    rule: Literal["standardise", "bucketise", "none"] = Field("standardise", description="Numbers only.")
    buckets: int = Field(10, ge=2, le=1000, description="bucketise: quantile buckets.")
    vocabulary: int = Field(1000, ge=1, le=100_000, description="Categories kept; the rest are out of vocabulary.")


class FeatureSelection(Options):
    """Keeps the `keep` best columns of a table, scored on the training split only."""

    method: Literal["mutual_information", "variance"] = "mutual_information"
    keep: Count


class PreprocessOptions(Options):
    """Beam preprocessing: raw records to columnar blocks."""

    runner: Literal["in_process", "multi_processing"] = "in_process"
    workers: Count = Field(2, description="multi_processing only.")
    split_bytes: int = Field(8 << 20, ge=1 << 10, description="Size of one split descriptor.")
    block_rows: int = Field(1024, ge=1, le=4096, description="Rows of one TFRecord record.")
    max_bad_fraction: Fraction = Field(0.01, description="More malformed rows than this share stop the run.")
    image_size: tuple[Count, Count] | None = Field(None, description="(height, width); null: the first picture's.")
    image_channels: Literal[1, 3] | None = Field(None, description="null: as the source has them.")
    pixels: Pixels = Field("zero_to_one", description="The range in which a model gets pictures.")
    columns: dict[str, ColumnOptions] = Field({}, description="By column name; others follow `auto`.")
    select: FeatureSelection | None = None
    transform: str | None = Field(
        None,
        description="transform.json of an earlier preprocess folder: features are made as it says, nothing is fitted, and data of "
        "another schema are refused. For model.file that was trained there.",
    )
    splits: SplitOptions = SplitOptions()


class Augmentation(Options):
    """Random changes of training pictures; zero means off. Tables take `noise` only."""

    flip: bool = Field(False, description="Left-right, with probability one half.")
    shift: Fraction = Field(0.0, description="Largest shift as a fraction of the side.")
    rotation: float = Field(0.0, ge=0, le=180, description="Largest angle, degrees.")
    zoom: Fraction = Field(0.0, description="Largest relative change of size.")
    noise: float = Field(0.0, ge=0, description="Standard deviation of Gaussian noise on the model's input.")


# --- model and training ------------------------------------------------------------------------------------------


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
        "5m", description="Longest time between two checkpoints, as 90s, 30m or 2h; each epoch ends in one too."
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


# --- compression -------------------------------------------------------------------------------------------------


class FineTune(Options):
    """What every compression step shares."""

    epochs: Count = 4
    learning_rate: Positive = Field(1e-3, description="Peak; falls to zero along a cosine over the step.")
    exclude: list[str] = Field([], description="Layer names that the step leaves alone.")


class LowRankOptions(FineTune):
    """Two thin kernels for a large one, by singular values (Denton et al. 2014, arXiv 1404.0736)."""

    energy: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9,
        description="Share of the sum of a kernel's squared singular values that is kept, where the recipe names none.",
    )
    minimum_rank: Count = Field(1, description="No kernel comes down to a lower rank.")


class ChannelsOptions(FineTune):
    """Removal of whole filters and neurons (Li et al. 2017, arXiv 1608.08710)."""

    epochs: Count = Field(8, description="More than other steps need: what is removed is gone at once.")
    removed: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the multiply-adds to remove where the recipe names none."
    )
    # On validation rows of Fashion-MNIST (ResNet-8, 0.5 removed, 200 updates, two seeds) batch_norm kept 0.864, l2 0.845.
    importance: Literal["batch_norm", "l2", "l1"] = Field(
        "batch_norm",
        description="Which channels go first: those with the smallest scale of the batch normalization behind them (without "
        "one: by l2), or with the smallest norm of their kernel, batch normalization folded in.",
    )
    minimum: Count = Field(4, description="Channels that every group keeps.")
    multiple: Count = Field(
        8,
        description="Groups of at least twice as many channels keep a multiple of it: XNNPACK computes channels in tiles, "
        "and a tile begun costs as much as a full one. 1: any number.",
    )


class PruneOptions(FineTune):
    """Magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878)."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="Target where the recipe names none.")
    schedule: Literal["polynomial", "constant"] = "polynomial"
    initial_sparsity: Fraction = Field(0.0, description="polynomial: where it starts.")
    begin: Fraction = Field(0.0, description="Fraction of the step's updates before pruning begins.")
    end: Annotated[float, Field(gt=0, le=1)] = Field(0.6, description="Fraction by which the target is reached.")
    frequency: Count = Field(20, description="Updates between two mask changes.")
    spread: Literal["uniform", "erk", "global"] = Field(
        "uniform",
        description="uniform: each kernel to the target; erk: larger kernels further than small ones, the target overall; "
        "global: one magnitude for all kernels, found on the weights that the step starts from, the target overall.",
    )
    dense_ends: bool | Literal["auto"] = Field(
        "auto",
        description="Kernels with no other kernel before or behind them stay dense too; auto: where they hold no more than "
        "0.05 of all weights together.",
    )
    targets: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="Sparsity by layer name, in place of what the recipe and `spread` say."
    )
    magnitude: Literal["l1", "l2"] = Field(
        "l1", description="Blocks only: a block counts by the sum of its magnitudes, or by their squares."
    )
    dense_share: Fraction = Field(
        0.01,
        description="The smallest kernels stay dense while together they hold no more than this share of all weights.",
    )


class ClusterOptions(FineTune):
    """Weight sharing (Han et al. 2016, arXiv 1510.00149)."""

    clusters: int = Field(16, ge=2, le=256, description="Distinct weights a layer where the recipe names none.")
    initialization: Literal["kmeans++", "linear", "density"] = "kmeans++"
    per_channel: bool = False


class QatOptions(FineTune):
    """Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877)."""

    learning_rate: Positive = 3e-4


class CompressOptions(Options):
    """Which recipes are carried out, and how strong each kind of step is by default."""

    recipes: Annotated[list[str], Field(min_length=1)] | Literal["auto"] = Field(
        [
            "float32",
            "float16",
            "dynamic",
            "int8",
            "qat",
            "prune+int8",
            "prune+qat",
            "cluster+int8",
            "cluster+qat",
            "prune+cluster+qat",
        ],
        description="Paths in the compression tree: steps joined by '+', strength after '@'; or auto, which searches for them. "
        "Steps: channels[@share], lowrank[@energy], prune[@sparsity] (in patterns: @2:4, @0.9:1x4, @0.9:1x16), cluster[@clusters], qat. Last, how it is written: "
        "float32, float16, dynamic, int8, rescue (int8 unless that loses too much), int16x8, int8_weights, int4_weights; behind that perhaps sparse, which leaves zeros out.",
    )
    budget: Duration = Field(
        "30m",
        description="recipes: auto only. Time for the search, as 90s, 30m or 2h; the base training is not part of it.",
    )
    batch_size: Count | None = Field(None, description="null: as in train.")
    distill: CompressDistillation | None = None
    channels: ChannelsOptions = ChannelsOptions()
    lowrank: LowRankOptions = LowRankOptions()
    prune: PruneOptions = PruneOptions()
    cluster: ClusterOptions = ClusterOptions()
    qat: QatOptions = QatOptions()

    @property
    def strengths(self) -> dict[str, float]:
        """By step: the strength that it has where a recipe names none."""
        return {
            "channels": self.channels.removed,
            "lowrank": self.lowrank.energy,
            "prune": self.prune.sparsity,
            "cluster": self.cluster.clusters,
        }


# --- delivery ----------------------------------------------------------------------------------------------------


class RescueOptions(Options):
    """What `rescue` may do where int8 loses more than select.max_metric_drop."""

    precisions: Annotated[list[Literal["int16", "float32"]], Field(min_length=1)] | None = Field(
        None,
        description="Of raised layers, in the order in which they are tried; null: int16 first, which keeps kernels in int8, and "
        "float32 first where select.objective is latency, since CPUs have no fast int16 kernels.",
    )
    most_layers: Count = Field(8, description="No more layers than this are raised.")
    qat: bool = Field(True, description="Train the model with quantization in the loop where no precision helps.")


class ExportOptions(Options):
    """Keras to TFLite."""

    calibration_examples: Count | None = Field(
        None, description="int8 and int16x8 only; null: until ranges settle, 512 at most."
    )
    io: Literal["float32", "int8", "uint8", "int16"] = Field(
        "float32",
        description="Input and output dtype of integer files: float32, int8 or uint8 for int8, float32 or int16 for int16x8.",
    )
    keep_float: list[Pattern] = Field(
        [],
        description="Layers that stay float32 inside an integer file: names, or regular expressions for whole names.",
    )
    int16: list[Pattern] = Field(
        [], description="Layers with int16 activations inside an int8 file, likewise; keep_float goes before."
    )
    rescue: RescueOptions = RescueOptions()


class MeasureOptions(Options):
    """The latency protocol."""

    threads: Count = 1
    warmup: int = Field(30, ge=0, description="Runs thrown away first.")
    runs: Count = Field(200, description="Timed runs; median and 90th percentile are reported.")


class SelectOptions(Options):
    """What 'best' means, among the variants that meet every constraint."""

    objective: Literal["size", "latency", "metric"] = "size"
    size: Literal["gzip", "raw"] = Field("gzip", description="Bytes to download, or bytes in flash.")
    max_metric_drop: float | None = Field(0.01, ge=0, description="Against float32, in the metric's own unit.")
    max_bytes: Count | None = Field(None, description="As `size` counts them.")
    max_latency_ms: Positive | None = Field(None, description="Median.")


class BundleOptions(Options):
    """What ships."""

    golden: int = Field(16, ge=1, le=1000, description="Raw records with their answers, shipped as test vectors.")
