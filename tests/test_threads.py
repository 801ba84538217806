"""No global state: work on several models at once gives what it gives one after the other, and callers keep their own
settings, which in turn do not change a result."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from strategies import Maker, make_update, raw, save_sharded

import loratool
from loratool import Adapter, Target, Targeted
from loratool.workers import workers

FORMS = ("lora", "loha", "dora1-lora")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)


def model(number: int, folder: Path) -> None:
    """A base and an adapter, others for every number, of a shape that takes several blocks."""
    shape, make = (1024 + number, 640), Maker(number)
    state = {f"l.{n}.weight": make.values(*shape, dtype=DTYPES[number]) for n in range(4)}
    save_sharded(state, folder / "base", shards=2)
    updates = []
    for n, form in enumerate(FORMS):
        updates.append(Targeted(Target(f"l.{n}.weight", shape), make_update(form, shape, make, rank=8, alpha=0.01)))
    loratool.save(Adapter(tuple(updates)), folder / "all.lora.safetensors")
    loratool.save(Adapter(tuple(updates[:1])), folder / "one.lora.safetensors")


def work(folder: Path, inputs: Path) -> dict[str, Any]:
    """Everything that there is to do with a model; the documents, without what is of this run."""
    base, adapter = inputs / "base", inputs / "all.lora.safetensors"
    out, undo = folder / "merged", folder / "undo.safetensors"
    found = {
        "merge": loratool.merge(base, adapter, out, undo=undo, threads=2).to_json(),
        "verify": loratool.verify(out, base, adapter, threads=2).to_json(),
        "unmerge": loratool.unmerge(out, adapter, folder / "back", undo=undo, threads=2).to_json(),
        "convert": loratool.convert(inputs / "one.lora.safetensors", folder / "peft", "peft").to_json(),
        "inspect": loratool.inspect(adapter, base=base).to_json(),
        "status": loratool.status(out, check=True).to_json(),
        "plan": loratool.plan(base, adapter, folder / "planned").to_json(),
    }
    text = json.dumps(found).replace(str(folder), "FOLDER")
    documents = json.loads(text)
    for document in documents.values():
        document.pop("seconds", None)
    with loratool.open_merged(base, adapter, threads=2) as merged:
        read = {name: hashlib.sha256(raw(merged.get_tensor(name))).hexdigest() for name in sorted(merged.keys())}
    return {"documents": documents, "files": tree(folder), "read": read}


def test_models_at_once_are_models_one_by_one(tmp_path: Path) -> None:
    runs = [(number, repeat) for number in range(4) for repeat in range(2)]
    for number in range(4):
        (tmp_path / f"in{number}").mkdir()
        model(number, tmp_path / f"in{number}")
    alone = {}
    for number in range(4):
        (tmp_path / f"alone{number}").mkdir()
        alone[number] = work(tmp_path / f"alone{number}", tmp_path / f"in{number}")
    start = threading.Barrier(len(runs))

    def at_once(run: tuple[int, int]) -> dict[str, Any]:
        folder = tmp_path / "at.{}.{}".format(*run)
        folder.mkdir()
        start.wait()
        return work(folder, tmp_path / f"in{run[0]}")

    with ThreadPoolExecutor(len(runs)) as pool:
        for run, found in zip(runs, pool.map(at_once, runs), strict=True):
            assert found == alone[run[0]], run
    assert len({json.dumps(found) for found in alone.values()}) == 4


def test_threads_of_the_caller_keep_their_number_of_torch_threads() -> None:
    """Also those that start while workers do, and after several pools at once."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)

        def pool() -> None:
            with workers(3) as threads:
                assert set(threads.map(lambda _: torch.get_num_threads(), range(9))) == {1}

        callers = [threading.Thread(target=pool) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


# What a process has one of, and a library has no business to change.
STATE = """
import gc, locale, logging, multiprocessing, os, random, signal, sys, tempfile, threading, warnings
import numpy, torch

def in_a_new_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start(), thread.join()
    return found[0]

def flushes_denormals():
    return bool((torch.full((64,), 1e-310, dtype=torch.float64, device="cpu") * 0.5 == 0).all())

def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    loggers = {name: (log.level, log.propagate, list(log.handlers), log.disabled)
               for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    mask = os.umask(0)
    os.umask(mask)
    return {
        "threads": torch.get_num_threads(),
        "threads of new threads": in_a_new_thread(torch.get_num_threads),
        "interop threads": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "denormals": flushes_denormals(),
        "denormals of new threads": in_a_new_thread(flushes_denormals),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "matmul": torch.get_float32_matmul_precision(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's": repr(numpy.random.get_state()),
        "python's": random.getstate(),
        "numpy's errors": numpy.geterr(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": mask,
        "signals": handlers,
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "loggers": {name: one for name, one in loggers.items() if not name.startswith("loratool")},
        "of loratool": [name for name in loggers if name.startswith("loratool") and loggers[name][2]],
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "path": list(sys.path),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()),
        "locale": locale.setlocale(locale.LC_ALL),
        "processes": multiprocessing.get_start_method(allow_none=True),
        "temporary": tempfile.tempdir,
        "running": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
    }
"""
CALLERS = {
    "default": "",
    "odd": """
torch.set_num_threads(3)
torch.set_default_dtype(torch.float16)
torch.set_flush_denormal(True)
torch.set_grad_enabled(False)
torch.manual_seed(7)
random.seed(7)
numpy.seterr(all="raise")
warnings.simplefilter("error")
signal.signal(signal.SIGTERM, lambda *_: None)
os.environ["PYTHONHASHSEED"] = "1"
os.chdir(sys.argv[1])
logging.basicConfig(level=logging.DEBUG)
torch.use_deterministic_algorithms(True)
""",
    "meta": "torch.set_default_device('meta')",
    "inference": "mode = torch.inference_mode(); mode.__enter__()",
}
USE = """
before = state()
sys.path.insert(0, sys.argv[2])
from test_threads import work
from pathlib import Path
sys.path.remove(sys.argv[2])
before["path"] = list(sys.path)
for name in ("files", "loggers", "warnings"):  # of what the tests import: pytest and the like
    before[name] = state()[name]
found = work(Path(sys.argv[1]), Path(sys.argv[3]))
after = state()
assert before.keys() == after.keys()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
sys.stdout.write(__import__("json").dumps({"changed": repr(changed), "found": found}))
"""


@pytest.mark.parametrize("caller", CALLERS)
def test_callers_keep_their_settings_and_those_change_nothing(caller: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    model(1, tmp_path / "in")
    done = _python(STATE + CALLERS[caller] + USE, tmp_path / "there", Path(__file__).parent, tmp_path / "in")
    assert done["changed"] == "{}"
    assert done["found"] == work(tmp_path / "here", tmp_path / "in")


def test_importing_changes_nothing() -> None:
    code = "before = state()\nimport loratool, loratool.api\n[getattr(loratool, name) for name in loratool.__all__]\n"
    code += "after = state()\nchanged = {name: after[name] for name in before if before[name] != after[name]}\n"
    code += "import json\nsys.stdout.write(json.dumps({'changed': repr(changed)}))"
    assert _python(STATE + code)["changed"] == "{}"


def _python(code: str, *arguments: object) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(Path(loratool.__file__).parent.parent)}
    command: list[str] = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
