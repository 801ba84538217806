"""What a merge does to files: which bytes stay, what appears when, what is refused, and what the receipt proves."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import (
    DTYPES,
    Maker,
    State,
    files_of,
    make_update,
    one,
    raw,
    rounded,
    same_bits,
    save_sharded,
    scaling,
    small_blocks,
    tensors_of,
)
from torch import Tensor

import loratool
from loratool import Adapter, BaseIdentity, LoratoolError, Target, Targeted, TensorIdentity, TensorRef
from loratool.blocks import round_once
from loratool.tensors import FileSpan
from loratool.updates import Add, Lora, Replace, Scaling
from loratool.workers import Progress

ROOT = Path(__file__).parent.parent
Act = Callable[[], object]


def state(dtype: torch.dtype = torch.bfloat16) -> State:
    """Eight tensors; the adapters below change `b.weight` and `g.weight`."""
    make = Maker(0)
    shapes = {"a": (3,), "b": (5, 4), "c": (4, 4), "d": (7,), "e": (2, 2), "f": (4, 6), "g": (5, 4)}
    made = {f"{name}.weight": make.values(*shape, dtype=dtype) for name, shape in shapes.items()}
    return {**made, "ids": torch.arange(6)}


def lora(name: str = "b.weight", shape: tuple[int, ...] = (5, 4), seed: int = 1) -> Adapter:
    return one("lora", shape, seed=seed, name=name)


def together(*adapters: Adapter) -> Adapter:
    return Adapter(tuple(item for adapter in adapters for item in adapter.updates))


BOTH = together(lora(), lora("g.weight", seed=2))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards, an index, and companions."""
    folder = save_sharded(state(), tmp_path / "base", shards=2)
    (folder / "config.json").write_bytes(b'{"torch_dtype": "bfloat16"}  \n')
    (folder / "LICENSE").write_bytes(b"\xff\x00 not text")
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(b"{}")
    return folder


def refused(act: Act) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        act()
    return caught.value


def codes(error: LoratoolError) -> list[str]:
    return sorted({problem.code for problem in error.problems})


def beside(path: Path) -> list[str]:
    """What lies in a folder, hidden things too."""
    return sorted(child.name for child in path.iterdir())


# --- layout ---------------------------------------------------------------------------------------------------------


def test_only_the_bytes_of_targets_change(base: Path, tmp_path: Path) -> None:
    loratool.merge(base, BOTH, tmp_path / "out")
    before, after = files_of(base), files_of(tmp_path / "out")
    assert after.keys() == {*before, "loratool_receipt.json"}
    different = {name for name in before if before[name] != after[name]}
    assert different == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    for name in different:
        old, new = before[name], after[name]
        assert len(old) == len(new)
        length = 8 + struct.unpack("<Q", old[:8])[0]
        assert old[:length] == new[:length]
        for tensor, entry in json.loads(old[8:length]).items():
            if tensor != "__metadata__":
                begin, end = (length + offset for offset in entry["data_offsets"])
                assert (old[begin:end] == new[begin:end]) == (tensor not in ("b.weight", "g.weight")), tensor


def test_a_header_that_we_would_write_otherwise_is_kept(tmp_path: Path) -> None:
    """Spaces, metadata at the end, entries in another order than the data: still the base's header to the byte."""
    values = {"b.weight": torch.ones(5, 4), "a": torch.ones(3), "c": torch.ones(2)}
    header = (
        '{ "c": {"dtype":"F32", "shape":[2], "data_offsets":[92,100]},\n'
        '"b.weight":{"shape":[5,4],"dtype":"F32","data_offsets":[0,80]},'
        '"a":{"data_offsets":[80,92],"dtype":"F32","shape":[3]}, "__metadata__":{"z":"é","format":"pt"}}     '
    ).encode()
    content = struct.pack("<Q", len(header)) + header + b"".join(raw(value) for value in values.values())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    loratool.merge(tmp_path / "base", lora(), tmp_path / "out")
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + len(header)
    assert merged[:start] == content[:start]
    assert merged[start + 80 :] == content[start + 80 :]
    loratool.unmerge(tmp_path / "out", lora(), tmp_path / "back", base=tmp_path / "base")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")


def test_an_index_with_more_in_it_is_kept(tmp_path: Path) -> None:
    base = save_sharded(state(), tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_parameters"] = 123
    index.write_text(json.dumps(document))
    loratool.merge(base, BOTH, tmp_path / "out")
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()


def test_an_index_follows_a_change_of_dtype(base: Path, tmp_path: Path) -> None:
    loratool.merge(base, BOTH, tmp_path / "out", dtype="fp32")
    before = json.loads((base / "model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert after["weight_map"] == before["weight_map"]
    total = sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert after["metadata"]["total_size"] == total


def test_a_single_file_becomes_a_single_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors", metadata={"format": "pt", "note": "é"})
    report = loratool.merge(tmp_path / "in.safetensors", BOTH, tmp_path / "out.safetensors")
    content = (tmp_path / "out.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata.keys() == {"format", "note", "loratool.receipt"}
    assert json.loads(metadata["loratool.receipt"]) == report.receipt.to_json()
    loratool.merge(tmp_path / "in.safetensors", BOTH, tmp_path / "folder")
    assert same_bits(tensors_of(tmp_path / "out.safetensors"), tensors_of(tmp_path / "folder"))
    assert beside(tmp_path / "folder") == ["in.safetensors", "loratool_receipt.json"]
    loratool.unmerge(
        tmp_path / "out.safetensors", BOTH, tmp_path / "back.safetensors", base=tmp_path / "in.safetensors"
    )
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_a_folder_goes_into_one_file_with_the_numbers_of_the_folder(base: Path, tmp_path: Path) -> None:
    loratool.merge(base, BOTH, tmp_path / "out")
    loratool.merge(base, BOTH, tmp_path / "out.safetensors")
    whole, shards = load_file(tmp_path / "out.safetensors"), tensors_of(tmp_path / "out")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], value) for name, value in shards.items())


def test_a_merge_twice_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        loratool.merge(base, [(BOTH, 0.5), lora(seed=7)], tmp_path / name)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_names_that_wrappers_left_stay_in_the_output(tmp_path: Path) -> None:
    save_sharded({f"_orig_mod.{name}": value for name, value in state().items()}, tmp_path / "base")
    loratool.merge(tmp_path / "base", BOTH, tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")) == {f"_orig_mod.{name}" for name in state()}
    report = loratool.unmerge(tmp_path / "out", BOTH, tmp_path / "back", base=tmp_path / "base")
    assert report.exact
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")


def test_a_plan_writes_nothing_and_knows_the_size(base: Path, tmp_path: Path) -> None:
    plan = loratool.plan(base, BOTH, tmp_path / "out", dtype="fp32")
    assert beside(tmp_path) == ["base"]
    document = json.loads(json.dumps(plan.to_json()))
    loratool.merge(base, BOTH, tmp_path / "out", dtype="fp32")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {file["name"]: file["bytes"] for file in document["files"]} == written
    assert document["bytes_to_write"] == sum(written.values())
    assert [change["tensor"] for change in document["changes"] if change["updates"]] == ["g.weight", "b.weight"]


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
def test_progress_counts_every_byte_once(out: str, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    steps: list[Progress] = []
    with small_blocks(16):
        loratool.merge(tmp_path / "in.safetensors", BOTH, tmp_path / out, progress=steps.append)
    written = tmp_path / out if out.endswith(".safetensors") else tmp_path / out / "in.safetensors"
    assert {step.total for step in steps} == {written.stat().st_size}
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total
    assert len(steps) > 6
    assert {step.what for step in steps} == {written.name}


# --- dtypes ---------------------------------------------------------------------------------------------------------

TO = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@pytest.mark.parametrize("option", ["keep", *TO])
@pytest.mark.parametrize("stored", DTYPES)
def test_every_floating_tensor_gets_the_dtype(option: str, stored: str, tmp_path: Path) -> None:
    values = state(DTYPES[stored])
    values["zero"] = torch.tensor(-0.0, dtype=DTYPES[stored])
    values["mixed"] = torch.ones(3, dtype=torch.float64)
    save_sharded(values, tmp_path / "base")
    loratool.merge(tmp_path / "base", lora(), tmp_path / "out", dtype=option)
    out = tensors_of(tmp_path / "out")
    assert out.keys() == values.keys()
    for name, value in values.items():
        wanted = DTYPES[TO.get(option, stored)] if value.is_floating_point() else value.dtype
        if (name, option) == ("mixed", "keep"):
            wanted = torch.float64
        assert out[name].dtype == wanted, name
        if name != "b.weight" and value.is_floating_point() and option != "keep":
            exact = rounded(value.double().numpy(), TO[option])
            assert raw(out[name].double()) == raw(torch.from_numpy(np.asarray(exact))), name
        elif name != "b.weight":
            assert raw(out[name]) == raw(value)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (2, 0, 3)])
def test_tensors_without_elements_survive_a_change_of_dtype(shape: tuple[int, ...], tmp_path: Path) -> None:
    for suffix in ("safetensors", "pt"):
        values = {**state(torch.float32), "nothing": torch.zeros(shape)}
        path = tmp_path / f"base.{suffix}"
        save_file(values, path) if suffix == "safetensors" else torch.save(values, path)
        loratool.merge(path, lora(), tmp_path / f"out-{suffix}", dtype="bf16")
        out = tensors_of(tmp_path / f"out-{suffix}")["nothing"]
        assert (out.shape, out.dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize(("option", "half"), [("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_nothing_is_rounded_twice(option: str, half: float, tmp_path: Path) -> None:
    """1 + half a step and a little more rounds up; by way of float32 it would be a tie, and round down."""
    little = torch.tensor([[half + 2.0**-40, half, half - 2.0**-40, 3 * half]], dtype=torch.float64)
    save_sharded({"w": torch.ones(1, 4)}, tmp_path / "base")
    adapter = Adapter((Targeted(Target("w", (1, 4)), Add(TensorRef.of(little), Scaling())),))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype=option)
    assert tensors_of(tmp_path / "out")["w"].double().tolist() == [[1 + 2 * half, 1, 1, 1 + 4 * half]]


def rounded_to(values: Tensor, dtype: str) -> Tensor:
    return round_once(values, torch.empty(values.shape, dtype=DTYPES[dtype]))


@given(
    dtype=st.sampled_from(("F16", "BF16")),
    code=st.integers(-0x7C00, 0x7C00),
    part=st.sampled_from((0.0, 0.25, 0.5, 0.75)),
    nudge=st.sampled_from((0.0, 2.0**-30, -(2.0**-30), 2.0**-44, -(2.0**-44), 2.0**-52)),
)
def test_round_once_rounds_once(dtype: str, code: int, part: float, nudge: float) -> None:
    """Every number of 16 bits, points between it and the next, and a hair beside them."""
    sign, size = (-1.0 if code < 0 else 1.0), min(abs(code), 0x7BFE if dtype == "F16" else 0x7F7E)
    low, high = (float(torch.tensor([n], dtype=torch.int16).view(DTYPES[dtype]).double()) for n in (size, size + 1))
    x = np.array([sign * (low + part * (high - low)) * (1 + nudge)])
    got = rounded_to(torch.from_numpy(x), dtype)
    assert raw(got.double()) == raw(torch.from_numpy(rounded(x, dtype)))


def test_round_once_keeps_what_is_not_finite() -> None:
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 1e-300, -1e-300], dtype=torch.float64)
    for dtype in ("F16", "BF16", "F32"):
        got = rounded_to(odd, dtype).double()
        assert got[:2].tolist() == [float("inf"), float("-inf")]
        assert bool(got[2].isnan())
        assert got[3:5].tolist() == [float("inf"), float("-inf")]
        assert raw(got[5:]) == raw(torch.tensor([0.0, -0.0]).double())


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch, loratool
from pathlib import Path
torch.set_num_threads(1)
loratool.merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""


@pytest.mark.parametrize("form", ["lora", "dora0-lora", "dora1-lora"])
def test_memory_does_not_grow_with_the_tensor(form: str, tmp_path: Path) -> None:
    peaks = {}
    for size in (100, 400) if form == "lora" else (40, 160):
        rows = size * 1_000_000 // 2048
        folder = tmp_path / f"{size}"
        folder.mkdir()
        header = json.dumps(
            {"w": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]},
             "x": {"dtype": "U8", "shape": [10_000_000], "data_offsets": [rows * 2048, rows * 2048 + 10_000_000]}}
        ).encode()  # fmt: skip
        with (folder / "base.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + rows * 2048 + 10_000_000)
        # thin factors: they are held, so they must not be what is measured
        lora = Lora(TensorRef.of(torch.ones(1, 1024)), TensorRef.of(torch.ones(rows, 1)), scaling("none", 1.0, 1))
        update = make_update(form, (8, 8), Maker(0))
        if form != "lora":
            magnitude = TensorRef.of(torch.ones((rows, 1024)[int(form[4])]))
            lora = replace(update, direction=lora, magnitude=magnitude)
        loratool.save(Adapter((Targeted(Target("w", (rows, 1024)), lora),)), folder / "a.lora.safetensors")
        paths = [str(folder / name) for name in ("base.safetensors", "a.lora.safetensors", "out")]
        command = [sys.executable, "-c", MEASURE, *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        peaks[size] = int(done.stdout) / 1024
        for path in (folder / "out").iterdir():
            path.unlink()
    small, large = sorted(peaks.items())
    assert large[1] - small[1] < 40, f"peak memory in MB, by MB of tensor: {peaks}"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_factors_of_experts_are_read_once_and_not_once_per_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, matrix = 16, (8, 8)
    update = make_update("lora", matrix, Maker(0, "F32", count))
    adapter = Adapter((Targeted(Target("w", (count, *matrix), experts=count), update),))
    loratool.save(adapter, tmp_path / "a.lora.safetensors")
    save_sharded({"w": torch.ones(count, *matrix)}, tmp_path / "base")
    size = sum(ref.nbytes for ref in update.components().values())
    loaded = 0

    def load(self: FileSpan, dtype: str, shape: tuple[int, ...], real: Any = FileSpan.load) -> Tensor:
        nonlocal loaded
        tensor: Tensor = real(self, dtype, shape)
        loaded += tensor.nbytes
        return tensor

    monkeypatch.setattr(FileSpan, "load", load)
    loratool.merge(tmp_path / "base", tmp_path / "a.lora.safetensors", tmp_path / "out")
    assert loaded <= 4 * size, f"read {loaded / size:.0f} times the adapter"


# --- whole or not at all --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, loratool
from pathlib import Path
def die(step, left=[int(sys.argv[4])]):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
loratool.merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), progress=die)
"""


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_killed_merge_leaves_no_output(step: int, base: Path, tmp_path: Path) -> None:
    loratool.save(BOTH, tmp_path / "a.lora.safetensors")
    before, adapter = files_of(base), (tmp_path / "a.lora.safetensors").read_bytes()
    out = base.parent / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "a.lora.safetensors"), str(out), str(step)]
    done = subprocess.run(command, check=False, env=environment())
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert files_of(base) == before
    assert (tmp_path / "a.lora.safetensors").read_bytes() == adapter
    loratool.merge(base, tmp_path / "a.lora.safetensors", out)  # what is left over is not in the way
    assert len(files_of(out)) == len(before) + 1


def test_what_a_killed_merge_left_is_not_taken_for_a_companion(base: Path, tmp_path: Path) -> None:
    (base / ".out.partial-abc" / "out").mkdir(parents=True)
    (base / ".out.partial-abc" / "out" / "config.json").write_text("{}")
    loratool.merge(base, BOTH, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*partial*"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, BrokenPipeError])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_exception_in_the_callback_leaves_nothing(error: type[BaseException], out: str, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")

    def stop(step: Progress) -> None:
        if step.done > step.total // 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        loratool.merge(tmp_path / "in.safetensors", BOTH, tmp_path / out, progress=stop)
    assert beside(tmp_path) == ["in.safetensors"]


def filled(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").touch()


@pytest.mark.parametrize("there", ["file", "folder", "dangling"])
def test_an_output_that_exists_is_refused(there: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    {"file": out.touch, "folder": lambda: filled(out), "dangling": lambda: out.symlink_to("nowhere")}[there]()
    for act in (lambda: loratool.merge(base, BOTH, out), lambda: loratool.save(BOTH, out)):
        error = refused(act)
        assert error.code == "E-EXISTS"
        assert str(out) in str(error)


def test_an_output_without_a_parent_is_refused(base: Path, tmp_path: Path) -> None:
    assert refused(lambda: loratool.merge(base, BOTH, tmp_path / "no" / "out")).code == "E-EXISTS"
    assert beside(tmp_path) == ["base"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_appears_meanwhile_is_not_overwritten(kind: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(step: Progress) -> None:
        if not out.exists():
            filled(out) if kind == "folder" else out.write_text("mine")

    error = refused(lambda: loratool.merge(base, BOTH, out, progress=appear))
    assert error.code == "E-EXISTS"
    assert beside(tmp_path) == ["base", "out"]
    assert [*files_of(out)] == ["mine"] if kind == "folder" else out.read_text() == "mine"


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("cut", ["target", "rest"])
def test_a_base_that_gets_shorter_meanwhile_is_an_error(
    portable: bool, cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portable:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "model.safetensors"
    save_file({"a": torch.ones(5, 4)} if cut == "target" else {"a": torch.ones(5, 4), "b": torch.ones(9)}, file)

    def shorten(step: Progress) -> None:
        os.truncate(file, file.stat().st_size - 8 if cut == "rest" else 100)

    error = refused(lambda: loratool.merge(tmp_path / "base", lora("a"), tmp_path / "out", progress=shorten))
    assert error.code == "E-CHANGED"
    assert error.where == str(file)
    assert beside(tmp_path) == ["base"]


def test_a_base_that_vanishes_meanwhile_is_an_error_of_reading(base: Path, tmp_path: Path) -> None:
    last = sorted(base.glob("*.safetensors"))[-1]
    error = refused(
        lambda: loratool.merge(base, BOTH, tmp_path / "out", progress=lambda step: last.unlink(missing_ok=True))
    )
    assert last.name in error.where
    assert beside(tmp_path) == ["base"]
    assert "writing failed" not in str(error)


# --- copying --------------------------------------------------------------------------------------------------------


def without_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "copy_file_range", raising=False)


def refusing_kernel(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    patch.setattr(os, "copy_file_range", refuse, raising=False)


def tiring_kernel(patch: pytest.MonkeyPatch) -> None:
    """Copies a few bytes at a time, and gives up every now and then."""
    calls = 0

    def copy(source: int, target: int, count: int, offset_src: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return os.write(target, os.pread(source, min(count, 7), offset_src))

    patch.setattr(os, "copy_file_range", copy, raising=False)


@pytest.mark.parametrize("kernel", [without_kernel, refusing_kernel, tiring_kernel])
def test_the_portable_copy_gives_the_same_files(
    kernel: Callable[[pytest.MonkeyPatch], None], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool.merge(base, BOTH, tmp_path / "1")
    kernel(monkeypatch)
    steps: list[Progress] = []
    loratool.merge(base, BOTH, tmp_path / "2", progress=steps.append)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert steps[-1].done == steps[-1].total


# --- pickles --------------------------------------------------------------------------------------------------------


def merged_state(parts: Any = BOTH, values: State | None = None, **options: Any) -> State:
    """What the same merge gives for safetensors."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_sharded({n: v.clone().contiguous() for n, v in (values or state()).items()}, Path(folder) / "base")
        loratool.merge(Path(folder) / "base", parts, Path(folder) / "out", **options)
        return tensors_of(Path(folder) / "out")


def in_file(folder: Path) -> tuple[Path, str]:
    torch.save(state(), folder / "weights.pt")
    return folder / "weights.pt", "weights.safetensors"


def in_folder(folder: Path) -> tuple[Path, str]:
    torch.save(state(), folder / "pytorch_model.bin")
    return folder, "model.safetensors"


def nested(folder: Path) -> tuple[Path, str]:
    torch.save({"epoch": 3, "state_dict": state(), "rest": [1]}, folder / "last.pth")
    return folder / "last.pth", "last.safetensors"


def legacy(folder: Path) -> tuple[Path, str]:
    torch.save(state(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt", "old.safetensors"


def parameters(folder: Path) -> tuple[Path, str]:
    values = {n: torch.nn.Parameter(v, requires_grad=v.is_floating_point()) for n, v in state().items()}
    torch.save(values, folder / "weights.pt")
    return folder / "weights.pt", "weights.safetensors"


def views(folder: Path) -> tuple[Path, str]:
    """Transposed, part of a larger storage, expanded: what is stored is not what is in the storage, in order."""
    values = state()
    values["b.weight"] = values["b.weight"].T.contiguous().T
    values["g.weight"] = torch.cat([torch.zeros(2, 4).bfloat16(), values["g.weight"]])[2:]
    torch.save(values, folder / "weights.pt")
    return folder / "weights.pt", "weights.safetensors"


@pytest.mark.parametrize("written", [in_file, in_folder, nested, legacy, parameters, views])
def test_pickles_become_safetensors(written: Callable[[Path], tuple[Path, str]], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path, name = written(tmp_path / "in")
    loratool.merge(path, BOTH, tmp_path / "out")
    assert beside(tmp_path / "out") == sorted(["loratool_receipt.json", name])
    assert same_bits(tensors_of(tmp_path / "out"), merged_state())
    report = loratool.unmerge(tmp_path / "out", BOTH, tmp_path / "back", base=path)
    assert report.exact
    assert same_bits(tensors_of(tmp_path / "back"), state())


def test_a_sharded_pickle_keeps_its_shards(tmp_path: Path) -> None:
    base, weight_map = tmp_path / "base", {}
    base.mkdir()
    for number in (1, 2):
        part = {name: value for n, (name, value) in enumerate(state().items()) if n % 2 == number - 1}
        torch.save(part, base / f"pytorch_model-0000{number}-of-00002.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-0000{number}-of-00002.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loratool.merge(base, BOTH, tmp_path / "out")
    out = tmp_path / "out"
    assert same_bits(tensors_of(out), merged_state())
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert beside(out) == sorted([*names, "loratool_receipt.json", "model.safetensors.index.json"])
    new = json.loads((out / "model.safetensors.index.json").read_text())
    assert new["weight_map"] == {name: file[8:-4] + ".safetensors" for name, file in weight_map.items()}
    assert new["metadata"]["total_size"] == sum(value.nbytes for value in state().values())


def tied(folder: Path, names: tuple[str, ...], new: bool = True) -> Path:
    values = state()
    for name in names:
        values[name] = values["b.weight"]
    torch.save(values, folder / "tied.pt", _use_new_zipfile_serialization=new)
    return folder / "tied.pt"


@pytest.mark.parametrize("named", ["b.weight", "h.weight"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tied_weights_of_a_pickle_change_together(named: str, zipped: bool, tmp_path: Path) -> None:
    path = tied(tmp_path, ("h.weight",), zipped)
    report = loratool.merge(path, lora(named), tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    assert raw(out["b.weight"]) == raw(out["h.weight"]) == raw(merged_state(lora())["b.weight"])
    assert any("b.weight" in note and "h.weight" in note for note in report.plan.notes)


@pytest.mark.parametrize("named", ["b.weight", "h.weight", "i.weight"])
def test_three_names_of_one_tensor_change_together(named: str, tmp_path: Path) -> None:
    loratool.merge(tied(tmp_path, ("h.weight", "i.weight")), lora(named), tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    changed = raw(merged_state(lora())["b.weight"])
    assert {name: raw(out[name]) == changed for name in ("b.weight", "h.weight", "i.weight")} == {
        "b.weight": True,
        "h.weight": True,
        "i.weight": True,
    }


@pytest.mark.parametrize("names", [("b.weight", "h.weight"), ("h.weight", "b.weight")])
def test_no_adapter_is_lost_where_two_name_a_tied_tensor_differently(names: tuple[str, str], tmp_path: Path) -> None:
    parts = [lora(names[0], seed=1), lora(names[1], seed=2)]
    wanted = merged_state([lora(seed=1), lora(seed=2)])["b.weight"]
    try:
        loratool.merge(tied(tmp_path, ("h.weight",)), parts, tmp_path / "out")
    except LoratoolError:
        return  # to refuse it is fine as well
    out = tensors_of(tmp_path / "out")
    assert raw(out["b.weight"]) == raw(wanted)
    assert raw(out["h.weight"]) == raw(wanted)


def test_equal_updates_are_no_sign_of_tied_tensors(tmp_path: Path) -> None:
    """Norms that training left alone are all ones; one that the base lacks is still a sign of the wrong base."""
    ones = Replace(TensorRef.of(torch.ones(4)))
    save_sharded({"layers.0.norm.weight": torch.zeros(4)}, tmp_path / "base")
    adapter = Adapter(tuple(Targeted(Target(f"layers.{n}.norm.weight", (4,)), ones) for n in (0, 1)))
    error = refused(lambda: loratool.merge(tmp_path / "base", adapter, tmp_path / "out"))
    assert error.code == "E-TARGET"
    assert "layers.1.norm.weight" in str(error)


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    error = refused(lambda: loratool.merge(tmp_path / "model.pt", BOTH, tmp_path / "out"))
    assert error.code == "E-PICKLE"
    assert "torch.nn.modules.linear.Linear" in str(error)


def test_a_pickle_that_grows_without_end_is_refused_soon(tmp_path: Path) -> None:
    """A few hundred bytes that describe 50^7 dicts: each level holds the one below fifty times."""
    level: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(7):
        level = {str(n): level for n in range(50)}
    torch.save(level, tmp_path / "bomb.pt")
    code = "import sys, loratool\ntry: loratool.inspect(sys.argv[1])\nexcept loratool.LoratoolError as e: print(e.code)"
    done = subprocess.run(
        [sys.executable, "-c", f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, (4, 4))\n{code}",
         str(tmp_path / "bomb.pt")], capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, "ran out of its 4 seconds"
    assert done.stdout.startswith("E-")


# --- receipts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(base: Path, tmp_path: Path) -> Path:
    loratool.merge(base, [(BOTH, 0.5), lora(seed=5)], tmp_path / "merged")
    return tmp_path / "merged"


def test_a_receipt_says_what_was_merged_into_what(base: Path, merged: Path) -> None:
    document = json.loads((merged / "loratool_receipt.json").read_text())
    assert document["format"] == "loratool-receipt"
    assert document["tool"] == f"loratool {loratool.__version__}"
    assert [(a["weight"], a["updates"]) for a in document["adapters"]] == [(0.5, 2), (1.0, 1)]
    assert document["adapters"][0]["digest"] != document["adapters"][1]["digest"]
    before, after = tensors_of(base), tensors_of(merged)
    assert [*document["tensors"]] == ["b.weight", "g.weight"]
    for name, entry in document["tensors"].items():
        assert entry["base"] == TensorRef.of(before[name]).digest()
        assert entry["merged"] == TensorRef.of(after[name]).digest()
        assert (entry["dtype"], entry["shape"], entry["reversible"]) == ("BF16", [5, 4], True)
    assert str(merged.parent) not in json.dumps(document), "no path of this machine"


def test_a_merged_checkpoint_is_not_merged_into_again(merged: Path, tmp_path: Path) -> None:
    error = refused(lambda: loratool.merge(merged, lora("g.weight"), tmp_path / "out"))
    assert error.code == "E-MERGED"
    assert "unmerge" in error.hint
    save_file(state(), tmp_path / "in.safetensors")
    loratool.merge(tmp_path / "in.safetensors", BOTH, tmp_path / "one.safetensors")
    assert refused(lambda: loratool.merge(tmp_path / "one.safetensors", BOTH, tmp_path / "out")).code == "E-MERGED"


def test_adapters_are_known_by_their_content(base: Path, merged: Path, tmp_path: Path) -> None:
    """In any order, from files or memory, with or without their weights."""
    loratool.save(BOTH, tmp_path / "renamed.lora.safetensors")
    for n, parts in enumerate(
        [[BOTH, lora(seed=5)], [lora(seed=5), BOTH], [(lora(seed=5), 1), (tmp_path / "renamed.lora.safetensors", 0.5)]]
    ):
        assert loratool.unmerge(merged, parts, tmp_path / f"{n}", base=base).exact  # type: ignore[arg-type]
        assert files_of(tmp_path / f"{n}") == files_of(base)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ([(BOTH, 0.7), lora(seed=5)], "0.7"),
        ([BOTH], "was merged and is not among"),
        ([BOTH, lora(seed=5), lora(seed=6)], "was not merged"),
        ([BOTH, lora(seed=6)], "was not merged"),
    ],
    ids=["weight", "missing", "more", "another"],
)
def test_unmerging_anything_else_is_refused(
    parts: Any, word: str, with_base: bool, base: Path, merged: Path, tmp_path: Path
) -> None:
    error = refused(lambda: loratool.unmerge(merged, parts, tmp_path / "out", base=base if with_base else None))
    assert codes(error) == ["E-RECEIPT"]
    assert word in str(error)
    assert not (tmp_path / "out").exists()


def test_one_adapter_merged_twice_is_found_twice(base: Path, tmp_path: Path) -> None:
    loratool.merge(base, [(BOTH, 0.5), (BOTH, 0.25)], tmp_path / "merged")
    for n, weights in enumerate([(None, None), (0.5, 0.25), (0.25, 0.5)]):
        parts = [(BOTH, weight) for weight in weights]
        assert loratool.unmerge(tmp_path / "merged", parts, tmp_path / f"{n}", base=base).exact


def test_an_unreadable_adapter_does_not_shift_the_weights(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"?")
    parts = [(tmp_path / "bad.safetensors", 1.0), (BOTH, 0.5), (lora(seed=5), 1.0)]
    error = refused(lambda: loratool.unmerge(merged, parts, tmp_path / "out"))
    assert codes(error) == ["E-HEADER"]


def flip(path: Path, tensor: str) -> None:
    """Change the last byte of a tensor in a file."""
    content = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", content[:8])[0]
    content[length + json.loads(content[8:length])[tensor]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_changed_since_the_merge_is_refused(base: Path, merged: Path, tmp_path: Path) -> None:
    flip(merged / "model-00002-of-00002.safetensors", "b.weight")
    for n, of in enumerate((base, None)):
        error = refused(lambda of=of, n=n: loratool.unmerge(merged, [BOTH, lora(seed=5)], tmp_path / f"{n}", base=of))
        assert codes(error) == ["E-RECEIPT"]
        assert "b.weight" in str(error)


def test_exact_covers_the_tensors_that_were_not_merged_into(base: Path, merged: Path, tmp_path: Path) -> None:
    """A change of another tensor is refused or undone, but never called exact."""
    flip(merged / "model-00001-of-00002.safetensors", "c.weight")
    try:
        report = loratool.unmerge(merged, [BOTH, lora(seed=5)], tmp_path / "back", base=base)
    except LoratoolError as error:
        assert "c.weight" in str(error)  # noqa: PT017 - either way is right
        return
    assert not report.exact or files_of(tmp_path / "back") == files_of(base)


def test_another_base_is_refused(base: Path, merged: Path, tmp_path: Path) -> None:
    flip(base / "model-00002-of-00002.safetensors", "b.weight")
    error = refused(lambda: loratool.unmerge(merged, [BOTH, lora(seed=5)], tmp_path / "out", base=base))
    assert codes(error) == ["E-BASE-MISMATCH"]
    assert "b.weight" in str(error)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "loratool-receipt", "version": "1.0"}'])
def test_a_broken_receipt_is_an_error_and_no_receipt(content: str, merged: Path, tmp_path: Path) -> None:
    (merged / "loratool_receipt.json").write_text(content)
    for act in (
        lambda: loratool.unmerge(merged, [BOTH], tmp_path / "out"),
        lambda: loratool.merge(merged, BOTH, tmp_path / "out"),
        lambda: loratool.inspect(merged),
    ):
        assert refused(act).code in ("E-RECEIPT", "E-JSON")


def test_without_a_receipt_nothing_is_unmerged(base: Path, tmp_path: Path) -> None:
    assert refused(lambda: loratool.unmerge(base, BOTH, tmp_path / "out")).code == "E-RECEIPT"


def test_what_can_not_be_computed_backwards_needs_the_base(base: Path, tmp_path: Path) -> None:
    for form in ("replace", "replace_rows", "dora0-lora", "dora1-lora"):
        adapter = together(one(form, (5, 4), name="b.weight"), lora("g.weight"))
        merged, out = tmp_path / f"merged-{form}", tmp_path / f"out-{form}"
        loratool.merge(base, adapter, merged)
        error = refused(lambda: loratool.unmerge(merged, adapter, out))  # noqa: B023 - called at once
        assert isinstance(error, loratool.AnswerIsNo)
        assert error.exit_code == 1
        assert "b.weight" in str(error)
        assert "--base" in error.problems[-1].hint
        assert not out.exists()
        loratool.unmerge(merged, adapter, out, base=base)
        assert files_of(out) == files_of(base)


def test_exact_is_only_promised_with_the_base(base: Path, merged: Path, tmp_path: Path) -> None:
    parts = [BOTH, lora(seed=5)]
    error = refused(lambda: loratool.unmerge(merged, parts, tmp_path / "out", exact=True))
    assert isinstance(error, loratool.AnswerIsNo)
    assert not (tmp_path / "out").exists()
    assert loratool.unmerge(merged, parts, tmp_path / "out", base=base, exact=True).exact
    report = loratool.unmerge(merged, parts, tmp_path / "near")
    assert report.total == 2
    assert report.to_json()["exact"] == (report.restored == 2)
    assert "loratool_receipt.json" not in beside(tmp_path / "near")


@pytest.mark.parametrize("option", TO)
def test_a_change_of_dtype_is_taken_back_with_the_base(option: str, base: Path, tmp_path: Path) -> None:
    loratool.merge(base, BOTH, tmp_path / "merged", dtype=option)
    report = loratool.unmerge(tmp_path / "merged", BOTH, tmp_path / "back", base=base)
    assert report.exact
    assert files_of(tmp_path / "back") == files_of(base)


# --- refusals -------------------------------------------------------------------------------------------------------


def identity(value: Tensor) -> TensorIdentity:
    return TensorIdentity(TensorRef.of(value).digest(), TensorRef.of(value).dtype, tuple(value.shape))


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    known = {name: identity(state()[name]) for name in ("b.weight", "g.weight")}
    bound = replace(BOTH, base=BaseIdentity("m", known))
    loratool.merge(base, bound, tmp_path / "good")
    for n, wrong in enumerate((state()["g.weight"], state()["b.weight"].float(), state()["b.weight"].flatten())):
        other = replace(bound, base=BaseIdentity("m", {**known, "b.weight": identity(wrong)}))
        error = refused(lambda other=other, n=n: loratool.merge(base, other, tmp_path / f"{n}"))
        assert codes(error) == ["E-BASE-MISMATCH"]
        assert error.problems[0].rule == "R-041"
        assert "b.weight" in str(error)
        assert "g.weight" not in str(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fnuz])
def test_a_quantised_target_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_sharded({**state(), "b.weight": torch.zeros(5, 4).to(dtype)}, tmp_path / "base")
    error = refused(lambda: loratool.merge(tmp_path / "base", BOTH, tmp_path / "out"))
    assert codes(error) == ["E-QUANTISED"]
    assert "b.weight" in str(error)


def test_all_problems_are_told_at_once(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.lora.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    nan = make_update("lora", (4, 6), Maker(0))
    nan = replace(nan, A=TensorRef.of(nan.A.read() * float("nan")))
    parts = [
        tmp_path / "cut.lora.safetensors",
        together(lora("layers.b.weight"), lora("c.weight", (4, 5)), lora("ids", (2, 3))),
        Adapter((Targeted(Target("f.weight", (4, 6)), nan),)),
        replace(lora("g.weight"), base=BaseIdentity("", {"g.weight": identity(torch.zeros(5, 4).bfloat16())})),
        together(one("dora0-lora", (2, 2), name="e.weight"), one("replace", (7,), name="d.weight")),
        together(one("dora0-lora", (2, 2), name="e.weight"), one("replace", (7,), name="d.weight")),
    ]
    error = refused(lambda: loratool.merge(base, parts, tmp_path / "out"))
    found = [
        "E-BASE-MISMATCH",
        "E-HEADER",
        "E-NONFINITE",
        "E-OVERLAP",
        "E-QUANTISED",
        "E-SHAPE",
        "E-TARGET",
    ]
    assert codes(error) == found
    text = str(error)
    for name in ("layers.b.weight", "c.weight", "ids", "f.weight", "g.weight", "e.weight", "d.weight"):
        assert name in text
    assert not (tmp_path / "out").exists()


def test_the_same_conflict_of_two_tensors_is_told_twice(base: Path, tmp_path: Path) -> None:
    adapter = together(one("dora0-lora", (5, 4), name="b.weight"), one("dora0-lora", (5, 4), name="g.weight"))
    error = refused(lambda: loratool.merge(base, [adapter, adapter], tmp_path / "out"))
    assert [problem.where for problem in error.problems if problem.code == "E-OVERLAP"] == ["b.weight", "g.weight"]


def test_near_names_are_named(base: Path, tmp_path: Path) -> None:
    error = refused(lambda: loratool.merge(base, together(lora(), lora("layers.g.weight", seed=9)), tmp_path / "out"))
    assert codes(error) == ["E-TARGET"]
    assert "layers.g.weight" in error.message
    assert "g.weight" in error.hint
    error = refused(lambda: loratool.merge(base, together(lora(), lora("qqqqqqq", seed=9)), tmp_path / "out"))
    assert "base" in error.hint


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_factors_of_a_strange_dtype_are_refused(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    factor = torch.ones(2, 4).to(dtype)
    odd = Lora(TensorRef.of(factor), TensorRef.of(torch.ones(5, 2)), scaling("none", 1.0, 2))
    adapter = Adapter((Targeted(Target("b.weight", (5, 4)), odd),))
    assert codes(refused(lambda: loratool.merge(base, adapter, tmp_path / "out"))) == ["E-DTYPE"]
    torch.save({"b.lora.A": factor.T.contiguous(), "b.lora.B": torch.ones(2, 5)}, tmp_path / "plain.pt")
    error = refused(lambda: loratool.merge(base, tmp_path / "plain.pt", tmp_path / "out"))
    assert ("E-DTYPE" in codes(error)) == (dtype == torch.int64), "a file's fp8 is read as bfloat16, which holds it"


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight: float, base: Path, tmp_path: Path) -> None:
    refused(lambda: loratool.merge(base, [(BOTH, weight)], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_is_refused(base: Path, tmp_path: Path) -> None:
    error = refused(lambda: loratool.merge(base, BOTH, tmp_path / "out", dtype="int8"))
    assert error.code == "E-OPTION"
    assert "bf16" in str(error)


def test_a_missing_input_is_a_typed_error(base: Path, tmp_path: Path) -> None:
    for act in (
        lambda: loratool.merge(tmp_path / "no", BOTH, tmp_path / "out"),
        lambda: loratool.merge(base, tmp_path / "no", tmp_path / "out"),
        lambda: loratool.load(tmp_path / "no"),
        lambda: loratool.validate(tmp_path / "no"),
        lambda: loratool.inspect(tmp_path / "no"),
    ):
        assert refused(act).code in ("E-MISSING", "E-READ")


# --- new tensors ----------------------------------------------------------------------------------------------------


def replaced(name: str, *shape: int) -> Adapter:
    return one("replace", shape, name=name, dtype="BF16")


def test_new_and_resized_tensors_need_consent(base: Path, tmp_path: Path) -> None:
    adapter = together(replaced("new.weight", 3, 2), replaced("b.weight", 6, 4))
    error = refused(lambda: loratool.merge(base, adapter, tmp_path / "out"))
    assert codes(error) == ["E-TARGET"]
    assert len(error.problems) == 2
    assert all("--allow-new" in problem.hint for problem in error.problems)
    loratool.merge(base, adapter, tmp_path / "out", allow_new=True)
    out = tensors_of(tmp_path / "out")
    for item in adapter.updates:
        assert raw(out[item.target.name]) == raw(item.update.components()["value"].read())
    assert raw(out["g.weight"]) == raw(state()["g.weight"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == out.keys()
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back", base=base)
    assert same_bits(tensors_of(tmp_path / "back"), state())


def test_a_resized_tensor_does_not_come_back_without_the_base(base: Path, tmp_path: Path) -> None:
    adapter = replaced("b.weight", 6, 4)
    loratool.merge(base, adapter, tmp_path / "merged", allow_new=True)
    error = refused(lambda: loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back"))
    assert isinstance(error, loratool.AnswerIsNo)
    assert "b.weight" in str(error)


def test_a_new_tensor_is_taken_out_again(tmp_path: Path) -> None:
    """Nothing of the base is needed for that."""
    base, adapter = save_sharded(state(), tmp_path / "base"), replaced("new.weight", 3, 2)
    loratool.merge(base, adapter, tmp_path / "merged", allow_new=True)
    assert loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back").exact
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.parametrize("weight", [0, 0.5, -1])
def test_a_new_tensor_has_weight_1(weight: float, base: Path, tmp_path: Path) -> None:
    act = lambda: loratool.merge(base, [(replaced("n", 2), weight)], tmp_path / "out", allow_new=True)  # noqa: E731
    assert codes(refused(act)) == ["E-TARGET"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_resized_tensor_and_an_update_of_the_old_size_are_refused(order: int, base: Path, tmp_path: Path) -> None:
    parts = [replaced("b.weight", 6, 4), lora()][::order]
    error = refused(lambda: loratool.merge(base, parts, tmp_path / "out", allow_new=True))
    assert "E-SHAPE" in codes(error)
    assert not (tmp_path / "out").exists()


def test_an_update_on_top_of_a_resized_tensor(base: Path, tmp_path: Path) -> None:
    """Within one adapter the sizes agree, and the delta is of the new tensor."""
    target = Target("b.weight", (6, 4))
    items = [Targeted(target, make_update(form, (6, 4), Maker(3))) for form in ("lora", "replace")]
    loratool.merge(base, Adapter(tuple(items)), tmp_path / "out", allow_new=True)
    save_sharded({"b.weight": items[1].update.components()["value"].read().double()}, tmp_path / "two")
    loratool.merge(tmp_path / "two", Adapter(tuple(items[:1])), tmp_path / "same")
    wanted = tensors_of(tmp_path / "same")["b.weight"]
    assert raw(tensors_of(tmp_path / "out")["b.weight"]) == raw(rounded_to(wanted, "BF16"))


# --- a tied head, which only the config shows -----------------------------------------------------------------------


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    base = save_sharded({"model.embed_tokens.weight": torch.ones(6, 4)}, tmp_path / "base")
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    return base


def test_a_changed_embedding_changes_the_head_and_that_is_said(headless: Path, tmp_path: Path) -> None:
    adapter = lora("model.embed_tokens.weight", (6, 4))
    report = loratool.merge(headless, adapter, tmp_path / "out")
    assert any("head" in note for note in report.plan.notes)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_head_that_the_base_has_as_its_embedding_gets_a_tensor_of_its_own(
    headless: Path, tmp_path: Path, weight: float
) -> None:
    update = lora("lm_head.weight", (6, 4))
    error = refused(lambda: loratool.merge(headless, [(update, weight)], tmp_path / "out"))
    assert error.code == "E-TARGET"
    assert "--allow-new" in error.hint
    loratool.merge(headless, [(update, weight)], tmp_path / "out", allow_new=True)
    got = tensors_of(tmp_path / "out")
    assert torch.equal(got["model.embed_tokens.weight"], torch.ones(6, 4))
    loratool.merge(headless, [(lora("model.embed_tokens.weight", (6, 4)), weight)], tmp_path / "same")
    assert raw(got["lm_head.weight"]) == raw(tensors_of(tmp_path / "same")["model.embed_tokens.weight"])


def whole(name: str, value: torch.Tensor) -> Targeted:
    return Targeted(Target(name, tuple(value.shape)), Replace(TensorRef.of(value, name)))


def test_an_embedding_and_a_head_that_were_both_trained(headless: Path, tmp_path: Path) -> None:
    """They differ, and the base has one tensor for both: nothing was "only the embedding" here."""
    both = [
        whole("model.embed_tokens.weight", torch.full((6, 4), 2.0)),
        whole("lm_head.weight", torch.zeros(6, 4)),
    ]
    error = refused(lambda: loratool.merge(headless, Adapter(tuple(both)), tmp_path / "out"))
    assert codes(error) == ["E-TARGET"]
    loratool.merge(headless, Adapter(tuple(both)), tmp_path / "out", allow_new=True)
    got = tensors_of(tmp_path / "out")
    assert {name: float(value.max()) for name, value in got.items()} == {
        "model.embed_tokens.weight": 2.0,
        "lm_head.weight": 0.0,
    }


def test_an_embedding_that_was_trained_alone_leaves_the_head_behind(headless: Path, tmp_path: Path) -> None:
    alone = Adapter((whole("model.embed_tokens.weight", torch.full((6, 4), 2.0)),))
    error = refused(lambda: loratool.merge(headless, alone, tmp_path / "out"))
    assert error.code == "E-TIED"
    assert "--allow-new" in error.hint
    loratool.merge(headless, alone, tmp_path / "out", allow_new=True)
    got = tensors_of(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], torch.ones(6, 4))
    assert float(got["model.embed_tokens.weight"].min()) == 2.0


def test_an_embedding_that_grew_alone_is_refused(headless: Path, tmp_path: Path) -> None:
    grown = Adapter((whole("model.embed_tokens.weight", torch.full((8, 4), 2.0)),))
    error = refused(lambda: loratool.merge(headless, grown, tmp_path / "out", allow_new=True))
    assert error.code == "E-TIED"
    assert "in no file" in error.message
