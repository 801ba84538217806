"""The native file to the byte, its limits, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import FORMS, Maker, adapters, files_of, make_update, one, raw, scaling
from torch import Tensor

import loratool
from loratool import Adapter, BaseIdentity, LoratoolError, Target, Targeted, TensorIdentity, TensorRef
from loratool.adapter import overlaps
from loratool.format import content_digest
from loratool.updates import Add, Dora, Lokr, Lora, Replace, Scaling

PACKAGE = Path(loratool.__file__).parent
Json = dict[str, Any]

# --- to the byte ----------------------------------------------------------------------------------------------------

MANIFEST = (
    b'{\\"base\\":{},\\"features\\":[],\\"format\\":\\"loratool\\",\\"provenance\\":{\\"by\\":\\"\xc3\xa9\\"},'
    b'\\"updates\\":[{\\"alpha\\":2,\\"kind\\":\\"lora\\",\\"rank\\":1,\\"scale\\":2,\\"scaling\\":\\"alpha/rank\\",'
    b'\\"shape\\":[1,2],\\"target\\":\\"w\\"}],\\"version\\":\\"1.0\\"}'
)
HEADER = (
    b'{"__metadata__":{"loratool":"' + MANIFEST + b'"},'
    b'"w.0.A":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    b'"w.0.B":{"dtype":"BF16","shape":[1,1],"data_offsets":[8,10]}}'
)
GOLDEN = b"\x88\x01\0\0\0\0\0\0" + HEADER + b"       " + b"\0\0\x80?" + b"\0\0\0@" + b"\0?"


def tiny(**provenance: str) -> Adapter:
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]], dtype=torch.bfloat16)
    update = Lora(TensorRef.of(A), TensorRef.of(B), Scaling.by("alpha/rank", 2.0, 1))
    return Adapter((Targeted(Target("w", (1, 2)), update),), provenance=provenance)


def test_a_file_is_these_bytes(tmp_path: Path) -> None:
    loratool.save(tiny(by="é"), tmp_path / "a.lora.safetensors")
    assert (tmp_path / "a.lora.safetensors").read_bytes() == GOLDEN


def test_these_bytes_are_that_adapter(tmp_path: Path) -> None:
    path = tmp_path / "a.lora.safetensors"
    path.write_bytes(GOLDEN)
    assert loratool.validate(path) == []
    loaded = loratool.load(path)
    assert loaded.provenance == {"by": "é"}
    assert content_digest(loaded) == content_digest(tiny())
    with safe_open(path, "pt") as file:  # any reader of safetensors sees the tensors
        assert file.get_tensor("w.0.A").tolist() == [[1, 2]]
        assert file.get_tensor("w.0.B").tolist() == [[0.5]]


@given(adapter=adapters())
def test_data_is_in_canonical_order(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("a") / "a.lora.safetensors"
    loratool.save(adapter, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert next(iter(header)) == "__metadata__"
    manifest = header.pop("__metadata__")["loratool"]
    assert rfc8785.dumps(json.loads(manifest)).decode() == manifest
    size = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    assert [*header] == sorted(header, key=lambda name: (-size[header[name]["dtype"]], name))
    position = 0
    for entry in header.values():
        assert entry["data_offsets"] == [position, position + math.prod(entry["shape"]) * size[entry["dtype"]]]
        position = entry["data_offsets"][1]
    assert position == len(content) - 8 - length
    assert not re.search(rb"\d{4}-\d\d-\d\d|/tmp", content[: 8 + length]), "no time, no path"


# --- what is wrong --------------------------------------------------------------------------------------------------


def build(path: Path, manifest: object, tensors: Mapping[str, Tensor], **extra: str) -> Path:
    """A file with this manifest, in canonical form as far as it can have one."""
    text = manifest if isinstance(manifest, str) else rfc8785.dumps(manifest).decode()
    header: Json = {"__metadata__": {"loratool": text, **extra}}
    names = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bfloat16: "BF16"}
    position = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        value = tensors[name]
        end = position + value.nbytes
        header[name] = {"dtype": names[value.dtype], "shape": [*value.shape], "data_offsets": [position, end]}
        position = end
    return pack(path, header, b"".join(raw(tensors[name]) for name in order))


def pack(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, str) else json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    raw_text = text.encode("utf-8", "surrogatepass")
    raw_text += b" " * (-len(raw_text) % 8)
    path.write_bytes(struct.pack("<Q", len(raw_text)) + raw_text + data)
    return path


def parts() -> tuple[Json, dict[str, Tensor]]:
    """A valid manifest with many kinds in it, and its tensors."""
    lora = {"kind": "lora", "rank": 2, "alpha": 4, "scaling": "alpha/rank", "scale": 2}
    manifest: Json = {
        "format": "loratool",
        "version": "1.0",
        "features": ["add", "dora", "expert", "lokr", "replace", "replace_rows", "rows"],
        "updates": [
            {"target": "a", "shape": [4, 3], "rows": [0, 2], **lora},
            {"target": "a", "shape": [4, 3], "kind": "add", "scaling": "none", "scale": 1, "rows": [2, 4]},
            {
                "target": "b",
                "shape": [4, 3],
                "layout": "in_out",
                **lora,
                "kind": "dora",
                "direction": "lora",
                "axis": 0,
            },
            {"target": "c", "shape": [2, 4, 3], "expert": 1, **lora},
            {"target": "d", "shape": [4, 3], "kind": "lokr", "scaling": "none", "scale": 1.5},
            {"target": "e", "shape": [3], "kind": "replace"},
            {"target": "f", "shape": [5, 2], "kind": "replace_rows", "layout": "embedding"},
        ],
        "base": {
            "name": "some/model",
            "tensors": {"e": {"digest": "blake3:" + "0" * 64, "dtype": "BF16", "shape": [3]}},
        },
        "provenance": {"tool": "a test"},
    }
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    ones = torch.ones
    tensors = {
        "a.0.A": A,
        "a.0.B": B[:2].clone(),
        "a.1.value": ones(2, 3),
        "b.0.A": A,
        "b.0.B": B,
        "b.0.magnitude": ones(4),
        "c.0.A": A,
        "c.0.B": B,
        "d.0.w1": ones(2, 3),
        "d.0.w2": ones(2, 1),
        "e.0.value": ones(3),
        "f.0.index": torch.tensor([1, 4]),
        "f.0.value": ones(2, 2),
    }
    return manifest, tensors


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    path = build(tmp_path / "a.safetensors", *parts())
    assert loratool.validate(path) == []
    assert len(loratool.load(path).updates) == 7


Change = Callable[[Json, dict[str, Tensor]], object]


def put(*keys: Any) -> Change:
    """Set the value at a path of the manifest: the last argument is the value."""

    def change(manifest: Json, tensors: dict[str, Tensor]) -> None:
        *path, last, value = keys
        place: Any = manifest
        for key in path:
            place = place[key]
        place[last] = value

    return change


def drop(*keys: Any) -> Change:
    def change(manifest: Json, tensors: dict[str, Tensor]) -> None:
        *path, last = keys
        place: Any = manifest
        for key in path:
            place = place[key]
        del place[last]

    return change


def tensor(name: str, value: Tensor | None) -> Change:
    def change(manifest: Json, tensors: dict[str, Tensor]) -> None:
        del tensors[name]
        if value is not None:
            tensors[name] = value

    return change


def added(name: str) -> Change:
    return lambda manifest, tensors: tensors.update({name: torch.ones(1)})


PIN = {"digest": "blake3:" + "0" * 64, "dtype": "F32", "shape": [1]}


def conditional(when: Any) -> Change:
    return lambda manifest, tensors: manifest.update(when=when, features=["conditional", *manifest["features"]])


def other_rank(manifest: Json, tensors: dict[str, Tensor]) -> None:
    """The scale agrees with it, the factors do not."""
    manifest["updates"][0] |= {"rank": 1, "scale": 4}


WRONG: list[tuple[str, str, Change]] = [
    ("E-MANIFEST", "R-011", put("format", "lora")),
    ("E-MANIFEST", "R-011", put("version", "1")),
    ("E-MANIFEST", "R-011", put("version", 1.0)),
    ("E-VERSION", "R-012", put("version", "2.0")),
    ("E-FEATURE", "R-013", put("features", ["magic"])),
    ("E-FEATURE", "R-013", put("features", ["dora", "dora"])),
    ("E-MANIFEST", "R-013", put("features", [1])),
    ("E-UNKNOWN-KEY", "R-014", put("extra", 1)),
    ("E-UNKNOWN-KEY", "R-014", put("updates", 0, "extra", 1)),
    ("E-UNKNOWN-KEY", "R-014", put("updates", 0, "axis", 1)),
    ("E-UNKNOWN-KEY", "R-014", put("base", "extra", 1)),
    ("E-UNKNOWN-KEY", "R-014", put("base", "tensors", "e", "extra", 1)),
    *[("E-MANIFEST", "R-015", drop(key)) for key in ("features", "updates", "base", "provenance")],
    ("E-MANIFEST", "R-011", drop("format")),
    ("E-LIMIT", "R-016", put("updates", [])),
    ("E-LIMIT", "R-016", put("updates", 0, "target", "")),
    ("E-LIMIT", "R-016", put("updates", 0, "target", "a\x1fb")),
    ("E-LIMIT", "R-016", put("updates", 0, "target", "é" * 513)),
    ("E-LIMIT", "R-016", put("updates", 0, "rank", 0)),
    ("E-LIMIT", "R-016", put("updates", 0, "rank", 65_537)),
    ("E-LIMIT", "R-016", put("updates", 5, "shape", [1] * 9)),
    ("E-LIMIT", "R-016", put("updates", 5, "shape", [2**27, 2**27])),
    ("E-FEATURE", "R-017", put("features", ["add"])),
    ("E-MANIFEST", "R-020", put("updates", 0, 7)),
    ("E-MANIFEST", "R-020", put("updates", 0, "rank", 2.5)),
    ("E-MANIFEST", "R-020", put("updates", 0, "rank", True)),
    ("E-MANIFEST", "R-020", put("updates", 0, "shape", "4x3")),
    ("E-KIND", "R-021", put("updates", 0, "kind", "ia3")),
    ("E-SHAPE", "R-022", put("updates", 0, "shape", [4, 0])),
    ("E-SHAPE", "R-022", put("updates", 1, "shape", [5, 3])),
    ("E-RANGE", "R-023", put("updates", 0, "rows", [0, 5])),
    ("E-RANGE", "R-023", put("updates", 0, "rows", [1, 1])),
    ("E-RANGE", "R-023", put("updates", 3, "expert", 2)),
    ("E-RANGE", "R-023", put("updates", 3, "experts", 2)),
    ("E-RANGE", "R-023", put("updates", 6, "rows", [0, 2])),
    ("E-SCALE", "R-024", drop("updates", 0, "alpha")),
    ("E-SCALE", "R-024", put("updates", 0, "scaling", "alpha*rank")),
    ("E-SCALE", "R-024", put("updates", 1, "rank", 2)),
    ("E-SCALE", "R-024", put("updates", 5, "scale", 1)),
    ("E-SCALE", "R-025", put("updates", 0, "scale", 2.0001)),
    ("E-RANK", "R-026", other_rank),
    ("E-RANK", "R-026", put("updates", 4, "rank", 1)),
    ("E-RANK", "R-026", drop("updates", 0, "rank")),
    ("E-MANIFEST", "R-027", put("updates", 0, "layout", "")),
    ("E-MANIFEST", "R-028", put("updates", 2, "axis", 2)),
    ("E-MANIFEST", "R-028", put("updates", 2, "direction", "add")),
    ("E-COMPONENTS", "R-030", tensor("a.0.A", None)),
    ("E-COMPONENTS", "R-030", tensor("b.0.magnitude", None)),
    ("E-COMPONENTS", "R-030", added("a.2.A")),
    ("E-SHAPE", "R-031", tensor("a.0.A", torch.ones(2, 4))),
    ("E-DTYPE", "R-032", tensor("a.0.A", torch.ones(2, 3, dtype=torch.int32))),
    ("E-DTYPE", "R-032", tensor("f.0.index", torch.tensor([1, 4], dtype=torch.int32))),
    ("E-NONFINITE", "R-033", tensor("a.0.A", torch.full((2, 3), float("nan")))),
    ("E-RANGE", "R-034", tensor("f.0.index", torch.tensor([4, 1]))),
    ("E-RANGE", "R-034", tensor("f.0.index", torch.tensor([1, 5]))),
    ("E-BASE", "R-040", put("base", "name", 1)),
    ("E-BASE", "R-040", put("base", "tensors", "q", {"digest": "blake3:" + "0" * 64, "dtype": "F32", "shape": [1]})),
    ("E-BASE", "R-040", put("base", "tensors", "e", "digest", "sha1:" + "0" * 64)),
    ("E-BASE", "R-040", put("base", "revision", 1)),
    ("E-BASE", "R-040", put("base", "architecture", None)),
    ("E-BASE", "R-040", put("base", "tokenizer", "blake3:0")),
    ("E-BASE", "R-040", put("base", "added_tokens", ["<x>"])),
    ("E-BASE", "R-040", put("base", "added_tokens", {"<x>": True})),
    ("E-BASE", "R-040", put("base", "tensors", "e", "parts", {})),
    ("E-BASE", "R-040", put("base", "tensors", "e", "parts", {"scale": "blake3:" + "0" * 64})),
    ("E-UNKNOWN-KEY", "R-014", put("base", "tensors", "e", "parts", {"scale": {**PIN, "parts": {}}})),
    ("E-MANIFEST", "R-044", put("info", "text")),
    ("E-MANIFEST", "R-046", put("info", {"license": ["MIT"]})),
    ("E-LIMIT", "R-016", put("updates", 0, "acme.note", [0] * 100_000)),
    ("E-LIMIT", "R-016", put("base", "tensors", "e", "acme.note", [0] * 100_000)),
    ("E-MANIFEST", "R-045", conditional([])),
    ("E-MANIFEST", "R-045", conditional({})),
    ("E-MANIFEST", "R-045", conditional({"tokens": [1], "routing": "x"})),
    ("E-MANIFEST", "R-045", conditional({"tokens": []})),
    ("E-MANIFEST", "R-045", conditional({"tokens": [-1]})),
    ("E-MANIFEST", "R-045", conditional({"prompts": [1]})),
    ("E-MANIFEST", "R-045", conditional({"routing": ""})),
    ("E-UNKNOWN-KEY", "R-014", conditional({"moon": "full"})),
    ("E-FEATURE", "R-045", put("when", {"routing": "x"})),
    ("E-FEATURE", "R-045", put("features", ["conditional"])),
    ("E-MANIFEST", "R-048", put("updates", 0, "part", "")),
    ("E-MANIFEST", "R-048", put("updates", 0, "part", "a.b")),
    ("E-MANIFEST", "R-048", put("updates", 0, "part", 1)),
    ("E-MANIFEST", "R-042", put("provenance", "n", 1)),
]


def two_doras(manifest: Json, tensors: dict[str, Tensor]) -> None:
    manifest["updates"].append(manifest["updates"][2])
    tensors |= {name.replace("b.0", "b.1"): value for name, value in tensors.items() if name.startswith("b.0")}


def dora_and_add(manifest: Json, tensors: dict[str, Tensor]) -> None:
    manifest["updates"].append({"target": "b", "shape": [4, 3], "kind": "add", "scaling": "none", "scale": 1})
    tensors["b.1.value"] = torch.ones(4, 3)


WRONG += [("E-OVERLAP", "R-029", two_doras), ("E-OVERLAP", "R-029", dora_and_add)]


@pytest.mark.parametrize(("code", "rule", "change"), WRONG, ids=[f"{n}-{w[0]}-{w[1]}" for n, w in enumerate(WRONG)])
def test_one_thing_wrong_is_that_code_and_rule(code: str, rule: str, change: Change, tmp_path: Path) -> None:
    manifest, tensors = parts()
    change(manifest, tensors)
    path = build(tmp_path / "a.safetensors", manifest, tensors)
    found = loratool.validate(path)
    assert (code, rule) in {(problem.code, problem.rule) for problem in found}, found
    assert all(problem.where for problem in found)
    if rule not in ("R-017", "R-033", "R-034", "R-046"):  # duties of a validator alone
        with pytest.raises(LoratoolError) as caught:
            loratool.load(path)
        assert (code, rule) in {(problem.code, problem.rule) for problem in caught.value.problems}
        later = {"E-FEATURE", "E-KIND", "E-VERSION"}
        assert isinstance(caught.value, loratool.Unsupported if {code} <= later else loratool.InvalidFile)
    else:
        loratool.load(path)


def entry(**values: Any) -> Json:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **values}}


WRONG_FILES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("E-HEADER", "R-001", lambda p: p.write_bytes(b"")),
    ("E-HEADER", "R-001", lambda p: p.write_bytes(b"\xff" * 8 + b"{}")),
    ("E-HEADER", "R-001", lambda p: p.write_bytes(b"\x20" + b"\0" * 7 + b"{}")),
    ("E-HEADER", "R-002", lambda p: p.write_bytes(b"\x02" + b"\0" * 7 + b"\xff\xff")),
    ("E-HEADER", "R-002", lambda p: pack(p, "[1]", b"")),
    ("E-HEADER", "R-002", lambda p: pack(p, "{NaN}", b"")),
    ("E-HEADER", "R-002", lambda p: pack(p, '{"a": NaN}', b"")),
    ("E-HEADER", "R-002", lambda p: pack(p, ' {"__metadata__":{}}', b"")),
    ("E-HEADER", "R-002", lambda p: pack(p, '{"__metadata__":{"a":"\\ud800"}}', b"")),
    ("E-LIMIT", "R-002", lambda p: pack(p, '{"a":' + "[" * 17 + "]" * 17 + "}", b"")),
    ("E-LIMIT", "R-002", lambda p: pack(p, '{"a":' + "[" * 200_000 + "]" * 200_000 + "}", b"")),
    ("E-DUPLICATE", "R-003", lambda p: pack(p, '{"a":1,"\\u0061":2}', b"")),
    ("E-HEADER", "R-004", lambda p: pack(p, {"__metadata__": {"a": 1}}, b"")),
    ("E-HEADER", "R-004", lambda p: pack(p, entry(shape=[-1]), b"")),
    ("E-HEADER", "R-004", lambda p: pack(p, entry(shape=[True]), b"")),
    ("E-HEADER", "R-004", lambda p: pack(p, entry(data_offsets=[0]), b"")),
    ("E-HEADER", "R-004", lambda p: pack(p, entry(dtype=None), b"")),
    ("E-TENSOR", "R-005", lambda p: pack(p, entry(dtype="F33"), bytes(8))),
    ("E-TENSOR", "R-005", lambda p: pack(p, entry(shape=[3]), bytes(8))),
    ("E-TENSOR", "R-005", lambda p: pack(p, entry(shape=[2**53] * 30), bytes(8))),
    ("E-TENSOR", "R-005", lambda p: pack(p, entry(data_offsets=[8, 0]), bytes(8))),
    ("E-LAYOUT", "R-006", lambda p: pack(p, entry(), bytes(9))),
    ("E-LAYOUT", "R-006", lambda p: pack(p, entry(), bytes(7))),
    ("E-LAYOUT", "R-006", lambda p: pack(p, entry(data_offsets=[4, 12]), bytes(12))),
    ("E-MANIFEST", "R-010", lambda p: pack(p, entry(), bytes(8))),
    ("E-MANIFEST", "R-010", lambda p: build(p, "[]", {})),
    ("E-MANIFEST", "R-010", lambda p: build(p, "{", {})),
    ("E-DUPLICATE", "R-003", lambda p: build(p, '{"a":1,"a":2}', {})),
    ("E-CANONICAL", "R-050", lambda p: build(p, json.dumps(parts()[0]), parts()[1])),
    ("E-CANONICAL", "R-051", lambda p: build(p, *parts(), other="")),
    ("E-CANONICAL", "R-052", lambda p: reordered(p)),
]


def reordered(path: Path) -> Path:
    """The valid file with its data in the order of names, whatever their width."""
    manifest, tensors = parts()
    header: Json = {"__metadata__": {"loratool": rfc8785.dumps(manifest).decode()}}
    position = 0
    for name in sorted(tensors):
        value, end = tensors[name], position + tensors[name].nbytes
        dtype = "I64" if value.dtype == torch.int64 else "F32"
        header[name] = {"dtype": dtype, "shape": [*value.shape], "data_offsets": [position, end]}
        position = end
    return pack(path, header, b"".join(raw(tensors[name]) for name in sorted(tensors)))


@pytest.mark.parametrize(
    ("code", "rule", "write"), WRONG_FILES, ids=[f"{n}-{w[0]}-{w[1]}" for n, w in enumerate(WRONG_FILES)]
)
def test_a_wrong_container_is_that_code_and_rule(
    code: str, rule: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    found = loratool.validate(path)
    assert (code, rule) in {(problem.code, problem.rule) for problem in found}, found
    if code != "E-CANONICAL":
        with pytest.raises(LoratoolError):
            loratool.load(path)


def test_every_code_of_the_reader_is_among_these() -> None:
    sources = [PACKAGE / name for name in ("container.py", "adapter.py", "updates/base.py")]
    sources += (PACKAGE / "format").glob("*.py")
    known = {code for path in sources for code in re.findall(r'"(E-[A-Z-]+)"', path.read_text())}
    elsewhere = {"E-ALPHA", "E-READ"}  # of writing, below; of no file at all
    assert known - elsewhere == {code for code, _, _ in WRONG} | {code for code, _, _ in WRONG_FILES}


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    manifest, tensors = parts()
    for change in (put("extra", 1), put("updates", 0, "scale", 9), put("updates", 4, "kind", "x"), drop("provenance")):
        change(manifest, tensors)
    with pytest.raises(LoratoolError) as caught:
        loratool.load(build(tmp_path / "a.safetensors", manifest, tensors))
    assert {p.code for p in caught.value.problems} == {"E-UNKNOWN-KEY", "E-SCALE", "E-KIND", "E-MANIFEST"}


def test_vendor_keys_and_minor_versions_are_let_through(tmp_path: Path) -> None:
    manifest, tensors = parts()
    for change in (
        put("version", "1.7"),
        put("acme.note", [1]),
        put("updates", 0, "acme.x", None),
        put("base", "acme.y", 1),
    ):
        change(manifest, tensors)
    assert len(loratool.load(build(tmp_path / "a.safetensors", manifest, tensors)).updates) == 7


JUNK = [None, True, 0, -1, 7, 2.5, "", "x", "\x00", [], [[]], {}, {"a": 1}, ["x"], 10**400, -(10**400), 1e308, 2**63]


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [(*path, key) for key, _ in pairs] + [p for key, child in pairs for p in places(child, (*path, key))]


def judged(path: Path) -> str:
    """What reader and validator say together; neither may crash, and the validator sees all that the reader does."""
    found = loratool.validate(path)
    try:
        loratool.load(path)
    except LoratoolError:
        return "invalid" if found else "the validator missed it"
    return "readable" if found else "valid"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "9007199254740993", "1e-999", "0." + "1" * 400])
@pytest.mark.parametrize(
    "where", [("updates", 0, "alpha"), ("updates", 0, "scale"), ("acme.note",), ("base", "tensors", "e", "shape", 0)]
)
def test_numbers_that_no_double_holds_are_no_crash(number: str, where: tuple[Any, ...], tmp_path: Path) -> None:
    text = json.dumps(with_junk(parts()[0], where, "NUMBER"), ensure_ascii=False).replace('"NUMBER"', number)
    assert judged(build(tmp_path / "a.safetensors", text, parts()[1])) in ("valid", "invalid", "readable")


def with_junk(document: Json, where: tuple[Any, ...], junk: object) -> Json:
    changed = copy.deepcopy(document)
    put(*where, junk)(changed, {})
    return changed


@pytest.mark.parametrize("where", places(parts()[0]), ids=lambda where: ".".join(map(str, where)))
def test_junk_in_a_manifest_is_a_typed_error(where: tuple[Any, ...], tmp_path: Path) -> None:
    manifest, tensors = parts()
    for n, junk in enumerate(JUNK):
        text = json.dumps(with_junk(manifest, where, junk), ensure_ascii=False)
        path = build(tmp_path / f"{n}.safetensors", text, tensors)
        assert judged(path) in ("valid", "invalid", "readable"), junk


def test_junk_in_a_header_is_a_typed_error(tmp_path: Path) -> None:
    source = build(tmp_path / "good.safetensors", *parts()).read_bytes()
    length = struct.unpack("<Q", source[:8])[0]
    header = json.loads(source[8 : 8 + length])
    for n, where in enumerate(places(header)):
        for junk in JUNK:
            path = pack(tmp_path / f"{n}.safetensors", with_junk(header, where, junk), source[8 + length :])
            assert judged(path) in ("valid", "invalid", "readable"), (where, junk)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 1), (0,), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", [*parts()[1]])
def test_a_component_of_any_shape_is_a_typed_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    manifest, tensors = parts()
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)
    path = build(tmp_path / "a.safetensors", manifest, tensors)
    found = loratool.validate(path)
    assert found
    assert {problem.code for problem in found} <= {"E-SHAPE", "E-RANK", "E-RANGE"}


@given(data=st.data())
def test_no_bytes_crash_the_reader(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(build(folder / "good.safetensors", *parts()).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = folder / "bad.safetensors"
    path.write_bytes(content)
    assert judged(path) in ("valid", "invalid", "readable")


def test_many_names_with_one_twice_are_read_in_time(tmp_path: Path) -> None:
    """A header of a few megabytes must not keep the reader busy for hours."""
    names = [f'"{n}":0' for n in range(60_000)] + ['"59999":0']
    pack(tmp_path / "a.safetensors", "{" + ",".join(names) + "}", b"")
    code = "import sys, loratool; print(loratool.validate(sys.argv[1])[0].code)"
    done = subprocess.run(
        [sys.executable, "-c", f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, (5, 5))\n{code}",
         str(tmp_path / "a.safetensors")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert done.stdout == "E-DUPLICATE\n"


# --- limits ---------------------------------------------------------------------------------------------------------


def test_the_largest_allowed_are_allowed(tmp_path: Path) -> None:
    name = "é" * 512
    shape = (1,) * 8
    lora = make_update("lora", (2, 3), Maker(0), rank=4096)
    items = (
        Targeted(Target(name, shape), Replace(TensorRef.of(torch.ones(shape)))),
        Targeted(Target("w", (2, 3)), lora),
    )
    loratool.save(Adapter(items), tmp_path / "a.lora.safetensors")
    assert loratool.validate(tmp_path / "a.lora.safetensors") == []
    assert loratool.load(tmp_path / "a.lora.safetensors").updates[0].target.name == name


@pytest.mark.parametrize("scale", [5e-324, 1.7976931348623157e308, 0.1, -0.0, 2.0**53, 2.0**60, 1e21, -1e-7])
@pytest.mark.parametrize("rule", ["none", "alpha", "alpha/rank", "alpha/sqrt(rank)"])
def test_any_finite_scale_goes_through_a_file(scale: float, rule: str, tmp_path: Path) -> None:
    lora = make_update("lora", (2, 3), Maker(0), rank=3, rule=rule, alpha=scale)
    loratool.save(Adapter((Targeted(Target("w", (2, 3)), lora),)), tmp_path / "a.lora.safetensors")
    assert loratool.validate(tmp_path / "a.lora.safetensors") == []
    loaded = loratool.load(tmp_path / "a.lora.safetensors").updates[0].update.scaling
    assert loaded == lora.scaling


# --- writing --------------------------------------------------------------------------------------------------------


def lora_of(scale: Scaling, rank: int = 2) -> Lora:
    return Lora(TensorRef.of(torch.ones(rank, 3)), TensorRef.of(torch.ones(4, rank)), scale)


def of(update: Any, **target: Any) -> Adapter:
    return Adapter((Targeted(Target(**{"name": "w", "shape": (4, 3), **target}), update),))


GOOD = lora_of(Scaling.by("alpha/rank", 4.0, 2))
IDENTITY = TensorIdentity("blake3:" + "0" * 64, "F32", (4, 3))
CONTRADICTIONS = {
    "no updates": Adapter(()),
    "empty name": of(GOOD, name=""),
    "control character": of(GOOD, name="a\nb"),
    "long name": of(GOOD, name="x" * 1025),
    "surrogate": of(GOOD, name="\ud800"),
    "rank 0": of(lora_of(Scaling.by("alpha", 4.0, 0), 0)),
    "rank too large": of(lora_of(Scaling.by("alpha", 4.0, 65_537), 65_537)),
    "other rank": of(lora_of(Scaling.by("alpha", 4.0, 3))),
    "no rank": of(lora_of(Scaling("alpha", None, 4.0, 4.0))),
    "rank of an add": of(Add(TensorRef.of(torch.ones(4, 3)), Scaling("none", 2, None, 1.0))),
    "alpha of an add": of(Add(TensorRef.of(torch.ones(4, 3)), Scaling("alpha", None, 1.0, 1.0))),
    "other scale": of(lora_of(Scaling("alpha/rank", 2, 4.0, 4.0))),
    "unknown rule": of(lora_of(Scaling("alpha*rank", 2, 4.0, 8.0))),
    "rule without alpha": of(lora_of(Scaling("alpha", 2, None, 8.0))),
    "alpha without rule": of(lora_of(Scaling("none", 2, 4.0, 8.0))),
    "rule of a whole lokr": of(Lokr(Scaling("alpha/rank", 2, 4.0, 2.0), w1=TensorRef.of(torch.ones(2, 3)),
                                    w2=TensorRef.of(torch.ones(2, 1)))),
    "half a lokr": of(Lokr(Scaling(), w1=TensorRef.of(torch.ones(2, 3)))),
    "infinite scale": of(lora_of(Scaling("none", 2, None, math.inf))),
    "scale not a number": of(lora_of(Scaling("none", 2, None, math.nan))),
    "unknown scale": of(lora_of(Scaling("none", 2, None, None))),
    "unknown layout": of(GOOD, layout="out_in"),
    "rows outside": of(GOOD, rows=(0, 5)),
    "shape": of(GOOD, shape=(4, 4)),
    "nine dimensions": of(Replace(TensorRef.of(torch.ones((1,) * 9))), shape=(1,) * 9),
    "dora of an add": of(Dora(Add(TensorRef.of(torch.ones(4, 3)), Scaling()), TensorRef.of(torch.ones(4)), 0)),
    "dora along axis 2": of(Dora(make_update("lora", (4, 3, 2), Maker(0)), TensorRef.of(torch.ones(2)), 2),
                            shape=(4, 3, 2)),
    "base of another tensor": replace(of(GOOD), base=BaseIdentity("", {"v": IDENTITY})),
    "base of another shape": replace(of(GOOD), base=BaseIdentity("", {"w": replace(IDENTITY, shape=(3, 4))})),
    "digest": replace(of(GOOD), base=BaseIdentity("", {"w": replace(IDENTITY, digest="sha256:0")})),
    "two doras": Adapter(of(make_update("dora0-lora", (4, 3), Maker(0))).updates * 2),
    "integers": of(replace(GOOD, A=TensorRef.of(torch.ones(2, 3, dtype=torch.int64)))),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_could_not_be_read_is_not_written(what: str, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        loratool.save(CONTRADICTIONS[what], tmp_path / "a.lora.safetensors")
    assert not [*tmp_path.iterdir()]
    assert isinstance(caught.value, loratool.ChoiceNeeded if what == "unknown scale" else loratool.InvalidFile)


def test_a_part_of_an_adapter_can_be_saved(tmp_path: Path) -> None:
    """Its base identity may name more tensors than are left, and then those are left out, or it is refused."""
    whole = Adapter(
        tuple(Targeted(Target(name, (4, 3)), GOOD) for name in "vw"),
        BaseIdentity("", {"v": IDENTITY, "w": IDENTITY}),
    )
    some = replace(whole, updates=whole.updates[:1])
    try:
        loratool.save(some, tmp_path / "a.lora.safetensors")
    except loratool.InvalidFile:
        return
    assert loratool.validate(tmp_path / "a.lora.safetensors") == []


def test_a_failing_save_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def load(self, dtype: str, shape: tuple[int, ...]) -> Tensor:
            raise OSError("no such disk")

        def chunks(self, dtype: str, shape: tuple[int, ...]) -> Any:
            raise OSError("no such disk")

    lost = TensorRef("x", "F32", (2, 3), Broken(), (2, 3))
    with pytest.raises(LoratoolError):
        loratool.save(of(replace(GOOD, A=lost)), tmp_path / "a.lora.safetensors")
    assert files_of(tmp_path) == {}
    assert not [*tmp_path.iterdir()]


# --- identity -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_the_same_in_every_convention(tmp_path: Path) -> None:
    """By hand, out of the plain wrapper, as PEFT saves it, and as a native file."""
    A, B = Maker(0).values(2, 3, dtype=torch.float32), Maker(1).values(4, 2, dtype=torch.float32)
    hand = Lora(TensorRef.of(A), TensorRef.of(B), Scaling.by("alpha/rank", 8.0, 2))
    adapter = of(hand, name="block.fc.weight")
    plain = {"block.fc.linear.weight": torch.ones(4, 3), "block.fc.lora.A": A.T.contiguous(), "block.fc.lora.B": B.T}
    torch.save(plain, tmp_path / "plain.pt")
    peft = tmp_path / "peft"
    peft.mkdir()
    names = {"base_model.model.block.fc.lora_A.weight": A, "base_model.model.block.fc.lora_B.weight": B}
    save_file(names, peft / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["fc"], "fan_in_fan_out": False}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    loratool.save(adapter, tmp_path / "native.lora.safetensors")
    loratool.extract(tmp_path / "plain.pt", tmp_path / "extracted.lora.safetensors", alpha=8, scaling="alpha/rank")
    digests = {
        "hand": content_digest(adapter),
        "plain": content_digest(loratool.load(tmp_path / "plain.pt", alpha=8, scaling="alpha/rank")),
        "extracted": content_digest(loratool.load(tmp_path / "extracted.lora.safetensors")),
        "peft": content_digest(loratool.load(peft)),
        "native": content_digest(loratool.load(tmp_path / "native.lora.safetensors")),
    }
    assert len(set(digests.values())) == 1, digests
    assert load_file(tmp_path / "extracted.lora.safetensors").keys() == {"block.fc.weight.0.A", "block.fc.weight.0.B"}


@given(adapter=adapters(), data=st.data())
def test_a_digest_does_not_depend_on_the_order_of_targets(adapter: Adapter, data: st.DataObject) -> None:
    order = data.draw(st.permutations([*adapter.targets()]))
    sorted_updates = [item for name in order for item in adapter.targets()[name]]
    assert content_digest(replace(adapter, updates=tuple(sorted_updates))) == content_digest(adapter)
    assert content_digest(replace(adapter, provenance={"a": "b"}, base=BaseIdentity("x"))) == content_digest(adapter)


@pytest.mark.parametrize("form", FORMS)
def test_a_digest_depends_on_all_that_matters(form: str) -> None:
    adapter = one(form, (4, 6))
    ((item),) = adapter.updates
    others = [one(form, (4, 6), seed=1), one(form, (4, 6), name="other"), one(form, (4, 6), dtype="F64")]
    others.append(Adapter((replace(item, target=replace(item.target, layout="in_out")),)))
    others.append(Adapter((item, item)))
    if item.update.scaling is not None:
        others.append(one(form, (4, 6), alpha=7.0))
    assert len({content_digest(one) for one in [adapter, *others]}) == len(others) + 1


def counted(items: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pairs of updates are compared, of an adapter with one for every expert and a last one for all."""
    compared = 0

    def may_overlap(role: str, other: str) -> bool:
        nonlocal compared
        compared += 1
        return role == other == "add"

    monkeypatch.setattr("loratool.adapter._may_overlap", may_overlap)
    value = TensorRef.of(torch.ones(3))
    each = [
        Targeted(Target("w", (items, 3), expert=e), Add(value, Scaling("none", None, None, 1.0))) for e in range(items)
    ]
    whole = Targeted(Target("w", (items, 3)), Replace(TensorRef.of(torch.ones(items, 3))))
    assert [*overlaps(each)] == []
    assert [problem.code for problem in overlaps([*each, each[1], whole, replace(whole, target=each[1].target)])]
    return compared


def test_overlaps_are_found_in_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 updates of one target are a valid file: pairs of them are not compared."""
    assert counted(2000, monkeypatch) < 3 * counted(1000, monkeypatch)


def test_scaling_rules_are_what_they_say() -> None:
    assert Scaling.by("alpha", 12.0, 4).scale == 12
    assert Scaling.by("alpha/rank", 12.0, 4).scale == 3
    assert Scaling.by("alpha/sqrt(rank)", 12.0, 4).scale == 6
    assert scaling("none", 12.0, 4).scale == 12


@pytest.mark.parametrize("name", ["my.lora", "my.bin"])
def test_a_native_file_may_be_called_otherwise(tmp_path: Path, name: str) -> None:
    adapter = one("lora", (6, 4), name="a.weight")
    loratool.save(adapter, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / name)
    assert loratool.inspect(tmp_path / name).convention == "native"
    assert [item.target.name for item in loratool.load(tmp_path / name).updates] == ["a.weight"]
    assert loratool.validate(tmp_path / name) == []
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00." + b"\0" * 20)
    with pytest.raises(loratool.LoratoolError):
        loratool.load(tmp_path / name)
