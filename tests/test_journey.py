"""The whole way in one run, on a small slice of digits: raw arrays in, a proven bundle out."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

CONFIG = {
    "name": "slice",
    "seed": 3,
    "source": {"kind": "arrays", "train": "digits.npz"},
    "preprocess": {"block_rows": 64, "splits": {"test": 0.25, "validation": 0.15, "calibration": 0.1}},
    "model": {"name": "cnn", "options": {"filters": [16, 32]}},
    "train": {"epochs": 10, "batch_size": 32, "optimizer": {"name": "adam", "learning_rate": 0.01}},
    "compress": {
        "recipes": ["float16", "dynamic", "int8", "prune@0.5+int8", "prune@0.5+qat"],
        "prune": {"epochs": 8, "frequency": 4},
        "qat": {"epochs": 2},
    },
    "measure": {"runs": 20, "warmup": 2},
    "select": {"max_metric_drop": 0.2},
}
RECIPES = ["float32", "float16", "dynamic", "int8", "prune@0.5+int8", "prune@0.5+qat"]


def trimline(*arguments: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def write_slice(folder: pathlib.Path, rows: int = 600) -> None:
    digits = load_digits()
    pictures = (digits.images[:rows] * 255 // 16).astype("uint8")[..., np.newaxis]
    np.savez(folder / "digits.npz", x=pictures, y=digits.target[:rows])
    (folder / "slice.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> pathlib.Path:
    """The folder after one run."""
    folder = tmp_path_factory.mktemp("journey")
    write_slice(folder)
    done = trimline("run", "slice.yaml", folder=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    (folder / "screen.txt").write_text(done.stdout)
    (folder / "noise.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def results(journey) -> dict:
    return json.loads((journey / "workspace" / "slice" / "results.json").read_text())


def test_every_variant_is_measured_and_ok(results):
    assert [variant["recipe"] for variant in results["variants"]] == RECIPES
    assert {variant["recipe"]: variant["reason"] for variant in results["variants"] if variant["status"] != "ok"} == {}
    for variant in results["variants"]:
        assert variant["metric"] > 0.6, variant
        assert variant["latency_ms"]["p50"] > 0
        assert variant["proof"]["flex"] == []


def test_compression_shows_in_the_files(results):
    by_recipe = {variant["recipe"]: variant for variant in results["variants"]}
    whole = by_recipe["float32"]
    assert by_recipe["int8"]["bytes"] < 0.6 * whole["bytes"]
    assert by_recipe["prune@0.5+qat"]["gzip_bytes"] < by_recipe["int8"]["gzip_bytes"]
    assert by_recipe["prune@0.5+qat"]["proof"]["sparsity"] > by_recipe["int8"]["proof"]["sparsity"] + 0.2
    assert whole["metric_drop"] == 0


def test_the_split_sizes_add_up_and_the_chosen_one_says_why(results):
    assert sum(results["examples"].values()) == 600
    assert results["selected"] in RECIPES
    assert "bytes" in results["selected_because"]


def test_the_screen_shows_a_table_and_no_noise(journey):
    screen = (journey / "screen.txt").read_text()
    assert "Chosen:" in screen
    assert "report.html" in screen
    assert (journey / "noise.txt").read_text() == ""


def test_the_bundle_holds_and_predicts(journey):
    bundle = "workspace/slice/bundle"
    verified = trimline("verify", bundle, folder=journey)
    assert (verified.returncode, verified.stderr) == (0, "")
    np.save(journey / "two.npy", np.load(journey / "digits.npz")["x"][:2])
    answered = trimline("predict", bundle, "two.npy", "--json", folder=journey)
    assert (answered.returncode, answered.stderr) == (0, "")
    assert len(json.loads(answered.stdout)) == 2


def test_a_bundle_with_one_changed_byte_is_refused(journey, tmp_path):
    import shutil

    shutil.copytree(journey / "workspace" / "slice" / "bundle", tmp_path / "bundle")
    labels = tmp_path / "bundle" / "labels.txt"
    labels.write_text(labels.read_text().replace("1", "7"))
    refused = trimline("verify", str(tmp_path / "bundle"), folder=tmp_path)
    assert refused.returncode == 4
    assert "labels.txt" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_tensorboard_holds_a_run_for_every_stage_in_the_order_of_the_journey(journey):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(journey / "workspace" / "slice" / "tensorboard"))
    multiplexer.Reload()
    runs = sorted({name.split("/")[0] for name in multiplexer.Runs()})
    stages = [name.split("-")[1] for name in runs]
    assert list(dict.fromkeys(stages)) == [
        "preprocess", "train", "compress", "export", "measure", "select", "bundle",
    ]  # fmt: skip


def test_inspect_reads_the_chosen_file(journey):
    told = trimline("inspect", "workspace/slice/bundle/model.tflite", "--json", folder=journey)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["flex"] == []


def test_an_unchanged_rerun_works_at_nothing_and_does_not_load_tensorflow(journey, results):
    before = time.monotonic()
    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", "run", "slice.yaml"],
        cwd=journey, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.monotonic() - before < 30  # a hang, not a speed: the speed is in benchmarks/
    assert "start " not in again.stdout
    assert again.stdout.count("cached") == 6 + 2 * 6 + 1  # preprocess train compress*2 select bundle report; per recipe
    assert "tensorflow" not in again.stderr
    assert json.loads((journey / "workspace" / "slice" / "results.json").read_text()) == results


def test_one_changed_recipe_step_retrains_neither_the_base_nor_the_others(journey):
    planned = trimline("plan", "slice.yaml", "--set", "compress.qat.epochs=3", "--json", folder=journey)
    assert planned.returncode == 0, planned.stderr
    states = {step["step"]: step["state"] for step in json.loads(planned.stdout)["steps"]}
    assert states["train"] == states["compress prune@0.5"] == states["export int8"] == "cached"
    runs = {name for name, state in states.items() if state == "runs"}
    assert runs == {
        "compress prune@0.5+qat", "export prune@0.5+qat", "measure prune@0.5+qat", "select", "bundle", "report",
    }  # fmt: skip


@pytest.mark.slow  # a whole run
def test_a_trained_model_is_compressed_without_training(journey, results, tmp_path):
    """The journey's own model, given by hand: its float32 file must be the same to the byte."""
    (model,) = journey.glob("workspace/store/train/*/model.keras")
    (tmp_path / "mine.keras").write_bytes(model.read_bytes())
    write_slice(tmp_path)
    sets = [
        each for text in ("seed=3", "compress.recipes=[int8,prune@0.5]", "measure.runs=9") for each in ("--set", text)
    ]
    done = trimline("compress", "mine.keras", "--data", "slice.yaml", *sets, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads((tmp_path / "workspace" / "mine" / "results.json").read_text())
    before = {variant["recipe"]: variant for variant in results["variants"]}
    after = {variant["recipe"]: variant for variant in made["variants"]}
    assert list(after) == ["float32", "int8", "prune@0.5"]
    assert after["float32"]["sha256"] == before["float32"]["sha256"]
    assert after["int8"]["metric"] == before["int8"]["metric"]
    (trained,) = (tmp_path / "workspace" / "store" / "train").glob("*/trained.json")
    assert json.loads(trained.read_text())["epochs"] == 0
    refused = trimline("compress", "mine.keras", "--data", "table.csv", folder=tmp_path)
    assert refused.returncode == 2
    assert "a table needs a configuration that names its label" in refused.stderr


OWN_LAYER = """
import keras


@keras.saving.register_keras_serializable("mine")
class Gate(keras.layers.Layer):
    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones", name="gain")

    def call(self, x):
        return keras.ops.sin(x) * self.gain


def build(spec):
    image = keras.Input(spec.input_shape, name=spec.input_name)
    x = keras.layers.Conv2D(16, 3, activation="relu")(image)
    x = keras.layers.GlobalAveragePooling2D()(Gate(name="gate")(x))
    return keras.Model(image, keras.layers.Dense(spec.outputs)(x))
"""


@pytest.mark.slow  # three processes, so that none knows the layer from the one before
def test_a_layer_of_ones_own_is_known_to_every_stage_that_loads_a_model(tmp_path):
    write_slice(tmp_path)
    (tmp_path / "mine.py").write_text(OWN_LAYER)
    sets = [
        part
        for text in ("model={builder: mine.py:build}", "train.epochs=1", "compress.recipes=[prune@0.5+qat]", "prune=1")
        for part in ("--set", text.replace("prune=1", "compress.prune.epochs=1"))
    ]
    for stage in ("train", "compress", "measure"):
        done = trimline("run", "slice.yaml", "--until", stage, *sets, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), stage
    assert len(list((tmp_path / "workspace" / "store" / "measure").glob("*/variant.json"))) == 2


def test_impossible_constraints_exit_with_their_own_code_and_say_by_how_much(journey):
    done = trimline("run", "slice.yaml", "--set", "select.max_bytes=10", "--set", "name=tight", folder=journey)
    assert done.returncode == 7
    assert "max_bytes" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (journey / "workspace" / "tight" / "report.html").exists()
    assert not (journey / "workspace" / "tight" / "bundle").exists()


@pytest.mark.slow  # two whole runs
def test_a_run_killed_while_it_trains_ends_in_the_same_files(journey, results, tmp_path):
    write_slice(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "slice.yaml"], cwd=tmp_path, stdout=subprocess.PIPE
    )
    store = tmp_path / "workspace" / "store"
    wait_for(lambda: list(store.glob("train/*.partial/checkpoint*")), process)
    process.kill()
    process.communicate()
    assert not list(store.glob("train/*/COMPLETED"))
    done = trimline("run", "slice.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(journey)


def wait_for(condition, process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "nothing to kill in time"
        time.sleep(0.02)


def files(folder: pathlib.Path) -> dict[str, str]:
    """Recipe -> SHA-256 of its file."""
    told = json.loads((folder / "workspace" / "slice" / "results.json").read_text())
    return {variant["recipe"]: variant["sha256"] for variant in told["variants"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["preprocess", "train", "compress", "export", "measure", "select", "bundle", "report"]
)
def test_a_run_killed_in_any_stage_is_completed_by_the_next_with_the_same_files(journey, tmp_path, stage):
    write_slice(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "slice.yaml"], cwd=tmp_path, stdout=subprocess.PIPE
    )
    wait_for(lambda: list((tmp_path / "workspace" / "store").glob(f"{stage}/*.partial")), process)
    process.kill()
    process.communicate()
    done = trimline("run", "slice.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(journey)
    assert not list((tmp_path / "workspace" / "store").glob("*/*.partial"))


@pytest.mark.slow
def test_two_runs_at_once_on_one_workspace_end_in_the_same_files(journey, tmp_path):
    write_slice(tmp_path)
    command = [sys.executable, "-m", "pipeline", "run", "slice.yaml"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, noise = process.communicate(timeout=600)
        assert process.returncode == 0, noise.decode()
    assert files(tmp_path) == files(journey)


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(tmp_path):
    write_slice(tmp_path)
    # A process that a script starts in the background inherits "ignore Ctrl-C"; this one must not.
    start = "import signal; signal.signal(2, signal.default_int_handler); from pipeline.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "run", "slice.yaml", "--until", "train"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "workspace" / "store").glob("train/*.partial/checkpoint*")), process)
    os.kill(process.pid, 2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said == "trimline: stopped. What was finished is kept; the same command goes on from here.\n"


@pytest.mark.slow
def test_a_model_that_int8_ruins_is_rescued_and_its_bundle_holds(journey, tmp_path):
    """One constant of 3,000 among the activations of a trained model, which the next layer does not look at."""
    import keras

    write_slice(tmp_path)
    (trained,) = (journey / "workspace" / "store" / "train").glob("*/model.keras")
    whole = keras.saving.load_model(trained)
    conv, head = (whole.get_layer(name) for name in ("conv2_conv", "logits"))
    norm = whole.get_layer("conv2_norm")
    gamma, beta, *rest = norm.get_weights()
    gamma[-1], beta[-1] = 0, 3000
    norm.set_weights([gamma, beta, *rest])
    kernel, bias = head.get_weights()
    kernel[-1] = 0
    head.set_weights([kernel, bias])
    whole.save(tmp_path / "ruined.keras")
    sets = {
        "compress.recipes": "[int8, rescue, prune@0.5+qat]",
        "select.max_metric_drop": "0.05",
        "export.rescue.qat": "false",
    }
    done = trimline(
        "compress",
        "ruined.keras",
        "--data",
        "slice.yaml",
        *(f"--set={key}={value}" for key, value in sets.items()),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "workspace" / "ruined" / "results.json").read_text())
    by_recipe = {variant["recipe"]: variant for variant in found["variants"]}
    assert by_recipe["int8"]["validation_drop"] > 0.2
    assert by_recipe["rescue"]["validation_drop"] <= 0.05
    assert by_recipe["rescue"]["rescue"]["met"]
    assert conv.name in by_recipe["rescue"]["rescue"]["rungs"][-1]["layers"]
    assert by_recipe["rescue"]["status"] == "ok"
    assert f"note     rescue: int8 loses {by_recipe['int8']['validation_drop']:.4f} on validation rows" in done.stdout


@contextlib.contextmanager
def running(*arguments: str, folder: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """A run whose screen is read line by line, as it comes."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "pipeline", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_search_keeps_its_budget_by_the_clock_and_goes_on_after_an_interruption(tmp_path):
    """From the first trial to the selection; every prune fails, since its loss is no number, and the others go on."""
    write_slice(tmp_path)
    arguments = ("run", "slice.yaml", "--budget", "40s", "--set=compress.prune.learning_rate=1e38")
    trimline("run", "slice.yaml", "--until", "train", folder=tmp_path)
    with running(*arguments, folder=tmp_path) as process:
        lines = iter(process.stdout)
        assert any("start    compress" in line for line in lines)
        process.send_signal(signal.SIGINT)
        assert "stopped. What was finished is kept" in "".join(lines)
        assert process.wait() == 130
    stamps = {}
    with running(*arguments, folder=tmp_path) as process:
        for line in process.stdout:
            words = " ".join(line.split()[:2])
            stamps.setdefault("trial" if words.startswith("trial") else words, time.monotonic())
            assert "done     export int8" not in line, "it was finished before the interruption"
        assert process.wait() == 0
    assert 0.5 * 40 < stamps["start select"] - stamps["trial"] < 1.1 * 40
    found = json.loads((tmp_path / "workspace" / "slice" / "results.json").read_text())
    tried = {variant["recipe"]: variant for variant in found["variants"] if "tried_because" in variant}
    assert list(tried)[:3] == ["int8", "dynamic", "float16"]
    assert tried["prune@0.7+int8"]["status"] == "failed"
    assert "prune@0.7: the loss" in tried["prune@0.7+int8"]["reason"]
    assert found["selected"].startswith(("cluster", "channels", "lowrank"))
    assert found["selected"] in tried
    chosen = min((each for each in tried.values() if each["status"] == "ok"), key=lambda each: each["gzip_bytes"])
    assert chosen["gzip_bytes"] < tried["int8"]["gzip_bytes"]
    again = trimline(*arguments, folder=tmp_path)
    assert again.returncode == 0
    assert "done     compress" not in again.stdout
    same = json.loads((tmp_path / "workspace" / "slice" / "results.json").read_text())
    assert [variant["recipe"] for variant in same["variants"]] == [variant["recipe"] for variant in found["variants"]]


@pytest.mark.slow
def test_a_transformer_walks_the_whole_way(tmp_path):
    write_slice(tmp_path, rows=1500)
    config = {
        **CONFIG,
        "model": {"name": "transformer", "options": {"patch": 2, "width": 24}},
        "train": {**CONFIG["train"], "epochs": 20, "optimizer": {"learning_rate": 0.003}},
        "compress": {"recipes": ["int8", "prune@0.5+qat"], "prune": {"epochs": 4}, "qat": {"epochs": 2}},
    }
    (tmp_path / "slice.yaml").write_text(yaml.safe_dump(config))
    done = trimline("run", "slice.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    variants = json.loads((tmp_path / "workspace" / "slice" / "results.json").read_text())["variants"]
    assert {variant["recipe"]: variant["status"] for variant in variants} == dict.fromkeys(
        ["float32", "int8", "prune@0.5+qat"], "ok"
    )
    assert min(variant["metric"] for variant in variants) > 0.75
    float32, int8, pruned = variants
    assert pruned["gzip_bytes"] < int8["gzip_bytes"] < 0.6 * float32["gzip_bytes"]
    assert pruned["proof"]["flex"] == []


LOOKS_BACK = """
import keras


def build(spec):
    image = keras.Input(spec.input_shape, name=spec.input_name)
    x = keras.layers.Dense(32)(keras.layers.Reshape((8, 8))(image))
    attention = keras.layers.MultiHeadAttention(4, 8, name="attention")
    x = keras.layers.Add()([x, attention(x, x, use_causal_mask=True)])
    x = keras.layers.Dense(32, activation="relu", name="hidden")(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Dense(spec.outputs)(x))
"""


@pytest.mark.slow  # a whole run
def test_an_attention_that_looks_back_alone_is_not_ruined_by_int8(tmp_path):
    write_slice(tmp_path, rows=1500)
    (tmp_path / "mine.py").write_text(LOOKS_BACK)
    recipes = ["int8", "rescue", "int16x8", "prune@0.5+qat"]
    sets = {
        "model": "{builder: mine.py:build}",
        "compress.recipes": json.dumps(recipes),
        "select.max_metric_drop": "0.05",
    }
    done = trimline("run", "slice.yaml", *(f"--set={key}={value}" for key, value in sets.items()), folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    variants = json.loads((tmp_path / "workspace" / "slice" / "results.json").read_text())["variants"]
    by_recipe = {variant["recipe"]: variant for variant in variants}
    assert {recipe: by_recipe[recipe]["status"] for recipe in recipes} == dict.fromkeys(recipes, "ok")
    assert by_recipe["float32"]["metric"] > 0.75
    assert by_recipe["int8"]["validation_drop"] <= 0.02
    assert by_recipe["rescue"]["sha256"] == by_recipe["int8"]["sha256"]
    assert by_recipe["int8"]["proof"]["float_operators"] == []
