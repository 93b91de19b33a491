"""Lower: the update of a training as a TensorFlow graph and as an XLA program, without training anything."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import keras
import tensorflow as tf

from components.artifacts import DataSpec
from components.options import TrainOptions
from components.training.loop import Loop, make_loss
from components.training.optimizer import make_optimizer
from components.training.precision import FLOAT16, computed_in
from components.training.prepared import prepared


@dataclasses.dataclass(frozen=True)
class Lowered:
    """One update, as `train` would make it.

    Attributes:
      graph: TensorFlow's.
      hlo: Serialized `HloModuleProto`; None where XLA refused.
      refusal: Why, in XLA's words, '' where it did not.
    """

    graph: Any
    hlo: bytes | None
    refusal: str


def lower(
    options: TrainOptions,
    model: keras.Model,
    spec: DataSpec,
    outputs: Literal["logits", "probabilities"],
    *,
    batch_size: int,
    precision: str,
    kind: str,
) -> Lowered:
    """Traces the update of one replica and lowers it with XLA for a CPU, the only device whose kernels are here for sure.

    Args:
      options: Optimizer, smoothing, parts, layers that are frozen or computed again; not its teacher or privacy.
      model: Built; its weights stay as they are.
      spec: Of the data.
      outputs: What a classifier returns.
      batch_size: Of one replica.
      precision: See `precision.Choice`.
      kind: 'CPU', 'GPU' or 'TPU', for which `precision` is meant.
    """
    classification = spec.task == "classification"
    specs = (
        tf.TensorSpec((batch_size, *spec.input_shape), tf.float32),
        tf.TensorSpec((batch_size,), tf.int32) if classification else tf.TensorSpec((batch_size, 1), tf.float32),
    )
    with prepared(model, options) as ready, computed_in(model, precision, kind):
        optimizer = make_optimizer(options.optimizer, 1000, max(1, options.epochs), scaled=precision == FLOAT16)
        optimizer.build(ready.variables)
        loss = make_loss(spec.task, outputs, options.label_smoothing)
        loop = Loop(model, optimizer, loss, spec.task, tf.distribute.get_strategy(), accumulate=options.accumulate)
        graph = tf.function(loop.update).get_concrete_function(*specs).graph
        compiled = tf.function(loop.update, jit_compile=True)
        try:
            hlo = compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized", platform_name="CPU")
        except (tf.errors.OpError, ValueError, RuntimeError, TypeError) as error:
            return Lowered(graph, None, " ".join(str(error).split())[:600])
    return Lowered(graph, bytes(hlo), "")
