import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

from components.artifacts import DataSpec
from components.options import TrainOptions
from components.training.lower import lower
from tpu import check as check_module
from tpu.check import Verdict, check
from tpu.errors import TpuError
from tpu.lint import Finding, lint
from tpu.resolve import make_tpu_strategy, where
from tpu.targets import GIB, parse_target

SPEC = DataSpec(task="classification", input_name="x", input_shape=(8,), labels=("a", "b", "c"))


def model_with(function, name="odd"):
    inputs = keras.Input((8,))
    x = keras.layers.Dense(4, name="hidden")(inputs)
    x = Odd(function, name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x), name="model")


class Odd(keras.layers.Layer):
    """Any function as a layer."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        return shape


def lowered(model, precision="float32", **options):
    made = TrainOptions.model_validate(options)
    return lower(made, model, SPEC, "logits", batch_size=16, precision=precision, kind="TPU")


def findings(model):
    return lint(lowered(model).graph, {layer.name for layer in model.layers})


# --- lint ----------------------------------------------------------------------------------------------------------


def test_an_update_of_plain_layers_has_no_errors_and_is_lowered():
    found = lowered(model_with(lambda x: x))
    assert [each for each in lint(found.graph, {"hidden"}) if each.level == "error"] == []
    assert found.refusal == ""
    assert len(found.hlo) > 1000


def test_what_is_frozen_or_computed_again_is_so_in_the_update():
    def count(kind, **options):
        graph = lowered(model_with(lambda x: x), **options).graph
        return sum(each.type == kind for each in graph.get_operations())

    assert count("MatMul", rematerialize=True) > count("MatMul")  # forward once more
    assert count("AssignSubVariableOp") == 4
    assert count("AssignSubVariableOp", transfer={"frozen": ["hidden"]}) == 2


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (
            lambda x: tf.ensure_shape(tf.py_function(lambda v: v, [x], tf.float32), x.shape),
            "EagerPyFunc",
            "runs Python",
        ),
        (
            lambda x: x + tf.ensure_shape(tf.numpy_function(lambda v: v, [x], tf.float32), x.shape),
            "PyFunc",
            "runs Python",
        ),
        (lambda x: x + tf.strings.to_number(tf.strings.as_string(x)), "AsString", "makes text"),
        (lambda x: x + tf.reduce_sum(tf.boolean_mask(x, x > 0)), "Where", "as many values as the data ask for"),
    ],
    ids=["py_function", "numpy_function", "strings", "boolean_mask"],
)
def test_what_only_a_host_can_do_is_named_with_its_layer(function, kind, words):
    found = findings(model_with(function))
    assert found[0].level == "error"
    assert any(each.layer == "odd" and each.what.startswith(kind) and words in each.what for each in found), found


def test_wide_numbers_are_a_note_and_scalars_are_not():
    found = findings(model_with(lambda x: tf.cast(tf.cast(x, tf.float64) * 2, tf.float32)))
    told = [str(each) for each in found if each.layer == "odd"]
    assert (
        "note: layer 'odd': Cast gives float64, which a TPU computes in several steps of 32 bits; cast to 32 bits"
        in told
    )
    usual = findings(model_with(lambda x: x))
    assert not any("float64" in each.what for each in usual)  # the step counts in int64, but that is one number


def test_what_is_inside_a_loop_is_seen():
    def looped(x):
        return tf.while_loop(
            lambda i, _: i < 3,
            lambda i, v: (i + 1, tf.ensure_shape(tf.numpy_function(lambda a: a, [v], tf.float32), v.shape)),
            (0, x),
        )[1]

    assert any(each.what.startswith("PyFunc") for each in findings(model_with(looped)))


def test_xla_names_the_operation_that_it_cannot_lower():
    found = lowered(model_with(lambda x: tf.ensure_shape(tf.py_function(lambda v: v, [x], tf.float32), x.shape)))
    assert found.hlo is None
    assert "EagerPyFunc" in found.refusal


def test_a_finding_reads_as_one_line():
    assert str(Finding("error", "", "no")) == "error: no"


# --- targets and the cluster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "devices", "gib"), [("v5e:2x2", 4, 16), ("v3:2x2x1", 8, 16), ("v4:2x2x2", 8, 32), ("v6e:4x4", 16, 32)]
)
def test_a_target_knows_its_devices_and_their_memory(text, devices, gib):
    target = parse_target(text)
    assert (target.devices, target.memory) == (devices, gib * GIB)


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "v5e:0x2", "v5e:2x2x1", "v4:2x2", "v5e:2y2"])
def test_what_is_no_target_is_refused_with_one_that_is(text):
    with pytest.raises(TpuError, match=rf"--target {text}: .* use for instance .*v\d"):
        parse_target(text)


def test_the_name_goes_before_the_environment_and_that_before_local():
    assert where("mine", {"TPU_NAME": "other"}) == "mine"
    assert where(None, {"TPU_NAME": "other"}) == "other"
    assert where(None, {}) == "local"


def test_without_a_tpu_the_message_says_what_was_asked_and_what_to_install():
    with pytest.raises(TpuError) as caught:
        make_tpu_strategy(None, {})
    message = str(caught.value)
    assert message.startswith("strategy.tpu=local: no TPU was found, got '")
    assert "on a TPU VM install tensorflow-tpu 2.20.0; docs/tpu.md has the set-up." in message
    assert "\n" not in message


# --- the compiler, in a process of its own -------------------------------------------------------------------------


def fake(tmp_path: pathlib.Path, body: str) -> str:
    """An interpreter that says what a compiler could say."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


TARGET = parse_target("v5e:2x2")


def test_a_verdict_tells_memory_and_versions(tmp_path):
    said = {"peak": 3 << 30, "versions": {"jaxlib": "1", "libtpu": "2"}, "flops": 5e9, "memory": {}}
    verdict = check(b"hlo", TARGET, python=fake(tmp_path, f"echo noise; echo '{json.dumps(said)}'"))
    assert str(verdict) == (
        "XLA:TPU for v5e:2x2 (jaxlib 1, libtpu 2) compiled the update: 3,072 MiB at most of 16 GiB a device, 5.00 GFLOP a device."
    )
    assert not verdict.refusal
    looped = Verdict(TARGET, "", 1 << 20, {**said, "flops": None})
    assert str(looped).endswith("1 MiB at most of 16 GiB a device.")


def test_a_refusal_is_told_in_the_compilers_words(tmp_path):
    said = {"refused": "XlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory. Used 48.70G of 15.75G hbm."}
    verdict = check(b"hlo", TARGET, python=fake(tmp_path, f"echo '{json.dumps(said)}'"))
    assert verdict.too_large
    assert str(verdict).startswith("XLA:TPU for v5e:2x2: the update does not fit: XlaRuntimeError: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("""echo '{"refused": "ModuleNotFoundError: No module named jax"}'""", r"pip install 'trimline\[tpu-check\]'"),
        ("echo crashed >&2; exit 3", r"the compiler's process ended with status 3: crashed"),
        ("sleep 20", r"had not finished after 0\.5 s; allow more with --limit"),
    ],
    ids=["absent", "crash", "slow"],
)
def test_a_process_without_an_answer_is_an_error(body, message, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "LOCK", tmp_path / "lock")
    with pytest.raises(TpuError, match=message):
        check(b"hlo", TARGET, python=fake(tmp_path, body), limit=0.5 if "sleep" in body else 60)


@pytest.fixture
def compiler():
    """An interpreter that has libtpu, which nobody installs for us; see setup.cfg."""
    python = os.environ.get("TRIMLINE_TPU_PYTHON", sys.executable)
    code = "import jax, libtpu"
    if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        pytest.skip("the extra tpu-check is not installed: TRIMLINE_TPU_PYTHON may name an interpreter that has it")
    return python


@pytest.mark.slow  # the real compiler
def test_the_real_compiler_takes_what_fits_and_refuses_what_does_not(compiler):
    fits = check(lowered(model_with(lambda x: x), precision="mixed_bfloat16").hlo, TARGET, python=compiler)
    assert 0 < fits.peak < 100 << 20
    # 95 GiB of products, which no fusion spares: a compiler that checked nothing would take it.

    def wide(x):
        outer = tf.tile(x[:, None, :], (1, 40_000, 1)) * tf.range(40_000.0)[None, :, None]
        return x + tf.reduce_sum(tf.tanh(tf.matmul(outer, outer, transpose_b=True)), axis=(1, 2))[:, None]

    large = model_with(lambda x: tf.ensure_shape(wide(x), x.shape))
    refused = check(lowered(large).hlo, TARGET, python=compiler)
    assert refused.too_large, refused
