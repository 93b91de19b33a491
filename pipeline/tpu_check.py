"""TPU check: what of a configuration's training a TPU would refuse, as far as that can be known without one."""

from __future__ import annotations

import sys

from components.errors import ConfigError, ModelError
from components.training.replicas import check_batch
from pipeline.config import Config
from pipeline.plan import make_plan
from pipeline.preflight import rough_spec
from tpu.check import UNPROVEN, Verdict, check
from tpu.errors import TpuError
from tpu.lint import Finding, lint
from tpu.targets import parse_target

_MULTIPLE = 8  # a TPU lays batches out in rows of eight


def tpu_check(
    config: Config, target: str, *, compile: bool, python: str = sys.executable, limit: float = 600.0
) -> tuple[list[Finding], Verdict | None]:
    """Looks at the update that `config` trains with, and compiles it for one device of `target` where `compile` says so.

    Returns:
      What the lint found, errors first, and the compiler's verdict; None where it was not asked or XLA had refused before.

    Raises:
      ConfigError: No such target, or the batch does not divide by its devices.
      ModelError: The model cannot be built, or the compiler's process failed.
    """
    from components.training.lower import lower
    from components.training.model import build, outputs_of
    from components.training.precision import BFLOAT16

    try:
        slice_ = parse_target(target)
    except TpuError as error:
        raise ConfigError(str(error)) from error
    train = config.train
    check_batch(train.batch_size, slice_.devices, f"tpu {slice_.name}", accumulate=train.accumulate)
    spec = rough_spec(make_plan(config))
    if spec is None:
        raise ConfigError(
            "tpu check: the shape of the data is not known, because the source cannot be read; see 'trimline plan'."
        )
    model = build(config.model, spec, seed=config.seed)
    share = train.batch_size // slice_.devices
    precision = BFLOAT16 if train.precision == "auto" else train.precision
    outputs = outputs_of(model, config.model)
    found = lower(train, model, spec, outputs, batch_size=share, precision=precision, kind="TPU")
    findings = lint(found.graph, {layer.name for layer in model._flatten_layers(include_self=False)})
    if share % _MULTIPLE:
        findings.append(
            Finding(
                "note",
                "",
                f"a device gets {share} examples of train.batch_size={train.batch_size}; multiples of {_MULTIPLE} fill its rows",
            )
        )
    if found.hlo is None:
        findings.insert(0, Finding("error", "", f"XLA cannot lower the update: {found.refusal}"))
        return findings, None
    if not compile:
        return findings, None
    try:
        return findings, check(found.hlo, slice_, python=python, limit=limit)
    except TpuError as error:
        raise ModelError(str(error)) from error


__all__ = ["UNPROVEN", "tpu_check"]
