"""What `trimline run --overlap` saves: preprocessing, input and first epoch at once, against one after the other.

    .venv/bin/python benchmarks/overlap.py                   # some minutes on two cores

Each round runs both ways in processes of their own and fresh workspaces, from JPEG files to the trained model, the order
changing from round to round. Told are the medians of the wall time and of the processor time, and their ratios. The work
is the same, so that processor time should not change; wall time can fall by no more than the shorter of the two parts, and
by nothing where each of them keeps all cores busy by itself.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

OUT = pathlib.Path(__file__).resolve().parent / "out"
WAYS = {"one after the other": [], "overlap": ["--overlap"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--side", type=int, default=192, help="of a JPEG file; the model gets 32 x 32")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        draw(folder / "pictures", options.pictures, options.side)
        (folder / "c.yaml").write_text(configuration(folder, options.epochs))
        for number in range(options.rounds):
            for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                found[way].append(timed(folder, f"{number}-{len(found[way])}-{way[:3]}", WAYS[way]))
    result = {}
    for place, clock in enumerate(("wall", "processor")):
        middle = {way: statistics.median(each[place] for each in times) for way, times in found.items()}
        ratio = middle["overlap"] / middle["one after the other"]
        result[clock] = {"seconds": middle, "ratio": ratio}
        told = ", ".join(f"{way} {seconds:.1f} s" for way, seconds in middle.items())
        print(f"{clock:10} {told}   ratio {ratio:.3f}")
    OUT.mkdir(exist_ok=True)
    (OUT / "overlap.json").write_text(json.dumps({"options": vars(options), **result}, indent=1))


def draw(folder: pathlib.Path, count: int, side: int) -> None:
    """Four classes of coarse patterns under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (4, side // 16, side // 16, 3))
    for label in range(4):
        (folder / f"class-{label}").mkdir(parents=True)
    for index in range(count):
        pixels = np.kron(patterns[index % 4], np.ones((16, 16, 1))) * 0.5 + rng.integers(0, 128, (side, side, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class-{index % 4}" / f"{index}.jpg")


def configuration(folder: pathlib.Path, epochs: int) -> str:
    return json.dumps(
        {
            "name": "overlap",
            "source": {"kind": "images", "train": str(folder / "pictures")},
            "preprocess": {"image_size": [32, 32]},
            "model": {"name": "resnet8"},
            "train": {"epochs": epochs, "batch_size": 64, "precision": "float32"},
        }
    )


def timed(folder: pathlib.Path, workspace: str, more: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of one run."""
    command = [sys.executable, "-m", "pipeline", "run", str(folder / "c.yaml"), "--until", "train"]
    command += ["--set", f"workspace={folder / workspace}", *more]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - clock
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
