"""Answers raw records with a trimline bundle. Needs numpy and ai-edge-litert; Pillow for picture files only.

    python predict.py INPUT [INPUT ...] [--json] [--delimiter ,]

    rows.csv      a table with a header line; columns that the model does not use are ignored; '.csv.gz' too
    x.npy x.npz   pictures, uint8 (n, h, w, c) or (h, w), of any size; or rows of numbers, (n, width)
    records.json  raw records as in golden.json, or golden.json itself
    a.png b.jpg   picture files

Prints one line a record: the label and its probability, or the value. As a module:

    Predictor("bundle").predict({"age": "39", "workclass": "Private"})  ->  [{"label": "<=50K", "probability": 0.93}]

The bundle ships this very file as `predict.py`, beside the `transform.py` that it loads, so it imports nothing else of
trimline.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import json
import pathlib
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L")


class Predictor:
    """A bundle, loaded: raw records in, answers out.

    Args:
      folder: The bundle.
      threads: Of the runtime.

    Attributes:
      facts: `metadata.json`.
      transform: Raw columns to features to inputs, as `transform.py` and `transform.json` of the bundle define it.

    Raises:
      OSError: A file of the bundle is absent.
      ValueError: A file of the bundle is damaged.
    """

    def __init__(self, folder: str | pathlib.Path, *, threads: int = 1) -> None:
        self.folder = pathlib.Path(folder)
        self.facts: dict[str, Any] = json.loads((self.folder / "metadata.json").read_text(encoding="utf-8"))
        facts = json.loads((self.folder / "transform.json").read_text(encoding="utf-8"))
        self._code = load_source(self.folder / "transform.py", "trimline_bundle_transform")
        self.transform = self._code.Transform.from_json(facts)
        file = self.folder / "model.tflite"
        try:
            self._interpreter = Interpreter(str(file), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: ai-edge-litert cannot load it: {str(error).splitlines()[0]}") from error
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]

    def features(self, raw: Any) -> dict[str, np.ndarray]:
        """Raw records to the features that training saw, before they are widened to inputs.

        Args:
          raw: One record or a sequence of records: {column: cell}, {"pixels": base64, "shape": [h, w, c]} or
            {"values": [...]}; or an array: pictures, uint8 (h, w), (h, w, c) or (n, h, w, c); or rows (width,) or (n, width).

        Raises:
          ValueError: A column is absent, a cell is no number, or an array has the wrong shape or dtype.
        """
        return self.transform.apply(self._columns(raw))

    def inputs(self, raw: Any) -> np.ndarray:
        """Raw records to the model's input, float32 (n, *shape); see `features`."""
        return self.transform.to_inputs(self.features(raw))

    def outputs(self, raw: Any) -> np.ndarray:
        """The file's answers to raw records, float32 (n, width): logits, probabilities or values; see `features`."""
        if not isinstance(raw, Mapping) and len(raw) == 0:
            return np.empty((0, int(self._output["shape"][-1])), np.float32)
        return self.run(self.inputs(raw))

    def predict(self, raw: Any) -> list[dict[str, Any]]:
        """Answers in words: {"label", "probability"} or {"value"} for each record; see `features`."""
        outputs = self.outputs(raw)
        if self.facts["task"] == "regression":
            return [{"value": float(row[0])} for row in outputs]
        shares = outputs if self.facts["outputs"][0]["name"] == "probabilities" else softmax(outputs)
        labels = self.facts["labels"]
        return [{"label": labels[int(row.argmax())], "probability": float(row.max())} for row in shares]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Runs the file on float32 (n, *shape), one example at a time, as it ships."""
        outputs = np.empty((len(inputs), int(self._output["shape"][-1])), np.float32)
        for row, example in enumerate(inputs):
            self._interpreter.set_tensor(self._input["index"], quantized(example, self._input)[np.newaxis])
            self._interpreter.invoke()
            outputs[row] = dequantized(self._interpreter.get_tensor(self._output["index"])[0], self._output)
        return outputs

    def _columns(self, raw: Any) -> Mapping[str, Any]:
        if isinstance(raw, np.ndarray):
            return self._arrays(raw)
        records = [raw] if isinstance(raw, Mapping) else list(raw)
        for place, record in enumerate(records):
            _check_record(record, place, self.transform.names)
        return self._code.raw_columns(records)

    def _arrays(self, array: np.ndarray) -> Mapping[str, np.ndarray]:
        name = self.transform.names[0]
        if self.transform.kind == "image":
            return {name: array[np.newaxis] if _one_picture(array) else array}
        if self.transform.kind == "values":
            return {name: np.atleast_2d(array)}
        raise ValueError(
            f"this model takes a table with columns {', '.join(self.transform.names)}, got an array; pass a .csv or records."
        )


def load_source(path: pathlib.Path, name: str) -> Any:
    """Runs a Python file as module `name`; unlike an import it leaves no `__pycache__` in the bundle."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def quantized(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """float32 values as the file's tensor takes them: rounded to the nearest code and clipped where it holds integers."""
    dtype = np.dtype(details["dtype"])
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    scale, zero_point = details["quantization"]
    limits = np.iinfo(dtype)
    return np.clip(np.round(values / np.float32(scale)) + zero_point, limits.min, limits.max).astype(dtype)


def dequantized(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """The file's tensor as float32."""
    if np.dtype(details["dtype"]).kind == "f":
        return values.astype(np.float32, copy=False)
    scale, zero_point = details["quantization"]
    return (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (n, classes) to float64 (n, classes) that add up to 1."""
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def read_input(path: pathlib.Path, *, delimiter: str = ",") -> Any:
    """A file as what `Predictor.features` takes: a list of records, or an array.

    Raises:
      OSError: The file cannot be read.
      ValueError: Unknown suffix, or the content is not what the suffix says.
    """
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return _read_csv(path, delimiter)
    if name.endswith((".npy", ".npz")):
        return _read_arrays(path)
    if name.endswith(".json"):
        return _read_records(path)
    if name.endswith(PICTURES):
        return [_as_record(_decode(path.read_bytes()))]
    raise ValueError(
        f"{path}: .csv, .csv.gz, .npy, .npz, .json, {', '.join(PICTURES)} can be read; rename or convert it."
    )


def _read_csv(path: pathlib.Path, delimiter: str) -> list[dict[str, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.name.lower().endswith(".gz") else content).decode("utf-8-sig")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        records = []
        for cells in filter(None, lines):
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {lines.line_num}: the header names {len(header)} columns, got {len(cells)} cells; repair the line."
                )
            records.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}; repair the line.") from error
    return records


def _read_arrays(path: pathlib.Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = list(loaded)
        if "x" not in names and len(names) != 1:
            raise ValueError(f"{path}: one array, or one named 'x', is needed, got {', '.join(names)}.")
        return loaded["x" if "x" in names else names[0]]


def _read_records(path: pathlib.Path) -> list[Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict):
        value = value.get("records", [value])
    if not isinstance(value, list):
        raise ValueError(f"{path}: a record or a list of records is needed, got {type(value).__name__}.")
    return [entry["raw"] if isinstance(entry, dict) and "raw" in entry else entry for entry in value]


def _decode(content: bytes) -> np.ndarray:
    """A picture file to uint8 (h, w, 1) where it is grey, else (h, w, 3), as preprocessing read those of the training set.

    The first frame; turned as its EXIF tag says; transparency is dropped; more than 8 bits are cut to the upper 8.
    """
    from PIL import Image, ImageOps  # here: everything but picture files works without it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                picture = ImageOps.exif_transpose(opened)
                if picture.mode.startswith("I"):
                    return (np.clip(np.asarray(picture), 0, 65535) >> 8).astype(np.uint8)[:, :, None]
                if picture.mode in _GREY_MODES:
                    return np.asarray(picture.convert("L"))[:, :, None]
                return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"a picture that Pillow reads is needed, got: {error}") from error


def _as_record(pixels: np.ndarray) -> dict[str, Any]:
    return {"pixels": base64.b64encode(pixels.tobytes()).decode(), "shape": list(pixels.shape)}


def _one_picture(array: np.ndarray) -> bool:
    """(h, w) and (h, w, 1 or 3) are one; (n, h, w) and (n, h, w, c) are many."""
    return array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))


def _check_record(record: Any, place: int, names: Sequence[str]) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"record {place}: an object with {', '.join(names)} is needed, got {type(record).__name__}.")
    absent = [name for name in names if name not in record]
    if absent:
        given = ", ".join(map(str, record)) or "nothing"
        raise ValueError(
            f"record {place}: column '{absent[0]}' is needed, got {given}; name the columns in the first line."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", nargs="+", type=pathlib.Path, help="a .csv, .npy, .npz, .json or picture file")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--delimiter", default=",", help="between the cells of a .csv (default: ,)")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    chosen = parser.parse_args(arguments)
    try:
        predictor = Predictor(pathlib.Path(__file__).parent, threads=chosen.threads)
        answers = [
            answer
            for path in chosen.input
            for answer in predictor.predict(read_input(path, delimiter=chosen.delimiter))
        ]
    except ModuleNotFoundError as error:
        print(f"predict.py: picture files need {error.name}; install it: pip install pillow", file=sys.stderr)
        return 2
    except (OSError, ValueError, TypeError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps(answers, indent=1, ensure_ascii=False))
    else:
        for answer in answers:
            print("\t".join(f"{part:.6g}" if isinstance(part, float) else str(part) for part in answer.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
