"""Measure: one TFLite file runs in the runtime that ships, on the whole test split.

    model.tflite --measure()--> variant.json (one entry of results.json), predictions.npz, proof.json

Every variant is measured on its own, so that each can be cached; `select.drops` relates them to float32 afterwards.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from components.artifacts import DataSpec, Measured, Promise, TFLiteFile, sha256, write_json
from components.delivery.predictor import dequantized, quantized
from components.delivery.proof import Proof, check, read_proof
from components.errors import ContractError, DataError
from components.machine import processor
from components.options import MeasureOptions
from components.tracing import Trace

Rows = Callable[[], tuple[np.ndarray, np.ndarray]]
# More classes than this cannot be told apart in the picture of a confusion matrix.
CONFUSION_LIMIT = 100
REASONS = 3  # broken promises spelt out in `reason`; proof.json has them all


def measure(
    file: TFLiteFile,
    test: Rows,
    validation: Rows,
    spec: DataSpec,
    options: MeasureOptions,
    folder: pathlib.Path,
    *,
    trace: Trace,
) -> Measured:
    """Runs the file, times it, reads its proof, and writes its entry of `results.json`.

    Args:
      file: As `export` left it.
      test: () -> (inputs float32 (n, *spec.input_shape), labels int32 (n,) or float32 (n,)) of the whole test split, in
        file order.
      validation: The same of the validation split; no rows leave its figures out.
      spec: What inputs and labels are.
      options: The latency protocol.
      folder: Exists; an earlier attempt is overwritten.
      trace: Hears progress and figures.

    Returns:
      The variant. Its status is 'failed' where the file does not hold what its recipe promised: the run goes on, and
      the reason names layer and tensor. `metric_drop` and `validation_drop` are None until `select.drops`.

    Raises:
      ContractError: The file does not fit `spec`, or the runtime refuses it.
      DataError: The test split is empty.
    """
    facts = file.facts
    proof = read_proof(file.file)
    broken = check(proof, [Promise.from_json(each) for each in facts["promises"]], facts["format"])
    trace.progress(0, 3, "validation split")
    on_validation = _evaluate(file.file, *validation(), spec)
    trace.progress(1, 3, "test split")
    inputs, labels = test()
    if len(inputs) == 0:
        raise DataError("measure: the test split holds 0 rows; raise preprocess.splits.test or name test files.")
    outputs = predict(file.file, inputs)
    trace.progress(2, 3, "latency")
    timing = latency(file.file, inputs[0], options)
    variant = {
        "recipe": facts["recipe"],
        "format": facts["format"],
        "status": "failed" if broken else "ok",
        "reason": _reason(broken),
        "file": file.file.name,
        "sha256": sha256(file.file),
        "metric_name": metric_name(spec),
        "metric": metric(outputs, labels, spec),
        "metric_drop": None,
        "validation_metric": on_validation,
        "validation_drop": None,
        "bytes": proof.bytes,
        "gzip_bytes": proof.gzip_bytes,
        "parameters": proof.parameters,
        "latency_ms": timing,
        "proof": proof.summary(),
        "untreated": facts["untreated"],
        **({"rescue": facts["rescue"]} if "rescue" in facts else {}),
    }
    np.savez(folder / "predictions.npz", outputs=outputs, labels=labels)
    write_json(folder / "proof.json", {**proof.to_json(), "broken": broken})
    _trace(trace, variant, proof, outputs, labels, spec)
    write_json(folder / "variant.json", variant)
    trace.progress(3, 3, facts["recipe"])
    return Measured(folder)


def _reason(broken: list[str]) -> str | None:
    if not broken:
        return None
    more = len(broken) - REASONS
    return "; ".join(broken[:REASONS]) + (f"; and {more} more" if more > 0 else "")


def _evaluate(path: pathlib.Path, inputs: np.ndarray, labels: np.ndarray, spec: DataSpec) -> float | None:
    return metric(predict(path, inputs), labels, spec) if len(inputs) else None


def metric_name(spec: DataSpec) -> str:
    """'accuracy' (a fraction, higher is better) or 'rmse' (in the label's unit, lower is better)."""
    return "rmse" if spec.task == "regression" else "accuracy"


def metric(outputs: np.ndarray, labels: np.ndarray, spec: DataSpec) -> float:
    """The one figure that variants are compared by.

    Args:
      outputs: float32 (n, spec.outputs), logits or probabilities; or the predicted value.
      labels: int32 (n,) class indices, or float32 (n,) or (n, 1) values.
      spec: Says which of the two.
    """
    if spec.task == "classification":
        return float(np.mean(outputs.argmax(axis=1) == labels.reshape(-1)))
    errors = outputs.reshape(-1).astype(np.float64) - labels.reshape(-1)
    return float(np.sqrt(np.mean(errors**2)))


def predict(path: pathlib.Path, inputs: np.ndarray) -> np.ndarray:
    """Runs every example through the file, one at a time as it ships.

    One interpreter a core, each on a slice of its own: faster than a resized batch on small models, it works with
    any operator (a fixed reshape forbids larger batches), and each answer is that of a single run, whatever the cores.

    Args:
      path: The `.tflite` file.
      inputs: float32 (n, *shape); quantized here where the file takes integers.

    Returns:
      float32 (n, outputs), dequantized where the file returns integers.

    Raises:
      ContractError: The runtime refuses the file, or examples have another shape.
    """
    workers = max(1, min(os.cpu_count() or 1, len(inputs) // 64))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda part: _Runner(path).run(part), np.array_split(inputs, workers))
        return np.concatenate(list(parts))


class _Runner:
    """An interpreter with its one input and output, single threaded unless said otherwise."""

    def __init__(self, path: pathlib.Path, threads: int = 1) -> None:
        try:
            self.interpreter = Interpreter(str(path), num_threads=threads)
            self.interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ContractError(
                f"{path}: ai-edge-litert cannot load the file: {str(error).splitlines()[0]}; `trimline inspect` shows its operators."
            ) from error
        self.path = path
        self.input = self.interpreter.get_input_details()[0]
        self.output = self.interpreter.get_output_details()[0]

    def feed(self, example: np.ndarray) -> None:
        """Sets the input to one example (*shape), float32."""
        if example.shape != tuple(self.input["shape"][1:]):
            raise ContractError(
                f"{self.path}: takes examples of shape {tuple(map(int, self.input['shape'][1:]))}, got {example.shape}; pass data of the model's own run."
            )
        self.interpreter.set_tensor(self.input["index"], quantized(example, self.input)[np.newaxis])

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """float32 (n, outputs) for inputs (n, *shape)."""
        outputs = np.empty((len(inputs), int(self.output["shape"][-1])), np.float32)
        for row, example in enumerate(inputs):
            self.feed(example)
            self.interpreter.invoke()
            outputs[row] = dequantized(self.interpreter.get_tensor(self.output["index"])[0], self.output)
        return outputs


def latency(path: pathlib.Path, example: np.ndarray, options: MeasureOptions) -> dict[str, Any]:
    """Times single runs on one example; copying the input in and the answer out is not counted.

    Returns:
      {"p50", "p90": milliseconds, "threads", "warmup", "runs", "cpu": name of the processor}.
    """
    runner = _Runner(path, options.threads)
    runner.feed(example)
    invoke = runner.interpreter.invoke
    for _ in range(options.warmup):
        invoke()
    took = np.empty(options.runs, np.int64)
    for number in range(options.runs):
        began = time.perf_counter_ns()
        invoke()
        took[number] = time.perf_counter_ns() - began
    p50, p90 = np.percentile(took / 1e6, (50, 90))
    return {
        "p50": float(p50),
        "p90": float(p90),
        "threads": options.threads,
        "warmup": options.warmup,
        "runs": options.runs,
        "cpu": processor(),
    }


def confusion(outputs: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): how often class `row` was answered by class `column`."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels.reshape(-1), outputs.argmax(axis=1)), 1)
    return counts


def _trace(
    trace: Trace, variant: dict[str, Any], proof: Proof, outputs: np.ndarray, labels: np.ndarray, spec: DataSpec
) -> None:
    results = {
        f"measure/{variant['metric_name']}": variant["metric"],
        "measure/bytes": variant["bytes"],
        "measure/gzip_bytes": variant["gzip_bytes"],
        "measure/latency_ms_p50": variant["latency_ms"]["p50"],
        "measure/latency_ms_p90": variant["latency_ms"]["p90"],
        "measure/sparsity": proof.sparsity,
    }
    if variant["validation_metric"] is not None:
        results[f"measure/validation_{variant['metric_name']}"] = variant["validation_metric"]
    trace.hparams({"recipe": variant["recipe"], "format": variant["format"]}, results)
    for number, kernel in enumerate(proof.weights):
        trace.scalar("measure/sparsity_by_kernel", kernel.sparsity, step=number)
        trace.scalar("measure/distinct_by_kernel", kernel.distinct_per_channel, step=number)
    if variant["reason"]:
        trace.text("measure/broken", variant["reason"])
    if trace.folder is not None and spec.task == "classification" and spec.outputs <= CONFUSION_LIMIT:
        counts = confusion(outputs, labels, spec.outputs)
        trace.images("measure/confusion", confusion_picture(counts, spec.labels)[np.newaxis])
    trace.flush()


def confusion_picture(counts: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """A confusion matrix as uint8 (height, width, 3): rows are the true classes, coloured by their share of the row."""
    # matplotlib's objects rather than pyplot: no display, no process-wide state, no figure left open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(12.0, 3.0 + 0.4 * len(labels))
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    if len(labels) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts[row].sum() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
