"""How a run goes. Start at `stages.py`; what the command line does is a call away here.

    import pipeline
    results = pipeline.run("digits")

The names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config as Config
    from pipeline.config import load_config as load_config
    from pipeline.plan import Plan as Plan
    from pipeline.plan import make_plan as make_plan
    from pipeline.results import Results as Results
    from pipeline.runner import run as run

_HOMES = {
    "Config": "pipeline.config",
    "load_config": "pipeline.config",
    "Plan": "pipeline.plan",
    "make_plan": "pipeline.plan",
    "Results": "pipeline.results",
    "run": "pipeline.runner",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
