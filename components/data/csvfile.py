"""CSV in ranges: where records end, what is malformed, and cells as bytes.

A quoted field may hold newlines, so a range may start only at a true end of record. `record_ends` finds those with
vectorised quote parity, and does not let one quote that is never closed swallow the rows behind it: a quote opens a
field only right behind a delimiter or a line's start, and closes it only right before a delimiter or a line's end.
Where that fails, the line is malformed and reading goes on behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import pathlib
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from components.data.hashing import Part
from components.data.transform import Coded, parse_cells, strip
from components.errors import DataError

LONGEST_RECORD = 1 << 20  # bytes; a quoted field that does not close within is taken as never closed
NOT_CLOSED = "a quote opens a field and does not close it before a delimiter or the line's end"
CARRIAGE_RETURN = "a carriage return inside a record"
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


@dataclasses.dataclass(frozen=True)
class Bad:
    """One malformed record.

    Attributes:
      file: Path as the user would know it.
      position: 'line 12', 'row 3', or '' where the file is the record.
      reason: The rule that it breaks, with the value.
      text: Its first 200 characters.
    """

    file: str
    position: str
    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of the (decompressed) file, whole records only.

    Attributes:
      line: Physical line of the first record, from 1.
      records: Records that a quote-aware count found; empty lines do not count.
    """

    start: int
    stop: int
    line: int
    records: int


# --- bytes -------------------------------------------------------------------------------------------------------


class _Reopened:
    """The one gzip file that is kept open, so that ranges read in order decompress it once. One per process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.path: pathlib.Path | None = None
        self.file: gzip.GzipFile | None = None

    def get(self, path: pathlib.Path) -> gzip.GzipFile:
        if self.path != path or self.file is None:
            self.close()
            # Open across calls on purpose: close() ends it.
            self.path, self.file = path, gzip.open(path)  # noqa: SIM115
        return self.file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.path = self.file = None


_GZIP = _Reopened()


def close() -> None:
    """Lets go of the compressed file that was read last."""
    with _GZIP.lock:
        _GZIP.close()


def is_gzip(path: pathlib.Path) -> bool:
    """Whether the file is compressed, by its first two bytes, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_range(path: pathlib.Path, start: int, size: int) -> bytes:
    """At most `size` bytes from `start` on, of the decompressed content."""
    with readable(path):
        return _read_range(path, start, size)


@contextlib.contextmanager
def readable(path: pathlib.Path | str) -> Iterator[None]:
    """Says in our words that a file cannot be read.

    Raises:
      DataError: Absent, cut short, damaged, or not allowed.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: a readable file is needed, got: {error}; get the file again.") from error


def _read_range(path: pathlib.Path, start: int, size: int) -> bytes:
    if not is_gzip(path):
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    with _GZIP.lock:
        unpacked = _GZIP.get(path)
        unpacked.seek(start)
        return unpacked.read(size)


# --- where records end -------------------------------------------------------------------------------------------


def record_ends(data: bytes, delimiter: str, *, last: bool) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Finds records in bytes that begin at a record.

    Args:
      data: Whole records and, unless `last`, perhaps the beginning of another one.
      delimiter: One ASCII character.
      last: The file ends where `data` does.

    Returns:
      (int64, one past each whole record's last byte; [(index of a malformed record, reason), ...], ascending).
    """
    content = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(content == _NEWLINE)
    flaws: list[tuple[int, str]] = []
    if b'"' in data:
        inside, unclosed, tail = _quoted(content, newlines, ord(delimiter), last)
        place = np.searchsorted(inside, newlines)
        outside = newlines[place % 2 == 0]
        flaws += [(at, NOT_CLOSED) for at in unclosed]
        newlines = outside[outside < tail]
        returns = _stray_returns(content, data)
        flaws += [(int(at), CARRIAGE_RETURN) for at in returns[np.searchsorted(inside, returns) % 2 == 0]]
    else:
        flaws += [(int(at), CARRIAGE_RETURN) for at in _stray_returns(content, data)]
    ends = newlines.astype(np.int64) + 1
    if last and len(data) and (not len(ends) or ends[-1] < len(data)):
        ends = np.append(ends, len(data))
    return ends, _by_record(ends, flaws)


def _stray_returns(content: np.ndarray, data: bytes) -> np.ndarray:
    """Positions of carriage returns that no newline follows; pyarrow would end a record there."""
    if b"\r" not in data:
        return np.zeros(0, np.int64)
    at = np.flatnonzero(content == _RETURN)
    behind = content[np.minimum(at + 1, len(content) - 1)]
    return at[(behind != _NEWLINE) & (at + 1 < len(content))]


def _by_record(ends: np.ndarray, flaws: list[tuple[int, str]]) -> list[tuple[int, str]]:
    found: dict[int, str] = {}
    for at, reason in sorted(flaws):
        record = int(np.searchsorted(ends, at, side="right"))
        if record < len(ends):
            found.setdefault(record, reason)
    return sorted(found.items())


def _quoted(content: np.ndarray, newlines: np.ndarray, delimiter: int, last: bool) -> tuple[np.ndarray, list[int], int]:
    """(positions of the quotes that open and close, in turn; positions of those never closed; where a tail begins that
    only more bytes can decide)."""
    quotes = np.flatnonzero(content == _QUOTE)
    framed = np.concatenate(([_NEWLINE], content, [_NEWLINE]))  # the ends of the data count as ends of a line
    edge = np.isin(framed, (delimiter, _NEWLINE, _RETURN))
    touching = np.diff(quotes) == 1
    opens = edge[quotes]
    may_open = opens | np.concatenate(([False], touching))
    may_close = edge[quotes + 2] | np.concatenate((touching, [False]))
    even = np.arange(len(quotes)) % 2 == 0
    wrong = [np.flatnonzero(np.where(even == want, ~may_open, ~may_close)) for want in (True, False)]
    kept: list[np.ndarray] = []
    unclosed: list[int] = []
    tail, at = len(content), 0
    while at < len(quotes):
        if not opens[at]:  # in the middle of a field a quote is a character like any other
            at += 1
            continue
        later = wrong[at % 2]
        place = np.searchsorted(later, at)
        stop = int(later[place]) if place < len(later) else len(quotes)
        if (stop - at) % 2 == 0:
            kept.append(quotes[at:stop])
            at = stop
            continue
        opener = _opener(quotes, touching, at, stop - (stop == len(quotes)))
        kept.append(quotes[at:opener])
        if stop == len(quotes) and not last and len(content) - quotes[opener] < LONGEST_RECORD:
            tail = int(quotes[opener])
            break
        unclosed.append(int(quotes[opener]))
        line = np.searchsorted(newlines, quotes[opener])
        if line == len(newlines):
            break
        at = int(np.searchsorted(quotes, newlines[line]))
    return np.concatenate(kept) if kept else np.zeros(0, np.int64), unclosed, tail


def _opener(quotes: np.ndarray, touching: np.ndarray, first: int, at: int) -> int:
    """The quote that opened the field in which quote `at` stands: walks back over doubled quotes."""
    opener = at - ((at - first) % 2)
    while opener - 2 >= first and touching[opener - 1]:
        opener -= 2
    return opener


# --- files to ranges ---------------------------------------------------------------------------------------------


def ranges(path: pathlib.Path, delimiter: str, split_bytes: int, start: int, line: int) -> Iterator[Range]:
    """Cuts a file from byte `start` (physical line `line`) into ranges of about `split_bytes`."""
    size = split_bytes
    while data := read_range(path, start, size):
        last = len(data) < size
        ends, _ = record_ends(data, delimiter, last=last)
        if not len(ends):
            size *= 2  # one record is longer than this
            continue
        stop = int(ends[-1])
        yield Range(start, start + stop, line, int((~_empty(data, ends)).sum()))
        start, line, size = start + stop, line + data.count(b"\n", 0, stop), split_bytes


def _empty(data: bytes, ends: np.ndarray) -> np.ndarray:
    """bool (records,): True where the record is an empty line, which CSV tools skip."""
    content = np.frombuffer(data, np.uint8)
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    blank = (lengths == 1) & (content[starts] == _NEWLINE)
    return blank | ((lengths == 2) & (content[starts] == _RETURN) & (content[ends - 1] == _NEWLINE))


# --- ranges to cells ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """The well-formed records of one range.

    Attributes:
      columns: name -> pyarrow binary array (rows,).
      lines: int64 (rows,), physical line on which each row begins.
      bad: The others.
      texts: int64 (rows, 2), where each row lies in `data`.
      data: The range's bytes.
    """

    columns: dict[str, pa.Array]
    lines: np.ndarray
    bad: list[Bad]
    texts: np.ndarray
    data: bytes

    def text(self, row: int) -> str:
        """The first 200 characters of a row as it stands in the file."""
        return shown(self.data[self.texts[row, 0] : self.texts[row, 1]])


def shown(record: bytes) -> str:
    """The first 200 characters, whatever the bytes."""
    return record[:800].decode("utf-8", "replace").rstrip("\r\n")[:200]


def read_table(path: pathlib.Path, cut: Range, names: Sequence[str], delimiter: str) -> Table:
    """Reads one range. Malformed: a quote that never closes, a wrong number of cells, bytes that are not UTF-8."""
    data = read_range(path, cut.start, cut.stop - cut.start)
    ends, flaws = record_ends(data, delimiter, last=True)
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    whole = ~_empty(data, ends)
    reasons = dict(flaws)
    if not data.isascii():
        reasons |= dict.fromkeys(_undecodable(data, starts, ends), "bytes that are not UTF-8")
    if reasons:
        whole[list(reasons)] = False
    records = np.flatnonzero(whole)
    sound = data if not reasons else b"".join(data[starts[at] : ends[at]] for at in records)
    columns, ragged = _parse(sound, names, delimiter)
    reasons |= {int(records[at]): f"{cells} cells where {len(names)} are needed" for at, cells in ragged.items()}
    kept = np.delete(records, list(ragged)) if ragged else records
    lines = _lines(data, starts, cut.line)
    bad = [
        Bad(str(path), f"line {lines[at]}", reasons[at], shown(data[starts[at] : ends[at]])) for at in sorted(reasons)
    ]
    return Table(columns, lines[kept], bad, np.stack((starts[kept], ends[kept]), axis=1), data)


def _lines(data: bytes, starts: np.ndarray, first: int) -> np.ndarray:
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE)
    return first + np.searchsorted(newlines, starts)


def _undecodable(data: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    try:
        data.decode()
    except UnicodeDecodeError:
        return [at for at in range(len(ends)) if not _is_utf8(data[starts[at] : ends[at]])]
    return []


def _is_utf8(record: bytes) -> bool:
    try:
        record.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parse(data: bytes, names: Sequence[str], delimiter: str) -> tuple[dict[str, pa.Array], dict[int, int]]:
    """({name: cells}, {index of a record among those that are not empty lines: how many cells it has instead})."""
    ragged: dict[int, int] = {}

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        ragged[row.number - 1] = row.actual_columns
        return "skip"

    if not data.strip(b"\r\n"):
        return {name: pa.array([], pa.binary()) for name in names}, ragged
    table = pyarrow.csv.read_csv(
        io.BytesIO(data),
        read_options=pyarrow.csv.ReadOptions(column_names=list(names), use_threads=False, block_size=len(data) + 1),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip, ignore_empty_lines=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.binary() for name in names}),
    )
    return {name: _joined(table.column(name)) for name in names}, ragged


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], pa.binary())])


# --- cells to values ---------------------------------------------------------------------------------------------


def numbers(cells: pa.Array, missing: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What `transform.parse_cells` gives, about twenty times as fast where no cell is bad.

    pyarrow reads a subset of what `parse_cells` does, to the same correctly rounded float64; a test holds them together.
    """
    texts = cells.view(pa.string())
    if any(_is_finite(token) for token in missing):
        return parse_cells(cells.to_pylist(), missing)
    for attempt in (lambda: texts, lambda: _without(texts, missing), lambda: _without(_trimmed(texts), missing)):
        try:
            values = pc.cast(attempt(), pa.float64())
        except pa.ArrowInvalid:
            continue
        if pc.all(pc.is_finite(values)).as_py() is not False:  # None: nothing but missing cells
            return values.to_numpy(zero_copy_only=False), np.zeros(len(values), bool)
    return parse_cells(cells.to_pylist(), missing)


def _is_finite(token: str) -> bool:
    return not parse_cells([token])[1][0]


def _without(texts: pa.Array, missing: Sequence[str]) -> pa.Array:
    absent = pc.is_in(texts, value_set=pa.array([strip(token) for token in missing], pa.string()))
    return pc.if_else(absent, pa.scalar(None, pa.string()), texts)


def _trimmed(texts: pa.Array) -> pa.Array:
    return pc.ascii_trim(texts, " \t\n\r\v\f")


def coded_cells(cells: pa.Array) -> Coded:
    """A column of text, each distinct cell once."""
    encoded = cells.dictionary_encode()
    values = [value.decode() for value in encoded.dictionary.to_pylist()]
    return Coded(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32), values)


def part(name: str, cells: pa.Array) -> Part:
    """The cells of a column for hashing, without the blanks around them."""
    _, offsets, data = cells.buffers()
    bounds = np.frombuffer(offsets, np.int32)[cells.offset : cells.offset + len(cells) + 1].astype(np.int64)
    content = np.frombuffer(data, np.uint8)[: bounds[-1]] if data is not None and len(bounds) else np.zeros(0, np.uint8)
    starts, ends = bounds[:-1].copy(), bounds[1:].copy()
    if len(content):
        _trim(content, starts, ends)
    return Part(name, content, starts, ends)


def _trim(content: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
    """Moves `starts` and `ends` inwards over blanks, in place."""
    blank = np.isin(content, np.frombuffer(b" \t\n\r\v\f", np.uint8))
    if not blank.any():
        return
    last = len(content) - 1
    while (moved := (starts < ends) & blank[np.minimum(starts, last)]).any():
        starts += moved
    while (moved := (starts < ends) & blank[np.maximum(ends - 1, 0)]).any():
        ends -= moved
