"""The launcher with stand-ins for the workers; tests/pipeline/test_multi_worker.py launches real ones."""

import sys
import time

import psutil
import pytest

from components.errors import WorkerError
from pipeline import launch as launching
from pipeline.launch import launch, start_again

STAND_IN = """
import json, os, pathlib, signal, sys, time
task = json.loads(os.environ["TF_CONFIG"])
index, home = task["task"]["index"], pathlib.Path.cwd()
mark = home / f"starts-{index}"
starts = len(mark.read_text().splitlines()) + 1 if mark.exists() else 1
with mark.open("a") as file:
    print(" ".join(sys.argv[1:]), os.environ.get("CUDA_VISIBLE_DEVICES"), *task["cluster"]["worker"], file=file)
print(f"worker {index} says so", flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lets `python -m pipeline` be another program: STAND_IN and what the test adds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 1.0)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__init__.py").touch()

    def write(code: str) -> None:
        (tmp_path / "pipeline/__main__.py").write_text(STAND_IN + code)

    return write


def starts(folder, index):
    return (folder / f"starts-{index}").read_text().splitlines()


def go(folder, force=(), restarts=1):
    return launch(["c.yaml", "--set=a=1"], force, folder, workers=2, restarts=restarts)


def test_each_worker_gets_its_number_and_the_same_addresses(stand_in, tmp_path, capfd):
    stand_in("")
    assert go(tmp_path, ["--force=train"]) == 0
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 1
    assert starts(tmp_path, 0) == starts(tmp_path, 1)
    words = starts(tmp_path, 0)[0].split()
    assert words[:4] == ["run", "c.yaml", "--set=a=1", "--force=train"]
    assert len(set(words[-2:])) == 2
    assert capfd.readouterr().out == "worker 0 says so\n"
    assert (tmp_path / "worker-1.out").read_text() == "worker 1 says so\n"


def test_gpus_that_are_listed_are_dealt_out(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    stand_in("")
    go(tmp_path)
    assert [starts(tmp_path, index)[0].split()[3] for index in (0, 1)] == ["0,2", "1"]


KILLED = "\nif index == 1 and starts <= {times}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0 if index else 3)\n"


def test_a_killed_worker_is_started_again_without_force(stand_in, tmp_path, capfd):
    stand_in(KILLED.format(times=1))
    assert go(tmp_path, ["--force=train"]) == 0
    first, second = starts(tmp_path, 1)
    assert second == first.replace(" --force=train", "")
    assert capfd.readouterr().err == "trimline: worker 1 was killed by SIGKILL; started again (1 of 1).\n"


def test_one_that_is_killed_too_often_ends_the_run_and_leaves_nobody(stand_in, tmp_path):
    stand_in(KILLED.format(times=9))
    with pytest.raises(WorkerError, match=r"worker 1 was killed by SIGKILL 2 times, --restarts=1 allows no more; free"):
        go(tmp_path)
    assert not [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]


def test_an_error_of_a_worker_ends_the_run_with_its_code_and_words(stand_in, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launching, "_END_SECONDS", 0.5)
    stand_in("\nif index: print('trimline: no such file.'); sys.exit(3)\ntime.sleep(60)\n")
    started = time.monotonic()
    assert go(tmp_path) == 3
    assert time.monotonic() - started < 20
    assert "trimline: worker 1 ended with code 3: trimline: no such file. (" in capfd.readouterr().err


def test_the_chiefs_error_is_the_one_that_counts(stand_in, tmp_path, capfd):
    stand_in("\nsys.exit(9) if index else (time.sleep(1), sys.exit(5))\n")
    assert go(tmp_path) == 5
    assert capfd.readouterr().err == ""


def test_a_process_replaces_itself_with_the_same_arguments_but_force(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(launching.os, "execv", lambda program, words: called.append((program, words)))
    monkeypatch.setattr(launching.time, "sleep", called.append)
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-m", "pipeline", "run", "c", "--force", "train", "--until", "train"]
    )
    monkeypatch.setenv("TRIMLINE_STARTED_AGAIN", "2")
    start_again(WorkerError("worker 1 was lost."))
    words = [sys.executable, "-m", "pipeline", "run", "c", "--until", "train"]
    assert called == [2.0, (sys.executable, words)]
    assert launching.os.environ["TRIMLINE_STARTED_AGAIN"] == "3"
    assert capsys.readouterr().err == "trimline: worker 1 was lost. Starting again (3 of 50).\n"


def test_it_gives_up_in_the_end(monkeypatch):
    monkeypatch.setenv("TRIMLINE_STARTED_AGAIN", "50")
    with pytest.raises(WorkerError, match=r"worker 1 was lost\. Given up after 50 times; look at the logs"):
        start_again(WorkerError("worker 1 was lost."))
