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
