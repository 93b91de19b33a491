import numpy as np
import pytest

from components.data.blocks import read_blocks
from components.data.preprocess import preprocess
from components.errors import ContractError, DataError
from components.options import ColumnOptions, CsvSource, PreprocessOptions
from components.tracing import Trace


def write(path, centre, words="abc", labels=("no", "yes"), header="x,word,y", rows=400):
    draw = np.random.default_rng(int(centre))
    lines = [
        f"{draw.normal(centre, 2):.3f},{words[draw.integers(len(words))]},{labels[row % len(labels)]}"
        for row in range(rows)
    ]
    path.write_text("\n".join([header, *lines]) + "\n")
    return CsvSource(kind="csv", train=[str(path)], label="y")


def prepare(source, folder, **options):
    folder.mkdir()
    return preprocess(source, PreprocessOptions(**options), folder, task=None, seed=0, trace=Trace())


@pytest.fixture
def first(tmp_path):
    return prepare(write(tmp_path / "old.csv", 10, labels=("maybe", "no", "yes")), tmp_path / "old")


def test_new_data_are_made_into_features_as_the_earlier_were(first, tmp_path):
    source = write(tmp_path / "new.csv", 50, words="bd?", labels=("yes", "no"))
    file = str(first.folder / "transform.json")
    data = prepare(source, tmp_path / "new", transform=file)
    assert (data.transform, data.spec) == (first.transform, first.spec)
    numbers = np.concatenate([block["numbers"] for path in data.files("train") for block in read_blocks(path)])
    (column,) = (column for column in first.transform["columns"] if column["kind"] == "number")
    assert numbers.mean() * column["std"] + column["mean"] == pytest.approx(50, abs=0.5)  # its own fit would give 10
    seen = {label: count > 0 for label, count in data.manifest["class_counts"]["train"].items()}
    assert seen == {"maybe": False, "no": True, "yes": True}
    gone = {each["name"]: each["missing"] for each in data.manifest["features"]}
    assert gone["word"] > 50  # '?' of the new data, of which the earlier had none
    assert next(each for each in first.manifest["features"] if each["name"] == "word")["missing"] == 0


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"header": "z,word,y"}, {}, r"whose columns are x, word, got z, word; make them agree"),
        ({"words": "123"}, {}, r"whose columns have kind=category for 'word', got kind=number"),
        (
            {},
            {"columns": {"x": ColumnOptions(rule="none")}},
            r"whose columns have rule=standardise for 'x', got rule=none",
        ),
        ({"labels": ("yes", "perhaps")}, {}, r"classes must be among those of .*, maybe, no, yes, got 'perhaps'"),
        ({"labels": ("0.5", "1.5")}, {}, r"whose task is 'classification', got 'regression'"),
    ],
)
def test_another_schema_is_refused_by_what_differs(first, tmp_path, more, options, message):
    source = write(tmp_path / "new.csv", 50, **more)
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path / "new", transform=str(first.folder / "transform.json"), **options)


def test_a_transform_without_its_schema_is_refused(first, tmp_path):
    alone = tmp_path / "transform.json"
    alone.write_bytes((first.folder / "transform.json").read_bytes())
    with pytest.raises(ContractError, match=r"schema\.json: a readable JSON file was promised"):
        prepare(write(tmp_path / "new.csv", 50), tmp_path / "new", transform=str(alone))
