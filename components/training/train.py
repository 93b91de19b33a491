"""Train: an untrained model and batches become a trained model, checkpointed on the way.

    TrainOptions, model, Batches --train()--> TrainedModel

A run that was killed and is started again in the same folder goes on at the update of its last checkpoint and ends with
the same bits as a run that was never disturbed: order and augmentation depend on (seed, epoch) only, and the checkpoint
holds weights, optimizer and the random states of the layers.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from components.artifacts import Batches, TrainedModel, write_json
from components.distillation import Teacher, make_lesson
from components.errors import ConfigError, DataError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training import checkpoint
from components.training.epochs import Training, assign
from components.training.insight import in_words
from components.training.maker import Maker
from components.training.model import outputs_of
from components.training.precision import CHOICE, Choice, choose, computed_in
from components.training.prepared import prepared
from components.training.privacy import KEY, promise
from components.training.replicas import check_batch, rescaled
from components.training.split import Split, whole_somewhere
from components.training.trainable import check_trainable
from components.training.transfer import merged
from components.workers import check_share, several


def train(
    options: TrainOptions,
    build_model: Callable[[], keras.Model],
    model_options: ModelOptions,
    batches: Batches,
    folder: pathlib.Path,
    *,
    strategy: tf.distribute.Strategy,
    seed: int,
    trace: Trace,
    teachers: Callable[[], tuple[Teacher, ...]] = tuple,
    rescale: bool = False,
    split: Split | None = None,
) -> TrainedModel:
    """Trains and writes `model.keras`, `history.json` and, last, `trained.json`.

    Args:
      options: Epochs, global batch size, optimizer, early stopping; 0 epochs take the model as it is.
      build_model: Returns a built model with the same initial weights each time; called under the strategy's scope.
      model_options: Says whether a classifier returns logits or probabilities.
      batches: Augmentation is theirs; only the splits train and validation are read.
      folder: Exists; checkpoints of a killed attempt in it are resumed from.
      strategy: See `pipeline.strategy`.
      seed: Fixes the order of the examples.
      trace: Progress counts epochs; steps of the scalars are epochs, 1 is the first.
      teachers: Loads those that `options.distill` names; called under the strategy's scope.
      rescale: Batch size and learning rate are those of one replica; see `rescaled`.
      split: Places the layers on several devices; with the strategy of one.

    Returns:
      The folder's artifact. Its facts: outputs, parameters, epochs, best_epoch (whose weights these are; 1 is the
      first, 0 are those that the model came with), precision, train and validation {"loss", "accuracy" | "rmse"}, seconds,
      and privacy (see `promise`) where `options.privacy` asks for it.

    Raises:
      ConfigError: The batch does not divide by the replicas or exceeds the training split; an optimizer option is wrong.
      DataError: Early stopping without a validation split.
      ModelError: The loss is not finite, or nothing can be trained.
    """
    if rescale:
        options = _rescale(options, strategy, trace)
    steps = _check(options, batches, strategy, trace)
    with contextlib.ExitStack() as stack:
        with strategy.scope(), whole_somewhere(split):
            model = build_model()
            outputs = outputs_of(model, model_options)
        check_trainable(model, options)
        promised = {}
        if options.privacy is not None:
            promised = {"privacy": _promise(options, steps, batches, trace)}
        ready = stack.enter_context(prepared(model, options, split))
        for line in ready.told:
            trace.tell(line)
        with strategy.scope(), contextlib.nullcontext() if ready.home is None else tf.device(ready.home):
            lesson = make_lesson(options.distill, teachers, batches.spec.task, outputs)
        make = Maker(
            options=options,
            model=model,
            variables=ready.variables,
            batches=batches,
            strategy=strategy,
            steps=steps,
            outputs=outputs,
            lesson=lesson,
            seed=seed,
            folder=folder,
            home=ready.home,
        )
        chosen = Choice("float32", "nothing is trained")
        if options.epochs:
            examples = options.epochs * steps * options.batch_size
            chosen = choose(options, model, examples, make.kind, make.timer, folder)
            fused = f"; {ready.fused} batch normalizations on the fused kernel" if ready.fused else ""
            trace.tell(f"precision: {chosen}{fused}")
        stack.enter_context(computed_in(model, chosen.precision, make.kind))
        optimizer, loop = make.take(chosen.precision)
        run = Training(options, model, optimizer, loop, batches, folder, steps, seed, trace)
        run.stages, run.remake = ready.stages, functools.partial(make.loop, optimizer)
        run.resume()
        _trace_graph(trace, model)
        run.to_the_end()
        learned = run.learned() if options.epochs else run.taken_over()
        if "speed" in learned:
            trace.tell(in_words(learned["speed"]))
    facts = {"outputs": outputs, "precision": chosen.precision, **learned, **promised}
    with whole_somewhere(split):  # a merged model is built beside the trained one
        return _finish(run, facts, build_model)


def _rescale(options: TrainOptions, strategy: tf.distribute.Strategy, trace: Trace) -> TrainOptions:
    made = rescaled(options, strategy.num_replicas_in_sync)
    trace.tell(
        f"{strategy.num_replicas_in_sync} replicas: batch {options.batch_size} becomes {made.batch_size}, "
        f"learning rate {options.optimizer.learning_rate:g} becomes {made.optimizer.learning_rate:g}"
    )
    return made


def _check(options: TrainOptions, batches: Batches, strategy: tf.distribute.Strategy, trace: Trace) -> int:
    """Returns the updates of one epoch."""
    replicas = strategy.num_replicas_in_sync
    check_batch(options.batch_size, replicas, _strategy_name(strategy), accumulate=options.accumulate)
    check_share(strategy, batches)
    steps = batches.steps_per_epoch(options.batch_size)
    if steps == 0:
        rows = batches.rows["train"]
        raise ConfigError(
            f"train.batch_size={options.batch_size} exceeds the {rows} rows of the training split, and a batch must be whole: use {rows} or less."
        )
    if batches.rows.get("validation", 0):
        return steps
    if options.early_stopping is not None:
        raise DataError(
            "train.early_stopping looks at the validation loss, and the validation split has 0 rows; raise preprocess.splits.validation, or drop it."
        )
    trace.warn("The validation split has 0 rows: training runs blind; raise preprocess.splits.validation to see it.")
    return steps


def _strategy_name(strategy: tf.distribute.Strategy) -> str:
    if several(strategy):
        return "multi_worker"
    kinds = {"mirrored": tf.distribute.MirroredStrategy, "tpu": tf.distribute.TPUStrategy}
    return next((name for name, kind in kinds.items() if isinstance(strategy, kind)), "default")


def _promise(options: TrainOptions, steps: int, batches: Batches, trace: Trace) -> dict[str, Any]:
    assert options.privacy is not None
    made = promise(
        options.privacy,
        rows=batches.rows["train"],
        batch_size=options.batch_size,
        updates=options.epochs * steps,
    )
    trace.tell(
        f"privacy: epsilon {made['epsilon']:.2f} at delta {made['delta']:.2g} after all {made['updates']} updates"
    )
    return made


def _trace_graph(trace: Trace, model: keras.Model) -> None:
    if trace.folder is None:
        return
    spec = tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype)
    trace.graph(model.name, tf.function(lambda x: model(x, training=False)).get_concrete_function(spec))


def _finish(run: Training, facts: dict[str, Any], build_model: Callable[[], keras.Model]) -> TrainedModel:
    """Writes the files, the face last, and removes the checkpoints."""
    if run.best:
        assign(run.model.variables, run.best)
    made = TrainedModel(run.folder)
    temporary = run.folder / ".model.keras"
    with contextlib.nullcontext() if run.best else run.averaged():  # the best weights are averages already
        transfer = run.options.transfer
        model = merged(run.model, build_model) if transfer is not None and transfer.lora else run.model
        model.save(temporary)
    temporary.replace(made.file)
    write_json(run.folder / "history.json", run.history)
    counts = {"parameters": model.count_params(), "epochs": run.epoch, "best_epoch": run.best_epoch}
    write_json(run.folder / "trained.json", {**counts, **facts})
    checkpoint.remove(run.folder)
    for name in (CHOICE, KEY):
        (run.folder / name).unlink(missing_ok=True)
    return made
