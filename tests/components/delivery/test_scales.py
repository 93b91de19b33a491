import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import DataSpec
from components.delivery.export import export
from components.delivery.measure import predict
from components.delivery.proof import gzip_bytes, operator_name
from components.delivery.scales import ACTIVATION_BITS, KERNEL_BITS, PRODUCTS, rounded, shorten
from components.options import ExportOptions
from components.recipe import IO
from components.tracing import Trace
from tests.components.delivery.conftest import answers, pack

EXACT = ExportOptions(short_scales=False)
SPEC = DataSpec(task="classification", input_name="image", input_shape=(12, 12, 2), labels=("a", "b", "c"))


def tied_network():
    """What ties scales or prescribes them: pooling, concatenation, sigmoid, softmax; a constant among activations."""
    layers = keras.layers
    keras.utils.set_random_seed(2)
    start = keras.Input((12, 12, 2), name="image")
    wide = layers.Conv2D(8, 3, padding="same", activation="relu", name="wide")(start)
    wide = keras.ops.multiply(wide, np.linspace(0.2, 1, 12, dtype=np.float32).reshape(12, 1, 1))
    pooled = layers.MaxPooling2D(2, name="pooled")(wide)
    mean = layers.AveragePooling2D(2, name="mean")(wide)
    both = layers.Concatenate(name="both")([pooled, mean])
    gate = layers.Dense(16, activation="sigmoid", name="gate")(layers.GlobalAveragePooling2D(name="squeeze")(both))
    gated = layers.Multiply(name="gated")([both, layers.Reshape((1, 1, 16))(gate)])
    thin = layers.DepthwiseConv2D(3, name="thin", bias_initializer="normal")(gated)
    flat = layers.Flatten()(layers.Conv2DTranspose(5, 3, strides=2, bias_initializer="normal", name="up")(thin))
    return keras.Model(start, layers.Dense(3, activation="softmax", name="head")(flat))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).random((64, 12, 12, 2), np.float32)


@pytest.fixture(scope="module")
def tied(pictures, tmp_path_factory):
    """int8 as the converter writes it."""
    return write(tied_network(), tmp_path_factory.mktemp("tied"), "int8", pictures, EXACT)


def write(model, folder, format, pictures, options=None, spec=SPEC):
    given = (format, format, model, spec, "probabilities", options or ExportOptions(), pictures, folder)
    return export(*given, seed=0, trace=Trace()).file.read_bytes()


def graph_of(content):
    """(model, first subgraph, names of its operators), as objects."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    return model, graph, [operator_name(model.operatorCodes[each.opcodeIndex]) for each in graph.operators]


def codes(model, tensor):
    stored = model.buffers[tensor.buffer].data
    dtype = {schema.TensorType.INT32: np.int32, schema.TensorType.INT64: np.int64}.get(tensor.type, np.int8)
    return None if stored is None else np.asarray(stored, np.uint8).view(dtype)


def scales(tensor):
    return (
        np.zeros(0) if tensor.quantization is None or tensor.quantization.scale is None else tensor.quantization.scale
    )


def both_answers(content, inputs, folder):
    """By XNNPACK and by the built-in kernels."""
    (folder / "m.tflite").write_bytes(content)
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return np.stack(
        [predict(folder / "m.tflite", inputs), answers(content, inputs, experimental_op_resolver_type=plain)]
    )


def is_short(values, bits):
    return np.array_equal(rounded(np.asarray(values, np.float32), bits, up=False), np.asarray(values, np.float32))


@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(2, 20))
def test_rounding_keeps_the_bits_that_it_is_told_and_no_more(scale, bits):
    near, above = (float(rounded(np.float32([scale]), bits, up=up)[0]) for up in (False, True))
    assert abs(near - scale) <= scale * 2.0**-bits
    assert scale <= above <= scale * (1 + 2.0 ** (1 - bits))
    for made in (near, above):
        assert float(np.ldexp(np.frexp(made)[0], bits)).is_integer()
        assert all(rounded(np.float32([made]), bits, up=up)[0] == made for up in (False, True))


@given(st.integers(-60, 60), st.booleans())
def test_powers_of_two_which_operators_prescribe_stay(power, up):
    assert rounded(np.float32([2.0**power]), ACTIVATION_BITS, up=up)[0] == 2.0**power


def test_scales_are_short_biases_keep_their_values_and_everything_else_stays(tied):
    made = shorten(tied)
    assert len(made) == len(tied)
    assert gzip_bytes(made) < gzip_bytes(tied)
    (before, old, names), (after, new, _) = graph_of(tied), graph_of(made)
    kernels, biases = set(), set()
    for name, operator in zip(names, new.operators, strict=True):
        if name not in PRODUCTS:
            continue
        source, kernel, bias = (int(operator.inputs[position]) for position in PRODUCTS[name])
        kernels.add(kernel)
        if bias < 0:  # zeros are left out
            continue
        biases.add(bias)
        product = np.float32(scales(new.tensors[source])) * np.float32(scales(new.tensors[kernel]))
        np.testing.assert_array_equal(scales(new.tensors[bias]), product)
        values = [
            codes(model, graph.tensors[bias]) * scales(graph.tensors[bias]).astype(np.float64)
            for model, graph in ((before, old), (after, new))
        ]
        np.testing.assert_allclose(*values, rtol=0, atol=0.51 * product.max())
    assert len(kernels) == 5
    assert len(biases) >= 3
    changed = 0
    for number, (was, now) in enumerate(zip(old.tensors, new.tensors, strict=True)):
        assert (was.name, was.shape.tolist(), was.type, was.buffer) == (
            now.name,
            now.shape.tolist(),
            now.type,
            now.buffer,
        )
        if len(scales(now)):
            np.testing.assert_array_equal(was.quantization.zeroPoint, now.quantization.zeroPoint)
        if number not in biases:
            np.testing.assert_array_equal(codes(before, was), codes(after, now))
        if number in kernels:
            assert is_short(scales(now), KERNEL_BITS)
            np.testing.assert_allclose(scales(now), scales(was), rtol=2.0**-KERNEL_BITS)
        elif len(scales(now)) and codes(after, now) is None:
            assert is_short(scales(now), ACTIVATION_BITS)
            assert 1 <= scales(now)[0] / scales(was)[0] <= 1 + 2.0 ** (1 - ACTIVATION_BITS)
            changed += scales(now)[0] != scales(was)[0]
    assert changed >= 6


def test_what_shares_a_scale_goes_on_sharing_it_and_the_answers_stay(tied, pictures, tmp_path):
    (_, old, _), (_, new, _) = graph_of(tied), graph_of(shorten(tied))
    pairs = {
        (float(scales(was)[0]), float(scales(now)[0]))
        for was, now in zip(old.tensors, new.tensors, strict=True)
        if len(scales(now)) == 1
    }
    assert len(pairs) == len({was for was, _ in pairs})
    exact, short = both_answers(tied, pictures, tmp_path), both_answers(shorten(tied), pictures, tmp_path)
    wanted = tied_network()(pictures, training=False).numpy()
    assert wanted.std(axis=0).min() > 0.001
    for kernels in (0, 1):
        assert np.abs(short[kernels] - wanted).mean() < 1.3 * np.abs(exact[kernels] - wanted).mean() + 0.0005
        assert np.abs(short[kernels] - exact[kernels]).max() <= 4 / 256


def test_a_constant_among_activations_keeps_its_scale(tied):
    (before, old, names), (_, new, _) = graph_of(tied), graph_of(shorten(tied))
    constants = [
        number
        for name, operator in zip(names, old.operators, strict=True)
        if name in ("ADD", "MUL")
        for number in operator.inputs
        if codes(before, old.tensors[number]) is not None
    ]
    assert constants
    for number in constants:
        np.testing.assert_array_equal(scales(new.tensors[number]), scales(old.tensors[number]))


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_input_and_output_of_an_integer_file_keep_theirs(io, pictures, tmp_path):
    found = []
    for name, short in (("exact", False), ("short", True)):
        (tmp_path / name).mkdir()
        content = write(tied_network(), tmp_path / name, "int8", pictures, ExportOptions(io=io, short_scales=short))
        interpreter = Interpreter(model_content=content)
        ends = interpreter.get_input_details() + interpreter.get_output_details()
        found.append([end["quantization"] for end in ends])
        assert [end["dtype"].__name__ for end in ends] == [io, io]
    assert found[0] == found[1]
    assert found[0][0][0] == pytest.approx(1 / 255, rel=0.01)


@pytest.mark.parametrize("format", ["float32", "float16", "dynamic", *IO, "int8_weights", "int4_weights"])
def test_shortening_twice_changes_nothing_and_floats_stay(format, toy, tmp_path):
    short = toy.export(tmp_path / "short", format).file.read_bytes()
    exact = toy.export(tmp_path / "exact", format, options=EXACT).file.read_bytes()
    assert shorten(short) == short == shorten(exact)
    assert (short == exact) == (format in ("float32", "float16"))
    assert gzip_bytes(short) <= gzip_bytes(exact)
    ours, theirs = (predict(tmp_path / name / "model.tflite", toy.held) for name in ("short", "exact"))
    assert toy.difference(ours) < 1.2 * toy.difference(theirs) + 0.001


def test_a_layer_in_int16_or_float_among_int8_is_shortened_too(toy, tmp_path):
    options = {"keep_float": ["hidden"], "int16": ["pointwise"]}
    short = toy.export(tmp_path / "short", "int8", options=ExportOptions(**options)).file.read_bytes()
    exact = toy.export(
        tmp_path / "exact", "int8", options=ExportOptions(**options, short_scales=False)
    ).file.read_bytes()
    assert short == shorten(exact) != exact


def test_an_embedding_and_what_is_read_from_it_keep_one_scale(tmp_path):
    keras.utils.set_random_seed(0)
    spec = DataSpec(task="classification", input_name="words", input_shape=(6,), labels=("a", "b"))
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="float32"),
            keras.layers.Embedding(20, 8, name="table"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu", bias_initializer="normal"),
            keras.layers.Dense(2),
        ]
    )
    words = np.random.default_rng(0).integers(0, 20, (64, 6)).astype(np.float32)
    exact = write(model, tmp_path, "int8", words, EXACT, spec)
    (_, old, names), (_, new, _) = graph_of(exact), graph_of(shorten(exact))
    (read,) = [operator for name, operator in zip(names, new.operators, strict=True) if name == "GATHER"]
    table, taken = int(read.inputs[0]), int(read.outputs[0])
    assert scales(new.tensors[table]) == scales(new.tensors[taken]) == scales(old.tensors[table])
    assert shorten(exact) != exact
    np.testing.assert_allclose(*(both_answers(each, words, tmp_path) for each in (exact, shorten(exact))), atol=0.02)


def products(model, graph, names):
    return [
        each for name, each in zip(names, graph.operators, strict=True) if name in PRODUCTS and name != "TRANSPOSE_CONV"
    ]


@pytest.mark.parametrize("shares", ["buffer", "tensor"])
def test_a_bias_that_two_kernels_share_is_left_alone_with_them(shares, toy, tmp_path):
    model, graph, names = graph_of(toy.export(tmp_path, "int8", options=EXACT).file.read_bytes())
    # both have 8 channels
    stem, depthwise = products(model, graph, names)[:2]
    first, second = int(stem.inputs[2]), int(depthwise.inputs[2])
    if shares == "buffer":
        graph.tensors[second].buffer = graph.tensors[first].buffer
    else:
        depthwise.inputs = np.array([*depthwise.inputs[:2], first], np.int32)
    before = pack(model)
    (_, old, _), (after, new, _) = graph_of(before), graph_of(shorten(before))
    for operator in (stem, depthwise):
        for number in operator.inputs:
            np.testing.assert_array_equal(scales(new.tensors[number]), scales(old.tensors[number]))
    np.testing.assert_array_equal(codes(after, new.tensors[first]), codes(model, graph.tensors[first]))
    assert is_short(scales(new.tensors[products(after, new, names)[3].inputs[1]]), KERNEL_BITS)


def relabel(model, operator, name):
    """As if it were an operator of another kind."""
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
    model.operatorCodes.append(code)
    operator.opcodeIndex = len(model.operatorCodes) - 1


def an_unknown_operator(model, graph, hidden):
    relabel(model, hidden, "UNIDIRECTIONAL_SEQUENCE_RNN")


def a_bias_without_scales(model, graph, hidden):
    graph.tensors[hidden.inputs[2]].quantization = None


def a_dequantized_sum(model, graph, hidden):
    hidden.inputs = hidden.inputs[2:]
    relabel(model, hidden, "DEQUANTIZE")


@pytest.mark.parametrize("change", [an_unknown_operator, a_bias_without_scales, a_dequantized_sum])
def test_an_operator_whose_bias_cannot_be_counted_anew_is_left_alone(change, toy, tmp_path):
    model, graph, names = graph_of(toy.export(tmp_path, "int8", options=EXACT).file.read_bytes())
    hidden = products(model, graph, names)[3]
    change(model, graph, hidden)
    before = pack(model)
    (was, old, _), (now, new, _) = graph_of(before), graph_of(shorten(before))
    # What a dequantized sum gives is not counted in its scale.
    for number in [*hidden.inputs, *(hidden.outputs if change is not a_dequantized_sum else ())]:
        np.testing.assert_array_equal(scales(new.tensors[number]), scales(old.tensors[number]))
        np.testing.assert_array_equal(codes(now, new.tensors[number]), codes(was, old.tensors[number]))
    assert shorten(before) != before


def test_a_bias_stays_where_the_product_of_the_scales_is_too_small_for_a_float(toy, tmp_path):
    model, graph, names = graph_of(toy.export(tmp_path, "int8", options=EXACT).file.read_bytes())
    source, kernel, bias = products(model, graph, names)[3].inputs
    graph.tensors[kernel].quantization.scale = np.full(32, 1e-45, np.float32)
    graph.tensors[bias].quantization.scale = np.zeros(32, np.float32)
    before = pack(model)
    (was, old, _), (now, new, _) = graph_of(before), graph_of(shorten(before))
    assert scales(new.tensors[source])[0] > scales(old.tensors[source])[0]
    np.testing.assert_array_equal(codes(now, new.tensors[bias]), codes(was, old.tensors[bias]))
