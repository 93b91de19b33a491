"""Fine-tune: the training loop that every compression step shares.

Resumes at the epoch after a kill, and then gives what an undisturbed run gives, bit for bit: all variables and the
optimizer's are in the checkpoint, and data, learning rate and random generators depend on (seed, epoch) only.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from components.artifacts import Batches
from components.distillation import Lesson
from components.errors import ConfigError, ModelError
from components.options import FineTune
from components.tracing import Trace
from components.workers import Statistics, check_share, several, shared

_CHECKPOINTS = "checkpoints"
_WATCHES_PER_EPOCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What fine-tuning needs beside the model.

    Attributes:
      step: Name for progress and errors, 'prune@0.8'.
      options: Epochs and learning rate.
      batches: The data.
      batch_size: Global, over all replicas.
      outputs: 'logits' or 'probabilities'.
      seed: Fixes order, augmentation and dropout.
      folder: Where checkpoints go; they are removed at the end.
      strategy: The one that the model was built under.
      trace: Hears progress, losses and what `watch` sees.
      lesson: What a teacher adds to the loss; None: labels alone.
    """

    step: str
    options: FineTune
    batches: Batches
    batch_size: int
    outputs: str
    seed: int
    folder: pathlib.Path
    strategy: tf.distribute.Strategy
    trace: Trace
    lesson: Lesson | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in one epoch.

        Raises:
          ConfigError: The training split holds less than one batch.
        """
        steps = self.batches.steps_per_epoch(self.batch_size)
        if steps == 0:
            raise ConfigError(
                f"compress.batch_size={self.batch_size}: the training split holds {self.batches.rows['train']} rows, less than one batch; lower it."
            )
        return steps

    @property
    def updates(self) -> int:
        """Optimizer updates in the whole step."""
        return self.steps_per_epoch * self.options.epochs

    @property
    def learning_rate(self) -> Any:
        """By update: a cosine from the options' rate to zero at the end of the step."""
        return tf_keras.optimizers.schedules.CosineDecay(self.options.learning_rate, self.updates)


def finetune(
    model: tf_keras.Model,
    setting: Setting,
    *,
    callbacks: Sequence[Any] = (),
    watch: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
) -> dict[str, float]:
    """Trains `model` in place: Adam, learning rate along a cosine to zero.

    Args:
      model: Built under `setting.strategy`.
      setting: See `Setting`.
      callbacks: tf_keras callbacks that the step needs.
      watch: Called a few times an epoch; {group: {layer: value}} becomes TensorBoard scalars 'group/layer' by update.

    Returns:
      Loss and metric on the validation split after the last epoch, {} where it is empty. Losses are told against the
      labels, with a teacher too.

    Raises:
      ModelError: The loss is not finite.
    """
    check_share(setting.strategy, setting.batches)
    with setting.strategy.scope():
        model = model if setting.lesson is None else _taught(model, setting.lesson)
        optimizer = tf_keras.optimizers.Adam(setting.learning_rate)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, _loss(setting), [_metric(setting)], jit_compile=False)
    if several(setting.strategy):
        # Metrics are the team's already, and tf_keras would add them up over the workers once more.
        model.distribute_reduction_method = "first"
    checkpoints = _Checkpoints(model, optimizer, setting)
    done = checkpoints.restore()
    if done < setting.options.epochs:
        model.fit(
            _dealt(setting, setting.batches.training(setting.batch_size, setting.seed, done)),
            validation_data=_validation(setting),
            validation_steps=_validation_steps(setting),
            steps_per_epoch=setting.steps_per_epoch,
            epochs=setting.options.epochs,
            initial_epoch=done,
            # The step's own callbacks come first: what they do at the end of an epoch belongs into the checkpoint.
            callbacks=[*callbacks, _Voice(setting, watch), checkpoints],
            verbose=0,
        )
    return evaluate(model, setting)


def finish(setting: Setting) -> None:
    """Removes the checkpoints, once the result is saved."""
    shutil.rmtree(setting.folder / _CHECKPOINTS, ignore_errors=True)


def evaluate(model: tf_keras.Model, setting: Setting) -> dict[str, float]:
    """Loss and metric of a compiled model on the validation split; {} where it is empty."""
    batches = _validation(setting)
    if batches is None:
        return {}
    found = model.evaluate(batches, steps=_validation_steps(setting), verbose=0, return_dict=True)
    return {name: float(value) for name, value in found.items()}


def _dealt(setting: Setting, batches: tf.data.Dataset) -> Any:
    """What tf_keras takes: it deals global batches out itself, but knows nothing of one worker's share of them."""
    return shared(setting.strategy, batches) if several(setting.strategy) else batches


def _validation(setting: Setting) -> Any:
    if not setting.batches.rows.get("validation"):
        return None
    batches = setting.batches.ordered("validation", setting.batch_size)
    # tf_keras does not begin a dealt data set anew where it is told the number of steps, and demands that number.
    return _dealt(setting, batches.repeat()) if several(setting.strategy) else batches


def _validation_steps(setting: Setting) -> int | None:
    if not several(setting.strategy) or not setting.batches.rows.get("validation"):
        return None
    return math.ceil(setting.batches.rows["validation"] / setting.batch_size)


def _loss(setting: Setting) -> Any:
    if setting.batches.spec.task == "regression":
        return tf_keras.losses.MeanSquaredError()
    return tf_keras.losses.SparseCategoricalCrossentropy(from_logits=setting.outputs == "logits")


def _metric(setting: Setting) -> Any:
    if setting.batches.spec.task == "regression":
        return tf_keras.metrics.RootMeanSquaredError(name="rmse")
    return tf_keras.metrics.SparseCategoricalAccuracy(name="accuracy")


class _Taught(tf_keras.Model):
    """A functional model around the layers of another, trained with the answers of a teacher."""

    lesson: Lesson

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update; see tf_keras."""
        x, y = data
        answers = self.lesson.answers(x)
        # tf_keras gives each replica its share of the global mean, and adds penalties on weights to it.
        share = 1 / tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape() as tape:
            given = self(x, training=True)
            labels = self.compute_loss(x, y, given, None)
            distance = tf.reduce_mean(self.lesson.distance(answers, given)) + sum(self.losses)
            loss = self.lesson.mixed(labels, share * distance)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return self.compute_metrics(x, y, given, None)


def _taught(model: tf_keras.Model, lesson: Lesson) -> tf_keras.Model:
    made = _Taught(model.inputs, model.outputs, name=model.name)
    made.lesson = lesson
    return made


class _Voice(tf_keras.callbacks.Callback):
    """Tells progress, losses and what the step watches; stops on a loss that is not finite."""

    def __init__(self, setting: Setting, watch: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        super().__init__()
        self._supports_tf_logs = True  # else tf_keras fetches the loss after every single update
        self.setting = setting
        self.watch = watch
        self.epoch = 0
        self.every = max(1, setting.steps_per_epoch // _WATCHES_PER_EPOCH)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        _reset_generators(self.model, self.setting.seed, epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.setting.trace.pulse()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self.every:
            return
        steps, loss = self.setting.steps_per_epoch, float(logs["loss"])
        if not math.isfinite(loss):
            raise ModelError(
                f"{self.setting.step}: the loss is {loss} in epoch {self.epoch + 1}, update {batch + 1}; lower compress.{_section(self.setting.step)}.learning_rate."
            )
        done = self.epoch + (batch + 1) / steps
        self.setting.trace.progress(done, self.setting.options.epochs, f"{self.setting.step}: loss {loss:.4f}")
        for group, values in self.watch().items():
            for layer, value in values.items():
                self.setting.trace.scalar(f"{group}/{layer}", value, self.epoch * steps + batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for name, value in (logs or {}).items():
            split = "validation" if name.startswith("val_") else "train"
            self.setting.trace.scalar(f"{split}/{name.removeprefix('val_')}", float(value), epoch + 1)
        rate = float(self.setting.learning_rate((epoch + 1) * self.setting.steps_per_epoch))
        self.setting.trace.scalar("train/learning_rate", rate, epoch + 1)


def _section(step: str) -> str:
    return step.partition("@")[0]


def _reset_generators(model: tf_keras.Model, seed: int, epoch: int) -> None:
    """Dropout and its kin start each epoch from (seed, epoch, position), so a resumed run draws the same."""
    for position, layer in enumerate(model._flatten_layers()):
        generator = getattr(getattr(layer, "_random_generator", None), "_generator", None)
        if generator is not None:
            words = np.random.SeedSequence((seed, epoch, position)).generate_state(1)
            generator.reset_from_seed(int(words[0]))


class _Checkpoints(tf_keras.callbacks.Callback):
    """One checkpoint an epoch, written whole or not at all; the last two are kept."""

    def __init__(self, model: tf_keras.Model, optimizer: Any, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        with setting.strategy.scope():
            self.done = tf.Variable(0, dtype=tf.int64, trainable=False, name="epochs_done")
        self.statistics = Statistics(setting.strategy, model.variables)
        # Plain lists: wrappers of tfmot hold variables that object tracking does not see.
        self.manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(done=self.done, model=list(model.variables), optimizer=list(optimizer.variables)),
            str(setting.folder / _CHECKPOINTS),
            max_to_keep=2,
        )

    def restore(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the number of epochs done."""
        variables = [*self.manager.checkpoint.model, *self.manager.checkpoint.optimizer]
        before = [variable.numpy() for variable in variables] if self.manager.checkpoints else []
        for path in reversed(self.manager.checkpoints):
            try:
                self.manager.checkpoint.restore(path).assert_consumed()
            except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
                self.setting.trace.warn(
                    f"{pathlib.Path(path).name} is damaged ({type(error).__name__}); {self.setting.step} goes on from the one before."
                )
                continue
            return int(self.done.numpy())
        for variable, value in zip(variables, before, strict=False):
            variable.assign(value)
        return 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.done.assign(epoch + 1)
        # A checkpoint holds one value of each variable, so what goes on from here must have that one everywhere.
        self.statistics.settle()
        self.manager.save()
