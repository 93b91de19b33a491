"""Options of the compression steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.fields import Duration
from components.options.base import Count, Fraction, Options, Positive
from components.options.training import CompressDistillation


class FineTune(Options):
    """What every compression step shares."""

    epochs: Count = 4
    learning_rate: Positive = Field(1e-3, description="Peak; falls to zero along a cosine over the step.")
    exclude: list[str] = Field([], description="Layer names that the step leaves alone.")


class LowRankOptions(FineTune):
    """Two thin kernels for a large one, by singular values (Denton et al. 2014, arXiv 1404.0736)."""

    energy: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9,
        description="Share of the sum of a kernel's squared singular values that is kept, where the recipe names none.",
    )
    minimum_rank: Count = Field(1, description="No kernel comes down to a lower rank.")


class ChannelsOptions(FineTune):
    """Removal of whole filters and neurons (Li et al. 2017, arXiv 1608.08710)."""

    epochs: Count = Field(8, description="More than other steps need: what is removed is gone at once.")
    removed: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the multiply-adds to remove where the recipe names none."
    )
    # On validation rows of Fashion-MNIST (ResNet-8, 0.5 removed, 200 updates, two seeds) batch_norm kept 0.864, l2 0.845.
    importance: Literal["batch_norm", "l2", "l1"] = Field(
        "batch_norm",
        description="Which channels go first: those with the smallest scale of the batch normalization behind them (without "
        "one: by l2), or with the smallest norm of their kernel, batch normalization folded in.",
    )
    minimum: Count = Field(4, description="Channels that every group keeps.")
    multiple: Count = Field(
        8,
        description="Groups of at least twice as many channels keep a multiple of it: XNNPACK computes channels in tiles, "
        "and a tile begun costs as much as a full one. 1: any number.",
    )


class PruneOptions(FineTune):
    """Magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878)."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="Target where the recipe names none.")
    schedule: Literal["polynomial", "constant"] = "polynomial"
    initial_sparsity: Fraction = Field(0.0, description="polynomial: where it starts.")
    begin: Fraction = Field(0.0, description="Fraction of the step's updates before pruning begins.")
    end: Annotated[float, Field(gt=0, le=1)] = Field(0.6, description="Fraction by which the target is reached.")
    frequency: Count = Field(20, description="Updates between two mask changes.")
    spread: Literal["uniform", "erk", "global"] = Field(
        "uniform",
        description="uniform: each kernel to the target; erk: larger kernels further than small ones, the target overall; "
        "global: one magnitude for all kernels, found on the weights that the step starts from, the target overall.",
    )
    dense_ends: bool | Literal["auto"] = Field(
        "auto",
        description="Kernels with no other kernel before or behind them stay dense too; auto: where they hold no more than "
        "0.05 of all weights together.",
    )
    targets: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="Sparsity by layer name, in place of what the recipe and `spread` say."
    )
    magnitude: Literal["l1", "l2"] = Field(
        "l1", description="Blocks only: a block counts by the sum of its magnitudes, or by their squares."
    )
    dense_share: Fraction = Field(
        0.01,
        description="The smallest kernels stay dense while together they hold no more than this share of all weights.",
    )


class ClusterOptions(FineTune):
    """Weight sharing (Han et al. 2016, arXiv 1510.00149)."""

    clusters: int = Field(16, ge=2, le=256, description="Distinct weights a layer where the recipe names none.")
    initialization: Literal["kmeans++", "linear", "density"] = "kmeans++"
    per_channel: bool = False


class QatOptions(FineTune):
    """Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877)."""

    learning_rate: Positive = 3e-4


class CompressOptions(Options):
    """Which recipes are carried out, and how strong each kind of step is by default."""

    recipes: Annotated[list[str], Field(min_length=1)] | Literal["auto"] = Field(
        [
            "float32",
            "float16",
            "dynamic",
            "int8",
            "qat",
            "prune+int8",
            "prune+qat",
            "cluster+int8",
            "cluster+qat",
            "prune+cluster+qat",
        ],
        description="Paths in the compression tree: steps joined by '+', strength after '@'; or auto, which searches for them. "
        "Steps: channels[@share], lowrank[@energy], prune[@sparsity] (in patterns: @2:4, @0.9:1x4, @0.9:1x16), cluster[@clusters], qat. Last, how it is written: "
        "float32, float16, dynamic, int8, rescue (int8 unless that loses too much), int16x8, int8_weights, int4_weights; behind that perhaps sparse, which leaves zeros out.",
    )
    budget: Duration = Field(
        "30m",
        description="recipes: auto only. Time for the search, as 90s, 30m or 2h; the base training is not part of it.",
    )
    batch_size: Count | None = Field(None, description="null: as in train.")
    distill: CompressDistillation | None = None
    channels: ChannelsOptions = ChannelsOptions()
    lowrank: LowRankOptions = LowRankOptions()
    prune: PruneOptions = PruneOptions()
    cluster: ClusterOptions = ClusterOptions()
    qat: QatOptions = QatOptions()

    @property
    def strengths(self) -> dict[str, float]:
        """By step: the strength that it has where a recipe names none."""
        return {
            "channels": self.channels.removed,
            "lowrank": self.lowrank.energy,
            "prune": self.prune.sparsity,
            "cluster": self.cluster.clusters,
        }
