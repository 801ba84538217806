"""The deployment examples, run as a user would run them."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Kit, tree
from models import fill, llama, save_base

import loratool

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(loratool.__file__).parent.parent),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(DEPLOY / script), *map(str, arguments)]


# --- release.py ------------------------------------------------------------------------------------------------------


def released(*arguments: object) -> tuple[int, Any]:
    done = subprocess.run(
        python("release.py", *arguments, "--json"), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(DEPLOY))
    return importlib.import_module("release")


@pytest.mark.parametrize("name", ["adapter", "native.lora.safetensors"])
def test_a_release(name: str, kit: Kit) -> None:
    out = kit / "release"
    code, manifest = released(kit / "base", kit / name, "-o", out, "--weight", "0.5", "--dtype", "bf16")
    assert (code, manifest.pop("ok")) == (0, True)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    files = {path for path in tree(out) if (out / path).is_file()} - {"manifest.json"}
    assert files == {"adapter.lora.safetensors"} | {
        f"model/{file}" for file in ("model.safetensors", "config.json", "loratool_receipt.json")
    }
    assert manifest["files"].keys() == files
    for file, listed in manifest["files"].items():
        data = (out / file).read_bytes()
        assert listed == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    loratool.merge(kit / "base", [(kit / name, 0.5)], kit / "by hand", dtype="bf16", reproducible=True)
    assert (kit / "by hand" / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
    receipt = loratool.status(out / "model").receipt
    assert receipt is not None
    assert manifest["receipt"] == receipt.digest
    assert manifest["adapter"] == {"digest": receipt.adapters[0].digest, "weight": 0.5, "from": name}
    assert manifest["base"]["tensors"] == {name: tensor.base for name, tensor in receipt.tensors.items()}
    assert loratool.validate(out / "adapter.lora.safetensors") == []


def test_a_release_can_be_made_again(kit: Kit) -> None:
    for name in ("one", "two"):
        assert released(kit / "base", kit / "adapter", "-o", kit / name)[0] == 0
    one, two = tree(kit / "one"), tree(kit / "two")
    assert {**one, "manifest.json": ""} == {**two, "manifest.json": ""}  # which has the release's name


def pinned(kit: Kit) -> Path:
    """An adapter that holds the digests of its base."""
    out = kit / "pinned.lora.safetensors"
    loratool.extract(kit / "plain.pth", out, alpha=4, scaling="alpha/rank", base_out=kit / "pinned base")
    return out


def test_a_pinned_release(kit: Kit) -> None:
    adapter = pinned(kit)
    code, manifest = released(kit / "pinned base", adapter, "-o", kit / "release", "--pinned")
    assert (code, manifest["base"]["pinned"]) == (0, True)


def test_an_adapter_of_peft_is_pinned_by_its_first_release(kit: Kit) -> None:
    code, problems = released(kit / "base", kit / "adapter", "-o", kit / "no", "--pinned")
    assert (code, problems["problems"][0]["code"]) == (1, "E-NOT-PINNED")
    code, manifest = released(kit / "base", kit / "adapter", "-o", kit / "first", "--pin", "--pinned")
    assert (code, manifest["base"]["pinned"]) == (0, True)
    adapter = kit / "first" / "adapter.lora.safetensors"
    assert released(kit / "base", adapter, "-o", kit / "second", "--pinned")[0] == 0


def test_no_release(kit: Kit, release: Any) -> None:
    """Every reason has its exit code and its error code, and leaves nothing behind."""
    adapter, native = pinned(kit), kit / "native.lora.safetensors"
    sloppy = kit.native(kit.manifest(), "sloppy.lora.safetensors")  # only a validator minds spaces in it
    broken = kit.native({**kit.manifest(), "provenance": 1})
    shutil.copytree(kit / "pinned base", kit / "other")
    data = bytearray((kit / "other" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (kit / "other" / "model.safetensors").write_bytes(data)
    before = tree(kit.folder)
    for base, given, out, is_pinned, code, error in (
        ("base", broken, "out", False, 1, "E-MANIFEST"),
        ("base", sloppy, "out", False, 1, "E-CANONICAL"),
        ("base", native, "out", True, 1, "E-NOT-PINNED"),
        ("other", adapter, "out", False, 2, "E-BASE-MISMATCH"),
        ("base", native, "merged", False, 2, "E-EXISTS"),
        ("base", native, "nowhere/out", False, 2, "E-EXISTS"),
        ("base", kit / "missing", "out", False, 2, "E-MISSING"),
        ("merged", native, "out", False, 2, "E-MERGED"),
    ):
        with pytest.raises(loratool.LoratoolError) as caught:
            release.release(kit / base, given, kit / out, 1.0, "keep", is_pinned)
        assert (caught.value.exit_code, caught.value.code) == (code, error)
        assert tree(kit.folder) == before


def test_no_release_tells_its_exit_code(kit: Kit) -> None:
    sloppy = kit.native(kit.manifest(), "sloppy.lora.safetensors")
    before = tree(kit.folder)
    for adapter, wanted, error in ((sloppy, 1, "E-CANONICAL"), (kit / "missing", 2, "E-MISSING")):
        code, document = released(kit / "base", adapter, "-o", kit / "out")
        assert (code, document["ok"], document["problems"][0]["code"]) == (wanted, False, error)
        assert tree(kit.folder) == before


def test_a_merge_that_can_not_be_confirmed_is_no_release(
    kit: Kit, release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk that lies between merge and verification."""
    merge = loratool.merge

    def then_broken(base: Path, adapters: Any, out: Path, **options: Any) -> loratool.MergeReport:
        report = merge(base, adapters, out, **options)
        path = out / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 64
        path.write_bytes(data)
        return report

    monkeypatch.setattr(loratool, "merge", then_broken)
    before = tree(kit.folder)
    with pytest.raises(loratool.AnswerIsNo) as caught:
        release.release(kit / "base", kit / "adapter", kit / "out", 1.0, "keep", False)
    assert {problem.code for problem in caught.value.problems} <= {"E-VERIFY", "E-RECEIPT"}
    assert tree(kit.folder) == before


# --- serve.py --------------------------------------------------------------------------------------------------------

PROMPTS = [(3, 1, 4), (15, 9, 2, 6), (5,)]
COUNT = 5


class Served(NamedTuple):
    url: str
    folder: Path
    process: subprocess.Popen[str]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def generate(self, adapter: str, prompt: tuple[int, ...]) -> Any:
        return self.get(f"/generate?adapter={adapter}&tokens={','.join(map(str, prompt))}&count={COUNT}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, an adapter `a` of PEFT, a native one `b`, and the merged folders of both."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = llama(layers=2).bfloat16()
    fill(model, 0)
    save_base(model, folder / "base")
    for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["down_proj", "q_proj", "o_proj"])):
        wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))  # type: ignore[arg-type]
        fill(wrapped, len(targets))
        wrapped.save_pretrained(folder / name)
        model = wrapped.unload()
    loratool.save(loratool.load(folder / "b", base=folder / "base"), folder / "b.lora.safetensors")
    loratool.merge(folder / "base", folder / "a", folder / "merged a")
    loratool.merge(folder / "base", [(folder / "b", 0.5)], folder / "merged b")
    return folder


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[tuple[str, tuple[int, ...]], Any]:
    """What folders answer, asked without the service."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name, folder in (("a", "merged a"), ("b", "merged b"), ("none", "base")):
        model = AutoModelForCausalLM.from_pretrained(models / folder, dtype="auto").eval()
        for prompt in PROMPTS:
            ids, scores = torch.tensor([prompt]), []
            with torch.inference_mode():
                for _ in range(COUNT):
                    best = model(ids).logits[0, -1].float().max(dim=0)
                    scores.append(best.values.item())
                    ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)
            found[name, prompt] = {"adapter": name, "tokens": ids[0].tolist(), "scores": scores}
    assert len({json.dumps(answer["scores"]) for answer in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    command = python("serve.py", models / "base", f"a={models / 'a'}", f"b={models / 'b.lora.safetensors'}@0.5")
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+) with a, b\n", line)
        assert found, line
        try:
            yield Served(found[1], models, process)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_answers_have_the_bits_of_merged_folders(served: Served, expected: dict[Any, Any]) -> None:
    for name in ("a", "b", "none", "b", "a"):
        for prompt in PROMPTS:
            assert served.generate(name, prompt) == expected[name, prompt]
            assert served.get("/status")["active"] == name


def test_requests_at_once_see_one_model_each(served: Served, expected: dict[Any, Any]) -> None:
    order = [(name, prompt) for name in ("a", "b", "none") for prompt in PROMPTS] * 8
    random.Random(0).shuffle(order)
    before = served.get("/status")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: served.generate(*each), order))
    assert answers == [expected[each] for each in order]
    after = served.get("/status")
    assert after["requests"] - before["requests"] == len(order)
    assert 10 < after["swaps"] - before["swaps"] <= len(order)
    assert after["adapters"]["b"] == {"path": str(served.folder / "b.lora.safetensors"), "weight": 0.5}


def test_what_is_asked_wrongly(served: Served, expected: dict[Any, Any]) -> None:
    for path, code in (
        ("/", 404),
        ("/generate?adapter=c&tokens=1", 404),
        ("/generate?adapter=a&tokens=x", 400),
        ("/generate?adapter=a&tokens=-1", 400),
        ("/generate?adapter=a&tokens=40", 400),
        ("/generate?adapter=a&tokens=1&count=0", 400),
        ("/generate?adapter=a&tokens=1&count=99", 400),
        ("/generate?adapter=a", 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            served.get(path)
        with caught.value as answer:
            assert answer.code == code, path
            assert json.load(answer)["error"]
    assert served.generate("a", PROMPTS[0]) == expected["a", PROMPTS[0]]


def test_an_adapter_that_does_not_fit_stops_the_service_at_its_start(models: Path, kit: Kit) -> None:
    done = subprocess.run(
        python("serve.py", models / "base", f"a={models / 'a'}", f"b={kit / 'adapter'}", "--port", "0"),
        capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "E-TARGET" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_end_waits_for_requests_and_not_for_silent_clients(models: Path, expected: dict[Any, Any]) -> None:
    command = python("serve.py", models / "base", f"a={models / 'a'}", "--port", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        served = Served(process.stdout.readline().split()[0], models, process)
        with (
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))),
            ThreadPoolExecutor(1) as pool,
        ):
            answer = pool.submit(served.get, "/generate?adapter=a&tokens=3,1,4&count=29")
            while not served.get("/status")["requests"]:
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            tokens = answer.result()["tokens"]
            assert process.wait(30) == 0
    start = expected["a", PROMPTS[0]]["tokens"]
    assert (len(tokens), tokens[: len(start)]) == (32, start)
