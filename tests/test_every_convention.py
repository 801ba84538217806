"""Every convention keeps what all of them promise: known by its names, merged to its formula, no traceback for damage.

And every writer: what it wrote is read again with the same deltas, and what it can not hold is refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convention_cases import SAMPLES, Sample
from models import State, assert_float32_close, changed, read
from safetensors.torch import save_file
from strategies import Maker, make_update
from writer_cases import WRITERS, Written

import loratool
from loratool import Adapter, Target, Targeted
from loratool.checkpoint import open_checkpoint
from loratool.conventions import CONVENTIONS, matching, native, writers

BY_NAME = {convention.NAME: convention for convention in CONVENTIONS}
every_convention = pytest.mark.parametrize("name", BY_NAME)
every_writer = pytest.mark.parametrize("name", writers())


def samples(name: str) -> list[Sample]:
    assert name in SAMPLES, f"{name} is a convention without a sample: give it one in convention_cases.SAMPLES"
    return SAMPLES[name]()


def written(name: str) -> Written:
    assert name in WRITERS, f"{name} can be written and is not tried: give it adapters in writer_cases.WRITERS"
    return WRITERS[name]()


def saved(case: Sample | Written, folder: Path) -> Path:
    """The base of a case, with what lies beside it."""
    folder.mkdir()
    save_file(dict(case.base), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in case.beside.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def placed(sample: Sample, folder: Path) -> tuple[Path, Path]:
    """The base and the source of a sample, on disk."""
    base = saved(sample, folder / "base")
    (folder / "source").mkdir()
    return base, sample.write(folder / "source")


# -- what every convention says of itself -----------------------------------------------------------------------------


@every_convention
def test_it_says_what_it_is(name: str) -> None:
    convention = BY_NAME[name]
    assert all(callable(getattr(convention, verb)) for verb in ("detect", "read", "unwrap"))
    assert name == convention.NAME
    assert convention.TITLE
    assert convention.TESTED
    assert {*convention.KINDS} <= {*native.KINDS}
    assert len({*convention.KINDS}) == len(convention.KINDS)


@every_convention
def test_its_kinds_are_those_it_has(name: str) -> None:
    assert {kind for sample in samples(name) for kind in sample.kinds} == {*BY_NAME[name].KINDS}


def test_no_sample_is_of_a_convention_that_is_gone() -> None:
    assert SAMPLES.keys() == BY_NAME.keys()
    assert WRITERS.keys() >= writers().keys()
    assert SAMPLES.keys() >= WRITERS.keys()


# -- reading ----------------------------------------------------------------------------------------------------------


@every_convention
def test_it_alone_takes_its_files(name: str, tmp_path: Path) -> None:
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        _, source = placed(sample, tmp_path / str(number))
        assert [found.NAME for found in matching(open_checkpoint(source))] == [name]


@every_convention
def test_it_finds_every_update(name: str, tmp_path: Path) -> None:
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        base, source = placed(sample, tmp_path / str(number))
        adapter = loratool.load(source, base=base, **sample.choices)
        assert {item.update.kind for item in adapter.updates} == sample.kinds
        assert adapter.targets().keys() == sample.exact.keys()
        assert adapter.provenance.get("convention", name) == name
        assert not adapter.doubts
        assert not adapter.check()
        summary = loratool.inspect(source, base=base)
        assert summary.convention == name
        assert {layer.kind for layer in summary.layers} == sample.kinds


@every_convention
def test_it_merges_to_its_formula(name: str, tmp_path: Path) -> None:
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        base, source = placed(sample, tmp_path / str(number))
        loratool.merge(base, loratool.load(source, base=base, **sample.choices), tmp_path / str(number) / "out")
        got = read(tmp_path / str(number) / "out")
        assert changed(sample.base, got) == sample.exact.keys()
        for tensor, value in sample.exact.items():
            assert_float32_close(got[tensor], value, name=tensor)


@every_convention
def test_a_cut_file_is_a_typed_error(name: str, tmp_path: Path) -> None:
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        base, source = placed(sample, tmp_path / str(number))
        file = weights(source)
        whole = file.read_bytes()
        for size in (0, 1, 9, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 40):
            file.write_bytes(whole[:size])
            said = [refusal(loratool.inspect, source), refusal(loratool.load, source, base=base, **sample.choices)]
            assert all(error is not None and error.code.startswith("E-") and error.message for error in said), size


@every_convention
def test_a_damaged_file_is_a_typed_error_or_none(name: str, tmp_path: Path) -> None:
    """Bytes turned at random: what is read in spite of it is a valid file of other numbers."""
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        base, source = placed(sample, tmp_path / str(number))
        file = weights(source)
        whole, dice = file.read_bytes(), random.Random(number)
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(dice.choice((1, 4, 16))):
                damaged[dice.randrange(min(len(whole), dice.choice((16, 400, len(whole)))))] = dice.randrange(256)
            file.write_bytes(damaged)
            error = refusal(planned, source, base, sample)
            assert error is None or error.code.startswith("E-")


def planned(source: Path, base: Path, sample: Sample) -> None:
    loratool.plan(base, loratool.load(source, base=base, **sample.choices), base.with_name("never"))


def refusal(act: Callable[..., object], *arguments: Any, **options: Any) -> loratool.LoratoolError | None:
    """The library's error, if there is one; any other is the test's failure."""
    try:
        act(*arguments, **options)
    except loratool.LoratoolError as error:
        return error
    return None


def weights(source: Path) -> Path:
    if source.is_file():
        return source
    (file,) = (path for path in source.iterdir() if path.suffix not in (".json", ".yaml"))
    return file


# -- writing ----------------------------------------------------------------------------------------------------------


def merged(base: Path, adapter: Adapter, out: Path) -> State:
    loratool.merge(base, adapter, out)
    return read(out)


@every_writer
def test_what_it_wrote_is_read_with_the_same_deltas(name: str, tmp_path: Path) -> None:
    case = written(name)
    base = saved(case, tmp_path / "base")
    for number, adapter in enumerate(case.adapters):
        source, out = tmp_path / f"{number}.safetensors", tmp_path / f"written-{number}{case.suffix}"
        loratool.save(adapter, source)
        loratool.convert(source, out, name, base=base, **case.options)
        again = loratool.load(out, base=base, **case.choices)
        assert again.provenance.get("convention", name) == name
        want = merged(base, adapter, tmp_path / f"want-{number}")
        got = merged(base, again, tmp_path / f"got-{number}")
        assert changed(case.base, got) == changed(case.base, want) == adapter.targets().keys()
        for tensor, value in want.items():
            assert_float32_close(got[tensor], value, name=f"{name}: {tensor}")
        kinds = {target: {item.update.kind for item in items} for target, items in again.targets().items()}
        for target, items in adapter.targets().items():
            assert kinds[target] == {case.turned.get(item.update.kind, item.update.kind) for item in items}


@every_writer
def test_what_it_does_not_hold_is_refused(name: str, tmp_path: Path) -> None:
    """Every kind of update is among those that are tried above, or a misfit that says why; never lost."""
    case = written(name)
    assert {case.turned.get(kind, kind) for kind in case.kinds} <= {*BY_NAME[name].KINDS}
    base = saved(case, tmp_path / "base")
    target = next(name for name, value in case.base.items() if value.dim() == 2 and name in case.adapters[0].targets())
    shape = tuple(case.base[target].shape)
    for kind in {*native.KINDS} - case.kinds:
        update = make_update({"dora": "dora0-lora", "scale": "scale1"}.get(kind, kind), shape, Maker(3))
        adapter = Adapter((Targeted(Target(target, shape), update),))
        with pytest.raises(loratool.Unsupported) as caught:
            loratool.convert(adapter, tmp_path / f"{kind}{case.suffix}", name, base=base, **case.options)
        assert target in str(caught.value)
        assert not (tmp_path / f"{kind}{case.suffix}").exists()


@every_writer
def test_what_it_reads_it_can_write_again(name: str, tmp_path: Path) -> None:
    """Its own samples, by way of their adapter."""
    case = written(name)
    for number, sample in enumerate(samples(name)):
        (tmp_path / str(number)).mkdir()
        base, source = placed(sample, tmp_path / str(number))
        adapter, out = loratool.load(source, base=base, **sample.choices), tmp_path / f"again-{number}{case.suffix}"
        if not sample.kinds <= case.kinds:
            continue
        error = refusal(loratool.convert, adapter, out, name, base=base, **case.options)
        if error is not None:
            assert all(f"{name} can not hold" in problem.message for problem in error.problems), str(error)
            continue
        got = merged(base, loratool.load(out, base=base, **case.choices), tmp_path / f"merged-{number}")
        for tensor, value in sample.exact.items():
            assert_float32_close(got[tensor], value, name=tensor)
