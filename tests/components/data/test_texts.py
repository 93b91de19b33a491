import pathlib
import zlib

import numpy as np
import pytest

from components.artifacts import SPLITS
from components.data.blocks import read_blocks
from components.data.preprocess import preprocess
from components.data.source import content_files
from components.data.texts import TextRule, load, row, tokens
from components.errors import ConfigError, DataError
from components.options import PreprocessOptions, SplitOptions, TextSource
from components.tracing import Trace

BYTES, WORDS = TextRule("bytes", 5, 257, "class"), TextRule("words", 5, 1000, "class")


def write(root: pathlib.Path, texts: dict[str, str]) -> pathlib.Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_bytes_and_words_become_numbers_by_a_fixed_rule():
    assert tokens("Aé", BYTES).tolist() == [66, 196, 170]
    expected = [1 + zlib.crc32(word) % 999 for word in (b"good", b"film", b"good")]
    assert tokens("Good film: GOOD!", WORDS).tolist() == expected
    assert tokens("", WORDS).tolist() == []


def test_a_row_is_cut_or_filled_with_zeros():
    assert row("abcdefg", BYTES).tolist() == [98, 99, 100, 101, 102]
    assert row("ab", BYTES).tolist() == [98, 99, 0, 0, 0]


def test_folders_are_classes(tmp_path):
    root = write(tmp_path, {"pos/1.txt": "yes", "neg/1.txt": "no", "neg/notes.md": "?", "readme.txt": "?"})
    x, y = load(str(root), BYTES)
    assert y.tolist() == ["neg", "pos"]
    assert x.tolist() == [[111, 112, 0, 0, 0], [122, 102, 116, 0, 0]]


def test_windows_lie_side_by_side_with_the_token_behind_as_label(tmp_path):
    root = write(tmp_path, {"a.txt": "abcdefgh", "deep/b.txt": "wxyz", "deep/c.txt": "xy"})
    x, y = load(str(root), TextRule("bytes", 3, 257, "next"))
    assert x.tolist() == [[98, 99, 100], [102, 103, 104], [120, 121, 122]]
    assert y.tolist() == ["101", "105", "123"]


def test_no_text_and_texts_too_short_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"one folder a class with \.txt files in it must be there, got none"):
        load(str(tmp_path), BYTES)
    write(tmp_path, {"a.txt": "abc"})
    with pytest.raises(DataError, match=r"more than source\.length=5 tokens, got none that has; lower the length"):
        load(str(tmp_path), TextRule("bytes", 5, 257, "next"))


def prepare(source, folder):
    folder.mkdir()
    splits = SplitOptions(validation=0.2, calibration=0.2)
    return preprocess(source, PreprocessOptions(splits=splits), folder, task=None, seed=0, trace=Trace())


def test_texts_go_through_preprocessing_as_they_are(tmp_path):
    root = write(tmp_path / "raw", {f"{'pos' if n % 2 else 'neg'}/{n}.txt": f"film number {n}" for n in range(60)})
    source = TextSource(kind="text", train=str(root), length=4, vocabulary=5000)
    data = prepare(source, tmp_path / "out")
    assert (data.spec.task, data.spec.labels, data.spec.input_shape) == ("classification", ("neg", "pos"), (4,))
    rows = np.concatenate(
        [block["numbers"] for split in SPLITS for path in data.files(split) for block in read_blocks(path)]
    )
    rule = TextRule("words", 4, 5000, "class")
    assert sorted(rows.tolist()) == sorted(row(f"film number {n}", rule).tolist() for n in range(60))
    assert len(content_files(source)) == 60


def test_next_tokens_are_classes_though_they_are_numbers(tmp_path):
    root = write(
        tmp_path / "raw", {"a.txt": "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 9000))}
    )
    source = TextSource(kind="text", train=str(root), tokens="bytes", length=4, learn="next")
    data = prepare(source, tmp_path / "out")
    assert data.spec.task == "classification"
    assert list(data.spec.labels) == sorted(data.spec.labels, key=int)
    assert len(data.spec.labels) > 20


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"source\.train: a folder with one folder a class is needed, got '.*absent'"):
        content_files(TextSource(kind="text", train=str(tmp_path / "absent")))
