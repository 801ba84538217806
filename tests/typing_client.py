"""A client of the public interface, for `mypy --strict`: it is checked, and never run."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import loratool
from loratool import (
    Adapter,
    BaseIdentity,
    ConvertReport,
    ExtractReport,
    Handle,
    LiveReport,
    LoratoolError,
    MergedFile,
    MergedFolder,
    MergedSlice,
    MergeReport,
    Plan,
    Problem,
    Progress,
    Status,
    Summary,
    Target,
    Targeted,
    TensorIdentity,
    TensorRef,
    UnmergeReport,
    VerifyReport,
)
from loratool.receipt import MergedAdapter, Receipt
from loratool.survival import Survival


def bar(step: Progress) -> None:
    assert_type(step.done, int)
    assert_type(step.total, int)
    assert_type(step.what, str)


def reads(path: Path) -> Adapter:
    adapter = loratool.load("adapter/", base=path, alpha={"*q_proj*": 16.0}, scaling="alpha/rank", adapter="default")
    assert_type(adapter, Adapter)
    assert_type(adapter.updates, tuple[Targeted, ...])
    assert_type(adapter.updates[0].target, Target)
    assert_type(adapter.updates[0].target.rows, tuple[int, int] | None)
    assert_type(adapter.base, BaseIdentity)
    assert_type(adapter.base.tensors, Mapping[str, TensorIdentity])
    assert_type(adapter.provenance, Mapping[str, str])
    assert_type(adapter.targets(), dict[str, list[Targeted]])
    assert_type(adapter.parameters, int)
    for ref in adapter.updates[0].update.components().values():
        assert_type(ref, TensorRef)
        assert_type(ref.shape, tuple[int, ...])
        assert_type(ref.digest(), str)
    return adapter


def writes(adapter: Adapter, path: Path) -> None:
    assert_type(loratool.validate(path), list[Problem])
    loratool.save(adapter, path)
    report = loratool.extract("wrapped.pth", path, alpha=16, scaling="alpha", base_out="base/", progress=bar)
    assert_type(report, ExtractReport)
    assert_type(report.adapter, Adapter)
    summary = loratool.inspect(path, base="base/")
    assert_type(summary, Summary)
    assert_type(summary.to_json(), dict[str, Any])
    converted = loratool.convert(adapter, "out/", "peft", base=path, uniform=True, bake=True)
    assert_type(converted, ConvertReport)
    assert_type(converted.files, tuple[Path, ...])
    assert_type(loratool.convert("in/", path, "native", alpha={"*": 16.0}).adapter, Adapter)


def merges(adapter: Adapter, path: Path) -> None:
    assert_type(loratool.merge("base/", adapter, "out/"), MergeReport)
    assert_type(loratool.merge("base/", "adapter/", "out/"), MergeReport)
    assert_type(loratool.merge("base/", "adapter/", "out/", executor=ProcessPoolExecutor(2)), MergeReport)
    report = loratool.merge(
        path, [adapter, "one", (path, 0.5), (adapter, 1)], path, dtype="bf16", allow_new=True, progress=bar
    )
    assert_type(report.plan, Plan)
    assert_type(report.plan.nbytes, int)
    assert_type(report.seconds, float)
    assert_type(loratool.plan("base/", ["one", "two"], "out/"), Plan)
    with loratool.open_merged(path, [(adapter, 0.5)], dtype="bf16", threads=2) as merged:
        assert_type(merged, MergedFolder)
        assert_type(merged.files, tuple[str, ...])
        assert_type(merged.keys(), list[str])
        assert_type(merged.metadata(), dict[str, str] | None)
        assert_type(merged.get_slice("w"), MergedSlice)
        assert_type(merged.get_slice("w").get_shape(), list[int])
        with merged.open_shard(merged.files[0]) as shard:
            assert_type(shard, MergedFile)
    names = [name for name, _ in loratool.iter_merged("base/", "adapter/")]
    assert_type(names, list[str])
    back = loratool.unmerge("out/", [("one", None), (adapter, 0.5)], "back/", base="base/", exact=True)
    assert_type(back, UnmergeReport)
    assert_type(back.exact, bool)
    assert_type(back.bound, float)
    assert_type(back.to_json(), dict[str, Any])
    assert_type(report.receipt, Receipt)
    assert_type(report.receipt.digest, str)
    assert_type(report.survival, Mapping[str, Survival])
    assert_type(report.survival["a.weight"].share, float | None)


def asks(adapter: Adapter, path: Path) -> bool:
    report = loratool.verify(path, "base/", [(adapter, 0.5), "other/"], sample=0.05, ulps=2, threads=1, progress=bar)
    assert_type(report, VerifyReport)
    assert_type(report.answer, bool)
    assert_type(report.ulps, float)
    assert_type(report.counts, tuple[int, int])
    assert_type(report.sample, float | None)
    assert_type(report.adapters, tuple[MergedAdapter, ...])
    assert_type(report.survival, Mapping[str, Survival])
    for finding in report.findings:
        assert_type((finding.word, finding.text), tuple[str, str])
        assert_type(finding.tensors, tuple[str, ...])
    for check in report.tensors:
        assert_type(check.wrong, int)
        assert_type(check.survival.moved_share, float | None)
        assert_type(check.reason.factors if check.reason else (), tuple[float, ...])
    status = loratool.status("merged/", check=True, progress=bar)
    assert_type(status, Status)
    assert_type(status.receipt, Receipt | None)
    assert_type(status.changed, tuple[str, ...])
    return report.answer and status.answer


def lives(model: Any, adapter: Adapter, path: Path) -> None:
    with loratool.apply(model, path, weight=0.5, undo="copy") as handle:
        assert_type(handle, Handle)
        assert_type(handle.swap(adapter, weight=1.0), LiveReport)
        assert_type(handle.active, bool)
        assert_type(handle.report.undo_bytes, int)
    assert_type(loratool.apply(model, adapter, undo=path, check_base=False).remove(), None)
    loratool.apply(model, adapter, 0.5)  # type: ignore[call-arg]


def fails() -> None:
    try:
        loratool.merge("base/", [], "out/")
    except (loratool.Mismatch, loratool.OutputRefused) as error:
        assert_type(error.code, str)
        assert_type(error.problems, tuple[Problem, ...])
    except loratool.AnswerIsNo as error:
        assert_type(error.exit_code, int)
    except LoratoolError as error:
        assert_type(error.problems[0].to_json(), dict[str, str])
    loratool.merge("base/", 3, "out/")  # type: ignore[arg-type]
    loratool.merge("base/", ["one"], "out/", precision="bf16")  # type: ignore[call-arg]
    loratool.verify("merged/", "base/")  # type: ignore[call-arg]
    loratool.status("merged/", True)  # type: ignore[call-arg]
    loratool.load("adapter/", alpha="16")  # type: ignore[arg-type]
    loratool.save("adapter/", "out")  # type: ignore[arg-type]
