"""What every writer is tried with: adapters that it holds, the base they are for, and the options it needs.

One entry per writer in WRITERS: a new one fails `test_every_convention.py` until it has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convention_cases import LAYER, LLAMA, LLAMA_SHAPES, MANY, RANK, base_of, diffusers, litgpt
from models import State
from strategies import Maker, make_update
from torch import Tensor

from loratool import Adapter, ConvertReport, Target, Targeted


def said(report: ConvertReport) -> tuple[str, ...]:
    """A conversion's notes on what it did, without the one on what nobody has tried."""
    return tuple(note for note in report.notes if not note.endswith("is not tested") and "is not tested;" not in note)


@dataclass(frozen=True)
class Written:
    """What a writer is tried with: adapters for one base, which have every kind that it writes, and the options."""

    adapters: Sequence[Adapter]
    base: State
    suffix: str = ""  # of the output; none for a folder
    options: Mapping[str, Any] = field(default_factory=dict)  # of `convert`
    choices: Mapping[str, Any] = field(default_factory=dict)  # of `load`, for what its files do not say
    beside: Mapping[str, Any] = field(default_factory=dict)  # files beside the base: JSON, or text
    turned: Mapping[str, str] = field(default_factory=dict)  # kinds that it writes as another one

    @property
    def kinds(self) -> set[str]:
        return {item.update.kind for adapter in self.adapters for item in adapter.updates}


def adapter(base: Mapping[str, Tensor], **forms: str) -> Adapter:
    """Updates of tensors of a base, by the forms of `strategies.make_update`; all LoRA of one rank and scale."""
    updates = [
        Targeted(Target(name, tuple(base[name].shape)), make_update(form, tuple(base[name].shape), Maker(n), RANK))
        for n, (name, form) in enumerate(forms.items())
    ]
    return Adapter(tuple(updates))


def on_many(**forms: str) -> Adapter:
    return adapter(MANY, **{f"l.{name.replace('__', '.')}": form for name, form in forms.items()})


def on_llama(*forms: str, suffix: str = "") -> Written:
    """For consumers of language models: attention and MLP by Hugging Face's names, all of one form; or a norm."""
    base = base_of(**LLAMA_SHAPES)
    matrices = [f"{LAYER}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    adapters = [
        adapter(base, **(dict.fromkeys(matrices, form) if form != "replace" else {"model.norm.weight": form}))
        for form in forms
    ]
    return Written(adapters, base, suffix, beside=LLAMA)


def all_kinds() -> list[Adapter]:
    return [
        on_many(q__weight="lora", v__weight="lora", emb__weight="replace_rows", norm__weight="replace"),
        on_many(o__weight="lora", o__bias="add"),
        on_many(q__weight="dora0-lora", v__weight="dora0-lora"),
        on_many(q__weight="loha", v__weight="loha"),
        on_many(q__weight="lokr"),
        on_many(q__weight="scale0", o__weight="scale1"),
    ]


def written_by_diffusers() -> Written:
    attention = "transformer_blocks.0.attn"
    v, o, norm = (f"{attention}.{part}" for part in ("to_v", "to_out.0", "norm_q"))
    base = diffusers()[0].base
    adapters = [
        adapter(base, **{f"{v}.weight": "lora"}),
        adapter(base, **{f"{o}.weight": "lora", f"{o}.bias": "add", f"{norm}.weight": "replace"}),
        adapter(base, **{f"{v}.weight": "dora0-lora"}),
    ]
    return Written(adapters, base, options={"as_component": "transformer"})


def written_by_kohya() -> Written:
    return Written([on_many(q__weight="lora", v__weight="lora")], MANY, ".safetensors", {"as_component": "unet"})


def written_by_litgpt() -> Written:
    base = {name: value for name, value in litgpt()[0].base.items() if name != "untouched.weight"}
    model = "n_layer: 1\nn_head: 4\nn_query_groups: 2\nhead_size: 3\npadded_vocab_size: 5\nmlp_class_name: LLaMAMLP\n"
    return Written([adapter(base, **dict.fromkeys(base, "lora"))], base, beside={"model_config.yaml": model})


def written_by_lycoris() -> Written:
    adapters = [
        on_many(q__weight="lora", v__weight="loha", o__weight="lokr", o__bias="add"),
        on_many(q__weight="dora0-lora", v__weight="dora1-lora", o__weight="replace"),
        on_many(q__weight="scale0", v__weight="scale1"),
    ]
    return Written(adapters, MANY, ".safetensors", {"as_component": "unet"}, turned={"replace": "add"})


# Entries do not wait for their writer: each counts from the day that its convention has one.
WRITERS: dict[str, Callable[[], Written]] = {
    "native": lambda: Written(all_kinds(), MANY, ".safetensors"),
    "peft": lambda: Written(all_kinds(), MANY),
    "kohya": written_by_kohya,
    "lycoris": written_by_lycoris,
    "diffusers": written_by_diffusers,
    "litgpt": written_by_litgpt,
    "torchtune": lambda: on_llama("lora", "dora0-lora"),
    "mlx": lambda: on_llama("lora", "dora0-lora", "replace"),
    "gguf": lambda: on_llama("lora", suffix=".gguf"),
}
