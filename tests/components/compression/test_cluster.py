import numpy as np
import pytest
import tf_keras

from components.compression.cluster import choose_clusterable, cluster, strip
from components.compression.kernels import distinct_per_channel, kernels, sparsity
from components.errors import ConfigError
from components.options import ClusterOptions

layers = tf_keras.layers


def twin() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 2))
    x = layers.DepthwiseConv2D(3, name="depth")(layers.Conv2D(4, 3, name="conv")(image))
    return tf_keras.Model(image, layers.Dense(3, name="out")(layers.Flatten()(x)))


def clustered(options: ClusterOptions, clusters: int, model: tf_keras.Model, zeros: set[str]) -> dict[str, np.ndarray]:
    chosen = choose_clusterable(model, options, clusters)
    bare = strip(cluster(model, chosen, options, clusters=clusters, keep_zeros=zeros))
    return {kernel.name: kernel.values for kernel in kernels(bare)}


@pytest.mark.parametrize("initialization", ["kmeans++", "linear", "density"])
def test_each_kernel_shares_the_number_of_values_that_was_asked_for(initialization):
    made = clustered(ClusterOptions(initialization=initialization), 5, twin(), set())
    assert len(np.unique(made["conv"])) <= 5
    assert len(np.unique(made["out"])) <= 5
    assert len(np.unique(made["depth"])) == 36


def test_with_centroids_per_channel_each_channel_has_its_own_values():
    made = clustered(ClusterOptions(per_channel=True), 5, twin(), set())
    assert distinct_per_channel(made["conv"]) <= 5
    assert len(np.unique(made["conv"])) > 5


@pytest.mark.parametrize("per_channel", [False, True])
def test_zeros_stay_zero_and_count_as_a_value(per_channel):
    model = twin()
    kernel = model.get_layer("conv").kernel
    kernel.assign(np.where(np.abs(kernel.numpy()) < 0.1, 0, kernel.numpy()))
    before = kernel.numpy()
    made = clustered(ClusterOptions(per_channel=per_channel), 5, model, {"conv"})["conv"]
    assert (made[before == 0] == 0).all()
    assert 0 < sparsity(before) <= sparsity(made) < 1
    assert distinct_per_channel(made) <= 5


def test_what_is_left_alone_comes_with_the_reason():
    model = twin()
    model.get_layer("out").kernel.assign(np.ones_like(model.get_layer("out").kernel))
    chosen = choose_clusterable(model, ClusterOptions(exclude=["conv"]), 4)
    assert {each.layer: each.reason for each in chosen.untreated} == {
        "conv": "excluded by compress.cluster.exclude",
        "depth": "tfmot does not cluster depthwise kernels: unrecoverable loss of accuracy",
        "out": "holds no more than 4 different weights as it is",
    }


def test_two_clusters_are_too_few_when_zeros_are_kept():
    chosen = choose_clusterable(twin(), ClusterOptions(), 2)
    with pytest.raises(ConfigError, match=r"'prune\+cluster@2': with zeros kept at least 3 clusters"):
        cluster(twin(), chosen, ClusterOptions(), clusters=2, keep_zeros={"conv"})
