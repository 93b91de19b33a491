"""What `plan` says of a configuration before the first second of work."""

import re

import keras
import pytest

from pipeline.config import from_dict
from pipeline.plan import make_plan
from pipeline.preflight import check, impossible


def test_a_teacher_that_does_not_fit_the_data_is_told_before_the_run(tmp_path):
    image = keras.Input((8, 8, 1))
    keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image))).save(tmp_path / "wrong.keras")
    for section in ("train", "compress"):
        value = {
            "name": "t",
            "source": {"kind": "digits"},
            "model": {"name": "cnn"},
            "workspace": str(tmp_path),
            "compress": {"recipes": ["int8"]},
        }
        value[section] = {**value.get(section, {}), "distill": {"teacher": [str(tmp_path / "wrong.keras")]}}
        (finding,) = check(make_plan(from_dict(value)))
        assert (finding.level, finding.text) == (
            "error",
            f"{section}.distill.teacher: teacher wrong.keras must take (8, 8, 1) and return (10,) as the data have it, "
            "got [(8, 8, 1), (3,)]; name one that was trained on data of this shape.",
        )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"privacy": {"noise": 1.0}}, r"train\.privacy: layer 'conv1_norm' \(BatchNormalization\) mixes the examples"),
        (
            {"transfer": {"frozen": ["stem"]}},
            r"train\.transfer\.frozen: 'stem' names no layer of the model; it has conv1",
        ),
        ({"batch_size": 30, "accumulate": 4}, r"train\.batch_size=30 must divide by train\.accumulate=4"),
    ],
)
def test_a_training_that_cannot_be_is_told_before_the_run(train, message, tmp_path):
    value = {"name": "t", "source": {"kind": "digits"}, "model": {"name": "cnn"}, "workspace": str(tmp_path)}
    (finding,) = check(make_plan(from_dict({**value, "compress": {"recipes": ["int8"]}, "train": train})))
    assert finding.level == "error"
    assert re.match(message, finding.text)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"layout": {"stem": 0}}, r"strategy\.layout: 'stem' names no layer of the model; it has conv1"),
        ({"devices": 3}, r"strategy\.devices=3 asks for more than the 2 CPU devices of this machine"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_told_before_the_run(strategy, message, tmp_path, two_devices):
    value = {"name": "t", "source": {"kind": "digits"}, "model": {"name": "cnn"}, "workspace": str(tmp_path)}
    value |= {"compress": {"recipes": ["int8"]}, "strategy": {"name": "split", **strategy}}
    (finding,) = check(make_plan(from_dict(value)))
    assert finding.level == "error"
    assert re.match(message, finding.text)


def test_what_a_trained_model_does_not_allow_is_found_out_once(tmp_path):
    exclude = {"compress": {"recipes": "auto", "prune": {"exclude": ["head"]}}}
    base = {"name": "t", "source": {"kind": "digits"}, "model": {"name": "cnn"}, "workspace": str(tmp_path), **exclude}
    plan = make_plan(from_dict(base))
    folder = plan.store.folder(next(step for step in plan.steps if step.name == "train").key)
    folder.mkdir(parents=True)
    image = keras.Input((8, 8, 1))
    keras.Model(image, keras.layers.Dense(10, name="head")(keras.layers.Flatten()(image))).save(folder / "model.keras")
    steps = ["prune@0.5", "cluster@16", "qat"]
    assert impossible(plan, steps, ask=False) is None
    found = impossible(plan, steps, ask=True)
    assert found == {"prune@0.5": "prune finds nothing to work on in this model."}
    (folder / "model.keras").unlink()
    longer = make_plan(from_dict({**base, "compress": {**exclude["compress"], "budget": "2h"}}))
    assert impossible(longer, steps, ask=False) == found
