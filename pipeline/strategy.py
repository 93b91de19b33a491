"""Strategy: the name in the configuration becomes the `tf.distribute` strategy that training runs under.

All of them run. TensorFlow is imported when a strategy is made, not before, so that `plan` can check the rules in
milliseconds. How the processes of `multi_worker` find each other and walk together: `pipeline.team`.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from components.errors import ConfigError
from components.options import StrategyOptions
from components.training.replicas import check_batch

if TYPE_CHECKING:
    import tensorflow as tf

    from components.training.split import Split


def check_strategy(options: StrategyOptions, batch_size: int, accumulate: int = 1) -> None:
    """What can be said about `options` without starting TensorFlow: of a global batch in `accumulate` parts.

    With `devices` unset the number of replicas is known only on the machine; training checks the batch then.

    Raises:
      ConfigError: `devices` or `tpu` mean nothing here, or the global batch does not divide.
    """
    if options.tpu is not None and options.name != "tpu":
        raise ConfigError(
            f"strategy.tpu={options.tpu} applies to tpu, got strategy.name={options.name}; set strategy.name=tpu, or drop strategy.tpu."
        )
    if options.devices is not None and options.name not in ("mirrored", "split"):
        raise ConfigError(
            f"strategy.devices={options.devices} applies to mirrored and split, got strategy.name={options.name}; set strategy.name=mirrored, or drop strategy.devices."
        )
    replicas = 1 if options.name == "split" else options.devices or options.workers or 1
    check_batch(batch_size, replicas, options.name, accumulate=accumulate)


def make_strategy(options: StrategyOptions) -> tf.distribute.Strategy:
    """Makes the strategy that `options` name.

    `mirrored` copies the model to each GPU, or, where there is none, to each logical CPU device, and sums the gradients
    of their shares of the batch. `multi_worker` does so across the processes that TF_CONFIG names, and waits for them.
    `tpu` connects to the TPU that `options.tpu` or the environment names; see `tpu.resolve`. `split` has one replica, whose
    layers `make_split` places.

    Raises:
      ConfigError: There is no such TPU, or more devices are asked for than the machine has.
    """
    check_strategy(options, batch_size=options.devices or options.workers or 1)
    import tensorflow as tf

    if options.name in ("default", "split"):
        return tf.distribute.get_strategy()
    if options.name == "multi_worker":
        return _multi_worker()
    if options.name == "tpu":
        return _tpu(options.tpu)
    return _mirrored(tuple(_devices(options.devices)))


def make_split(options: StrategyOptions) -> Split | None:
    """Which devices the layers of the model go to; None unless `options` name `split`.

    Raises:
      ConfigError: There are fewer devices than are asked for.
    """
    if options.name != "split":
        return None
    from components.training.split import Split

    return Split(tuple(_devices(options.devices)), options.layout)


@functools.cache
def _tpu(name: str | None) -> tf.distribute.Strategy:
    """One per process: to initialise a TPU again forgets what is on it."""
    from tpu.errors import TpuError
    from tpu.resolve import make_tpu_strategy

    try:
        return make_tpu_strategy(name, dict(os.environ))
    except TpuError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """One strategy per set of devices and process, as two that use collectives clash: each numbers its own from 100.

    On CPUs the sum is taken on one device, which needs no collectives.
    """
    import tensorflow as tf

    on_cpu = all("CPU" in device for device in devices)
    return tf.distribute.MirroredStrategy(
        list(devices), cross_device_ops=tf.distribute.ReductionToOneDevice() if on_cpu else None
    )


@functools.cache
def _multi_worker() -> tf.distribute.Strategy:
    """One per process: it starts the server at which the others call."""
    import tensorflow as tf

    return tf.distribute.MultiWorkerMirroredStrategy()


def _devices(wanted: int | None) -> list[str]:
    import tensorflow as tf

    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    if wanted is not None and wanted > len(found):
        raise ConfigError(
            f"strategy.devices={wanted} asks for more than the {len(found)} {kind} devices of this machine: use {len(found)} or fewer, or drop it to take all."
        )
    return found[:wanted]
