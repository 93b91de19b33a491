"""The configuration of a run: YAML in, one frozen and checked `Config` out.

    my.yaml or a template's name, --set overrides --load_config()--> Config

Every fault is one line: FILE:LINE: section.key rule, got value; next step. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic
import pydantic_core
from pydantic import Field

from components.errors import ConfigError
from components.options import (
    AUTO,
    BundleOptions,
    CompressOptions,
    ExportOptions,
    ImagesSource,
    MeasureOptions,
    ModelOptions,
    Options,
    PreprocessOptions,
    SelectOptions,
    Source,
    StrategyOptions,
    TextSource,
    TrainOptions,
    TuneOptions,
)
from pipeline import adopt, rules, yaml_text
from pipeline.contradictions import NAME, contradictions
from pipeline.rules import Origin, Spot
from pipeline.yaml_text import KeyPath, dotted, shown

_TEMPLATES = pathlib.Path(__file__).with_name("templates")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Config(Options):
    """Everything that a run depends on. `load_config` makes one; paths are absolute, save `workspace`."""

    name: str = Field(
        description="Name of the run and of its folder: letters, digits, '.', '_', '-'; at most 64.",
        json_schema_extra={"pattern": f"^{NAME}$"},
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Everything random follows from it.")
    task: Literal["auto", "classification", "regression"] = Field("auto", description="auto: from the labels.")
    workspace: str = Field(
        "workspace", min_length=1, description="Folder of runs and of cached work, relative to the current one."
    )
    source: Source
    preprocess: PreprocessOptions = PreprocessOptions()
    model: ModelOptions
    strategy: StrategyOptions = StrategyOptions()
    train: TrainOptions = TrainOptions()
    compress: CompressOptions = CompressOptions()
    export: ExportOptions = ExportOptions()
    measure: MeasureOptions = MeasureOptions()
    select: SelectOptions = SelectOptions()
    bundle: BundleOptions = BundleOptions()
    tune: TuneOptions | None = None

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Config:
        """Refuses what no single key shows to be wrong."""
        for path, rule in contradictions(self):
            raise pydantic_core.PydanticCustomError("impossible", "{rule}", {"path": path, "rule": rule})
        return self


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    model: str | os.PathLike[str] | None = None,
) -> Config:
    """Reads and checks a configuration.

    `${NAME}` in a path stands for an environment variable. A relative path starts at the file's folder; in an override,
    a template or a mapping, at the current folder.

    Args:
      source: A YAML file, the name of a template, or the values themselves.
      overrides: 'a.b=c', value in YAML, as after `--set` on the command line.
      model: A trained `.keras` file that takes the place of the configuration's model and training. `source` may then be
        the data themselves: a folder of class folders, or an `.npz` file.

    Raises:
      ConfigError: Whatever is wrong, the first of it, with its place.
    """
    if model is not None and not isinstance(source, Mapping):
        source = adopt.data_alone(pathlib.Path(source)) or source
    data, origin = _values(source) if isinstance(source, Mapping) else _read(source)
    if model is not None:
        adopt.adopt(data, origin, model)
    for override in overrides:
        _override(data, origin, override)
    if isinstance(data, dict):
        _resolve_paths(data, origin)
    return _checked(data, origin)


def from_dict(values: Mapping[str, Any]) -> Config:
    """`load_config` for values at hand: `from_dict({"name": "mine", "source": {"kind": "digits"}, "model": {...}})`."""
    return load_config(values)


def searching(budget: str | None) -> list[str]:
    """What `--budget` stands for, as overrides; none where it is None."""
    return [] if budget is None else [f"compress.recipes={AUTO}", f"compress.budget={json.dumps(budget)}"]


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` takes back unchanged."""
    return yaml_text.write(config.model_dump(mode="json"))


def templates() -> list[str]:
    """Names of the templates that ship with trimline."""
    return sorted(file.stem for file in _TEMPLATES.glob("*.yaml"))


def template_text(name: str) -> str:
    """A template as it is written, comments and all.

    Raises:
      ConfigError: There is none of that name.
    """
    if name not in templates():
        raise ConfigError(f"template '{name}': there is none of that name; use one of {', '.join(templates())}.")
    return (_TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8")


@functools.cache
def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, for completion and checks in an editor."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "trimline configuration",
    }


# --- reading -----------------------------------------------------------------------------------------------------


def _read(source: str | os.PathLike[str]) -> tuple[Any, Origin]:
    """Values of a file or template, and where each was written."""
    file = pathlib.Path(source)
    if isinstance(source, str) and source in templates():
        where, base, text = f"template {source}", pathlib.Path.cwd(), template_text(source)
    else:
        where, base, text = _printable(str(source)), file.absolute().parent, _file_text(file)
    data, lines = yaml_text.read(text, where)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}:1: a configuration must be a section of keys, got {shown(data)}; 'trimline init digits' writes one."
        )
    spots = {path: Spot(line, f"{where}:{line}", base) for path, line in lines.items()}
    return data, Origin(Spot(1, f"{where}:1", base), spots)


def _file_text(file: pathlib.Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: must be UTF-8 text, got byte {error.start} that is not; save it as UTF-8."
        ) from None
    except (FileNotFoundError, ValueError):
        near = difflib.get_close_matches(str(file), templates(), n=1)
        meant = f"did you mean the template '{near[0]}'?" if near else f"templates are {', '.join(templates())}."
        raise ConfigError(f"{shown(str(file))}: there is no such file or template; {meant}") from None
    except OSError as error:
        raise ConfigError(
            f"{_printable(str(file))}: must be a readable file, got '{error.strerror}'; check the path."
        ) from None


def _printable(text: str) -> str:
    """`text`, in quotes where it would break the line of an error or the terminal."""
    return text if text.isprintable() else ascii(text)


def _values(source: Mapping[str, Any]) -> tuple[Any, Origin]:
    return _plain(source, ()), Origin(Spot(0, "", pathlib.Path.cwd()))


def _plain(value: Any, path: KeyPath) -> Any:
    """`value` as YAML would have given it: what Python users pass along is options, tuples, paths, NumPy numbers."""
    if len(path) > yaml_text.DEEPEST:
        raise ConfigError(f"{dotted(path[:3])} must be nested at most {yaml_text.DEEPEST} deep, got more; flatten it.")
    match value:
        case None | bool() | int() | float():
            return value
        case str() if not re.search("[\ud800-\udfff]", value):
            return str(value)
        case os.PathLike():
            return os.fspath(value)
        case pydantic.BaseModel():
            return value.model_dump(mode="json")
        case Mapping():
            return {str(key): _plain(each, (*path, str(key))) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each, (*path, index)) for index, each in enumerate(value)]
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return _plain(value.item(), path)
    raise ConfigError(
        f"{dotted(path)} must be text, a number, true, false, null, a list or a section, got {shown(value)} of type "
        f"{type(value).__name__}; convert it."
    )


def _override(data: dict[str, Any], origin: Origin, override: str) -> None:
    """Puts `a.b=c` into `data`; whether the configuration has such a key is checked with all the rest."""
    place = f"--set {_printable(override)}"
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(
            f"{place}: must be KEY=VALUE, got {shown(override)}; write for instance --set train.epochs=5."
        )
    spot = Spot(0, place, pathlib.Path.cwd())
    inside = data
    for depth, part in enumerate(path[:-1], start=1):
        if not isinstance(inside.get(part), dict):
            inside[part] = {}
            origin.spots[path[:depth]] = spot
        inside = inside[part]
    inside[path[-1]], _ = yaml_text.read(text, place)
    for stale in [each for each in origin.spots if each[: len(path)] == path]:
        del origin.spots[stale]
    origin.spots[path] = spot


# --- paths -------------------------------------------------------------------------------------------------------


def _path_places(data: dict[str, Any]) -> Iterator[tuple[Any, Any, KeyPath]]:
    """(container, key, path) of every text that names a file or folder.

    In every kind of source these are the fields that start with the split whose records they hold; beside it, files of models.
    """
    places: list[tuple[Any, Any, KeyPath]] = [(data, "workspace", ("workspace",))]
    for where in (("model",), ("train", "distill", "teacher_model")):
        if isinstance(model := _at(data, where), dict):
            places += [(model, key, (*where, key)) for key in ("file", "builder")]
    if isinstance(source := data.get("source"), dict):
        for key in filter(lambda key: key.startswith(("train", "test")), source):
            if isinstance(files := source[key], list):
                places += [(files, index, ("source", key, index)) for index in range(len(files))]
            places.append((source, key, ("source", key)))
    if isinstance(preprocess := data.get("preprocess"), dict):
        places.append((preprocess, "transform", ("preprocess", "transform")))
    for section in ("train", "compress"):
        teachers = (section, "distill", "teacher")
        if isinstance(files := _at(data, teachers), list):
            places += [(files, index, (*teachers, index)) for index in range(len(files))]
    for container, key, path in places:
        if isinstance(container, list) or key in container:
            yield container, key, path


def _at(data: Any, path: tuple[str, ...]) -> Any:
    """What stands at `path`, None where nothing does."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _resolve_paths(data: dict[str, Any], origin: Origin) -> None:
    """Expands `${NAME}` and `~`, and starts relative paths at the folder of the file that holds them."""
    for container, key, path in _path_places(data):
        if not isinstance(text := container[key], str):
            continue  # the types are checked later, all at once
        text = os.path.expanduser(_expand(text, path, origin))
        folder = origin.spot(path).base
        if key == "builder":
            place, _, function = text.rpartition(":")
            text = f"{folder / place}:{function}" if place.endswith(".py") else text
        elif key != "workspace":
            text = str(folder / text)
        container[key] = text


def _expand(text: str, path: KeyPath, origin: Origin) -> str:
    """`text` with its environment variables filled in."""
    if not text.strip() or "\0" in text:
        raise ConfigError(
            origin.line(path, f"{dotted(path)} must name a file or folder, got {shown(text)}; write its path.")
        )
    for name in _VARIABLE.findall(text):
        if not os.environ.get(name):
            raise ConfigError(
                origin.line(
                    path,
                    f"{dotted(path)} must get the environment variable {name}, got none set in {shown(text)}; "
                    f"set it: export {name}=FOLDER.",
                )
            )
    return _VARIABLE.sub(lambda match: os.environ[match[1]], text)


def _missing_files(config: Config, origin: Origin) -> Iterator[str]:
    """One line for each file or folder that is named and not there."""
    for container, key, path in _path_places(config.model_dump()):
        text = container[key]
        if key == "workspace" or not isinstance(text, str):
            continue
        if key == "builder":
            text = text.rpartition(":")[0]
            if not text.endswith(".py"):
                continue
        folder = path[0] == "source" and isinstance(config.source, ImagesSource | TextSource)
        if not (os.path.isdir(text) if folder else os.path.isfile(text)):
            rule = f"{dotted(path)} must be {'a folder' if folder else 'a file'} that exists, got {shown(text, 200)}"
            yield origin.line(path, f"{rule}; correct the path.")


# --- checks ------------------------------------------------------------------------------------------------------


def _checked(data: Any, origin: Origin) -> Config:
    try:
        # From JSON, since strict checks of Python values would refuse a list where a tuple is kept.
        config = Config.model_validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(rules.told(error.errors(include_url=False), data, json_schema(), origin)) from None
    if missing := list(_missing_files(config, origin)):
        raise ConfigError(missing[0] + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    return config
