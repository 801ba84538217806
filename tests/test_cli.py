"""The command line as people and scripts meet it: examples, exit codes, JSON, terminals of two widths, messages."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import ClassVar

import click
import pytest
import torch
from conftest import PREFIX, Cli, Kit, tree
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli import COMMANDS, cli, run

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7])[0-9;]*m")
SCRIPT = "from loratool.cli import main; main()"


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in pipes."""
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "LORATOOL_DEBUG")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def on_terminal(columns: int, *arguments: object, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """The command line on a terminal of this width: its exit code, and everything that was printed."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=cwd,
        env={**clean, "TERM": "xterm-256color", **environment},
    ) as process:
        os.close(child)
        printed = b""
        while select.select([parent], [], [], 60)[0]:
            try:
                data = os.read(parent, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not data:
                break
            printed += data
        code = process.wait(60)
    os.close(parent)
    return code, printed.decode().replace("\r\n", "\n")


def plain(printed: str) -> str:
    return ANSI.sub("", printed)


# ---------------------------------------------------------------- help and its examples


def test_help_imports_nothing_that_is_slow() -> None:
    code = "import sys; from loratool.cli import run; run(['--help']); assert 'torch' not in sys.modules; "
    code += "assert 'rich' not in sys.modules; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["adapter", "native.lora.safetensors", "sharded", "plain.pth", "peft.pth", "merged"])
def test_inspect_needs_no_torch(kit: Kit, name: str) -> None:
    code = f"import sys; from loratool.cli import run; assert run(['inspect', {str(kit / name)!r}]) == 0; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(cli: Cli, name: str, option: str) -> None:
    result = cli(*[name] * bool(name), option)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: loratool {name}".rstrip())
    assert not ANSI.search(result.out)
    if name:
        assert "Examples:" in result.out
    else:
        assert all(command in result.out for command in COMMANDS)
        assert all(code in result.out for code in ("0", "1", "2", "101", "130"))


def test_every_command_of_the_list_exists() -> None:
    context = click.Context(cli)
    for name, text in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(200).rstrip(".")[:12] == text[:12], "two texts that say different things"


def test_every_option_has_help() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"
                assert parameter.help.endswith((".", "?")), f"{name} {parameter.opts}"


def examples() -> list[str]:
    """Every line of the help that starts with the program's name."""
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        lines = [line.strip() for line in (command.epilog or "").splitlines()]
        assert sum(line.startswith("loratool ") for line in lines) >= 2, f"{name} needs two examples"
        found += lines
    found += [line.strip() for line in (cli.help or "").splitlines()]
    return sorted({line for line in found if line.startswith("loratool ")})


@pytest.mark.parametrize("line", examples())
def test_examples_of_the_help_run(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    arguments = shlex.split(line)[1:]
    work = kit.folder.parent / "work"
    work.mkdir()
    shutil.copytree(kit / "base", work / "base")
    shutil.copytree(kit / "adapter", work / "adapter")
    shutil.copytree(kit / "adapter", work / "style")
    for name in ("my", "task"):
        shutil.copy(kit / "native.lora.safetensors", work / f"{name}.lora.safetensors")
    shutil.copy(kit / ("peft.pth" if "--config" in arguments else "plain.pth"), work / "wrapped.pth")
    torch.save(load_file(kit / "base" / "model.safetensors"), work / "model.pth")
    merged = work / "merged"
    loratool.merge(work / "base", work / "my.lora.safetensors", merged, undo=work / "merged.undo.safetensors")
    if "--config" in arguments:
        shutil.copy(kit / "adapter" / "adapter_config.json", work)
    if arguments[0] == "verify":
        shutil.rmtree(merged)
        given = [str(work / value) for value in arguments[2 : arguments.index("--base")]]
        assert cli("merge", work / "base", *given, "-o", merged).code == 0
    monkeypatch.chdir(work)
    written = {"-o", "--base-out"} | ({"--undo"} if arguments[0] == "merge" else set())
    outputs = [Path(value) for option, value in itertools.pairwise(arguments) if option in written]
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    result = cli(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out
    assert all(path.exists() != ("--dry-run" in arguments) for path in outputs)


@pytest.mark.parametrize(
    "name", ["native.lora.safetensors", "base/model.safetensors", "plain.pth", "merged.safetensors"]
)
def test_a_config_that_lies_beside_a_file_is_not_its_own(kit: Kit, cli: Cli, name: str) -> None:
    """Downloads pile up in one folder; a PEFT config there says nothing about the files of others."""
    before = cli("inspect", kit / name).out
    shutil.copy(kit / "adapter" / "adapter_config.json", (kit / name).parent)
    assert cli("inspect", kit / name) == (0, before, "")


# ---------------------------------------------------------------- exit codes


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"loratool, version {loratool.__version__}\n", "")


def test_without_arguments_it_shows_its_help(cli: Cli) -> None:
    result = cli()
    assert result.code in (0, 2)
    assert "Commands:" in result.out + result.err
    assert "error[" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["inspect", "a", "--nonsense"],
        ["merge", "base"],
        ["merge", "base", "adapter"],
        ["merge", "base", "adapter", "-o"],
        ["merge", "base", "adapter", "-o", "out", "--dtype", "int8"],
        ["merge", "base", "adapter@x", "-o", "out"],
        ["merge", "base", "adapter@nan", "-o", "out"],
        ["merge", "base", "adapter@inf", "-o", "out"],
        ["merge", "base", "adapter@", "-o", "out"],
        ["merge", "base", "@0.5", "-o", "out"],
        ["extract", "w.pth", "-o", "out", "--alpha", "x"],
        ["extract", "w.pth", "-o", "out", "--alpha", "*=x"],
        ["extract", "w.pth", "-o", "out", "--alpha", "nan"],
        ["extract", "w.pth", "-o", "out", "--alpha", "inf"],
        ["unmerge", "merged", "-o", "out"],
        ["validate"],
    ],
    ids=" ".join,
)
def test_usage_errors(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error[E-USAGE]: ")
    assert "help: see `loratool" in result.err
    as_json = cli(arguments[0], "--json", *arguments[1:])
    assert (as_json.code, as_json.err) == (2, "")
    assert as_json.json["error"]["code"] == "E-USAGE"


def test_exit_1_is_for_an_answer_that_is_no(kit: Kit, cli: Cli) -> None:
    result = cli("unmerge", kit / "merged", kit / "adapter", "-o", kit / "out", "--exact")
    assert result.code == 1
    assert result.err.startswith("error[E-NOT-EXACT]: ")
    bad = kit.native({**kit.manifest(), "features": ["rows"]})
    invalid = cli("validate", bad)
    assert "R-017" in invalid.out
    assert invalid.code == 1


def test_validate_in_a_shell_fails_for_an_invalid_file(kit: Kit) -> None:
    bad = kit.native({**kit.manifest(), "features": ["rows"]})
    assert call("validate", bad).returncode == 1
    assert call("validate", bad, "--json").returncode == 1
    assert call("validate", kit / "native.lora.safetensors").returncode == 0


def test_validate_of_a_file_that_is_not_there_could_not_run(kit: Kit, cli: Cli) -> None:
    assert cli("validate", kit / "nowhere").code == 2
    assert cli("validate", kit / "base").code == 2  # a folder is not a file that could be valid


@pytest.mark.parametrize("debug", [False, True])
def test_exit_101_is_for_a_bug(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(loratool, "merge", broken)
    monkeypatch.setenv("LORATOOL_DEBUG", "1" if debug else "")
    result = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out")
    assert (result.code, result.out) == (101, "")
    assert "error[E-BUG]: a bug in loratool, sorry: ZeroDivisionError: made up" in result.err
    assert "LORATOOL_DEBUG=1" in result.err
    assert ("Traceback" in result.err) == debug
    as_json = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out", "--json")
    assert as_json.code == 101
    assert as_json.json["error"]["code"] == "E-BUG"


def test_exit_130_is_for_an_interrupt(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = tree(kit.folder)
    monkeypatch.setattr("loratool.staging.flush_tree", interrupted)  # all is written, nothing is in its place
    for as_json in (False, True):
        result = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out", *["--json"] * as_json)
        assert result.code == 130
        if as_json:
            assert result.json["error"]["code"] == "E-INTERRUPTED"
        else:
            assert result.out == ""
            assert result.err.strip().startswith(("interrupted", "error[E-INTERRUPTED]"))
        assert tree(kit.folder) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_merge_and_nothing_is_left(kit: Kit, name: str) -> None:
    before = tree(kit.folder)
    slow = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import loratool.staging as s, loratool.cli;"
        "s.flush_tree = lambda path: (print('writing', flush=True), time.sleep(60));"
        "loratool.cli.main()"
    )
    arguments = ["merge", str(kit / "base"), str(kit / "adapter"), "-o", str(kit / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert tree(kit.folder) != before  # the scratch folder is there
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=30)
    assert tree(kit.folder) == before
    if name == "SIGINT":
        assert process.returncode == 130
        assert "interrupted" in error
        assert "Traceback" not in error


def test_a_closed_pipe_is_no_error(kit: Kit) -> None:
    for flags in ([], ["--json"]):
        inspect = shlex.join([sys.executable, "-c", SCRIPT, "inspect", str(kit / "adapter"), *flags])
        done = subprocess.run(
            ["bash", "-c", f"{inspect} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert done.stdout.strip() in ("0", "141")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_a_full_disk_behind_stdout_is_told(kit: Kit, flags: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, "inspect", str(kit / "adapter"), *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "E-BUG" not in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- JSON


def everyday(kit: Kit) -> dict[str, list[object]]:
    """A command line that works, for every command and schema."""
    base, adapter, native = kit / "base", kit / "adapter", kit / "native.lora.safetensors"
    scale = ["--alpha", "4", "--scaling", "alpha/rank"]
    return {
        "inspect adapter": ["inspect", adapter],
        "inspect native": ["inspect", native, "--base", base, "--layers"],
        "inspect base": ["inspect", kit / "sharded"],
        "inspect merged": ["inspect", kit / "merged"],
        "inspect wrapped": ["inspect", kit / "plain.pth"],
        "extract": [
            "extract",
            kit / "plain.pth",
            "-o",
            kit / "new.safetensors",
            *scale,
            "--base-out",
            kit / "new base",
        ],
        "merge": ["merge", base, native, "-o", kit / "new"],
        "merge two": ["merge", base, f"{native}@0.5", f"{adapter}@-0.25", "-o", kit / "new", "--dtype", "bf16"],
        "merge --dry-run": ["merge", base, native, "-o", kit / "new", "--dry-run"],
        "unmerge": ["unmerge", kit / "merged", native, "-o", kit / "new"],
        "unmerge --base": ["unmerge", kit / "merged", native, "--base", base, "-o", kit / "new"],
        "unmerge --dry-run": ["unmerge", kit / "merged", native, "-o", kit / "new", "--dry-run"],
        "validate": ["validate", native],
    }


EVERYDAY = [
    "inspect adapter", "inspect native", "inspect base", "inspect merged", "inspect wrapped", "extract", "merge",
    "merge two", "merge --dry-run", "unmerge", "unmerge --base", "unmerge --dry-run", "validate",
]  # fmt: skip
SCHEMAS = {"merge --dry-run": "plan", "unmerge --dry-run": "plan"}


@pytest.mark.parametrize("name", EVERYDAY)
def test_json_is_one_document(kit: Kit, cli: Cli, name: str) -> None:
    arguments = everyday(kit)[name]
    result = cli(*arguments, "--json")
    assert (result.code, result.err) == (0, "")
    schema = SCHEMAS.get(name, name.split()[0])
    assert list(result.json)[:2] == ["schema", "ok"]
    version = 2 if schema == "validate" else 1
    assert (result.json["schema"], result.json["ok"]) == (f"loratool.{schema}/{version}", True)
    assert not ANSI.search(result.out)
    if name == "merge":
        shutil.rmtree(kit / "new")
        code, printed = on_terminal(60, *arguments, "--json", FORCE_COLOR="1")
        assert code == 0
        assert re.sub('"seconds": .*', "", printed) == re.sub('"seconds": .*', "", result.out)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "nowhere"], 2),
        (["validate", "nowhere"], 2),
        (["merge", "nowhere", "adapter", "-o", "out"], 2),
        (["merge", "base", "adapter", "-o", "base"], 2),
        (["merge", "base", "plain.pth", "-o", "out"], 2),
        (["extract", "plain.pth", "-o", "out.safetensors"], 2),
        (["unmerge", "merged", "adapter", "-o", "out", "--exact"], 1),
        (["unmerge", "base", "adapter", "-o", "out"], 2),
    ],
    ids=str,
)
def test_json_of_a_failure(
    kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.chdir(kit.folder)
    result = cli(*arguments, "--json")
    assert (result.code, result.err) == (code, "")
    document = result.json
    assert (document["schema"], document["ok"]) == ("loratool.error/1", False)
    assert document["error"] == document["problems"][0]
    assert {"code", "message", "where", "hint"} <= document["error"].keys()
    text = cli(*arguments)
    assert text.code == code
    assert f"error[{document['error']['code']}]: {document['error']['message']}" in text.err


def test_json_is_an_option_and_not_a_word(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be called --json."""
    monkeypatch.chdir(kit.folder)
    result = cli("inspect", "--", "--json")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error[E-MISSING]")


def test_names_from_files_reach_json_as_they_are(kit: Kit, cli: Cli) -> None:
    name = 'ä "quoted" \x1b[31m [bold] \u2028.weight'
    save_file({name: torch.ones(2)}, kit / "odd.safetensors")
    parts = {f"{PREFIX}{name}.lora_A.weight": torch.ones(2, 4), f"{PREFIX}{name}.lora_B.weight": torch.ones(6, 2)}
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    assert cli("inspect", kit / "adapter", "--json").json["layers"][0]["target"] == f"{name}.weight"
    ascii_only = call("inspect", kit / "adapter", "--json", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0, ascii_only.stderr


def test_file_names_that_are_not_unicode(kit: Kit) -> None:
    odd = os.fsencode(kit.folder) + b"/\xff.lora.safetensors"
    shutil.copy(kit / "native.lora.safetensors", odd)
    for flags in ([], ["--json"]):
        done = subprocess.run([sys.executable, "-c", SCRIPT, "inspect", odd, *flags], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        if flags:
            json.loads(done.stdout)  # which are UTF-8 by definition


# ---------------------------------------------------------------- pipes, terminals, colour


@pytest.mark.parametrize("name", EVERYDAY)
def test_nothing_on_stderr_and_no_codes_in_pipes(kit: Kit, cli: Cli, name: str) -> None:
    result = cli(*everyday(kit)[name])
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert "\x1b" not in result.out
    assert all(line == line.rstrip() for line in result.out.splitlines())
    assert "\n\n\n" not in result.out


@pytest.mark.parametrize("name", ["extract", "merge", "unmerge"])
def test_quiet(kit: Kit, cli: Cli, name: str) -> None:
    arguments = everyday(kit)[name]
    assert cli(*arguments, "-q") == (0, "", "")
    again = cli(*arguments, "--quiet")
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("error[E-EXISTS]")


@pytest.mark.parametrize("name", ["merge", "unmerge"])
def test_quiet_dry_run_prints_only_errors(kit: Kit, cli: Cli, name: str) -> None:
    assert cli(*everyday(kit)[f"{name} --dry-run"], "-q") == (0, "", "")


class Llama:
    """Files with the names of a real model, 22 layers of 7 matrices; tiny numbers."""

    LEAVES: ClassVar = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (2, 8), "self_attn.v_proj": (2, 8), "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shapes = {f"model.layers.{n}.{leaf}": shape for n in range(22) for leaf, shape in self.LEAVES.items()}
        state = {f"{name}.weight": torch.ones(shape).bfloat16() for name, shape in shapes.items()}
        state |= {"model.embed_tokens.weight": torch.ones(16, 8), "model.norm.weight": torch.ones(8)}
        (folder / "TinyLlama-1.1B").mkdir()
        save_file(state, folder / "TinyLlama-1.1B" / "model.safetensors", metadata={"format": "pt"})
        (folder / "alpaca-lora").mkdir()
        parts = {}
        for name, (out, into) in shapes.items():
            parts[f"{PREFIX}{name}.lora_A.weight"] = torch.full((2, into), 0.1)
            parts[f"{PREFIX}{name}.lora_B.weight"] = torch.full((out, 2), 0.1)
        save_file(parts, folder / "alpaca-lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "TinyLlama/TinyLlama-1.1B"}
        (folder / "alpaca-lora" / "adapter_config.json").write_text(json.dumps(config))
        loratool.save(loratool.load(folder / "alpaca-lora"), folder / "alpaca.lora.safetensors")
        loratool.merge(folder / "TinyLlama-1.1B", folder / "alpaca.lora.safetensors", folder / "merged")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("llama"))


ON_TERMINALS = {
    "inspect": ["inspect", "alpaca-lora"],
    "inspect --layers": ["inspect", "alpaca.lora.safetensors", "--layers"],
    "inspect --base": ["inspect", "alpaca.lora.safetensors", "--base", "TinyLlama-1.1B"],
    "merge --dry-run": ["merge", "TinyLlama-1.1B", "alpaca.lora.safetensors@0.8", "-o", "new", "--dry-run"],
    "unmerge --dry-run": [
        "unmerge", "merged", "alpaca.lora.safetensors", "--base", "TinyLlama-1.1B", "-o", "new", "--dry-run",
    ],
}  # fmt: skip


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("name", ON_TERMINALS)
def test_tables_fit_the_terminal(llama: Llama, name: str, columns: int) -> None:
    code, printed = on_terminal(columns, *ON_TERMINALS[name], cwd=llama.folder)
    assert code == 0, printed
    lines = plain(printed).splitlines()
    start = next(n for n, line in enumerate(lines) if re.match(r" *(target|tensor) +(kind|shape) ", line))
    too_wide = [line for line in lines[start:] if len(line) > columns]
    assert not too_wide
    whole = [line for line in lines if "model.layers." in line and line.split()[0].endswith(".weight")]
    broken = [line for line in lines[start + 2 :] if re.match(r" *(model\.|[a-z_.]+ *$)", line) and line not in whole]
    if columns >= 140:
        assert not broken, "a table with room to spare folds its names"
    assert not [line for line in broken if not re.search(r"[._](?=\s|$)|^ *[._]", line)], (
        "names are folded within a word, which can be neither read nor copied"
    )


@pytest.mark.parametrize("name", ON_TERMINALS)
def test_tables_in_pipes_are_unwrapped(llama: Llama, cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(llama.folder)
    monkeypatch.setenv("COLUMNS", "40")
    lines = cli(*ON_TERMINALS[name]).out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(("target ", "tensor ")))
    rows = [line for line in lines[start + 1 :] if line.startswith("model.")]
    assert len(rows) == (7 if "layers" not in name and "dry" not in name else 154)
    assert all(line.split()[0].endswith(".weight") for line in rows)


def test_layers_come_in_their_order(llama: Llama, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.folder)
    for name in ("inspect --layers", "merge --dry-run"):
        numbers = [int(n) for n in re.findall(r"^model\.layers\.(\d+)\.", cli(*ON_TERMINALS[name]).out, re.M)]
        assert numbers == sorted(numbers), name


def test_colour_is_for_terminals_that_want_it(kit: Kit) -> None:
    wanted = on_terminal(80, "inspect", kit / "nowhere")[1]
    assert COLOUR.search(wanted)
    assert not COLOUR.search(on_terminal(80, "inspect", kit / "nowhere", NO_COLOR="1")[1])
    assert not ANSI.search(on_terminal(80, "inspect", kit / "nowhere", TERM="dumb")[1])
    assert not ANSI.search(call("inspect", kit / "nowhere").stderr)
    assert not ANSI.search(call("inspect", kit / "adapter").stdout)
    assert not COLOUR.search(on_terminal(80, "inspect", kit / "adapter", NO_COLOR="1")[1])
    assert COLOUR.search(call("inspect", kit / "nowhere", FORCE_COLOR="1").stderr)


def test_progress_is_for_terminals_and_for_long_work(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = on_terminal(80, *everyday(kit)["merge"])
    assert code == 0
    assert "?" not in printed, "a bar without a total flashed"
    shutil.rmtree(kit / "new")
    slow = (
        "import sys, time, importlib; import loratool.cli;"
        "m = importlib.import_module('loratool.workers'); old = m.Progress;"
        "m.Progress = lambda *a: (time.sleep(0.4), old(*a))[1];"
        "sys.exit(loratool.cli.run(sys.argv[1:]))"
    )
    piped = subprocess.run(
        [sys.executable, "-c", slow, *map(str, everyday(kit)["merge"])], capture_output=True, text=True, check=False
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "\r" not in piped.stdout


# ---------------------------------------------------------------- names from files on a terminal

HOSTILE = {
    "markup": "l[/x].q",
    "style": "l[red].q",
    "link": "l[link=file:///x]y[/link].q",
    "emoji": "l:smile:.q",
    "escape": "l\x1b[2J\x1b[31m.q",
    "title": "l\x1b]0;owned\x07.q",
    "return": "l\rq",
    "newline": "l\nerror[E-FAKE]: x",
    "backspace": "l\b\b\bq",
    "C1": "l\x9b31mq",
    "bidi": "l\u202eq",
    "backslash": "l\\[x].q",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_names_can_not_drive_the_terminal(kit: Kit, cli: Cli, case: str) -> None:
    name = HOSTILE[case]
    parts = {f"{PREFIX}{name}.lora_A.weight": torch.ones(2, 4), f"{PREFIX}{name}.lora_B.weight": torch.ones(6, 2)}
    save_file(parts, kit / "adapter" / "adapter_model.safetensors")
    save_file({f"{name}.weight": torch.ones(6, 4)}, kit / "base" / "model.safetensors")
    base, adapter = kit / "base", kit / "adapter"
    for arguments in (
        ["inspect", adapter],
        ["inspect", adapter, "--layers"],
        ["inspect", adapter, "--base", base],
        ["merge", base, adapter, "-o", kit / "new", "--dry-run"],
        ["merge", kit / "sharded", adapter, "-o", kit / "new"],
    ):
        result = cli(*arguments)
        assert result.code in (0, 2), result.err
        shown = result.out + result.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown), repr(shown[-200:])
        assert not re.search(r"^error\[E-FAKE\]", shown, re.M)
        if case in ("markup", "style", "link", "emoji", "backslash"):
            assert name in shown, "a name is shown as it is"


def test_parts_of_a_tensor_are_shown(kit: Kit, cli: Cli) -> None:
    """[rows 0:6] looks like the markup of the library that prints tables."""
    manifest = kit.manifest()
    manifest["updates"][0]["rows"] = [0, 6]
    manifest["features"] = ["rows"]
    result = cli("inspect", kit.native(manifest), "--layers")
    assert "l.0.q.weight [rows 0:6]" in result.out


# ---------------------------------------------------------------- messages


def message(*arguments: object, cli: Cli, code: str) -> str:
    result = cli(*arguments)
    assert result.code in (1, 2)
    assert result.out == ""
    first, *rest = result.err.splitlines()
    assert first.startswith(f"error[{code}]: "), result.err
    assert all(re.match(r"(error\[E-[A-Z-]+\]: |  in: |  help: |and \d+ more|Usage: )", line) for line in rest), (
        result.err
    )
    return result.err


def test_messages_say_what_where_and_what_helps(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kit.folder)
    (kit / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(kit / "base" / "model.safetensors", kit / "two" / name)
    (kit / "adapters" / "one").mkdir(parents=True)
    kit.write("adapters/one/adapter_config.json", {})
    kit.write("notes.txt", "x")
    out = ["-o", "new"]
    for arguments, code, words in [
        (["inspect", "nowhere"], "E-MISSING", ["nowhere", "help: "]),
        (["inspect", "notes.txt"], "E-SUFFIX", ["notes.txt", "safetensors", "help: "]),
        (["inspect", "two"], "E-AMBIGUOUS", ["a.safetensors, b.safetensors", "help: give the path of one file"]),
        (["inspect", "adapters"], "E-MISSING", ["in: adapters", "one"]),
        (["inspect", "sharded/model.safetensors.index.json"], "E-SUFFIX", ["help: give the folder itself"]),
        (["merge", "base", "adapter", "-o", "merged"], "E-EXISTS", ["merged", "help: "]),
        (["merge", "base", "adapter", "-o", "no/such/new"], "E-EXISTS", ["no/such", "help: "]),
        (["merge", "base", "adapter", "-o", "new.gguf"], "E-OUTPUT", ["folder", "help: "]),
        (["merge", "merged", "adapter", *out], "E-MERGED", ["receipt", "unmerge", "in: merged"]),
        (["merge", "plain.pth", "adapter", *out], "E-WRAPPED", ["extract", "--base-out", "in: plain.pth"]),
        (["merge", "base", "plain.pth", *out], "E-ALPHA", ["l.0.q.weight", "--scaling", "--alpha"]),
        (["merge", "base", "base", *out], "E-CONVENTION", ["in: base", "l.0.q.weight", "help: "]),
        (["extract", "plain.pth", "-o", "new.safetensors"], "E-ALPHA", ["--alpha", "--scaling", "in: plain.pth"]),
        (["extract", "adapter", "-o", "new.safetensors"], "E-NO-BASE", ["in: adapter", "help: "]),
        (["unmerge", "base", "adapter", *out], "E-RECEIPT", ["in: base", "help: "]),
        (["unmerge", "merged", "adapter@0.5", *out], "E-RECEIPT", ["weight 1, not 0.5", "help: "]),
        (["unmerge", "merged", "adapter", "--exact", *out], "E-NOT-EXACT", ["--base", "in: merged"]),
        (["unmerge", "merged", "adapter", "--base", "sharded", "-o", "base"], "E-EXISTS", ["base", "help: "]),
    ]:
        text = message(*arguments, cli=cli, code=code)
        missing = [word for word in words if word not in text]
        assert not missing, f"{arguments}: no {missing} in\n{text}"


def test_near_names_are_suggested(kit: Kit, cli: Cli) -> None:
    state = {"l.0.query.weight": torch.ones(6, 4), "l.0.qv.weight": torch.ones(6, 4), "other": torch.ones(2)}
    save_file(state, kit / "base" / "model.safetensors")
    text = message("merge", kit / "base", kit / "adapter", "-o", kit / "new", cli=cli, code="E-TARGET")
    assert "l.0.q.weight" in text
    assert "l.0.q" in text.split("help: ")[1]
    assert "Did you mean" in cli("inspect", kit / "base", "--layer").err
    assert "--layers" in cli("inspect", kit / "base", "--layer").err


@pytest.mark.parametrize(("typed", "meant"), [("mrege", "merge"), ("unmrge", "unmerge"), ("inspekt", "inspect")])
def test_near_commands_are_suggested(cli: Cli, typed: str, meant: str) -> None:
    assert meant in cli(typed, "x").err.split("Usage:")[0]


def test_near_choices_are_suggested(kit: Kit, cli: Cli) -> None:
    convention = cli("inspect", kit / "adapter", "--from", "pft").err
    assert "peft" in convention.split("help: ")[1]
    scaling = cli(
        "extract", kit / "plain.pth", "-o", kit / "new.safetensors", "--alpha", "1", "--scaling", "alpha/r"
    ).err
    assert "alpha/rank" in scaling
    layout = cli("merge", kit / "base", kit / "adapter", "-o", kit / "new", "--layout", "out").err
    assert "out_in" in layout
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "new", "--dtype", "bfloat16").err.count("bf16") >= 1


def test_many_problems_are_counted(llama: Llama, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(llama.folder)
    save_file({"other.weight": torch.ones(8, 8)}, tmp_path / "other.safetensors")
    arguments = ["merge", tmp_path / "other.safetensors", "alpaca-lora", "-o", tmp_path / "new"]
    text = cli(*arguments).err
    assert 1 <= text.count("error[E-TARGET]") <= 10
    assert "none of the adapter's 154 targets is in the base" in text.splitlines()[0]
    assert len(cli(*arguments, "--json").json["problems"]) == 155  # the summary and each of them


def test_alpha_without_scaling_says_which_of_the_two_is_missing(kit: Kit, cli: Cli) -> None:
    text = message("extract", kit / "plain.pth", "-o", kit / "new.safetensors", "--alpha", "4", cli=cli, code="E-ALPHA")
    assert "--scaling" in text.split("help: ")[1].split("--alpha")[0], "the user did give --alpha"
    text = message(
        "extract", kit / "plain.pth", "-o", kit / "new.safetensors", "--scaling", "alpha", cli=cli, code="E-ALPHA"
    )
    assert "--alpha" in text.split("help: ")[1]


def test_help_of_a_missing_alpha_helps(kit: Kit, cli: Cli) -> None:
    """What the message proposes must work for the file it is about."""
    config = kit / "adapter" / "adapter_config.json"
    for name in ("plain.pth", "peft.pth"):
        text = message("extract", kit / name, "-o", kit / "new.safetensors", cli=cli, code="E-ALPHA")
        if "--config" in text:
            assert cli("extract", kit / name, "-o", kit / f"{name}.safetensors", "--config", config).code == 0, name


def test_options_that_do_nothing_are_refused(kit: Kit, cli: Cli) -> None:
    for options in (["--config", kit / "adapter" / "adapter_config.json"], ["--adapter", "nobody"]):
        result = cli(
            "extract", kit / "plain.pth", "-o", kit / "new.safetensors", "--alpha", "4", "--scaling", "alpha", *options
        )
        assert result.code == 2, f"{options} was ignored"


# ---------------------------------------------------------------- ADAPTER@WEIGHT


@pytest.mark.parametrize(
    ("name", "typed", "weight"),
    [
        ("a", "a", 1.0),
        ("a", "a@0.5", 0.5),
        ("a", "a@-1e-1", -0.1),
        ("a", "a/@2", 2.0),
        ("a@b", "a@b", 1.0),
        ("a@b", "a@b@0.5", 0.5),
        ("a@0.8", "a@0.8", 1.0),
        ("a@0.8", "a@0.8@0.5", 0.5),
        ("me@host", "me@host/", 1.0),
        ("a@0.8@0.5", "a@0.8@0.5", 1.0),
        ("ä b", "ä b@0", 0.0),
    ],
)
def test_weights_of_adapters(
    kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, typed: str, weight: float
) -> None:
    monkeypatch.chdir(kit.folder)
    shutil.copytree(kit / "adapter", kit / name)
    plan = cli("merge", "base", typed, "-o", "new", "--allow-unchanged", "--dry-run", "--json").json
    assert [adapter["weight"] for adapter in plan["adapters"]] == [weight]


def test_a_path_with_an_at_that_is_not_there(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kit.folder)
    text = cli("merge", "base", "me@host/adapter", "-o", "new").err
    assert "me@host/adapter" in text
    assert "not exist" in text, "that the weight is no number is only one of two possible mistakes"


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize(
    "name", ["native.lora.safetensors", "adapter", "base", "sharded", "merged", "merged.safetensors"]
)
def test_bytes_add_up(kit: Kit, cli: Cli, name: str) -> None:
    document = cli("inspect", kit / name, "--json").json
    path = kit / name
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    assert document["files"] == len(files)
    assert document["file_bytes"] == sum(file.stat().st_size for file in files)
    assert document["file_bytes"] == document["header_bytes"] + document["tensor_bytes"]
    if document["layers"]:
        assert document["adapter_bytes"] == sum(layer["bytes"] for layer in document["layers"])
        assert document["adapter_bytes"] == sum(group["bytes"] for group in document["groups"])
        assert document["adapter_bytes"] == document["tensor_bytes"]
        assert document["adapter_parameters"] == document["parameters"]
        assert sum(group["count"] for group in document["groups"]) == len(document["layers"])
    text = cli("inspect", path).out
    assert f"{document['file_bytes']:,} bytes" in text or f"{document['file_bytes']} bytes" in text


@pytest.mark.parametrize("name", ["plain.pth", "peft.pth", "plain.legacy.pth"])
def test_bytes_of_wrapped_checkpoints(kit: Kit, cli: Cli, name: str) -> None:
    document = cli("inspect", kit / name, "--json").json
    state = torch.load(kit / name, weights_only=True)
    assert document["what"] == "wrapped checkpoint"
    assert document["file_bytes"] == (kit / name).stat().st_size
    assert document["header_bytes"] is None
    assert document["tensor_bytes"] == sum(value.nbytes for value in state.values())
    assert document["parameters"] == sum(value.numel() for value in state.values())
    factors = [value for key, value in state.items() if ".lora" in key]
    assert document["adapter_bytes"] == sum(value.nbytes for value in factors)


def test_layers_add_up_for_a_real_shape(llama: Llama, cli: Cli) -> None:
    path = llama.folder / "alpaca.lora.safetensors"
    document = cli("inspect", path, "--base", llama.folder / "TinyLlama-1.1B", "--json").json
    assert len(document["layers"]) == 154
    assert document["file_bytes"] == path.stat().st_size
    assert document["header_bytes"] + sum(layer["bytes"] for layer in document["layers"]) == path.stat().st_size
    assert len(document["fit"]["touched"]) == 154
    assert document["fit"]["missing"] == []


def test_a_plan_tells_the_bytes_of_its_files(kit: Kit, cli: Cli) -> None:
    for base, flags in (("base", []), ("sharded", ["--dtype", "bf16"])):
        arguments = ["merge", kit / base, kit / "adapter", "-o", kit / f"{base}.new", *flags]
        plan = cli(*arguments, "--dry-run", "--json").json
        assert not (kit / f"{base}.new").exists()
        assert cli(*arguments).code == 0
        for file in plan["files"]:
            assert (kit / f"{base}.new" / file["name"]).stat().st_size == file["bytes"]
        assert plan["bytes_to_write"] == sum(file["bytes"] for file in plan["files"])


def test_a_plan_says_converted_for_what_is_converted(kit: Kit, cli: Cli) -> None:
    plan = cli("merge", kit / "base", kit / "adapter", "-o", kit / "new", "--dtype", "bf16", "--dry-run").out
    row = next(line for line in plan.splitlines() if line.startswith("norm.weight"))
    assert "restored" not in row, "nothing is restored in a merge"


def test_one_is_singular(kit: Kit, cli: Cli) -> None:
    for name in ("inspect adapter", "merge", "extract", "unmerge --dry-run"):
        out = cli(*everyday(kit)[name]).out
        assert not re.search(r"\b1 (updates|files|tensors|findings|companions)\b", out), out
        for path in (kit / "new", kit / "new base"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def test_run_returns_what_main_exits_with(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", str(kit / "native.lora.safetensors")]) == 0
    assert run(["--version"]) == 0
    capsys.readouterr()
