"""Rescue: where int8 loses too much, the mildest file that does not.

    int8 --too much lost--> its worst 1, 2, 4, ... layers in another precision --still--> the model after qat

Which layers are worst is read from the int8 file, layer by layer against the float one (`errors_by_layer`). Where a layer's
output has a range that 256 codes cannot tell apart, the layers that read it are raised along: they would round it again. What a file
loses is told on validation rows: the test split is for the last word only. The first rung within the limit is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from components.artifacts import TFLiteFile, read_json, write_json
from components.delivery.errors_by_layer import LayerError
from components.errors import BudgetError, TrimlineError
from components.options import ExportOptions
from components.tracing import Trace

KEYS = {"int16": "int16", "float32": "keep_float"}
"""By precision: the field of ExportOptions that names the layers which have it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One file that was tried.

    Attributes:
      name: 'int8', 'worst 2 in int16', 'qat'.
      precision: Of the raised layers, one of KEYS; '' where none is raised.
      layers: Keras layer names that are raised, the worst first, each before the readers that come along.
      drop: What it loses on validation rows, in the metric's unit, positive is worse; None where it could not be made.
      bytes: Of the file; None likewise.
      reason: Why it could not be made; None where it was.
    """

    name: str
    precision: str = ""
    layers: tuple[str, ...] = ()
    drop: float | None = None
    bytes: int | None = None
    reason: str | None = None


def rescue(
    write: Callable[[ExportOptions, pathlib.Path], TFLiteFile],
    retrain: Callable[[pathlib.Path], TFLiteFile] | None,
    lost: Callable[[TFLiteFile], float],
    blame: Callable[[TFLiteFile], Sequence[LayerError]],
    layers: Mapping[str, str],
    options: ExportOptions,
    folder: pathlib.Path,
    *,
    allowed: float,
    precisions: Sequence[str],
    trace: Trace,
) -> TFLiteFile:
    """Climbs until a file is within the limit, and leaves that one in `folder`.

    Args:
      write: (options, folder) -> the model as int8 under these options.
      retrain: folder -> the same after quantization-aware training, as int8; None where that is not wanted.
      lost: What a file loses on validation rows, in the metric's unit; positive is worse.
      blame: An int8 file's layers, the one that adds most noise first.
      layers: Name -> class of all Keras layers of the model; operators of no layer cannot be raised.
      options: Of the export; its own `keep_float` and `int16` hold on every rung.
      folder: Exists; an earlier attempt is overwritten.
      allowed: The limit, in the metric's unit.
      precisions: Tried in this order for each number of layers, keys of KEYS.
      trace: Hears progress, each rung, and what came of it.

    Returns:
      The first file within the limit, or the one that loses least where none is. Its face holds "rescue": see `_face`.

    Raises:
      TrimlineError: Not even int8 can be made.
    """
    ladder = _Ladder(write, lost, options, folder / "rungs", trace)
    shutil.rmtree(ladder.folder, ignore_errors=True)
    first = ladder.climb(Rung(name="int8"), functools.partial(write, options))
    if first is None:
        raise TrimlineError(f"rescue: int8 itself cannot be made: {ladder.rungs[0].reason}")
    noisy: list[LayerError] = []
    if not ladder.within(allowed):
        noisy = [each for each in blame(first) if each.added > 0 and each.layer in layers]
        for rung in _raised(noisy, options.rescue.most_layers, precisions, layers):
            ladder.climb(rung, functools.partial(ladder.raise_layers, rung))
            if ladder.within(allowed):
                break
        else:
            if retrain is not None:
                ladder.climb(Rung(name="qat"), retrain)
    taken = ladder.best(allowed)
    face = _face(ladder.rungs, taken, allowed, noisy) | {"worth": [ladder.worth(taken, each) for each in taken.layers]}
    trace.text("rescue", _table(face))
    if taken.name != "int8" or not ladder.within(allowed):
        trace.warn(in_words(face))
    return ladder.keep(taken, folder, face)


def _raised(
    worst: Sequence[LayerError], most: int, precisions: Sequence[str], layers: Container[str]
) -> Iterator[Rung]:
    """The worst 1, 2, 4, ... layers up to `most`, in each precision; where an output is to blame, with its readers.

    >>> worst = [LayerError(layer=each, operators=(), snr_db=3.0, added=0.5) for each in "abc"]
    >>> [rung.name for rung in _raised(worst, 8, ["int16"], "abc")]
    ['worst 1 in int16', 'worst 2 in int16', 'worst 3 in int16']
    """
    top = min(len(worst), most)
    counts = [2**power for power in range(top.bit_length())]
    for count in dict.fromkeys([*counts, top] if top else []):
        names = [
            name
            for each in worst[:count]
            for name in (each.layer, *(each.readers if each.blames_output else ()))
            if name in layers
        ]
        for precision in precisions:
            yield Rung(name=f"worst {count} in {precision}", precision=precision, layers=tuple(dict.fromkeys(names)))


class _Ladder:
    """The rungs so far, each with its file in a folder of its own."""

    def __init__(
        self,
        write: Callable[[ExportOptions, pathlib.Path], TFLiteFile],
        lost: Callable[[TFLiteFile], float],
        options: ExportOptions,
        folder: pathlib.Path,
        trace: Trace,
    ) -> None:
        self.write, self.lost, self.options, self.folder, self.trace = write, lost, options, folder, trace
        self.rungs: list[Rung] = []

    def climb(self, rung: Rung, make: Callable[[pathlib.Path], TFLiteFile]) -> TFLiteFile | None:
        """Makes and judges one file; what cannot be made is recorded, and None."""
        place = self._place(len(self.rungs))
        place.mkdir(parents=True)
        self.trace.pulse()
        try:
            file = make(place)
            drop = self.lost(file)
        except BudgetError:  # says nothing of the rung: an artifact without it would be taken for the whole ladder
            raise
        except TrimlineError as error:
            self.rungs.append(dataclasses.replace(rung, reason=str(error)))
            return None
        self.rungs.append(dataclasses.replace(rung, drop=drop, bytes=file.facts["bytes"]))
        self.trace.scalar("rescue/drop", drop, len(self.rungs))
        self.trace.scalar("rescue/bytes", file.facts["bytes"], len(self.rungs))
        return file

    def raise_layers(self, rung: Rung, place: pathlib.Path) -> TFLiteFile:
        """The file with the rung's layers raised, beside those that the user named; on the rows that int8 settled on."""
        key = KEYS[rung.precision]
        names = [*getattr(self.options, key), *map(re.escape, rung.layers)]
        rows = read_json(TFLiteFile(self._place(0)).calibration)["rows"]
        return self.write(self.options.model_copy(update={key: names, "calibration_examples": rows}), place)

    def worth(self, rung: Rung, layer: str) -> dict[str, Any]:
        """What one raised layer gives and takes: the rung against the same with this layer back in int8."""
        others = tuple(each for each in rung.layers if each != layer)
        drop, size = self.rungs[0].drop, self.rungs[0].bytes
        if others:
            place = self.folder / "put_back"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            self.trace.pulse()
            file = self.raise_layers(dataclasses.replace(rung, layers=others), place)
            drop, size = self.lost(file), file.facts["bytes"]
        assert rung.drop is not None, "a rung that is taken was made"
        assert rung.bytes is not None, "likewise"
        assert drop is not None, "int8 was made, or nothing would have been raised"
        assert size is not None, "likewise"
        return {"layer": layer, "gives_back": round(drop - rung.drop, 9), "bytes": rung.bytes - size}

    def within(self, allowed: float) -> bool:
        """Whether the last file is within the limit."""
        drop = self.rungs[-1].drop
        return drop is not None and drop <= allowed

    def best(self, allowed: float) -> Rung:
        """The last rung if it is within the limit, else the one that loses least; of equals the earliest."""
        made = [(rung.drop, number) for number, rung in enumerate(self.rungs) if rung.drop is not None]
        return self.rungs[-1 if self.within(allowed) else min(made)[1]]

    def keep(self, rung: Rung, folder: pathlib.Path, face: Mapping[str, Any]) -> TFLiteFile:
        """Moves the rung's files into `folder`, their face last, and removes the others."""
        place = self._place(self.rungs.index(rung))
        facts = read_json(place / "exported.json")
        for path in sorted(place.iterdir()):
            if path.name != "exported.json":
                path.replace(folder / path.name)
        write_json(folder / "exported.json", {**facts, "rescue": dict(face)})
        shutil.rmtree(self.folder)
        return TFLiteFile(folder)

    def _place(self, number: int) -> pathlib.Path:
        return self.folder / str(number)


def _face(rungs: Sequence[Rung], taken: Rung, allowed: float, noisy: Sequence[LayerError]) -> dict[str, Any]:
    """{"allowed", "met", "taken": a rung's name, "rungs": [...], "layers": [{"layer", "snr_db", "added", "raised"}, ...]}.

    `layers` are those of int8 that add noise, the worst first; `raised` is what the taken file computes them in, "" for int8.
    Beside these "worth", of each raised layer what the drop would grow by without it ("gives_back") and what it takes in "bytes".
    """
    return {
        "allowed": allowed,
        "met": taken.drop is not None and taken.drop <= allowed,
        "taken": taken.name,
        "rungs": [{**dataclasses.asdict(rung), "layers": list(rung.layers)} for rung in rungs],
        "layers": [
            {
                "layer": each.layer,
                "snr_db": round(max(each.snr_db, -999.0), 2),
                "added": min(each.added, 1e9),  # nothing varies in the signal: JSON knows no infinity
                "raised": taken.precision if each.layer in taken.layers else "",
            }
            for each in noisy
        ],
    }


def in_words(face: Mapping[str, Any]) -> str:
    """What came of a rescue, on one line.

    >>> in_words({"allowed": 0.01, "met": True, "taken": "worst 1 in int16", "layers": [], "rungs": [
    ...     {"name": "int8", "drop": 0.031, "layers": [], "precision": ""},
    ...     {"name": "worst 1 in int16", "drop": 0.004, "layers": ["head"], "precision": "int16"}]})
    "rescue: int8 loses 0.0310 on validation rows, 0.0100 is allowed; with 'head' in int16 it loses 0.0040."
    """
    by_name = {rung["name"]: rung for rung in face["rungs"]}
    taken = by_name[face["taken"]]
    begin = f"rescue: int8 {_lost(by_name['int8']['drop'])} on validation rows, {face['allowed']:.4f} is allowed"
    if taken["layers"]:
        how = f"with {', '.join(map(repr, taken['layers']))} in {taken['precision']} it"
    else:
        how = {"qat": "after qat it", "int8": "the file as it is"}[taken["name"]]
    if face["met"]:
        return f"{begin}; {how} {_lost(taken['drop'])}."
    return f"{begin}; none of {len(by_name)} rungs is within it, {how} loses least, {taken['drop']:.4f}."


def _lost(drop: float) -> str:
    return f"loses {drop:.4f}" if drop > 0 else "loses nothing" if drop == 0 else f"gains {-drop:.4f}"


def _table(face: Mapping[str, Any]) -> str:
    """Rungs and layers as Markdown."""
    lines = ["| rung | drop | bytes | layers |", "|---|---|---|---|"]
    for rung in face["rungs"]:
        figures = f"{rung['drop']:+.4f} | {rung['bytes']:,}" if rung["reason"] is None else f"{rung['reason']} |"
        lines.append(f"| {rung['name']} | {figures} | {', '.join(rung['layers'])} |")
    lines += ["", "| layer of int8 | SNR, dB | noise added | raised to |", "|---|---|---|---|"]
    for each in face["layers"]:
        lines.append(f"| {each['layer']} | {each['snr_db']:.1f} | {each['added']:.2e} | {each['raised'] or '-'} |")
    if face["worth"]:
        lines += ["", "| raised layer | gives back | bytes |", "|---|---|---|"]
    lines += [f"| {each['layer']} | {each['gives_back']:+.4f} | {each['bytes']:+,} |" for each in face["worth"]]
    return f"{in_words(face)}\n\n" + "\n".join(lines)
