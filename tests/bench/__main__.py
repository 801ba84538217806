"""The benchmark: sections that make their data, run everything in turns, and compare with what was promised.

python -m tests.bench --quick                          about a minute, on a small model
python -m tests.bench --json out.json --plot out.svg   all of it, the table on stdout
python -m tests.bench --only speed,memory --rounds 5 --size 1.1 --dir /tmp/bench
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import data, measure, report
from tests.bench.data import ALL, QV, Model
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
        path = self.folder / f"base-{size:g}-{shards}-{dtype}"
        if not path.exists():
            self.room(2.2 * size * 1e9 * data.WIDTH[dtype])
            tell(f"making {path.name}")
            data.apart(data.write_checkpoint, path, Model(size), shards, dtype)
        return path

    def adapter(self, size: float, rank: int, targets: tuple[str, ...] = ALL, delta: float = 2e-3) -> Path:
        path = self.folder / f"adapter-{size:g}-{rank}-{len(targets)}-{delta:g}"
        if not path.exists():
            data.apart(data.write_adapter, path, Model(size), rank, targets, delta)
        return path

    def room(self, nbytes: float) -> None:
        if (free := shutil.disk_usage(self.folder).free) < nbytes:
            raise SystemExit(
                f"{self.folder}: {free / 1e9:.0f} GB free, {nbytes / 1e9:.0f} GB needed: see --dir, --size"
            )

    def measure(
        self,
        section: str,
        base: Path,
        cases: dict[str, Case],
        copies: bool = True,
        rounds: int | None = None,
        warm: bool = True,
    ) -> dict[str, Row]:
        """Run all cases in turns. The first round warms the page cache and does not count."""
        plain: Case = lambda out: measure.copy(base, out, backed)  # noqa: E731
        synced: Case = lambda out: measure.copy(base, out, backed, sync=True)  # noqa: E731
        name, backed = base.name.removeprefix("base-"), self.backed(base)
        if copies:
            cases = {f"`cp -r` of {name}": plain, f"`cp -r` of {name}, then `sync`": synced, **cases}
        rows = {what: Row(section, what) for what in cases}
        for number in range(-1 if warm else 0, self.rounds if rounds is None else rounds):
            took: list[float] = []
            for what, case in cases.items():
                out = self.folder / "out"
                done = case(out)
                remove(out)
                took.append(done.work)
                mark = "warm-up" if number < 0 else f"round {number + 1}"
                tell(f"{section}, {mark}: {what}: {done.wall:.2f} s, work {done.work:.2f} s, {done.peak / MB:.0f} MB")
                if number >= 0:
                    rows[what].runs.append(done)
            if copies and number >= 0:
                for row in rows.values():
                    row.copies.append(took[0])
                    row.synced.append(took[1])
        self.results.rows += rows.values()
        if (fetched := sum(run.fetched for row in rows.values() for run in row.runs)) > 50 * MB:
            self.results.note(
                f"{section}, {name}: the page cache was not warm, {fetched / 1e9:.1f} GB came from the disk"
            )
        busy = [run.busy for row in rows.values() for run in row.runs if run.busy > measure.BUSY]
        if busy:
            self.results.note(f"{section}, {name}: others used {max(busy):.0%} of the machine before {len(busy)} runs")
        return rows

    def backed(self, base: Path) -> int:
        """Bytes of memory that a run should find ready: the page cache of the output and, for PEFT, the model."""
        return int(2.2 * sum(file.stat().st_blocks * 512 for file in base.iterdir())) + 10**9

    def merge(self, base: Path, adapter: Path, *options: str, flush: bool = True) -> Case:
        arguments = ("merge", base, adapter, *threads(), *options)
        return lambda out: measure.loratool(*arguments, "-o", out, flush=flush, backed=self.backed(base))

    def claim(
        self, what: str, values: list[float], unit: str, most: float | None = None, least: float | None = None
    ) -> None:
        self.results.claims.append(Claim(what, values, unit, most, least))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def threads() -> list[str]:
    cores = len(os.sched_getaffinity(0))
    limited = cores < (os.cpu_count() or 1) and measure.offers("merge", "--threads")
    return ["--threads", str(cores)] if limited else []


def digestless() -> bool:
    return measure.offers("merge", "--no-digests")


# --- sections --------------------------------------------------------------------------------------------------------

PROMISED = (  # what, rank, targets, the most a merge may take against a copy: without digests, and with them
    ("all 7, r=16", 16, ALL, 1.6, 2.4),
    ("q and v, r=16", 16, QV, 1.3, 1.5),
    ("all 7, r=64", 64, ALL, 2.2, 3.0),
)
DIGESTS = {"no digests": ("--no-digests",), "": ()}


def speed(bench: Bench) -> None:
    """Merges against copies, and against PEFT, of the same base in the same round.

    `cp` does not flush, so against it a merge runs without its flushes; against `cp` and `sync` it runs as it does.
    """
    base, adapter = bench.base(bench.size), bench.adapter(bench.size, 16)
    cases: dict[str, Case] = {}
    limits: list[tuple[str, float, str, str]] = []
    for what, rank, targets, *most in PROMISED:
        for (digests, options), limit in zip(DIGESTS.items(), most, strict=True):
            name = ", ".join(filter(None, (f"merge, {what}", digests)))
            limits.append((name, limit, name, f"{name}, unflushed"))
            if not options or digestless():
                for flush in (True, False):
                    name_ = name if flush else f"{name}, unflushed"
                    cases[name_] = bench.merge(base, bench.adapter(bench.size, rank, targets), *options, flush=flush)
    main = "merge, all 7, r=16"
    rounding: dict[str, tuple[int, int]] = {}

    def checked(what: str, case: Case) -> Case:
        def run(out: Path) -> Run:
            done = case(out)
            if what not in rounding:  # the warm-up round
                rounding[what] = data.apart(data.wrongly_rounded, base, adapter, out, 0)  # type: ignore[assignment]
            return done

        return run

    cases[main] = checked(main, cases[main])
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        backed = bench.backed(base)
        cases["PEFT, all 7, r=16"] = checked("PEFT", lambda out: measure.peft(base, adapter, out, backed))
    rows = bench.measure("speed", base, cases)
    none = Row("speed", "not available")
    for what, limit, flushed, unflushed in limits:
        bench.claim(f"{what}: to `cp -r`", rows.get(unflushed, none).ratios("copies"), " x", limit)
        bench.claim(f"{what}: to `cp -r` + `sync`", rows.get(flushed, none).ratios("synced"), " x", limit)
    slow = rows.get("PEFT, all 7, r=16", none).runs
    faster = [theirs.wall / ours.wall for theirs, ours in zip(slow, rows[main].runs, strict=False)]
    bench.claim("PEFT's process to loratool's, all 7, r=16", faster, " times", least=8)
    for what, (wrong, total) in rounding.items():
        tool = "PEFT" if what == "PEFT" else "loratool"
        bench.claim(f"{tool}: numbers of layer 0 not rounded right", [wrong / total * 1e6], " per million")
    for shards, dtype, what in ((1, "BF16", "one file"), (3, "F32", "float32")):
        other = bench.base(bench.size, shards, dtype)
        name, limit = f"merge, {what}, all 7, r=16", 2.4 if dtype == "BF16" else None
        both = {name: bench.merge(other, adapter), f"{name}, unflushed": bench.merge(other, adapter, flush=False)}
        rows = bench.measure("speed", other, both)
        bench.claim(f"{name}: to `cp -r`", rows[f"{name}, unflushed"].ratios("copies"), " x", limit)
        bench.claim(f"{name}: to `cp -r` + `sync`", rows[name].ratios("synced"), " x", limit)
        remove(other)


def memory(bench: Bench) -> None:
    """Peak resident memory by size of the model, layout and rank."""
    for size in (0.12, 0.25) if bench.quick else (1.1, 8.0):
        for shards in (3, 1):
            base = bench.base(size, shards)
            where = f"{size:g} B, {'one file' if shards == 1 else f'{shards} shards'}"
            cases = {f"merge, {where}, r={rank}": bench.merge(base, bench.adapter(size, rank)) for rank in (16, 256)}
            for what, row in bench.measure("memory", base, cases, copies=False, rounds=1, warm=False).items():
                bench.claim(f"{what}: peak memory", [run.peak / MB for run in row.runs], " MB", most=320)
            remove(base)
        for rank in (16, 256):
            remove(bench.adapter(size, rank))


def scale(bench: Bench) -> None:
    """Work by bytes of the model, with the default digests."""
    per_gb: dict[float, list[float]] = {}
    for gigabytes in (0.125, 0.25, 0.5) if bench.quick else (0.25, 1, 4):
        base, adapter = bench.base(gigabytes / 2), bench.adapter(gigabytes / 2, 16)
        what = f"merge, {gigabytes:g} GB, all 7, r=16"
        row = bench.measure("scale", base, {what: bench.merge(base, adapter)})[what]
        per_gb[gigabytes] = [run.work / gigabytes for run in row.runs]
        bench.claim(f"{what}: work per GB", per_gb[gigabytes], " s")
        remove(base)
    first, *_, last = per_gb.values()
    bench.claim("work per GB, largest to smallest model", [statistics.median(last) / statistics.median(first)], " x")


def inspect(bench: Bench) -> None:
    """Headers only: the whole process."""
    paths = {}
    for count, targets in ((500, QV[:1]), (3500, ALL)):
        paths[f"inspect, 500 layers, {count:,} updates"] = path = bench.folder / f"flat-{count}"
        data.apart(data.write_flat_adapter, path, 500, targets)
    paths["inspect, 8 B in 4 shards"] = sharded = bench.folder / "headers"
    data.apart(data.write_checkpoint, sharded, Model(8), 4, "BF16", True)
    cases: dict[str, Case] = {what: lambda out, p=path: measure.loratool("inspect", p) for what, path in paths.items()}  # type: ignore[misc]
    for what, row in bench.measure("inspect", sharded, cases, copies=False, rounds=max(5, bench.rounds)).items():
        bench.claim(f"{what}: whole process", [run.wall for run in row.runs], " s", most=0.35)
        if measure.imports_torch("inspect", paths[what]):
            bench.results.note(f"{what} imports torch")


def undo(bench: Bench) -> None:
    """The record that takes a merge back without its base."""
    if not (measure.offers("merge", "--undo") and measure.offers("unmerge", "--undo")):
        bench.results.note("undo: not available, this loratool has no --undo")
        return
    base = bench.base(bench.size)
    targeted = sum(rows * columns * 2 for rows, columns in Model(bench.size).linears().values())
    record, merged = bench.folder / "record", bench.folder / "merged"
    for delta, share in ((2e-3, 5.0), (1e-4, 1.2)):
        adapter = bench.adapter(bench.size, 16, ALL, delta)

        def recorded(out: Path, adapter: Path = adapter) -> Run:
            remove(record)
            return bench.merge(base, adapter, "--undo", str(record))(out)

        recorded(merged)
        restore: Case = lambda out: measure.loratool("unmerge", merged, "--undo", record, "-o", out)  # noqa: E731
        restore(bench.folder / "restored")
        same = all(data.same(file, bench.folder / "restored" / file.name) for file in base.glob("*.safetensors"))
        remove(bench.folder / "restored")
        if not same:
            bench.results.note(f"undo, delta {delta:g}: the restored files are NOT the base's")
        bench.claim(
            f"undo, delta {delta:g}: record to targeted bytes", [record.stat().st_size / targeted * 100], " %", share
        )
        names = f"merge, delta {delta:g}", f"merge --undo, delta {delta:g}", f"unmerge --undo, delta {delta:g}"
        keep = bench.folder / "record-kept"
        record.rename(keep)
        restore = lambda out: measure.loratool("unmerge", merged, "--undo", keep, "-o", out)  # noqa: E731
        rows = bench.measure(
            "undo", base, dict(zip(names, (bench.merge(base, adapter), recorded, restore), strict=True))
        )
        plain, with_record, unmerge = (rows[name] for name in names)
        cost = [b.wall / a.wall for a, b in zip(plain.runs, with_record.runs, strict=True)]
        bench.claim(f"undo, delta {delta:g}: process of a merge with it to one without", cost, " x", 2.5)
        bench.claim(f"undo, delta {delta:g}: unmerge to `cp -r` + `sync`", unmerge.ratios("synced"), " x", 3)
        for path in (merged, keep, record):
            remove(path)


SECTIONS = {"speed": speed, "memory": memory, "scale": scale, "inspect": inspect, "undo": undo}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What a merge costs.")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES", help="sections (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 5; quick: 3)")
    parser.add_argument("--size", type=float, help="billions of parameters (default: 1.1; quick: 0.12)")
    parser.add_argument("--cores", type=int, default=2, help="cores to use (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models: a minute, no promises")
    parser.add_argument("--dir", type=Path, help="where the models go; what is made there is removed (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and claim")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the ratios as an SVG picture")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loratool-bench-", dir=options.dir) as folder:
        rounds, size = options.rounds or (3 if options.quick else 5), options.size or (0.12 if options.quick else 1.1)
        bench = Bench(Path(folder), rounds, size, options.quick)
        if not digestless():
            bench.results.note("--no-digests: not available in this loratool")
        for name in names:
            SECTIONS[name](bench)
    sys.stdout.write(report.markdown(bench.results))
    if options.json:
        options.json.write_text(report.document(bench.results))
    if options.plot:
        options.plot.write_text(report.svg(bench.results))


if __name__ == "__main__":
    main()
