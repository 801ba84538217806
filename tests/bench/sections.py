"""What is measured, and what was promised of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import data, measure
from tests.bench.data import ALL, QV, Model
from tests.bench.live import timed
from tests.bench.measure import Run
from tests.bench.report import Claim, Results, Row, tell

Case = Callable[[Path], Run]  # runs something that writes to a path that is free
MB = 1e6


@dataclass
class Bench:
    """What the sections share: where, how often, how large, and the results."""

    folder: Path
    rounds: int
    size: float  # billions of parameters
    quick: bool
    results: Results = field(default_factory=Results)

    def base(self, size: float, shards: int = 3, dtype: str = "BF16") -> Path:
        path = self.folder / f"base-{size:g}B-{shards}-{dtype}"
        if not path.exists():
            needed, free = 2.2 * size * 1e9 * data.WIDTH[dtype], shutil.disk_usage(self.folder).free
            if free < needed:
                raise SystemExit(f"{self.folder}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; see --dir")
            tell(f"making {path.name}")
            data.apart(data.write_checkpoint, path, Model(size), shards, dtype)
        return path

    def adapter(self, size: float, rank: int, targets: tuple[str, ...] = ALL, delta: float = 2e-3) -> Path:
        path = self.folder / f"adapter-{size:g}B-{rank}-{len(targets)}-{delta:g}"
        if not path.exists():
            data.apart(data.write_adapter, path, Model(size), rank, targets, delta)
        return path

    def backed(self, base: Path) -> int:
        """Bytes of memory that a run should find ready: the page cache of the output and, for PEFT, the model."""
        return int(2.2 * sum(file.stat().st_blocks * 512 for file in base.iterdir())) + 10**9

    def loratool(self, base: Path, command: str, *arguments: object, flush: bool = True) -> Case:
        cores = len(os.sched_getaffinity(0))
        threads = ["--threads", cores] if cores < (os.cpu_count() or 1) and measure.offers(command, "--threads") else []
        everything = (command, *arguments, *threads)
        return lambda out: measure.loratool(*everything, "-o", out, flush=flush, backed=self.backed(base))

    def measure(
        self,
        section: str,
        base: Path,
        cases: dict[str, Case],
        copies: bool = True,
        rounds: int | None = None,
        warm: bool = True,
    ) -> dict[str, Row]:
        """Run all cases in turns, every round, copies first. The warm-up round fills the page cache, uncounted."""
        name, backed = base.name.removeprefix("base-"), self.backed(base)
        if copies:
            plain: Case = lambda out: measure.copy(base, out, backed)  # noqa: E731
            synced: Case = lambda out: measure.copy(base, out, backed, sync=True)  # noqa: E731
            cases = {f"`cp -r` of {name}": plain, f"`cp -r` of {name}, then `sync`": synced, **cases}
        rows = {what: Row(section, what) for what in cases}
        for number in range(0 if not warm else -1, self.rounds if rounds is None else rounds):
            took: list[float] = []
            for what, case in cases.items():
                out = self.folder / "out"
                done = case(out)
                remove(out)
                took.append(done.work)
                turn = "warm-up" if number < 0 else f"round {number + 1}"
                tell(f"{section}, {turn}: {what}: {done.wall:.2f} s, work {done.work:.2f} s, {done.peak / MB:.0f} MB")
                if number >= 0:
                    rows[what].runs.append(done)
            for row in rows.values() if copies and number >= 0 else ():
                row.copies.append(took[0])
                row.synced.append(took[1])
        self.results.rows += rows.values()
        runs = [run for row in rows.values() for run in row.runs]
        if warm and (fetched := sum(run.fetched for run in runs)) > 50 * MB:
            self.results.note(f"{section}, {name}: {fetched / 1e9:.1f} GB came from the disk, not the page cache")
        if loud := [run.busy for run in runs if run.busy > measure.BUSY]:
            self.results.note(
                f"{section}, {name}: others used up to {max(loud):.0%} of the machine in {len(loud)} runs"
            )
        return rows

    def claim(
        self, what: str, values: list[float], unit: str, most: float | None = None, least: float | None = None
    ) -> None:
        self.results.claims.append(Claim(what, values, unit, most, least))

    def claim_ratios(self, rows: dict[str, Row], what: str, most: float | None) -> None:
        """Like against like: `cp` does not flush, and against it no flushes of ours count; with `sync` they do."""
        none = Row("", "")
        self.claim(f"{what}: to `cp -r`", rows.get(f"{what}, unflushed", none).ratios("copies"), " x", most)
        self.claim(f"{what}: to `cp -r` + `sync`", rows.get(what, none).ratios("synced"), " x", most)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# --- sections --------------------------------------------------------------------------------------------------------

PROMISED = (  # what, rank, targets, the most that work may take to a copy: without digests, with them
    ("merge, all 7, r=16", 16, ALL, 1.6, 2.4),
    ("merge, q and v, r=16", 16, QV, 1.3, 1.5),
    ("merge, all 7, r=64", 64, ALL, 2.2, 3.0),
)


def speed(bench: Bench) -> None:
    """Merges against copies, and against PEFT, of the same base in the same round."""
    base, adapter = bench.base(bench.size), bench.adapter(bench.size, 16)
    off = measure.offers("merge", "--no-digests")
    cases: dict[str, Case] = {}
    limits: dict[str, float] = {}
    for what, rank, targets, without, by_default in PROMISED:
        for name, most, options in ((what, by_default, ()), (f"{what}, no digests", without, ("--no-digests",))):
            limits[name] = most
            arguments = ("merge", base, bench.adapter(bench.size, rank, targets), *options)
            for suffix, flush in (("", True), (", unflushed", False)) if off or not options else ():
                cases[name + suffix] = bench.loratool(base, *arguments, flush=flush)
    ours, theirs, rounding = "merge, all 7, r=16", "PEFT, all 7, r=16", dict[str, tuple[int, int]]()
    exactly = f"{ours}, --reproducible"
    cases[exactly] = bench.loratool(base, "merge", base, adapter, "--reproducible")

    def checked(what: str, case: Case) -> Case:
        def run(out: Path) -> Run:
            done = case(out)
            if what not in rounding:  # in the warm-up round
                rounding[what] = data.apart(data.wrongly_rounded, base, adapter, out, 0)
            return done

        return run

    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        cases[theirs] = lambda out: measure.peft(base, adapter, out, bench.backed(base))
    for what in {ours, exactly, theirs} & cases.keys():
        cases[what] = checked(what, cases[what])
    rows = bench.measure("speed", base, cases)
    for what, most in limits.items():
        bench.claim_ratios(rows, what, most)
    for what in (ours, f"{ours}, unflushed"):
        pairs = zip(rows[what].runs, rows[theirs].runs if theirs in rows else (), strict=False)
        bench.claim(f"{what}: PEFT's process to ours", [b.wall / a.wall for a, b in pairs], " times", least=8)
    for what, (wrong, total) in rounding.items():
        most = 0 if what == exactly else None
        bench.claim(f"{what}: wrongly rounded numbers", [wrong / total * 1e6], " per million", most)
    bench.claim(f"{exactly}: to `cp -r` + `sync`", rows[exactly].ratios("synced"), " x")
    for shards, dtype, kind in ((1, "BF16", "one file"), (3, "F32", "float32")):
        other, what = bench.base(bench.size, shards, dtype), f"{ours}, {kind}"
        both = {what: True, f"{what}, unflushed": False}
        cases = {name: bench.loratool(other, "merge", other, adapter, flush=flush) for name, flush in both.items()}
        bench.claim_ratios(bench.measure("speed", other, cases), what, limits[ours] if dtype == "BF16" else None)
        remove(other)


def memory(bench: Bench) -> None:
    """Peak resident memory by size of the model, layout and rank."""
    for size in (0.12, 0.25) if bench.quick else (1.1, 8.0):
        for shards in (3, 1):
            base, cases = bench.base(size, shards), dict[str, Case]()
            where = f"{size:g} B, {'one file' if shards == 1 else f'{shards} shards'}"
            for rank in (16, 256):
                cases[f"merge, {where}, r={rank}"] = bench.loratool(base, "merge", base, bench.adapter(size, rank))
            for what, row in bench.measure("memory", base, cases, copies=False, rounds=1, warm=False).items():
                bench.claim(f"{what}: peak memory", [run.peak / MB for run in row.runs], " MB", most=320)
            remove(base)
        for rank in (16, 256):
            remove(bench.adapter(size, rank))


def scale(bench: Bench) -> None:
    """Work by bytes of the model, with the default digests, flushed or not."""
    per_gb: dict[float, float] = {}
    for gigabytes in (0.125, 0.25, 0.5) if bench.quick else (0.25, 1, 4):
        base, adapter = bench.base(gigabytes / 2), bench.adapter(gigabytes / 2, 16)
        what = f"merge, {gigabytes:g} GB, all 7, r=16, unflushed"
        row = bench.measure("scale", base, {what: bench.loratool(base, "merge", base, adapter, flush=False)})[what]
        seconds = [run.work / gigabytes for run in row.runs]
        per_gb[gigabytes] = statistics.median(seconds)
        bench.claim(f"{what}: work per GB", seconds, " s")
        remove(base)
    first, *_, last = per_gb.values()
    bench.claim("work per GB, largest to smallest model", [last / first], " times")


def inspect(bench: Bench) -> None:
    """Headers only: the whole process."""
    paths = {}
    for count, targets in ((500, QV[:1]), (3500, ALL)):
        paths[f"inspect, 500 layers, {count:,} updates"] = path = bench.folder / f"flat-{count}"
        data.apart(data.write_flat_adapter, path, 500, targets)
    paths["inspect, 8 B in 4 shards"] = sharded = bench.folder / "headers"
    data.apart(data.write_checkpoint, sharded, Model(8), 4, "BF16", True)

    def case(path: Path) -> Case:
        return lambda out: measure.loratool("inspect", path)

    cases = {what: case(path) for what, path in paths.items()}
    for what, row in bench.measure("inspect", sharded, cases, copies=False, rounds=max(5, bench.rounds)).items():
        bench.claim(f"{what}: whole process", [run.wall for run in row.runs], " s", most=0.35)
        if measure.imports_torch("inspect", paths[what]):
            bench.results.note(f"{what} imports torch")


def undo(bench: Bench) -> None:
    """The record that takes a merge out again without the base."""
    if not measure.offers("merge", "--undo"):
        bench.results.note("undo: not available in this loratool")
        return
    for delta, most in ((2e-3, 5.0), (1e-4, 1.2)):
        _undo(bench, delta, most)


def _undo(bench: Bench, delta: float, most: float) -> None:
    base, adapter = bench.base(bench.size), bench.adapter(bench.size, 16, ALL, delta)
    merged, record, again = (bench.folder / name for name in ("merged", "merged.undo", "again.undo"))
    targeted = sum(rows * columns * 2 for rows, columns in Model(bench.size).linears().values())
    wrong: set[str] = set()

    def recording(out: Path) -> Run:
        again.unlink(missing_ok=True)
        return bench.loratool(base, "merge", base, adapter, "--undo", again)(out)

    def restoring(flush: bool) -> Case:
        case = bench.loratool(base, "unmerge", merged, adapter, "--undo", record, flush=flush)

        def run(out: Path) -> Run:
            done = case(out)
            wrong.update(file.name for file in base.glob("*.safetensors") if not data.same(file, out / file.name))
            return done

        return run

    bench.loratool(base, "merge", base, adapter, "--undo", record)(merged)
    share = record.stat().st_size / targeted * 100
    bench.claim(f"undo, delta {delta:g}: record to targeted bytes", [share], " %", most)
    plain, recorded, back = (f"{verb}, delta {delta:g}" for verb in ("merge", "merge --undo", "unmerge --undo"))
    cases = {plain: bench.loratool(base, "merge", base, adapter), recorded: recording, back: restoring(True)}
    rows = bench.measure("undo", base, {**cases, f"{back}, unflushed": restoring(False)})
    pairs = zip(rows[plain].runs, rows[recorded].runs, strict=True)
    bench.claim(f"{recorded}: process to that of a merge", [b.wall / a.wall for a, b in pairs], " x", 2.5)
    bench.claim_ratios(rows, back, 3)
    bench.results.note(f"{back}: {f'NOT the base again: {sorted(wrong)}' if wrong else 'every file is the base again'}")
    for path in (merged, record, again):
        remove(path)


def read(bench: Bench) -> None:
    """Merged on read, against plain `safe_open` of the merged folder, in the page cache.

    What `safe_open` gives is a mapping of the file, which costs nothing until it is copied: so all open their files and
    bring all tensors, one after the other, into parameters that are there already. `open_merged` computes into them,
    or gives tensors that are then copied.
    """
    base, merged = bench.base(bench.size), bench.folder / "merged"
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    for what, rank, targets in (("all 7, r=16", 16, ALL), ("q and v, r=16", 16, QV), ("all 7, r=64", 64, ALL)):
        adapter = bench.adapter(bench.size, rank, targets)
        bench.loratool(base, "merge", base, adapter, "--no-digests")(merged)
        measure.read("check", base, adapter, merged)

        def case(how: str, adapter: Path = adapter) -> Case:
            return lambda out: measure.read(how, base, adapter, merged)

        plain, copied, straight = (f"{how}, {what}" for how in ("safe_open", "open_merged, copied", "open_merged"))
        cases = {plain: case("plain"), straight: case("straight"), copied: case("copied")}
        rows = bench.measure("read", base, cases, copies=False)
        for ours, least in ((straight, 0.6 if rank == 16 else None), (copied, None)):
            pairs = zip(rows[plain].runs, rows[ours].runs, strict=True)
            ratios = [theirs.work / own.work for theirs, own in pairs]
            bench.claim(f"{ours}: throughput to safe_open's", ratios, " times", least=least)
        for name, row in rows.items():
            bench.claim(f"{name}: throughput", [nbytes / run.work / 1e9 for run in row.runs], " GB/s")
            bench.claim(f"{name}: peak beside the parameters", [(run.peak - nbytes) / MB for run in row.runs], " MB")
        remove(merged)


def live(bench: Bench) -> None:
    """A model in memory: seconds to apply, swap and remove, and what is kept meanwhile."""
    base = bench.base(bench.size)
    one, other = bench.adapter(bench.size, 16), bench.adapter(bench.size, 16, ALL, 1e-4)
    for kind, most in (("compressed", 5.0), ("copy", 100.0)):
        rounds = [data.apart(timed, base, one, other, kind) for _ in range(bench.rounds)]
        bench.claim(f"live, {kind}: kept of changed bytes", [100 * found["kept"] for found in rounds], " %", most)
        for verb in ("apply", "swap", "remove"):
            bench.claim(f"live, {kind}: {verb}, {bench.size:g} B", [found[verb] for found in rounds], " s")


SECTIONS = {
    "speed": speed, "memory": memory, "scale": scale, "inspect": inspect, "undo": undo, "read": read, "live": live,
}  # fmt: skip
