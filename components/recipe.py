"""The recipe grammar: `prune@0.8+cluster@16+qat` is a path in the compression tree.

    recipe = step ("+" step)*        training steps first, at most one way of writing last
    step   = name ["@" strength]     for prune also a pattern: prune@2:4, prune@0.9:1x16

After the way of writing may stand 'sparse': zeros are not stored (`prune@0.9:1x16+int8+sparse`).

Training steps come in the order of STRENGTHS, each at most once: a later step keeps what an earlier one did, and the
reverse is not possible (channels that go after pruning would take its zeros along, pruning after clustering would move
centroids, training after QAT would lose its ranges).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from components.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Strength:
    """What may stand after a step's '@'.

    Attributes:
      fits: Whether a number is in range.
      rule: The range in words.
      example: A step well written.
      read: Text after '@' -> (number, pattern or None); raises ValueError where it is not of this form.
      form: The form in words.
    """

    fits: Callable[[float], bool]
    rule: str
    example: str
    read: Callable[[str], tuple[float, str | None]] = lambda text: (float(text), None)
    form: str = "a number"


BLOCKS = ("1x4", "1x16")
"""Blocks along the input axis of a dense kernel for which TFLite has sparse kernels: 1x4 in float32, 1x16 in int8."""
MOST = 16  # weights in one group of m:n


def block_side(pattern: str) -> int:
    """Inputs in one block: '1x16' -> 16."""
    return int(pattern.partition("x")[2])


def zeros_of(pattern: str) -> tuple[int, int]:
    """'2:4' -> (2, 4): 2 zeros in each 4."""
    zeros, _, group = pattern.partition(":")
    return int(zeros), int(group)


def _sparsity(text: str) -> tuple[float, str | None]:
    """'0.8' -> (0.8, None); '2:4' -> (0.5, '2:4'), 2 zeros in each 4; '0.9:1x16' -> (0.9, '1x16')."""
    first, colon, last = text.partition(":")
    if not colon:
        return float(first), None
    if last in BLOCKS:
        return float(first), last
    zeros, group = int(first), int(last)
    if not 1 <= zeros < group <= MOST:
        raise ValueError(text)
    return zeros / group, f"{zeros}:{group}"


STRENGTHS: dict[str, Strength | None] = {
    "channels": Strength(
        lambda value: 0 < value < 1, "a share of the multiply-adds above 0 and below 1", "channels@0.5"
    ),
    "lowrank": Strength(
        lambda value: 0 < value < 1, "a share of the kernel's energy above 0 and below 1", "lowrank@0.9"
    ),
    "prune": Strength(
        lambda value: 0 < value < 1,
        "a sparsity above 0 and below 1",
        "prune@0.8",
        _sparsity,
        f"a number, a number and blocks ({', '.join(f'0.9:{each}' for each in BLOCKS)}), or zeros:group up to {MOST} (2:4)",
    ),
    "cluster": Strength(
        lambda value: value.is_integer() and 2 <= value <= 256, "a whole number from 2 to 256", "cluster@16"
    ),
    "qat": None,
}
"""The training steps in the order in which a recipe may name them; None: takes no strength."""

TRAINING_STEPS = tuple(STRENGTHS)
SPARSE = "sparse"
FORMATS = ("float32", "float16", "dynamic", "int8", "int16x8", "int8_weights", "int4_weights")
RESCUE = "rescue"
"""Instead of a format: int8, with layers in another precision where it would lose too much (`components.delivery.rescue`)."""
WRITTEN = (*FORMATS, RESCUE)
IO = {"int8": ("float32", "int8", "uint8"), "int16x8": ("float32", "int16")}
"""By format that computes in integers: what its input and output may be. The converter allows no other."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
      name: As in STRENGTHS.
      strength: As STRENGTHS says; None for a step that takes none.
      pattern: Where the zeros lie, prune only: 'm:n' (m zeros in each n, so the strength is m / n) or one of BLOCKS; None
        for anywhere.
    """

    name: str
    strength: float | None = None
    pattern: str | None = None

    def __str__(self) -> str:
        number = "" if self.strength is None else f"{self.strength:g}"
        if self.pattern is None:
            return f"{self.name}@{number}" if number else self.name
        return f"{self.name}@{self.pattern}" if ":" in self.pattern else f"{self.name}@{number}:{self.pattern}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training steps, then how the file is written, one of WRITTEN, and whether it stores the nonzero weights only."""

    steps: tuple[Step, ...]
    format: str
    sparse: bool = False

    def __str__(self) -> str:
        quantized = self.steps and self.steps[-1].name == "qat"
        plain = self.steps and self.format == "float32" and not self.sparse
        written = [] if quantized or plain else [self.format]
        return "+".join([str(step) for step in self.steps] + written + [SPARSE] * self.sparse)

    @property
    def in_format(self) -> str:
        """The format of the file, one of FORMATS."""
        return "int8" if self.format == RESCUE else self.format

    @property
    def retrained(self) -> tuple[Step, ...]:
        """The training steps with qat behind them: the last resort of a rescue."""
        return (*self.steps, Step("qat"))

    @property
    def dense(self) -> Recipe:
        """The same with zeros stored."""
        return dataclasses.replace(self, sparse=False)

    def prefixes(self) -> list[tuple[Step, ...]]:
        """Every training prefix, shortest first: what must be trained, and can be shared, before the export."""
        return [self.steps[: n + 1] for n in range(len(self.steps))]


def parse_recipe(text: str, strengths: Mapping[str, float]) -> Recipe:
    """Reads a recipe.

    Args:
      text: As the user wrote it.
      strengths: By step, where the text names none: `CompressOptions.strengths`.

    Raises:
      ConfigError: Unknown step, strength out of range, or an order that cannot work.

    >>> str(parse_recipe("prune+qat", {"prune": 0.8, "cluster": 16}))
    'prune@0.8+qat'
    """
    steps: list[Step] = []
    written: str | None = None
    parts = text.split("+")
    sparse = len(parts) > 1 and parts[-1].strip() == SPARSE
    for part in parts[:-1] if sparse else parts:
        name, _, strength = part.strip().partition("@")
        if written is not None:
            raise ConfigError(
                f"compress.recipes '{text}': '{written}' says how the file is written, so nothing may follow it; got '{part}'. Move '{written}' to the end."
            )
        if name in WRITTEN and not strength:
            written = name
        elif name in TRAINING_STEPS:
            step = _step(text, name, strength, strengths)
            before = steps[-1].name if steps else None
            if before is not None and TRAINING_STEPS.index(name) <= TRAINING_STEPS.index(before):
                raise ConfigError(
                    f"compress.recipes '{text}': '{name}' cannot follow '{before}'; the order is {', '.join(TRAINING_STEPS)}, each once."
                )
            steps.append(step)
        else:
            raise ConfigError(
                f"compress.recipes '{text}': unknown step '{part.strip()}'; use one of {', '.join(TRAINING_STEPS + WRITTEN)}, strength after '@'."
            )
    quantized = bool(steps) and steps[-1].name == "qat"
    if quantized and written not in (None, "int8"):
        raise ConfigError(
            f"compress.recipes '{text}': a qat model is written as int8, got '{written}'; drop '+{written}' or 'qat'."
        )
    recipe = Recipe(tuple(steps), "int8" if quantized else written or "float32", sparse)
    if sparse:
        _check_sparse(text, recipe)
    return recipe


def _check_sparse(text: str, recipe: Recipe) -> None:
    """Refuses sparse storage where there are no zeros, and where the runtime refuses the file or computes nonsense.

    Each was tried with TF 2.21 and ai-edge-litert 2.3 on dense layers: tests/components/delivery/test_export.py.
    """
    pruned = next((step for step in recipe.steps if step.name == "prune"), None)
    if pruned is None:
        raise ConfigError(
            f"compress.recipes '{text}': sparse storage leaves zeros out, so prune must come before it, got none; write for instance 'prune@0.9:1x16+int8+sparse'."
        )
    wrong = {
        "float16": pruned.pattern in BLOCKS and "TFLite makes NaN of float16 blocks",
        "dynamic": "XNNPACK takes the stored weights for the whole kernel",
        "int8": pruned.pattern != "1x16" and "XNNPACK loads sparse int8 kernels of dense layers in blocks of 1x16 only",
        "float32": None,
    }.get(recipe.format, "it has not been seen to run")
    if wrong:
        raise ConfigError(
            f"compress.recipes '{text}': sparse storage of {recipe.format} does not work after '{pruned}': {wrong}; drop '+{SPARSE}', or write 'prune@0.9:1x16+int8+sparse' or 'prune@0.9:1x4+float32+sparse'."
        )


def _step(text: str, name: str, strength: str, strengths: Mapping[str, float]) -> Step:
    takes = STRENGTHS[name]
    if takes is None:
        if strength:
            raise ConfigError(
                f"compress.recipes '{text}': {name} takes no strength, got '@{strength}'; write '{name}'."
            )
        return Step(name)
    try:
        value, pattern = takes.read(strength) if strength else (float(strengths[name]), None)
    except ValueError:
        raise ConfigError(
            f"compress.recipes '{text}': the strength after '@' must be {takes.form}, got '{strength}'; write '{name}@{strengths[name]:g}'."
        ) from None
    if not takes.fits(value):
        raise ConfigError(
            f"compress.recipes '{text}': {name} takes {takes.rule}, got {value:g}; write for instance '{takes.example}'."
        )
    return Step(name, value, pattern)
