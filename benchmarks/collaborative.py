"""PQAT, CQAT and PCQAT: trimline's recipes against tfmot used as its own guides show, on Fashion-MNIST.

    TRIMLINE_DATA=FOLDER .venv/bin/python benchmarks/collaborative.py --seeds 0 1 2

Two networks (ResNet-8; a DS-CNN of MLPerf Tiny's shape), each trained once a seed; both sides start from those weights, see
the same batches and train for the same epochs. Bars, each the mean over the seeds, for each of the three and each network:
gzip bytes at most 0.75x of tfmot's file, accuracy at most 0.3 point below it.

tfmot's side is what its notebooks do (tensorflow_model_optimization/g3doc/guide/combine: pqat_, cqat_ and
pcqat_example.ipynb): pruning to a constant 0.5, 8 clusters from k-means++ (by channel without pruning), Adam at 1e-5 for
these and at 1e-3 behind them, 3 epochs each, then 1 epoch with the scheme that preserves, and the converter with
`Optimize.DEFAULT`. It gets the tf_keras twin of the model, since it refuses the model itself. Batches are of 128
throughout; the notebooks prune and cluster in batches of 32.

trimline's strengths, and the rate at which it prunes the DS-CNN, were chosen on validation rows of seed 100. All that is trained is cached in the workspace.
"""

import argparse
import gzip
import json
import os
import pathlib
import statistics
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_model_optimization as tfmot  # noqa: E402
import tf_keras  # noqa: E402
from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as sparse  # noqa: E402

import pipeline  # noqa: E402
from components.artifacts import Batches, PreparedData, TrainedModel, read_json, write_json  # noqa: E402
from components.compression.twin import to_twin  # noqa: E402
from components.data.dataset import make_batches, read  # noqa: E402
from components.delivery.measure import metric, predict  # noqa: E402
from pipeline.plan import make_plan  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent / "out"
SIZE_BAR, ACCURACY_BAR = 0.75, 0.003
METHODS = ("PQAT", "CQAT", "PCQAT")
NETWORKS = {
    "resnet8": ["model.name=resnet8", "model.options={filters: 16}"],
    "ds_cnn": [
        "model.name=mobilenet",
        "model.options={stem: 64, blocks: [64, 64, 64, 64], strides: [2, 1, 1, 1]}",
        "compress.prune.learning_rate=0.003",
    ],
}
EPOCHS = {"prune": 3, "cluster": 3, "qat": 1}  # the notebooks'
OURS = {
    "resnet8": ("prune@0.75+qat", "cluster@8+qat", "prune@0.75+cluster@16+qat"),
    "ds_cnn": ("prune@0.73+qat", "cluster@8+qat", "prune@0.75+cluster@12+qat"),
}
SETTINGS = [
    *(f"compress.{step}.epochs={epochs}" for step, epochs in EPOCHS.items()),
    "compress.prune.spread=erk",
    "compress.distill={teacher: base}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--epochs", type=int, default=12, help="of the base training")
    parser.add_argument(
        "--set", nargs="*", default=[], dest="settings", help="for trimline's side, as `trimline run` takes"
    )
    parser.add_argument("--recipes", nargs=3, help="in place of OURS: PQAT, CQAT, PCQAT")
    parser.add_argument("--workspace", default="workspace")
    options = parser.parse_args()
    if "TRIMLINE_DATA" not in os.environ:
        sys.exit("collaborative: set TRIMLINE_DATA to the folder that holds fashion_mnist/.")
    found = [one(network, seed, options) for network in options.networks for seed in options.seeds]
    report = {"options": vars(options), "found": found, "means": [means(found, each) for each in options.networks]}
    OUT.mkdir(exist_ok=True)
    (OUT / "collaborative.json").write_text(json.dumps(report, indent=1) + "\n")


def one(network: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one network and seed; what was done before is found in the workspace."""
    recipes = options.recipes or OURS[network]
    settings = [
        f"name=collaborative-{network}-{seed}",
        f"seed={seed}",
        f"workspace={options.workspace}",
        f"train.epochs={options.epochs}",
        f"compress.recipes={json.dumps(['int8', *recipes])}",
        *NETWORKS[network],
        *SETTINGS,
        *options.settings,
    ]
    config = pipeline.load_config("fashion_mnist", settings)
    variants = {variant["recipe"]: variant for variant in pipeline.run(config).variants}
    plan = make_plan(config)
    folders = {step.name: plan.store.folder(step.key) for step in plan.steps}
    theirs = Theirs(TrainedModel(folders["train"]), PreparedData(folders["preprocess"]), seed)
    made: dict[str, Any] = {"network": network, "seed": seed}
    for name in ("float32", "int8"):
        made[name] = figures(variants[name])
    for method, recipe in zip(METHODS, recipes, strict=True):
        made[method] = {"recipe": recipe, "ours": figures(variants[recipe]), "theirs": theirs.figures(method)}
        ours, tfmots = made[method]["ours"], made[method]["theirs"]
        print(
            f"{network} seed {seed} {method:5} {recipe:26} gzip {ours['gzip']:7,} / {tfmots['gzip']:7,} = {ours['gzip'] / tfmots['gzip']:.3f}x  "
            f"validation {ours['validation']:.4f} / {tfmots['validation']:.4f}  test {ours['test']:.4f} / {tfmots['test']:.4f}",
            flush=True,
        )
    return made


def figures(variant: dict[str, Any]) -> dict[str, float]:
    if variant["status"] != "ok":
        sys.exit(f"collaborative: {variant['recipe']} {variant['status']}: {variant['reason']}")
    return {"gzip": variant["gzip_bytes"], "validation": variant["validation_metric"], "test": variant["metric"]}


def means(found: list[dict[str, Any]], network: str) -> dict[str, Any]:
    """Mean ratio of the sizes and mean difference of the accuracies, by method; printed with the bars."""
    rows = [each for each in found if each["network"] == network]
    made: dict[str, Any] = {"network": network}
    for method in METHODS:
        size = statistics.fmean(row[method]["ours"]["gzip"] / row[method]["theirs"]["gzip"] for row in rows)
        gain = statistics.fmean(row[method]["ours"]["test"] - row[method]["theirs"]["test"] for row in rows)
        reached = size <= SIZE_BAR and gain >= -ACCURACY_BAR
        made[method] = {"size": size, "gain": gain, "reached": reached}
        print(
            f"{network} {method:5} gzip {size:.3f}x (bar {SIZE_BAR}), accuracy {100 * gain:+.2f} points (bar {-100 * ACCURACY_BAR:+.1f}): {'reached' if reached else 'MISSED'}"
        )
    return made


class Theirs:
    """tfmot as its guides use it, on the twin of the base model; each method's figures are kept beside that model."""

    def __init__(self, base: TrainedModel, data: PreparedData, seed: int) -> None:
        self.base, self.data, self.seed = base, data, seed
        self.batches: Batches = make_batches(
            data, augmentation=pipeline.load_config("fashion_mnist").train.augmentation
        )

    def figures(self, method: str) -> dict[str, float]:
        """What the file of a method weighs and answers, made now or before."""
        folder = pathlib.Path(f"{self.base.folder}-tfmot-{method}")
        if not (folder / "figures.json").exists():
            folder.mkdir(exist_ok=True)
            converter = tf.lite.TFLiteConverter.from_keras_model(getattr(self, method.lower())())
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            file = folder / "model.tflite"
            file.write_bytes(converter.convert())
            found = {"gzip": len(gzip.compress(file.read_bytes(), 9))}
            for split in ("validation", "test"):
                x, y = read(self.data, split)
                found[split] = metric(predict(file, x), y, self.data.spec)
            write_json(folder / "figures.json", found)
        return read_json(folder / "figures.json")

    def twin(self) -> tf_keras.Model:
        """The base model in tf_keras."""
        tf_keras.utils.set_random_seed(self.seed)
        return to_twin(keras.saving.load_model(self.base.file, compile=False))

    def fit(self, model: tf_keras.Model, step: str, rate: float, callbacks: tuple[Any, ...] = ()) -> tf_keras.Model:
        """Trains as the notebooks do."""
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.Adam(rate), loss, jit_compile=False)
        steps, rows = self.batches.steps_per_epoch(128), self.batches.training(128, self.seed, 0)
        model.fit(rows, steps_per_epoch=steps, epochs=EPOCHS[step], callbacks=list(callbacks), verbose=0)
        return model

    def pruned(self) -> tf_keras.Model:
        """Half of each kernel zero."""
        schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0, frequency=100)
        model = tfmot.sparsity.keras.prune_low_magnitude(self.twin(), pruning_schedule=schedule)
        self.fit(model, "prune", 1e-5, (tfmot.sparsity.keras.UpdatePruningStep(),))
        return tfmot.sparsity.keras.strip_pruning(model)

    def quantized(self, model: tf_keras.Model, scheme: Any) -> tf_keras.Model:
        """Fake quantization under a scheme that preserves, trained."""
        annotated = tfmot.quantization.keras.quantize_annotate_model(model)
        return self.fit(tfmot.quantization.keras.quantize_apply(annotated, scheme), "qat", 1e-3)

    def pqat(self) -> tf_keras.Model:
        """pqat_example.ipynb."""
        return self.quantized(self.pruned(), tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme())

    def cqat(self) -> tf_keras.Model:
        """cqat_example.ipynb."""
        start = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
        # By channel needs the wrapper's own call: the public check takes a kernel without bias for its bias.
        model = tfmot.clustering.keras.cluster_weights(
            self.twin(), number_of_clusters=8, cluster_centroids_init=start, cluster_per_channel=True
        )
        self.fit(model, "cluster", 1e-5)
        scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme()
        return self.quantized(tfmot.clustering.keras.strip_clustering(model), scheme)

    def pcqat(self) -> tf_keras.Model:
        """pcqat_example.ipynb."""
        start = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
        model = sparse.cluster_weights(
            self.pruned(), number_of_clusters=8, cluster_centroids_init=start, preserve_sparsity=True
        )
        self.fit(model, "cluster", 1e-3)
        scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True)
        return self.quantized(tfmot.clustering.keras.strip_clustering(model), scheme)


if __name__ == "__main__":
    main()
