"""One process, measured from outside: wall time, peak memory, bytes; and from inside the work time that it reports."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
LORATOOL = [sys.executable, "-c", "from loratool.cli import main; main()"]
UNFLUSHED = [*LORATOOL[:2], f"import os; os.fsync = lambda handle: None; {LORATOOL[2]}"]  # as little durable as `cp`
BACKED = (
    "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
)
PEFT = """
import json, sys, time
base, adapter, out = sys.argv[1:]
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
print(json.dumps({"seconds": time.monotonic() - started}))
"""
READ = """
import contextlib, json, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
import loratool
how, base, adapter, merged, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
files, parameters = sorted(Path(merged).glob("*.safetensors")), {}
for file in files:
    with safe_open(file, "pt") as opened:
        for name in opened.offset_keys():
            part = opened.get_slice(name)
            parameters[name] = torch.ones(part.get_shape(), dtype=part[:0].dtype)  # every page of it is there
started = time.monotonic()
with contextlib.ExitStack() as stack:
    if how == "plain":
        shards = [stack.enter_context(safe_open(file, "pt")) for file in files]
    else:
        shards = [stack.enter_context(loratool.open_merged(base, adapter, threads=int(threads)))]
    for shard in shards:
        for name in shard.offset_keys():
            if how == "straight":
                shard.get_tensor(name, out=parameters[name])
            else:
                parameters[name].copy_(shard.get_tensor(name))
seconds = time.monotonic() - started
if how == "check":
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.offset_keys():
                assert torch.equal(parameters[name].view(torch.int16), opened.get_tensor(name).view(torch.int16)), name
print(json.dumps({"seconds": seconds}))
"""
BUSY = 0.1  # of all cores, by others: wait before measuring
PATIENCE = 5.0  # seconds; after that the run counts, with a note


@dataclass(frozen=True)
class Run:
    """What one process took."""

    wall: float  # seconds, start to end
    work: float  # seconds by its own clock, without interpreter and imports; as wall where it tells none
    cpu: float  # seconds, user and system
    peak: int  # resident bytes
    read: int  # bytes by system calls, from the page cache or not; memory maps do not count
    written: int
    fetched: int  # bytes that came from the disk: 0 when the cache was warm
    busy: float  # share of the machine that others used just before


def run(command: list[str], backed: int = 0) -> Run:
    """Run a process to its end. One that fails ends the benchmark, with what it said.

    `backed` bytes of free memory are touched before: a virtual machine may have given them back to its host, and to get
    them again takes several times as long as a copy.
    """
    busy = _settle()
    if backed := min(backed, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 8 // 10):
        subprocess.run([sys.executable, "-c", BACKED, str(backed)], check=True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=ENV)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - started
        io = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said = out.read()
        if process.returncode:
            raise SystemExit(f"failed ({process.returncode}): {command}\n{err.read().decode()}\n{said.decode()}")
    try:
        work = float(json.loads(said)["seconds"])
    except (ValueError, KeyError):
        work = wall
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the child's peak starts at it: it must stay small
    assert own < 60_000, "something large was imported into the benchmark itself"
    read, written, fetched = int(io["rchar"]), int(io["wchar"]), int(io["read_bytes"])
    return Run(wall, work, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, read, written, fetched, busy)


def copy(source: Path, out: Path, backed: int, sync: bool = False) -> Run:
    command = ["sh", "-c", 'cp -r "$0" "$1" && sync'] if sync else ["cp", "-r"]
    return run([*command, str(source), str(out)], backed)


def loratool(*arguments: object, flush: bool = True, backed: int = 0) -> Run:
    return run([*(LORATOOL if flush else UNFLUSHED), *map(str, arguments), "--json"], backed)


def peft(base: Path, adapter: Path, out: Path, backed: int) -> Run:
    return run([sys.executable, "-c", PEFT, str(base), str(adapter), str(out)], backed)


def read(how: str, base: Path, adapter: Path, merged: Path) -> Run:
    """Bring a merged model into parameters in memory: "plain", with safe_open from its folder; with open_merged
    "straight" into them, or "copied"; "check" is the latter, and compares them afterwards."""
    threads = len(os.sched_getaffinity(0))
    return run([sys.executable, "-c", READ, how, str(base), str(adapter), str(merged), str(threads)])


def offers(command: str, option: str) -> bool:
    """Whether this loratool's command has an option."""
    text = subprocess.run([*LORATOOL, command, "--help"], env=ENV, capture_output=True, text=True, check=True).stdout
    return option in text.replace(",", " ").split()


def imports_torch(*arguments: object) -> bool:
    code = "import sys; from loratool.cli import run; run(sys.argv[1:]); sys.exit(3 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=ENV, stdout=subprocess.DEVNULL).returncode == 3


def _settle() -> float:
    """Write out what is dirty, and wait until others leave the machine alone; how busy it still is."""
    os.sync()
    deadline = time.monotonic() + PATIENCE
    while True:
        before = _ticks()
        time.sleep(0.2)
        after = _ticks()
        busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        if busy <= BUSY or time.monotonic() > deadline:
            return busy


def _ticks() -> tuple[int, int]:
    """All and idle ticks of the machine; waiting for the disk is not idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3]
