"""Folders of torch.distributed.checkpoint, as torch itself writes them: read in pieces, and never believed."""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import Cli, Kit, tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import State, one, raw, same_bits, save_sharded, small_blocks, tensors_of
from torch import Tensor, distributed

import loratool
from loratool import distcp, pieces
from loratool.checkpoint import open_checkpoint
from loratool.errors import InvalidFile, LoratoolError
from loratool.remote import lies_in_files

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

RANKS = 2
Box = tuple[tuple[int, int], ...]  # offsets and sizes by dimension: (offset, size)


class Cut(Tensor):
    """A tensor that torch saves in the pieces that it is told, as it does DTensors: by torch's own protocol."""

    boxes: Sequence[Box]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self)
        items = []
        for box in self.boxes:
            offsets, sizes = torch.Size(start for start, _ in box), torch.Size(size for _, size in box)
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, self.size())
            items.append(WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        box = next(box for box in self.boxes if tuple(start for start, _ in box) == index.offset)
        part = self.as_subclass(Tensor)[tuple(slice(start, start + size) for start, size in box)]
        return part.clone()


def cut(value: Tensor, boxes: Sequence[Box]) -> Cut:
    found = value.as_subclass(Cut)
    found.boxes = boxes
    return found


def saved(state: object, folder: Path, **writer: Any) -> Path:
    """A folder as one process writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist does not silence it
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **writer), no_dist=True)  # type: ignore[arg-type]
    return folder


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def halves(value: Tensor, dim: int) -> Cut:
    """A tensor in two pieces."""
    half = value.shape[dim] // 2
    whole = [(0, size) for size in value.shape]
    cuts = [(0, half), (half, value.shape[dim] - half)]
    return cut(value, [(*whole[:dim], part, *whole[dim + 1 :]) for part in cuts])


def read(folder: Path) -> State:
    return {name: ref.read() for name, ref in open_checkpoint(folder).tensors.items()}


STATE = {
    "l.0.q.weight": numbers(6, 4),
    "l.0.v.weight": numbers(3, 4, dtype=torch.bfloat16, seed=1),
    "norm.weight": numbers(4, seed=2),
    "half.weight": numbers(2, 3, dtype=torch.float16, seed=3),
    "fp8.weight": numbers(3, 5, seed=4).to(torch.float8_e4m3fn),
    "ids": torch.arange(7),
    "flag": torch.tensor(True),
    "none": torch.zeros(0, 4),
}


# --- what torch writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "writer",
    [
        {},
        {"single_file_per_rank": False},
        {"single_file_per_rank": False, "thread_count": 2},
        {"thread_count": 2},
        {"serialization_format": SerializationFormat.SAFETENSORS},
    ],
    ids=str,
)
@pytest.mark.parametrize("keys", [(), ("model",), ("state_dict",), ("app", "model")], ids=".".join)
def test_every_way_of_writing_is_read(writer: dict[str, Any], keys: tuple[str, ...], tmp_path: Path) -> None:
    state: Any = dict(STATE)
    for key in reversed(keys):
        state = {key: state}
    assert same_bits(read(saved(state, tmp_path / "saved", **writer)), STATE)


def test_tensors_that_lie_in_another_order(tmp_path: Path) -> None:
    value = numbers(6, 4)
    image = numbers(4, 3, 5, 2).to(memory_format=torch.channels_last)
    state = {"t": value.T, "image": image, "slice": value[2:4, 1:3], "wide": value[:1].expand(5, 4)}
    got = read(saved(state, tmp_path / "saved"))
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert b"".join(map(bytes, open_checkpoint(tmp_path / "saved").tensors["image"].chunks())) == raw(image)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it: cut in two again and again, anywhere."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    boxes: list[Box] = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        start, size = box[dim]
        first = draw(st.integers(0, size))
        boxes += [
            (*box[:dim], part, *box[dim + 1 :]) for part in ((start, first), (start + first, size - first)) if part[1]
        ]
    return shape, boxes


@given(tiling=tilings(), data=st.data())
def test_any_tiling_is_read_in_any_part(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, boxes = tiling
    value = torch.arange(math.prod(shape)).reshape(shape).float()
    ref = open_checkpoint(saved({"w": cut(value, boxes)}, tmp_path_factory.mktemp("saved"))).tensors["w"]
    assert (ref.dtype, ref.shape) == ("F32", shape)
    assert torch.equal(ref.read(), value)
    assert b"".join(map(bytes, ref.chunks())) == raw(value)
    start = data.draw(st.integers(0, shape[0]))
    count = data.draw(st.integers(0, shape[0] - start))
    part = ref.narrow(0, start, count)
    assert torch.equal(part.read(), value[start : start + count])
    assert torch.equal(part.reshape(part.numel).read(), value[start : start + count].reshape(-1))
    columns = shape[-1]
    low = data.draw(st.integers(0, value.numel() // columns - 1))
    if len(boxes) > 1:
        assert isinstance(ref.data, pieces.Pieces)
        assert torch.equal(ref.data.rows(low, low + 1, columns), value.reshape(-1, columns)[low : low + 1])
    if len(boxes) > 1 and len(shape) > 1 and count:
        assert isinstance(part.data, pieces.Pieces)
        assert torch.equal(part.data.rows(0, 1, columns), value[start:].reshape(-1, columns)[:1])


# --- several processes -----------------------------------------------------------------------------------------------

SHARDED = {
    "l.0.q.weight": numbers(33, 20, dtype=torch.bfloat16),
    "l.1.q.weight": numbers(20, 33),
    "l.0.bias": numbers(33),
    "norm.weight": numbers(1, seed=5),
    "step_size": numbers(3, seed=6),
}


def of_rank(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        places = {"l.0.q.weight": Shard(0), "l.1.q.weight": Shard(1), "l.0.bias": Replicate(), "norm.weight": Shard(0)}
        state: dict[str, Any] = dict(SHARDED)
        state |= {name: distribute_tensor(SHARDED[name], mesh, [place]) for name, place in places.items()}
        moments = {name: {"exp_avg": value} for name, value in state.items()}
        optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
        whole = {"model": state, "optimizer": optimizer, "step": torch.tensor(7), "config": {"name": "x"}}
        dcp.save(whole, checkpoint_id=folder / "sharded")
        torch.save(state, folder / f"model_world_size_{RANKS}_rank_{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may be left, which abort a process that ends by itself


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes save together, and what each of them saves alone."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(of_rank, (folder,), nprocs=RANKS)  # type: ignore[no-untyped-call]
    (folder / "sharded" / "config.json").write_text('{"tie_word_embeddings": false}')
    (folder / "sharded" / "tokenizer.json").write_text("{}")
    save_sharded(SHARDED, folder / "plain")
    (folder / "plain" / "config.json").write_text('{"tie_word_embeddings": false}')
    return folder


def adapter() -> loratool.Adapter:
    first = one("lora", (33, 20), name="l.0.q.weight")
    return loratool.Adapter((*first.updates, *one("dora0-lora", (20, 33), name="l.1.q.weight").updates))


def test_what_several_processes_saved_is_read_as_a_whole(sharded: Path, cli: Cli) -> None:
    opened = open_checkpoint(sharded / "sharded")
    assert same_bits({name: ref.read() for name, ref in opened.tensors.items()}, SHARDED)
    assert isinstance(opened.tensors["l.0.q.weight"].data, pieces.Pieces)
    assert isinstance(opened.tensors["l.1.q.weight"].data, pieces.Pieces)
    said = cli("inspect", sharded / "sharded").out
    assert "optimizer (5), step (1)" in said
    assert "optimizer" in said
    assert "config" in said


def test_a_merge_is_that_of_the_same_base_as_safetensors(sharded: Path, tmp_path: Path) -> None:
    with small_blocks(512):
        for name in ("sharded", "plain"):
            loratool.merge(sharded / name, adapter(), tmp_path / name, reproducible=True)
    merged = load_file(tmp_path / "sharded" / "model.safetensors")
    assert same_bits(merged, load_file(tmp_path / "plain" / "model.safetensors"))
    assert not same_bits(merged, SHARDED)
    assert {path.name for path in (tmp_path / "sharded").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "loratool_receipt.json"
    }  # fmt: skip


def test_every_verb_takes_it_as_a_base(sharded: Path, tmp_path: Path, cli: Cli) -> None:
    base, out = sharded / "sharded", tmp_path / "out"
    loratool.save(adapter(), tmp_path / "a.lora.safetensors")
    assert cli("inspect", tmp_path / "a.lora.safetensors", "--base", base).code == 0
    assert cli("merge", base, tmp_path / "a.lora.safetensors", "-o", out, "--undo", tmp_path / "undo").code == 0
    assert cli("verify", out, tmp_path / "a.lora.safetensors", "--base", base).code == 0
    assert cli("verify", out, "--base", base).code == 2  # of which adapters is asked first
    assert cli("unmerge", out, tmp_path / "a.lora.safetensors", "--base", base, "-o", tmp_path / "back").code == 0
    assert same_bits(tensors_of(tmp_path / "back"), SHARDED)
    pinned = tmp_path / "p.lora.safetensors"
    assert cli("pin", tmp_path / "a.lora.safetensors", "--base", base, "-o", pinned).code == 0
    assert cli("merge", sharded / "plain", pinned, "-o", tmp_path / "also", "--require-pinned").code == 0
    with loratool.open_merged(base, adapter()) as virtual:
        for name, value in tensors_of(out).items():
            assert torch.equal(virtual.get_tensor(name), value)
            assert torch.equal(virtual.get_slice(name)[1:], value[1:]) if len(value) > 1 else True


def test_other_processes_read_the_pieces_themselves(sharded: Path, tmp_path: Path) -> None:
    assert all(map(lies_in_files, open_checkpoint(sharded / "sharded").tensors.values()))
    loratool.merge(sharded / "sharded", adapter(), tmp_path / "here")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        loratool.merge(sharded / "sharded", adapter(), tmp_path / "there", executor=pool)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_files_of_single_ranks_say_what_to_do(sharded: Path, cli: Cli) -> None:
    (sharded / "alone").mkdir(exist_ok=True)
    name = f"model_world_size_{RANKS}_rank_0.pt"
    for path in (sharded / name, sharded):
        said = cli("inspect", path)
        assert said.code == 2
        assert "full_state_dict=True" in said.err
        assert "verl.model_merger merge" in said.err
    assert "spread over ranks" in cli("inspect", sharded / name).err


def test_pieces_in_safetensors_are_not_taken_for_whole_tensors(tmp_path: Path, cli: Cli) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "saved"), save_distributed=True)
        dcp.save({"w": numbers(6, 4)}, storage_writer=writer, no_dist=True)
    name = "shard-00001-model-00001-of-00001.safetensors"
    for _ in range(2):
        for path in (tmp_path / "saved", tmp_path / "saved" / name):
            said = cli("inspect", path)
            assert said.code == 2
            assert "one rank's pieces" in said.err
            assert "enable_consolidation=True" in said.err
        (tmp_path / "saved" / name.replace("1", "2", 1)).write_bytes((tmp_path / "saved" / name).read_bytes())


# --- a base, an adapter, a wrapped checkpoint ------------------------------------------------------------------------


def pieces_of(state: State) -> dict[str, object]:
    return {name: halves(value, value.dim() - 1) if value.numel() > 1 else value for name, value in state.items()}


def test_an_adapter_in_pieces_is_merged_as_from_one_file(kit: Kit, cli: Cli) -> None:
    state = load_file(kit / "adapter" / "adapter_model.safetensors")
    saved({"model": pieces_of(state)}, kit / "run" / "pytorch_model_fsdp_0")
    place = kit / "run" / "pytorch_model_fsdp_0"
    assert str(place) in cli("inspect", kit / "run").err
    asked = cli("merge", kit / "base", place, "-o", kit / "out")
    assert asked.code == 2
    assert "--alpha" in asked.err
    assert "--config" in asked.err
    config = ("--config", kit / "adapter" / "adapter_config.json")
    assert cli("merge", kit / "base", place, "-o", kit / "out", *config).code == 0
    assert same_bits(tensors_of(kit / "out"), tensors_of(kit / "merged"))
    for name in ("adapter_config.json",):
        (place / name).write_bytes((kit / "adapter" / name).read_bytes())
    assert same_bits(
        {u.target.name: u.update.components()["A"].read() for u in loratool.load(place).updates},
        {u.target.name: u.update.components()["A"].read() for u in loratool.load(kit / "adapter").updates},
    )


def test_an_adapter_is_extracted_from_a_wrapped_one(kit: Kit, cli: Cli) -> None:
    wrapped = torch.load(kit / "peft.pth")
    saved({"model": pieces_of(wrapped)}, kit / "wrapped")
    config = ("--config", kit / "adapter" / "adapter_config.json")
    for source, out in ((kit / "wrapped", "pieces"), (kit / "peft.pth", "whole")):
        result = cli("extract", source, "-o", kit / f"{out}.lora.safetensors", "--base-out", kit / out, *config)
        assert result.code == 0, result.err
    assert (kit / "pieces.lora.safetensors").read_bytes() == (kit / "whole.lora.safetensors").read_bytes()
    assert same_bits(load_file(kit / "pieces" / "model.safetensors"), tensors_of(kit / "whole"))


@pytest.mark.parametrize("prefix", ["module.", "_fsdp_wrapped_module.", "_orig_mod."])
def test_what_wrappers_leave_in_names_is_taken_off(prefix: str, tmp_path: Path) -> None:
    saved({"model": {prefix + name: value for name, value in STATE.items()}}, tmp_path / "saved")
    assert read(tmp_path / "saved").keys() == STATE.keys()


def test_an_output_beyond_the_size_of_a_file_has_an_index(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distcp, "SHARD", 2000)
    loratool.merge(sharded / "sharded", adapter(), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in SHARDED.values())
    monkeypatch.undo()
    loratool.merge(sharded / "sharded", adapter(), tmp_path / "one")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "one"))


def test_what_would_have_several_files_is_one_by_its_name(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distcp, "SHARD", 2000)
    loratool.merge(sharded / "sharded" / ".metadata", adapter(), tmp_path / "out.safetensors")
    loratool.merge(sharded / "sharded", adapter(), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    want = {name: value for file in files for name, value in load_file(file).items()}
    got = load_file(tmp_path / "out.safetensors")
    assert len(files) == 3
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_no_more_than_a_block_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = numbers(2000, 600)
    saved({"w": halves(value, 1), "other": halves(value, 0)}, tmp_path / "base")
    sizes: list[int] = []
    original = pieces.read_exactly

    def watched(file: Any, buffer: memoryview, path: Path) -> None:
        sizes.append(len(buffer))
        original(file, buffer, path)

    monkeypatch.setattr(pieces, "read_exactly", watched)
    loratool.merge(tmp_path / "base", one("lora", (2000, 600), name="w"), tmp_path / "out")
    assert 2 * value.nbytes == sum(sizes)  # each byte once
    assert max(sizes) <= 1 << 20 < value.nbytes // 4
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["other"], value)


def test_what_is_not_in_the_output_is_named(kit: Kit, cli: Cli) -> None:
    state = load_file(kit / "base" / "model.safetensors")
    saved({"model": state, "optimizer": {"m": {"q": numbers(2)}}, "step": 3}, kit / "place")
    torch.save({"a": 1}, kit / "place" / "meta.pt")  # Lightning's
    saved({"optimizer": state}, kit / "place" / "optimizer_0")
    said = cli("merge", kit / "place", kit / "adapter", "-o", kit / "out").out
    for words in ("optimizer (1)", "no tensors are left out: step", "meta.pt", "__0_0.distcp", "no config.json"):
        assert words in said, words
    assert sorted(path.name for path in (kit / "out").iterdir()) == ["loratool_receipt.json", "model.safetensors"]
    linked = cli("merge", kit / "place", kit / "adapter", "-o", kit / "linked", "--link")
    assert (linked.code, "leave out --link" in linked.err) == (2, True)
    one_file = cli("merge", kit / "place", kit / "adapter", "-o", kit / "x.safetensors")
    assert (one_file.code, one_file.err) == (0, "")
    assert load_file(kit / "x.safetensors").keys() == state.keys()


# --- which state dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": {"w": numbers(3)}, "module": {"w": numbers(3)}}, ["E-AMBIGUOUS", "model, module"]),
        ({"model": {"w": numbers(3)}, "w": numbers(3)}, ["E-AMBIGUOUS", "the top level"]),
        ({"encoder": {"w": numbers(3)}}, ["E-EMPTY", "its keys are encoder"]),
        ({"optimizer": {"model": {"w": numbers(3)}}, "step": 3}, ["E-EMPTY", "its keys are optimizer, step"]),
    ],
)
def test_what_is_no_single_state_dict_is_refused(
    state: dict[str, Any], words: list[str], tmp_path: Path, cli: Cli
) -> None:
    said = cli("inspect", saved(state, tmp_path / "saved")).err
    assert all(word in said for word in words), said


def test_flat_names_beside_an_optimizer_are_torchtitans(tmp_path: Path) -> None:
    optimizer = {"state.l.0.q.weight.exp_avg": numbers(6, 4), "param_groups.l.0.q.weight.lr": 0.1}
    saved({**STATE, "optimizer": optimizer, "train_state": {"step": torch.tensor(3)}}, tmp_path / "saved")
    assert same_bits(read(tmp_path / "saved"), STATE)


def test_another_checkpoint_in_the_same_folder_is_a_question(kit: Kit, cli: Cli) -> None:
    saved({"model": load_file(kit / "base" / "model.safetensors")}, kit / "base")
    said = cli("inspect", kit / "base")
    assert said.code == 2
    for name in (".metadata", "model.safetensors"):
        assert str(kit / "base" / name) in said.err
        assert cli("inspect", kit / "base" / name).code == 0
        assert cli("merge", kit / "base" / name, kit / "adapter", "-o", kit / f"{name}.out.safetensors").code == 0
    one, other = (load_file(kit / f"{name}.out.safetensors") for name in (".metadata", "model.safetensors"))
    assert same_bits(one, other)


# --- not believed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return saved({"w": halves(numbers(6, 4), 0), "b": numbers(5), "v": halves(numbers(4, 4), 1)}, tmp_path / "saved")


def rewrite(folder: Path, change: Callable[[Metadata], object]) -> None:
    """The metadata with a change; storage info is keyed by (name, offset)."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def info(metadata: Metadata, name: str = "b", place: int = 0) -> Any:
    return [value for key, value in metadata.storage_data.items() if key.fqn == name][place]


def entry(metadata: Metadata, name: str = "w") -> Any:
    return metadata.state_dict_metadata[name]


def stored(metadata: Metadata, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(info(metadata), name, value)


def shift(metadata: Metadata, offsets: Sequence[int]) -> None:
    """The second piece of `w`, which begins at [3, 0], at another place."""
    entry(metadata).chunks[1].offsets = torch.Size(offsets)
    data = metadata.storage_data
    key = [key for key in data if key.fqn == "w"][1]
    data[MetadataIndex("w", offsets)] = data.pop(key)


def resized(metadata: Metadata, size: Sequence[int]) -> None:
    one_tensor = entry(metadata, "b")
    one_tensor.size = one_tensor.chunks[0].sizes = torch.Size(size)


BROKEN: dict[str, tuple[Callable[[Metadata], object], str, str]] = {
    "above": (lambda m: stored(m, relative_path="../../x"), "E-INDEX", "outside of the folder"),
    "absolute": (lambda m: stored(m, relative_path="/etc/passwd"), "E-INDEX", "outside of the folder"),
    "dots": (lambda m: stored(m, relative_path=".."), "E-INDEX", "outside of the folder"),
    "no path": (lambda m: stored(m, relative_path=3), "E-INDEX", "outside of the folder"),
    "missing": (lambda m: stored(m, relative_path="__9_0.distcp"), "E-INDEX", "__9_0.distcp is missing"),
    "negative": (lambda m: stored(m, offset=-1), "E-LAYOUT", "said to be at -1"),
    "no offset": (lambda m: stored(m, offset="0"), "E-LAYOUT", "said to be at"),
    "behind": (lambda m: stored(m, offset=10**6), "E-LAYOUT", "of __0_0.distcp, which has"),
    "huge": (lambda m: stored(m, length=2**60), "E-LAYOUT", "said to be at"),
    "long": (lambda m: stored(m, length=2**50), "E-LAYOUT", "of __0_0.distcp, which has"),
    "short": (lambda m: stored(m, length=8), "E-TENSOR", "needs 20 bytes"),
    "elsewhere": (lambda m: stored(m, offset=info(m, "v").offset, length=info(m, "v").length), "E-TENSOR", "[4, 2]"),
    "not at a beginning": (lambda m: stored(m, offset=7, length=700), "E-PICKLE", "not a readable checkpoint"),
    "transformed": (lambda m: stored(m, transform_descriptors=["stream.zstd"]), "E-UNSUPPORTED", "stream.zstd"),
    "2**60 elements": (lambda m: resized(m, [2**60]), "E-TENSOR", "incomplete"),
    "2**50 elements": (lambda m: resized(m, [2**50]), "E-TENSOR", "needs 4,503,599,627,370,496 bytes"),
    "two of 2**40": (lambda m: resized(m, [2**40, 2**40]), "E-TENSOR", "dimensions"),
    "other dtype": (lambda m: setattr(entry(m, "b").properties, "dtype", torch.int32), "E-TENSOR", "F32 [5]"),
    "unknown dtype": (lambda m: setattr(entry(m, "b").properties, "dtype", torch.complex128), "E-TENSOR", "complex128"),
    "sparse": (lambda m: setattr(entry(m, "b").properties, "layout", torch.sparse_coo), "E-TENSOR", "dense"),
    "other shape": (lambda m: resized(m, [4]), "E-TENSOR", "F32 [5]"),
    "overlap": (lambda m: shift(m, [2, 0]), "E-LAYOUT", "w: pieces overlap at [2, 0]"),
    "beyond": (lambda m: shift(m, [4, 0]), "E-LAYOUT", "reaches beyond its [6, 4]"),
    "hole": (lambda m: entry(m).chunks.pop(), "E-LAYOUT", "hold 12 of its 24 elements"),
    "no pieces": (lambda m: entry(m).chunks.clear(), "E-LAYOUT", "hold 0 of its 24 elements"),
    "larger": (lambda m: setattr(entry(m), "size", torch.Size([7, 4])), "E-LAYOUT", "hold 24 of its 28"),
    "no place": (lambda m: m.storage_data.pop(MetadataIndex("b", [0])), "E-INDEX", "no file is named"),
    "no places": (lambda m: setattr(m, "storage_data", None), "E-INDEX", "no file is named"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", [1]), "E-PICKLE", "lists no tensors"),
    "numbers for names": (lambda m: setattr(m, "state_dict_metadata", {1: entry(m)}), "E-PICKLE", "lists no tensors"),
    "chunks of another kind": (lambda m: entry(m).chunks.append(1), "E-TENSOR", "dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_contradictions_are_errors_that_name_them(name: str, good: Path, tmp_path: Path, cli: Cli) -> None:
    change, code, words = BROKEN[name]
    assert cli("inspect", good).code == 0
    rewrite(good, change)
    said = cli("inspect", good)
    assert (said.code, f"error[{code}]" in said.err, words in said.err) == (2, True, True), said.err
    before = tree(tmp_path)
    assert cli("merge", good, good, "-o", tmp_path / "out").code == 2
    assert tree(tmp_path) == before


def test_replicas_that_are_listed_twice_are_one(good: Path) -> None:
    rewrite(good, lambda m: entry(m, "b").chunks.append(entry(m, "b").chunks[0]))
    assert torch.equal(read(good)["b"], numbers(5))


def test_irregular_pieces_are_compared_up_to_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boxes: list[Box] = [((0, 2), (0, 3)), ((0, 1), (3, 1)), ((1, 1), (3, 1)), ((2, 1), (0, 2)), ((2, 1), (2, 2))]
    saved({"w": cut(numbers(3, 4), boxes)}, tmp_path / "saved")
    assert torch.equal(read(tmp_path / "saved")["w"], numbers(3, 4))
    monkeypatch.setattr(pieces, "IRREGULAR", 4)
    with pytest.raises(InvalidFile, match="5 pieces that are no grid"):
        read(tmp_path / "saved")


def test_all_problems_are_told_at_once(good: Path) -> None:
    rewrite(good, lambda m: (entry(m, "v").chunks.pop(), stored(m, relative_path="../x")))
    with pytest.raises(InvalidFile) as caught:
        open_checkpoint(good)
    assert {problem.code for problem in caught.value.problems} == {"E-LAYOUT", "E-INDEX"}


class Runs:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.parts = (call, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.parts


@pytest.mark.parametrize("place", ["whole", "planner", "storage", "item"])
def test_nothing_is_run(place: str, good: Path, tmp_path: Path, cli: Cli) -> None:
    mark = tmp_path / "ran"
    bomb = Runs(os.system, f"touch {mark}")
    if place == "whole":
        (good / ".metadata").write_bytes(pickle.dumps(bomb))
    elif place == "planner":
        rewrite(good, lambda m: setattr(m, "planner_data", bomb))
    elif place == "storage":
        rewrite(good, lambda m: m.storage_data.update({bomb: 1}))
    else:
        item = tmp_path / "item.zip"
        with zipfile.ZipFile(item, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb, 2))
            archive.writestr("archive/data/0", bytes(200))
        (good / "evil.distcp").write_bytes(item.read_bytes())
        rewrite(good, lambda m: stored(m, relative_path="evil.distcp", offset=0, length=item.stat().st_size))
    said = cli("inspect", good)
    assert said.code == 2
    assert "error[E-PICKLE]" in said.err
    assert "system" in said.err
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps(3), pickle.dumps({"a": 1}), b"\x80\x02r\xff\xff\xff\x7f."])
def test_what_describes_no_checkpoint_is_refused(content: bytes, good: Path, cli: Cli) -> None:
    (good / ".metadata").write_bytes(content)
    said = cli("inspect", good)
    assert said.code == 2
    assert "error[E-PICKLE]" in said.err


def test_files_that_are_none(good: Path, cli: Cli) -> None:
    file = good / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "error[E-LAYOUT]" in cli("inspect", good).err
    file.unlink()
    os.mkfifo(file)
    assert "__0_0.distcp is missing" in cli("inspect", good).err
    (good / ".metadata").unlink()
    os.mkfifo(good / ".metadata")
    assert cli("inspect", good).code == 2


def test_a_file_that_changes_meanwhile_is_noticed(sharded: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in (sharded / "sharded").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    plan = loratool.plan(base, adapter(), tmp_path / "out")
    assert {state.path.name for state in plan.inputs} >= {f"__{rank}_0.distcp" for rank in range(RANKS)}
    os.utime(base / "__1_0.distcp", ns=(1, 1))
    changed = next(state for state in plan.inputs if state.path.name == "__1_0.distcp")
    with pytest.raises(InvalidFile, match="E-CHANGED"):
        changed.check()


def test_flipped_bits_are_errors_of_the_file_or_nothing(good: Path) -> None:
    random = Random(0)
    for path in (good / ".metadata", good / "__0_0.distcp"):
        content = path.read_bytes()
        codes = set()
        for _ in range(150):
            changed = bytearray(content)
            changed[random.randrange(len(changed))] = random.randrange(256)
            path.write_bytes(changed[: random.choice([None, None, None, random.randrange(len(changed))])])
            try:
                read(good)
            except LoratoolError as error:
                codes |= {problem.code for problem in error.problems}
        assert codes & {"E-PICKLE", "E-LAYOUT"}
        assert "E-READ" not in codes
        path.write_bytes(content)
