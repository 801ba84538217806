"""Fixtures that several test files use: running the command line, and a kit of tiny files to attack."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import loratool
from loratool.cli import run

PREFIX = "base_model.model."


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one document on stdout, as strict JSON: no NaN, no Infinity, nothing around it."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        document = json.loads(self.out, parse_constant=refuse)
        assert isinstance(document, dict)
        return document


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process: `cli("inspect", path).code`."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


def container(header: Mapping[str, Any] | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header; `length` is what its first 8 bytes claim."""
    text = header if isinstance(header, str | bytes) else json.dumps(header, ensure_ascii=False)
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def opened(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8:end]), file[end:]


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> digest of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(folder.rglob("*"))
    }


class Kit:
    """A base, an adapter in each convention, a merge of them; all tiny, all in one folder. Names are relative to it.

    base/  adapter/ (PEFT)  native.lora.safetensors  merged/  merged.safetensors  sharded/  plain.pth
    plain.legacy.pth  peft.pth
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        state = {"l.0.q.weight": values(6, 4), "l.0.v.weight": values(3, 4), "norm.weight": values(4)}
        A, B = values(2, 4), values(6, 2)
        for name in ("base", "adapter", "sharded"):
            (folder / name).mkdir()
        save_file(state, folder / "base" / "model.safetensors", metadata={"format": "pt"})
        self.write("base/config.json", {"tie_word_embeddings": False})
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        save_file({"l.0.q.weight": state["l.0.q.weight"]}, folder / "sharded" / names[0])
        save_file({k: v for k, v in state.items() if "q" not in k}, folder / "sharded" / names[1])
        weight_map = {name: names[0 if "q" in name else 1] for name in state}
        self.write("sharded/model.safetensors.index.json", {"metadata": {"total_size": 160}, "weight_map": weight_map})
        parts = {f"{PREFIX}l.0.q.lora_A.weight": A, f"{PREFIX}l.0.q.lora_B.weight": B}
        save_file(parts, folder / "adapter" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
        self.write("adapter/adapter_config.json", config)
        adapter = loratool.load(folder / "adapter", base=folder / "base")
        loratool.save(adapter, folder / "native.lora.safetensors")
        loratool.merge(folder / "base", folder / "adapter", folder / "merged")
        loratool.merge(folder / "base" / "model.safetensors", folder / "adapter", folder / "merged.safetensors")
        plain = {"l.0.q.linear.weight": state["l.0.q.weight"], "l.0.q.lora.A": A.T.clone(), "l.0.q.lora.B": B.T.clone()}
        torch.save(plain, folder / "plain.pth")
        torch.save(plain, folder / "plain.legacy.pth", _use_new_zipfile_serialization=False)
        wrapped = {f"{PREFIX}l.0.q.base_layer.weight": state["l.0.q.weight"], f"{PREFIX}norm.weight": values(4)}
        wrapped |= {name.replace(".weight", ".default.weight"): ref for name, ref in parts.items()}
        torch.save(wrapped, folder / "peft.pth")

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: object) -> Path:
        """Bytes and text as they are, anything else as JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        return path

    def json(self, name: str) -> dict[str, Any]:
        document = json.loads((self / name).read_text())
        assert isinstance(document, dict)
        return document

    def manifest(self) -> dict[str, Any]:
        header, _ = opened((self / "native.lora.safetensors").read_bytes())
        manifest = json.loads(header["__metadata__"]["loratool"])
        assert isinstance(manifest, dict)
        return manifest

    def native(self, manifest: object, name: str = "bad.lora.safetensors") -> Path:
        """The native adapter with another manifest: a document, or text."""
        header, data = opened((self / "native.lora.safetensors").read_bytes())
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        header["__metadata__"]["loratool"] = text
        return self.write(name, container(header, data))


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    folder = tmp_path / "kit"
    folder.mkdir()
    yield Kit(folder)
    assert not [path for path in tmp_path.rglob("*") if ".partial-" in path.name], "a scratch folder was left"
