"""The vectors catch programs that are nearly right: the reference reader with one fault at a time fails one of them.

First the faults that programs have had, by hand; then every check of the reader taken out. What no vector can tell
apart is listed, with the reason.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import loratool

SPEC = Path(__file__).parent.parent / "spec"
FOLDER = SPEC / "vectors" / "1.0"
SOURCE = (SPEC / "reference_reader.py").read_text(encoding="utf-8")
INDEX = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
MERGED = [case for case in INDEX["merge"] if "codes" not in case]
TOO_LARGE = [case for case in INDEX["merge"] if case.get("codes") == ["E-NONFINITE"]]
OPENED = {case["name"] for case in INDEX["invalid"] if case["also"] == ["R-055"]}  # by a reader


def program(source: str | ast.Module) -> ModuleType:
    module = ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def merged(reader: Any, case: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The name, the result and the wanted result of every tensor; wanted is None where a merge is to be refused."""
    adapters = case.get("adapters", [case])
    found = [(reader.read(FOLDER / each["file"])[1], each.get("weight", 1)) for each in adapters]
    base = reader.container(FOLDER / case["base"])[1] if "base" in case else {}
    wanted = reader.container(FOLDER / case["merged"])[1] if "merged" in case else {}
    names = wanted if "merged" in case else {name: base[name] for groups, _ in found for name in groups}
    for name, (dtype, shape, array) in names.items():
        steps = [(*step, weight) for groups, weight in found for step in groups.get(name, [])]
        start = np.resize(base.get(name, [0.0])[-1], shape)
        yield name, reader.merge(start, dtype, steps), array if "merged" in case else None


def fails(reader: Any, case: dict[str, Any]) -> bool:
    """Whether a program is seen to be wrong by one vector."""
    try:
        if case in INDEX["valid"] and "merged" not in case:
            reader.read(FOLDER / case["file"])
            return False
        if case in INDEX["valid"] or case in MERGED:
            return not all(np.array_equal(result, wanted) for _, result, wanted in merged(reader, case))
        if case in TOO_LARGE:
            list(merged(reader, case))
        else:
            reader.read(FOLDER / case["file"])
    except reader.Refused as refused:
        return refused.args[0] not in (None, *case["codes"]) if "codes" in case else True
    except Exception:
        return True
    return "codes" in case and case["name"] not in OPENED


CASES = [*INDEX["valid"], *MERGED, *TOO_LARGE, *INDEX["invalid"]]


def seen(source: str | ast.Module, among: tuple[str, ...] = ()) -> list[str]:
    """The vectors that fail: the first one, or all of those that are asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mutant may divide by zero on its way
        reader = program(source)
        cases = [case for case in CASES if case["name"] in among] if among else CASES
        failing = (case["name"] for case in cases if fails(reader, case))
        return [*failing] if among else [name for name in [next(failing, "")] if name]


def test_the_reader_as_it_is_passes() -> None:
    assert not seen(SOURCE)


# --- faults that programs have had ----------------------------------------------------------------------------------

FIRST = "    for u, ranges, parts, weight in sorted(\n        [s for"
LAST = "    return np.ldexp(np.rint(np.ldexp(w, -exponent)), exponent)\n"
LOADS = "json.loads(text, parse_constant=int, **unique)"
FAULTS = {
    "subnormal results are flushed": (
        LAST,
        "    w = np.where(np.frexp(w)[1] < 3 - top, 0.0, w)\n" + LAST,
        ("subnormal_f16", "subnormal_bf16", "subnormal_f32", "subnormal_f64"),
    ),
    "subnormals of the base are flushed": (
        FIRST,
        "    w = np.where(np.frexp(w)[1] < 3 - FLOATS[dtype][1], 0.0, w)\n" + FIRST,
        ("subnormal_f16", "subnormal_bf16", "subnormal_f32"),
    ),
    "scale is computed again from alpha": (
        'float(u["scale"])',
        'float(u["alpha"] / u["rank"] if u.get("scaling") == "alpha/rank" else u["scale"])',
        ("scale_as_stored",),
    ),
    "scale is taken as alpha": ('float(u["scale"])', 'float(u.get("alpha", u["scale"]))', ("lora_linear",)),
    "results are 2^-20 off": (LAST, "    w = w * (1 + 2.0**-20)\n" + LAST, ("lora_conv", "scale_as_stored")),
    "rounded towards zero": (LAST, LAST.replace("np.rint", "np.trunc"), ("lora_linear",)),
    "rounded half up": (
        LAST,
        LAST.replace("np.rint(np.ldexp(w, -exponent))", "np.floor(np.ldexp(w, -exponent) + 0.5)"),
        ("fp8_e4m3",),
    ),
    "the weight of a dora is taken as 1": (
        "weight * (new - w[at])",
        "(new - w[at])",
        ("weight_two_dora", "weight_dora"),
    ),
    "shapes of one target differ": (
        'all(shape == v["shape"] for v, *_ in group)',
        "True",
        ("shapes_of_one_target", "shapes_of_one_target_less"),
    ),
    "control characters in JSON": (
        LOADS,
        LOADS.replace("parse_constant", "strict=False, parse_constant"),
        ("manifest_control", "manifest_tab"),
    ),
    "leading zeros in JSON": (
        LOADS,
        LOADS.replace("(text,", r'(re.sub(r"(?<=[\[:,])0+(?=\d)", "", text),'),
        ("manifest_rank_leading_zero", "header_leading_zero"),
    ),
    "trailing commas in JSON": (
        LOADS,
        LOADS.replace("(text,", r'(re.sub(r",(?=[\]}])", "", text),'),
        ("manifest_trailing_comma", "manifest_array_comma", "header_trailing_comma"),
    ),
    "a depth of 15 is the deepest": (".max(initial=0) <= 16)", ".max(initial=0) <= 15)", ("depth_sixteen",)),
    "a depth of 17 as well": (".max(initial=0) <= 16)", ".max(initial=0) <= 17)", ("manifest_deep",)),
    "no minor above 9": (r"1\.(0|[1-9]\d*)", r"1\.\d", ("minor_ten",)),
    "only the minor 0": (r"1\.(0|[1-9]\d*)", r"1\.0", ("minor_ten", "higher_minor")),
    "any major version": (r'"1\.(0|', r'"\d\.(0|', ("major_two",)),
    "an infinite alpha": ("/ 2**40 < np.inf", "/ 2**40", ("alpha_infinite",)),
    "scale is held to 2^-30 of alpha only": ("/ 2**40", "/ 2**30", ("scale_far",)),
    "scale must be alpha/rank to the bit": (
        "<= abs(scales[rule]) / 2**40",
        "<= abs(scales[rule]) / 2**60",
        ("scale_as_stored", "scale_tolerance"),
    ),
    "rows and experts never meet": (
        "meet = all(",
        "meet = all(a == b for a, b in zip(group[-1][1], ranges)) and all(",
        ("rows_meet_expert",),
    ),
    "rows meet whatever expert they are of": (
        "for a, b in zip(group[-1][1], ranges, strict=True))",
        "for a, b in [*zip(group[-1][1], ranges, strict=True)][-1:])",
        ("rows_beside_expert",),
    ),
    "a dora beside others": ('"dora|scale|re"', '"scale|re"', ("dora_and_lora", "dora_twice")),
    "largest numbers are infinite": (
        "(2 - 2.0**-digits)",
        "(2 - 2.0 ** (1 - digits))",
        ("largest_f16", "largest_bf16", "largest_f32"),
    ),
    "numbers beyond the largest saturate": (
        '    need((np.abs(w) < limit).all(), code="E-NONFINITE")\n',
        "    w = np.clip(w, -np.nextafter(limit, 0), np.nextafter(limit, 0))\n",
        ("refused_beyond_f16", "refused_beyond_bf16", "refused_beyond_f32", "refused_fp8_beyond", "refused_overflow"),
    ),
    "E4M3 has infinities": ('if dtype == "F8_E4M3" else', 'if dtype == "none" else', ("fp8_e4m3",)),
    "more elements than 2^53": ("np.prod(shape, dtype=object) <= 2**53", "True", ("shape_product_experts",)),
    "2^53 elements are too many": (
        "np.prod(shape, dtype=object) <= 2**53",
        "np.prod(shape, dtype=object) < 2**53",
        ("shape_product_limit",),
    ),
    "a part without a target": ('        u["target"],\n', "", ("part_without_target",)),
    "a tensor's entry has any dotted key": ("all(len(t) == 3 for t in header.values())", "True", ("entry_dotted_key",)),
    "more experts than there are": (
        '< shape[0] == u.get("experts", shape[0])',
        '< shape[0] <= u.get("experts", shape[0])',
        ("experts_more",),
    ),
    "unknown features are opened": (
        'len({*m["features"]} & known) == len(m["features"])',
        "True",
        ("feature_unknown",),
    ),
    "unknown keys are opened": (
        'keys.get(k, ".*" if "." in k else "")',
        'keys.get(k, ".*")',
        ("key_in_manifest", "key_in_update", "key_in_base"),
    ),
    "dotted keys are refused": ('keys.get(k, ".*" if "." in k else "")', 'keys.get(k, "")', ("vendor_keys",)),
    "JSON names may repeat": (
        "need(len(dict(pairs)) == len(pairs)) or dict(pairs)",
        "dict(pairs)",
        ("duplicate_manifest_key", "duplicate_escaped_key"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    old, new, vectors = FAULTS[fault]
    assert SOURCE.count(old) >= 1, "the reader has no such line any more"
    known = {case["name"] for case in CASES}
    assert known.issuperset(vectors)
    assert seen(SOURCE.replace(old, new), vectors) == [case["name"] for case in CASES if case["name"] in vectors]


# --- every check ----------------------------------------------------------------------------------

# What no vector can tell from the reader as it is, and why: text of the condition, as `ast.unparse` has it.
REDUNDANT = {
    "10 <= n <= 8 + 10 ** 8": "a vector over 100 MB; a header of one byte is no object either",
    "n <= len(raw)": "then the data of the first tensor is missing as well",
    "len(meta.get('loratool', '').encode()) <= 5 * 10 ** 7": "a vector over 50 MB",
    "len(m['updates']) <= 200000": "a vector over 20 MB",
    "sum((values(x[k]) for x in free for k in x if '.' in k or k in FREE)) <= 100000": "tested below, not a file",
    "stop - start == array.nbytes": "then the array can not have the shape's size",
    "array.size == np.prod(shape, dtype=object)": "then it can not be brought to its shape",
    "(dtype == 'I64') == (name == 'index')": "an index of fractions can not take rows",
    "array.size": "a rank of 0 is refused, and so is a shape with one",
    "1 <= rank <= 65536": "factors of rank 65536 take vectors of 256 kB; rank 0 has no elements",
    "t.get('parts') != {}": "the pattern of `parts` asks for one member",
    "((norm > 0) & (norm < np.inf)).all()": "what is divided by such a norm is no number that the dtype has",
    "len(R) >= (2 if matrix else least)": "the axes of the factors say the same",
}


def conditions(tree: ast.AST) -> list[tuple[ast.Call, int]]:
    """Every condition that the reader needs."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    needed = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "need"]
    return [(call, place) for call in needed for place in range(len(call.args))]


def test_every_check_of_the_reader_is_seen_when_it_is_gone() -> None:
    silent = set()
    for number in range(len(conditions(ast.parse(SOURCE)))):
        tree = ast.parse(SOURCE)
        call, place = conditions(tree)[number]
        text = ast.unparse(call.args[place])
        call.args[place] = ast.Constant(True)
        if not seen(ast.fix_missing_locations(tree)):
            silent.add(text)
    assert silent == REDUNDANT.keys()


@pytest.mark.parametrize(("count", "fits"), [(99_000, True), (100_001, False)])
def test_free_values_are_counted(count: int, fits: bool, tmp_path: Path) -> None:
    """R-016, with a file that is not worth keeping."""
    raw = (FOLDER / "valid" / "info.lora.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    manifest = json.loads(header["__metadata__"]["loratool"])
    manifest["info"]["training"] = {"loss": [0] * count}
    header["__metadata__"]["loratool"] = json.dumps(manifest, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "many.lora.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    reader = program(SOURCE)
    for read, refusal in ((reader.read, reader.Refused), (loratool.load, loratool.LoratoolError)):
        if fits:
            read(path)
        else:
            with pytest.raises(refusal, match="E-LIMIT"):
                read(path)
