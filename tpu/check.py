"""Check: an update compiled by the real XLA:TPU compiler, on a machine without a TPU.

    serialized HLO, target --check()--> what one device needs, or the compiler's own refusal

The update is the one that trains, TensorFlow's graph of it, lowered by TensorFlow for XLA on a CPU and compiled by libtpu.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import filelock

from tpu.errors import TpuError
from tpu.targets import Target

LOCK = pathlib.Path(tempfile.gettempdir()) / "trimline-libtpu.lock"
UNPROVEN = (
    "Not proven: that it runs on a TPU, TensorFlow's own kernels for TPUs, TPUStrategy, the input pipeline, speed, numbers, and memory "
    "beside this one program (input ahead of time, the runtime's part, evaluation)."
)
_FLAT_OUT = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the compiler said.

    Attributes:
      target: For which slice.
      refusal: In the compiler's words, '' where it compiled.
      peak: Greatest memory of a device, bytes; 0 where it was refused.
      facts: Everything that the compiler told.
    """

    target: Target
    refusal: str
    peak: int
    facts: dict[str, Any]

    @property
    def too_large(self) -> bool:
        """Whether it was refused for want of memory."""
        return _FLAT_OUT in self.refusal

    def __str__(self) -> str:
        gib = self.target.memory / (1 << 30)
        if self.refusal:
            why = "does not fit" if self.too_large else "is refused"
            return f"XLA:TPU for {self.target.name}: the update {why}: {' '.join(self.refusal.split())[:600]}"
        versions = ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        flops = f", {self.facts['flops'] / 1e9:.2f} GFLOP a device" if self.facts.get("flops") else ""
        return (
            f"XLA:TPU for {self.target.name} ({versions}) compiled the update: {self.peak / (1 << 20):,.0f} MiB at most of "
            f"{gib:.0f} GiB a device{flops}."
        )


def check(hlo: bytes, target: Target, *, python: str = sys.executable, limit: float = 600.0) -> Verdict:
    """Compiles `hlo` for one device of `target` in a process of its own.

    Args:
      hlo: A serialized `HloModuleProto` with static shapes.
      target: See `parse_target`.
      python: An interpreter that has the packages of the extra `tpu-check`.
      limit: Seconds to wait for the compiler; ResNet-50 takes two to three minutes on two cores.

    Raises:
      TpuError: The packages are not there, or the time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "update.hlo"
        program.write_bytes(hlo)
        command = [python, str(pathlib.Path(__file__).with_name("compiler.py")), str(program), target.name]
        # libtpu lets one process in at a time and fails in the others; ours wait for each other.
        with filelock.FileLock(LOCK):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            except subprocess.TimeoutExpired:
                raise TpuError(
                    f"tpu check: the compiler had not finished after {limit:g} s; allow more with --limit, or try a smaller model."
                ) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise TpuError(f"tpu check: the compiler's process ended with status {done.returncode}: {last}")
    said = json.loads(lines[-1])
    refusal = said.get("refused", "")
    if refusal.startswith(("ModuleNotFoundError", "ImportError", "AttributeError")):
        raise TpuError(
            f"tpu check: jax, jaxlib and libtpu of the pinned versions were expected, got '{refusal[:200]}'; install them: pip install "
            "'trimline[tpu-check]' (libtpu is under the Google Cloud Platform Terms of Service)."
        )
    return Verdict(target, refusal, said.get("peak", 0), said)
