import hashlib
import pathlib
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from components.data.blocks import DTYPES, Layout, decode, encode, read_blocks, write_blocks
from components.errors import ContractError


def table(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "numbers": random.normal(size=(rows, 3)).astype("float32"),
        "ids": random.integers(0, 9, (rows, 2), dtype=np.int32),
        "label": random.integers(0, 2, rows, dtype=np.int32),
    }


def pictures(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    return {
        "image": random.integers(0, 256, (rows, 5, 3, 1), dtype=np.uint8),
        "label": random.integers(0, 2, rows, dtype=np.int32),
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


@st.composite
def columns(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rows = draw(st.integers(1, 7))
    names = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    made: dict[str, np.ndarray] = {}
    for name in names:
        shape = (rows, *draw(st.lists(st.integers(1, 4), max_size=3)))
        made[name] = draw(hnp.arrays(draw(st.sampled_from(DTYPES)), shape))
    return made


@hypothesis.given(columns())
def test_what_goes_in_comes_out_bit_by_bit_nan_and_all(given: dict[str, np.ndarray]) -> None:
    assert_same(decode(encode(given)), given)


@hypothesis.given(columns(), st.data())
def test_a_record_cut_anywhere_is_refused_in_our_words(given: dict[str, np.ndarray], data: st.DataObject) -> None:
    record = encode(given)
    with pytest.raises(ContractError, match="block: .*run preprocess again"):
        decode(record[: data.draw(st.integers(0, len(record) - 1))])


@hypothesis.given(st.binary(max_size=80), st.integers(0, 3))
def test_junk_is_refused_and_never_crashes(junk: bytes, columns: int) -> None:
    header = b"TLBK\x01\x00\x40\x00\x01\x00\x00\x00" + columns.to_bytes(4, "little")
    for record in (junk, header + junk):
        with pytest.raises(ContractError):
            decode(record)


def test_views_are_aligned_and_read_only() -> None:
    found = decode(encode(pictures(3)))
    assert all(array.flags.aligned and not array.flags.writeable for array in found.values())


def test_the_order_of_columns_and_their_memory_layout_do_not_change_the_bytes() -> None:
    given = table(5)
    turned = {name: np.asfortranarray(given[name]) for name in reversed(given)}
    assert encode(turned) == encode(given)


def test_the_header_differs_in_its_rows_only() -> None:
    layout = Layout.of({"image": ("uint8", (5, 3, 1)), "label": ("int32", ())})
    assert encode(pictures(2)).startswith(layout.header(2))
    assert encode(pictures(4)).startswith(layout.header(4))
    assert layout.header(2)[:8] + layout.header(2)[12:] == layout.header(4)[:8] + layout.header(4)[12:]
    assert len(layout.header(1)) % 8 == 0
    assert len(encode(pictures(4))) == len(layout.header(4)) + 4 * layout.row_bytes
    assert layout.row_bytes == 5 * 3 + 4


def test_the_first_bytes_are_the_documented_ones() -> None:
    record = encode({"label": np.array([7, 8], np.int32)})
    expected = b"TLBK\x01\x00\x18\x00\x02\x00\x00\x00\x01\x00\x00\x00\x05\x01\x00label"
    assert record == expected + b"\x07\x00\x00\x00\x08\x00\x00\x00"


@pytest.mark.parametrize("place", [6, 23])
def test_a_header_that_encode_would_not_have_written_is_refused(place: int) -> None:
    record = bytearray(encode({"label": np.array([7, 8], np.int32)}))
    record[place] += 8  # the header's size, or a byte of the name
    if place == 6:
        record[24:24] = bytes(8)
    else:
        record[19] = 0xFF
    with pytest.raises(ContractError, match="block: "):
        decode(bytes(record))


def test_a_layout_comes_back_from_its_json() -> None:
    layout = Layout.of({"numbers": ("float32", (3,)), "ids": ("int32", (2,)), "label": ("int32", ())})
    assert layout.to_json()["numbers"] == {"dtype": "float32", "shape": [3]}
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one column is needed, got none"),
        ({"x": np.zeros((2, 3))}, "column 'x': dtype must be one of .*, got 'float64'; cast it"),
        ({"x": np.zeros((2, 0), "float32")}, r"column 'x': each side .* at least 1, got \(0,\); leave it out"),
        ({"x": np.zeros((0, 3), "float32")}, "rows must be 1 to 4096, got 0"),
        ({"x": np.zeros((4097, 1), "uint8")}, "rows must be 1 to 4096, got 4097; split"),
        ({"x": np.zeros(2, "int32"), "y": np.zeros(3, "int32")}, "same number of rows, got {'x': 2, 'y': 3}"),
        ({"": np.zeros(2, "int32")}, "the name must take 1 to 255 bytes of UTF-8, got 0"),
        ({"x": np.float32(1)}, "column 'x': the first axis must be the rows, got a scalar"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        encode(given)


def test_a_file_comes_back_and_its_entry_tells_the_truth(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train-00000.tfrecord"
    given = [table(4096), table(1, seed=1), table(17, seed=2)]
    entry = write_blocks(path, (encode(block) for block in given))
    assert entry == {
        "name": "train-00000.tfrecord",
        "rows": 4114,
        "blocks": 3,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    for found, expected in zip(read_blocks(path), given, strict=True):
        assert_same(found, expected)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tensorflow_reads_the_same_records(tmp_path: pathlib.Path) -> None:
    records = [encode(table(3)), encode(table(5))]
    write_blocks(tmp_path / "f", records)
    assert list(tf.data.TFRecordDataset(str(tmp_path / "f")).as_numpy_iterator()) == records


def test_a_file_without_blocks_is_a_file_of_no_rows(tmp_path: pathlib.Path) -> None:
    entry = write_blocks(tmp_path / "empty", [])
    assert (entry["rows"], entry["blocks"], entry["bytes"]) == (0, 0, 0)
    assert list(read_blocks(tmp_path / "empty")) == []


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    write_blocks(path, [encode(table(2))])
    before = path.read_bytes()
    with pytest.raises(ContractError, match="a record must open with b'TLBK'"):
        write_blocks(path, [encode(table(3)), b"not a block"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_blocks_are_written_as_they_come_not_gathered_first(tmp_path: pathlib.Path) -> None:
    seen = []

    def blocks() -> Any:
        for _ in range(3):
            seen.append([p.stat().st_size for p in tmp_path.iterdir()])
            yield encode({"image": np.zeros((4096, 64, 64, 1), np.uint8)})

    write_blocks(tmp_path / "f", blocks())
    assert seen[2][0] >= 16 << 20  # the first block is on disk before the third is asked for


@pytest.mark.parametrize("place", range(0, 190, 7))
def test_one_flipped_bit_names_file_record_and_byte(tmp_path: pathlib.Path, place: int) -> None:
    path = tmp_path / "train-00003.tfrecord"
    first = encode(table(1))
    write_blocks(path, [first, encode(table(2))])
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))
    framed = len(first) + 16
    where = "record 0 at byte 0" if place < framed else f"record 1 at byte {framed}"
    with pytest.raises(
        ContractError, match=f"train-00003.tfrecord: {where}: the checksum of its .* again with --force"
    ):
        list(read_blocks(path))


@pytest.mark.parametrize("cut", [1, 3, 11, 12, 13, 40])
def test_a_file_cut_short_is_refused(tmp_path: pathlib.Path, cut: int) -> None:
    path = tmp_path / "f"
    write_blocks(path, [encode(table(1)), encode(table(1))])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ContractError, match=r"f: record 1 at byte \d+: the checksum"):
        list(read_blocks(path))


def test_a_sound_record_that_is_no_block_names_file_and_record(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(encode(table(1)))
        writer.write(b"someone else's")
    with pytest.raises(ContractError, match="f: record 1: block: a record must open with"):
        list(read_blocks(path))


def test_an_absent_file_is_said_to_be_absent(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ContractError, match="gone: a readable file of blocks was promised, got .*No such file"):
        list(read_blocks(tmp_path / "gone"))
