"""Blocks: the file format between preprocessing and training; NumPy only, so that Beam workers never load TensorFlow.

    columns of 1 to 4096 rows --encode()--> one TFRecord record --write_blocks()--> one file

A record is a header and the columns, one after the other, nothing between them. All integers are little-endian:

    offset  0  magic b"TLBK"
            4  uint16 version, uint16 bytes of the whole header (a multiple of 8)
            8  uint32 rows
           12  uint32 number of columns
           16  per column: uint8 length of the name, uint8 dtype code, uint8 rank, the name, rank x uint32 shape of a row
               zeros up to the next multiple of 8
    then   per column: its values, rows x shape, C order

Columns with wide items come first, then by name, so that every column lies aligned. Only `rows` differs between the
headers of one data set; the offset of each column is therefore `header + rows * constant`, which is what lets
`components.data.dataset` slice a record in TensorFlow without parsing it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from components.errors import ContractError

MAGIC = b"TLBK"
VERSION = 1
MAX_ROWS = 4096
# The code of a dtype is its place in this tuple: append, never reorder.
DTYPES = ("uint8", "int32", "float32")
_FIXED = struct.Struct("<4sHHII")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_AGAIN = "run preprocess again with --force preprocess"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: `dtype` is one of DTYPES, `shape` that of a single row, () for a scalar."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all blocks of a data set share: the columns in stored order, hence the header and every offset."""

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
        """The layout of {name: (dtype, shape of one row)}.

        Raises:
          ContractError: No column, an unknown dtype, an empty shape, or a name that does not fit the header.
        """
        made = [Column(name, dtype, tuple(shape)) for name, (dtype, shape) in columns.items()]
        if not made:
            raise ContractError("block: at least one column is needed, got none; name the columns to store.")
        for column in made:
            _check(column)
        return cls(tuple(sorted(made, key=lambda c: (-np.dtype(c.dtype).itemsize, c.name))))

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes over all columns."""
        return sum(column.row_bytes for column in self.columns)

    def header(self, rows: int) -> bytes:
        """The header of a block of `rows` rows; its length does not depend on `rows`."""
        body = b"".join(_describe(column) for column in self.columns)
        size = -(-(_FIXED.size + len(body)) // 8) * 8
        fixed = _FIXED.pack(MAGIC, VERSION, size, rows, len(self.columns))
        return (fixed + body).ljust(size, b"\0")

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{name: {"dtype", "shape"}}: what a manifest says under "columns"."""
        return {column.name: {"dtype": column.dtype, "shape": list(column.shape)} for column in self.columns}

    @classmethod
    def from_json(cls, value: Mapping[str, Mapping[str, Any]]) -> Layout:
        """Reads what `to_json` gave."""
        return cls.of({name: (column["dtype"], tuple(column["shape"])) for name, column in value.items()})


def _check(column: Column) -> None:
    where = f"block column {column.name!r}"
    if column.dtype not in DTYPES:
        raise ContractError(f"{where}: dtype must be one of {DTYPES}, got {column.dtype!r}; cast it before encoding.")
    if not 1 <= len(column.name.encode()) <= 255:
        raise ContractError(f"{where}: the name must take 1 to 255 bytes of UTF-8, got {len(column.name.encode())}.")
    if len(column.shape) > 255 or any(not 1 <= side < 2**32 for side in column.shape):
        raise ContractError(
            f"{where}: each side of a row's shape must be at least 1, got {column.shape}; leave it out."
        )


def _describe(column: Column) -> bytes:
    name = column.name.encode()
    fixed = struct.pack("<BBB", len(name), DTYPES.index(column.dtype), len(column.shape))
    return fixed + name + struct.pack(f"<{len(column.shape)}I", *column.shape)


def encode(columns: Mapping[str, np.ndarray]) -> bytes:
    """Packs columns into one record.

    Args:
      columns: By name; uint8, int32 or float32 of shape (rows, ...), all with the same 1 to 4096 rows.

    Returns:
      The record; equal columns give equal bytes, whatever their order in `columns`.

    Raises:
      ContractError: A dtype, shape or number of rows that a block cannot hold.
    """
    scalars = [name for name, array in columns.items() if np.ndim(array) == 0]
    if scalars:
        raise ContractError(f"block column {scalars[0]!r}: the first axis must be the rows, got a scalar; add an axis.")
    layout = Layout.of({name: (array.dtype.name, array.shape[1:]) for name, array in columns.items()})
    lengths = {name: len(array) for name, array in columns.items()}
    rows = lengths[layout.columns[0].name]
    if len(set(lengths.values())) > 1:
        raise ContractError(f"block: all columns must have the same number of rows, got {lengths}; align them first.")
    if not 1 <= rows <= MAX_ROWS:
        raise ContractError(f"block: rows must be 1 to {MAX_ROWS}, got {rows}; split the columns before encoding.")
    values = (columns[c.name].astype(_stored(c.dtype), order="C", copy=False).tobytes() for c in layout.columns)
    return b"".join([layout.header(rows), *values])


def decode(record: bytes) -> dict[str, np.ndarray]:
    """Unpacks a record that `encode` made.

    Returns:
      The columns, of shape (rows, ...), as read-only views of `record`.

    Raises:
      ContractError: `record` is not a block, or is cut short.
    """
    layout, rows = _parse(record)
    start = len(layout.header(rows))
    columns = {}
    for column in layout.columns:
        count = rows * column.row_bytes // np.dtype(column.dtype).itemsize
        flat = np.frombuffer(record, _stored(column.dtype), count, start)
        columns[column.name] = flat.reshape(rows, *column.shape)
        start += rows * column.row_bytes
    return columns


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _parse(record: bytes) -> tuple[Layout, int]:
    """Reads and checks the header: (layout, rows)."""
    magic, version, size, rows, count = _FIXED.unpack_from(record.ljust(_FIXED.size, b"\0"))
    if magic != MAGIC or version != VERSION:
        found = f"{magic!r} version {version}"
        raise ContractError(f"block: a record must open with {MAGIC!r} version {VERSION}, got {found}; {_AGAIN}.")
    try:
        layout = Layout(tuple(_parse_columns(record[_FIXED.size : size], count)))
        sound = record.startswith(layout.header(rows)) and 1 <= rows <= MAX_ROWS
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ContractError(f"block: the header is damaged ({error}); {_AGAIN}.") from error
    if not sound or len(record) != size + rows * layout.row_bytes:
        raise ContractError(f"block: {len(record)} bytes do not hold the {rows} rows that the header tells; {_AGAIN}.")
    return layout, rows


def _parse_columns(body: bytes, count: int) -> Iterator[Column]:
    place = 0
    for _ in range(count):
        length, code, rank = struct.unpack_from("<BBB", body, place)
        name = body[place + 3 : place + 3 + length].decode()
        yield Column(name, DTYPES[code], struct.unpack_from(f"<{rank}I", body, place + 3 + length))
        place += 3 + length + 4 * rank


def write_blocks(path: pathlib.Path, blocks: Iterable[bytes]) -> dict[str, Any]:
    """Writes records into one TFRecord file, whole or not at all, holding one record in memory at a time.

    Args:
      path: Target, replaced if it exists; its folder must exist. Until the final rename the bytes lie beside it in
        `.<name>.<random>.tmp`, which stays behind only where the process was killed.
      blocks: What `encode` gave; may be none.

    Returns:
      {"name": file name, "rows", "blocks", "bytes": of the file, "sha256": of the file}: the file's manifest entry.

    Raises:
      ContractError: A record is not a block.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            facts = _write_records(file, blocks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, **facts}


def _write_records(file: BinaryIO, blocks: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    rows = count = size = 0
    for record in blocks:
        rows += _parse(record)[1]
        length = _LENGTH.pack(len(record))
        for part in (length, _masked_crc(length), record, _masked_crc(record)):
            file.write(part)
            digest.update(part)
            size += len(part)
        count += 1
    return {"rows": rows, "blocks": count, "bytes": size, "sha256": digest.hexdigest()}


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord does it (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def read_records(path: pathlib.Path) -> Iterator[bytes]:
    """Reads the records of a TFRecord file in order, checking both checksums of each.

    Raises:
      ContractError: The file is absent, cut short or damaged; the message has the record's number and byte.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ContractError(f"{path}: a readable file of blocks was promised, got {error}; {_AGAIN}.") from error
    with file:
        number = 0
        while True:
            where = f"{path}: record {number} at byte {file.tell()}"
            record = _read_record(file, where)
            if record is None:
                return
            yield record
            number += 1


def _read_record(file: BinaryIO, where: str) -> bytes | None:
    """The next record, or None at the end of the file."""
    head = file.read(_LENGTH.size + _CHECKSUM.size)
    if not head:
        return None
    if head[_LENGTH.size :] != _masked_crc(head[: _LENGTH.size]):
        raise ContractError(f"{where}: the checksum of its length does not fit; the file is damaged, {_AGAIN}.")
    (length,) = _LENGTH.unpack_from(head)
    record = file.read(length)
    if file.read(_CHECKSUM.size) != _masked_crc(record):
        raise ContractError(f"{where}: the checksum of its {length} bytes does not fit; the file is damaged, {_AGAIN}.")
    return record


def read_blocks(path: pathlib.Path) -> Iterator[dict[str, np.ndarray]]:
    """Reads a file that `write_blocks` wrote, one block at a time.

    Returns:
      Iterator over the columns of each block; see `decode`.

    Raises:
      ContractError: The file is absent, cut short or damaged, or a record is not a block; the message has the file
        and the record's number.
    """
    for number, record in enumerate(read_records(path)):
        try:
            yield decode(record)
        except ContractError as error:
            raise ContractError(f"{path}: record {number}: {error}") from error
