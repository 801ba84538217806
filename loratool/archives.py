"""The zip archives that torch.save writes: where their records lie, and how one is finished that is written again.

Every record is stored as it is, aligned, with its CRC-32 behind its data (in a data descriptor) and in the directory at
the end (torch's ``caffe2/serialize/inline_container.cc``; the format is PKWARE's APPNOTE). A receipt is one record
more, which torch.load does not look at.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from loratool.errors import InvalidFile, Problem
from loratool.tensors import CHUNK, reading

RECEIPT = "loratool.receipt"  # what it is called here, and in the header of a safetensors file
MAX_RECEIPT = 100_000_000

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_LIMIT = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """A file in the archive. `start` is where its data begins, `entry` its bytes in the directory."""

    name: str
    local: int
    start: int
    size: int
    crc: int
    described: bool  # whether its CRC-32 is behind its data, not before it
    entry: bytes


@dataclass(frozen=True)
class Archive:
    """An archive of torch.save. `folder` is what its records' names begin with, `end` where the directory begins."""

    path: Path
    folder: str
    records: tuple[Record, ...]
    end: int

    def storage(self, key: str) -> Record:
        return self._by_name[f"{self.folder}data/{key}"]

    @cached_property
    def _by_name(self) -> dict[str, Record]:
        return {record.name: record for record in self.records}

    def tail_size(self, receipt: bytes | None) -> int:
        """How many bytes follow the records."""
        return len(self._tail(receipt, {}, self.end))

    def finish(self, path: Path, changed: Collection[str], receipt: bytes | None) -> None:
        """Write what follows the records of a copy whose storages `changed` hold other numbers: they are read once."""
        with path.open("r+b") as file:
            crcs = {}
            for key in changed:
                record = self.storage(key)
                crc = crcs[record.name] = _crc(file, record)
                file.seek(record.start + record.size + 4 if record.described else record.local + 14)
                file.write(struct.pack("<I", crc))
            file.seek(self.end)
            file.write(self._tail(receipt, crcs, self.end))
            file.truncate()

    def _tail(self, receipt: bytes | None, crcs: dict[str, int], start: int) -> bytes:
        """The receipt's record, the directory, and its end (always with zip64's, as torch writes it)."""
        head = b""
        entries = [_with_crc(record.entry, crcs.get(record.name, record.crc)) for record in self.records]
        if receipt is not None:
            name, crc, size = f"{self.folder}{RECEIPT}".encode(), zlib.crc32(receipt), len(receipt)
            fields = struct.pack("<HHHHHIIIH", 20, 0x0800, 0, 0, 0x21, crc, size, size, len(name))
            head = _LOCAL + fields + struct.pack("<H", 0) + name + receipt
            extra = struct.pack("<HHQ", 1, 8, start) if start >= _LIMIT else b""
            place = struct.pack("<HHHHII", len(extra), 0, 0, 0, 0, min(start, _LIMIT))
            entries.append(_CENTRAL + struct.pack("<H", 45) + fields + place + name + extra)
        directory, count = b"".join(entries), len(entries)
        at = start + len(head)
        end64 = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 0x031E, 45, 0, 0, count, count, len(directory), at)
        locator = b"PK\x06\x07" + struct.pack("<IQI", 0, at + len(directory), 1)
        few, short, near = min(count, 0xFFFF), min(len(directory), _LIMIT), min(at, _LIMIT)
        end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, few, few, short, near, 0)
        return head + directory + end64 + locator + end


def open_archive(path: Path) -> Archive:
    """Raises InvalidFile where the file is no archive as torch.save writes them."""
    try:
        with reading(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = [info.filename for info in archive.infolist() if info.filename.endswith("data.pkl")]
            if len(names) != 1 or any(info.compress_type for info in archive.infolist()):
                raise ValueError("not one that torch.save wrote")
            folder = names[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            entries = _entries(file, archive.start_dir, len(archive.infolist()))
            records = [_record(file, info, entry) for info, entry in zip(archive.infolist(), entries, strict=True)]
            end = archive.start_dir
            if records[-1].name == folder + RECEIPT:  # the receipt of an earlier merge: a new one takes its place
                end = records.pop().local
    except (ValueError, zipfile.BadZipFile, struct.error, IndexError) as error:
        raise InvalidFile(Problem("E-PICKLE", f"not a readable archive: {error}", str(path))) from None
    return Archive(path, folder, tuple(records), end)


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file would have in its header: the receipt, if there is one, under its key."""
    if not zipfile.is_zipfile(path):
        return {}
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            last = archive.infolist()[-1]
            if last.filename.rpartition("/")[2] != RECEIPT or last.compress_type or last.file_size > MAX_RECEIPT:
                return {}
            return {RECEIPT: archive.read(last).decode("utf-8")}
    except (zipfile.BadZipFile, UnicodeDecodeError, IndexError, EOFError) as error:
        raise InvalidFile(Problem("E-RECEIPT", f"its receipt can not be read: {error}", str(path))) from None


def _entries(file: BinaryIO, start: int, count: int) -> list[bytes]:
    """The directory, an entry each."""
    file.seek(start)
    found = []
    for _ in range(count):
        fixed = file.read(46)
        if fixed[:4] != _CENTRAL:
            raise ValueError("its directory is not where its end says")
        found.append(fixed + file.read(sum(struct.unpack("<HHH", fixed[28:34]))))
    return found


def _record(file: BinaryIO, info: zipfile.ZipInfo, entry: bytes) -> Record:
    file.seek(info.header_offset)
    fixed = file.read(30)
    if fixed[:4] != _LOCAL:
        raise ValueError(f"{info.filename} is not where the directory says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", fixed[26:30]))
    described = bool(info.flag_bits & 8)
    if described:
        file.seek(start + info.file_size)
        if file.read(4) != _DESCRIPTOR:
            raise ValueError(f"{info.filename} has no descriptor")
    return Record(info.filename, info.header_offset, start, info.file_size, info.CRC, described, entry)


def _with_crc(entry: bytes, crc: int) -> bytes:
    return entry[:16] + struct.pack("<I", crc) + entry[20:]


def _crc(file: BinaryIO, record: Record) -> int:
    file.seek(record.start)
    crc, left = 0, record.size
    while left:
        piece = file.read(min(left, CHUNK))
        if not piece:
            raise ValueError(f"{record.name} is cut short")
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc
