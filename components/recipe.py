"""The recipe grammar: `prune@0.8+cluster@16+qat` is a path in the compression tree.

    recipe = step ("+" step)*        training steps first, at most one way of writing last
    step   = name ["@" strength]

Training steps come in the order prune, cluster, qat, each at most once: a later step keeps what an earlier one did, and
the reverse is not possible (pruning after clustering would move centroids, training after QAT would lose its ranges).
"""

from __future__ import annotations

import dataclasses

from components.errors import ConfigError

TRAINING_STEPS = ("prune", "cluster", "qat")
FORMATS = ("float32", "float16", "dynamic", "int8")


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step; `strength` is a sparsity in (0, 1) for prune, a count of clusters for cluster, None for qat."""

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


def parse_recipe(text: str, *, sparsity: float, clusters: int) -> Recipe:
    """Reads a recipe.

    Args:
      text: As the user wrote it.
      sparsity: Strength of `prune` where the text names none, in (0, 1).
      clusters: Strength of `cluster` where the text names none, 2 to 256.

    Raises:
      ConfigError: Unknown step, strength out of range, or an order that cannot work.

    >>> str(parse_recipe("prune+qat", sparsity=0.8, clusters=16))
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
            step = _step(text, name, strength, sparsity, clusters)
            before = steps[-1].name if steps else None
            if before is not None and TRAINING_STEPS.index(name) <= TRAINING_STEPS.index(before):
                raise ConfigError(
                    f"compress.recipes '{text}': '{name}' cannot follow '{before}'; the order is prune, cluster, qat, each once."
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


def _step(text: str, name: str, strength: str, sparsity: float, clusters: int) -> Step:
    if name == "qat":
        if strength:
            raise ConfigError(f"compress.recipes '{text}': qat takes no strength, got '@{strength}'; write 'qat'.")
        return Step("qat")
    try:
        value = float(strength) if strength else float(sparsity if name == "prune" else clusters)
    except ValueError:
        raise ConfigError(
            f"compress.recipes '{text}': the strength after '@' must be a number, got '{strength}'; write '{name}@{sparsity if name == 'prune' else clusters}'."
        ) from None
    if name == "prune" and not 0 < value < 1:
        raise ConfigError(
            f"compress.recipes '{text}': prune takes a sparsity above 0 and below 1, got {value:g}; write for instance 'prune@0.8'."
        )
    if name == "cluster" and not (value.is_integer() and 2 <= value <= 256):
        raise ConfigError(
            f"compress.recipes '{text}': cluster takes a whole number from 2 to 256, got {value:g}; write for instance 'cluster@16'."
        )
    return Step(name, value)
