# ruff: noqa: E501  # tables of cases read better on one line; the shim patches os itself
"""A fuzzer of everything that parses a file: headers, indexes, manifests, receipts, undo records.

    python -m tests.fuzz --minutes 10          # two workers; findings go to tests/regressions/

Inputs are valid files with values, keys, bytes and compressed blocks changed, one change to a few at a time. An input
whose answer is new (another error, another message) becomes a seed itself. The property: nothing but a LoratoolError
is raised, in bounded time and memory; what is called valid can be read; and an unmerge that succeeds gives the base's
bytes. Files that break it are kept, named after their target, and `test_fuzz.py` runs them for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import zstandard
from strategies import FORMS, Maker, make_update, save_sharded

import loratool
from loratool import Adapter, LoratoolError, Target, Targeted, receipt, undo
from loratool import format as native_format
from loratool.checkpoint import open_checkpoint
from loratool.container import read_header

REGRESSIONS = Path(__file__).parent / "regressions"
SECONDS = 5.0  # one input may take
MEMORY = 1 << 30  # bytes that one input may take
CORPUS = 500  # inputs kept of a target
NUMBERS = [0, 1, -1, 2, 7, 8, 255, 256, 2**31, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**310]
ODD: list[Any] = [
    None, True, False, 0.5, -0.0, 1e308, 1e-320, "", "x", "F32", "U8", "F4", "BF16", "C64", "lora", "a.weight", "1.0", "2.0",
    "1.99", "blake3:" + "0" * 64, "\u0000", "\ud800", "\u202e", "é" * 50, "x" * 10_000, [], {}, [[]], [0], [1, 2, 3], [2**53] * 9,
    [1] * 3000, {"": None}, {"a": {"b": 1}},
]  # fmt: skip
WORDS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"1e999", b"NaN", b"-", b"\\u0000", b"\\ud800", b" ", b"\x00",
         b"\xff", b"\xed\xa0\x80", b"__metadata__", b"9" * 400, b"[" * 2000, b"data_offsets", b"\n"]  # fmt: skip


# --- changing -------------------------------------------------------------------------------------------------------


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    yield path
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield from places(value, (*path, key))


def change_json(document: Any, rng: random.Random) -> Any:
    """The document with one value replaced, removed, copied or renamed."""
    document = json.loads(json.dumps(document))
    path = rng.choice([path for path in places(document) if path] or [()])
    if not path:
        return rng.choice([*ODD, *NUMBERS])
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    key, value = path[-1], owner[path[-1]]
    verb = rng.randrange(7)
    if verb == 0:
        del owner[key]
    elif verb == 1 and isinstance(owner, dict):
        owner[rng.choice([*map(str, ODD[9:20]), f"{key}.", *owner])] = value
    elif verb == 2 and isinstance(owner, list):
        owner.insert(rng.randrange(len(owner) + 1), value)
    elif verb == 3 and isinstance(value, int) and not isinstance(value, bool):
        owner[key] = rng.choice([value + 1, value - 1, -value, value * 2, value * 8, value // 2, *NUMBERS])
    elif verb == 4:
        other = rng.choice([path for path in places(document) if path])
        found = document
        for step in other:
            found = found[step]
        owner[key] = json.loads(json.dumps(found))
    elif verb == 5 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        owner[key] = value[:at] + rng.choice(["", ".", "0", "\u0000", "A", "/", "é"]) + value[at + rng.randrange(2) :]
    else:
        owner[key] = rng.choice([*ODD, *NUMBERS])
    return document


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, removed, copied or put in."""
    broken = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(broken) + 1)
        until = at + rng.choice([1, 1, 2, 8, 50])
        verb = rng.randrange(6)
        if verb == 0 and at < len(broken):
            broken[at] ^= 1 << rng.randrange(8)
        elif verb == 1:
            del broken[at:until]
        elif verb == 2:
            broken[at:at] = rng.choice(WORDS)
        elif verb == 3:
            broken[at:at] = broken[at:until]
        elif verb == 4:
            broken[at:until] = rng.randbytes(until - at)
        else:
            del broken[at:]
    return bytes(broken)


def dumps(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def change_container(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header, a document in its metadata, its data or its raw bytes changed."""
    if rng.random() < 0.15:
        return change_bytes(content, rng)
    try:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        raw, data = content[8:end], content[end:]
        header = json.loads(raw)
        metadata = header.get("__metadata__")
        texts = sorted(metadata) if isinstance(metadata, dict) else []
    except (ValueError, struct.error, AttributeError, RecursionError):
        return change_bytes(content, rng)
    verb = rng.random()
    if verb < 0.15:
        raw = change_bytes(raw, rng)
    elif verb < 0.25:
        data = change_bytes(data, rng)
    elif verb < 0.7 and texts:
        name = rng.choice(texts)
        try:
            document = json.loads(metadata[name])
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                document = change_json(document, rng)
            metadata[name] = dumps(signed(document, rng)).decode("utf-8", "surrogatepass")
        except (ValueError, TypeError, RecursionError):
            return change_bytes(content, rng)
        raw = dumps(header)
    else:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            header = change_json(header, rng)
        raw = dumps(header)
        if rng.random() < 0.2:  # one name twice, which a dict can not hold
            raw = raw.replace(b"}", b"," + raw[1:30].partition(b":")[0] + b":{}}", 1)
    length = len(raw) if rng.random() < 0.95 else rng.choice([abs(n) for n in NUMBERS if n < 2**64])
    return struct.pack("<Q", length) + raw + data


def signed(document: Any, rng: random.Random) -> Any:
    """A receipt with the digest of its new content, mostly: else no change would get past it."""
    if isinstance(document, dict) and document.get("format") == receipt.FORMAT_NAME and rng.random() < 0.9:
        content = {key: value for key, value in document.items() if key != "digest"}
        try:
            document = {**content, "digest": receipt._digest(content)}
        except (TypeError, ValueError):
            return document
    return document


def change_document(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with values or bytes changed."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(content, rng)
    if rng.random() < 0.2:
        return change_bytes(content, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        document = change_json(document, rng)
    return dumps(signed(document, rng))


def change_record(content: bytes, rng: random.Random) -> bytes:
    """An undo record with a block changed under its compression, its sizes put right; or changed like any container."""
    if rng.random() < 0.5:
        return change_container(content, rng)
    try:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        document = json.loads(header["__metadata__"][undo.METADATA_KEY])
        name = rng.choice(sorted(document["tensors"]))
        entry = document["tensors"][name]
        number = rng.randrange(len(entry["blocks"]))
        first = header[f"{name}.blocks"]["data_offsets"][0]
        start = end + first + sum(entry["blocks"][:number])
        size = entry["blocks"][number]
        plain = zstandard.ZstdDecompressor().decompress(content[start : start + size], max_output_size=1 << 20)
        verb = rng.randrange(4)
        if verb == 0:
            plain = struct.pack("<II", *(rng.choice([0, 1, 2, 5, 2**31, 2**32 - 1]) for _ in range(2))) + plain[8:]
        elif verb == 1:
            plain = bytes(rng.choice([0, 100_000, 30_000_000]))
        else:
            plain = change_bytes(plain, rng)
        packed = zstandard.ZstdCompressor(level=1, write_content_size=rng.random() < 0.7).compress(plain)
        if rng.random() < 0.1:
            packed = change_bytes(packed, rng)
        moved = len(packed) - size
        entry["blocks"][number] = len(packed)
        for key, known in header.items():
            if key != "__metadata__":
                known["data_offsets"] = [at + moved * (at > first) for at in known["data_offsets"]]
        header["__metadata__"][undo.METADATA_KEY] = dumps(document).decode("utf-8", "surrogatepass")
        raw = dumps(header)
        return struct.pack("<Q", len(raw)) + raw + content[end:start] + packed + content[start + size :]
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        struct.error,
        zstandard.ZstdError,
        RecursionError,
    ):
        return change_bytes(content, rng)


# --- targets --------------------------------------------------------------------------------------------------------


class World:
    """Valid files of every kind, in one folder, and what reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make = Maker(5)
        state = {
            "a.weight": make.values(5, 4, dtype=torch.bfloat16),
            "b.weight": make.values(6, 4, dtype=torch.float32),
            "c.weight": make.values(4, 4, dtype=torch.float16),
            "d.weight": make.values(3, dtype=torch.float64),
        }
        save_sharded(state, folder / "base", shards=2)
        save_sharded(state, folder / "sharded", shards=3)
        self.base = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
        plain = [("a.weight", "lora", 5), ("b.weight", "lora", 6), ("c.weight", "dora1-lora", 4)]
        items = [
            Targeted(Target(name, (rows, 4)), make_update(form, (rows, 4), Maker(rows))) for name, form, rows in plain
        ]
        self.adapter = Adapter(tuple(items))
        loratool.save(self.adapter, folder / "adapter.safetensors")
        loratool.merge(folder / "base", self.adapter, folder / "merged", undo=folder / "record.safetensors")
        (folder / "one").mkdir()
        save_sharded(state, folder / "one" / "base")
        single = folder / "one" / "merged.safetensors"
        loratool.merge(folder / "one" / "base" / "model.safetensors", self.adapter, single)
        forms = [form for form in FORMS if "rows" not in form and form != "replace"]
        every = [
            Targeted(Target(f"{form}.weight", (6, 4)), make_update(form, (6, 4), Maker(n)))
            for n, form in enumerate(forms)
        ]
        every.append(
            Targeted(Target("x.weight", (4, 6, 4), experts=4), make_update("lora", (6, 4), Maker(9, experts=4)))
        )
        every.append(Targeted(Target("y.weight", (9, 4), rows=(3, 9)), make_update("lora", (6, 4), Maker(8))))
        every.append(Targeted(Target("z.weight", (6, 4)), make_update("replace_rows", (6, 4), Maker(7))))
        loratool.save(Adapter(tuple(every)), folder / "every.safetensors")
        shutil.copytree(folder / "merged", folder / "received")
        index = folder / "sharded" / "model.safetensors.index.json"
        read = [folder / "adapter.safetensors", folder / "every.safetensors"]
        headers = [*read, folder / "record.safetensors", single, *sorted((folder / "base").glob("*.safetensors"))]
        self.seeds: dict[str, list[bytes]] = {
            "header": [path.read_bytes() for path in headers],
            "index": [index.read_bytes()],
            "manifest": [path.read_bytes() for path in read],
            "receipt": [(folder / "merged" / receipt.FILE_NAME).read_bytes(), single.read_bytes()],
            "undo": [(folder / "record.safetensors").read_bytes()],
        }

    def put(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def header(self, content: bytes) -> str:
        header = read_header(self.put("broken.safetensors", content))
        assert sum(tensor.nbytes for tensor in header.tensors.values()) == header.file_size - header.size
        return f"{len(header.tensors)} tensors"

    def index(self, content: bytes) -> str:
        self.put("sharded/model.safetensors.index.json", content)
        found = open_checkpoint(self.folder / "sharded")
        return f"{len(found.shards)} shards, {len(found.ties)} ties"

    def manifest(self, content: bytes) -> str:
        path = self.put("broken.lora.safetensors", content)
        problems = loratool.validate(path)
        try:
            adapter = native_format.read(path)
        except LoratoolError:
            assert problems, "called valid, and can not be read"
            raise
        native_format.content_digest(adapter)
        copy = self.folder / "again.safetensors"
        copy.unlink(missing_ok=True)
        if not problems:
            loratool.save(adapter, copy)
            assert copy.read_bytes() == content, "valid, and written again with other bytes"
        return f"{len(problems)} problems"

    def receipt(self, content: bytes) -> str:
        """In a folder or in a header; what parses is planned with."""
        if content[:1] == b"{":
            self.put(f"received/{receipt.FILE_NAME}", content)
            merged, base = self.folder / "received", self.folder / "base"
        else:
            merged, base = self.put("received.safetensors", content), self.folder / "one" / "base" / "model.safetensors"
        found = receipt.find(open_checkpoint(merged))
        if found is None:
            return "none"
        out = self.folder / "planned"
        return f"planned {loratool.api.plan_of_unmerge(merged, self.adapter, out, base=base).exact}"

    def undo(self, content: bytes) -> str:
        path = self.put("broken.undo.safetensors", content)
        undo.read(path)
        out = self.folder / "back"
        try:
            report = loratool.unmerge(self.folder / "merged", self.adapter, out, undo=path, threads=1)
            assert report.exact
            assert {file.name: file.read_bytes() for file in out.iterdir()} == self.base, "exact, and not the base"
        except LoratoolError:
            assert not out.exists()
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return "the base"

    def check(self, target: str, content: bytes) -> str:
        """What a parser answers to an input. Raises what is a finding."""
        try:
            return str(getattr(self, target)(content))
        except LoratoolError as error:
            told = error.message.replace(str(self.folder), "")
            return f"{error.code} {re.sub(r'[0-9]+|.[^ ]*[^ -~].*', '#', told)[:60]}"


CHANGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "header": change_container,
    "index": change_document,
    "manifest": change_container,
    "receipt": lambda content, rng: (change_document if content[:1] == b"{" else change_container)(content, rng),
    "undo": change_record,
}


# --- running --------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    pass


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


class Fuzzer:
    """Runs changed inputs through the parsers of one world, and keeps what breaks them."""

    def __init__(self, folder: Path, seed: int, keep: Path | None = None) -> None:
        self.world = World(folder)
        self.rng = random.Random(seed)
        self.keep = keep
        self.runs: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.answers: dict[str, set[str]] = {target: set() for target in CHANGE}
        self.slowest: dict[str, float] = dict.fromkeys(CHANGE, 0.0)
        self.findings: dict[str, str] = {}
        self.corpus = {target: [*seeds] for target, seeds in self.world.seeds.items()}
        for target, seeds in self.world.seeds.items():
            for content in seeds:
                answer = self.world.check(target, content)
                assert not answer.startswith("E-") or target == "header", f"a seed of {target} is refused: {answer}"

    def step(self, target: str) -> None:
        seeds = self.corpus[target]
        content = CHANGE[target](self.rng.choice(seeds), self.rng)
        self.runs[target] += 1
        began = time.monotonic()
        signal.signal(signal.SIGALRM, _too_slow)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            answer = self.world.check(target, content)
        except (Exception, TooSlow) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.found(target, content, error)
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest[target] = max(self.slowest[target], time.monotonic() - began)
        self.accepted[target] += not answer.startswith("E-")
        if answer not in self.answers[target]:
            self.answers[target].add(answer)
            if len(seeds) < CORPUS and len(content) < 200_000:
                seeds.append(content)

    def found(self, target: str, content: bytes, error: BaseException) -> None:
        """Keep an input that broke something; one for every place it broke."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/loratool/" in frame.filename]
        place = own[-1] if own else where
        known = f"{target}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        if known in self.findings:
            return
        name = f"{target}-{hashlib.sha256(content).hexdigest()[:12]}"
        self.findings[known] = f"{str(error)[:200]} ({name})"
        if self.keep is not None:
            self.keep.mkdir(exist_ok=True)
            (self.keep / name).write_bytes(content)

    def run(self, seconds: float) -> None:
        """All targets in turn, for a time: each gets an equal share of it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for target in CHANGE:
                turn = min(end, time.monotonic() + 0.5)
                while time.monotonic() < turn:
                    self.step(target)


@contextmanager
def capped() -> Iterator[None]:
    """Let this process have no more than MEMORY above what it has now: more is a MemoryError, and a finding."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def work(arguments: tuple[int, float, Path]) -> dict[str, Any]:
    seed, seconds, keep = arguments
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loratool-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), seed, keep)
        with capped():
            fuzzer.run(seconds)
    return {
        "runs": fuzzer.runs,
        "accepted": fuzzer.accepted,
        "answers": fuzzer.answers,
        "slowest": fuzzer.slowest,
        "findings": fuzzer.findings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=REGRESSIONS)
    options = parser.parse_args()
    jobs = [(options.seed + n, options.minutes * 60, options.keep) for n in range(options.workers)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = pool.map(work, jobs)
    say = sys.stdout.write
    say(f"{options.minutes:g} minutes, {options.workers} workers, seed {options.seed}\n\n")
    say("| parser | inputs | accepted | different answers | slowest |\n|---|---|---|---|---|\n")
    for target in CHANGE:
        runs, accepted = (sum(result[key][target] for result in results) for key in ("runs", "accepted"))
        answers = set[str]().union(*(result["answers"][target] for result in results))
        slowest = max(result["slowest"][target] for result in results)
        say(f"| {target} | {runs:,} | {accepted:,} | {len(answers)} | {slowest:.2f} s |\n")
    findings = {where: what for result in results for where, what in result["findings"].items()}
    say(f"\n{len(findings)} findings\n")
    for where, what in findings.items():
        say(f"  {where}: {what}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
