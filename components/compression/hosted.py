"""Hosted: what Keras 3 computes and tf_keras does not, run by Keras 3 inside a tf_keras model.

    keras.Layer or keras.Operation --host()--> Hosted, a tf_keras layer

Keras 3 on TensorFlow and tf_keras are both functions of TensorFlow tensors, so a layer that tf_keras lacks need not be
written again: its weights become weights of a tf_keras layer, and Keras 3 computes with them (`keras.StatelessScope`).
tfmot sees a layer that it does not know, and leaves it in float.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
import tf_keras


@tf_keras.saving.register_keras_serializable("trimline")
class Hosted(tf_keras.layers.Layer):
    """One call of a Keras 3 layer or operation.

    Its weights are those of the Keras 3 layer in that order, and then the states of its random generators: a
    checkpoint holds them too, so that a resumed training draws the same. What it adds to the loss (regularizers of its
    weights, `add_loss`) is added to that of the twin.
    """

    # No tracking: to tf_keras a Keras 3 layer looks like one of its own, whose variables it would list.
    @tf.__internal__.tracking.no_automatic_dependency_tracking
    def __init__(self, held: str, arguments: str, **kwargs: Any) -> None:
        """Takes both as JSON, which neither tf_keras nor tfmot rewrites on the way: Keras 3's own serialization.

        Args:
          held: The layer or operation.
          arguments: [args, kwargs] of its call, with a KerasTensor of the right shape and dtype for each input.
          **kwargs: Those of every tf_keras layer.
        """
        super().__init__(autocast=False, **kwargs)
        self._json = {"held": held, "arguments": arguments}
        self.held = keras.saving.deserialize_keras_object(json.loads(held))
        self._arguments = keras.saving.deserialize_keras_object(json.loads(arguments))
        self._copies: list[Any] = []
        self.supports_masking = True  # Keras 3 finds the inputs' masks, and marks its outputs, by itself

    @tf.__internal__.tracking.no_automatic_dependency_tracking
    def build(self, shapes: Any) -> None:
        """Builds the Keras 3 layer and makes a weight for each of its variables."""
        if isinstance(self.held, keras.Layer):
            args, kwargs = self._arguments
            self.held(*args, **kwargs)
            self._copies = [self._copy(variable) for variable in self.held.variables]
            _refuse_foreign_state(self)
        super().build(shapes)

    def _copy(self, variable: Any) -> Any:
        return self.add_weight(
            variable.name,
            shape=variable.shape,
            dtype=variable.dtype,
            initializer=tf_keras.initializers.Constant(keras.ops.convert_to_numpy(variable)),
            trainable=variable.trainable,
            aggregation=tf.VariableAggregation.NONE
            if variable.trainable
            else tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    @property
    def carried(self) -> list[Any]:
        """The weights that go back to Keras 3: all but the states of random generators."""
        if not isinstance(self.held, keras.Layer):
            return []
        by_variable = {id(variable): copy for variable, copy in zip(self.held.variables, self._copies, strict=True)}
        return [by_variable[id(weight)] for weight in self.held.weights]

    def call(self, inputs: Any, training: Any = None) -> Any:
        """What Keras 3 returns for `inputs`, one tensor or a list, in the order of the call's arguments."""
        return self._update_and_compute(tf.nest.flatten(inputs), training)

    @tf.autograph.experimental.do_not_convert  # Keras 3 does without
    def _update_and_compute(self, tensors: Sequence[Any], training: Any) -> Any:
        outputs, changed, losses = self.compute(tensors, training)
        for loss in losses:
            self.add_loss(loss)
        for copy, value in changed:  # statistics and random states; none at inference, or the converter would refuse
            copy.assign(value)
        return outputs

    def compute(self, tensors: Sequence[Any], training: Any) -> tuple[Any, list[tuple[Any, Any]], list[Any]]:
        """Outputs; each variable that would change with its new value (None for one that is not of this layer); losses."""
        given = iter(tensors)
        args, kwargs = keras.tree.map_structure(
            lambda each: next(given) if isinstance(each, keras.KerasTensor) else each, self._arguments
        )
        if training is not None and isinstance(self.held, keras.Layer):
            kwargs = {**kwargs, "training": training}
        own = list(zip(self.held.variables, self._copies, strict=True)) if self._copies else []
        mapping = [(variable, tf.convert_to_tensor(copy)) for variable, copy in own]
        scope = keras.StatelessScope(mapping, collect_losses=True)
        before = dict(scope.state_mapping)
        with scope:
            outputs = self.held(*args, **kwargs)
            losses = list(self.held.losses) if isinstance(self.held, keras.Layer) else []
        copies = {id(variable): copy for variable, copy in own}
        after = scope.state_mapping.items()
        return outputs, [(copies.get(key), value) for key, value in after if value is not before.get(key)], losses

    def inputs_among(self, args: Any, kwargs: Any) -> list[Any]:
        """The tensors to call this layer with, out of the arguments of a call of the Keras 3 layer."""
        described, given = keras.tree.flatten(self._arguments), keras.tree.flatten([list(args), dict(kwargs)])
        return [value for leaf, value in zip(described, given, strict=True) if isinstance(leaf, keras.KerasTensor)]

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """Shape and dtype of each input."""
        leaves = keras.tree.flatten(self._arguments)
        return [tf.TensorSpec(each.shape, each.dtype) for each in leaves if isinstance(each, keras.KerasTensor)]

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """None: where Keras 3 gives its outputs a mask, they have it already."""

    def get_config(self) -> dict[str, Any]:
        """For tf_keras: the layer can be saved wherever Keras 3 can load what it holds."""
        return super().get_config() | self._json


def host(operation: Any, name: str, args: Any, kwargs: Any) -> Hosted:
    """A tf_keras layer that does what `operation` does.

    Args:
      operation: Keras 3 layer, built, or operation; its configuration is copied, its weights are not.
      name: For the tf_keras layer.
      args: Of the call; tensors, of either Keras, stand for their shape and dtype.
      kwargs: Likewise.

    Raises:
      TypeError or ValueError: Keras 3 cannot serialize it, or it draws random numbers from Keras's global generator.
    """
    held = keras.saving.serialize_keras_object(operation)
    if isinstance(operation, keras.Layer):
        held["config"]["dtype"] = "float32"
    arguments = keras.tree.map_structure(_described, [list(args), dict(kwargs)])
    return Hosted(json.dumps(held), json.dumps(keras.saving.serialize_keras_object(arguments)), name=name)


def is_symbolic(leaf: Any) -> bool:
    """Whether it is a tensor of a model that is being built, in either Keras."""
    return hasattr(leaf, "_keras_history")


def _described(leaf: Any) -> Any:
    if is_symbolic(leaf):
        return keras.KerasTensor(tuple(leaf.shape), keras.backend.standardize_dtype(leaf.dtype))
    return leaf


def carried(chain: Iterable[Any]) -> list[Any]:
    """The weights of twin layers that take over those of one Keras 3 layer, in order."""
    return [weight for each in chain for weight in (each.carried if isinstance(each, Hosted) else each.weights)]


def _refuse_foreign_state(layer: Hosted) -> None:
    """Traces the layer in training: what it changes outside itself would be lost without a word.

    Keras's global generator of random numbers is the case that occurs.
    """
    changed: list[Any] = []

    def trace(*tensors: tf.Tensor) -> None:
        changed.extend(copy for copy, _ in layer.compute(tensors, True)[1])

    tf.function(trace, autograph=False).get_concrete_function(*layer.specs)
    if any(copy is None for copy in changed):
        raise ValueError(
            "in training it changes a variable that is not its own, as keras.random functions without seed=keras.random.SeedGenerator() do"
        )
