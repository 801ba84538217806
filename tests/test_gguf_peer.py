"""llama.cpp's `gguf` package: its map of names, its writer's files, and its reader of what is read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="needs gguf")

# ruff: noqa: E402  # the imports below need what is looked for above
import numpy as np
import torch
from gguf_models import MODELS, adapter_for, converted_base, interleaved, save_model
from models import HIDDEN, State, assert_float32_close, changed, fill, llama, mixtral, read, save_base
from safetensors.torch import load_file

import loratool
from loratool.conventions.checked import CHECKED
from loratool.conventions.gguf_names import ARCHITECTURES, MODEL, STACKS
from loratool.gguf import read_gguf

pytestmark = pytest.mark.peers


def name_map(architecture: str, layers: int = 2) -> Any:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, layers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_llama_cpps_map(architecture: str) -> None:
    names, known = name_map(architecture), ARCHITECTURES[architecture]
    for part, owner in known.parts.items():
        assert names.get_name(f"model.layers.1.{owner}") == f"blk.1.{part}", owner
    for part, owner in MODEL.items():
        found = names.get_name(owner)
        assert found == part or (part == "output" and found is None), owner  # some are tied by design
    for part, single in known.experts.items():
        # Its converter stacks them under the name without a number.
        merged = f"model.layers.1.{single.replace('.{}', '')}"
        assert names.get_name(merged) == f"blk.1.{part}", single
    assert set(known.experts) <= set(STACKS)


def converted(adapter: Path, out: Path, names: Any, *, architecture: str, alpha: float, dtype: Any = None) -> Path:
    """As convert_lora_to_gguf.py writes a PEFT adapter: its names, orders and keys, with the real writer."""
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    state = load_file(adapter / "adapter_model.safetensors")
    embedding = "lora_embedding_"
    for key in state:
        if not key.endswith(("lora_A.weight", f"{embedding}A")):
            continue
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        a, b = state[key], state[key.replace("lora_A", "lora_B").replace(f"{embedding}A", f"{embedding}B")]
        name = names.get_name(module)
        if ARCHITECTURES[architecture].reordered and name.endswith(("attn_q", "attn_k")):
            b = interleaved(b, 4 if name.endswith("q") else 2)
        if name == "token_embd":
            a = a.T
        for part, value in (("a", a), ("b", b)):
            array = value.contiguous().numpy()
            array, kind = (array, None) if dtype is None else (gguf.quants.quantize(array, dtype), dtype)
            writer.add_tensor(f"{name}.weight.lora_{part}", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def peft_adapter(folder: Path, targets: list[str]) -> tuple[Path, Path, State]:
    """A base, PEFT's adapter for it, and PEFT's own merge."""
    import peft

    torch.manual_seed(1)
    model = llama(layers=2)
    base = save_base(model, folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    fill(wrapped, seed=2)
    wrapped.save_pretrained(folder / "peft", save_embedding_layers=False)
    return base, folder / "peft", dict(wrapped.merge_and_unload().state_dict())


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_merge_is_what_peft_merges(architecture: str, tmp_path: Path) -> None:
    base, adapter, want = peft_adapter(tmp_path, [*LINEAR, "embed_tokens", "lm_head"])
    file = converted(adapter, tmp_path / "a.gguf", name_map(architecture), architecture=architecture, alpha=12.0)
    loratool.merge(base, file, tmp_path / "out")
    got = read(tmp_path / "out")
    assert len(changed(read(base), got)) == 2 * len(LINEAR) + 2
    for name, value in got.items():
        assert_float32_close(value, want[name], name=name)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_both_readers_read_the_same(kind: str, tmp_path: Path) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 7.5)
    writer.add_array("general.tags", ["one", "two"])
    writer.add_array("x.numbers", [1, 2, 3])
    random = np.random.default_rng(3)
    for name, shape in {
        "blk.0.ffn_up_exps.weight.lora_a": (3, 2, 64),
        "blk.0.ffn_up_exps.weight.lora_b": (3, 5, 32),
    }.items():
        values = gguf.quants.quantize(random.standard_normal(shape).astype(np.float32), type_)
        writer.add_tensor(f"blk.0.ffn_up_exps.weight.{name}", values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs, ours = gguf.GGUFReader(file), read_gguf(file)
    assert set(ours.metadata) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    assert float(ours.metadata["adapter.lora.alpha"]) == 7.5
    assert {tensor.name for tensor in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        want = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.tensors[tensor.name].read(torch.float32), want.reshape(ours.tensors[tensor.name].shape))


def test_experts_as_transformers_saves_them(tmp_path: Path) -> None:
    """The converter stacks factors of single experts; transformers writes Mixtral's base under the old names."""
    torch.manual_seed(4)
    base = save_base(mixtral(), tmp_path / "base")
    before = read(base)
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    random = np.random.default_rng(5)
    prefix, want = "model.layers.0.block_sparse_moe.experts", dict(before)
    for part, number, (out, into) in (("gate", 1, (12, HIDDEN)), ("up", 3, (12, HIDDEN)), ("down", 2, (HIDDEN, 12))):
        a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 2, into), (3, out, 2)))
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight.lora_a", a)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight.lora_b", b)
        for e in range(3):
            name = f"{prefix}.{e}.w{number}.weight"
            want[name] = before[name] + 3.0 * torch.from_numpy(b[e] @ a[e])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loratool.merge(base, file, tmp_path / "out")
    got = read(tmp_path / "out")
    assert len(changed(before, got)) == 9
    for name, value in got.items():
        assert_float32_close(value, want[name], name=name)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_what_llama_cpp_adds(name: str, tmp_path: Path) -> None:
    """Read by the package; alpha / rank times the product as in llama-adapter.h, on tensors as its converter stores."""
    base = save_model(name, tmp_path / "base")
    made = adapter_for(base)
    loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = file.fields["adapter.lora.alpha"].contents()
    assert {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")} == {
        gguf.Keys.General.ARCHITECTURE: MODELS[name][2],
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.Adapter.LORA_ALPHA: alpha,
        gguf.Keys.General.ALIGNMENT: 32,
    }
    parts = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in file.tensors)
    loratool.merge(base, made, tmp_path / "merged")
    before, want = converted_base(base, name), converted_base(tmp_path / "merged", name)
    adapted = {key.rpartition(".lora_")[0] for key in parts}
    assert adapted == changed(before, want)
    for key in adapted:
        a, b = parts[f"{key}.lora_a"], parts[f"{key}.lora_b"]
        delta = a @ b.T if key == "token_embd.weight" else b @ a
        assert_float32_close(before[key] + alpha / b.shape[-1] * delta, want[key], name=key)


def test_the_models_are_those_that_are_claimed() -> None:
    import transformers

    known = {getattr(transformers, config)().model_type for config, _, _ in MODELS.values()}
    assert known == {*CHECKED["gguf"].families}
