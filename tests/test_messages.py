"""What an error tells the user to change must be there to be changed."""

import ast
import pathlib
import re

import pydantic
import pytest

from pipeline.config import Config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(path for room in ("components", "pipeline") for path in (ROOT / room).rglob("*.py"))
# A key in a sentence: words joined by dots, before a blank, '=', ':' or the end of the sentence.
KEY = re.compile(r"(?<![\w./'-])([a-z_]+(?:\.[a-z_]+)+)(?=[ =:,;)]|\.? |\.?$)")
FILES = re.compile(r"\.(py|keras|json|yaml|csv|tflite|npz|txt|html)$")
FIRST = {*Config.model_fields, "data", "dataset", "splits"}  # the last three: what a slip would start with


def models(kind) -> list[type[pydantic.BaseModel]]:
    """The option models in an annotation: one, or those of a union."""
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return [kind]
    return [found for part in getattr(kind, "__args__", ()) for found in models(part)]


def legal(key: str) -> bool:
    """True where every part of `key` is a field; below a mapping by the user's own names anything may stand."""
    kinds = [Config]
    for part in key.split("."):
        fields = [each.model_fields[part].annotation for each in kinds if part in each.model_fields]
        if any(str(field).startswith("dict[") for field in fields):
            return True
        if not fields:
            return False
        kinds = [each for field in fields for each in models(field)]
    return True


def messages(path: pathlib.Path) -> list[str]:
    """The texts of all errors that a file raises, with blanks for what is filled in."""
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise) and node.exc]
    texts = []
    for text in (each for node in raised for each in ast.walk(node) if isinstance(each, ast.JoinedStr | ast.Constant)):
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts))
    return texts


def test_the_check_itself_tells_a_key_from_a_slip():
    assert legal("preprocess.splits.calibration")
    assert legal("source.train")
    assert legal("preprocess.columns.x.rule")
    assert not legal("data.splits.calibration")
    assert not legal("train.epohcs")
    assert KEY.findall("raise data.splits.test or train.epochs=3; see model.keras.") == [
        "data.splits.test", "train.epochs", "model.keras",
    ]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_that_a_message_names_exists(path):
    named = {key for text in messages(path) for key in KEY.findall(text) if not FILES.search(key)}
    assert {key for key in named if key.split(".")[0] in FIRST and not legal(key)} == set()
