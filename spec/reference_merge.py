"""The merge of FORMAT.md 1.0 in float64, rounded once, and a run over all vectors.

`python reference_reader.py vectors/1.0` (or this file) checks that every valid vector decodes as
expected and merges to the expected bytes, and that every invalid one is refused with its code.
"""
# ruff: noqa: T201 - a script that talks to its user

import json
import sys
from pathlib import Path

import numpy as np
from reference_container import Refused, container, need, numbers
from reference_reader import read

DIGITS = {"F64": (53, -1021), "F32": (24, -125), "F16": (11, -13), "BF16": (8, -125)}
LARGEST = {"F64": 1024, "F32": 128, "F16": 16, "BF16": 128}


def product(b, a, mid=None):
    if mid is None:
        return np.einsum("im,m...->i...", b, a)
    return np.einsum("im,mn...,nj->ij...", b, mid, a)


def delta(kind, p):
    """The change of an update before its scale; p holds the components."""
    if kind == "lora":
        return product(p["B"], p["A"], p.get("mid"))
    if kind == "loha":
        one = product(p["B1"], p["A1"], p.get("mid1"))
        return one * product(p["B2"], p["A2"], p.get("mid2"))
    if kind == "lokr":
        w1 = p["w1"] if "w1" in p else product(p["B1"], p["A1"])
        w2 = p["w2"] if "w2" in p else product(p["B2"], p["A2"], p.get("mid2"))
        shape = w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:]
        return np.einsum("ij,pq...->ipjq...", w1, w2).reshape(shape)
    return p["value"]  # an add


def regions(u, parts):
    """(index into the tensor, components) of an update; one pair for each of its experts."""
    rows = (slice(*u["rows"]),) if "rows" in u else ()
    if "index" in parts:
        yield (parts["index"],), parts
    elif "experts" in u:
        for e in range(u["experts"]):
            yield (e, *rows), {name: p[e] for name, p in parts.items()}
    else:
        yield ((u["expert"], *rows) if "expert" in u else rows), parts


def merge(base, updates):
    """base: float64 array; updates: (update, components, weight) of all adapters in order."""
    w, touched = base.copy(), {role: np.zeros(base.shape, bool) for role in "rad"}

    def steps(roles):
        for u, parts, weight in updates:
            role = u["kind"][0] if u["kind"] in ("replace", "replace_rows", "dora") else "a"
            for at, p in regions(u, parts) if role in roles else ():
                clash = {"r": "r", "a": "d", "d": "ad"}[role]
                need(not any(touched[c][at].any() for c in clash), "E-OVERLAP")
                touched[role][at] = True
                yield u, at, p, weight

    for _, at, p, weight in steps("r"):
        w[at] = p["value"] if weight == 1 else w[at] + weight * (p["value"] - w[at])
    for u, at, p, weight in steps("ad"):
        if u["kind"] != "dora":
            w[at] += weight * float(u["scale"]) * delta(u["kind"], p)
            continue
        v = w[at] + u["scale"] * delta(u["direction"], p)
        norm = np.sqrt((v * v).sum(tuple({*range(v.ndim)} - {u["axis"]}), keepdims=True))
        need(norm.all(), "E-NONFINITE")
        m = p["magnitude"].reshape([-1 if i == u["axis"] else 1 for i in range(v.ndim)])
        w[at] = m * v / norm if weight == 1 else w[at] + weight * (m * v / norm - w[at])
    return w


def rounded(x, dtype):
    """The nearest values of that dtype, ties to even, still as float64."""
    digits, low = DIGITS[dtype]
    exponent = np.maximum(np.frexp(x)[1], low) - digits
    y = np.ldexp(np.rint(np.ldexp(x, -exponent)), exponent)
    need((np.abs(np.ldexp(y, -1)) < 2.0 ** (LARGEST[dtype] - 1)).all(), "E-NONFINITE")
    return y


def merge_files(base_path, adapters, consent):
    """{name: (dtype, float64 array)} of all tensors of the base after the merge."""
    base = {n: (t[0], numbers(*t)) for n, t in container(base_path)[1].items()}
    work, whole = {}, {}
    for path, weight in adapters:
        manifest, tensors = read(path)
        for name, known in manifest["base"].get("tensors", {}).items():
            found = [base[name][0], list(base[name][1].shape)]
            need(found == [known["dtype"], known["shape"]], "E-BASE-MISMATCH")
        seen = {}
        for u in manifest["updates"]:
            target = u["target"]
            seen[target] = i = seen.get(target, -1) + 1
            stem = f"{target}.{i}."
            parts = {n.removeprefix(stem): v for n, v in tensors.items() if n.startswith(stem)}
            work.setdefault(target, []).append((u, parts, weight))
            if u["kind"] == "replace" and not {"rows", "expert", "experts"} & set(u):
                whole[target] = weight, container(path)[1][stem + "value"][0]
    for target, updates in work.items():
        dtype, start = base.get(target, (None, None))
        need(dtype in (None, *DIGITS), "E-QUANTISED")
        if start is None or list(start.shape) != updates[0][0]["shape"]:
            need(target in whole, "E-SHAPE" if dtype else "E-TARGET")
            need(consent and whole[target][0] == 1, "E-TARGET")
            dtype, start = dtype or whole[target][1], np.zeros(updates[0][0]["shape"])
        base[target] = dtype, rounded(merge(start, updates), dtype)
    return base


def code_of(function, *arguments):
    try:
        function(*arguments)
    except Refused as refused:
        return refused.code
    return None


def run(folder):
    """(name, whether it passed) of every vector that this reader can judge."""
    index = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for case in index["valid"]:
        manifest, tensors = read(folder / case["file"])
        expected = json.loads((folder / case["expected"]).read_text(encoding="utf-8"))
        same = manifest == expected["manifest"] and set(tensors) == set(expected["tensors"])
        for name, t in expected["tensors"].items():
            same = same and tensors[name].tolist() == np.reshape(t["values"], t["shape"]).tolist()
        yield case["name"], same
    for case in index["invalid"]:
        if case["rule"] not in ("R-050", "R-051", "R-052"):
            yield case["name"], code_of(read, folder / case["file"]) == case["code"]
        else:  # the canonical form is not a reader's business: such a file is opened
            yield case["name"], code_of(read, folder / case["file"]) is None
    whole = [{**case, "adapters": [{"file": case["file"], "weight": 1}]} for case in index["valid"]]
    for case in whole + [case for case in index["merge"] if case.get("needs") != "blake3"]:
        adapters = [(folder / a["file"], a["weight"]) for a in case["adapters"]]
        arguments = folder / case["base"], adapters, case["consent"]
        if "code" in case:
            yield case["name"], code_of(merge_files, *arguments) == case["code"]
            continue
        merged = merge_files(*arguments)
        wanted = container(folder / case["merged"])[1]
        same = set(merged) == set(wanted)
        for name, t in wanted.items():
            near = 2.0**-50 if t[0] == "F64" else 0  # the truth itself has only 53 bits
            same = same and merged[name][0] == t[0]
            same = same and np.allclose(merged[name][1], numbers(*t), rtol=near, atol=near)
        yield case["name"], bool(same)


def main():
    results = list(run(Path(sys.argv[1])))
    failed = [name for name, passed in results if not passed]
    print(*(f"failed: {name}" for name in failed), sep="\n", end="\n" if failed else "")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
