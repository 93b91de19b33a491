"""The rules that a global batch and the replicas of a strategy share; light, so that `plan` can check them too."""

from __future__ import annotations

import math

from components.errors import ConfigError
from components.options import TrainOptions


def rescaled(options: TrainOptions, replicas: int) -> TrainOptions:
    """`options` for `replicas` devices, each of which takes a batch of the size that they name.

    The batch grows by the number of replicas. The learning rate grows by the same for SGD (Goyal et al. 2017, arXiv
    1706.02677) and by its square root for Adam and AdamW, whose steps have a length that does not depend on the
    gradient's (Malladi et al. 2022, arXiv 2205.10287).

    >>> made = rescaled(TrainOptions(batch_size=64, optimizer={"name": "adam", "learning_rate": 0.001}), 4)
    >>> made.batch_size, made.optimizer.learning_rate
    (256, 0.002)
    """
    optimizer = options.optimizer
    factor = replicas if optimizer.name == "sgd" else math.sqrt(replicas)
    faster = optimizer.model_copy(update={"learning_rate": optimizer.learning_rate * factor})
    return options.model_copy(update={"batch_size": options.batch_size * replicas, "optimizer": faster})


def check_batch(
    batch_size: int, replicas: int, strategy: str, where: str = "train.batch_size", accumulate: int = 1
) -> None:
    """Each replica takes an equal share of every batch, in `accumulate` parts, so `batch_size` must divide by both.

    Raises:
      ConfigError: It does not; the message names the nearest sizes that do.
    """
    whole = replicas * accumulate
    rest = batch_size % whole
    if rest == 0:
        return
    below, above = batch_size - rest, batch_size - rest + whole
    choice = f"{below} or {above}" if below else str(above)
    by = [f"the {replicas} replicas of strategy '{strategy}'"] if replicas > 1 else []
    by += [f"train.accumulate={accumulate}"] if accumulate > 1 else []
    raise ConfigError(f"{where}={batch_size} must divide by {' times '.join(by)} (remainder {rest}): use {choice}.")
