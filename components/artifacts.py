"""What stages hand to each other: folders on disk with a small JSON face, and the values read from them.

A reader trusts the face only; it is written last, by a rename, so a folder without it is not an artifact.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from components.errors import ContractError

Task = Literal["classification", "regression"]
SPLITS = ("train", "validation", "calibration", "test")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` to `path` whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
      ContractError: The file is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{path}: a readable JSON file was promised, got {error}; run the stage again with --force."
        ) from error


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a model must accept and return; the contract between data, model and bundle.

    Attributes:
      task: Classification returns logits (batch, len(labels)); regression returns (batch, 1).
      input_name: Name of the model's one input: 'image' or 'features'.
      input_shape: One example, without batch: (height, width, channels) or (width,).
      labels: Class names in the order of the logits; empty for regression.
    """

    task: Task
    input_name: str
    input_shape: tuple[int, ...]
    labels: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Width of the model's output."""
        return len(self.labels) or 1

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DataSpec:
        """Reads what `to_json` gave."""
        return cls(
            task=value["task"],
            input_name=value["input_name"],
            input_shape=tuple(value["input_shape"]),
            labels=tuple(value["labels"]),
        )


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """The folder that `preprocess` leaves. Its face is `manifest.json`; readers trust nothing else.

    Files: manifest.json, transform.json, statistics.json, quarantine.jsonl, golden.json, <split>-<nnnnn>.tfrecord.
    """

    folder: pathlib.Path

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """The face: splits, columns, record counts, spec."""
        return read_json(self.folder / "manifest.json")

    @property
    def spec(self) -> DataSpec:
        """What a model of this data must accept and return."""
        return DataSpec.from_json(self.manifest["spec"])

    @property
    def transform(self) -> dict[str, Any]:
        """The serialised transform; `components.data.transform.Transform.from_json` brings it to life."""
        return read_json(self.folder / "transform.json")

    def rows(self, split: str) -> int:
        """Number of rows in `split`."""
        return self.manifest["splits"][split]["rows"]

    def files(self, split: str) -> list[pathlib.Path]:
        """TFRecord files of `split`, in order."""
        return [self.folder / file["name"] for file in self.manifest["splits"][split]["files"]]


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every batch one of several training processes takes.

    Attributes:
      index: Number of the process, 0 is the first.
      count: How many there are.
    """

    index: int = 0
    count: int = 1

    def part(self, rows: int) -> tuple[int, int]:
        """First row and row after the last of this process among `rows`; together the processes have each row once.

        Share(1, 3).part(10) is (3, 6); of the others, (0, 3) and (6, 10).
        """
        return rows * self.index // self.count, rows * (self.index + 1) // self.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arriving:
    """Data that are being written while the first epoch reads them. Both functions raise what ended the writing.

    Attributes:
      batches: batch_size -> how many batches of the first epoch can be had by now without waiting.
      complete: Whether all data are there.
    """

    batches: Callable[[int], int]
    complete: Callable[[], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """How a stage that trains gets its data, without knowing where it lies. `components.data.dataset` makes it.

    Attributes:
      spec: What each batch holds.
      training: (batch_size, seed, first_epoch) -> `tf.data.Dataset`, infinite but for `first_apart`, of (inputs float32 (batch_size, *shape),
        labels int32 (batch_size,) or float32 (batch_size, 1)). Epoch e depends only on (seed, e).
      ordered: (split, batch_size) -> `tf.data.Dataset` of known cardinality, one pass in file order, last batch smaller.
      rows: split -> number of rows, of all processes together.
      rows_of: (batch_size, seed, epoch, step) -> int64 (batch_size,), the rows of the training split in file order, 0 is
        the first, that make one batch of `training`; None where nobody can tell.
      share: Of several processes each gets its share of every batch: `batch_size` stays global, and the data sets hold
        `share.part(batch_size)` of its rows.
      first_apart: The data set that starts at epoch 0 ends after it; the rest is asked for then.
      arriving: None where all data are there; else `rows` are those that were promised, of which some may turn out
        malformed.
    """

    spec: DataSpec
    training: Callable[[int, int, int], Any]
    ordered: Callable[[str, int], Any]
    rows: Mapping[str, int]
    rows_of: Callable[[int, int, int, int], Any] | None = None
    share: Share = Share()
    first_apart: bool = False
    arriving: Arriving | None = None

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one epoch; the remainder is dropped so that shapes stay static."""
        return self.rows["train"] // batch_size


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The folder that `train` leaves: `model.keras`, `history.json`; face: `trained.json`."""

    folder: pathlib.Path

    @property
    def file(self) -> pathlib.Path:
        """The Keras 3 model, without optimizer."""
        return self.folder / "model.keras"

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """{"outputs": "logits" | "probabilities", "parameters": n, "epochs": n, "validation": {name: value}, ...}."""
        return read_json(self.folder / "trained.json")


@dataclasses.dataclass(frozen=True)
class CompressedModel:
    """The folder that one compression step leaves; face: `compressed.json`.

    `facts` holds {"recipe": "prune@0.8+cluster@16", "quantized": bool, "outputs": "logits" | "probabilities",
    "layers": [Promise, ...], "untreated": [{"layer", "class", "reason"}, ...], "validation": {...},
    "reports": {step: what it recorded beside its promises}}.
    """

    folder: pathlib.Path

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The face; see the class."""
        return read_json(self.folder / "compressed.json")

    @property
    def promises(self) -> list[Promise]:
        """What the file must show, kernel by kernel."""
        return [Promise.from_json(layer) for layer in self.facts["layers"]]


def attention_parts(name: str) -> list[str]:
    """The layers of an attention's twin beside its last kernel, which has the attention's own name; scores last.

    >>> attention_parts("a")
    ['a_query', 'a_key', 'a_value', 'a_scores']
    """
    return [f"{name}_{part}" for part in ("query", "key", "value", "scores")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """What a compression step did to one kernel, to be found again in the file.

    Attributes:
      layer: Keras layer name.
      kind: 'conv2d', 'depthwise_conv2d', 'dense', ...
      shape: Kernel shape as TFLite lays it out (conv2d: out, h, w, in; depthwise: 1, h, w, channels; dense: out, in).
      sparsity: Fraction of exact zeros in the kernel, under a pattern of blocks of those in whole blocks; 0 where not pruned.
      distinct: Most distinct values that one output channel may hold; 0 where not clustered.
      quantized: True where quantization-aware training covered the layer: the file must hold int8.
      pattern: Where the zeros lie along the last axis: 'm:n', m zeros at least in each n; '1x4' or '1x16', whole blocks; ''
        anywhere.
      precision: What the layer computes in where that is not for the format to say: 'float32' or 'int16'; else ''.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float = 0.0
    distinct: int = 0
    quantized: bool = False
    pattern: str = ""
    precision: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Promise:
        """Reads what `dataclasses.asdict` gave."""
        return cls(**{**value, "shape": tuple(value["shape"])})


@dataclasses.dataclass(frozen=True)
class TFLiteFile:
    """The folder that `export` leaves: `model.tflite`; face: `exported.json`."""

    folder: pathlib.Path

    @property
    def file(self) -> pathlib.Path:
        """The flatbuffer."""
        return self.folder / "model.tflite"

    @property
    def calibration(self) -> pathlib.Path:
        """What calibration found, JSON; absent where the format has no ranges."""
        return self.folder / "calibration.json"

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """{"recipe", "format", "outputs", "sha256", "bytes", "promises": [...], "untreated": [...]}; of a rescue "rescue" too."""
        return read_json(self.folder / "exported.json")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The folder that `measure` leaves; face: `variant.json`, one entry of `results.json`."""

    folder: pathlib.Path

    @functools.cached_property
    def variant(self) -> dict[str, Any]:
        """The measurements; see `results.json` in docs/results-format.md."""
        return read_json(self.folder / "variant.json")
