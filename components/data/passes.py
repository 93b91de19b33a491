"""The two passes over the source, as Beam pipelines of one leaf: descriptors in, one merged value out.

No tags, no finish_bundle, no rows between stages: such a pipeline is right on every runner of Beam's. Elements cross
stage boundaries as pickled bytes, so that no coder is guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from components.artifacts import SPLITS
from components.data import statistics
from components.data.blocks import encode, write_blocks
from components.data.csvfile import Bad
from components.data.hashing import fractions, mixed
from components.data.rows import Rows, read
from components.data.schema import Schema
from components.data.source import Descriptor
from components.data.statistics import Statistics
from components.data.transform import Transform
from components.errors import TrimlineError
from components.options import PreprocessOptions, Source, SplitOptions

WORK = ".work"  # folder for what only this run needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know.

    Attributes:
      folder: Where files go; all workers see it.
      transform: JSON form; None in the first pass.
    """

    source: Source
    schema: Schema
    options: PreprocessOptions
    folder: pathlib.Path
    transform: dict[str, Any] | None = None


def assign(hashes: np.ndarray, origin: str, splits: SplitOptions) -> np.ndarray:
    """The split of each row, from its content alone.

    Where the source names test files, they are the test split, and the shares of validation and calibration are taken
    of the training files; else all three are shares of the whole.

    Args:
      hashes: uint64 (rows,).
      origin: 'test' for rows of test files; 'train' where there are such files; 'all' where there are none.

    Returns:
      Array of text (rows,).
    """
    if origin == "test":
        return np.full(len(hashes), "test", dtype="<U11")
    share = fractions(hashes)
    bounds = np.cumsum([splits.test if origin == "all" else 0.0, splits.validation, splits.calibration])
    names = np.array(["test", "validation", "calibration", "train"])
    return names[np.searchsorted(bounds, share, side="right")]


def first(job: Job, descriptor: Descriptor) -> Statistics:
    """Statistics of one descriptor."""
    rows = read(descriptor, job.source, job.schema, job.options.splits, pixels=False)
    assigned = assign(rows.hashes, descriptor.origin, job.options.splits)
    select = job.options.select
    drawn = select is not None and select.method == "mutual_information"
    order = mixed(rows.hashes, descriptor.index) if drawn else None
    return statistics.observe(descriptor.index, rows, assigned, job.schema, order)


def second(job: Job, descriptor: Descriptor) -> dict[int, dict[str, Any]]:
    """Reads again, transforms, and writes one file a split; returns its row of the manifest."""
    rows, assigned, labels, bad = sorted_out(job, descriptor)
    assert job.transform is not None, "the second pass transforms"
    columns = {**Transform.from_json(job.transform).apply(rows.columns), "label": labels}
    files = {}
    for split in SPLITS:
        places = np.flatnonzero(assigned == split)
        if len(places):
            path = job.folder / file_name(split, descriptor.index)
            files[split] = write_blocks(path, _blocks(columns, places, job.options.block_rows))
    _write_quarantine(job.folder / WORK / f"bad-{descriptor.index:05d}.jsonl", bad)
    facts = {"files": files, "bad": len(bad), "first_bad": bad[: statistics.SHOWN_BAD], "classes": {}}
    if labels.dtype == np.int32:
        facts["classes"] = {split: np.bincount(labels[assigned == split]).tolist() for split in files}
    return {descriptor.index: facts}


def file_name(split: str, index: int) -> str:
    """Of the blocks that descriptor `index` gives for `split`."""
    return f"{split}-{index:05d}.tfrecord"


def sorted_out(job: Job, descriptor: Descriptor) -> tuple[Rows, np.ndarray, np.ndarray, list[Bad]]:
    """(rows, split of each, '' where its label is unknown; labels; all malformed records of the descriptor)."""
    assert job.transform is not None, "labels are known after the first pass"
    rows = read(descriptor, job.source, job.schema, job.options.splits)
    assigned = assign(rows.hashes, descriptor.origin, job.options.splits)
    labels = Transform.from_json(job.transform).labels(rows.label)
    unknown = np.flatnonzero(labels == -1) if labels.dtype == np.int32 else np.zeros(0, np.int64)
    bad = list(rows.bad)
    if len(unknown):
        assigned[unknown] = ""
        for row in unknown.tolist():
            position, text = rows.locate(row)
            bad.append(Bad(rows.file, position, "its label does not occur in the training split", text))
    return rows, assigned, labels, bad


def _blocks(columns: dict[str, np.ndarray], places: np.ndarray, block_rows: int) -> Iterator[bytes]:
    for start in range(0, len(places), block_rows):
        rows = places[start : start + block_rows]
        yield encode({name: values[rows] for name, values in columns.items()})


def _write_quarantine(path: pathlib.Path, bad: list[Bad]) -> None:
    if bad:
        path.write_text("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in bad), encoding="utf-8")


# --- Beam --------------------------------------------------------------------------------------------------------


def run(
    name: str,
    work: Callable[[Job, Descriptor], Any],
    merge: Callable[[Iterable[Any]], Any],
    job: Job,
    descriptors: list[Descriptor],
    progress: Callable[[int], None],
) -> Any:
    """Carries `work` out on every descriptor and merges what it returns.

    Args:
      name: Of the pass; names its files.
      merge: Associative and commutative.
      descriptors: At least one; a runner of one process takes them in this order.
      progress: Told the number of records that are done, now and then, from another thread.

    Raises:
      TrimlineError: What `work` raised, on the first descriptor that it raised on.
    """
    folder = job.folder / WORK
    folder.mkdir(exist_ok=True)
    result = folder / f"{name}.pickle"
    with _root_logger_kept(), _watched(folder, name, descriptors, progress):
        beam, runner, options = _beam(job.options)
        with _plain_labels(), beam.Pipeline(runner=runner, options=options) as pipeline:
            _ = (
                pipeline
                # One worker takes them in their order; for several Beam deals them out.
                | "descriptors"
                >> beam.Create([pickle.dumps(each) for each in descriptors], reshuffle=_many(job.options))
                | name >> beam.Map(functools.partial(_worked, name, work, job))
                | "merge" >> beam.CombineGlobally(functools.partial(_merged, merge)).without_defaults()
                | "leave" >> beam.Map(functools.partial(_left, result))
            )
    made = pickle.loads(result.read_bytes())
    if isinstance(made, _Stopped):
        raise made.error
    return made


@dataclasses.dataclass(frozen=True)
class _Stopped:
    """Travels in place of a result, as Beam would bury the error in one of its own."""

    index: int
    error: TrimlineError


def _worked(name: str, work: Callable[[Job, Descriptor], Any], job: Job, element: bytes) -> bytes:
    descriptor: Descriptor = pickle.loads(element)
    made: Any
    try:
        made = work(job, descriptor)
    except TrimlineError as error:
        made = _Stopped(descriptor.index, error)
    content = pickle.dumps(made)
    (job.folder / WORK / f"{name}-{descriptor.index}.done").touch()
    return content


def _merged(merge: Callable[[Iterable[Any]], Any], parts: Iterable[bytes]) -> bytes:
    made = [pickle.loads(part) for part in parts]
    stopped = [part for part in made if isinstance(part, _Stopped)]
    return pickle.dumps(min(stopped, key=lambda part: part.index) if stopped else merge(made))


def _left(path: pathlib.Path, value: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(value)
    temporary.replace(path)


@contextlib.contextmanager
def _watched(
    folder: pathlib.Path, name: str, descriptors: list[Descriptor], progress: Callable[[int], None]
) -> Iterator[None]:
    """Reports progress while the block runs: from the marks in the folder, as workers may be other processes."""
    records = {f"{name}-{each.index}.done": each.records for each in descriptors}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            progress(sum(records.get(path, 0) for path in os.listdir(folder)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    progress(sum(records.values()))


def _many(options: PreprocessOptions) -> bool:
    """Whether several processes work."""
    return options.runner == "multi_processing"


def _beam(options: PreprocessOptions) -> tuple[Any, Any, Any]:
    """(the apache_beam module, the in-process runner, its options).

    The runner is named because Beam's default one first tries to download another.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # importing Beam warns about Google Cloud clients
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    finally:
        logging.disable(disabled)
    flags = ["--direct_running_mode=multi_processing", f"--direct_num_workers={options.workers}"]
    flags = flags if _many(options) else []
    return apache_beam, FnApiRunner(), PipelineOptions(flags)


@contextlib.contextmanager
def _plain_labels() -> Iterator[None]:
    """In a notebook Beam would put the cell's number into labels, for which it imports its interactive extra."""
    import apache_beam.pipeline as module

    original = module.alter_label_if_ipython
    module.alter_label_if_ipython = lambda *_: None
    try:
        yield
    finally:
        module.alter_label_if_ipython = original


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Beam calls `logging.basicConfig()`, which would give a program without handlers one on its screen."""
    handlers = list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
