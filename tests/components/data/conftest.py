"""A table and pictures, prepared."""

import pathlib

import pytest

from components.artifacts import PreparedData
from tests.components.data.stored import (
    PICTURE_TRANSFORM,
    PICTURES,
    TABLE,
    TABLE_TRANSFORM,
    cut,
    picture_columns,
    prepared,
    table_columns,
)


@pytest.fixture
def table(tmp_path: pathlib.Path) -> PreparedData:
    return prepared(
        tmp_path / "table",
        TABLE,
        TABLE_TRANSFORM,
        {"train": cut(table_columns(100), 3), "validation": cut(table_columns(21), 2)},
    )


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> PreparedData:
    splits = {"train": cut(picture_columns(600), 3), "test": cut(picture_columns(19), 1), "calibration": [[]]}
    return prepared(tmp_path / "pictures", PICTURES, PICTURE_TRANSFORM, splits)
