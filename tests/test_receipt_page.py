"""spec/RECEIPT.md, followed to the letter by a program that shares nothing with loratool but BLAKE3."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from conftest import Kit

import loratool

VALID = sorted((Path(__file__).parent.parent / "spec" / "vectors" / "1.0" / "valid").glob("*.lora.safetensors"))
MEMBERS = ("target", "kind", "shape", "rows", "expert", "experts", "layout", "rank", "alpha", "scaling", "scale",
           "direction", "axis")  # fmt: skip


def text_of(value: Any) -> str:
    """Section 2, by hand."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{text_of(k)}:{text_of(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    if isinstance(value, str):
        units = struct.unpack(f"<{len(value.encode('utf-16-le')) // 2}H", value.encode("utf-16-le"))
        named = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
        return '"' + "".join(named.get(u) or (chr(u) if 32 <= u < 127 else f"\\u{u:04x}") for u in units) + '"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def own_digest(document: dict[str, Any]) -> str:
    content = {name: value for name, value in document.items() if name != "digest"}
    return f"blake3:{blake3(text_of(content).encode('ascii')).hexdigest()}"


def adapter_digest(file: Path) -> str:
    """Section 4, from the bytes of a native file."""
    rfc8785 = pytest.importorskip("rfc8785")
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    manifest = json.loads(header["__metadata__"]["loratool"])
    number: dict[str, int] = {}
    updates = []
    for update in manifest["updates"]:
        name = update["target"]
        n = number[name] = number.get(name, -1) + 1
        entry = {member: update[member] for member in MEMBERS if member in update}
        entry |= {member: float(entry[member]) for member in ("alpha", "scale") if member in entry}
        entry["target"] = f"{update['part']}.{name}" if "part" in update else name
        prefix = f"{name}.{n}."
        parts = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
        updates.append((rfc8785.dumps(entry), {part: value for part, value in parts.items() if "." not in part}))
    hasher = blake3()
    if "when" in manifest:
        when = {member: value for member, value in manifest["when"].items() if "." not in member}
        hasher.update(rfc8785.dumps({"when": when}))
    for entry_bytes, parts in sorted(updates, key=lambda pair: pair[0]):
        hasher.update(entry_bytes)
        for part, value in sorted(parts.items()):
            first, last = value["data_offsets"]
            hasher.update(f"\n{part} {value['dtype']} {value['shape']}\n".encode() + raw[end + first : end + last])
    return f"blake3:{hasher.hexdigest()}"


@pytest.mark.parametrize("weight", [1, 0.5, -1e-7, 1e16, 3])
def test_the_digest_of_a_receipt(kit: Kit, weight: float) -> None:
    (kit / "adapter").rename(kit / 'ä \x7f"\\ 😀')
    loratool.merge(kit / "base", {str(kit / 'ä \x7f"\\ 😀'): weight}, kit / "out", dtype="fp32")
    document = json.loads((kit / "out" / "loratool_receipt.json").read_text(encoding="utf-8"))
    assert document["digest"] == own_digest(document)


def test_a_chain_of_receipts_has_the_digests_of_each(kit: Kit) -> None:
    report = loratool.merge(kit / "merged", kit / "adapter", kit / "two", onto_merged=True)
    document = json.loads((kit / "two" / "loratool_receipt.json").read_text(encoding="utf-8"))
    assert report.receipt.digest == document["digest"] == own_digest(document)
    assert document["previous"]["digest"] == own_digest(document["previous"])


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.name.partition(".")[0])
def test_the_digest_of_an_adapter(file: Path) -> None:
    from loratool.format import content_digest

    assert adapter_digest(file) == content_digest(loratool.load(file))
