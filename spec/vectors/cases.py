"""The cases of format 1.0 as plain data: what generate.py turns into files. No arithmetic here.

VALID    adapters that every reader opens, each with a base and the merge of the two
MERGES   further merges of those adapters: weights, several adapters, merges that are refused
INVALID  one valid adapter each, ONE mutation, and the code and the rule that refuse it
"""

import math

# ---------------------------------------------------------------- how a case is written down


def t(dtype, *shape, values=None):
    """A tensor; without explicit values generate.py fills it from its counter."""
    return {"dtype": dtype, "shape": list(shape), "values": values}


def up(kind, target, shape, parts, **keys):
    """An update and its components. `scale` follows from the rule unless it is given."""
    rules = {
        "alpha": lambda: keys["alpha"],
        "alpha/rank": lambda: keys["alpha"] / keys["rank"],
        "alpha/sqrt(rank)": lambda: keys["alpha"] / math.sqrt(keys["rank"]),
    }
    if keys.get("scaling") in rules and "scale" not in keys:
        keys["scale"] = rules[keys["scaling"]]()
    return {"kind": kind, "target": target, "shape": list(shape), **keys}, parts


def lora(target, shape, n=None, **keys):
    """Rank 2 and alpha 4 unless told otherwise; n rows where a row range is used."""
    keys = {"rank": 2, "alpha": 4, "scaling": "alpha/rank", **keys}
    lead = [keys["experts"]] if "experts" in keys else []
    m = shape[1:] if "expert" in keys or "experts" in keys else shape
    parts = {
        "A": t("F32", *lead, keys["rank"], *m[1:]),
        "B": t("F32", *lead, n or m[0], keys["rank"]),
    }
    return up("lora", target, shape, parts, **keys)


ALPHA = {"rank": 2, "alpha": 3, "scaling": "alpha"}
FREE = {"scaling": "none"}

VALID = []


def valid(name, shows, rules, base, updates, **more):
    case = {"name": name, "shows": shows, "rules": rules, "base": base, "updates": updates}
    VALID.append({**case, **more})


# ---------------------------------------------------------------- valid: lora

valid(
    "worked", "the smallest useful file; FORMAT.md walks through its bytes",
    ["R-001", "R-010", "R-015", "R-030", "R-060"],
    {"w": t("F32", 2, 2, values=[1, 2, 3, 4])},
    [up("lora", "w", [2, 2],
        {"A": t("F32", 1, 2, values=[0.5, -1]), "B": t("F32", 2, 1, values=[2, 4])},
        rank=1, alpha=1, scaling="alpha")],
)  # fmt: skip
valid(
    "lora_linear", "a linear layer in BF16, alpha/rank, base recorded, a second tensor untouched",
    ["R-001", "R-006", "R-011", "R-025", "R-040", "R-041", "R-042", "R-060", "R-061"],
    {"l.weight": t("BF16", 4, 3), "norm.weight": t("BF16", 3)},
    [lora("l.weight", [4, 3], alpha=8)],
    identity={"name": "tiny"}, provenance={"convention": "plain", "tool": "hand"},
)  # fmt: skip
valid(
    "lora_embedding", "an embedding in F16, marked as one",
    ["R-027", "R-060"],
    {"e.weight": t("F16", 6, 3)},
    [lora("e.weight", [6, 3], layout="embedding")],
)  # fmt: skip
valid(
    "lora_in_out", "a base stored as [in, out]: the factors follow the stored order",
    ["R-027", "R-060"],
    {"c_attn.weight": t("F16", 3, 6)},
    [lora("c_attn.weight", [3, 6], layout="in_out")],
    identity={"name": "gpt"}, digests=False,
)  # fmt: skip
valid(
    "lora_conv", "a convolution: the kernel axes belong to A",
    ["R-031", "R-060"],
    {"conv.weight": t("F32", 4, 3, 2, 2)},
    [lora("conv.weight", [4, 3, 2, 2])],
)  # fmt: skip
valid(
    "lora_mid", "a convolution with a mid factor",
    ["R-017", "R-031", "R-060"],
    {"conv.weight": t("BF16", 4, 3, 2, 2)},
    [up("lora", "conv.weight", [4, 3, 2, 2],
        {"A": t("F16", 2, 3), "B": t("F16", 4, 2), "mid": t("F16", 2, 2, 2, 2)}, **ALPHA)],
)  # fmt: skip
valid(
    "lora_mid_linear", "a mid factor on a matrix without kernel axes",
    ["R-017", "R-031"],
    {"l.weight": t("F32", 4, 3)},
    [up("lora", "l.weight", [4, 3],
        {"A": t("F16", 2, 3), "B": t("F16", 4, 2), "mid": t("F16", 2, 2)}, **ALPHA)],
)  # fmt: skip
valid(
    "lora_rows", "row ranges of a fused tensor: the first and the last pair of rows",
    ["R-017", "R-023", "R-029", "R-060"],
    {"qkv.weight": t("BF16", 6, 3)},
    [lora("qkv.weight", [6, 3], 2, rows=[0, 2]), lora("qkv.weight", [6, 3], 2, rows=[4, 6])],
)  # fmt: skip
valid(
    "lora_expert", "one expert of a packed tensor",
    ["R-017", "R-023", "R-060"],
    {"experts.w": t("BF16", 3, 4, 2)},
    [lora("experts.w", [3, 4, 2], expert=1)],
)  # fmt: skip
valid(
    "lora_experts", "all experts of a packed tensor in one update",
    ["R-017", "R-023", "R-031", "R-060"],
    {"experts.w": t("F16", 3, 4, 2)},
    [lora("experts.w", [3, 4, 2], experts=3)],
)  # fmt: skip
valid(
    "lora_experts_rows", "a row range within every expert",
    ["R-017", "R-023", "R-031", "R-060"],
    {"experts.w": t("F32", 2, 4, 3)},
    [lora("experts.w", [2, 4, 3], 2, experts=2, rows=[1, 3])],
)  # fmt: skip
valid(
    "scaling_sqrt_rank", "alpha/sqrt(rank), an irrational scale",
    ["R-024", "R-025", "R-060"],
    {"l.weight": t("BF16", 4, 3)},
    [lora("l.weight", [4, 3], alpha=4, scaling="alpha/sqrt(rank)")],
)  # fmt: skip
valid(
    "scaling_none", "no rule and no alpha: the scale stands for itself, here 1e-7",
    ["R-024", "R-050", "R-060"],
    {"l.weight": t("F32", 4, 3)},
    [up("lora", "l.weight", [4, 3], {"A": t("F32", 2, 3), "B": t("F32", 4, 2)},
        rank=2, scaling="none", scale=1e-7)],
)  # fmt: skip
valid(
    "scaling_alpha", "alpha alone, a negative fraction",
    ["R-024", "R-025", "R-060"],
    {"l.weight": t("F16", 4, 3)},
    [lora("l.weight", [4, 3], alpha=-0.375, scaling="alpha")],
)  # fmt: skip
valid(
    "scaling_zero", "alpha 0 is allowed and changes nothing",
    ["R-025", "R-060"],
    {"l.weight": t("BF16", 4, 3)},
    [lora("l.weight", [4, 3], alpha=0)],
)  # fmt: skip
valid(
    "scale_tolerance", "a scale that is off by less than 2^-40 is accepted",
    ["R-025"],
    {"l.weight": t("BF16", 4, 3)},
    [lora("l.weight", [4, 3], alpha=4, scaling="alpha/sqrt(rank)", scale=2.828427124746)],
)  # fmt: skip
valid(
    "stacked", "three additive updates of one tensor: ordinals 0, 1, 2",
    ["R-017", "R-022", "R-029", "R-030", "R-060"],
    {"l.weight": t("BF16", 4, 3)},
    [
        lora("l.weight", [4, 3], scaling="alpha", alpha=2),
        up("loha", "l.weight", [4, 3],
           {"A1": t("F16", 2, 3), "B1": t("F16", 4, 2), "A2": t("F16", 2, 3), "B2": t("F16", 4, 2)},
           **ALPHA),
        up("add", "l.weight", [4, 3], {"value": t("F32", 4, 3)}, **FREE, scale=0.25),
    ],
)  # fmt: skip

# ---------------------------------------------------------------- valid: dora

DORA = {"direction": "lora", "axis": 0, **ALPHA}


def dora(target, shape, dtype="F32", **keys):
    keys = {**DORA, **keys}
    update, parts = lora(target, shape, **keys)
    m = shape[1:] if "experts" in keys else shape
    lead = [keys["experts"]] if "experts" in keys else []
    size = keys["rows"][1] - keys["rows"][0] if "rows" in keys else m[0]
    parts = {**parts, "magnitude": t(dtype, *lead, [size, *m[1:]][keys["axis"]])}
    return {**update, "kind": "dora"}, parts


valid("dora_axis0", "magnitude per row, norm over all other axes",
      ["R-017", "R-028", "R-031", "R-060"],
      {"l.weight": t("BF16", 4, 3)}, [dora("l.weight", [4, 3])])  # fmt: skip
valid("dora_axis1", "magnitude per column",
      ["R-028", "R-031", "R-060"],
      {"l.weight": t("F32", 4, 3)}, [dora("l.weight", [4, 3], axis=1)])  # fmt: skip
valid("dora_conv", "a convolution with axis 1: norm over rows and kernel",
      ["R-028", "R-031", "R-060"],
      {"conv.weight": t("F16", 4, 3, 2, 1)},
      [dora("conv.weight", [4, 3, 2, 1], axis=1)])  # fmt: skip
valid("dora_rows", "dora on rows 0..2 and lora on the other rows of the same tensor",
      ["R-023", "R-028", "R-029", "R-060"],
      {"qk.weight": t("BF16", 5, 3)},
      [dora("qk.weight", [5, 3], n=2, rows=[0, 2], axis=1),
       lora("qk.weight", [5, 3], 3, rows=[2, 5])])  # fmt: skip
valid("dora_experts", "a magnitude for each expert",
      ["R-023", "R-028", "R-031", "R-060"],
      {"experts.w": t("F16", 2, 4, 3)}, [dora("experts.w", [2, 4, 3], experts=2)])  # fmt: skip
valid("dora_zero_column", "a column that the update leaves alone still gets its magnitude",
      ["R-060"],
      {"l.weight": t("F32", 2, 2)},
      [up("dora", "l.weight", [2, 2],
          {"A": t("F32", 1, 2, values=[0, 1]), "B": t("F32", 2, 1), "magnitude": t("F32", 2)},
          direction="lora", axis=1, rank=1, alpha=1, scaling="alpha")])  # fmt: skip
valid("dora_loha", "a dora whose direction is a loha: both names are features",
      ["R-017", "R-028", "R-060"],
      {"l.weight": t("BF16", 4, 3)},
      [up("dora", "l.weight", [4, 3],
          {"A1": t("F16", 2, 3), "B1": t("F16", 4, 2), "A2": t("F16", 2, 3), "B2": t("F16", 4, 2),
           "magnitude": t("F16", 4)}, **{**DORA, "direction": "loha"})])  # fmt: skip
valid("dora_lokr", "a dora over a lokr of two whole factors: no rank",
      ["R-017", "R-026", "R-028", "R-060"],
      {"l.weight": t("F32", 4, 6)},
      [up("dora", "l.weight", [4, 6],
          {"w1": t("F16", 2, 3), "w2": t("F16", 2, 2), "magnitude": t("F32", 6)},
          direction="lokr", axis=1, scaling="none", scale=0.5)])  # fmt: skip

# ---------------------------------------------------------------- valid: scale

valid("scale_axis0", "one factor per row of a weight, and of its bias, which is a vector",
      ["R-017", "R-022", "R-028", "R-031", "R-060"],
      {"l.weight": t("BF16", 4, 3), "l.bias": t("BF16", 4)},
      [up("scale", "l.weight", [4, 3], {"factor": t("F32", 4)}, axis=0),
       up("scale", "l.bias", [4], {"factor": t("F32", 4)}, axis=0)])  # fmt: skip
valid("scale_axis1", "one factor per column, one of them 0 and one negative",
      ["R-028", "R-031", "R-060"],
      {"l.weight": t("F32", 4, 3)},
      [up("scale", "l.weight", [4, 3], {"factor": t("BF16", 3, values=[0, -0.5, 1.25])}, axis=1)])  # fmt: skip
valid("scale_conv", "a convolution: a column's factor is for all positions of the kernel",
      ["R-028", "R-031", "R-060"],
      {"conv.weight": t("F16", 4, 3, 2, 1)},
      [up("scale", "conv.weight", [4, 3, 2, 1], {"factor": t("F16", 3)}, axis=1)])  # fmt: skip
valid("scale_fp8", "a base in 8 bits; a factor that is not its neighbours' is rounded once",
      ["R-060", "R-061"],
      {"l.weight": t("F8_E4M3", 3, 4)},
      [up("scale", "l.weight", [3, 4], {"factor": t("F32", 4)}, axis=1)])  # fmt: skip
valid("scale_rows", "a scale on rows 0..2, a lora on the other rows, a replacement below both",
      ["R-023", "R-029", "R-060"],
      {"qk.weight": t("BF16", 5, 3)},
      [up("scale", "qk.weight", [5, 3], {"factor": t("F32", 3)}, axis=1, rows=[0, 2]),
       lora("qk.weight", [5, 3], 3, rows=[2, 5]),
       up("replace", "qk.weight", [5, 3], {"value": t("F32", 5, 3)})])  # fmt: skip
valid("scale_experts", "factors for each expert, of some rows; one expert alone; biases of experts",
      ["R-017", "R-022", "R-023", "R-031", "R-060"],
      {"experts.w": t("F16", 2, 4, 3), "experts.v": t("F32", 2, 3, 2), "experts.b": t("BF16", 2, 3)},
      [up("scale", "experts.w", [2, 4, 3], {"factor": t("F32", 2, 2)}, axis=0, experts=2, rows=[1, 3]),
       up("scale", "experts.v", [2, 3, 2], {"factor": t("F32", 2)}, axis=1, expert=1),
       up("scale", "experts.b", [2, 3], {"factor": t("F32", 2, 3)}, axis=0, experts=2)])  # fmt: skip

# ---------------------------------------------------------------- valid: loha and lokr

valid("loha", "an elementwise product of two low-rank products",
      ["R-017", "R-026", "R-031", "R-060"],
      {"l.weight": t("BF16", 4, 3)},
      [up("loha", "l.weight", [4, 3],
          {"A1": t("F32", 2, 3), "B1": t("F32", 4, 2), "A2": t("F32", 2, 3), "B2": t("F32", 4, 2)},
          **ALPHA)])  # fmt: skip
valid("loha_conv", "loha of a convolution without mid factors",
      ["R-031", "R-060"],
      {"conv.weight": t("F16", 4, 3, 2, 2)},
      [up("loha", "conv.weight", [4, 3, 2, 2],
          {"A1": t("F16", 2, 3, 2, 2), "B1": t("F16", 4, 2),
           "A2": t("F16", 2, 3, 2, 2), "B2": t("F16", 4, 2)}, **ALPHA)])  # fmt: skip
valid("loha_mid", "loha with both mid factors",
      ["R-017", "R-030", "R-031", "R-060"],
      {"conv.weight": t("F32", 4, 3, 2, 2)},
      [up("loha", "conv.weight", [4, 3, 2, 2],
          {"A1": t("BF16", 2, 3), "B1": t("BF16", 4, 2), "mid1": t("BF16", 2, 2, 2, 2),
           "A2": t("BF16", 2, 3), "B2": t("BF16", 4, 2), "mid2": t("BF16", 2, 2, 2, 2)},
          **ALPHA)])  # fmt: skip
valid("lokr_full", "a Kronecker product of two whole factors: no rank, scaling alpha",
      ["R-017", "R-026", "R-031", "R-060"],
      {"l.weight": t("BF16", 4, 6)},
      [up("lokr", "l.weight", [4, 6], {"w1": t("F32", 2, 3), "w2": t("F32", 2, 2)},
          alpha=0.5, scaling="alpha")])  # fmt: skip
valid("lokr_full_conv", "whole factors of a convolution: the kernel axes belong to w2",
      ["R-031", "R-060"],
      {"conv.weight": t("F16", 4, 6, 2, 1)},
      [up("lokr", "conv.weight", [4, 6, 2, 1],
          {"w1": t("F16", 2, 3), "w2": t("F16", 2, 2, 2, 1)}, **FREE, scale=1)])  # fmt: skip
valid("lokr_factored1", "the first factor is a product",
      ["R-026", "R-031", "R-060"],
      {"l.weight": t("F32", 4, 6)},
      [up("lokr", "l.weight", [4, 6],
          {"B1": t("F16", 2, 1), "A1": t("F16", 1, 3), "w2": t("F16", 2, 2)},
          rank=1, alpha=2, scaling="alpha/rank")])  # fmt: skip
valid("lokr_factored2", "the second factor is a product, over a convolution",
      ["R-026", "R-031", "R-060"],
      {"conv.weight": t("F16", 6, 4, 1, 2)},
      [up("lokr", "conv.weight", [6, 4, 1, 2],
          {"w1": t("F16", 2, 2), "B2": t("F16", 3, 2), "A2": t("F16", 2, 2, 1, 2)},
          **ALPHA)])  # fmt: skip
valid("lokr_factored", "both factors are products",
      ["R-026", "R-031", "R-060"],
      {"l.weight": t("BF16", 6, 6)},
      [up("lokr", "l.weight", [6, 6],
          {"B1": t("F16", 2, 2), "A1": t("F16", 2, 3), "B2": t("F16", 3, 2), "A2": t("F16", 2, 2)},
          **ALPHA)])  # fmt: skip
valid("lokr_mid", "the second factor has a mid factor",
      ["R-017", "R-026", "R-031", "R-060"],
      {"conv.weight": t("BF16", 4, 4, 2, 2)},
      [up("lokr", "conv.weight", [4, 4, 2, 2],
          {"w1": t("F16", 2, 2), "B2": t("F16", 2, 2), "A2": t("F16", 2, 2),
           "mid2": t("F16", 2, 2, 2, 2)}, **ALPHA)])  # fmt: skip

# ---------------------------------------------------------------- valid: full kinds

valid("replace", "a tensor and a bias replaced; the value is rounded to the base's dtype",
      ["R-017", "R-024", "R-060", "R-061"],
      {"head.weight": t("BF16", 4, 3), "head.bias": t("F32", 4)},
      [up("replace", "head.weight", [4, 3], {"value": t("F32", 4, 3)}),
       up("replace", "head.bias", [4], {"value": t("F32", 4)})])  # fmt: skip
valid("replace_scalar", "a tensor without axes",
      ["R-022", "R-060"],
      {"logit_scale": t("F16")},
      [up("replace", "logit_scale", [], {"value": t("F32")})])  # fmt: skip
valid("replace_part", "a row range, an expert and all experts replaced",
      ["R-017", "R-023", "R-029", "R-060"],
      {"a": t("F16", 4, 2), "b": t("F32", 3, 2), "c": t("BF16", 2, 3)},
      [up("replace", "a", [4, 2], {"value": t("F16", 2, 2)}, rows=[1, 3]),
       up("replace", "b", [3, 2], {"value": t("F32", 2)}, expert=2),
       up("replace", "c", [2, 3], {"value": t("BF16", 2, 1)}, experts=2, rows=[1, 2])])  # fmt: skip
valid("replace_new", "a tensor that the base lacks (needs the user's consent)",
      ["R-043", "R-060"],
      {"l.weight": t("BF16", 4, 3)},
      [up("replace", "value_head.weight", [1, 3], {"value": t("F16", 1, 3)})],
      consent=True)  # fmt: skip
valid("replace_resized", "more rows than the base has (needs consent), then a lora on it",
      ["R-029", "R-040", "R-043", "R-060"],
      {"e.weight": t("BF16", 4, 3)},
      [up("replace", "e.weight", [6, 3], {"value": t("BF16", 6, 3)}), lora("e.weight", [6, 3])],
      identity={}, consent=True)  # fmt: skip
valid("replace_then_lora", "a replacement first, whatever the order in the list, then the sum",
      ["R-029", "R-060"],
      {"l.weight": t("F16", 4, 3)},
      [lora("l.weight", [4, 3]),
       up("replace", "l.weight", [4, 3], {"value": t("F16", 4, 3)})])  # fmt: skip
valid("replace_rows", "single rows, by index, with a lora on the same tensor",
      ["R-017", "R-029", "R-034", "R-060"],
      {"e.weight": t("BF16", 5, 3)},
      [up("replace_rows", "e.weight", [5, 3],
          {"index": t("I64", 2, values=[1, 4]), "value": t("F16", 2, 3)}),
       lora("e.weight", [5, 3])])  # fmt: skip
valid("replace_rows_other", "other rows of the same base as replace_rows",
      ["R-034", "R-060"],
      {"e.weight": t("BF16", 5, 3)},
      [up("replace_rows", "e.weight", [5, 3],
          {"index": t("I64", 3, values=[0, 2, 3]), "value": t("BF16", 3, 3)})])  # fmt: skip
valid("replace_rows_dora", "single rows, then a dora whose norm sees them",
      ["R-029", "R-060"],
      {"e.weight": t("F32", 4, 3)},
      [up("replace_rows", "e.weight", [4, 3],
          {"index": t("I64", 1, values=[0]), "value": t("F32", 1, 3)}),
       dora("e.weight", [4, 3], axis=1)])  # fmt: skip
valid("add", "a stored difference for a matrix, a bias and a scalar",
      ["R-017", "R-022", "R-024", "R-060"],
      {"l.weight": t("BF16", 4, 3), "l.bias": t("F16", 4), "s": t("F32")},
      [up("add", "l.weight", [4, 3], {"value": t("BF16", 4, 3)}, **FREE, scale=1),
       up("add", "l.bias", [4], {"value": t("F32", 2)}, **FREE, scale=-0.3, rows=[2, 4]),
       up("add", "s", [], {"value": t("F32")}, **FREE, scale=3)])  # fmt: skip
valid("add_experts", "a stored difference for all experts and for one row range of one expert",
      ["R-023", "R-029", "R-060"],
      {"b": t("F16", 2, 3)},
      [up("add", "b", [2, 3], {"value": t("F16", 2, 3)}, **FREE, scale=1, experts=2),
       up("add", "b", [2, 3], {"value": t("F16", 1)},
          **FREE, scale=2, expert=1, rows=[0, 1])])  # fmt: skip

# ---------------------------------------------------------------- valid: container, versions, names

valid("dtypes", "all four component dtypes in one file, and bases of all four",
      ["R-005", "R-032", "R-052", "R-060"],
      {"a": t("F64", 2, 2), "b": t("F32", 2, 2), "c": t("F16", 2, 2), "d": t("BF16", 2, 2)},
      [up("lora", "a", [2, 2], {"A": t("F64", 1, 2), "B": t("F32", 2, 1)},
          rank=1, alpha=1, scaling="alpha"),
       up("lora", "b", [2, 2], {"A": t("BF16", 1, 2), "B": t("F64", 2, 1)},
          rank=1, alpha=1, scaling="alpha"),
       up("lora", "c", [2, 2], {"A": t("F16", 1, 2), "B": t("BF16", 2, 1)},
          rank=1, alpha=1, scaling="alpha"),
       up("add", "d", [2, 2], {"value": t("F64", 2, 2)}, **FREE, scale=1)])  # fmt: skip
valid("unicode_names", "names outside ASCII: the manifest sorts by UTF-16, the data by code point",
      ["R-016", "R-040", "R-050", "R-051", "R-052"],
      {"\ufb00": t("F32", 2, 2), "\U0001d11e": t("F32", 2, 2), 'q"\\': t("F32", 2, 2)},
      [up("add", n, [2, 2], {"value": t("F32", 2, 2)}, **FREE, scale=1)
       for n in ("\ufb00", "\U0001d11e", 'q"\\')],
      identity={"name": "Grüße"}, provenance={"line": "a\tb\u0001"})  # fmt: skip
valid("name_shapes", "targets whose names end like components: the last two parts decide",
      ["R-030"],
      {"a": t("F32", 2), "a.0": t("F32", 2), "a.0.value": t("F32", 2)},
      [up("add", n, [2], {"value": t("F32", 2)}, **FREE, scale=1)
       for n in ("a", "a.0", "a.0.value")])  # fmt: skip
valid("limits", "a target of 1024 bytes in UTF-8 and a shape of eight axes",
      ["R-016"],
      {"é" * 512: t("F32", 1, 2, 1, 1, 1, 1, 1, 2)},
      [lora("é" * 512, [1, 2, 1, 1, 1, 1, 1, 2])])  # fmt: skip
valid("vendor_keys", "keys with a dot are ignored wherever keys may stand",
      ["R-014"],
      {"l.weight": t("BF16", 4, 3)},
      [lora("l.weight", [4, 3], **{"acme.note": {"any": [1.5, True, None]}})],
      identity={"acme.repo": "x"}, vendor={"acme.run": 7})  # fmt: skip
valid("higher_minor", "version 1.9 that uses nothing new is opened",
      ["R-012"],
      {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])], version="1.9")  # fmt: skip
valid("number_forms", "numbers whose canonical form is easy to get wrong",
      ["R-025", "R-050"],
      {"a": t("F64", 2), "b": t("F64", 2), "c": t("F64", 2)},
      [up("add", "a", [2], {"value": t("F64", 2)}, **FREE, scale=1e21),
       up("add", "b", [2], {"value": t("F64", 2)}, **FREE, scale=123456789012345680000.0),
       up("add", "c", [2], {"value": t("F64", 2)}, **FREE, scale=0.000001)])  # fmt: skip

# ---------------------------------------------------------------- valid: fp8, info, when, part, the base

valid("fp8_e4m3", "an 8-bit base: 463.5 becomes 448, the largest number; a subnormal one, ties to even",
      ["R-060", "R-061", "R-063"],
      {"w": t("F8_E4M3", 2, 3, values=[448, 2**-9, 1.125, -448, 1.25, -240])},
      [up("add", "w", [2, 3], {"value": t("F32", 2, 3, values=[15.5, 2**-10, 0.0625, -15.5, 0.0625, 1])},
          **FREE, scale=1)])  # fmt: skip
valid("fp8_e5m2", "the other one, up to its largest number",
      ["R-060", "R-061", "R-063"],
      {"w": t("F8_E5M2", 2, 2, values=[57344, 2**-16, 1.25, -3])},
      [up("add", "w", [2, 2], {"value": t("F32", 2, 2, values=[4094, 2**-17, 0.125, 0.25])}, **FREE, scale=1)],
      )  # fmt: skip
valid("fp8_lora", "loras in 16 bits on bases in 8",
      ["R-060", "R-061", "R-063"],
      {"k.weight": t("F8_E4M3", 4, 3), "l.weight": t("F8_E5M2", 4, 3)},
      [up("lora", n, [4, 3], {"A": t("BF16", 2, 3), "B": t("BF16", 4, 2)}, rank=2, alpha=1, scaling="alpha/rank")
       for n in ("k.weight", "l.weight")])  # fmt: skip
valid("dora_rows_only", "a dora on the first rows; nothing touches the others",
      ["R-028", "R-060"],
      {"qk.weight": t("BF16", 5, 3)}, [dora("qk.weight", [5, 3], n=2, rows=[0, 2], axis=1)])  # fmt: skip
valid("info", "what no merge looks at: all members that have a meaning, and one that has none",
      ["R-014", "R-044", "R-046"],
      {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])],
      info={
          "title": "Ink", "description": "drawings\nin ink", "triggers": ["inked"], "license": "Apache-2.0",
          "authors": ["A. Nyone"], "source": "https://example.org/ink", "weight": 0.8,
          "training": {"steps": 1200, "loss": [0.5, 0.25]},
          "config": {"adapter_config.json": {"r": 2, "lora_dropout": 0.05, "revision": None}},
          "of the future": [{"updates": []}],
      })  # fmt: skip
valid("metadata_members", "members for other programs beside the manifest, sorted by code point",
      ["R-010", "R-051"],
      {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])],
      metadata={"ss_network_alpha": "99", "modelspec.title": "Ink", "\U0001d11e.x": "", "\ufb00.x": "\t"})  # fmt: skip
for kind, what, when in (
    ("tokens", "after tokens", {"tokens": [5, 0, 5]}),
    ("prompts", "on some prompts", {"prompts": ["in ink", "Tusche"]}),
    ("routing", "where it is chosen", {"routing": "by the model's own router", "acme.router": 3}),
):
    valid(f"conditional_{kind}", f"an adapter that acts {what} only: it is read, and not merged",
          ["R-017", "R-045", "R-047"],
          {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])], when=when, merge=False)  # fmt: skip
valid("part", "two parts of a pipeline with tensors of one name, and a third one without a part",
      ["R-022", "R-029", "R-030", "R-040", "R-048"],
      {"te_1.q.weight": t("BF16", 4, 3), "te-2.q.weight": t("F16", 2, 3), "q.weight": t("F32", 3, 3)},
      [lora("q.weight", [4, 3], part="te_1"), lora("q.weight", [3, 3]),
       lora("q.weight", [2, 3], part="te-2"), lora("q.weight", [4, 3], part="te_1")],
      identity={"name": "org/pipeline"})  # fmt: skip
valid("base_known", "all that can be said of a base, with SHA-256 digests",
      ["R-040", "R-041"],
      {"e.weight": t("BF16", 4, 3)}, [lora("e.weight", [4, 3])], function="sha256",
      identity={"name": "org/model", "revision": "main", "architecture": "LlamaForCausalLM",
                "tokenizer": "blake3:" + "a1" * 32, "added_tokens": {"<|ink|>": 3}})  # fmt: skip
valid("base_scales", "a weight with scales: its identity is that of the codes and the scales",
      ["R-040", "R-041"],
      {"l.weight": t("F8_E4M3", 4, 3), "l.weight_scale": t("F32", 4, 1)},
      [lora("l.weight", [4, 3])], identity={}, scales={"l.weight": "weight_scale"}, merge=False)  # fmt: skip

# ---------------------------------------------------------------- valid: what catches programs that are nearly right

valid("minor_ten", "version 1.10: the minor is a number, not a digit",
      ["R-012"],
      {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])], version="1.10")  # fmt: skip
valid("depth_sixteen", "a vendor key is nested exactly 16 deep",
      ["R-002", "R-014"],
      {"l.weight": t("BF16", 4, 3)}, [lora("l.weight", [4, 3])],
      identity={}, vendor={"acme.deep": [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]})  # fmt: skip
valid("scale_as_stored", "scale is not alpha/rank to the last bit, and it is scale that counts",
      ["R-025", "R-060"],
      {"w": t("F64", 1, 1, values=[0])},
      [up("lora", "w", [1, 1], {"A": t("F32", 1, 1, values=[1]), "B": t("F32", 1, 1, values=[1])},
          rank=1, alpha=3, scaling="alpha/rank", scale=3 * (1 + 2**-41))])  # fmt: skip
valid("shape_product_limit", "an expert of a tensor of exactly 2^53 elements",
      ["R-016"],
      {}, [lora("experts.w", [2**51, 2, 2], expert=2**51 - 1)], merge=False)  # fmt: skip
valid("index_last", "single rows: the first and the last",
      ["R-032", "R-034"],
      {"e.weight": t("BF16", 5, 3)},
      [up("replace_rows", "e.weight", [5, 3], {"index": t("I64", 2, values=[0, 4]), "value": t("BF16", 2,
          3)})])  # fmt: skip
valid("rows_beside_expert",
      "two experts are replaced, a third has a lora, and rows of every expert of another tensor have one",
      ["R-023", "R-029"],
      {"c": t("F32", 3, 4, 2), "d": t("F32", 3, 4, 2)},
      [up("replace", "c", [3, 4, 2], {"value": t("F32", 4, 2)}, expert=1),
       up("replace", "c", [3, 4, 2], {"value": t("F32", 4, 2)}, expert=0),
       lora("c", [3, 4, 2], expert=2), lora("d", [3, 4, 2], 2, experts=3, rows=[2, 4])])  # fmt: skip
for dtype, low, step in (("F16", -14, -24), ("BF16", -126, -133), ("F32", -126, -149), ("F64", -1022, -1074)):
    valid(f"subnormal_{dtype.lower()}", f"results below the smallest normal number of {dtype} are not flushed to zero",
          ["R-060", "R-061"],
          {"w": t(dtype, 4, values=[2.0**low, 2.0**step, 3 * 2.0**step, -(2.0**low)])},
          [up("add", "w", [4], {"value": t("F64", 4, values=[-(2.0**step), 2.0**step, -(2.0**step), 2.0 ** (low - 1)])},
              **FREE, scale=1)])  # fmt: skip
TOPS = (("F16", 65504, 8), ("BF16", 2.0**128 - 2.0**120, 2.0**118), ("F32", 2.0**128 - 2.0**104, 2.0**102))
for dtype, top, less in TOPS:
    valid(f"largest_{dtype.lower()}", f"a sum over the largest number of {dtype} that rounds to it",
          ["R-061"],
          {"w": t(dtype, 2, values=[top, -top])},
          [up("add", "w", [2], {"value": t("F64", 2, values=[less, -less])}, **FREE, scale=1)])  # fmt: skip

# ---------------------------------------------------------------- valid: many updates of one target

for dtype, count in (("F64", 4), ("F64", 12), ("F32", 5), ("F32", 24), ("BF16", 24)):
    valid(f"many_loras_{dtype.lower()}_{count}", f"{count} loras on one tensor of {dtype}, which cancel in part",
          ["R-060", "R-061"],
          {"w": t(dtype, 2, 2)},
          [lora("w", [2, 2], alpha=(-1) ** i * (3 + i)) for i in range(count)])  # fmt: skip
valid("many_adds", "14 adds on one tensor of F32, from 2^-20 to 2^20",
      ["R-060", "R-061"],
      {"w": t("F32", 2, 2)},
      [up("add", "w", [2, 2], {"value": t("F32", 2, 2)}, **FREE, scale=(-1) ** i * 2.0 ** (3 * i - 20))
       for i in range(14)])  # fmt: skip
valid("many_kinds", "a replacement in part, loras, a loha and a lokr on one tensor",
      ["R-029", "R-060", "R-061"],
      {"w": t("F32", 4, 4)},
      [up("replace", "w", [4, 4], {"value": t("F32", 4, 4)}), lora("w", [4, 4], alpha=1), lora("w", [4, 4], alpha=-1),
       up("loha", "w", [4, 4], {"A1": t("F32", 2, 4), "B1": t("F32", 4, 2), "A2": t("F32", 2, 4), "B2": t("F32", 4, 2)},
          **ALPHA),
       up("lokr", "w", [4, 4], {"w1": t("F32", 2, 2), "w2": t("F32", 2, 2)}, **FREE, scale=0.5)])  # fmt: skip
valid("underflow", "products that underflow in binary32: what is left is within the band, and no more",
      ["R-060", "R-061"],
      {"w": t("BF16", 2, 2, values=[0, 2.0**-133, -(2.0**-126), 1])},
      [up("lora", "w", [2, 2], {"A": t("BF16", 1, 2, values=[2.0**-70, 2.0**-64]),
                                "B": t("BF16", 2, 1, values=[2.0**-70, -(2.0**-69)])},
          rank=1, scaling="none", scale=1)])  # fmt: skip

METADATA = {case["name"]: case["metadata"] for case in VALID if "metadata" in case}

# ---------------------------------------------------------------- merges

MERGES = []


def merge(name, shows, rules, adapters, base=None, error=None, **more):
    adapters = [{"case": n, "weight": w} for n, w in adapters]
    case = {"name": name, "shows": shows, "rules": rules, "adapters": adapters}
    MERGES.append({**case, "base": base or adapters[0]["case"], "error": error, **more})


W = ["R-060"]
merge("weight_half", "weight 0.5 of a lora", W, [("lora_linear", 0.5)])
merge("weight_minus", "weight -1 of a lora", W, [("lora_conv", -1)])
merge("weight_zero", "weight 0 of a lora changes nothing", W, [("lora_linear", 0)])
merge("weight_zero_dora", "weight 0 of a dora changes nothing", W, [("dora_axis0", 0)])
merge("weight_zero_replace", "weight 0 of a replacement changes nothing", W, [("replace", 0)])
merge("weight_zero_rows", "weight 0 of single rows changes nothing", W, [("replace_rows", 0)])
merge("weight_dora", "a dora with weight 0.3 moves part of the way", W, [("dora_axis1", 0.3)])
merge("weight_scale", "a scale with weight 0.5 moves half of the way", W, [("scale_axis0", 0.5)])
merge("weight_scale_minus", "a scale with weight -1.5: away from its result", W, [("scale_axis1", -1.5)])
merge("weight_zero_scale", "weight 0 of a scale changes nothing", W, [("scale_experts", 0)])
merge("weight_replace", "a replacement with weight 0.7", W, [("replace", 0.7)])
merge("weight_rows", "single rows with weight 0.5, the lora on top too", W, [("replace_rows", 0.5)])
merge("two_loras", "two adapters in one sum, rounded once", W,
      [("lora_linear", 1), ("loha", 0.5)])  # fmt: skip
merge("two_with_replace", "the second adapter replaces, the first adds on top", W,
      [("scaling_alpha", 1), ("replace_then_lora", 0.5)])  # fmt: skip
merge("two_rows", "two adapters replace different rows of one tensor", ["R-060", "R-062"],
      [("replace_rows", 1), ("replace_rows_other", 0.5)])  # fmt: skip
merge("weight_two_replace", "a replacement with weight 2 goes past it", W, [("replace", 2)])
merge("weight_two_dora", "a dora with weight 2 goes past it", W, [("dora_axis0", 2)])
merge("zero_beside", "two adapters replace one tensor, one of them at weight 0: it meets nothing",
      ["R-043", "R-062"], [("replace", 1), ("replace", 0)])  # fmt: skip
merge("zero_dora_beside", "a dora at weight 0 beside a lora", ["R-043", "R-062"],
      [("dora_axis0", 0), ("scaling_sqrt_rank", 1)])  # fmt: skip
for dtype in ("f16", "bf16", "f32"):
    merge(f"refused_beyond_{dtype}", "the sum rounds to a number after the largest one",
          ["R-061"], [(f"largest_{dtype}", 2.5)], error="E-NONFINITE")  # fmt: skip
merge("refused_fp8_beyond", "over 464 there is no number of F8_E4M3", ["R-061"],
      [("fp8_e4m3", 1.0625)], error="E-NONFINITE")  # fmt: skip
merge("refused_digest", "one bit of the base differs from the recorded digest", ["R-041"],
      [("lora_linear", 1)], error="E-BASE-MISMATCH", flip="l.weight", needs="blake3")  # fmt: skip
merge("refused_dtype", "the base has another dtype than the recorded one", ["R-041"],
      [("lora_linear", 1)], error="E-BASE-MISMATCH", swap={"l.weight": t("F16", 4, 3)})  # fmt: skip
merge("refused_no_target", "a tensor that the base lacks, without consent", ["R-043"],
      [("replace_new", 1)], error="E-TARGET")  # fmt: skip
merge("refused_no_target_lora", "a lora on a tensor that the base lacks, with consent", ["R-043"],
      [("lora_linear", 1), ("lora_conv", 1)], error="E-TARGET", consent=True)  # fmt: skip
merge("refused_resize", "a tensor of another shape, without consent", ["R-043"],
      [("replace_resized", 1)], error="E-TARGET")  # fmt: skip
merge("refused_resize_weight", "half of a tensor of another shape", ["R-043"],
      [("replace_resized", 0.5)], error="E-TARGET", consent=True)  # fmt: skip
merge("refused_shape", "the base has a row less than the adapter says", ["R-043"],
      [("lora_embedding", 1)], error="E-SHAPE", swap={"e.weight": t("F16", 5, 3)})  # fmt: skip
merge("refused_integers", "a base of integers", ["R-063"],
      [("scaling_alpha", 1)], error="E-QUANTISED",
      swap={"l.weight": t("I64", 4, 3, values=range(12))})  # fmt: skip
merge("refused_overflow", "the result does not fit F16", ["R-061"],
      [("lora_in_out", 60000)], error="E-NONFINITE")  # fmt: skip
merge("refused_zero_norm", "a column of the direction is zero", ["R-060"],
      [("dora_zero_column", 1)], error="E-NONFINITE",
      swap={"l.weight": t("F32", 2, 2, values=[0, 1, 0, 2])})  # fmt: skip
merge("refused_two_replacements", "two adapters replace the same tensor", ["R-062"],
      [("replace", 1), ("replace", 0.5)], error="E-OVERLAP")  # fmt: skip
merge("refused_dora_and_lora", "a dora is not alone on its region", ["R-062"],
      [("dora_axis0", 1), ("scaling_sqrt_rank", 1)], error="E-OVERLAP")  # fmt: skip
merge("refused_scale_and_lora", "a scale is not alone on its region", ["R-062"],
      [("scale_axis1", 1), ("scaling_none", 1)], error="E-OVERLAP")  # fmt: skip
merge("refused_two_scales", "two adapters with a scale of one tensor", ["R-062"],
      [("scale_axis0", 1), ("scale_axis0", 0.5)], error="E-OVERLAP")  # fmt: skip

merge("refused_conditional", "an adapter that acts after tokens only", ["R-047"],
      [("conditional_tokens", 1)], error="E-CONDITIONAL")  # fmt: skip
merge("refused_conditional_zero", "the same at weight 0, beside another one", ["R-047"],
      [("lora_linear", 1), ("conditional_prompts", 0)], error="E-CONDITIONAL")  # fmt: skip
merge("refused_scales", "one bit of the scales differs, none of the codes", ["R-041"],
      [("base_scales", 1)], error="E-BASE-MISMATCH", flip="l.weight_scale", needs="blake3")  # fmt: skip
merge("refused_no_scales", "the same codes without scales", ["R-041"],
      [("base_scales", 1)], error="E-BASE-MISMATCH", lacks=["l.weight_scale"])  # fmt: skip
merge("refused_sha256", "one bit of the base differs from the SHA-256 digest", ["R-041"],
      [("base_known", 1)], error="E-BASE-MISMATCH", flip="e.weight")  # fmt: skip
merge("refused_lacks_recorded", "the base lacks a recorded tensor, which a replacement would bring", ["R-041"],
      [("replace_resized", 1)], error="E-BASE-MISMATCH", lacks=["e.weight"],
      swap={"f.weight": t("BF16", 4, 3)}, consent=True)  # fmt: skip
merge("refused_new_zero", "a new tensor at weight 0, with consent", ["R-043"],
      [("replace_new", 0)], error="E-TARGET", consent=True)  # fmt: skip
merge("overlap_zero", "two replacements of one tensor, one of them at weight 0", ["R-062"],
      [("replace", 1), ("replace", 0)])  # fmt: skip
merge("zero_norm_zero", "a column of the direction is zero, at weight 0", W,
      [("dora_zero_column", 0)], swap={"l.weight": t("F32", 2, 2, values=[0, 1, 0, 2])})  # fmt: skip
merge("refused_shapes", "two adapters give a new tensor different shapes", ["R-062"],
      [("replace_resized", 1), ("replace_rows_other", 1)], error="E-SHAPE", consent=True)  # fmt: skip
merge("refused_nan_outside", "the base holds NaN in a row that no update changes", ["R-061"],
      [("dora_rows_only", 1)], error="E-NONFINITE", nan="qk.weight")  # fmt: skip
merge("refused_fp8_overflow", "465.4, which F8_E4M3 can not hold: it does not saturate", ["R-061"],
      [("fp8_e4m3", 1.125)], error="E-NONFINITE")  # fmt: skip
merge("refused_fp8_infinity", "61443, which F8_E5M2 rounds to infinity", ["R-061"],
      [("fp8_e5m2", 1.001)], error="E-NONFINITE")  # fmt: skip
merge("fp8_weight", "an 8-bit base and weight 0.5", W, [("fp8_lora", 0.5)])

# ---------------------------------------------------------------- invalid: the edits
# An edit is (stage, function). The stages, in the order in which generate.py builds a file:
#   file      (manifest, tensors), changed in place       tensors are {name: [dtype, shape, bytes]}
#   text      the manifest's JSON text -> new text
#   header    the header as a dict, in order, changed in place or a new one returned
#   json      the header's bytes before padding -> new bytes
#   bytes     the bytes of the whole file -> new bytes


def at(obj, path):
    for key in path:
        obj = obj[key]
    return obj


def put(*path, to):
    def edit(manifest, tensors):
        at(manifest, path[:-1])[path[-1]] = to

    return "file", edit


def drop(*path):
    def edit(manifest, tensors):
        del at(manifest, path[:-1])[path[-1]]

    return "file", edit


SIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def tensor(name, dtype, *shape):
    """Puts a zero tensor in that place, new or instead of the one there."""

    def edit(manifest, tensors):
        tensors[name] = [dtype, list(shape), bytes(SIZE[dtype] * math.prod(shape))]

    return "file", edit


def bits(name, i, raw):
    """Overwrites element i of a tensor with raw little-endian bytes."""

    def edit(manifest, tensors):
        dtype, shape, data = tensors[name]
        data = data[: i * len(raw)] + raw + data[(i + 1) * len(raw) :]
        tensors[name] = [dtype, shape, data]

    return "file", edit


def rename(old, new):
    def edit(manifest, tensors):
        tensors[new] = tensors.pop(old)

    return "file", edit


def retarget(to):
    """Renames the target of the only update, and its tensors with it."""

    def edit(manifest, tensors):
        old, manifest["updates"][0]["target"] = manifest["updates"][0]["target"], to
        for name in list(tensors):
            tensors[to + name.removeprefix(old)] = tensors.pop(name)

    return "file", edit


def lose(name):
    return "file", lambda manifest, tensors: tensors.pop(name)


def second(update, **tensors_of_it):
    """Appends an update with its (zero) tensors."""

    def edit(manifest, tensors):
        manifest["updates"].append(update)
        for name, (dtype, *shape) in tensors_of_it.items():
            ordinal = sum(u["target"] == update["target"] for u in manifest["updates"]) - 1
            tensor(f"{update['target']}.{ordinal}.{name}", dtype, *shape)[1](manifest, tensors)

    return "file", edit


def text(old, new):
    return "text", lambda s: swap(s, old, new)


def json(old, new):
    return "json", lambda s: swap(s, old, new)


def swap(s, old, new):
    if s.count(old) < 1:
        raise ValueError(f"{old!r} is not there")
    return s.replace(old, new, 1)


def entry(key, to, name="l.weight.0.A"):
    return "header", lambda h: h[name].__setitem__(key, to)


def raw(edit):
    return "bytes", edit


def hole(b):
    """8 bytes between the two tensors of lora_linear."""
    b = swap(b, b"[24,56]", b"[32,64]")
    return b[: head(b) + 24] + bytes(8) + b[head(b) + 24 :]


def head(b):
    return 8 + int.from_bytes(b[:8], "little")


INVALID = []
SEEN = "seen by the schema"


def invalid(rule, code, of, *mutants, schema=None):
    """schema: whether the JSON schema of the manifest can see the fault; SEEN says so for one."""
    for name, how, (stage, edit), *one in mutants:
        seen = bool(one) or (stage == "file" if schema is None else schema)
        INVALID.append({"name": name, "of": of, "mutation": how, "code": code, "rule": rule,
                        "stage": stage, "edit": edit, "schema": seen})  # fmt: skip


L, N, R, E = "lora_linear", "lora_embedding", "lora_rows", "lora_experts"
U0 = ("updates", 0)

# ---------------------------------------------------------------- invalid: container

invalid("R-001", "E-HEADER", L,
    ("empty", "the file is cut to no bytes", raw(lambda b: b"")),
    ("length_cut", "the file is cut to 7 bytes", raw(lambda b: b[:7])),
    ("header_cut", "the file is cut inside the header", raw(lambda b: b[:100])),
    ("length_over_limit", "the header length says 100000001",
     raw(lambda b: (100_000_001).to_bytes(8, "little") + b[8:])),
    ("length_huge", "the header length says 2^64 - 1", raw(lambda b: b"\xff" * 8 + b[8:])),
    ("length_one", "the header length says 1", raw(lambda b: (1).to_bytes(8, "little") + b[8:])),
)  # fmt: skip
invalid("R-002", "E-HEADER", L,
    ("header_not_utf8", "a letter of a tensor name is the byte FF",
     json(b"l.weight.0.A", b"\xff.weight.0.A")),
    ("header_not_json", "the first colon is missing", json(b":", b"")),
    ("header_array", "the header stands in an array", ("json", lambda s: b"[" + s + b"]")),
    ("header_leading_space", "a space before the header", ("json", lambda s: b" " + s)),
    ("header_trailing_newline", "a line feed after the header", ("json", lambda s: s + b"\n")),
    ("header_two_values", "a second object after the first", ("json", lambda s: s + b"{}")),
    ("header_nan", "a shape holds NaN", json(b'"shape":[2,3]', b'"shape":[2,NaN]')),
    ("header_surrogate", "a tensor name holds an unpaired surrogate",
     json(b"l.weight.0.A", b"\\ud800.weight.0.A")),
)  # fmt: skip
invalid("R-002", "E-LIMIT", L,
    ("header_deep", "a shape is nested 17 deep",
     json(b'"shape":[2,3]', b'"shape":' + b"[" * 15 + b"2" + b"]" * 15)),
    ("header_bomb", "a shape is nested 3000 deep",
     json(b'"shape":[2,3]', b'"shape":' + b"[" * 3000 + b"]" * 3000)),
)  # fmt: skip
invalid("R-003", "E-DUPLICATE", L,
    ("duplicate_tensor", "a tensor is listed twice",
     ("json", lambda s: s[:-1] + b"," + s[s.index(b'"l.weight.0.A"'):s.index(b'},"l.weight.0.B')]
      + b"}}")),
    ("duplicate_entry_key", "a tensor has two dtypes",
     json(b'{"dtype":"F32",', b'{"dtype":"F16","dtype":"F32",')),
    ("duplicate_manifest_key", "the manifest has two versions",
     text('"version":"1.0"', '"version":"1.0","version":"1.0"')),
    ("duplicate_nested_key", "an update has two ranks", text('"rank":2', '"rank":3,"rank":2')),
    ("duplicate_escaped_key", "an update has two ranks, one spelt with an escape",
     text('"rank":2', '"r\\u0061nk":2,"rank":2')),
)  # fmt: skip
invalid("R-004", "E-HEADER", L,
    ("entry_not_object", "a tensor entry is a number",
     ("header", lambda h: h.__setitem__("l.weight.0.A", 1))),
    ("entry_no_offsets", "a tensor has no data_offsets",
     ("header", lambda h: h["l.weight.0.A"].pop("data_offsets"))),
    ("entry_extra_key", "a tensor has a fourth key", entry("strides", [3, 1])),
    ("entry_dtype_number", "a dtype is a number", entry("dtype", 32)),
    ("entry_shape_fraction", "a shape is written 2.0", entry("shape", [2.0, 3])),
    ("entry_shape_boolean", "a shape holds true", entry("shape", [True, 6])),
    ("entry_shape_negative", "a shape is negative", entry("shape", [-2, -3])),
    ("entry_shape_large", "a shape holds 2^53 + 1", entry("shape", [2**53 + 1])),
    ("entry_offsets_three", "three offsets", entry("data_offsets", [0, 24, 24])),
    ("entry_offsets_text", "offsets are strings", entry("data_offsets", ["0", "24"])),
    ("metadata_number", "another metadata value is a number",
     ("header", lambda h: h["__metadata__"].__setitem__("pt", 1))),
    ("metadata_not_object", "__metadata__ is a string",
     ("header", lambda h: h.__setitem__("__metadata__", "x"))),
)  # fmt: skip
invalid("R-005", "E-TENSOR", L,
    ("dtype_unknown", "a dtype that safetensors lacks", entry("dtype", "F128")),
    ("dtype_lower_case", "a dtype in small letters", entry("dtype", "f32")),
    ("size_differs", "a shape of another size than the bytes", entry("shape", [2, 4])),
    ("offsets_reversed", "the offsets of a tensor change places", entry("data_offsets", [24, 0])),
    ("shape_overflow", "a shape whose product wraps to the right size in 64 bits",
     entry("shape", [1050655, 684737634023226])),
)  # fmt: skip
invalid("R-006", "E-LAYOUT", L,
    ("hole", "8 unused bytes before the last tensor", raw(lambda b: hole(b))),
    ("overlapping_data", "the second tensor starts where the first does",
     entry("data_offsets", [0, 32], "l.weight.0.B")),
    ("trailing_bytes", "8 bytes follow the last tensor", raw(lambda b: b + bytes(8))),
    ("data_cut", "the last 4 bytes are missing", raw(lambda b: b[:-4])),
    ("data_missing", "all data is missing", raw(lambda b: b[: head(b)])),
)  # fmt: skip
invalid("R-010", "E-MANIFEST", L,
    ("no_metadata", "__metadata__ is missing",
     ("header", lambda h: {k: v for k, v in h.items() if k != "__metadata__"})),
    ("no_manifest", "the key loratool is missing",
     ("header", lambda h: h.__setitem__("__metadata__", {"format": "pt"}))),
    ("manifest_not_json", "a comma is missing", text(",", "")),
    ("manifest_array", "the manifest stands in an array", ("text", lambda s: f"[{s}]"), SEEN),
    ("manifest_empty", "the manifest is the empty string", ("text", lambda s: "")),
    ("manifest_two_values", "a second object after the first", ("text", lambda s: s + "{}")),
    ("manifest_nan", "alpha is NaN", text('"alpha":8', '"alpha":NaN')),
    ("manifest_surrogate", "a provenance value holds an unpaired surrogate",
     text('"hand"', '"\\ud800"')),
)  # fmt: skip

# ---------------------------------------------------------------- invalid: manifest

invalid("R-011", "E-MANIFEST", L,
    ("format_other", "format is lora", put("format", to="lora")),
    ("version_number", "version is the number 1.5", put("version", to=1.5)),
    ("version_no_minor", "version is 1", put("version", to="1")),
    ("version_leading_zero", "version is 1.00", put("version", to="1.00")),
    ("version_zero_major", "version is 0.9", put("version", to="0.9")),
    ("version_three_parts", "version is 1.0.0", put("version", to="1.0.0")),
    ("version_other_digits", "the zero of the version is an Arabic-Indic digit",
     put("version", to="1.\u0660")),
)  # fmt: skip
invalid("R-011", "E-MANIFEST", L,
    ("version_newline", "a line feed after the version", put("version", to="1.0\n")),
    schema=False,  # `$` means the end of the text in ECMA-262, not in every regex library
)  # fmt: skip
invalid("R-012", "E-VERSION", L,
    ("major_two", "version is 2.0", put("version", to="2.0")),
    ("major_ten", "version is 10.0", put("version", to="10.0")),
)  # fmt: skip
invalid("R-013", "E-FEATURE", L,
    ("feature_unknown", "a feature of the future", put("features", to=["quaternion"])),
    ("feature_lora", "lora is no feature", put("features", to=["lora"])),
)  # fmt: skip
invalid("R-013", "E-FEATURE", R,
    ("feature_twice", "a feature is listed twice", put("features", to=["rows", "rows"])),
)  # fmt: skip
invalid("R-015", "E-MANIFEST", R,
    ("features_text", "features is a string", put("features", to="rows")),
)  # fmt: skip
invalid("R-013", "E-MANIFEST", R,
    ("features_number", "a feature is a number", put("features", to=["rows", 1])),
)  # fmt: skip
invalid("R-014", "E-UNKNOWN-KEY", L,
    ("key_in_manifest", "a key without a dot in the manifest", put("comment", to="x")),
    ("key_in_update", "a key without a dot in an update", put(*U0, "dropout", to=0)),
    ("key_in_base", "a key without a dot in base", put("base", "commit", to="main")),
    ("key_in_base_tensor", "a key without a dot in a base tensor",
     put("base", "tensors", "l.weight", "file", to="x")),
    ("key_of_other_kind", "a lora with an axis", put(*U0, "axis", to=0)),
    ("key_misspelt_case", "Layout for layout", put(*U0, "Layout", to="in_out")),
)  # fmt: skip
invalid("R-014", "E-UNKNOWN-KEY", "higher_minor",
    ("key_of_the_future", "version 1.9 with a key that 1.0 lacks", put("layers", to=[])),
)  # fmt: skip
invalid("R-015", "E-MANIFEST", L,
    ("no_features", "features is missing", drop("features")),
    ("no_updates", "updates is missing", drop("updates")),
    ("no_base", "base is missing", drop("base")),
    ("no_provenance", "provenance is missing", drop("provenance")),
    ("updates_object", "updates is an object", put("updates", to={})),
    ("base_array", "base is an array", put("base", to=[])),
    ("provenance_null", "provenance is null", put("provenance", to=None)),
)  # fmt: skip
invalid("R-016", "E-LIMIT", N,
    ("target_empty", "the target is empty, here and in the tensor names", retarget("")),
    ("target_control", "the target ends in a line feed", retarget("e.weight\n")),
    ("target_delete", "the target holds U+007F", retarget("e\x7fweight")),
    ("updates_none", "the only update is taken out", put("updates", to=[])),
    ("shape_nine_axes", "a shape has nine axes", put(*U0, "shape", to=[6, 3] + [1] * 7)),
)  # fmt: skip
invalid("R-016", "E-LIMIT", "scaling_alpha",
    ("rank_zero", "rank is 0", put(*U0, "rank", to=0)),
    ("rank_over_limit", "rank is 65537", put(*U0, "rank", to=65537)),
)  # fmt: skip
invalid("R-016", "E-LIMIT", N,
    ("target_long", "a target of 513 letters of two bytes each", retarget("é" * 513)),
    ("shape_product", "a shape of 2^54 elements", put(*U0, "shape", to=[2**27, 2**27])),
    schema=False,
)  # fmt: skip
invalid("R-010", "E-LIMIT", L,
    ("manifest_deep", "a vendor key is nested 17 deep",
     text('"version"', '"x.y":' + "[" * 16 + "]" * 16 + ',"version"')),
    ("manifest_bomb", "a vendor key is nested 3000 deep",
     text('"version"', '"x.y":' + "[" * 3000 + "]" * 3000 + ',"version"')),
    schema=False,
)  # fmt: skip
invalid("R-017", "E-FEATURE", R,
    ("feature_missing", "rows is used and not listed", put("features", to=[])),
    ("feature_unused", "a feature that nothing uses", put("features", to=["mid", "rows"])),
    schema=False,
)  # fmt: skip
invalid("R-017", "E-FEATURE", "dora_loha",
    ("features_unsorted", "the features change places", put("features", to=["loha", "dora"])),
    schema=False,
)  # fmt: skip

# ---------------------------------------------------------------- invalid: updates

invalid("R-020", "E-MANIFEST", N,
    ("update_not_object", "an update is a string", put(*U0, to="e.weight")),
    ("no_target", "an update has no target", drop(*U0, "target")),
    ("no_kind", "an update has no kind", drop(*U0, "kind")),
    ("no_shape", "an update has no shape", drop(*U0, "shape")),
    ("target_number", "a target is a number", put(*U0, "target", to=1)),
    ("kind_number", "a kind is a number", put(*U0, "kind", to=1)),
    ("shape_text", "a shape is a string", put(*U0, "shape", to="6x3")),
    ("shape_boolean", "a shape holds true", put(*U0, "shape", to=[True, 3])),
    ("rank_text", "rank is a string", put(*U0, "rank", to="2")),
    ("rank_boolean", "rank is true", put(*U0, "rank", to=True)),
    ("alpha_text", "alpha is a string", put(*U0, "alpha", to="8")),
    ("scale_boolean", "scale is true", put(*U0, "scale", to=True)),
    ("scaling_number", "scaling is a number", put(*U0, "scaling", to=4)),
)  # fmt: skip
invalid("R-020", "E-MANIFEST", N,
    ("shape_fraction", "a shape is written 6.0", text("[6,3]", "[6.0,3]")),
    ("rank_exponent", "rank is written 2e0", text('"rank":2', '"rank":2e0')),
    schema=False,  # JSON Schema calls 6.0 an integer
)  # fmt: skip
invalid("R-020", "E-MANIFEST", R,
    ("rows_three", "rows has three numbers", put(*U0, "rows", to=[0, 1, 2])),
    ("rows_text", "rows is a string", put(*U0, "rows", to="0:2")),
)  # fmt: skip
invalid("R-021", "E-KIND", L,
    ("kind_unknown", "a kind of the future", put(*U0, "kind", to="vera")),
    ("kind_capitals", "LoRA for lora", put(*U0, "kind", to="LoRA")),
)  # fmt: skip
invalid("R-022", "E-SHAPE", "lora_embedding",
    ("shape_zero", "a shape holds 0", put(*U0, "shape", to=[0, 3])),
    ("shape_negative", "a shape holds -6", put(*U0, "shape", to=[-6, 3])),
    ("matrix_one_axis", "a lora on a vector", put(*U0, "shape", to=[6])),
    ("matrix_scalar", "a lora on a scalar", put(*U0, "shape", to=[])),
)  # fmt: skip
invalid("R-022", "E-SHAPE", "replace_rows",
    ("rows_of_scalar", "replace_rows on a scalar", ("file", lambda m, ts: (
        m["updates"].pop(1), m["updates"][0].update(shape=[]),
        ts.pop("e.weight.1.A"), ts.pop("e.weight.1.B")))),
)  # fmt: skip
invalid("R-022", "E-SHAPE", "scale_axis0",
    ("scale_of_scalar", "a scale of a scalar", put("updates", 1, "shape", to=[])),
    ("scale_axis_of_vector", "a factor per column of a vector", put("updates", 1, "axis", to=1)),
)  # fmt: skip
invalid("R-022", "E-SHAPE", "stacked",
    ("shapes_differ", "two shapes for one target", put("updates", 1, "shape", to=[4, 4])),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", R,
    ("rows_past_end", "rows stop after the last row", put(*U0, "rows", to=[5, 7])),
    ("rows_empty", "an empty row range", put(*U0, "rows", to=[1, 1])),
    ("rows_reversed", "rows run backwards", put(*U0, "rows", to=[2, 0])),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", R,
    ("rows_negative", "rows start before 0", put(*U0, "rows", to=[-2, 0])),
)  # fmt: skip
invalid("R-023", "E-RANGE", "lora_expert",
    ("expert_negative", "expert is -1", put(*U0, "expert", to=-1)),
    ("expert_and_experts", "expert and experts together", put(*U0, "experts", to=3)),
)  # fmt: skip
invalid("R-023", "E-RANGE", "lora_expert",
    ("expert_past_end", "expert is the number of experts", put(*U0, "expert", to=3)),
    ("expert_of_matrix", "a shape without an expert axis", put(*U0, "shape", to=[4, 2]), SEEN),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", E,
    ("experts_differ", "experts is not the first dimension", put(*U0, "experts", to=2)),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", "add",
    ("expert_of_vector", "expert on a bias", put("updates", 1, "expert", to=0), SEEN),
    ("rows_of_number", "rows on a scalar", put("updates", 2, "rows", to=[0, 1]), SEEN),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", "replace_rows",
    ("single_rows_with_rows", "replace_rows with rows", put(*U0, "rows", to=[0, 5])),
    ("single_rows_with_expert", "replace_rows with expert", put(*U0, "expert", to=0)),
)  # fmt: skip
invalid("R-024", "E-SCALE", L,
    ("no_scale", "scale is missing", drop(*U0, "scale")),
    ("no_scaling", "scaling is missing", drop(*U0, "scaling")),
    ("no_alpha", "alpha is missing", drop(*U0, "alpha")),
    ("scaling_unknown", "a rule that is not registered", put(*U0, "scaling", to="alpha*rank")),
    ("alpha_and_none", "alpha beside the rule none", put(*U0, "scaling", to="none")),
)  # fmt: skip
invalid("R-024", "E-SCALE", "add",
    ("add_no_scale", "an add without scale", drop(*U0, "scale")),
    ("add_scaling", "an add with the rule alpha", put(*U0, "scaling", to="alpha")),
    ("add_rank", "an add with a rank", put(*U0, "rank", to=2)),
    ("add_alpha", "an add with an alpha", put(*U0, "alpha", to=1)),
)  # fmt: skip
invalid("R-024", "E-SCALE", "replace",
    ("replace_scale", "a replace with a scale", put(*U0, "scale", to=1)),
    ("replace_scaling", "a replace with a rule", put(*U0, "scaling", to="none")),
    ("replace_rank", "a replace with a rank", put(*U0, "rank", to=2)),
)  # fmt: skip
invalid("R-024", "E-SCALE", "scale_axis1",
    ("scale_scale", "a scale with a scale", put(*U0, "scale", to=1)),
    ("scale_scaling", "a scale with a rule", put(*U0, "scaling", to="none")),
    ("scale_rank", "a scale with a rank", put(*U0, "rank", to=1)),
)  # fmt: skip
invalid("R-024", "E-SCALE", "replace_rows",
    ("single_rows_alpha", "replace_rows with alpha", put(*U0, "alpha", to=1)),
)  # fmt: skip
invalid("R-025", "E-SCALE", L,
    ("scale_other_rule", "scale is alpha, the rule is alpha/rank", put(*U0, "scale", to=8)),
    ("scale_off", "scale is off by 1e-9 of its value", put(*U0, "scale", to=4.000000004)),
    ("scale_sign", "scale has the other sign", put(*U0, "scale", to=-4)),
    ("scale_infinite", "scale is 1e999", text('"scale":4', '"scale":1e999')),
    schema=False,
)  # fmt: skip
invalid("R-025", "E-SCALE", "scaling_none",
    ("scale_free_infinite", "a free scale is -1e999", text('"scale":1e-7', '"scale":-1e999')),
    schema=False,
)  # fmt: skip
invalid("R-026", "E-RANK", "lora_mid",
    ("rank_differs", "rank is 3, the factors have 2", put(*U0, "rank", to=3)),
    ("rank_of_b", "B has another inner dimension than rank",
     tensor("conv.weight.0.B", "F16", 4, 3)),
    schema=False,
)  # fmt: skip
invalid("R-026", "E-RANK", "lora_mid",
    ("no_rank", "rank is missing, the rule does not need it", drop(*U0, "rank")),
)  # fmt: skip
invalid("R-026", "E-RANK", "lokr_full",
    ("rank_of_whole", "a lokr of whole factors with a rank", put(*U0, "rank", to=1)),
    ("rule_of_whole", "a lokr of whole factors with the rule alpha/rank",
     put(*U0, "scaling", to="alpha/rank"), SEEN),
    schema=False,
)  # fmt: skip
invalid("R-026", "E-RANK", "lokr_factored",
    ("rank_of_a1", "the first product has another rank", ("file", lambda m, ts: (
        tensor("l.weight.0.A1", "F16", 1, 3)[1](m, ts),
        tensor("l.weight.0.B1", "F16", 2, 1)[1](m, ts)))),
    schema=False,
)  # fmt: skip
invalid("R-027", "E-MANIFEST", "lora_in_out",
    ("layout_unknown", "layout is out_in", put(*U0, "layout", to="out_in")),
    ("layout_number", "layout is a number", put(*U0, "layout", to=1)),
)  # fmt: skip
invalid("R-028", "E-MANIFEST", "dora_axis0",
    ("no_direction", "direction is missing", drop(*U0, "direction")),
    ("direction_unknown", "direction is dora", put(*U0, "direction", to="dora")),
    ("no_axis", "axis is missing", drop(*U0, "axis")),
    ("axis_two", "axis is 2", put(*U0, "axis", to=2)),
    ("axis_negative", "axis is -1", put(*U0, "axis", to=-1)),
    ("axis_boolean", "axis is false", put(*U0, "axis", to=False)),
)  # fmt: skip
invalid("R-028", "E-MANIFEST", "scale_axis1",
    ("scale_no_axis", "a scale without axis", drop(*U0, "axis")),
    ("scale_axis_two", "the axis of a scale is 2", put(*U0, "axis", to=2)),
)  # fmt: skip
invalid("R-014", "E-UNKNOWN-KEY", "scale_axis1",
    ("scale_direction", "a scale with a direction", put(*U0, "direction", to="lora")),
)  # fmt: skip
ADDED = {"target": "l.weight", "kind": "lora", "shape": [4, 3], **ALPHA, "scale": 3}
DOUBLE = {"target": "head.weight", "kind": "replace", "shape": [4, 3]}
invalid("R-029", "E-OVERLAP", "dora_axis0",
    ("dora_and_lora", "a lora is added on the tensor of a dora",
     second(ADDED, A=("F32", 2, 3), B=("F32", 4, 2))),
    ("dora_twice", "a second dora on the same tensor",
     second({**ADDED, **DORA, "kind": "dora"}, A=("F32", 2, 3), B=("F32", 4, 2),
            magnitude=("F32", 4))),
    schema=False,
)  # fmt: skip
invalid("R-029", "E-OVERLAP", "scale_axis1",
    ("scale_and_lora", "a lora is added on the tensor of a scale",
     second(ADDED, A=("F32", 2, 3), B=("F32", 4, 2))),
    ("scale_twice", "a second scale on the same tensor, along the other axis",
     second({"target": "l.weight", "kind": "scale", "shape": [4, 3], "axis": 0}, factor=("F32", 4))),
    schema=False,
)  # fmt: skip
invalid("R-029", "E-OVERLAP", "replace",
    ("replace_twice", "a second replacement of the same tensor",
     second(DOUBLE, value=("F32", 4, 3))),
    schema=False,
)  # fmt: skip
invalid("R-029", "E-OVERLAP", "replace_part",
    ("replace_rows_meet", "a second row range that meets the first",
     second({"target": "a", "kind": "replace", "shape": [4, 2], "rows": [2, 4]},
            value=("F16", 2, 2))),
    ("replace_expert_meet", "one expert beside all experts",
     second({"target": "c", "kind": "replace", "shape": [2, 3], "expert": 0}, value=("F16", 3))),
    schema=False,
)  # fmt: skip
invalid("R-029", "E-OVERLAP", "replace_rows",
    ("single_rows_twice", "a second replace_rows on the same tensor, for another row",
     second({"target": "e.weight", "kind": "replace_rows", "shape": [5, 3]},
            index=("I64", 1), value=("F16", 1, 3))),
    schema=False,
)  # fmt: skip

# ---------------------------------------------------------------- invalid: tensors

invalid("R-030", "E-COMPONENTS", L,
    ("component_missing", "A is missing", lose("l.weight.0.A")),
    ("component_extra", "a tensor that no update has", tensor("l.weight.0.C", "F32", 2)),
    ("component_of_nobody", "a tensor of another target", tensor("m.weight.0.A", "F32", 2, 3)),
    ("component_plain_name", "a tensor whose name has no ordinal", tensor("A", "F32", 2, 3)),
    ("ordinal_one", "A has the ordinal 1", rename("l.weight.0.A", "l.weight.1.A")),
    ("ordinal_zeros", "A has the ordinal 00", rename("l.weight.0.A", "l.weight.00.A")),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "loha_mid",
    ("mid_alone", "mid1 without mid2", lose("conv.weight.0.mid2")),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "lokr_factored",
    ("factor_twice", "w1 beside A1 and B1", tensor("l.weight.0.w1", "F16", 2, 3)),
    ("factor_half", "B1 without A1", lose("l.weight.0.A1")),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "lokr_full",
    ("mid_of_whole", "mid2 beside a whole w2", tensor("l.weight.0.mid2", "F32", 1, 1)),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "dora_axis0",
    ("magnitude_missing", "a dora without a magnitude", lose("l.weight.0.magnitude")),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "scale_axis0",
    ("factor_missing", "a scale without its factor", lose("l.weight.0.factor")),
    ("scale_with_magnitude", "the factor is called magnitude",
     rename("l.weight.0.factor", "l.weight.0.magnitude")),
    schema=False,
)  # fmt: skip
invalid("R-030", "E-COMPONENTS", "stacked",
    ("ordinals_gap", "the last update's value has the ordinal 3",
     rename("l.weight.2.value", "l.weight.3.value")),
    schema=False,
)  # fmt: skip
# fmt: off
for source, mutants in {
    L: [("a_width", "A is too wide", tensor("l.weight.0.A", "F32", 2, 4)),
        ("a_axes", "A has a third axis", tensor("l.weight.0.A", "F32", 2, 3, 1)),
        ("b_rows", "B has too few rows", tensor("l.weight.0.B", "F32", 3, 2))],
    "lora_conv": [("a_flat", "A is flattened", tensor("conv.weight.0.A", "F32", 2, 12))],
    "lora_mid": [("mid_square", "mid has another second axis than rank",
                  tensor("conv.weight.0.mid", "F16", 2, 3, 2, 2)),
                 ("mid_kernel", "mid has another kernel",
                  tensor("conv.weight.0.mid", "F16", 2, 2, 2, 3))],
    E: [("experts_short", "A has two experts of three",
         tensor("experts.w.0.A", "F32", 2, 2, 2))],
    "lora_rows": [("b_of_all_rows", "B covers all rows, not the range",
                   tensor("qkv.weight.0.B", "F32", 6, 2))],
    "dora_axis1": [("magnitude_axis", "the magnitude has the length of axis 0",
                    tensor("l.weight.0.magnitude", "F32", 4)),
                   ("magnitude_matrix", "the magnitude has two axes",
                    tensor("l.weight.0.magnitude", "F32", 1, 3))],
    "scale_axis1": [("factor_axis", "the factor has the length of axis 0",
                     tensor("l.weight.0.factor", "BF16", 4)),
                    ("factor_matrix", "the factor has two axes",
                     tensor("l.weight.0.factor", "BF16", 1, 3))],
    "scale_experts": [("factor_of_all_rows", "the factors are those of all rows, not of the range",
                       tensor("experts.w.0.factor", "F32", 2, 4))],
    "lokr_full": [("lokr_rows", "the factors' rows do not multiply to 4",
                   tensor("l.weight.0.w1", "F32", 3, 3)),
                  ("lokr_columns", "the factors' columns do not multiply to 6",
                   tensor("l.weight.0.w2", "F32", 2, 3))],
    "replace": [("value_shape", "the value has another shape",
                 tensor("head.weight.0.value", "F32", 3, 4))],
    "replace_rows": [("index_matrix", "the index has two axes",
                      tensor("e.weight.0.index", "I64", 2, 1)),
                     ("value_count", "more values than indices",
                      tensor("e.weight.0.value", "F16", 3, 3)),
                     ("value_width", "the value's rows are too short",
                      tensor("e.weight.0.value", "F16", 2, 2)),
                     ("index_empty", "no row at all", ("file", lambda m, ts: (
                         tensor("e.weight.0.index", "I64", 0)[1](m, ts),
                         tensor("e.weight.0.value", "F16", 0, 3)[1](m, ts)))),
                     ("index_long", "more indices than rows", ("file", lambda m, ts: (
                         tensor("e.weight.0.index", "I64", 6)[1](m, ts),
                         tensor("e.weight.0.value", "F16", 6, 3)[1](m, ts))))],
}.items():
    invalid("R-031", "E-SHAPE", source, *mutants, schema=False)
# fmt: on
invalid(
    "R-032",
    "E-DTYPE",
    L,
    ("a_integer", "A is I32", tensor("l.weight.0.A", "I32", 2, 3)),
    schema=False,
)  # fmt: skip
invalid("R-032", "E-DTYPE", "replace",
    ("value_integer", "a value is U8", tensor("head.weight.0.value", "U8", 4, 3)),
    schema=False)  # fmt: skip
invalid("R-032", "E-DTYPE", "replace_rows",
    ("index_float", "the index is F64", tensor("e.weight.0.index", "F64", 2)),
    ("index_short", "the index is I32", tensor("e.weight.0.index", "I32", 2)),
    schema=False,
)  # fmt: skip
invalid("R-033", "E-NONFINITE", L,
    ("nan_in_a", "A holds NaN", bits("l.weight.0.A", 1, b"\x00\x00\xc0\x7f")),
    ("infinity_in_b", "B holds minus infinity", bits("l.weight.0.B", 0, b"\x00\x00\x80\xff")),
    schema=False,
)  # fmt: skip
invalid("R-033", "E-NONFINITE", "loha_mid",
    ("nan_in_bf16", "a BF16 tensor holds NaN", bits("conv.weight.0.A1", 0, b"\xc0\x7f")),
    schema=False,
)  # fmt: skip
invalid("R-034", "E-RANGE", "replace_rows",
    ("index_decreasing", "the indices change places",
     bits("e.weight.0.index", 0, b"\x04" + bytes(7) + b"\x01" + bytes(7))),
    ("index_twice", "one index twice", bits("e.weight.0.index", 0, b"\x04" + bytes(7))),
    ("index_past_end", "an index is the number of rows",
     bits("e.weight.0.index", 1, b"\x05" + bytes(7))),
    ("index_negative", "an index is -1", bits("e.weight.0.index", 0, b"\xff" * 8)),
    schema=False,
)  # fmt: skip

# ---------------------------------------------------------------- invalid: base and provenance

B0 = ("base", "tensors", "l.weight")
ZERO = "blake3:" + "0" * 64
invalid("R-040", "E-BASE", L,
    ("base_name_number", "the base's name is a number", put("base", "name", to=7)),
    ("base_tensors_array", "the base's tensors are an array", put("base", "tensors", to=[])),
    ("base_tensor_text", "a base tensor is a string", put(*B0, to=ZERO)),
    ("digest_missing", "a digest is missing", drop(*B0, "digest")),
    ("digest_other", "a digest of another function", put(*B0, "digest", to="md5:" + "0" * 64)),
    ("revision_number", "the base's revision is a number", put("base", "revision", to=7)),
    ("architecture_null", "the base's architecture is null", put("base", "architecture", to=None)),
    ("tokenizer_text", "the tokenizer is no digest", put("base", "tokenizer", to="tokenizer.json")),
    ("added_tokens_array", "the added tokens are an array", put("base", "added_tokens", to=["<x>"])),
    ("added_tokens_text", "the number of an added token is a string",
     put("base", "added_tokens", to={"<x>": "3"})),
    ("base_shape_axes", "a base shape of nine axes", put(*B0, "shape", to=[1] * 9)),
    ("parts_empty", "parts without a member", put(*B0, "parts", to={})),
    ("parts_text", "a part is a digest", put(*B0, "parts", to={"weight_scale": ZERO})),
    ("parts_no_shape", "a part without a shape",
     put(*B0, "parts", to={"weight_scale": {"digest": ZERO, "dtype": "F32"}})),
    ("digest_capitals", "a digest in capitals", put(*B0, "digest", to="blake3:" + "A" * 64)),
    ("digest_short", "a digest of 63 digits", put(*B0, "digest", to=ZERO[:-1])),
    ("base_dtype", "a base dtype that safetensors lacks", put(*B0, "dtype", to="bfloat16")),
    ("base_shape_text", "a base shape is a string", put(*B0, "shape", to="4x3")),
)  # fmt: skip
invalid("R-040", "E-BASE", L,
    ("digest_newline", "a line feed after a digest", put(*B0, "digest", to=ZERO + "\n")),
    ("base_of_nobody", "a base tensor that no update has",
     put("base", "tensors", "norm.weight",
         to={"digest": ZERO, "dtype": "BF16", "shape": [3]})),
    ("base_shape_differs", "a base tensor of another shape than the update's",
     put(*B0, "shape", to=[3, 4])),
    schema=False,
)  # fmt: skip
invalid("R-014", "E-UNKNOWN-KEY", "base_scales",
    ("key_in_part", "parts within a part", put("base", "tensors", "l.weight", "parts", "weight_scale", "parts", to={})),
)  # fmt: skip
invalid("R-044", "E-MANIFEST", "info",
    ("info_text", "info is a string", put("info", to="Ink")),
    ("info_array", "info is an array", put("info", to=[])),
)  # fmt: skip
invalid("R-046", "E-MANIFEST", "info",
    ("info_title_number", "the title is a number", put("info", "title", to=7)),
    ("info_triggers_text", "the triggers are a string", put("info", "triggers", to="inked")),
    ("info_authors_number", "an author is a number", put("info", "authors", to=[7])),
    ("info_weight_text", "the weight is a string", put("info", "weight", to="0.8")),
    ("info_config_text", "the config is a string", put("info", "config", to="{}")),
)  # fmt: skip
invalid("R-045", "E-MANIFEST", "conditional_tokens",
    ("when_array", "when is an array", put("when", to=[])),
    ("when_empty", "when has no member", put("when", to={})),
    ("when_vendor", "when has a vendor key only", put("when", to={"acme.x": 1})),
    ("when_two", "tokens and prompts", put("when", "prompts", to=["x"])),
    ("when_no_tokens", "no token", put("when", "tokens", to=[])),
    ("when_token_negative", "a token is -1", put("when", "tokens", to=[5, -1])),
    ("when_token_text", "a token is a string", put("when", "tokens", to=["5"])),
)  # fmt: skip
invalid("R-045", "E-MANIFEST", "conditional_prompts",
    ("when_prompt_empty", "a prompt is empty", put("when", "prompts", to=[""])),
    ("when_prompts_text", "the prompts are a string", put("when", "prompts", to="in ink")),
)  # fmt: skip
invalid("R-045", "E-MANIFEST", "conditional_routing",
    ("when_routing_empty", "the routing is empty", put("when", "routing", to="")),
)  # fmt: skip
invalid("R-014", "E-UNKNOWN-KEY", "conditional_tokens",
    ("when_other", "a condition that is not known", put("when", to={"moon": "full"})),
)  # fmt: skip
invalid("R-045", "E-FEATURE", "conditional_tokens",
    ("when_without_feature", "the feature conditional is missing", put("features", to=[])),
)  # fmt: skip
invalid("R-045", "E-FEATURE", L,
    ("feature_without_when", "the feature conditional, and no when", put("features", to=["conditional"])),
)  # fmt: skip
invalid("R-048", "E-MANIFEST", "part",
    ("part_empty", "a part is empty", put(*U0, "part", to="")),
    ("part_dot", "a part holds a dot", put(*U0, "part", to="te.1")),
    ("part_number", "a part is a number", put(*U0, "part", to=1)),
    ("part_long", "a part of 101 letters", put(*U0, "part", to="x" * 101)),
)  # fmt: skip
invalid("R-042", "E-MANIFEST", L,
    ("provenance_number", "a provenance value is a number", put("provenance", "seed", to=7)),
    ("provenance_object", "a provenance value is an object", put("provenance", "tool", to={})),
)  # fmt: skip

# ---------------------------------------------------------------- invalid: what lenient programs let pass

invalid("R-010", "E-MANIFEST", L,
    ("manifest_control", "a line feed as it is in a string of the manifest", text('"hand"', '"ha\nnd"')),
    ("manifest_tab", "a tab as it is in a string of the manifest", text('"hand"', '"ha\tnd"')),
    ("manifest_rank_leading_zero", "rank is written 02", text('"rank":2', '"rank":02')),
    ("manifest_plus", "rank is written +2", text('"rank":2', '"rank":+2')),
    ("manifest_point_last", "alpha is written 8.", text('"alpha":8', '"alpha":8.')),
    ("manifest_point_first", "alpha is written .8e1", text('"alpha":8', '"alpha":.8e1')),
    ("manifest_trailing_comma", "a comma after the last member", ("text", lambda s: s[:-1] + ",}")),
    ("manifest_array_comma", "a comma after the last number of a shape", text('"shape":[4,3]', '"shape":[4,3,]')),
    ("manifest_comment", "a comment", text('"rank":2', '"rank":2/**/')),
    ("manifest_single_quotes", "a string in single quotes", text('"hand"', "'hand'")),
    schema=False,
)  # fmt: skip
invalid("R-002", "E-HEADER", L,
    ("header_control", "a tab as it is in a tensor's name", json(b"l.weight.0.A", b"l.weight\t0.A")),
    ("header_leading_zero", "a shape holds 02", json(b'"shape":[2,3]', b'"shape":[02,3]')),
    ("header_trailing_comma", "a comma after the last entry", ("json", lambda s: s[:-1] + b",}")),
)  # fmt: skip
invalid("R-004", "E-HEADER", L,
    ("entry_dotted_key", "a tensor has a fourth key with a dot", entry("acme.x", 1)),
)  # fmt: skip
invalid("R-025", "E-SCALE", L,
    ("alpha_infinite", "alpha is 1e999", text('"alpha":8', '"alpha":1e999')),
    ("scale_far", "scale is off by 2^-39 of its value", put(*U0, "scale", to=4 * (1 + 2**-39))),
    schema=False,
)  # fmt: skip
invalid("R-016", "E-LIMIT", N,
    ("part_without_target", "a part, and an empty target", ("file", lambda m, ts: (
        retarget("")[1](m, ts), m["updates"][0].__setitem__("part", "unet")))),
)  # fmt: skip
invalid("R-016", "E-LIMIT", "shape_product_limit",
    ("shape_product_experts", "one expert of a tensor of 2^54 elements", put(*U0, "shape", to=[2**52, 2, 2])),
    schema=False,
)  # fmt: skip
invalid("R-022", "E-SHAPE", "scaling_alpha",
    ("shapes_of_one_target", "a second update of the tensor has one row more",
     second({"target": "l.weight", "kind": "lora", "shape": [5, 3], **ALPHA, "scale": 3}, A=("F32", 2, 3), B=("F32",
         5, 2))),
    ("shapes_of_one_target_less", "a second update of the tensor has one row less",
     second({"target": "l.weight", "kind": "lora", "shape": [3, 3], **ALPHA, "scale": 3}, A=("F32", 2, 3), B=("F32",
         3, 2))),
    schema=False,
)  # fmt: skip
invalid("R-029", "E-OVERLAP", "rows_beside_expert",
    ("rows_meet_expert", "rows of all experts meet the replaced ones",
     second({"target": "c", "kind": "replace", "shape": [3, 4, 2], "experts": 3, "rows": [2, 4]}, value=("F32", 3, 2,
         2))),
    schema=False,
)  # fmt: skip
invalid("R-023", "E-RANGE", E,
    ("experts_more", "there are more experts than the shape says", put(*U0, "experts", to=4)),
    schema=False,
)  # fmt: skip

# ---------------------------------------------------------------- invalid: canonical form

invalid("R-050", "E-CANONICAL", L,
    ("manifest_space", "a space after a colon", text(":", ": ")),
    ("manifest_key_order", "the key version comes first",
     ("text", lambda s: swap('{"version":"1.0",' + s[1:], ',"version":"1.0"}', "}"))),
    ("number_fraction", "alpha is written 8.0", text('"alpha":8', '"alpha":8.0')),
    ("number_exponent", "scale is written 4e0", text('"scale":4', '"scale":4e0')),
    ("manifest_escape", "a letter is written as an escape", text('"hand"', '"h\\u0061nd"')),
    schema=False,
)  # fmt: skip
invalid("R-050", "E-CANONICAL", "unicode_names",
    ("manifest_code_points", "the names of the base are sorted by code point",
     ("text", lambda s: by_code_point(s))),
    schema=False,
)  # fmt: skip


def by_code_point(s):
    """Exchanges the last two members of base.tensors; the first one is the name with a quote."""
    i, j = s.index('"\U0001d11e":'), s.index('"\ufb00":')
    end = s.index("}}", j) + 1
    return s[:i] + s[j:end] + "," + s[i : j - 1] + s[end:]


def pad(n):
    """The header length changed by n, that many spaces more or fewer after the header."""

    def edit(b):
        old = head(b)
        new = b[8:old] + b" " * n if n > 0 else b[8 : old + n]
        return len(new).to_bytes(8, "little") + new + b[old:]

    return raw(edit)


def last_to_front(h):
    """The header's entries in another order (the offsets stay)."""
    meta, first, *rest = h.items()
    return dict([meta, *rest, first])


invalid("R-051", "E-CANONICAL", L,
    ("metadata_more", "__metadata__ has a second key",
     ("header", lambda h: h["__metadata__"].__setitem__("format", "pt"))),
    ("metadata_last", "__metadata__ is the last key of the header",
     ("header", lambda h: {**{k: v for k, v in h.items() if k != "__metadata__"},
                           "__metadata__": h["__metadata__"]})),
    ("entries_order", "the entries are not in the order of their offsets",
     ("header", last_to_front)),
    ("entry_key_order", "shape comes before dtype",
     json(b'"dtype":"F32","shape":[2,3]', b'"shape":[2,3],"dtype":"F32"')),
    ("header_space", "a space after a comma", json(b'"dtype":"F32",', b'"dtype":"F32", ')),
    ("header_escape", "a letter of a dtype is written as an escape",
     json(b'"dtype":"F32"', b'"dtype":"\\u004632"')),
    ("padding_more", "eight spaces too many", pad(8)),
    ("padding_one", "one space too many", pad(1)),
    schema=False,
)  # fmt: skip
invalid("R-051", "E-CANONICAL", "metadata_members",
    ("members_order", "the members of __metadata__ are sorted by UTF-16", ("header", lambda h: {
        **h, "__metadata__": dict(sorted(h["__metadata__"].items(), key=lambda i: (
            i[0] != "loratool", i[0].encode("utf-16-be"))))})),
    ("manifest_not_first", "loratool is the last member of __metadata__", ("header", lambda h: {
        **h, "__metadata__": dict([*[*h["__metadata__"].items()][1:], next(iter(h["__metadata__"].items()))])})),
    ("member_plain", "a member without a dot", ("header", lambda h: h["__metadata__"].__setitem__("zss_x", "1"))),
    schema=False,
)  # fmt: skip
invalid("R-052", "E-CANONICAL", "stacked",
    ("data_by_name", "the data is sorted by name alone", ("order", lambda item: item[0])),
    schema=False,
)  # fmt: skip

# ---------------------------------------------------------------- the other codes that are right
# By one change a file may break several rules; a program looks at them in what order it likes (section 1).
ALSO = {
    name: codes.split()
    for names, codes in (
        ("header_deep header_bomb", "E-HEADER"),
        ("duplicate_tensor offsets_reversed", "E-LAYOUT"),
        ("entry_shape_large entry_dtype_number", "E-TENSOR"),
        ("metadata_not_object", "E-MANIFEST"),
        ("version_zero_major", "E-VERSION"),
        ("when_other", "E-MANIFEST"),
        ("no_updates updates_object", "E-COMPONENTS E-BASE E-LIMIT"),
        ("updates_none", "E-COMPONENTS"),
        ("shape_nine_axes shape_product", "E-SHAPE"),
        ("rank_zero rank_over_limit rank_text rank_boolean", "E-RANK"),
        ("update_not_object no_target no_kind target_number", "E-COMPONENTS"),
        ("kind_number", "E-COMPONENTS E-KIND"),
        ("alpha_text scale_boolean scaling_number", "E-SCALE"),
        ("kind_unknown kind_capitals no_direction direction_unknown", "E-COMPONENTS"),
        ("rows_empty rows_reversed expert_and_experts expert_of_matrix experts_differ", "E-SHAPE"),
        ("expert_of_vector rows_of_number axis_two axis_negative", "E-SHAPE"),
        ("single_rows_with_rows single_rows_with_expert single_rows_alpha", "E-UNKNOWN-KEY"),
        ("add_rank add_alpha replace_scale replace_scaling replace_rank", "E-UNKNOWN-KEY"),
        ("rank_differs rank_of_a1", "E-SHAPE"),
        ("rule_of_whole", "E-SCALE"),
        ("index_matrix index_long index_float index_short", "E-RANGE"),
        ("refused_scales", "E-QUANTISED"),
        ("refused_shapes", "E-OVERLAP"),
    )
    for name in names.split()
}
