"""Carries out a recipe in a process of its own, so that a test can kill it: python killed.py FOLDER RECIPE STEP DIE_AT.

The repository's root and this folder are on PYTHONPATH. The process kills itself with SIGKILL once STEP has come to
DIE_AT epochs; at 0 it lives.
"""

import os
import pathlib
import signal
import sys

import conftest

from components.artifacts import CompressedModel, TrainedModel
from components.tracing import Trace


def main(folder: pathlib.Path, recipe: str, step: str, die_at: float) -> None:
    def progress(done: float, total: float, note: str) -> None:
        if die_at and note.startswith(f"{step}") and done >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    finished = folder.glob("*/compressed.json")
    done = {path.parent.name: CompressedModel(path.parent) for path in finished}
    trace = Trace(on_progress=progress)
    conftest.carry_out(
        recipe, folder, TrainedModel(folder.parent / "base"), conftest.small_batches(), done, trace=trace
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
