"""Cluster: the weights of each kernel share a few values, which go on learning.

    twin --cluster()--> model with centroids --train--> strip() --> twin with few distinct weights

tfmot's cluster_weights (Han et al. 2016, arXiv 1510.00149); zeros of an earlier pruning stay zero.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras

# The wrapper itself: tfmot's public name does not pass `preserve_sparsity` on, and the check in front of the experimental
# one takes the kernel of a convolution without bias for its bias, and so refuses to cluster it by channel.
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights

from components.compression.kernels import Chosen, Kernel, check_excluded, choose, copy, wrap
from components.errors import ConfigError
from components.options import ClusterOptions

CentroidInitialization = tfmot.clustering.keras.CentroidInitialization
_INITIALIZATIONS = {
    "kmeans++": CentroidInitialization.KMEANS_PLUS_PLUS,
    "linear": CentroidInitialization.LINEAR,
    "density": CentroidInitialization.DENSITY_BASED,
}


def choose_clusterable(twin: tf_keras.Model, options: ClusterOptions, clusters: int) -> Chosen:
    """Which kernels are clustered.

    Left alone: what the user excludes, depthwise kernels (tfmot: unrecoverable loss of accuracy), and kernels that hold
    no more than `clusters` different values as they are.

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
    """
    check_excluded("cluster", options.exclude, twin)

    def refuse(kernel: Kernel) -> str | None:
        if kernel.name in options.exclude:
            return "excluded by compress.cluster.exclude"
        if not kernel.layer.trainable:
            return "the layer is frozen (trainable=False)"
        if kernel.kind == "depthwise_conv2d":
            return "tfmot does not cluster depthwise kernels: unrecoverable loss of accuracy"
        if _values_to_share(kernel, options.per_channel) <= clusters:
            return f"holds no more than {clusters} different weights as it is"
        return None

    return choose(twin, refuse)


def _values_to_share(kernel: Kernel, per_channel: bool) -> int:
    """Different values that one set of centroids must stand for; the least of the channels where each has its own."""
    values = kernel.values
    if per_channel and kernel.kind == "conv2d":
        return min(len(np.unique(channel)) for channel in values.reshape(-1, values.shape[-1]).T)
    return len(np.unique(values))


def cluster(
    twin: tf_keras.Model, chosen: Chosen, options: ClusterOptions, *, clusters: int, keep_zeros: Collection[str]
) -> tf_keras.Model:
    """Wraps the chosen kernels.

    Args:
      twin: Without wrappers; left as it is.
      chosen: What `choose_clusterable` gave.
      options: How centroids start, and whether each output channel of a convolution has its own.
      clusters: Different values a kernel (or channel) may hold, zero included.
      keep_zeros: Layers that were pruned: there zero is one of the values, and what is zero stays zero.

    Raises:
      ConfigError: Two clusters with zeros kept; tfmot needs three there.
    """
    if keep_zeros and clusters < 3:
        raise ConfigError(
            f"compress.recipes 'prune+cluster@{clusters}': with zeros kept at least 3 clusters are needed; write cluster@3 or more."
        )
    return wrap(
        twin,
        chosen.names,
        lambda layer: ClusterWeights(
            layer,
            number_of_clusters=clusters,
            cluster_centroids_init=_INITIALIZATIONS[options.initialization],
            preserve_sparsity=layer.name in keep_zeros,
            cluster_per_channel=options.per_channel,
        ),
    )


def distinct_weights(model: tf_keras.Model) -> dict[str, float]:
    """Number of different centroids of each wrapped layer (most in one channel), by layer name."""
    return {
        layer.layer.name: float(max(len(np.unique(row)) for row in np.atleast_2d(centroids.numpy())))
        for layer in model.layers
        if isinstance(layer, ClusterWeights)
        for centroids in layer.cluster_centroids.values()
    }


def strip(model: tf_keras.Model) -> tf_keras.Model:
    """A twin without wrappers, each weight equal to its centroid."""
    return copy(tfmot.clustering.keras.strip_clustering(model))
