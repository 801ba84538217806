"""A merge whose tasks are calls of an executor: the bytes of a local merge, whatever becomes of the workers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given
from strategies import FORMS, Case, cases, files_of, one, raw, save_sharded
from test_quantised import fp8_base, lora

import loratool
from loratool import Adapter, Problem, dispatch, errors, remote
from loratool.layout import Change, Copy
from loratool.remote import Site, factors, lies_in_files, portable, sources
from loratool.resume import Journal
from loratool.tasks import Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    elsewhere = {"initializer": os.chdir, "initargs": ("/",)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), **elsewhere) as pool:
        yield pool


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BUNDLE", 20_000)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """base/: three shards with some tensors that change and some that do not; two adapters for them."""
    torch.manual_seed(0)
    state = {f"{n}.weight": torch.randn(96, 80).to((torch.bfloat16, torch.float32)[n % 2]) for n in range(9)}
    save_sharded(state, tmp_path / "base", shards=3)
    (tmp_path / "base" / "config.json").write_text("{}")
    items = [one(form, (96, 80), name=f"{n}.weight").updates[0] for n, form in enumerate(("lora", "dora1-lora"))]
    loratool.save(Adapter(tuple(items)), tmp_path / "two.lora.safetensors")
    loratool.save(one("loha", (96, 80), name="0.weight"), tmp_path / "one.lora.safetensors")
    return tmp_path


def adapters(world: Path) -> list[tuple[Path, float]]:
    return [(world / "two.lora.safetensors", 1.0), (world / "one.lora.safetensors", 0.5)]


def scratch(folder: Path) -> list[Path]:
    return [*folder.glob(".*.partial-*")]


class Wrong(Executor):
    """An executor that answers `look`, and does something else with other calls."""

    def __init__(self, act: Callable[[Future[Any], Callable[[], Any]], None]) -> None:
        self.act, self.submitted = act, 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        if function is remote.look:
            future.set_result(function(*arguments))
        else:
            self.act(future, lambda: function(*arguments, **options))
        return future


# --- the same bytes --------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no digests": {"digests": False},
    "float32": {"dtype": "fp32"},
    "reproducible": {"reproducible": True},
    "linked": {"link": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_folder_is_the_same(kind: str, options: str, world: Path, request: pytest.FixtureRequest) -> None:
    executor = request.getfixturevalue(kind)
    local = loratool.merge(world / "base", adapters(world), world / "local", **OPTIONS[options])
    there = loratool.merge(world / "base", adapters(world), world / "there", **OPTIONS[options], executor=executor)
    assert files_of(world / "there") == files_of(world / "local")
    assert there.survival == local.survival
    assert there.receipt == local.receipt
    assert not scratch(world)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_undo_record_is_the_same(kind: str, world: Path, request: pytest.FixtureRequest) -> None:
    executor = request.getfixturevalue(kind)
    for name, given_one in (("local", None), ("there", executor)):
        loratool.merge(world / "base", adapters(world), world / name, undo=world / f"{name}.undo", executor=given_one)
    assert (world / "there.undo").read_bytes() == (world / "local.undo").read_bytes()
    loratool.unmerge(world / "there", [path for path, _ in adapters(world)], world / "back", undo=world / "there.undo")
    assert files_of(world / "back") == files_of(world / "base")


def test_one_file_is_the_same(world: Path, processes: Executor) -> None:
    base = save_sharded({"0.weight": torch.randn(96, 80), "n": torch.arange(30_000)}, world / "single")
    file, adapter = base / "model.safetensors", one("lora", (96, 80), name="0.weight")
    loratool.merge(file, adapter, world / "local.safetensors")
    loratool.merge(file, adapter, world / "there.safetensors", executor=processes)
    assert (world / "there.safetensors").read_bytes() == (world / "local.safetensors").read_bytes()


@pytest.mark.parametrize("shards", [1, 2])  # codes and scales in one file, or in two
def test_quantised_weights_are_the_same(shards: int, tmp_path: Path, processes: Executor) -> None:
    state = fp8_base(tmp_path / "base", "deepseek", shards)
    name = next(name for name in state if f"{name}_scale_inv" in state)
    adapter = lora(tuple(state[name].shape), name=name)
    for dtype in ("keep", "bf16"):
        loratool.merge(tmp_path / "base", adapter, tmp_path / f"{dtype}-local", dtype=dtype)
        loratool.merge(tmp_path / "base", adapter, tmp_path / f"{dtype}-there", dtype=dtype, executor=processes)
        assert files_of(tmp_path / f"{dtype}-there") == files_of(tmp_path / f"{dtype}-local")


@pytest.mark.parametrize("zipped", [True, False])  # the other is only read whole: its tasks stay here
def test_a_pickled_base_is_the_same(zipped: bool, tmp_path: Path, processes: Executor) -> None:
    (tmp_path / "base").mkdir()
    state = {f"{n}.weight": torch.randn(96, 80) for n in range(6)}
    torch.save(state, tmp_path / "base" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    adapter = one("lora", (96, 80), name="2.weight")
    executor = processes if zipped else Wrong(lambda future, call: pytest.fail("a base in memory was sent"))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "local")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "there", executor=executor)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "local")


def test_relative_paths_mean_the_same_elsewhere(
    world: Path, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    for name, executor in (("local", None), ("there", processes)):
        loratool.merge("base", ["two.lora.safetensors", ("one.lora.safetensors", 0.5)], name, executor=executor)
    assert files_of(world / "there") == files_of(world / "local")


# --- what is sent ----------------------------------------------------------------------------------------------------


def calls(base: Path, adapter: Adapter | Path, out: Path) -> list[tuple[tuple[Copy | Change, ...], bytes]]:
    """The tasks of each call of a merge, and what would be sent for them."""
    out.parent.mkdir()
    plan = loratool.plan(base, adapter, out)
    site = Site.of(out, Journal(out.parent / "journal", plan), "cpu", plan.inputs)
    bundles = [bundle for file in plan.files for bundle in dispatch.bundles(file.name, file.tasks)]
    assert not any(bundle.stays for bundle in bundles)
    return [(bundle.tasks, site.call(bundle.name, bundle.tasks, Settings())[1]) for bundle in bundles]


@given(case=cases(FORMS))
def test_calls_of_every_kind_of_update_are_small_and_hold_nothing_of_the_base(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("case")
    save_sharded(case.base, folder / "base", shards=2)
    loratool.save(case.adapter, folder / "a.lora.safetensors")
    for where, adapter in (("file", folder / "a.lora.safetensors"), ("memory", case.adapter)):
        for tasks, sent in calls(folder / "base", adapter, folder / where / "out"):
            carried = 0 if where == "file" else sum(ref.nbytes for task in tasks for ref in factors(task))
            assert len(sent) < carried + 4_000 * len(tasks) + 2_000
            for value in case.base.values():
                assert len(raw(value)) < 24 or raw(value) not in sent
    with ThreadPoolExecutor(2) as pool:
        loratool.merge(folder / "base", case.adapter, folder / "there", executor=pool)
    loratool.merge(folder / "base", case.adapter, folder / "local")
    assert files_of(folder / "there") == files_of(folder / "local")


def test_a_pickled_base_is_sent_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    state = {f"{n}.weight": torch.randn(96, 80) for n in range(3)}
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    adapter = one("lora", (96, 80), name="2.weight")
    for tasks, sent in calls(tmp_path / "base", adapter, tmp_path / "out" / "out"):
        [ref.read() for task in tasks for ref in sources(task)]  # which keeps the opened file
        assert len(sent) < 6_000
        again = pickle.loads(sent)
        assert len({id(ref.data.file) for task in again.tasks for ref in sources(task)}) == 1
        for task in tasks:
            assert len(pickle.dumps(portable(task))) < 6_000


def test_a_long_copy_is_cut_and_every_byte_is_written_once(world: Path) -> None:
    for file in loratool.plan(world / "base", adapters(world), world / "out").files:
        pieces = sorted(
            (task.offset, task.nbytes) for found in dispatch.bundles(file.name, file.tasks) for task in found.tasks
        )
        assert len(pieces) > len(file.tasks)
        ends = [len(file.header), *(offset + nbytes for offset, nbytes in pieces)]
        assert ends == [*(offset for offset, _ in pieces), file.size]


def test_small_tasks_go_together(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BUNDLE", 1 << 20)
    for file in loratool.plan(world / "base", adapters(world), world / "out").files:
        assert len([*dispatch.bundles(file.name, file.tasks)]) == 1


def test_factors_that_lie_in_no_file_are_read_before_they_are_sent(tmp_path: Path) -> None:
    item = one("lora", (6, 4)).updates[0]
    turned = replace(item.update, A=item.update.components()["A"].T.T.narrow(0, 0, 1))
    sent = pickle.loads(pickle.dumps(portable(turned)))
    assert not lies_in_files(turned.A)
    assert torch.equal(sent.A.read(), turned.A.read())
    assert len(sent.A.data.raw) == turned.A.nbytes
    assert torch.equal(sent.B.read(), turned.B.read())


# --- workers that can not do it --------------------------------------------------------------------------------------

BLIND: dict[str, tuple[Callable[[Site], Site], str]] = {
    "folder": (lambda site: replace(site, folder=Path("/nowhere"), journal=Path("/nowhere/journal")), "does not see"),
    "another folder": (lambda site: replace(site, first_line="another"), "does not see"),
    "input": (lambda site: replace(site, inputs=(site.inputs[0]._replace(path=Path("/no")),)), "does not see /no as"),
    "other input": (lambda site: replace(site, inputs=(site.inputs[0]._replace(size=1),)), "as it is here"),
    "torch": (lambda site: replace(site, torch="1.0"), "has torch"),
    "device": (lambda site: replace(site, device="cuda:99"), "has no device cuda:99"),
}


@pytest.mark.parametrize("what", BLIND)
def test_a_worker_that_sees_something_else_is_found_out_first(
    what: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BLIND[what]
    blind = Wrong(lambda future, call: pytest.fail("a task was sent"))
    packed = Site.packed
    monkeypatch.setattr(Site, "packed", lambda site: packed(change(site)))
    with pytest.raises(loratool.OutputRefused) as caught:
        loratool.merge(world / "base", adapters(world), world / "out", executor=blind)
    assert caught.value.code == "E-WORKER"
    assert message in caught.value.message
    assert f"process {os.getpid()}" in caught.value.where
    assert caught.value.hint
    assert not (world / "out").exists()
    assert not scratch(world)


@pytest.mark.parametrize("when", ["look", "perform"])
def test_another_release_is_refused_before_anything_is_unpacked(
    when: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "loratool 0.0.0"
    if when == "look":
        monkeypatch.setattr(Site, "packed", lambda site: (other, b"not a pickle"))
    else:
        monkeypatch.setattr(Site, "call", lambda *_: (other, b"not a pickle"))
    with pytest.raises(loratool.OutputRefused, match=f"not {other}") as caught:
        loratool.merge(world / "base", adapters(world), world / "out", executor=ThreadPoolExecutor(1))
    assert caught.value.code == "E-WORKER"


def test_a_worker_that_has_lost_the_folder_says_so(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Site.call
    monkeypatch.setattr(Site, "call", lambda site, *rest: call(replace(site, journal=Path("/gone")), *rest))
    with pytest.raises(loratool.OutputRefused, match="does not see"):
        loratool.merge(world / "base", adapters(world), world / "out", executor=ThreadPoolExecutor(1))
    assert not scratch(world)


# --- failures --------------------------------------------------------------------------------------------------------


def gives_up(future: Future[Any], call: Callable[[], Any]) -> None:
    future.set_exception(RuntimeError("the worker is gone"))


def cancels(future: Future[Any], call: Callable[[], Any]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()


def breaks(future: Future[Any], call: Callable[[], Any]) -> None:
    raise BrokenExecutor("no more")


@pytest.mark.parametrize("act", [gives_up, cancels, breaks])
def test_an_executor_that_loses_a_call_leaves_nothing(
    act: Callable[[Future[Any], Callable[[], Any]], None], world: Path
) -> None:
    done = 0

    def third(future: Future[Any], call: Callable[[], Any]) -> None:
        nonlocal done
        done += 1
        act(future, call) if done == 3 else future.set_result(call())

    with pytest.raises(loratool.OutputRefused) as caught:
        loratool.merge(world / "base", adapters(world), world / "out", undo=world / "u.undo", executor=Wrong(third))
    assert caught.value.code == "E-WORKER"
    assert not (world / "out").exists()
    assert not (world / "u.undo").exists()
    assert not scratch(world)


def test_a_broken_pool_of_processes(world: Path) -> None:
    def kill(step: loratool.Progress) -> None:
        for process in pool._processes.values():
            os.kill(process.pid, signal.SIGKILL)

    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(loratool.OutputRefused, match="BrokenProcessPool") as caught,
    ):
        loratool.merge(world / "base", adapters(world), world / "out", executor=pool, progress=kill)
    assert caught.value.code == "E-WORKER"
    assert not (world / "out").exists()
    assert not scratch(world)


def test_an_error_of_a_task_is_that_of_a_local_merge(tmp_path: Path, processes: Executor) -> None:
    save_sharded({"layer.weight": torch.full((64, 64), 60_000.0).half()}, tmp_path / "base")
    adapter = one("add", (64, 64), alpha=1e6)
    found = []
    for executor in (None, processes):
        with pytest.raises(loratool.Mismatch) as caught:
            loratool.merge(tmp_path / "base", adapter, tmp_path / "out", executor=executor)
        found.append((type(caught.value), caught.value.problems, str(caught.value)))
    assert found[0] == found[1]
    assert found[0][1][0].code == "E-NONFINITE"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_base_that_changes_is_noticed_by_the_worker(world: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (world / "base").glob("*.safetensors")}

    def touched(future: Future[Any], call: Callable[[], Any]) -> None:
        for path in files:
            os.utime(path, (1, 1))
        future.set_result(call())
        for path, time_then in files.items():
            os.utime(path, ns=(time_then, time_then))  # the parent sees nothing of it

    with pytest.raises(loratool.InvalidFile) as caught:
        loratool.merge(world / "base", adapters(world), world / "out", executor=Wrong(touched))
    assert caught.value.code == "E-CHANGED"
    assert not scratch(world)


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_a_journey(kind: type[loratool.LoratoolError]) -> None:
    error = kind([Problem("E-ONE", "one", "here", "do that", "R-001"), Problem("E-TWO", "two")])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.problems, str(again), again.args) == (kind, error.problems, str(error), error.args)


def test_threads_are_the_executor_s(world: Path, threads: Executor) -> None:
    with pytest.raises(loratool.ChoiceNeeded, match="workers of its own"):
        loratool.merge(world / "base", adapters(world), world / "out", threads=2, executor=threads)


def test_the_memory_of_one_task_is_what_is_limited(world: Path, threads: Executor) -> None:
    need = loratool.plan(world / "base", adapters(world), world / "out", threads=1).memory
    loratool.merge(world / "base", adapters(world), world / "out", max_memory=need, executor=threads)
    with pytest.raises(loratool.Mismatch) as caught:
        loratool.merge(world / "base", adapters(world), world / "no", max_memory=need - 1, executor=threads)
    assert caught.value.code == "E-MEMORY"


# --- on the way ------------------------------------------------------------------------------------------------------


def test_progress_adds_up_and_comes_from_the_caller(
    world: Path, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    finished: list[str] = []
    file_done = Journal.file_done
    monkeypatch.setattr(
        Journal, "file_done", lambda own, file, known: [finished.append(file), file_done(own, file, known)]
    )

    def note(step: loratool.Progress) -> None:
        assert threading.current_thread() is threading.main_thread()
        steps.append((step.done, step.total))

    plan = loratool.merge(world / "base", adapters(world), world / "out", executor=processes, progress=note).plan
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1] == (plan.nbytes, plan.nbytes)
    assert len(steps) > len(plan.files) * 2
    assert sorted(finished) == sorted(file.name for file in plan.files)


def test_only_so_many_calls_are_on_their_way(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "IN_FLIGHT", 4)
    lock, now, most = threading.Lock(), 0, 0

    class Counting(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            return super().submit(function, *arguments, **options)

    def one_less(step: loratool.Progress) -> None:
        nonlocal now
        with lock:
            now = max(0, now - 1)

    with Counting(2) as pool:
        loratool.merge(world / "base", adapters(world), world / "out", executor=pool, progress=one_less)
    assert 2 <= most <= 5  # a call that is done counts until its progress is told


@pytest.mark.parametrize("failure", [KeyboardInterrupt, BrokenPipeError, ZeroDivisionError])
def test_an_interrupted_merge_leaves_nothing_and_nothing_runs_on(failure: type[BaseException], world: Path) -> None:
    running: list[object] = []

    class Slow(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
            def slowly() -> Any:
                running.append(self)
                time.sleep(0.05)
                try:
                    return function(*arguments, **options)
                finally:
                    running.pop()

            return super().submit(slowly)

    def stop(step: loratool.Progress) -> None:
        if step.done > step.total / 3:
            raise failure

    with Slow(3) as pool:
        with pytest.raises(failure):
            loratool.merge(world / "base", adapters(world), world / "out", executor=pool, progress=stop)
        assert not running
        assert not (world / "out").exists()
        assert not scratch(world)
        loratool.merge(world / "base", adapters(world), world / "out", executor=pool)


def test_calls_that_run_twice_and_too_late_change_nothing(world: Path) -> None:
    late: list[Callable[[], Any]] = []

    def twice(future: Future[Any], call: Callable[[], Any]) -> None:
        first = call()
        for before in late:
            before()  # a worker that was given up for lost, while its neighbours have gone on
        late.append(call)
        future.set_result(first)

    loratool.merge(world / "base", adapters(world), world / "local")
    loratool.merge(world / "base", adapters(world), world / "out", executor=Wrong(twice))
    assert files_of(world / "out") == files_of(world / "local")
    for call in late:
        assert call().error.code == "E-WORKER", "it finds no folder any more"
    assert files_of(world / "out") == files_of(world / "local")
    assert not scratch(world)


KILLED = """
import os, signal, sys, loratool
from concurrent.futures import ThreadPoolExecutor
from loratool import dispatch
dispatch.BUNDLE, dispatch.FILES_AT_ONCE = 20_000, 1
def stop(step):
    if step.done > 0.8 * step.total:
        os.kill(os.getpid(), signal.SIGKILL)
loratool.merge(*sys.argv[1:4], progress=stop, executor=ThreadPoolExecutor(1))
"""


def test_what_a_killed_merge_has_finished_is_kept(world: Path, processes: Executor) -> None:
    arguments = [str(world / name) for name in ("base", "two.lora.safetensors", "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    finished = {path.stat().st_ino for path in scratch(world)[0].glob("out/*.safetensors")}
    loratool.merge(*arguments[:2], arguments[2], resume=True, executor=processes)
    kept = finished & {path.stat().st_ino for path in (world / "out").glob("*.safetensors")}
    assert kept, "nothing was kept"
    loratool.merge(*arguments[:2], world / "local")
    assert files_of(world / "out") == files_of(world / "local")


# --- the command line ------------------------------------------------------------------------------------------------


def test_dask_without_its_package(world: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    arguments = ("merge", world / "base", world / "two.lora.safetensors", "-o", world / "out", "--dask", "here:8786")
    result = cli(*arguments, "--json")
    assert result.code == 2
    assert result.json["problems"][0]["code"] == "E-OPTION"
    assert "loratool[dask]" in result.json["problems"][0]["hint"]
    assert cli(*arguments, "--threads", 2).code == 2
