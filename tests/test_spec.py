"""The specification agrees with itself, and loratool agrees with the specification.

FORMAT.md, its schema, the vectors and the reference reader are checked against each other first; the
tests at the end run the library over the same vectors.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors import safe_open

SPEC = Path(__file__).parent.parent / "spec"
VECTORS = SPEC / "vectors" / "1.0"
FORMAT = (SPEC / "FORMAT.md").read_text(encoding="utf-8")
INDEX = json.loads((VECTORS / "manifest.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((SPEC / "schema" / "manifest-1.schema.json").read_text(encoding="utf-8"))

VALID, MERGES, INVALID = INDEX["valid"], INDEX["merge"], INDEX["invalid"]
AS_MERGE = [{**case, "adapters": [{"file": case["file"], "weight": 1}]} for case in VALID if "merged" in case]
REFUSED = [case for case in MERGES if "codes" in case]
GOOD = AS_MERGE + [case for case in MERGES if "codes" not in case]

sys.path.insert(0, str(SPEC))  # the reference reader is a script, no package
import reference_reader as reference  # noqa: E402 - needs the line above

KINDS = {*reference.FORMS, "dora"}


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def rules():
    """{id: (duty, text)} of FORMAT.md: a rule is a list item that starts with its id."""
    found = re.findall(r"^- \*\*(R-\d{3})\*\* ([RVW])\. (.*?)(?=^- \*\*|^$)", FORMAT, re.M | re.S)
    ids = [rule for rule, _, _ in found]
    assert len(set(ids)) == len(ids)
    return {rule: (duty, text) for rule, duty, text in found}


def table(heading):
    """The rows of the first table after a heading, as lists of cells."""
    text = FORMAT.split(heading, 1)[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def cited():
    """Every rule id of the manifest of vectors."""
    several = [rule for case in VALID + MERGES for rule in case["rules"]]
    return {*several, *(case["rule"] for case in INVALID), *(r for c in INVALID for r in c["also"])}


# ---------------------------------------------------------------- generator and reference reader


def test_vectors_are_what_the_generator_writes():
    done = run(SPEC / "vectors" / "generate.py", "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name",
    ["FORMAT.md", "vectors/1.0/manifest.json", "vectors/1.0/invalid/hole.lora.safetensors", "new"],
)
def test_generator_check_names_what_differs(tmp_path, name):
    copy = shutil.copytree(SPEC, tmp_path / "spec")
    path = copy / name if name != "new" else copy / "vectors" / "1.0" / "valid" / "new.json"
    before = path.read_bytes() if path.exists() else b""
    # the last digit of the worked example lies inside the part of FORMAT.md that is generated
    at = before.rfind(b'"version":"1.0"') if name == "FORMAT.md" else len(before) - 1
    path.write_bytes(before[:at] + b"!" + before[at + 1 :])
    done = run(copy / "vectors" / "generate.py", "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"differs: {path.relative_to(copy)}"]


def test_generator_writes_what_it_checks(tmp_path):
    copy = shutil.copytree(SPEC, tmp_path / "spec")
    shutil.rmtree(copy / "vectors" / "1.0" / "valid")
    (copy / "vectors" / "1.0" / "left-over").write_bytes(b"")
    assert run(copy / "vectors" / "generate.py").returncode == 0
    assert run(copy / "vectors" / "generate.py", "--check").returncode == 0


def test_reference_reader_passes_all_vectors():
    done = run(SPEC / "reference_reader.py", VECTORS)
    judged = len(VALID) + len(MERGES) - len(REFUSED) + len(INVALID)
    assert done.stdout.splitlines() == [f"{judged} passed, 0 failed"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("valid", {"merged": "valid/loha.merged.safetensors"}),
        ("merge", {"merged": "valid/lora_linear.merged.safetensors"}),
        ("invalid", {"codes": ["E-OTHER"]}),
        ("invalid", {"file": "valid/loha.lora.safetensors"}),
    ],
)
def test_reference_run_notices_a_wrong_vector(tmp_path, kind, change):
    copy = shutil.copytree(VECTORS, tmp_path / "1.0")
    index = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    index[kind][0].update(change)
    (copy / "manifest.json").write_text(json.dumps(index), encoding="utf-8")
    done = run(SPEC / "reference_reader.py", copy)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(" passed, 1 failed")
    assert done.stdout.startswith(f"failed: {index[kind][0]['name']}\n")


def imports_of(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    direct = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    return direct | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_reference_reader_is_one_short_file_that_needs_numpy_only():
    assert len((SPEC / "reference_reader.py").read_text(encoding="utf-8").splitlines()) <= 200
    used = {module.split(".")[0] for module in imports_of(SPEC / "reference_reader.py")}
    assert used - set(sys.stdlib_module_names) == {"numpy"}
    assert [path.name for path in SPEC.glob("*.py")] == ["reference_reader.py"]


@by_name(INVALID)
def test_reference_reader_refuses_what_a_reader_must(case):
    """The refusal is a duty; a code only where it costs the reader nothing, but then it is the right one."""
    if case["also"] == ["R-055"]:
        assert reference.read(VECTORS / case["file"])
        return
    with pytest.raises(reference.Refused) as caught:
        reference.read(VECTORS / case["file"])
    assert caught.value.args[0] in (None, *case["codes"])


@by_name(VALID)
def test_reference_reader_reads_what_is_expected(case):
    expected = json.loads((VECTORS / case["expected"]).read_text("utf-8"))
    manifest, groups = reference.read(VECTORS / case["file"])
    doubles = [json.loads(json.dumps(m), parse_int=float) for m in (manifest, expected["manifest"])]
    assert doubles[0] == doubles[1]
    wanted = {name: np.ravel(t["values"]).tolist() for name, t in expected["tensors"].items()}
    entries = [(u, parts) for group in groups.values() for u, _, parts in group]
    order = {id(u): n for n, u in enumerate(manifest["updates"])}
    entries.sort(key=lambda entry: order[id(entry[0])])
    ordinals, found = Counter(), {}
    for u, parts in entries:
        prefix = f"{u['target']}.{ordinals[u['target']]}"
        ordinals[u["target"]] += 1
        found |= {f"{prefix}.{name}": array.ravel().tolist() for name, (_, array) in parts.items()}
    assert found == wanted


def test_generator_shares_no_code_with_an_implementation():
    used = {
        module.split(".")[0] for name in ("generate", "cases") for module in imports_of(SPEC / "vectors" / f"{name}.py")
    }
    assert used - set(sys.stdlib_module_names) == {"numpy", "blake3", "cases"}


# ---------------------------------------------------------------- FORMAT.md, manifest, schema


def test_every_rule_has_a_vector_or_a_waiver():
    waived = {row[0] for row in table("### Waivers")}
    assert waived <= set(rules())
    assert cited() | waived == set(rules())
    assert not cited() & waived


def test_every_must_has_an_id():
    """Outside the rules the key words of a duty do not appear in the normative sections."""
    text = re.sub(r"^```.*?^```", "", FORMAT, flags=re.M | re.S)
    text = re.sub(r"^- \*\*R-\d{3}\*\*.*?(?=^- \*\*|^$)", "", text, flags=re.M | re.S)
    for section in text.split("\n## ")[2:]:
        assert not re.search(r"\b(MUST|SHALL)\b", section), section.splitlines()[0]


def test_codes_are_those_of_the_table():
    of_code = {row[0].strip("`"): set(row[1].split()) for row in table("## 13. Error codes")}
    used = {code for case in INVALID + REFUSED for code in case["codes"]}
    assert used == set(of_code)
    assert all(case["code"] in case["codes"] == sorted({*case["codes"]}) for case in INVALID)
    for case in INVALID:
        assert case["rule"] in of_code[case["code"]], case["name"]
    assert {(c, r) for c, ids in of_code.items() for r in ids} == {
        (code, rule) for rule, (_, text) in rules().items() for code in re.findall(r"`(E-[A-Z-]+)`", text)
    }


@by_name(INVALID)
def test_duty_is_that_of_the_rule(case):
    duty, _ = rules()[case["rule"]]
    assert case["duty"] == {"R": "reader", "V": "validator"}[duty]
    assert (VECTORS / case["file"]).read_bytes() != (VECTORS / case["from"]).read_bytes()


def test_every_file_of_the_vectors_is_listed():
    listed = {"manifest.json"}
    for case in VALID + MERGES + INVALID:
        listed |= {case[k] for k in ("file", "expected", "base", "merged", "truth") if k in case}
    files = {p.relative_to(VECTORS).as_posix() for p in VECTORS.rglob("*") if p.is_file()}
    assert listed == files


def validator(part=""):
    root = {"$ref": f"#/$defs/{part}", "$defs": SCHEMA["$defs"]} if part else SCHEMA
    return jsonschema.Draft202012Validator(root)


def test_examples_are_valid_under_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    examples = re.findall(r"^```json(.*?)\n(.*?)^```", FORMAT, re.M | re.S)
    names = [name.strip() for name, _ in examples]
    assert {"manifest", "update", "base", "info", "when"} == set(names)
    for name, text in examples:
        validator(name.strip().replace("manifest", "")).validate(json.loads(text))
    kinds = {json.loads(text)["kind"] for name, text in examples if name.strip() == "update"}
    assert kinds == KINDS


def test_schema_is_anchored_and_has_the_lists_of_the_format():
    def patterns(node):
        if isinstance(node, dict):
            yield from (node["pattern"],) if isinstance(node.get("pattern"), str) else ()
            yield from node.get("patternProperties", {})
            for value in node.values():
                yield from patterns(value)
        elif isinstance(node, list):
            for value in node:
                yield from patterns(value)

    forbidden = SCHEMA["$defs"]["update"]["properties"]["target"]["not"]["pattern"]
    for pattern in set(patterns(SCHEMA)) - {forbidden}:
        assert pattern.startswith("^"), pattern
        assert pattern.endswith("$") or pattern == "^[^.]*\\.", pattern
    assert set(SCHEMA["properties"]["features"]["items"]["enum"]) == KINDS - {"lora"} | {
        "mid",
        *reference.PLACE,
        "conditional",
    }
    update = SCHEMA["$defs"]["update"]["properties"]
    assert set(update["kind"]["enum"]) == KINDS
    documented = {
        dtype: int(bits) for bits, names in table("## 3. Container") for dtype in re.findall(r"`(\w+)`", names)
    }
    assert set(SCHEMA["$defs"]["stored"]["properties"]["dtype"]["enum"]) == set(documented)
    assert all(re.fullmatch(reference.DTYPE, dtype) for dtype in documented)
    assert {dtype: 8 * np.dtype(code).itemsize for dtype, code in reference.NUMPY.items()}.items() <= documented.items()
    assert {row[0].strip("`") for row in table("### 5.1 Keys")} == set(update)
    assert {row[0].strip("`") for row in table("## 4. Manifest")} == set(SCHEMA["properties"])
    types = {"string": "string", "array of strings": "array", "number": "number", "object": "object"}
    members = {row[0].strip("`"): types[row[1]] for row in table("### 4.1 `info`")}
    schema = SCHEMA["$defs"]["info"]["properties"]
    assert members == {name: value.get("type", "array") for name, value in schema.items()}
    assert {row[0].strip("`") for row in table("### 4.2 `when`")} == set(SCHEMA["$defs"]["when"]["properties"])
    assert {*reference.WHEN} == set(SCHEMA["$defs"]["when"]["properties"])
    assert {*reference.BASE} == set(SCHEMA["$defs"]["base"]["properties"])
    registry = (SPEC / "registry" / "kinds.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| 1\.0", registry, re.M)) == KINDS


@by_name(VALID)
def test_schema_accepts(case):
    validator().validate(json.loads((VECTORS / case["expected"]).read_text("utf-8"))["manifest"])


@by_name(INVALID)
def test_schema_rejects_what_it_can_see(case):
    raw = (VECTORS / case["file"]).read_bytes()
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        manifest = json.loads(header["__metadata__"]["loratool"])
    except (ValueError, KeyError, TypeError, RecursionError):
        assert not case["schema"]
    else:
        assert validator().is_valid(manifest) != case["schema"]


@by_name(VALID)
def test_safetensors_opens(case):
    for path in (VECTORS / case[key] for key in ("file", "base", "merged", "truth") if key in case):
        _, tensors = reference.container(path)
        with safe_open(path, framework="pt") as opened:
            assert set(opened.keys()) == set(tensors)
            for name, (_, shape, array) in tensors.items():
                tensor = opened.get_tensor(name)
                assert list(tensor.shape) == shape
                assert tensor.double().numpy().tolist() == array.tolist()


def within_tolerance(case, merged):
    """The targets of a merge that are not within the tolerance of FORMAT.md, section 8."""
    _, truth = reference.container(VECTORS / case["truth"])
    _, wanted = reference.container(VECTORS / case["merged"])
    assert {name: t[:2] for name, t in merged.items()} == {name: t[:2] for name, t in wanted.items()}
    bad = []
    for name, (dtype, _, array) in wanted.items():
        low = high = array
        if f"exact.{name}" in truth:
            exact, band = (truth[f"{key}.{name}"][2] for key in ("exact", "band"))
            low, high = (reference.merge(edge, dtype, []) for edge in (exact - band, exact + band))  # only rounds
        if not ((low <= merged[name][2]) & (merged[name][2] <= high)).all():
            bad.append(name)
    return bad


def untouched(case, path):
    """{name: bytes} of the tensors of a file that are no target of a case."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    _, truth = reference.container(VECTORS / case["truth"])
    entries = {name: t for name, t in json.loads(raw[8:start]).items() if name != "__metadata__"}
    spans = {name: t["data_offsets"] for name, t in entries.items() if f"exact.{name}" not in truth}
    return {name: raw[start + begin : start + end] for name, (begin, end) in spans.items()}


@by_name(GOOD)
def test_expected_result_is_within_the_tolerance(case):
    _, merged = reference.container(VECTORS / case["merged"])
    assert within_tolerance(case, merged) == []
    assert untouched(case, VECTORS / case["merged"]) == untouched(case, VECTORS / case["base"])


@by_name(GOOD)
def test_reference_reader_merges_within_the_tolerance(case):
    adapters = [(reference.read(VECTORS / a["file"])[1], a["weight"]) for a in case["adapters"]]
    base, merged = (reference.container(VECTORS / case[key])[1] for key in ("base", "merged"))
    for name, (dtype, shape, _) in merged.items():
        steps = [(*step, weight) for groups, weight in adapters for step in groups.get(name, [])]
        old = base[name][2] if name in base and base[name][1] == shape else np.zeros(shape)
        merged[name] = dtype, shape, reference.merge(old, dtype, steps)
    assert within_tolerance(case, merged) == []


@by_name([case for case in REFUSED if case["codes"] == ["E-NONFINITE"]])
def test_reference_reader_merges_to_finite_numbers_only(case):
    base = reference.container(VECTORS / case["base"])[1]
    [(a, groups)] = [(a, reference.read(VECTORS / a["file"])[1]) for a in case["adapters"]]
    [(name, group)] = groups.items()
    with pytest.raises(reference.Refused, match="E-NONFINITE"):
        reference.merge(base[name][2], base[name][0], [(*step, a["weight"]) for step in group])


@by_name([case for case in GOOD if case["name"] in ("worked", "loha", "dora_axis0", "replace")])
def test_tolerance_notices_a_number_nearby(case):
    _, merged = reference.container(VECTORS / case["merged"])
    for name in [n for n in merged if f"exact.{n}" in reference.container(VECTORS / case["truth"])[1]]:
        dtype, shape, array = merged[name]
        off = array.copy()
        off.flat[0] += 4 * np.ldexp(1, np.frexp(array.flat[0])[1] - reference.FLOATS[dtype][0])  # four steps up
        assert within_tolerance(case, {**merged, name: (dtype, shape, off)}) == [name]


# ---------------------------------------------------------------- loratool on the vectors


@by_name(VALID)
def test_loratool_finds_nothing_in_a_valid_file(case):
    import loratool

    assert loratool.validate(VECTORS / case["file"]) == []


# A reader keeps neither vendor keys nor a higher version.
CHANGED = ("vendor_keys", "depth_sixteen", "higher_minor", "minor_ten", "scale_tolerance", "conditional_routing")


@by_name([case for case in VALID if case["name"] not in CHANGED])
def test_loratool_writes_the_canonical_bytes(case, tmp_path):
    import loratool

    loratool.save(loratool.load(VECTORS / case["file"]), tmp_path / "a.lora.safetensors")
    written = (tmp_path / "a.lora.safetensors").read_bytes()
    assert written == (VECTORS / case["file"]).read_bytes()


@by_name(INVALID)
def test_loratool_finds_the_fault(case):
    import loratool

    found = {(finding.code, finding.rule) for finding in loratool.validate(VECTORS / case["file"])}
    assert (case["code"], case["rule"]) in found


@by_name(INVALID)
def test_loratool_refuses_to_load(case):
    import loratool

    path = VECTORS / case["file"]
    if case["duty"] == "reader":
        with pytest.raises(loratool.LoratoolError) as caught:
            loratool.load(path, convention="native")
        assert caught.value.code in case["codes"]
        assert {problem.code for problem in caught.value.problems} <= {*case["codes"]}
    elif case["also"] == ["R-055"]:
        assert loratool.load(path).updates


@by_name(GOOD)
def test_loratool_merges_within_the_tolerance(case, tmp_path):
    import loratool

    adapters = [(VECTORS / a["file"], a["weight"]) for a in case["adapters"]]
    out = tmp_path / "merged.safetensors"
    loratool.merge(VECTORS / case["base"], adapters, out, allow_new=case["consent"], allow_unchanged=True)
    assert within_tolerance(case, reference.container(out)[1]) == []
    assert untouched(case, out) == untouched(case, VECTORS / case["merged"])


@by_name(REFUSED)
def test_loratool_refuses_to_merge(case, tmp_path):
    import loratool

    adapters = [(VECTORS / a["file"], a["weight"]) for a in case["adapters"]]
    out = tmp_path / "merged.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(VECTORS / case["base"], adapters, out, allow_new=case["consent"])
    assert {problem.code for problem in caught.value.problems} <= {*case["codes"]}
    assert list(tmp_path.iterdir()) == []


@by_name([case for case in INVALID if case["rule"] in ("R-033", "R-034")])
def test_loratool_merge_checks_the_values(case, tmp_path):
    import loratool

    base = VECTORS / case["from"].replace(".lora.", ".base.")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, [(VECTORS / case["file"], 1)], tmp_path / "merged.safetensors")
    assert caught.value.code == case["code"]
