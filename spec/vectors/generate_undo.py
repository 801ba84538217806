"""Writes the test vectors of the undo record's blocks, undo-1.0/blocks.json.

    python generate_undo.py            write
    python generate_undo.py --check    compare what the frames hold; exit 1 with the names that differ

Compressed bytes depend on the version of zstd, so --check compares contents. Needs zstandard only.
"""
# ruff: noqa: T201 - a script that talks to its user

import json
import struct
import sys
from pathlib import Path

import zstandard

PLACE = Path(__file__).parent / "undo-1.0" / "blocks.json"
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
BOMB = 1 << 24


def code(bits, width):
    """Of an unsigned bit pattern: the signed, order-preserving integer; and `bits_of` back."""
    top = 1 << (8 * width - 1)
    return bits if bits < top else (bits ^ (top - 1)) - 2 * top


def bits_of(number, width):
    top = 1 << (8 * width - 1)
    return number if number >= 0 else (number + 2 * top) ^ (top - 1)


def plain(dtype, marks):
    """The three parts of a block. `marks`: element -> a difference, or ("literal", bits)."""
    gaps, differences, literals, next_one = b"", b"", b"", 0
    for n, mark in sorted(marks.items()):
        gap, next_one = n - next_one, n + 1
        gaps += b"\xff" * (gap // 255) + bytes([gap % 255])
        if isinstance(mark, tuple):
            differences += b"\x80"
            literals += mark[1].to_bytes(WIDTH[dtype], "little")
        else:
            differences += struct.pack("b", mark)
    return gaps, differences, literals


def restored(dtype, guess, marks):
    width, found = WIDTH[dtype], list(guess)
    for n, mark in marks.items():
        found[n] = mark[1] if isinstance(mark, tuple) else bits_of(code(guess[n], width) + mark, width)
    return found


def pack(content):
    return zstandard.ZstdCompressor(level=1).compress(content)


def unsized(content):
    """A frame that does not say how much it holds, and ends in a checksum."""
    return zstandard.ZstdCompressor(level=1, write_content_size=False, write_checksum=True).compress(content)


def block(m, literals, frames):
    return struct.pack("<IIII", m, literals, len(frames[0]), len(frames[1])) + b"".join(frames)


def block_of(dtype, marks, packer=pack):
    literals = sum(isinstance(mark, tuple) for mark in marks.values())
    return block(len(marks), literals, [packer(part) for part in plain(dtype, marks)])


def hexes(dtype, values):
    return " ".join(f"{value:0{2 * WIDTH[dtype]}x}" for value in values)


LONG = [0x3F80] * 600
VALID = {
    "nothing_marked": ("BF16", [0x3F80, 0xBF80, 0, 0x8000], {}),
    "one_up_one_down": ("BF16", [0x3F80, 0xBF80, 0x3F80, 0xBF80], {0: 1, 1: 1, 2: -1, 3: -1}),
    "across_zero": ("BF16", [0, 0x8000, 1, 0x8001], {0: -1, 1: 1, 2: -3, 3: 3}),
    "edges": ("F16", [0x3C00] * 9, {0: 127, 3: -127, 8: 1}),
    "ends_of_the_codes": ("BF16", [0x7FFE, 0xFFFE, 0x7FFF, 0xFFFF], {0: 1, 1: -1, 2: -127, 3: 127}),
    "literals_bf16": ("BF16", [0x3F80] * 3, {0: ("literal", 0x1234), 2: ("literal", 0xFF81)}),
    "literals_f16": ("F16", [0x3C00] * 3, {0: ("literal", 0x1234), 2: ("literal", 0xFC01)}),
    "literals_f32": ("F32", [0x3F800000, 0, 0xFF800000], {0: ("literal", 0x7FC00001), 1: -1, 2: ("literal", 1 << 31)}),
    "literals_f64": ("F64", [0x3FF0000000000000] * 10, {9: ("literal", 0x0102030405060708), 7: -5}),
    "all_literal": ("BF16", [0x3F80] * 2, {0: ("literal", 0), 1: ("literal", 0x8000)}),
    "empty": ("BF16", [], {}),
}
VALID |= {
    f"gap_{gap}": ("BF16", LONG, {gap: 1, gap + 1: -1, gap + 3: 2}) for gap in (253, 254, 255, 256, 509, 510, 511)
}
VALID |= {"gap_between": ("BF16", LONG, {3: 1, 3 + 1 + 255: -1, 599: ("literal", 0x0102)})}

ONE, GAPS, DIFFERENCES = bytes(1), b"\0\1", b"\x01\x80"
SOUND = {0: 1, 2: ("literal", 0x0708)}  # of 4 elements
PARTS = plain("BF16", SOUND)
FRAMES = [pack(part) for part in PARTS]
NAMES = ("gaps", "differences", "literals")


def changed(n, frame):
    return block(2, 1, [*FRAMES[:n], frame, *FRAMES[n + 1 :]])


def of(m, literals, *parts):
    return block(m, literals, [pack(part) for part in parts])


# Rule and block; of BF16 and four elements of 3f80, unless a guess is given.
INVALID = {
    "nothing": ("U-021", b""),
    "head_cut": ("U-021", block(2, 1, FRAMES)[:15]),
    "head_only": ("U-020", struct.pack("<IIII", 0, 0, 0, 0)),
    "first_frame_beyond": ("U-021", struct.pack("<IIII", 2, 1, 1000, 0) + b"".join(FRAMES)),
    "second_frame_beyond": ("U-021", struct.pack("<IIII", 2, 1, len(FRAMES[0]), 1 << 31) + b"".join(FRAMES)),
    "marks_above_elements": ("U-021", of(5, 0, bytes(5), b"\1" * 5, b"")),
    "literals_above_marks": ("U-021", of(0, 1, b"", b"", b"\7\0")),
    "gap_missing": ("U-022", of(2, 1, b"\0", DIFFERENCES, b"\7\0")),
    "gap_too_many": ("U-022", of(2, 1, b"\0\0\0", DIFFERENCES, b"\7\0")),
    "gaps_of_no_marks": ("U-022", of(0, 0, b"\0", b"", b"")),
    "long_gap_instead_of_mark": ("U-022", of(2, 0, b"\0\xff", b"\1\1", b""), LONG),
    "long_gaps_too_many": ("U-021", of(1, 0, b"\0" + b"\xff" * 3, b"\1", b""), LONG),
    "long_gap_of_no_marks": ("U-021", block(0, 0, [unsized(b"\xff"), pack(b""), pack(b"")])),
    "mark_beyond": ("U-022", of(1, 0, b"\4", b"\1", b"")),
    "second_mark_beyond": ("U-022", of(2, 0, b"\3\0", b"\1\1", b"")),
    "mark_beyond_a_long_gap": ("U-022", of(1, 0, b"\xff\xff\x5a", b"\1", b""), LONG),
    "difference_missing": ("U-021", of(2, 1, GAPS, b"\x80", b"\7\0")),
    "difference_too_many": ("U-021", of(2, 1, GAPS, b"\x80\1\1", b"\7\0")),
    "literal_missing": ("U-021", of(2, 1, GAPS, DIFFERENCES, b"")),
    "literal_cut": ("U-021", of(2, 1, GAPS, DIFFERENCES, b"\7")),
    "literal_too_many": ("U-021", of(2, 1, GAPS, DIFFERENCES, b"\7\0\7\0")),
    "literal_of_nobody": ("U-022", of(2, 1, GAPS, b"\1\1", b"\7\0")),
    "literal_uncounted": ("U-022", of(2, 0, GAPS, DIFFERENCES, b"")),
    "code_above": ("U-030", of(1, 0, ONE, b"\1", b""), [0x7FFF]),
    "code_far_above": ("U-030", of(1, 0, ONE, b"\x7f", b""), [0x7F82]),
    "code_below": ("U-030", of(1, 0, ONE, b"\xff", b""), [0xFFFF]),
    "code_far_below": ("U-030", of(1, 0, ONE, b"\x81", b""), [0xFF82]),
    "code_above_f32": ("U-030", of(1, 0, ONE, b"\1", b""), [(1 << 31) - 1], "F32"),
    "code_above_f64": ("U-030", of(1, 0, ONE, b"\1", b""), [(1 << 63) - 1], "F64"),
    "code_below_f64": ("U-030", of(1, 0, ONE, b"\x81", b""), [(1 << 64) - 1], "F64"),
    "gaps_and_differences_swapped": ("U-022", block(2, 1, [FRAMES[1], FRAMES[0], FRAMES[2]])),
    "differences_and_literals_swapped": ("U-021", block(2, 1, [FRAMES[0], FRAMES[2], pack(b"\x80")])),
    "one_frame_for_all": ("U-020", block(2, 1, [pack(b"".join(PARTS)), b"", b""])),
    "byte_after_an_empty_frame": ("U-020", block(1, 0, [pack(ONE), pack(b"\1"), pack(b"") + b"\0"])),
    "empty_frame_cut": ("U-020", block(1, 0, [pack(ONE), pack(b"\1"), pack(b"")[:-1]])),
    "two_empty_frames": ("U-020", block(1, 0, [pack(ONE), pack(b"\1"), pack(b"") * 2])),
}
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip"
for n, name in enumerate(NAMES):
    INVALID |= {
        f"{name}_no_frame": ("U-020", changed(n, bytes(12))),
        f"{name}_no_bytes": ("U-020", changed(n, b"")),
        f"{name}_frame_cut": ("U-020", changed(n, FRAMES[n][:-1])),
        f"{name}_two_frames": ("U-020", changed(n, FRAMES[n] * 2)),
        f"{name}_byte_after_frame": ("U-020", changed(n, FRAMES[n] + b"\0")),
        f"{name}_skippable_frame_before": ("U-020", changed(n, SKIPPABLE + FRAMES[n])),
        f"{name}_with_a_dictionary": ("U-020", changed(n, FRAMES[n][:4] + b"\x21\x01" + FRAMES[n][5:])),
        f"{name}_bomb": ("U-023", changed(n, pack(bytes(BOMB)))),
        f"{name}_bomb_of_no_size": ("U-023", changed(n, unsized(bytes(BOMB)))),
        f"{name}_claims_2_to_60": ("U-023", changed(n, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<QBH", 1 << 60, 1, 0))),
        # A window of 128 MiB, a content of 0 bytes, 128 times 2^17 zeros.
        f"{name}_claims_nothing": (
            "U-023",
            changed(n, b"\x28\xb5\x2f\xfd\x80\x88" + bytes(4) + b"\x02\0\x10\0" * 128 + b"\1\0\0"),
        ),
    }


def build():
    def good(name, dtype, guess, content, found):
        return {
            "name": name,
            "dtype": dtype,
            "guess": hexes(dtype, guess),
            "block": content.hex(),
            "restored": hexes(dtype, found),
        }

    valid = [
        good(name, dtype, guess, block_of(dtype, marks), restored(dtype, guess, marks))
        for name, (dtype, guess, marks) in VALID.items()
    ]
    guess = [0x3F80] * 4
    valid += [
        good("frames_of_no_size", "BF16", guess, block_of("BF16", SOUND, unsized), restored("BF16", guess, SOUND)),
        # 600 elements may have two bytes more than marks; what stands after the last mark is idle.
        good(
            "long_gaps_after_the_last_mark",
            "BF16",
            LONG,
            of(1, 0, b"\3\xff\xff", b"\1", b""),
            restored("BF16", LONG, {3: 1}),
        ),
    ]

    def bad(name, rule, content, guess=(0x3F80,) * 4, dtype="BF16"):
        facts = {"dtype": dtype, "guess": hexes(dtype, guess), "block": content.hex()}
        return {"name": name, "rule": rule, "code": "E-UNDO", **facts}

    invalid = [bad(name, *case) for name, case in INVALID.items()]
    return {"format": "loratool-undo", "version": "1.0", "valid": valid, "invalid": invalid}


def content(case):
    """A case with the contents of its frames in place of them, where they are sound."""
    data = bytes.fromhex(case["block"])
    if len(data) < 16:
        return case
    m, literals, first, second = struct.unpack_from("<IIII", data)
    frames = data[16 : 16 + first], data[16 + first : 16 + first + second], data[16 + first + second :]
    found = [m, literals]
    for frame in frames:
        try:
            found.append(zstandard.ZstdDecompressor().decompress(frame, max_output_size=BOMB, allow_extra_data=False))
        except (zstandard.ZstdError, MemoryError, ValueError):
            found.append("not one frame")
    return {**case, "block": found}


def main():
    made = build()
    if "--check" not in sys.argv[1:]:
        PLACE.parent.mkdir(exist_ok=True)
        PLACE.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    kept = json.loads(PLACE.read_text())
    differ = [
        one["name"]
        for part in ("valid", "invalid")
        for one, two in zip(made[part], kept[part], strict=True)
        if content(one) != content(two)
    ]
    print("\n".join(differ) or f"{len(made['valid']) + len(made['invalid'])} blocks are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
