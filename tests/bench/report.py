"""Results as rows and claims, in Markdown, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from pathlib import Path

from tests.bench.measure import Run


@dataclass
class Row:
    """One thing that was run, in every round, and the copies of the same rounds."""

    section: str
    what: str
    runs: list[Run] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)  # seconds of `cp -r`, by round
    synced: list[float] = field(default_factory=list)  # seconds of `cp -r && sync`, by round

    def ratios(self, against: str) -> list[float]:
        """Work of every round to its `copies` or `synced`."""
        return [run.work / seconds for run, seconds in zip(self.runs, getattr(self, against), strict=False)]


@dataclass(frozen=True)
class Claim:
    """A number that was promised, and what it is. `values` are by round; their median counts."""

    what: str
    values: list[float]
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool | None:
        value = statistics.median(self.values) if self.values else None
        if value is None or (self.most is None and self.least is None):
            return None
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        tell(f"note: {text}")


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "peft", "transformers"))
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {os.cpu_count()} ({cpu}), {memory:.0f} GB of memory",
        "software": f"Linux {platform.release()}, Python {platform.python_version()}, {packages}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "not installed"


# --- Markdown --------------------------------------------------------------------------------------------------------


def spread(values: list[float], unit: str = "", digits: int = 2) -> str:
    """``median (min-max)``."""
    if not values:
        return "-"
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle}{unit}" + (f" ({low}-{high})" if low != high else "")


def markdown(results: Results) -> str:
    facts = machine()
    lines = [f"{facts['machine']}; {facts['software']}. Medians, with the smallest and largest of the rounds.", ""]
    head = (
        "",
        "process, s",
        "work, s",
        "work : cp -r",
        "work : cp -r + sync",
        "peak, MB",
        "read, GB",
        "written, GB",
        "GB/s",
    )
    lines += ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in results.rows:
        runs = row.runs
        cells = [
            row.what,
            spread([run.wall for run in runs]),
            spread([run.work for run in runs]),
            spread(row.ratios("copies"), " x"),
            spread(row.ratios("synced"), " x"),
            spread([run.peak / 1e6 for run in runs], digits=0),
            spread([run.read / 1e9 for run in runs]),
            spread([run.written / 1e9 for run in runs]),
            f"{statistics.median(run.written / run.work for run in runs) / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| target | promised | measured | |", "|---|--:|--:|---|"]
    for claim in results.claims:
        bounds = [f"at most {claim.most:g}" if claim.most is not None else ""]
        bounds += [f"at least {claim.least:g}" if claim.least is not None else ""]
        verdict = {True: "met", False: "**missed**", None: "" if claim.values else "not available"}[claim.met]
        promised = " ".join(filter(None, bounds)) + (claim.unit if any(bounds) else "")
        lines.append(f"| {claim.what} | {promised} | {spread(claim.values, claim.unit)} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in results.notes)]) + "\n"


def document(results: Results) -> str:
    claims = [{**asdict(claim), "met": claim.met} for claim in results.claims]
    rows = [asdict(row) for row in results.rows]
    return json.dumps({**machine(), "claims": claims, "rows": rows, "notes": results.notes}, indent=1) + "\n"


# --- picture ---------------------------------------------------------------------------------------------------------


def svg(results: Results) -> str:
    """A bar per promised ratio, from the smallest to the largest round around its median; a red line is the promise."""
    claims = [c for c in results.claims if c.values and c.unit == " x" and c.most is not None]
    left, right, step = 420, 360, 24
    scale = right / max([1.0, *(max(*c.values, c.most or 0) for c in claims)])
    shapes = []
    for number, claim in enumerate(claims):
        y, middle = 34 + number * step, statistics.median(claim.values)
        colour = "#3a7d44" if claim.met else "#b3541e"
        low, high = left + min(claim.values) * scale, left + max(claim.values) * scale
        shapes += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(claim.what)}</text>',
            f'<rect x="{left}" y="{y}" width="{middle * scale:.1f}" height="16" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 8}H{high:.1f}" stroke="#000" stroke-width="1.5"/>',
            f'<path d="M{left + (claim.most or 0) * scale:.1f} {y - 3}v22" stroke="#c00" stroke-width="2"/>',
            f'<text x="{max(high, left + (claim.most or 0) * scale) + 6:.1f}" y="{y + 12}">{middle:.2f} x</text>',
        ]
    height, width = 44 + len(claims) * step, left + right + 70
    title = "measured (bar: median, black: all rounds) and promised (red)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{left}" y="20" font-weight="bold">{title}</text>\n' + "\n".join(shapes) + "\n</svg>\n"
    )
