"""A configuration that is complete, and what is said of one that is not."""

import pathlib

import pytest

from components.errors import ConfigError
from pipeline.config import load_config

BASE = "name: mine\nsource: {kind: csv, train: [rows.csv], label: y}\nmodel: {name: mlp}\n"
DIGITS = {"name": "mine", "source": {"kind": "digits"}, "model": {"name": "mlp"}}


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty current folder with one table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("y,a\n1,2\n")
    return tmp_path


def refusal(text: str | bytes, *overrides: str) -> str:
    """The error of `my.yaml` in the current folder."""
    pathlib.Path("my.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as refused:
        load_config("my.yaml", overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)
