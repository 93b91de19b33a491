"""The command line: help that teaches, one line for an error, an exit code for each kind, nothing heavy loaded early."""

import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

COMMANDS = [
    "run",
    "compress",
    "find-rate",
    "tune",
    "plan",
    "init",
    "inspect",
    "verify",
    "predict",
    "tensorboard",
    "schema",
]


def trimline(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_help_names_every_command_and_a_first_step(tmp_path):
    told = trimline("--help", folder=tmp_path)
    assert told.returncode == 0
    assert "trimline run digits" in told.stdout
    for command in COMMANDS:
        assert f"\n  {command} " in told.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(tmp_path, command):
    told = trimline(command, "--help", folder=tmp_path)
    assert told.returncode == 0
    assert len(told.stdout.splitlines()) > 5


@pytest.mark.parametrize("arguments", [("--help",), ("init", "--list"), ("schema",)])
def test_light_commands_load_no_heavy_library(tmp_path, arguments):
    code = (
        "import sys; sys.argv = ['trimline', *sys.argv[1:]]\n"
        "from pipeline.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'apache_beam', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("run", "digits", "--set", "train.epohcs=3"), 2, "epochs"),
        (("run", "digits", "--set", "train.epochs=zero"), 2, "train.epochs"),
        (("run", "digits", "--until", "tain"), 2, "--until tain: not a stage; use one of preprocess"),
        (("run", "digits", "--force", "tain"), 2, "--force tain: not a stage"),
        (("run", "digits", "--set", "compress.recipes=[qat+prune]"), 2, "'prune' cannot follow 'qat'"),
        (("run", "digits", "--set", "strategy.tpu=local"), 2, "strategy.tpu=local applies to tpu"),
        (
            ("run", "digits", "--set", "strategy.name=multi_worker", "--set", "strategy.workers=2"),
            2,
            "must find the workers in the variable TF_CONFIG, which is not set",
        ),
        (("inspect", "gone.tflite"), 2, "gone.tflite: there is no such file or folder"),
        (("verify", "gone"), 2, "gone: there is no such file or folder"),
        (("init", "nothing"), 2, "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line_with_its_own_code(tmp_path, arguments, code, message):
    told = trimline(*arguments, folder=tmp_path)
    assert told.returncode == code, told.stdout
    assert told.stderr.startswith("trimline: ")
    assert told.stderr.count("\n") == 1
    assert message in told.stderr
    assert not list(tmp_path.glob("workspace/store/*/*/COMPLETED"))


def test_a_file_that_is_no_tflite_is_refused(tmp_path):
    (tmp_path / "a.tflite").write_bytes(b"not a flatbuffer")
    told = trimline("inspect", "a.tflite", folder=tmp_path)
    assert told.returncode == 4
    assert "TFL3" in told.stderr


def test_a_workspace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    told = trimline("run", "digits", "--set", "workspace=taken", folder=tmp_path)
    assert told.returncode == 2
    assert "workspace" in told.stderr
    assert told.stderr.count("\n") == 1


def test_init_writes_a_template_once(tmp_path):
    assert trimline("init", "digits", folder=tmp_path).returncode == 0
    assert yaml.safe_load((tmp_path / "digits.yaml").read_text())["name"] == "digits"
    (tmp_path / "digits.yaml").write_text("mine")
    again = trimline("init", "digits", folder=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert (tmp_path / "digits.yaml").read_text() == "mine"


def test_init_lists_every_template_with_its_purpose(tmp_path):
    lines = trimline("init", "--list", folder=tmp_path).stdout.splitlines()
    assert {line.split()[0] for line in lines} >= {"digits", "fashion_mnist", "adult", "images", "linear"}
    assert all(len(line.split()) > 4 for line in lines)


def test_the_schema_accepts_a_template_and_refuses_a_slip(tmp_path):
    trimline("schema", "--out", "s.json", folder=tmp_path)
    schema = json.loads((tmp_path / "s.json").read_text())
    trimline("init", "digits", folder=tmp_path)
    value = yaml.safe_load((tmp_path / "digits.yaml").read_text())
    jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError, match="epohcs"):
        jsonschema.validate({**value, "train": {"epohcs": 3}}, schema)
