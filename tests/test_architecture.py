"""The rooms of the package: who may import whom, and what starts without torch."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from strategies import one, save_sharded

import loratool

PACKAGE = Path(loratool.__file__).parent

# Arrows go down only: a room imports from rooms further up in this list, or from itself.
ROOMS = (
    ("errors", "version"),
    ("explanations",),
    ("tensors", "rounding", "survival", "workers"),
    ("container", "gguf", "npz", "pickles", "archives", "staging", "names", "slicing", "recycling"),
    ("places", "pieces", "wrappers"),
    ("distcp",),
    ("updates", "checkpoint", "spans"),
    ("adapter", "quantised", "outputs"),
    ("maps", "identity"),
    ("format",),
    ("receipt", "layout"),
    ("undo", "rows", "repacked"),
    ("matrices",),
    ("bounds",),
    ("undoing",),
    ("blocks",),
    ("folding", "bundle"),
    ("conventions",),
    ("strangers", "pinning"),
    ("ground",),
    ("binding", "requantise"),
    ("changes", "tasks"),
    ("live",),
    ("pairing", "claims"),
    ("evidence",),
    ("replays",),
    ("diagnosis",),
    ("grids", "misplaced", "checks"),
    ("comparing",),
    ("applied", "verdict"),
    ("ondemand",),
    ("virtual",),
    ("configs", "tokenizers"),
    ("companions",),
    ("plan",),
    ("unmerging",),
    ("resume", "cluster"),
    ("remote",),
    ("dispatch",),
    ("merge",),
    ("partial",),
    ("extract", "summary", "convert", "verify", "status"),
    ("api",),
    ("loratool",),  # the package itself: loratool/__init__.py
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Narrower than the list: what these rooms must know nothing of, wherever they stand.
IGNORANT = {
    "updates": {"container", "pickles", "archives", "staging", "names", "version"},
    "checkpoint": {"updates", "staging", "names"},
    "conventions": {"staging"},
    "receipt": {"updates", "format", "conventions"},
    "layout": {"updates", "format", "conventions"},
    "blocks": {"format", "conventions", "names", "checkpoint"},
    "merge": {"conventions", "format", "names"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in modules()}


def imports(path: Path) -> Iterator[str]:
    """The modules of loratool that a file imports, wherever in it, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "loratool")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "loratool":
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in NAMES else node.module for name in whole)


def room(module: str) -> str:
    return [*module.split("."), "loratool"][1]


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_arrows_go_down_only(path: Path) -> None:
    here = room(dotted(path))
    assert here in LEVEL, f"{here} is a new room: give it a place in ROOMS"
    for module in imports(path):
        there = room(module)
        assert there == here or LEVEL[there] < LEVEL[here], f"{dotted(path)} imports {module}"
        assert there not in IGNORANT.get(here, set()), f"{dotted(path)} imports {module}"


def test_every_room_exists() -> None:
    assert LEVEL.keys() == {room(dotted(path)) for path in modules()}


def sources() -> dict[str, str]:
    return {dotted(path): path.read_text(encoding="utf-8") for path in modules()}


def test_the_formula_of_lora_is_written_once() -> None:
    for formula in (r"\baddmm_\(", r"\bself\.B\.rows\(start, stop\) @ self\.A\b"):
        assert [name for name, text in sources().items() if re.search(formula, text)] == ["loratool.updates.lora"]
    products = [
        dotted(path)
        for path in modules()
        if any(isinstance(node, ast.MatMult) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    ]
    assert {room(name) for name in products} == {"updates"}


def test_only_the_command_line_talks() -> None:
    for path in modules():
        if room(dotted(path)) == "cli":
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "print" not in {func.id for func in calls if isinstance(func, ast.Name)}, path
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bsys\.(exit|stdout|stderr|argv)\b|os\.environ|\bimport (click|rich)\b", text), path


def test_torch_is_never_imported_at_the_top() -> None:
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "torch" not in {name.split(".")[0] for name in names}, path


def test_a_new_tensor_says_its_device() -> None:
    """Callers set default devices: `torch.set_default_device("cuda")`, or "meta" while a model is built."""
    makers = {"empty", "zeros", "ones", "full", "tensor", "arange", "as_tensor", "eye", "linspace", "rand", "randn"}
    silent = [
        f"{dotted(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in makers}
        if "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    state = {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(4, 3)}
    save_file(state, folder / "one.safetensors")
    save_sharded(state, folder / "shards", shards=2)
    torch.save(state, folder / "plain.pth")
    torch.save({"fc.linear.weight": torch.ones(4, 3), "fc.lora.A": torch.ones(3, 2), "fc.lora.B": torch.ones(2, 4)},
               folder / "wrapped.pth")  # fmt: skip
    loratool.save(one("lora", (4, 3), name="a.weight"), folder / "adapter.lora.safetensors")
    peft = folder / "peft"
    peft.mkdir()
    name = "base_model.model.a.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 3), name.format("B"): torch.ones(4, 2)}, peft / "adapter_model.safetensors"
    )
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def imported(code: str, *arguments: object) -> set[str]:
    """The modules that are loaded after some code has run."""
    tail = "import sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    return set(done.stderr.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "safetensors", "transformers", "peft"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported("import loratool") & (HEAVY | {"click", "rich"})


@pytest.mark.parametrize("arguments", ["--help", "--version", "merge --help", "inspect --help"])
def test_help_imports_nothing_heavy(arguments: str) -> None:
    run = f"from loratool.cli import run; assert run({arguments.split()!r}) == 0"
    assert not imported(run) & HEAVY


@pytest.mark.parametrize(
    "name",
    ["one.safetensors", "shards", "plain.pth", "wrapped.pth", "adapter.lora.safetensors", "peft"],
)
def test_inspect_needs_headers_only(name: str, files: Path) -> None:
    assert not imported("import sys, loratool; loratool.inspect(sys.argv[1])", files / name) & HEAVY
    run = "import sys; from loratool.cli import run; assert run(['inspect', sys.argv[1], '--json']) == 0"
    assert not imported(run, files / name) & HEAVY


def test_inspect_with_a_base_needs_headers_only(files: Path) -> None:
    code = "import sys, loratool; loratool.inspect(sys.argv[1], base=sys.argv[2])"
    assert not imported(code, files / "adapter.lora.safetensors", files / "shards") & HEAVY
