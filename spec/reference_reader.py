"""Reads and merges adapters of FORMAT.md 1.0; `python reference_reader.py vectors/1.0` runs the test vectors."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "F8_E4M3": "u1", "F8_E5M2": "u1"}
FLOATS = {"F64": (53, 1024), "F32": (24, 128), "F16": (11, 16), "BF16": (8, 128)}  # bits of precision, exponent's limit
FLOATS |= {"F8_E4M3": (4, 8), "F8_E5M2": (3, 16)}
TEXT, NUMBER, SIZES = r'"(?:[^"\\]|\\.)*"', r"(-?(\d.*|Infinity))?", r"\[(\d+(, \d+)*)?\]"
SOME, WHOLE = r'"(?:[^"\\]|\\.)+"', r"\d{1,16}"  # a text that is not empty, a number
TEXTS, VERSION, SHAPE = rf"\{{({TEXT}: {TEXT}(, )?)*\}}", r'"1\.(0|[1-9]\d*)"', r"\[([1-9]\d*(, [1-9]\d*){0,7})?\]"
MANIFEST = {"format": '"loratool"', "version": VERSION, "features": r"\[.*\]", "updates": r"\[.+\]", "base": r"\{.*\}"}
MANIFEST |= {"provenance": TEXTS, "info": r"(\{.*\})?", "when": r"(\{.*\})?"}
WHEN = {"tokens": rf"(\[{WHOLE}(, {WHOLE})*\])?", "prompts": rf"(\[{SOME}(, {SOME})*\])?", "routing": f"({SOME})?"}
PLACE = {"rows": r"(\[\d+, \d+\])?", "expert": r"\d*", "experts": r"\d*"}
SCALE = {"rank": r"\d*", "alpha": NUMBER, "scaling": '(".*")?', "scale": NUMBER, "direction": ".*", "axis": "[01]?"}
UPDATE = {"target": TEXT, "kind": TEXT, "shape": SHAPE, "layout": '("(in_out|embedding)")?', **PLACE, **SCALE}
UPDATE["part"] = r'("[\w-]{1,100}")?'
DTYPE = "BOOL|[UI](8|16|32|64)|BF16|F(4|16|32|64)|C64|F6_E2M3|F6_E3M2|F8_E(4M3|5M2)(FNUZ)?|F8_E8M0"
DIGEST, TOKENS = '"(blake3|sha256):[0-9a-f]{64}"', rf"(\{{({TEXT}: {WHOLE}(, )?)*\}})?"
IDENTITY = {"digest": DIGEST, "dtype": f'"({DTYPE})"', "shape": r"\[(\d+(, \d+){0,7})?\]"}
BASE = {"name": f"({TEXT})?", "revision": f"({TEXT})?", "architecture": f"({TEXT})?", "tokenizer": f"({DIGEST})?"}
BASE |= {"tensors": r"(\{.*\})?", "added_tokens": TOKENS}
# Components and their axes: n, R, C, c, K as in FORMAT.md, r to u are ranks, any other letter is one free axis.
LOKR = [f"{w1} {w2}" for w1 in ("w1:ax", "B1:ar A1:rx") for w2 in ("w2:byK", "B2:bs A2:syK", "B2:bs mid2:stK A2:ty")]
LOHA = ["B1:nr A1:rC B2:ns A2:sC", "B1:nr mid1:rsK A1:sc B2:nt mid2:tuK A2:uc"]
FORMS = {"lora": ["B:nr A:rC", "B:nr mid:rsK A:sc"], "loha": LOHA, "lokr": LOKR, "add": ["value:R"]}
FORMS |= {"replace": ["value:R"], "replace_rows": ["index:k value:kC"], "scale": [""]}
FREE = ("provenance", "info", "when", "added_tokens")


class Refused(Exception): ...  # the argument is an error code, or None where the fault is told no closer


def full_name(u):  # section 2
    return f"{u['part']}.{u['target']}" if "part" in u else u["target"]


def need(*conditions, code=None):
    if not all(conditions):
        raise Refused(code)


def check(x, keys):  # a key's pattern is for its value in JSON, or for "" where it is absent
    need(all(re.fullmatch(keys.get(k, ".*" if "." in k else ""), json.dumps(x[k]) if k in x else "") for k in keys | x))


def parse(text):  # int() refuses NaN, encode() an unpaired surrogate
    need(np.cumsum([1 if c in "[{" else -1 for c in re.sub(rf'{TEXT}|[^][}}{{"]', "", text)]).max(initial=0) <= 16)
    unique = {"object_pairs_hook": lambda pairs: need(len(dict(pairs)) == len(pairs)) or dict(pairs)}
    return json.loads(json.dumps(json.loads(text, parse_constant=int, **unique), ensure_ascii=False).encode())


def container(path):  # the manifest, {} if there is none, and {name: (dtype, shape, float64 array)}
    raw = Path(path).read_bytes()
    n, end, tensors = 8 + int.from_bytes(raw[:8], "little"), 0, {}
    need(10 <= n <= 8 + 10**8, n <= len(raw), re.fullmatch(rb"(?s)\{.*\} *", raw[8:n]), code="E-HEADER")
    header = parse(raw[8:n].decode())
    meta = header.pop("__metadata__", {})
    need(re.fullmatch(TEXTS, json.dumps(meta)), all(len(t) == 3 for t in header.values()), code="E-HEADER")
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        check(t, {"dtype": TEXT, "shape": SIZES, "data_offsets": SIZES})
        dtype, shape, (start, stop) = t["dtype"], t["shape"], t["data_offsets"]
        array = np.frombuffer(raw[n + start : n + stop], NUMPY[dtype])
        need(start == end, stop - start == array.nbytes, array.size == np.prod(shape, dtype=object))
        array = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
        array = eight_bits(array, dtype) if dtype.startswith("F8") else array
        tensors[name], end = (dtype, shape, array.astype(float).reshape(shape)), stop
    need(n + end == len(raw), len(meta.get("loratool", "").encode()) <= 5 * 10**7)
    return parse(meta.get("loratool", "{}")), tensors


def eight_bits(raw, dtype):  # section 8: sign, exponent, fraction
    bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    exponent, fraction = (raw & 127) >> bits, (raw & (1 << bits) - 1).astype(float)
    value = np.ldexp(fraction + (exponent > 0) * 2.0**bits, np.maximum(exponent, 1).astype(int) - bias - bits)
    value[(raw & 127) >= (127 if bits == 3 else 124)] = np.nan
    return np.where(raw > 127, -value, value)


def values(x):  # of R-016
    return 1 + sum(map(values, x.values() if isinstance(x, dict) else x if isinstance(x, list) else []))


def update(u, group, prefix, tensors):  # ranges of two axes, and {component: (axes, array)}
    check(u, UPDATE)
    kind, shape, rank, rule = u.get("direction", u["kind"]), u["shape"], u.get("rank", 1), u.get("scaling")
    matrix, factor, packed = kind in ("lora", "loha", "lokr"), kind == "scale", len({"expert", "experts"} & u.keys())
    full, least = factor or "replace" in kind, max(packed + ("rows" in kind), u.get("axis", -1) + 1)
    lead, R, rows = shape[: "experts" in u], shape[packed:], u.get("rows", [0, 2**53])
    need(
        re.fullmatch(rb"[^\0-\x1f\x7f]{1,1024}", full_name(u).encode()),
        u["target"],
        np.prod(shape, dtype=object) <= 2**53,
    )
    need(not packed or (packed == 1 and u.get("expert", 0) < shape[0] == u.get("experts", shape[0])), code="E-RANGE")
    need("rows" not in u or rows[0] < rows[1] <= [*R, 0][0], "rows" not in kind or not PLACE.keys() & u)
    need(len(R) >= (2 if matrix else least), all(shape == v["shape"] for v, *_ in group))
    R[:1] = [min(rows[1], n) - rows[0] for n in R[:1]]
    parts = {n.rpartition(".")[2]: tensors.pop(n) for n in [*tensors] if n.rpartition(".")[0] == prefix}
    vector = f" {'factor' if factor else 'magnitude'}:{'nc'[u['axis']]}" if "axis" in u else ""
    [form] = [form + vector for form in FORMS[kind] if {*re.findall(r"(\w+):", form + vector)} == parts.keys()]
    low, dora, alpha, scale = "B" in form, u["kind"] == "dora", u.get("alpha", 0), u.get("scale", 0)
    need([key in u for key in SCALE] == [low, matrix and rule != "none", not full, not full, dora, dora or factor])
    scales = {None: 0, "none": scale, "alpha": alpha, "alpha/rank": alpha / rank, "alpha/sqrt(rank)": alpha / rank**0.5}
    need(rule in [*scales][: 2 + matrix + 2 * low], abs(scale - scales[rule]) <= abs(scales[rule]) / 2**40 < np.inf)
    sizes = {"R": R, "n": R[:1], "C": R[1:], "c": R[1:2], "K": R[2:]} | {axis: [rank] for axis in "rstu"}
    for name, axes in re.findall(r"(\w+):(\w+)", form):
        dtype, got, array = parts[name]
        need((dtype == "I64") == (name == "index"), array.size, np.isfinite(array).all())
        need(got == sum((sizes.setdefault(axis, got[i : i + 1]) for i, axis in enumerate(axes, len(lead))), lead))
        parts[name] = "e" + axes, array.reshape(*(lead or [1]), *got[len(lead) :][: len(axes) - 1], -1)
    need(kind != "lokr" or R[:2] == [sizes["a"][0] * sizes["b"][0], sizes["x"][0] * sizes["y"][0]])
    need("index" not in parts or (np.diff([-1, *parts["index"][1][0], shape[0]]) > 0).all(), 1 <= rank <= 65536)
    return ([[u.get("expert", 0), u.get("expert", 2**53) + 1], rows] if packed else [rows, [0, 2**53]]), parts


def read(path):
    """The manifest, and {target: [(update, ranges, components)]}."""
    try:
        (m, tensors), groups = container(path), {}
        check(m, MANIFEST)
        known = {*FORMS, "dora", "mid", *PLACE, "conditional"} - {"lora"}
        need(len({*m["features"]} & known) == len(m["features"]), ("when" in m) == ("conditional" in m["features"]))
        check(m.get("when", {}), WHEN)
        need("when" not in m or len(WHEN.keys() & m["when"]) == 1, len(m["updates"]) <= 200_000)
        check(m["base"], BASE)
        free = [m["base"], m.get("when", {}), *m["base"].get("tensors", {}).values(), *m["updates"], m]
        free += [part for t in m["base"].get("tensors", {}).values() for part in t.get("parts", {}).values()]
        need(sum(values(x[k]) for x in free for k in x if "." in k or k in FREE) <= 100_000, code="E-LIMIT")
        ordinals = Counter()
        for u in m["updates"]:
            group, name = groups.setdefault(full_name(u), []), u["target"]
            group.append((u, *update(u, group, f"{name}.{ordinals[name]}", tensors)))
            ordinals[name] += 1
            for v, ranges, _ in group[:-1]:
                kinds = u["kind"] + v["kind"]
                meet = all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(group[-1][1], ranges, strict=True))
                need(not meet or kinds.count("replace") == 1 or not re.search("dora|scale|re", kinds), code="E-OVERLAP")
        need(not tensors, code="E-COMPONENTS")
        for name, t in m["base"].get("tensors", {}).items():
            check(t, {**IDENTITY, "parts": r"(\{.+\})?"})
            need(t.get("parts") != {}, *(check(part, IDENTITY) is None for part in t.get("parts", {}).values()))
            new = any(u["kind"] == "replace" and not PLACE.keys() & u for u, *_ in groups[name])
            need(new or "parts" in t or t["shape"] == groups[name][0][0]["shape"], code="E-BASE")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Refused(None) from error
    return m, groups


def merge(w, dtype, steps):
    """A tensor of that dtype after a merge of [(update, ranges, components, weight)]."""
    for u, ranges, parts, weight in sorted(
        [s for s in steps if s[3]], key=lambda step: "replace" not in step[0]["kind"]
    ):
        at = parts["index"][1][0].astype(int) if "index" in parts else tuple(slice(*r) for r in ranges)[: w.ndim]
        axes, arrays = zip(*(part for name, part in parts.items() if name not in ("index", "magnitude")), strict=True)
        packed = len({"expert", "experts"} & u.keys())
        kept = {packed - 1, packed + u.get("axis", 0)}  # by a magnitude or a factor
        out = "".join(axis for axis in "enkabcxyCKR" if axis in str(axes))
        new = np.einsum(f"{','.join(axes)}->{out}", *arrays, optimize=True)
        along = [n if i in kept else 1 for i, n in enumerate(w[at].shape)]
        new = w[at] * new.reshape(along) if u["kind"] == "scale" else new.reshape(w[at].shape)
        new = w[at] + float(u["scale"]) * (1 if u["kind"] == "dora" else weight) * new if "scale" in u else new
        if u["kind"] == "dora":
            norm = np.sqrt((new * new).sum(tuple({*range(w.ndim)} - kept), keepdims=True))
            need(((norm > 0) & (norm < np.inf)).all(), code="E-NONFINITE")
            new *= parts["magnitude"][1].reshape(norm.shape) / norm
        w[at] = new if weight == 1 or u["kind"] in ("lora", "loha", "lokr", "add") else w[at] + weight * (new - w[at])
    digits, top = FLOATS[dtype]
    exponent = np.maximum(np.frexp(w)[1], 3 - top) - digits
    limit = np.nextafter(464, 465) if dtype == "F8_E4M3" else 2.0 ** (top - 1) * (2 - 2.0**-digits)
    need((np.abs(w) < limit).all(), code="E-NONFINITE")
    return np.ldexp(np.rint(np.ldexp(w, -exponent)), exponent)


if __name__ == "__main__":
    folder, passed, failed = Path(sys.argv[1]), [], []
    index = json.loads((folder / "manifest.json").read_text("utf-8"))
    for case in index["valid"] + [case for case in index["merge"] if "codes" not in case] + index["invalid"]:
        try:
            found = [(read(folder / a["file"])[1], a.get("weight", 1)) for a in case.get("adapters", [case])]
            base, wanted = (container(folder / case[key])[1] if key in case else {} for key in ("base", "merged"))
            right = case in index["valid"] + index["merge"] or case["also"] == ["R-055"]
            for name, (dtype, shape, array) in wanted.items():
                steps = [(*step, weight) for groups, weight in found for step in groups.get(name, [])]
                right &= np.array_equal(merge(np.resize(base.get(name, [0.0])[-1], shape), dtype, steps), array)
        except Refused as refused:
            right = refused.args[0] in (None, *case["codes"]) if "codes" in case else False
        (passed if right else failed).append(f"failed: {case['name']}")
    print(*failed, f"{len(passed)} passed, {len(failed)} failed", sep="\n")  # noqa: T201
    sys.exit(bool(failed))
