"""Half of a network's multiply-adds removed channel by channel, against the same small network trained from scratch.

    .venv/bin/python benchmarks/channels.py                                            # latency only, a minute
    TRIMLINE_DATA=FOLDER .venv/bin/python benchmarks/channels.py --seeds 0 1 2         # hours on two cores

ResNet-8 of the zoo on Fashion-MNIST, `channels@0.5+int8`. With `--seeds`: the base is trained for `--epochs`, shrunk and
fine-tuned for `--finetune`; the alternative is a network of exactly those widths, trained from scratch for as many epochs
as both together, with the base's own options. Both files are int8, on the whole test split. Bars: accuracy not below
scratch (mean over the seeds), latency at most 0.65x of the full network's int8 file.

Latency needs no trained weights: without `--seeds` the widths are those that a fresh network is cut to. Files take turns
in blocks of runs; each ratio is that of two blocks side by side, and the median of all ratios is told.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from components.artifacts import Batches, DataSpec, PreparedData, TrainedModel  # noqa: E402
from components.compression.channels import choose_channels, shrink  # noqa: E402
from components.compression.compress import compress, load  # noqa: E402
from components.compression.twin import to_twin  # noqa: E402
from components.data.dataset import make_batches, read  # noqa: E402
from components.data.preprocess import preprocess  # noqa: E402
from components.delivery.export import export  # noqa: E402
from components.delivery.measure import latency, metric, predict  # noqa: E402
from components.machine import processor  # noqa: E402
from components.options import (  # noqa: E402
    Augmentation,
    ChannelsOptions,
    CompressOptions,
    ExportOptions,
    IdxSource,
    MeasureOptions,
    ModelOptions,
    OptimizerOptions,
    PreprocessOptions,
    TrainOptions,
)
from components.recipe import Step  # noqa: E402
from components.tracing import Trace  # noqa: E402
from components.training.model import build  # noqa: E402
from components.training.train import train  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent / "out"
LATENCY_BAR = 0.65
MODEL = ModelOptions(name="resnet8")
SPEC = DataSpec(task="classification", input_name="image", input_shape=(28, 28, 1), labels=tuple("0123456789"))
AUGMENTATION = Augmentation(flip=True, shift=0.08)  # as the template fashion_mnist
SPLITS = {"validation": 0.05, "calibration": 0.02}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="trains with each; none: latency only")
    parser.add_argument("--epochs", type=int, default=24, help="of the base training")
    parser.add_argument("--finetune", type=int, default=8, help="epochs after the cut")
    parser.add_argument("--strength", type=float, default=0.5, help="share of the multiply-adds to remove")
    parser.add_argument("--blocks", type=int, default=60, help="of 50 timed runs, for each file")
    parser.add_argument("--rows", type=int, default=None, help="training rows of an epoch, to try the script out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, pathlib.Path(folder))
    OUT.mkdir(exist_ok=True)
    (OUT / "channels.json").write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    report: dict[str, Any] = {"options": vars(options), "cpu": processor(), "latency_bar": LATENCY_BAR}
    if not options.seeds:
        report["latency"] = show_latency(*untrained(options.strength, folder), options.blocks)
        return report
    data = prepare(folder)
    report["seeds"] = []
    for seed in options.seeds:
        report["seeds"].append(one_seed(seed, data, options, folder / f"seed-{seed}"))
        print(f"seed {seed}: {report['seeds'][-1]['accuracy']}", flush=True)
    files = [folder / f"seed-{options.seeds[-1]}" / name / "model.tflite" for name in ("full", "channels")]
    report["latency"] = show_latency(*files, options.blocks)
    for key in ("full", "channels", "scratch"):
        report[key] = statistics.fmean(each["accuracy"][key] for each in report["seeds"])
    gain = report["channels"] - report["scratch"]
    print(
        f"accuracy, mean: full {report['full']:.4f}  channels {report['channels']:.4f}  scratch {report['scratch']:.4f}"
    )
    print(f"channels above scratch by {gain:+.4f} (bar 0: {'reached' if gain >= 0 else 'MISSED'})")
    return report


# --- latency -----------------------------------------------------------------------------------------------------


def untrained(strength: float, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """int8 files of a fresh network, whole and cut."""
    twin = to_twin(build(MODEL, SPEC, seed=0))
    cut = choose_channels(twin, ChannelsOptions(), strength)
    small = shrink(twin, cut)
    print(json.dumps(cut.facts(twin, small)))
    pictures = np.random.default_rng(0).random((64, *SPEC.input_shape), np.float32)
    return write("full", twin, pictures, folder), write("channels", small, pictures, folder)


def write(name: str, model: Any, calibration: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    given = (name, "int8", model, SPEC, "logits", ExportOptions(), calibration, folder / name)
    return export(*given, seed=0, trace=Trace()).file


def show_latency(full: pathlib.Path, small: pathlib.Path, blocks: int) -> dict[str, float]:
    picture, protocol = np.zeros(SPEC.input_shape, np.float32), MeasureOptions(warmup=20, runs=50)
    taken = [[latency(file, picture, protocol)["p50"] for file in (full, small)] for _ in range(blocks)]
    ratio = statistics.median(after / before for before, after in taken)
    before, after = (statistics.median(column) for column in zip(*taken, strict=True))
    verdict = "reached" if ratio <= LATENCY_BAR else "MISSED"
    print(
        f"int8 latency: full {before:.4f} ms  channels {after:.4f} ms  ratio {ratio:.3f} (bar {LATENCY_BAR}: {verdict})"
    )
    return {"full_ms": before, "channels_ms": after, "ratio": ratio}


# --- accuracy ----------------------------------------------------------------------------------------------------


def prepare(folder: pathlib.Path) -> PreparedData:
    if "TRIMLINE_DATA" not in os.environ:
        sys.exit("channels: set TRIMLINE_DATA to the folder that holds fashion_mnist/.")
    source = pathlib.Path(os.environ["TRIMLINE_DATA"]) / "fashion_mnist"
    names = {"train_images": "train-images-idx3", "train_labels": "train-labels-idx1"}
    names |= {"test_images": "t10k-images-idx3", "test_labels": "t10k-labels-idx1"}
    files = {key: str(source / f"{name}-ubyte.gz") for key, name in names.items()}
    (folder / "data").mkdir()
    return preprocess(
        IdxSource(kind="idx", **files),
        PreprocessOptions.model_validate({"splits": SPLITS}),
        folder / "data",
        task="classification",
        seed=0,
        trace=Trace(),
    )


def one_seed(seed: int, data: PreparedData, options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    batches = make_batches(data, augmentation=AUGMENTATION)
    if options.rows:
        batches = dataclasses.replace(batches, rows={**batches.rows, "train": options.rows})
    whole = lambda: build(MODEL, SPEC, seed=seed)  # noqa: E731
    base = fit(whole, options.epochs, batches, folder / "base", seed)
    step = Step("channels", options.strength)
    (folder / "step").mkdir()
    made = compress(
        step,
        (step,),
        CompressOptions(channels=ChannelsOptions(epochs=options.finetune)),
        base,
        None,
        batches,
        folder / "step",
        strategy=tf.distribute.get_strategy(),
        batch_size=128,
        seed=seed,
        trace=Trace(),
    )
    groups = made.facts["reports"]["channels@0.5"]["groups"]
    widths = {name: group["channels"][1] for group in groups for name in group["layers"]}
    epochs = options.epochs + options.finetune
    scratch = fit(lambda: narrowed(whole(), widths), epochs, batches, folder / "scratch-training", seed)
    calibration, _ = read(data, "calibration")
    files = {
        "full": write("full", keras.saving.load_model(base.file), calibration, folder),
        "channels": write("channels", load(made), calibration, folder),
        "scratch": write("scratch", keras.saving.load_model(scratch.file), calibration, folder),
    }
    x, y = read(data, "test")
    accuracy = {name: metric(predict(file, x), y, SPEC) for name, file in files.items()}
    return {"seed": seed, "accuracy": accuracy, "channels": made.facts["reports"]["channels@0.5"]}


def fit(make: Any, epochs: int, batches: Batches, folder: pathlib.Path, seed: int) -> TrainedModel:
    folder.mkdir(parents=True)
    optimizer = OptimizerOptions(learning_rate=0.004, schedule="cosine", warmup_epochs=min(1, epochs / 2))
    return train(
        TrainOptions(epochs=epochs, batch_size=128, optimizer=optimizer),
        make,
        MODEL,
        batches,
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=seed,
        trace=Trace(),
    )


def narrowed(model: keras.Model, widths: dict[str, int]) -> keras.Model:
    """A network of the same layers with other numbers of filters, and fresh weights."""

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if layer.name in widths:
            config["filters"] = widths[layer.name]
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=clone)


if __name__ == "__main__":
    main()
