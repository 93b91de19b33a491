"""What makes two runs of a stage the same: code, options, inputs, data content and library versions, as one SHA-256.

Code counts by its syntax tree, docstrings left out: a new comment does not retrain a model, a new line of code does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from components.artifacts import read_json, sha256, write_json
from components.errors import ConfigError, ContractError
from pipeline.stage import Stage

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_OURS = ("components", "pipeline", "tpu")
# Leaves that no result depends on: the values of the options count on their own, the rest only words and shows.
_APART = ("components.options", "components.errors", "components.tracing")


def fingerprint(stage: Stage, options: Mapping[str, Any], inputs: Iterable[str], content: Iterable[str]) -> str:
    """The cache key of one step.

    Args:
      stage: Its row in the journey.
      options: The part of the configuration that it depends on, JSON-able.
      inputs: Fingerprints of the artifacts that it takes, in order.
      content: Digests of the user's files that it reads.

    Returns:
      64 hexadecimal digits.
    """
    facts = {
        "stage": stage.name,
        "code": code_digest(stage),
        "options": options,
        "inputs": list(inputs),
        "content": list(content),
        "libraries": {name: _version(name) for name in stage.libraries},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache  # a search lays out hundreds of plans
def code_digest(stage: Stage) -> str:
    """SHA-256 over the stage's function, every module of ours that its modules lead to, and its other files."""
    digest = hashlib.sha256(_tree_text(textwrap.dedent(inspect.getsource(stage.run))).encode())
    for name in sorted(_closure(stage.modules)):
        digest.update(f"{name}\n{_source(name)[1]}\n".encode())
    for name in stage.files:
        digest.update((_ROOT / name).read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(library: str) -> str:
    return importlib.metadata.version(library)


def _closure(modules: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in _APART and _path(name) is not None:
            seen.add(name)
            waiting.extend(_source(name)[0])
    return seen


def _path(module: str) -> pathlib.Path | None:
    base = _ROOT.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _source(module: str) -> tuple[tuple[str, ...], str]:
    """(modules of ours that it imports, its normalised text)."""
    path = _path(module)
    assert path is not None, f"{module} is one of ours"
    text = path.read_text(encoding="utf-8")
    imports: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.add(node.module)
            imports.update(f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(sorted(name for name in imports if name.split(".")[0] in _OURS)), _tree_text(text)


def _tree_text(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


class ContentIndex:
    """Digests of the user's files, remembered by path, size and time of change, so that a plan stays quick.

    Args:
      file: Where they are remembered; a damaged file is forgotten, not trusted.
    """

    def __init__(self, file: pathlib.Path) -> None:
        self._file = file
        try:
            self._known: dict[str, list[Any]] = read_json(file) if file.exists() else {}
        except ContractError:
            self._known = {}
        self._new = False

    def digest(self, path: pathlib.Path) -> str:
        """SHA-256 of a file, or of a folder's names and contents below it.

        Raises:
          ConfigError: There is no such file or folder.
        """
        if path.is_dir():
            digest = hashlib.sha256()
            for file in sorted(each for each in path.rglob("*") if each.is_file()):
                digest.update(f"{file.relative_to(path).as_posix()} {self.digest(file)}\n".encode())
            return digest.hexdigest()
        try:
            facts = path.stat()
        except OSError as error:
            raise ConfigError(
                f"{path}: a file that can be read was expected, got '{error.strerror}'; correct the path."
            ) from error
        stamp = [facts.st_size, facts.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != stamp:
            known = [*stamp, sha256(path)]
            self._known[str(path)] = known
            self._new = True
        return str(known[2])

    def save(self) -> None:
        """Remembers what was learned; a workspace that cannot be written is no obstacle to a plan."""
        if self._new and os.access(self._file.parent if self._file.parent.exists() else ".", os.W_OK):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._known)
            self._new = False
