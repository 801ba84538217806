"""What PEFT writes and what PEFT's own merge makes of it: one row per feature.

The truth of every row is PEFT's `merge_and_unload`, run twice: as it is, and with every number
widened to float64 first. The second is the exact result that a merge has to round.
"""

from __future__ import annotations

import copy
import functools
import importlib
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from models import (
    HIDDEN,
    Net,
    State,
    bert,
    fill,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    own,
    read,
    save_base,
)
from torch import nn


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    changed: int  # number of tensors that PEFT's merge changes: a guard against rows that test nothing
    config: dict[str, Any]
    kind: str = "LoraConfig"
    names: str = "disk"  # or "memory": the base is saved under the names of its modules
    base_dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: what PEFT picks
    adapter_name: str = "default"
    bound: bool = False  # only the base can tell how the factors lie (square tensors)
    inject: bool = False  # without PeftModel around it

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Built:
    case: Case
    base: Path  # folder of the base checkpoint
    adapter: Path  # folder with adapter_config.json
    wrapped: State  # state dict of the wrapped model
    exact: State  # PEFT's merge in float64, by the base's names
    merged: State  # PEFT's merge as it is
    trained_in_place: frozenset[str]  # base tensors that a wrapped file no longer has

    @property
    def config(self) -> Path:
        return self.adapter / "adapter_config.json"

    @property
    def base_state(self) -> State:
        return read(self.base)


def row(name: str, model: Callable[[], nn.Module], changed: int, **values: Any) -> Case:
    """A row for `LoraConfig`; what `Case` does not know belongs to the config."""
    known = {field.name for field in fields(Case)}
    config = {"r": 4, "lora_alpha": 6} | {k: v for k, v in values.items() if k not in known}
    if values.get("kind", "LoraConfig") != "LoraConfig":
        del config["r"], config["lora_alpha"]
    rest = {k: v for k, v in values.items() if k in known}
    return Case(name, model, changed, config, **rest)


def untied_gpt2() -> nn.Module:
    model = gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


llama2 = functools.partial(llama, layers=2)
tied_llama = functools.partial(llama, tied=True)
square_mixtral = functools.partial(mixtral, inner=HIDDEN)
square_gate_up = functools.partial(mixtral, inner=HIDDEN // 2)
square_gpt_oss = functools.partial(gpt_oss, inner=HIDDEN)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
CONVOLUTIONS = ["conv1", "conv2", "point", "conv3"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = ["query", "key", "value", "dense"]
TABLES = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
BF16, FP16 = torch.bfloat16, torch.float16

SCALE = [
    row("llama", llama2, 14, target_modules=LINEAR),
    row("llama-all-linear", llama, 7, target_modules="all-linear"),
    row("llama-regex", llama2, 2, target_modules=r".*\.layers\.1\..*\.[qv]_proj"),
    row("llama-one-layer", llama2, 1, target_modules=["q_proj"], layers_to_transform=[1]),
    row("llama-rslora", llama, 7, target_modules=LINEAR, use_rslora=True),
    row(
        "llama-rank-pattern",
        llama2,
        8,
        target_modules=ATTENTION,
        rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 7},
    ),
    row(
        "llama-alpha-pattern",
        llama2,
        8,
        target_modules=ATTENTION,
        alpha_pattern={"q_proj": 3, "^model.layers.1.self_attn.k_proj": 20},
    ),
    row(
        "llama-both-patterns",
        llama2,
        8,
        target_modules=ATTENTION,
        rank_pattern={"[qk]_proj": 2},
        alpha_pattern={"k_proj": 9, "layers.0.self_attn.v_proj": 1},
    ),
    row(
        "llama-both-patterns-rslora",
        llama,
        4,
        target_modules=ATTENTION,
        use_rslora=True,
        rank_pattern={"q_proj": 9},
        alpha_pattern={"q_proj": 5},
    ),
    # the file sorts the patterns, so that another one comes first: the tensors know the rank
    row(
        "llama-rank-pattern-overlap",
        llama,
        1,
        target_modules=["q_proj"],
        rank_pattern={"self_attn.q_proj": 4, "layers.0.self_attn.q_proj": 6},
    ),
    row("llama-rank-above-width", llama, 2, target_modules=["q_proj", "k_proj"], r=HIDDEN + 4),
    row("llama-rank-equals-width", llama, 2, target_modules=["q_proj", "down_proj"], r=HIDDEN),
]

DORA = [
    row("llama-dora", llama, 7, target_modules=LINEAR, use_dora=True),
    row(
        "llama-dora-embedding",
        llama,
        2,
        target_modules=["q_proj", "embed_tokens"],
        use_dora=True,
        use_rslora=True,
    ),
    row(
        "gpt2-dora",
        gpt2,
        10,
        target_modules=[*CONV1D, "wte", "wpe"],
        use_dora=True,
        fan_in_fan_out=True,
        bound=True,
    ),
    row(
        "net-dora",
        Net,
        6,
        target_modules=[*CONVOLUTIONS, "emb", "fc"],
        use_dora=True,
        names="memory",
    ),
]

LAYOUT = [
    row("gpt2", gpt2, 8, target_modules=CONV1D, fan_in_fan_out=True, bound=True),
    row("gpt2-square", gpt2, 2, target_modules=["attn.c_proj"], fan_in_fan_out=True, bound=True),
    row("gpt2-flag-not-given", gpt2, 2, target_modules=["c_attn"]),
    # PEFT keeps one flag for all layers: beside a Linear it ends up false, though c_proj needs it
    row("gpt2-flag-wrong", untied_gpt2, 9, target_modules=[*CONV1D, "lm_head"], bound=True),
    row(
        "gpt2-flag-wrong-dora",
        untied_gpt2,
        9,
        target_modules=[*CONV1D, "lm_head"],
        use_dora=True,
        bound=True,
    ),
    row("gpt2-embedding", gpt2, 3, target_modules=["c_attn", "wpe"], fan_in_fan_out=True),
    row("bert", bert, 7, target_modules=DENSE),
    row("bert-embeddings", bert, 4, target_modules=[*TABLES, "query"]),
    row("llama-embedding-and-head", llama, 2, target_modules=["embed_tokens", "lm_head"]),
    row("llama-head", llama, 2, target_modules=["lm_head", "q_proj"]),
    row("llama-tied", tied_llama, 1, target_modules=["q_proj"]),
    row("llama-tied-embedding", tied_llama, 2, target_modules=["embed_tokens", "q_proj"]),
    row("net-conv", Net, 5, target_modules=[*CONVOLUTIONS, "emb"], names="memory"),
    # torch's attention: out_proj's delta counts twice in PEFT, in the forward as in the merge
    row("net-attention", Net, 2, target_modules=["mha"], names="memory"),
    row("net-attention-out", Net, 1, target_modules=["out_proj"], names="memory"),
]

FULL = [
    row("bert-classifier", bert, 3, target_modules=["query"], task_type="SEQ_CLS"),
    row("bert-bias-all", bert, 12, target_modules=["query"], bias="all"),
    row(
        "bert-bias-all-classifier",
        bert,
        13,
        target_modules=["query"],
        bias="all",
        task_type="SEQ_CLS",
    ),
    row(
        "bert-bias-lora-only",
        bert,
        6,
        target_modules=["query", "value"],
        bias="lora_only",
        task_type="SEQ_CLS",
    ),
    row("gpt2-bias-all", gpt2, 15, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    row("bert-lora-bias", bert, 10, target_modules=["query", "dense"], lora_bias=True),
    row(
        "net-lora-bias",
        Net,
        6,
        target_modules=["conv1", "conv2", "fc"],
        lora_bias=True,
        names="memory",
    ),
    row("net-head", Net, 5, target_modules=["fc"], modules_to_save=["head"], names="memory"),
    # of each bias in the head the file has three, one of them under the adapter's name
    row(
        "net-head-bias-all",
        Net,
        13,
        target_modules=["fc"],
        modules_to_save=["head"],
        bias="all",
        names="memory",
    ),
    row("llama-norms", llama, 4, target_modules=["q_proj"], modules_to_save=["norm"]),
    row(
        "llama-saved-embeddings",
        llama,
        3,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    ),
]

ROWS = [
    row("llama-tokens", llama, 2, target_modules=["q_proj"], trainable_token_indices=[7, 1, 30]),
    row(
        "llama-tokens-by-module",
        llama,
        3,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [2]},
    ),
    row(
        "llama-tokens-tied",
        tied_llama,
        2,
        target_modules=["q_proj"],
        trainable_token_indices=[7, 1],
    ),
    row(
        "llama-tokens-without-lora",
        llama,
        1,
        kind="TrainableTokensConfig",
        target_modules=["embed_tokens"],
        token_indices=[9, 0, 4],
    ),
]

MIXTURE = [
    row(
        "mixtral",
        mixtral,
        4,
        target_modules=["q_proj"],
        target_parameters=[*EXPERTS, "mlp.gate.weight"],
        names="memory",
    ),
    row("mixtral-down", mixtral, 1, target_parameters=[EXPERTS[1]], names="memory"),
    row("mixtral-gate-up", mixtral, 1, target_parameters=[EXPERTS[0]], names="memory"),
    row("mixtral-rslora", mixtral, 2, target_parameters=EXPERTS, use_rslora=True, names="memory"),
    row(
        "mixtral-patterns",
        mixtral,
        2,
        target_parameters=EXPERTS[::-1],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 5},
        names="memory",
    ),
    row(
        "mixtral-square-down",
        square_mixtral,
        2,
        target_parameters=EXPERTS,
        names="memory",
        bound=True,
    ),
    row(
        "mixtral-square-gate-up",
        square_gate_up,
        2,
        target_parameters=EXPERTS,
        names="memory",
        bound=True,
    ),
    row(
        "gpt-oss",
        gpt_oss,
        4,
        target_modules=["q_proj"],
        target_parameters=[*EXPERTS, "mlp.router.weight"],
    ),
    row("gpt-oss-square-down", square_gpt_oss, 2, target_parameters=EXPERTS, bound=True),
]

DTYPE = [
    row("llama-bf16", llama2, 14, target_modules=LINEAR, base_dtype=BF16),
    row("llama-fp16", llama, 7, target_modules=LINEAR, base_dtype=FP16),
    row("llama-all-bf16", llama, 7, target_modules=LINEAR, base_dtype=BF16, adapter_dtype=BF16),
    row("llama-all-fp16", llama, 7, target_modules=LINEAR, base_dtype=FP16, adapter_dtype=FP16),
    row("llama-fp32-bf16", llama, 7, target_modules=LINEAR, adapter_dtype=BF16),
    row("llama-bf16-fp16", llama, 7, target_modules=LINEAR, base_dtype=BF16, adapter_dtype=FP16),
    row(
        "llama-bf16-dora",
        llama,
        8,
        target_modules=[*LINEAR, "embed_tokens"],
        use_dora=True,
        base_dtype=BF16,
    ),
    row(
        "gpt2-bf16",
        gpt2,
        9,
        target_modules=[*CONV1D, "wte"],
        fan_in_fan_out=True,
        base_dtype=BF16,
        bound=True,
    ),
    row(
        "bert-bf16",
        bert,
        4,
        target_modules=["query"],
        lora_bias=True,
        task_type="SEQ_CLS",
        base_dtype=BF16,
    ),
    row("mixtral-bf16", mixtral, 2, target_parameters=EXPERTS, names="memory", base_dtype=BF16),
    row(
        "llama-bf16-tokens",
        llama,
        2,
        target_modules=["q_proj"],
        trainable_token_indices=[4, 2],
        base_dtype=BF16,
    ),
]

NAMES = [
    row(
        "net-adapter-name",
        Net,
        6,
        target_modules=["fc", "emb"],
        modules_to_save=["head"],
        names="memory",
        adapter_name="my_adapter",
    ),
    row(
        "llama-adapter-name-dora",
        llama,
        1,
        target_modules=["q_proj"],
        use_dora=True,
        adapter_name="v2",
    ),
    row(
        "net-injected",
        Net,
        6,
        target_modules=["fc", "conv2"],
        modules_to_save=["head"],
        names="memory",
        inject=True,
    ),
    row(
        "llama-injected-dora",
        llama,
        2,
        target_modules=["q_proj", "embed_tokens"],
        use_dora=True,
        inject=True,
    ),
]

CASES = [*SCALE, *DORA, *LAYOUT, *FULL, *ROWS, *MIXTURE, *DTYPE, *NAMES]


def peft() -> Any:
    """The library, imported late and without what it warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("peft")


def build(case: Case, folder: Path) -> Built:
    """Make the base, wrap it, give the adapter values, save everything, and let PEFT merge."""
    torch.manual_seed(11)
    model = case.model()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: values that hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.1
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model = model.to(case.base_dtype)
    base = save_base(model, folder / "base", names=case.names)
    config = getattr(peft(), case.kind)(**case.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.inject:
            wrapped = peft().inject_adapter_in_model(config, model)
        else:
            wrapped = peft().get_peft_model(
                model,
                config,
                adapter_name=case.adapter_name,
                autocast_adapter_dtype=case.adapter_dtype is None,
            )
        fill(wrapped, seed=5)
        if case.adapter_dtype is not None:
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(case.adapter_dtype)
        adapter = _save_adapter(wrapped, config, case, folder / "adapter")
        state = own(wrapped.state_dict())
        exact = merge_with_peft(copy.deepcopy(wrapped).double())
        merged = merge_with_peft(wrapped)
    names = read(base)
    return Built(
        case=case,
        base=base,
        adapter=adapter,
        wrapped=state,
        exact={name: exact[name] for name in names},
        merged={name: merged[name] for name in names},
        trained_in_place=_trained_in_place(case, state, names),
    )


def merge_with_peft(wrapped: nn.Module, adapters: list[str] | None = None) -> State:
    """PEFT's own merge. Consumes the model."""
    if hasattr(wrapped, "merge_and_unload"):
        return own(wrapped.merge_and_unload(adapter_names=adapters).state_dict())
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(wrapped.named_modules()):  # inject_adapter_in_model leaves no merge_and_unload
        if isinstance(module, ModulesToSaveWrapper):
            wrapped.set_submodule(name, module.modules_to_save[module.active_adapter])
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            wrapped.set_submodule(name, module.get_base_layer())
    return own(wrapped.state_dict())


def _save_adapter(wrapped: nn.Module, config: Any, case: Case, folder: Path) -> Path:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if case.inject:
        folder.mkdir()
        save_file(
            own(get_peft_model_state_dict(wrapped)),
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(folder)
        return folder
    wrapped.save_pretrained(folder)
    return folder if case.adapter_name == "default" else folder / case.adapter_name


def _trained_in_place(case: Case, wrapped: State, base: State) -> frozenset[str]:
    """Biases trained with `bias=`: the wrapped model has no copy of what they were."""
    bias = case.config.get("bias", "none")
    if bias == "none":
        return frozenset()
    kept = {
        key.removeprefix("base_model.model.").replace(".original_module.", ".")
        for key in wrapped
        if ".original_module." in key
    }
    names = set()
    for name in base:
        module = name.removesuffix(".bias")
        targeted = f"base_model.model.{module}.base_layer.bias" in wrapped
        if name.endswith(".bias") and (targeted or bias == "all") and name not in kept:
            names.add(name)
    return frozenset(names)


def as_bin(built: Built, folder: Path) -> Path:
    """The same adapter folder, with the pickle that PEFT wrote before safetensors."""
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copy(built.config, folder)
    torch.save(load_file(built.adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")
    return folder
