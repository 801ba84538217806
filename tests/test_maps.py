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
from torch import Tensor, nn

import loratool
from loratool.adapter import Adapter, Target, Targeted
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch
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
    assert all(f"the map {family!r} led" in note and "'transformers' to the base's 'checkpoint'" in note for note in used)

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
        naming = next(axis for axis in matrix if all(part.strip() in weights for part in axis.replace("/", "+").split("+")))
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
