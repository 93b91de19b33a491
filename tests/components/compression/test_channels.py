"""Channels are followed through graphs, ranked, cut, and found cut in the file."""

import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from components.artifacts import CompressedModel, DataSpec
from components.compression.channel_groups import trace_channels
from components.compression.channels import _counts, choose_channels, importance, shrink
from components.compression.compress import load, unsupported
from components.compression.twin import to_twin
from components.delivery.export import export
from components.delivery.measure import predict
from components.delivery.proof import Proof, check, read_proof
from components.errors import ConfigError, ModelError
from components.options import ChannelsOptions, ExportOptions
from components.recipe import parse_recipe
from components.tracing import Trace

from .conftest import OPTIONS, SPEC, carry_out, draw, small_model, trained

layers = tf_keras.layers
ANY = ChannelsOptions(multiple=1, minimum=1)


def conv(x, filters, name, kernel=3, **more):
    x = layers.Conv2D(filters, kernel, padding="same", name=name, **more)(x)
    return layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=f"{name}_norm")(x))


def everything() -> tf_keras.Model:
    """Residual sums, depthwise kernels, squeeze and excite, concatenation, a transposed kernel, flatten, dense layers."""
    image = layers.Input((8, 8, 3), name="image")
    x = conv(image, 12, "stem")
    x = layers.Add(name="sum")([x, conv(conv(x, 10, "inner"), 12, "outer")])
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depth")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="prelu")(layers.BatchNormalization(name="depth_norm")(x))
    x = conv(x, 14, "point", kernel=1)
    s = layers.GlobalAveragePooling2D(name="squeeze")(x)
    s = layers.Reshape((1, 1, 14), name="picture")(s)
    s = layers.Conv2D(6, 1, activation="relu", name="reduce")(s)
    s = layers.Conv2D(14, 1, activation="sigmoid", name="expand")(s)
    x = layers.Multiply(name="excite")([x, s])
    x = layers.Concatenate(name="both")([layers.MaxPooling2D(name="pool")(x), conv(x, 9, "half", strides=2)])
    x = layers.Conv2DTranspose(11, 2, strides=2, name="up")(layers.Dropout(0.1, name="dropout")(x))
    x = layers.Flatten(name="flatten")(layers.AveragePooling2D(4, name="shrink")(x))
    x = layers.Dense(20, activation="relu", name="hidden")(x)
    return tf_keras.Model(image, layers.Dense(3, name="logits")(x), name="everything")


def randomize(model: tf_keras.Model, seed: int = 0) -> tf_keras.Model:
    """Weights of every kind away from their start, variances positive."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(
            random.uniform(0.5, 1.5, weight.shape) * (1 if "variance" in weight.name else random.choice([-1, 1]))
        )
        if len(weight.shape) > 1:
            weight.assign(random.normal(0, 0.2, weight.shape))
    return model


def silence(model: tf_keras.Model, gone: np.ndarray) -> None:
    """Zero in every weight that makes or takes a channel marked in `gone`, biases and normalization included."""
    flows = trace_channels(model).flows
    for layer in model.layers:
        flow = flows.get(layer.name)
        for weight in layer.weights:
            values = weight.numpy()
            takes, makes = gone[flow.inputs], gone[flow.outputs]
            if type(layer) is layers.DepthwiseConv2D and values.ndim > 2:
                values[:, :, takes] = 0
            elif type(layer) is layers.Conv2DTranspose and values.ndim > 1:
                values[..., takes] = 0
                values[:, :, makes] = 0
            elif values.ndim > 1 and "alpha" not in weight.name:
                values[..., takes, :] = 0
                values[..., makes] = 0
            elif "variance" not in weight.name:
                values[..., makes] = 0
            weight.assign(values)


def example(model: tf_keras.Model) -> np.ndarray:
    return np.random.default_rng(1).random((4, *model.inputs[0].shape[1:])).astype(np.float32)


def test_channels_that_carry_nothing_go_without_a_trace():
    model = randomize(everything())
    groups = trace_channels(model).groups()
    random = np.random.default_rng(2)
    gone = np.zeros(trace_channels(model).count, bool)
    for group in groups:
        gone[random.choice(group.numbers, len(group.numbers) // 2, replace=False)] = True
    silence(model, gone)
    cut = choose_channels(model, ANY, 0.01)
    small = shrink(model, type(cut)(cut.channels, ~gone, []))
    assert small.get_layer("hidden").kernel.shape == (2 * 2 * 6, 10)
    expected = model(example(model), training=False)
    assert float(np.ptp(expected)) > 0.01, "nothing reaches the output"
    np.testing.assert_allclose(small(example(model), training=False), expected, atol=1e-6)


def grouped(groups: int) -> tf_keras.Model:
    """A convolution of 16 to 24 channels in groups between two plain ones."""
    image = layers.Input((8, 8, 3), name="image")
    x = conv(conv(image, 16, "wide", kernel=1), 24, "grouped", groups=groups)
    x = layers.GlobalAveragePooling2D()(conv(x, 10, "narrow", kernel=1))
    return tf_keras.Model(image, layers.Dense(3, name="logits")(x), name="grouped")


@pytest.mark.parametrize(
    ("groups", "units", "left", "kernel"),
    [
        (2, [("wide", 8), ("grouped", 12)], 2, (3, 3, 4, 12)),  # each group loses half of its inputs and outputs
        (8, [("wide", "grouped", 8)], 4, (3, 3, 2, 12)),  # half of the groups go
    ],
)
def test_groups_of_a_convolution_lose_equally_or_go_as_a_whole(groups, units, left, kernel, tmp_path):
    model = randomize(grouped(groups))
    channels = trace_channels(model)
    found = [(*group.layers, len(group.numbers)) for group in channels.groups()]
    assert found == [*units, ("narrow", 10)]
    gone = np.zeros(channels.count, bool)
    for group in channels.groups():
        gone[group.numbers[::2]] = True
    for layer in ("wide", "grouped", "narrow"):  # what is gone makes nothing: its kernel, offset and mean are zero
        makes = gone[channels.flows[layer].outputs]
        for weight in [*model.get_layer(layer).weights, *model.get_layer(f"{layer}_norm").weights]:
            if "variance" not in weight.name:
                weight.assign(np.where(makes, 0, weight.numpy()))
    small = shrink(model, type(choose_channels(model, ANY, 0.01))(channels, ~gone, []))
    made = small.get_layer("grouped")
    assert (made.groups, tuple(made.kernel.shape)) == (left, kernel)
    expected = model(example(model), training=False)
    assert float(np.ptp(expected)) > 0.01, "nothing reaches the output"
    np.testing.assert_allclose(small(example(model), training=False), expected, atol=1e-6)
    counted = channels.multiply_adds(~gone)
    assert counted == trace_channels(small).multiply_adds()
    spec = DataSpec(task="classification", input_name="image", input_shape=(8, 8, 3), labels=("a", "b", "c"))
    given = ("float32", "float32", small, spec, "logits", ExportOptions(), None, tmp_path)
    file = export(*given, seed=0, trace=Trace()).file
    assert (12, 3, 3, kernel[2]) in {each.shape for each in read_proof(file).weights}
    np.testing.assert_allclose(predict(file, example(model)), expected, atol=1e-5)


def test_the_order_of_channels_survives_the_cut():
    model = randomize(everything())
    cut = choose_channels(model, ANY, 0.5)
    small = shrink(model, cut)
    flow, made = cut.channels.flows["up"], small.get_layer("up")
    kernel = model.get_layer("up").kernel.numpy()[:, :, cut.kept[flow.outputs]][..., cut.kept[flow.inputs]]
    np.testing.assert_array_equal(made.kernel, kernel)
    np.testing.assert_array_equal(made.bias, model.get_layer("up").bias.numpy()[cut.kept[flow.outputs]])


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_share_is_reached_and_no_step_could_have_stayed(strength, multiple):
    model = randomize(everything())
    cut = choose_channels(model, ChannelsOptions(multiple=multiple, minimum=1), strength)
    whole = cut.channels.multiply_adds()
    assert cut.channels.multiply_adds(cut.kept) <= (1 - strength) * whole
    for group in cut.channels.groups():
        gone = group.numbers[~cut.kept[group.numbers]]
        back = cut.kept.copy()
        back[gone[: multiple if len(group.numbers) >= 2 * multiple else 1]] = True
        assert len(gone) == 0 or cut.channels.multiply_adds(back) > (1 - strength) * whole, group.layers
    small = shrink(model, cut)
    assert trace_channels(small).multiply_adds() == cut.channels.multiply_adds(cut.kept)
    facts = cut.facts(model, small)
    assert facts["parameters"] == [model.count_params(), small.count_params()]
    assert {"layers": ["hidden"], "channels": [20, small.get_layer("hidden").units]} in facts["groups"]


def test_large_groups_keep_a_multiple_and_every_group_its_minimum():
    options = ChannelsOptions(multiple=8, minimum=4)
    assert _counts(30, options) == [30, 24, 16, 8]
    assert _counts(16, options) == [16, 8]
    assert _counts(12, options) == [12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert _counts(3, options) == [3]
    assert _counts(32, ChannelsOptions(multiple=8, minimum=9)) == [32, 24, 16]


def test_more_than_can_go_is_refused_with_the_most_that_can():
    model = everything()
    options = ChannelsOptions(minimum=6, exclude=["hidden"])
    with pytest.raises(ModelError) as caught:
        choose_channels(model, options, 0.9)
    most = float(str(caught.value).partition("at most ")[2].partition(" ")[0])
    assert str(caught.value) == (
        f"channels@0.9: at most {most:.4f} of the multiply-adds of model 'everything' can be removed, with "
        "compress.channels.minimum=6 and layers that cannot shrink ('up', 'hidden', 'logits'); "
        f"write channels@{math.floor(most * 100) / 100:g} or less."
    )
    choose_channels(model, options, math.floor(most * 100) / 100)


def test_excluding_a_layer_that_is_not_there_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"compress\.channels\.exclude: the model has no layer 'hiden'; did you mean"):
        choose_channels(everything(), ChannelsOptions(exclude=["hiden"]), 0.5)


# --- which channels go -------------------------------------------------------------------------------------------


def two_layers() -> tf_keras.Model:
    """A convolution of three filters with normalization, whose norms, L1 norms and scales disagree."""
    image = layers.Input((4, 4, 1))
    x = layers.Conv2D(3, 2, use_bias=False, name="conv")(image)
    x = layers.Flatten()(layers.BatchNormalization(name="norm")(x))
    model = tf_keras.Model(image, layers.Dense(2, name="out")(x))
    kernel = np.zeros((2, 2, 1, 3), np.float32)
    kernel[..., 0].flat = [3, 0, 0, 0]  # L2 3, L1 3
    kernel[..., 1].flat = [1, 1, 1, 1]  # L2 2, L1 4
    kernel[..., 2].flat = [2, 2, 2, 2]  # L2 4, L1 8
    model.get_layer("conv").set_weights([kernel])
    return model


@pytest.mark.parametrize(
    ("kind", "gamma", "variance", "order"),
    [
        ("l2", [1, 1, 1], [1, 1, 1], [1, 0, 2]),
        ("l1", [1, 1, 1], [1, 1, 1], [0, 1, 2]),
        ("l2", [1, 1, 0.1], [1, 1, 1], [2, 1, 0]),  # the normalization is folded into the kernel
        ("l2", [1, 1, 1], [1, 1, 400], [2, 1, 0]),
        ("batch_norm", [-2, 1, 1.5], [1, 1, 400], [1, 2, 0]),
    ],
)
def test_the_least_important_channel_goes_first(kind, gamma, variance, order):
    model = two_layers()
    model.get_layer("norm").set_weights([np.array(each, np.float32) for each in (gamma, [0] * 3, [0] * 3, variance)])
    channels = trace_channels(model)
    values = importance(channels, ChannelsOptions(importance=kind))
    own = values[channels.flows["conv"].outputs]
    assert list(np.argsort(own)) == order
    assert own.mean() == pytest.approx(1)


def test_without_a_normalization_behind_it_a_layer_is_judged_by_its_norm():
    image = layers.Input((4, 4, 1))
    x = layers.Conv2D(2, 1, use_bias=False, name="conv")(image)
    model = tf_keras.Model(image, layers.Dense(1)(layers.Flatten()(x)))
    model.get_layer("conv").set_weights([np.array([[[[3.0, 1.0]]]])])
    channels = trace_channels(model)
    for kind in ("batch_norm", "l2", "l1"):
        values = importance(channels, ChannelsOptions(importance=kind))
        assert list(values[channels.flows["conv"].outputs]) == [1.5, 0.5]


def test_a_residual_stream_is_judged_by_all_that_is_added_to_it():
    image = layers.Input((4, 4, 1))
    a, b = (layers.Conv2D(2, 1, use_bias=False, name=name)(image) for name in "ab")
    model = tf_keras.Model(image, layers.Dense(1)(layers.Flatten()(layers.Add()([a, b]))))
    model.get_layer("a").set_weights([np.array([[[[3.0, 1.0]]]])])
    model.get_layer("b").set_weights([np.array([[[[1.0, 9.0]]]])])
    channels = trace_channels(model)
    values = importance(channels, ChannelsOptions())
    assert list(values[channels.flows["a"].outputs]) == [(1.5 + 0.2) / 2, (0.5 + 1.8) / 2]


# --- the step ----------------------------------------------------------------------------------------------------

LONG = "channels+prune+cluster+qat"
RECIPES = ["channels", pytest.param(LONG, marks=pytest.mark.slow)]  # three more trainings


def proof_of(made: CompressedModel, folder: pathlib.Path, calibration: np.ndarray, format: str = "int8") -> Proof:
    given = (made.facts["recipe"], format, load(made), SPEC, "logits", ExportOptions(), calibration, folder)
    return read_proof(export(*given, seed=0, trace=Trace()).file)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_holds_the_smaller_kernels_and_the_model_still_does_its_task(
    recipe, compressed, calibration, tmp_path
):
    made = compressed(recipe)
    shapes = {promise.layer: promise.shape for promise in made.promises}
    assert shapes["stem"][0] == shapes["inner"][0] == shapes["inner"][3] == shapes["point"][3] < 8
    twin = load(compressed("channels"))
    assert shapes["point"][0] == twin.get_layer("depth").depthwise_kernel.shape[2]
    assert check(proof_of(made, tmp_path, calibration), made.promises, "int8") == []
    x, y = draw(200, 9)
    assert np.mean(np.argmax(load(made)(x, training=False), -1) == y) > 0.8


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_later_step_tells_what_was_removed(recipe, compressed, base):
    whole = to_twin(keras.saving.load_model(base.file, compile=False))
    made, facts = load(compressed("channels")), compressed(recipe).facts["reports"]["channels@0.5"]
    before, after = (trace_channels(each).multiply_adds() for each in (whole, made))
    assert facts["multiply_adds"] == [before, after]
    assert facts["parameters"] == [whole.count_params(), made.count_params()]
    assert 0.4 < after / before <= 0.5
    layers_of = [group["layers"] for group in facts["groups"]]
    assert layers_of == [["stem", "inner"], ["point", "depth"], ["hidden"]]


def test_without_the_step_nothing_is_told(compressed):
    assert compressed("prune").facts["reports"] == {}


def test_a_kernel_of_the_old_shape_breaks_the_promise(compressed, calibration, tmp_path):
    promises = {promise.layer: promise for promise in compressed("channels").promises}
    whole = proof_of(compressed("prune"), tmp_path, calibration)
    broken = check(whole, list(promises.values()), "int8")
    for name in ("stem", "inner", "point"):
        shape = promises[name].shape
        assert f"layer '{name}': no conv2d kernel of shape {shape} in the file" in broken


@pytest.mark.slow  # as above
def test_zeros_and_clusters_are_promised_beside_the_shape(compressed):
    promises = {promise.layer: promise for promise in compressed(LONG).promises}
    assert promises["hidden"].sparsity > 0.5
    assert promises["inner"].distinct == 6
    assert promises["stem"].sparsity == 0  # among the smallest, so prune left it alone
    assert all(promise.quantized for promise in promises.values())
    alone = {promise.layer: promise for promise in compressed("channels").promises}
    assert {(each.sparsity, each.distinct, each.quantized) for each in alone.values()} == {(0.0, 0, False)}
    assert all(promises[name].shape == promise.shape for name, promise in alone.items())


def test_qat_goes_on_training_what_only_became_smaller(base, batches, compressed, tmp_path):
    options = OPTIONS.model_copy(update={"qat": OPTIONS.qat.model_copy(update={"exclude": ["stem"]})})
    small = compressed("channels")
    made = carry_out("channels+qat", tmp_path, base, batches, {"channels@0.5": small}, options=options)
    before = load(small).get_layer("stem").kernel.numpy()
    after = load(made).get_layer("stem").kernel.numpy()
    assert not np.array_equal(before, after)


def test_before_a_run_fixed_layers_and_shares_out_of_reach_are_told():
    recipes = [parse_recipe(text, OPTIONS.strengths) for text in ("channels@0.5", "channels@0.97")]
    lines = unsupported(small_model(), recipes, OPTIONS)
    assert lines[0] == "channels leaves layer 'logits' (Dense) alone: its channels are those of the model's output"
    assert lines[1].startswith("channels@0.97: at most 0.")
    assert len(lines) == 2


def test_a_model_in_which_nothing_can_shrink_is_refused(batches, tmp_path):
    image = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.LayerNormalization(name="norm")(x)
    model = keras.Model(image, keras.layers.Dense(3, name="logits")(keras.layers.GlobalAveragePooling2D()(x)))
    base = trained(tmp_path / "base", model)
    with pytest.raises(ModelError) as caught:
        carry_out("channels", tmp_path, base, batches, {})
    assert str(caught.value) == (
        "channels@0.5: the model has no layer to work on ('conv': its channels go through layer 'norm' (LayerNormalization), "
        "which trimline cannot cut; 'logits': its channels are those of the model's output); drop the recipes with channels."
    )
    (line,) = (line for line in unsupported(model, [parse_recipe("channels", OPTIONS.strengths)]) if "nothing" in line)
    assert line.startswith("channels finds nothing to work on in model")


@pytest.mark.slow  # builds networks of hundreds of layers
@pytest.mark.parametrize(
    ("name", "side", "strength"),
    [
        ("MobileNet", 32, 0.5),
        ("MobileNetV2", 32, 0.5),
        ("MobileNetV3Small", 32, 0.5),
        ("EfficientNetB0", 32, 0.5),
        ("ResNet50V2", 32, 0.5),
        ("DenseNet121", 32, 0.5),
        ("InceptionV3", 75, 0.5),
        ("Xception", 71, 0.5),
        ("VGG16", 32, 0.5),
        ("NASNetMobile", 32, 0.3),
    ],
)
def test_networks_of_every_kind_shrink_without_a_rule_of_their_own(name, side, strength):
    model = to_twin(getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=10))
    cut = choose_channels(model, ChannelsOptions(), strength)
    silence(model, ~cut.kept)
    small = shrink(model, cut)
    expected = model(example(model), training=False)
    np.testing.assert_allclose(small(example(model), training=False), expected, atol=1e-5)
    assert trace_channels(small).multiply_adds() <= (1 - strength) * trace_channels(model).multiply_adds()


@pytest.mark.slow  # two replicas
def test_it_runs_on_two_devices_with_the_result_of_one(mirrored, base, batches, compressed, tmp_path):
    made, one = carry_out("channels+qat", tmp_path, base, batches, {}, strategy=mirrored), compressed("channels+qat")
    assert made.facts["validation"]["loss"] == pytest.approx(one.facts["validation"]["loss"], abs=0.05)
    assert made.promises == one.promises
    assert made.facts["reports"]["channels@0.5"] == one.facts["reports"]["channels@0.5"]


def test_interrupted_in_an_epoch_it_goes_on_to_the_same_bits(base, batches, compressed, tmp_path):
    def stop(done: float, total: float, note: str) -> None:
        if done >= 1.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out("channels", tmp_path, base, batches, {}, trace=Trace(on_progress=stop))
    epochs: list[float] = []
    with Trace(tmp_path / "log", on_progress=lambda done, *_: epochs.append(done)) as trace:
        resumed, whole = carry_out("channels", tmp_path, base, batches, {}, trace=trace), compressed("channels")
    assert min(epochs) > 1, "an epoch that was done has been done again"
    assert resumed.facts == whole.facts
    with np.load(whole.folder / "weights.npz") as ours, np.load(resumed.folder / "weights.npz") as theirs:
        assert ours.files == theirs.files
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)
    assert sizes_told(tmp_path / "log") == {
        key: whole.facts["reports"]["channels@0.5"][key] for key in ("multiply_adds", "parameters")
    }


def sizes_told(folder: pathlib.Path) -> dict[str, list[float]]:
    """What TensorBoard shows under channels/, before and after."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    names = [name for name in events.Tags()["tensors"] if name.startswith("channels/")]
    return {
        name.removeprefix("channels/"): [float(tf.make_ndarray(each.tensor_proto)) for each in events.Tensors(name)]
        for name in names
    }
