"""Synthetic checkpoints and adapters, of any size, written a block at a time: the writer needs little memory.

Weights are drawn from N(0, 0.02): zeros would compress, leave holes in files and round too well. From 4 B parameters on
the blocks repeat, which saves minutes and changes nothing that memory is measured by.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

WIDTH = {"BF16": 2, "F32": 4}
TORCH = {"BF16": "bfloat16", "F32": "float32"}
STD = 0.02  # of weights, and of the factor A
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QV = ("q_proj", "v_proj")
BLOCK = 1 << 22  # numbers drawn at a time
T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A Llama of about `size` billion parameters: TinyLlama's layers, from 4 B on those of Llama 3 8B."""

    size: float

    @property
    def large(self) -> bool:
        return self.size >= 4

    def config(self) -> dict[str, int]:
        hidden, inner, heads, kv_heads = (4096, 14336, 32, 8) if self.large else (2048, 5632, 32, 4)
        per_layer = hidden * (2 * hidden + 2 * kv_heads * hidden // heads + 3 * inner + 2)
        layers = max(1, round(self.size * (4 if self.large else 20)))
        vocab = max(1, round((self.size * 1e9 - layers * per_layer) / (2 * hidden * 16))) * 16  # what is left
        return {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }

    def linears(self, targets: tuple[str, ...] = ALL) -> dict[str, tuple[int, ...]]:
        """The linear layers by module name: [out, in]."""
        hidden, inner, layers, _, heads, kv_heads = self.config().values()
        kv = kv_heads * hidden // heads
        attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        shapes = {f"self_attn.{name}": shape for name, shape in (attention | {"o_proj": (hidden, hidden)}).items()}
        mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in (shapes | mlp).items()
            if name.rpartition(".")[2] in targets
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, _, layers, vocab, *_ = self.config().values()
        norms = [f"model.layers.{n}.{which}_layernorm" for n in range(layers) for which in ("input", "post_attention")]
        ends = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
        found: Shapes = {**ends, **self.linears(), **dict.fromkeys(norms, (hidden,))}
        return {f"{name}.weight": shape for name, shape in found.items()}


class Numbers:
    """Blocks of normally distributed numbers, new ones or the same again."""

    def __init__(self, seed: int, dtype: str, repeat: bool) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)
        self.dtype: torch.dtype = getattr(torch, TORCH[dtype])
        self.repeat: dict[float, torch.Tensor] | None = {} if repeat else None

    def draw(self, count: int, std: float) -> torch.Tensor:
        import torch

        return torch.empty(count).normal_(0, std, generator=self.generator).to(self.dtype)

    def blocks(self, count: int, std: float) -> Iterator[memoryview]:
        import torch

        while count > 0:
            if self.repeat is None:
                block = self.draw(min(count, BLOCK), std)
            else:
                if std not in self.repeat:
                    self.repeat[std] = self.draw(BLOCK, std)
                block = self.repeat[std]
            yield memoryview(block[:count].view(torch.uint8).numpy().data)
            count -= len(block)


def write_file(path: Path, shapes: Shapes, dtype: str, stds: Mapping[str, float], numbers: Numbers | None) -> int:
    """A safetensors file, sparse without numbers: then its header is all that is read. Returns the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        if numbers is None:
            out.truncate(8 + len(raw) + position)
        else:
            for name, shape in shapes.items():
                for block in numbers.blocks(math.prod(shape), stds.get(name, STD)):
                    out.write(block)
    return position


def write_checkpoint(folder: Path, model: Model, shards: int, dtype: str = "BF16", sparse: bool = False) -> None:
    """A folder with a config, and one file or shards of about the same size with an index."""
    folder.mkdir(parents=True)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": TORCH[dtype]}
    (folder / "config.json").write_text(json.dumps({**kind, **model.config(), "tie_word_embeddings": False}))
    numbers = None if sparse else Numbers(1, dtype, model.large)
    shapes = model.tensors()
    share = sum(map(math.prod, shapes.values())) / shards
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        parts[min(shards - 1, int(done / share))][name] = shape
        done += math.prod(shape)
    total, index = 0, {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        total += write_file(folder / name, part, dtype, {}, numbers)
        index.update(dict.fromkeys(part, name))
    if shards > 1:
        document = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def write_adapter(folder: Path, model: Model, rank: int, targets: tuple[str, ...] = ALL, delta: float = 2e-3) -> None:
    """A PEFT adapter in float32, whose scaled B @ A has elements of standard deviation `delta`."""
    shapes, stds = {}, {}
    for module, (rows, columns) in model.linears(targets).items():
        A, B = (f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")
        shapes[A], shapes[B] = (rank, columns), (rows, rank)
        stds[B] = delta / (2 * STD * math.sqrt(rank))  # 2: alpha / rank
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": list(targets), "bias": "none", "inference_mode": True}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_file(folder / "adapter_model.safetensors", shapes, "F32", stds, Numbers(2, "F32", model.large))


def write_flat_adapter(folder: Path, layers: int, targets: tuple[str, ...]) -> None:
    """An adapter of many thin layers: all header."""
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    shapes = {
        name.format(n, t, f): (8, 256) if f == "A" else (256, 8) for n in range(layers) for t in targets for f in "AB"
    }
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_file(folder / "adapter_model.safetensors", shapes, "F32", {}, Numbers(3, "F32", False))


def wrongly_rounded(base: Path, adapter: Path, merged: Path, layer: int) -> tuple[int, int]:
    """How many of a layer's merged numbers are not the float64 result rounded once, and of how many."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found.update({k: opened.get_tensor(k) for k in opened.keys() if f".layers.{layer}." in k})  # noqa: SIM118
        return found

    before, after, factors = tensors(base), tensors(merged), tensors(adapter)
    wrong = total = 0
    for key, A in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            W, B = before[name], factors[key.replace(".lora_A.", ".lora_B.")]
            exact = W.double() + 2 * (B.double() @ A.double())
            off = (after[name].double() - exact).abs()
            for end in (torch.inf, -torch.inf):  # a neighbour that is nearer: torch itself rounds float64 twice
                other = torch.nextafter(after[name], torch.tensor(end, dtype=W.dtype))
                wrong += int(((other.double() - exact).abs() < off).count_nonzero())
            total += W.numel()
    return wrong, total


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own: what is measured must not inherit the peak memory of its parent."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            part = a.read(1 << 20)
            if part != b.read(1 << 20):
                return False
            if not part:
                return True
