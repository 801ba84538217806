"""A small file of every convention, and its truth in float64.

One entry per convention in SAMPLES: a new one fails `test_every_convention.py` until it has its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import State
from safetensors.torch import save_file
from test_gguf import KEYS, gguf_bytes
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, ReplaceRows, Scale, Scaling

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
OUT, IN = 6, 4
BY_RANK = {"alpha": ALPHA, "scaling": "alpha/rank"}


@dataclass(frozen=True)
class Sample:
    """A source: how to write it, the base it changes, and what of that it changes, in float64."""

    write: Callable[[Path], Path]  # into an empty folder; the path that a user names
    base: State
    exact: State
    kinds: frozenset[str]
    choices: Mapping[str, Any] = field(default_factory=dict)  # what the files do not say
    beside: Mapping[str, Any] = field(default_factory=dict)  # files beside the base: JSON, or text


# -- numbers ----------------------------------------------------------------------------------------------------------


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(31 * seed + sum(shape)))


def pair(seed: int, out: int = OUT, into: int = IN) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank]."""
    return values(RANK, into, seed=seed), values(out, RANK, seed=seed + 1)


def plus(W: Tensor, A: Tensor, B: Tensor, scale: float = SCALE) -> Tensor:
    return W.double() + scale * (B.double() @ A.double())


def with_norm(V: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: every row of V brought to its magnitude."""
    return torch.stack([row * m / row.norm() for row, m in zip(V, magnitude.double(), strict=True)])


def hadamard(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, scale: float = SCALE) -> Tensor:
    return W.double() + scale * (B1.double() @ A1.double()) * (B2.double() @ A2.double())


def kronecker(W: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    return W.double() + scale * torch.kron(w1.double(), w2.double())


def rows_replaced(W: Tensor, rows: list[int], new: Tensor) -> Tensor:
    W = W.double().clone()
    W[rows] = new.double()
    return W


# -- files ------------------------------------------------------------------------------------------------------------


def file(state: Mapping[str, Any], name: str, *, folder: bool = False, **beside: Any) -> Callable[[Path], Path]:
    """Writes tensors under a name, by its suffix, and JSON files (`config_json={}`) beside it."""

    def write(place: Path) -> Path:
        path = place / name
        if name.endswith(".gguf"):
            path.write_bytes(gguf_bytes(state, {**KEYS, "adapter.lora.alpha": ALPHA}))
        elif name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
        for other, content in beside.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (place / other.replace("__", ".")).write_text(text)
        return place if folder else path

    return write


def base_of(*names: str, **shapes: tuple[int, ...]) -> State:
    """Matrices [out, in] by name, and others by name and shape; `__` stands for a dot."""
    sizes = dict.fromkeys(names, (OUT, IN)) | {name.replace("__", "."): shape for name, shape in shapes.items()}
    state = {name: values(*shape, seed=50 + n) for n, (name, shape) in enumerate(sizes.items())}
    return state | {"untouched.weight": values(3, 5)}


# -- the conventions --------------------------------------------------------------------------------------------------

MANY = base_of(
    "l.q.weight", "l.v.weight", "l.o.weight", "l.emb.weight", l__o__bias=(OUT,), l__norm__weight=(OUT,)
)  # fmt: skip
(QA, QB), (VA, VB), (OA, OB) = pair(1), pair(3), pair(5)
MAGNITUDE, ROWS, NEW = values(OUT, seed=7).abs() + 0.5, [1, 4], values(2, IN, seed=8)
NORM, BIAS = values(OUT, seed=9), values(OUT, seed=10)
W1, W2A, W2B = values(2, 2, seed=11), values(3, 1, seed=12), values(1, 2, seed=13)  # [2, 2] x [3, 2]
SIX = {
    "l.q.weight": plus(MANY["l.q.weight"], QA, QB),
    "l.v.weight": with_norm(plus(MANY["l.v.weight"], VA, VB), MAGNITUDE),
    "l.o.weight": plus(MANY["l.o.weight"], OA, OB),
    "l.o.bias": MANY["l.o.bias"].double() + SCALE * BIAS.double(),
    "l.emb.weight": rows_replaced(MANY["l.emb.weight"], ROWS, NEW),
    "l.norm.weight": NORM.double(),
}
HADAMARD = {"l.q.weight": hadamard(MANY["l.q.weight"], QA, QB, VA, VB)}
IA3_IN = values(IN, seed=16)
SCALED = {
    "l.q.weight": MANY["l.q.weight"].double() * IA3_IN.double(),
    "l.o.weight": MANY["l.o.weight"].double() * MAGNITUDE.double()[:, None],
    "l.o.bias": MANY["l.o.bias"].double() * MAGNITUDE.double(),
}
KRONECKER = {"l.q.weight": kronecker(MANY["l.q.weight"], W1, W2A @ W2B, ALPHA)}  # of rank 1


def ref(value: Tensor) -> TensorRef:
    return TensorRef.of(value)


def native_adapter() -> Adapter:
    by_rank, by_one = Scaling.by("alpha/rank", ALPHA, RANK), Scaling.by("alpha/rank", ALPHA, 1)
    table = Target("l.emb.weight", (OUT, IN), layout="embedding")
    updates = [
        Targeted(Target("l.q.weight", (OUT, IN)), Loha(ref(QA), ref(QB), ref(VA), ref(VB), by_rank)),
        Targeted(Target("l.v.weight", (OUT, IN)), Dora(Lora(ref(VA), ref(VB), by_rank), ref(MAGNITUDE), 0)),
        Targeted(Target("l.o.weight", (OUT, IN)), Lora(ref(OA), ref(OB), by_rank)),
        Targeted(Target("l.k.weight", (OUT, IN)), Lokr(by_one, ref(W1), A2=ref(W2B), B2=ref(W2A))),
        Targeted(Target("l.o.bias", (OUT,)), Add(ref(BIAS), Scaling(scale=SCALE))),
        Targeted(table, ReplaceRows(ref(torch.tensor(ROWS)), ref(NEW))),
        Targeted(Target("l.norm.weight", (OUT,)), Replace(ref(NORM))),
        Targeted(Target("l.w.weight", (OUT, IN)), Scale(ref(MAGNITUDE), 0)),
    ]
    return Adapter(tuple(updates))


def native() -> list[Sample]:
    def write(place: Path) -> Path:
        loratool.save(native_adapter(), place / "a.lora.safetensors")
        return place / "a.lora.safetensors"

    base = MANY | {"l.k.weight": values(OUT, IN, seed=70), "l.w.weight": values(OUT, IN, seed=71)}
    exact = {**SIX, **HADAMARD, "l.w.weight": base["l.w.weight"].double() * MAGNITUDE.double()[:, None]}
    exact |= {"l.k.weight": kronecker(base["l.k.weight"], W1, W2A @ W2B, ALPHA)}
    kinds = {"lora", "dora", "loha", "lokr", "scale", "replace", "add", "replace_rows"}
    return [Sample(write, base, exact, frozenset(kinds))]


def plain() -> list[Sample]:
    base = base_of("l.q.weight")
    state = {"l.q.linear.weight": base["l.q.weight"], "l.q.lora.A": QA.T, "l.q.lora.B": QB.T}
    exact = {"l.q.weight": plus(base["l.q.weight"], QA, QB)}
    return [Sample(file(state, "model.pth"), base, exact, frozenset({"lora"}), BY_RANK)]


LORA_CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "trainable_token_indices": {"l.emb": ROWS}}


def peft_samples(name: str, wrapped: bool) -> list[Sample]:
    """`wrapped`: the adapter's name is in the keys of factors, and the base lies beside them."""
    own, weight = (".default", ".default.weight") if wrapped else ("", ".weight")
    lora = {
        f"l.{module}.lora_{side}{weight}": value
        for module, factors in {"q": (QA, QB), "v": (VA, VB), "o": (OA, OB)}.items()
        for side, value in zip("AB", factors, strict=True)
    }
    lora |= {f"l.o.lora_B{own}.bias": BIAS, f"l.emb.token_adapter.trainable_tokens_delta{own}": NEW}
    lora["l.v.lora_magnitude_vector" + (weight if wrapped else "")] = MAGNITUDE
    lora["l.norm.modules_to_save.default.weight" if wrapped else "l.norm.weight"] = NORM
    loha = {f"l.q.hada_w{n}_{side}{own}": value for n, side, value in
            ((1, "a", QB), (1, "b", QA), (2, "a", VB), (2, "b", VA))}  # fmt: skip
    lokr = {f"l.q.lokr_{part}{own}": value for part, value in (("w1", W1), ("w2_a", W2A), ("w2_b", W2B))}
    methods = (
        (lora, LORA_CONFIG, SIX, {"lora", "dora", "add", "replace", "replace_rows"}),
        (loha, {"peft_type": "LOHA", "r": RANK, "alpha": ALPHA}, HADAMARD, {"loha"}),
        (lokr, {"peft_type": "LOKR", "r": 1, "alpha": ALPHA}, KRONECKER, {"lokr"}),
    )
    if not wrapped:
        ia3 = {"l.o.ia3_l": MAGNITUDE.reshape(-1, 1), "l.q.ia3_l": IA3_IN.reshape(1, -1)}
        methods = (*methods, (ia3, {"peft_type": "IA3", "feedforward_modules": ["l.q"]}, SCALED, {"scale"}))
    return [
        Sample(
            file(
                {f"base_model.model.{key}": value for key, value in parts.items()},
                name,
                folder=True,
                adapter_config__json=config,
            ),
            MANY,
            exact,
            frozenset(kinds),
        )
        for parts, config, exact, kinds in methods
    ]


def loralib() -> list[Sample]:
    """Biases replace; a grouped convolution, whose product no LoRA of its weight is, adds."""
    base = base_of("l.q.weight", l__q__bias=(OUT,), conv__conv__weight=(4, 2, 3, 3))
    A, B = values(RANK * 3, 4 * 3, seed=2), values(2 * 3, RANK * 3, seed=3)
    state = {"l.q.lora_A": QA, "l.q.lora_B": QB, "l.q.bias": BIAS, "conv.lora_A": A, "conv.lora_B": B}
    exact = {
        "l.q.weight": plus(base["l.q.weight"], QA, QB),
        "l.q.bias": BIAS.double(),
        "conv.conv.weight": base["conv.conv.weight"].double() + SCALE * (B.double() @ A.double()).reshape(4, 2, 3, 3),
    }
    return [Sample(file(state, "lora.pt"), base, exact, frozenset({"lora", "replace", "add"}), {"alpha": ALPHA})]


def kohya() -> list[Sample]:
    base = base_of("a.to_q.weight")
    state = {"lora_down.weight": QA, "lora_up.weight": QB, "alpha": torch.tensor(ALPHA)}
    state = {f"lora_unet_a_to_q.{part}": value for part, value in state.items()}
    exact = {"a.to_q.weight": plus(base["a.to_q.weight"], QA, QB)}
    return [Sample(file(state, "a.safetensors"), base, exact, frozenset({"lora"}))]


def lycoris() -> list[Sample]:
    base = base_of(*(f"{name}.weight" for name in "qvhkfigw"))
    alpha = torch.tensor(ALPHA)
    parts: dict[str, dict[str, Tensor]] = {
        "q": {"lora_down.weight": QA, "lora_up.weight": QB, "alpha": alpha},
        "v": {
            "lora_down.weight": VA,
            "lora_up.weight": VB,
            "alpha": alpha.clone(),
            "dora_scale": MAGNITUDE.reshape(-1, 1),
        },
        "h": {"hada_w1_a": QB, "hada_w1_b": QA, "hada_w2_a": VB, "hada_w2_b": VA, "alpha": alpha.clone()},
        "k": {"lokr_w1": W1, "lokr_w2_a": W2A, "lokr_w2_b": W2B, "alpha": alpha.clone()},
        "f": {"diff": values(OUT, IN, seed=14)},
        "i": {"weight": MAGNITUDE, "on_input": torch.tensor(0)},
        "w": {"set_weight": values(OUT, IN, seed=15)},
        "g": {
            "a1.weight": VA.T,
            "a2.weight": QA,
            "b1.weight": QB,
            "b2.weight": VA,
            "alpha": alpha.clone(),
        },
    }
    state = {f"lycoris_{module}.{part}": value.clone() for module, own in parts.items() for part, value in own.items()}
    exact = {
        "q.weight": plus(base["q.weight"], QA, QB),
        "v.weight": with_norm(plus(base["v.weight"], VA, VB), MAGNITUDE),
        "h.weight": hadamard(base["h.weight"], QA, QB, VA, VB),
        "k.weight": kronecker(base["k.weight"], W1, W2A @ W2B, ALPHA),
        "f.weight": base["f.weight"].double() + parts["f"]["diff"].double(),
        "i.weight": base["i.weight"].double() * (1 + MAGNITUDE.double()[:, None]),
        "g.weight": plus(base["g.weight"], VA, QB) + SCALE * (base["g.weight"].double() @ VA.T.double() @ QA.double()),
        "w.weight": parts["w"]["set_weight"].double(),
    }
    kinds = frozenset({"lora", "dora", "loha", "lokr", "scale", "add", "replace"})
    return [Sample(file(state, "a.safetensors"), base, exact, kinds)]


def diffusers() -> list[Sample]:
    """LoRA with a bias and a norm, and DoRA, which a component has everywhere or nowhere."""
    attention = "transformer_blocks.0.attn"
    v, o, norm = (f"{attention}.{part}" for part in ("to_v", "to_out.0", "norm_q"))
    base = base_of(f"{v}.weight", f"{o}.weight", **{f"{o}.bias": (OUT,), f"{norm}.weight": (OUT,)})
    lora = {f"{o}.lora_A.weight": OA, f"{o}.lora_B.weight": OB, f"{o}.lora_B.bias": BIAS, f"{norm}.weight": NORM}
    dora = {f"{v}.lora_A.weight": VA, f"{v}.lora_B.weight": VB, f"{v}.lora_magnitude_vector": MAGNITUDE}
    lora[f"{o}.alpha"] = dora[f"{v}.alpha"] = torch.tensor(ALPHA)
    exact = {
        f"{o}.weight": plus(base[f"{o}.weight"], OA, OB),
        f"{o}.bias": base[f"{o}.bias"].double() + SCALE * BIAS.double(),
        f"{norm}.weight": NORM.double(),
    }
    normed = {f"{v}.weight": with_norm(plus(base[f"{v}.weight"], VA, VB), MAGNITUDE)}
    return [
        Sample(
            file({f"transformer.{key}": value for key, value in state.items()}, "pytorch_lora_weights.safetensors"),
            base,
            truth,
            frozenset(kinds),
        )
        for state, truth, kinds in ((lora, exact, {"lora", "replace", "add"}), (dora, normed, {"dora"}))
    ]


def litgpt() -> list[Sample]:
    """Query and value of one packed matrix: 4 + 2 + 2 heads of 3 numbers, and the output projection."""
    qkv, proj = "transformer.h.0.attn.qkv", "transformer.h.0.attn.proj"
    base = base_of(**{f"{qkv}.weight": (24, 8), f"{proj}.weight": (8, 12)})
    A, B, C, D = values(2 * RANK, 8), values(12 + 6, RANK), values(RANK, 12), values(8, RANK)
    state = {f"{qkv}.lora_A": A, f"{qkv}.lora_B": B, f"{proj}.lora_A": C, f"{proj}.lora_B": D}
    W = base[f"{qkv}.weight"]
    query, value = plus(W[:12], A[:RANK], B[:12]), plus(W[18:], A[RANK:], B[12:])
    exact = {
        f"{qkv}.weight": torch.cat([query, W[12:18].double(), value]),
        f"{proj}.weight": plus(base[f"{proj}.weight"], C, D),
    }
    hyper = f"lora_r: {RANK}\nlora_alpha: {int(ALPHA)}\nlora_query: true\nlora_key: false\nlora_value: true\n"
    beside = {"hyperparameters__yaml": hyper, "model_config__yaml": "n_head: 4\nn_query_groups: 2\nhead_size: 3\n"}
    return [Sample(file({"model": state}, "lit_model.pth.lora", **beside), base, exact, frozenset({"lora"}))]


def torchtune() -> list[Sample]:
    q, v = "layers.0.attn.q_proj", "layers.0.attn.v_proj"
    base = base_of(f"{q}.weight", f"{v}.weight")
    state = {f"{q}.lora_a.weight": QA, f"{q}.lora_b.weight": QB, f"{v}.lora_a.weight": VA, f"{v}.lora_b.weight": VB}
    state[f"{v}.magnitude"] = MAGNITUDE
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    exact = {
        f"{q}.weight": plus(base[f"{q}.weight"], QA, QB),
        f"{v}.weight": with_norm(plus(base[f"{v}.weight"], VA, VB), MAGNITUDE),
    }
    write = file(state, "adapter_model.pt", adapter_config__json=config)
    return [Sample(write, base, exact, frozenset({"lora", "dora"}))]


def mlx() -> list[Sample]:
    """One kind of training per folder: LoRA, DoRA, or whole weights."""
    q = "model.layers.0.self_attn.q_proj"
    base = base_of(f"{q}.weight", **{"model.norm.weight": (OUT,)})
    lora = {f"{q}.lora_a": QA.T, f"{q}.lora_b": QB.T}
    V = plus(base[f"{q}.weight"], QA, QB)
    numbers = {"num_layers": 1, "lora_parameters": {"rank": RANK, "scale": SCALE}}
    folders = (
        ("lora", lora, {f"{q}.weight": V}, "lora"),
        ("dora", {**lora, f"{q}.m": MAGNITUDE}, {f"{q}.weight": with_norm(V, MAGNITUDE)}, "dora"),
        ("full", {"model.norm.weight": NORM}, {"model.norm.weight": NORM.double()}, "replace"),
    )
    return [
        Sample(
            file(state, "adapters.safetensors", folder=True, adapter_config__json={**numbers, "fine_tune_type": tuned}),
            base,
            exact,
            frozenset({kind}),
        )
        for tuned, state, exact, kind in folders
    ]


_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 9,
    "intermediate_size": 12,
}
LLAMA = {"config.json": _CONFIG}
LAYER = "model.layers.0"
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (9, 8),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.v_proj.weight": (8, 8),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
}


def gguf() -> list[Sample]:
    """llama.cpp's rows of q take turns between the halves of a head; those of v are as they were."""
    base = base_of(**LLAMA_SHAPES)
    q, v = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.v_proj.weight"
    (A, B), (C, D) = pair(1, 8, 8), pair(3, 8, 8)
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # llama.cpp's row n of two heads of 4 is transformers' order[n]
    state = {"blk.0.attn_q.weight": (A, B[order]), "blk.0.attn_v.weight": (C, D)}
    factors = {f"{key}.lora_{side}": part for key, two in state.items() for side, part in zip("ab", two, strict=True)}
    exact = {q: plus(base[q], A, B), v: plus(base[v], C, D)}
    return [Sample(file(factors, "a.gguf"), base, exact, frozenset({"lora"}), beside=LLAMA)]


def megatron() -> list[Sample]:
    base = base_of(**LLAMA_SHAPES)
    o, down = f"{LAYER}.self_attn.o_proj.weight", f"{LAYER}.mlp.down_proj.weight"
    modules = {"self_attention.linear_proj": pair(1, 8, 8), "mlp.linear_fc2": pair(3, 8, 12)}
    state = {
        f"decoder.layers.0.{module}.adapter.linear_{side}.weight": value
        for module, two in modules.items()
        for side, value in zip(("in", "out"), two, strict=True)
    }
    exact = {o: plus(base[o], *pair(1, 8, 8)), down: plus(base[down], *pair(3, 8, 12))}
    return [Sample(file(state, "a.safetensors"), base, exact, frozenset({"lora"}), BY_RANK, LLAMA)]


SAMPLES: dict[str, Callable[[], list[Sample]]] = {
    "native": native,
    "plain": plain,
    "peft": lambda: peft_samples("adapter_model.safetensors", wrapped=False),
    "peft-wrapped": lambda: peft_samples("pytorch_model.bin", wrapped=True),
    "loralib": loralib,
    "kohya": kohya,
    "lycoris": lycoris,
    "diffusers": diffusers,
    "litgpt": litgpt,
    "torchtune": torchtune,
    "mlx": mlx,
    "gguf": gguf,
    "megatron": megatron,
}
