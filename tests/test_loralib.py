"""loralib's layout, built by hand: every layer's formula, what the file leaves open, and merged weights.

The layouts are those that test_loralib_producer.py gets from loralib itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from models import State, assert_float32_close, assert_rounded, assert_same_bits, own, read
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.checkpoint import open_checkpoint
from loratool.conventions import CONVENTIONS, choose, matching

ALPHA, RANK = 6.0, 4
SCALE = ALPHA / RANK


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def factors(module: str, A: Tensor, B: Tensor) -> State:
    return {f"{module}.lora_A": A, f"{module}.lora_B": B}


def linear(module: str = "l.0.fc", out: int = 6, into: int = 5) -> State:
    return factors(module, values(RANK, into), values(out, RANK))


def saved(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


def base_at(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True)
    save_file(own(state), folder / "model.safetensors")
    return folder


def merged_with(tmp_path: Path, base: State, adapter: State, **choices: Any) -> State:
    """The base with the adapter in it, through files."""
    place = base_at(tmp_path / "base", base)
    loaded = loratool.load(saved(adapter, tmp_path / "adapter.pt"), base=place, **{"alpha": ALPHA, **choices})
    loratool.merge(place, loaded, tmp_path / "merged")
    return read(tmp_path / "merged")


def refused(call: Callable[[], object]) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        call()
    return caught.value


@pytest.fixture
def full() -> State:
    """A whole state dict with two LoRA layers."""
    base = {"l.0.fc.weight": values(6, 5), "l.0.fc.bias": values(6), "l.0.fc2.weight": values(3, 6), "norm": values(5)}
    return base | linear() | linear("l.0.fc2", 3, 6)


def bare(state: State) -> State:
    return {name: value for name, value in state.items() if "lora_" not in name}


def in_eval_mode(state: State, scale: float = SCALE) -> State:
    """The same, with every delta added to its weight, rounded as loralib rounds it."""
    after = dict(state)
    for name, A in state.items():
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            delta = state[f"{module}.lora_B"] @ A * scale
            after[f"{module}.weight"] = after[f"{module}.weight"] + delta
    return after


# --- formulas -----------------------------------------------------------------------------------


def test_linear_embedding_and_transposed_linear(tmp_path: Path) -> None:
    A, B = values(RANK, 9), values(5, RANK)
    base = {"wte.weight": values(9, 5), "c_fc.weight": values(9, 5), "c_fc.bias": values(5), "fc.weight": values(5, 9)}
    adapter = factors("wte", A, B) | factors("c_fc", A, B) | factors("fc", A, B)
    got = merged_with(tmp_path, base, adapter)
    delta = SCALE * (B.double() @ A.double())
    assert_rounded(got["fc.weight"], base["fc.weight"] + delta)
    for name in ("wte.weight", "c_fc.weight"):
        assert_rounded(got[name], base[name] + delta.T)
    assert torch.equal(got["c_fc.bias"], base["c_fc.bias"])
    loaded = loratool.load(tmp_path / "adapter.pt", base=tmp_path / "base", alpha=ALPHA)
    layouts = {item.target.name: item.target.layout for item in loaded.updates}
    assert layouts == {"wte.weight": "embedding", "c_fc.weight": "in_out", "fc.weight": ""}
    assert {item.update.scaling for item in loaded.updates} == {loratool_scaling(RANK)}


def loratool_scaling(rank: int) -> object:
    from loratool.updates import Scaling

    return Scaling("alpha/rank", rank, ALPHA, ALPHA / rank)


@settings(deadline=None, max_examples=40)
@given(
    enabled=st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
    block=st.integers(1, 4),
    into=st.integers(1, 5),
    rank=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_packed_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    enabled: list[bool],
    block: int,
    into: int,
    rank: int,
    transposed: bool,
) -> None:
    """Any choice of blocks, in both orientations: the block-wise product in the trained rows, nothing elsewhere."""
    count, out = sum(enabled), block * len(enabled)
    A, B = values(count * rank, into), values(count * block, rank)
    delta = torch.zeros(len(enabled), block, into, dtype=torch.float64)
    products = [b @ a for a, b in zip(A.double().split(rank), B.double().split(block), strict=True)]
    delta[torch.tensor(enabled)] = torch.stack(products)
    exact = ALPHA / rank * delta.reshape(out, into)
    weight = values(into, out) if transposed else values(out, into)
    got = merged_with(
        tmp_path_factory.mktemp("blocks"),
        {"attn.weight": weight},
        factors("attn", A, B),
        enable_lora="".join("01"[flag] for flag in enabled),
        layout={"*": "in_out" if transposed else "out_in"},
    )
    assert_rounded(got["attn.weight"], weight.double() + (exact.T if transposed else exact))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 6),
    kernel=st.integers(1, 4),
    rank=st.integers(1, 3),
    wide=st.integers(1, 2),
    high=st.integers(1, 2),
)
def test_convolutions(
    tmp_path_factory: pytest.TempPathFactory, groups: int, kernel: int, rank: int, wide: int, high: int
) -> None:
    into, out = groups * wide, groups * high
    weight = values(out, wide, kernel, kernel)
    A, B = values(rank * kernel, into * kernel), values(high * kernel, rank * kernel)
    got = merged_with(tmp_path_factory.mktemp("conv"), {"c.weight": weight}, factors("c", A, B))
    exact = weight.double() + ALPHA / rank * (B.double() @ A.double()).view(weight.shape)
    assert_float32_close(got["c.weight"], exact)


def test_convolution_keeps_its_low_rank(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", {"c.weight": values(8, 6, 3, 3)})
    adapter = saved(factors("c", values(2 * 3, 6 * 3), values(8 * 3, 2 * 3)), tmp_path / "a.pt")
    [item] = loratool.load(adapter, base=base, alpha=ALPHA).updates
    assert item.update.kind == "lora"
    assert item.update.scaling is not None
    assert (item.update.scaling.rank, item.update.scaling.scale) == (2 * 3 * 3, ALPHA / 2)


def test_convolution_wrapper_is_taken_off(tmp_path: Path) -> None:
    """loralib's layer has the convolution one level down; newer versions have it under both names."""
    weight, bias = values(4, 3, 2, 2), values(4)
    lora = factors("c", values(4, 6), values(8, 4))
    for nested in ({}, {"c.weight": weight, "c.bias": bias}):
        state = lora | {"c.conv.weight": weight, "c.conv.bias": bias, "other.conv.weight": values(2)} | nested
        place = tmp_path / str(len(nested))
        place.mkdir()
        loratool.extract(saved(state, place / "full.pt"), place / "a.safetensors", alpha=1, base_out=place / "base")
        assert_same_bits(read(place / "base"), {"c.weight": weight, "c.bias": bias, "other.conv.weight": values(2)})
    torn = state | {"c.weight": weight + 1}
    error = refused(lambda: loratool.load(saved(torn, tmp_path / "torn.pt"), alpha=1))
    assert error.code == "E-NAMES"
    assert "both stand for c.weight" in error.message


def test_a_single_layer(tmp_path: Path) -> None:
    """The state dict of one layer has no module names."""
    base = {"weight": values(6, 5)}
    adapter = {"lora_A": values(RANK, 5), "lora_B": values(6, RANK)}
    got = merged_with(tmp_path, base, adapter)
    exact = base["weight"].double() + SCALE * adapter["lora_B"].double() @ adapter["lora_A"].double()
    assert_rounded(got["weight"], exact)


def test_biases_are_replaced(tmp_path: Path) -> None:
    base = {"l.0.fc.weight": values(6, 5), "l.0.fc.bias": values(6), "norm.bias": values(5), "h.attn.bias": values(2)}
    adapter = linear() | {"l.0.fc.bias": values(6, seed=1), "norm.bias": values(5, seed=1)}
    mask = {"h.attn.bias": torch.ones(2, 2, dtype=torch.bool)}
    got = merged_with(tmp_path, base, adapter | mask)
    assert torch.equal(got["l.0.fc.bias"], adapter["l.0.fc.bias"])
    assert torch.equal(got["norm.bias"], adapter["norm.bias"])
    assert torch.equal(got["h.attn.bias"], base["h.attn.bias"])
    [note] = loratool.load(tmp_path / "adapter.pt", base=tmp_path / "base").notes
    assert "1 buffers" in note
    assert "h.attn.bias" in note


def test_biases_trained_in_a_whole_state_dict(tmp_path: Path, full: State) -> None:
    """Only beside the base can one see that they were trained."""
    base = base_at(tmp_path / "base", bare(full))
    trained = saved(full | {"l.0.fc.bias": values(6, seed=2)}, tmp_path / "full.pt")
    loaded = loratool.load(trained, base=base, alpha=ALPHA)
    assert [(i.target.name, i.update.kind) for i in loaded.updates][-1] == ("l.0.fc.bias", "replace")
    assert "1 biases differ" in loaded.notes[-1]
    alone = loratool.load(trained, alpha=ALPHA)
    assert {i.update.kind for i in alone.updates} == {"lora"}
    assert "nothing in it says" in alone.notes[0]


# --- whole state dicts, merged and not ----------------------------------------------------------


def test_extract_gives_the_base_back(tmp_path: Path, full: State) -> None:
    wrapped = saved(full, tmp_path / "full.pt")
    report = loratool.extract(wrapped, tmp_path / "a.safetensors", alpha=ALPHA, base_out=tmp_path / "base")
    assert_same_bits(read(tmp_path / "base"), bare(full))
    assert report.convention == "loralib"
    assert set(report.adapter.base.tensors) == {"l.0.fc.weight", "l.0.fc2.weight"}
    loratool.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    for name, want in in_eval_mode(full).items():
        if "lora_" not in name:
            assert_float32_close(read(tmp_path / "merged")[name], want, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_already_merged(tmp_path: Path, full: State, dtype: torch.dtype, container: str, cli: Cli) -> None:
    state = {name: value.to(dtype) for name, value in full.items()}
    merged, path = in_eval_mode(state), tmp_path / f"eval.{container}"
    torch.save(merged, path) if container == "pt" else save_file(merged, path)
    out, base = tmp_path / "a.safetensors", tmp_path / "base"
    result = cli("extract", path, "-o", out, "--alpha", ALPHA, "--already-merged", "--base-out", base)
    assert result.code == 0
    assert "already merged" in result.out
    assert "to rounding" in result.out
    loaded = loratool.load(out)
    assert not loaded.base.tensors, "digests of approximate weights would refuse the real base"
    assert loratool.validate(out) == []
    got = read(base)
    assert set(got) == set(bare(state))
    for name, want in bare(state).items():
        assert got[name].dtype == dtype
        bound = 3 * torch.finfo(dtype).eps * merged[name].abs().max().item()
        assert (got[name].double() - want.double()).abs().max().item() <= bound, name
    assert not torch.equal(got["l.0.fc.weight"], merged["l.0.fc.weight"])
    plain = loratool.extract(path, tmp_path / "b.safetensors", alpha=ALPHA, base_out=tmp_path / "wrong")
    assert_same_bits(read(tmp_path / "wrong"), bare(merged))
    assert len(plain.adapter.base.tensors) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_shows_what_is_merged(tmp_path: Path, full: State, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in full.items()}
    base = base_at(tmp_path / "base", bare(state))
    clean, merged = saved(state, tmp_path / "clean.pt"), saved(in_eval_mode(state), tmp_path / "eval.pt")
    assert loratool.load(clean, base=base, alpha=ALPHA).notes == ()
    [note] = loratool.load(merged, base=base, alpha=ALPHA).notes
    assert "2 of its 2 weights hold the delta already" in note
    assert "--already-merged" in note
    said = loratool.load(merged, base=base, alpha=ALPHA, already_merged=True)
    assert all("hold the delta" not in note for note in said.notes)
    error = refused(lambda: loratool.load(clean, base=base, alpha=ALPHA, already_merged=True))
    assert error.code == "E-OPTION"
    assert "equal to the base's" in error.message
    error = refused(lambda: loratool.load(merged, base=base, alpha=2 * ALPHA))
    assert error.code == "E-BASE-MISMATCH"
    assert "--alpha" in error.hint


def test_a_narrower_copy_of_the_base_is_the_base(tmp_path: Path, full: State) -> None:
    """Trained in 16 bits from a float32 base."""
    base = base_at(tmp_path / "base", bare(full))
    state = {name: value.bfloat16() for name, value in full.items()} | linear("l.0.fc2", 3, 6)
    assert loratool.load(saved(state, tmp_path / "full.pt"), base=base, alpha=ALPHA).notes == ()


def test_a_wider_copy_of_the_base_is_the_base(tmp_path: Path, full: State) -> None:
    """Trained in float32 from a 16-bit base: equal numbers, other bytes."""
    half = {name: value.bfloat16() for name, value in bare(full).items()}
    base = base_at(tmp_path / "base", half)
    state = full | {name: value.float() for name, value in half.items()}
    assert loratool.load(saved(state, tmp_path / "full.pt"), base=base, alpha=ALPHA).notes == ()


def test_packed_rows_are_subtracted_where_they_were_added(tmp_path: Path) -> None:
    weight, state = values(12, 5), factors("attn", values(RANK, 5), values(4, RANK))
    merged = weight.clone()
    merged[4:8] += state["attn.lora_B"] @ state["attn.lora_A"] * SCALE
    wrapped, base = saved(state | {"attn.weight": merged}, tmp_path / "eval.pt"), tmp_path / "base"
    options: dict[str, Any] = {"alpha": ALPHA, "enable_lora": "010", "already_merged": True}
    loratool.extract(wrapped, tmp_path / "a.safetensors", base_out=base, **options)
    got = read(base)["attn.weight"]
    assert torch.equal(got[:4], weight[:4])
    assert torch.equal(got[8:], weight[8:])
    assert torch.allclose(got, weight, atol=1e-5)


# --- what is asked for, and refused -------------------------------------------------------------


def test_alpha_is_asked_for(tmp_path: Path, full: State, cli: Cli) -> None:
    wrapped, out = saved(full, tmp_path / "full.pt"), tmp_path / "a.safetensors"
    result = cli("extract", wrapped, "-o", out)
    assert result.code == 2
    assert "error[E-ALPHA]" in result.err
    assert "give --alpha X" in result.err
    assert "always alpha/rank" in result.err
    result = cli("extract", wrapped, "-o", out, "--alpha", 6, "--scaling", "alpha")
    assert result.code == 2
    assert "always alpha/rank, not alpha" in result.err
    assert cli("extract", wrapped, "-o", out, "--alpha", 6, "--scaling", "alpha/rank").code == 0
    assert "give --alpha" in cli("inspect", wrapped).out
    assert "--scaling" not in cli("inspect", wrapped).out


def test_inspect(tmp_path: Path, cli: Cli) -> None:
    state = {"attn.weight": values(12, 5)} | factors("attn", values(2 * RANK, 5), values(8, RANK))
    document = cli("inspect", saved(state, tmp_path / "a.pt"), "--json").json
    assert (document["convention"], document["what"]) == ("loralib", "wrapped checkpoint")
    layers = [(layer["target"], layer["rank"], layer["alpha"], layer["shape"]) for layer in document["layers"]]
    assert layers == [("attn.weight", RANK, None, [12, 5])] * 2
    assert any("2 of 3 blocks were trained" in note for note in document["notes"])


def test_which_blocks_is_asked_for(tmp_path: Path, cli: Cli) -> None:
    state = {"attn.weight": values(12, 5), "fc.weight": values(6, 5)} | linear("fc")
    state |= factors("attn", values(2 * RANK, 5), values(8, RANK))
    wrapped, out = saved(state, tmp_path / "full.pt"), tmp_path / "a.safetensors"
    result = cli("extract", wrapped, "-o", out, "--alpha", 6)
    assert result.code == 2
    assert "2 of 3 blocks" in result.err
    assert "--enable-lora PATTERN=DIGITS" in result.err
    for digits in ("11", "100", "1010"):
        result = cli("extract", wrapped, "-o", out, "--alpha", 6, "--enable-lora", f"attn={digits}")
        assert result.code == 2
        assert "error[E-OPTION]" in result.err
        assert "2 of 3 blocks" in result.err
    for digits in ("000", "TFT", ""):
        result = cli("extract", wrapped, "-o", out, "--alpha", 6, "--enable-lora", f"attn={digits}")
        assert result.code == 2
        assert "one digit per block" in result.err
    assert "matches no layer" in cli("extract", wrapped, "-o", out, "--alpha", 6, "--enable-lora", "x=101").err
    assert cli("extract", wrapped, "-o", out, "--alpha", 6, "--enable-lora", "101").code == 0
    rows = [item.target.rows for item in loratool.load(out).updates if item.target.name == "attn.weight"]
    assert rows == [(0, 4), (8, 12)]


def test_a_square_matrix_among_transposed_ones(tmp_path: Path) -> None:
    state = {"c_fc.weight": values(5, 6), "c_fc.bias": values(6), "sq.weight": values(5, 5)}
    adapter = saved(linear("c_fc") | linear("sq", 5, 5), tmp_path / "a.pt")
    base = base_at(tmp_path / "base", state)
    [doubt] = loratool.load(adapter, base=base, alpha=ALPHA).doubts
    assert "sq.weight is square" in doubt
    assert "--layout" in doubt
    for layout in ("in_out", "out_in"):
        loaded = loratool.load(adapter, base=base, alpha=ALPHA, layout={"sq": layout})
        assert loaded.doubts == ()
        loratool.merge(base, loaded, tmp_path / layout)
        delta = SCALE * values(5, RANK).double() @ values(RANK, 5).double()
        exact = state["sq.weight"].double() + (delta.T if layout == "in_out" else delta)
        assert_rounded(read(tmp_path / layout)["sq.weight"], exact)


def test_square_tables_are_asked_for(tmp_path: Path) -> None:
    """gpt2-medium has as many positions as dimensions: nothing tells its table from a Linear."""
    base = base_at(tmp_path / "base", {"wpe.weight": values(5, 5)})
    adapter = saved(linear("wpe", 5, 5), tmp_path / "a.pt")
    assert "wpe.weight is square" in loratool.load(adapter, base=base, alpha=ALPHA).doubts[0]


def test_factors_alone_need_the_base(tmp_path: Path) -> None:
    adapter = saved(linear(), tmp_path / "a.pt")
    loaded = loratool.load(adapter, alpha=ALPHA)
    assert "only the base tells" in loaded.doubts[0]
    assert refused(lambda: loratool.save(loaded, tmp_path / "x.safetensors")).code == "E-LAYOUT"
    loratool.save(loratool.load(adapter, alpha=ALPHA, layout={"*": "out_in"}), tmp_path / "x.safetensors")
    error = refused(lambda: loratool.extract(adapter, tmp_path / "y.safetensors", alpha=ALPHA))
    assert error.code == "E-NO-BASE"


def test_broken_pairs_are_all_reported(tmp_path: Path) -> None:
    state = {"a.lora_A": values(2, 3), "b.lora_B": values(3, 2)} | factors("c", values(3, 4), values(4, 2))
    state |= factors("d", values(4), values(4, 2)) | factors("e", values(0, 3), values(3, 0))
    error = refused(lambda: loratool.load(saved(state, tmp_path / "a.pt"), alpha=1))
    codes = [problem.code for problem in error.problems]
    assert codes == ["E-COMPONENTS", "E-COMPONENTS", "E-SHAPE", "E-SHAPE", "E-SHAPE"]
    assert "a has lora_A but not its partner" in error.problems[0].message
    assert "b has lora_B" in error.problems[1].message


def test_what_fits_no_weight_is_refused(tmp_path: Path) -> None:
    base = base_at(
        tmp_path / "base",
        {
            "fc.weight": values(7, 5),
            "c.weight": values(4, 3, 2, 2),
            "c1.weight": values(4, 3, 3),
            "v.weight": values(5),
        },
    )
    adapter = linear("fc") | linear("c") | linear("v") | factors("c1", values(6, 9), values(12, 6))
    error = refused(lambda: loratool.load(saved(adapter, tmp_path / "a.pt"), base=base, alpha=1))
    texts = [problem.message for problem in error.problems]
    assert len(texts) == 4
    assert any(t.startswith("fc: ") and "[7, 5]" in t for t in texts)
    assert any(t.startswith("c: ") and "not of a convolution [4, 3, 2, 2]" in t for t in texts)
    assert any("Conv1d and Conv3d neither run nor merge" in t for t in texts)
    uneven = factors("q", values(4, 5), values(7, 2))
    error = refused(lambda: loratool.load(saved(uneven, tmp_path / "b.pt"), alpha=1))
    assert error.code == "E-SHAPE"
    assert "does not divide" in error.message


def test_missing_target_names_its_neighbours(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", {"l.0.fd.weight": values(6, 5)})
    adapter = loratool.load(saved(linear(), tmp_path / "a.pt"), base=base, alpha=1, layout={"*": "out_in"})
    error = refused(lambda: loratool.merge(base, adapter, tmp_path / "out"))
    assert error.code == "E-TARGET"
    assert "l.0.fc.weight" in error.message
    assert "l.0.fd.weight" in error.hint


def test_names_are_bound_by_one_prefix(tmp_path: Path) -> None:
    weight = values(6, 5)
    got = merged_with(tmp_path, {"transformer.l.0.fc.weight": weight}, linear())
    exact = weight.double() + SCALE * values(6, RANK).double() @ values(RANK, 5).double()
    assert_rounded(got["transformer.l.0.fc.weight"], exact)


def test_unused_tensors_are_refused(tmp_path: Path, full: State) -> None:
    stray = saved(linear() | {"norm.weight": values(5), "x": values(1)}, tmp_path / "a.pt")
    error = refused(lambda: loratool.load(stray, alpha=1))
    assert [problem.code for problem in error.problems] == ["E-NAMES", "E-NAMES"]
    assert "norm.weight" in error.message
    assert "neither a factor nor a bias" in error.message
    full.pop("l.0.fc2.weight")
    error = refused(lambda: loratool.load(saved(full, tmp_path / "b.pt"), alpha=1))
    assert error.code == "E-COMPONENTS"
    assert "l.0.fc2 has factors but no weight" in error.message


def test_options_that_mean_nothing(tmp_path: Path, kit: Any, cli: Cli) -> None:
    adapter = saved(linear(), tmp_path / "a.pt")
    error = refused(lambda: loratool.load(adapter, alpha=1, already_merged=True))
    assert "--already-merged: there are no weights" in error.message
    assert "--adapter means nothing" in refused(lambda: loratool.load(adapter, alpha=1, adapter="x")).message
    out = tmp_path / "x.safetensors"
    for name in ("plain.pth", "peft.pth"):
        for option in (["--already-merged"], ["--enable-lora", "101"]):
            result = cli("extract", kit / name, "-o", out, "--alpha", 1, "--scaling", "alpha/rank", *option)
            assert result.code == 2
            assert f"{option[0]} means nothing" in result.err


# --- detection ----------------------------------------------------------------------------------

FOREIGN = {
    "a plain checkpoint": {"l.weight": values(4, 3), "l.bias": values(4)},
    "AdaLoRA": {"l.lora_A": values(2, 3), "l.lora_B": values(4, 2), "l.lora_E": values(2, 1)},
    "PEFT's AdaLoRA": {"base_model.model.l.lora_A": values(2, 3), "base_model.model.l.lora_B": values(4, 2)},
    "PEFT": {"base_model.model.l.lora_A.weight": values(2, 3), "base_model.model.l.lora_B.weight": values(4, 2)},
    "PEFT-wrapped": {"l.lora_A.default.weight": values(2, 3), "l.lora_B.default.weight": values(4, 2)},
    "minLoRA": {"l.parametrizations.weight.0.lora_A": values(2, 3), "l.parametrizations.weight.0.lora_B": values(4, 2)},
    "mlx": {"l.lora_a": values(3, 2), "l.lora_b": values(2, 4)},
    "torchtune": {"l.lora_a.weight": values(2, 3), "l.lora_b.weight": values(4, 2)},
    "plain": {"l.lora.A": values(3, 2), "l.lora.B": values(2, 4), "l.linear.weight": values(4, 3)},
    "another wrapper": {"l.lora_A": values(2, 3), "l.lora_B": values(4, 2), "l.linear.weight": values(4, 3)},
    "kohya": {"lora_unet_l.lora_down.weight": values(2, 3), "lora_unet_l.lora_up.weight": values(4, 2)},
    "litgpt": {"transformer.h.0.attn.qkv.lora_A": values(2, 3), "transformer.h.0.attn.qkv.lora_B": values(4, 2)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_not_loralib(tmp_path: Path, name: str) -> None:
    source = open_checkpoint(saved(FOREIGN[name], tmp_path / "a.pt"))
    assert "loralib" not in [convention.NAME for convention in matching(source)]


def test_own_files_are_loralib_alone(tmp_path: Path, full: State) -> None:
    gpt2 = factors("transformer.h.0.attn.c_attn", values(2 * RANK, 5), values(10, RANK))
    for state in (full, linear(), {"model_state_dict": gpt2}, {f"module.{name}": v for name, v in linear().items()}):
        source = open_checkpoint(saved(state, tmp_path / "a.pt"))
        assert choose(source).NAME == "loralib"
    assert [c.NAME for c in CONVENTIONS].count("loralib") == 1
