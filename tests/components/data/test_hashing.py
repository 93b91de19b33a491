import numpy as np
import pytest

from components.data.hashing import Part, fractions, mixed, row_hashes


def part(name, cells):
    data = np.frombuffer(b"".join(cells), np.uint8)
    ends = np.cumsum([len(cell) for cell in cells]).astype(np.int64)
    return Part(name, data, ends - [len(cell) for cell in cells], ends)


def test_the_hash_of_version_1_never_changes():
    # A change would move rows between splits of every data set that was ever prepared.
    found = row_hashes([part("a", [b"", b"x", b"12345678", b"a longer cell than eight"])], salt="s")
    assert found.tolist() == EXPECTED


EXPECTED = [17137336851369275443, 8139725938297755647, 11594462339802667971, 8240484513434375505]


def test_neither_the_order_of_rows_nor_of_columns_nor_what_lies_around_matters():
    a, b = part("a", [b"1", b"22", b"1"]), part("b", [b"x", b"y", b"x"])
    first, second, third = row_hashes([a, b], "")
    assert first == third != second
    assert row_hashes([b, a], "").tolist() == [first, second, third]
    assert row_hashes([part("b", [b"y"]), part("a", [b"22"])], "").tolist() == [second]


def test_the_column_the_salt_and_trailing_zeros_matter():
    cells = [b"1"]
    hashes = [
        row_hashes([part("a", cells)], "")[0],
        row_hashes([part("b", cells)], "")[0],
        row_hashes([part("a", cells)], "salt")[0],
        row_hashes([part("a", [b"1\0"])], "")[0],
        row_hashes([part("a", cells), part("b", [b""])], "")[0],
    ]
    assert len(set(hashes)) == len(hashes)


def test_rows_that_differ_in_one_digit_spread_evenly():
    cells = [f"{row},0,0".encode() for row in range(100_000)]
    hashes = row_hashes([part("a", cells)], "")
    assert len(np.unique(hashes)) == len(cells)
    counts, _ = np.histogram(fractions(hashes), bins=100, range=(0, 1))
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_mixing_draws_exact_duplicates_apart():
    assert len(np.unique(mixed(np.zeros(1000, np.uint64), 3))) == 1000
    assert not np.isin(mixed(np.zeros(1000, np.uint64), 3), mixed(np.zeros(1000, np.uint64), 4)).any()


def test_no_part_is_refused():
    with pytest.raises(ValueError, match="at least one part is needed"):
        row_hashes([], "")
