"""Adapters written for llama.cpp: the exact bytes, every delta back, one alpha for all, and what is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import assume, given
from models import State
from safetensors.torch import save_file
from strategies import Case, Maker, cases, make_update
from test_convert import assert_same_model, components
from test_convert import merged as merged_file
from test_gguf import BASE, KEYS, NAMES, gguf_bytes, randn, row_of
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted
from loratool.conventions.gguf_names import ARCHITECTURES, architecture_name
from loratool.conventions.gguf_write import best_alpha
from loratool.gguf import read_gguf
from loratool.updates import Lora

# -- tools ------------------------------------------------------------------------------------------------------------

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2}
Q, V, DOWN = (f"model.layers.0.{module}.weight" for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def save_base(
    folder: Path, state: Mapping[str, torch.Tensor] = BASE, config: Mapping[str, Any] | None = CONFIG
) -> Path:
    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def item(name: str, shape: tuple[int, ...], form: str = "lora", seed: int = 0, **options: Any) -> Targeted:
    """An update of a tensor: `rows`, `expert`, `experts` and `layout` are its target's."""
    target = Target(name, shape, **{key: options.pop(key) for key in TARGET & options.keys()})
    make = Maker(seed, options.pop("dtype", "F32"), target.experts)
    return Targeted(target, make_update(form, target.region, make, **options))


TARGET = {"rows", "expert", "experts", "layout"}


def of_base(form: str = "lora", names: Iterable[str] = BASE, **options: Any) -> Adapter:
    """One update of each tensor of the base."""
    return Adapter(
        tuple(
            item(name, tuple(BASE[name].shape), form, seed, layout="embedding" if "embed" in name else "", **options)
            for seed, name in enumerate(names)
        )
    )


def same_updates(one: Adapter, two: Adapter) -> None:
    """The same factors to the bit, the same scale."""
    first, second = components(one), components(two)
    assert first.keys() == second.keys()
    scales = [{i.target.name: i.update.scaling.factor for i in a.updates if i.update.scaling} for a in (one, two)]
    assert scales[0] == scales[1]
    for name, (_, tensors) in first.items():
        for a, b in zip(tensors, second[name][1], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def merged(base: Path, adapter: object) -> State:
    return merged_file(base / "model.safetensors", adapter)


def refused(adapter: Adapter, tmp_path: Path, **options: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.convert(adapter, tmp_path / "refused.gguf", "gguf", **options)
    assert not (tmp_path / "refused.gguf").exists()
    return caught.value


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_bytes(dtype: str, tmp_path: Path) -> None:
    """Laid out by hand in test_gguf.py, from llama.cpp's description; rows of q and k by their numbers."""
    made = of_base(dtype=dtype, alpha=6.0)
    report = loratool.convert(made, tmp_path / "a.gguf", "gguf", base=save_base(tmp_path / "base"))
    assert said(report) == ()
    want: State = {}
    lora = {i.target.name: i.update for i in made.updates}
    for ggml in ["blk.0.attn_k", "blk.0.attn_q", "blk.0.attn_v", "blk.0.ffn_down", "output", "token_embd"]:
        A, B = lora[f"{NAMES[ggml]}.weight"].A.read(), lora[f"{NAMES[ggml]}.weight"].B.read()
        if ggml.endswith(("_q", "_k")):
            B = torch.stack([B[row_of(row)] for row in range(len(B))])
        a, b = (B, A.T.contiguous()) if ggml == "token_embd" else (A, B)
        want |= {f"{ggml}.weight.lora_a": a, f"{ggml}.weight.lora_b": b}
    keys = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0,
        "general.alignment": 32,
    }  # fmt: skip
    assert (tmp_path / "a.gguf").read_bytes() == gguf_bytes(want, keys)


def test_its_size_is_known_before(tmp_path: Path) -> None:
    from loratool.bundle import Gguf

    tensors = {name: item(name, (3, 5)).update.components()["A"] for name in ("a", "b")}
    content = Gguf(tensors, {"general.type": "adapter", "x": 1.5})
    with (tmp_path / "a.gguf").open("wb") as file:
        content.write(file)
    assert (tmp_path / "a.gguf").stat().st_size == content.nbytes
    found = read_gguf(tmp_path / "a.gguf")
    assert found.metadata == {"general.type": "adapter", "x": "1.5", "general.alignment": "32"}
    assert torch.equal(found.tensors["b"].read(), tensors["b"].read())


def test_native_and_back_to_the_bit(tmp_path: Path) -> None:
    """Nothing is folded that one alpha can hold: other ranks, where the scale follows; 16-bit factors."""
    base = save_base(tmp_path / "base")
    items = [
        item(Q, (16, 8), rank=2, alpha=6.0, dtype="BF16"), item(V, (8, 8), rank=3, alpha=6.0, dtype="F16"),
        item(DOWN, (8, 12), rank=1, rule="alpha", alpha=6.0),
    ]  # fmt: skip
    loratool.convert(Adapter(tuple(items)), tmp_path / "a.gguf", "gguf", base=base)
    loratool.convert(tmp_path / "a.gguf", tmp_path / "b.safetensors", "native", base=base)
    same_updates(Adapter(tuple(items)), loratool.load(tmp_path / "b.safetensors"))


EXPERTS = {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
STACKED = {"model.layers.0.mlp.experts.gate_up_proj": (3, 12, 8), "model.layers.0.mlp.experts.down_proj": (3, 8, 6)}


def single(architecture: str) -> dict[str, tuple[int, ...]]:
    parts = {part: ARCHITECTURES[architecture].single("0", f"ffn_{part}_exps", "{}") for part in EXPERTS}
    return {name.format(e): EXPERTS[part] for part, name in parts.items() for e in range(3)}


MOES = {
    "mixtral apart": ("MixtralForCausalLM", single("llama")),
    "qwen2moe apart": ("Qwen2MoeForCausalLM", single("qwen2moe")),
    "mixtral stacked": ("MixtralForCausalLM", STACKED),
    "qwen3moe stacked": ("Qwen3MoeForCausalLM", STACKED),
}


@pytest.mark.parametrize("name", ["llama", "phi3", *MOES])
def test_what_was_read_is_written_again(name: str, tmp_path: Path) -> None:
    state, architecture, parts = dict(BASE), "llama", dict(PARTS)
    config: dict[str, Any] = dict(CONFIG)
    if name == "phi3":
        state = {"model.layers.0.self_attn.qkv_proj.weight": randn(16, 8)}
        parts = {f"blk.0.attn_qkv.weight.lora_{part}": randn(*shape) for part, shape in (("a", (2, 8)), ("b", (16, 2)))}
        config["architectures"], architecture = ["Phi3ForCausalLM"], "phi3"
    elif name in MOES:
        shapes = MOES[name][1]
        state |= {tensor: randn(*shape) for tensor, shape in shapes.items()}
        config["architectures"] = [MOES[name][0]]
        architecture = architecture_name(config) or ""
        for part, (out, into) in EXPERTS.items():
            parts |= {f"blk.0.ffn_{part}_exps.weight.lora_a": randn(3, 2, into)}
            parts |= {f"blk.0.ffn_{part}_exps.weight.lora_b": randn(3, out, 2)}
        if architecture != "llama":
            parts = {key: value for key, value in parts.items() if "ffn_down.w" not in key}
    base = save_base(tmp_path / "base", state, config)
    keys = {**KEYS, "general.architecture": architecture, "general.alignment": 32}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(dict(sorted(parts.items())), keys))
    loratool.convert(tmp_path / "a.gguf", tmp_path / "n.safetensors", "native", base=base)
    loratool.convert(tmp_path / "n.safetensors", tmp_path / "b.gguf", "gguf", base=base)
    one, two = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert one.metadata == two.metadata
    assert one.tensors.keys() == two.tensors.keys()
    for key, ref in one.tensors.items():
        assert torch.equal(ref.read(), two.tensors[key].read()), key


PARTS: State = {}
for number, (ggml, module) in enumerate(NAMES.items()):
    out, into = BASE[f"{module}.weight"].shape
    shape_a, shape_b = ((out, 2), (into, 2)) if ggml == "token_embd" else ((2, into), (out, 2))
    PARTS |= {f"{ggml}.weight.lora_a": randn(*shape_a, seed=number), f"{ggml}.weight.lora_b": randn(*shape_b)}


# -- one alpha --------------------------------------------------------------------------------------------------------


def lora_of(scale: float, rank: int) -> Lora:
    update = item("a", (4, 4), rule="none", alpha=scale, rank=rank).update
    assert isinstance(update, Lora)
    return update


@pytest.mark.parametrize(
    ("scales", "alpha"),
    [
        ([(2.0, 4)], 8.0),
        ([(2.0, 4), (4.0, 2), (1.0, 8)], 8.0),  # one alpha at every rank
        ([(2.0, 4), (2.0, 2), (2.0, 2)], 4.0),  # one scale: what most need
        ([(3.0, 1), (1.0, 1), (2.0, 1)], 1.0),  # as many anyway: the one that makes another exact
        ([(-0.5, 2)], -1.0),
        ([(0.0, 2), (0.0, 3), (1.5, 2)], 3.0),  # an alpha of 0 would be a scale of 1
        ([(0.0, 2)], 2.0),
        ([(1e-60, 2), (1e60, 3)], 2.0),  # no float32 alpha gives either
        ([(0.1, 1)], float(torch.tensor(0.1))),
    ],
)
def test_the_alpha_for_which_least_is_scaled(scales: list[tuple[float, int]], alpha: float) -> None:
    assert best_alpha(lora_of(*pair) for pair in scales) == alpha


def test_a_scale_of_zero_stays_zero(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    made = of_base(names=[V, DOWN], alpha=0.0)
    loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    assert read_gguf(tmp_path / "a.gguf").metadata["adapter.lora.alpha"] == "2.0"
    assert_same_model(merged(base, tmp_path / "a.gguf"), merged(base, made))


def test_what_is_scaled_is_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    items = (
        item(V, (8, 8), rank=2, alpha=4.0), item(Q, (16, 8), rank=4, rule="none", alpha=2.0, dtype="BF16"),
        item(DOWN, (8, 12), rank=2, rule="none", alpha=2.0, dtype="F64"),
    )  # fmt: skip
    report = loratool.convert(Adapter(items), tmp_path / "a.gguf", "gguf", base=base)
    assert said(report) == (
        "llama.cpp has one alpha, 4, for all ranks: B of 1 matrices was scaled, exactly",
        "its float64 factors are rounded to float32",
    )
    written = read_gguf(tmp_path / "a.gguf").tensors
    dtypes = {part: written[f"blk.0.{part}.weight.lora_b"].dtype for part in ("attn_q", "attn_v", "ffn_down")}
    assert dtypes == {"attn_q": "BF16", "attn_v": "F32", "ffn_down": "F32"}
    assert_same_model(merged(base, tmp_path / "a.gguf"), merged(base, Adapter(items)))
    more = (*items, item("lm_head.weight", (9, 8), rank=3, rule="alpha/sqrt(rank)", alpha=1.0), items[0])
    report = loratool.convert(Adapter(more), tmp_path / "b.gguf", "gguf", base=base)
    assert "B of 2 matrices was scaled, 1 of them by no power of two and rounded to float32" in report.notes[0]
    assert report.notes[1] == "1 matrices had several LoRAs: their factors are side by side, in one of a larger rank"
    third = Adapter((item(V, (8, 8), rule="none", alpha=0.1),))
    report = loratool.convert(third, tmp_path / "c.gguf", "gguf", base=base)
    assert said(report) == ("the scale of 1 matrices is rounded to what a float32 alpha gives",)


# -- parts of matrices ------------------------------------------------------------------------------------------------

QKV, ROUTER = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate.weight"
GATE_UP, STACK = STACKED
PIECES: dict[str, tuple[str, dict[str, tuple[int, ...]], list[Targeted]]] = {
    "fused rows": (
        "Phi3ForCausalLM", {QKV: (12, 4)},
        [item(QKV, (12, 4), rows=(0, 4)), item(QKV, (12, 4), rows=(8, 12), rank=1, alpha=7.0)],
    ),
    "several of one": ("Phi3ForCausalLM", {QKV: (12, 4)}, [item(QKV, (12, 4)), item(QKV, (12, 4), rank=3)]),
    "one expert": ("MixtralForCausalLM", single("llama"), [item([*single("llama")][1], (6, 8))]),
    "experts of several ranks": (
        "Qwen2MoeForCausalLM", single("qwen2moe"),
        [item(name, shape, seed=n, rank=1 + n % 3, alpha=1.0 + n)
         for n, (name, shape) in enumerate(single("qwen2moe").items()) if n != 4],
    ),
    "rows of one expert": ("MixtralForCausalLM", single("llama"), [item([*single("llama")][8], (8, 6), rows=(2, 5))]),
    "a stack": (
        "Qwen3MoeForCausalLM", STACKED,
        [item(GATE_UP, STACKED[GATE_UP], experts=3), item(STACK, STACKED[STACK], experts=3, rank=1)],
    ),
    "rows over the middle of a stack": (
        "Qwen3MoeForCausalLM", STACKED, [item(GATE_UP, STACKED[GATE_UP], experts=3, rows=(4, 9))],
    ),
    "one expert of a stack": (
        "MixtralForCausalLM", STACKED,
        [item(GATE_UP, STACKED[GATE_UP], expert=1), item(GATE_UP, STACKED[GATE_UP], expert=2, rows=(6, 12), rank=3)],
    ),
    "a stack and one of its experts": (
        "MixtralForCausalLM", STACKED, [item(STACK, STACKED[STACK], experts=3), item(STACK, STACKED[STACK], expert=0)],
    ),
    "a router": ("Qwen3MoeForCausalLM", {ROUTER: (3, 8)}, [item(ROUTER, (3, 8))]),
    "a core": ("LlamaForCausalLM", {DOWN: (8, 12)}, [item(DOWN, (8, 12), "lora-mid")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_parts_of_matrices_arrive(name: str, tmp_path: Path) -> None:
    class_, shapes, items = PIECES[name]
    state = {tensor: randn(*shape, seed=5) for tensor, shape in shapes.items()}
    base = save_base(tmp_path / "base", state, {**CONFIG, "architectures": [class_]})
    loratool.convert(Adapter(tuple(items)), tmp_path / "a.gguf", "gguf", base=base)
    want = merged(base, Adapter(tuple(items)))
    assert any(not torch.equal(value, state[tensor]) for tensor, value in want.items())
    assert_same_model(merged(base, tmp_path / "a.gguf"), want)


def test_only_the_half_of_a_stack_that_changes_is_written(tmp_path: Path) -> None:
    made = item(GATE_UP, STACKED[GATE_UP], experts=3, rows=(6, 12))
    state = {tensor: randn(*shape) for tensor, shape in STACKED.items()}
    base = save_base(tmp_path / "base", state, {"architectures": ["MixtralForCausalLM"]})
    loratool.convert(Adapter((made,)), tmp_path / "a.gguf", "gguf", base=base)
    written = read_gguf(tmp_path / "a.gguf").tensors
    assert [*written] == ["blk.0.ffn_up_exps.weight.lora_a", "blk.0.ffn_up_exps.weight.lora_b"]
    assert written["blk.0.ffn_up_exps.weight.lora_b"].shape == (3, 6, 2)


@given(cases(("lora", "lora-mid"), base_dtypes=("F32",), most=5))
def test_whatever_is_in_it_arrives(case: Case) -> None:
    """Every LoRA of a matrix or a stack of them, in a model of which each is some part."""
    matrices = [i for i in case.adapter.updates if len(i.target.matrix) == 2]
    assume(matrices)
    renamed: dict[str, str] = {}
    for number, target in enumerate(i.target for i in matrices if i.target.name not in renamed):
        module = "mlp.experts.down_proj" if target.stacked else "mlp.up_proj.weight"
        embedding = target.layout == "embedding" and "model.embed_tokens.weight" not in renamed.values()
        renamed[target.name] = "model.embed_tokens.weight" if embedding else f"model.layers.{number}.{module}"
    adapter = Adapter(
        tuple(replace(i, target=replace(i.target, name=renamed[i.target.name], layout="")) for i in matrices)
    )
    state = {new: case.base[old] for old, new in renamed.items()} | {"lm_head.weight": torch.ones(2, 3)}
    with tempfile.TemporaryDirectory() as folder:
        base, out = save_base(Path(folder, "base"), state), Path(folder, "a.gguf")
        loratool.convert(adapter, out, "gguf", base=base)
        assert_same_model(merged(base, out), merged(base, adapter))


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "class_"), [("language_model.", "Mistral3ForConditionalGeneration"), (None, "LlamaModel")]
)
def test_bases_with_other_prefixes(prefix: str | None, class_: str, tmp_path: Path) -> None:
    """A language model inside another, and one without its head."""
    rename = {
        n: n.removeprefix("model.") if prefix is None else prefix + n for n in BASE if prefix or n != "lm_head.weight"
    }
    config: dict[str, Any] = {"architectures": [class_]}
    config |= CONFIG | config if prefix is None else {"text_config": {**CONFIG, "architectures": None}}
    base = save_base(tmp_path / "base", {new: BASE[old] for old, new in rename.items()}, config)
    made = of_base(names=[name for name in rename if prefix or "embed" not in name])
    made = Adapter(tuple(replace(i, target=replace(i.target, name=rename[i.target.name])) for i in made.updates))
    loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    assert_same_model(merged(base, tmp_path / "a.gguf"), merged(base, made))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "qwen3moe"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "gemma3_text"}}, "gemma3"),
        ({"architectures": ["SomeVision"], "text_config": {"architectures": ["MistralForCausalLM"]}}, "llama"),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral"}}, "mistral3"),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}, None),
        ({"architectures": ["LlamaForSequenceClassification"]}, None),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({"architectures": []}, None),
        ({}, None),
    ],
)
def test_the_architecture_is_by_the_class(config: Mapping[str, Any], name: str | None) -> None:
    assert architecture_name(config) == name


# -- what does not fit ------------------------------------------------------------------------------------------------

TIED = {name: value for name, value in BASE.items() if name != "lm_head.weight"}
GEMMA, QWEN = {**CONFIG, "architectures": ["GemmaForCausalLM"]}, {**CONFIG, "architectures": ["Qwen3MoeForCausalLM"]}
MERGED = "convert_hf_to_gguf.py"
EMBEDDING = of_base(names=["model.embed_tokens.weight"])
MISFITS: dict[str, tuple[Adapter, Mapping[str, torch.Tensor], Mapping[str, Any] | None, str, str]] = {
    "dora": (of_base("dora0-lora", [V]), BASE, CONFIG, "has no dora update", MERGED),
    "loha": (of_base("loha", [V]), BASE, CONFIG, "has no loha update", MERGED),
    "lokr": (of_base("lokr", [V]), BASE, CONFIG, "has no lokr update", MERGED),
    "a whole tensor": (of_base("replace", [V]), BASE, CONFIG, "has no replace update", MERGED),
    "a difference": (of_base("add", [V]), BASE, CONFIG, "has no add update", MERGED),
    "rows of a table": (
        of_base("replace_rows", ["model.embed_tokens.weight"]), BASE, CONFIG, "has no replace_rows", MERGED,
    ),
    "a bias": (
        Adapter((item("model.layers.0.self_attn.q_proj.bias", (4,), "add"),)),
        {"model.layers.0.self_attn.q_proj.bias": randn(4)}, CONFIG, "has no add update", MERGED,
    ),
    "no config": (of_base(), BASE, None, "the class None of the base is not known", "known are LlamaForCausalLM, "),
    "another class": (
        of_base(), BASE, {"architectures": ["GPT2LMHeadModel"]}, r"class \['GPT2LMHeadModel'\] of the base",
        "known are Llama",
    ),
    "no heads": (
        of_base(), BASE, {"architectures": ["LlamaForCausalLM"]}, "needs num_attention_heads",
        "the model's own config.json",
    ),
    "heads that do not divide": (
        of_base(names=[Q]), BASE, {**CONFIG, "num_attention_heads": 3, "num_key_value_heads": 3},
        "attn_q: 16 rows do not divide among 3 heads", "adapter's base",
    ),
    "another tensor": (
        Adapter((item("vision.layers.0.fc.weight", (4, 4)),)), {"vision.layers.0.fc.weight": randn(4, 4)}, CONFIG,
        "no such matrix of llama.cpp's architecture llama", MERGED,
    ),
    "a part of another architecture": (of_base(), BASE, QWEN, "llama.cpp's architecture qwen3moe", MERGED),
    "a convolution": (
        Adapter((item(V, (4, 4, 3)),)), {V: randn(4, 4, 3)}, CONFIG, "no such matrix", MERGED,
    ),
    "a stack in the place of a matrix": (
        Adapter((item(V, (2, 4, 4), experts=2),)), {V: randn(2, 4, 4)}, CONFIG, "no such matrix", MERGED,
    ),
    "odd rows of two halves": (
        Adapter((item(GATE_UP, (3, 5, 4), experts=3),)), {GATE_UP: randn(3, 5, 4)}, QWEN, "no such matrix", MERGED,
    ),
    "stored the other way round": (
        Adapter((item(DOWN, (8, 12), layout="in_out"),)), BASE, CONFIG, r"\[out, in\]", MERGED,
    ),
    "an embedding that is the head": (EMBEDDING, TIED, CONFIG, "the embedding is the head as well", MERGED),
    "an embedding of gemma": (EMBEDDING, BASE, GEMMA, "the embedding is the head as well", MERGED),
    "a head of gemma": (of_base(names=["lm_head.weight"]), BASE, GEMMA, "no head beside the embedding", MERGED),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("bake", [False, True])
def test_what_does_not_fit(name: str, bake: bool, tmp_path: Path) -> None:
    """There is nothing that a whole tensor could replace: baking does not help."""
    adapter, state, config, why, hint = MISFITS[name]
    error = refused(adapter, tmp_path, base=save_base(tmp_path / "base", state, config), bake=bake)
    assert {problem.code for problem in error.problems} == {"E-UNSUPPORTED"}
    with pytest.raises(loratool.Unsupported, match=why):
        raise error
    assert hint in error.hint
    assert "--bake" not in error.hint


def test_it_needs_the_base(tmp_path: Path) -> None:
    error = refused(of_base(), tmp_path)
    assert "its names and rows depend on the model's architecture" in error.message
    assert error.hint == "give the base with --base BASE"


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    made = Adapter((*of_base("dora0-lora", [V]).updates, *of_base("loha", [DOWN]).updates, *EMBEDDING.updates))
    error = refused(made, tmp_path, base=save_base(tmp_path / "base", TIED))
    assert [problem.message.split(": ", 1)[0] for problem in error.problems] == [
        f"gguf can not hold the dora updates of {V}",
        f"gguf can not hold the loha updates of {DOWN}",
        "gguf can not hold the lora updates of model.embed_tokens.weight",
    ]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    base = save_base(tmp_path / "base")
    loratool.save(of_base(), tmp_path / "a.safetensors")
    arguments = ("convert", tmp_path / "a.safetensors", "--to", "gguf", "--base", base, "-o")
    report = cli(*arguments, tmp_path / "a.gguf", "--json").json
    assert (report["to"], report["updates"], report["files"]) == ("gguf", 6, [str(tmp_path / "a.gguf")])
    wrong = cli(*arguments, tmp_path / "adapter")
    assert wrong.code == 2
    assert "say -o adapter.gguf" in wrong.err
