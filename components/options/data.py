"""Options of the data: where raw records come from, how they are split, and how they become features."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from components.options.base import Count, Fraction, Options, Pixels


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
