"""Merges on a real Dask cluster of several processes: the bytes of a local merge, though workers are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from strategies import files_of, one, save_sharded

import loratool
from loratool import Adapter, dispatch

distributed = pytest.importorskip("distributed", reason="only tests/peers.sh installs it")
dask = pytest.importorskip("dask")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # its own, when workers die
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BUNDLE", 200_000)


def local_cluster(workers: int) -> Any:
    return distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50,
        env={"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of three processes; `scheduler_file` is where its scheduler is told."""
    with local_cluster(3) as cluster:
        cluster.scheduler_file = tmp_path_factory.mktemp("shared") / "scheduler.json"
        with distributed.Client(cluster, set_as_default=False) as client:
            client.write_scheduler_file(cluster.scheduler_file)
        yield cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ in three shards, 12 MB, two adapters of several kinds, and local/ and local.undo: a merge on threads."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    state = {f"{n}.weight": torch.randn(512, 256).to((torch.bfloat16, torch.float32)[n % 2]) for n in range(30)}
    save_sharded(state, folder / "base", shards=3)
    forms = ("lora", "dora1-lora", "lokr-both", "loha", "replace")
    items = [one(forms[n % 5], (512, 256), seed=n, name=f"{n}.weight").updates[0] for n in range(0, 30, 2)]
    loratool.save(Adapter(tuple(items)), folder / "a.lora.safetensors")
    loratool.save(one("lora", (512, 256), name="1.weight"), folder / "b.lora.safetensors")
    loratool.merge(folder / "base", adapters(folder), folder / "local", undo=folder / "local.undo")
    return folder


def adapters(world: Path) -> list[tuple[Path, float]]:
    return [(world / "a.lora.safetensors", 1.0), (world / "b.lora.safetensors", 0.5)]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["address", "file"])
def test_the_command_line_takes_an_address_or_a_scheduler_file(
    how: str, shared: Any, world: Path, tmp_path: Path, cli: Cli
) -> None:
    place = shared.scheduler_address if how == "address" else shared.scheduler_file
    weighted = [f"{path}@{weight}" for path, weight in adapters(world)]
    out = tmp_path / "out"
    result = cli("merge", world / "base", *weighted, "-o", out, "--dask", place, "--undo", tmp_path / "u", "--json")
    assert result.code == 0, result.err
    assert result.json["schema"] == "loratool.merge/1"
    assert files_of(out) == files_of(world / "local")
    assert (tmp_path / "u").read_bytes() == (world / "local.undo").read_bytes()


def test_a_worker_killed_half_way_changes_no_byte(world: Path, tmp_path: Path) -> None:
    with local_cluster(3) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        workers: dict[str, int] = client.run(os.getpid)
        killed: list[int] = []
        steps: list[loratool.Progress] = []

        def half_way(step: loratool.Progress) -> None:
            steps.append(step)
            if step.done > step.total / 2 and not killed:
                busy = client.processing()
                killed.append(next(pid for address, pid in workers.items() if busy.get(address)))
                os.kill(killed[0], signal.SIGKILL)

        executor = client.get_executor(pure=False)
        report = loratool.merge(
            world / "base", adapters(world), tmp_path / "out", undo=tmp_path / "u", executor=executor, progress=half_way
        )
        lost = [event for _, event in client.get_events("all") if event.get("action") == "remove-worker"]
        assert any(event["processing-tasks"] for event in lost), "it had nothing to do when it was killed"
        assert killed[0] not in client.run(os.getpid).values()
    assert files_of(tmp_path / "out") == files_of(world / "local")
    assert (tmp_path / "u").read_bytes() == (world / "local.undo").read_bytes()
    assert report.receipt.to_json()["tensors"]
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total, "no byte is counted twice"
    assert left_behind(tmp_path) == ["out", "u"]


def test_a_call_that_is_lost_too_often_is_told(world: Path, tmp_path: Path) -> None:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        local_cluster(1) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        (pid,) = client.run(os.getpid).values()
        with pytest.raises(loratool.OutputRefused, match="KilledWorker") as caught:
            loratool.merge(
                world / "base", adapters(world), tmp_path / "out", executor=client.get_executor(pure=False),
                progress=lambda step: os.kill(pid, signal.SIGKILL) if step.done > step.total / 2 else None,
            )  # fmt: skip
    assert caught.value.code == "E-WORKER"
    assert left_behind(tmp_path) == []


def test_a_worker_that_does_not_see_the_files_is_named(shared: Any, world: Path, tmp_path: Path) -> None:
    def blindfold() -> None:  # as on a machine where nothing is mounted
        from loratool import remote

        remote._is_there = lambda state: False  # type: ignore[assignment]

    with distributed.Client(shared, set_as_default=False) as client:
        one_of_them = next(iter(client.run(os.getpid)))
        client.run(blindfold, workers=[one_of_them])
        try:
            with pytest.raises(loratool.OutputRefused, match="does not see") as caught:
                loratool.merge(world / "base", adapters(world), tmp_path / "out", executor=client.get_executor())
        finally:
            client.restart()
    assert caught.value.code == "E-WORKER"
    assert one_of_them in caught.value.where
    assert ", " not in caught.value.where.replace(", process", ""), "only this one"
    assert left_behind(tmp_path) == []


def test_an_error_of_a_task_comes_out_as_it_is(shared: Any, tmp_path: Path, cli: Cli) -> None:
    save_sharded({"layer.weight": torch.full((64, 64), 60_000.0).half()}, tmp_path / "base")
    loratool.save(one("add", (64, 64), alpha=1e6), tmp_path / "a.lora.safetensors")
    arguments = ("merge", tmp_path / "base", tmp_path / "a.lora.safetensors", "-o", tmp_path / "out", "--json")
    here, there = cli(*arguments), cli(*arguments, "--dask", shared.scheduler_address)
    assert here.code == there.code == 2
    assert here.json == there.json
    assert there.json["problems"][0]["code"] == "E-NONFINITE"
    assert left_behind(tmp_path) == ["a.lora.safetensors", "base"]


def test_an_interrupted_merge_leaves_nothing_and_a_cluster_that_works(shared: Any, world: Path, tmp_path: Path) -> None:
    def stop(step: loratool.Progress) -> None:
        if step.done > step.total / 3:
            raise KeyboardInterrupt

    with distributed.Client(shared, set_as_default=False) as client:
        executor = client.get_executor(pure=False)
        with pytest.raises(KeyboardInterrupt):
            loratool.merge(world / "base", adapters(world), tmp_path / "out", executor=executor, progress=stop)
        assert left_behind(tmp_path) == []
        until = time.monotonic() + 20
        while any(client.processing().values()) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(client.processing().values()), "what was not begun is cancelled"
        loratool.merge(world / "base", adapters(world), tmp_path / "out", executor=executor)
    assert files_of(tmp_path / "out") == files_of(world / "local")


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("127.0.0.1:1", "E-WORKER", "no Dask scheduler answers at 127.0.0.1:1"),
        ("no such address", "E-WORKER", "no Dask scheduler answers"),
        ("nowhere.json", "E-OPTION", "no scheduler file nowhere.json"),
    ],
)
def test_a_scheduler_that_is_not_there(
    address: str, code: str, message: str, world: Path, tmp_path: Path, cli: Cli
) -> None:
    result = cli(
        "merge", world / "base", world / "a.lora.safetensors", "-o", tmp_path / "out", "--dask", address, "--json"
    )
    assert result.code == 2
    assert result.json["problems"][0]["code"] == code
    assert message in result.json["problems"][0]["message"]
    assert left_behind(tmp_path) == []


def test_a_cluster_without_workers(world: Path, tmp_path: Path) -> None:
    with (
        local_cluster(0) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        pytest.raises(loratool.OutputRefused, match="has no workers"),
    ):
        loratool.merge(world / "base", adapters(world), tmp_path / "out", executor=client.get_executor())
    assert left_behind(tmp_path) == []
