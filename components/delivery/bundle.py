"""Bundle: the chosen file with all that it takes to use it right, checked before it ships.

    variant + model.tflite + prepared data --bundle()--> folder --verify()--> Verification
                                                                --predict()--> answers

The folder: model.tflite, metadata.json, transform.json, transform.py, predict.py, labels.txt, golden.json,
model_card.md, and manifest.json with the SHA-256 of each, written last. `transform.py` and `predict.py` are the very
sources that trimline runs itself. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from components.artifacts import SPLITS, Batches, PreparedData, TFLiteFile, read_json, sha256, write_json
from components.data import transform as transform_source
from components.delivery import predictor
from components.delivery.card import model_card
from components.delivery.skew import delivered, feature_names, golden_features, neighbours, skew_gate
from components.errors import ConfigError, ContractError, DataError
from components.options import BundleOptions
from components.recipe import IO
from components.tracing import Trace

SCHEMA = 1
MANIFEST = "manifest.json"
VERSIONS = ("ai-edge-litert", "keras", "numpy", "tensorflow", "tensorflow-model-optimization")
# How far answers may move on another machine, as a fraction of the largest golden answer. Float kernels add in another
# order; dynamic-range kernels round activations at run time, where a last bit may tip a code of 1/127.
MACHINE_TOLERANCE = {"float32": 1e-5, "float16": 1e-5, "dynamic": 2e-2, "int8_weights": 1e-5, "int4_weights": 1e-5}
INTEGER_OUTPUTS = (schema.TensorType.INT8, schema.TensorType.INT16)
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip knows: equal inputs give equal bytes


def bundle(
    variant: Mapping[str, Any],
    file: TFLiteFile,
    data: PreparedData,
    options: BundleOptions,
    folder: pathlib.Path,
    *,
    run: str,
    selected_because: str,
    privacy: Mapping[str, Any] | None = None,
    keras_outputs: Callable[[np.ndarray], np.ndarray] | None = None,
    batches: Batches | None = None,
    trace: Trace,
) -> pathlib.Path:
    """Fills `folder` and sends the golden records through the skew gate.

    Args:
      variant: Entry of `results.json` of the file.
      file: As `export` left it.
      data: Whose transform and golden records ship.
      options: How many golden records.
      folder: Exists; an earlier attempt is overwritten.
      run: Name of the run; names the model.
      selected_because: Why this variant, in words.
      privacy: What the training promises to each row, None where it promises nothing.
      keras_outputs: The exported model as a function of float32 (n, *input_shape), for the skew gate; None leaves its
        seam unchecked, and the model card says so.
      batches: How training received its data, for the skew gate; None likewise.
      trace: Hears what the gate found, and sizes.

    Returns:
      `folder`. Equal arguments give equal bytes.

    Raises:
      ContractError: The file is not the measured one, or a seam is broken; see `skew.skew_gate`.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    _check_measured(file, variant)
    golden = read_json(data.folder / "golden.json")[: options.golden]
    metadata = _metadata(variant, file, data, run, selected_because)
    if privacy is not None:
        metadata["privacy"] = dict(privacy)
    _write_parts(folder, file, data, metadata)
    trace.progress(1, 3, "skew gate")
    gate = skew_gate(
        folder,
        file.file,
        golden,
        format=file.facts["format"],
        keras_outputs=keras_outputs,
        tf_inputs=None if batches is None else delivered(batches, golden),
        more_inputs=None if batches is None else neighbours(batches, golden),
    )
    trace.progress(2, 3, "golden samples and model card")
    _write_golden(folder, file, golden, gate["outputs"])
    (folder / "model_card.md").write_text(model_card(metadata, gate, data.manifest), encoding="utf-8")
    _write_manifest(folder, variant, has_labels=bool(data.spec.labels))
    _trace(trace, folder, gate)
    trace.progress(3, 3, variant["recipe"])
    return folder


def _check_measured(file: TFLiteFile, variant: Mapping[str, Any]) -> None:
    found = sha256(file.file)
    if found != variant["sha256"]:
        raise ContractError(
            f"bundle: {file.file} must be the file that was measured, SHA-256 {variant['sha256'][:12]}..., got {found[:12]}...; run export again with --force."
        )


def _metadata(
    variant: Mapping[str, Any], file: TFLiteFile, data: PreparedData, run: str, selected_because: str
) -> dict[str, Any]:
    spec, facts = data.spec, file.facts
    interpreter = Interpreter(str(file.file))
    return {
        "schema": SCHEMA,
        "name": run,
        "task": spec.task,
        "recipe": variant["recipe"],
        "format": facts["format"],
        "inputs": [_tensor(interpreter.get_input_details()[0], spec.input_name)],
        "outputs": [_tensor(interpreter.get_output_details()[0], facts["outputs"])],
        "labels": list(spec.labels),
        "preprocessing": _preprocessing(data.transform),
        "metrics": {
            "name": variant["metric_name"],
            **{key: variant[key] for key in ("metric", "metric_drop", "validation_metric", "validation_drop")},
        },
        "examples": {split: data.rows(split) for split in SPLITS},
        "latency_ms": variant["latency_ms"],
        "proof": variant["proof"],
        "untreated": variant["untreated"],
        "parameters": variant["parameters"],
        # Of the file before this very record was appended to it.
        "measured": {key: variant[key] for key in ("sha256", "bytes", "gzip_bytes")},
        "selected_because": selected_because,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def _tensor(details: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One end of the file: `quantization` is (scale, zero point), None where it takes floats."""
    dtype = np.dtype(details["dtype"])
    scale, zero_point = details["quantization"]
    return {
        "name": name,
        "tensor": details["name"],
        "shape": [int(side) for side in details["shape"]],
        "dtype": dtype.name,
        "quantization": None if dtype.kind == "f" else {"scale": float(scale), "zero_point": int(zero_point)},
    }


def _preprocessing(transform: Mapping[str, Any]) -> dict[str, Any]:
    """What happens to a raw record, in short; `transform.json` has every number."""
    if transform["kind"] == "image":
        return {
            "kind": "image",
            "size": list(transform["size"]),
            "channels": transform["channels"],
            "pixels": transform["inputs"]["pixels"],
        }
    if transform["kind"] == "values":
        return {"kind": "values", "width": len(transform["mean"]), "rule": "standardise"}
    columns = [
        {"name": c["name"], "kind": c["kind"], "rule": c.get("rule", "vocabulary")} for c in transform["columns"]
    ]
    return {"kind": "table", "columns": columns, "missing": transform["missing"]}


def _write_parts(folder: pathlib.Path, file: TFLiteFile, data: PreparedData, metadata: dict[str, Any]) -> None:
    """Everything that the bundle needs to answer."""
    write_json(folder / "metadata.json", metadata)
    write_json(folder / "transform.json", data.transform)
    (folder / "transform.py").write_text(inspect.getsource(transform_source), encoding="utf-8")
    (folder / "predict.py").write_text(inspect.getsource(predictor), encoding="utf-8")
    # One a line, so a line break inside a name is spelt out; metadata.json has the names as they are.
    labels = "".join(label.replace("\n", "\\n") + "\n" for label in data.spec.labels)
    (folder / "labels.txt").unlink(missing_ok=True)
    if labels:
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
    model = folder / "model.tflite"
    model.write_bytes(file.file.read_bytes())
    _append(model, {"metadata.json": (folder / "metadata.json").read_text(encoding="utf-8"), "labels.txt": labels})


def _append(model: pathlib.Path, texts: Mapping[str, str]) -> None:
    """Puts `texts` behind the flatbuffer as a zip, where its readers do not look and `unzip` does.

    Source: TFLite metadata, ai.google.dev/edge/litert/conversion/tensorflow/metadata (associated files).
    """
    with zipfile.ZipFile(model, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            if text:
                archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), text, zipfile.ZIP_DEFLATED)


def _write_golden(
    folder: pathlib.Path, file: TFLiteFile, golden: Sequence[Mapping[str, Any]], outputs: np.ndarray
) -> None:
    tolerance, why = machine_tolerance(file.file, file.facts["format"], outputs)
    records = [
        {**{key: entry[key] for key in ("raw", "label", "features")}, "outputs": list(map(float, row))}
        for entry, row in zip(golden, outputs, strict=True)
    ]
    write_json(
        folder / "golden.json",
        {"schema": SCHEMA, "features": "exact", "outputs_tolerance": tolerance, "why": why, "records": records},
    )


def machine_tolerance(file: pathlib.Path, format: str, outputs: np.ndarray) -> tuple[float, str]:
    """How far the file's answers may lie from `outputs` on another machine, absolute; and why.

    Args:
      file: The flatbuffer.
      format: One of `components.recipe.FORMATS`.
      outputs: float32 (n, width), its answers here.
    """
    largest = max(float(np.abs(outputs).max()), 1e-6)
    step = output_step(file) if format in IO else None
    if step is not None:
        return step, "one quantization step of the output"
    share = MACHINE_TOLERANCE.get(format, MACHINE_TOLERANCE["dynamic"])
    return share * largest, f"{share:g} of the largest golden answer, {largest:.6g}"


def output_step(file: pathlib.Path) -> float | None:
    """Distance of two neighbouring codes of a file's output, also where it is dequantized last; None where it is float."""
    graph = schema.Model.GetRootAs(file.read_bytes(), 0).Subgraphs(0)
    tensor = graph.Outputs(0)
    for place in range(graph.OperatorsLength()):
        operator = graph.Operators(place)
        if operator.OutputsLength() and operator.Outputs(0) == tensor and operator.InputsLength() == 1:
            before = graph.Tensors(operator.Inputs(0))
            if graph.Tensors(tensor).Type() == schema.TensorType.FLOAT32 and before.Type() in INTEGER_OUTPUTS:
                tensor = operator.Inputs(0)
    quantization = graph.Tensors(tensor).Quantization()
    if graph.Tensors(tensor).Type() == schema.TensorType.FLOAT32 or quantization is None:
        return None
    return float(quantization.Scale(0)) if quantization.ScaleLength() else None


def _write_manifest(folder: pathlib.Path, variant: Mapping[str, Any], *, has_labels: bool) -> None:
    names = ["model.tflite", "metadata.json", "transform.json", "transform.py", "predict.py", "golden.json"]
    names += ["model_card.md"] + ["labels.txt"] * has_labels
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "files": {
                name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names
            },
            # model.tflite begins with the measured file; the rest of it is the zip.
            "measured": {key: variant[key] for key in ("sha256", "bytes")},
        },
    )


def _trace(trace: Trace, folder: pathlib.Path, gate: Mapping[str, Any]) -> None:
    trace.scalar("bundle/golden_records", gate["records"])
    trace.scalar("bundle/bytes", sum(each["bytes"] for each in read_json(folder / MANIFEST)["files"].values()))
    if isinstance(gate["seams"]["keras"], dict):
        trace.scalar("bundle/keras_difference", gate["seams"]["keras"]["difference"])
    trace.text("bundle/model_card", (folder / "model_card.md").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found; it raises where anything is wrong.

    Attributes:
      name: Run and recipe of the model.
      sha256: Of model.tflite.
      files: How many files match their checksum.
      records: How many golden records gave their features exactly and their answers within the tolerance.
      outputs_difference: Largest absolute difference of an answer.
      outputs_tolerance: Largest that was allowed.
      why: Where that tolerance comes from.
    """

    name: str
    sha256: str
    files: int
    records: int
    outputs_difference: float
    outputs_tolerance: float
    why: str


def verify(folder: pathlib.Path) -> Verification:
    """Checks a bundle on this machine: checksums, then its own code on its golden records.

    Runs the bundle's `transform.py` and `predict.py`, so verify only what you would run.

    Raises:
      ContractError: A file is absent or changed, does not load, or a golden record gives other features or answers.
    """
    manifest = read_json(folder / MANIFEST)
    _check_files(folder, manifest)
    shipped = _shipped(folder)
    golden = read_json(folder / "golden.json")
    differences = [_check_record(shipped, golden, place) for place in range(len(golden["records"]))]
    return Verification(
        name=f"{shipped.facts['name']} {shipped.facts['recipe']}",
        sha256=manifest["files"]["model.tflite"]["sha256"],
        files=len(manifest["files"]),
        records=len(differences),
        outputs_difference=max(differences, default=0.0),
        outputs_tolerance=golden["outputs_tolerance"],
        why=golden["why"],
    )


def _check_files(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    for name, promised in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ContractError(f"{path}: the manifest promises this file, but it is absent; copy the bundle again.")
        found = sha256(path)
        if found != promised["sha256"]:
            raise ContractError(
                f"{path}: the manifest promises SHA-256 {promised['sha256'][:12]}... and {promised['bytes']} bytes, "
                f"got {found[:12]}... and {path.stat().st_size}; copy the bundle again."
            )
    measured = manifest["measured"]
    with (folder / "model.tflite").open("rb") as file:
        found = hashlib.sha256(file.read(measured["bytes"])).hexdigest()
    if found != measured["sha256"]:
        raise ContractError(
            f"{folder / 'model.tflite'}: its first {measured['bytes']} bytes must be the measured file, SHA-256 {measured['sha256'][:12]}..., "
            f"got {found[:12]}...; make the bundle again."
        )


def _shipped(folder: pathlib.Path) -> predictor.Predictor:
    """The bundle as its own `predict.py` loads it."""
    try:
        code = predictor.load_source(folder / "predict.py", "trimline_bundle_predict")
        return code.Predictor(folder)
    # Whatever stands in a bundle's files may surface here: each is a bundle that cannot be used.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, ImportError) as error:
        raise ContractError(
            f"{folder}: a bundle that loads is needed, got {type(error).__name__}: {error}; make it again or copy it whole."
        ) from error


def _check_record(shipped: predictor.Predictor, golden: Mapping[str, Any], place: int) -> float:
    """One golden record; returns the largest difference of its answers."""
    record = golden["records"][place]
    where = f"{shipped.folder / 'golden.json'}, record {place}"
    try:
        features = shipped.features(record["raw"])
    except ValueError as error:
        raise ContractError(f"{where}: the transform refuses it: {error}; make the bundle again.") from error
    _check_features(where, features, record["features"], shipped.transform)
    found = shipped.run(shipped.transform.to_inputs(features))[0]
    expected = np.array(record["outputs"], np.float32)
    if found.shape != expected.shape:
        raise ContractError(f"{where}: {len(expected)} answers are promised, got {len(found)}; make the bundle again.")
    differences = np.abs(found.astype(np.float64) - expected)
    allowed = golden["outputs_tolerance"]
    worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
    if not differences[worst] <= allowed * (1 + 1e-6):  # a step, as a float64, is not exactly that of float32 answers
        raise ContractError(
            f"{where}: answer {worst} must be {expected[worst]:.6g} within {allowed:.3g} ({golden['why']}), got {found[worst]:.6g}; "
            "this machine's ai-edge-litert computes otherwise: try another version of it."
        )
    return float(differences[worst])


def _check_features(where: str, made: Mapping[str, np.ndarray], stored: Mapping[str, Any], transform: Any) -> None:
    for kind, expected in golden_features([{"features": stored}]).items():
        found = made.get(kind, np.empty(0))
        if found.shape != expected.shape:
            raise ContractError(
                f"{where}: feature '{kind}' of shape {expected.shape[1:]} is promised, got {found.shape[1:]}."
            )
        differ = np.argwhere(found[0] != expected[0])
        if len(differ):
            at = tuple(map(int, differ[0]))
            raise ContractError(
                f"{where}, {feature_names(transform, kind)(at)}: the transform must give {expected[0][at]!s}, got {found[0][at]!s}; make the bundle again."
            )


def predict(folder: pathlib.Path, source: pathlib.Path) -> list[dict[str, Any]]:
    """Answers the raw records of a file, exactly as the bundle's own `predict.py` does.

    Args:
      folder: A bundle.
      source: .csv, .csv.gz, .npy, .npz, .json or a picture file; see `predictor.read_input`.

    Returns:
      [{"label", "probability"}] or [{"value"}], one a record.

    Raises:
      ConfigError: `source` has another suffix or cannot be read.
      ContractError: The bundle does not load.
      DataError: A record lacks a column, or holds what the model cannot take.
    """
    shipped = _shipped(folder)
    try:
        return shipped.predict(predictor.read_input(source))
    except OSError as error:
        raise ConfigError(f"predict: {source}: a readable file is needed, got {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"predict: {source}: {error}") from error
