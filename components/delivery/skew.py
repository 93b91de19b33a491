"""The skew gate: the same raw records give the same features and answers at every seam of the journey.

    golden.json --transform--> features == Beam's blocks          exactly
                --to_inputs--> inputs   == what tf.data delivers  exactly
    inputs --Keras model--> answers     ~= the file's answers     within the tolerance of the file's format
    raw records --bundle--> answers     == the file's answers     exactly

A model that is fed otherwise in production than in training fails silently: good figures, bad answers. Here the break
is found before anything ships, and named: seam, record, column, both values. Needs no TensorFlow itself.
"""

from __future__ import annotations

import base64
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from components.artifacts import Batches
from components.delivery.measure import predict as run_file
from components.delivery.predictor import Predictor
from components.errors import ContractError

# Largest difference between the Keras model's answers and the file's, by format: root mean square over the golden
# records, as a fraction of the spread of the Keras answers. Measured on the three toy models of the tests: float32 up to
# 1e-7 (a GPU that multiplies in TF32 reaches 1e-3), float16 5e-4, dynamic 0.005, int8 0.014; a collapsed feed is far off:
# inputs scaled to [-1, 1], by 255 or mirrored give 0.9 to 300. Deep quantized models lie higher than the toys, and what
# that costs in accuracy is for `measure` and `select` to judge, not for this gate.
KERAS_TOLERANCE = {
    "float32": 5e-3,
    "float16": 2e-2,
    "dynamic": 0.3,
    "int8": 0.3,
    "int16x8": 0.3,
    "int8_weights": 0.3,
    "int4_weights": 0.5,
}
BATCH = 64  # rows asked of tf.data at a time, and rows that the spread of answers is taken from


def golden_features(golden: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The features of golden records as Beam stored them.

    Args:
      golden: Entries of `golden.json`, each with "features": {"numbers": [...], "ids": [...]} or
        {"image": base64 of uint8 bytes, "shape": [height, width, channels]}.

    Returns:
      {"image": uint8 (n, h, w, c)}, or {"numbers": float32 (n, k), "ids": int32 (n, m)} without the absent one.

    Raises:
      ContractError: An entry lacks them, or their widths differ.
    """
    dtypes = {"image": np.uint8, "numbers": np.float32, "ids": np.int32}
    try:
        stored = [entry["features"] for entry in golden]
        names = [name for name in dtypes if name in stored[0]]
        return {name: np.stack([_stored(each, name, dtypes[name]) for each in stored]) for name in names}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ContractError(
            f"golden.json: records with features of one width are needed, got {len(golden)} records and {type(error).__name__}: {error}; run preprocess again with --force."
        ) from error


def _stored(features: Mapping[str, Any], name: str, dtype: Any) -> np.ndarray:
    if name == "image":
        return np.frombuffer(base64.b64decode(features["image"]), np.uint8).reshape(features["shape"])
    return np.array(features[name], dtype)


def delivered(batches: Batches, golden: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The golden rows as tf.data delivers them to a model: float32 (n, *input_shape), found by "split" and "index".

    Raises:
      ContractError: A split ends before a golden row.
    """
    found: dict[tuple[str, int], np.ndarray] = {}
    for split in {entry["split"] for entry in golden}:
        wanted = {entry["index"] for entry in golden if entry["split"] == split}
        rows = itertools.chain.from_iterable(x for x, _ in batches.ordered(split, BATCH).as_numpy_iterator())
        for index, row in enumerate(itertools.islice(rows, max(wanted) + 1)):
            if index in wanted:
                found[split, index] = row
    absent = [entry for entry in golden if (entry["split"], entry["index"]) not in found]
    if absent:
        raise ContractError(
            f"golden.json names row {absent[0]['index']} of split '{absent[0]['split']}', but tf.data delivers fewer rows; run preprocess again with --force."
        )
    return np.stack([found[entry["split"], entry["index"]] for entry in golden])


def neighbours(batches: Batches, golden: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Up to 64 rows of the first golden record's split, float32 (n, *input_shape): they show how far answers spread."""
    inputs, _ = next(batches.ordered(golden[0]["split"], BATCH).as_numpy_iterator())
    return inputs


def skew_gate(
    folder: pathlib.Path,
    file: pathlib.Path,
    golden: Sequence[Mapping[str, Any]],
    *,
    format: str,
    keras_outputs: Callable[[np.ndarray], np.ndarray] | None,
    tf_inputs: np.ndarray | None,
    more_inputs: np.ndarray | None = None,
) -> dict[str, Any]:
    """Sends golden records through every seam and compares.

    Args:
      folder: The bundle, filled but for its golden samples.
      file: The `.tflite` file as `export` left it and `measure` measured it.
      golden: Entries of the prepared data's `golden.json`: raw record, features as Beam's blocks hold them.
      format: One of `components.recipe.FORMATS`: sets the tolerance towards the Keras model.
      keras_outputs: float32 (n, *input_shape) -> (n, outputs) of the model that was exported; None leaves the seam out.
      tf_inputs: The golden rows as tf.data delivers them, see `delivered`; None leaves the seam out.
      more_inputs: Further rows, see `neighbours`: one golden record whose answer is near zero says nothing of the spread
        that a difference is weighed against. None takes the golden ones alone.

    Returns:
      {"records": n, "outputs": float32 (n, outputs) of the file, "seams": {"beam", "tf.data", "bundle": "exact" or
      "not checked", "keras": {"tolerance", "difference"} or "not checked"}}.

    Raises:
      ContractError: Two sides of a seam differ; names seam, record, column and both values.
    """
    predictor = Predictor(folder)
    features = golden_features(golden)
    raw = [entry["raw"] for entry in golden]
    made = _made(predictor, raw)
    _same_features(made, features, predictor.transform)
    inputs = predictor.transform.to_inputs(features)
    if tf_inputs is not None:
        _same(tf_inputs, inputs, "tf.data", ("tf.data delivers", "the blocks hold"), _input_names(predictor.transform))
    answers = run_file(file, inputs)
    keras: Any = "not checked"
    if keras_outputs is not None:
        found = np.asarray(keras_outputs(inputs), np.float32)
        others = None if more_inputs is None else np.asarray(keras_outputs(more_inputs), np.float32)
        keras = _keras_seam(found, answers, format, found if others is None else np.concatenate([found, others]))
    bundled = predictor.outputs(raw)
    _same(
        bundled, answers, "bundle", ("the bundle answers", "the measured file answers"), lambda at: f"output {at[-1]}"
    )
    return {
        "records": len(golden),
        "outputs": answers,
        "seams": {
            "beam": "exact",
            "tf.data": "not checked" if tf_inputs is None else "exact",
            "keras": keras,
            "bundle": "exact",
        },
    }


def _made(predictor: Predictor, raw: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Features as the bundle makes them."""
    try:
        return predictor.features(raw)
    except ValueError as error:
        raise ContractError(
            f"skew gate, seam beam: the bundle's transform refuses a golden record: {error} Run preprocess again with --force."
        ) from error


def _same_features(made: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray], transform: Any) -> None:
    if set(made) != set(stored):
        raise ContractError(
            f"skew gate, seam beam: the transform makes {', '.join(made)}, the blocks hold {', '.join(stored)}; run preprocess again with --force."
        )
    for kind in stored:
        names = feature_names(transform, kind)
        _same(made[kind], stored[kind], "beam", ("the transform makes", "the blocks hold"), names)


def _same(
    left: np.ndarray,
    right: np.ndarray,
    seam: str,
    says: tuple[str, str],
    name: Callable[[tuple[int, ...]], str],
) -> None:
    """Demands equal bits.

    Args:
      left: (records, ...), one side of the seam.
      right: The other side.
      seam: Its name.
      says: What each side does.
      name: (place behind the record axis) -> the column in words.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        raise ContractError(
            f"skew gate, seam {seam}: {says[0]} {left.dtype} {left.shape}, {says[1]} {right.dtype} {right.shape}; run preprocess again with --force."
        )
    # Bits, not values: NaN equals NaN, and a zero that changed its sign is a change.
    wide = left.reshape(len(left), -1).view(f"u{left.dtype.itemsize}")
    differ = np.argwhere(wide != right.reshape(len(right), -1).view(f"u{right.dtype.itemsize}"))
    if len(differ):
        record, flat = map(int, differ[0])
        place = tuple(map(int, np.unravel_index(flat, left.shape[1:])))
        raise ContractError(
            f"skew gate, seam {seam}: record {record}, {name(place)}: {says[0]} {left[(record, *place)]!s}, {says[1]} {right[(record, *place)]!s} "
            f"({len(differ)} of {left.size} values differ); training and deployment would see different data: run the stages before it again with --force."
        )


def feature_names(transform: Any, kind: str) -> Callable[[tuple[int, ...]], str]:
    """Place in a stored feature array -> the raw column in words."""
    if transform.kind == "table":
        is_number = [column["kind"] == "number" and column["rule"] != "bucketise" for column in transform.columns]
        names = [
            c["name"] for c, number in zip(transform.columns, is_number, strict=True) if number == (kind == "numbers")
        ]
        return lambda place: f"column '{names[place[0]]}'" if place[0] < len(names) else f"column {place[0]}"
    return _place_in_picture if kind == "image" else lambda place: f"value {place[0]}"


def _input_names(transform: Any) -> Callable[[tuple[int, ...]], str]:
    """Place in a model input -> the raw column in words."""
    if transform.kind == "image":
        return _place_in_picture
    if transform.kind == "values":
        return lambda place: f"value {place[0]}"
    numbers, ids = feature_names(transform, "numbers"), feature_names(transform, "ids")
    depths = transform.to_json()["inputs"]["depths"]
    widths = len(transform.columns) - len(depths)
    owners = [numbers((place,)) for place in range(widths)]
    owners += [f"{ids((place,))}, id {one}" for place, depth in enumerate(depths) for one in range(depth)]
    return lambda place: owners[place[0]]


def _place_in_picture(place: tuple[int, ...]) -> str:
    return f"row {place[0]}, column {place[1]}, channel {place[2]}"


def _keras_seam(keras: np.ndarray, answers: np.ndarray, format: str, usual: np.ndarray) -> dict[str, float]:
    """Weighs |keras - answers|, both (records, outputs), against the spread of `usual`, (rows, outputs)."""
    if keras.shape != answers.shape:
        raise ContractError(
            f"skew gate, seam keras: the model answers {keras.shape}, the file {answers.shape}; export the model again with --force."
        )
    # Answers that hardly vary (a constant model) are compared with their size instead.
    spread = max(float(usual.std()), 0.05 * float(np.abs(usual).max()), 1e-6)
    by_record = np.sqrt(np.mean((keras.astype(np.float64) - answers) ** 2, axis=1)) / spread
    difference = float(np.sqrt(np.mean(by_record**2)))
    tolerance = KERAS_TOLERANCE[format]
    if not difference <= tolerance:  # so that NaN fails
        worst = int(np.argmax(np.nan_to_num(by_record, nan=np.inf)))
        at = int(np.argmax(np.nan_to_num(np.abs(keras[worst] - answers[worst]), nan=np.inf)))
        raise ContractError(
            f"skew gate, seam keras: {format} answers may differ by {tolerance:g} of their spread, got {difference:.3g}; worst is record {worst}, "
            f"output {at}: the Keras model answers {keras[worst, at]:.6g}, the file {answers[worst, at]:.6g}. Choose a milder recipe, or raise preprocess.splits.calibration."
        )
    return {"tolerance": tolerance, "difference": difference}
