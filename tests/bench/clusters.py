"""What merges of 8, 70 and 671 billion parameters cost on several machines: the tables of examples/deploy/SCALE.md.

python -m tests.bench.clusters [--dir DIR] [--rounds 5]

Bytes and memory are those of the plans of real merges, of sparse files with the shapes of the models. Seconds of a
core are measured on a small model here, in one worker process of an executor, and multiplied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

import loratool
from loratool import Plan, dispatch, staging
from loratool.layout import Change
from tests.bench import data
from tests.bench.data import Model

WIDTH = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
RANK = 16
GB = 1e9
Tensors = dict[str, tuple[str, tuple[int, ...]]]


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model: its tensors, and its modules that an adapter changes."""

    title: str
    tensors: Tensors
    targets: dict[str, tuple[int, ...]]
    shards: int
    config: dict[str, object]

    @property
    def quantised(self) -> bool:
        return "quantization_config" in self.config


def llama(title: str, layers: int, hidden: int, inner: int, shards: int) -> Shape:
    """Llama 3: 8 heads of keys and values, a head of 128; every linear layer is a target."""
    own = {"q": (hidden, hidden), "k": (1024, hidden), "v": (1024, hidden), "o": (hidden, hidden)}
    linears = {f"self_attn.{name}_proj": shape for name, shape in own.items()}
    linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    targets = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in linears.items()}
    norms = {f"model.layers.{n}.{which}_layernorm": (hidden,) for n in range(layers) for which in ("input", "post")}
    ends = {"model.embed_tokens": (128256, hidden), "model.norm": (hidden,), "lm_head": (128256, hidden)}
    tensors: Tensors = {f"{name}.weight": ("BF16", shape) for name, shape in {**ends, **targets, **norms}.items()}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": 8, "head_dim": 128}
    return Shape(title, tensors, targets, shards, {**heads})


def deepseek(title: str, fp8: bool, experts: bool) -> Shape:
    """DeepSeek-V3: 61 layers, three of them dense, the others of 256 experts; in fp8 as it is published, or in bf16.

    Targets are the linear layers of the attention, and the experts if asked for.
    """
    hidden, tensors = 7168, Tensors()
    targets: dict[str, tuple[int, ...]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: str = "") -> None:
        tensors[f"{name}.weight"] = (dtype or ("F8_E4M3" if fp8 else "BF16"), shape)
        if fp8 and not dtype:
            tensors[f"{name}.weight_scale_inv"] = ("F32", tuple(-(-size // 128) for size in shape))

    def mlp(name: str, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
        yield from ((f"{name}.{part}_proj", (inner, hidden)) for part in ("gate", "up"))
        yield f"{name}.down_proj", (hidden, inner)

    add("model.embed_tokens", (129280, hidden), "BF16")
    add("lm_head", (129280, hidden), "BF16")
    for n in range(61):
        layer = f"model.layers.{n}"
        attention = {"q_a_proj": (1536, hidden), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, hidden),
                     "kv_b_proj": (32768, 512), "o_proj": (hidden, 16384)}  # fmt: skip
        own: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.{name}": size for name, size in attention.items()}
        targets |= own
        if n < 3:
            own |= dict(mlp(f"{layer}.mlp", 18432))
        else:
            parts = [f"{layer}.mlp.shared_experts", *(f"{layer}.mlp.experts.{e}" for e in range(256))]
            routed = dict(itertools.chain.from_iterable(mlp(part, 2048) for part in parts))
            own |= routed
            targets |= routed if experts else {}
            add(f"{layer}.mlp.gate", (256, hidden), "BF16")
        for name, size in own.items():
            add(name, size)
        for norm, count in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
            add(f"{layer}.{norm}", (count,), "BF16")
    config: dict[str, object] = {"num_attention_heads": 128, "num_key_value_heads": 128}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return Shape(title, tensors, targets, 163, config)


def sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of its full size that takes no room: only its header is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + position)


def laid_out(shape: Shape, folder: Path) -> None:
    """A base of a model's shapes, and an adapter of rank 16 for all its targets."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    names = [f"model-{n + 1:05}-of-{shape.shards:05}.safetensors" for n in range(shape.shards)]
    total, done, where = sum(math.prod(size) * WIDTH[dtype] for dtype, size in shape.tensors.values()), 0, {}
    for name, (dtype, size) in shape.tensors.items():
        where[name] = names[min(shape.shards - 1, done * shape.shards // total)]
        done += math.prod(size) * WIDTH[dtype]
    for file in names:
        sparse(base / file, {name: shape.tensors[name] for name in where if where[name] == file})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(shape.config))
    factors: Tensors = {}
    for name, (rows, columns) in shape.targets.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = ("BF16", (RANK, columns))
        factors[f"base_model.model.{name}.lora_B.weight"] = ("BF16", (rows, RANK))
    sparse(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


# --- seconds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Seconds of one core per GB of an output: copied, changed in bf16, quantised to fp8 again."""

    copied: float
    changed: float
    fp8: float


def measured(folder: Path, rounds: int) -> Rates:
    folder.mkdir()
    base, model = folder / "base", Model(0.5)
    data.apart(data.write_checkpoint, base, model, 4)
    data.apart(data.write_adapter, folder / "all", model, RANK)
    first = {name: shape for name, shape in model.linears().items() if name.endswith("layers.0.self_attn.k_proj")}
    parts = {f"{name}.{f}": size for name, (rows, columns) in first.items()
             for f, size in (("lora_A.weight", (RANK, columns)), ("lora_B.weight", (rows, RANK)))}  # fmt: skip
    (folder / "one").mkdir()
    save_file({f"base_model.model.{name}": torch.randn(size) for name, size in parts.items()},
              folder / "one" / "adapter_model.safetensors")  # fmt: skip
    config = (folder / "all" / "adapter_config.json").read_text()
    (folder / "one" / "adapter_config.json").write_text(config)
    quantised = folder / "fp8"
    quantised.mkdir()
    state = {}
    for n in range(2):
        state[f"layers.{n}.proj.weight"] = torch.randn(4096, 8192).to(torch.float8_e4m3fn)
        state[f"layers.{n}.proj.weight_scale_inv"] = torch.full((32, 64), 0.01)
    save_file(state, quantised / "model.safetensors", metadata={"format": "pt"})
    method = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (quantised / "config.json").write_text(json.dumps(method))
    (folder / "proj").mkdir()
    factors = {f"base_model.model.layers.{n}.proj.lora_{f}.weight": torch.randn(size) * 0.01
               for n in range(2) for f, size in (("A", (RANK, 8192)), ("B", (4096, RANK)))}  # fmt: skip
    save_file(factors, folder / "proj" / "adapter_model.safetensors")
    (folder / "proj" / "adapter_config.json").write_text(config)
    found: dict[str, list[float]] = {"copied": [], "changed": [], "fp8": []}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for turn in range(-1, rounds):
            for what, source, adapter in (
                ("copied", base, "one"),
                ("changed", base, "all"),
                ("fp8", quantised, "proj"),
            ):
                before = pool.submit(time.process_time).result()
                report = loratool.merge(source, folder / adapter, folder / "out", executor=pool)
                seconds: float = pool.submit(time.process_time).result() - before
                data_of = report.plan
                if what == "changed":
                    copied = min(found["copied"], default=0.0)
                    seconds = (seconds - copied * (data_of.nbytes - _changed(data_of)) / GB) / (_changed(data_of) / GB)
                else:
                    seconds /= data_of.nbytes / GB
                _remove(folder / "out")
                if turn >= 0:
                    found[what].append(seconds)
    return Rates(**{what: min(values) for what, values in found.items()})  # of the CPU: least disturbed by others


def _changed(plan: Plan) -> int:
    return sum(tensor.nbytes for tensor in plan.changes)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# --- tables ----------------------------------------------------------------------------------------------------------


def row(shape: Shape, folder: Path, rates: Rates) -> str:
    laid_out(shape, folder)
    started = time.monotonic()
    plan = loratool.plan(folder / "base", folder / "adapter", folder / "out", threads=1)
    planning = time.monotonic() - started
    changed, files = _changed(plan), len(plan.files)
    core = (plan.nbytes - changed) / GB * rates.copied
    core += changed / GB * (rates.fp8 if shape.quantised else rates.changed)
    read = plan.nbytes + (2 * changed if shape.quantised else 0)  # for its scales, for its codes, for its digest
    tasks = [(file.name, task) for file in plan.files for task in file.tasks]
    calls = sum(1 for file in plan.files for _ in dispatch.bundles(file.name, file.tasks))
    longest = max(task.nbytes for _, task in tasks if isinstance(task, Change)) / 1e6
    memory = [replace(plan, threads=threads).memory / 1e6 for threads in (1, 8)]
    disk = [max((read + plan.nbytes) / GB / speed, core / 64) for speed in (2, 20)]
    cells = (
        shape.title, f"{plan.nbytes / GB:,.0f}", f"{read / GB:,.0f}", f"{changed / plan.nbytes:.0%}", f"{files}",
        f"{calls:,}", f"{longest:,.0f} MB", f"{memory[0]:.0f} / {memory[1]:.0f} MB", _time(core), _time(core / 8),
        " / ".join(map(_time, disk)), _time(planning),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.clusters")
    parser.add_argument("--dir", type=Path, help="where the models go; they are removed at the end (default: TMPDIR)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", metavar="S,S,S", help="seconds that an earlier run measured, instead of measuring")
    options = parser.parse_args()
    staging.refuse_small_disk = lambda path, nbytes: None  # these outputs are not written
    say = sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="loratool-clusters-", dir=options.dir) as name:
        known = [float(text) for text in options.rates.split(",")] if options.rates else None
        rates = Rates(*known) if known else measured(Path(name) / "measured", options.rounds)
        say(f"one core, s per GB: copied {rates.copied:.2f}, changed {rates.changed:.2f}, fp8 {rates.fp8:.2f}\n\n")
        sys.stdout.flush()
        heads = ("model", "written, GB", "read, GB", "changed", "files", "calls", "largest tensor",
                 "memory of 1 / 8 threads", "1 core", "8 cores", "64 cores, disks of 2 / 20 GB/s", "plan")  # fmt: skip
        say(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}\n")
        shapes = (
            llama("8 B, bf16, all linear layers", 32, 4096, 14336, 4),
            llama("70 B, bf16, all linear layers", 80, 8192, 28672, 30),
            deepseek("671 B, fp8, attention", fp8=True, experts=False),
            deepseek("671 B, bf16, attention and experts", fp8=False, experts=True),
        )
        for number, shape in enumerate(shapes):
            say(row(shape, Path(name) / str(number), rates) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
