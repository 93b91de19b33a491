"""The lock pins what setup.cfg asks for, the wheel holds what the packages need, and make finds its way."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def asked() -> list[Requirement]:
    """Every requirement of setup.cfg, those for development included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [*setup["options"]["install_requires"].split("\n"), *setup["options.extras_require"]["dev"].split("\n")]
    return [Requirement(line) for line in lines if line.strip()]


def pinned() -> dict[str, list[str]]:
    """Name -> versions in the lock; several where they differ by Python's version."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", LOCK, flags=re.MULTILINE):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


@pytest.mark.parametrize("requirement", asked(), ids=str)
def test_the_lock_pins_every_requirement_inside_its_range(requirement):
    versions = pinned().get(canonicalize_name(requirement.name), [])
    assert versions, "not in requirements.lock; run: make lock"
    assert [version for version in versions if not requirement.specifier.contains(version)] == []


def test_the_lock_pins_what_builds_the_editable_install():
    assert {"setuptools", "wheel"} <= pinned().keys()


def test_every_line_of_the_lock_is_a_pin_a_hash_or_a_comment():
    for line in LOCK.splitlines():
        assert re.match(r"^([a-z0-9._-]+==\S+( ; .+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?|\s+#.*)$", line), line
    blocks = re.split(r"\n(?=\S)", LOCK)
    assert [block for block in blocks if "--hash=sha256:" not in block] == []
    assert "://" not in LOCK


def packaged() -> list[str]:
    """Files of the packages as they lie in the working tree."""
    kinds = (".py", ".yaml", ".html", ".txt", ".typed")
    files = [file for top in ("components", "pipeline", "tpu") for file in (ROOT / top).rglob("*")]
    return sorted(str(file.relative_to(ROOT)) for file in files if file.suffix in kinds)


def test_the_wheel_holds_every_file_of_the_packages_and_the_command(tmp_path):
    skip = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "workspace", "out")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skip)
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(tmp_path / "source")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next(tmp_path.glob("trimline-*.whl"))) as wheel:
        names = wheel.namelist()
        assert sorted(name for name in names if ".dist-info/" not in name) == packaged()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "trimline = pipeline.__main__:main" in wheel.read(entry).decode()
        assert any(name.endswith("LICENSE") for name in names)


def test_the_licence_is_the_standard_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split("\n")[1].strip() == "Apache License"
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) == 11358


# --- make --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
    """A folder with the Makefile, a short lock, and an interpreter that only says what it was asked."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "requirements.lock").write_text("a==1\n")
    (tmp_path / "bin").mkdir()
    say(tmp_path / "bin" / "python3.12", PRETENDER)
    say(tmp_path / "bin" / "python3.13", "exit 127")
    say(tmp_path / "bin" / "python3.11", "exit 127")
    return tmp_path


# Answers the Makefile's questions as an interpreter would: `-I -c`, `-m venv`, `-m pip`.
PRETENDER = """
echo "$@" >> "$LOG"
case "$*" in
  *realpath*) echo "$PRETENDER" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$PRETENDER" .venv/bin/python ;;
  *requirements.lock*) [ -z "$KILLED" ] || kill -9 $PPID ;;
esac
"""


def say(file: pathlib.Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def make(folder: pathlib.Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs make; what it did, and what the interpreter was asked meanwhile."""
    log = folder / "log"
    log.write_text("")
    known = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LOG": str(log), "PRETENDER": str(folder / "bin" / "python3.12")
    }  # fmt: skip
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=known | environment, capture_output=True, text=True, check=False
    )
    return done, log.read_text()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_installs_once_and_then_no_more(clone):
    done, asked_for = make(clone, ".venv/installed")
    assert done.returncode == 0, done.stderr
    assert "-m venv .venv" in asked_for
    assert "--no-deps --require-hashes -r requirements.lock" in asked_for
    assert "--no-deps -q --no-build-isolation -e ." in asked_for
    os.utime(clone / "requirements.lock")  # as a checkout does
    done, asked_for = make(clone, ".venv/installed")
    assert "-m venv" not in asked_for
    done, asked_for = make(clone, ".venv/installed")
    assert "pip" not in asked_for


@needs_make
def test_a_changed_lock_and_a_moved_folder_make_the_environment_anew(clone, tmp_path_factory):
    make(clone, ".venv/installed")
    (clone / "requirements.lock").write_text("a==2\n")
    os.utime(clone / "requirements.lock", (2e9, 2e9))
    assert "-m venv .venv" in make(clone, ".venv/installed")[1]
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    clone.rename(moved)
    assert "-m venv .venv" in make(moved, ".venv/installed")[1]


@needs_make
def test_an_installation_that_was_killed_is_made_anew(clone):
    done, _ = make(clone, ".venv/installed", KILLED="yes")
    assert done.returncode != 0
    assert (clone / ".venv" / "bin" / "python").exists()
    assert "-m venv .venv" in make(clone, ".venv/installed")[1]


@needs_make
def test_an_environment_whose_interpreter_is_gone_is_made_anew(clone):
    make(clone, ".venv/installed")
    (clone / ".venv" / "bin" / "python").unlink()
    assert "-m venv .venv" in make(clone, ".venv/installed")[1]


@needs_make
def test_without_a_suitable_python_make_says_what_to_do(clone):
    for name in ("python3.12", "python3"):
        say(clone / "bin" / name, "exit 127")
    done, _ = make(clone, "demo")
    assert done.returncode != 0
    assert "make: Python 3.11, 3.12 or 3.13 with its venv module is needed; tried: python3.12 python3.13" in done.stderr
    assert "name one: make PYTHON=/path/to/python3.12" in done.stderr


@needs_make
def test_make_test_checks_the_code_and_then_runs_the_tests(clone):
    (clone / "bin" / "x").touch()
    done, _ = make(clone, "-n", "test")
    at = [done.stdout.find(each) for each in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest -q")]
    assert -1 not in at
    assert at == sorted(at)
