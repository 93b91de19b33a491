import pytest

from components.errors import ConfigError, ModelError
from pipeline.config import load_config
from pipeline.tpu_check import tpu_check


def digits(tmp_path, *changes):
    return load_config("digits", [f"workspace={tmp_path}", "model.name=mlp", "model.options={units: [8]}", *changes])


def test_a_template_has_nothing_that_a_tpu_refuses(tmp_path):
    findings, verdict = tpu_check(digits(tmp_path, "train.batch_size=32"), "v5e:2x2", compile=False)
    assert verdict is None
    assert [each for each in findings if each.level == "error"] == []
    assert not any("multiples of 8" in each.what for each in findings)
    assert not (tmp_path / "store" / "preprocess").exists()  # a look at the source is enough


def test_a_small_share_of_the_batch_is_noted_and_one_that_does_not_divide_refused(tmp_path):
    findings, _ = tpu_check(digits(tmp_path, "train.batch_size=16"), "v5e:2x2", compile=False)
    told = "a device gets 4 examples of train.batch_size=16; multiples of 8 fill its rows"
    assert told in [each.what for each in findings]
    message = (
        r"train\.batch_size=30 must divide by the 4 replicas of strategy 'tpu v5e:2x2' \(remainder 2\): use 28 or 32\."
    )
    with pytest.raises(ConfigError, match=message):
        tpu_check(digits(tmp_path, "train.batch_size=30"), "v5e:2x2", compile=False)
    with pytest.raises(ConfigError, match=r"--target v1:2: a kind and its topology"):
        tpu_check(digits(tmp_path), "v1:2", compile=False)


def test_without_the_compiler_it_says_what_to_install(tmp_path):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"refused": "ModuleNotFoundError: No module named jax"}'\n""")
    python.chmod(0o755)
    with pytest.raises(ModelError, match=r"pip install 'trimline\[tpu-check\]'"):
        tpu_check(digits(tmp_path, "train.batch_size=32"), "v5e:2x2", compile=True, python=str(python))
