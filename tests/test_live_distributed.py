"""Live models whose parameters lie in pieces on two processes: the pieces of a merge, without gathering.

Both processes are real, and talk over gloo. What one of them finds wrong, it raises; the other one then fails too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import FORMS, Maker, make_update, save_sharded, tensors_of
from torch import Tensor, distributed, nn

import loratool
from loratool import Adapter, BaseIdentity, LoratoolError, Target, Targeted, TensorIdentity, TensorRef
from loratool.updates import Add, Scaling

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RANKS = 2
SHAPE = (24, 16)


def on_two(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run a function on two processes of one group."""
    torch.multiprocessing.spawn(entered, (work, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]


def entered(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS)
    try:
        work(rank, folder)
        distributed.barrier()  # neither leaves while the other one still talks to it
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may be left, which abort a process that ends by itself


def raw(value: Tensor) -> bytes:
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def local(parameter: Any) -> Tensor:
    value: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return value.detach()


def is_merge(model: nn.Module, merged: Path) -> None:
    """Every piece has the bits of its place in a merged checkpoint."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = tensors_of(merged)
    for name, parameter in model.named_parameters():
        value = whole[name]
        if isinstance(parameter, DTensor):
            value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        assert raw(value) == raw(local(parameter)), name


def prepared(folder: Path, state: dict[str, Tensor], adapters: dict[str, Adapter]) -> None:
    """A base, adapters, and what a reproducible merge makes of them: of each, and of all together."""
    base = save_sharded(state, folder / "base")
    for name, adapter in adapters.items():
        loratool.save(adapter, folder / f"{name}.safetensors")
        loratool.merge(base, adapter, folder / f"merged-{name}", reproducible=True)
    loratool.merge(base, [*adapters.values()], folder / "merged-all", reproducible=True)


def story(model: nn.Module, folder: Path, **options: Any) -> None:
    """Apply both adapters, take the first out, swap, take all out."""
    loratool.apply(model, folder / "a.safetensors", **options).remove()
    is_merge(model, folder / "base")
    first = loratool.apply(model, folder / "a.safetensors", **options)
    is_merge(model, folder / "merged-a")
    second = loratool.apply(model, folder / "b.safetensors", **options)
    is_merge(model, folder / "merged-all")
    first.remove()
    is_merge(model, folder / "merged-b")
    second.swap(folder / "a.safetensors")
    is_merge(model, folder / "merged-a")
    second.remove()
    is_merge(model, folder / "base")


# --- real wrappers --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Sizes that two processes do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(25, 16)
        self.up = nn.Linear(16, 33)
        self.down = nn.Linear(33, 16)
        self.wide = nn.Linear(300, 201, bias=False)  # large enough to show how it was rounded

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.up(self.embed(tokens)))
        return hidden


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers().bfloat16()


def two_adapters(forms: dict[str, str]) -> dict[str, Adapter]:
    shapes = {name: tuple(value.shape) for name, value in layers().state_dict().items()}
    make, adapters = Maker(5), {}
    for key in "ab":
        items = []
        for name, form in forms.items():
            form = "lora" if key == "b" and form != "replace_rows" and len(shapes[name]) > 1 else form
            if key == "a" or form == "lora":
                items.append(Targeted(Target(name, shapes[name]), make_update(form, shapes[name], make, rank=16)))
        adapters[key] = Adapter(tuple(items))
    return adapters


def fully_sharded(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = layers()
    for module in (model.up, model):
        fully_shard(module, reshard_after_forward=False)
    for undo in ("compressed", folder / "base"):
        story(model, folder, undo=undo)
    tokens = torch.arange(25)
    with torch.no_grad():
        before = model(tokens)  # what it gathers stays, in the root
        with loratool.apply(model, folder / "a.safetensors", undo="copy"):
            other = layers()
            other.load_state_dict(tensors_of(folder / "merged-a"))
            model.reshard()  # type: ignore[attr-defined]  # it is the shards that must have changed
            assert raw(model(tokens)) == raw(other(tokens)) != raw(before)
        assert raw(model(tokens)) == raw(before)
    model.reshard()  # type: ignore[attr-defined]
    is_merge(model, folder / "base")


def test_fully_shard(tmp_path: Path) -> None:
    forms = {
        "embed.weight": "replace_rows",
        "up.weight": "lora",
        "up.bias": "add",
        "down.weight": "dora0-lora",
        "wide.weight": "lora",
    }
    prepared(tmp_path, layers().state_dict(), two_adapters(forms) | {
        "b": Adapter(two_adapters({"up.weight": "lora", "embed.weight": "lora"})["b"].updates)
    })  # fmt: skip
    on_two(fully_sharded, tmp_path)


def tensor_parallel(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, mesh = layers(), init_device_mesh("cpu", (RANKS,))
    plan = {"embed": RowwiseParallel(), "up": ColwiseParallel(), "wide": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
    story(model, folder)
    story(model, folder, undo="copy")


def test_tensor_parallel(tmp_path: Path) -> None:
    forms = {
        "embed.weight": "replace_rows",
        "up.weight": "loha",
        "up.bias": "replace",
        "down.weight": "lora",
        "wide.weight": "lora",
    }
    prepared(tmp_path, layers().state_dict(), two_adapters(forms) | {
        "b": Adapter(two_adapters({"up.weight": "lora", "down.weight": "lora"})["b"].updates)
    })  # fmt: skip
    on_two(tensor_parallel, tmp_path)


# --- every kind, every placement -------------------------------------------------------------------------------------


def placed(state: dict[str, Tensor], mesh: Any, placements: Any) -> nn.Module:
    from torch.distributed.tensor import distribute_tensor

    model = nn.Module()
    for name, value in state.items():
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(value.clone(), mesh, placements))
        model.add_module(name.removesuffix(".weight"), module)
    return model


def one_kind(form: str) -> Adapter:
    return Adapter((Targeted(Target(f"{form}.weight", SHAPE), make_update(form, SHAPE, Maker(len(form)))),))


def apart(form: str, cut: int) -> bool:
    """Whether an update can not be cut along this dimension: it needs what other processes have."""
    update: Any = one_kind(form).updates[0].update
    norms = form.startswith("dora") and int(form[4]) != cut
    core = "mid" in form and cut == 1
    direction = getattr(update, "direction", update)
    second = (direction.w2 or (direction.B2, direction.A2)[cut]).shape[cut] if "lokr" in form else 1
    return norms or core or SHAPE[cut] // RANKS % second != 0


def kinds(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    line, grid = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (RANKS, 1))
    state = tensors_of(folder / "base")
    for mesh, placements in (
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Replicate()]),
    ):
        cut = next((p.dim for p in placements if isinstance(p, Shard)), None)
        for form in FORMS:
            name = f"{form}.weight"
            model = placed({name: state[name]}, mesh, placements)
            try:
                handle = loratool.apply(model, one_kind(form))
            except LoratoolError as error:
                refused = (error.code, name in error.message, "norm of each" in error.message)
            else:
                refused = None
                is_merge(model, folder / "merged" / form)
                handle.remove()
            norms = form.startswith("dora") and int(form[4]) != cut
            expected = ("E-UNSUPPORTED", True, norms) if cut is not None and apart(form, cut) else None
            assert refused == expected, form
            is_merge(model, folder / "base")


def test_every_kind_on_every_placement(tmp_path: Path) -> None:
    make = Maker(1)
    state = {f"{form}.weight": make.values(*SHAPE, dtype=torch.bfloat16) for form in FORMS}
    base = save_sharded(state, tmp_path / "base")
    (tmp_path / "merged").mkdir()
    for form in FORMS:
        loratool.merge(base, one_kind(form), tmp_path / "merged" / form, reproducible=True)
    on_two(kinds, tmp_path)


def experts(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    state, mesh = tensors_of(folder / "base"), init_device_mesh("cpu", (RANKS,))
    for dim in range(3):
        for undo in ("compressed", folder / "base"):
            story(placed(state, mesh, [Shard(dim)]), folder, undo=undo)


def test_experts(tmp_path: Path) -> None:
    """All experts at once, single ones, and a range of rows of them: five, on two processes."""
    shape, make = (5, 6, 8), Maker(2)
    state = {f"{n}.weight": make.values(*shape, dtype=torch.bfloat16) for n in ("all", "some", "rows")}
    every = Maker(3, experts=5)
    a = [Targeted(Target("all.weight", shape, experts=5), make_update("lora", shape[1:], every))]
    a += [Targeted(Target("some.weight", shape, expert=n), make_update("lora", shape[1:], make)) for n in (0, 4)]
    a += [Targeted(Target("rows.weight", shape, (2, 5), experts=5), make_update("lora", (3, 8), every))]
    b = [Targeted(Target("all.weight", shape, expert=1), make_update("lora", shape[1:], make))]
    prepared(tmp_path, state, {"a": Adapter(tuple(a)), "b": Adapter(tuple(b))})
    on_two(experts, tmp_path)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def one_fails(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = placed(tensors_of(folder / "base"), mesh, [Shard(0)])
    with pytest.raises(LoratoolError) as refused:
        loratool.apply(model, folder / "a.safetensors")
    assert refused.value.code == ("E-NONFINITE" if rank == 1 else "E-INTERRUPTED")
    is_merge(model, folder / "base")
    with loratool.apply(model, folder / "a.safetensors", weight=0.5):  # no process waits for another one
        pass
    is_merge(model, folder / "base")
    here = folder / "a.safetensors" if rank == 0 else folder / "none.safetensors"
    with pytest.raises(LoratoolError) as refused:
        loratool.apply(model, here)
    assert refused.value.code == ("E-MISSING" if rank == 1 else "E-INTERRUPTED")
    is_merge(model, folder / "base")


def test_what_one_process_refuses_happens_on_none(tmp_path: Path) -> None:
    value = torch.zeros(SHAPE)
    value[20] = 7e4
    adapter = Adapter((Targeted(Target("w.weight", SHAPE), Add(TensorRef.of(value), Scaling())),))
    save_sharded({"w.weight": torch.ones(SHAPE, dtype=torch.float16)}, tmp_path / "base")
    loratool.save(adapter, tmp_path / "a.safetensors")
    on_two(one_fails, tmp_path)


def pinned(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = placed(tensors_of(folder / "base"), mesh, [Shard(1)])
    with pytest.raises(LoratoolError) as refused:
        loratool.apply(model, folder / "a.safetensors")
    assert (refused.value.code, "check_base=False" in refused.value.hint) == ("E-BASE-MISMATCH", True)
    story(model, folder, check_base=False)
    loratool.apply(model, folder / "a.safetensors", undo=folder / "base").remove()
    with pytest.raises(LoratoolError) as refused:  # the file is the adapter's base, and the model another one
        loratool.apply(placed(tensors_of(folder / "other"), mesh, [Shard(1)]), folder / "a.safetensors",
                       undo=folder / "base")  # fmt: skip
    assert refused.value.code == "E-BASE-MISMATCH"
    with pytest.raises(LoratoolError) as refused:
        loratool.apply(placed(tensors_of(folder / "other"), mesh, [Shard(1)]), folder / "a.safetensors",
                       undo=folder / "other")  # fmt: skip
    assert refused.value.code == "E-BASE-MISMATCH"


def test_a_base_is_checked_where_it_can_be(tmp_path: Path) -> None:
    state = {"w.weight": torch.ones(SHAPE, dtype=torch.bfloat16)}
    ref = TensorRef.of(state["w.weight"])
    identity = BaseIdentity("", {"w.weight": TensorIdentity(ref.digest(), ref.dtype, ref.shape)})
    a, b = (Adapter((Targeted(Target("w.weight", SHAPE), make_update("lora", SHAPE, Maker(n))),)) for n in (1, 2))
    prepared(tmp_path, state, {"a": replace(a, base=identity), "b": b})
    save_sharded({"w.weight": torch.full(SHAPE, 2.0, dtype=torch.bfloat16)}, tmp_path / "other")
    on_two(pinned, tmp_path)
