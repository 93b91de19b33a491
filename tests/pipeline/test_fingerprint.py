"""Fingerprints: what counts, and what does not."""

import os

import pytest

from components.errors import ConfigError
from pipeline import fingerprint as module
from pipeline.fingerprint import ContentIndex, code_digest, fingerprint
from pipeline.stages import STAGES


def of(stage="measure", options=None, inputs=(), content=()):
    return fingerprint(STAGES[stage], options or {"runs": 1}, inputs, content)


def test_the_same_facts_give_the_same_full_sha256():
    assert of() == of()
    assert len(of()) == 64
    assert int(of(), 16) >= 0


@pytest.mark.parametrize(
    "other",
    [{"stage": "report"}, {"options": {"runs": 2}}, {"inputs": ("a",)}, {"content": ("a",)}],
    ids=lambda value: next(iter(value)),
)
def test_every_fact_counts(other):
    assert of(**other) != of()


def test_another_version_of_a_library_counts(monkeypatch):
    before = of()
    monkeypatch.setattr(module, "_version", lambda name: "0.0")
    assert of() != before


def test_code_counts_and_comments_do_not(monkeypatch, tmp_path):
    (tmp_path / "components").mkdir()
    leaf, top = tmp_path / "components" / "leaf.py", tmp_path / "components" / "top.py"
    top.write_text("def f():\n    from components.leaf import g\n    return g()\n")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    stage = module.Stage("x", lambda *_: {}, of, ("components.top",))

    def digest(text):
        leaf.write_text(text)
        module._source.cache_clear()
        code_digest.cache_clear()
        return code_digest(stage)

    first = digest("def g():\n    return 1\n")
    assert digest('"""Doc."""\ndef g():\n    "Doc."\n    return 1  # why\n') == first
    assert digest("def g():\n    return 2\n") != first
    module._source.cache_clear()


def test_a_new_option_of_one_stage_retrains_no_other():
    modules = module._closure(STAGES["train"].modules)
    assert "components.training.train" in modules
    assert "components.artifacts" in modules
    assert "components.options" not in modules


def test_content_is_told_by_bytes_not_by_name(tmp_path):
    index = ContentIndex(tmp_path / "content.json")
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    (tmp_path / "c").write_text("other")
    a, b, c = (index.digest(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_folder_is_told_by_the_names_and_bytes_below_it(tmp_path):
    index = ContentIndex(tmp_path / "content.json")
    for top in ("x", "y"):
        (tmp_path / top / "cat").mkdir(parents=True)
        (tmp_path / top / "cat" / "1.png").write_text("1")
    assert index.digest(tmp_path / "x") == index.digest(tmp_path / "y")
    (tmp_path / "y" / "cat" / "1.png").rename(tmp_path / "y" / "1.png")
    assert index.digest(tmp_path / "x") != index.digest(tmp_path / "y")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    file, memory = tmp_path / "a", tmp_path / "content.json"
    file.write_text("one")
    index = ContentIndex(memory)
    first = index.digest(file)
    index.save()
    monkeypatch.setattr(module, "sha256", lambda path: "read again")
    assert ContentIndex(memory).digest(file) == first
    os.utime(file, ns=(1, 1))
    assert ContentIndex(memory).digest(file) == "read again"


def test_a_damaged_memory_is_forgotten(tmp_path):
    (tmp_path / "content.json").write_text("{half")
    (tmp_path / "a").write_text("one")
    assert len(ContentIndex(tmp_path / "content.json").digest(tmp_path / "a")) == 64


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.csv: a file that can be read was expected, got 'No such file"):
        ContentIndex(tmp_path / "content.json").digest(tmp_path / "gone.csv")
