import json

from pipeline.config import load_config
from pipeline.find_rate import find_rate
from pipeline.screen import Screen


def test_a_template_is_tested_and_nothing_but_its_data_prepared(tmp_path):
    changes = [
        f"workspace={tmp_path}",
        "model.name=mlp",
        "model.options={units: [16]}",
        "train.optimizer.learning_rate=0.004",
    ]
    found, picture = find_rate(load_config("digits", changes), Screen.silent())
    assert 1e-5 < found.suggested < 0.1
    assert picture == tmp_path / "digits" / "find_rate.png"
    assert picture.stat().st_size > 5000
    told = json.loads((tmp_path / "digits" / "find_rate.json").read_text())
    assert told["suggested"] == found.suggested
    assert len(told["rates"]) == len(told["losses"]) == len(told["smoothed"]) > 100
    assert [path.name for path in (tmp_path / "store").iterdir() if path.is_dir()] == ["preprocess"]
    assert list((tmp_path / "digits" / "tensorboard" / "find-rate").iterdir())
