import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data import csvfile

NAMES = ["a", "b", "c"]
CELL = st.text('ab1"\n, é', max_size=5)


def read_all(path, split_bytes):
    """(cells of all sound rows, all malformed records, what the count of records says)."""
    rows, bad, counted = [], [], 0
    for cut in csvfile.ranges(path, ",", split_bytes, 0, 1):
        table = csvfile.read_table(path, cut, NAMES, ",")
        rows += zip(*(table.columns[name].to_pylist() for name in NAMES), strict=True)
        bad += table.bad
        counted += cut.records
    csvfile.close()
    return rows, bad, counted


@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=30),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from([8, 33, 100, 10_000]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_ranges_give_what_the_csv_module_wrote(tmp_path_factory, rows, ending, closed, split_bytes, quoting):
    text = io.StringIO()
    csv.writer(text, lineterminator=ending, quoting=quoting).writerows(rows)
    content = text.getvalue().encode()
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(content if closed else content.rstrip(b"\r\n"))
    found, bad, counted = read_all(path, split_bytes)
    assert found == [tuple(cell.encode() for cell in row) for row in rows]
    assert (bad, counted) == ([], len(rows))


GOOD = ["1,2,3", '"1","2","3"', '"a ""q""\nb",2,"z"', '1,5" pipe,3', ",,"]
DAMAGED = {
    '"never closed,2,3': csvfile.NOT_CLOSED,
    '1,"x"y,3': csvfile.NOT_CLOSED,
    "1,2": "2 cells where 3 are needed",
    "1,2,3,4": "4 cells where 3 are needed",
    "1,\r2,3": csvfile.CARRIAGE_RETURN,
}


@given(st.lists(st.sampled_from([*GOOD, *DAMAGED]), min_size=1, max_size=40), st.sampled_from([16, 64, 10_000]))
def test_a_malformed_record_takes_no_other_with_it(tmp_path_factory, records, split_bytes):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes("\n".join([*records, "9,9,9"]).encode())
    rows, bad, counted = read_all(path, split_bytes)
    damaged = [record for record in records if record in DAMAGED]
    assert len(rows) == len(records) - len(damaged) + 1
    assert [each.reason for each in bad] == [DAMAGED[record] for record in damaged]
    assert counted == len(records) + 1


def test_a_malformed_record_has_file_line_and_first_characters(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'1,2,3\n"x\ny",2,3\n\nonly one\n1,\xff,3\n' + b"w" * 900 + b"\n")
    _, bad, counted = read_all(path, 10_000)
    assert [(each.file, each.position, each.reason, each.text[:8]) for each in bad] == [
        (str(path), "line 5", "1 cells where 3 are needed", "only one"),
        (str(path), "line 6", "bytes that are not UTF-8", "1,\ufffd,3"),
        (str(path), "line 7", "1 cells where 3 are needed", "w" * 8),
    ]
    assert len(bad[2].text) == 200
    assert counted == 5


def test_lines_are_counted_across_ranges(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('1,2,3\n"a\n\nb",2,3\n\n' * 50 + "bad\n")
    _, bad, _ = read_all(path, 16)
    assert [each.position for each in bad] == ["line 251"]


def test_a_quote_that_never_closes_is_given_up_within_a_bound(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"open,2,3\n' + "1,2,3\n" * 200_000)
    rows, bad, counted = read_all(path, 1 << 16)
    assert (len(rows), len(bad), counted) == (200_000, 1, 200_001)


def test_compressed_files_read_like_plain_ones_in_any_order(tmp_path):
    content = "".join(f'{row},"x\n{row}",3\n' for row in range(500)).encode()
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert read_all(packed, 100)[0] == read_all(plain, 100)[0]
    cuts = list(csvfile.ranges(packed, ",", 100, 0, 1))
    backwards = [csvfile.read_table(packed, cut, NAMES, ",").columns["a"].to_pylist() for cut in reversed(cuts)]
    csvfile.close()
    assert [cell for cells in reversed(backwards) for cell in cells] == [str(row).encode() for row in range(500)]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n\n\r\n"])
def test_empty_lines_are_no_records(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert read_all(path, 1 << 10) == ([], [], 0)


def test_a_field_that_never_closes_is_blamed_on_the_line_that_opened_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('1,2,3\n"a\n"" b,2,3\n1,2,3\n')
    rows, bad, _ = read_all(path, 10_000)
    assert len(rows) == 2
    assert [each.position for each in bad] == ["line 2", "line 3"]
