"""The reference reader's container: safetensors and JSON read strictly (R-001 to R-006, R-010)."""

import json
import math
import re
from pathlib import Path

import numpy as np

SIZES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {dtype: bits for bits, names in SIZES.items() for dtype in names.split()}


class Refused(Exception):
    """An adapter or a merge that the format refuses, with the code of FORMAT.md."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code


def need(ok, code):
    if not ok:
        raise Refused(code)


def is_a(x, kind):
    """Whether x has the JSON type: every list here holds integers, and true is no number."""
    if kind is list:
        return isinstance(x, list) and all(type(i) is int for i in x)
    return isinstance(x, kind) and type(x) is not bool


def known(obj, keys):
    need(all(key in keys or "." in key for key in obj), "E-UNKNOWN-KEY")


def parse(text, code):
    """A JSON object without duplicate names, NaN, unpaired surrogates or deep nesting."""
    depth = deepest = 0
    for bracket in re.findall(r"[][}{]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    need(deepest <= 16, "E-LIMIT")

    def pairs(items):
        need(len(dict(items)) == len(items), "E-DUPLICATE")
        return dict(items)

    def integer(digits):
        return int(digits) if len(digits) < 20 else float(digits)

    try:
        hooks = {"object_pairs_hook": pairs, "parse_int": integer}
        value = json.loads(text, **hooks, parse_constant=lambda name: 1 / 0)
        json.dumps(value, ensure_ascii=False).encode()  # fails on an unpaired surrogate
    except (ValueError, ZeroDivisionError):
        raise Refused(code) from None
    need(isinstance(value, dict), code)
    return value


def container(path):
    """The manifest's text, and the tensors as {name: (dtype, shape, bytes)}."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    need(len(raw) >= 8 and 2 <= n <= 100_000_000 and 8 + n <= len(raw), "E-HEADER")
    text, data = raw[8 : 8 + n].decode(errors="replace"), raw[8 + n :]
    need(text.encode() == raw[8 : 8 + n], "E-HEADER")
    need(re.fullmatch(r"\{.*\} *", text, re.DOTALL), "E-HEADER")
    header = parse(text, "E-HEADER")
    meta = header.pop("__metadata__", {})
    need(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()), "E-HEADER")
    for t in header.values():
        need(isinstance(t, dict) and set(t) == {"dtype", "shape", "data_offsets"}, "E-HEADER")
        need(isinstance(t["dtype"], str), "E-HEADER")
        need(is_a(t["shape"], list) and is_a(t["data_offsets"], list), "E-HEADER")
        need(len(t["data_offsets"]) == 2, "E-HEADER")
        need(all(0 <= i <= 2**53 for i in t["shape"] + t["data_offsets"]), "E-HEADER")
    tensors, end = {}, 0
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = t["data_offsets"]
        bits = BITS.get(t["dtype"])
        need(bits and (stop - begin) * 8 == math.prod(t["shape"]) * bits, "E-TENSOR")
        need(begin == end, "E-LAYOUT")
        tensors[name] = t["dtype"], t["shape"], data[begin:stop]
        end = stop
    need(end == len(data), "E-LAYOUT")
    return meta.get("loratool", ""), tensors


def numbers(dtype, shape, data):
    """The values of a tensor: int64 for I64, float64 for the four float dtypes."""
    stored = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}[dtype]
    flat = np.frombuffer(data, stored)
    if dtype == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(shape) if dtype == "I64" else flat.astype(float).reshape(shape)
