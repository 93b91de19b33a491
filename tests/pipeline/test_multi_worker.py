"""Two real processes over loopback: what they make together, and what a kill leaves of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import psutil
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIG = {
    "name": "two",
    "workspace": "workspace",
    "source": {"kind": "digits"},
    "model": {"name": "cnn", "options": {"filters": [8, 8]}},
    "train": {"epochs": 6, "batch_size": 64, "augmentation": {"shift": 0.1}, "early_stopping": {"patience": 3}},
    "compress": {"recipes": ["prune@0.5+qat"], "prune": {"epochs": 3}, "qat": {"epochs": 3}},
}
EVERYONE = ("train", "compress prune@0.5", "compress prune@0.5+qat")


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def trained(folder: pathlib.Path) -> list[np.ndarray]:
    (path,) = (folder / "workspace/store/train").glob("*/model.keras")
    return [variable.numpy() for variable in keras.saving.load_model(path, compile=False).variables]


def validation(folder: pathlib.Path) -> list[float]:
    (path,) = (folder / "workspace/store/train").glob("*/history.json")
    return json.loads(path.read_text())["val_loss"]


def compressed(folder: pathlib.Path) -> dict[str, list[np.ndarray]]:
    found = {}
    for path in (folder / "workspace/store/compress").glob("*/compressed.json"):
        with np.load(path.with_name("weights.npz")) as file:
            found[json.loads(path.read_text())["recipe"]] = [file[name] for name in file.files]
    return found


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "launch", "two.yaml", "--workers", "2")
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    for step in EVERYONE:
        assert f"done     {step}" in said
        assert f"done     {step}" in (folder / "workspace/two/worker-1.out").read_text()
    return folder


@pytest.mark.slow
def test_two_workers_train_what_one_process_trains(undisturbed, tmp_path):
    """Without augmentation the batches are the same rows; the rest is batch normalization over half batches."""
    for name, command in (("one", "run"), ("two", "launch")):
        workers = ("--workers", "2") if name == "two" else ()
        options = ("--until", "train", "--set", "train.augmentation.shift=0", "--set", "model.name=mlp")
        options += ("--set", "model.options={units: [16]}", "--set", "train.optimizer.name=sgd")
        process = start(tmp_path / name, command, "two.yaml", *workers, *options)
        _, complained = process.communicate(timeout=200)
        assert process.returncode == 0, complained
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert max(np.abs(a - b).max() for a, b in zip(one, two, strict=True)) < 1e-5


@pytest.mark.slow
def test_only_the_chief_leaves_anything_in_the_workspace(undisturbed):
    run = undisturbed / "workspace/two"
    assert {path.name for path in run.iterdir() if "worker" in path.name} == {"worker-1.out", "worker-1.log"}
    assert json.loads((run / "results.json").read_text())["selected"] is not None
    events = list((undisturbed / "workspace/store/train").glob("*/tensorboard/events*"))
    assert {name.name.split(".")[4] for name in events} == {
        name.name.split(".")[4] for name in events[:1]
    }  # one process


def worker(launcher: subprocess.Popen[str], index: int) -> psutil.Process:
    for child in psutil.Process(launcher.pid).children():
        if json.loads(child.environ().get("TF_CONFIG", '{"task": {}}'))["task"].get("index") == index:
            return child
    raise AssertionError(f"there is no worker {index}")


def once(there: Callable[[], bool], launcher: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "stage", "sign", "count"),
    [
        (1, "train", "checkpoint-*", 2),
        (0, "train", "checkpoint-*", 3),
        (1, "compress", "checkpoints/ckpt-1.index", 1),
    ],
)
def test_a_killed_worker_comes_back_and_the_result_is_that_of_an_undisturbed_run(
    undisturbed, tmp_path, index, stage, sign, count
):
    process = start(tmp_path, "launch", "two.yaml", "--workers", "2")
    attempts = tmp_path / "workspace/store" / stage
    once(lambda: len(list(attempts.glob(f"*.partial/{sign}"))) >= count, process)
    worker(process, index).send_signal(signal.SIGKILL)
    _, complained = process.communicate(timeout=300)
    assert process.returncode == 0, complained
    name = "the chief" if index == 0 else "worker 1"
    assert f"trimline: {name} was killed by SIGKILL; started again (1 of 3)." in complained
    assert same(trained(tmp_path), trained(undisturbed))
    assert validation(tmp_path) == validation(undisturbed)  # statistics of all workers have part in it
    ours, theirs = compressed(tmp_path), compressed(undisturbed)
    assert ours.keys() == theirs.keys() == {"prune@0.5", "prune@0.5+qat"}
    for recipe, weights in ours.items():
        assert same(weights, theirs[recipe]), recipe


@pytest.mark.slow
def test_ctrl_c_stops_every_process(tmp_path):
    process = start(tmp_path, "launch", "two.yaml", "--workers", "2")
    once(lambda: any((tmp_path / "workspace/store/train").glob("*.partial/checkpoint-*")), process)
    crew = psutil.Process(process.pid).children()
    assert len(crew) == 2
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "trimline: stopped. What was finished is kept" in complained
    assert not psutil.wait_procs(crew, timeout=5)[1]
