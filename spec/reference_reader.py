"""A reader and a merge of FORMAT.md 1.0, without R-017 and R-050 to R-052 (a validator's) and digests (BLAKE3)."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

DTYPE = "BOOL|BF16|C64|[UIF](16|32|64)|[UI]8|F4|F6_E2M3|F6_E3M2|F8_E4M3|F8_E5M2|F8_E8M0|F8_E4M3FNUZ|F8_E5M2FNUZ"
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
DIGITS = {"F64": (53, 1024), "F32": (24, 128), "F16": (11, 16), "BF16": (8, 128)}  # significand, exponents below this
RULES = {"alpha": lambda rank: 1, "alpha/rank": lambda rank: 1 / rank, "alpha/sqrt(rank)": lambda rank: rank**-0.5}
# Types are patterns for a value written as JSON; a member that is absent is written as nothing.
STR, INT, NUM = r'"(?:[^"\\]|\\.)*"', r"-?\d+", r"-?(?:\d.*|Infinity)"
INTS, STRS, OBJECT = rf"\[({INT}(, {INT})*)?\]", rf"\[({STR}(, )?)*\]", rf"\{{({STR}: {STR}(, )?)*\}}"
SHAPE = INTS.replace("-?", "")  # no negative sizes
HEAD = {"format": '"loratool"', "version": r'"[1-9][0-9]*\.(0|[1-9][0-9]*)"', "features": STRS}
MANIFEST = {**HEAD, "updates": r"\[.*\]", "base": r"\{.*\}", "provenance": OBJECT}
PLACE = {"rows": rf"(\[{INT}, {INT}\])?", "expert": f"({INT})?", "experts": f"({INT})?"}
SCALE = {"rank": f"({INT})?", "alpha": f"({NUM})?", "scaling": f"({STR})?", "scale": f"({NUM})?"}
UPDATE = {"target": STR, "kind": STR, "shape": INTS, "layout": '("in_out"|"embedding")?', **PLACE, **SCALE}
DORA = {**UPDATE, "direction": '"(lora|loha|lokr)"', "axis": "[01]"}
IDENTITY = {"digest": '"blake3:[0-9a-f]{64}"', "dtype": f'"({DTYPE})"', "shape": SHAPE}
# The sets of components and their axes: n, C, c, K, R, T of FORMAT.md, r the rank, any other letter one free axis.
LOKR = [w1 + w2 for w1 in ("w1:ax ", "B1:ar A1:rx ") for w2 in ("w2:byK", "B2:br A2:ryK", "B2:br A2:ry mid2:rrK")]
LOHA = ["B1:nr A1:rC B2:nr A2:rC", "B1:nr A1:rc mid1:rrK B2:nr A2:rc mid2:rrK"]
FORMS = {"lora": ["B:nr A:rC", "B:nr A:rc mid:rrK"], "loha": LOHA, "lokr": LOKR, "add": ["value:R"]}
FORMS |= {"replace": ["value:R"], "replace_rows": ["index:k value:kT"]}
ROLES = {"replace": (1, 1), "replace_rows": (1, 1), "dora": (4, 6)}  # a bit, and the bits it must not meet


class Refused(Exception):
    code = property(lambda self: self.args[0])


def need(ok, code):
    if not ok:
        raise Refused(code)


def check(x, types, code):
    need(isinstance(x, dict), code)
    need(all(key in types or "." in key for key in x), "E-UNKNOWN-KEY")
    need(all(re.fullmatch(types[key], json.dumps(x[key]) if key in x else "") for key in types), code)


def parse(raw, code):
    hooks = {"object_pairs_hook": lambda pairs: need(len(dict(pairs)) == len(pairs), "E-DUPLICATE") or dict(pairs)}
    hooks |= {"parse_constant": int, "parse_int": lambda digits: int(digits) if len(digits) < 309 else math.inf}
    try:
        brackets = re.findall(r"[][{}]", re.sub(STR, "", raw.decode()))
        need(np.cumsum([0] + [1 if bracket in "[{" else -1 for bracket in brackets]).max() <= 16, "E-LIMIT")
        x = json.loads(raw.decode(), **hooks)  # int("NaN") is an error
        json.dumps(x, ensure_ascii=False).encode()  # so is an unpaired surrogate
    except ValueError:
        raise Refused(code) from None
    return x if isinstance(x, dict) else need(False, code)


def container(path):
    """(manifest in JSON, {name: (dtype, shape, float64 array)}); arrays of other dtypes hold the bytes."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    need(2 <= n <= 100_000_000 and 8 + n <= len(raw) and re.fullmatch(rb"(?s)\{.*\} *", raw[8 : 8 + n]), "E-HEADER")
    header, data, tensors, end = parse(raw[8 : 8 + n], "E-HEADER"), raw[8 + n :], {}, 0
    meta = header.pop("__metadata__", {})
    need(re.fullmatch(OBJECT, json.dumps(meta)), "E-HEADER")
    entry = rf'\{{"data_offsets": \[\d+, \d+\], "dtype": {STR}, "shape": {SHAPE}\}}'
    need(all(re.fullmatch(entry, json.dumps(t, sort_keys=True)) for t in header.values()), "E-HEADER")
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = t["dtype"], t["shape"], t["data_offsets"]
        need(max(*shape, start, stop) <= 2**53, "E-HEADER")
        bits = re.fullmatch(DTYPE, dtype) and int(re.findall(r"\d+", dtype + " 8")[0])  # BOOL has 8
        need(bits and (stop - start) * 8 == math.prod(shape) * bits, "E-TENSOR")
        need(start == end and stop <= len(data), "E-LAYOUT")
        array, end = np.frombuffer(data[start:stop], NUMPY.get(dtype, "u1")), stop
        array = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
        tensors[name] = dtype, shape, array.astype(float).reshape(shape) if dtype in NUMPY else array
    need(end == len(data), "E-LAYOUT")
    return meta.get("loratool", "").encode(), tensors


def update(u, prefix, tensors):
    """[(index into the target, {component: array})] with one item per expert, and the ranges this covers."""
    kind, shape, rank, rule, scale = u.get("direction", u["kind"]), u["shape"], u.get("rank", 1), u.get("scaling"), u.get("scale", 0)
    need(kind in FORMS, "E-KIND")
    matrix, packed, has = kind in ("lora", "loha", "lokr"), {"expert", "experts"} & u.keys(), SCALE.keys() & u.keys()
    need(re.fullmatch(r"[^\0-\x1f\x7f]+", u["target"]) and len(u["target"].encode()) <= 1024, "E-LIMIT")
    need(1 <= rank <= 65536 and len(shape) <= 8 and math.prod(shape) <= 2**53, "E-LIMIT")
    need(len(packed) < (1 if kind == "replace_rows" else 2) and not (packed and len(shape) < 2 + matrix), "E-RANGE")
    need(not packed or 0 <= u.get("expert", 0) < shape[0] == u.get("experts", shape[0]), "E-RANGE")
    lead, region = shape[: "experts" in u], shape[len(packed) :]
    need(min(shape, default=1) >= 1 and len(region) >= (2 if matrix else kind == "replace_rows"), "E-SHAPE")
    rows = u.get("rows", [0, *region[:1]])
    need("rows" not in u or (region and 0 <= rows[0] < rows[1] <= region[0] and kind != "replace_rows"), "E-RANGE")
    region = [*np.diff(rows), *region[1:]]
    need("scale" in u if matrix else has == ({"scaling", "scale"} if kind == "add" else set()), "E-SCALE")
    need(rule in (RULES if "alpha" in u else ["none"] if "scale" in u else [None]), "E-SCALE")
    forms = [dict(part.split(":") for part in (form + " magnitude:m" * ("axis" in u)).split()) for form in FORMS[kind]]
    parts = {name.removeprefix(prefix): t for name, t in tensors.items() if re.fullmatch(re.escape(prefix) + r"\w+", name)}
    form = next((form for form in forms if form.keys() == parts.keys()), {})
    need(form, "E-COMPONENTS")
    products = "r" in "".join(form.values())
    need(("rank" in u) == products and (products or rule in (None, "none", "alpha")), "E-RANK")
    wanted = u["alpha"] * RULES[rule](rank) if "alpha" in u else scale
    need(math.isfinite(scale) and abs(scale - wanted) <= abs(wanted) / 2**40, "E-SCALE")
    sizes = {"n": region[:1], "R": region, "C": region[1:], "c": region[1:2], "K": region[2:], "T": shape[1:]}
    sizes |= {"r": [rank], "m": region[u.get("axis", 0) :][:1]}
    for name, axes in form.items():
        dtype, got, parts[name] = parts[name]
        need(dtype in (["I64"] if name == "index" else DIGITS), "E-DTYPE")
        want = [sizes.setdefault(axis, got[i : i + 1] or [0]) for i, axis in enumerate(axes, len(lead))]
        want = sum(want, lead)
        need(got == want, "E-RANK" if name[0] == "B" and got[:-1] == want[:-1] else "E-SHAPE")
    a, b, x, y, k = (sizes.get(axis, [1])[0] for axis in "abxyk")
    need(1 <= k <= [*shape, 1][0] and (kind != "lokr" or region[:2] == [a * b, x * y]), "E-SHAPE")
    need(all(np.isfinite(part).all() for part in parts.values()), "E-NONFINITE")
    need((np.diff([-1, *parts.get("index", []), *shape[:1]]) > 0).all(), "E-RANGE")
    at = [range(u["expert"], u["expert"] + 1) if "expert" in u else range(shape[0])] * len(packed) + [range(*rows)] * ("rows" in u)
    ...


def read(path):
    """The manifest of an adapter, and [(update, dtype of its last component, places)]."""
    text, tensors = container(path)
    m, found, groups = parse(text, "E-MANIFEST"), [], {}
    check({key: m[key] for key in HEAD if key in m}, HEAD, "E-MANIFEST")
    need(m["version"].startswith("1."), "E-VERSION")
    features = {*FORMS, "dora", "mid", *PLACE} - {"lora"}
    need({*m["features"]} <= features and len({*m["features"]}) == len(m["features"]), "E-FEATURE")
    check(m, MANIFEST, "E-MANIFEST")
    need(1 <= len(m["updates"]) <= 1_000_000 and len(text) <= 50_000_000, "E-LIMIT")
    for u in m["updates"]:
        check(u, DORA if isinstance(u, dict) and u.get("kind") == "dora" else UPDATE, "E-MANIFEST")
        group, (role, foes) = groups.setdefault(u["target"], []), ROLES.get(u["kind"], (2, 4))
        ...
    return m, found


def factor(p, i=""):
    """The matrix w, or the product of B and A, or that of B, mid and A."""
    b, a, mid = (p.get(name + i) for name in ("B", "A", "mid"))
    a = a if mid is None else np.einsum("mn...,nj->mj...", mid, a)
    return p["w" + i] if b is None else np.tensordot(b, a, 1)


def merge(base, adapters, consent=False):
    """{name: (dtype, array)} of a base after a merge of [(adapter, weight)] (section 8)."""
    tensors, steps, seen = container(base)[1], [], {}
    for path, weight in adapters:
        m, found = read(path)
        for name, t in m["base"].get("tensors", {}).items():
            need([*tensors.get(name, (t["dtype"], t["shape"]))[:2]] == [t["dtype"], t["shape"]], "E-BASE-MISMATCH")
        steps += [(weight, *step) for step in found]
    for weight, u, own, places in sorted(steps, key=lambda step: "replace" not in step[1]["kind"]):
        name, kind, (role, foes) = u["target"], u["kind"], ROLES.get(u["kind"], (2, 4))
        dtype, shape, w = tensors.get(name, (None, None, None))
        need(dtype in (None, *DIGITS), "E-QUANTISED")
        if shape != u["shape"]:
            need(kind == "replace" and not PLACE.keys() & u.keys(), "E-SHAPE" if dtype else "E-TARGET")
            need(consent and weight == 1, "E-TARGET")
            w = np.zeros(u["shape"])
        tensors[name] = dtype or own, u["shape"], w
        covered = seen.setdefault(name, np.zeros(w.shape, int))
        for at, p in places:
            need(not (covered[at] & foes).any(), "E-OVERLAP")
            covered[at] |= role
            new = p["value"] if "value" in p
    return tensors
