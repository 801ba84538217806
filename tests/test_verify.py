"""`verify` and `status`: right merges pass, by whatever tool; every mistake is called by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Cli
from hypothesis import given
from peft_cases import CASES, build
from peft_cases import Case as PeftCase
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import Case, cases
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.evidence import ulps_between
from loratool.updates import Lora, Replace, Scaling

State = dict[str, Tensor]
NAMES = tuple(f"layers.{n}.{part}.weight" for n in range(3) for part in "qv")
TARGETS = NAMES[::2]
SHAPE = (96, 64)
RANK, SCALE = 9, 2.0


@pytest.fixture
def base(tmp_path: Path) -> State:
    made = torch.Generator().manual_seed(0)
    state = {name: (torch.randn(SHAPE, generator=made) * 0.02).bfloat16() for name in NAMES}
    state["norm.weight"] = torch.ones(64).bfloat16()
    save_file(state, tmp_path / "base.safetensors")
    return state


def adapter_of(seed: int = 1, scaling: Scaling | None = None, names: tuple[str, ...] = TARGETS) -> Adapter:
    made = torch.Generator().manual_seed(seed)
    updates = []
    for name in names:
        A, B = torch.randn(RANK, SHAPE[1], generator=made), torch.randn(SHAPE[0], RANK, generator=made) * 0.02
        factors = scaling or Scaling.by("alpha/rank", SCALE * RANK, RANK)
        updates.append(Targeted(Target(name, SHAPE), Lora(TensorRef.of(A), TensorRef.of(B), factors)))
    return Adapter(tuple(updates))


def deltas(adapter: Adapter) -> State:
    """B @ A by name, without the scale."""
    return {
        item.target.name: (item.update.B.read().double() @ item.update.A.read().double())
        for item in adapter.updates
        if isinstance(item.update, Lora)
    }


Rule = Callable[[str, Tensor, Tensor], Tensor]  # name, W, scaled delta -> W'


def merged_by(rule: Rule, base: State, path: Path, adapter: Adapter | None = None) -> Path:
    """A merge of another tool, with whatever mistake."""
    out = {name: value.clone() for name, value in base.items()}
    for name, delta in deltas(adapter or adapter_of()).items():
        out[name] = rule(name, base[name].double(), delta * SCALE).to(base[name].dtype)
    save_file(out, path)
    return path


def verified(tmp_path: Path, merged: Path, *adapters: Adapter, **options: object) -> loratool.VerifyReport:
    given_ones = list(adapters) or [adapter_of()]
    return loratool.verify(merged, tmp_path / "base.safetensors", given_ones, **options)  # type: ignore[arg-type]


# -- yes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "fp32"}, {"dtype": "fp16"}, {"reproducible": True}], ids=str)
def test_own_merges(options: dict[str, object], base: State, tmp_path: Path) -> None:
    made = [(adapter_of(1), 0.7), (adapter_of(2, names=NAMES), -1.5)]
    out = tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", made, out, **options)  # type: ignore[arg-type]
    report = loratool.verify(out, tmp_path / "base.safetensors", made)
    assert report.answer, report.findings
    assert [check.name for check in report.tensors] == [*NAMES]
    assert report.untouched == 1
    if options:
        assert report.ulps == (0 if "fp16" not in str(options) else report.ulps)
    changed = {name: value for name, value in load_file(out).items() if name in NAMES}
    assert report.counts[1] == sum(value.numel() for value in changed.values())


@given(case=cases())
def test_any_merge(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    folder = tmp_path_factory.mktemp("any")
    save_file(case.base, folder / "base.safetensors")
    loratool.merge(folder / "base.safetensors", case.adapter, folder / "out.safetensors", allow_new=True)
    report = loratool.verify(folder / "out.safetensors", folder / "base.safetensors", case.adapter)
    assert report.answer, report.findings


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_peft_merges(case: PeftCase, tmp_path: Path) -> None:
    built = build(case, tmp_path)
    save_file({name: value.contiguous() for name, value in built.merged.items()}, tmp_path / "merged.safetensors")
    report = loratool.verify(tmp_path / "merged.safetensors", built.base, built.adapter)
    # PEFT multiplies in the adapter's dtype, which may be coarser than the base's.
    assert {finding.word for finding in report.findings} <= {"rounded-delta"}
    assert report.answer or (case.base_dtype, case.adapter_dtype) != (torch.float32, None) != case.base_dtype
    report = loratool.verify(tmp_path / "merged.safetensors", built.base, built.adapter, rounded_delta=True)
    assert report.answer, report.findings


# -- no, and why ------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, Rule, str, str]] = [
    ("twice", lambda n, W, D: W + 2 * D, "twice", "merged twice"),
    (
        "alpha for alpha/rank",
        lambda n, W, D: W + RANK * D,
        "scale",
        "(as if the scale was taken as alpha): 18 times its product instead of 2",
    ),
    ("rsLoRA for alpha/rank", lambda n, W, D: W + RANK**0.5 * D, "scale", "taken as alpha/sqrt(rank)"),
    (
        "scale left out",
        lambda n, W, D: W + D / SCALE,
        "scale",
        "merged with weight 0.5 instead of 1 (as if the scale was left out): 1 times",
    ),
    ("scale twice", lambda n, W, D: W + D / RANK, "scale", "divided by the rank again"),
    (
        "another scale",
        lambda n, W, D: W + 0.37 * D,
        "scale",
        "merged with weight 0.37 instead of 1: 0.74 times its product instead of 2",
    ),
    ("subtracted", lambda n, W, D: W - D, "scale", "it was subtracted"),
    ("not merged", lambda n, W, D: W, "missing", "it was not merged at all"),
    ("another base", lambda n, W, D: torch.randn_like(W) * 0.02 + D, "other-base", "another base"),
    ("something else", lambda n, W, D: W + D + torch.randn_like(W) * 0.01, "other-base", "other adapters as well"),
    ("NaN", lambda n, W, D: W + D * torch.nan, "nonfinite", "NaN or infinity"),
]


@pytest.mark.parametrize(("rule", "word", "text"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_mistakes_are_called_by_their_names(rule: Rule, word: str, text: str, base: State, tmp_path: Path) -> None:
    report = verified(tmp_path, merged_by(rule, base, tmp_path / "out.safetensors"))
    assert not report.answer
    assert [finding.word for finding in report.findings] == [word]
    assert text in report.findings[0].text
    assert report.findings[0].tensors == TARGETS


def test_rules_are_told_by_the_rule_of_the_adapter(base: State, tmp_path: Path) -> None:
    """An rsLoRA adapter merged with alpha/rank, and one of the plain wrapper's first edition."""
    for rule, alpha, applied, text in [
        ("alpha/sqrt(rank)", 6.0, 6 / RANK, "taken as alpha/rank"),
        (
            "alpha/sqrt(rank)",
            6.0,
            6.0,
            "taken as alpha, or it was merged three times): 6 times its product",
        ),
        ("alpha", 2.0, 2 / RANK, "taken as alpha/rank"),
    ]:
        adapter = adapter_of(scaling=Scaling.by(rule, alpha, RANK))
        factor = applied / SCALE
        out = merged_by(lambda n, W, D, factor=factor: W + factor * D, base, tmp_path / "o.safetensors", adapter)  # type: ignore[misc]
        (finding,) = verified(tmp_path, out, adapter).findings
        assert finding.word == "scale"
        assert text in finding.text


def test_one_layer_is_missing_and_another_scaled(base: State, tmp_path: Path) -> None:
    factors = {TARGETS[0]: 1.0, TARGETS[1]: 0.0, TARGETS[2]: 2.0}
    report = verified(tmp_path, merged_by(lambda n, W, D: W + factors[n] * D, base, tmp_path / "out.safetensors"))
    assert {finding.word: finding.tensors for finding in report.findings} == {
        "missing": (TARGETS[1],),
        "twice": (TARGETS[2],),
    }
    assert [check.reason.factors for check in report.tensors if check.reason] == [(0.0,), (2.0,)]


def test_which_of_several_adapters(base: State, tmp_path: Path) -> None:
    one, two = adapter_of(1), adapter_of(2)
    loratool.save(one, tmp_path / "one.safetensors")
    loratool.save(two, tmp_path / "two.safetensors")
    wrong = deltas(two)
    out = merged_by(lambda n, W, D: W + 0.5 * D + 2 * SCALE * wrong[n], base, tmp_path / "out.safetensors", one)
    asked = [(tmp_path / "one.safetensors", 0.5), (tmp_path / "two.safetensors", 1.0)]
    report = loratool.verify(out, tmp_path / "base.safetensors", asked)
    (finding,) = report.findings
    assert (
        finding.text
        == "two.safetensors: it was merged twice (or the scale was applied twice): 4 times its product instead of 2"
    )
    out = merged_by(lambda n, W, D: W + D + SCALE * wrong[n], base, tmp_path / "left.safetensors", one)
    (finding,) = loratool.verify(out, tmp_path / "base.safetensors", asked).findings
    assert finding.word == "scale"
    assert "one.safetensors: merged with weight 1 instead of 0.5 (as if it was merged twice, or" in finding.text
    assert "or its weight was left out, or the scale was applied twice): 2 times its product" in finding.text


def test_a_rounded_delta_can_be_accepted(base: State, tmp_path: Path) -> None:
    """In the output's own dtype always, as PEFT, diffusers and MLX do it; in a coarser one if it is asked for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        state = {name: value.to(dtype) for name, value in base.items()}
        save_file(state, tmp_path / "base.safetensors")
        out = merged_by(lambda n, W, D: W + D.bfloat16().double(), state, tmp_path / "out.safetensors")
        report = verified(tmp_path, out)
        assert report.answer == (dtype == torch.bfloat16)
        (told,) = report.findings or report.remarks
        assert (told.word, told.tensors) == ("rounded-delta", TARGETS)
        assert told.text == "the delta was rounded to BF16 before it was added"
        report = verified(tmp_path, out, rounded_delta=True)
        assert report.answer
        assert [remark.word for remark in report.remarks] == ["rounded-delta"]
        twice = merged_by(lambda n, W, D: W + 2 * D.bfloat16().double(), state, tmp_path / "twice.safetensors")
        (finding,) = verified(tmp_path, twice, rounded_delta=True).findings
        assert finding.word == "twice"


def test_ulps(base: State, tmp_path: Path) -> None:
    out = merged_by(lambda n, W, D: W + D, base, tmp_path / "out.safetensors")
    state = load_file(out)
    codes = state[TARGETS[0]].view(torch.int16)
    where = state[TARGETS[0]].abs().argmax()
    codes.view(-1)[where] += 3
    save_file(state, out)
    report = verified(tmp_path, out)
    check = report.tensors[0]
    assert (check.name, check.ulps, check.wrong) == (TARGETS[0], 3, 1)
    assert verified(tmp_path, out, ulps=3).answer
    assert not verified(tmp_path, out, ulps=2).answer


# -- what is not changed ----------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Callable[[State], object], base: State) -> loratool.VerifyReport:
    out = merged_by(lambda n, W, D: W + D, base, tmp_path / "out.safetensors")
    state = load_file(out)
    change(state)
    save_file(state, out)
    return verified(tmp_path, out)


def test_untouched_tensors_are_byte_equal(base: State, tmp_path: Path) -> None:
    def flip(state: State) -> None:
        state["layers.2.v.weight"].view(torch.int16)[5, 5] ^= 1

    (finding,) = changed(tmp_path, flip, base).findings
    assert (finding.word, finding.tensors) == ("untouched", ("layers.2.v.weight",))


@pytest.mark.parametrize(
    ("change", "word", "name"),
    [
        (lambda s: s.pop(TARGETS[1]), "absent", TARGETS[1]),
        (lambda s: s.pop("norm.weight"), "absent", "norm.weight"),
        (lambda s: s.update(more=torch.ones(3)), "extra", "more"),
        (lambda s: s.update({TARGETS[0]: torch.ones(2, 2)}), "shape", f"{TARGETS[0]} (F32 [2, 2])"),
        (lambda s: s.update({"norm.weight": torch.ones(64).int()}), "shape", "norm.weight (I32 [64])"),
    ],
    ids=["target gone", "other gone", "one more", "shape", "integers"],
)
def test_what_is_there(change: Callable[[State], object], word: str, name: str, base: State, tmp_path: Path) -> None:
    (finding,) = changed(tmp_path, change, base).findings
    assert (finding.word, finding.tensors) == (word, (name,))


def test_another_base_is_told_by_what_no_adapter_changes(base: State, tmp_path: Path) -> None:
    other = {name: (value * 1.05 if name != "norm.weight" else value) for name, value in base.items()}
    out = merged_by(lambda n, W, D: other[n].double() + D, base, tmp_path / "out.safetensors")
    state = load_file(out) | {name: value for name, value in other.items() if name not in TARGETS}
    save_file(state, out)
    (finding,) = verified(tmp_path, out).findings
    assert finding.word == "other-base"
    assert finding.tensors == tuple(NAMES[1::2])


def test_a_replaced_tensor(base: State, tmp_path: Path) -> None:
    value = torch.randn(SHAPE)
    made = Adapter((Targeted(Target(NAMES[0], SHAPE), Replace(TensorRef.of(value))),))
    loratool.merge(tmp_path / "base.safetensors", made, tmp_path / "out.safetensors")
    assert verified(tmp_path, tmp_path / "out.safetensors", made).answer
    (finding,) = verified(tmp_path, tmp_path / "base.safetensors", made).findings
    assert finding.word == "missing"


def test_a_tied_tensor_may_be_left_out(base: State, tmp_path: Path) -> None:
    """A pickle in which two names share one storage, and a tool that keeps one of them."""
    state = dict(base)
    state["head.weight"] = state["norm.weight"]
    torch.save(state, tmp_path / "base.pth")
    out = merged_by(lambda n, W, D: W + D, base, tmp_path / "out.safetensors")
    assert loratool.verify(out, tmp_path / "base.pth", adapter_of()).answer


def test_another_dtype_is_rounded_to(base: State, tmp_path: Path) -> None:
    out = merged_by(lambda n, W, D: W + D, {n: v.float() for n, v in base.items()}, tmp_path / "out.safetensors")
    report = verified(tmp_path, out)
    assert report.answer
    assert {check.dtype for check in report.tensors} == {"F32"}
    state = load_file(out)
    state["norm.weight"][0] += 1e-6
    save_file(state, out)
    assert [finding.word for finding in verified(tmp_path, out).findings] == ["untouched"]


# -- samples, errors, the command line --------------------------------------------------------------------------------


def test_a_sample_looks_at_a_part(base: State, tmp_path: Path) -> None:
    shape = (4096, 512)
    made = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=made) for name in "wv"}
    save_file(state, tmp_path / "b.safetensors")
    A, B = torch.randn(4, 512, generator=made), torch.randn(4096, 4, generator=made)
    adapter = Adapter(
        (Targeted(Target("w", shape), Lora(TensorRef.of(A), TensorRef.of(B), Scaling.by("alpha", 1, 4))),)
    )
    loratool.merge(tmp_path / "b.safetensors", adapter, tmp_path / "out.safetensors")
    report = loratool.verify(tmp_path / "out.safetensors", tmp_path / "b.safetensors", adapter, sample=0.1)
    assert report.answer
    assert 0.1 * 4096 * 512 <= report.counts[1] < 0.4 * 4096 * 512
    assert report.to_json()["sample"] == 0.1
    save_file(state, tmp_path / "out.safetensors")
    report = loratool.verify(tmp_path / "out.safetensors", tmp_path / "b.safetensors", adapter, sample=0.1)
    assert [finding.word for finding in report.findings] == ["missing"]


def test_adapters_that_do_not_fit(base: State, tmp_path: Path) -> None:
    out = merged_by(lambda n, W, D: W + D, base, tmp_path / "out.safetensors")
    bad = replace(adapter_of(), updates=(Targeted(Target("nowhere", SHAPE), adapter_of().updates[0].update),))
    with pytest.raises(loratool.Mismatch, match="nowhere"):
        verified(tmp_path, out, bad)
    with pytest.raises(loratool.ChoiceNeeded, match="sample"):
        verified(tmp_path, out, sample=1.5)


def test_the_command(base: State, cli: Cli, tmp_path: Path) -> None:
    loratool.save(adapter_of(), tmp_path / "a.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    arguments = [tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors"]
    good = cli("verify", tmp_path / "out.safetensors", *arguments)
    assert good.code == 0
    assert "out.safetensors: yes: 3 changed tensors" in good.out
    assert "4 others are the base's" in good.out
    assert "of the change survives rounding" in good.out
    bad = cli("verify", tmp_path / "base.safetensors", *arguments)
    assert bad.code == 1
    assert "no: a.safetensors: it was not merged at all" in bad.out
    assert "in: layers.0.q.weight, layers.1.q.weight, ... (3 in all)" in bad.out
    assert "survives" not in bad.out
    assert cli("verify", tmp_path / "base.safetensors", *arguments, "-q") == (1, "", "")
    document = cli("verify", tmp_path / "base.safetensors", *arguments, "--json", "--sample").json
    assert (document["ok"], document["verdict"]) == (False, "no")
    assert document["findings"][0]["reason"] == "missing"
    assert document["tensors"][0]["factors"] == [0.0]
    weighted = cli("verify", tmp_path / "out.safetensors", f"{arguments[0]}@0.5", *arguments[1:], "--json").json
    assert "(as if it was merged twice, or its weight was left out" in weighted["findings"][0]["text"]
    (asked,) = weighted["applied"]
    assert (asked["asked"], asked["applied"], asked["lowest"], asked["highest"]) == (0.5, 1.0, 1.0, 1.0)


def test_ulps_between_numbers() -> None:
    one = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-40, torch.nan, torch.nan, torch.inf], dtype=torch.bfloat16)
    other = torch.tensor([1.0078125, 1.0, -0.0, 2.0**-133, 0.0, 1.0, torch.nan, -torch.inf], dtype=torch.bfloat16)
    wanted = [1, 2 * 0x3F80, 0, 1, 1, torch.inf, 0, 2 * 0x7F80]
    assert ulps_between(one, other, "BF16").tolist() == wanted


# -- the receipt ------------------------------------------------------------------------------------------------------


def test_the_receipt_is_read_first_and_believed_nothing(base: State, cli: Cli, tmp_path: Path) -> None:
    for n in (1, 2):
        loratool.save(adapter_of(n), tmp_path / f"{n}.safetensors")
    one, two, out = tmp_path / "1.safetensors", tmp_path / "2.safetensors", tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", [(one, 0.5), two], out)

    def claim(*asked: tuple[Path, float]) -> loratool.VerifyReport:
        return loratool.verify(out, tmp_path / "base.safetensors", [*asked])

    right = claim((one, 0.5), (two, 1.0))
    assert right.claim is not None
    assert (right.claim.agrees, right.answer) == (True, True)
    for asked, difference in [
        ([(one, 1.0), (two, 1.0)], "it says 1.safetensors@0.5, not @1"),
        ([(one, 0.5)], "it also names 2.safetensors@1"),
    ]:
        report = claim(*asked)
        assert report.claim is not None
        assert report.claim.differences == (difference,)
        assert not report.answer
    loratool.save(adapter_of(3), tmp_path / "3.safetensors")
    report = claim((one, 0.5), (two, 1.0), (tmp_path / "3.safetensors", 1.0))
    assert report.claim is not None
    assert report.claim.differences == ("it does not name 3.safetensors",)
    assert [(finding.word, finding.text) for finding in report.findings] == [
        ("missing", "3.safetensors: it was not merged at all")
    ]
    shown = cli("verify", out, one, two, "--base", tmp_path / "base.safetensors")
    assert "its receipt says something else (1.safetensors@0.5, 2.safetensors@1): it says 1.safeten" in shown.out
    assert "1.safetensors: asked with weight 1, merged with 0.5 (3 tensors)" in shown.out


def test_a_receipt_that_lies_is_found_out(base: State, tmp_path: Path) -> None:
    """The numbers decide: it says what was asked for, and they are those of the base."""
    loratool.save(adapter_of(), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out)
    with safe_open(out, "pt") as file:
        receipt = file.metadata()
    save_file(base, out, metadata=receipt)
    report = loratool.verify(out, tmp_path / "base.safetensors", tmp_path / "a.safetensors")
    assert report.claim is not None
    assert (report.claim.agrees, report.verdict) == (True, "no")
    broken = {key: value.replace("keep", "kept") for key, value in receipt.items()}
    save_file(base, out, metadata=broken)
    report = loratool.verify(out, tmp_path / "base.safetensors", tmp_path / "a.safetensors")
    assert report.claim is not None
    assert "broken" in report.claim.differences[0]


def test_no_units_in_the_last_place_beside_a_yes(base: State, cli: Cli, tmp_path: Path) -> None:
    """Where a sum is next to zero, float32 is thousands of its units off, and right."""
    wide = {name: value.float() for name, value in base.items()}
    wide[TARGETS[0]] = -(deltas(adapter_of())[TARGETS[0]] * SCALE).float()
    save_file(wide, tmp_path / "base.safetensors")

    def in_float32(name: str, W: Tensor, D: Tensor) -> Tensor:
        (item,) = (item.update for item in adapter_of().updates if item.target.name == name)
        assert isinstance(item, Lora)
        return (W.float() + SCALE * (item.B.read() @ item.A.read())).double()

    loratool.save(adapter_of(), tmp_path / "a.safetensors")
    out = merged_by(in_float32, wide, tmp_path / "out.safetensors")
    report = verified(tmp_path, out)
    assert report.answer, report.findings
    assert report.ulps <= 1
    shown = cli("verify", out, tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors")
    assert "of its row's largest at most" in shown.out
    assert "last place" not in shown.out


def test_two_weak_adapters_can_not_be_told_from_the_base(base: State, tmp_path: Path) -> None:
    """Together they would move some numbers; one after the other, and rounded in between, they rightly move none."""
    large = {name: value.sign() for name, value in base.items()}  # no small number that anything moves
    save_file(large, tmp_path / "base.safetensors")
    tiny = [adapter_of(n, Scaling("none", RANK, None, 0.012)) for n in (1, 2)]
    out = tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", tiny, out)
    moved = sum(int((value != large[name]).sum()) for name, value in load_file(out).items())
    assert 0 < moved < 0.05 * 3 * 96 * 64
    assert loratool.verify(out, tmp_path / "base.safetensors", tiny).verdict == "yes"
    report = loratool.verify(tmp_path / "base.safetensors", tmp_path / "base.safetensors", tiny)
    assert report.verdict == "can-not-tell"


# -- status -----------------------------------------------------------------------------------------------------------


def test_status(base: State, cli: Cli, tmp_path: Path) -> None:
    loratool.save(adapter_of(), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    report = loratool.merge(tmp_path / "base.safetensors", [(tmp_path / "a.safetensors", 0.5)], out)
    shown = cli("status", out)
    assert shown.code == 0
    assert "a.safetensors@0.5" in shown.out
    assert "3 tensors" in shown.out
    assert cli("status", out, "--json").json["receipt"] == report.receipt.to_json()
    checked = loratool.status(out, check=True)
    assert (checked.answer, checked.checked, checked.unproven) == (True, 3, 0)
    none = cli("status", tmp_path / "base.safetensors")
    assert (none.code, "no receipt" in none.out) == (1, True)
    raw = bytearray(out.read_bytes())
    raw[-200] ^= 1  # of the last tensor
    out.write_bytes(raw)
    assert cli("status", out).code == 0
    broken = cli("status", out, "--check")
    name = loratool.status(out, check=True).changed
    assert (broken.code, len(name)) == (1, 1) or name == ()


def test_status_of_a_merge_without_digests(base: State, tmp_path: Path) -> None:
    loratool.merge(tmp_path / "base.safetensors", adapter_of(), tmp_path / "out.safetensors", digests=False)
    found = loratool.status(tmp_path / "out.safetensors", check=True)
    assert (found.answer, found.checked, found.unproven) == (True, 0, 3)
