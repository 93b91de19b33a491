"""Export: a trained model becomes one TFLite file.

    model --export(format)--> model.tflite + exported.json

Knows nothing of training, compression or the runner; takes a Keras 3 model as well as a tf_keras one, since both are
functions of a batch. Built-in operators only: a file that needs the TensorFlow runtime (Flex) is refused.

The door into the converter is a concrete function of one example with named input and output. Measured against
`from_keras_model` on TF 2.21: equal weights and operators, but that door leaves the batch open, calls the output
'output_0' and saves the model twice; a frozen function loses the output's name.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from components.artifacts import DataSpec, Promise, TFLiteFile, sha256, write_json
from components.delivery.calibration import (
    CLIPPED,
    Rows,
    calibration_table,
    check_rows,
    order,
    worst_clipped,
)
from components.delivery.edge_quantizer import weights_only
from components.delivery.formats import WEIGHT_BITS, weight_dtype
from components.delivery.integers import in_integers
from components.delivery.owners import layer_classes, operations
from components.delivery.proof import KERNELS, OPERATORS_OF_KIND, Proof, read_proof
from components.delivery.scales import as_asked
from components.errors import ConfigError, ModelError
from components.options import ExportOptions
from components.recipe import FORMATS, IO
from components.tracing import Trace

OPERATORS = {
    "int8": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8],
    # The second lets operators without a 16-bit kernel stay in float, as those without an 8-bit one do.
    "int16x8": [
        tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
        tf.lite.OpsSet.TFLITE_BUILTINS,
    ],
}


def export(
    recipe: str,
    format: str,
    model: Callable[..., Any],
    spec: DataSpec,
    outputs: Literal["logits", "probabilities"],
    options: ExportOptions,
    calibration: np.ndarray | None,
    folder: pathlib.Path,
    *,
    labels: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    promises: Sequence[Promise] = (),
    untreated: Sequence[dict[str, Any]] = (),
    sparse: bool = False,
    seed: int,
    trace: Trace,
) -> TFLiteFile:
    """Converts `model` and writes `model.tflite` and its face into `folder`.

    Args:
      recipe: As results name it, 'prune@0.8+qat'.
      format: 'float32', 'float16' (kernels only), 'dynamic' (int8 kernels above 1,024 weights, float activations), 'int8'
        (everything), 'int16x8' (int8 kernels, int16 activations), 'int8_weights' or 'int4_weights' (kernels only). A model
        that carries fake quantization keeps its own ranges under 'int8'.
      model: Built Keras model of one input (batch, *spec.input_shape) float32; called with `training=False`.
      spec: Names the input and fixes its shape; the file takes one example.
      outputs: Name of a classifier's output in the file; regression calls it 'value'.
      options: Calibration budget, dtype of input and output of an integer file, layers in another precision, bits of scales.
      calibration: float32 (n, *spec.input_shape) as the model is fed; read for 'int8' and 'int16x8' only.
      folder: Exists; an earlier attempt is overwritten. Integer formats leave `calibration.json` there too: how many rows
        were taken, and by tensor what its range covers and clips.
      labels: Of `calibration`, int32 (n,) or float32 (n,) or (n, 1): rows are drawn so that each class, or each tenth
        of the values, has its share. None draws them all alike.
      held_out: float32 (m, *spec.input_shape) that took no part, to tell what the ranges clip; None leaves that out.
      promises: What the compression steps did; carried along for `measure` to check.
      untreated: Layers that a compression step left alone, with reasons; carried along, kernels that the format has no
        type for are added.
      sparse: Zeros are not stored (`components.recipe` says where that works). Left to the converter: it does so for every
        kernel with enough of them.
      seed: Draws the calibration examples.
      trace: Hears progress, warnings, sizes.

    Returns:
      The written file. Equal arguments give equal bytes.

    Raises:
      ConfigError: Unknown format, an `io` that it does not have, a layer that is not there, or a calibration budget above
        what the data holds.
      ContractError: Calibration examples are absent, of another shape, or not finite.
      ModelError: An operator has no built-in kernel, or the model returns another shape or dtype than `spec` says.

    Source: TFLite int8 scheme, tensorflow.org/lite/performance/quantization_spec
    """
    if format not in FORMATS:
        raise ConfigError(
            f"export: the format of a recipe must be one of {', '.join(FORMATS)}, got '{format}'; correct the recipe."
        )
    if options.io not in IO.get(format, (options.io,)):
        raise ConfigError(
            f"export.io must be {' or '.join(IO[format])} for {format}, got {options.io}; change it or leave {format} out of compress.recipes."
        )
    output_name = "value" if spec.task == "regression" else outputs
    function, holder = _function(model, spec, output_name)

    def convert(written: str, examples: np.ndarray | None = None) -> bytes:
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
        if examples is not None:
            _quantize_all(converter, written, examples, options, trace)
        elif written in ("float16", "dynamic"):
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16] if written == "float16" else []
        if sparse and written == format:
            converter.optimizations = [*converter.optimizations, tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        return _convert(converter, recipe, model)

    file = TFLiteFile(folder)
    file.calibration.unlink(missing_ok=True)
    if format in IO:
        inputs = check_rows(calibration, spec, options, format)
        rows = Rows(inputs, order(len(inputs), labels, spec, seed), held_out)
        trained, classes = _is_trained_for_int8(function), layer_classes(model)
        made = in_integers(convert, format, rows, options, classes, promises, untreated, trained=trained)
        promises, untreated = made.promises, made.untreated
        file.file.write_bytes(made.content)
        write_json(file.calibration, made.calibration)
        _tell(made.calibration, recipe, trace)
    else:
        file.file.write_bytes(convert(format))
    if format in WEIGHT_BITS:
        untreated = [*untreated, *_wider(file.file.read_bytes(), format, model)]
        file.file.write_bytes(weights_only(file.file, WEIGHT_BITS[format]))
    if format in ("dynamic", *WEIGHT_BITS):
        file.file.write_bytes(as_asked(file.file.read_bytes(), options))
    _write_face(file, recipe, format, output_name, promises, untreated, trace)
    return file


def _function(model: Callable[..., Any], spec: DataSpec, output_name: str) -> tuple[Any, tf.Module]:
    """`model` as a concrete function of one example, and the object that owns its variables.

    Raises:
      ModelError: The model does not return float32 (1, spec.outputs).
    """
    signature = tf.TensorSpec((1, *spec.input_shape), tf.float32, name=spec.input_name)

    # The converter takes the argument's name for the input's, hence by keyword.
    def serve(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {output_name: model(inputs[spec.input_name], training=False)}

    serving = tf.function(serve, autograph=False)
    function = serving.get_concrete_function(**{spec.input_name: signature})
    made = function.structured_outputs[output_name]
    if tuple(made.shape) != (1, spec.outputs) or made.dtype != tf.float32:
        raise ModelError(
            f"export: a model of this data returns float32 (batch, {spec.outputs}), got {made.dtype.name} {tuple(made.shape)}; "
            "change its last layer, or load it with the float32 dtype policy."
        )
    holder = tf.Module()
    holder.serving = serving
    # Neither Keras makes its variables visible to a tf.Module, and a variable that nobody tracks is not frozen.
    holder.tracked = list(function.graph.variables)
    return function, holder


def _wider(content: bytes, format: str, model: Any) -> list[dict[str, Any]]:
    """Kernels of a float file that `format` cannot store in its bits, by layer: {"layer", "class", "reason"}."""
    bits, classes = WEIGHT_BITS[format], layer_classes(model)
    found = []
    for each in operations(content, list(classes)):
        dtype = weight_dtype(each.kind, bits)
        if each.kind in KERNELS and dtype != f"int{bits}":
            reason = f"{format}: a {each.kind} kernel of {bits} bits is not to be had, it is {dtype}"
            found.append({"layer": each.layer, "class": classes.get(each.layer, each.kind), "reason": reason})
    return found


def _is_trained_for_int8(function: Any) -> bool:
    """Whether the model carries fake quantization, which brings ranges of its own."""
    graph = function.graph.as_graph_def()
    nodes = itertools.chain(graph.node, *(inner.node_def for inner in graph.library.function))
    return any(node.op.startswith("FakeQuant") for node in nodes)


def _tell(found: dict[str, Any], recipe: str, trace: Trace) -> None:
    """What calibration found, to TensorBoard; and a warning where held-out rows are clipped."""
    trace.scalar("export/calibration_rows", found["rows"])
    tensors = found.get("tensors", [])
    if not tensors:
        return
    for number, each in enumerate(tensors):
        trace.scalar("export/covered_by_tensor", each["covered"], step=number)
        for split, share in each["clipped"].items():
            trace.scalar(f"export/clipped_{split}_by_tensor", share, step=number)
    trace.text("export/calibration", calibration_table(found))
    worst = worst_clipped(tensors, "validation")
    if worst is not None:
        trace.warn(
            f"{recipe}: {worst['clipped']['validation']:.3f} of what layer '{worst['layer']}' makes of the validation split lies outside the "
            f"range that {found['rows']} calibration rows gave it, at most {CLIPPED:g} is usual; raise preprocess.splits.calibration."
        )


def _quantize_all(converter: Any, format: str, examples: np.ndarray, options: ExportOptions, trace: Trace) -> None:
    """Sets the converter to integers throughout: weights int8, activations int8 or int16.

    ai-edge-quantizer's int16x8 was tried as well; on the toy of the tests both are equally near to the float model, but the
    converter has the kernels of more operators.

    Examples are passed for quantization-aware models too: TF 2.21 insists on them, and takes from them only the ranges
    of layers that carry none of their own.
    """

    def representative() -> Iterator[list[np.ndarray]]:
        for number, example in enumerate(examples, 1):
            trace.progress(number, len(examples), f"calibrating {format}")
            yield [example[np.newaxis]]

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = OPERATORS[format]
    converter.inference_input_type = converter.inference_output_type = tf.as_dtype(options.io)


def _convert(converter: Any, recipe: str, model: Any) -> bytes:
    with warnings.catch_warnings():
        # TF 2.21 says so in every int8 conversion: it asks for the ranges of a model that is quantized already.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected", UserWarning)
        try:
            return converter.convert()
        except Exception as error:  # the converter raises ConverterError, ValueError and RuntimeError alike
            raise ModelError(_explain(error, recipe, model)) from error


def _explain(error: Exception, recipe: str, model: Any) -> str:
    """One line that names the operators, and the Keras layers that they come from."""
    found = [(_layer(report, model), report.operator.name) for report in getattr(error, "errors", ())]
    named = sorted({(layer, name.removeprefix("tf.")) for layer, name in found if name})
    if not named:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"export '{recipe}': the TFLite converter refused the model: {first[:300]}; see the run's log for all of it."
    where = ", ".join(f"{name} in layer '{layer}'" if layer else name for layer, name in named)
    return (
        f"export '{recipe}': no built-in TFLite operator for {where}; "
        "replace the layer by one made of built-in operators (tensorflow.org/lite/guide/op_select_allowlist lists what needs more)."
    )


def _layer(report: Any, model: Any) -> str:
    """The innermost layer of `model` in the converter's call stack, or '' where it names none."""
    layers = {layer.name for layer in getattr(model, "layers", ())}
    for call in report.location.call:
        for scope in reversed(call.name.partition("@")[0].split("/")[:-1]):
            # Keras 3 numbers a scope that it enters twice.
            for name in (scope, re.sub(r"_\d+$", "", scope)):
                if name in layers:
                    return name
    return ""


def _write_face(
    file: TFLiteFile,
    recipe: str,
    format: str,
    output_name: str,
    promises: Sequence[Promise],
    untreated: Sequence[dict[str, Any]],
    trace: Trace,
) -> None:
    proof = read_proof(file.file)
    _check_storage(proof, recipe)
    asked_for = {operator for promise in promises if promise.precision for operator in OPERATORS_OF_KIND[promise.kind]}
    stayed = [name for name in proof.float_operators if name not in asked_for]
    if format in IO and stayed:
        names = ", ".join(stayed)
        trace.warn(
            f"{recipe}: operators without an {format} kernel run in float inside the file, expect it to be slower: {names}."
        )
    trace.scalar("export/bytes", proof.bytes)
    trace.scalar("export/gzip_bytes", proof.gzip_bytes)
    trace.scalar("export/parameters", proof.parameters)
    trace.text("export/operators", _table(proof.operators))
    write_json(
        file.folder / "exported.json",
        {
            "recipe": recipe,
            "format": format,
            "outputs": output_name,
            "sha256": sha256(file.file),
            "bytes": proof.bytes,
            "promises": [dataclasses.asdict(promise) for promise in promises],
            "untreated": list(untreated),
        },
    )


# How the kernel of a dense layer may be stored, where that is not all one, and why.
_STORABLE = {
    "int8": (("dense", "sparse 1x16"), "XNNPACK loads sparse int8 kernels of dense layers in blocks of 1x16 only"),
    "float16": (("dense", "sparse"), "TFLite makes NaN of float16 blocks"),
}


def _check_storage(proof: Proof, recipe: str) -> None:
    """Refuses a file that the runtime does not load, or answers nonsense with.

    The grammar of recipes refuses what must go wrong; but the converter looks at each kernel, and one that was left alone
    may hold enough zeros by chance.
    """
    for kernel in proof.weights:
        fine, why = _STORABLE.get(kernel.dtype, ((kernel.storage,), ""))
        if kernel.operator == "FULLY_CONNECTED" and kernel.storage not in fine:
            raise ModelError(
                f"export '{recipe}': the converter stored tensor '{kernel.short}' {kernel.storage}, since {kernel.sparsity:.2f} of it are zero, "
                f"and {why}; drop '+sparse', or have prune treat that layer (compress.prune.dense_share, exclude)."
            )


def _table(operators: dict[str, int]) -> str:
    return "\n".join(["| operator | uses |", "|---|---|", *(f"| {name} | {n} |" for name, n in operators.items())])
