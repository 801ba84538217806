"""LyCORIS files built by hand: every algorithm's formula in float64, what is refused, and how that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import State, assert_rounded, changed
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import conventions
from loratool.checkpoint import open_checkpoint

CONV, LINEAR = (8, 6, 3, 3), (8, 6)
BASE_SHAPES = {"conv": CONV, "fc": LINEAR}
EINSUM = "i j ..., j r, i p -> p r ..."  # a core with its factors [rank, in] and [rank, out]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def base() -> State:
    state = {f"{name}.weight": values(*shape) for name, shape in BASE_SHAPES.items()}
    return state | {"conv.bias": values(8), "fc.bias": values(8), "norm.weight": values(8), "norm.bias": values(8)}


def loha(key: str) -> State:
    a = {f"{key}.hada_w{n}_a": values(8, 2, seed=n) for n in (1, 2)}
    b = {f"{key}.hada_w{n}_b": values(2, 54 if "conv" in key else 6, seed=n) for n in (1, 2)}
    return {**a, **b, f"{key}.alpha": torch.tensor(3.0)}


def lokr(key: str) -> State:
    """[2, 3] x [4, 2(, 3, 3)], the second of rank 1."""
    kernel = 9 if "conv" in key else 1
    return {
        f"{key}.lokr_w1": values(2, 3),
        f"{key}.lokr_w2_a": values(4, 1),
        f"{key}.lokr_w2_b": values(1, 2 * kernel),
        f"{key}.alpha": torch.tensor(0.5),
    }


def saved(state: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, file, metadata)
    return file


def merged(lora: State, folder: Path, metadata: dict[str, str] | None = None) -> State:
    saved(base(), folder / "base.safetensors")
    saved(lora, folder / "lora.safetensors", metadata)
    loratool.merge(folder / "base.safetensors", folder / "lora.safetensors", folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


def deltas() -> dict[str, tuple[State, str, Tensor]]:
    """By name: the file, the tensor that changes, and by how much, in float64."""
    found: dict[str, tuple[State, str, Tensor]] = {}
    for name, shape in BASE_SHAPES.items():
        key = f"lycoris_{name}"
        h = loha(key)
        f = {part.rpartition(".")[2]: value.double() for part, value in h.items()}
        product = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
        found[f"loha-{name}"] = h, f"{name}.weight", 3 / 2 * product.reshape(shape)
        k = lokr(key)
        f = {part.rpartition(".")[2]: value.double() for part, value in k.items()}
        second = (f["lokr_w2_a"] @ f["lokr_w2_b"]).reshape(4, 2, *shape[2:])
        first = f["lokr_w1"].reshape(2, 3, *[1] * len(shape[2:]))
        found[f"lokr-{name}"] = k, f"{name}.weight", 0.5 * torch.kron(first, second)
        whole = {f"{key}.lokr_w1": values(2, 3), f"{key}.lokr_w2": values(4, 2, *shape[2:])}
        first, second = whole[f"{key}.lokr_w1"].double(), whole[f"{key}.lokr_w2"].double()
        # Two whole factors: their alpha counts for nothing.
        file = {**whole, f"{key}.alpha": torch.tensor(64.0)}
        product = torch.kron(first.reshape(2, 3, *[1] * len(shape[2:])), second)
        found[f"lokr-whole-{name}"] = file, f"{name}.weight", product
        diff = values(*shape, seed=5)
        found[f"diff-{name}"] = {f"{key}.diff": diff}, f"{name}.weight", diff.double()
    t, a, b = values(2, 2, 3, 3), values(2, 8), values(2, 6)
    key, file = "lycoris_conv", {}
    for n in (1, 2):
        file |= {f"{key}.hada_t{n}": t * n, f"{key}.hada_w{n}_a": a + n, f"{key}.hada_w{n}_b": b - n}
    product = torch.ones(CONV, dtype=torch.float64)
    for n in (1, 2):
        factors = (file[f"{key}.{part}"].double() for part in (f"hada_t{n}", f"hada_w{n}_b", f"hada_w{n}_a"))
        product *= torch.einsum(EINSUM, *factors)
    found["loha-tucker"] = file, "conv.weight", product
    file = {f"{key}.lokr_w1": values(2, 3), f"{key}.lokr_t2": t, f"{key}.lokr_w2_a": values(2, 4)}
    file |= {f"{key}.lokr_w2_b": values(2, 2), f"{key}.alpha": torch.tensor(1.0)}
    factors = (file[f"{key}.{part}"].double() for part in ("lokr_t2", "lokr_w2_b", "lokr_w2_a"))
    first = file[f"{key}.lokr_w1"].double().reshape(2, 3, 1, 1)
    found["lokr-tucker"] = file, "conv.weight", torch.kron(first, torch.einsum(EINSUM, *factors).contiguous()) / 2
    file = {f"{key}.lora_mid.weight": t, f"{key}.lora_down.weight": values(2, 6, 1, 1)}
    file |= {f"{key}.lora_up.weight": values(8, 2, 1, 1), f"{key}.alpha": torch.tensor(3.0)}
    up, down = (file[f"{key}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    found["locon-tucker"] = (
        file,
        "conv.weight",
        1.5 * torch.einsum("m n h w, i m, n j -> i j h w", t.double(), up, down),
    )
    found["bias"] = {"lycoris_fc.diff_b": values(8, seed=9)}, "fc.bias", values(8, seed=9).double()
    found["norm"] = {"lycoris_norm.w_norm": values(8, seed=9)}, "norm.weight", values(8, seed=9).double()
    found["norm-bias"] = {"lycoris_norm.b_norm": values(8, seed=9)}, "norm.bias", values(8, seed=9).double()
    return found


DELTAS = deltas()


@pytest.mark.parametrize("name", DELTAS)
def test_the_delta_is_that_of_the_formula(name: str, tmp_path: Path) -> None:
    lora, target, delta = DELTAS[name]
    got = merged(lora, tmp_path)
    assert changed(base(), got) == {target}
    assert_rounded(got[target], base()[target].double() + delta, name=name)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["loha-fc", "loha-conv", "lokr-fc", "lokr-conv", "loha-tucker", "locon-tucker"])
def test_the_shape_of_the_magnitude_says_its_axis(name: str, axis: int, tmp_path: Path) -> None:
    """A norm over everything but the outputs, or over everything but the inputs; kernels are part of either."""
    lora, target, delta = DELTAS[name]
    shape = [1] * delta.dim()
    shape[axis] = delta.shape[axis]
    magnitude = values(*shape).abs() + 0.5
    got = merged({**lora, f"lycoris_{target.removesuffix('.weight')}.dora_scale": magnitude}, tmp_path)
    V = base()[target].double() + delta
    norm = V.square().sum(dim=[dim for dim in range(V.dim()) if dim != axis], keepdim=True).sqrt()
    want = magnitude.double() * V / norm
    distance = (got[target].double() - want).abs().max().item()
    assert distance <= 2.0**-23 * want.abs().max().item()


def test_a_bias_beside_factors_is_an_update_of_its_own(tmp_path: Path) -> None:
    lora, target, delta = DELTAS["loha-fc"]
    got = merged({**lora, "lycoris_fc.diff_b": values(8, seed=9)}, tmp_path)
    assert changed(base(), got) == {"fc.weight", "fc.bias"}
    assert_rounded(got[target], base()[target].double() + delta)
    assert_rounded(got["fc.bias"], base()["fc.bias"].double() + values(8, seed=9).double())


LOHA, LOKR = loha("lycoris_fc"), lokr("lycoris_fc")
BAD: dict[str, tuple[State, str, str]] = {
    "half": ({k: v for k, v in LOHA.items() if "w2_b" not in k}, "E-COMPONENTS", "has no hada_w2_b"),
    "one-core": ({**LOHA, "lycoris_fc.hada_t1": values(2, 2)}, "E-COMPONENTS", "only one of hada_t1"),
    "loha-ranks": ({**LOHA, "lycoris_fc.hada_w2_a": values(8, 3)}, "E-RANK", "rank says 2"),
    "loha-shape": ({**LOHA, "lycoris_fc.hada_w1_b": values(2, 7)}, "E-SHAPE", "make [8, 7], the base has [8, 6]"),
    "loha-second": ({**LOHA, "lycoris_fc.hada_w2_b": values(2, 7)}, "E-SHAPE", "hada_w2_b is [2, 7]"),
    "loha-3d": ({**LOHA, "lycoris_fc.hada_w1_a": values(8, 2, 1)}, "E-SHAPE", "not a matrix"),
    "lokr-half": ({k: v for k, v in LOKR.items() if "w2_b" not in k}, "E-COMPONENTS", "lokr_w2 or lokr_w2_b"),
    "lokr-none": ({k: v for k, v in LOKR.items() if "w1" not in k}, "E-COMPONENTS", "lokr_w1 or lokr_w1_a"),
    "lokr-both": ({**LOKR, "lycoris_fc.lokr_w2": values(4, 2)}, "E-COMPONENTS", "has both lokr_w2_a and lokr_w2"),
    "lokr-shape": ({**LOKR, "lycoris_fc.lokr_w1": values(3, 3)}, "E-SHAPE", "make [12, 6], the base has [8, 6]"),
    "lokr-flat": ({**LOKR, "lycoris_fc.lokr_w1": values(3)}, "E-SHAPE", "not a matrix"),
    "mixed": ({**LOHA, **LOKR}, "E-COMPONENTS", "parts of LoHa and LoKr"),
    "diff-shape": ({"lycoris_fc.diff": values(6, 8)}, "E-SHAPE", "make [6, 8], the base has [8, 6]"),
    "diff-b-shape": ({"lycoris_fc.diff_b": values(6)}, "E-SHAPE", "fc.bias"),
    "magnitude": ({**LOHA, "lycoris_fc.dora_scale": values(6, 1)}, "E-SHAPE", "neither [out, 1, ...] nor [1, in, ...]"),
    "magnitude-scalar": ({**LOHA, "lycoris_fc.dora_scale": torch.tensor(1.0)}, "E-SHAPE", "dora_scale is []"),
    "magnitude-alone": ({"lycoris_fc.dora_scale": values(8, 1)}, "E-COMPONENTS", "no factors"),
    "magnitude-diff": ({"lycoris_fc.diff": values(8, 6), "lycoris_fc.dora_scale": values(8, 1)}, "E-COMPONENTS", "no"),
    "alpha-alone": ({"lycoris_fc.alpha": torch.tensor(1.0)}, "E-COMPONENTS", "only alpha"),
    "unknown": ({**LOHA, "lycoris_fc.weight": values(2)}, "E-UNSUPPORTED", "1 tensor is no part of an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    lora, code, message = BAD[name]
    with pytest.raises(loratool.LoratoolError) as caught:
        merged(lora, tmp_path)
    assert code in {problem.code for problem in caught.value.problems}
    assert message in str(caught.value)
    assert "lora.safetensors" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def blocks(key: str, *shape: int) -> State:
    return {f"{key}.oft_blocks": values(*shape), f"{key}.rescale": values(8, 1), f"{key}.alpha": torch.tensor(0.1)}


REFUSED: dict[str, tuple[State, str]] = {
    "oft": (blocks("lycoris_fc", 2, 4, 4), "1 module is of OFT, which is not supported: it rotates the base's weights"),
    "oft-old": ({"lycoris_fc.oft_diag": values(2, 4, 4)}, "1 module is of OFT, which"),
    "boft": (blocks("lycoris_fc", 2, 2, 4, 4), "1 module is of BOFT, which is not supported: it rotates"),
    "tlora": ({"lycoris_fc.lambda_layer": values(1, 2)}, "1 module is of T-LoRA, which is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_no_update_is_refused_by_name(name: str, tmp_path: Path) -> None:
    lora, message = REFUSED[name]
    with pytest.raises(loratool.LoratoolError) as caught:
        merged({**lora, **loha("lycoris_conv")}, tmp_path)
    (problem,) = caught.value.problems
    assert problem.code == "E-UNSUPPORTED"
    assert problem.message.startswith(message)
    assert problem.message.endswith("; lycoris_fc")
    assert "LyCORIS" in problem.hint
    assert "lora.safetensors" in problem.where
    assert not (tmp_path / "out.safetensors").exists()


def test_every_method_of_a_mixed_file_is_named_once_with_its_modules(tmp_path: Path) -> None:
    lora = {f"lora_unet_{n}.lambda_layer": values(1, 2) for n in range(5)}
    lora |= blocks("lora_te_a", 2, 4, 4) | blocks("lora_te_b", 2, 2, 4, 4) | {"lora_te_c.strange": values(2)}
    file = saved(lora, tmp_path / "x.safetensors")
    with pytest.raises(loratool.Unsupported) as caught:
        loratool.load(file)
    for problems in (caught.value.problems, loratool.inspect(file).problems):
        said = [problem.message for problem in problems]
        assert len(said) == 4
        assert said[0].startswith("1 module is of BOFT")
        assert said[1].startswith("1 module is of OFT")
        assert said[2].startswith("5 modules are of T-LoRA")
        assert said[2].endswith("; lora_unet_0, lora_unet_1, lora_unet_2 and 2 more")
        assert said[3] == "1 tensor is no part of an adapter that this convention knows: lora_te_c.strange"


@pytest.mark.parametrize("shape", [(), (0,), (1, 0), (1, 5), (8,)])
def test_a_wrong_magnitude_is_no_traceback_without_a_base(shape: tuple[int, ...], tmp_path: Path) -> None:
    file = saved({**LOHA, "lycoris_fc.dora_scale": torch.ones(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(loratool.LoratoolError, match="dora_scale is"):
        loratool.load(file)
    assert [problem for problem in loratool.inspect(file).problems if "dora_scale is" in problem.message]


def test_a_rescaled_scale_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    lora, _, _ = DELTAS["lokr-whole-fc"]
    with pytest.raises(loratool.LoratoolError, match="rs_lora with two whole LoKr factors"):
        merged(lora, tmp_path, {"ss_network_args": json.dumps({"algo": "lokr", "rs_lora": "True"})})
    assert merged(lora, tmp_path, {"ss_network_args": json.dumps({"algo": "lokr"})})


@pytest.mark.parametrize("name", [*DELTAS, *REFUSED, *(name for name in BAD if name != "alpha-alone")])
def test_files_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    lora = {**BAD, **DELTAS, **REFUSED}[name][0]
    for prefix in ("lycoris_", "lora_unet_", "lora_te2_", "diffusion_model."):
        file = saved({k.replace("lycoris_", prefix): v for k, v in lora.items()}, tmp_path / f"{prefix}.safetensors")
        assert [c.NAME for c in conventions.matching(open_checkpoint(file))] == ["lycoris"], prefix


def test_inspect_shows_what_each_algorithm_has(tmp_path: Path) -> None:
    lora = {**loha("lora_unet_a"), **lokr("lora_unet_b"), "lora_te_c.diff": values(2, 2)}
    lora |= {f"lora_unet_d_{part.rpartition('.')[2]}": value for part, value in loha("conv").items()}
    lora = {k.replace("d_hada", "d.hada").replace("d_alpha", "d.alpha"): v for k, v in lora.items()}
    lora["lora_unet_d.dora_scale"] = values(1, 6, 1, 1)
    summary = loratool.inspect(saved(lora, tmp_path / "x.safetensors"))
    found = {layer.target: (layer.kind, layer.rank, layer.alpha, layer.scale) for layer in summary.layers}
    assert found == {
        "lora_unet_a.weight": ("loha", 2, 3.0, 1.5),
        "lora_unet_b.weight": ("lokr", 1, 0.5, 0.5),
        "lora_te_c.weight": ("add", None, None, 1.0),
        "lora_unet_d.weight": ("dora", 2, 3.0, 1.5),
    }
    assert {"unet: 3 modules", "te: 1 modules"} <= set(summary.notes)
