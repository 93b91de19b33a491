"""Again: new data become features exactly as earlier data did, so that a model may go on learning from them.

transform.json of an earlier run, schema of the new data --earlier()--> the same transform, or a refusal
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from components.artifacts import read_json
from components.data.fit import missing
from components.data.schema import Schema, class_names
from components.data.statistics import Statistics
from components.errors import DataError


def earlier(file: pathlib.Path, schema: Schema, stats: Statistics) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `fit` gave an earlier run: means, vocabularies, buckets, selection and the order of the classes are kept.

    Args:
      file: `transform.json` in the folder that an earlier `preprocess` left.
      schema: Of the new data.
      stats: Of the new data; only its labels and the counts of missing cells are used.

    Returns:
      (the transform, what became of each raw feature with `missing` counted in the new data).

    Raises:
      ContractError: The folder lacks schema.json or manifest.json, or holds something else.
      DataError: The new data have another schema, or a class that the earlier ones had not.
    """
    made = read_json(file)
    before, now = read_json(file.with_name("schema.json")), json.loads(json.dumps(schema.to_json()))
    for key in [key for key in now if now[key] != before.get(key)]:
        was, found = _difference(before.get(key), now[key])
        raise DataError(
            f"preprocess.transform: the data must have the schema of {file.with_name('schema.json')}, whose {key} "
            f"{was}, got {found}; make them agree, or train a new model without it."
        )
    names = made["label"].get("names", [])
    new = [name for name in class_names(list(stats.labels)) if name not in names] if names else []
    if new:
        raise DataError(
            f"preprocess.transform: the classes must be among those of {file}, {', '.join(names[:10])}, got '{new[0]}'; "
            "leave its rows out, or train a new model without it."
        )
    features = read_json(file.with_name("manifest.json"))["features"]
    return made, [
        each | {"missing": missing(each["name"], schema, stats)} if "missing" in each else each for each in features
    ]


def _difference(before: Any, now: Any) -> tuple[str, str]:
    """Both in words; of columns the first that differs."""
    if not isinstance(before, list) or not isinstance(now, list) or not all(isinstance(each, dict) for each in now):
        return f"is {before!r}", repr(now)
    was, found = ({column["name"]: column for column in columns} for columns in (before, now))
    if list(was) != list(found):
        return f"are {', '.join(was)}", ", ".join(found)
    name = next(name for name in was if was[name] != found[name])
    key = next(key for key in was[name] if was[name][key] != found[name].get(key))
    return f"have {key}={was[name][key]} for '{name}'", f"{key}={found[name].get(key)}"
