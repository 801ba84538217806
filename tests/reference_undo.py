"""Undo records decoded from `spec/UNDO.md` alone, in numpy: `restore(merged, adapters, record)` gives the base's bytes.

Read next to the document: no speed, whole files in memory; lora, add, scale, and dora of lora, with rows and experts.
Digests and the checks of the manifest are left out; `block` checks all that it must.
"""

import json
import struct

import numpy as np
import zstandard

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
LAYOUT = {"F32": (24, -149, 128), "F16": (11, -24, 16), "BF16": (8, -133, 128)}  # digits, smallest exponent, limit


def need(condition, rule):
    if not condition:
        raise ValueError(rule)


def container(path):  # the metadata, and every tensor's dtype and stored numbers
    data, found = path.read_bytes(), {}
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    meta = header.pop("__metadata__", {})
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        content = np.frombuffer(data[end + start : end + stop], STORED[entry["dtype"]])
        found[name] = entry["dtype"], content.reshape(entry["shape"])
    return meta, found


def widened(dtype, stored):  # numbers in binary64
    return ((stored.astype("<u4") << 16).view("<f4") if dtype == "BF16" else stored).astype(np.float64)


def rounded(x, dtype):  # section 4, step 1: the bits of the nearest numbers of a dtype
    if dtype == "F64":
        return x.copy().view("<i8")
    digits, smallest, limit = LAYOUT[dtype]
    step = np.maximum(np.frexp(x)[1] - digits, smallest)
    near = np.ldexp(np.rint(np.ldexp(x, -step)), step)  # exact but for the rint, which takes ties to even
    near = np.where(np.abs(near) < 2.0**limit, near, np.copysign(np.inf, near))
    if dtype == "BF16":
        return (near.astype("<f4").view("<u4") >> 16).astype("<u2").view("<i2")
    return near.astype(STORED[dtype]).view(STORED[dtype].replace("f", "i"))


def code(b):
    return np.where(b >= 0, b, b ^ np.iinfo(b.dtype).max).astype(b.dtype)


def frame(data, least, most):  # U-020, U-021, U-023
    codec = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    content = codec.stream_reader(data, read_size=1).read(most + 1)
    need(least <= len(content) <= most, "U-021")
    whole = codec.decompressobj()
    need(whole.decompress(data) == content and whole.eof and not whole.unused_data, "U-020")
    return content


def block(content, g):  # sections 3 and 4: the stored bits of a block, from their prediction
    n, w, limits = g.size, g.itemsize, np.iinfo(g.dtype)
    need(len(content) >= 16, "U-021")
    m, l, first, second = struct.unpack_from("<IIII", content)  # noqa: E741 - as in the document
    need(l <= m <= n and 16 + first + second <= len(content), "U-021")
    gaps = frame(content[16 : 16 + first], m, m + n // 255)
    differences = frame(content[16 + first : 16 + first + second], m, m)
    literals = iter(np.frombuffer(frame(content[16 + first + second :], l * w, l * w), g.dtype))
    need(m == sum(gap != 255 for gap in gaps) and l == differences.count(b"\x80"), "U-022")
    found, codes, at, steps = g.copy(), code(g), 0, iter(struct.unpack(f"{m}b", differences))
    for gap in gaps:
        at += gap
        if gap != 255:
            need(at < n, "U-022")
            step = next(steps)
            moved = int(codes[at]) + step
            need(step == -128 or limits.min <= moved <= limits.max, "U-030")
            found[at] = next(literals) if step == -128 else code(np.array(moved, g.dtype))
            at += 1
    return found


def restore(merged, adapters, record):
    (meta, stored), (_, tensors), found, updates = container(record), container(merged), {}, {}
    for path, weight in adapters:
        (manifest, parts), counts = container(path), {}
        for u in json.loads(manifest["loratool"])["updates"] if weight else ():
            counts[u["target"]] = n = counts.get(u["target"], -1) + 1
            own = {name: part for name, part in parts.items() if name.rpartition(".")[0] == f"{u['target']}.{n}"}
            own = {name.rpartition(".")[2]: widened(*part) for name, part in own.items()}
            updates.setdefault(u["target"], []).append((weight, u, own))
    for name, entry in json.loads(meta["loratool.undo"])["tensors"].items():
        steps = sorted(updates.get(name, []), key=lambda step: "axis" in step[1])  # the sort is stable
        packed = any("expert" in u or "experts" in u for _, u, _ in steps)
        count, rows = entry["shape"][:2] if packed else (1, [*entry["shape"], 1][0])
        norms = (stored[f"{name}.norm.{n}"][1] for n in range(entry["norms"]))
        blocks, sizes, (dtype, whole) = stored[f"{name}.blocks"][1].tobytes(), iter(entry["blocks"]), tensors[name]
        found[name] = b""
        for matrix, stored_bits in enumerate(whole.reshape(count, rows, -1) if whole.size else ()):
            touching = [step for step in steps if step[1].get("expert", matrix) == matrix]
            kept, x = [next(norms) for step in touching if step[1]["kind"] == "dora"], widened(dtype, stored_bits)
            for w, u, c in reversed(touching):
                c = {part: a[matrix] for part, a in c.items()} if "experts" in u else c
                p = x[slice(*u.get("rows", (0, rows)))]  # a view
                delta = c["value"] if "value" in c else c["B"] @ c["A"].reshape(len(c["A"]), -1) if "B" in c else 0 * p
                delta = u.get("scale", 0) * delta.reshape(p.shape)
                f = c["magnitude"] / kept.pop() if u["kind"] == "dora" else c.get("factor", np.ones(1))
                f = f[:, None] if u.get("axis") == 0 else np.repeat(f, p.shape[1] // len(f))
                d = (1 - w) + w * f if "axis" in u else 1.0
                with np.errstate(all="ignore"):  # where d is 0 a literal stands
                    p[:] = p / d - (w * f / d) * delta
            same = not touching and dtype == entry["dtype"]
            g = stored_bits.view(f"<i{stored_bits.itemsize}") if same else rounded(x, entry["dtype"])
            for start in range(0, rows, entry["height"]):
                content, blocks = np.split(np.frombuffer(blocks, "u1"), [next(sizes)])
                found[name] += block(content.tobytes(), g[start : start + entry["height"]].reshape(-1)).tobytes()
    return found
