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


def code(bits, width):
    """Of an unsigned bit pattern: the signed, order-preserving integer; and `bits_of` back."""
    top = 1 << (8 * width - 1)
    return bits if bits < top else (bits ^ (top - 1)) - 2 * top


def bits_of(number, width):
    top = 1 << (8 * width - 1)
    return number if number >= 0 else (number + 2 * top) ^ (top - 1)


def plain(dtype, guess, marks):
    """`marks`: element -> a difference, or ("literal", bits)."""
    width, mask, differences, literals = WIDTH[dtype], bytearray((len(guess) + 7) // 8), b"", b""
    for n, mark in sorted(marks.items()):
        mask[n // 8] |= 0x80 >> n % 8
        if isinstance(mark, tuple):
            differences += b"\x80"
            literals += mark[1].to_bytes(width, "little")
        else:
            differences += struct.pack("b", mark)
    return struct.pack("<II", len(marks), len(literals) // width) + mask + differences + literals


def restored(dtype, guess, marks):
    width, found = WIDTH[dtype], list(guess)
    for n, mark in marks.items():
        found[n] = mark[1] if isinstance(mark, tuple) else bits_of(code(guess[n], width) + mark, width)
    return found


def hexes(dtype, values):
    return [f"{value:0{2 * WIDTH[dtype]}x}" for value in values]


VALID = {
    "nothing_marked": ("BF16", [0x3F80, 0xBF80, 0, 0x8000], {}),
    "one_up_one_down": ("BF16", [0x3F80, 0xBF80, 0x3F80, 0xBF80], {0: 1, 1: 1, 2: -1, 3: -1}),
    "across_zero": ("BF16", [0, 0x8000, 1, 0x8001], {0: -1, 1: 1, 2: -3, 3: 3}),
    "edges": ("F16", [0x3C00] * 9, {0: 127, 3: -127, 8: 1}),
    "literals": ("F32", [0x3F800000, 0, 0xFF800000], {0: ("literal", 0x7FC00001), 1: -1, 2: ("literal", 0x80000000)}),
    "wide": ("F64", [0x3FF0000000000000] * 10, {9: ("literal", 1), 7: -5}),
    "empty": ("BF16", [], {}),
}
SOUND = plain("BF16", [0x3F80] * 4, {0: 1, 2: ("literal", 7)})
INVALID = {
    "empty_content": ("U-021", b""),
    "cut": ("U-021", SOUND[:-1]),
    "longer": ("U-021", SOUND + b"\0"),
    "more_marks_than_mask": ("U-022", struct.pack("<II", 2, 0) + b"\x80\x01\x01"),
    "fewer_literals": ("U-022", struct.pack("<II", 2, 1) + b"\xc0\x01\x01\x07\0"),
    "literals_above_marks": ("U-021", struct.pack("<II", 0, 1) + b"\0\x07\0"),
}
BOMB = 1 << 24


def build():
    pack = zstandard.ZstdCompressor(level=1).compress
    valid = [
        {
            "name": name,
            "dtype": dtype,
            "guess": hexes(dtype, guess),
            "block": pack(plain(dtype, guess, marks)).hex(),
            "restored": hexes(dtype, restored(dtype, guess, marks)),
        }
        for name, (dtype, guess, marks) in VALID.items()
    ]

    def bad(name, rule, block):
        guess = hexes("BF16", [0x3F80] * 4)
        return {"name": name, "rule": rule, "code": "E-UNDO", "dtype": "BF16", "guess": guess, "block": block.hex()}

    invalid = [bad(name, rule, pack(content)) for name, (rule, content) in INVALID.items()]
    frame = pack(SOUND)
    invalid += [
        bad("no_frame", "U-020", b"\0" * 12),
        bad("frame_cut", "U-020", frame[:-1]),
        bad("two_frames", "U-020", frame * 2),
        bad("byte_after_frame", "U-020", frame + b"\0"),
        bad("bomb", "U-023", pack(bytes(BOMB))),
        bad("claims_2_to_60", "U-023", b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\0\0"),
    ]
    return {"format": "loratool-undo", "version": "1.0", "valid": valid, "invalid": invalid}


def content(case):
    block = bytes.fromhex(case["block"])
    try:
        unpacked = zstandard.ZstdDecompressor().decompress(block, max_output_size=BOMB, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError, ValueError):
        return {**case, "block": "not one frame"}
    return {**case, "block": unpacked}


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
