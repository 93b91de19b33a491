"""The store: whole or not at all, once for all runs, and a killed attempt is gone on with."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from components.errors import ContractError
from pipeline.store import MARKER, Key, Store, publish

KEY = Key("train", "f" * 64)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    return Store(tmp_path / "store")


def write(text: str):
    return lambda folder: (folder / "value").write_text(text)


def test_work_is_done_once(store):
    first = store.build(KEY, write("one"), resumes=False)
    again = store.build(KEY, write("two"), resumes=False)
    assert first == again == store.folder(KEY)
    assert (again / "value").read_text() == "one"
    assert store.completed(KEY)
    assert store.seconds(KEY) >= 0


def test_failed_work_leaves_no_artifact_but_its_attempt(store):
    def fail(folder):
        (folder / "checkpoint").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        store.build(KEY, fail, resumes=True)
    assert not store.completed(KEY)
    assert not store.folder(KEY).exists()

    def go_on(folder):
        assert (folder / "checkpoint").read_text() == "half"

    store.build(KEY, go_on, resumes=True)
    assert store.completed(KEY)


def test_a_stage_that_does_not_resume_starts_from_an_empty_folder(store):
    store.partial(KEY).mkdir(parents=True)
    (store.partial(KEY) / "left").write_text("over")
    folder = store.build(KEY, write("new"), resumes=False)
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "value"]


def test_a_folder_without_marker_is_not_an_artifact_and_is_replaced(store):
    store.folder(KEY).mkdir(parents=True)
    (store.folder(KEY) / "value").write_text("half copied")
    assert not store.completed(KEY)
    store.build(KEY, write("whole"), resumes=False)
    assert (store.folder(KEY) / "value").read_text() == "whole"


def test_two_at_once_build_once_and_the_second_is_told_that_it_waits(store):
    started, release, built, waited = threading.Event(), threading.Event(), [], []

    def slow(folder):
        built.append(1)
        started.set()
        assert release.wait(10)

    first = threading.Thread(target=store.build, args=(KEY, slow), kwargs={"resumes": False})
    first.start()
    assert started.wait(10)

    def waiting():
        waited.append(1)
        release.set()

    Store(store.root).build(KEY, lambda folder: built.append(2), resumes=False, waiting=waiting)
    first.join(10)
    assert (built, waited) == ([1], [1])


def test_a_killed_builder_leaves_its_attempt_and_frees_the_lock(store):
    script = f"""
        import os, pathlib, signal
        from pipeline.store import Key, Store
        def work(folder):
            (folder / "checkpoint").write_text("epoch 3")
            os.kill(os.getpid(), signal.SIGKILL)
        Store(pathlib.Path({str(store.root)!r})).build(Key("train", "f" * 64), work, resumes=True)
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not store.completed(KEY)
    seen = []
    store.build(KEY, lambda folder: seen.append((folder / "checkpoint").read_text()), resumes=True)
    assert seen == ["epoch 3"]
    assert store.completed(KEY)


def test_the_time_of_a_stopped_attempt_counts(store, monkeypatch):
    clock = iter([0.0, 7.0, 100.0, 105.0])
    monkeypatch.setattr("pipeline.store.time.monotonic", lambda: next(clock))

    def stop(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build(KEY, stop, resumes=True)
    store.build(KEY, write("done"), resumes=True)
    assert store.seconds(KEY) == 12.0


def test_remove_forgets_artifact_and_attempt(store):
    store.build(KEY, write("one"), resumes=False)
    store.remove(KEY)
    assert not store.completed(KEY)
    assert not store.folder(KEY).exists()


def test_a_full_disk_is_one_line_and_keeps_the_attempt(store):
    def full(folder):
        (folder / "checkpoint").write_text("epoch 3")
        raise OSError(28, os.strerror(28), str(folder / "big"))

    with pytest.raises(ContractError, match=r"train could not be written to .*big, got 'No space left.*free space"):
        store.build(KEY, full, resumes=True)
    assert (store.partial(KEY) / "checkpoint").read_text() == "epoch 3"


def test_an_error_of_reading_is_not_blamed_on_the_disk(store):
    def absent(folder):
        (folder / "no such").read_text()

    with pytest.raises(FileNotFoundError):
        store.build(KEY, absent, resumes=True)


def test_publish_replaces_a_folder_whole(tmp_path):
    source, target = tmp_path / "a", tmp_path / "run" / "bundle"
    source.mkdir()
    (source / "new").write_text("1")
    (source / MARKER).write_text("{}")
    (source / "tensorboard").mkdir()
    target.mkdir(parents=True)
    (target / "old").write_text("0")
    publish(source, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_publish_replaces_a_file(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    publish(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


def test_a_failure_is_remembered_until_the_artifact_is_made_or_removed(store):
    assert store.failure(KEY) is None
    for forget in (lambda: store.build(KEY, write("one"), resumes=True), lambda: store.remove(KEY)):
        store.remove(KEY)
        store.partial(KEY).mkdir(parents=True)
        store.fail(KEY, "the loss is nan.")
        assert store.failure(KEY) == "the loss is nan."
        forget()
        assert store.failure(KEY) is None
    store.partial(KEY).mkdir(parents=True)
    store.fail(KEY, "the loss is nan.")
    assert not (store.build(KEY, write("one"), resumes=True) / "failed.json").exists()
