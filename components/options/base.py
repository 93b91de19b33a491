"""What all options share."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
AUTO = "auto"  # in the place of a list of recipes: they are searched for (`pipeline.search`)
Pixels = Literal["zero_to_one", "minus_one_to_one", "zero_to_255"]


class Options(pydantic.BaseModel):
    """Base: frozen, unknown keys and infinite numbers refused, defaults checked like input."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
