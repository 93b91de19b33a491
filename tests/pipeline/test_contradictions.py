import pytest

from components.errors import ConfigError
from pipeline.config import from_dict

BASE = {
    "name": "private",
    "source": {"kind": "digits"},
    "model": {"name": "mlp"},
    "compress": {"recipes": ["float32", "int8"]},
    "train": {"privacy": {"noise": 1.0}},
}


def test_a_private_training_that_is_only_written_in_other_formats_is_fine():
    assert from_dict(BASE).train.privacy.clip == 1.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"compress": {"recipes": ["int8", "prune+qat"]}},
            r"must not train beside train\.privacy, got 'prune\+qat', which",
        ),
        ({"compress": {"recipes": ["rescue"]}}, r"must not train beside train\.privacy, got 'rescue'"),
        ({"compress": {"recipes": "auto"}}, r"compress\.recipes must be listed beside train\.privacy, got auto"),
        (
            {"train": {"privacy": {"noise": 1.0}, "precision": "mixed_float16"}},
            r"train\.precision must not be mixed_float16 beside train\.privacy",
        ),
        (
            {"train": {"privacy": {"noise": 1.0}, "distill": {"teacher_model": {"name": "mlp"}}}},
            r"train\.distill\.teacher_model would learn from the rows without train\.privacy",
        ),
    ],
)
def test_what_would_break_the_promise_of_privacy_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**BASE, **changed})


def of_text(tmp_path, source=None, options=None, **more):
    (tmp_path / "texts").mkdir(exist_ok=True)
    source = {"kind": "text", "train": str(tmp_path / "texts"), **(source or {})}
    model = {"name": "text_encoder", "options": {"vocabulary": 8192} if options is None else options}
    return {"name": "words", "source": source, "model": model, **more}


def test_a_model_of_tokens_knows_as_many_as_its_source_has(tmp_path):
    assert from_dict(of_text(tmp_path)).model.options == {"vocabulary": 8192}
    assert from_dict(of_text(tmp_path, {"tokens": "bytes"}, {})).model.options == {}
    with pytest.raises(
        ConfigError, match=r"vocabulary must be the 8192 token numbers of the source, got 257; write 8192"
    ):
        from_dict(of_text(tmp_path, options={}))
    with pytest.raises(
        ConfigError, match=r"vocabulary must be the 257 token numbers of the source, got 8192; write 257"
    ):
        from_dict(of_text(tmp_path, {"tokens": "bytes"}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "regression"}, r"task must be classification or auto for source kind text, got regression"),
        (
            {"export": {"io": "int8"}},
            r"export\.io must be float32 for token numbers, which int8 would merge; leave it out",
        ),
        ({"source": {"kind": "digits"}}, r"model\.name=text_encoder must have a source of kind text, got kind digits"),
        (
            {"train": {"augmentation": {"noise": 0.1}}},
            r"augmentation\.noise would change one token into another, got 0\.1",
        ),
    ],
)
def test_what_tokens_do_not_go_together_with_is_refused(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**of_text(tmp_path), **changed})


def test_columns_are_not_chosen_anew_beside_an_earlier_transform(tmp_path):
    (tmp_path / "rows.csv").write_text("x,y\n1,2\n")
    (tmp_path / "transform.json").write_text("{}")
    config = {
        "name": "again",
        "source": {"kind": "csv", "train": [str(tmp_path / "rows.csv")], "label": "y"},
        "model": {"name": "mlp"},
        "preprocess": {"transform": str(tmp_path / "transform.json"), "select": {"keep": 1}},
    }
    with pytest.raises(
        ConfigError, match=r"preprocess\.select chooses columns anew, got it beside preprocess\.transform"
    ):
        from_dict(config)
    del config["preprocess"]["select"]
    assert from_dict(config).preprocess.transform == str(tmp_path / "transform.json")


SPLIT = {**BASE, "train": {}, "strategy": {"name": "split", "devices": 2}}


def test_a_split_training_that_is_only_written_in_other_formats_is_fine():
    assert from_dict({**SPLIT, "strategy": {"name": "split", "layout": {"dense.*": 1}}}).strategy.layout == {
        "dense.*": 1
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy": {"layout": {"a": 0}}}, r"strategy\.layout is for split only, got it with strategy\.name=default"),
        (
            {"strategy": {**SPLIT["strategy"], "layout": {"a": 2}}},
            r"strategy\.layout must name devices below strategy\.devices=2, got 2 for 'a'; 0 is the first",
        ),
        ({"train": {"xla": True}}, r"train\.xla compiles for one device, got true with strategy\.name=split"),
        ({"train": {"privacy": {"noise": 1.0}}}, r"train\.privacy computes each example on one device"),
        ({"compress": {"recipes": "auto"}}, r"must not train beside strategy\.name=split, .* got auto"),
        ({"compress": {"recipes": ["int8", "qat"]}}, r"must not train beside strategy\.name=split, .* got 'qat'"),
    ],
)
def test_what_knows_one_device_only_is_refused_beside_split(changed, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({**SPLIT, **changed})


def test_what_trains_a_twin_is_refused_beside_a_tpu():
    on_tpu = {**BASE, "train": {}, "strategy": {"name": "tpu"}}
    assert from_dict(on_tpu).strategy.name == "tpu"
    message = r"must not train beside strategy\.name=tpu, which takes the base training only, got 'prune\+int8'; .* trimline compress"
    with pytest.raises(ConfigError, match=message):
        from_dict({**on_tpu, "compress": {"recipes": ["prune+int8"]}})
