"""Every JSON document of the command line against its schema in `spec/schema/`: all commands, options and outcomes."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from conftest import Kit
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from safetensors.torch import load_file, save_file
from strategies import FORMS, one

import loratool
from loratool import Adapter, Target
from loratool.cli import COMMANDS, cli, run
from loratool.updates import Scaling

FOLDER = Path(__file__).parent.parent / "spec" / "schema"
SCHEMAS: dict[str, Any] = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
OURS = {name: schema for name, schema in SCHEMAS.items() if name.startswith(("cli-", "receipt-"))}
NAMES_FOR_KEYS = ("tensors", "dtypes", "dropped", "replaced", "info", "metadata", "when", "quantised")
OPTIONAL = {"dropped", "replaced", "previous"}  # of a receipt, which is a file, and says nothing where there is nothing


def version(command: str) -> int:
    """That of a command's document: there is one schema of each."""
    (found,) = (re.fullmatch(rf"cli-{command}-(\d+)\.schema\.json", name) for name in OURS if f"-{command}-" in name)
    assert found is not None
    return int(found[1])


def _registry(schemas: dict[str, Any]) -> Any:
    return Registry().with_resources([(name, Resource.from_contents(schema)) for name, schema in schemas.items()])


def strict(node: Any) -> Any:
    """A copy that refuses keys it does not know: the published schemas allow new ones."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: strict(value) for key, value in node.items()}
    return closed | {"unevaluatedProperties": False} if node.get("type") == "object" else closed


PUBLISHED, CLOSED = _registry(SCHEMAS), _registry(strict(SCHEMAS))


def is_valid(document: Any, closed: bool = False) -> bool:
    return not [*errors(document, closed)]


def errors(document: Any, closed: bool = False) -> Iterator[str]:
    command, _, major = document["schema"].removeprefix("loratool.").partition("/")
    name = f"cli-{command}-{major}.schema.json"
    schema = strict(SCHEMAS[name]) if closed else SCHEMAS[name]
    for error in Draft202012Validator(schema, registry=CLOSED if closed else PUBLISHED).iter_errors(document):
        yield f"{error.json_path}: {error.message}"


# --- the command lines -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    schema: str
    line: str  # in the kit's folder
    code: int = 0


ALPHA = "--alpha 4 --scaling alpha/rank"
MERGE = "merge base native.lora.safetensors -o"
VERIFY = "native.lora.safetensors --base base"
CASES = [
    *[Case("inspect", f"inspect {name}") for name in ("adapter", "base", "sharded", "merged", "merged.safetensors")],
    *[Case("inspect", f"inspect {name}") for name in ("plain.pth", "plain.legacy.pth", "peft.pth", "fp8.merged")],
    Case("inspect", "inspect native.lora.safetensors --base base --layers"),
    Case("inspect", "inspect native.lora.safetensors --base other"),
    *[Case("inspect", f"inspect {form}.lora.safetensors") for form in FORMS],
    Case("inspect", "inspect rows.lora.safetensors"),
    Case("extract", f"extract plain.pth -o x1.lora.safetensors {ALPHA}"),
    Case("extract", f"extract plain.pth -o x2.lora.safetensors {ALPHA} --base-out x2"),
    Case("extract", "extract adapter -o x3.lora.safetensors --base base"),
    Case("convert", "convert native.lora.safetensors --to peft -o c1"),
    Case("convert", "convert adapter --to native -o c2.lora.safetensors --base base --pin"),
    Case("convert", "convert loha.lora.safetensors --to mlx -o c3 --base layer --bake"),
    Case("merge", f"{MERGE} m1"),
    Case("merge", f"{MERGE} m2 --undo m2.undo.safetensors --threads 1 --max-memory 300MB"),
    Case("merge", f"{MERGE} m3 --dtype bf16 --reproducible --link"),
    Case("merge", f"{MERGE} m4 --no-digests"),
    Case("merge", f"{MERGE} m5 --resume"),
    Case("merge", "merge base native.lora.safetensors@0.5 adapter@-0.25 -o m6"),
    Case("merge", "merge base native.lora.safetensors@0 -o m7 --allow-unchanged"),
    Case("merge", "merge base/model.safetensors adapter -o m8.safetensors"),
    Case("merge", "merge layer/model.safetensors huge.lora.safetensors -o m9.safetensors"),
    Case("merge", "merge base new.lora.safetensors -o m10 --allow-new"),
    Case("merge", "merge carded head.lora.safetensors -o m13 --allow-new"),
    Case("merge", "merge carded native.lora.safetensors -o m12 --tokenizer-from asked --dtype bf16"),
    Case("merge", "merge fp8 lora.lora.safetensors -o m11 --dtype bf16"),
    *[Case("merge", f"merge layer {form}.lora.safetensors -o m-{form}") for form in FORMS],
    Case("plan", f"{MERGE} p --dry-run --undo p.undo.safetensors"),
    Case("plan", f"{MERGE} p --dry-run --no-digests --dtype fp16"),
    Case("plan", "merge fp8 lora.lora.safetensors -o p --dry-run --dtype fp32"),
    *[Case("plan", f"merge layer {form}.lora.safetensors -o p --dry-run") for form in FORMS],
    Case("plan", "unmerge merged native.lora.safetensors -o p --dry-run"),
    Case("plan", "unmerge merged native.lora.safetensors --base base -o p --dry-run"),
    Case("unmerge", "unmerge merged native.lora.safetensors -o u1 --threads 1 --max-memory 300MB"),
    Case("unmerge", "unmerge merged native.lora.safetensors --base base --exact -o u2"),
    Case("unmerge", "unmerge undoable native.lora.safetensors --undo undo.safetensors -o u3"),
    Case("unmerge", "unmerge undigested native.lora.safetensors --base base -o u4"),
    Case("validate", "validate native.lora.safetensors"),
    Case("validate", "validate bad.lora.safetensors", 1),
    Case("verify", f"verify merged {VERIFY}"),
    Case("verify", "verify merged native.lora.safetensors@2 --base base", 1),
    Case("verify", f"verify merged {VERIFY} --sample 0.5 --ulps 0 --rounded-delta --threads 1"),
    Case("verify", f"verify base {VERIFY}", 1),
    Case("verify", f"verify nan {VERIFY}", 1),
    Case("verify", f"verify other {VERIFY}", 1),
    Case("verify", "verify fp8.merged lora.lora.safetensors --base fp8"),
    Case("verify", "verify base native.lora.safetensors@0 --base base"),
    Case("verify", "verify adapter native.lora.safetensors --base base", 1),
    Case("verify", "verify layer weak.lora.safetensors --base layer", 3),
    Case("merge", "merge merged native.lora.safetensors -o m.twice --onto-merged"),
    Case("status", "status m.twice --check"),
    Case("status", "status merged --check"),
    Case("status", "status merged.safetensors"),
    Case("status", "status base", 1),
    Case("status", "status undigested --check"),
    Case("status", "status changed --check", 1),
    Case("pin", "pin adapter -o c9.lora.safetensors --base base"),
    Case("explain", "explain alpha"),
    Case("explain", "explain"),
    Case("error", "inspect", 2),
    Case("error", "inspect nowhere", 2),
    Case("error", "extract plain.pth -o out.lora.safetensors", 2),
    Case("error", "convert loha.lora.safetensors --to mlx -o out", 2),
    Case("error", "merge base lora.lora.safetensors loha.lora.safetensors -o base --dtype bf16", 2),
    Case("error", "merge base bad.lora.safetensors -o out", 2),
    Case("error", "merge base adapter -o out --require-pinned", 2),
    Case("error", "unmerge base adapter -o out", 2),
    Case("error", "unmerge merged adapter -o out --exact", 1),
    Case("error", "verify merged native.lora.safetensors --base other", 2),
    Case("error", "validate nowhere", 2),
    Case("error", "status nowhere", 2),
]


def prepare(kit: Kit) -> None:
    """What the kit lacks: adapters of every kind, a base with scales, and checkpoints with something wrong in them."""
    for form in FORMS:
        loratool.save(one(form, (6, 4)), kit / f"{form}.lora.safetensors")
    (item,) = one("lora", (3, 4), name="l.0.q.weight").updates
    part = replace(item, target=Target("l.0.q.weight", (6, 4), rows=(0, 3)))
    loratool.save(Adapter((part,)), kit / "rows.lora.safetensors")
    (item,) = one("add", (6, 4)).updates
    huge = replace(item.update, value=loratool.TensorRef.of(torch.full((6, 4), 1e30)))  # type: ignore[call-arg]
    loratool.save(Adapter((replace(item, update=huge),)), kit / "huge.lora.safetensors")
    (item,) = one("lora", (6, 4)).updates
    weak = replace(item.update, factors=Scaling("none", 2, None, 1e-30))  # type: ignore[call-arg]
    loratool.save(Adapter((replace(item, update=weak),)), kit / "weak.lora.safetensors")
    loratool.save(one("replace", (2, 2), name="new.weight"), kit / "new.lora.safetensors")
    loratool.save(one("replace", (3, 4), name="score.weight"), kit / "head.lora.safetensors")
    for folder in ("layer", "other", "fp8", "nan"):
        (kit / folder).mkdir()
    save_file({"layer.weight": torch.ones(6, 4).bfloat16()}, kit / "layer" / "model.safetensors")
    save_file({"l.0.q.weight": torch.ones(2, 2), "more": torch.ones(1)}, kit / "other" / "model.safetensors")
    scaled = {"layer.weight": torch.ones(6, 4).to(torch.float8_e4m3fn), "layer.weight_scale_inv": torch.ones(1, 1)}
    save_file(scaled, kit / "fp8" / "model.safetensors")
    kit.write("fp8/config.json", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    base, native = kit / "base", kit / "native.lora.safetensors"
    shutil.copytree(base, kit / "carded")
    kit.write("carded/README.md", "# base")
    kit.write("carded/config.json", {"dtype": "float32"})
    kit.write("carded/vocab.txt", "a\nb\n")
    kit.write("asked/tokenizer.json", {"model": {"vocab": {"a": 0}}})
    loratool.merge(kit / "fp8", kit / "lora.lora.safetensors", kit / "fp8.merged")
    loratool.merge(base, native, kit / "undigested", digests=False)
    loratool.merge(base, native, kit / "undoable", undo=kit / "undo.safetensors")
    shutil.copytree(kit / "merged", kit / "changed")
    state = load_file(kit / "merged" / "model.safetensors")
    state["l.0.q.weight"][0, 0] = float("nan")
    for folder in ("nan", "changed"):
        save_file(state, kit / folder / "model.safetensors")
    manifest = kit.manifest()
    manifest["updates"][0]["rank"] = 7
    kit.native(manifest)


class Printed(NamedTuple):
    code: int
    document: Any


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Printed]:
    """What every case prints, once for all tests."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    prepare(kit)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(kit.folder)
        for case in CASES:
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                code = run([*case.line.split(), "--json"])
            assert err.getvalue() == "", case
            found[case] = Printed(code, json.loads(out.getvalue()))
    return found


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.line)
def test_every_document_follows_its_schema(case: Case, printed: dict[Case, Printed]) -> None:
    code, document = printed[case]
    assert (document["schema"], code) == (f"loratool.{case.schema}/{version(case.schema)}", case.code), document
    assert document["ok"] == (code == 0)
    assert [*errors(document)] == []
    assert [*errors(document, closed=True)] == []


def test_the_schemas_notice_every_missing_key(printed: dict[Case, Printed]) -> None:
    """And none minds a new one, which may come within a version."""
    documents = [document for _, document in printed.values()]
    looked = set()
    for document in documents:
        for path in objects(document):
            there = at(document, path)
            spot = (document["schema"], *(key for key in path if isinstance(key, str)))
            if spot in looked or (path and path[-1] in NAMES_FOR_KEYS):  # these have names for keys
                continue
            if {"info", "metadata", "when"} & {*path}:
                continue  # an adapter's own
            looked.add(spot)
            changed = copy.deepcopy(document)
            at(changed, path)["new"] = 1
            assert is_valid(changed), path
            assert not is_valid(changed, closed=True), path
            for key in there.keys() - OPTIONAL - {"schema"}:
                changed = copy.deepcopy(document)
                del at(changed, path)[key]
                assert not is_valid(changed), (path, key)
    assert len(looked) > 40


def objects(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all objects in a document."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield path
    for key, value in entries:
        yield from objects(value, (*path, key))


def at(node: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def test_what_may_be_null_was_seen_with_both(printed: dict[Case, Printed]) -> None:
    """A schema may not allow more than what happens, nor these cases leave out what can happen."""
    seen: dict[tuple[str, ...], set[bool]] = {}
    for _, document in printed.values():
        for path in objects(document):
            for key, value in at(document, path).items():
                spot = (document["schema"], *(str(key) for key in path if isinstance(key, str)), key)
                seen.setdefault(spot, set()).add(value is None)
    wanted = {
        ("loratool.inspect/1", *spot.split())
        for spot in (
            "convention", "format_version", "header_bytes", "fit", "receipt",
            "layers rank", "layers alpha", "layers scaling", "layers scale",
        )
    } | {
        (f"loratool.{command}/{version(command)}", *spot.split())
        for command, spot in (
            ("merge", "tokenizer_from"), ("merge", "config_edits from"), ("merge", "config_edits to"),
            ("plan", "undo"), ("plan", "changes updates rank"), ("plan", "changes updates scale"),
            ("merge", "undo"), ("merge", "changes updates rank"), ("merge", "survival share"),
            ("extract", "base_out"), ("status", "receipt"), ("verify", "sample"), ("verify", "ulps"),
            ("verify", "tensors ulps"), ("verify", "tensors reason"), ("verify", "survival share"),
            ("verify", "error"), ("verify", "tensors error"), ("verify", "claim"), ("verify", "applied applied"),
        )
    }  # fmt: skip
    assert {spot for spot, values in seen.items() if values == {True, False}} >= wanted
    assert all(values == {False} for spot, values in seen.items() if spot[-1] in ("path", "out", "notes", "seconds"))


def test_a_receipt_in_a_file_follows_its_schema(printed: dict[Case, Printed], kit: Kit) -> None:
    validator = Draft202012Validator(strict(SCHEMAS["receipt-1.schema.json"]), registry=CLOSED)
    validator.validate(kit.json("merged/loratool_receipt.json"))
    for _, document in printed.values():
        if document.get("receipt"):
            validator.validate(document["receipt"])
    for key in OPTIONAL:
        assert any((document.get("receipt") or {}).get(key) for _, document in printed.values())


def test_interrupts_and_bugs_are_errors(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    for failure, code in ((KeyboardInterrupt(), 130), (RuntimeError("x"), 101)):

        def fail(*args: object, failure: BaseException = failure, **options: object) -> None:
            raise failure

        monkeypatch.setattr(loratool, "inspect", fail)
        out = io.StringIO()
        with redirect_stdout(out):
            assert run(["inspect", str(kit / "base"), "--json"]) == code
        assert [*errors(json.loads(out.getvalue()), closed=True)] == []


# --- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_the_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(OURS[name])
    for node in nodes(OURS[name]):
        assert node.get("additionalProperties", True) is not False, "new keys may come within a version"
        if "properties" in node:
            assert set(node["properties"]) - set(node["required"]) <= OPTIONAL
            assert set(node["required"]) <= set(node["properties"])
        for pattern in filter(None, [node.get("pattern")]):
            if isinstance(pattern, str):
                assert pattern.startswith("^"), pattern
                assert pattern.endswith("$"), pattern
        if "$ref" in node:
            PUBLISHED.resolver(name).lookup(node["$ref"])


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(value)


def test_every_command_with_json_has_a_schema_and_every_schema_a_case() -> None:
    documents = {name.split("-")[1] for name in OURS if name.startswith("cli-")}
    commands = {name for name in COMMANDS if "--json" in flags(name)}
    assert documents == commands | {"plan", "error", "progress", "common"}
    assert {case.schema for case in CASES} == documents - {"progress", "common"}


def test_every_option_has_a_case() -> None:
    """But for those that only say what an input is, and say nothing about the document."""
    told = {"--json", "--quiet", "-q", "--progress", "--out", "--device", "--component", "--map", "--layout"}
    told |= {
        "--from",
        "--adapter",
        "--config",
        "--enable-lora",
        "--already-merged",
        "--as",
        "--uniform",
        "--task-type",
        "--base-name",
        "--revision",
    }
    told |= {"--force", "--alpha", "--scaling", "--dask", "--only", "--skip"}
    for name in COMMANDS:
        lines = " ".join(case.line for case in CASES if case.line.split()[0] == name)
        assert {flag for flag in flags(name) - told if flag not in lines} == set(), name


def flags(name: str) -> set[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {flag for param in command.params if isinstance(param, click.Option) for flag in param.opts}


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        f"{MERGE} out",
        "unmerge merged native.lora.safetensors --base base -o out",
        f"verify merged {VERIFY}",
        f"extract plain.pth -o out.lora.safetensors {ALPHA} --base-out b",
        "status merged --check",
    ],
)
def test_progress_as_lines(line: str, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kit.folder)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run([*line.split(), "--progress", "json", "--json"]) == 0
    assert json.loads(out.getvalue())["ok"]
    events = [json.loads(text) for text in err.getvalue().splitlines()]
    assert events
    assert [error for event in events for error in errors(event, closed=True)] == []
    assert events[-1]["done"] == events[-1]["total"]


def test_a_reader_of_progress_that_is_gone_does_not_end_the_work(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.chdir(kit.folder)
    with redirect_stdout(io.StringIO()), redirect_stderr(Gone()):
        assert run(f"{MERGE} out --progress json".split()) == 0
    assert (kit / "out" / "model.safetensors").exists()
