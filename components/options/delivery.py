"""Options of what is made of a trained model: files, measurements, the choice, the bundle."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.fields import Pattern
from components.options.base import Count, Options, Positive


class RescueOptions(Options):
    """What `rescue` may do where int8 loses more than select.max_metric_drop."""

    precisions: Annotated[list[Literal["int16", "float32"]], Field(min_length=1)] | None = Field(
        None,
        description="Of raised layers, in the order in which they are tried; null: int16 first, which keeps kernels in int8, and "
        "float32 first where select.objective is latency, since CPUs have no fast int16 kernels.",
    )
    most_layers: Count = Field(8, description="No more layers than this are raised.")
    qat: bool = Field(True, description="Train the model with quantization in the loop where no precision helps.")


class ExportOptions(Options):
    """Keras to TFLite."""

    calibration_examples: Count | None = Field(
        None, description="int8 and int16x8 only; null: until ranges settle, 512 at most."
    )
    io: Literal["float32", "int8", "uint8", "int16"] = Field(
        "float32",
        description="Input and output dtype of integer files: float32, int8 or uint8 for int8, float32 or int16 for int16x8.",
    )
    keep_float: list[Pattern] = Field(
        [],
        description="Layers that stay float32 inside an integer file: names, or regular expressions for whole names.",
    )
    int16: list[Pattern] = Field(
        [], description="Layers with int16 activations inside an int8 file, likewise; keep_float goes before."
    )
    short_scales: bool = Field(
        True,
        description="Scales of integer kernels and activations are rounded to 8 and 6 significant bits, the latter upwards, so that a download "
        "is smaller; false: as the TFLite converter writes them.",
    )
    rescue: RescueOptions = RescueOptions()


class MeasureOptions(Options):
    """The latency protocol."""

    threads: Count = 1
    warmup: int = Field(30, ge=0, description="Runs thrown away first.")
    runs: Count = Field(200, description="Timed runs; median and 90th percentile are reported.")


class SelectOptions(Options):
    """What 'best' means, among the variants that meet every constraint."""

    objective: Literal["size", "latency", "metric"] = "size"
    size: Literal["gzip", "raw"] = Field("gzip", description="Bytes to download, or bytes in flash.")
    max_metric_drop: float | None = Field(0.01, ge=0, description="Against float32, in the metric's own unit.")
    max_bytes: Count | None = Field(None, description="As `size` counts them.")
    max_latency_ms: Positive | None = Field(None, description="Median.")


class BundleOptions(Options):
    """What ships."""

    golden: int = Field(16, ge=1, le=1000, description="Raw records with their answers, shipped as test vectors.")
