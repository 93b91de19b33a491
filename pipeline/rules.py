"""What the configuration allows at a place, in words: read from its JSON Schema, so words and checks cannot part.

pydantic's errors --told()--> one line: FILE:LINE: section.key rule, got value; next step.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipeline.yaml_text import KeyPath, dotted, shown

Schema = Mapping[str, Any]


class Spot(NamedTuple):
    """Where a value was written: `text` as 'my.yaml:12' or '--set a.b=c', and the folder its relative paths start at."""

    line: int
    text: str
    base: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where each value of a configuration was written.

    Attributes:
      whole: The spot of what has none of its own; empty text for a configuration made in Python.
      spots: Path of a value -> its spot.
    """

    whole: Spot
    spots: dict[KeyPath, Spot] = dataclasses.field(default_factory=dict)

    def spot(self, path: KeyPath) -> Spot:
        """The spot of `path`, or of the nearest section around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.spots:
                return self.spots[path[:end]]
        return self.whole

    def line(self, path: KeyPath, text: str) -> str:
        """`text` as one line that starts with the place."""
        place = self.spot(path).text
        return " ".join(f"{place}: {text}".splitlines()) if place else " ".join(text.splitlines())


def told(errors: Iterable[Mapping[str, Any]], data: Any, schema: Schema, origin: Origin) -> str:
    """The first of pydantic's errors in our words, and how many more there are.

    Args:
      errors: `pydantic.ValidationError.errors()`.
      data: The values that were refused.
      schema: JSON Schema of what was expected.
      origin: Where the values were written.
    """
    found: dict[KeyPath, tuple[bool, int, str]] = {}
    for error in errors:
        path, words = _explain(error, data, schema)
        # A misspelt key is both unknown and missing: the unknown one tells more, so what is missing comes last.
        found.setdefault(path, (error["type"] == "missing", origin.spot(path).line, origin.line(path, words)))
    (_, _, first), *rest = sorted(found.values(), key=lambda each: each[:2])
    return f"{first} (and {len(rest)} more)" if rest else first


def _explain(error: Mapping[str, Any], data: Any, schema: Schema) -> tuple[KeyPath, str]:
    """(path, rule with value and next step) of one error."""
    path, around, node = locate(schema, error["loc"])
    value = _look_up(data, path)
    match error["type"]:
        case "impossible":
            return tuple(error["ctx"]["path"]), error["ctx"]["rule"]
        case "value_error":
            return path, f"{dotted(path)}: {error['ctx']['error']}."
        case "missing" if isinstance(path[-1], str):
            section = dotted(path[:-1])
            inside = f" in section '{section}'" if section else ""
            return path, f"{dotted(path)} must be given, got nothing; add '{path[-1]}: ...'{inside}, {describe(node)}."
        case "extra_forbidden":
            return path, f"{dotted(path)} {unknown_key(around, path, value)}"
        case "union_tag_invalid" | "union_tag_not_found":
            kind = node["discriminator"]["propertyName"]
            path, node = (*path, kind), {"enum": list(node["discriminator"]["mapping"])}
            value = _look_up(data, path)
        case "missing":  # a list that is too short: pydantic names the first place that is empty
            path, node = path[:-1], around
            value = _look_up(data, path)
    return (
        path,
        f"{dotted(path) or 'the configuration'} must be {describe(node)}, got {shown(value)}; {_next(node, value)}.",
    )


def unknown_key(around: Schema, path: KeyPath, value: Any) -> str:
    """Rule, value and next step for a key that the section `around` does not have."""
    legal = list(around.get("properties", {}))
    near = nearest(str(path[-1]), legal)
    step = f"did you mean '{near}'?" if near else f"use one of {', '.join(legal)}."
    return f"is not a key of {dotted(path[:-1]) or 'the configuration'}, got {shown(value)}; {step}"


def nearest(word: str, legal: Iterable[str]) -> str | None:
    """The legal word that `word` was probably meant to be."""
    close = difflib.get_close_matches(word.lower(), list(legal), n=1)
    return close[0] if close else None


def locate(schema: Schema, place: Iterable[str | int]) -> tuple[KeyPath, Schema, Schema]:
    """Follows pydantic's place of an error through the schema.

    Pydantic's places hold the branch of a union too: ('source', 'csv', 'label') is 'source.label' to the user.

    Returns:
      The path as the user writes it, the section that holds its last key, and what is allowed there ({} if unknown).
    """
    path: KeyPath = ()
    around, node = schema, schema
    for part in place:
        here = resolve(schema, node)
        if part in here.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": here["discriminator"]["mapping"][part]}
            continue
        inside = _inside(here, part)
        if inside is None and not _is_section(here):
            break  # the branch of a union of plain types: the whole value is at fault
        path, around, node = (*path, part), here, inside or {}
    return path, resolve(schema, around), resolve(schema, node)


def _inside(node: Schema, part: str | int) -> Schema | None:
    if isinstance(part, int):
        return node.get("items") or (node.get("prefixItems", [])[part:] or [None])[0]
    free = node.get("additionalProperties")
    return node.get("properties", {}).get(part) or (free if isinstance(free, dict) else None)


def _is_section(node: Schema) -> bool:
    return node.get("type") == "object"


def resolve(schema: Schema, node: Schema) -> Schema:
    """`node` with its reference followed; of 'this or null', this."""
    if "$ref" in node:
        target = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return {**resolve(schema, target), **{key: value for key, value in node.items() if key != "$ref"}}
    some = [each for each in node.get("anyOf", []) if each.get("type") != "null"]
    if len(some) == 1:
        outer = {key: value for key, value in node.items() if key != "anyOf"}
        return {**resolve(schema, some[0]), **outer, "nullable": True}
    return node


def describe(node: Schema) -> str:
    """What is allowed, to follow the words 'must be': 'a whole number of at least 1, or null'."""
    if "anyOf" in node:
        return " or ".join(describe(each) for each in node["anyOf"])
    return _describe(node) + (", or null" if node.get("nullable") else "")


def _describe(node: Schema) -> str:
    if "discriminator" in node:
        kinds = ", ".join(node["discriminator"]["mapping"])
        return f"a section with '{node['discriminator']['propertyName']}', one of {kinds}"
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "const" in node:
        return f"{node['const']}"
    match node.get("type"):
        case "integer":
            return "a whole number" + _range(node)
        case "number":
            return "a number" + _range(node)
        case "array":
            return _describe_list(node)
    plain = {"boolean": "true or false", "string": "text", "object": "a section of keys", "null": "null"}
    words = plain.get(node.get("type", ""), "a value that trimline knows")
    return "one character" if node.get("maxLength") == 1 else words


def _describe_list(node: Schema) -> str:
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {describe(node['prefixItems'][0])}"
    return ("a list of at least one, each " if node.get("minItems") else "a list, each ") + describe(node["items"])


def _range(node: Schema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {node[key]}" for key, word in words.items() if key in node]
    return " " + " and ".join(bounds) if bounds else ""


def _next(node: Schema, value: Any) -> str:
    near = nearest(value, map(str, node.get("enum", []))) if isinstance(value, str) else None
    if near is not None:
        return f"write {near}"
    if node.get("type") == "string" and isinstance(value, bool | int | float):
        return f"put it in quotes: '{shown(value)}'"
    if any(each.get("type") == "array" for each in node.get("anyOf", [node])) and isinstance(value, str | int | float):
        return f"put it in brackets: [{value}]"
    if "default" in node:
        default = node["default"]
        return "leave it out for the default" + ("" if isinstance(default, dict | list) else f", {shown(default)}")
    return "'trimline schema' lists every key and its range"


def _look_up(data: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
