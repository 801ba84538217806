# ruff: noqa: E501, PTH102, PTH104  # tables of cases read better on one line; the shim patches os itself
"""What is left when something goes wrong: a kill at every call, a full disk, a failing read, sources that change, two
runs at once, Ctrl-C. Outputs are whole or absent, inputs untouched, and the next run succeeds.

Runs are forks of one process that has imported everything (this file as a script), with the calls that change a disk
counted, and the n-th of them killed, failed, torn or held.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PREFIX
from safetensors.torch import save_file
from strategies import Maker, one, save_sharded

import loratool

ROOT = Path(__file__).parent.parent

# Known bugs, each with a test that fails until it is mended: then the mark must go.

# --- the process that is hurt ---------------------------------------------------------------------------------------

CHANGING = (
    "open",
    "write",
    "truncate",
    "fsync",
    "rename",
    "mkdir",
    "link",
    "unlink",
    "rmdir",
)  # and "read", and "lock"


class Shim:
    """Counts calls in the order in which they happen, over all threads, and does something at the `at`-th.

    `how` is kill (before the call), torn (after half of it), the name of a signal that the process sends itself, hold
    (until the file `go` is there), or the name of an errno; with `stays`, every later call of the kind fails too, as on
    a disk that is full. `only` is a part of the path, the end of which is marked with a $.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], at: int, how: str, stays: bool, only: str) -> None:
        self.folder, self.kinds, self.at, self.how, self.stays, self.only = folder, kinds, at, how, stays, only
        self.lock = threading.Lock()
        self.count = 0
        self.log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.raw_write = os.write

    def hit(self, kind: str, what: object = "", torn: Callable[[], object] | None = None) -> None:
        if kind not in self.kinds or self.only not in f"{what}$":
            return
        with self.lock:
            self.count += 1
            self.raw_write(self.log, f"{kind} {what}\n".encode())
            if self.count < self.at or not self.at or (self.count > self.at and not self.stays):
                return
        if self.how == "torn" and torn is not None:
            torn()
        if self.how in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.how))
            time.sleep(0.05)  # the main thread gets it, whoever is here
        elif self.how == "hold":
            (self.folder / "held").mkdir()
            while not (self.folder / "go").exists():
                time.sleep(0.002)
        else:
            code = getattr(errno, self.how)
            raise OSError(code, os.strerror(code))

    def install(self) -> None:
        """Put itself before every call with which loratool, shutil and tempfile change a disk, or read one."""
        shim = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                shim.hit("write", self.name, lambda: io.FileIO.write(self, memoryview(data)[: len(data) // 2]))
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                shim.hit("truncate", self.name)
                return super().truncate(size)

            def readinto(self, buffer: Any) -> int | None:
                shim.hit("read", self.name)
                return super().readinto(buffer)

            def read(self, size: int | None = -1) -> bytes:
                shim.hit("read", self.name)
                return super().read(size)

            def readall(self) -> bytes:
                shim.hit("read", self.name)
                return super().readall()

        def opened(
            path: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: Any = None,
            errors: Any = None,
            newline: Any = None,
        ) -> Any:
            if isinstance(path, int):
                return real_open(path, mode, buffering, encoding, errors, newline)
            if set(mode) & set("wax+"):
                shim.hit("open", path)
            raw = File(os.fspath(path), mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered = kind(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        def before(kind: str, real: Callable[..., Any], reads: bool = False) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                named = f"/proc/self/fd/{arguments[0]}" if isinstance(arguments[0], int) else arguments[0]
                if reads:
                    shim.hit("read", os.path.realpath(named))
                    named = f"/proc/self/fd/{arguments[1]}"
                shim.hit(kind, os.path.realpath(named) if str(named).startswith("/proc") else named)
                return real(*arguments, **options)

            return call

        real_open = builtins.open
        builtins.open = opened  # type: ignore[assignment]
        Path.open = opened  # type: ignore[assignment,method-assign]
        for name in ("rename", "mkdir", "fsync", "link", "unlink", "rmdir"):
            setattr(os, name, before(name, getattr(os, name)))
        if sys.version_info < (3, 11):  # pathlib kept the functions themselves
            Path.rename = lambda path, target: os.rename(path, target)  # type: ignore[method-assign,assignment]
            Path.mkdir = lambda path, mode=0o777, **_: os.mkdir(path, mode)  # type: ignore[method-assign,assignment]
        fcntl.flock = before("lock", fcntl.flock)
        os.copy_file_range = lambda src, dst, *more, **options: before("write", copy_range, True)(
            src, dst, *more, **options
        )
        os.sendfile = lambda dst, src, *more: before("write", lambda a, b, *c: sendfile(b, a, *c), True)(
            src, dst, *more
        )


copy_range, sendfile = os.copy_file_range, os.sendfile


def child(order: dict[str, Any]) -> int:
    """One run of the command line, with whatever is to go wrong."""
    folder = Path(order["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.umask(order.get("umask", 0o022))
    if (user := order.get("user")) is not None and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if order["faults"].pop("plain", False):
        from loratool import staging

        staging._exchanged = lambda one, other: False  # as where no call swaps two names
    if (limit := order.get("fsize")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    else:  # its log would be limited as well
        shim = {"kinds": CHANGING, "at": 0, "how": "", "stays": False, "only": "", **order["faults"]}
        Shim(folder, **shim).install()
    from loratool.cli import main

    if order["argv"][0] != "save":
        sys.argv = ["loratool", *order["argv"]]
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
    try:
        loratool.save(loratool.load(order["argv"][1]), order["argv"][3])
    except loratool.LoratoolError as error:
        sys.stderr.write(f"error[{error.code}]: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def serve() -> None:
    """Fork a child for every order on stdin, and tell how it ended when asked."""
    import encodings.utf_16_be  # noqa: F401  # another user may not be allowed to read the standard library

    import blake3  # noqa: F401
    import numpy  # noqa: F401
    import zstandard  # noqa: F401

    import loratool.cli.extract
    import loratool.cli.merge
    import loratool.cli.unmerge  # noqa: F401

    gc.freeze()  # what is there is never touched by a child's collector
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif not (answer := os.fork()):
            code = 99
            try:
                code = child(order)
                sys.stdout.flush()
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


# --- its client -----------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[str]  # kind and path

    @property
    def error(self) -> str:
        """The code of the first problem told on stderr."""
        found = re.match(r"error\[(E-[A-Z-]+)\]", self.err)
        return found[1] if found else ""


class Run(NamedTuple):
    pid: int
    folder: Path
    ends: dict[str, int]


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self, *argv: object, user: int | None = None, umask: int = 0o022, fsize: int | None = None, **faults: Any
    ) -> Run:
        """Begin a run of a command line; `faults` are the shim's."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        folder.mkdir()
        folder.chmod(0o777)
        ends = {}
        for name in ("out", "err"):  # pipes have no size to limit
            os.mkfifo(folder / name)
            (folder / name).chmod(0o666)
            ends[name] = os.open(folder / name, os.O_RDWR | os.O_NONBLOCK)
        order = {"folder": str(folder), "argv": [*map(str, argv)], "user": user, "umask": umask, "fsize": fsize}
        return Run(self.ask({**order, "faults": faults}), folder, ends)

    def wait(self, run: Run) -> Done:
        code = self.ask({"wait": run.pid})
        told = {}
        for name, end in run.ends.items():
            told[name] = ""
            with contextlib.suppress(BlockingIOError):
                told[name] = os.read(end, 1 << 16).decode()
            os.close(end)
        log = run.folder / "log"
        return Done(code, told["out"], told["err"], log.read_text().splitlines() if log.exists() else [])

    def run(self, *argv: object, **faults: Any) -> Done:
        return self.wait(self.start(*argv, **faults))

    def held(self, run: Run) -> None:
        """Wait until a run is at the call where it is to be held."""
        deadline = time.monotonic() + 20
        while not (run.folder / "held").exists():
            assert time.monotonic() < deadline, "it never came there"
            time.sleep(0.002)

    def go(self, run: Run) -> Done:
        (run.folder / "go").touch()
        return self.wait(run)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="loratool-faults-") as name:  # where another user gets to
        Path(name).chmod(0o777)
        server = Server(Path(name))
        yield server
        assert server.process.stdin is not None
        server.process.stdin.close()
        server.process.wait(30)
        assert server.process.stdout is not None
        server.process.stdout.close()


def facts(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder with content, mode, owner, time, and inode; --link may count links up."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content: object = path.readlink() if path.is_symlink() else None
        if stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = (
            content, info.st_mode, info.st_uid, info.st_size, info.st_mtime_ns, info.st_ino
        )  # fmt: skip
    return found


def contents(path: Path) -> dict[str, bytes]:
    """The files of an output, which is a file or a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {child.relative_to(path).as_posix(): child.read_bytes() for child in path.rglob("*") if child.is_file()}


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def beside(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


@dataclass
class World:
    """Inputs that nobody may change, and commands that read them and write into a folder."""

    inputs: Path
    server: Server

    def __post_init__(self) -> None:
        self.known: dict[str, dict[str, dict[str, bytes]]] = {}
        self.lengths: dict[str, list[str]] = {}
        self.lookups: dict[str, list[str]] = {}
        self.before = facts(self.inputs)

    def argv(self, act: str, out: Path) -> list[object]:
        inputs = self.inputs
        adapters = [inputs / "lora.safetensors", f"{inputs / 'dora.safetensors'}@0.5"]
        scale = ["--alpha", 4, "--scaling", "alpha/rank"]
        merge, file = ["merge", inputs / "base", *adapters], ["merge", inputs / "one.safetensors", *adapters]
        unmerge = ["unmerge", inputs / "merged", *adapters]
        folder, single = ["-o", out / "out"], ["-o", out / "out.safetensors"]
        record, known = ["--undo", out / "u.safetensors"], ["--undo", inputs / "u.undo.safetensors"]
        return {
            "merge": [*merge, *folder],
            "merge-undo": [*merge, *folder, *record],
            "merge-link": ["merge", inputs / "base", adapters[0], *folder, "--link", "--threads", 1],
            "merge-resume": [*merge, *folder, "--resume"],
            "merge-dtype": [*merge, *folder, "--dtype", "fp32"],
            "merge-file": [*file, *single],
            "merge-file-undo": [*file, *single, *record],
            "merge-file-resume": [*file, *single, "--resume"],
            "unmerge": [*unmerge, *folder, "--base", inputs / "base"],
            "unmerge-undo": [*unmerge, *folder, *known],
            "unmerge-file": ["unmerge", inputs / "merged.safetensors", *adapters, *single, "--undo", inputs / "file.undo.safetensors"],
            "unmerge-alone": ["unmerge", inputs / "merged-lora", adapters[0], *folder],
            "extract": ["extract", inputs / "wrapped.pth", "-o", out / "a.safetensors", "--base-out", out / "out", *scale],
            "extract-alone": ["extract", inputs / "wrapped.safetensors", "-o", out / "a.safetensors", *scale],
            "extract-base": ["extract", inputs / "wrapped.safetensors", "-o", out / "a.safetensors", "--base-out", out / "out", *scale],
            "save": ["save", inputs / "adapter", "-o", out / "a.safetensors"],
        }[act]  # fmt: skip

    def outputs(self, act: str) -> dict[str, dict[str, bytes]]:
        """What a command writes when nothing goes wrong, by name; known from a run that was left alone."""
        if act not in self.known:
            folder = self.server.folder / f"good-{act}"
            folder.mkdir()
            done = self.server.run(*self.argv(act, folder))
            assert (done.code, done.err) == (0, ""), done
            self.known[act] = {path.name: contents(path) for path in folder.iterdir()}
            self.lengths[act] = done.calls
        return self.known[act]

    def calls(self, act: str) -> list[str]:
        self.outputs(act)
        return self.lengths[act]

    def reads(self, act: str) -> list[str]:
        """The reads of inputs, by path, in a run that is left alone."""
        if act not in self.lookups:
            folder = Path(tempfile.mkdtemp(dir=self.server.folder))
            done = self.server.run(*self.argv(act, folder), kinds=["read"], only=str(self.inputs))
            assert (done.code, done.err) == (0, ""), done
            self.lookups[act] = [call.partition(" ")[2] for call in done.calls]
            shutil.rmtree(folder)
        return self.lookups[act]

    def whole_or_absent(self, act: str, out: Path, staging: bool = False) -> list[str]:
        """Names of the outputs that are there; they are whole, inputs are as they were, and nothing else is there."""
        good = self.outputs(act)
        there = [name for name in beside(out) if name in good]
        for name in there:
            assert contents(out / name) == good[name], f"{name} is there and not whole"
        left = set(beside(out)) - set(there)
        allowed = {name for name in left if any(name.startswith(f".{known}.partial-") for known in good)}
        assert left == (allowed if staging else set())
        self.untouched()
        return there

    def untouched(self) -> None:
        now = facts(self.inputs)
        changed = {name for name in self.before.keys() | now.keys() if self.before.get(name) != now.get(name)}
        assert not changed, f"inputs were touched: {changed}"

    def refused(self, done: Done, act: str, out: Path, *codes: str) -> None:
        """It said no in its own words, and left nothing."""
        assert done.code in (1, 2), done
        assert not codes or done.error in codes, done
        assert "Traceback" not in done.err
        assert self.whole_or_absent(act, out) == []

    def again(self, act: str, out: Path) -> None:
        """The same command once more: refused where an output is there, else it succeeds; then all is there."""
        there = self.whole_or_absent(act, out, staging=True)
        if there:
            done = self.server.run(*self.argv(act, out))
            assert (done.code, done.error) == (2, "E-EXISTS"), done
            for name in there:
                remove(out / name)
        done = self.server.run(*self.argv(act, out))
        assert (done.code, done.err) == (0, ""), done
        assert self.whole_or_absent(act, out) == sorted(self.outputs(act))


MERGES = (
    "merge",
    "merge-undo",
    "merge-link",
    "merge-resume",
    "merge-dtype",
    "merge-file",
    "merge-file-undo",
    "merge-file-resume",
)
UNMERGES = ("unmerge", "unmerge-undo", "unmerge-file", "unmerge-alone")
ACTS = (*MERGES, *UNMERGES, "extract", "extract-alone", "extract-base", "save")


@pytest.fixture(scope="module")
def world(server: Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three shards, of which adapters change two; a base in one file; a DoRA; a wrapped pickle; a merge with record."""
    folder = server.folder / "inputs"
    folder.mkdir()
    folder.chmod(0o755)
    build(folder)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return World(folder, server)


def build(folder: Path) -> None:
    make = Maker(3)
    shapes = {"a": (3,), "b": (5, 4), "c": (4, 4), "d": (7,), "e": (2, 2), "f": (4, 6), "g": (5, 4)}
    state = {f"{name}.weight": make.values(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    base = save_sharded(state, folder / "base", shards=3)
    (base / "config.json").write_text("{}")
    (base / "sub").mkdir()
    (base / "sub" / "tokenizer.json").write_text("{}")
    save_file(state, folder / "one.safetensors")
    loratool.save(one("lora", (5, 4), seed=1, name="b.weight"), folder / "lora.safetensors")
    loratool.save(one("dora1-lora", (4, 4), seed=2, name="c.weight"), folder / "dora.safetensors")
    adapters = [(folder / "lora.safetensors", 1.0), (folder / "dora.safetensors", 0.5)]
    loratool.merge(base, adapters, folder / "merged", undo=folder / "u.undo.safetensors")
    loratool.merge(base, adapters[0][0], folder / "merged-lora")
    single = folder / "merged.safetensors"
    loratool.merge(folder / "one.safetensors", adapters, single, undo=folder / "file.undo.safetensors")
    A, B = make.values(2, 4, dtype=torch.float32), make.values(5, 2, dtype=torch.float32)
    wrapped = {
        "x.linear.weight": torch.ones(5, 4),
        "x.lora.A": A.T.clone(),
        "x.lora.B": B.T.clone(),
        "y": torch.ones(9),
    }
    torch.save(wrapped, folder / "wrapped.pth")
    save_file({name: value.contiguous() for name, value in wrapped.items()}, folder / "wrapped.safetensors")
    (folder / "adapter").mkdir()
    parts = {f"{PREFIX}b.lora_A.weight": A, f"{PREFIX}b.lora_B.weight": B}
    save_file(parts, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["b"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def spots(calls: Sequence[str], writes: int) -> list[int]:
    """Numbers of the calls to hurt, from 1: all of the rare kinds, and about `writes` of the frequent ones."""
    often = [n for n, call in enumerate(calls, 1) if call.split()[0] in ("write", "open", "fsync", "mkdir", "read")]
    step = max(1, len(often) // writes)
    return sorted({n for n in range(1, len(calls) + 1) if n not in often} | {*often[::step], *often[-1:]})


# --- kill -9 --------------------------------------------------------------------------------------------------------


def appears(call: str) -> bool:
    """Whether a call gives an output its name: a folder is renamed, a file is linked out of the scratch folder."""
    kind, _, path = call.partition(" ")
    return kind in ("rename", "link") and ".partial-" in Path(path).parent.name


# An output that nobody should have alone, and the one that it needs: a merge that promised a record is not undone
# without it; the adapter of an extraction says that all of it is done.
NEEDS = {"merge-undo": ("out", "u.safetensors"), "merge-file-undo": ("out.safetensors", "u.safetensors"),
         "extract": ("a.safetensors", "out"), "extract-base": ("a.safetensors", "out")}  # fmt: skip
EVERY = ("merge-undo", "unmerge-undo", "extract-base")  # of these no call is left out


def renames(calls: Sequence[str]) -> tuple[int, int]:
    """The numbers of the first and the last call that gives an output its name."""
    found = [n for n, call in enumerate(calls, 1) if appears(call)]
    return found[0], found[-1]


@pytest.mark.parametrize("act", ACTS)
def test_a_kill_at_any_call_leaves_whole_outputs_or_none(act: str, world: World, tmp_path: Path) -> None:
    calls = world.calls(act)
    for n in spots(calls, len(calls) if act in EVERY else 3):
        out = tmp_path / str(n)
        out.mkdir()
        done = world.server.run(*world.argv(act, out), at=n, how="torn" if n % 2 else "kill")
        assert done.code == -signal.SIGKILL or len(done.calls) < n, done
        there = world.whole_or_absent(act, out, staging=True)
        assert len(there) == sum(map(appears, done.calls[: n - 1])), (done.calls[-1], there)
        if act in NEEDS and NEEDS[act][0] in there:
            assert NEEDS[act][1] in there
        world.again(act, out)


@pytest.mark.parametrize("act", NEEDS)
def test_of_two_outputs_the_one_that_needs_the_other_appears_last(act: str, world: World, tmp_path: Path) -> None:
    """A merge without its record can not be repeated nor undone; a record, or a base, alone does no harm."""
    done = world.server.run(*world.argv(act, tmp_path), at=2, kinds=["rename", "link"], how="kill")
    assert done.code == -signal.SIGKILL
    assert world.whole_or_absent(act, tmp_path, staging=True) == [NEEDS[act][1]]


def test_nothing_is_renamed_before_it_is_flushed(world: World) -> None:
    for act in ACTS:
        calls = [re.sub(r"\.partial-[^/]*", ".partial", call) for call in world.calls(act)]
        for n, call in enumerate(calls):
            if appears(call):
                moved = call.split()[1]
                names = {call.split()[1] for call in calls if call.startswith("write ")}
                written = {name for name in names if name == moved or name.startswith(f"{moved}/")}
                flushed = {c.split()[1] for c in calls[:n] if c.startswith("fsync ")}
                assert written | {moved} <= flushed, (act, written - flushed)
                assert calls[n + 1] == f"fsync {Path(moved).parent.parent}", "the name itself is flushed as well"
                later = [c for c in calls[n:] if c.startswith(("write ", "open ", "truncate ")) and moved in c]
                assert not later, "written after the rename"


def test_what_the_killed_left_is_removed_by_the_next_run_and_what_lives_is_not(world: World, tmp_path: Path) -> None:
    for n in (3, 9):
        world.server.run(*world.argv("merge", tmp_path), at=n, how="kill")
    assert len(beside(tmp_path)) == 1, "the second removed what the first left"
    alive = world.server.start(*world.argv("merge", tmp_path), at=renames(world.calls("merge"))[0], how="hold")
    world.server.held(alive)
    (scratch,) = beside(tmp_path)
    done = world.server.run(*world.argv("merge", tmp_path), at=3, how="kill")
    assert done.code == -signal.SIGKILL
    assert len(beside(tmp_path)) == 2
    assert scratch in beside(tmp_path)
    assert world.server.go(alive).code == 0
    assert [name for name in beside(tmp_path) if not name.startswith(".")] == ["out"]
    world.whole_or_absent("merge", tmp_path, staging=True)


def test_staging_of_others_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / ".other.partial-abc").mkdir()
    (tmp_path / ".out.partial-file").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial-link").symlink_to("precious")
    assert world.server.run(*world.argv("merge", tmp_path)).code == 0
    assert beside(tmp_path) == [".other.partial-abc", ".out.partial-file", ".out.partial-link", "out", "precious"]


# --- no space, and other refusals of the disk -----------------------------------------------------------------------


# Of `mkdir` and `unlink` some are allowed to fail: a folder that is there, a scratch file that stays behind.
REFUSALS = {"write": "ENOSPC", "open": "EMFILE", "truncate": "EDQUOT", "fsync": "EIO", "rename": "EACCES"}


@pytest.mark.parametrize("act", ACTS)
def test_a_disk_that_refuses_any_call_is_an_error_and_leaves_nothing(act: str, world: World, tmp_path: Path) -> None:
    calls = world.calls(act)[: renames(world.calls(act))[0]]  # later there is an output, which is whole
    for kind, how in REFUSALS.items():
        count = sum(call.startswith(f"{kind} ") for call in calls)
        for n in range(1, count + 1, 1 + count // 2):
            out = tmp_path / f"{kind}-{n}"
            out.mkdir()
            done = world.server.run(*world.argv(act, out), at=n, kinds=[kind], how=how, stays=kind == "write")
            assert (done.code, done.error) == (2, "E-DISK"), (kind, n, done)
            assert os.strerror(getattr(errno, how)) in done.err, done.err
            assert ("space" in done.err.partition("help:")[2]) == (how in ("ENOSPC", "EDQUOT")), done.err
            assert world.whole_or_absent(act, out) == []
    world.again(act, out)


def test_a_scratch_folder_that_can_not_be_made(world: World, tmp_path: Path) -> None:
    done = world.server.run(*world.argv("merge", tmp_path), at=1, kinds=["mkdir"], how="ENOSPC")
    assert (done.code, done.error) == (2, "E-DISK")
    assert beside(tmp_path) == []


@pytest.mark.parametrize("act", NEEDS)
def test_a_second_output_that_gets_no_name_leaves_no_first(act: str, world: World, tmp_path: Path) -> None:
    where = {"kinds": ["rename", "link"], "only": ".partial-", "how": "EIO", "stays": True}
    for n in (1, 2):
        done = world.server.run(*world.argv(act, tmp_path), at=n, **where)
        world.refused(done, act, tmp_path, "E-DISK")
    world.again(act, tmp_path)


@pytest.mark.parametrize("act", ACTS)
def test_a_name_that_can_not_be_flushed_is_taken_back(act: str, world: World, tmp_path: Path) -> None:
    """The output has its name already, and the folder that knows it is not on the disk."""
    for n in range(1, len(world.outputs(act)) + 1):
        done = world.server.run(*world.argv(act, tmp_path), at=n, kinds=["fsync"], how="EIO", only=f"{tmp_path}$")
        world.refused(done, act, tmp_path, "E-DISK")
    world.again(act, tmp_path)


@pytest.mark.parametrize(("act", "file"), [("merge", "journal"), ("merge-resume", "journal"), ("unmerge-undo", "journal"),
                                           ("merge-undo", ".blocks"), ("merge-undo", "u.safetensors/u.safetensors"),
                                           ("merge-file-undo", ".blocks")])  # fmt: skip
def test_no_room_for_what_is_written_beside(act: str, file: str, world: World, tmp_path: Path) -> None:
    """The journal, and the record with its scratch file: at every write to one of them."""
    only = re.sub("/.*", "", file) if "/" not in file else "/u.safetensors"
    calls = [call for call in world.calls(act) if call.startswith("write ") and call.endswith(only)]
    assert calls, f"nothing is written to {file}"
    for n in range(1, len(calls) + 1):
        done = world.server.run(*world.argv(act, tmp_path), at=n, kinds=["write"], how="EFBIG", only=only, stays=True)
        world.refused(done, act, tmp_path, "E-DISK")
        assert "help: free some space" in done.err
    world.again(act, tmp_path)


@pytest.mark.parametrize("act", ["merge-undo", "merge-dtype", "merge-file-undo", "unmerge-undo", "extract-base"])
def test_every_file_that_is_written_may_be_too_large(act: str, world: World, tmp_path: Path) -> None:
    """A limit of the system just below each file that a run makes, the journal and the record's blocks among them."""
    held = world.server.start(*world.argv(act, tmp_path), at=1, kinds=["rename", "link"], only=".partial-", how="hold")
    world.server.held(held)
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert world.server.go(held).code == 0
    for path in tmp_path.iterdir():
        remove(path)
    assert {"journal"} <= sizes.keys()
    assert not any(name.endswith(".blocks") for name in sizes) or act.endswith("undo")
    for limit in sorted({size - 1 for size in sizes.values() if size}):
        done = world.server.run(*world.argv(act, tmp_path), fsize=limit)
        world.refused(done, act, tmp_path, "E-DISK")
        assert "help: free some space" in done.err
    world.again(act, tmp_path)


@pytest.mark.parametrize("act", ACTS)
def test_files_that_may_not_grow(act: str, world: World, tmp_path: Path) -> None:
    """A limit of the system instead of a full disk: the real error of a real write."""
    largest = max(len(content) for files in world.outputs(act).values() for content in files.values())
    for n, limit in enumerate((0, 100, largest - 1)):
        out = tmp_path / str(n)
        out.mkdir()
        done = world.server.run(*world.argv(act, out), fsize=limit)
        assert done.code == 2, done
        assert world.whole_or_absent(act, out) == []
    world.again(act, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(world: World, small_disk: Path, tmp_path: Path) -> None:
    """Told by the plan where it knows; and by the writing, where the room goes meanwhile, or for what is no weights."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(60 << 10))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    done = world.server.run(*world.argv("merge", small_disk), "--dry-run")
    assert (done.code, done.error) == (2, "E-SPACE"), done
    filler.unlink()
    for act in ("merge", "merge-file", "merge-undo", "merge-resume", "unmerge-undo", "unmerge-alone", "extract"):
        good = world.outputs(act)
        alive = world.server.start(*world.argv(act, small_disk), at=3, how="hold")
        world.server.held(alive)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 1024):
                pass
        done = world.server.go(alive)
        assert (done.code, done.error) == (2, "E-DISK"), (act, done)
        assert "help: free some space" in done.err
        filler.unlink()
        assert world.whole_or_absent(act, small_disk) == []
        world.again(act, small_disk)
        for name in good:
            remove(small_disk / name)


def test_a_disk_that_is_read_only(world: World, small_disk: Path) -> None:
    """Inputs on it are read, and linked from nowhere; outputs are refused before anything is tried."""
    (small_disk / "inputs").mkdir()
    shutil.copytree(world.inputs / "base", small_disk / "inputs" / "base")
    for name in ("lora.safetensors", "dora.safetensors"):
        shutil.copy2(world.inputs / name, small_disk / "inputs")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    other = World(small_disk / "inputs", world.server)
    for act in ACTS:
        done = world.server.run(*world.argv(act, small_disk))
        assert (done.code, done.error) == (2, "E-DISK"), (act, done)
        assert "not writable" in done.err
        assert [call for call in done.calls if call.startswith(CHANGING)] == []
        if act not in MERGES or "file" in act:
            continue
        out = small_disk.parent / act
        out.mkdir()
        assert world.server.run(*other.argv(act, out)).code == 0
        assert {path.name for path in out.iterdir()} == world.outputs(act).keys()
    other.untouched()


# --- permissions ----------------------------------------------------------------------------------------------------

NOBODY = 65534  # root may do anything, so its children become somebody else


@pytest.fixture
def shared(server: Server) -> Iterator[Path]:
    """A folder that everybody may write to."""
    folder = Path(tempfile.mkdtemp(dir=server.folder))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("act", ACTS)
def test_a_folder_that_may_not_be_written_to_is_told_by_the_plan(act: str, world: World, shared: Path) -> None:
    locked = shared / "locked"
    locked.mkdir(mode=0o555)
    plan = ["--dry-run"] if act.startswith(("merge", "unmerge")) else []
    done = world.server.run(*world.argv(act, locked), *plan, user=NOBODY)
    assert (done.code, done.error) == (2, "E-DISK"), done
    assert "not writable" in done.err
    assert [call for call in done.calls if call.startswith(CHANGING)] == []
    locked.chmod(0o755)


@pytest.mark.parametrize("name", ["base/config.json", "base/model-00002-of-00003.safetensors", "lora.safetensors"])
def test_an_input_that_may_not_be_read_is_an_error_of_reading(name: str, world: World, shared: Path) -> None:
    shutil.copytree(world.inputs, shared / "inputs")
    (shared / "inputs" / name).chmod(0)
    other = World(shared / "inputs", world.server)
    out = shared / "new"
    out.mkdir()
    out.chmod(0o777)
    done = world.server.run(*other.argv("merge", out), user=NOBODY)
    assert (done.code, done.error) == (2, "E-READ"), done
    assert name in done.err
    assert beside(out) == []


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_outputs_keep_the_umask(act: str, umask: int, world: World, tmp_path: Path) -> None:
    done = world.server.run(*world.argv(act, tmp_path), umask=umask)
    assert done.code == 0
    linked = {path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert bool(linked) == (act == "merge-link")
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path in linked or stat.S_IMODE(path.stat().st_mode) == wanted, (path, oct(path.stat().st_mode))


def test_open_modes_of_companions_are_not_taken_over(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.inputs, tmp_path / "in")
    for path in (tmp_path / "in" / "base").rglob("*"):
        path.chmod(0o777)
    other = World(tmp_path / "in", world.server)
    assert world.server.run(*other.argv("merge", tmp_path)).code == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.stat().st_mode & 0o022]


# --- reading --------------------------------------------------------------------------------------------------------


COMPANIONS = ("config.json", "tokenizer.json")


def test_a_companion_that_can_not_be_read_is_told_with_its_name(world: World, tmp_path: Path) -> None:
    for name in COMPANIONS:
        done = world.server.run(*world.argv("merge", tmp_path), at=1, kinds=["read"], how="EIO", only=name, stays=True)
        world.refused(done, "merge", tmp_path, "E-READ")
        assert name in done.err


@pytest.mark.parametrize("act", ACTS)
def test_a_read_that_fails_is_told_and_leaves_nothing(act: str, world: World, tmp_path: Path) -> None:
    """The first read of every input, the last, and one between: headers, digests, rows, copies, undo blocks."""
    reads = world.reads(act)
    assert {str(world.inputs / name) for name in CHANGES.get(act, ())} <= set(reads)
    for file in sorted(set(reads)):
        if Path(file).name in COMPANIONS:
            continue
        count = reads.count(file)
        for n in sorted({1, count} if act.endswith(("resume", "alone")) else {1, (count + 1) // 2, count}):
            done = world.server.run(*world.argv(act, tmp_path), at=n, kinds=["read"], how="EIO", only=file, stays=True)
            world.refused(done, act, tmp_path, "E-READ")
            assert os.strerror(errno.EIO) in done.err, done.err
            assert file in done.err or "  in: " not in done.err, (n, done.err)
    world.again(act, tmp_path)


@pytest.mark.parametrize("act", ["merge-link", "unmerge-file", "extract"])
def test_a_read_that_fails_is_told_with_its_file_wherever_it_is(act: str, world: World, tmp_path: Path) -> None:
    """A header that is read again for the output, the undo record's own, and a pickle."""
    for file in sorted({read for read in world.reads(act) if Path(read).name not in COMPANIONS}):
        for n in range(1, world.reads(act).count(file) + 1):
            done = world.server.run(*world.argv(act, tmp_path), at=n, kinds=["read"], how="EIO", only=file, stays=True)
            assert file in done.err, (n, done.err)


# --- sources that change --------------------------------------------------------------------------------------------


def rewrite(file: Path) -> None:
    """Other bytes of the same length, in place."""
    content = file.read_bytes()
    with file.open("r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(bytes(byte ^ 255 for byte in content[-4:]))


def append(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"more")


def replaced(file: Path) -> None:
    """Another file of the same size and times under the name, as a sync tool would put it there."""
    info = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.rename(file)


def vanish(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def another(file: Path) -> None:
    """A later version of the file under its name: a longer header, and other numbers further on."""
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    data = content[8 + header : -4] + b"\x01\x02\x03\x04"
    other = file.with_name("other")
    other.write_bytes((header + 8).to_bytes(8, "little") + content[8 : 8 + header] + b" " * 8 + data)
    other.rename(file)


WAYS = (rewrite, append, replaced, vanish, truncate, another)

CHANGES = {
    "merge": ["base/model-00002-of-00003.safetensors", "base/model-00003-of-00003.safetensors", "lora.safetensors"],
    "merge-undo": ["base/model-00001-of-00003.safetensors", "dora.safetensors"],
    "merge-link": ["base/model-00001-of-00003.safetensors"],
    "merge-resume": ["base/model-00002-of-00003.safetensors", "lora.safetensors"],
    "merge-dtype": ["base/model-00001-of-00003.safetensors", "dora.safetensors"],
    "merge-file": ["one.safetensors"],
    "merge-file-undo": ["one.safetensors", "lora.safetensors"],
    "unmerge": ["base/model-00002-of-00003.safetensors", "merged/model-00001-of-00003.safetensors"],
    "unmerge-undo": ["merged/model-00002-of-00003.safetensors", "lora.safetensors", "u.undo.safetensors"],
    "unmerge-file": ["merged.safetensors", "dora.safetensors", "file.undo.safetensors"],
    "unmerge-alone": ["merged-lora/model-00002-of-00003.safetensors", "lora.safetensors"],
    "extract": ["wrapped.pth"],
    "extract-alone": ["wrapped.safetensors"],
    "extract-base": ["wrapped.safetensors"],
}


@pytest.fixture
def meanwhile(world: World, tmp_path: Path) -> Callable[..., tuple[Done, World, Path]]:
    """Runs an act on a copy of the inputs, holds it at a call, changes a file, and lets it go on."""
    count = 0

    def run(act: str, name: str, change: Callable[[Path], None], **where: Any) -> tuple[Done, World, Path]:
        nonlocal count
        count += 1
        out = tmp_path / str(count)
        out.mkdir()
        shutil.copytree(world.inputs, tmp_path / f"in{count}")
        other = World(tmp_path / f"in{count}", world.server)
        if "only" in where:
            where["only"] = str(other.inputs / where["only"])
        held = world.server.start(*other.argv(act, out), how="hold", **where)
        world.server.held(held)
        change(other.inputs / name)
        other.before = facts(other.inputs)
        other.known = world.known
        return world.server.go(held), other, out

    return run


@pytest.mark.parametrize(("act", "name"), [(act, name) for act, names in CHANGES.items() for name in names])
def test_a_source_that_changes_after_the_plan_is_noticed(
    act: str, name: str, world: World, meanwhile: Callable[..., tuple[Done, World, Path]]
) -> None:
    """When nothing is written yet, and in the midst of writing; whatever is told, nothing wrong gets a name."""
    good = world.outputs(act)
    writes = sum(call.startswith("write ") for call in world.calls(act))
    spots = [{"kinds": ["mkdir"], "at": 1}, {"kinds": ["write"], "at": max(1, writes // 2)}]
    for n, change in enumerate(WAYS):
        if name.endswith(".pth") and change in (truncate, another):
            continue  # torch maps it: the system ends a process that reads beyond the end of a file
        proven = "undo" in name and change in (rewrite, append, replaced)  # by digests: not every byte of it matters
        for where in spots[: 1 + n % 2]:
            done, other, out = meanwhile(act, name, change, **where)
            if done.code == 0:
                assert proven or where is not spots[0], (change, done)
                assert {path.name: contents(path) for path in out.iterdir()} == good
                other.untouched()
            else:
                other.refused(done, act, out)
                assert name in done.err or done.error in ("E-NOT-EXACT", "E-RECEIPT", "E-UNDO"), done


READ_TWICE = {
    "merge": ["lora.safetensors", "base/model-00002-of-00003.safetensors"],
    "merge-undo": ["dora.safetensors", "base/model-00001-of-00003.safetensors"],
    "unmerge-undo": ["merged/model-00002-of-00003.safetensors", "lora.safetensors", "u.undo.safetensors"],
    "unmerge": ["base/model-00002-of-00003.safetensors"],
    "unmerge-alone": ["lora.safetensors", "merged-lora/model-00002-of-00003.safetensors"],
    "extract-base": ["wrapped.safetensors"],
}


@pytest.mark.parametrize(
    ("act", "name"),
    [(act, name) for act, names in READ_TWICE.items() for name in names],
)
def test_a_source_that_changes_between_two_reads_never_gives_a_mixture(
    act: str, name: str, world: World, tmp_path: Path, meanwhile: Callable[..., tuple[Done, World, Path]]
) -> None:
    """Held before every read of it, the plan's as well: the output is that of the old file or of the new one."""
    shutil.copytree(world.inputs, tmp_path / "new")
    new = World(tmp_path / "new", world.server)
    another(new.inputs / name)
    good = [world.outputs(act)]
    (tmp_path / "out-new").mkdir()
    if world.server.run(*new.argv(act, tmp_path / "out-new")).code == 0:
        good.append({path.name: contents(path) for path in (tmp_path / "out-new").iterdir()})
    for n in range(1, world.reads(act).count(str(world.inputs / name)) + 1):
        done, other, out = meanwhile(act, name, another, kinds=["read"], at=n, only=name)
        if done.code == 0:
            made = {path.name: contents(path) for path in out.iterdir()}
            assert made in good, f"a mixture, from a change before read {n}"
        else:
            other.refused(done, act, out)


def test_a_companion_that_changes_while_it_is_copied(
    world: World, tmp_path: Path, meanwhile: Callable[..., tuple[Done, World, Path]]
) -> None:
    """Half of the old tokenizer and half of the new one is a model that talks nonsense."""
    shutil.copytree(world.inputs, tmp_path / "in")
    other = World(tmp_path / "in", world.server)
    companion = tmp_path / "in" / "base" / "tokenizer.model"
    companion.write_bytes(b"o" * (3 << 20))
    other.before = facts(other.inputs)
    reads = other.reads("merge").count(str(companion))
    assert reads > 2
    held = world.server.start(*other.argv("merge", tmp_path), kinds=["read"], at=2, only=str(companion), how="hold")
    world.server.held(held)
    companion.write_bytes(b"n" * (3 << 20))
    done = world.server.go(held)
    if done.code == 0:
        assert len(set((tmp_path / "out" / "tokenizer.model").read_bytes())) == 1, "a mixture"
    else:
        assert done.error == "E-CHANGED"


# --- two at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_of_two_runs_for_one_output_the_first_to_finish_wins(act: str, world: World, tmp_path: Path) -> None:
    """The other is held before its scratch folder is made, before that is locked, or when all is written."""
    good = world.outputs(act)
    last = {"kinds": ["rename", "link"], "only": ".partial-"}
    for n, where in enumerate(({"kinds": ["mkdir"]}, {"kinds": ["lock"]}, last)):
        out = tmp_path / str(n)
        out.mkdir()
        held = world.server.start(*world.argv(act, out), how="hold", at=1, **where)
        world.server.held(held)
        assert world.server.run(*world.argv(act, out)).code == 0
        late = world.server.go(held)
        assert (late.code, late.error) == (2, "E-EXISTS"), late
        assert any(str(out / name) in late.err for name in good), late.err
        assert world.whole_or_absent(act, out) == sorted(good)


@pytest.mark.parametrize("act", ACTS)
def test_of_two_runs_that_race_exactly_one_wins(act: str, world: World, tmp_path: Path) -> None:
    for n in range(2):
        out = tmp_path / str(n)
        out.mkdir()
        done = [world.server.wait(run) for run in [world.server.start(*world.argv(act, out)) for _ in range(2)]]
        assert sorted(run.code for run in done) == [0, 2], done
        assert [run.error for run in done if run.code] == ["E-EXISTS"]
        assert world.whole_or_absent(act, out) == sorted(world.outputs(act))


@pytest.mark.parametrize("act", NEEDS)
def test_who_loses_the_second_name_gives_the_first_back(act: str, world: World, tmp_path: Path) -> None:
    """Somebody else takes the name of the last output when the other output is there already."""
    where = {"kinds": ["rename", "link"], "only": ".partial-", "at": 2, "how": "hold"}
    held = world.server.start(*world.argv(act, tmp_path), **where)
    world.server.held(held)
    last, first = NEEDS[act]
    assert first in beside(tmp_path)
    (tmp_path / last).write_text("another's")
    late = world.server.go(held)
    assert (late.code, late.error) == (2, "E-EXISTS"), late
    assert beside(tmp_path) == [last]
    assert (tmp_path / last).read_text() == "another's"
    world.untouched()


def test_two_that_merge_into_different_outputs_do_not_meet(world: World, tmp_path: Path) -> None:
    acts = ["merge", "merge-file", "merge", "extract"]
    folders = [tmp_path, tmp_path, tmp_path / "x", tmp_path / "x"]
    (tmp_path / "x").mkdir()
    runs = [world.server.start(*world.argv(act, folder)) for act, folder in zip(acts, folders, strict=True)]
    # two of them have an output of one name
    codes = [world.server.wait(run).code for run in runs]
    assert codes[:2] == [0, 0]
    assert 0 in codes[2:]


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [act for act in ACTS if act != "save"])  # a library call: its caller answers
def test_ctrl_c_at_any_call_leaves_nothing(act: str, world: World, tmp_path: Path) -> None:
    """Reads and locks as well: in the plan, in a worker, when an output has its name, and while scratch is removed."""
    kinds = [*CHANGING, "read", "lock"]
    calls = world.server.run(*world.argv(act, tmp_path), kinds=kinds).calls
    said = "interrupted; nothing unfinished was left behind"
    for n in spots(calls, 6):
        out = tmp_path / str(n)
        out.mkdir()
        done = world.server.run(*world.argv(act, out), at=n, kinds=kinds, how="SIGINT")
        assert (done.code, done.out, done.err.strip()) == (130, "", said) or len(done.calls) < n, done
        assert world.whole_or_absent(act, out) == [] or done.code == 0, done.calls[n - 1]
    world.again(act, out)


@pytest.mark.parametrize("act", ["merge-undo", "merge-file", "merge-resume", "unmerge-undo", "extract-base"])
def test_a_request_to_stop_leaves_nothing_either(act: str, world: World, tmp_path: Path) -> None:
    calls = world.calls(act)
    for n in spots(calls, 4):
        out = tmp_path / str(n)
        out.mkdir()
        done = world.server.run(*world.argv(act, out), at=n, how="SIGTERM")
        assert (done.code, done.out, done.err) == (128 + signal.SIGTERM, "", "") or len(done.calls) < n, done
        assert world.whole_or_absent(act, out) == [] or done.code == 0, done.calls[n - 1]
    world.again(act, out)


# --- resuming -------------------------------------------------------------------------------------------------------


def killed(world: World, act: str, out: Path) -> list[Path]:
    """The weights files that a merge leaves which is killed when all of them are finished and nothing has its name."""
    calls = world.calls(act)
    last = renames(calls)[0]
    if "file" in act:  # the receipt, for whose sake the header is written once more, is not there when it goes on
        last = max(n for n, call in enumerate(calls, 1) if call.startswith("write "))
    done = world.server.run(*world.argv(act, out), at=last, how="kill")
    assert done.code == -signal.SIGKILL
    assert world.whole_or_absent(act, out, staging=True) == []
    return sorted(path for path in out.rglob("*.safetensors") if path.is_file())


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "header": lambda file: flip(file, 12),
    "first number": lambda file: flip(file, 8 + int.from_bytes(file.read_bytes()[:8], "little")),
    "last number": lambda file: flip(file, -1),
    "shorter": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": append,
    "empty": lambda file: os.truncate(file, 0),
    "gone": vanish,
    "a folder": folder_instead,
}
JOURNALS: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 7),
    "its plan alone": lambda file: file.write_text(file.read_text().splitlines(keepends=True)[0]),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "no object": lambda file: file.write_text("[]\n[]\n"),
    "empty": lambda file: os.truncate(file, 0),
    "gone": vanish,
    "a folder": folder_instead,
}


@pytest.mark.parametrize(("act", "then"), [("merge", "merge-resume"), ("merge-file", "merge-file-resume")])
def test_what_a_killed_merge_has_finished_is_kept_only_if_nothing_is_wrong_with_it(
    act: str, then: str, world: World, tmp_path: Path
) -> None:
    def resumed(name: str, damage: Callable[[Path], object], in_journal: bool = False) -> int:
        """How many of the finished files are in the output."""
        out = tmp_path / name
        out.mkdir()
        files = killed(world, act, out)
        finished = {file.stat().st_ino for file in files}
        for file in out.rglob("journal") if in_journal else files:
            damage(file)
        done = world.server.run(*world.argv(then, out))
        assert (done.code, done.err) == (0, ""), (name, done)
        assert world.whole_or_absent(then, out) == sorted(world.outputs(then)), name
        assert not [path for path in out.rglob("*") if path.is_symlink()]
        return len(finished & {path.stat().st_ino for path in out.rglob("*.safetensors")})

    assert resumed("nothing", lambda _: None) == (1 if "file" in act else 3), "what is right is not written again"
    for name, damage in DAMAGES.items():
        resumed(name, damage)
    for name, damage in JOURNALS.items():
        kept = resumed(f"journal {name}", damage, in_journal=True)
        assert kept == (2 if (act, name) == ("merge", "cut short") else 0), name


def test_a_finished_file_that_can_not_be_read_is_made_again(world: World, tmp_path: Path) -> None:
    for n in range(3):
        file = killed(world, "merge", tmp_path)[n]
        faults = {"at": 1, "kinds": ["read"], "how": "EIO", "only": str(file), "stays": True}
        done = world.server.run(*world.argv("merge-resume", tmp_path), **faults)
        assert (done.code, done.err) == (0, ""), done
        assert world.whole_or_absent("merge-resume", tmp_path) == ["out"]
        remove(tmp_path / "out")


def first_numbers(file: Path) -> None:
    """Another first tensor, in a file of the same size and times."""
    info, content = file.stat(), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    other = file.with_name("other")
    other.write_bytes(content[:start] + b"\x01\x02\x03\x04" + content[start + 4 :])
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [first_numbers, replaced, another, rewrite])
def test_inputs_that_changed_since_the_kill_are_what_is_merged(
    change: Callable[[Path], None], world: World, tmp_path: Path
) -> None:
    for n, name in enumerate(CHANGES["merge"]):
        shutil.copytree(world.inputs, tmp_path / f"in{n}")
        other = World(tmp_path / f"in{n}", world.server)
        out = tmp_path / str(n)
        out.mkdir()
        done = world.server.run(*other.argv("merge", out), at=1, kinds=["rename"], how="kill")
        assert done.code == -signal.SIGKILL
        change(other.inputs / name)
        other.before = facts(other.inputs)
        assert world.server.run(*other.argv("merge-resume", out)).code == 0
        fresh = tmp_path / f"fresh{n}"
        fresh.mkdir()
        assert world.server.run(*other.argv("merge", fresh)).code == 0
        assert contents(out / "out") == contents(fresh / "out"), name
        assert beside(out) == ["out"]
        other.untouched()


def test_the_files_of_another_plan_are_not_kept(world: World, tmp_path: Path) -> None:
    base, lora, dora = (world.inputs / name for name in ("base", "lora.safetensors", "dora.safetensors"))
    plans: list[list[object]] = [
        [base, lora],
        [base, dora, lora],
        [base, f"{lora}@0.5", f"{dora}@0.5"],
        [base, lora, f"{dora}@0.5", "--dtype", "fp32"],
        [base, lora, f"{dora}@0.5", "--link"],
    ]
    for n, plan in enumerate(plans):
        out, fresh = tmp_path / str(n), tmp_path / f"fresh{n}"
        out.mkdir()
        fresh.mkdir()
        killed(world, "merge", out)
        for folder, resume in ((out, ["--resume"]), (fresh, [])):
            done = world.server.run("merge", *plan, "-o", folder / "out", *resume)
            assert (done.code, done.err) == (0, ""), (plan, done)
        assert contents(out / "out") == contents(fresh / "out"), plan
        assert beside(out) == ["out"]
    world.untouched()


@pytest.mark.parametrize("act", ["merge-resume", "merge-file-resume"])
def test_a_resumed_merge_may_be_killed_and_resumed_again(act: str, world: World, tmp_path: Path) -> None:
    killed(world, act, tmp_path)
    calls = world.server.run(*world.argv(act, tmp_path)).calls
    remove(tmp_path / beside(tmp_path)[0])
    for n in spots(calls, 2):
        killed(world, act, tmp_path)
        done = world.server.run(*world.argv(act, tmp_path), at=n, how="torn" if n % 2 else "kill")
        assert done.code == -signal.SIGKILL or len(done.calls) < n, done
        world.again(act, tmp_path)
        remove(tmp_path / beside(tmp_path)[0])


# --- hub caches, and links ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(world: World, tmp_path: Path) -> Path:
    """A snapshot as hubs keep it: links into blobs that nobody may write to. The folder that holds all of it."""
    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    for name in ("base", "merged", "adapter"):
        for file in sorted((world.inputs / name).rglob("*")):
            if file.is_dir():
                continue
            content = file.read_bytes()
            blob = hub / "blobs" / hashlib.sha256(content).hexdigest()
            if not blob.exists():
                blob.write_bytes(content)
                blob.chmod(0o444)
            link = hub / "snapshots" / name / file.relative_to(world.inputs / name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    for name in ("lora.safetensors", "dora.safetensors", "u.undo.safetensors"):
        shutil.copyfile(world.inputs / name, hub / "snapshots" / name)
    return hub


@pytest.mark.parametrize("act", ["merge", "merge-undo", "merge-link", "unmerge", "unmerge-undo", "save"])
def test_a_hub_cache_is_never_written(act: str, hub: Path, world: World, tmp_path: Path) -> None:
    other = World(hub / "snapshots", world.server)
    before = facts(hub)
    out = tmp_path / "new"
    out.mkdir()
    done = world.server.run(*other.argv(act, out))
    assert (done.code, done.err) == (0, ""), done
    assert facts(hub) == before
    assert not [call for call in done.calls if str(hub) in call and not call.startswith("link ")]
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert {path.name: contents(path) for path in out.iterdir()} == world.outputs(act)
    for path in out.iterdir():
        remove(path)
    assert facts(hub) == before


def hard_links(out: Path, *sources: Path) -> set[str]:
    """Names of files of an output that are files of the sources."""
    inodes = {path.stat().st_ino for source in sources for path in source.rglob("*") if path.is_file()}
    return {path.name for path in out.rglob("*") if path.is_file() and path.stat().st_ino in inodes}


@pytest.mark.parametrize("cached", [False, True])
def test_only_whole_untouched_shards_are_linked(cached: bool, hub: Path, world: World, tmp_path: Path) -> None:
    base = hub / "snapshots" / "base" if cached else world.inputs / "base"
    lora, dora = world.inputs / "lora.safetensors", world.inputs / "dora.safetensors"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    for n, adapters in enumerate(([lora], [dora], [lora, dora])):
        linked, copied = tmp_path / f"linked{n}", tmp_path / f"copied{n}"
        loratool.merge(base, adapters, linked, link=True)
        loratool.merge(base, adapters, copied)
        assert contents(linked) == contents(copied)
        same = {name for name in shards if (base / name).read_bytes() == (copied / name).read_bytes()}
        assert hard_links(linked, base) == same
        assert 0 < len(same) < len(shards)
        assert hard_links(copied, base) == set()
    world.untouched()


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {}], ids=["dtype", "one file"])
def test_nothing_is_linked_where_every_file_changes(options: dict[str, Any], world: World, tmp_path: Path) -> None:
    base = world.inputs / ("base" if options else "one.safetensors")
    out = tmp_path / ("out" if options else "out.safetensors")
    loratool.merge(base, world.inputs / "lora.safetensors", out, link=True, **options)
    assert out.is_file() or hard_links(out, world.inputs) == set()
    assert out.stat().st_nlink == 1 or out.is_dir()
    world.untouched()


def test_a_file_that_can_not_be_linked_is_copied(world: World, tmp_path: Path) -> None:
    done = world.server.run(*world.argv("merge-link", tmp_path), kinds=["link"], at=1, how="EXDEV", stays=True)
    assert done.code == 0
    assert hard_links(tmp_path / "out", world.inputs) == set()
    assert world.whole_or_absent("merge-link", tmp_path) == ["out"]


def test_a_link_lives_on_without_its_source_and_is_unmerged_as_usual(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.inputs, tmp_path / "in")
    base, lora = tmp_path / "in" / "base", tmp_path / "in" / "lora.safetensors"
    whole = contents(base)
    loratool.merge(base, lora, tmp_path / "out", link=True, undo=tmp_path / "u.safetensors")
    linked = {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_nlink > 1
    }
    assert linked
    shutil.rmtree(base)
    assert {path: path.read_bytes() for path in linked} == linked
    assert loratool.unmerge(tmp_path / "out", lora, tmp_path / "back", undo=tmp_path / "u.safetensors").exact
    assert contents(tmp_path / "back") == whole


# --- threads and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_workers_change_no_byte_and_are_as_many_as_said(
    threads: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sys.modules["loratool.merge"]  # `loratool.merge` is the function
    lock, now, most = threading.Lock(), 0, 0

    def watched(*arguments: Any, real: Any = engine._run) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        try:
            return real(*arguments)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(engine, "_run", watched)
    adapters = [(world.inputs / "lora.safetensors", 1.0), (world.inputs / "dora.safetensors", 0.5)]
    plan = loratool.plan(world.inputs / "base", adapters, tmp_path / "out", threads=threads)
    assert plan.threads == threads == plan.to_json()["threads"]
    record = tmp_path / "u.safetensors"
    loratool.merge(world.inputs / "base", adapters, tmp_path / "out", undo=record, threads=threads)
    assert world.whole_or_absent("merge-undo", tmp_path) == ["out", "u.safetensors"]
    assert most <= threads
    assert (most == 1) == (threads == 1)
    most = 0
    loratool.unmerge(tmp_path / "out", adapters, tmp_path / "back", undo=record, threads=threads)
    assert contents(tmp_path / "back") == contents(world.inputs / "base")
    assert 0 < most <= threads


def test_options_that_make_no_sense(world: World, tmp_path: Path) -> None:
    argv = world.argv("merge", tmp_path)
    for options in (["--threads", 0], ["--threads", -1], ["--threads", "many"], ["--max-memory", "lots"],
                    ["--max-memory", "-1MB"], ["--max-memory", "nan"], ["--max-memory", ""]):  # fmt: skip
        done = world.server.run(*argv, *options)
        assert (done.code, done.error) == (2, "E-USAGE"), (options, done)
    with pytest.raises(loratool.LoratoolError, match="E-OPTION"):
        loratool.merge(world.inputs / "base", world.inputs / "lora.safetensors", tmp_path / "out", threads=0)
    assert beside(tmp_path) == []


@pytest.mark.parametrize("act", ["merge", "unmerge", "unmerge-undo"])
def test_too_little_memory_is_refused_before_anything_is_written(act: str, world: World, tmp_path: Path) -> None:
    done = world.server.run(*world.argv(act, tmp_path), "--max-memory", "10kB")
    assert (done.code, done.error) == (2, "E-MEMORY"), done
    assert "--max-memory" in done.err
    assert [call for call in done.calls if call.startswith(CHANGING)] == []
    needed = int(re.search(r"needs ([\d,]+) bytes", done.err)[1].replace(",", ""))  # type: ignore[index]
    assert world.server.run(*world.argv(act, tmp_path), "--max-memory", needed - 1).error == "E-MEMORY"
    assert world.server.run(*world.argv(act, tmp_path), "--max-memory", needed).code == 0
    world.whole_or_absent(act, tmp_path)


MEASURE = """
import sys
from pathlib import Path
import loratool
base, adapter, small, out, limit = sys.argv[1:]
loratool.merge(small, adapter + ".small", out + ".small")  # so that all is imported
def status(field):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith(field))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
plan = loratool.merge(base, adapter, out, threads=4, max_memory=int(limit) or None).plan
print(plan.threads, plan.memory, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory that starts again")
def test_the_memory_that_is_allowed_is_not_exceeded(tmp_path: Path) -> None:
    """Eight tensors with factors as large as themselves, which need four workers of about 20 MB each."""
    size, rank = 1024, 512
    make = Maker(0)
    names = [f"w{n}" for n in range(8)]
    save_sharded({name: make.values(size, size, dtype=torch.float16) for name in names}, tmp_path / "base")
    save_sharded({"w0": torch.ones(4, 4)}, tmp_path / "small")
    big = [one("lora", (size, size), seed=n, name=name, rank=rank) for n, name in enumerate(names)]
    loratool.save(
        loratool.Adapter(tuple(item for adapter in big for item in adapter.updates)), tmp_path / "a.safetensors"
    )
    (tmp_path / "a.safetensors.small").mkdir()
    loratool.save(one("lora", (4, 4), seed=0, name="w0"), tmp_path / "a.safetensors.small" / "model.safetensors")
    plan = loratool.plan(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", threads=1)
    found = []
    for n, limit in enumerate((0, plan.memory + (1 << 20))):
        command = [sys.executable, "-c", MEASURE, *map(str, (
            tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "small", tmp_path / f"out{n}", limit
        ))]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        found.append([*map(int, told.split())])
        shutil.rmtree(tmp_path / f"out{n}")
    (most, bound, free), (fewest, allowed, used) = found
    assert (most, fewest) == (4, 1)
    assert used <= allowed + (4 << 20), "the allocator and the stacks of threads have a little more"
    assert used < free <= bound


if __name__ == "__main__":
    serve()


# --- replacing an output --------------------------------------------------------------------------------------------

FORCED = ("merge-undo", "merge-file", "merge-file-undo", "unmerge", "extract-base")


def with_old(act: str, world: World, out: Path) -> dict[str, dict[str, bytes]]:
    """A folder in which every output of a command is there already, an older one."""
    out.mkdir()
    for name, parts in world.outputs(act).items():
        if [*parts] == [""]:
            (out / name).write_bytes(b"old")
        else:
            (out / name).mkdir()
            (out / name / "config.json").write_bytes(b"old")
    return {path.name: contents(path) for path in out.iterdir()}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("act", FORCED)
def test_what_is_replaced_is_there_until_the_new_one_is_whole(
    act: str, exchange: bool, world: World, tmp_path: Path
) -> None:
    """A disk that is full at any moment leaves the old outputs; a kill leaves each of them old or new."""
    good, how = world.outputs(act), {} if exchange else {"plain": True}
    alone = tmp_path / "alone"
    with_old(act, world, alone)
    done = world.server.run(*world.argv(act, alone), "--force", **how)
    assert (done.code, done.err) == (0, "")
    assert {path.name: contents(path) for path in alone.iterdir()} == good
    for n in spots(done.calls, 3):
        for cause in ("ENOSPC", "kill"):
            out = tmp_path / f"{n}-{cause}"
            old = with_old(act, world, out)
            found = world.server.run(*world.argv(act, out), "--force", at=n, how=cause, **how)
            now = {name: contents(out / name) if (out / name).exists() else None for name in old}
            aside = [path for path in out.iterdir() if ".replaced-" in path.name]
            for name, content in now.items():
                if content is None:  # killed between two renames: the old one lies beside, whole
                    assert (cause, exchange) == ("kill", False)
                    assert any(contents(path / name) == old[name] for path in aside if path.is_dir())
                else:
                    assert content in (old[name], good[name]), (name, n, cause)
            if cause == "ENOSPC" and found.code:
                assert now == old or act == "extract-base", (n, found)
                assert not aside
        world.untouched()
