"""A release job: an adapter and its base become a checked, merged model with a manifest of digests.

Usage: `python release.py BASE ADAPTER -o RELEASE [--weight W] [--dtype bf16] [--pinned] [--pin] [--json]`

With `--pinned` an adapter must prove its base by digests, which PEFT's files do not hold. `--pin` notes those of BASE
in the released adapter, for the first release of one whose training you know; from then on `--pinned` takes it.

RELEASE is a new folder, which appears whole or not at all:

    adapter.lora.safetensors    what was merged, as a native file
    model/                      the merged checkpoint, with its receipt
    manifest.json               digests of all that, of the adapter's content and of the base's tensors

Exit codes: 0 released; 1 the answer is no (the adapter is not valid, the merge could not be confirmed); 2 could not run
(the base is another one, a file is broken, the output exists, the disk is full). Nothing is left behind but at 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import loratool
from loratool import AnswerIsNo, LoratoolError, OutputRefused, Problem


def release(
    base: Path, adapter: Path, out: Path, weight: float, dtype: str, pinned: bool, pin: bool = False
) -> dict[str, Any]:
    """Make the release folder; return its manifest. Raises LoratoolError, and then there is no `out`."""
    if out.exists() or not out.absolute().parent.is_dir():
        raise OutputRefused(Problem("E-EXISTS", "exists already, or its parent folder does not", str(out)))
    # Everything is made beside the output, and gets its name in one step.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as scratch:
        place = Path(scratch) / out.name
        place.mkdir()
        native, model = place / "adapter.lora.safetensors", place / "model"
        bring_in(adapter, native, base, pin)
        known = loratool.load(native).base.tensors  # digests of the base it was trained on, if it holds any
        if pinned and not known:
            hint = "release.py --pin, or `loratool pin ADAPTER --base BASE`, notes the digests of a base that you trust"
            raise AnswerIsNo(Problem("E-NOT-PINNED", "the adapter does not prove its base", str(adapter), hint))

        # Do they belong together? The plan compares names, shapes and those digests. A job that waits for somebody's
        # consent would stop here and show `loratool.plan(...).to_json()`; a merge alone checks the same.
        loratool.plan(base, [(native, weight)], model, dtype=dtype, reproducible=True)
        # `reproducible`: the same bits on every machine, so a release can be made again and compared.
        report = loratool.merge(base, [(native, weight)], model, dtype=dtype, reproducible=True)
        confirm(model, base, native, weight)

        receipt = report.receipt
        manifest = {
            "name": out.name,
            "loratool": loratool.__version__,
            "adapter": {"digest": receipt.adapters[0].digest, "weight": weight, "from": adapter.name},
            "base": {
                "name": base.name,
                "pinned": bool(known),
                "tensors": {name: tensor.base for name, tensor in sorted(receipt.tensors.items())},
            },
            "receipt": receipt.digest,
            "notes": [*report.plan.notes, *report.notes],
            "files": {
                path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(place.rglob("*"))
                if path.is_file()
            },
        }
        (place / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        place.rename(out)  # fails where something has appeared under the name meanwhile
    return manifest


def bring_in(adapter: Path, native: Path, base: Path, pin: bool) -> None:
    """The adapter as a native file: a copy if it is one, converted if it is not; valid in any case."""
    if pin:
        loratool.pin(adapter, native, base)
    elif loratool.inspect(adapter).convention == "native":
        shutil.copyfile(adapter, native)
    else:
        loratool.convert(adapter, native, "native", base=base)
    if findings := loratool.validate(native):
        raise AnswerIsNo(findings)


def confirm(model: Path, base: Path, adapter: Path, weight: float) -> None:
    """Compare every tensor that was written with what base and adapter give, and its digest with the receipt."""
    checked = loratool.verify(model, base, [(adapter, weight)])
    problems = [Problem("E-VERIFY", finding.text, ", ".join(finding.tensors[:3])) for finding in checked.findings]
    if checked.verdict == "can-not-tell":
        problems.append(Problem("E-VERIFY", "the adapter changes nothing that the output's dtype can hold"))
    written = loratool.status(model, check=True)
    problems += [Problem("E-RECEIPT", "is not what was written", name) for name in written.changed]
    if problems:
        raise AnswerIsNo(problems)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--dtype", default="keep", choices=["keep", "bf16", "fp16", "fp32"])
    parser.add_argument("--pinned", action="store_true", help="refuse an adapter without digests of its base")
    parser.add_argument("--pin", action="store_true", help="note the digests of BASE in the released adapter")
    parser.add_argument("--json", action="store_true", help="print the manifest, or the problems")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a scheduler's stop cleans up like any other failure
    try:
        try:
            manifest = release(given.base, given.adapter, given.out, given.weight, given.dtype, given.pinned, given.pin)
        except OSError as error:  # of what is done here: loratool's own are typed
            raise OutputRefused(Problem("E-DISK", str(error), str(given.out))) from error
    except LoratoolError as error:
        problems = [problem.to_json() for problem in error.problems]
        print(json.dumps({"ok": False, "problems": problems}, indent=2) if given.json else f"not released: {error}")
        return error.exit_code
    print(json.dumps({"ok": True, **manifest}, indent=2) if given.json else f"{given.out}: {manifest['receipt']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
