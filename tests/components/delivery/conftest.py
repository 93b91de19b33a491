"""Prepared data, a model and its file, small enough to make for every module: a table, pictures, rows of numbers."""

import dataclasses
import pathlib

import flatbuffers
import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from components.artifacts import Batches, DataSpec, PreparedData, TFLiteFile
from components.data.dataset import make_batches, read
from components.data.preprocess import preprocess
from components.delivery.bundle import bundle
from components.delivery.export import export
from components.delivery.measure import measure
from components.options import (
    ArraysSource,
    Augmentation,
    BundleOptions,
    ColumnOptions,
    CsvSource,
    DigitsSource,
    ExportOptions,
    MeasureOptions,
    PreprocessOptions,
)
from components.tracing import Trace

ROWS = 240


def pack(model):
    """The file of a model of objects, `schema.ModelT`."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def answers(content, inputs, **options):
    """float32 answers of a file with float input and output, one example at a time; options of the interpreter."""
    interpreter = Interpreter(model_content=content, num_threads=1, **options)
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for example in inputs:
        interpreter.set_tensor(source, example[np.newaxis])
        interpreter.invoke()
        found.append(interpreter.get_tensor(sink)[0])
    return np.array(found)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a bundle is made from."""

    data: PreparedData
    model: keras.Model
    file: TFLiteFile
    variant: dict
    source: pathlib.Path | None

    @property
    def batches(self) -> Batches:
        return make_batches(self.data, augmentation=Augmentation())

    def keras_outputs(self, inputs):
        return self.model(inputs, training=False).numpy()

    def again(self, folder, format, options):
        """The same model written in another way."""
        file, variant = written(self.data, self.model, format, options, folder)
        return dataclasses.replace(self, file=file, variant=variant)

    def bundle(self, folder, *, golden=5, trace=None, **changed):
        folder.mkdir(exist_ok=True)
        given = {"variant": self.variant, "file": self.file, "data": self.data, "options": BundleOptions(golden=golden)}
        said = {
            "run": "toy",
            "selected_because": "smallest of 2",
            "keras_outputs": self.keras_outputs,
            "batches": self.batches,
        }
        given |= {key: changed.pop(key) for key in list(changed) if key in given}
        return bundle(*given.values(), folder, **(said | changed), trace=trace or Trace())


def make(folder, source, options, format, task, path=None):
    """Everything up to a measured file, from a source."""
    (folder / "data").mkdir(parents=True)
    data = preprocess(source, options, folder / "data", task=task, seed=0, golden=8, trace=Trace())
    keras.utils.set_random_seed(3)
    spec = data.spec
    model = keras.Sequential(
        [
            keras.Input(spec.input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(spec.outputs),
        ]
    )
    return Made(data, model, *written(data, model, format, ExportOptions(), folder), path)


def written(data, model, format, options, folder):
    """The model as a file of `format`, and its entry of the results."""
    places = [folder / name for name in ("exported", "measured")]
    for place in places:
        place.mkdir()
    calibration = read(data, "calibration")[0]
    spec = data.spec
    file = export(format, format, model, spec, "logits", options, calibration, places[0], seed=0, trace=Trace())
    measured = measure(
        file,
        lambda: read(data, "test"),
        lambda: read(data, "validation"),
        spec,
        MeasureOptions(runs=5, warmup=1),
        places[1],
        trace=Trace(),
    )
    return file, {**measured.variant, "metric_drop": 0.0, "validation_drop": 0.0}


def write_csv(path):
    """ages standardised, income bucketised, job a category; missing cells, blanks, commas within quotes."""
    random = np.random.default_rng(0)
    lines = ["age,job,income,note,class"]
    for row in range(ROWS):
        age = "?" if row % 17 == 0 else f" {random.integers(18, 80)}"
        job = ["cook", "clerk", '"smith, black"', "?"][random.integers(4)]
        lines.append(f"{age},{job},{random.normal(30, 9):.2f},x{row},{'rich' if row % 3 else 'poor'}")
    path.write_text("\n".join(lines) + "\n")


def table(folder, format="float32"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "people.csv"
    write_csv(path)
    columns = {
        "note": ColumnOptions(kind="ignore"),
        "income": ColumnOptions(rule="bucketise", buckets=4),
        "job": ColumnOptions(kind="category"),
    }
    source = CsvSource(kind="csv", train=[str(path)], label="class")
    return make(folder / "made", source, PreprocessOptions(columns=columns), format, "classification", path)


def digits(folder, format="int8"):
    return make(folder / "made", DigitsSource(), PreprocessOptions(), format, "classification")


def values(folder, format="float32"):
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(1).normal(5, 2, (ROWS, 3)).astype(np.float32)
    path = folder / "rows.npz"
    np.savez(path, x=x, y=(2 * x[:, 0] + 1).astype(np.float32))
    return make(
        folder / "made", ArraysSource(kind="arrays", train=str(path)), PreprocessOptions(), format, "regression", path
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """kind -> Made, each made once a session."""
    makers = {"table": table, "digits": digits, "values": values}
    kept = {}

    def get(kind):
        if kind not in kept:
            kept[kind] = makers[kind](tmp_path_factory.mktemp(kind))
        return kept[kind]

    return get


@dataclasses.dataclass(frozen=True)
class Toy:
    """A problem that a small network learns in seconds: which quarter of a noisy picture is brighter."""

    model: keras.Model
    inputs: np.ndarray
    labels: np.ndarray
    held: np.ndarray
    held_labels: np.ndarray
    spec: DataSpec = DataSpec(task="classification", input_name="image", input_shape=(12, 12, 1), labels=tuple("abcd"))

    def export(self, folder, format, *, options=None, model=None, **more):
        folder.mkdir(exist_ok=True, parents=True)
        more = {"seed": 0, "trace": Trace(), "calibration": self.inputs[:96], "labels": self.labels[:96], **more}
        calibration = more.pop("calibration")
        given = (model or self.model, self.spec, "logits", options or ExportOptions(), calibration, folder)
        return export(more.pop("recipe", format), format, *given, **more)

    def accuracy(self, outputs):
        return float(np.mean(outputs.argmax(axis=1) == self.held_labels))

    def difference(self, outputs):
        """Root mean square from the model's answers, as a share of their spread."""
        wanted = self.model(self.held, training=False).numpy()
        return float(np.sqrt(np.mean((outputs - wanted) ** 2)) / wanted.std())


def quarters(rows, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, rows).astype(np.int32)
    inputs = random.normal(0, 0.3, (rows, 12, 12, 1)).astype(np.float32)
    for picture, label in zip(inputs, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 0.2
    return inputs, labels


def toy_network():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(8, 3, use_bias=False, name="stem"),
            layers.BatchNormalization(name="stem_bn"),
            layers.ReLU(name="stem_relu"),
            layers.DepthwiseConv2D(3, strides=2, activation="relu", name="depthwise"),
            layers.Conv2D(16, 1, activation="relu", name="pointwise"),
            layers.Flatten(name="flat"),
            layers.Dense(32, activation="relu", name="hidden"),
            layers.Dense(4, name="head"),
        ],
        name="quarters",
    )


@pytest.fixture(scope="session")
def toy():
    inputs, labels = quarters(1024, 0)
    keras.utils.set_random_seed(1)
    model = toy_network()
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(inputs, labels, batch_size=64, epochs=6, verbose=0)
    return Toy(model, inputs, labels, *quarters(400, 1))


def spoilt(toy, layer, consumer):
    """A copy of the toy where one channel of `layer` is huge and constant, and `consumer` does not look at it.

    The answers stay what they were, but the range of the others has no codes left in int8.
    """
    model = keras.models.clone_model(toy.model)
    model.set_weights(toy.model.get_weights())
    kernel, bias = model.get_layer(layer).get_weights()
    model.get_layer(layer).set_weights([kernel, np.concatenate([bias[:-1], [3000.0]]).astype(np.float32)])
    kernel, bias = model.get_layer(consumer).get_weights()
    by_channel = kernel.reshape(-1, toy.model.get_layer(layer).output.shape[-1], kernel.shape[-1]).copy()
    by_channel[:, -1] = 0
    model.get_layer(consumer).set_weights([by_channel.reshape(kernel.shape), bias])
    return dataclasses.replace(toy, model=model)
