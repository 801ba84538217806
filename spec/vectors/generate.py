"""Writes the test vectors of format 1.0 and the worked example in FORMAT.md.

    python generate.py            write 1.0/ and the example
    python generate.py --check    compare instead of writing; exit 1 with the names that differ

cases.py says what to write. This file has its own writer and its own arithmetic: it shares no line
with any implementation. Merges are computed in exact rational numbers and rounded once, so the
bytes do not depend on the machine. Needs numpy and blake3.
"""
# ruff: noqa: T201 - a script that talks to its user

import copy
import hashlib
import json
import math
import struct
import sys
import zlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import cases
import numpy as np
from blake3 import blake3

HERE = Path(__file__).parent
OUT = HERE / "1.0"
DOC = HERE.parent / "FORMAT.md"
MARKS = ("<!-- worked example: begin -->\n", "<!-- worked example: end -->\n")

# dtype: item size, significand bits, smallest and largest exponent, largest numerator used here
FLOATS = {
    "F64": (8, 53, -1022, 1023, 2**29),
    "F32": (4, 24, -126, 127, 2**19),
    "F16": (2, 11, -14, 15, 2**10 - 1),
    "BF16": (2, 8, -126, 127, 2**7 - 1),
    "F8_E4M3": (1, 4, -6, 8, 2**4 - 1),
    "F8_E5M2": (1, 3, -14, 15, 2**3 - 1),
}
# of the compute dtype: u, its unit roundoff, and h, its smallest subnormal number
UNIT = dict.fromkeys(FLOATS, Fraction(1, 2**24)) | dict.fromkeys(("F64", "F32"), Fraction(1, 2**53))
LEAST = dict.fromkeys(FLOATS, Fraction(1, 2**149)) | dict.fromkeys(("F64", "F32"), Fraction(1, 2**1074))
SUMS = {"B", "B1", "B2", "mid", "mid1", "mid2"}  # components over whose rank there is a sum


# ---------------------------------------------------------------- numbers and bytes


class Counter:
    """A linear congruential generator, seeded by a case's name: no random library is involved."""

    def __init__(self, name):
        self.state = zlib.crc32(name.encode())

    def next(self, limit):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit

    def values(self, dtype, count):
        """Numbers in (-2, 2), not zero, all of them exact in that dtype."""
        top = FLOATS[dtype][4]
        signs = ((1, -1)[self.next(2)] for _ in range(count))
        return [Fraction(2 * sign * (1 + self.next(top - 1)), top + top % 2) for sign in signs]


def rounded(x, dtype):
    """The nearest number of that dtype, ties to even; beyond the largest one: refused."""
    _, digits, low, high, _ = FLOATS[dtype]
    if x == 0:
        return Fraction(0)
    size = abs(x)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    e -= size < Fraction(2) ** e
    step = Fraction(2) ** (max(e, low) - digits + 1)
    y = round(x / step) * step  # round() of a fraction is half to even
    if abs(y) >= Fraction(2) ** (high + 1) or (dtype == "F8_E4M3" and abs(y) > 448):
        raise Refused("E-NONFINITE")
    return y


def encode(values, dtype):
    if dtype.startswith("F8"):
        return bytes(eight_bits(Fraction(v), dtype) for v in values)
    floats = np.array([float(v) for v in values])
    if dtype == "I64":
        return np.array([int(v) for v in values], dtype="<i8").tobytes()
    if dtype == "BF16":
        return (floats.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return floats.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def eight_bits(x, dtype):
    """The byte of a number that is exact in that dtype: sign, exponent, fraction."""
    _, digits, low, high, _ = FLOATS[dtype]
    e = max([low, *(e for e in range(low, high + 1) if abs(x) >= Fraction(2) ** e)])
    return 128 * (x < 0) + int(abs(x) / Fraction(2) ** (e - digits + 1)) + (e - low) * 2 ** (digits - 1)


def decode(dtype, shape, data):
    """An array of fractions (of ints for I64)."""
    if dtype.startswith("F8"):
        _, digits, low, _, _ = FLOATS[dtype]
        field, fraction = np.divmod(np.frombuffer(data, "u1").astype(int) & 127, 2 ** (digits - 1))
        flat = (fraction + 2.0 ** (digits - 1) * (field > 0)) * 2.0 ** (np.maximum(field, 1) + low - digits)
        flat = np.where(np.frombuffer(data, "u1") > 127, -flat, flat)
    elif dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        flat = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype])
    out = np.empty(len(flat), dtype=object)
    if dtype != "I64" and not np.isfinite(flat).all():
        raise Refused("E-NONFINITE")
    out[:] = [int(v) if dtype == "I64" else Fraction(float(v)) for v in flat]
    return out.reshape(shape)


def digest(data, function="blake3"):
    made = hashlib.sha256(data) if function == "sha256" else blake3(data)
    return f"{function}:{made.hexdigest()}"


def identity_of(stored, function="blake3"):
    dtype, shape, data = stored
    return {"digest": digest(data, function), "dtype": dtype, "shape": shape}


# ---------------------------------------------------------------- canonical JSON and files


def quote(s):
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f"}
    short["\r"] = "\\r"
    return '"' + "".join(short.get(c, c if c >= " " else f"\\u{ord(c):04x}") for c in s) + '"'


def number(x):
    """The shortest decimal form, laid out as ECMAScript does (RFC 8785, section 3.2.2.3)."""
    if isinstance(x, int) or (x == int(x) and abs(x) < 2**53):
        return str(int(x))
    sign, digits, exponent = Decimal(repr(x)).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + exponent
    if len(text) <= point <= 21:
        text += "0" * (point - len(text))
    elif 0 < point <= 21:
        text = text[:point] + "." + text[point:]
    elif -6 < point <= 0:
        text = "0." + "0" * -point + text
    else:
        text = text[0] + ("." + text[1:] if text[1:] else "") + f"e{point - 1:+d}"
    return "-" * sign + text


def canonical(value):
    """RFC 8785: no white space, keys sorted by UTF-16 code units."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda k: k.encode("utf-16-be"))
        return "{" + ",".join(f"{quote(k)}:{canonical(value[k])}" for k in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return number(value)


def plain(value):
    """The header: as it comes, no white space. Fractions are written as Python writes them."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{quote(k)}:{plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(plain, value)) + "]"
    return quote(value) if isinstance(value, str) else json.dumps(value)


def by_size(item):
    """Data order: item size descending, then name by code point."""
    name, (dtype, _, _) = item
    return -cases.SIZE[dtype], name


def build(manifest, tensors, stage=None, edit=None, metadata=None):
    """The bytes of a file. `edit` is applied once, at the stage it names (see cases.py)."""

    def hook(name, value):
        result = edit(value) if stage == name else None
        return value if result is None or not isinstance(result, type(value)) else result

    manifest, tensors = copy.deepcopy(manifest), copy.deepcopy(tensors)
    if stage == "file":
        edit(manifest, tensors)
    header, data = {}, b""
    if manifest is not None:
        header["__metadata__"] = {"loratool": hook("text", canonical(manifest))}
        header["__metadata__"].update(sorted((metadata or {}).items()))
    for name, (dtype, shape, raw) in sorted(tensors.items(), key=edit if stage == "order" else by_size):
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = hook("json", plain(hook("header", header)).encode())
    text += b" " * (-len(text) % 8)
    return hook("bytes", struct.pack("<Q", len(text)) + text + data)


# ---------------------------------------------------------------- the merge, exactly


class Refused(Exception):
    """A merge that the format refuses; the argument is the code."""


def root(x):
    """The square root to 100 digits: exact enough for one rounding to 53 bits."""
    scale = 10**100
    return Fraction(math.isqrt(x.numerator * x.denominator * scale**2), x.denominator * scale)


def product(b, a, mid=None):
    """sum over m: B[i, m] A[m, j, ...]; with mid also over n: B[i, m] mid[m, n, ...] A[n, j]"""
    if mid is None:
        return np.tensordot(b, a, 1)
    inner = np.tensordot(a, mid, ((0,), (1,)))  # [j, m, ...]
    return np.tensordot(b, np.moveaxis(inner, 1, 0), 1)


def kron(w1, w2):
    """out[i*b + p, j*d + q, ...] = w1[i, j] w2[p, q, ...]"""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    outer = np.moveaxis(np.tensordot(w1, w2, 0), 2, 1)  # [a, b, c, d, ...]
    return outer.reshape(a * b, c * d, *kernel)


def delta(kind, p):
    if kind == "lora":
        return product(p["B"], p["A"], p.get("mid"))
    if kind == "loha":
        one = product(p["B1"], p["A1"], p.get("mid1"))
        return one * product(p["B2"], p["A2"], p.get("mid2"))
    if kind == "lokr":
        w1 = p["w1"] if "w1" in p else product(p["B1"], p["A1"])
        return kron(w1, p["w2"] if "w2" in p else product(p["B2"], p["A2"], p.get("mid2")))
    return p["value"]


def places(u, parts):
    """The region of an update as (index into the tensor, components there), one per expert."""
    rows = (slice(*u["rows"]),) if "rows" in u else ()
    if "experts" in u:
        for e in range(u["experts"]):
            yield (e, *rows), {name: p[e] for name, p in parts.items()}
    else:
        yield ((u["expert"], *rows) if "expert" in u else rows), parts


def norm(v, axis):
    others = tuple(i for i in range(v.ndim) if i != axis)
    squares = (v * v).sum(axis=others, keepdims=True)
    if 0 in squares.flat:
        raise Refused("E-NONFINITE")
    return np.vectorize(root, otypes=[object])(squares)


def along(m, v, axis):
    return m.reshape([-1 if i == axis else 1 for i in range(v.ndim)])


def merge_one(w, todo, dtype):
    """todo: (update, components, weight) in order. The exact result, and the band of every element (section 8)."""
    w, state = w.copy(), np.full(w.shape, "", dtype=object)  # state: what has touched an element
    S, Z, n = each(abs, w), each(raised, w), np.full(w.shape, 8, dtype=object)
    u, h = UNIT[dtype], LEAST[dtype]

    def take(where, mark, clash):
        if set("".join(np.ravel(state[where]))) & set(clash):
            raise Refused("E-OVERLAP")
        state[where] = state[where] + mark

    for update, parts, weight in todo:
        if update["kind"] not in ("replace", "replace_rows"):
            continue
        for where, p in places(update, parts):
            where = ([int(i) for i in p["index"]],) if "index" in p else where
            value = p["value"]
            take(where, "v" if weight == 1 else "r", "rv")
            n[where] = n[where] + 4
            if weight == 1:
                w[where], S[where], Z[where] = value, each(abs, value), each(raised, value)
                continue
            w[where] = w[where] + weight * (value - w[where])
            S[where] = S[where] + abs(weight) * (each(abs, value) + S[where])
            Z[where] = Z[where] + raised(weight) * (each(raised, value) + Z[where])
    others = [step for step in todo if step[0]["kind"] not in ("replace", "replace_rows")]
    for update, parts, _ in others:
        alone = update["kind"] in ("dora", "scale")
        for where, p in places(update, parts):
            take(where, *(("d", "da") if alone else ("a", "d")))
            n[where] = n[where] + 4 + update.get("rank", 0) * len(SUMS & p.keys())
            if update["kind"] == "dora":
                under = w[where].size // w[where].shape[update["axis"]]
                n[where] = n[where] + 8 + math.ceil(math.log2(under)) + math.ceil(under / 2**53 / u)
    g = n * u / (1 - n * u)
    band = np.zeros(w.shape, dtype=object)  # of doras: what is more than g S + n h Z
    for update, parts, weight in others:
        scale = Fraction(update.get("scale", 1))
        for where, p in places(update, parts):
            if update["kind"] == "dora":
                goal, off = dora(w[where], S[where], Z[where], n[where], g[where], h, update, p)
                S[where] = S[where] + abs(weight) * (S[where] + abs(goal))
                Z[where] = Z[where] + raised(weight) * (Z[where] + each(raised, goal))
                band[where] = abs(weight) * off
                w[where] = w[where] + weight * (goal - w[where])
            elif update["kind"] == "scale":
                factor = along(p["factor"], w[where], update["axis"])
                S[where] = S[where] + abs(weight) * (S[where] + abs(factor) * S[where])
                Z[where] = Z[where] + raised(weight) * (Z[where] + each(raised, factor) * Z[where])
                w[where] = w[where] + weight * (factor * w[where] - w[where])
            else:
                kind = update["kind"]
                w[where] = w[where] + weight * scale * delta(kind, p)
                S[where] = S[where] + abs(weight * scale) * delta(kind, {k: each(abs, v) for k, v in p.items()})
                more = delta(kind, {k: each(raised, v) for k, v in p.items()})
                Z[where] = Z[where] + raised(weight) * raised(scale) * more
    rounds = np.vectorize(lambda marks: int(marks not in ("", "v")), otypes=[object])(state)
    return w, rounds * (band + g * S + n * h * Z)


def dora(w, S, Z, n, g, h, update, parts):
    """The goal m V / norm(V), and d: how far from it rounding and underflow of V and its norm may lead."""
    way, axis, scale = update["direction"], update["axis"], Fraction(update["scale"])
    v = w + scale * delta(way, parts)
    e = g * (S + abs(scale) * delta(way, {k: each(abs, x) for k, x in parts.items()}))
    above = Z + raised(scale) * delta(way, {k: each(raised, x) for k, x in parts.items()})
    e = e + n * h * above
    length, m = norm(v, axis), along(parts["magnitude"], v, axis)
    if (length == 0).any():
        raise Refused("E-NONFINITE")
    off = norm(e, axis) + root(v.size // v.shape[axis] * h)
    low = length - off
    if (low <= 0).any():
        raise SystemExit("a norm that rounding may take away: no vector for it")
    return m * v / length, abs(m) * (e + abs(v) * off / length) / low + n * h * (above + abs(m) + 1 / low)


def upwards(x):
    """The next number of binary64 from there, so that a band is not cut short."""
    return math.nextafter(float(x), math.inf) if x else 0.0


def each(change, x):
    return np.asarray(np.vectorize(change, otypes=[object])(x), dtype=object)


def raised(x):
    return max(Fraction(1), abs(x))


def merge(base, adapters, consent=False):
    """base: {name: [dtype, shape, bytes]}; adapters: (manifest, tensors, weight).

    Gives the merged tensors, and for every target the exact result and its band as F64.
    """
    merged, truth, todo = dict(base), {}, {}
    for manifest, tensors, weight in adapters:
        if "when" in manifest:
            raise Refused("E-CONDITIONAL")
        for name, known in manifest["base"].get("tensors", {}).items():
            beside = [(f"{name.rpartition('.')[0]}.{n}", part) for n, part in known.get("parts", {}).items()]
            for stored, wanted in [(name, known), *beside]:
                if stored not in base:
                    raise Refused("E-BASE-MISMATCH")
                found = identity_of(base[stored], wanted["digest"].partition(":")[0])
                if any(wanted[key] != found[key] for key in found):
                    raise Refused("E-BASE-MISMATCH")
        seen = {}
        for u in manifest["updates"]:
            i = seen[u["target"]] = seen.get(u["target"], -1) + 1
            stem = f"{u['target']}.{i}."
            parts = {
                n.removeprefix(stem): decode(*v)
                for n, v in tensors.items()
                if n.startswith(stem) and "." not in n.removeprefix(stem)
            }
            todo.setdefault(full_name(u), []).append((u, parts, Fraction(weight)))
    for target, work in todo.items():
        shape = work[0][0]["shape"]
        if any(u["shape"] != shape for u, _, weight in work if weight):
            raise Refused("E-SHAPE")
        dtype, found, _ = base.get(target, [None, None, None])
        if dtype not in (None, *FLOATS):
            raise Refused("E-QUANTISED")
        if found == shape:
            start = decode(*base[target])
        else:  # a whole-tensor replacement of another shape, or of nothing: it starts from itself
            whole = [(p, weight) for u, p, weight in work if is_whole(u)]
            if not whole:
                raise Refused("E-SHAPE" if dtype else "E-TARGET")
            if not consent or whole[0][1] != 1:
                raise Refused("E-TARGET")
            start = whole[0][0]["value"]
            dtype = dtype or stored_as(target, adapters)
        exact, band = merge_one(start, [step for step in work if step[2]], dtype)
        values = [rounded(x, dtype) for x in exact.flat]
        merged[target] = [dtype, shape, encode(values, dtype)]
        truth["exact." + target] = ["F64", shape, encode(exact.flat, "F64")]
        truth["band." + target] = ["F64", shape, encode(map(upwards, np.ravel(band)), "F64")]
    return merged, truth


def full_name(u):
    return f"{u['part']}.{u['target']}" if "part" in u else u["target"]


def is_whole(u):
    return u["kind"] == "replace" and not {"rows", "expert", "experts"} & set(u)


def stored_as(target, adapters):
    """The dtype of the value that becomes a new tensor."""
    for manifest, tensors, _ in adapters:
        updates = [u for u in manifest["updates"] if full_name(u) == target]
        for i, u in enumerate(updates):
            if is_whole(u):
                return tensors[f"{target}.{i}.value"][0]
    raise KeyError(target)


# ---------------------------------------------------------------- from cases to files


def fill(tensors, counter):
    """The tensors of a case as {name: [dtype, shape, bytes]}."""
    out = {}
    for name, spec in tensors.items():
        values = spec["values"]
        if values is None:
            values = counter.values(spec["dtype"], math.prod(spec["shape"]))
        out[name] = [spec["dtype"], spec["shape"], encode(values, spec["dtype"])]
    return out


def features(updates, parts):
    used = set()
    for u, p in zip(updates, parts, strict=True):
        used |= {u["kind"], u.get("direction", "lora")} - {"lora"}
        used |= {"mid"} if {"mid", "mid1", "mid2"} & set(p) else set()
        used |= {"rows", "expert", "experts"} & set(u)
    return sorted(used)


def adapter(case):
    """(manifest, tensors, base tensors) of a valid case."""
    counter = Counter(case["name"])
    base = fill(case["base"], counter)
    updates, parts = zip(*case["updates"], strict=True)
    tensors, seen = {}, {}
    for u, p in zip(updates, parts, strict=True):
        i = seen[u["target"]] = seen.get(u["target"], -1) + 1
        tensors.update(fill({f"{u['target']}.{i}.{k}": v for k, v in p.items()}, counter))
    identity = dict(case.get("identity", {}))
    if "identity" in case and case.get("digests", True):
        function = case.get("function", "blake3")
        identity["tensors"] = {n: identity_of(base[n], function) for n in map(full_name, updates)}
        for name, beside in case.get("scales", {}).items():
            stored = base[f"{name.rpartition('.')[0]}.{beside}"]
            identity["tensors"][name]["parts"] = {beside: identity_of(stored, function)}
    vendor = case.get("vendor", {})
    if vendor:
        identity["tensors"]["l.weight"]["acme.shard"] = 1
    manifest = {
        "format": "loratool",
        "version": case.get("version", "1.0"),
        "features": sorted([*features(updates, parts), *["conditional"] * ("when" in case)]),
        "base": identity,
        "provenance": case.get("provenance", {}),
        "updates": list(updates),
        **{key: case[key] for key in ("info", "when") if key in case},
        **vendor,
    }
    return manifest, tensors, base


def expected(manifest, tensors, metadata):
    """The decoded file, for a reader to compare with."""
    shown = {}
    for name, (dtype, shape, data) in sorted(tensors.items()):
        values = [int(v) if dtype == "I64" else float(v) for v in decode(dtype, shape, data).flat]
        shown[name] = {"dtype": dtype, "shape": shape, "values": values}
    return pretty({"manifest": manifest, "metadata": dict(sorted(metadata.items())), "tensors": shown})


def pretty(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def generate():
    """{path below 1.0/: bytes}"""
    files = {}
    index = {"format": "1.0", "valid": [], "merge": [], "invalid": []}
    known = {}
    for case in cases.VALID:
        name = case["name"]
        manifest, tensors, base = known[name] = adapter(case)
        consent, metadata = case.get("consent", False), case.get("metadata", {})
        stem = f"valid/{name}"
        paths = {
            "file": (f"{stem}.lora.safetensors", build(manifest, tensors, metadata=metadata)),
            "expected": (f"{stem}.expected.json", expected(manifest, tensors, metadata)),
            "base": (f"{stem}.base.safetensors", build(None, base)),
        }
        if case.get("merge", True):
            merged, truth = merge(base, [(manifest, tensors, 1)], consent)
            paths["merged"] = f"{stem}.merged.safetensors", build(None, merged)
            paths["truth"] = f"{stem}.truth.safetensors", build(None, truth)
        files.update(paths.values())
        entry = {"name": name, "shows": case["shows"], "rules": case["rules"]}
        entry.update({key: path for key, (path, _) in paths.items()})
        index["valid"].append({**entry, "consent": consent})
    for case in cases.MERGES:
        name, of = case["name"], case["base"]
        base, base_path = dict(known[of][2]), f"valid/{of}.base.safetensors"
        if {"swap", "flip", "lacks", "nan"} & case.keys():
            base.update(fill(case.get("swap", {}), Counter(name)))
            if "flip" in case:
                dtype, shape, data = base[case["flip"]]
                base[case["flip"]] = [dtype, shape, bytes([data[0] ^ 1]) + data[1:]]
            for lacking in case.get("lacks", []):
                del base[lacking]
            if "nan" in case:  # the last element
                dtype, shape, data = base[case["nan"]]
                size = FLOATS[dtype][0]
                base[case["nan"]] = [dtype, shape, data[:-size] + b"\xff" * (size - 1) + b"\x7f"]
            base_path = f"merge/{name}.base.safetensors"
            files[base_path] = build(None, base)
        entry = {"name": name, "shows": case["shows"], "rules": case["rules"], "base": base_path}
        entry["adapters"] = [
            {"file": f"valid/{a['case']}.lora.safetensors", "weight": a["weight"]} for a in case["adapters"]
        ]
        entry["consent"] = case.get("consent", False)
        entry.update({"needs": case["needs"]} if "needs" in case else {})
        work = [(*known[a["case"]][:2], a["weight"]) for a in case["adapters"]]
        try:
            merged, truth = merge(base, work, case.get("consent", False))
            found = None
        except Refused as refused:
            found = str(refused)
        if found != case["error"]:
            raise SystemExit(f"merge case {name}: {found} instead of {case['error']}")
        if found:
            entry["codes"] = sorted({found, *cases.ALSO.get(name, [])})
        else:
            entry["merged"] = f"merge/{name}.merged.safetensors"
            entry["truth"] = f"merge/{name}.truth.safetensors"
            files[entry["merged"]] = build(None, merged)
            files[entry["truth"]] = build(None, truth)
        index["merge"].append(entry)
    for case in cases.INVALID:
        manifest, tensors, _ = known[case["of"]]
        path = f"invalid/{case['name']}.lora.safetensors"
        metadata = cases.METADATA.get(case["of"])
        data = build(manifest, tensors, case["stage"], case["edit"], metadata)
        if data == build(manifest, tensors, metadata=metadata) or path in files:
            raise SystemExit(f"invalid case {case['name']}: nothing changed, or the name is taken")
        files[path] = data
        opened = case["rule"] in ("R-017", "R-046", "R-050", "R-051", "R-052")  # by a reader: R-055
        validator = opened or case["rule"] in ("R-033", "R-034")
        index["invalid"].append(
            {
                "name": case["name"],
                "file": path,
                "from": f"valid/{case['of']}.lora.safetensors",
                "mutation": case["mutation"],
                "code": case["code"],
                "codes": sorted({case["code"], *cases.ALSO.get(case["name"], [])}),
                "rule": case["rule"],
                "duty": "validator" if validator else "reader",
                "schema": case["schema"],
                "also": ["R-055"] if opened else [],
            }
        )
    if unknown := cases.ALSO.keys() - {entry["name"] for kind in ("merge", "invalid") for entry in index[kind]}:
        raise SystemExit(f"ALSO names no case: {sorted(unknown)}")
    files["manifest.json"] = pretty(index)
    return files


def worked(files):
    """The worked example of FORMAT.md, made from the bytes of the case of that name."""
    data = files["valid/worked.lora.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    manifest = json.loads(header)["__metadata__"]["loratool"]
    lines = [f"The file has {len(data)} bytes: 8 + {length} + {len(data) - 8 - length}.\n"]
    lines += ["```text"]
    for i in range(0, len(data), 16):
        row = data[i : i + 16]
        chars = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{i:04x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  {chars}")
    pad = length - len(header.rstrip(" "))
    first = 8 + length
    lines += ["```\n", "| bytes | content |", "|---|---|"]
    lines += [f"| 0000-0007 | the header length, {length}, little-endian |"]
    lines += [f"| 0008-{first - 1:04x} | the header, with {pad} spaces of padding |"]
    for name, item in list(json.loads(header).items())[1:]:
        begin, end = (first + x for x in item["data_offsets"])
        values = [float(v) for v in decode(item["dtype"], item["shape"], data[begin:end]).flat]
        what = f"`{name}`, {item['dtype']} {item['shape']}: {', '.join(map(str, values))}"
        lines.append(f"| {begin:04x}-{end - 1:04x} | {what} |")
    lines += ["\nThe manifest inside the header, without its escapes:\n"]
    return "\n".join([*lines, "```json manifest", manifest, "```", ""])


def document(files):
    """FORMAT.md with the example between its marks."""
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    return (before + MARKS[0] + worked(files) + MARKS[1] + rest.split(MARKS[1])[1]).encode()


def main():
    made = generate()
    files = {OUT / name: data for name, data in made.items()}
    if DOC.exists():
        files[DOC] = document(made)
    present = [p for p in OUT.rglob("*") if p.is_file()]
    if "--check" in sys.argv[1:]:
        differ = [p for p, data in files.items() if not p.is_file() or p.read_bytes() != data]
        differ += [p for p in present if p not in files]
        for path in differ:
            print("differs:", path.relative_to(HERE.parent))
        return 1 if differ else 0
    for path in present:
        if path not in files:
            path.unlink()
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
