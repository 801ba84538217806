"""FORMAT.md 1.0 in one file of Python and numpy, to show that the document suffices. read() and merge() refuse what
it refuses, the canonical form apart. `python reference_reader.py vectors/1.0` runs all vectors that need no BLAKE3."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

BITS = {f"{letter}{bits}": bits for letter in "UIF" for bits in (16, 32, 64)} | {"BF16": 16, "C64": 64}
BITS |= dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
DIGITS = {"F64": (53, 1024), "F32": (24, 128), "F16": (11, 16), "BF16": (8, 128)}  # bits, and all are below 2^this
RULES = {"alpha": lambda rank: 1, "alpha/rank": lambda rank: 1 / rank, "alpha/sqrt(rank)": lambda rank: rank**-0.5}
# Types are patterns for the JSON text of a value; a member that is absent has the text "".
STR, INT, NUM, ANY = r'"(?:[^"\\]|\\.)*"', r"-?\d+", r"-?(?:\d.*|Infinity)", [0, 2**53]
INTS, STRS, TEXTS = rf"\[({INT}(, {INT})*)?\]", rf"\[({STR}(, )?)*\]", rf"\{{({STR}: {STR}(, )?)*\}}"
ENTRY = rf'\{{"data_offsets": \[\d+, \d+\], "dtype": {STR}, "shape": {INTS.replace("-?", "")}\}}'
HEAD = {"format": '"loratool"', "version": r'"[1-9][0-9]*\.(0|[1-9][0-9]*)"', "features": STRS}
MANIFEST = {**HEAD, "updates": r"\[.*\]", "base": r"\{.*\}", "provenance": TEXTS}
PLACE = {"rows": rf"(\[{INT}, {INT}\])?", "expert": f"({INT})?", "experts": f"({INT})?"}
SCALE = {"rank": f"({INT})?", "alpha": f"({NUM})?", "scaling": f"({STR})?", "scale": f"({NUM})?"}
UPDATE = {"target": STR, "kind": STR, "shape": INTS, "layout": '("in_out"|"embedding")?', **PLACE, **SCALE}
DORA = {**UPDATE, "direction": '"(lora|loha|lokr)"', "axis": "[01]"}
BASE = {"name": f"({STR})?", "tensors": r"(\{.*\})?"}
IDENTITY = {"digest": '"blake3:[0-9a-f]{64}"', "dtype": f'"({"|".join(BITS)})"', "shape": INTS.replace("-?", "")}
# The components of a kind with their axes: a small letter is one axis, a capital any number. n, C, c, K, R, T are
# those of FORMAT.md, r is the rank, m the length of the magnitude, any other letter is free.
LOKR = [w1 + w2 for w1 in ("w1:ax ", "B1:ar A1:rx ") for w2 in ("w2:byK", "B2:br A2:ryK", "B2:br A2:ry mid2:rrK")]
LOHA = ["B1:nr A1:rC B2:nr A2:rC", "B1:nr A1:rc mid1:rrK B2:nr A2:rc mid2:rrK"]
SETS = {"lora": ["B:nr A:rC", "B:nr A:rc mid:rrK"], "loha": LOHA, "lokr": LOKR, "add": ["value:R"]}
SETS |= {"replace": ["value:R"], "replace_rows": ["index:k value:kT"]}
FORMS = {kind: [dict(part.split(":") for part in each.split()) for each in sets] for kind, sets in SETS.items()}
COMPONENTS = {"magnitude"}.union(*(form for forms in FORMS.values() for form in forms))
FEATURES = {*FORMS, "dora", "mid", *PLACE} - {"lora"}
ROLES = {"replace": (1, 1), "replace_rows": (1, 1), "dora": (4, 6)}  # a bit, and the bits it must not meet (R-029)


class Refused(Exception):
    code = property(lambda self: self.args[0])


def need(ok, code):
    if not ok:
        raise Refused(code)


def check(x, code, types):  # R-014, R-015, R-020
    need(isinstance(x, dict), code)
    need(all(key in types or "." in key for key in x), "E-UNKNOWN-KEY")
    need(all(re.fullmatch(types[key], json.dumps(x[key]) if key in x else "") for key in types), code)


def parse(raw, code):  # R-002, R-003
    try:
        nesting = [1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", re.sub(STR, "", raw.decode()))]
        need(np.cumsum([0, *nesting]).max() <= 16, "E-LIMIT")
        hooks = {"object_pairs_hook": lambda items: need(len(dict(items)) == len(items), "E-DUPLICATE") or dict(items)}
        hooks["parse_int"] = lambda digits: int(digits) if len(digits) < 309 else float(digits)
        x = json.loads(raw.decode(), **hooks, parse_constant=int)  # int("NaN") fails
        json.dumps(x, ensure_ascii=False).encode()  # fails on an unpaired surrogate
    except ValueError:
        raise Refused(code) from None
    need(isinstance(x, dict), code)
    return x


def container(path):
    """The manifest, still JSON, and {name: (dtype, shape, float64 array)}; other dtypes stay bytes (R-001 to R-006)."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    need(2 <= n <= 100_000_000 and re.fullmatch(rb"(?s)\{.*\} *", raw[8 : 8 + n]) and 8 + n <= len(raw), "E-HEADER")
    header, data, tensors, end = parse(raw[8 : 8 + n], "E-HEADER"), raw[8 + n :], {}, 0
    meta = header.pop("__metadata__", {})
    need(re.fullmatch(TEXTS, json.dumps(meta)), "E-HEADER")
    need(all(re.fullmatch(ENTRY, json.dumps(t, sort_keys=True)) for t in header.values()), "E-HEADER")
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = t["dtype"], t["shape"], t["data_offsets"]
        need(max(*shape, start, stop) <= 2**53, "E-HEADER")
        need(dtype in BITS and (stop - start) * 8 == math.prod(shape) * BITS[dtype], "E-TENSOR")
        need(start == end and stop <= len(data), "E-LAYOUT")
        flat, end = np.frombuffer(data[start:stop], NUMPY.get(dtype, "u1")), stop
        flat = (flat.astype("<u4") << 16).view("<f4") if dtype == "BF16" else flat
        tensors[name] = dtype, shape, flat.astype(float).reshape(shape) if dtype in NUMPY else flat
    need(end == len(data), "E-LAYOUT")
    return meta.get("loratool", "").encode(), tensors


def update(u, prefix, tensors):  # R-016, R-021 to R-026, R-030 to R-034
    """{component: array} of an update whose tensors' names begin with prefix, and what it covers of two axes."""
    kind, shape, packed = u.get("direction", u["kind"]), u["shape"], {"expert", "experts"} & u.keys()
    rank, rule, scale, matrix = u.get("rank", 1), u.get("scaling"), u.get("scale", 0), "direction" in u or kind[0] == "l"
    need(kind in FORMS, "E-KIND")
    need(re.fullmatch(r"[^\0-\x1f\x7f]+", u["target"]) and len(u["target"].encode()) <= 1024, "E-LIMIT")
    need(1 <= rank <= 65536 and len(shape) <= 8 and math.prod(shape) <= 2**53, "E-LIMIT")
    need(kind != "replace_rows" or not PLACE.keys() & u.keys(), "E-RANGE")
    need(not packed or (len(packed) == 1 and len(shape) >= 2 + matrix), "E-RANGE")
    need(not packed or 0 <= u.get("expert", 0) < shape[0] == u.get("experts", shape[0]), "E-RANGE")
    lead, region = shape[: "experts" in u], shape[len(packed) :]
    need(min(shape, default=1) >= 1 and len(region) >= (2 if matrix else kind == "replace_rows"), "E-SHAPE")
    rows = u.get("rows", [0, *region[:1]])
    need("rows" not in u or (region and 0 <= rows[0] < rows[1] <= region[0]), "E-RANGE")
    region = [*np.diff(rows), *region[1:]]
    has, keys = SCALE.keys() & u.keys(), {"scaling", "scale"} if kind == "add" else set()
    need("scale" in u if matrix else has == keys, "E-SCALE")
    need(rule in (RULES if "alpha" in u else ["none"] if "scale" in u else [None]), "E-SCALE")
    names = {name for name in COMPONENTS if prefix + name in tensors}
    form = next((form for form in FORMS[kind] if {*form, *["magnitude"] * ("axis" in u)} == names), {})
    need(form, "E-COMPONENTS")
    products = "r" in "".join(form.values())
    need(("rank" in u) == products and (products or rule in (None, "none", "alpha")), "E-RANK")
    wanted = u["alpha"] * RULES[rule](rank) if "alpha" in u else scale
    need(math.isfinite(scale) and abs(scale - wanted) <= abs(wanted) / 2**40, "E-SCALE")
    sizes = {"n": region[:1], "R": region, "C": region[1:], "c": region[1:2], "K": region[2:], "T": shape[1:]}
    sizes |= {"r": [rank], "m": region[u.get("axis", 0) :][:1]}
    for name in names:
        dtype, got, _ = tensors[prefix + name]
        need(dtype in (["I64"] if name == "index" else DIGITS), "E-DTYPE")
        axes = enumerate(form.get(name, "m"), len(lead))
        want = lead + [size for i, axis in axes for size in sizes.setdefault(axis, got[i : i + 1] or [0])]
        need(got == want, "E-RANK" if name[0] == "B" and got[:-1] == want[:-1] else "E-SHAPE")
    a, b, x, y, k = (sizes.get(axis, [1])[0] for axis in "abxyk")
    need(1 <= k <= [*shape, 1][0] and (kind != "lokr" or region[:2] == [a * b, x * y]), "E-SHAPE")
    parts = {name: tensors[prefix + name][2] for name in names}
    need(all(np.isfinite(part).all() for part in parts.values()), "E-NONFINITE")
    need((np.diff([-1, *parts.get("index", []), *shape[:1]]) > 0).all(), "E-RANGE")
    first = [u["expert"], u["expert"] + 1] if "expert" in u else ANY
    return parts, np.array([first, u.get("rows", ANY)] if packed else [u.get("rows", ANY), first])


def read(path):
    """The manifest of an adapter, and {"target.ordinal.": {component: array}} in the order of its updates."""
    text, tensors = container(path)
    m, found, used, groups = parse(text, "E-MANIFEST"), {}, set(), {}
    check({key: m[key] for key in HEAD if key in m}, "E-MANIFEST", HEAD)
    need(m["version"].startswith("1."), "E-VERSION")
    need({*m["features"]} <= FEATURES and len({*m["features"]}) == len(m["features"]), "E-FEATURE")
    check(m, "E-MANIFEST", MANIFEST)
    need(1 <= len(m["updates"]) <= 1_000_000 and len(text) <= 50_000_000, "E-LIMIT")
    for u in m["updates"]:
        check(u, "E-MANIFEST", DORA if isinstance(u, dict) and u.get("kind") == "dora" else UPDATE)
        group, (role, foes) = groups.setdefault(u["target"], []), ROLES.get(u["kind"], (2, 4))
        prefix = f"{u['target']}.{len(group)}."
        found[prefix], box = update(u, prefix, tensors)
        need(all(u["shape"] == v["shape"] for v, *_ in group), "E-SHAPE")
        meet = [r for _, r, other in group if (np.maximum(box, other)[:, 0] < np.minimum(box, other)[:, 1]).all()]
        need(not any(r & foes for r in meet), "E-OVERLAP")
        group.append((u, role, box))
    need(tensors.keys() == {prefix + name for prefix, parts in found.items() for name in parts}, "E-COMPONENTS")
    check(m["base"], "E-BASE", BASE)
    for name, t in m["base"].get("tensors", {}).items():
        check(t, "E-BASE", IDENTITY)
        new = any(u["kind"] == "replace" and not PLACE.keys() & u.keys() for u, *_ in groups.get(name, []))
        need(new or (name in groups and t["shape"] == groups[name][0][0]["shape"]), "E-BASE")
    return m, found


def merge(base, adapters, consent=False):
    """{name: (dtype, array)} of a base after a merge of [(adapter, weight)] (section 8)."""
    stored, jobs, whole = container(base)[1], {}, {}
    for path, weight in adapters:
        m, found = read(path)
        for name, t in m["base"].get("tensors", {}).items():
            need([*stored.get(name, (t["dtype"], t["shape"]))[:2]] == [t["dtype"], t["shape"]], "E-BASE-MISMATCH")
        for u, (prefix, p) in zip(m["updates"], found.items(), strict=True):
            jobs.setdefault(u["target"], []).append((u, p, weight))
            if u["kind"] == "replace" and not PLACE.keys() & u.keys():
                whole[u["target"]] = weight, container(path)[1][prefix + "value"][0]
    merged = {name: (dtype, array) for name, (dtype, _, array) in stored.items()}
    for target, steps in jobs.items():
        dtype, old, w = stored.get(target, (None, None, None))
        need(dtype in (None, *DIGITS), "E-QUANTISED")
        if any(u["shape"] != old for u, *_ in steps):
            need(target in whole, "E-SHAPE" if dtype else "E-TARGET")
            need(consent and whole[target][0] == 1, "E-TARGET")
            dtype, w = dtype or whole[target][1], np.zeros(steps[0][0]["shape"])
        w, seen = w.copy(), np.zeros(w.shape, int)
        for u, p, weight in sorted(steps, key=lambda step: "replace" not in step[0]["kind"]):
            role, foes = ROLES.get(u["kind"], (2, 4))
            first = p["index"].astype(int) if "index" in p else u.get("expert")
            for e in range(u.get("experts", 1)):
                q = {name: part[e] for name, part in p.items()} if "experts" in u else dict(p)
                at = [e] if "experts" in u else [] if first is None else [first]
                at = (*at, *([slice(*u["rows"])] if "rows" in u else []))
                need(not (seen[at] & foes).any(), "E-OVERLAP")
                seen[at] |= role
                for i in ("", "1", "2"):
                    if "mid" + i in q:
                        q["A" + i] = np.einsum("mn...,nj->mj...", q["mid" + i], q["A" + i])
                    if "B" + i in q:
                        q["w" + i] = np.tensordot(q["B" + i], q["A" + i], 1)
                ...
