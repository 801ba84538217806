"""Hostile and broken files: always a typed error, never a traceback, a partial output, a run program or a full memory.

Each test breaks one file of the kit (conftest.py) in many ways, runs every command that reads such a file, and
collects what went wrong, so that one failure names all cases.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX, Cli, Kit, Result, container, opened, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool

INFINITE = "<1e999>"  # stands for the literal 1e999, which json.dumps can not write
# One of each JSON type, and the values that conversions stumble over.
ODD: list[Any] = [None, True, 0, -1, 1.5, 2**70, 10**400, INFINITE, "x", "", [], [1], {}, {"a": 1}]
ERROR_LINE = re.compile(r"error\[E-[A-Z0-9-]+\]: \S")


# ---------------------------------------------------------------- helpers


def dumps(document: object) -> str:
    return json.dumps(document).replace(json.dumps(INFINITE), "1e999")


def paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with one value replaced, or added."""
    copy = json.loads(json.dumps(document))
    if not path:
        return value
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return copy


def without(document: Any, path: tuple[Any, ...]) -> Any:
    copy = json.loads(json.dumps(document))
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    del owner[path[-1]]
    return copy


def commands(kit: Kit, role: str, path: Path, out: Path) -> list[list[object]]:
    """Every command line that reads `path` in a role."""
    base, adapter, merged = kit / "base", kit / "adapter", kit / "merged"
    looks = [["inspect", path], ["inspect", path, "--json"]]
    if role == "adapter":
        return [
            *looks,
            ["inspect", path, "--base", base, "--layers"],
            ["validate", path],
            ["merge", base, path, "-o", out],
            ["unmerge", merged, path, "-o", out],
        ]
    if role == "base":
        return [
            *looks,
            ["inspect", adapter, "--base", path],
            ["merge", path, adapter, "-o", out],
            ["merge", path, adapter, "-o", out, "--dtype", "bf16", "--json"],
            ["unmerge", merged, adapter, "--base", path, "-o", out],
        ]
    if role == "merged":
        return [
            *looks,
            ["unmerge", path, adapter, "-o", out],
            ["unmerge", path, adapter, "-o", out, "--dry-run"],
            ["unmerge", path, adapter, "--base", base, "-o", out],
            ["merge", path, adapter, "-o", out],
        ]
    assert role == "wrapped"
    scale = ["--alpha", "4", "--scaling", "alpha/rank"]
    return [
        *looks,
        ["extract", path, "-o", out, *scale],
        ["extract", path, "-o", out, *scale, "--base-out", out.with_name("out2")],
        ["merge", base, path, "-o", out],
    ]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Attack:
    """Runs commands on broken files and keeps what was not answered as it should be."""

    def __init__(self, kit: Kit, cli: Cli) -> None:
        self.kit, self.cli = kit, cli
        self.out = kit.folder.parent / "output" / "out"
        self.out.parent.mkdir()
        self.failures: dict[str, list[str]] = {}
        self.before = tree(kit.folder)

    def run(self, what: object, role: str, path: Path, must_fail: bool = False, quick: bool = False) -> None:
        """Every command on a path; a look and one that writes, where there are many paths and `quick` is said."""
        for arguments in commands(self.kit, role, path, self.out)[1 if quick else 0 :: 3 if quick else 1]:
            result = self.cli(*arguments)
            self.note(f"{what!s:.90} | {arguments[0]}", self.wrong(arguments, result, must_fail))
            self.clear()

    def note(self, what: str, reason: str) -> None:
        """Keep a failure; one of a kind is enough to see it, so others with its reason are only counted."""
        if reason:
            self.failures.setdefault(reason, []).append(what)

    def clear(self) -> None:
        for left in self.out.parent.iterdir():
            remove(left)

    def wrong(self, arguments: list[object], result: Result, must_fail: bool) -> str:
        """Why a result is not a good answer; "" if it is."""
        as_json = "--json" in arguments
        left = sorted(path.name for path in self.out.parent.iterdir())
        if result.code not in (0, 1, 2):
            bug = re.search(r"sorry: (.*?)(?:\",)?$", result.err + result.out, re.M)
            return f"exit {result.code}: {bug[1] if bug else result.err:.120}"
        if "Traceback" in result.err + result.out or "Warning" in result.err:
            return f"exit {result.code} with {result.err[:120]}"
        if as_json:
            try:
                document = result.json
            except (AssertionError, ValueError) as error:
                return f"stdout is not one JSON document: {error}"
            if document["ok"] != (result.code == 0):
                return f"ok is {document['ok']}, the exit code {result.code}"
        elif result.code and arguments[0] != "validate" and not ERROR_LINE.match(result.err):
            return f"exit {result.code} without an error line: {result.err[:100]!r}"
        if result.code and left:
            return f"exit {result.code}, and {left} is there"
        if any(".partial-" in name for name in left):
            return f"left {left}"
        told = "problem[E-" in result.out if not as_json else bool(result.json.get("problems"))
        if must_fail and result.code == 0 and not (arguments[0] == "inspect" and told):  # looking works, and tells
            return "exit 0: accepted"
        return ""

    def done(self) -> None:
        told = [f"{reason}: {cases[0]} (and {len(cases) - 1} more)" for reason, cases in self.failures.items()]
        self.failures.clear()
        assert not told, f"{len(told)} kinds of wrong answers:\n" + "\n".join(told)


@pytest.fixture
def attack(kit: Kit, cli: Cli) -> Attack:
    return Attack(kit, cli)


def capped(*arguments: object, seconds: float = 30) -> tuple[int, str, int]:
    """Run the command line in a process of its own: its exit code, its stderr, and its peak memory in bytes.

    It says the peak itself, where the system tells it: what a parent is told begins with the parent's own size.
    """
    script = "\n".join(
        (
            "import atexit, sys",
            "def peak():",
            "    lines = [line.split() for line in open('/proc/self/status') if line.startswith('VmHWM')]",
            "    sys.stderr.write(f'\\npeak {lines[0][1]}')",
            "if sys.platform == 'linux': atexit.register(peak)",
            "from loratool.cli import main; main()",
        )
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + seconds
        os.set_blocking(process.stderr.fileno(), True)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        error, _, peak = process.stderr.read().decode().partition("\npeak ")
    return process.returncode, error, (int(peak) if peak else usage.ru_maxrss) * 1024


# ---------------------------------------------------------------- truncation and flipped bits

CUT = [
    ("adapter", "native.lora.safetensors", ""),
    ("adapter", "adapter/adapter_model.safetensors", "adapter"),
    ("adapter", "adapter/adapter_config.json", "adapter"),
    ("base", "base/model.safetensors", "base"),
    ("base", "base/config.json", "base"),
    ("base", "sharded/model.safetensors.index.json", "sharded"),
    ("base", "sharded/model-00002-of-00002.safetensors", "sharded"),
    ("merged", "merged/loratool_receipt.json", "merged"),
    ("merged", "merged.safetensors", ""),
]


def steps(size: int, count: int) -> list[int]:
    """At most `count` positions of a file: all of a small one, its ends and an even spread of a larger one."""
    if size <= count:
        return list(range(size))
    return sorted({*range(24), *range(size - 24, size), *range(0, size, size // count + 1)})


@pytest.mark.parametrize(("role", "name", "folder"), CUT, ids=[name for _, name, _ in CUT])
def test_every_truncation_is_refused(attack: Attack, kit: Kit, role: str, name: str, folder: str) -> None:
    file = kit / name
    whole = file.read_bytes().rstrip(b"\n")
    for length in steps(len(whole), 60):
        file.write_bytes(whole[:length])
        attack.run(f"{length} bytes", role, kit / folder if folder else file)
        if name != "base/config.json":  # which nobody needs to look at a base
            with pytest.raises(loratool.LoratoolError):
                loratool.load(kit / folder if folder else file)
            try:
                found = loratool.inspect(kit / folder if folder else file)
            except loratool.LoratoolError:
                continue
            assert found.problems, "what can be looked at is told"
    attack.done()


@pytest.mark.parametrize("name", ["plain.pth", "plain.legacy.pth", "peft.pth"])
def test_every_truncated_pickle_is_refused(attack: Attack, kit: Kit, name: str) -> None:
    file = kit / name
    whole = file.read_bytes()
    for length in steps(len(whole), 80):
        file.write_bytes(whole[:length])
        attack.run(f"{length} bytes", "wrapped", file, must_fail=True)
    attack.done()


@pytest.mark.parametrize(("role", "name", "folder"), CUT, ids=[name for _, name, _ in CUT])
def test_flipped_bits_are_answered(attack: Attack, kit: Kit, role: str, name: str, folder: str) -> None:
    file = kit / name
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else len(whole)
    for position in [*steps(header, 300), *steps(len(whole), 10)]:
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        file.write_bytes(broken)
        arguments = commands(kit, role, kit / folder if folder else file, attack.out)[position % 6]
        result = attack.cli(*arguments)
        attack.note(f"byte {position}", attack.wrong(arguments, result, must_fail=False))
        attack.clear()
    attack.done()


@pytest.mark.parametrize("name", ["plain.pth", "plain.legacy.pth", "peft.pth"])
def test_flipped_bits_of_a_pickle_are_answered(attack: Attack, kit: Kit, name: str) -> None:
    file = kit / name
    whole = file.read_bytes()
    for position in steps(len(whole), 150):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        file.write_bytes(broken)
        arguments = commands(kit, "wrapped", file, attack.out)[position % 4]
        result = attack.cli(*arguments)
        attack.note(f"byte {position}", attack.wrong(arguments, result, must_fail=False))
        attack.clear()
    attack.done()


# ---------------------------------------------------------------- safetensors headers that lie

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


DATA = b"\0" * 8
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "E-HEADER"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "E-HEADER"),
    "length 0": (container("", DATA), "E-HEADER"),
    "length 1": (container("{", DATA), "E-HEADER"),
    "length past the end": (container({"a": F32}, b"", length=10_000), "E-HEADER"),
    "length 2^63": (container({"a": F32}, DATA, length=2**63), "E-HEADER"),
    "length 2^64-1": (container({"a": F32}, DATA, length=2**64 - 1), "E-HEADER"),
    "length over the limit": (container({"a": F32}, DATA, length=100_000_001), "E-HEADER"),
    "length one short": (container({"a": F32}, DATA, length=len(json.dumps({"a": F32})) - 1), "E-HEADER"),
    "not JSON": (container("{'a': 1}", DATA), "E-HEADER"),
    "a list": (container("[]", DATA), "E-HEADER"),
    "a string": (container('"ab"', DATA), "E-HEADER"),
    "null": (container("null", DATA), "E-HEADER"),
    "leading blank": (container(" " + json.dumps({"a": F32}), DATA), "E-HEADER"),
    "byte order mark": (container("\ufeff" + json.dumps({"a": F32}), DATA), "E-HEADER"),
    "two documents": (container(json.dumps({"a": F32}) * 2, DATA), "E-HEADER"),
    "not UTF-8": (container(json.dumps({"a": F32}).encode().replace(b"a", b"\xff"), DATA), "E-HEADER"),
    "UTF-16": (container(json.dumps({"a": F32}).encode("utf-16"), DATA), "E-HEADER"),
    "raw surrogate": (container('{"\ud800":' + json.dumps(F32) + "}", DATA), "E-HEADER"),
    "escaped surrogate": (container('{"\\ud800":' + json.dumps(F32) + "}", DATA), "E-HEADER"),
    "NUL padding": (container(json.dumps({"a": F32}) + "\0\0", DATA), "E-HEADER"),
    "NaN": (container('{"a": NaN}', DATA), "E-HEADER"),
    "Infinity": (container('{"a": {"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', DATA), "E-HEADER"),
    "1e999": (container('{"a": {"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', DATA), "E-HEADER"),
    "number of 5000 digits": (container('{"a": {"shape":[' + "9" * 5000 + "]}}", DATA), "E-HEADER"),
    "nested 17 deep": (container('{"a":' + nested(17) + "}", DATA), "E-LIMIT"),
    "nested 100,000 deep": (container('{"a":' + nested(100_000) + "}", DATA), "E-LIMIT"),
    "objects 100,000 deep": (container('{"a":' * 100_000 + "1" + "}" * 100_000, DATA), "E-LIMIT"),
    "the same tensor twice": (container('{"a":' + dumps(F32) + ',"a":' + dumps(F32) + "}", DATA), "E-DUPLICATE"),
    "the same key twice": (container('{"a":{"dtype":"F32","dtype":"F32"}}', DATA), "E-DUPLICATE"),
    "metadata twice": (container('{"__metadata__":{},"__metadata__":{},"a":' + dumps(F32) + "}", DATA), "E-DUPLICATE"),
    "a key of metadata twice": (container('{"__metadata__":{"x":"","x":""}}'), "E-DUPLICATE"),
    "metadata is a list": (container({"__metadata__": [], "a": F32}, DATA), "E-HEADER"),
    "metadata is a string": (container({"__metadata__": "x", "a": F32}, DATA), "E-HEADER"),
    "metadata is 0": (container({"__metadata__": 0, "a": F32}, DATA), "E-HEADER"),
    "metadata of numbers": (container({"__metadata__": {"x": 1}, "a": F32}, DATA), "E-HEADER"),
    "metadata of null": (container({"__metadata__": {"x": None}, "a": F32}, DATA), "E-HEADER"),
    "metadata of objects": (container({"__metadata__": {"loratool": {}}, "a": F32}, DATA), "E-HEADER"),
    "entry is null": (container({"a": None}, DATA), "E-HEADER"),
    "entry is a list": (container({"a": [F32]}, DATA), "E-HEADER"),
    "no dtype": (container({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA), "E-HEADER"),
    "no shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA), "E-HEADER"),
    "no offsets": (container({"a": {"dtype": "F32", "shape": [2]}}, DATA), "E-HEADER"),
    "dtype is a list": (container({"a": entry(dtype=["F32"])}, DATA), "E-HEADER"),
    "dtype unknown": (container({"a": entry(dtype="F33")}, DATA), "E-TENSOR"),
    "dtype in lower case": (container({"a": entry(dtype="f32")}, DATA), "E-TENSOR"),
    "dtype empty": (container({"a": entry(dtype="")}, DATA), "E-TENSOR"),
    "shape is a number": (container({"a": entry(shape=2)}, DATA), "E-HEADER"),
    "shape of strings": (container({"a": entry(shape=["2"])}, DATA), "E-HEADER"),
    "shape of true": (container({"a": entry(shape=[True, 2])}, DATA), "E-HEADER"),
    "shape of fractions": (container({"a": entry(shape=[2.0])}, DATA), "E-HEADER"),
    "shape is negative": (container({"a": entry(shape=[-2])}, DATA), "E-HEADER"),
    "two negatives": (container({"a": entry(shape=[-1, -2])}, DATA), "E-HEADER"),
    "shape is nested": (container({"a": entry(shape=[[2]])}, DATA), "E-HEADER"),
    "shape too large for the offsets": (container({"a": entry(shape=[3])}, DATA), "E-TENSOR"),
    "shape that overflows to 2": (container({"a": entry(shape=[2**32, 2**32 + 1])}, DATA), "E-TENSOR"),
    "shape of 2^62": (container({"a": entry(shape=[2**62])}, DATA), "E-HEADER"),
    "shape beyond any float": (container({"a": entry(shape=[2**53] * 30)}, DATA), "E-TENSOR"),
    "shape of a million ones": (container({"a": entry(shape=[1] * 100_000 + [3])}, DATA), "E-TENSOR"),
    "F4 that ends within a byte": (container({"a": entry(dtype="F4", shape=[15])}, DATA), "E-TENSOR"),
    "offsets backwards": (container({"a": entry(data_offsets=[8, 0])}, DATA), "E-TENSOR"),
    "offsets of three": (container({"a": entry(data_offsets=[0, 8, 8])}, DATA), "E-HEADER"),
    "offsets of one": (container({"a": entry(data_offsets=[8])}, DATA), "E-HEADER"),
    "offsets of strings": (container({"a": entry(data_offsets=["0", "8"])}, DATA), "E-HEADER"),
    "offsets of fractions": (container({"a": entry(data_offsets=[0.0, 8.0])}, DATA), "E-HEADER"),
    "offsets negative": (container({"a": entry(data_offsets=[-8, 0])}, DATA), "E-HEADER"),
    "offsets past the end": (container({"a": entry(data_offsets=[8, 16])}, DATA), "E-LAYOUT"),
    "overlap": (container({"a": F32, "b": entry(data_offsets=[4, 12])}, DATA * 2), "E-LAYOUT"),
    "two tensors on one place": (container({"a": F32, "b": F32}, DATA), "E-LAYOUT"),
    "hole": (container({"a": F32, "b": entry(data_offsets=[12, 20])}, DATA * 3), "E-LAYOUT"),
    "hole at the start": (container({"a": entry(data_offsets=[4, 12])}, DATA * 2), "E-LAYOUT"),
    "trailing byte": (container({"a": F32}, DATA + b"\0"), "E-LAYOUT"),
    "missing byte": (container({"a": F32}, DATA[:-1]), "E-LAYOUT"),
    "data without tensors": (container({}, DATA), "E-LAYOUT"),
    "no tensor": (container({}), "E-EMPTY"),
    "empty tensor beside its place": (
        container({"a": F32, "b": entry(shape=[0], data_offsets=[4, 4])}, DATA),
        "E-LAYOUT",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(attack: Attack, kit: Kit, case: str) -> None:
    content, code = LIES[case]
    file = kit.write("bad.safetensors", content)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.inspect(file)
    assert caught.value.code == code
    assert caught.value.where == str(file)
    assert len(str(caught.value)) < 2000, "a hostile file must not flood the terminal"
    attack.run(case, "adapter", file, must_fail=True)
    attack.run(case, "base", file, must_fail=True)
    for name, role in (("base/model.safetensors", "base"), ("adapter/adapter_model.safetensors", "adapter")):
        kit.write(name, content)
        attack.run(f"{case} in {name}", role, (kit / name).parent, must_fail=True)
    attack.done()


def test_many_names_with_one_duplicate_are_refused(kit: Kit, cli: Cli) -> None:
    count = 200_000  # a search that takes quadratic time would not end before the test's own limit
    names = [*range(count), count - 1]
    file = kit.write("bad.safetensors", container("{" + ",".join(f'"{name}":0' for name in names) + "}"))
    assert "E-DUPLICATE" in cli("inspect", file).err


def test_many_updates_of_one_tensor_are_checked(kit: Kit, cli: Cli) -> None:
    manifest, count = kit.manifest(), 40_000  # comparing every pair would not end before the test's own limit
    add = {"target": "t", "kind": "add", "shape": [], "scaling": "none", "scale": 1}
    manifest |= {"updates": [add] * count, "features": ["add"], "base": {}}
    tensors = {f"t.{n}.value": {"dtype": "F32", "shape": [], "data_offsets": [4 * n, 4 * n + 4]} for n in range(count)}
    header = {"__metadata__": {"loratool": json.dumps(manifest)}, **tensors}
    file = kit.write("many.lora.safetensors", container(header, b"\0" * 4 * count))
    assert cli("inspect", file).code == 0


def test_claims_of_size_do_not_fill_the_memory(kit: Kit) -> None:
    limit = 600 << 20  # torch itself takes 200 to 300 MB
    sparse = kit / "sparse.safetensors"
    sparse.write_bytes(container({"a": F32}, b"", length=99_000_000))
    os.truncate(sparse, 99_000_008)  # a header of 99 MB of NUL
    hostile = {
        "header of 99 MB": sparse,
        "tensor of 2^50 bytes": kit.write("huge.safetensors", container({"a": entry(shape=[2**48])}, DATA)),
        "pickle of 2^40 elements": zipped(kit / "huge.pth", listing({"a": rebuilt((2**20, 2**20), count=2**40)})),
        "memo index of a pickle": zipped(kit / "memo.pth", b"\x80\x02}r\xff\xff\xff\x03."),
        "bytes of 2^40 in a pickle": zipped(kit / "bytes.pth", b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."),
        "zip of 90 MB of zeros": zipped(kit / "bomb.pth", b"\0" * 90_000_000, zipfile.ZIP_DEFLATED),
    }
    wrong = {}
    for case, file in hostile.items():
        code, error, memory = capped("inspect", file)
        if memory > limit or code not in (0, 2) or "E-BUG" in error:
            wrong[case] = f"exit {code}, {memory >> 20} MB, {error[:100]}"
    receipt = put(kit.json("merged/loratool_receipt.json"), ("tensors", "l.0.q.weight", "base_shape"), [2**40, 2**10])
    kit.write("merged/loratool_receipt.json", receipt)
    code, error, memory = capped("unmerge", kit / "merged", kit / "adapter", "-o", kit / "out")
    if memory > limit or code != 2 or "E-BUG" in error:
        wrong["receipt with a base of 2^50 elements"] = f"exit {code}, {memory >> 20} MB, {error[:100]}"
    assert not wrong


def test_truncated_while_it_is_read(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    base = kit / "base" / "model.safetensors"
    planned = loratool.plan(kit / "base", kit / "adapter", kit / "out")
    os.truncate(base, base.stat().st_size - 30)
    from loratool.merge import run_merge

    with pytest.raises(loratool.LoratoolError) as caught:
        run_merge(planned)
    assert caught.value.code == "E-CHANGED"
    assert not (kit / "out").exists()


# ---------------------------------------------------------------- JSON beside the weights

BROKEN_JSON: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "trailing comma": b'{"a": 1,}',
    "comment": b"{} // x",
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "lone surrogate": b'{"a": "\\ud800"}',
    "NaN": b'{"lora_alpha": NaN}',
    "-Infinity": b'{"lora_alpha": -Infinity}',
    "duplicate": b'{"r": 1, "r": 2}',
    "duplicate deep inside": b'{"a": [{"b": {"r": 1, "r": 2}}]}',
    "deep": b'{"a": ' + nested(50_000).encode() + b"}",
    "deeper than the limit": b'{"a": ' + nested(20).encode() + b"}",
    "long number": b'{"a": ' + b"1" * 6000 + b"}",
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_json_is_refused_wherever_it_is(attack: Attack, kit: Kit, case: str) -> None:
    content = BROKEN_JSON[case]
    files = {
        "adapter/adapter_config.json": "adapter",
        "merged/loratool_receipt.json": "merged",
        "sharded/model.safetensors.index.json": "base",
    }
    for name, role in files.items():
        whole = (kit / name).read_bytes()
        kit.write(name, content)
        attack.run(f"{case} in {name}", role, (kit / name).parent)
        if role == "adapter":
            problems = loratool.inspect((kit / name).parent).problems
        else:
            with pytest.raises(loratool.LoratoolError) as caught:
                loratool.inspect((kit / name).parent)
            problems = caught.value.problems
        assert problems[0].where.endswith(Path(name).name)
        kit.write(name, whole)
    text = content.decode("latin-1")
    attack.run(f"{case} as a manifest", "adapter", kit.native(text), must_fail=True)
    kit.write("bad.json", content)
    result = attack.cli("extract", kit / "peft.pth", "-o", attack.out, "--config", kit / "bad.json")
    assert attack.wrong(["extract"], result, must_fail=True) == ""
    kit.write("base/config.json", content)  # only what must be read of it may stop a merge
    attack.run(f"{case} in config.json", "base", kit / "base")
    attack.done()


# ---------------------------------------------------------------- indexes

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NAMES = {"l.0.q.weight": SHARDS[0], "l.0.v.weight": SHARDS[1], "norm.weight": SHARDS[1]}
INDEXES: dict[str, object] = {
    "no weight_map": {"metadata": {}},
    "weight_map is a list": {"weight_map": [SHARDS[0]]},
    "weight_map is a string": {"weight_map": SHARDS[0]},
    "weight_map is null": {"weight_map": None},
    "weight_map is empty": {"weight_map": {}},
    "file is a number": {"weight_map": {**NAMES, "norm.weight": 2}},
    "file is null": {"weight_map": {**NAMES, "norm.weight": None}},
    "file is a list": {"weight_map": {**NAMES, "norm.weight": [SHARDS[1]]}},
    "file is empty": {"weight_map": {**NAMES, "norm.weight": ""}},
    "parent": {"weight_map": {**NAMES, "norm.weight": "../base/model.safetensors"}},
    "just the parent": {"weight_map": {**NAMES, "norm.weight": ".."}},
    "itself": {"weight_map": {**NAMES, "norm.weight": "model.safetensors.index.json"}},
    "this folder": {"weight_map": {**NAMES, "norm.weight": "./" + SHARDS[1]}},
    "subfolder": {"weight_map": {**NAMES, "norm.weight": "sub/" + SHARDS[1]}},
    "backslash": {"weight_map": {**NAMES, "norm.weight": "..\\" + SHARDS[1]}},
    "drive": {"weight_map": {**NAMES, "norm.weight": "C:" + SHARDS[1]}},
    "absolute": {"weight_map": {**NAMES, "norm.weight": "/etc/passwd"}},
    "absolute with the right suffix": {"weight_map": {**NAMES, "norm.weight": "/etc/x.safetensors"}},
    "NUL": {"weight_map": {**NAMES, "norm.weight": SHARDS[1] + "\0.safetensors"}},
    "very long name": {"weight_map": {**NAMES, "norm.weight": "x" * 5000 + ".safetensors"}},
    "a device": {"weight_map": {**NAMES, "norm.weight": "/dev/zero"}},
    "missing shard": {"weight_map": {**NAMES, "norm.weight": "model-00003-of-00003.safetensors"}},
    "names the wrong shard": {"weight_map": {**NAMES, "norm.weight": SHARDS[0]}},
    "leaves a tensor out": {"weight_map": {k: v for k, v in NAMES.items() if k != "norm.weight"}},
    "names a tensor that is nowhere": {"weight_map": {**NAMES, "ghost.weight": SHARDS[1]}},
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused(attack: Attack, kit: Kit, case: str) -> None:
    kit.write("sharded/model.safetensors.index.json", INDEXES[case])
    with pytest.raises(loratool.InvalidFile) as caught:
        loratool.inspect(kit / "sharded")
    assert caught.value.code in ("E-INDEX", "E-READ")
    for arguments in (["inspect", kit / "sharded"], ["merge", kit / "sharded", kit / "adapter", "-o", attack.out]):
        result = attack.cli(*arguments)
        assert attack.wrong(arguments, result, must_fail=True) == ""


def test_a_tensor_in_two_shards_is_refused(kit: Kit, cli: Cli) -> None:
    shutil.copy(kit / "base" / "model.safetensors", kit / "sharded" / SHARDS[1])
    for names in (
        NAMES,
        dict.fromkeys(NAMES, SHARDS[1]),
        {**dict.fromkeys(NAMES, SHARDS[1]), "l.0.q.weight": SHARDS[0]},
    ):
        kit.write("sharded/model.safetensors.index.json", {"weight_map": names})
        result = cli("merge", kit / "sharded", kit / "adapter", "-o", kit / "out")
        if set(names.values()) == {SHARDS[1]}:  # the other file is not part of the checkpoint: that is fine
            assert result.code == 0
            shutil.rmtree(kit / "out")
        else:
            assert result.code == 2
            assert "E-INDEX" in result.err


def test_symlinked_shards_are_read_and_never_written(kit: Kit, cli: Cli) -> None:
    """Hubs store a snapshot as links into a store of blobs."""
    (kit / "blobs").mkdir()
    blob = kit / "blobs" / "1"
    (kit / "sharded" / SHARDS[1]).rename(blob)
    (kit / "sharded" / SHARDS[1]).symlink_to(blob)
    (kit / "sharded" / "config.json").symlink_to(kit / "base" / "config.json")
    (kit / "sharded" / "loop").symlink_to(kit / "sharded")
    (kit / "sharded" / "dangling.json").symlink_to(kit / "nowhere")
    os.mkfifo(kit / "sharded" / "fifo")
    before = blob.read_bytes()
    assert cli("merge", kit / "sharded", kit / "adapter", "-o", kit / "out").code == 0
    assert blob.read_bytes() == before
    assert not [path.name for path in (kit / "out").iterdir() if path.is_symlink()]
    (kit / "sharded" / SHARDS[1]).unlink()
    (kit / "sharded" / SHARDS[1]).symlink_to(kit / "sharded" / SHARDS[1])
    assert cli("inspect", kit / "sharded").code == 2
    (kit / "link").symlink_to(kit / "base")
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "link").code == 2
    (kit / "dangling").symlink_to(kit / "nowhere")
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "dangling").code == 2
    assert not (kit / "nowhere").exists()


# ---------------------------------------------------------------- pickles


class Id(tuple[Any, ...]):
    """A persistent id, as torch writes one for each storage."""


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Writer(pickle._Pickler):  # type: ignore[name-defined,misc]  # the one in Python can be told everything
    def persistent_id(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, Id) else None


def listing(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, protocol).dump(value)
    return buffer.getvalue()


def storage(key: Any = "0", count: Any = 4, kind: Any = torch.FloatStorage) -> Id:
    return Id(("storage", kind, key, "cpu", count))


def rebuilt(size: Any, stride: Any = (1,), offset: Any = 0, **options: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage(**options), offset, size, stride, False, {})


def zipped(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save writes one, with any program as its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"\0" * 16)
    return path


def legacy(path: Path, program: bytes) -> Path:
    """A file as torch before 1.6 wrote one."""
    magic = 0x1950A86A20F9469CFC6C
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (magic, 1001, sizes)]
    path.write_bytes(b"".join(parts) + program + pickle.dumps([], 2))
    return path


def raw(path: Path, program: bytes) -> Path:
    path.write_bytes(program)
    return path


def programs(marker: Path) -> dict[str, bytes]:
    """Pickles that make a file if they are run."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    text = code.encode()

    def short(value: bytes) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value

    return {
        "os.system": listing({"a": Call(os.system, touch)}),
        "eval": listing({"a": Call(eval, code)}),
        "exec at the top": listing(Call(exec, code)),
        "exec as a key": listing({Call(exec, code): 1}),
        "open": listing({"a": Call(open, str(marker), "w")}),
        "subprocess": listing({"a": Call(subprocess.check_call, ["touch", str(marker)])}),
        "getattr chain": listing({"a": Call(getattr, Call(__import__, "os"), "system")}),
        "numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n(" + short(text) + b"}tR.",
        "torch.hub": b"\x80\x02ctorch.utils.collect_env\nrun\n(" + short(touch.encode()) + b"tR.",
        "inside the state of an allowed call": listing({"a": Call(dict, state={"x": Call(exec, code)})}),
        "inside a tensor's size": listing({"a": rebuilt(Call(exec, code))}),
        "inside a storage": listing({"a": rebuilt((4,), key=Call(exec, code))}),
        "INST": b"(S" + repr(code).encode() + b"\nibuiltins\nexec\n.",
        "OBJ": b"(cbuiltins\nexec\n" + short(text) + b"o.",
        "STACK_GLOBAL": b"\x80\x04" + short(b"builtins") + short(b"exec") + b"\x93" + short(text) + b"\x85R.",
        "dotted STACK_GLOBAL": b"\x80\x04" + short(b"torch") + short(b"os.system") + b"\x93" + short(touch.encode())
        + b"\x85R.",
        "NEWOBJ": b"\x80\x02cbuiltins\nexec\n" + short(text) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nexec\n" + short(text) + b"\x85}\x92.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}" + short(b"x") + b"cos\nsystem\n" + short(touch.encode())
        + b"\x85Rsb.",
        "EXT1": b"\x80\x02\x82\x01.",
        "nested pickle": listing({"a": Call(pickle.loads, listing(Call(exec, code)))}),
    }  # fmt: skip


@pytest.mark.parametrize("form", [zipped, legacy, raw], ids=["zip", "legacy", "raw"])
def test_pickles_never_run_code(attack: Attack, kit: Kit, form: Callable[[Path, bytes], Path]) -> None:
    marker = kit.folder.parent / "marker"
    for case, program in programs(marker).items():
        file = form(kit / "bad.pth", program)
        attack.run(case, "wrapped", file, must_fail=True)
        attack.run(case, "adapter", file, must_fail=True)
        attack.run(case, "base", file, must_fail=True)
        shutil.copy(file, kit / "adapter" / "adapter_model.bin")
        (kit / "adapter" / "adapter_model.safetensors").unlink(missing_ok=True)
        result = attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out)
        assert attack.wrong(["merge"], result, must_fail=True) == ""
        assert not marker.exists(), f"{case}: the program was run"
    attack.done()


def test_the_programs_do_run_where_nothing_stops_them(tmp_path: Path) -> None:
    """The proof that the test before this one could fail."""
    marker = tmp_path / "marker"
    for case in ("os.system", "INST", "OBJ", "STACK_GLOBAL", "inside a tensor's size"):
        marker.unlink(missing_ok=True)

        class Open(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return None

        try:
            Open(io.BytesIO(programs(marker)[case])).load()
        except Exception:
            assert marker.exists(), case
        assert marker.exists(), case


@pytest.mark.parametrize("modern", [True, False])
def test_whole_modules_are_refused_with_advice(kit: Kit, cli: Cli, modern: bool) -> None:
    torch.save(torch.nn.Linear(2, 2), kit / "module.pth", _use_new_zipfile_serialization=modern)
    result = cli("inspect", kit / "module.pth")
    assert result.code == 2
    assert result.err.startswith("error[E-PICKLE]: ")
    assert "Linear" in result.err
    assert "model.state_dict()" in result.err
    assert "weights_only` argument" not in result.err
    assert "trust" not in result.err, "torch's advice to load it unsafely must not be passed on"


def test_other_content_of_pickles_is_refused(attack: Attack, kit: Kit) -> None:
    marks: dict[str, bytes] = {
        "empty": b"",
        "stop only": b"\x80\x02.",
        "garbage": b"garbage",
        "a list": listing([1, 2]),
        "a number": listing(5),
        "a string": listing("x"),
        "no tensor": listing({"a": 1}),
        "empty dict": listing({}),
        "numbers as names": listing({1: rebuilt((4,))}),
        "deeply nested": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"}" + b"s" * 5000 + b".",
        "contains itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "list that contains itself": b"\x80\x02}X\x01\x00\x00\x00a]q\x00h\x00as.",
        "negative size": listing({"a": rebuilt((-4,))}),
        "two negative sizes": listing({"a": rebuilt((-2, -2), (1, 1))}),
        "fraction as size": listing({"a": rebuilt((1.5,))}),
        "string as size": listing({"a": rebuilt(("4",))}),
        "size is a string": listing({"a": rebuilt("44")}),
        "size is null": listing({"a": rebuilt(None)}),
        "true as size": listing({"a": rebuilt((True, 4), (4, 1))}),
        "size larger than the storage": listing({"a": rebuilt((400,))}),
        "size of 2^124": listing({"a": rebuilt((2**62, 2**62), (1, 1))}),
        "offset past the storage": listing({"a": rebuilt((4,), offset=100)}),
        "offset is negative": listing({"a": rebuilt((4,), offset=-1)}),
        "offset is a string": listing({"a": rebuilt((4,), offset="x")}),
        "stride of lists": listing({"a": rebuilt((4,), stride=([],))}),
        "stride is negative": listing({"a": rebuilt((4,), stride=(-1,))}),
        "stride too short": listing({"a": rebuilt((2, 2), stride=(1,))}),
        "stride past the storage": listing({"a": rebuilt((4,), stride=(1000,))}),
        "key is a list": listing({"a": rebuilt((4,), key=[1])}),
        "key is null": listing({"a": rebuilt((4,), key=None)}),
        "key of a missing record": listing({"a": rebuilt((4,), key="7")}),
        "key that climbs": listing({"a": rebuilt((4,), key="../version")}),
        "dtype is a list": listing({"a": rebuilt((4,), kind=[])}),
        "dtype is a string": listing({"a": rebuilt((4,), kind="F32")}),
        "dtype is a function": listing({"a": rebuilt((4,), kind=torch.Size)}),
        "count is a string": listing({"a": rebuilt((4,), count="x")}),
        "name with a surrogate": listing({"a\ud800": rebuilt((4,))}),
        "storage is a number": listing({"a": Call(torch._utils._rebuild_tensor_v2, 5, 0, (4,), (1,), False, {})}),
        "too few arguments": listing({"a": Call(torch._utils._rebuild_tensor_v2, storage())}),
        "parameter of a number": listing({"a": Call(torch._utils._rebuild_parameter, 5, False, {})}),
        "persistent id is a number": b"\x80\x02}X\x01\x00\x00\x00aK\x05Qs.",
        "persistent id is short": b"\x80\x02}X\x01\x00\x00\x00aK\x05K\x06\x86Qs.",
        "truncated": listing({"a": rebuilt((4,))})[:-9],
        "unknown protocol": b"\x80\x7f}.",
        "frame that lies": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.",
    }
    for case, program in marks.items():
        for form in (zipped, legacy, raw):
            file = form(kit / "bad.pth", program)
            attack.run(f"{form.__name__}: {case}", "base", file, must_fail=True)
    attack.done()


def test_archives_that_torch_did_not_write_are_refused(attack: Attack, kit: Kit) -> None:
    def archive(*names: str, content: bytes = b"") -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name in names:
                file.writestr(name, content)
        return buffer.getvalue()

    good = (kit / "plain.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        program = file.read("plain/data.pkl")
    for case, content in {
        "empty archive": archive(),
        "a document": archive("word/document.xml"),
        "TorchScript": archive("m/code/x.py", "m/constants.pkl"),
        "two programs": archive("a/data.pkl", "b/data.pkl", content=program),
        "program without data": archive("a/data.pkl", content=program),
        "program outside a folder": archive("data.pkl", content=program),
        "damaged program": good.replace(program[40:60], b"\0" * 20),
        "an archive after a pickle": listing({"a": 1}) + archive("a/data.pkl", content=program),
    }.items():
        file_path = kit.write("bad.pth", content)
        attack.run(case, "wrapped", file_path)
        result = attack.cli("extract", file_path, "-o", attack.out, "--alpha", "1", "--scaling", "alpha")
        attack.note(case, attack.wrong(["extract"], result, must_fail=True))
        attack.clear()
    attack.done()


def test_a_pickle_that_refers_to_itself_is_refused(kit: Kit, cli: Cli) -> None:
    """Twenty names for the dict itself are 20^8 paths of eight steps: walking them all would never end."""
    names = b"".join(b"X\x01\x00\x00\x00" + bytes([48 + n]) + b"h\x00" for n in range(20))
    file = zipped(kit / "bad.pth", b"\x80\x02}q\x00(" + names + b"u.")
    assert cli("inspect", file).code == 2


def test_opcodes_replaced_one_by_one(attack: Attack, kit: Kit) -> None:
    """Every opcode in turn becomes another one: the machine behind must not be driven into a traceback."""
    with zipfile.ZipFile(kit / "plain.pth") as archive:
        program = archive.read("plain/data.pkl")
    places = [position for _, _, position in pickletools.genops(program) if position is not None]
    for number, position in enumerate(places):
        for code in (b"R", b"b", b"Q", b"0", b"}", b"t", b"(")[number % 3 :: 3]:
            broken = program[:position] + code + program[position + 1 :]
            arguments = commands(kit, "wrapped", zipped(kit / "bad.pth", broken), attack.out)[number % 4]
            attack.note(f"opcode at {position} -> {code!r}", attack.wrong(arguments, attack.cli(*arguments), False))
            attack.clear()
    attack.done()


# ---------------------------------------------------------------- empty tensors, NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(attack: Attack, kit: Kit, value: float) -> None:
    header, data = opened((kit / "native.lora.safetensors").read_bytes())
    broken = torch.frombuffer(bytearray(data), dtype=torch.float32).clone()
    broken[3] = value
    file = kit.write("nan.lora.safetensors", container(header, broken.numpy().tobytes()))
    assert "E-NONFINITE" in [problem.code for problem in loratool.validate(file)]
    with pytest.raises(loratool.LoratoolError, match="E-NONFINITE"):
        loratool.merge(kit / "base", file, attack.out)
    attack.run(value, "adapter", file)
    state = {"l.0.q.weight": torch.ones(6, 4), "l.0.v.weight": torch.ones(3, 4), "norm.weight": torch.ones(4)}
    state["l.0.q.weight"][1, 2] = value
    save_file(state, kit / "base" / "model.safetensors")
    with pytest.raises(loratool.LoratoolError, match="E-NONFINITE"):
        loratool.merge(kit / "base", kit / "adapter", attack.out)
    assert not attack.out.exists()
    attack.run(value, "base", kit / "base")
    state["l.0.q.weight"] = torch.ones(6, 4)
    state["norm.weight"][0] = value  # a tensor that nothing changes is copied, whatever is in it
    save_file(state, kit / "base" / "model.safetensors")
    assert attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out).code == 0
    attack.done()


def test_a_result_that_overflows_is_refused(kit: Kit, cli: Cli) -> None:
    save_file({"l.0.q.weight": torch.full((6, 4), 6e4, dtype=torch.float16)}, kit / "base" / "model.safetensors")
    result = cli("merge", kit / "base", f"{kit / 'adapter'}@1e30", "-o", kit / "out")
    assert result.code == 2
    assert "E-NONFINITE" in result.err
    assert not (kit / "out").exists()


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 4), (6, 0)),
        ((2, 0), (6, 2)),
        ((2, 4), (0, 2)),
        ((0, 0), (0, 0)),
        ((0,), (0,)),
        ((), ()),
        ((2, 4, 0), (6, 2, 0)),
    ],
    ids=str,
)
def test_factors_without_elements_are_refused(attack: Attack, kit: Kit, shapes: tuple[tuple[int, ...], ...]) -> None:
    parts = {f"{PREFIX}l.0.q.lora_{n}.weight": torch.zeros(s) for n, s in zip("AB", shapes, strict=True)}
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    attack.run(f"PEFT {shapes}", "adapter", kit / "adapter")
    result = attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out)
    assert attack.wrong(["merge"], result, must_fail=True) == ""
    plain = {f"l.0.q.lora.{n}": torch.zeros(s[::-1]) for n, s in zip("AB", shapes, strict=True)}
    torch.save({"l.0.q.linear.weight": torch.zeros(6, 4), **plain}, kit / "plain.pth")
    attack.run(f"plain {shapes}", "wrapped", kit / "plain.pth", must_fail=shapes != ((), ()))
    attack.done()


def test_empty_tensors_of_a_base_are_carried_along(attack: Attack, kit: Kit) -> None:
    empty = {"a": torch.zeros(0), "b": torch.zeros(0, 4), "c": torch.zeros(4, 0), "d": torch.zeros(2, 0, 3)}
    scalar = {"e": torch.tensor(1.5), "f": torch.tensor(3)}
    save_file({"l.0.q.weight": torch.ones(6, 4), **empty, **scalar}, kit / "base" / "model.safetensors")
    attack.run("empty tensors", "base", kit / "base")
    for dtype in ("keep", "bf16", "fp32"):
        result = attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out, "--dtype", dtype)
        attack.note(f"--dtype {dtype}", result.err)
        attack.clear()
    save_file(empty, kit / "base" / "model.safetensors")
    attack.run("nothing but empty tensors", "base", kit / "base")
    attack.done()


# ---------------------------------------------------------------- manifests


def test_manifests_with_odd_values_are_answered(attack: Attack, kit: Kit) -> None:
    manifest = kit.manifest() | {"base": {"name": "b", "tensors": {"l.0.q.weight": {
        "digest": loratool.load(kit / "native.lora.safetensors").provenance and "blake3:" + "0" * 64,
        "dtype": "F32", "shape": [6, 4]}}}}  # fmt: skip
    assert attack.cli("inspect", kit.native(manifest)).code == 0
    update = manifest["updates"][0]
    more = [("updates", 0, key) for key in ("rows", "expert", "experts", "layout", "direction", "axis")]
    more += [("vendor.key",), ("updates", 0, "vendor.key"), ("base", "vendor.key")]
    assert not {key for *_, key in more} & update.keys()
    for path in [*paths(manifest), *more]:
        for value in ODD:
            attack.run(f"{path} = {value!r:.20}", "adapter", kit.native(dumps(put(manifest, path, value))))
    attack.done()


# What each place accepts of ODD, beside its own value.
ACCEPTED: dict[tuple[Any, ...], list[Any]] = {
    ("base",): [{}],
    ("base", "name"): ["x", ""],
    ("base", "tensors"): [{}],
    ("provenance",): [{}],
    ("provenance", "convention"): ["x", ""],
    ("updates", 0, "alpha"): [],
    ("updates", 0, "scaling"): [],
}


def test_wrong_types_in_a_manifest_are_refused(attack: Attack, kit: Kit) -> None:
    manifest = kit.manifest() | {"base": {"name": "b", "tensors": {"l.0.q.weight": {
        "digest": "blake3:" + "0" * 64, "dtype": "F32", "shape": [6, 4]}}}}  # fmt: skip
    wrong = []
    for path in paths(manifest):
        for value in ODD:
            if any(type(value) is type(good) and value == good for good in ACCEPTED.get(path, [])):
                continue
            if (path == ("features",) and value == []) or path[:1] == ("info",):
                continue  # what `info` says is nobody's business: see the next test
            file = kit.native(dumps(put(manifest, path, value)))
            try:
                loratool.load(file)
            except loratool.LoratoolError:
                continue
            except Exception as error:
                wrong.append(f"{path} = {value!r:.20}: {type(error).__name__}: {error}")
                continue
            wrong.append(f"{path} = {value!r:.20}: accepted")
    assert not wrong, "\n".join(wrong)


def test_odd_values_in_info_are_refused_or_shown(attack: Attack, kit: Kit) -> None:
    manifest = kit.manifest() | {"info": {"title": "t", "config": {"a": 1}, "authors": ["x"], "weight": 1}}
    for path in [path for path in paths(manifest) if path[:1] == ("info",)]:
        for value in ODD:
            attack.run(f"{path} = {value!r:.20}", "adapter", kit.native(dumps(put(manifest, path, value))))
    attack.done()


def test_missing_keys_of_a_manifest_are_refused(attack: Attack, kit: Kit) -> None:
    manifest = kit.manifest()
    for path in [path for path in paths(manifest) if path and isinstance(path[-1], str)]:
        must_fail = path[0] not in ("provenance", "base", "info") or path in [("provenance",), ("base",)]
        attack.run(f"without {path}", "adapter", kit.native(without(manifest, path)), must_fail)
    attack.done()


def test_a_vendor_key_may_hold_anything(kit: Kit, cli: Cli) -> None:
    for value in (2**70, 1.5, {"deep": [1, {"er": None}]}, "x"):
        file = kit.native({**kit.manifest(), "vendor.key": value})
        assert cli("inspect", file).code == 0
        assert cli("validate", file).code in (0, 1)


def test_an_infinite_alpha_is_refused(kit: Kit, cli: Cli) -> None:
    """1e999 is a JSON number that no double holds."""
    manifest = kit.manifest()
    manifest["updates"][0] |= {"alpha": INFINITE, "scaling": "alpha", "scale": 1.0}
    for command, codes in (("inspect", (0, 2)), ("validate", (1, 2))):
        result = cli(command, kit.native(dumps(manifest)))
        assert result.code in codes, result
        assert "R-025" in result.err + result.out or "E-MANIFEST" in result.err + result.out


def test_what_save_writes_can_be_read(kit: Kit, cli: Cli) -> None:
    """A name that the format forbids is refused by the writer, not only by the next reader."""
    values = torch.ones(6, 4), torch.ones(4, 2), torch.ones(2, 6)
    for name in ("l\n", "l\x7f", "l" * 2000, "l\x1b[31m"):
        state = {f"{name}.linear.weight": values[0], f"{name}.lora.A": values[1], f"{name}.lora.B": values[2]}
        torch.save(state, kit / "odd.pth")
        out = kit / "odd.lora.safetensors"
        result = cli("extract", kit / "odd.pth", "-o", out, "--alpha", "1", "--scaling", "alpha")
        if result.code == 0:
            assert loratool.validate(out) == [], repr(name)
        else:
            assert result.code == 2
            assert "E-BUG" not in result.err
            assert not out.exists()


def test_an_adapter_without_updates_is_not_written(kit: Kit) -> None:
    with pytest.raises(loratool.LoratoolError):
        loratool.save(loratool.Adapter(()), kit / "empty.lora.safetensors")
    assert not (kit / "empty.lora.safetensors").exists()


# ---------------------------------------------------------------- adapter_config.json

TOKENS = f"{PREFIX}emb.token_adapter.trainable_tokens_delta"
FIELDS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters", "target_modules",
    "trainable_token_indices", "token_indices", "use_rslora", "use_dora", "fan_in_fan_out", "bias",
    "init_lora_weights", "modules_to_save", "base_model_name_or_path", "layers_to_transform",
]  # fmt: skip


def test_configs_with_odd_values_are_answered(attack: Attack, kit: Kit) -> None:
    config = kit.json("adapter/adapter_config.json")
    for field in FIELDS:
        for value in [
            *ODD,
            ["x"],
            [None],
            {"q": None},
            {"q": []},
            {"q": INFINITE},
            {"q": 10**400},
            {"q": "x"},
            "false",
        ]:
            kit.write("adapter/adapter_config.json", dumps({**config, field: value}))
            attack.run(f"{field} = {value!r:.30}", "adapter", kit / "adapter", quick=True)
    attack.done()


WRONG_CONFIGS: dict[str, dict[str, Any]] = {
    "alpha null": {"lora_alpha": None},
    "alpha true": {"lora_alpha": True},
    "alpha string": {"lora_alpha": "x"},
    "alpha number in a string": {"lora_alpha": "4"},
    "alpha list": {"lora_alpha": [4]},
    "alpha infinite": {"lora_alpha": INFINITE},
    "alpha of 400 digits": {"lora_alpha": 10**400},
    "alpha_pattern list": {"alpha_pattern": ["q"]},
    "alpha_pattern string": {"alpha_pattern": "q"},
    "alpha_pattern number": {"alpha_pattern": 1},
    "alpha_pattern of strings": {"alpha_pattern": {"q": "x"}},
    "alpha_pattern of lists": {"alpha_pattern": {"q": [1]}},
    "alpha_pattern of null": {"alpha_pattern": {"q": None}},
    "alpha_pattern infinite": {"alpha_pattern": {"q": INFINITE}},
    "alpha_pattern bad regex": {"alpha_pattern": {"(": 1}},
    "alpha_pattern huge repeat": {"alpha_pattern": {"a{99999999999999}": 1}},
    "alpha_pattern deep regex": {"alpha_pattern": {"(" * 5000: 1}},
    "rank_pattern list": {"rank_pattern": ["q"]},
    "rank_pattern bad regex": {"rank_pattern": {"[": 1}},
    "r string": {"r": "x"},
    "r null": {"r": None},
    "r fraction": {"r": 2.5},
    "r zero": {"r": 0},
    "r negative": {"r": -2},
    "target_parameters number": {"target_parameters": 5},
    "target_parameters of numbers": {"target_parameters": [5]},
    "target_parameters object": {"target_parameters": {"a": 1}},
    "use_rslora string": {"use_rslora": "false"},
    "fan_in_fan_out string": {"fan_in_fan_out": "false"},
    "peft_type number": {"peft_type": 5},
    "peft_type list": {"peft_type": ["LORA"]},
    "peft_type null": {"peft_type": None},
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_of_wrong_types_is_refused(attack: Attack, kit: Kit, case: str) -> None:
    config = kit.json("adapter/adapter_config.json")
    kit.write("adapter/adapter_config.json", dumps({**config, **WRONG_CONFIGS[case]}))
    for arguments in (["inspect", kit / "adapter"], ["merge", kit / "base", kit / "adapter", "-o", attack.out]):
        result = attack.cli(*arguments)
        assert attack.wrong(arguments, result, must_fail=True) == ""


def test_a_pattern_can_not_hang_the_reader(kit: Kit) -> None:
    """PEFT's patterns are regular expressions, and a file from a stranger may hold one of exponential time."""
    module = "a" * 40
    parts = {f"{PREFIX}{module}.lora_A.weight": torch.ones(2, 4), f"{PREFIX}{module}.lora_B.weight": torch.ones(6, 2)}
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    config = kit.json("adapter/adapter_config.json")
    kit.write("adapter/adapter_config.json", {**config, "alpha_pattern": {"(a+)+b": 1}})
    code, _, _ = capped("inspect", kit / "adapter", seconds=60)
    assert code in (0, 2), "inspect hangs"


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(
    "indices",
    [None, 5, "x", [], {}, [1], [1, 2, 3], [1, 1], [-1, 2], [0, 6], [1, 2**62], [1, 10**30], [True, 2], [1.0, 2.0],
     ["1", "2"], [[1], 2], {"emb": 5}, {"emb": [-1, 2]}, {"emb": [1, 9]}, {"other": [1, 2]}],
    ids=lambda value: f"{value!s:.20}",
)  # fmt: skip
def test_token_indices_that_do_not_fit_are_refused(attack: Attack, kit: Kit, indices: Any, resized: bool) -> None:
    parts = {TOKENS: torch.full((2, 4), 2.0)}
    if resized:
        parts[f"{PREFIX}emb.token_adapter.base_layer.weight"] = torch.ones(6, 4)
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    save_file({"emb.weight": torch.ones(6, 4)}, kit / "base" / "model.safetensors")
    config = kit.json("adapter/adapter_config.json")
    kit.write("adapter/adapter_config.json", {**config, "trainable_token_indices": [4, 1]})
    assert attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out).code == 0
    remove(attack.out)
    kit.write("adapter/adapter_config.json", {**config, "trainable_token_indices": indices})
    attack.run(indices, "adapter", kit / "adapter")
    result = attack.cli("merge", kit / "base", kit / "adapter", "-o", attack.out)
    attack.note("merge", attack.wrong(["merge"], result, must_fail=True))
    attack.done()


# ---------------------------------------------------------------- receipts


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_receipts_with_odd_values_are_answered(attack: Attack, kit: Kit, single: bool) -> None:
    receipt = kit.json("merged/loratool_receipt.json")
    header, data = opened((kit / "merged.safetensors").read_bytes())
    for path in paths(receipt):
        for value in ODD:
            text = dumps(put(receipt, path, value))
            if single:
                header["__metadata__"]["loratool.receipt"] = text
                target = kit.write("merged.safetensors", container(header, data))
            else:
                target = kit.write("merged/loratool_receipt.json", text).parent
            attack.run(f"{path} = {value!r:.20}", "merged", target, quick=True)
    attack.done()


def fits(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is of the type that this place of a receipt has."""
    last = path[-1] if path else ""
    if last in ("tool", "formula", "name", "dtype"):
        return isinstance(value, str) and path[0] != "tensors"
    if last == "weight":
        return type(value) in (int, float)
    if last == "updates":
        return type(value) is int
    return path[0] == "tensors" and last == "reversible" and type(value) is bool if path else False


def test_wrong_types_in_a_receipt_are_refused(attack: Attack, kit: Kit) -> None:
    receipt = kit.json("merged/loratool_receipt.json")
    for path in paths(receipt):
        for value in ODD:
            if fits(path, value):
                continue
            kit.write("merged/loratool_receipt.json", dumps(put(receipt, path, value)))
            result = attack.cli("unmerge", kit / "merged", kit / "adapter", "-o", attack.out)
            if reason := attack.wrong(["unmerge"], result, must_fail=True):
                attack.note(f"{value!r:.20}", f"{path}: {reason}")
            attack.clear()
    attack.done()


@pytest.mark.parametrize("given_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors",), {}),
        (("tensors", "l.0.q.weight", "base"), None),
        (("tensors", "l.0.q.weight", "base_shape"), [4, 6]),
        (("tensors", "l.0.q.weight", "base_shape"), [5, 4]),
        (("tensors", "l.0.q.weight", "base_shape"), [7, 4]),
        (("tensors", "l.0.q.weight", "base_shape"), [24]),
        (("tensors", "l.0.q.weight", "base_shape"), [0, 4]),
        (("tensors", "l.0.q.weight", "shape"), [4, 6]),
        (("tensors", "l.0.q.weight", "dtype"), "I32"),
        (("tensors", "l.0.q.weight", "base_dtype"), "I32"),
        (("tensors", "l.0.q.weight", "base_dtype"), "F4"),
        (("adapters",), []),
    ],
    ids=lambda value: f"{value!s:.50}",
)
def test_a_receipt_that_contradicts_the_files_is_refused(
    attack: Attack, kit: Kit, path: tuple[Any, ...], value: Any, given_base: bool
) -> None:
    kit.write("merged/loratool_receipt.json", put(kit.json("merged/loratool_receipt.json"), path, value))
    base = ["--base", kit / "base"] if given_base else []
    arguments = ["unmerge", kit / "merged", kit / "adapter", "-o", attack.out, *base]
    assert attack.wrong(arguments, attack.cli(*arguments), must_fail=True) == ""


def test_a_receipt_can_not_make_a_replacement_reversible(kit: Kit, cli: Cli) -> None:
    parts = {f"{PREFIX}l.0.v.weight": torch.ones(3, 4)}
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "out").code == 0
    assert cli("unmerge", kit / "out", kit / "adapter", "-o", kit / "back").code == 1
    receipt = kit.json("out/loratool_receipt.json")
    kit.write("out/loratool_receipt.json", put(receipt, ("tensors", "l.0.v.weight", "reversible"), True))
    assert cli("unmerge", kit / "out", kit / "adapter", "-o", kit / "back").code in (1, 2)
    assert not (kit / "back").exists()


# ---------------------------------------------------------------- inputs stay as they are


def test_no_command_touches_its_inputs(attack: Attack, kit: Kit) -> None:
    for role, name in [
        ("adapter", "adapter"), ("adapter", "native.lora.safetensors"), ("base", "base"), ("base", "sharded"),
        ("base", "base/model.safetensors"), ("merged", "merged"), ("merged", "merged.safetensors"),
        ("wrapped", "plain.pth"), ("wrapped", "peft.pth"), ("wrapped", "plain.legacy.pth"),
    ]:  # fmt: skip
        attack.run(name, role, kit / name)
    assert tree(kit.folder) == attack.before
    attack.done()


@pytest.mark.parametrize("out", ["base/out", "adapter/out", "sharded/sub"])
def test_an_output_inside_an_input_is_refused(kit: Kit, cli: Cli, out: str) -> None:
    base = kit / ("sharded" if out.startswith("sharded") else "base")
    before = tree(kit.folder)
    assert cli("merge", base, kit / "adapter", "-o", kit / out).code == 2
    assert tree(kit.folder) == before


def test_a_second_output_that_fails_leaves_no_first(kit: Kit, cli: Cli) -> None:
    out = kit / "new"
    result = cli("extract", kit / "plain.pth", "-o", out, "--base-out", out, "--alpha", "1", "--scaling", "alpha")
    assert result.code == 2
    assert not out.exists()


# ---------------------------------------------------------------- fuzzing

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([2**53, 10**320, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
edits = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 2**16), st.integers(0, 255)), max_size=4
)
SOURCES = {
    "native.lora.safetensors": "adapter",
    "adapter/adapter_model.safetensors": "adapter",
    "base/model.safetensors": "base",
    "merged.safetensors": "merged",
}


def edited(content: bytes, changes: Iterable[tuple[str, int, int]]) -> bytes:
    broken = bytearray(content)
    for verb, position, byte in changes:
        position %= max(len(broken), 1)
        if verb == "flip" and broken:
            broken[position] ^= byte
        elif verb == "cut":
            del broken[position : position + byte]
        else:
            broken[position:position] = bytes([byte])
    return bytes(broken)


@pytest.mark.parametrize("name", SOURCES)
def test_fuzz(attack: Attack, kit: Kit, name: str) -> None:
    """Valid files with header and manifest values replaced, and bytes flipped, cut and inserted."""
    whole = (kit / name).read_bytes()
    header, data = opened(whole)
    keys = [key for key in ("loratool", "loratool.receipt") if key in header.get("__metadata__", {})]
    inner = {key: json.loads(header["__metadata__"][key]) for key in keys}
    folder = "" if name.count("/") == 0 else name.split("/")[0]

    @settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutate(draw: st.DataObject) -> None:
        changed: Mapping[str, Any] = header
        if inner and draw.draw(st.booleans()):
            key = draw.draw(st.sampled_from(sorted(inner)))
            place = draw.draw(st.sampled_from(list(paths(inner[key]))))
            text = json.dumps(put(inner[key], place, draw.draw(values)))
            changed = put(header, ("__metadata__", key), text)
        elif draw.draw(st.booleans()):
            place = draw.draw(st.sampled_from([path for path in paths(header) if path]))
            changed = put(header, place, draw.draw(values))
        content = container(json.dumps(changed), data)
        kit.write(name, edited(content, draw.draw(edits)))
        attack.run(name, SOURCES[name], kit / folder if folder else kit / name)
        attack.done()

    mutate()
