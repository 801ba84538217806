"""torchtune's files, laid out by hand as its own code lays them out: merged, mapped to transformers' names, refused.

What the layout is rests on test_torchtune_peer.py, which runs torchtune itself. Here the reordering of rows is derived
once more, from what rotary embeddings do to a query, not from how loratool computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import State, assert_rounded, assert_same_bits, read
from safetensors.torch import save_file
from torch import Tensor

import loratool

HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER = 4, 2, 6, 10, 14
ALPHA, RANK = 6, 3
SHAPES = {
    "attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn.output_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.w1": (INNER, WIDTH),
    "mlp.w2": (WIDTH, INNER),
    "mlp.w3": (INNER, WIDTH),
}
TRANSFORMERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
GENERATOR = torch.Generator()


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR) * 0.3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    GENERATOR.manual_seed(20)


def base_state(layers: int = 2) -> State:
    state = {f"layers.{i}.{m}.weight": values(*shape) for i in range(layers) for m, shape in SHAPES.items()}
    state |= {f"layers.{i}.sa_norm.scale": values(WIDTH) for i in range(layers)}
    return {**state, "tok_embeddings.weight": values(20, WIDTH), "output.weight": values(20, WIDTH)}


def factors(state: Mapping[str, Tensor], *modules: str, dora: bool = False, rank: int = RANK) -> State:
    made: State = {}
    for module in modules:
        out, columns = state[f"{module}.weight"].shape
        made[f"{module}.lora_a.weight"] = values(rank, columns)
        made[f"{module}.lora_b.weight"] = values(out, rank)
        if dora:
            made[f"{module}.magnitude"] = values(out).abs() + 0.5
    return made


def all_modules(layers: int = 2) -> list[str]:
    return [*(f"layers.{i}.{module}" for i in range(layers) for module in SHAPES), "output"]


def merged(state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], alpha: float = ALPHA) -> State:
    """W + alpha/rank * b @ a, and for DoRA every row of that brought to its magnitude; in float64."""
    result = {name: value.double() for name, value in state.items()}
    for name in adapter:
        if name.endswith(".lora_a.weight"):
            module = name.removesuffix(".lora_a.weight")
            a, b = adapter[name].double(), adapter[f"{module}.lora_b.weight"].double()  # [rank, in], [out, rank]
            W = result[f"{module}.weight"] + alpha / a.shape[0] * b @ a
            if (m := adapter.get(f"{module}.magnitude")) is not None:
                W = torch.stack([row * scale / row.norm() for row, scale in zip(W, m.double(), strict=True)])
            result[f"{module}.weight"] = W
    return result


def reordered(W: Tensor, heads: int) -> Tensor:
    """torchtune turns rows 2i and 2i+1 of a head by one angle, transformers rows i and i + half."""
    rows = []
    for head in range(heads):
        first = head * HEAD_DIM
        rows += [first + 2 * i for i in range(HEAD_DIM // 2)] + [first + 2 * i + 1 for i in range(HEAD_DIM // 2)]
    return W[rows]


def in_transformers(state: Mapping[str, Tensor], model_type: str) -> State:
    """The same weights as transformers stores them."""
    result: State = {}
    for name, value in state.items():
        if not name.startswith("layers."):
            own = {"tok_embeddings.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}[name]
            result[own] = value
            continue
        _, layer, rest = name.split(".", 2)
        if rest == "sa_norm.scale":
            result[f"model.layers.{layer}.input_layernorm.weight"] = value
            continue
        module = rest.removesuffix(".weight")
        if model_type in ("llama", "mistral", "gemma", "gemma2"):
            heads = {"attn.q_proj": HEADS, "attn.k_proj": KV_HEADS}.get(module)
            value = value if heads is None else reordered(value, heads)
        result[f"model.layers.{layer}.{TRANSFORMERS[module]}.weight"] = value
    if model_type == "phi3":
        for layer in sorted({name.split(".")[2] for name in result if ".layers." in name}):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            result[f"{attention}.qkv_proj.weight"] = torch.cat(
                [result.pop(f"{attention}.{m}_proj.weight") for m in "qkv"]
            )
            result[f"{mlp}.gate_up_proj.weight"] = torch.cat(
                [result.pop(f"{mlp}.{m}_proj.weight") for m in ("gate", "up")]
            )
    return result


def save_transformers(state: Mapping[str, Tensor], folder: Path, model_type: str, **config: Any) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in in_transformers(state, model_type).items()}, folder / "model.safetensors")
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    document = {"model_type": model_type, "hidden_size": WIDTH, **heads, **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return folder


def save_adapter(state: Mapping[str, Tensor], folder: Path, **config: Any) -> Path:
    """As torchtune's checkpointers do: ``adapter_model.pt``, and a config of four fields."""
    folder.mkdir()
    torch.save(dict(state), folder / "adapter_model.pt")
    document = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA", **config}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return folder / "adapter_model.pt"


def check(folder: Path, want: Mapping[str, Tensor], base: Mapping[str, Tensor], changed: int) -> None:
    got = read(folder)
    assert sorted(got) == sorted(want)
    assert sum(not torch.equal(got[name], base[name]) for name in got) == changed
    for name, value in got.items():
        assert_rounded(value, want[name].double(), name=name)


def refused(code: str, *words: str, **call: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(call["base"], [call["adapter"]], call["out"])
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not call["out"].exists()
    return caught.value


# --- torchtune's own names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_into_a_torchtune_base(dora: bool, tmp_path: Path) -> None:
    base = base_state()
    adapter = factors(base, *all_modules(), dora=dora)
    torch.save(base, tmp_path / "torchtune_model_0.pt")
    file = save_adapter(adapter, tmp_path / "epoch_0")
    loratool.merge(tmp_path / "torchtune_model_0.pt", [file], tmp_path / "out.safetensors")
    got = read_one(tmp_path / "out.safetensors")
    want = merged(base, adapter)
    for name, value in got.items():
        assert_rounded(value, want[name], name=name)
    assert sum(not torch.equal(got[name], base[name]) for name in base) == 15
    loratool.unmerge(
        tmp_path / "out.safetensors", [file], tmp_path / "back.safetensors", base=tmp_path / "torchtune_model_0.pt"
    )
    assert_same_bits(read_one(tmp_path / "back.safetensors"), base)


def read_one(file: Path) -> State:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("dora", [False, True])
def test_a_wrapped_checkpoint_is_taken_apart(dora: bool, tmp_path: Path) -> None:
    base = base_state()
    adapter = factors(base, *all_modules()[::2], dora=dora)
    torch.save({"model": {**base, **adapter}}, tmp_path / "wrapped.pt")
    summary = loratool.inspect(tmp_path / "wrapped.pt")
    assert (summary.convention, summary.what) == ("torchtune", "wrapped checkpoint")
    assert any("alpha" in note for note in summary.notes)
    out = tmp_path / "a.lora.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(tmp_path / "wrapped.pt", out)
    assert caught.value.code == "E-ALPHA"
    loratool.extract(tmp_path / "wrapped.pt", out, alpha=ALPHA, scaling="alpha/rank", base_out=tmp_path / "base-out")
    assert loratool.validate(out) == []
    assert_same_bits(read(tmp_path / "base-out"), base)
    loratool.merge(tmp_path / "base-out", [out], tmp_path / "out")
    check(tmp_path / "out", merged(base, adapter), base, 8)


def test_a_wrapped_checkpoint_with_its_config(tmp_path: Path) -> None:
    base = base_state(1)
    adapter = factors(base, "output")
    torch.save({**base, **adapter}, tmp_path / "wrapped.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    out = tmp_path / "a.lora.safetensors"
    with pytest.raises(loratool.LoratoolError, match="alpha"):  # whose it is, nothing says
        loratool.extract(tmp_path / "wrapped.pt", out)
    loratool.extract(
        tmp_path / "wrapped.pt", out, config=tmp_path / "adapter_config.json", base_out=tmp_path / "base-out"
    )
    loratool.merge(tmp_path / "base-out", [out], tmp_path / "out")
    check(tmp_path / "out", merged(base, adapter), base, 1)


def test_biases_and_other_magnitudes_are_the_base_s_own(tmp_path: Path) -> None:
    base = {**base_state(1), "layers.0.attn.q_proj.bias": values(24), "scene.magnitude": values(3)}
    adapter = factors(base, "layers.0.attn.q_proj")
    torch.save({**base, **adapter}, tmp_path / "wrapped.pt")
    loratool.extract(
        tmp_path / "wrapped.pt", tmp_path / "a.lora.safetensors", alpha=1, scaling="alpha/rank", base_out=tmp_path / "b"
    )
    assert_same_bits(read(tmp_path / "b"), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices [experts, in, out], factors [experts, in, rank] and [experts, rank, out]; one matrix is square."""
    sizes = {"gate": (5, 7), "up": (5, 7), "down": (7, 7)}
    base = {f"layers.0.mlp.experts.{m}_proj": values(4, *size).to(dtype) for m, size in sizes.items()}
    base["layers.0.mlp.router.gate.weight"] = values(4, 5).to(dtype)
    adapter: State = {}
    want = {name: value.double() for name, value in base.items()}
    for m, (rows, columns) in sizes.items():
        a, b = values(4, rows, RANK).to(dtype), values(4, RANK, columns).to(dtype)
        adapter |= {f"layers.0.mlp.experts.lora_{m}_a": a, f"layers.0.mlp.experts.lora_{m}_b": b}
        for expert in range(4):
            delta = ALPHA / RANK * a[expert].double() @ b[expert].double()
            want[f"layers.0.mlp.experts.{m}_proj"][expert] += delta
    adapter |= factors(base, "layers.0.mlp.router.gate")
    want |= {"layers.0.mlp.router.gate.weight": merged(base, adapter)["layers.0.mlp.router.gate.weight"]}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    file = save_adapter(adapter, tmp_path / "epoch_0")
    loratool.merge(tmp_path / "base", [file], tmp_path / "out")
    check(tmp_path / "out", want, base, 4)
    torch.save({**base, **adapter}, tmp_path / "wrapped.pt")
    loratool.extract(
        tmp_path / "wrapped.pt", tmp_path / "a.lora.safetensors", alpha=ALPHA, scaling="alpha/rank",
        base_out=tmp_path / "base-out",
    )  # fmt: skip
    assert_same_bits(read(tmp_path / "base-out"), base)
    loratool.merge(tmp_path / "base-out", [tmp_path / "a.lora.safetensors"], tmp_path / "out2")
    check(tmp_path / "out2", want, base, 4)


# --- transformers' names --------------------------------------------------------------------------------------------

MODEL_TYPES = ["llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3", "phi3"]


@pytest.mark.parametrize("form", ["pt", "native"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_is_merged_into_a_transformers_base(model_type: str, dora: bool, form: str, tmp_path: Path) -> None:
    state = base_state()
    adapter = factors(state, *all_modules(), dora=dora)
    base = save_transformers(state, tmp_path / "base", model_type)
    file = save_adapter(adapter, tmp_path / "epoch_0")
    if form == "native":
        loratool.save(loratool.load(file, base=base), tmp_path / "a.lora.safetensors")
        file = tmp_path / "a.lora.safetensors"
        assert loratool.validate(file) == []
    report = loratool.merge(base, [file], tmp_path / "out")
    before = in_transformers(state, model_type)
    check(
        tmp_path / "out", in_transformers(merged(state, adapter), model_type), before, 9 if model_type == "phi3" else 15
    )
    if form == "pt":
        assert any(model_type in note for note in report.plan.notes)
    loratool.unmerge(tmp_path / "out", [file], tmp_path / "back", base=base)
    assert_same_bits(read(tmp_path / "back"), before)


def test_the_order_of_rows_matters(tmp_path: Path) -> None:
    """A llama and a qwen2 base with the same bytes get different results: the test above can fail."""
    state = base_state(1)
    file = save_adapter(factors(state, "layers.0.attn.q_proj"), tmp_path / "epoch_0")
    results = []
    for model_type in ("qwen2", "llama"):
        base = save_transformers(state, tmp_path / model_type, "qwen2")
        (base / "config.json").write_text((base / "config.json").read_text().replace("qwen2", model_type))
        loratool.merge(base, [file], tmp_path / f"out-{model_type}")
        results.append(read(tmp_path / f"out-{model_type}")["model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(*results)


@given(heads=st.integers(1, 5), half=st.integers(1, 5), trailing=st.sampled_from([(), (3,)]))
def test_reordered_rows_are_those_of_the_two_halves(heads: int, half: int, trailing: tuple[int, ...]) -> None:
    from loratool.conventions.torchtune_names import Place
    from loratool.tensors import TensorRef

    out = heads * 2 * half
    rows = torch.arange(out * max(1, *trailing, 1)).reshape(out, *trailing).float()
    place = Place("q.weight", heads=(heads, 2 * half))
    got = place.ordered(TensorRef.of(rows)).read()
    for head in range(heads):
        for pair in range(half):
            start = head * 2 * half
            assert torch.equal(got[start + pair], rows[start + 2 * pair])
            assert torch.equal(got[start + half + pair], rows[start + 2 * pair + 1])


def test_head_size_is_computed_where_the_config_lacks_it(tmp_path: Path) -> None:
    state = {"layers.0.attn.q_proj.weight": values(12, 12)}
    adapter = factors(state, "layers.0.attn.q_proj")
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": state["layers.0.attn.q_proj.weight"]}, base / "m.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 12, "num_attention_heads": 3}))
    loratool.merge(base, [save_adapter(adapter, tmp_path / "epoch_0")], tmp_path / "out")
    order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    b = adapter["layers.0.attn.q_proj.lora_b.weight"].double()[order]
    delta = ALPHA / RANK * b @ adapter["layers.0.attn.q_proj.lora_a.weight"].double()
    want = state["layers.0.attn.q_proj.weight"].double() + delta
    assert_rounded(read(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"], want)


# --- inspection -----------------------------------------------------------------------------------------------------


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    state = base_state(1)
    file = save_adapter(factors(state, "layers.0.attn.q_proj", "output", dora=True), tmp_path / "epoch_0")
    summary = loratool.inspect(file)
    assert (summary.convention, summary.what) == ("torchtune", "adapter")
    assert [(x.target, x.kind, x.rank, x.alpha, x.scale) for x in summary.layers] == [
        ("layers.0.attn.q_proj.weight", "dora", 3, 6.0, 2.0),
        ("output.weight", "dora", 3, 6.0, 2.0),
    ]
    base = save_transformers(state, tmp_path / "base", "phi3")
    layers = loratool.inspect(file, base=base).layers
    assert [(x.target, x.part) for x in layers] == [
        ("lm_head.weight", ""),
        ("model.layers.0.self_attn.qkv_proj.weight", "rows 0:24"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["l.q.lora_a", "l.q.lora_b"],  # MLX
        ["base_model.model.l.q.lora_A.weight", "base_model.model.l.q.lora_B.weight"],  # PEFT
        ["l.q.lora_A", "l.q.lora_B", "l.q.weight"],  # loralib
        ["l.q.lora.A", "l.q.lora.B", "l.q.linear.weight"],  # the plain wrapper
        ["lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"],
        ["transformer.q.lora.down.weight", "transformer.q.lora.up.weight"],
        ["layers.0.attn.q_proj.weight", "norm.scale", "magnitude", "x.magnitude"],  # no adapter at all
        ["q.adapter.linear_in.weight", "q.adapter.linear_out.weight"],
    ],
)
def test_other_files_are_not_torchtune_s(names: list[str], tmp_path: Path) -> None:
    from loratool.checkpoint import open_checkpoint
    from loratool.conventions import torchtune

    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    assert not torchtune.detect(open_checkpoint(tmp_path / "x.safetensors"))


def test_no_other_convention_takes_torchtune_s(tmp_path: Path) -> None:
    from loratool import conventions
    from loratool.checkpoint import open_checkpoint

    file = save_adapter(factors(base_state(1), "output"), tmp_path / "epoch_0")
    assert [c.NAME for c in conventions.matching(open_checkpoint(file))] == ["torchtune"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_without_alpha_it_is_asked_for(tmp_path: Path) -> None:
    state = base_state(1)
    adapter = factors(state, "output")
    base = save_transformers(state, tmp_path / "base", "llama")
    file = save_adapter(adapter, tmp_path / "epoch_0", lora_alpha=None)  # PEFT's default is not torchtune's
    assert loratool.load(file).unknown_scales()
    (file.parent / "adapter_config.json").unlink()
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, [file], tmp_path / "out")
    assert caught.value.code == "E-ALPHA"
    loaded = loratool.load(file, alpha=ALPHA, scaling="alpha/rank", base=base)
    loratool.merge(base, [loaded], tmp_path / "out")
    want = in_transformers(merged(state, adapter), "llama")
    check(tmp_path / "out", want, in_transformers(state, "llama"), 1)


def test_halves_and_wrong_shapes_are_named_together(tmp_path: Path) -> None:
    state = base_state(1)
    adapter = factors(state, *all_modules(1), dora=True)
    del adapter["layers.0.attn.q_proj.lora_a.weight"]
    adapter["layers.0.mlp.w1.lora_b.weight"] = values(INNER, RANK + 1)
    adapter["output.magnitude"] = values(3)
    file = save_adapter(adapter, tmp_path / "epoch_0")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.load(file)
    assert [problem.code for problem in caught.value.problems] == ["E-COMPONENTS", "E-SHAPE", "E-SHAPE"]
    for word in ("layers.0.attn.q_proj", "lora_b", "[14, 4]", "output", "magnitude [3]"):
        assert word in str(caught.value)


@pytest.mark.parametrize("part", ["a", "b"])
def test_half_of_an_expert_pair_is_refused(part: str, tmp_path: Path) -> None:
    adapter = {"l.experts.lora_up_a": values(2, 3, 1), "l.experts.lora_up_b": values(2, 1, 4)}
    del adapter[f"l.experts.lora_up_{part}"]
    file = save_adapter(adapter, tmp_path / "epoch_0", r=1)
    with pytest.raises(loratool.LoratoolError, match="lora_up_a and lora_up_b"):
        loratool.load(file)


@pytest.mark.parametrize(
    "shapes", [((2, 3, 1), (2, 2, 4)), ((2, 3, 1), (3, 1, 4)), ((6, 1), (1, 4)), ((2, 3, 0), (2, 0, 4))]
)
def test_expert_factors_that_do_not_fit_are_refused(shapes: Any, tmp_path: Path) -> None:
    adapter = {f"l.experts.lora_up_{part}": values(*shape) for part, shape in zip("ab", shapes, strict=True)}
    with pytest.raises(loratool.LoratoolError, match=r"l\.experts\.up_proj") as caught:
        loratool.load(save_adapter(adapter, tmp_path / "epoch_0"))
    assert caught.value.code == "E-SHAPE"


def test_the_config_of_another_adapter_is_refused(tmp_path: Path) -> None:
    file = save_adapter(factors(base_state(1), "output", "layers.0.mlp.w1"), tmp_path / "epoch_0", r=8)
    with pytest.raises(loratool.LoratoolError, match="r = 8") as caught:
        loratool.load(file)
    assert len(caught.value.problems) == 2


def test_a_module_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    state = {**base_state(1), "layers.0.moe.gate.weight": values(3, WIDTH)}
    adapter = factors(state, "layers.0.moe.gate", "output")
    del state["layers.0.moe.gate.weight"]
    base = save_transformers(state, tmp_path / "base", "llama")
    error = refused("E-TARGET", "layers.0.moe.gate", "llama", base=base,
                    adapter=save_adapter(adapter, tmp_path / "e"), out=tmp_path / "out")  # fmt: skip
    assert "torchtune" in error.hint


def test_a_layer_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    state = base_state(2)
    file = save_adapter(factors(state, "layers.0.mlp.w1", "layers.1.mlp.w1"), tmp_path / "e")
    base = save_transformers(base_state(1), tmp_path / "base", "llama")
    refused("E-TARGET", "model.layers.1.mlp.gate_proj", base=base, adapter=file, out=tmp_path / "out")


@pytest.mark.parametrize("model_type", ["mllama", "llama4", "t5", ""])
def test_models_whose_conversion_is_not_known_are_refused(model_type: str, tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", model_type)
    file = save_adapter(factors(state, "layers.0.mlp.w1"), tmp_path / "e")
    refused("E-UNSUPPORTED", repr(model_type), "torchtune", base=base, adapter=file, out=tmp_path / "out")


def test_experts_are_not_mapped_to_transformers(tmp_path: Path) -> None:
    base = save_transformers(base_state(1), tmp_path / "base", "qwen3")
    adapter = {"layers.0.mlp.experts.lora_up_a": values(2, 3, 3), "layers.0.mlp.experts.lora_up_b": values(2, 3, 4)}
    refused("E-UNSUPPORTED", "experts", base=base, adapter=save_adapter(adapter, tmp_path / "e"), out=tmp_path / "out")


def test_without_the_base_s_config_the_heads_are_not_guessed(tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "llama")
    (base / "config.json").unlink()
    file = save_adapter(factors(state, "layers.0.mlp.w1"), tmp_path / "e")
    error = refused("E-CONFIG", "heads", base=base, adapter=file, out=tmp_path / "out")
    assert "config.json" in error.hint


@pytest.mark.parametrize(
    "config",
    [{"num_attention_heads": None}, {"num_attention_heads": 0}, {"head_dim": "6"}, {"num_key_value_heads": True},
     {"num_attention_heads": 2.5, "head_dim": None}, {"hidden_size": None, "head_dim": None}],
    ids=str,
)  # fmt: skip
def test_a_config_without_sound_heads_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "llama", **config)
    file = save_adapter(factors(state, "layers.0.attn.q_proj"), tmp_path / "e")
    refused("E-CONFIG", "num_attention_heads", base=base, adapter=file, out=tmp_path / "out")


@pytest.mark.parametrize(
    "config", [{"head_dim": 8}, {"num_attention_heads": 3}, {"num_attention_heads": 8, "head_dim": 3}], ids=str
)
def test_heads_that_do_not_fit_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "llama", **config)
    file = save_adapter(factors(state, "layers.0.attn.q_proj"), tmp_path / "e")
    refused("E-SHAPE", "24 rows", base=base, adapter=file, out=tmp_path / "out")


def test_stacked_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "phi3", num_key_value_heads=4)
    file = save_adapter(factors(state, "layers.0.attn.k_proj"), tmp_path / "e")
    refused("E-SHAPE", "12 rows", "qkv_proj", base=base, adapter=file, out=tmp_path / "out")


@pytest.mark.parametrize("option", [{"adapter": "default"}, {"layout": {"*": "in_out"}}])
def test_options_that_mean_nothing_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    state = base_state(1)
    torch.save({**state, **factors(state, "output")}, tmp_path / "wrapped.pt")
    with pytest.raises(loratool.LoratoolError, match="means nothing"):
        loratool.extract(tmp_path / "wrapped.pt", tmp_path / "o.lora.safetensors", alpha=1, scaling="alpha", **option)
