"""Preprocess: raw records become blocks of features, in two passes over the source.

    Source --1: statistics--> Transform --2: read again, transform, split, write--> PreparedData

Files: `<split>-<nnnnn>.tfrecord` (one a descriptor and split), transform.json, schema.json, statistics.json,
quarantine.jsonl, golden.json; manifest.json last.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from components.artifacts import SPLITS, DataSpec, PreparedData, Task, write_json
from components.data import passes, rows, statistics
from components.data.again import earlier
from components.data.blocks import read_blocks
from components.data.csvfile import Bad
from components.data.fit import fit
from components.data.opened import OPENING, in_order, waves
from components.data.passes import Job
from components.data.schema import Schema, infer
from components.data.source import Descriptor, descriptors, peek
from components.data.statistics import Statistics
from components.errors import DataError
from components.options import PreprocessOptions, Source
from components.tracing import Trace

_SHOWN_HISTOGRAMS = 50
_SHOWN_QUARANTINE = 20


def preprocess(
    source: Source,
    options: PreprocessOptions,
    folder: pathlib.Path,
    *,
    task: Task | None,
    seed: int,
    golden: int = 16,
    opens: bool = False,
    trace: Trace,
) -> PreparedData:
    """Prepares `source` and leaves the result in `folder`, which is emptied first.

    Args:
      source: Where raw records come from.
      options: How they become features.
      folder: Exists; may hold what a killed attempt left.
      task: None: found from the labels.
      seed: Of the feature selection, and of the order in which files are written; what they hold depends on the data alone.
      golden: Raw records that are kept with their features, from the calibration split first.
      opens: Says as soon as the transform is fitted what will be there, and writes file by file, so that a training may
        read meanwhile: see `components.data.opened`. The artifact is the same.
      trace: Progress in records read (both passes), counts, quarantine, histograms, pictures.

    Returns:
      The artifact; the same bytes whatever the runner.

    Raises:
      ConfigError: A file or column is not there.
      DataError: Too many malformed records, an empty split, records lost or counted twice.
    """
    _empty(folder)
    schema = infer(peek(source), source, options, task)
    cuts = _with_origin(descriptors(source, options.split_bytes))
    job = Job(source=source, schema=schema, options=options, folder=folder)
    total = sum(cut.records for cut in cuts)
    try:
        stats = passes.run(
            "statistics",
            passes.first,
            statistics.merge,
            job,
            cuts,
            lambda n: trace.progress(n, 2 * total, "statistics"),
        )
        _check_bad(stats.bad, total, stats.first_bad(), options)
        statistics.check(stats, schema)
        if options.transform is None:
            transform, features = fit(schema, stats, options.select, seed, trace.warn)
        else:
            transform, features = earlier(pathlib.Path(options.transform), schema, stats)
        job = dataclasses.replace(job, transform=transform)
        if opens:
            write_json(folder / OPENING, {"manifest": _opening(job, stats, features), "transform": transform})
        written = _second_pass(
            job, waves(in_order(cuts, seed, lambda cut: cut.index)) if opens else [cuts], total, trace
        )
        manifest = _manifest(job, cuts, written, features)
        records = _golden(job, cuts, manifest, golden)
    finally:
        rows.release()
    _check_bad(manifest["records"]["quarantined"], total, _first_bad(written), options)
    _check_splits(manifest, job)
    _write(job, stats, records, cuts, manifest)
    data = PreparedData(folder)
    _tell(data, trace)
    return data


def _empty(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _with_origin(cuts: list[Descriptor]) -> list[Descriptor]:
    """Says 'all' where the test split must be drawn too.

    Raises:
      DataError: There is nothing to read.
    """
    if not sum(cut.records for cut in cuts):
        raise DataError("source: at least one record is needed, got none; check the paths.")
    if any(cut.origin == "test" for cut in cuts):
        return cuts
    return [dataclasses.replace(cut, origin="all") for cut in cuts]


def _second_pass(job: Job, parts: Iterable[list[Descriptor]], total: int, trace: Trace) -> dict[int, dict[str, Any]]:
    """Rows of the manifest by descriptor; part by part."""
    written: dict[int, dict[str, Any]] = {}
    done = total
    for part in parts:
        trace.pulse()

        def tell(records: int, before: int = done) -> None:
            trace.progress(before + records, 2 * total, "blocks")

        written |= passes.run("blocks", passes.second, _union, job, part, tell)
        done += sum(cut.records for cut in part)
    return written


def _opening(job: Job, stats: Statistics, features: list[dict[str, Any]]) -> dict[str, Any]:
    """What a training must know of the manifest."""
    spec = _spec(job, features)
    splits = {}
    for split in SPLITS:
        rows = {index: part.rows[split] for index, part in sorted(stats.parts.items()) if part.rows.get(split)}
        files = [{"name": passes.file_name(split, index), "rows": count} for index, count in rows.items()]
        splits[split] = {"rows": sum(rows.values()), "files": files}
    return {
        "spec": spec.to_json(),
        "columns": _columns(spec, features),
        "block_rows": job.options.block_rows,
        "splits": splits,
    }


def _union(many: Iterable[dict[int, Any]]) -> dict[int, Any]:
    return dict(item for each in many for item in each.items())


def _first_bad(written: dict[int, dict[str, Any]]) -> list[Bad]:
    return [bad for _, row in sorted(written.items()) for bad in row["first_bad"]][: statistics.SHOWN_BAD]


def _check_bad(count: int, total: int, shown: list[Bad], options: PreprocessOptions) -> None:
    if count <= options.max_bad_fraction * total:
        return
    first = "; ".join(f"{bad.file} {bad.position}: {bad.reason}" for bad in shown)
    raise DataError(
        f"preprocess.max_bad_fraction={options.max_bad_fraction:g}: {count} of {total} records are malformed, a share of"
        f" {count / total:.3g}. First: {first}. Mend the data, set preprocess.columns, or raise the limit."
    )


def _check_splits(manifest: dict[str, Any], job: Job) -> None:
    shares = job.options.splits
    wanted = {"train": 1.0, "validation": shares.validation, "calibration": shares.calibration, "test": shares.test}
    total = manifest["records"]["kept"]
    for split, share in wanted.items():
        if share and not manifest["splits"][split]["rows"]:
            raise DataError(
                f"preprocess.splits.{split}: the split must hold rows, got none of {total}; raise its share, change"
                " preprocess.splits.salt, or set the share to 0."
            )


# --- the face ----------------------------------------------------------------------------------------------------


def _manifest(
    job: Job, cuts: list[Descriptor], written: dict[int, dict[str, Any]], features: list[dict[str, Any]]
) -> dict[str, Any]:
    spec = _spec(job, features)
    splits = {split: _split(written, split) for split in SPLITS}
    kept = sum(split["rows"] for split in splits.values())
    bad = sum(row["bad"] for row in written.values())
    read = sum(cut.records for cut in cuts)
    if kept + bad != read:
        odd = next(cut for cut in cuts if cut.records != _accounted(written[cut.index]))
        raise DataError(
            f"{odd.path}: {odd.records} records were counted, {_accounted(written[odd.index])} were read"
            f"{f' from line {odd.cut.line} on' if odd.cut else ''}; look for odd line ends or quotes there."
        )
    return {
        "schema": 1,
        "spec": spec.to_json(),
        "columns": _columns(spec, features),
        "block_rows": job.options.block_rows,
        "splits": splits,
        "records": {"read": read, "kept": kept, "quarantined": bad},
        "class_counts": _class_counts(written, spec.labels),
        "features": features,
    }


def _accounted(row: dict[str, Any]) -> int:
    return row["bad"] + sum(file["rows"] for file in row["files"].values())


def _spec(job: Job, features: list[dict[str, Any]]) -> DataSpec:
    assert job.transform is not None, "the transform is fitted"
    names = tuple(job.transform["label"].get("names", ()))
    if job.schema.kind == "image":
        return DataSpec(task=job.schema.task, input_name="image", input_shape=job.schema.shape, labels=names)
    width = sum(feature["width"] for feature in features)
    return DataSpec(task=job.schema.task, input_name="features", input_shape=(width,), labels=names)


def _split(written: dict[int, dict[str, Any]], split: str) -> dict[str, Any]:
    files = [row["files"][split] for _, row in sorted(written.items()) if split in row["files"]]
    return {
        "rows": sum(file["rows"] for file in files),
        "blocks": sum(file["blocks"] for file in files),
        "files": files,
    }


def _columns(spec: DataSpec, features: list[dict[str, Any]]) -> dict[str, Any]:
    """What each block holds: dtype, and shape of one row."""
    label: dict[str, Any] = {"dtype": "int32" if spec.task == "classification" else "float32", "shape": []}
    if spec.input_name == "image":
        return {"image": {"dtype": "uint8", "shape": list(spec.input_shape)}, "label": label}
    kept = [feature for feature in features if feature["kept"]]
    ids = sum(feature["kind"] == "category" or feature.get("rule") == "bucketise" for feature in kept)
    numbers = spec.input_shape[0] if kept[0]["kind"] == "values" else len(kept) - ids
    held = {"numbers": {"dtype": "float32", "shape": [numbers]}, "ids": {"dtype": "int32", "shape": [ids]}}
    return {name: column for name, column in held.items() if column["shape"] != [0]} | {"label": label}


def _class_counts(written: dict[int, dict[str, Any]], names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    counts = {split: np.zeros(len(names), np.int64) for split in SPLITS} if names else {}
    for row in written.values():
        for split, found in row["classes"].items():
            counts[split][: len(found)] += found
    return {split: dict(zip(names, found.tolist(), strict=True)) for split, found in counts.items()}


def _write(
    job: Job, stats: Statistics, records: list[dict[str, Any]], cuts: list[Descriptor], manifest: dict[str, Any]
) -> None:
    write_json(job.folder / "transform.json", job.transform)
    write_json(job.folder / "schema.json", job.schema.to_json())
    write_json(job.folder / "statistics.json", _statistics(job.schema, stats))
    write_json(job.folder / "golden.json", records)
    with (job.folder / "quarantine.jsonl").open("wb") as whole:
        for cut in cuts:
            part = job.folder / passes.WORK / f"bad-{cut.index:05d}.jsonl"
            whole.write(part.read_bytes() if part.exists() else b"")
    shutil.rmtree(job.folder / passes.WORK)
    (job.folder / OPENING).unlink(missing_ok=True)
    write_json(job.folder / "manifest.json", manifest)


def _statistics(schema: Schema, stats: Statistics) -> dict[str, Any]:
    """What the first pass learned, for people to look at; training rows only."""
    part = next(iter(stats.parts.values()))
    numbers = {}
    for name in sorted(part.moments):
        found = stats.moments(name)
        seen = found.count > 0
        numbers[name] = {
            "count": found.count.tolist(),
            "missing": found.missing.tolist(),
            "mean": found.mean.tolist(),
            "std": found.std.tolist(),
            "low": np.where(seen, found.low, 0).tolist(),
            "high": np.where(seen, found.high, 0).tolist(),
        }
    categories = {
        name: {
            "distinct": None if counts is None else len(counts),
            "frequent": dict((counts or stats.labels.__class__()).most_common(20)),
        }
        for name, counts in sorted(stats.categories.items())
    }
    return {
        "schema": 1,
        "kind": schema.kind,
        "numbers": numbers,
        "categories": categories,
        "labels": dict(stats.labels),
    }


# --- golden records ----------------------------------------------------------------------------------------------


def _golden(job: Job, cuts: list[Descriptor], manifest: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The first records of the calibration split (then validation, then train) with the features that blocks hold."""
    found = (
        record for split in ("calibration", "validation", "train") for record in _golden_of(job, cuts, split, manifest)
    )
    return list(itertools.islice(found, most))


def _golden_of(job: Job, cuts: list[Descriptor], split: str, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    names = manifest["spec"]["labels"]
    index = itertools.count()
    for cut in cuts:
        path = job.folder / passes.file_name(split, cut.index)
        if not path.exists():
            continue
        raw, assigned, labels, _ = passes.sorted_out(job, cut)
        places = np.flatnonzero(assigned == split).tolist()
        for place, features in zip(places, _rows_of(path), strict=True):
            label = names[labels[place]] if names else float(labels[place])
            yield {
                "raw": raw.record(place),
                "label": label,
                "features": _json_features(features),
                "split": split,
                "index": next(index),
            }


def _rows_of(path: pathlib.Path) -> Iterator[dict[str, np.ndarray]]:
    for block in read_blocks(path):
        for row in range(len(block["label"])):
            yield {name: values[row] for name, values in block.items() if name != "label"}


def _json_features(features: dict[str, np.ndarray]) -> dict[str, Any]:
    if "image" in features:
        pixels = features["image"]
        return {"image": base64.b64encode(pixels.tobytes()).decode(), "shape": list(pixels.shape)}
    return {name: values.tolist() for name, values in features.items()}


# --- TensorBoard -------------------------------------------------------------------------------------------------


def _tell(data: PreparedData, trace: Trace) -> None:
    manifest = data.manifest
    counts = manifest["records"]
    for name, value in counts.items():
        trace.scalar(f"records/{name}", value)
    for split in SPLITS:
        trace.scalar(f"rows/{split}", data.rows(split))
    if counts["quarantined"]:
        trace.warn(
            f"{counts['quarantined']} of {counts['read']} records are malformed and were left out; see quarantine.jsonl."
        )
        with (data.folder / "quarantine.jsonl").open(encoding="utf-8") as lines:
            first = list(itertools.islice(lines, _SHOWN_QUARANTINE))
        trace.text("quarantine", "".join(f"    {line}" for line in first))
    if trace.folder is not None and data.files("train"):
        _show_features(data, next(read_blocks(data.files("train")[0])), trace)


def _show_features(data: PreparedData, block: dict[str, np.ndarray], trace: Trace) -> None:
    """Of the first training block; standardised as the model sees them."""
    if "image" in block:
        names = [data.spec.labels[label] if data.spec.labels else f"{label:g}" for label in block["label"][:16]]
        trace.images("samples", block["image"][:16])
        trace.text("samples/labels", ", ".join(names))
        trace.histogram("features/pixels", block["image"])
        return
    features = [each for each in data.manifest["features"] if each["kept"]]
    ids = [each for each in features if each["kind"] == "category" or each.get("rule") == "bucketise"]
    named = [each["name"] for each in features if each not in ids]
    wide = block["numbers"].shape[1] if "numbers" in block else 0
    named = named if len(named) == wide else [f"values/{place}" for place in range(wide)]
    for place, name in enumerate(named[:_SHOWN_HISTOGRAMS]):
        trace.histogram(f"features/{name}", block["numbers"][:, place])
    for place, each in enumerate(ids[:_SHOWN_HISTOGRAMS]):
        trace.histogram(f"features/{each['name']}", block["ids"][:, place])
