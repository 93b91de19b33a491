"""The one rule that a global batch and the replicas of a strategy share; light, so that `plan` can check it too."""

from __future__ import annotations

from components.errors import ConfigError


def check_batch(batch_size: int, replicas: int, strategy: str, where: str = "train.batch_size") -> None:
    """Each replica takes an equal share of every batch, so `batch_size` must divide by `replicas`.

    Raises:
      ConfigError: It does not; the message names the nearest sizes that do.
    """
    rest = batch_size % replicas
    if rest == 0:
        return
    below, above = batch_size - rest, batch_size - rest + replicas
    choice = f"{below} or {above}" if below else str(above)
    raise ConfigError(
        f"{where}={batch_size} must divide by the {replicas} replicas of strategy '{strategy}' (remainder {rest}): use {choice}."
    )
