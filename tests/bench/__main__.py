"""The benchmark: sections make their data, run everything in turns, and compare with what was promised.

python -m tests.bench --quick                          a few minutes, on small models
python -m tests.bench --json out.json --plot out.svg   all of it, with the table on stdout
python -m tests.bench --only speed,memory --rounds 5 --size 1.1 --dir bench-data
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.bench import report
from tests.bench.sections import SECTIONS, Bench


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What a merge costs.")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES", help="sections (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds that count (default: 5; quick: 1)")
    parser.add_argument("--size", type=float, help="billions of parameters (default: 1.1; quick: 0.12)")
    parser.add_argument("--cores", type=int, default=2, help="cores to use (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, a few minutes: no proof of the targets")
    parser.add_argument("--dir", type=Path, help="where the models go; they are removed at the end (default: TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and every claim")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the ratios as an SVG picture")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the models are removed on the way
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    rounds, size = options.rounds or (1 if options.quick else 5), options.size or (0.12 if options.quick else 1.1)
    with tempfile.TemporaryDirectory(prefix="loratool-bench-", dir=options.dir) as folder:
        bench = Bench(Path(folder), rounds, size, options.quick)
        for name in names:
            SECTIONS[name](bench)
            if options.json:  # after every section: hours of work are not lost in the last
                options.json.write_text(report.document(bench.results))
    sys.stdout.write(report.markdown(bench.results))
    if options.plot:
        options.plot.write_text(report.svg(bench.results))


if __name__ == "__main__":
    main()
