"""Merged on read: what `open_merged` gives is what safetensors' `safe_open` gives on the merged folder, to the bit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import fill, llama
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import Case, Maker, cases, make_update, one, raw, save_sharded, small_blocks, weights
from torch import Tensor

import loratool
from loratool import Adapter, LoratoolError, MergedFile, MergedFolder, Target, Targeted, TensorRef
from loratool.recycling import Recycled
from loratool.rounding import gradual_underflow
from loratool.slicing import box, runs
from loratool.tensors import OWN_PAGES
from loratool.workers import workers
from tests.bench.data import write_file

ROOT = Path(__file__).parent.parent
Fresh = Callable[[], Path]
Parts = list[tuple[Adapter | Path, float]]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return lambda: tmp_path_factory.mktemp("example")


def bits(value: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return value.dtype, value.shape, raw(value.clone(memory_format=torch.contiguous_format))


def outcome(act: Callable[[], Tensor]) -> object:
    """The bits of a result, or the type of what was raised."""
    try:
        return bits(act())
    except Exception as error:
        return type(error)


def assert_file(found: MergedFile, path: Path, indexes: list[Any]) -> None:
    with safe_open(path, "pt") as wanted:
        assert found.keys() == wanted.keys()
        assert found.offset_keys() == wanted.offset_keys()
        assert found.metadata() == wanted.metadata()
        for name in wanted.keys():  # noqa: SIM118  # no mapping
            assert bits(found.get_tensor(name)) == bits(wanted.get_tensor(name)), name
            mine, theirs = found.get_slice(name), wanted.get_slice(name)
            assert (mine.get_shape(), mine.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
            for index in indexes:
                assert outcome(lambda: mine[index]) == outcome(lambda: theirs[index]), (name, index)  # noqa: B023


def assert_folder(found: MergedFolder, out: Path, indexes: list[Any]) -> None:
    paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*.safetensors")}
    assert sorted(found.files) == sorted(paths)
    names = []
    for file, path in paths.items():
        with found.open_shard(file) as shard:
            assert_file(shard, path, indexes)
            component = file.rpartition("/")[0]
            names += [f"{component}.{name}" if component else name for name in shard.keys()]  # noqa: SIM118
    assert found.keys() == sorted(names)


# --- any adapter, any index -----------------------------------------------------------------------------------------

numbers = st.integers(-7, 7)
slices = st.builds(slice, st.none() | numbers, st.none() | numbers, st.none() | st.integers(1, 3))
simple = st.one_of(numbers, slices, slices, st.just(...), st.none())
indexes = st.one_of(
    simple,
    st.lists(simple, max_size=4).map(tuple),
    st.sampled_from(([0], [0, -1], True, (0, [0]), torch.tensor(0), torch.tensor([True]), 1.5, "a", slice(1, 0, -1))),
)


@given(case=cases(), more=weights, index=st.lists(indexes, min_size=3, max_size=6), data=st.data())
def test_what_is_read_is_what_a_merge_writes(
    case: Case, more: float, index: list[Any], data: Any, fresh: Fresh
) -> None:
    folder = fresh()
    shards, threads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    options = {"dtype": data.draw(st.sampled_from(("keep", "keep", "bf16"))), "reproducible": data.draw(st.booleans())}
    save_sharded(case.base, folder / "base", shards)
    with small_blocks(data.draw(st.sampled_from((16, 64)))):
        loratool.merge(folder / "base", [(case.adapter, more)], folder / "out", **options)
        with loratool.open_merged(folder / "base", [(case.adapter, more)], threads=threads, **options) as merged:
            assert_folder(merged, folder / "out", index)


@given(data=st.data(), shape=st.lists(st.integers(0, 5), max_size=4))
def test_a_box_holds_what_an_index_asks_for(data: st.DataObject, shape: list[int]) -> None:
    index = data.draw(indexes)
    numbered = torch.arange(torch.Size(shape).numel()).view(shape)
    try:
        wanted = numbered[index]
    except (IndexError, TypeError, ValueError):
        return
    part = box(index, tuple(shape))
    inside = numbered[tuple(slice(*bound) for bound in part.bounds)]
    assert torch.equal(inside[part.index], wanted)
    assert inside.shape == part.shape
    found = [place for start, stop in runs(shape, part.bounds) for place in range(start, stop)]
    assert found == inside.flatten().tolist()
    if inside.numel() and not isinstance(index, list):
        assert len(runs(shape, part.bounds)) <= inside.numel()


# --- bases of every sort --------------------------------------------------------------------------------------------

Q = "layers.0.q_proj.weight"
TYPICAL = [..., 0, slice(1, 3), slice(100, 140), (slice(None), 1), (..., slice(5, 9)), (slice(3, 200, 7), slice(2, 9))]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@dataclass(frozen=True)
class Setting:
    base: Path
    adapters: Parts
    options: Mapping[str, Any]


def sharded(folder: Path, **options: Any) -> Setting:
    state = {
        Q: values(260, 150).bfloat16(),
        "other.weight": values(90, 40),
        "norm": values(7),
        "one": torch.tensor(2.0),
    }
    save_sharded(state, folder / "base", shards=2)
    return Setting(folder / "base", [(one("lora", (260, 150), name=Q), 0.5)], options)


def one_file(folder: Path) -> Setting:
    setting = sharded(folder)
    state = {name: tensor for file in setting.base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(state, folder / "any-name.safetensors", metadata={"format": "pt", "a": "b"})
    return replace(setting, base=folder / "any-name.safetensors")


def pickled(folder: Path) -> Setting:
    (folder / "base").mkdir()
    torch.save({Q: values(30, 12).half(), "fc.weight": values(20, 6).T}, folder / "base" / "pytorch_model.bin")
    return Setting(folder / "base", [(one("dora1-lora", (30, 12), name=Q), 1.0)], {})


def pipeline(folder: Path) -> Setting:
    names = {"unet": ["d", "U"], "text_encoder": ["t", "C"], "vae": ["d", "V"], "scheduler": ["d", "S"]}
    for name in ("unet", "text_encoder", "vae"):
        (folder / "base" / name).mkdir(parents=True)
        (folder / "base" / name / "config.json").write_text("{}")
    (folder / "base" / "model_index.json").write_text(json.dumps(names))
    weight = "d.attn1.to_out.0.weight"
    state = {weight: values(6, 4), "conv.weight": values(3, 3)}
    save_file(state, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"conv.weight": values(3, 5)}, folder / "base" / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"l.weight": values(2, 2)}, folder / "base" / "text_encoder" / "pytorch_model.bin")
    factors = {"unet.d.attn1.to_out.0.lora_A.weight": values(3, 4), "unet.d.attn1.to_out.0.lora_B.weight": values(6, 3)}
    save_file(factors, folder / "adapter.safetensors")
    return Setting(folder / "base", [(folder / "adapter.safetensors", 1.0)], {})


def quantised(folder: Path, **options: Any) -> Setting:
    """DeepSeek's blocks of 128 x 128, the last ones cut off; the adapter leaves some blocks alone."""
    codes = (values(300, 200) * 100).to(torch.float8_e4m3fn)
    state = {Q: codes, f"{Q}_scale_inv": values(3, 2).abs() + 0.1, "norm": values(3).bfloat16()}
    save_sharded(state, folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    update = make_update("lora", (100, 200), Maker(1))
    adapter = Adapter((Targeted(Target(Q, (300, 200), (0, 100)), update),))
    return Setting(folder / "base", [(adapter, 1.0)], options)


def experts(folder: Path) -> Setting:
    shape = (3, 140, 30)
    target = Target("experts.weight", shape, experts=3)
    item = Targeted(target, make_update("lora", shape[1:], Maker(2), rank=2))
    single = Targeted(Target("more.weight", shape, expert=1), make_update("dora0-lora", shape[1:], Maker(3)))
    make = Maker(4, experts=3)
    turned = make_update("lora", shape[1:], make)
    turned = replace(turned, A=TensorRef.of(turned.A.read().transpose(1, 2).contiguous()).permute(0, 2, 1))
    viewed = Targeted(Target("turned.weight", shape, experts=3), turned)
    item = replace(item, update=make_update("lora", shape[1:], Maker(5, experts=3)))
    names = ("experts.weight", "more.weight", "turned.weight", "untouched.weight")
    save_sharded({name: values(*shape, seed=n).bfloat16() for n, name in enumerate(names)}, folder / "base")
    return Setting(folder / "base", [(Adapter((item, single, viewed)), 1.0)], {})


def resized(folder: Path) -> Setting:
    save_sharded({"n": values(4, 3), "z": values(2, 2)}, folder / "base")
    items = [Targeted(Target(name, (6, 3)), make_update("replace", (6, 3), Maker(7))) for name in ("n", "new")]
    return Setting(folder / "base", [(Adapter(tuple(items)), 1.0)], {"allow_new": True})


SETTINGS: dict[str, Callable[[Path], Setting]] = {
    "shards": sharded,
    "shards in float32": lambda folder: sharded(folder, dtype="fp32"),
    "one file": one_file,
    "a pickle": pickled,
    "a pipeline": pipeline,
    "fp8 with scales": quantised,
    "fp8 in bfloat16": lambda folder: quantised(folder, dtype="bf16"),
    "experts": experts,
    "new and resized": resized,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("block", [1 << 20, 512])
def test_every_sort_of_base(name: str, block: int, tmp_path: Path) -> None:
    setting = SETTINGS[name](tmp_path)
    with small_blocks(block):
        loratool.merge(setting.base, setting.adapters, tmp_path / "out", **setting.options)
        with loratool.open_merged(setting.base, setting.adapters, threads=2, **setting.options) as merged:
            assert_folder(merged, tmp_path / "out", TYPICAL)
        given = dict(loratool.iter_merged(setting.base, setting.adapters, **setting.options))
    assert [*given] == merged_names(tmp_path / "out", merged)


def merged_names(out: Path, merged: MergedFolder) -> list[str]:
    names = []
    for file in merged.files:
        component = f"{file.rpartition('/')[0]}." if "/" in file else ""
        with safe_open(out / file, "pt") as opened:
            names += [component + name for name in opened.offset_keys()]
    return names


def test_get_tensors_gives_all(tmp_path: Path) -> None:
    setting = sharded(tmp_path)
    loratool.merge(setting.base, setting.adapters, tmp_path / "out")
    with loratool.open_merged(setting.base, setting.adapters) as merged:
        for file in merged.files:
            wanted = load_file(tmp_path / "out" / file)
            found = merged.open_shard(file).get_tensors()
            assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in wanted.items()}


def test_a_tensor_can_be_computed_where_it_is_wanted(tmp_path: Path) -> None:
    setting = quantised(tmp_path)
    loratool.merge(setting.base, setting.adapters, tmp_path / "out")
    wanted = load_file(tmp_path / "out" / "model.safetensors")
    with small_blocks(4096), loratool.open_merged(setting.base, setting.adapters) as merged:
        for name, tensor in wanted.items():
            mine = torch.nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.dtype == torch.bfloat16)
            version = mine.data_ptr()
            assert merged.get_tensor(name, out=mine).data_ptr() == version
            assert bits(mine.detach()) == bits(tensor), name
        W = wanted["norm"]
        for wrong in (torch.empty(4, dtype=W.dtype), torch.empty(3), torch.empty(3, device="meta", dtype=W.dtype),
                      torch.empty(6, dtype=W.dtype)[::2]):  # fmt: skip
            assert refused(lambda: merged.get_tensor("norm", out=wrong)).code == "E-SHAPE"  # noqa: B023


# --- only what is asked for -----------------------------------------------------------------------------------------


def bytes_read(act: Callable[[], object]) -> int:
    """By system calls of this process, whatever was in the page cache."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    own = so_far() - before
    before = so_far()
    act()
    return so_far() - before - own


@pytest.fixture
def large(tmp_path: Path) -> Iterator[MergedFolder]:
    """Blocks of 100 rows and 10 kB."""
    shape = (4000, 50)
    state = {"touched": values(*shape).bfloat16(), "untouched": values(*shape).bfloat16(), "e": values(40, 100, 50)}
    save_sharded(state, tmp_path / "base")
    with small_blocks(10_000), loratool.open_merged(tmp_path / "base", one("add", shape, name="touched")) as merged:
        merged.get_tensor("touched")  # starts the workers
        yield merged


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts bytes")
@pytest.mark.parametrize(
    ("name", "index", "least", "most"),
    [
        ("untouched", slice(7, 17), 1000, 1000),
        ("untouched", 3, 100, 100),
        ("untouched", (5, slice(0, 10)), 20, 20),
        ("untouched", (slice(10, 20), 0), 20, 1000),
        ("e", (slice(None), slice(10, 20)), 80_000, 80_000),
        ("e", (slice(2, 4), 7, slice(3, 5)), 16, 800),
        ("touched", slice(0, 0), 0, 0),
        ("touched", slice(1000, 1100), 10_000, 10_000),
        ("touched", slice(1050, 1150), 20_000, 20_000),
        ("touched", (slice(-1, None), slice(0, 1)), 10_000, 10_000),
    ],
)
def test_only_the_rows_that_are_asked_for_are_read(
    large: MergedFolder, name: str, index: Any, least: int, most: int
) -> None:
    part = large.get_slice(name)
    assert least <= bytes_read(lambda: part[index]) <= most


PEAK = """
import json, resource, sys
import torch, loratool
from loratool.updates import Add, Scaling
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
with loratool.open_merged(sys.argv[1], sys.argv[2], threads=2) as merged:
    merged.get_slice("a.weight")[:10], merged.get_slice("b.weight")[:10]
    before = peak()
    for index in (slice(0, 64), (slice(None), slice(0, 8)), (slice(None, None, 512), -1), (..., slice(100, 108))):
        for name in ("a.weight", "b.weight"):
            merged.get_slice(name)[index]
    parts = peak() - before
    for name, tensor in merged._entries.items():
        merged.get_tensor(name)
    print(json.dumps([parts, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_is_that_of_what_is_asked_for(tmp_path: Path) -> None:
    """Of two tensors of 64 MB, parts of at most 1 MB; then one whole tensor after the other, in the same memory."""
    shape = (16_384, 1024)
    write_file(
        tmp_path / "base.safetensors", {"a.weight": shape, "b.weight": shape, "c.weight": shape}, "F32", {}, None
    )
    loratool.save(one("lora", shape, name="a.weight"), tmp_path / "a.lora.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "base.safetensors"), str(tmp_path / "a.lora.safetensors")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    parts, whole = json.loads(done.stdout)
    assert parts < 24e6, "two workers with blocks of 1 MB, wider copies of them, and factors"
    assert whole < 24e6 + 64e6 * 1.2, "a tensor's memory was not used again for the next one"


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory, size = Recycled(), OWN_PAGES
    first = memory.empty((size,), "U8")
    place = first.data_ptr()
    row, array = first[10:20], first.numpy()
    del first
    gc.collect()
    assert memory.empty((size,), "U8").data_ptr() != place, "a view of it is still held"
    del row
    gc.collect()
    assert memory.empty((size,), "U8").data_ptr() != place, "an array of it is still held"
    del array
    gc.collect()
    assert not memory.spare or len(memory.spare) == 1, "no more than the largest tensor had is kept"
    third = memory.empty((size // 4,), "F32")
    assert third.shape == (size // 4,)
    del third
    gc.collect()
    again = memory.empty((size,), "U8").data_ptr()
    gc.collect()
    assert memory.empty((size,), "U8").data_ptr() == again
    memory.close()
    assert not memory.spare


# --- threads --------------------------------------------------------------------------------------------------------


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_the_caller_s_threads_change_no_bit_and_are_left_alone(tmp_path: Path) -> None:
    shape = (300, 700)
    save_sharded({"w": values(*shape).bfloat16()}, tmp_path / "base")
    adapter = one("lora", shape, name="w", rank=40)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    wanted = bits(load_file(tmp_path / "out" / "model.safetensors")["w"])
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with loratool.open_merged(tmp_path / "base", adapter) as merged:
                assert bits(merged.get_tensor("w")) == wanted
                assert (torch.get_num_threads(), threads_of_a_new_thread()) == (number, number)
    finally:
        torch.set_num_threads(before)


def test_workers_have_one_torch_thread_each() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with workers(4) as pool:
            assert threads_of_a_new_thread() == 3
            meet = threading.Barrier(4)

            def own() -> int:
                meet.wait()  # all four answer
                torch.ones(1 << 20).add_(1)
                return torch.get_num_threads()

            assert [done.result() for done in [pool.submit(own) for _ in range(4)]] == [1, 1, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_the_default_dtype_of_the_process_changes_no_bit(tmp_path: Path) -> None:
    """transformers sets it while it builds a model."""
    setting = sharded(tmp_path)
    loratool.merge(setting.base, setting.adapters, tmp_path / "out")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with loratool.open_merged(setting.base, setting.adapters) as merged:
            assert_folder(merged, tmp_path / "out", [slice(3, 9)])
    finally:
        torch.set_default_dtype(before)


def test_a_thread_s_subnormal_numbers_are_left_as_they_were() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # which has no number as small as the one that is tried
    try:
        with gradual_underflow():
            pass
    finally:
        torch.set_default_dtype(before)
    try:
        assert (torch.full((1,), 2.0**-140) * 1.0).item() > 0
    finally:
        torch.set_flush_denormal(False)


def test_many_threads_may_read_at_once(tmp_path: Path) -> None:
    setting = quantised(tmp_path)
    loratool.merge(setting.base, setting.adapters, tmp_path / "out")
    wanted = {name: bits(tensor) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    merged = loratool.open_merged(setting.base, setting.adapters, threads=2)
    with small_blocks(4096), merged, ThreadPoolExecutor(6) as pool:
        names = [*wanted] * 8
        for name, found in zip(names, pool.map(merged.get_tensor, names), strict=True):
            assert bits(found) == wanted[name], name


# --- what goes wrong ------------------------------------------------------------------------------------------------


def refused(act: Callable[[], object], kind: type[Exception] = LoratoolError) -> LoratoolError:
    with pytest.raises(kind) as caught:
        act()
    assert isinstance(caught.value, LoratoolError)
    return caught.value


def test_the_problems_of_a_merge_are_raised_when_it_is_opened(tmp_path: Path) -> None:
    setting = sharded(tmp_path)
    wrong = [(one("lora", (9, 9), name=Q), 1.0), (one("add", (3,), name="nowhere"), 1.0)]
    wanted = refused(lambda: loratool.merge(setting.base, wrong, tmp_path / "out"))
    assert len(wanted.problems) >= 2
    for act in (loratool.open_merged, loratool.iter_merged):
        found = refused(lambda: act(setting.base, wrong))  # noqa: B023
        assert (type(found), found.problems) == (type(wanted), wanted.problems)
        assert refused(lambda: act(setting.base, setting.adapters, threads=0)).code == "E-OPTION"  # noqa: B023
        assert refused(lambda: act(setting.base, setting.adapters, dtype="x")).code == "E-OPTION"  # noqa: B023
        assert refused(lambda: act(tmp_path / "none", setting.adapters)).code == "E-MISSING"  # noqa: B023


def test_two_files_of_one_name_are_refused_as_by_a_merge(tmp_path: Path) -> None:
    weight_map = {"a": "pytorch_model.bin", "b": "model.safetensors"}
    (tmp_path / "base").mkdir()
    torch.save({"a": values(2, 2)}, tmp_path / "base" / "pytorch_model.bin")
    save_file({"b": values(2, 2)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter = one("add", (2, 2), name="a")
    wanted = refused(lambda: loratool.merge(tmp_path / "base", adapter, tmp_path / "out"))
    assert refused(lambda: loratool.open_merged(tmp_path / "base", adapter)).problems == wanted.problems


def test_a_wrong_name_is_a_key_error_too(tmp_path: Path) -> None:
    setting = sharded(tmp_path)
    with loratool.open_merged(setting.base, setting.adapters) as merged:
        for act in (merged.get_tensor, merged.get_slice, merged.open_shard):
            error = refused(lambda: act("nowhere"), KeyError)  # noqa: B023
            assert str(error).startswith("E-")


def test_nothing_can_be_asked_of_what_is_closed(tmp_path: Path) -> None:
    setting = sharded(tmp_path)
    merged = loratool.open_merged(setting.base, setting.adapters)
    first, second = (merged.open_shard(file) for file in merged.files)
    part, kept = merged.get_slice(Q), merged.get_tensor(Q)
    before = bits(kept)
    with first:
        pass
    assert refused(first.keys, ValueError).code == "E-CLOSED"
    assert second.keys()
    merged.close()
    merged.close()
    assert bits(kept) == before
    for act in (second.keys, merged.keys, merged.metadata, lambda: part[:1], lambda: merged.get_tensor(Q),
                lambda: merged.open_shard(merged.files[0]), merged.__enter__, lambda: part[0:0]):  # fmt: skip
        assert refused(act, ValueError).code == "E-CLOSED"


@pytest.mark.parametrize("what", ["base", "adapter", "gone", "shorter"])
@pytest.mark.parametrize("name", [Q, "other.weight"])
def test_a_file_that_was_replaced_is_no_mixture(what: str, name: str, tmp_path: Path) -> None:
    """Also of the tensors that need not read it: nothing, for those."""
    setting = sharded(tmp_path)
    adapter = tmp_path / "a.lora.safetensors"
    loratool.save(one("lora", (260, 150), name=Q), adapter)
    with loratool.open_merged(setting.base, adapter) as merged:
        before = bits(merged.get_tensor(name))
        file = next(file for file in merged.files if name in merged.open_shard(file).keys())  # noqa: SIM118
        path = adapter if what == "adapter" else setting.base / file
        if what == "gone":
            path.unlink()
        elif what == "shorter":
            os.truncate(path, 200)
        else:  # the same file, to every byte but for its identity
            (tmp_path / "new").write_bytes(path.read_bytes())
            (tmp_path / "new").replace(path)
        for act in (lambda: merged.get_tensor(name), lambda: merged.get_slice(name)[1:3]):
            if what == "adapter" and name != Q:
                assert bits(merged.get_tensor(name)) == before
            else:
                assert refused(act).code == "E-CHANGED"


def test_what_a_merge_could_not_write_is_not_given_out(tmp_path: Path) -> None:
    save_sharded({"w": torch.full((2, 2), 60000.0).half()}, tmp_path / "base")
    update = replace(make_update("add", (2, 2), Maker(0)), value=TensorRef.of(torch.full((2, 2), 60000.0)))
    with loratool.open_merged(tmp_path / "base", Adapter((Targeted(Target("w", (2, 2)), update),))) as merged:
        assert refused(lambda: merged.get_tensor("w")).code == "E-NONFINITE"


def test_a_dtype_that_torch_lacks_can_be_listed_only(tmp_path: Path) -> None:
    header = {
        "w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [8, 11]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "base.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(11))
    with loratool.open_merged(tmp_path / "base.safetensors", one("add", (2, 2), name="w")) as merged:
        part = merged.get_slice("x")
        assert (part.get_dtype(), part.get_shape()) == ("F6_E2M3", [4])
        assert refused(lambda: merged.get_tensor("x")).code == "E-TENSOR"
        assert refused(lambda: part[0]).code == "E-TENSOR"


# --- with transformers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ and merged/ of a Llama."""
    folder = tmp_path_factory.mktemp("llama")
    model = llama(layers=2)
    fill(model, 1)
    model.bfloat16().save_pretrained(folder / "base", max_shard_size="8KB")
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]))
    fill(adapted, 2)
    adapted.save_pretrained(folder / "adapter")
    loratool.merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


def test_transformers_loads_a_model_that_was_never_written(trained: Path) -> None:
    """The example, and its weights against those of the merged folder."""
    arguments = [trained / name for name in ("base", "adapter", "saved")]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "load_merged.py", *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(trained / "merged", dtype="auto").state_dict()
    found = AutoModelForCausalLM.from_pretrained(trained / "saved", dtype="auto").state_dict()
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in wanted.items()}


RANK = """
import os, sys
import torch.distributed as dist, transformers
from safetensors.torch import save_file
from transformers.distributed import DistributedConfig
import loratool
from loratool.ondemand import Engine
base, adapter, meet, out = sys.argv[1:]
dist.init_process_group("gloo", init_method=meet, rank=int(os.environ["RANK"]), world_size=2)
asked, read = {}, Engine.read
def noting(engine, entry, bounds):
    found = read(engine, entry, bounds)
    asked[entry.name] = asked.get(entry.name, 0) + found.numel()
    return found
Engine.read = noting
config = transformers.AutoConfig.from_pretrained(base)
with loratool.open_merged(base, adapter, threads=1) as merged:
    slices = {name: merged.get_slice(name) for name in merged.keys()}
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=slices, dtype=config.dtype, distributed_config=DistributedConfig(tp_plan="auto")
    )
mine = {}
for name, parameter in model.named_parameters():
    mine[name] = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach().contiguous()
assert asked == {name: tensor.numel() for name, tensor in mine.items()}, "more was computed than this rank holds"
save_file(mine, out)
dist.destroy_process_group()
"""


def test_two_ranks_load_their_halves(trained: Path, tmp_path: Path) -> None:
    """transformers' tensor parallelism: rows of the first layers of each pair, columns of the second ones."""
    paths = [tmp_path / f"rank{rank}.safetensors" for rank in range(2)]
    here = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    arguments = [sys.executable, "-c", RANK, trained / "base", trained / "adapter", f"file://{tmp_path / 'meet'}"]
    ranks = [
        subprocess.Popen(
            [*arguments, path], stderr=subprocess.PIPE, text=True, env={**here, "RANK": f"{n}", "LOCAL_RANK": f"{n}"}
        )
        for n, path in enumerate(paths)
    ]
    said = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "".join(said)
    first, second = map(load_file, paths)
    whole = {n: t for file in sorted((trained / "merged").glob("*.safetensors")) for n, t in load_file(file).items()}
    assert first.keys() == second.keys() == whole.keys()
    cuts = set()
    for name, wanted in whole.items():
        if first[name].shape == wanted.shape:
            assert bits(first[name]) == bits(second[name]) == bits(wanted)
            continue
        cut = int(first[name].shape[0] == wanted.shape[0])
        cuts.add((name.split(".")[-2], cut))
        assert [bits(half) for half in wanted.chunk(2, cut)] == [bits(first[name]), bits(second[name])], name
    assert {("q_proj", 0), ("up_proj", 0), ("o_proj", 1), ("down_proj", 1)} <= cuts
