"""Who teaches, and in what the stages get them."""

import keras
import numpy as np

from components.artifacts import write_json
from components.tracing import Trace
from pipeline.config import from_dict
from pipeline.stage import Call
from pipeline.teachers import teachers

SPEC = {"task": "classification", "input_name": "features", "input_shape": [4], "labels": ["a", "b"]}


def saved(folder, seed: int):
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(seed)
    rows = keras.Input((4,))
    model = keras.Model(rows, keras.layers.Dense(2)(rows))
    model.save(folder / "model.keras")
    return model


def call(tmp_path, section: str = "compress", **distill) -> Call:
    value = {"name": "t", "source": {"kind": "digits"}, "model": {"name": "mlp"}}
    value[section] = {"distill": distill}
    write_json(tmp_path / "manifest.json", {"spec": SPEC})
    write_json(tmp_path / "train" / "trained.json", {"outputs": "probabilities"})
    takes = {"preprocess": tmp_path, "train" if section == "compress" else "train teacher": tmp_path / "train"}
    return Call("compress qat", from_dict(value), tmp_path, takes, takes.__getitem__, None, {}, (), {}, {}, Trace())


def test_the_base_teaches_with_the_outputs_that_it_was_trained_with_and_files_with_their_own(tmp_path):
    base, other = saved(tmp_path / "train", 1), saved(tmp_path / "other", 2)
    x = np.ones((3, 4), np.float32)
    (teacher,) = teachers(call(tmp_path), "compress")()
    assert teacher.outputs == "probabilities"
    np.testing.assert_array_equal(teacher.answer(x), base(x))
    files = [str(tmp_path / name / "model.keras") for name in ("other", "train")]
    first, second = teachers(call(tmp_path, teacher=files), "compress")()
    assert (first.outputs, second.outputs) == ("logits", "logits")
    np.testing.assert_array_equal(first.answer(x), other(x))
    np.testing.assert_array_equal(second.answer(x), base(x))


def test_the_model_that_was_trained_to_teach_teaches_the_base_training(tmp_path):
    large = saved(tmp_path / "train", 1)
    (teacher,) = teachers(call(tmp_path, "train", teacher_model={"name": "cnn"}), "train")()
    assert teacher.outputs == "probabilities"
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(teacher.answer(x), large(x))
