"""FORMAT.md 1.0 in one file of Python and numpy, whole files in memory: the proof that the document suffices.

`python reference_reader.py vectors/1.0` reads, merges or refuses every vector; BLAKE3 is all that it lacks.
"""

import json
import math
import re
import sys
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np

BITS = {f"{letter}{bits}": bits for letter in "UIF" for bits in (16, 32, 64)} | {"BF16": 16, "C64": 64}
BITS |= dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
DIGITS = {"F64": (53, 1024), "F32": (24, 128), "F16": (11, 16), "BF16": (8, 128)}  # and all values are below 2^that
# The components of a kind with their axes: a small letter is one axis, a capital any number. n, C, c, K, R, T are
# those of FORMAT.md, r is the rank, m the length of the magnitude, any other letter is free.
FORMS = {
    "lora": ["B:nr A:rC", "B:nr A:rc mid:rrK"],
    "loha": ["B1:nr A1:rC B2:nr A2:rC", "B1:nr A1:rc mid1:rrK B2:nr A2:rc mid2:rrK"],
    "lokr": [f"{w1} {w2}" for w1 in ("w1:ax", "B1:ar A1:rx") for w2 in ("w2:byK", "B2:br A2:ryK", "B2:br A2:ry mid2:rrK")],
    "replace": ["value:R"],
    "add": ["value:R"],
    "replace_rows": ["index:k value:kT"],
}
COMPONENTS = re.findall(r"\w+(?=:)", " ".join(["magnitude:m", *sum(FORMS.values(), [])]))
RULES = {"alpha": lambda rank: 1, "alpha/rank": lambda rank: 1 / rank, "alpha/sqrt(rank)": lambda rank: rank**-0.5}
# The members of objects and their types; float is any number, [t] an array of t, {t} an object of t.
ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}
MANIFEST = {"format": str, "version": str, "features": [str], "updates": list, "base": dict, "provenance": {str}}
PLACE = {"rows": [int], "expert": int, "experts": int}
SCALE = {"rank": int, "alpha": float, "scaling": str, "scale": float}
UPDATE = {"target": str, "kind": str, "shape": [int]}
OPTIONAL = PLACE | SCALE | {"layout": str, "direction": str, "axis": int}
IDENTITY = {"digest": str, "dtype": str, "shape": [int]}
FEATURES = {*FORMS, "dora", "mid", *PLACE} - {"lora"}


class Refused(Exception):
    code = property(lambda self: self.args[0], doc="The code of FORMAT.md, section 13.")


def need(ok, code):
    if not ok:
        raise Refused(code)


def is_a(x, kind):
    if isinstance(kind, (list, set)):
        items = x if isinstance(kind, list) else [*x.values()] if isinstance(x, dict) else None
        return isinstance(items, list) and all(is_a(item, *kind) for item in items)
    return type(x) is kind or (type(x) is int and kind is float)


def check(x, code, required, optional):  # R-014
    need(isinstance(x, dict) and required.keys() <= x.keys(), code)
    need(all("." in key or key in required | optional for key in x), "E-UNKNOWN-KEY")
    need(all(is_a(x[key], kind) for key, kind in (required | optional).items() if key in x), code)


def parse(text, code):  # R-002, R-003
    brackets = re.findall(r"[][}{]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text))
    need(max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0) <= 16, "E-LIMIT")

    def pairs(items):
        need(len(dict(items)) == len(items), "E-DUPLICATE")
        return dict(items)

    def whole(digits):
        return int(digits) if len(digits) < 309 else float(digits)  # which is infinite

    try:
        x = json.loads(text, object_pairs_hook=pairs, parse_int=whole, parse_constant=int)  # int("NaN") fails
        json.dumps(x, ensure_ascii=False).encode()  # fails on an unpaired surrogate
    except ValueError:
        raise Refused(code) from None
    need(isinstance(x, dict), code)
    return x


def canonical(x):  # R-050
    if isinstance(x, dict):
        names = sorted(x, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(name)}:{canonical(x[name])}" for name in names) + "}"
    if isinstance(x, list):
        return f"[{','.join(map(canonical, x))}]"
    if type(x) not in (int, float):
        return json.dumps(x, ensure_ascii=False)
    if x and not 1e-6 <= abs(x) < 1e21:
        return repr(float(x)).replace("e-0", "e-")
    return np.format_float_positional(x + 0.0, trim="-")


def container(path):
    """(the manifest's text, {name: (dtype, shape, bytes)}, whether R-051 and R-052 hold) of a safetensors file."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    need(len(raw) >= 8 and 2 <= n <= 100_000_000 and 8 + n <= len(raw), "E-HEADER")
    text, data = raw[8 : 8 + n].decode(errors="replace"), raw[8 + n :]
    need(text.encode() == raw[8 : 8 + n] and re.fullmatch(r"(?s)\{.*\} *", text), "E-HEADER")
    header = parse(text, "E-HEADER")
    meta = header.pop("__metadata__", {})
    need(is_a(meta, {str}), "E-HEADER")
    for t in header.values():
        need(isinstance(t, dict) and t.keys() == ENTRY.keys() and all(is_a(t[k], ENTRY[k]) for k in t), "E-HEADER")
        need(len(t["data_offsets"]) == 2 and all(0 <= i <= 2**53 for i in t["shape"] + t["data_offsets"]), "E-HEADER")
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    for dtype, shape, (start, stop) in ([t[key] for key in ENTRY] for t in header.values()):
        need(dtype in BITS and (stop - start) * 8 == math.prod(shape) * BITS[dtype], "E-TENSOR")
    starts, stops = ([t["data_offsets"][i] for t in header.values()] for i in (0, 1))
    need([*starts, len(data)] == [0, *stops], "E-LAYOUT")
    tensors = {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}
    entries = {name: {key: t[key] for key in ENTRY} for name, t in header.items()}
    wanted = {"__metadata__": {"loratool": meta.get("loratool")}} | entries
    wanted = json.dumps(wanted, ensure_ascii=False, separators=(",", ":")).encode()
    order = sorted(entries, key=lambda name: (-BITS[entries[name]["dtype"]], name))
    tidy = raw[8 : 8 + n] == wanted + b" " * (-len(wanted) % 8) and order == [*entries]
    return meta.get("loratool", ""), tensors, tidy


def numbers(dtype, shape, data):
    flat = np.frombuffer(data, NUMPY[dtype])
    if dtype == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.astype("<i8" if dtype == "I64" else "<f8").reshape(shape)


def rounded(x, dtype):
    """The nearest values of a dtype, ties to even, as float64 (R-061)."""
    digits, top = DIGITS[dtype]
    exponent = np.maximum(np.frexp(x)[1], 3 - top) - digits
    y = np.ldexp(np.rint(np.ldexp(x, -exponent)), exponent)
    need((np.abs(np.ldexp(y, -1)) < 2.0 ** (top - 1)).all(), "E-NONFINITE")
    return y


def boxes(u):
    """What an update covers: ranges of the first two axes. A merge knows the index of a replace_rows."""
    rows = u.get("rows", (0, 2**53))
    if "index" in u:
        return [((i, i + 1), (0, 2**53)) for i in u["index"]]
    if "expert" in u:
        return [((u["expert"], u["expert"] + 1), rows)]
    return [((0, 2**53), rows) if "experts" in u else (rows, (0, 2**53))]


def clash(u, v):  # R-029
    roles = [x["kind"].removesuffix("_rows") for x in (u, v)]
    if roles.count("replace") == 1 or not {"replace", "dora"} & {*roles}:
        return False
    return any(all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(p, q)) for p in boxes(u) for q in boxes(v))


def update(u, prefix, tensors):  # R-016, R-020 to R-028, R-030 to R-034
    """{component: array} of an update whose tensors' names begin with prefix."""
    target, kind, shape, dora = u["target"], u["kind"], u["shape"], u["kind"] == "dora"
    need(dora or kind in FORMS, "E-KIND")
    need(dora or not {"direction", "axis"} & u.keys(), "E-UNKNOWN-KEY")
    kind, rank, rule, has = u.get("direction", kind), u.get("rank", 1), u.get("scaling"), SCALE.keys() & u.keys()
    matrix = kind in ("lora", "loha", "lokr")
    need(u.get("layout", "in_out") in ("in_out", "embedding") and len(u.get("rows", "ab")) == 2, "E-MANIFEST")
    need(not dora or (matrix and u.get("axis") in (0, 1)), "E-MANIFEST")
    need(re.fullmatch(r"[^\0-\x1f\x7f]+", target) and len(target.encode()) <= 1024, "E-LIMIT")
    need(1 <= rank <= 65536 and len(shape) <= 8 and math.prod(shape) <= 2**53, "E-LIMIT")
    need(all(size >= 1 for size in shape), "E-SHAPE")
    need(kind != "replace_rows" or not PLACE.keys() & u.keys(), "E-RANGE")
    packed = {"expert", "experts"} & u.keys()
    need(not packed or (len(packed) == 1 and len(shape) >= 2 + matrix), "E-RANGE")
    need(not packed or 0 <= u.get("expert", 0) < shape[0] == u.get("experts", shape[0]), "E-RANGE")
    region = shape[len(packed) :]
    need(len(region) >= (2 if matrix else kind == "replace_rows"), "E-SHAPE")
    if "rows" in u:
        start, stop = u["rows"]
        need(region and 0 <= start < stop <= region[0], "E-RANGE")
        region = [stop - start, *region[1:]]
    need("scale" in u if matrix else has == ({"scaling", "scale"} if kind == "add" else set()), "E-SCALE")
    need(rule in (RULES if "alpha" in u else ["none"] if "scale" in u else [None]), "E-SCALE")
    names = {name for name in COMPONENTS if prefix + name in tensors}
    forms = [dict(part.split(":") for part in (form + " magnitude:m" * dora).split()) for form in FORMS[kind]]
    form = next((form for form in forms if form.keys() == names), {})
    need(form, "E-COMPONENTS")
    products = any("r" in axes for axes in form.values())
    need(("rank" in u) == products and (products or rule in (None, "none", "alpha")), "E-RANK")
    scale = u.get("scale", 0)
    wanted = u["alpha"] * RULES[rule](rank) if "alpha" in u else scale
    need(math.isfinite(scale) and abs(scale - wanted) <= abs(wanted) / 2**40, "E-SCALE")
    sizes = {"E": shape[: "experts" in u], "n": region[:1], "R": region, "C": region[1:], "c": region[1:2]}
    sizes |= {"K": region[2:], "T": shape[1:], "r": [rank], "m": region[u.get("axis", 0) :][:1]}
    for name, axes in form.items():
        dtype, rest, _ = tensors[prefix + name]
        need(dtype in (["I64"] if name == "index" else DIGITS), "E-DTYPE")
        for axis in "E" + axes:
            size = sizes.setdefault(axis, rest[:1] or [0])
            need(rest[: len(size)] == size, "E-RANK" if axis == "r" and name[0] == "B" and rest else "E-SHAPE")
            rest = rest[len(size) :]
        need(not rest, "E-SHAPE")
    a, b, x, y = (sizes.get(axis, [0])[0] for axis in "abxy")
    need(kind != "lokr" or region[:2] == [a * b, x * y], "E-SHAPE")
    parts = {name: numbers(*tensors[prefix + name]) for name in form}
    need(all(np.isfinite(part).all() for part in parts.values()), "E-NONFINITE")
    if kind == "replace_rows":
        need(1 <= len(parts["index"]) <= shape[0], "E-SHAPE")
        need((np.diff([-1, *parts["index"], shape[0]]) > 0).all(), "E-RANGE")
    return parts


def read(path, strict=False):
    """(manifest, {"target.ordinal.": {component: array}}); strict also refuses what R-055 lets a reader open."""
    text, tensors, tidy = container(path)
    m = parse(text, "E-MANIFEST")
    version, features = m.get("version"), m.get("features")
    need(m.get("format") == "loratool" and is_a(version, str), "E-MANIFEST")
    need(re.fullmatch(r"[1-9][0-9]*\.(0|[1-9][0-9]*)", version), "E-MANIFEST")
    need(version.startswith("1."), "E-VERSION")
    need(is_a(features, [str]), "E-MANIFEST")
    need({*features} <= FEATURES and len({*features}) == len(features), "E-FEATURE")
    check(m, "E-MANIFEST", MANIFEST, {})
    need(1 <= len(m["updates"]) <= 1_000_000 and len(text.encode()) <= 50_000_000, "E-LIMIT")
    found, used, groups, base = {}, set(), {}, m["base"]
    for u in m["updates"]:
        check(u, "E-MANIFEST", UPDATE, OPTIONAL)
        group = groups.setdefault(u["target"], [])
        prefix = f"{u['target']}.{len(group)}."
        found[prefix] = parts = update(u, prefix, tensors)
        need(all(u["shape"] == v["shape"] for v in group), "E-SHAPE")
        need(not any(clash(u, v) for v in group), "E-OVERLAP")
        group.append(u)
        used |= {u["kind"], u.get("direction"), *PLACE.keys() & u.keys(), *(name.rstrip("12") for name in parts)}
    need(tensors.keys() == {prefix + name for prefix in found for name in found[prefix]}, "E-COMPONENTS")
    check(base, "E-BASE", {}, {"name": str, "tensors": dict})
    for name, t in base.get("tensors", {}).items():
        check(t, "E-BASE", IDENTITY, {})
        need(name in groups and re.fullmatch("blake3:[0-9a-f]{64}", t["digest"]) and t["dtype"] in BITS, "E-BASE")
        new = any(u["kind"] == "replace" and not PLACE.keys() & u.keys() for u in groups[name])
        need(min(t["shape"], default=0) >= 0 and (new or t["shape"] == groups[name][0]["shape"]), "E-BASE")
    need(not strict or features == sorted(used & FEATURES), "E-FEATURE")
    need(not strict or (tidy and text == canonical(m)), "E-CANONICAL")
    return m, found


def delta(kind, p):
    """The change of an update before its scale, from the components for one expert."""

    def factor(i=""):
        if "w" + i in p:
            return p["w" + i]
        b, a, mid = p["B" + i], p["A" + i], p.get("mid" + i)
        return np.einsum("im,m...->i...", b, a) if mid is None else np.einsum("im,mn...,nj->ij...", b, mid, a)

    if kind in ("add", "lora"):
        return p["value"] if kind == "add" else factor()
    one, two = factor("1"), factor("2")
    return one * two if kind == "loha" else np.kron(one.reshape(one.shape + (1,) * (two.ndim - 2)), two)


def apply(w, u, p, weight):
    """Changes the region of w for one update, or for each of its experts (R-060)."""
    rows = [slice(*u["rows"])] if "rows" in u else []
    places = [((*[u[key] for key in ("index", "expert") if key in u], *rows), p)]
    if "experts" in u:
        places = [((e, *rows), {name: part[e] for name, part in p.items()}) for e in range(u["experts"])]
    for at, q in places:
        change = "replace" in u["kind"] or float(u["scale"]) * delta(u.get("direction", u["kind"]), q)
        if u["kind"] == "dora":
            v = np.moveaxis(w[at] + change, u["axis"], -1)  # [..., m]
            norm = np.sqrt((v * v).sum(axis=tuple(range(v.ndim - 1))))  # [m]
            need((np.isfinite(norm) & (norm > 0)).all(), "E-NONFINITE")
            q["value"] = np.moveaxis(q["magnitude"] * v / norm, -1, u["axis"])
        ...


