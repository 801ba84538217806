"""A reader of FORMAT.md 1.0: with its two small neighbours the proof that the document suffices.

read() checks all but the canonical form (R-050 to R-052). Run it on vectors/1.0 for all vectors.
"""

import math
import re
import sys

import numpy as np
from reference_container import BITS, container, is_a, known, need, numbers, parse

# The components of a kind and their axes. A small letter is one axis, a capital several:
# n, C, c, K, R, T, m as in FORMAT.md, r the rank, any other letter is free.
W1, W2 = ["w1:ax", "B1:ar A1:rx"], ["w2:byK", "B2:br A2:ryK", "B2:br A2:ry mid2:rrK"]
FORMS = {
    "lora": ["B:nr A:rC", "B:nr A:rc mid:rrK"],
    "loha": ["B1:nr A1:rC B2:nr A2:rC", "B1:nr A1:rc mid1:rrK B2:nr A2:rc mid2:rrK"],
    "lokr": [f"{w1} {w2}" for w1 in W1 for w2 in W2],
    "replace": ["value:R"],
    "add": ["value:R"],
    "replace_rows": ["index:k value:kT"],
}
SCALE = {"rank": int, "alpha": (int, float), "scaling": str, "scale": (int, float)}
PLACE = {"rows": list, "expert": int, "experts": int}
TYPES = {"target": str, "kind": str, "shape": list, **PLACE, **SCALE}
RULES = {"alpha": lambda r: 1, "alpha/rank": lambda r: 1 / r, "alpha/sqrt(rank)": lambda r: r**-0.5}
FEATURES = {*FORMS, "dora", "mid", *PLACE} - {"lora"}


def update(u, prefix, tensors):
    """Checks one update; gives its components as {name: array}."""
    need(isinstance(u, dict) and {"target", "kind", "shape"} <= set(u), "E-MANIFEST")
    need(all(is_a(u[key], TYPES[key]) for key in set(u) & set(TYPES)), "E-MANIFEST")
    need(len(u.get("rows", "ab")) == 2, "E-MANIFEST")
    target, shape, dora = u["target"], u["shape"], u["kind"] == "dora"
    need(dora or u["kind"] in FORMS, "E-KIND")
    known(u, {*TYPES, "layout", *(["direction", "axis"] if dora else [])})
    need(u.get("layout", "in_out") in ("in_out", "embedding"), "E-MANIFEST")
    kind = u.get("direction") if dora else u["kind"]
    matrix = kind in ("lora", "loha", "lokr")
    need(not dora or (matrix and is_a(u.get("axis"), int) and u["axis"] in (0, 1)), "E-MANIFEST")
    need(1 <= len(target.encode()) <= 1024 and not re.search("[\0-\x1f\x7f]", target), "E-LIMIT")
    rank = u.get("rank", 1)
    need(1 <= rank <= 65536 and len(shape) <= 8 and math.prod(shape) <= 2**53, "E-LIMIT")
    need(all(d >= 1 for d in shape), "E-SHAPE")
    region, lead = list(shape), []
    need(kind != "replace_rows" or not set(PLACE) & set(u), "E-RANGE")
    if "expert" in u or "experts" in u:
        need(not ("expert" in u and "experts" in u) and len(shape) >= 2 + matrix, "E-RANGE")
        need(0 <= u.get("expert", 0) < shape[0] == u.get("experts", shape[0]), "E-RANGE")
        lead, region = shape[: "experts" in u], shape[1:]
    need(len(region) >= (2 if matrix else kind == "replace_rows"), "E-SHAPE")
    if "rows" in u:
        start, stop = u["rows"]
        need(region and 0 <= start < stop <= region[0], "E-RANGE")
        region[0] = stop - start
    has, rule, scale = set(u) & set(SCALE), u.get("scaling"), u.get("scale", 0)
    need(matrix or has == ({"scaling", "scale"} if kind == "add" else set()), "E-SCALE")
    need(not matrix or "scale" in u, "E-SCALE")
    need(rule in (RULES if "alpha" in u else ["none"] if "scale" in u else [None]), "E-SCALE")
    names = {n.removeprefix(prefix) for n in tensors if re.fullmatch(re.escape(prefix) + r"\w+", n)}
    forms = [dict(p.split(":") for p in (f + " magnitude:m" * dora).split()) for f in FORMS[kind]]
    form = next((form for form in forms if set(form) == names), None)
    need(form, "E-COMPONENTS")
    products = any("r" in axes for axes in form.values())
    need(("rank" in u) == products and (products or rule in (None, "none", "alpha")), "E-RANK")
    want = u["alpha"] * RULES[rule](rank) if "alpha" in u else scale
    need(abs(scale) < math.inf and abs(scale - want) <= abs(want) / 2**40, "E-SCALE")
    sizes = {"n": region[:1], "C": region[1:], "c": region[1:2], "K": region[2:], "R": region}
    sizes |= {"T": shape[1:], "r": [u.get("rank")], "m": region[u.get("axis", 0) :][:1]}
    for name, axes in form.items():
        dtype, rest, _ = tensors[prefix + name]
        need(dtype in (["I64"] if name == "index" else ["F64", "F32", "F16", "BF16"]), "E-DTYPE")
        need(rest[: len(lead)] == lead, "E-SHAPE")
        rest = rest[len(lead) :]
        for axis in axes:
            size = sizes.setdefault(axis, rest[:1])
            rank_of_b = axis == "r" and name[0] == "B" and rest
            need(rest[: len(size)] == size, "E-RANK" if rank_of_b else "E-SHAPE")
            rest = rest[len(size) :]
        need(not rest, "E-SHAPE")
    a, b, x, y = (sizes.get(axis, [0])[0] for axis in "abxy")
    need(kind != "lokr" or region[:2] == [a * b, x * y], "E-SHAPE")
    parts = {name: numbers(*tensors[prefix + name]) for name in form}
    need(all(np.isfinite(p).all() for p in parts.values()), "E-NONFINITE")
    if kind == "replace_rows":
        need(1 <= len(parts["index"]) <= shape[0], "E-SHAPE")
        need((np.diff([-1, *parts["index"], shape[0]]) > 0).all(), "E-RANGE")
    return parts


def clash(u, v):
    """Whether two updates of one tensor meet where they must not."""
    rows = [x.get("rows", (0, math.inf)) for x in (u, v)]
    experts = {x["expert"] for x in (u, v) if "expert" in x}
    meet = max(r[0] for r in rows) < min(r[1] for r in rows) and len(experts) < 2
    roles = [x["kind"].removesuffix("_rows") for x in (u, v)]
    return meet and roles.count("replace") != 1 and bool({"replace", "dora"} & set(roles))


def read(path):
    """(manifest, {tensor name: array}) of an adapter, or Refused with a code."""
    text, tensors = container(path)
    m = parse(text, "E-MANIFEST")
    version = m.get("version")
    need(m.get("format") == "loratool" and isinstance(version, str), "E-MANIFEST")
    need(re.fullmatch(r"[1-9][0-9]*\.(0|[1-9][0-9]*)", version), "E-MANIFEST")
    need(version.startswith("1."), "E-VERSION")
    types = {"features": list, "updates": list, "base": dict, "provenance": dict}
    need(all(isinstance(m.get(key), kind) for key, kind in types.items()), "E-MANIFEST")
    features, updates, base = m["features"], m["updates"], m["base"]
    need(all(isinstance(f, str) for f in features), "E-MANIFEST")
    need(set(features) <= FEATURES and len(set(features)) == len(features), "E-FEATURE")
    known(m, {"format", "version", *types})
    need(1 <= len(updates) <= 1_000_000 and len(text.encode()) <= 50_000_000, "E-LIMIT")
    found, used, groups = {}, set(), {}
    for u in updates:
        target = u.get("target") if isinstance(u, dict) else None
        group = groups.setdefault(str(target), [])
        prefix = f"{target}.{len(group)}."
        parts = update(u, prefix, tensors)
        need(all(u["shape"] == v["shape"] for v in group), "E-SHAPE")
        need(not any(clash(u, v) for v in group), "E-OVERLAP")
        group.append(u)
        found |= {prefix + name: part for name, part in parts.items()}
        used |= {u["kind"], u.get("direction")} | (PLACE.keys() & u.keys())
        used |= {"mid"} if {"mid", "mid1", "mid2"} & set(parts) else set()
    need(found.keys() == tensors.keys(), "E-COMPONENTS")
    known(base, {"name", "tensors"})
    base_name, identities = base.get("name", ""), base.get("tensors", {})
    need(isinstance(base_name, str) and isinstance(identities, dict), "E-BASE")
    for name, t in identities.items():
        need(isinstance(t, dict) and name in groups, "E-BASE")
        known(t, {"digest", "dtype", "shape"})
        need(re.fullmatch("blake3:[0-9a-f]{64}", str(t.get("digest"))), "E-BASE")
        need(str(t.get("dtype")) in BITS and is_a(t.get("shape"), list), "E-BASE")
        whole = [u for u in groups[name] if u["kind"] == "replace" and not PLACE.keys() & u.keys()]
        need(whole or t["shape"] == groups[name][0]["shape"], "E-BASE")
    need(all(isinstance(v, str) for v in m["provenance"].values()), "E-MANIFEST")
    need(features == sorted(used & FEATURES), "E-FEATURE")
    return m, found


if __name__ == "__main__":
    from reference_merge import main

    sys.exit(main())
