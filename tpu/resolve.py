"""Resolve: where the TPU is, and the strategy that trains on it.

Nothing here has run on a TPU. What can be tested without one is what is said where there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpu.errors import TpuError

if TYPE_CHECKING:
    import tensorflow as tf

LOCAL = "local"
VARIABLES = ("TPU_NAME", "TPU_WORKER_HOSTNAMES", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS")
_GUIDE = "docs/tpu.md has the set-up"


def where(name: str | None, environment: dict[str, str]) -> str:
    """What the cluster resolver is to be asked for: `name`; else what the environment names; else 'local', as on a TPU VM.

    >>> where(None, {"TPU_NAME": "my-tpu"})
    'my-tpu'
    """
    return name or environment.get("TPU_NAME") or LOCAL


def make_tpu_strategy(name: str | None, environment: dict[str, str]) -> tf.distribute.TPUStrategy:
    """Connects to the TPU, initialises it and makes its strategy: one replica for each core.

    Args:
      name: Of a Cloud TPU, 'local' on a TPU VM, a 'grpc://' address; None asks the environment (TPU_NAME).
      environment: Usually `os.environ`.

    Raises:
      TpuError: There is none, or TensorFlow has no kernels for it; says what to install or set.
    """
    import tensorflow as tf

    asked = where(name, environment)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=asked)
        if asked != LOCAL:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        missing = "ConfigureDistributedTPU" in str(error)
        step = (
            f"TensorFlow {tf.__version__} as installed here drives no TPU: on a TPU VM install tensorflow-tpu 2.20.0"
            if missing
            else "set strategy.tpu or TPU_NAME to a TPU that runs"
        )
        raise TpuError(f"strategy.tpu={asked}: no TPU was found, got '{first}'; {step}; {_GUIDE}.") from error
    return tf.distribute.TPUStrategy(resolver)
