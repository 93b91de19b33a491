"""The recipe grammar: `prune@0.8+cluster@16+qat` is a path in the compression tree.

    recipe = step ("+" step)*        training steps first, at most one way of writing last
    step   = name ["@" strength]

Training steps come in the order channels, prune, cluster, qat, each at most once: a later step keeps what an earlier one did, and
the reverse is not possible (channels that go after pruning would take its zeros along, pruning after clustering would move centroids,
training after QAT would lose its ranges).
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
    """

    fits: Callable[[float], bool]
    rule: str
    example: str


STRENGTHS: dict[str, Strength | None] = {
    "channels": Strength(
        lambda value: 0 < value < 1, "a share of the multiply-adds above 0 and below 1", "channels@0.5"
    ),
    "prune": Strength(lambda value: 0 < value < 1, "a sparsity above 0 and below 1", "prune@0.8"),
    "cluster": Strength(
        lambda value: value.is_integer() and 2 <= value <= 256, "a whole number from 2 to 256", "cluster@16"
    ),
    "qat": None,
}
"""The training steps in the order in which a recipe may name them; None: takes no strength."""

TRAINING_STEPS = tuple(STRENGTHS)
FORMATS = ("float32", "float16", "dynamic", "int8")


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step.

    `strength` is a share of the multiply-adds in (0, 1) for channels, a sparsity in (0, 1) for prune, a count of clusters
    for cluster, None for qat.
    """

    name: str
    strength: float | None = None

    def __str__(self) -> str:
        return self.name if self.strength is None else f"{self.name}@{self.strength:g}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training steps, then the format of the file."""

    steps: tuple[Step, ...]
    format: str

    def __str__(self) -> str:
        quantized = self.steps and self.steps[-1].name == "qat"
        written = [] if quantized or (self.steps and self.format == "float32") else [self.format]
        return "+".join([str(step) for step in self.steps] + written)

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
    for part in text.split("+"):
        name, _, strength = part.strip().partition("@")
        if written is not None:
            raise ConfigError(
                f"compress.recipes '{text}': '{written}' says how the file is written, so nothing may follow it; got '{part}'. Move '{written}' to the end."
            )
        if name in FORMATS and not strength:
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
                f"compress.recipes '{text}': unknown step '{part.strip()}'; use one of {', '.join(TRAINING_STEPS + FORMATS)}, strength after '@'."
            )
    quantized = bool(steps) and steps[-1].name == "qat"
    if quantized and written not in (None, "int8"):
        raise ConfigError(
            f"compress.recipes '{text}': a qat model is written as int8, got '{written}'; drop '+{written}' or 'qat'."
        )
    return Recipe(tuple(steps), "int8" if quantized else written or "float32")


def _step(text: str, name: str, strength: str, strengths: Mapping[str, float]) -> Step:
    takes = STRENGTHS[name]
    if takes is None:
        if strength:
            raise ConfigError(
                f"compress.recipes '{text}': {name} takes no strength, got '@{strength}'; write '{name}'."
            )
        return Step(name)
    try:
        value = float(strength or strengths[name])
    except ValueError:
        raise ConfigError(
            f"compress.recipes '{text}': the strength after '@' must be a number, got '{strength}'; write '{name}@{strengths[name]:g}'."
        ) from None
    if not takes.fits(value):
        raise ConfigError(
            f"compress.recipes '{text}': {name} takes {takes.rule}, got {value:g}; write for instance '{takes.example}'."
        )
    return Step(name, value)
