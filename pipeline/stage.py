"""What the journey is made of: the rows of its table, and what a row's function gets when it is called."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from components.artifacts import Batches, PreparedData, Share
from components.recipe import Recipe
from components.tracing import Trace

if TYPE_CHECKING:
    from pipeline.ahead import Ahead
    from pipeline.config import Config


@dataclasses.dataclass(frozen=True)
class Call:
    """All that a stage's function gets.

    Attributes:
      name: The step's name in the plan: 'train', 'export int8', ...
      config: The whole configuration; a function reads only what its row's `options` names.
      folder: Where the artifact is built; may hold what a killed attempt left.
      takes: Finished artifacts, by step name ('train', 'compress prune@0.8', ...).
      demand: Step name -> its artifact, which is made now if it is not there; for steps that the plan lists as asked for.
      recipe: The recipe, or prefix of one, that this step carries out; None where there is none.
      failures: Recipe -> why it could not be carried out; read by `select` only, as are:
      skipped: Those of them whose time was up.
      trials: Recipe -> why a search tried it; empty where the user named the recipes.
      seconds: Step name -> how long it worked.
      trace: Where numbers, progress and warnings go.
      share: Of the batches, where several processes train together.
      ahead: The preprocessing, where it is carried out beside the training: of `preprocess` and `train`.
    """

    name: str
    config: Config
    folder: pathlib.Path
    takes: dict[str, pathlib.Path]
    demand: Callable[[str], pathlib.Path]
    recipe: Recipe | None
    failures: dict[str, str]
    skipped: tuple[str, ...]
    trials: dict[str, str]
    seconds: dict[str, float]
    trace: Trace
    share: Share = Share()
    ahead: Ahead | None = None

    @property
    def data(self) -> PreparedData:
        """The prepared data, which every later stage may read."""
        return PreparedData(self.takes["preprocess"]) if self.ahead is None else self.ahead.data

    @functools.cached_property
    def strategy(self) -> Any:
        """The `tf.distribute` strategy of the run."""
        from pipeline.strategy import make_strategy

        return make_strategy(self.config.strategy)

    def batches(self, share: Share = Share(), *, overlap: bool = False) -> Batches:  # noqa: B008, frozen
        """The training data as `tf.data`, augmented as the configuration says; all of it, or this process's share."""
        from components.data.dataset import make_batches

        return make_batches(self.data, augmentation=self.config.train.augmentation, share=share, overlap=overlap)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the journey.

    Attributes:
      name: As the user writes it after `--until` and `--force`.
      options: The part of the configuration that the result depends on; goes into the fingerprint.
      run: Calls the stage's verb.
      modules: Where its code is; these and all that they import from `components` go into the fingerprint.
      libraries: Distributions whose versions go into the fingerprint.
      files: What else its result depends on, below the repository's root.
      resumes: True where the verb goes on from what a killed attempt left.
    """

    name: str
    options: Callable[[Config, Recipe | None], dict[str, Any]]
    run: Callable[[Call], None]
    modules: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    resumes: bool = False
