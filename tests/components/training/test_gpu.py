"""What only a GPU can show: skipped, with the reason, where there is none."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import VISIBLE_GPUS

HERE = pathlib.Path(__file__).parent
COUNT = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
FEW = {"epochs": 2, "batch_size": 32, "precision": "float32", "optimizer": {"name": "sgd", "learning_rate": 0.05}}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parents[2]), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    visible = "0" if VISIBLE_GPUS is None else VISIBLE_GPUS  # hidden on purpose stays hidden
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": visible}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def _a_gpu() -> None:
    if not pathlib.Path("/dev/nvidiactl").exists():
        pytest.skip("no GPU here: what runs on one was not tested")
    if python("-c", COUNT).stdout.strip() in ("", "0"):
        pytest.skip("TensorFlow finds no GPU here: what runs on one was not tested")


def trained(folder, model="cnn", devices=1, strategy="default", **options) -> dict:
    wanted = {"options": FEW | options, "model": model, "devices": devices, "strategy": strategy}
    folder.mkdir()
    done = python("-m", "on_gpu", str(folder), json.dumps(wanted))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_gpu_makes_the_updates_that_the_processor_makes(tmp_path):
    there, here = trained(tmp_path / "there"), trained(tmp_path / "here", devices=0)
    for a, b in zip(there["weights"], here["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(there["loss"], here["loss"], rtol=1e-3)
    assert 0 < there["said"] <= there["memory"][0]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains(tmp_path, precision):
    rates = {"learning_rate": 0.01}
    loss = trained(tmp_path / "half", precision=precision, epochs=6, optimizer=rates)["loss"]
    assert loss[-1] < 0.7 * loss[0]


def test_parts_and_computing_again_need_less_memory(tmp_path):
    fixed = {"epochs": 1, "batch_size": 64}
    whole = trained(tmp_path / "whole", "deep", **fixed)["memory"][0]
    parts = trained(tmp_path / "parts", "deep", accumulate=4, **fixed)["memory"][0]
    again = trained(tmp_path / "again", "deep", rematerialize=True, **fixed)["memory"][0]
    assert parts < 0.5 * whole, (whole, parts)
    assert again < 0.7 * whole, (whole, again)


def test_two_mirrored_gpus_make_the_updates_of_one(tmp_path):
    one, two = trained(tmp_path / "one", "mlp"), trained(tmp_path / "two", "mlp", 2, "mirrored")
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert all(two["memory"])


def test_each_gpu_of_a_split_holds_less_than_the_whole(tmp_path):
    whole = trained(tmp_path / "whole", "wide", xla=False)
    parts = trained(tmp_path / "parts", "wide", 2, "split")
    assert max(parts["memory"]) < 0.7 * whole["memory"][0], (whole["memory"], parts["memory"])
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-3)
