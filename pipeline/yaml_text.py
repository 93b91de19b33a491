"""YAML as a configuration is written: values with the line of each, and back.

Read by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, chapter 10.3), as editors do: `1e-3` is a number, `yes` and `no`
are text. Keys are text always. Anchors, aliases and tags are refused: a configuration says what it means in one place.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from components.errors import ConfigError

KeyPath = tuple[str | int, ...]
DEEPEST = 50  # levels of nesting; the configuration itself has 5
_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """The parser of PyYAML with the core schema's idea of what a plain word is."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As inherited; an alias is refused, since a few nested ones grow to more than memory holds."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not supported, write the value out", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either schema would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> Any:
    # Only this style escapes: in others PyYAML folds exotic line ends (U+0085, U+2028) into spaces.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _name, _pattern, _first in _CORE:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


def read(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parses one document.

    Args:
      text: YAML.
      where: What to call it in an error, usually the file.

    Returns:
      Values of dict, list, str, int, float, bool and None, and for the path of each value the line of its key, from 1.

    Raises:
      ConfigError: Not YAML, a key given twice, an alias, a tag, or nested beyond reason.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        return (None if node is None else _value(node, (), lines, where)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where if mark is None else _place(where, mark.line + 1)
        raise ConfigError(
            f"{place}: must be YAML, got a fault: {error.problem or error.context}; check indentation, colons, "
            "brackets and quotes there."
        ) from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: must be YAML, got a fault: {reason}; save it as plain UTF-8 text.") from None
    except RecursionError:
        raise ConfigError(f"{where}: must be nested at most {DEEPEST} deep, got more; close the brackets.") from None


def _value(node: Any, path: KeyPath, lines: dict[KeyPath, int], where: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(path) > DEEPEST:
        raise ConfigError(
            f"{_place(where, line)}: must be nested at most {DEEPEST} deep, got more; close the brackets."
        )
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, path, lines, where)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(child, (*path, index), lines, where) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and kind in ("str", *(name for name, _, _ in _CORE)):
        return _scalar(kind, node.value, _place(where, line))
    raise ConfigError(
        f"{_place(where, line)}: must be plain YAML, got the tag '{node.tag}'; write the value without a tag."
    )


def _mapping(node: Any, path: KeyPath, lines: dict[KeyPath, int], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"{_place(where, line)}: a key must be one word, got a list or a section; put it in quotes."
            )
        key = key_node.value
        if key in values:
            raise ConfigError(
                f"{_place(where, line)}: {dotted((*path, key))} must be given once, got it in line {lines[*path, key]} too; "
                "remove one of them."
            )
        lines[*path, key] = line
        values[key] = _value(value_node, (*path, key), lines, where)
    return values


def _scalar(kind: str, text: str, place: str) -> Any:
    try:
        if kind == "str":
            text.encode()  # "\ud800" is half a character: no file, screen or JSON parser takes it
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "float":
            return float(text)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2].lower(), 10))
    except ValueError:
        rule = "text of whole characters" if kind == "str" else "a number of at most 4300 digits"
        raise ConfigError(f"{place}: must be {rule}, got {shown(text)}; correct it.") from None


def _place(where: str, line: int) -> str:
    """'my.yaml:12'; what stands on the command line has one line only, and needs no number."""
    return where if where.startswith("--set ") else f"{where}:{line}"


def write(value: Any) -> str:
    """Values of dict, list, str, int, float, bool and None as YAML that `read` takes back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dotted(path: KeyPath) -> str:
    """`('train', 'batch_size')` as 'train.batch_size'; a key that would be misread is quoted, an index in brackets."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." * bool(text) + (part if re.fullmatch(r"[\w-]+", part) else shown(part))
    return text


def shown(value: Any, most: int = 60) -> str:
    """A value as one short line: text in quotes, the rest as YAML calls it."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else ascii(value) if _odd(value) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _odd(value: Any) -> bool:
    return not repr(value).isprintable() or "\ud800" <= max(repr(value)) <= "\udfff"
