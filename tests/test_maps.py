"""Adapters and bases that name or pack the same weights differently, against PEFT's own merge and numpy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    HIDDEN,
    VOCAB,
    State,
    _quiet,
    assert_float32_close,
    assert_rounded,
    assert_same_bits,
    changed,
    edit_json,
    fill,
    gpt_oss,
    mixtral,
    own,
    read,
    save_base,
)
from peft_cases import peft
from safetensors.torch import save_file
from torch import nn

import loratool
from loratool.adapter import Adapter, Target, Targeted
from loratool.errors import InvalidFile, LoratoolError, Mismatch
from loratool.maps import View, led, shipped
from loratool.tensors import TensorRef
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, Scaling, Update

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
E, INNER = 4, 6
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 20,
    "moe_intermediate_size": INNER, "num_experts_per_tok": 2,
}  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


def qwen3(*, inner: int = INNER) -> nn.Module:
    t = _quiet()
    sizes = {**SIZES, "moe_intermediate_size": inner}
    config = t.Qwen3MoeConfig(**sizes, num_hidden_layers=2, num_key_value_heads=1, num_experts=E, head_dim=8)
    return t.Qwen3MoeForCausalLM(config)


def deepseek(version: str) -> nn.Module:
    t = _quiet()
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    routing = {"n_routed_experts": E, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    config = getattr(t, f"Deepseek{version}Config")(
        **SIZES, **latent, **routing, num_hidden_layers=2, num_key_value_heads=2
    )
    return getattr(t, f"Deepseek{version}ForCausalLM")(config)


def qwen2() -> nn.Module:
    t = _quiet()
    config = t.Qwen2MoeConfig(
        **SIZES, num_hidden_layers=1, num_key_value_heads=1, num_experts=E, shared_expert_intermediate_size=10
    )
    return t.Qwen2MoeForCausalLM(config)


def llama4() -> nn.Module:
    t = _quiet()
    sizes = {**SIZES, "intermediate_size": INNER, "num_experts_per_tok": 1}
    del sizes["moe_intermediate_size"]
    return t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **sizes, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=E, head_dim=8,
            intermediate_size_mlp=20, layer_types=["full_attention"], moe_layers=[0],
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "mixtral-square": lambda: mixtral(inner=HIDDEN),
    "mixtral-square-gate-up": lambda: mixtral(inner=HIDDEN // 2),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "deepseek-v2": lambda: deepseek("V2"),
    "deepseek-v3": lambda: deepseek("V3"),
    "gpt-oss": gpt_oss,
}


class Trained:
    """A PEFT adapter on a model as transformers has it in memory, the base as it is saved, and PEFT's merge of both."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype, **config: Any) -> None:
        torch.manual_seed(sum(map(ord, name)))
        model = MODELS[name]()
        fill(model, 1)
        model.to(dtype)
        self.base = save_base(model, folder / "base")
        self.memory = own(model.state_dict())
        library = peft()
        parameters = [*EXPERTS, "mlp.gate.weight"] if "mixtral" in name else EXPERTS
        given = {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj"], "target_parameters": parameters, **config}
        wrapped = library.get_peft_model(model, library.LoraConfig(**given))
        fill(wrapped, 2)
        self.adapter = folder / "adapter"
        wrapped.save_pretrained(self.adapter)
        exact = copy.deepcopy(wrapped).double().merge_and_unload()
        self.exact = read(save_base(exact, folder / "exact"))
        self.merged = read(save_base(wrapped.merge_and_unload(), folder / "merged"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    @cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> Trained:
        return Trained(name, tmp_path_factory.mktemp(name), dtype)

    return make


# --- PEFT's adapter into the saved checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_the_model_in_memory_merges_into_the_saved_checkpoint(
    name: str, dtype: torch.dtype, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    made = trained(name, dtype)
    plan = loratool.merge(made.base, made.adapter, tmp_path / "out", undo=tmp_path / "undo").plan
    got, base = read(tmp_path / "out"), read(made.base)
    assert changed(base, got) == changed(base, made.exact)
    split = [tensor for tensor in changed(base, got) if ".experts." in tensor]
    experts = 3 if name.startswith(("mixtral", "gpt")) else E
    layers = 2 if name == "qwen3" else 1
    assert len(split) == (2 * layers if name == "gpt-oss" else 3 * experts * layers)
    for tensor, exact in made.exact.items():
        assert_rounded(got[tensor], exact.double(), name=tensor)
        if dtype == torch.float32:
            assert_float32_close(got[tensor], made.merged[tensor], name=tensor)
    used = [note for note in plan.notes if "the map" in note]
    family = "mixtral" if "mixtral" in name else "qwen_moe"
    assert len(used) == (name != "gpt-oss")
    assert all(
        f"the map {family!r} led" in note and "'transformers' to the base's 'checkpoint'" in note for note in used
    )

    # and out again, with the base, with the record, and without either
    for option, proof in {"base": made.base, "undo": tmp_path / "undo"}.items():
        report = loratool.unmerge(tmp_path / "out", made.adapter, tmp_path / f"by-{option}", **{option: proof})
        assert report.exact
        assert_same_bits(read(tmp_path / f"by-{option}"), base)
    report = loratool.unmerge(tmp_path / "out", made.adapter, tmp_path / "near")
    for tensor, value in read(tmp_path / "near").items():
        assert (value.double() - base[tensor].double()).abs().max() <= report.bound or tensor not in split


# --- any layout into any other, against numpy ------------------------------------------------------------------------

FILES = sorted((Path(loratool.__file__).parent / "maps").glob("*.json"))
RULES: dict[str, dict[str, Any]] = {file.stem: json.loads(file.read_text()) for file in FILES}
DIMS = {"experts": 3, "inner": 6, "hidden": 8}
PATH = "model.layers.0."
PAIRS = [
    (family, one, two)
    for family, rules in RULES.items()
    for one in rules["layouts"]
    for two in rules["layouts"]
    if one != two
]

Arrays = Mapping[str, np.ndarray]


def numbers(rules: Mapping[str, Any], seed: int = 0, dims: Mapping[str, int] = DIMS) -> dict[str, np.ndarray]:
    """Random weights by the rules' names, [experts, out, in] or without experts."""
    generator = np.random.default_rng(seed)
    shapes = {weight: [dims[dim] for dim in axes] for weight, axes in rules["weights"].items()}
    return {
        weight: generator.normal(size=shape if weight == "router" else (dims["experts"], *shape))
        for weight, shape in shapes.items()
    }


def packed(rules: Mapping[str, Any], layout: str, weights: Arrays, path: str = PATH) -> dict[str, np.ndarray]:
    """The weights as a layout stores them: the rules, read a second time and in other words."""
    state = {}
    for ending, axes in rules["layouts"][layout].items():
        matrix = [axis for axis in axes if axis != "experts"]
        naming = next(
            axis for axis in matrix if all(part.strip() in weights for part in axis.replace("/", "+").split("+"))
        )
        names = [name.strip() for name in naming.replace("/", "+").split("+")]
        parts = [weights[name] for name in names]
        out = parts[0].ndim - len(matrix)  # the axis of the rows
        if "/" in naming:
            whole = np.stack(parts, out + 1).reshape(*parts[0].shape[:out], -1, *parts[0].shape[out + 1 :])
        else:
            whole = np.concatenate(parts, out)
        if matrix.index(naming) == 1:
            whole = whole.swapaxes(-1, -2)
        if "{expert}" in ending:
            state |= {path + ending.replace("{expert}", str(e)): part for e, part in enumerate(whole)}
        else:
            state[path + ending] = whole
    return state


def unpacked(rules: Mapping[str, Any], layout: str, state: Arrays) -> dict[str, np.ndarray]:
    """The opposite: where each number of the weights went, by packing their positions."""
    weights = numbers(rules)
    order, positions = 0, {}
    for name, value in weights.items():
        positions[name] = np.arange(order, order + value.size).reshape(value.shape)
        order += value.size
    flat = np.zeros(order)
    for name, where in packed(rules, layout, positions).items():
        flat[where] = state[name]
    return {name: flat[where] for name, where in positions.items()}


def save_arrays(state: Arrays, file: Path) -> Path:
    save_file({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}, file)
    return file


def ref(*shape: int, seed: int) -> TensorRef:
    return TensorRef.of(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def update(kind: str, shape: tuple[int, ...], lead: tuple[int, ...], seed: int) -> Update:
    """A random update of a matrix of this shape, of `lead` experts; of a bias, the one kind there is."""
    scaling, bare = Scaling.by("alpha/rank", 3, 2), Scaling("none", None, None, 0.7)
    if kind == "replace":
        return Replace(ref(*lead, *shape, seed=seed))
    if kind == "add" or len(shape) == 1:
        return Add(ref(*lead, *shape, seed=seed), bare)
    out, columns = shape
    if kind == "lora":
        return Lora(ref(*lead, 2, columns, seed=seed), ref(*lead, out, 2, seed=seed + 1), scaling)
    if kind == "loha":
        A1, A2 = (ref(*lead, 2, columns, seed=seed + n) for n in (2, 3))
        B1, B2 = (ref(*lead, out, 2, seed=seed + n) for n in (4, 5))
        return Loha(A1, B1, A2, B2, scaling)
    assert kind == "lokr"  # its second factor has as many rows (and columns) as each packed weight, or fewer
    return Lokr(bare, ref(*lead, out // 2, columns // 2, seed=seed), w2=ref(*lead, 2, 2, seed=seed + 7))


def adapter_of(state: Arrays, kind: str, rules: Mapping[str, Any], layout: str, only: str = "") -> Adapter:
    """An update of every tensor of a layout, of all experts where it stacks them."""
    items = []
    for seed, (name, value) in enumerate(sorted(state.items())):
        axes = next((a for e, a in rules["layouts"][layout].items() if name == PATH + e), [])
        experts = value.shape[0] if axes[:1] == ["experts"] else None
        lead = () if experts is None else (experts,)
        if only in name:
            changed_by = update(kind, value.shape[len(lead) :], lead, seed * 10)
            items.append(Targeted(Target(name, value.shape, experts=experts), changed_by))
    return Adapter(tuple(items))


def merged(base: Path, adapter: Adapter | Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    loratool.merge(base, adapter, out, **options)
    return {name: value.numpy() for name, value in read(out).items()}


def assert_equal_arrays(got: Arrays, want: Arrays) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def folder_of(state: Arrays, folder: Path) -> Path:
    folder.mkdir()
    save_arrays(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("family", "one", "two"), PAIRS)
@pytest.mark.parametrize("kind", ["lora", "loha", "add"])
def test_every_layout_into_every_other(family: str, one: str, two: str, kind: str, tmp_path: Path) -> None:
    rules = RULES[family]
    weights = numbers(rules)
    theirs, ours = packed(rules, one, weights), packed(rules, two, weights)
    adapter = adapter_of(theirs, kind, rules, one)
    # The truth: the adapter in its own layout, where no map is needed; then the weights put where the base has them.
    plain = merged(folder_of(theirs, tmp_path / "theirs"), adapter, tmp_path / "plain")
    assert not any(np.allclose(plain[name], theirs[name]) for name in theirs)
    base = folder_of(ours, tmp_path / "ours")
    got = merged(base, adapter, tmp_path / "out", undo=tmp_path / "undo")
    assert_equal_arrays(got, packed(rules, two, unpacked(rules, one, plain)))

    # the same adapter as a native file, and back with the record
    loratool.save(adapter, tmp_path / "a.lora.safetensors")
    again = merged(base, tmp_path / "a.lora.safetensors", tmp_path / "again")
    assert_equal_arrays(again, got)
    report = loratool.unmerge(tmp_path / "out", tmp_path / "a.lora.safetensors", tmp_path / "u", undo=tmp_path / "undo")
    assert report.exact
    assert_same_bits(read(tmp_path / "u"), read(base))


# --- one expert, some rows, other kinds ------------------------------------------------------------------------------


def led_arrays(items: list[Targeted], state: Arrays, tmp_path: Path) -> dict[str, np.ndarray]:
    return merged(folder_of(state, tmp_path / "base"), Adapter(tuple(items)), tmp_path / "out")


def np_of(ref: TensorRef | None) -> np.ndarray:
    assert ref is not None
    return ref.read().numpy()


@pytest.mark.parametrize(("family", "two"), [("qwen_moe", "checkpoint"), ("qwen_moe", "mlx"), ("gpt_oss", "mlx")])
def test_one_expert_of_a_stack(family: str, two: str, tmp_path: Path) -> None:
    rules = RULES[family]
    weights = numbers(rules)
    theirs = packed(rules, "transformers", weights)
    name = f"{PATH}mlp.experts.gate_up_proj"
    lora = update("lora", theirs[name].shape[1:], (), 3)
    assert isinstance(lora, Lora)
    target = Target(name, theirs[name].shape, expert=1)
    got = led_arrays([Targeted(target, lora)], packed(rules, two, weights), tmp_path)
    theirs[name][1] += 1.5 * np_of(lora.B) @ np_of(lora.A)
    assert_equal_arrays(got, packed(rules, two, unpacked(rules, "transformers", theirs)))


@pytest.mark.parametrize("two", ["checkpoint", "mlx"])
@pytest.mark.parametrize("rows", [(0, 6), (6, 12), (2, 5), (7, 9), (4, 9)], ids=str)
@pytest.mark.parametrize("kind", ["lora", "loha", "replace", "dora"])
def test_rows_of_packed_weights(kind: str, rows: tuple[int, int], two: str, tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    weights = numbers(rules)
    theirs = packed(rules, "transformers", weights)
    name = f"{PATH}mlp.experts.gate_up_proj"
    region = (rows[1] - rows[0], 8)
    change = update("lora" if kind == "dora" else kind, region, (3,), 1)
    if kind == "dora":
        change = Dora(change, TensorRef.of(ref(3, region[0], seed=5).read().abs() + 0.5), 0)
    adapter = Adapter((Targeted(Target(name, theirs[name].shape, rows, experts=3), change),))
    plain = merged(folder_of(theirs, tmp_path / "theirs"), adapter, tmp_path / "plain")
    got = merged(folder_of(packed(rules, two, weights), tmp_path / "ours"), adapter, tmp_path / "out")
    assert_equal_arrays(got, packed(rules, two, unpacked(rules, "transformers", plain)))
    touched = np.abs(plain[name] - theirs[name]).max(axis=(0, 2)) > 0
    assert touched.tolist() == [rows[0] <= row < rows[1] for row in range(12)]


@pytest.mark.parametrize("kind", ["lora", "dora", "dora-columns", "lokr", "replace"])
def test_one_matrix_of_one_expert_into_a_stack(kind: str, tmp_path: Path) -> None:
    rules = RULES["mixtral"]
    weights = numbers(rules)
    theirs = packed(rules, "checkpoint", weights)
    items = []
    for seed, name in enumerate(
        [f"{PATH}block_sparse_moe.experts.{e}.{w}.weight" for e, w in [(0, "w1"), (0, "w3"), (2, "w2")]]
    ):
        shape = theirs[name].shape
        change = update(kind if kind in ("lokr", "replace") else "lora", shape, (), seed * 10)
        if kind.startswith("dora"):
            axis = int(kind == "dora-columns")
            change = Dora(change, TensorRef.of(ref(shape[axis], seed=seed).read().abs() + 0.5), axis)
        items.append(Targeted(Target(name, shape), change))
    adapter = Adapter(tuple(items))
    plain = merged(folder_of(theirs, tmp_path / "theirs"), adapter, tmp_path / "plain")
    got = merged(folder_of(packed(rules, "transformers", weights), tmp_path / "ours"), adapter, tmp_path / "out")
    assert_equal_arrays(got, packed(rules, "transformers", unpacked(rules, "checkpoint", plain)))
    assert np.array_equal(
        got[f"{PATH}mlp.experts.gate_up_proj"][1],
        packed(rules, "transformers", weights)[f"{PATH}mlp.experts.gate_up_proj"][1],
    )


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_dora_is_turned_and_cut_with_its_norms(family: str, tmp_path: Path) -> None:
    rules = RULES[family]  # stored [in, out]: the norm of an output is a column's
    weights = numbers(rules)
    theirs = packed(rules, "transformers", weights)
    items = []
    for seed, name in enumerate(name for name in theirs if "bias" not in name):
        shape = theirs[name].shape
        magnitude = TensorRef.of(ref(3, shape[2], seed=seed).read().abs() + 0.5)
        items.append(
            Targeted(Target(name, shape, experts=3), Dora(update("lora", shape[1:], (3,), seed), magnitude, 1))
        )
    plain = merged(folder_of(theirs, tmp_path / "theirs"), Adapter(tuple(items)), tmp_path / "plain")
    got = led_arrays(items, packed(rules, "mlx", weights), tmp_path)
    assert_equal_arrays(got, packed(rules, "mlx", unpacked(rules, "transformers", plain)))


@pytest.mark.parametrize("factored", [False, True])
def test_lokr_divides_where_its_rows_are_products(factored: bool, tmp_path: Path) -> None:
    rules = RULES["llama4"]  # stored [in, out]: it is turned as well
    weights = numbers(rules)
    theirs = packed(rules, "transformers", weights)
    name = f"{PATH}feed_forward.experts.gate_up_proj"  # [3, 8, 12]
    bare = Scaling("none", 2 if factored else None, None, 0.7)
    left = {"A1": ref(3, 2, 4, seed=1), "B1": ref(3, 4, 2, seed=2)} if factored else {"w1": ref(3, 4, 4, seed=1)}
    right = {"A2": ref(3, 2, 3, seed=3), "B2": ref(3, 2, 2, seed=4)} if factored else {"w2": ref(3, 2, 3, seed=3)}
    adapter = Adapter((Targeted(Target(name, (3, 8, 12), experts=3), Lokr(bare, **left, **right)),))
    plain = merged(folder_of(theirs, tmp_path / "theirs"), adapter, tmp_path / "plain")
    got = merged(folder_of(packed(rules, "mlx", weights), tmp_path / "ours"), adapter, tmp_path / "out")
    assert_equal_arrays(got, packed(rules, "mlx", unpacked(rules, "transformers", plain)))


def uncut(
    update_: Update, family: str = "qwen_moe", of: str = "transformers", to: str = "checkpoint", **target: Any
) -> str:
    """The refusal of an update of the first packed tensor of a layout."""
    rules = RULES[family]
    theirs, ours = (packed(rules, layout, numbers(rules)) for layout in (of, to))
    name = next(name for name in sorted(theirs, reverse=True) if "gate" in name and "bias" not in name)
    base = {name: TensorRef.of(torch.from_numpy(value)) for name, value in ours.items()}
    item = Targeted(Target(name, theirs[name].shape, **target), update_)
    with pytest.raises(Mismatch) as caught:
        led(Adapter((item,)), View(base, shipped()), "it")
    assert caught.value.code == "E-MAP"
    assert caught.value.where == "it"
    assert caught.value.message.startswith(f"{name}: the map {family!r} can not lead it from {of} to {to}: ")
    return caught.value.message.partition(f"to {to}: ")[2]


def test_updates_that_can_not_be_taken_apart() -> None:
    lora, bare = update("lora", (12, 8), (3,), 0), Scaling("none", None, None, 1.0)
    magnitude = ref(3, 8, seed=1)
    assert uncut(Dora(lora, magnitude, 1), experts=3) == (
        "the norms of this dora update run over all rows, also those of the other weights in them"
    )
    kron = Lokr(bare, ref(3, 3, 2, seed=1), w2=ref(3, 4, 4, seed=2))
    assert uncut(kron, experts=3) == "the second factor of this lokr update has 4 rows: rows 0 to 6 are not a product"
    assert uncut(Lora(ref(2, 8, 8, seed=1), ref(3, 2, seed=1), Scaling("none", 2, None, 1.0))) == (
        "it changes the tensor of all experts as one"
    )
    assert uncut(Replace(ref(1, 12, 8, seed=1)), rows=(1, 2)) == "its rows are experts"


def test_updates_that_do_not_add_need_whole_columns() -> None:
    one = {"of": "mlx", "to": "transformers", "experts": 3}
    lora = update("lora", (6, 8), (3,), 0)
    want = "a {} update of some of a matrix's columns is not defined"
    assert uncut(Replace(ref(3, 6, 8, seed=1)), "gpt_oss", **one) == want.format("replace")
    assert uncut(Replace(ref(3, 6, 8, seed=1)), "llama4", **one) == want.format("replace")
    assert uncut(Dora(lora, ref(3, 6, seed=1), 0), "llama4", **one) == want.format("dora")
    kron = Lokr(Scaling("none", None, None, 1.0), ref(3, 3, 4, seed=1), w2=ref(3, 2, 2, seed=2))
    assert uncut(kron, "gpt_oss", **one) == want.format("lokr")
    other = {"of": "transformers", "to": "mlx", "experts": 3}
    turned_kron = Lokr(Scaling("none", None, None, 1.0), ref(3, 4, 6, seed=1), w2=ref(3, 2, 2, seed=2))
    assert uncut(turned_kron, "gpt_oss", **other) == "the rows of a lokr update can not be taken apart"
    some = update("lora", (2, 12), (3,), 0)
    what = "it changes some rows of it, which are not rows of one weight"
    assert uncut(some, "gpt_oss", rows=(0, 2), **other) == what


# --- what is not led -------------------------------------------------------------------------------------------------


def fused_lora(rules: Mapping[str, Any], layout: str = "transformers", dims: Mapping[str, int] = DIMS) -> Adapter:
    state = packed(rules, layout, numbers(rules, dims=dims))
    return adapter_of(state, "lora", rules, layout)


def refused(base: Path, adapter: Adapter, out: Path, **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(base, adapter, out, **options)
    assert not out.exists()
    return caught.value


def test_missing_experts(tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    ours = packed(rules, "checkpoint", numbers(rules))
    for expert, weight in [(1, "gate_proj"), (1, "up_proj"), (2, "down_proj")]:
        del ours[f"{PATH}mlp.experts.{expert}.{weight}.weight"]
    error = refused(folder_of(ours, tmp_path / "base"), fused_lora(rules), tmp_path / "out")
    assert {problem.code for problem in error.problems} == {"E-TARGET"}
    assert len(error.problems) == 2
    assert (
        "; the map 'qwen_moe' knows it, but the base lacks 3 tensors of its experts, such as"
        f" {PATH}mlp.experts.1.gate_proj.weight" in error.message
    )


def test_experts_that_are_fewer_than_the_router_says(tmp_path: Path) -> None:
    rules = RULES["mixtral"]
    ours = packed(rules, "checkpoint", numbers(rules))
    ours = {name: value for name, value in ours.items() if ".experts.2." not in name}
    error = refused(folder_of(ours, tmp_path / "base"), fused_lora(rules), tmp_path / "out")
    assert "gate.weight is [3, 8], and with experts 2, hidden 8, inner 6 it would be [2, 8]" in error.message


@pytest.mark.parametrize("name", ["mlp.experts.1.up_proj.weight", "mlp.experts.0.down_proj.weight"])
def test_wrong_shapes_in_the_base(name: str, tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    ours = packed(rules, "checkpoint", numbers(rules))
    ours[PATH + name] = np.zeros((5, 8))
    error = refused(folder_of(ours, tmp_path / "base"), fused_lora(rules), tmp_path / "out")
    assert {problem.code for problem in error.problems} == {"E-TARGET"}
    assert f"{PATH}{name} is [5, 8]" in error.message


def test_shapes_that_do_not_agree(tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    ours = packed(rules, "checkpoint", numbers(rules))
    ours = {name: np.zeros((7, 6)) if "down" in name else value for name, value in ours.items()}
    error = refused(folder_of(ours, tmp_path / "base"), fused_lora(rules), tmp_path / "out")
    assert "shapes do not agree: model.layers.0.mlp.experts.{expert}.down_proj.weight is [7, 6]" in error.message


def test_an_adapter_of_another_size(tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    base = folder_of(packed(rules, "checkpoint", numbers(rules)), tmp_path / "base")
    for dims in ({**DIMS, "experts": 4}, {**DIMS, "inner": 10}):
        error = refused(base, fused_lora(rules, dims=dims), tmp_path / "out")
        assert [problem.code for problem in error.problems] == ["E-MAP", "E-MAP"]
        assert "the base's weights would make [3, " in error.message


def test_two_families_that_fit(tmp_path: Path) -> None:
    mixtral_names = packed(RULES["mixtral"], "checkpoint", numbers(RULES["mixtral"]))
    qwen_names = packed(RULES["qwen_moe"], "checkpoint", numbers(RULES["qwen_moe"]))
    base = folder_of({**mixtral_names, **qwen_names}, tmp_path / "base")
    adapter = fused_lora(RULES["qwen_moe"])
    error = refused(base, adapter, tmp_path / "out")
    assert error.code == "E-AMBIGUOUS"
    assert len(error.problems) == 1
    assert f"{PATH}block_sparse_moe.experts.0.w2.weight (map 'mixtral', transformers to checkpoint)" in error.message
    assert f"{PATH}mlp.experts.0.down_proj.weight (map 'qwen_moe', transformers to checkpoint)" in error.message
    assert "--map FILE" in error.hint
    got = merged(base, adapter, tmp_path / "out", map=FILES[[f.stem for f in FILES].index("qwen_moe")])
    assert {
        name for name, value in got.items() if not np.array_equal(value, {**mixtral_names, **qwen_names}[name])
    } == {*qwen_names}


def test_layers_that_need_two_maps(tmp_path: Path) -> None:
    one = packed(RULES["mixtral"], "checkpoint", numbers(RULES["mixtral"]))
    two = packed(RULES["qwen_moe"], "checkpoint", numbers(RULES["qwen_moe"]), "model.layers.1.")
    first = fused_lora(RULES["qwen_moe"])
    second = [
        Targeted(Target(item.target.name.replace(".0.", ".1."), item.target.shape, experts=3), item.update)
        for item in first.updates
    ]
    adapter = Adapter((*first.updates, *second))
    error = refused(folder_of({**one, **two}, tmp_path / "base"), adapter, tmp_path / "out")
    assert error.code == "E-AMBIGUOUS"
    assert "no one map leads all 4 targets" in error.message
    assert "mixtral (transformers to checkpoint: 2), qwen_moe (transformers to checkpoint: 2)" in error.message


def test_a_shared_name_alone_is_not_ambiguous(tmp_path: Path) -> None:
    rules = RULES["mixtral"]  # two of its layouts call the router the same
    name = f"{PATH}block_sparse_moe.gate.weight"
    weights = numbers(rules)
    lora = update("lora", (3, 8), (), 0)
    assert isinstance(lora, Lora)
    got = led_arrays([Targeted(Target(name, (3, 8)), lora)], packed(rules, "transformers", weights), tmp_path)
    want = packed(rules, "transformers", weights)
    want[f"{PATH}mlp.gate.weight"] = weights["router"] + 1.5 * np_of(lora.B) @ np_of(lora.A)
    assert_equal_arrays(got, want)


def test_a_target_that_the_base_has_is_left_alone(tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    weights = numbers(rules)
    both = {**packed(rules, "checkpoint", weights), **packed(rules, "transformers", weights)}
    base = folder_of(both, tmp_path / "base")
    report = loratool.merge(base, fused_lora(rules), tmp_path / "out")
    assert not any("map" in note for note in report.plan.notes)
    assert {new.name for new in report.plan.changes} == {*packed(rules, "transformers", weights)}


def test_names_of_no_map_stay_missing(tmp_path: Path) -> None:
    rules = RULES["qwen_moe"]
    base = folder_of(packed(rules, "checkpoint", numbers(rules)), tmp_path / "base")
    adapter = fused_lora(rules)
    other = Targeted(Target(f"{PATH}mlp.experts.sideways", (6, 8)), update("lora", (6, 8), (), 0))
    error = refused(base, Adapter((*adapter.updates, other)), tmp_path / "out")
    assert [problem.message for problem in error.problems] == [f"the base has no '{PATH}mlp.experts.sideways'"]


# --- digests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "one", "two"), PAIRS)
def test_digests_of_the_base_hold_in_every_layout(family: str, one: str, two: str, tmp_path: Path) -> None:
    from loratool.adapter import BaseIdentity, TensorIdentity

    rules = RULES[family]
    weights = numbers(rules)
    theirs = packed(rules, one, weights)
    refs = {name: TensorRef.of(torch.from_numpy(value.copy())) for name, value in theirs.items()}
    pins = {name: TensorIdentity(value.digest(), value.dtype, value.shape) for name, value in refs.items()}
    adapter = Adapter(fused_lora(rules, one).updates, BaseIdentity("it", pins))
    loratool.plan(folder_of(packed(rules, two, weights), tmp_path / "base"), adapter, tmp_path / "out")
    weights["up"][1, 2, 3] += 1
    error = refused(folder_of(packed(rules, two, weights), tmp_path / "other"), adapter, tmp_path / "out")
    assert {problem.code for problem in error.problems} == {"E-BASE-MISMATCH"}
    assert len(error.problems) == 1


# --- files of real conventions, the other way round ------------------------------------------------------------------


def per_expert(base: State, folder: Path, endings: tuple[str, ...], expert: str) -> tuple[Path, State]:
    """A PEFT adapter on each expert's own linear layers, as it was trained before experts were stacked."""
    folder.mkdir()
    state: State = {}
    deltas: State = {}
    generator = torch.Generator().manual_seed(7)
    for name in sorted(name for name in base if name.endswith(endings) and expert in name):
        out, columns = base[name].shape
        A, B = torch.randn(3, columns, generator=generator), torch.randn(out, 3, generator=generator)
        module = name.removesuffix(".weight")
        state |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        deltas[name] = 2.0 * B.double() @ A.double()
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1"], "peft_version": "0.14.0"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, deltas


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "qwen3", "deepseek-v2", "deepseek-v3"])
def test_experts_of_their_own_into_a_model_that_stacks_them(
    name: str, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    made = trained(name)
    disk = read(made.base)
    endings = (".w1.weight", ".w2.weight") if name == "mixtral" else (".up_proj.weight", ".down_proj.weight")
    adapter, deltas = per_expert(disk, tmp_path / "adapter", endings, ".experts.")
    assert deltas
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(made.memory, stacked / "model.safetensors")
    report = loratool.merge(stacked, adapter, tmp_path / "out", undo=tmp_path / "undo")
    got = read(tmp_path / "out")
    assert any("'checkpoint' to the base's 'transformers'" in note for note in report.plan.notes)
    want = {tensor: value.double().clone() for tensor, value in made.memory.items()}
    for tensor, delta in deltas.items():
        layer, _, rest = tensor.partition(".experts.")
        expert, projection = rest.split(".")[:2]
        block = layer.replace("block_sparse_moe", "mlp")
        if projection in ("w2", "down_proj"):
            want[f"{block}.experts.down_proj"][int(expert)] += delta
        else:  # gate's rows come before up's
            rows = slice(0, len(delta)) if projection == "w1" else slice(len(delta), None)
            want[f"{block}.experts.gate_up_proj"][int(expert), rows] += delta
    assert changed(made.memory, got) == {t for t in want if ".experts." in t and "shared" not in t}
    for tensor, exact in want.items():
        assert_rounded(got[tensor], exact, name=tensor)
    for option, proof in {"base": stacked, "undo": tmp_path / "undo"}.items():
        assert loratool.unmerge(tmp_path / "out", adapter, tmp_path / f"by-{option}", **{option: proof}).exact
        assert_same_bits(read(tmp_path / f"by-{option}"), made.memory)
    fit = loratool.inspect(adapter, base=stacked).fit
    assert fit is not None
    assert fit.missing == fit.wrong_shape == ()
    assert {*fit.touched} == changed(made.memory, got)
    assert {item.target.name for item in loratool.load(adapter, base=stacked).updates} == {*fit.touched}


def test_square_experts_of_an_older_peft_keep_their_orientation(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    made = trained("mixtral-square")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(made.memory, stacked / "model.safetensors")
    outputs = {}
    for version in ("0.18.0", "0.21.2"):
        adapter = tmp_path / version
        adapter.mkdir()
        for file in made.adapter.iterdir():
            (adapter / file.name).write_bytes(file.read_bytes())
        edit_json(adapter / "adapter_config.json", peft_version=version)
        loratool.merge(stacked, adapter, tmp_path / f"{version}-stacked")
        loratool.merge(made.base, adapter, tmp_path / f"{version}-disk")
        one, two = read(tmp_path / f"{version}-stacked"), read(tmp_path / f"{version}-disk")
        outputs[version] = two
        for expert in range(3):
            down = two[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
            assert torch.equal(one["model.layers.0.mlp.experts.down_proj"][expert], down)
    assert changed(outputs["0.18.0"], outputs["0.21.2"]) == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(3)
    }


@pytest.mark.parametrize("family", ["qwen_moe", "mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("to", ["transformers", "checkpoint"])
def test_an_adapter_of_mlx_into_other_checkpoints(family: str, to: str, tmp_path: Path) -> None:
    rules = RULES[family]
    if to not in rules["layouts"]:
        to = "transformers"
    weights = numbers(rules)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}, "num_layers": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    state, generator = {}, np.random.default_rng(3)
    for name, value in packed(rules, "mlx", weights).items():
        if value.ndim == 3:
            weight = next(key for key in ("gate", "up", "down") if f".{key}_proj." in name)
            A, B = generator.normal(size=(3, 2, value.shape[2])), generator.normal(size=(3, value.shape[1], 2))
            module = name.removesuffix(".weight")
            state |= {f"{module}.lora_a": A.astype("f4"), f"{module}.lora_b": B.astype("f4")}
            weights[weight] = weights[weight] + 20.0 * (B.astype("f4").astype("f8") @ A.astype("f4").astype("f8"))
    save_arrays(state, adapter / "adapters.safetensors")
    base = folder_of(packed(rules, to, numbers(rules)), tmp_path / "base")
    assert_equal_arrays(merged(base, adapter, tmp_path / "out"), packed(rules, to, weights))


def test_a_prefix_and_a_map_together(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("qwen3")
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"language_model.{name}": value for name, value in read(made.base).items()}, base / "model.safetensors")
    loratool.merge(base, made.adapter, tmp_path / "out")
    for name, exact in made.exact.items():
        assert_rounded(read(tmp_path / "out")[f"language_model.{name}"], exact.double(), name=name)


# --- maps of a user's ------------------------------------------------------------------------------------------------

# gpt-oss with experts of their own, as no library that is tested here writes them.
OWN = {
    "format": "loratool.map/1",
    "family": "my gpt-oss",
    "weights": {"gate": ["inner", "hidden"], "up": ["inner", "hidden"], "down": ["hidden", "inner"]},
    "layouts": {
        "stacked": {
            "mlp.experts.gate_up_proj": ["experts", "hidden", "gate / up"],
            "mlp.experts.down_proj": ["experts", "inner", "down"],
        },
        "single": {
            "mlp.experts.{expert}.gate_proj.weight": ["gate", "hidden"],
            "mlp.experts.{expert}.up_proj.weight": ["up", "hidden"],
            "mlp.experts.{expert}.down_proj.weight": ["down", "inner"],
        },
    },
}


def own_map(folder: Path, **changes: Any) -> Path:
    file = folder / "map.json"
    file.write_text(json.dumps({**OWN, **changes}))
    return file


def test_a_users_map_from_the_command_line(
    cli: Callable[..., Any], trained: Callable[..., Trained], tmp_path: Path
) -> None:
    made = trained("gpt-oss")
    state = read(made.base)
    single = {"mlp.experts.0.gate_proj.weight": state[f"{PATH}mlp.experts.gate_up_proj"][0, :, ::2].T}
    adapter, deltas = per_expert(
        {PATH + name: value for name, value in single.items()}, tmp_path / "a", (".weight",), ""
    )
    refusal = cli("merge", made.base, adapter, "-o", tmp_path / "out")
    assert refusal.code == 2
    assert "the base has no 'model.layers.0.mlp.experts.0.gate_proj.weight'" in refusal.err
    assert "the map 'qwen_moe' knows it, but shapes do not agree" in refusal.err
    options = ["--map", own_map(tmp_path)]
    done = cli("merge", made.base, adapter, "-o", tmp_path / "out", "--undo", tmp_path / "undo", *options)
    assert done.code == 0, done.err
    assert "the map 'my gpt-oss' led 1 target from the layout 'single' to the base's 'stacked'" in done.out + done.err
    want = state[f"{PATH}mlp.experts.gate_up_proj"].double().clone()
    want[0, :, ::2] += next(iter(deltas.values())).T
    got = read(tmp_path / "out")
    assert_rounded(got[f"{PATH}mlp.experts.gate_up_proj"], want)
    assert changed(state, got) == {f"{PATH}mlp.experts.gate_up_proj"}
    for proof in (["--base", made.base], ["--undo", tmp_path / "undo"]):
        out = tmp_path / f"by{proof[0]}"
        done = cli("unmerge", tmp_path / "out", adapter, *proof, "-o", out, *options)
        assert done.code == 0, done.err
        assert_same_bits(read(out), state)
    led = tmp_path / "led.safetensors"
    done = cli("convert", adapter, "--to", "native", "--base", made.base, "-o", led, *options)
    assert done.code == 0, done.err
    loratool.merge(made.base, led, tmp_path / "again")  # which needs no map any more
    assert_same_bits(read(tmp_path / "again"), got)


def test_a_map_that_matches_nothing(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("qwen3")
    rules = {"a": {"x.{expert}.w": ["gate", "hidden"]}, "b": {"x.stack": ["experts", "gate", "hidden"]}}
    none = own_map(tmp_path, weights={"gate": ["inner", "hidden"]}, layouts=rules)
    error = refused(made.base, made.adapter, tmp_path / "out", map=none)
    assert "the map 'my gpt-oss' matches nothing: none of its layouts is in the base" in str(error)
    assert "leave out --map" in str(error)
    # its layout is in the base, but the adapter has no name of the other one
    plain = folder_of(packed(RULES["qwen_moe"], "checkpoint", numbers(RULES["qwen_moe"])), tmp_path / "plain")
    name = f"{PATH}mlp.experts.0.up_proj.weight"
    adapter = Adapter((Targeted(Target(name, (6, 8)), update("lora", (6, 8), (), 0)),))
    loratool.plan(plain, adapter, tmp_path / "out")
    error = refused(plain, adapter, tmp_path / "out", map=FILES[[file.stem for file in FILES].index("qwen_moe")])
    assert error.message == (
        "the map 'qwen_moe' matches nothing: it knows none of the targets that the base does not have"
    )


def layouts(**changes: Any) -> dict[str, Any]:
    """The layouts of the map above, with other tensors in the one called single."""
    single = {**OWN["layouts"]["single"], **changes}  # type: ignore[dict-item]
    return {**OWN["layouts"], "single": {name: axes for name, axes in single.items() if axes is not None}}  # type: ignore[dict-item]


GATE = "mlp.experts.{expert}.gate_proj.weight"
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "format": ({"format": "loratool.map/2"}, ["format is 'loratool.map/2', not 'loratool.map/1'"]),
    "several at once": (
        {"format": 1, "family": "", "models": "x", "about": 3, "extra": 1},
        ["format is 1", "unknown key 'extra'", "family is not a name", "about is not text", "models is not a list"],
    ),
    "weights": (
        {"weights": {"a+b": ["x", "y"], "c": [], "d": ["x", "y", "z"]}},
        ["weight 'a+b' needs a name without + and /", "weight 'c' is []", "weight 'd' is ['x', 'y', 'z']"],
    ),
    "no weights": ({"weights": {}}, ["weights is not an object of weights"]),
    "one layout": ({"layouts": {"a": {}}}, ["layouts is not an object of two layouts or more"]),
    "empty layout": ({"layouts": {"a": {}, "b": 3}}, ["layout 'a' is not an object", "layout 'b' is not an object"]),
    "axes": ({"layouts": layouts(**{GATE: "gate"})}, ["its axes are 'gate', not a list of names"]),
    "unknown weight": ({"layouts": layouts(**{GATE: ["gait", "hidden"]})}, ["'gait' is not among the weights"]),
    "no weight": ({"layouts": layouts(**{GATE: ["hidden", "hidden"]})}, ["one names its weights"]),
    "other input": (
        {"layouts": layouts(**{GATE: ["gate", "inner"]})},
        ["its axes are ['gate', 'inner'], the input of gate is ['hidden']"],
    ),
    "both experts": (
        {"layouts": layouts(**{GATE: ["experts", "gate", "hidden"]})},
        ["it has {expert} in its name and an axis of experts"],
    ),
    "braces": ({"layouts": layouts(**{"a.{layer}.b": ["gate", "hidden"]})}, ["and no other braces"]),
    "half a segment": ({"layouts": layouts(**{"a.w{expert}": ["gate", "hidden"]})}, ["{expert} is a segment of its"]),
    "absent": ({"layouts": layouts(**{GATE: None})}, ["layout 'single': weight 'gate' is in no tensor"]),
    "twice": (
        {"layouts": layouts(**{"mlp.other.{expert}.weight": ["gate", "hidden"]})},
        ["layout 'single': weight 'gate' is in more than one place"],
    ),
    "not an expert's": (
        {"layouts": layouts(**{GATE: None, "mlp.gate_proj.weight": ["gate", "hidden"]})},
        ["weight 'gate' is an expert's in one layout and not in another"],
    ),
    "same twice": (
        {"layouts": {**layouts(), "again": OWN["layouts"]["single"]}},  # type: ignore[index]
        ["layouts 'single' and 'again' are the same"],
    ),
    "lengths": (
        {"weights": {**OWN["weights"], "up": ["other", "hidden"]}},  # type: ignore[dict-item]
        ["layout 'stacked': 'mlp.experts.gate_up_proj': weights in turn are of one length"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_map_is_read_strictly(case: str, tmp_path: Path) -> None:
    changes, want = WRONG[case]
    file = own_map(tmp_path, **changes)
    with pytest.raises(InvalidFile) as caught:
        loratool.merge(tmp_path, tmp_path, tmp_path / "out", map=file)
    assert len(caught.value.problems) == len(want)
    for problem, text in zip(
        sorted(caught.value.problems, key=lambda p: p.message),
        sorted(want, key=lambda t: next(p.message for p in caught.value.problems if t in p.message)),
        strict=True,
    ):
        assert text in problem.message
        assert (problem.code, problem.where) == ("E-MAP", str(file))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": 1, "format": 1}', "[" * 100_000, '"a"', "\xff"])
def test_what_is_no_json_of_a_map(text: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidFile) as caught:
        loratool.merge(tmp_path, tmp_path, tmp_path / "out", map=[file])
    assert caught.value.code == "E-MAP"
    with pytest.raises(InvalidFile) as caught:
        loratool.merge(tmp_path, tmp_path, tmp_path / "out", map=tmp_path / "none.json")
    assert caught.value.code == "E-READ"


# --- the shipped rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen_moe"])
def test_the_rules_are_those_of_transformers(family: str) -> None:
    from transformers import conversion_mapping as known

    rules = RULES[family]
    homes = {axes[0]: ending for ending, axes in rules["layouts"]["checkpoint"].items()}
    assert rules["models"]
    for model in rules["models"]:
        steps = known.get_checkpoint_conversion_mapping(model)
        packing = {step.target_patterns[0]: step for step in steps if type(step).__name__ == "WeightConverter"}
        renames = [step for step in steps if type(step).__name__ == "WeightRenaming"]
        for ending, axes in rules["layouts"]["transformers"].items():
            if axes[0] != "experts":
                assert renames[0].source_patterns[0].strip(".") + ending.removeprefix("mlp") == homes["router"]
                continue
            step = next(step for target, step in packing.items() if ending.endswith(target))
            sources = [homes[weight].replace("{expert}", "*") for weight in axes[1].split(" + ")]
            assert len(step.source_patterns) == len(sources)
            assert all(ours.endswith(theirs) for ours, theirs in zip(sources, step.source_patterns, strict=True))
            joins = [(type(join).__name__, join.dim) for join in step.operations]
            assert joins == [("MergeModulelist", 0), ("Concatenate", 1)][: len(sources)]


@pytest.mark.parametrize("name", [*MODELS, "llama4"])
def test_each_model_has_the_shapes_that_its_rules_say(name: str, tmp_path: Path) -> None:
    model = llama4() if name == "llama4" else MODELS[name]()
    family = {"mixtral": "mixtral", "gpt": "gpt_oss", "llama4": "llama4"}.get(name.split("-")[0], "qwen_moe")
    disk = read(save_base(model, tmp_path / "base"))
    saved = "transformers" if family in ("gpt_oss", "llama4") else "checkpoint"
    for layout, state in {"transformers": model.state_dict(), saved: disk}.items():
        refs = {tensor: TensorRef.of(value) for tensor, value in state.items()}
        blocks = [block for block in View(refs, shipped()).blocks if block.family.name == family]
        assert {block.layout.name for block in blocks} == {layout}
        assert len(blocks) == (2 if name == "qwen3" else 1)
        assert {block.dims["hidden"] for block in blocks} == {HIDDEN}


# --- many experts ----------------------------------------------------------------------------------------------------


def test_factors_of_all_experts_are_read_a_few_times_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = RULES["qwen_moe"]
    sizes = {"experts": 64, "inner": 6, "hidden": 8}
    base = folder_of(packed(rules, "checkpoint", numbers(rules, dims=sizes)), tmp_path / "base")
    theirs = packed(rules, "transformers", numbers(rules, dims=sizes))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    state: State = {}
    for name, layer in {"gate_up_proj": "base_layer.", "down_proj": ""}.items():
        _, out, columns = theirs[f"{PATH}mlp.experts.{name}"].shape
        key = f"base_model.model.{PATH}mlp.experts.{layer}lora_"
        state |= {f"{key}A.weight": torch.randn(2 * 64, columns), f"{key}B.weight": torch.randn(out, 2 * 64)}
    save_file(state, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": EXPERTS, "peft_version": "0.21.2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plan = loratool.plan(base, adapter, tmp_path / "out", threads=1)
    largest = max(ref.numel() for name, ref in state.items() if "lora_B" in name) * 4
    # What is kept is part of the promise; out of a native file each expert's part is read on its own.
    loratool.save(loratool.load(adapter, base=folder_of(theirs, tmp_path / "theirs")), tmp_path / "a.safetensors")
    native = loratool.plan(base, tmp_path / "a.safetensors", tmp_path / "out", threads=1)
    assert plan.memory - native.memory == 5 * largest
    reads = []
    load = loratool.tensors.FileSpan.load
    monkeypatch.setattr(
        loratool.tensors.FileSpan, "load", lambda span, dtype, shape: reads.append(shape) or load(span, dtype, shape)
    )
    loratool.merge(base, adapter, tmp_path / "out", threads=1, digests=False)
    whole = [shape for shape in reads if shape in {(12, 2, 64), (8, 2, 64)}]
    assert 2 <= len(whole) <= 12  # 192 tensors take their part of the two
