"""A trained model in the place of a configuration's model and training."""

import pathlib

import pytest

from components.errors import ConfigError
from pipeline.config import load_config


@pytest.fixture
def model(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my model (v2).keras"
    file.write_bytes(b"looked at later")
    return file


def test_a_template_gives_its_data_and_recipes_and_the_model_its_name(model):
    before, config = load_config("digits"), load_config("digits", model=model.name)
    assert config.name == "my-model-v2"
    assert config.model.file == str(model)
    assert (config.model.name, config.model.options) == (None, {})
    assert config.train.epochs == 0
    assert config.train.batch_size == before.train.batch_size
    assert config.train.augmentation == before.train.augmentation
    assert (config.source, config.preprocess, config.compress) == (before.source, before.preprocess, before.compress)


def test_overrides_come_last(model):
    config = load_config("digits", ["name=other", "train.batch_size=7", "model.outputs=probabilities"], model=model)
    assert (config.name, config.train.batch_size, config.model.outputs) == ("other", 7, "probabilities")


@pytest.mark.parametrize(("data", "kind"), [("photos", "images"), ("rows.npz", "arrays")])
def test_data_alone_are_enough_where_they_hold_their_labels(model, tmp_path, data, kind):
    (tmp_path / "photos").mkdir()
    (tmp_path / "rows.npz").write_bytes(b"looked at later")
    config = load_config(data, model=model)
    assert (config.source.kind, config.source.train) == (kind, str(tmp_path / data))


def test_a_table_alone_is_refused_with_the_next_step(model):
    with pytest.raises(
        ConfigError, match=r"--data t\.csv: a table needs a configuration that names its label; write one"
    ):
        load_config("t.csv", model=model)


def test_a_model_that_is_not_there_is_named_as_it_was_given(model):
    with pytest.raises(ConfigError, match=r"^gone\.keras: model\.file must be a file that exists, got '.*gone\.keras'"):
        load_config("digits", model="gone.keras")


def test_no_epochs_for_a_model_of_the_zoo_are_refused():
    with pytest.raises(
        ConfigError, match=r"train\.epochs=0 takes a model as it is, .* got model\.name=cnn; give model"
    ):
        load_config("digits", ["train.epochs=0"])


def test_a_strategy_of_the_base_training_alone_is_left_out(model, tmp_path):
    text = "source: {kind: digits}\nmodel: {name: mlp}\nname: x\ncompress: {recipes: [int8]}\nstrategy: "
    (tmp_path / "split.yaml").write_text(text + "{name: split, devices: 2, layout: {dense.*: 1}}\n")
    assert load_config("split.yaml", ["compress.recipes=[prune+qat]"], model=model).strategy.name == "default"
    (tmp_path / "two.yaml").write_text(text + "{name: mirrored, devices: 2}\n")
    assert load_config("two.yaml", model=model).strategy.devices == 2
    (tmp_path / "team.yaml").write_text(text + "{name: multi_worker, workers: 2}\n")
    searching = ["strategy={}", "compress.recipes=auto"]
    assert load_config("team.yaml", searching, model=model).strategy.name == "default"
