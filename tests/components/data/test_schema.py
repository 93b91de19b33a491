import numpy as np
import pytest

from components.data.schema import Peek, class_names, guess_task, infer, rough_spec
from components.errors import ConfigError, DataError
from components.options import ArraysSource, ColumnOptions, CsvSource, FeatureSelection, PreprocessOptions, SplitOptions

SOURCE = CsvSource(kind="csv", train=["a.csv"], label="y", missing=["", "?"])
SEEN = Peek(
    kind="table",
    columns=("n", "t", "empty", "user", "y"),
    sample={"n": ["1", " ?", "2.5"], "t": ["a", "b", "7"], "empty": ["", "?", ""], "user": ["1", "1", "2"], "y": ["0"]},
    labels=["0", "1"],
)


def kinds(**options):
    return {c.name: c.kind for c in infer(SEEN, SOURCE, PreprocessOptions(**options), None).columns}


def test_columns_are_numbers_where_every_cell_is_one_and_categories_else():
    assert kinds() == {"n": "number", "t": "category", "empty": "category", "user": "number"}


def test_options_override_what_was_inferred():
    chosen = {"n": ColumnOptions(kind="category"), "t": ColumnOptions(kind="ignore")}
    assert kinds(columns=chosen) == {"n": "category", "empty": "category", "user": "number"}


def test_the_group_column_is_no_feature():
    assert "user" not in kinds(splits=SplitOptions(group="user"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"tt": ColumnOptions()}}, r"preprocess.columns: a column .* got 'tt'; did you mean 't'\?"),
        ({"columns": {"y": ColumnOptions()}}, "preprocess.columns.y: the label is no feature"),
        ({"splits": SplitOptions(group="zzz")}, "preprocess.splits.group: .* got 'zzz'; known: n, t, empty, user, y"),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_the_nearest_name(options, message):
    with pytest.raises(ConfigError, match=message):
        infer(SEEN, SOURCE, PreprocessOptions(**options), None)


def test_a_table_without_features_is_refused():
    ignored = {name: ColumnOptions(kind="ignore") for name in ("n", "t", "empty", "user")}
    with pytest.raises(DataError, match="at least one column beside the label 'y' must be a feature"):
        infer(SEEN, SOURCE, PreprocessOptions(columns=ignored), None)


def test_arrays_are_not_selected_from():
    source = ArraysSource(kind="arrays", train="a.npz")
    seen = Peek(kind="values", shape=(3,), labels=[0, 1])
    with pytest.raises(ConfigError, match="only the columns of a csv source are selected, got arrays"):
        infer(seen, source, PreprocessOptions(select=FeatureSelection(keep=1)), None)


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["yes", "no"], "classification"),
        (["0", "1"], "classification"),
        ([0.5, 1.0], "regression"),
        (list(range(21)), "regression"),
        (list(range(20)), "classification"),
    ],
)
def test_the_task_follows_from_the_labels(labels, task):
    assert guess_task(labels) == task


def test_classes_are_ordered_by_number_where_all_are_numbers():
    assert class_names(["10", "9", "2"]) == ("2", "9", "10")
    assert class_names(["10", "9", "b"]) == ("10", "9", "b")


def test_the_rough_shape_of_pictures_is_exact():
    seen = Peek(kind="image", shape=(32, 48, 3), labels=["cat", "dog"])
    options = PreprocessOptions(image_size=(16, 16), image_channels=1)
    spec = rough_spec(seen, infer(seen, SOURCE, options, None))
    assert (spec.input_name, spec.input_shape, spec.labels) == ("image", (16, 16, 1), ("cat", "dog"))


def test_the_rough_width_of_a_table_counts_what_was_seen():
    spec = rough_spec(SEEN, infer(SEEN, SOURCE, PreprocessOptions(), None))
    assert spec.input_shape == (1 + (2 + 3) + (2 + 2) + 1,)
    assert np.prod(spec.input_shape) == 11
