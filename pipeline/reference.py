"""Every key of the configuration as a page of Markdown: `make docs` writes docs/configuration.md with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import json_schema
from pipeline.rules import Schema, describe, resolve
from pipeline.yaml_text import shown

_HEAD = """# The configuration

Written by `make docs` from the options themselves; do not edit. `trimline schema --out trimline.schema.json` gives an
editor the same knowledge.

A configuration is a YAML file. `trimline run my.yaml` reads it, `trimline init TEMPLATE` writes a commented one to start
from, and `--set train.epochs=5` overrides one key on the command line. Only `name`, `source` and `model` must be given.

- `${NAME}` in a path stands for an environment variable, `~` for the home folder. A relative path starts at the folder of
  the file that holds it; one on the command line, and `workspace`, at the current folder.
- Words and numbers are those of YAML 1.2: `1e-3` is a number, `yes` is text. Anchors, aliases and tags are refused.
- Whatever is wrong is one line: place, rule, value, next step; the exit code is 2.
"""


def reference() -> str:
    """The page. A pure function of the options, so a test can tell whether docs/configuration.md is up to date."""
    schema = json_schema()
    lines = [_HEAD, "## The whole", "", *_table(schema, schema)]
    for name, node in schema["properties"].items():
        lines += _section(schema, name, resolve(schema, node))
    return "\n".join(lines).rstrip() + "\n"


def _section(schema: Schema, name: str, node: Schema) -> Iterator[str]:
    """Heading, words and table of a section, then of the sections inside it."""
    if "discriminator" in node:
        yield from _kinds(schema, name, node)
        return
    inner = _inner(schema, node)
    if inner is not None:
        yield from _section(schema, f"{name}.NAME", inner)
    if not node.get("properties"):
        return
    yield from ("", f"## {name}", "", _words(node), "", *_table(schema, node))
    for key, child in node["properties"].items():
        yield from _section(schema, f"{name}.{key}", resolve(schema, child))


def _kinds(schema: Schema, name: str, node: Schema) -> Iterator[str]:
    """One table for each kind of a section that has several."""
    key = node["discriminator"]["propertyName"]
    yield from ("", f"## {name}", "", f"`{key}` says which of these it is.")
    for kind, target in node["discriminator"]["mapping"].items():
        branch = resolve(schema, {"$ref": target})
        yield from ("", f"### {name}, {key}: {kind}", "", _words(branch), "", *_table(schema, branch))


def _inner(schema: Schema, node: Schema) -> Schema | None:
    """The section that every value of a free mapping is, as `preprocess.columns` has one for each column."""
    free = node.get("additionalProperties")
    inner = resolve(schema, free) if isinstance(free, Mapping) else {}
    return inner if "properties" in inner else None


def _table(schema: Schema, node: Schema) -> Iterator[str]:
    yield "| key | must be | default | |"
    yield "|---|---|---|---|"
    for key, child in node["properties"].items():
        allowed = resolve(schema, child)
        words = "" if "properties" in allowed else child.get("description", "")
        cells = (f"`{key}`", describe(allowed), _default(node, key, allowed), words)
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(section: Schema, key: str, node: Schema) -> str:
    if key in section.get("required", []):
        return "required"
    default: Any = node.get("default")
    return "see below" if isinstance(default, dict) and default else f"`{shown(default, 200)}`"


def _words(node: Schema) -> str:
    return " ".join(node.get("description", "").split())


if __name__ == "__main__":
    print(reference(), end="")
