"""The bundle: whole, the same every time, checked without TensorFlow, and refused in words when it is damaged."""

import base64
import csv
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.artifacts import read_json, sha256, write_json
from components.data.pictures import decode
from components.delivery.bundle import machine_tolerance, output_step, predict, verify
from components.delivery.card import in_words
from components.delivery.predictor import _decode, read_input
from components.errors import ConfigError, ContractError, DataError
from components.options import ExportOptions
from components.tracing import Trace

ROOT = pathlib.Path(__file__).parents[3]
KINDS = ("table", "digits", "values")


@pytest.fixture
def bundled(made, tmp_path):
    """kind -> a fresh bundle that a test may damage."""
    return lambda kind="table": made(kind).bundle(tmp_path / f"bundle-{kind}")


def reseal(folder):
    """Makes the checksums right again after a change, so that later checks are reached."""
    manifest = read_json(folder / "manifest.json")
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = sha256(folder / name)
    write_json(folder / "manifest.json", manifest)


def said(done):
    """What a process wrote to stderr, without LiteRT's own greeting."""
    return "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("INFO: "))


def isolated(script, *arguments, cwd=None):
    """Runs Python where only numpy, ai_edge_litert and the standard library can be imported."""
    blocker = """
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                # ai_edge_litert itself looks for tqdm and flatbuffers
                if top not in sys.stdlib_module_names | {"numpy", "ai_edge_litert", "flatbuffers", "tqdm"}:
                    raise ModuleNotFoundError(f"No module named '{top}' (blocked)", name=top)
        sys.meta_path.insert(0, Blocker())
    """
    code = textwrap.dedent(blocker) + textwrap.dedent(script)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("format", "io"), [("int8", "int8"), ("int8", "uint8"), ("int16x8", "int16"), ("int4_weights", "float32")]
)
def test_a_bundle_answers_alike_whatever_its_file_takes_and_gives(format, io, made, tmp_path):
    usual = made("digits")
    other = usual.again(tmp_path, format, ExportOptions(io=io))
    folder = other.bundle(tmp_path / "bundle")
    inside = read_json(folder / "metadata.json")
    assert (inside["inputs"][0]["dtype"], inside["outputs"][0]["dtype"]) == (io, io)
    assert verify(folder).outputs_difference == 0
    assert other.variant["metric"] == pytest.approx(usual.variant["metric"], abs=0.02)
    answers = predict(folder, folder / "golden.json")
    usual_answers = predict(usual.bundle(tmp_path / "usual"), folder / "golden.json")
    # The model is untrained: the two best classes of one record are 0.007 apart, so labels alone would tell little.
    same = [each["label"] == other["label"] for each, other in zip(answers, usual_answers, strict=True)]
    assert sum(same) >= len(same) - 1
    probabilities = [[each["probability"] for each in of] for of in (answers, usual_answers)]
    np.testing.assert_allclose(*probabilities, atol=0.05 if format == "int4_weights" else 0.005)


RUN_PREDICT = """
    import runpy
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_verifies_and_holds_exactly_what_its_manifest_says(bundled, kind):
    folder = bundled(kind)
    manifest = read_json(folder / "manifest.json")
    names = {path.name for path in folder.iterdir()}
    assert names == set(manifest["files"]) | {"manifest.json"}
    assert ("labels.txt" in names) == (kind != "values")
    found = verify(folder)
    assert (found.files, found.records, found.outputs_difference) == (len(names) - 1, 5, 0.0)
    assert found.sha256 == hashlib.sha256((folder / "model.tflite").read_bytes()).hexdigest()
    assert {path.name for path in folder.iterdir()} == names  # no __pycache__ left by running its code


def test_equal_inputs_give_equal_bytes_even_over_an_earlier_attempt(made, tmp_path):
    first = made("digits").bundle(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.tflite").write_bytes(b"half a file")
    second = made("digits").bundle(tmp_path / "b")
    assert read_json(first / "manifest.json") == read_json(second / "manifest.json")


def test_the_file_carries_its_metadata_as_a_zip_and_answers_as_before(made, bundled):
    folder = bundled("digits")
    with zipfile.ZipFile(folder / "model.tflite") as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("metadata.json")) == read_json(folder / "metadata.json")
        assert archive.read("labels.txt").decode().split() == list("0123456789")
    original = made("digits").file.file.read_bytes()
    assert (folder / "model.tflite").read_bytes()[: len(original)] == original
    interpreter = Interpreter(str(folder / "model.tflite"))
    interpreter.allocate_tensors()
    metadata = read_json(folder / "metadata.json")
    assert metadata["inputs"][0]["shape"] == interpreter.get_input_details()[0]["shape"].tolist() == [1, 8, 8, 1]
    assert metadata["measured"]["sha256"] == hashlib.sha256(original).hexdigest()


def test_the_card_tells_figures_protocol_gate_and_limits(made, bundled):
    card = (bundled("table") / "model_card.md").read_text()
    variant = made("table").variant
    assert f"| test | {variant['metric']:.4f} | 0.0000 |" in card
    assert "5 single runs after 1 to warm up, 1 thread(s)" in card
    assert "| inputs as tf.data delivered them | exact |" in card
    assert "`golden.json` holds 5 raw records" in card
    assert "chosen because: smallest of 2" in card
    assert "unchecked" not in card


def test_the_card_says_which_seams_nobody_checked(made, tmp_path):
    folder = made("table").bundle(tmp_path / "b", keras_outputs=None, batches=None)
    card = (folder / "model_card.md").read_text()
    assert "| inputs as tf.data delivered them | not checked |" in card
    assert "The skew gate left seams unchecked" in card


def test_the_card_says_what_the_training_promises_and_what_it_does_not(made, tmp_path):
    promised = {"epsilon": 3.217, "delta": 1e-5, "noise": 1.1, "clip": 0.5, "batch_size": 64, "rows": 5000}
    folder = made("table").bundle(tmp_path / "b", privacy={**promised, "updates": 1200, "accountant": "an accountant"})
    card = (folder / "model_card.md").read_text()
    assert (
        "epsilon 3.22 at delta 1e-05, by DP-SGD with noise 1.1 and gradients of at most norm 0.5, 1,200 updates" in card
    )
    assert "Not counted: statistics of preprocessing" in card
    assert "## Privacy" not in (made("table").bundle(tmp_path / "plain") / "model_card.md").read_text()


def test_a_recipe_is_said_in_words():
    assert in_words("prune@0.8+cluster@16+qat", "int8") == (
        "magnitude pruning to a sparsity of 0.8, then weight clustering, 16 distinct weights a layer, "
        "then quantization-aware training, then written as int8 kernels and activations"
    )
    assert in_words("prune@0.9:1x16+int8+sparse", "int8") == (
        "magnitude pruning to a sparsity of 0.9 in blocks of 1x16, then written as int8 kernels and activations without the zeros"
    )
    assert in_words("prune@2:4", "float32") == "magnitude pruning to 2 zeros in each 4 inputs, then written as float32"


def test_a_file_other_than_the_measured_one_does_not_ship(made, tmp_path):
    variant = {**made("table").variant, "sha256": "0" * 64}
    with pytest.raises(ContractError, match=r"must be the file that was measured, SHA-256 000000000000\.\.\., got"):
        made("table").bundle(tmp_path / "b", variant=variant)
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_the_trace_hears_of_the_bundle(made, tmp_path):
    heard = []
    trace = Trace(on_progress=lambda done, total, note: heard.append((done, total, note)))
    made("table").bundle(tmp_path / "b", trace=trace)
    assert heard == [(1, 3, "skew gate"), (2, 3, "golden samples and model card"), (3, 3, "float32")]


@pytest.mark.parametrize("name", ["model.tflite", "transform.json", "predict.py", "golden.json", "model_card.md"])
def test_one_changed_byte_is_found(bundled, name):
    folder = bundled()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(
        ContractError, match=rf"{name}: the manifest promises SHA-256 \w{{12}}\.\.\. and {len(content)} bytes"
    ):
        verify(folder)


def test_a_missing_file_is_named(bundled):
    folder = bundled()
    (folder / "transform.py").unlink()
    with pytest.raises(ContractError, match=r"transform\.py: the manifest promises this file, but it is absent"):
        verify(folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ContractError, match=r"manifest\.json: a readable JSON file was promised"):
        verify(tmp_path)


def test_a_file_swapped_behind_the_manifest_is_not_the_measured_one(bundled):
    folder = bundled()
    model = folder / "model.tflite"
    content = bytearray(model.read_bytes())
    content[200] ^= 1
    model.write_bytes(bytes(content))
    reseal(folder)
    with pytest.raises(ContractError, match=r"its first \d+ bytes must be the measured file"):
        verify(folder)


def test_a_changed_mean_is_named_with_record_column_and_values(bundled):
    folder = bundled()
    facts = read_json(folder / "transform.json")
    age = next(column for column in facts["columns"] if column["name"] == "age")
    age["mean"] += 1
    write_json(folder / "transform.json", facts)
    reseal(folder)
    with pytest.raises(
        ContractError, match=r"golden\.json, record \d, column 'age': the transform must give -?\d.*, got"
    ):
        verify(folder)


def test_answers_beyond_the_tolerance_are_named(bundled):
    folder = bundled("digits")
    golden = read_json(folder / "golden.json")
    golden["records"][2]["outputs"][4] += 2.5 * golden["outputs_tolerance"]
    write_json(folder / "golden.json", golden)
    reseal(folder)
    with pytest.raises(
        ContractError, match=r"record 2: answer 4 must be .* \(one quantization step of the output\), got"
    ):
        verify(folder)


def test_one_quantization_step_is_allowed_and_reported(bundled):
    folder = bundled("digits")
    golden = read_json(folder / "golden.json")
    step = golden["outputs_tolerance"]
    golden["records"][2]["outputs"][4] += step
    write_json(folder / "golden.json", golden)
    reseal(folder)
    assert verify(folder).outputs_difference == pytest.approx(step, rel=1e-6)


def test_broken_code_in_a_bundle_is_a_bundle_that_does_not_load(bundled):
    folder = bundled()
    (folder / "transform.py").write_text("def Transform(:")
    reseal(folder)
    with pytest.raises(ContractError, match=r"a bundle that loads is needed, got SyntaxError"):
        verify(folder)


def test_the_step_of_an_int8_file_with_float_answers_is_that_before_the_last_dequantize(made, bundled):
    file = made("digits").file.file
    step = output_step(file)
    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    scales = {each["quantization"][0] for each in interpreter.get_tensor_details() if each["dtype"] == np.int8}
    assert any(step == pytest.approx(scale, rel=1e-6) for scale in scales)
    golden = read_json(bundled("digits") / "golden.json")["records"]
    codes = np.array([record["outputs"] for record in golden]) / step
    assert np.abs(codes - codes.round()).max() < 1e-3
    assert output_step(made("table").file.file) is None


def test_float_tolerance_follows_the_largest_answer(made):
    tolerance, why = machine_tolerance(made("table").file.file, "float32", np.array([[-20.0, 4.0]], np.float32))
    assert tolerance == pytest.approx(2e-4)
    assert why == "1e-05 of the largest golden answer, 20"


def test_verify_and_predict_work_without_tensorflow(bundled):
    script = textwrap.dedent("""
        import pathlib, sys
        from components.delivery.bundle import predict, verify
        folder = pathlib.Path(sys.argv[1])
        assert verify(folder).records == 5
        assert len(predict(folder, folder / "golden.json")) == 5
        heavy = {"tensorflow", "keras", "tf_keras", "apache_beam", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, bundled()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, said(done)) == (0, "")


def test_predict_answers_a_csv_with_cells_as_people_write_them(made, bundled):
    answers = predict(bundled(), made("table").source)
    assert len(answers) == 240
    assert set(answers[0]) == {"label", "probability"}
    assert all(each["label"] in ("rich", "poor") and 0.5 <= each["probability"] <= 1 for each in answers)


def test_predict_gives_what_the_keras_model_gives(made, bundled, tmp_path):
    toy = made("values")
    x = np.random.default_rng(5).normal(5, 2, (7, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    facts = toy.data.transform
    inputs = ((x.astype(np.float64) - facts["mean"]) / facts["std"]).astype(np.float32)
    found = [answer["value"] for answer in predict(bundled("values"), tmp_path / "x.npy")]
    assert found == pytest.approx(toy.keras_outputs(inputs)[:, 0].tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", "", DataError, r"\.csv, \.csv\.gz, \.npy.* can be read; rename or convert it"),
        ("a.csv", "age,job\n1,cook\n", DataError, r"record 0: column 'income' is needed, got age, job"),
        ("a.csv", "age,job,income\n1,cook\n", DataError, r"line 2: the header names 3 columns, got 2 cells"),
        ("a.csv", "age,job,income\nold,cook,2\n", DataError, r"record 0, column 'age': a number .* got 'old'"),
        ("a.csv", 'age,job,income\n1,"cook,2\n', DataError, r"line 2: unexpected end of data"),
        ("a.json", "{", DataError, r"a\.json: Expecting property name"),
        ("a.json", "3", DataError, r"a record or a list of records is needed, got int"),
        ("a.json", "[3]", DataError, r"record 0: an object with age, job, income is needed, got int"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(bundled, tmp_path, name, content, error, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(error, match=message):
        predict(bundled(), path)


def test_a_missing_input_is_a_matter_of_the_command_line(bundled, tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.csv: a readable file is needed, got No such file"):
        predict(bundled(), tmp_path / "absent.csv")


def test_an_empty_table_has_no_answers(bundled, tmp_path):
    (tmp_path / "none.csv").write_text("age,job,income\n")
    assert predict(bundled(), tmp_path / "none.csv") == []


def test_predict_py_runs_where_only_numpy_and_litert_exist(bundled, tmp_path):
    folder = bundled("digits")
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    done = isolated(RUN_PREDICT, moved / "predict.py", moved / "golden.json", "--json", cwd=tmp_path)
    assert (done.returncode, said(done)) == (0, "")
    assert json.loads(done.stdout) == predict(moved, moved / "golden.json")
    assert not (moved / "__pycache__").exists()


def test_predict_py_explains_itself_and_prints_label_and_probability(made, bundled):
    folder = bundled()
    told = isolated(RUN_PREDICT, folder / "predict.py", "--help")
    assert told.returncode == 0
    assert "a table with a header line" in told.stdout
    done = isolated(RUN_PREDICT, folder / "predict.py", made("table").source)
    first = predict(folder, made("table").source)[0]
    assert done.stdout.splitlines()[0] == f"{first['label']}\t{first['probability']:.6g}"
    assert len(done.stdout.splitlines()) == 240


def test_predict_py_refuses_with_one_line_and_a_status(bundled, tmp_path):
    folder = bundled()
    (tmp_path / "a.csv").write_text("age\n1\n")
    done = isolated(RUN_PREDICT, folder / "predict.py", tmp_path / "a.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert said(done).startswith("predict.py: record 0: column 'job' is needed, got age")
    assert said(done).count("\n") == 1


def test_picture_files_ask_for_pillow_where_it_is_absent(bundled, tmp_path):
    folder = bundled("digits")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    done = isolated(RUN_PREDICT, folder / "predict.py", tmp_path / "a.png")
    assert (done.returncode, said(done)) == (2, "predict.py: picture files need PIL; install it: pip install pillow\n")


def test_a_picture_file_is_answered_as_its_pixels_are(bundled, tmp_path):
    folder = bundled("digits")
    record = read_json(folder / "golden.json")["records"][0]["raw"]
    pixels = np.frombuffer(base64.b64decode(record["pixels"]), np.uint8).reshape(record["shape"])
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", x=pixels[np.newaxis], y=np.zeros(1))
    expected = predict(folder, folder / "golden.json")[:1]
    assert predict(folder, tmp_path / "a.png") == expected
    assert predict(folder, tmp_path / "a.npy") == expected
    assert predict(folder, tmp_path / "a.npz") == expected


def test_bytes_that_are_no_picture_are_refused(bundled, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match=r"a picture that Pillow reads is needed, got"):
        predict(bundled("digits"), tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_predict_py_reads_pictures_as_preprocessing_does(mode):

    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(colours[:, :, 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(colours).convert(mode)
    written = io.BytesIO()
    picture.save(written, "TIFF" if mode == "CMYK" else "PNG")
    ours, theirs = _decode(written.getvalue()), decode(written.getvalue())
    assert ours.dtype == theirs.dtype == np.uint8
    np.testing.assert_array_equal(ours, theirs)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_predict_py_reads_every_cell_that_a_csv_can_hold(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("left", "right"), *cells])
    assert read_input(path) == [{"left": left, "right": right} for left, right in cells]
