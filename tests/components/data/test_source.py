import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from components.data.rows import read
from components.data.schema import infer
from components.data.source import content_files, descriptors, peek
from components.errors import ConfigError, DataError
from components.options import (
    ArraysSource,
    CsvSource,
    DigitsSource,
    IdxSource,
    ImagesSource,
    LineSource,
    PreprocessOptions,
    SplitOptions,
)


def rows_of(source, split_bytes=1 << 20, splits=None, task=None):
    schema = infer(peek(source), source, PreprocessOptions(), task)
    return [read(each, source, schema, splits or SplitOptions()) for each in descriptors(source, split_bytes)]


def write_csv(path, text, **options):
    path.write_text(text)
    return CsvSource(kind="csv", train=[str(path)], **({"label": "y"} | options))


def write_idx(path, values):
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()) if path.suffix == ".gz" else head + values.tobytes())
    return str(path)


def write_pictures(root, classes=("cat", "dog"), each=3):
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for row in range(each):
            pixels = np.full((4 + row, 6, 3), 40 * place + row, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{row}.png")
    return ImagesSource(kind="images", train=str(root))


# --- tables ---


def test_a_header_a_comment_a_byte_order_mark_and_blanks_are_understood(tmp_path):
    source = write_csv(tmp_path / "a.csv", "\ufeff#made by hand\n#twice\n n , t, y\n 1, red, no.\n ?, blue, yes.\n",
                       comment="#", label_strip=".")  # fmt: skip
    seen = peek(source)
    assert seen.columns == ("n", "t", "y")
    (rows,) = rows_of(source)
    assert rows.columns["n"].tolist()[:1] == [1.0]
    assert np.isnan(rows.columns["n"][1])
    assert list(rows.label.values) == ["no", "yes"]
    assert rows.locate(1) == ("line 5", " ?, blue, yes.")
    assert rows.record(0) == {"n": " 1", "t": " red"}


def test_the_hash_of_a_row_does_not_see_blanks_quotes_column_order_or_line_ends(tmp_path):
    plain = write_csv(tmp_path / "a.csv", "n,t,y\n1,red,0\n2,blue,1\n")
    other = write_csv(tmp_path / "b.csv", 'y,n,t\r\n1,"2", blue\r\n"0",1,red \r\n')
    assert rows_of(plain)[0].hashes.tolist() == rows_of(other)[0].hashes[::-1].tolist()


def test_rows_of_one_group_share_their_hash(tmp_path):
    source = write_csv(tmp_path / "a.csv", "user,n,y\nann,1,0\nbob,2,1\nann,3,1\n")
    (rows,) = rows_of(source, splits=SplitOptions(group="user"))
    assert rows.hashes[0] == rows.hashes[2] != rows.hashes[1]


def test_malformed_cells_and_labels_are_told_apart_by_reason(tmp_path):
    text = "n,t,y\n1,a,0\nx,a,1\n2,a,?\n3,a\n4,a,1\n"
    (rows,) = rows_of(write_csv(tmp_path / "a.csv", text), task="classification")
    assert len(rows) == 3
    assert {bad.position: bad.reason for bad in rows.bad} == {
        "line 4": "column 'y': the label is missing",
        "line 5": "2 cells where 3 are needed",
    }


def test_a_number_column_quarantines_what_is_no_number(tmp_path):
    lines = [f"{row},0" for row in range(2000)] + ["x,1", "7,1"]
    source = write_csv(tmp_path / "a.csv", "n,y\n" + "\n".join(lines) + "\n")
    (rows,) = rows_of(source)
    assert [(bad.position, bad.reason, bad.text) for bad in rows.bad] == [
        ("line 2002", "column 'n': a number is needed, got 'x'", "x,1")
    ]
    assert rows.columns["n"][-1] == 7.0
    assert rows.locate(2000) == ("line 2003", "7,1")
    assert len(rows) == len(rows.columns["n"]) == len(rows.label.codes) == 2001


def test_regression_labels_that_are_no_numbers_are_malformed(tmp_path):
    (rows,) = rows_of(write_csv(tmp_path / "a.csv", "n,y\n1,0.5\n2,\n3,x\n"), task="regression")
    assert rows.label.tolist() == [0.5]
    assert [bad.reason for bad in rows.bad] == [f"column 'y': a number is needed, got '{cell}'" for cell in ("", "x")]


def test_descriptors_cover_every_record_once(tmp_path):
    source = write_csv(tmp_path / "a.csv", "n,y\n" + "".join(f"{row},{row % 2}\n" for row in range(1000)))
    cuts = descriptors(source, 1 << 10)
    assert len(cuts) > 5
    assert [cut.index for cut in cuts] == list(range(len(cuts)))
    assert sum(cut.records for cut in cuts) == 1000
    values = np.concatenate([rows.columns["n"] for rows in rows_of(source, 1 << 10)])
    assert values.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("n,y\n1,0\n", {"label": "z"}, ConfigError, "source.label: a column of .*, got 'z'; columns: n, y"),
        ("n,n\n1,0\n", {"label": "n"}, DataError, "each column needs a name of its own, got 'n' twice"),
        ("n,y\n", {}, DataError, "at least one record is needed, got none"),
        ("1,2,3\n", {"columns": ["n", "y"]}, DataError, "no sound record .* 3 cells where 2 are needed"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_before_any_work(tmp_path, text, options, error, message):
    with pytest.raises(error, match=message):
        peek(write_csv(tmp_path / "a.csv", text, **options))


def test_files_of_two_layouts_are_refused(tmp_path):
    write_csv(tmp_path / "b.csv", "n,z\n1,0\n")
    source = write_csv(tmp_path / "a.csv", "n,y\n1,0\n").model_copy(update={"test": [str(tmp_path / "b.csv")]})
    with pytest.raises(DataError, match=r"b.csv: the columns must be those of .*a.csv, got z"):
        peek(source)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"source.train: a file is needed, got '.*none.csv', which is not there"):
        content_files(CsvSource(kind="csv", train=[str(tmp_path / "none.csv")], label="y"))


# --- arrays ---


def test_digits_are_pictures_that_use_all_of_uint8():
    (rows,) = rows_of(DigitsSource())
    pixels = rows.columns["pixels"]
    assert (pixels.shape, pixels.dtype, pixels.min(), pixels.max()) == ((1797, 8, 8, 1), np.uint8, 0, 255)
    assert list(rows.label.values) == [str(digit) for digit in range(10)]
    assert content_files(DigitsSource()) == []


def test_the_line_is_the_same_every_time_and_has_the_mean_it_promises():
    (rows,), (again,) = rows_of(LineSource(kind="line")), rows_of(LineSource(kind="line"))
    assert np.array_equal(rows.columns["values"], again.columns["values"])
    off = rows.label - 2 * rows.columns["values"][:, 0].astype(np.float64)
    assert abs(off.mean() - 1.5) < 0.03
    assert off.min() >= 1
    assert off.max() < 2


@pytest.mark.parametrize("suffix", [".gz", ".idx"])
def test_idx_files_are_read_packed_and_plain(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 5, 4), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 3
    x, y = write_idx(tmp_path / f"x{suffix}", pixels), write_idx(tmp_path / f"y{suffix}", labels)
    source = IdxSource(kind="idx", train_images=x, train_labels=y)
    found = rows_of(source, split_bytes=100)
    assert len(found) == 4
    assert np.array_equal(np.concatenate([rows.columns["pixels"] for rows in found])[..., 0], pixels)
    assert [int(rows.label.values[code]) for rows in found for code in rows.label.codes] == labels.tolist()
    assert peek(source).shape == (5, 4, 1)
    assert [path.name for path in content_files(source)] == [f"x{suffix}", f"y{suffix}"]


def test_a_damaged_idx_file_says_what_is_wrong(tmp_path):
    y = write_idx(tmp_path / "y", np.zeros(3, np.uint8))
    (tmp_path / "x").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="an idx file begins with 0, 0, a type and a rank, got b'PK"):
        peek(IdxSource(kind="idx", train_images=str(tmp_path / "x"), train_labels=y))
    x = write_idx(tmp_path / "x", np.zeros((4, 2, 2), np.uint8))
    with pytest.raises(DataError, match=r"labels must have shape \(4,\), .* got \(3,\)"):
        peek(IdxSource(kind="idx", train_images=x, train_labels=y))


def test_arrays_of_numbers_lose_rows_that_are_not_finite(tmp_path):
    x = np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0], [5.0, 6.0]])
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0.5, 1.0, np.inf, 2.25]))
    (rows,) = rows_of(ArraysSource(kind="arrays", train=str(tmp_path / "a.npz")), task="regression")
    assert rows.columns["values"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert rows.label.tolist() == [0.5, 2.25]
    assert [bad.position for bad in rows.bad] == ["row 1", "row 2"]
    assert rows.record(1) == {"values": [5.0, 6.0]}


def test_an_npz_without_x_and_y_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", data=np.zeros(3))
    with pytest.raises(DataError, match="arrays x and y are needed, got data"):
        peek(ArraysSource(kind="arrays", train=str(tmp_path / "a.npz")))


def test_float_pictures_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4)), y=np.zeros(2, int))
    with pytest.raises(DataError, match=r"x must be uint8 pictures .* got float64 \(2, 4, 4\)"):
        peek(ArraysSource(kind="arrays", train=str(tmp_path / "a.npz")))


# --- pictures ---


def test_pictures_of_any_size_come_with_the_name_of_their_folder(tmp_path):
    source = write_pictures(tmp_path / "root")
    found = rows_of(source, split_bytes=1 << 10)
    named = sorted(
        (rows.label.values[code], pixels.shape)
        for rows in found
        for code, pixels in zip(rows.label.codes, rows.columns["pixels"], strict=True)
    )
    assert named == [(name, (4 + row, 6, 3)) for name in ("cat", "dog") for row in range(3)]
    seen = peek(source)
    assert (seen.shape, list(seen.labels)) == ((4, 6, 3), ["cat", "dog"])
    assert len(content_files(source)) == 6


def test_a_damaged_picture_is_quarantined(tmp_path):
    source = write_pictures(tmp_path / "root")
    (tmp_path / "root" / "dog" / "1.png").write_bytes((tmp_path / "root" / "dog" / "1.png").read_bytes()[:40])
    (rows,) = rows_of(source)
    assert [bad.position for bad in rows.bad] == ["dog/1.png"]
    assert "a picture that Pillow reads is needed" in rows.bad[0].reason
    assert len(rows) == len(rows.columns["pixels"]) == 5


def test_the_same_picture_under_two_names_shares_its_hash(tmp_path):
    source = write_pictures(tmp_path / "root", each=1)
    (tmp_path / "root" / "cat" / "copy.png").write_bytes((tmp_path / "root" / "cat" / "0.png").read_bytes())
    (rows,) = rows_of(source)
    assert len(set(rows.hashes.tolist())) == 2


def test_a_test_folder_with_an_unknown_class_is_refused(tmp_path):
    write_pictures(tmp_path / "test", classes=("cat", "cow"))
    source = write_pictures(tmp_path / "train").model_copy(update={"test": str(tmp_path / "test")})
    with pytest.raises(DataError, match="must be among those of source.train, got 'cow'"):
        peek(source)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(DataError, match="one folder a class with pictures in it is needed, got none"):
        peek(ImagesSource(kind="images", train=str(tmp_path)))


def test_a_look_at_a_source_loads_neither_tensorflow_nor_beam():
    code = (
        "import sys; from components.data.source import peek; from components.options import DigitsSource;"
        "peek(DigitsSource()); print([m for m in ('tensorflow', 'apache_beam', 'keras', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
