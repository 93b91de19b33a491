"""Lint: what in a traced update a TPU cannot compute, or only badly, with the layer that it sits in.

Looks at TensorFlow's graph, needs no libtpu, and takes seconds. That nothing is found proves little: see `check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Literal

HOST = {
    **dict.fromkeys(("PyFunc", "EagerPyFunc", "PyFuncStateless"), "runs Python (py_function, numpy_function)"),
    **dict.fromkeys(("PrintV2", "StringFormat", "AsString", "Print"), "makes text (tf.print, as_string)"),
    **dict.fromkeys(
        ("ReadFile", "WriteFile", "DecodeJpeg", "DecodePng", "DecodeImage", "DecodeCSV"), "reads files or formats"
    ),
    **dict.fromkeys(
        ("LookupTableFindV2", "LookupTableImportV2", "StringSplitV2", "RegexFullMatch"), "looks up or splits text"
    ),
    "Eig": "has no XLA kernel",
    "MaxPoolWithArgmax": "has no XLA kernel",
    "SparseTensorDenseMatMul": "has no XLA kernel",
}
DYNAMIC = ("Where", "Unique", "UniqueV2", "BooleanMask", "NonMaxSuppressionV3")
WIDE = ("float64", "int64", "uint64", "complex128")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
      level: 'error' where a TPU refuses it, 'note' where it computes it badly.
      layer: Name of the Keras layer, '' outside of all.
      what: In words, with the operation.
    """

    level: Literal["error", "note"]
    layer: str
    what: str

    def __str__(self) -> str:
        place = f"layer '{self.layer}': " if self.layer else ""
        return f"{self.level}: {place}{self.what}"


def lint(graph: Any, layers: Collection[str]) -> list[Finding]:
    """Reads a `tf.Graph`, functions that it calls included.

    Args:
      graph: Of one update, traced with static shapes.
      layers: Names of the model's layers.

    Returns:
      Each finding once, errors first.
    """
    found = dict.fromkeys(finding for operation in _operations(graph) for finding in _look(operation, layers))
    return sorted(found, key=lambda each: each.level)


def _operations(graph: Any) -> Iterator[Any]:
    yield from graph.get_operations()
    # Bodies of loops and branches are functions of the graph, traced under the names of their own operations.
    for name in graph._functions:
        inner = getattr(graph._functions[name], "graph", None)
        if inner is not None:
            yield from inner.get_operations()


def _look(operation: Any, layers: Collection[str]) -> Iterator[Finding]:
    layer = next((part for part in reversed(list(_parts(operation.name))) if part in layers), "")
    kind = operation.type
    if kind in HOST:
        yield Finding(
            "error",
            layer,
            f"{kind} {HOST[kind]}, which only a host can do; do it in preprocessing, or write it in keras.ops",
        )
    if kind in DYNAMIC:
        yield Finding(
            "error",
            layer,
            f"{kind} gives as many values as the data ask for, and a TPU needs shapes that are known; use a mask and keras.ops.where with three arguments",
        )
    for tensor in operation.outputs:
        name, rank = tensor.dtype.base_dtype.name, tensor.shape.rank
        if name == "string":
            yield Finding("error", layer, f"{kind} gives strings; encode them in preprocessing")
        elif name in WIDE and rank:
            yield Finding(
                "note", layer, f"{kind} gives {name}, which a TPU computes in several steps of 32 bits; cast to 32 bits"
            )
        elif rank is not None and kind not in DYNAMIC and not tensor.shape.is_fully_defined():
            yield Finding(
                "note",
                layer,
                f"{kind} gives a shape that is not known ({tensor.shape}); give the model static shapes",
            )


def _parts(name: str) -> Iterator[str]:
    """Scopes of an operation's name; Keras numbers a layer's scope from its second call on."""
    for part in name.split("/"):
        yield part
        stem, _, number = part.rpartition("_")
        if number.isdigit():
            yield stem
