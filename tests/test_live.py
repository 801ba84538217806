"""Adapters in running models: the bits of a merge of what is active, and of the original when nothing is."""

from __future__ import annotations

import _thread
import gc
import importlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import (
    ADDITIVE,
    FORMS,
    MATRIX_FORMS,
    Case,
    Maker,
    State,
    cases,
    make_update,
    one,
    save_sharded,
    seeds,
    small_blocks,
    tensors_of,
    weights,
)
from torch import Tensor, nn

import loratool
from loratool import Adapter, BaseIdentity, Handle, LoratoolError, Mismatch, Target, Targeted, TensorIdentity, TensorRef
from loratool.updates import Add, Replace, Scaling

live: Any = importlib.import_module("loratool.live")
parameter: Any = importlib.import_module("loratool.live.parameter")
state_of: Any = importlib.import_module("loratool.live.state")

SHAPE = (24, 16)
UNDOS = ("compressed", "copy", "base")


def model_of(state: Mapping[str, Tensor]) -> nn.Module:
    """A model whose parameters have these names and numbers."""
    root = nn.Module()
    for name, value in state.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(value.clone(), requires_grad=value.is_floating_point()))
    return root


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (p.dtype, tuple(p.shape), raw_bytes(p)) for name, p in model.named_parameters()}


def raw_bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits_of(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return bits(model_of(state))


def merged(base: Path, active: Sequence[tuple[Adapter, float]], work: Path, **options: Any) -> dict[str, Any]:
    """The bits that a merge of some adapters gives, as the reference."""
    out = work / f"merged-{sum(1 for _ in work.iterdir())}"
    loratool.merge(base, active, out, **options)
    return bits_of(tensors_of(out))


def pair(dtype: torch.dtype, forms: Sequence[str] = MATRIX_FORMS) -> tuple[State, Adapter, Adapter]:
    """A base, an adapter of every form, and one that changes half of the same tensors, and adds to no DoRA."""
    make = Maker(3)
    state = {f"{form}.weight": make.values(*SHAPE, dtype=dtype) for form in forms}

    def adapter(chosen: Sequence[tuple[str, str]]) -> Adapter:
        return Adapter(tuple(Targeted(Target(f"{n}.weight", SHAPE), make_update(f, SHAPE, make)) for n, f in chosen))

    second = [(form, "lora") for form in forms if not form.startswith(("dora", "scale"))]
    return state, adapter([(form, form) for form in forms]), adapter(second)


# --- the bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undo", UNDOS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_step_has_the_bits_of_a_merge(dtype: torch.dtype, undo: str, tmp_path: Path) -> None:
    state, A, B = pair(dtype)
    base = save_sharded(state, tmp_path / "base", shards=2)
    model = model_of(state)
    before = bits(model)
    with small_blocks(64):
        first = loratool.apply(model, A, undo=base if undo == "base" else undo)
        assert bits(model) == merged(base, [(A, 1.0)], tmp_path)
        second = loratool.apply(model, B, weight=0.5)
        assert bits(model) == merged(base, [(A, 1.0), (B, 0.5)], tmp_path)
        first.remove()  # not the last one
        assert (first.active, second.active) == (False, True)
        assert bits(model) == merged(base, [(B, 0.5)], tmp_path)
        second.swap(A, weight=0.3)
        assert bits(model) == merged(base, [(A, 0.3)], tmp_path)
        second.remove()
        assert bits(model) == before
        second.remove()  # nothing to do
    assert bits(model) == before
    assert not second.active
    assert (second.report.undo_bytes, second.report.factor_bytes) == (0, 0)


def others(draw: st.DrawFn, adapter: Adapter) -> Adapter:
    """Another adapter of the same tensors: deltas, of whatever region the first one changes."""
    items = []
    for item in adapter.updates:
        region, form = item.target.region, draw(st.sampled_from(ADDITIVE if len(item.target.region) > 1 else ("add",)))
        update = make_update(form, region, Maker(draw(seeds), experts=item.target.experts))
        items.append(replace(item, update=update))
    return Adapter(tuple(items))


@st.composite
def stories(draw: st.DrawFn) -> tuple[Case, list[Adapter], list[tuple[str, int, int, float]]]:
    """Some adapters of one model, and what is done with them: verb, which handle, which adapter, weight."""
    case = draw(cases(FORMS))
    adapters = [case.adapter, *(others(draw, case.adapter) for _ in range(2))]
    step = st.tuples(st.sampled_from(("apply", "swap", "remove")), st.integers(0, 3), st.integers(0, 2), weights)
    return case, adapters, draw(st.lists(step, min_size=1, max_size=5))


def reference(base: Path, wanted: list[tuple[Adapter, float]], work: Path) -> tuple[dict[str, Any], set[str]]:
    """The bits that a merge gives, of no adapter the base's; or the codes with which it refuses."""
    try:
        return (merged(base, wanted, work) if wanted else bits_of(tensors_of(base))), set()
    except LoratoolError as error:
        return {}, {problem.code for problem in error.problems}


@given(stories(), st.sampled_from(UNDOS), st.sampled_from((8, 24, 1 << 20)))
def test_any_sequence_is_a_merge_of_what_is_active(
    story: tuple[Case, list[Adapter], list[tuple[str, int, int, float]]], undo: str, block: int
) -> None:
    case, adapters, steps = story
    with TemporaryDirectory() as folder, small_blocks(block):
        work = Path(folder)
        base = save_sharded(case.base, work / "base")
        model = model_of(case.base)
        before = bits(model)
        action: Callable[[], Any]
        handles: list[Handle] = []
        active: list[tuple[Adapter, float]] = []
        for verb, which, number, weight in steps:
            wanted, place = list(active), which % max(1, len(handles))
            if verb == "apply" or not handles:
                wanted.append((adapters[number], weight))
                kind = base if undo == "base" else undo
                action = partial(loratool.apply, model, adapters[number], weight=weight, undo=kind)
            elif verb == "swap":
                wanted[place] = (adapters[number], weight)
                action = partial(handles[place].swap, adapters[number], weight=weight)
            else:
                del wanted[place]
                action = handles[place].remove
            expected, codes = reference(base, wanted, work)
            here = bits(model)
            if codes:
                with pytest.raises(LoratoolError) as refused:
                    action()
                assert {problem.code for problem in refused.value.problems} == codes
                assert bits(model) == here
                continue
            done = action()
            assert bits(model) == expected
            active = wanted
            handles += [done] if isinstance(done, Handle) else []
            handles = [handle for handle in handles if handle.active]
        for handle in handles[::-2] + handles[-2::-2]:
            handle.remove()
        assert bits(model) == before


def test_reproducible_stays_on_and_is_for_the_whole_model(tmp_path: Path) -> None:
    make = Maker(4)
    state = {f"{n}.weight": make.values(200, 300, dtype=torch.bfloat16) for n in "ab"}
    base, model = save_sharded(state, tmp_path / "base"), model_of(state)
    A, B = (one("lora", (200, 300), name=f"{n}.weight", rank=16) for n in "ab")
    first = loratool.apply(model, A)
    assert bits(model) == merged(base, [(A, 1.0)], tmp_path) != merged(base, [(A, 1.0)], tmp_path, reproducible=True)
    second = loratool.apply(model, B, reproducible=True)
    assert second.report.changed == 2
    assert bits(model) == merged(base, [(A, 1.0), (B, 1.0)], tmp_path, reproducible=True)
    second.swap(A, weight=0.5)
    assert bits(model) == merged(base, [(A, 1.0), (A, 0.5)], tmp_path, reproducible=True)
    first.remove()
    second.remove()
    assert bits(model) == bits_of(state)


def test_a_context_manager_takes_it_out_whatever_happens() -> None:
    state, A, _ = pair(torch.float16, ("lora",))
    model = model_of(state)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), loratool.apply(model, A) as handle:
        1 / (handle.active and bits(model) == before)  # fails as it should where it was applied
    assert bits(model) == before
    with loratool.apply(model, A) as handle:
        handle.remove()
    assert bits(model) == before


def test_the_report_says_what_changed_and_what_is_kept() -> None:
    state, A, _ = pair(torch.bfloat16, ("lora", "dora0-lora"))
    state["other.weight"] = torch.ones(3)
    model = model_of(state)
    report = loratool.apply(model, A, undo="copy").report
    assert report.changed == 2
    assert report.survival.keys() == {"lora.weight", "dora0-lora.weight"}
    assert all(0.9 < (each.share or 0) < 1.1 for each in report.survival.values())
    assert report.undo_bytes == 2 * 24 * 16 * 2
    assert report.factor_bytes == 4 * sum(ref.numel for i in A.updates for ref in i.update.components().values())
    tiny = Adapter((Targeted(Target("lora.weight", SHAPE), Add(TensorRef.of(torch.full(SHAPE, 1e-9)), Scaling())),))
    assert "tensors keep less than 90% of their change" in loratool.apply(model_of(state), tiny).report.notes[-1]


# --- all or nothing --------------------------------------------------------------------------------------------------


class Broken(BaseException):
    """Not even an Exception, as KeyboardInterrupt is not."""


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool, BaseException | None], None]:
    """Let the n-th write of a block fail, before its bits change or after; every write after it works again."""
    mode = torch.inference_mode

    def arrange(number: int, late: bool, error: BaseException | None) -> None:
        turn = count()

        @contextmanager
        def writing(on: bool) -> Iterator[None]:
            mine = next(turn) == number and error is not None
            if mine and not late:
                raise error
            with mode(on):
                yield
            if mine:
                raise error

        monkeypatch.setattr(torch, "inference_mode", writing)

    return arrange


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("undo", UNDOS)
@pytest.mark.parametrize("verb", ["first", "apply", "remove", "swap"])
def test_a_failure_at_any_block_changes_nothing(
    verb: str, undo: str, late: bool, breaking: Callable[..., None], tmp_path: Path
) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha", "dora1-lora"))
    base = save_sharded(state, tmp_path / "base")
    original = bits_of(state)
    kind = base if undo == "base" else undo
    with small_blocks(256):  # 3 blocks of each
        failed = 0
        for number in range(20):
            model = model_of(state)
            breaking(-1, late, None)
            handle = loratool.apply(model, A, undo=kind) if verb != "first" else None
            before = bits(model)
            breaking(number, late, MemoryError("no more") if number % 2 else Broken())
            try:
                if handle is None:
                    handle = loratool.apply(model, A, undo=kind)
                elif verb == "apply":
                    loratool.apply(model, B, weight=0.5)
                elif verb == "swap":
                    handle.swap(B)
                else:
                    handle.remove()
                break
            except (MemoryError, Broken):
                failed += 1
                assert bits(model) == before
                assert handle is None or handle.active
                if handle is not None:
                    handle.remove()
                    assert bits(model) == original
        assert failed >= 6


def test_what_also_stops_the_way_back_is_put_right_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha"))
    model, original = model_of(state), parameter.Parameter._write
    monkeypatch.setattr(state_of, "WORKERS", 1)  # two could by chance put all of it right on the way back
    with small_blocks(256):
        handle = loratool.apply(model, A)
    before = bits(model)
    turn = count()

    def write(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if next(turn) >= 1:
            raise MemoryError

    with small_blocks(256):
        monkeypatch.setattr(parameter.Parameter, "_write", write)
        with pytest.raises(MemoryError):
            loratool.apply(model, B)
        assert bits(model) != before
        monkeypatch.setattr(parameter.Parameter, "_write", original)
        loratool.apply(model, B).remove()
        assert bits(model) == before
        handle.remove()
    assert bits(model) == bits_of(state)


def test_an_interrupt_in_the_main_thread_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state, A, _ = pair(torch.bfloat16, ("lora", "loha", "lokr"))
    model, original, turn = model_of(state), parameter.Parameter._write, count()
    before = bits(model)

    def write(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if next(turn) == 2:
            _thread.interrupt_main()

    monkeypatch.setattr(parameter.Parameter, "_write", write)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with small_blocks(64), pytest.raises(KeyboardInterrupt):
            loratool.apply(model, A)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert next(turn) > 3
    assert bits(model) == before


def test_a_result_that_is_not_finite_changes_nothing() -> None:
    state = {f"{n}.weight": torch.full(SHAPE, 6e4, dtype=torch.float16) for n in "abc"}
    big = Add(TensorRef.of(torch.full(SHAPE, 1e4)), Scaling())
    small = Add(TensorRef.of(torch.ones(SHAPE)), Scaling())
    adapter = Adapter(tuple(Targeted(Target(f"{n}.weight", SHAPE), big if n == "c" else small) for n in "abc"))
    model = model_of(state)
    with pytest.raises(Mismatch) as refused:
        loratool.apply(model, adapter)
    assert refused.value.code == "E-NONFINITE"
    assert bits(model) == bits_of(state)


# --- what does not fit -----------------------------------------------------------------------------------------------


def refusal(model: nn.Module, adapter: Adapter | Path, **options: Any) -> list[loratool.Problem]:
    """Why an adapter is refused; the model stays as it is."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(LoratoolError) as refused:
        loratool.apply(model, adapter, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    return list(refused.value.problems)


def test_missing_and_wrong_modules_are_all_told_as_a_merge_tells_them(tmp_path: Path) -> None:
    state = {"model.layers.0.q_proj.weight": torch.ones(SHAPE), "model.layers.0.k_proj.weight": torch.ones(4, 4)}
    names = ("model.layers.0.k_proj.weight", "model.layers.0.q_prjo.weight")
    adapter = Adapter(tuple(one("lora", SHAPE, name=name).updates[0] for name in names))
    with pytest.raises(Mismatch) as refused:
        loratool.merge(save_sharded(state, tmp_path / "base"), adapter, tmp_path / "out")
    found = refusal(model_of(state), adapter)
    assert found == list(refused.value.problems)
    assert [problem.code for problem in found] == ["E-SHAPE", "E-TARGET"]
    assert "model.layers.0.q_proj.weight" in found[1].hint


def quantised(value: Tensor) -> nn.Parameter:
    """Four bits a number, as bitsandbytes has them: packed, with an attribute that says how."""
    packed = nn.Parameter(torch.zeros(value.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = object()  # type: ignore[attr-defined]
    return packed


def subclassed(value: Tensor) -> nn.Parameter:
    from torch.testing._internal.two_tensor import TwoTensor

    return nn.Parameter(TwoTensor(value, value.clone()))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "code", "what"),
    [
        (lambda v: nn.Parameter(v.to("meta")), "E-UNSUPPORTED", "has no numbers yet"),
        (lambda v: nn.parameter.UninitializedParameter(), "E-UNSUPPORTED", "has no numbers yet"),
        (quantised, "E-QUANTISED", "is quantised (Parameter, stored as U8)"),
        (lambda v: nn.Parameter(v.to(torch.float8_e4m3fn)), "E-QUANTISED", "stored as F8_E4M3"),
        (lambda v: nn.Parameter(torch.zeros(SHAPE, dtype=torch.complex64)), "E-QUANTISED", "stored as C64"),
        (lambda v: nn.Parameter(torch.ones(1, 16).expand(SHAPE)), "E-UNSUPPORTED", "is expanded"),
        (subclassed, "E-UNSUPPORTED", "is a TwoTensor"),
    ],
)
def test_parameters_that_can_not_be_changed_are_named(
    make: Callable[[Tensor], nn.Parameter], code: str, what: str
) -> None:
    model = model_of({"good.weight": torch.ones(SHAPE)})
    bad = nn.Module()
    bad.weight = make(torch.ones(SHAPE))
    model.add_module("bad", bad)
    loratool.apply(model, one("lora", SHAPE, name="good.weight")).remove()  # what is no target does not matter
    adapter = Adapter(tuple(one("lora", SHAPE, name=f"{name}.weight").updates[0] for name in ("bad", "good")))
    with pytest.raises(Mismatch) as refused:
        loratool.apply(model, adapter)
    assert [(problem.code, what in problem.message) for problem in refused.value.problems] == [(code, True)]
    assert bool((model.get_parameter("good.weight") == 1).all())


def test_parameters_that_overlap_are_refused() -> None:
    memory = torch.ones(30, 16)
    model = model_of({})
    for name, start in (("a", 0), ("b", 6)):
        model.add_module(name, nn.Module())
        model.get_submodule(name).weight = nn.Parameter(memory[start : start + 24])
    (problem,) = refusal(model, one("lora", SHAPE, name="a.weight"))
    assert (problem.code, "shares a part of its memory with b.weight" in problem.message) == ("E-UNSUPPORTED", True)


def test_what_would_add_a_tensor_names_the_way_that_is_there() -> None:
    adapter = Adapter((Targeted(Target("new.weight", (2, 2)), Replace(TensorRef.of(torch.ones(2, 2)))),))
    (problem,) = refusal(model_of({"old.weight": torch.ones(2, 2)}), adapter)
    assert (problem.code, problem.hint) == ("E-TARGET", "merge it into the checkpoint with --allow-new, and load that")


def test_a_model_with_adapters_in_it_is_refused() -> None:
    state = {"q.base_layer.weight": torch.ones(SHAPE), "q.lora_A.default.weight": torch.ones(2, 16),
             "q.lora_B.default.weight": torch.ones(24, 2)}  # fmt: skip
    (problem,) = refusal(model_of(state), one("lora", SHAPE, name="q.weight"))
    assert problem.code == "E-WRAPPED"


def pinned(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    known = {
        item.target.name: TensorIdentity(ref.digest(), ref.dtype, ref.shape)
        for item in adapter.updates
        for ref in [TensorRef.of(state[item.target.name])]
    }
    return replace(adapter, base=BaseIdentity("base", known))


@pytest.mark.parametrize("undo", ["compressed", "copy"])
def test_an_adapter_is_for_its_base_also_while_another_is_active(undo: str) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha"))
    model, other = model_of(state), {name: value + 1 for name, value in state.items()}
    problems = refusal(model, pinned(A, other))
    assert {(problem.code, problem.rule) for problem in problems} == {("E-BASE-MISMATCH", "R-041")}
    with small_blocks(64), loratool.apply(model, pinned(A, state), undo=undo), loratool.apply(model, pinned(B, state)):
        assert refusal(model, pinned(A, other))
        loratool.apply(model, pinned(A, other), check_base=False).remove()
    assert bits(model) == bits_of(state)


@pytest.mark.parametrize("undo", ["compressed", "copy"])
def test_a_parameter_that_something_else_changed_is_not_given_back(undo: str) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha"))
    model = model_of(state)
    handle = loratool.apply(model, A, undo=undo)
    with torch.no_grad():
        model.get_parameter("lora.weight").add_(1)
    changed = bits(model)
    for action in (handle.remove, lambda: handle.swap(B), lambda: loratool.apply(model, B)):
        with pytest.raises(Mismatch) as refused:
            action()
        assert [(p.code, p.where) for p in refused.value.problems] == [("E-CHANGED", "lora.weight")]
    assert bits(model) == changed
    handle.forget()
    assert not handle.active
    with loratool.apply(model, B):
        assert bits(model) != changed
    assert bits(model) == changed


def test_a_change_that_torch_does_not_count_is_not_given_back_as_nonsense() -> None:
    state, A, _ = pair(torch.float32, ("lora",))
    model = model_of(state)
    handle = loratool.apply(model, A)
    model.half()
    with pytest.raises(Mismatch) as refused:
        handle.remove()
    assert refused.value.code == "E-CHANGED"


def test_memory_that_a_model_has_left_is_nobodys() -> None:
    state, A, _ = pair(torch.float32, ("lora",))
    first, second = model_of(state), model_of(state)
    kept = loratool.apply(first, A)
    for name, parameter in second.named_parameters():
        # As if `first` had been moved to a GPU, and its old memory given to `second`.
        theirs = first.get_parameter(name)
        parameter.data, theirs.data = theirs.data, theirs.data.clone()
    with loratool.apply(second, A):
        pass
    assert kept.active


def test_an_inactive_handle_has_nothing_to_swap() -> None:
    state, A, B = pair(torch.float32, ("lora",))
    model = model_of(state)
    handle = loratool.apply(model, A)
    handle.remove()
    with pytest.raises(loratool.ChoiceNeeded) as refused:
        handle.swap(B)
    assert refused.value.code == "E-OPTION"
    assert bits(model) == bits_of(state)


def test_a_base_to_go_back_to_must_be_the_model_s(tmp_path: Path) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "add"))
    base, model = save_sharded(state, tmp_path / "base"), model_of(state)
    others = {
        "E-BASE-MISMATCH": {**state, "lora.weight": state["lora.weight"] * 2},
        "E-TARGET": {"add.weight": state["add.weight"]},
    }
    for code, other in others.items():
        (problem,) = refusal(model, A, undo=save_sharded(other, tmp_path / code))
        assert (problem.code, "lora.weight" in problem.message) == (code, True)
    wide = save_sharded({name: value.float() for name, value in state.items()}, tmp_path / "wide")
    assert {problem.code for problem in refusal(model, A, undo=str(wide))} == {"E-BASE-MISMATCH"}
    assert refusal(model, A, undo=tmp_path / "none")[0].code == "E-MISSING"
    handle = loratool.apply(model, A, undo=base)
    save_file({name: value * 3 for name, value in state.items()}, base / "model.safetensors")
    now = bits(model)
    with pytest.raises(LoratoolError) as refused:
        handle.swap(B)
    assert refused.value.code in ("E-CHANGED", "E-BASE-MISMATCH")
    assert bits(model) == now


# --- models ----------------------------------------------------------------------------------------------------------


def test_tied_parameters_are_one() -> None:
    model = model_of({"embed_tokens.weight": torch.ones(SHAPE), "lm_head.weight": torch.ones(SHAPE)})
    model.lm_head.weight = model.embed_tokens.weight  # type: ignore[union-attr,assignment]
    before = bits(model)
    update = one("lora", SHAPE, name="embed_tokens.weight")
    with loratool.apply(model, update) as handle:
        assert handle.report.changed == 1
        once = raw_bytes(model.get_parameter("lm_head.weight"))
        with loratool.apply(model_of({"embed_tokens.weight": torch.ones(SHAPE)}), update):
            assert model.get_parameter("lm_head.weight") is model.get_parameter("embed_tokens.weight")
    head = one("lora", SHAPE, name="lm_head.weight")
    with loratool.apply(model, Adapter((*update.updates, *head.updates))) as handle:
        assert raw_bytes(model.get_parameter("lm_head.weight")) == once  # one update under two names
    other = one("lora", SHAPE, name="lm_head.weight", seed=5)
    assert refusal(model, Adapter((*update.updates, *other.updates)))[0].code == "E-TIED"
    assert bits(model) == before


def test_wrapped_models_are_the_ones_inside() -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha"))
    model = model_of(state)
    compiled = torch.compile(model, backend="eager")
    inner = nn.ModuleDict({"_checkpoint_wrapped_module": model})
    handle = loratool.apply(compiled, A)  # type: ignore[arg-type]
    second = loratool.apply(model, B)
    handle.remove()
    with pytest.raises(Mismatch) as refused:  # another root that has the same parameters
        loratool.apply(inner, A)
    assert refused.value.code == "E-OVERLAP"
    second.remove()
    assert bits(model) == bits_of(state)
    with loratool.apply(inner, A):
        assert bits(model) != bits_of(state)
    assert bits(model) == bits_of(state)


def test_strides_and_modes_are_kept() -> None:
    conv = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    shapes = {"turned.weight": torch.randn(16, 24).T, "conv.weight": conv, "cut.weight": torch.randn(24, 40)[:, 3:19]}
    adapter = Adapter(tuple(one("lora", tuple(v.shape), name=n).updates[0] for n, v in shapes.items()))
    model = model_of({})
    for name, value in shapes.items():
        module = nn.Module()
        module.weight = nn.Parameter(value)
        model.add_module(name.split(".")[0], module)
    with torch.inference_mode():
        made = nn.Module()
        made.weight = nn.Parameter(torch.ones(SHAPE))
        model.add_module("made", made)
    adapter = Adapter((*adapter.updates, *one("lora", SHAPE, name="made.weight").updates))
    before, plain = bits(model), model_of({n: p.detach().contiguous() for n, p in model.named_parameters()})
    with small_blocks(64):
        for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with mode, loratool.apply(model, adapter), loratool.apply(plain, adapter):
                assert bits(model) == bits(plain) != before
                assert not model.get_parameter("turned.weight").is_contiguous()
            assert bits(model) == before


def test_a_backward_pass_across_a_change_is_an_error_of_torch_s() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 1))
    adapter = Adapter(one("lora", (1, 24), name="1.weight").updates)
    loss = model(torch.ones(2, 16)).sum()
    with loratool.apply(model, adapter):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_moves_with_what_was_applied_to_it() -> None:
    state, A, _ = pair(torch.bfloat16, ("lora", "dora1-lora"))
    model = model_of(state)
    handle = loratool.apply(model, A)
    for p in model.parameters():
        p.data = p.data.clone()  # as `.to(device)` does
    handle.remove()
    assert bits(model) == bits_of(state)


def test_nothing_is_left_on_the_model_or_of_it(tmp_path: Path) -> None:
    state, A, _ = pair(torch.bfloat16, ("lora",))
    loratool.save(A, tmp_path / "a.safetensors")
    model = model_of(state)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = loratool.apply(model, tmp_path / "a.safetensors")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    (tmp_path / "a.safetensors").unlink()  # its factors are in memory
    handle.remove()
    assert bits(model) == bits_of(state)
    loratool.apply(model, A)
    gone = weakref.ref(model.get_parameter("lora.weight"))
    gc.collect()  # what earlier tests left
    states = len(live._states)
    del model, handle
    gc.collect()
    assert gone() is None
    assert len(live._states) == states - 1


def test_a_second_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha"))
    model, original = model_of(state), parameter.Parameter._write
    reached, go_on, done = threading.Event(), threading.Event(), threading.Event()
    turn = count()

    def write(self: Any, *arguments: Any) -> None:
        if next(turn) == 0:
            reached.set()
            assert go_on.wait(60)
        original(self, *arguments)

    monkeypatch.setattr(parameter.Parameter, "_write", write)
    handles: list[Handle] = []

    def run(adapter: Adapter, after: threading.Event | None = None) -> None:
        handles.append(loratool.apply(model, adapter))
        if after is not None:
            after.set()

    first = threading.Thread(target=run, args=(A,))
    first.start()
    assert reached.wait(60)
    second = threading.Thread(target=run, args=(B, done))
    second.start()
    assert not done.wait(1)
    go_on.set()
    first.join()
    second.join()
    for handle in handles:
        handle.remove()
    assert bits(model) == bits_of(state)


def test_threads_that_swap_leave_no_trace() -> None:
    state, A, B = pair(torch.bfloat16, ("lora", "loha", "lokr"))
    model = model_of(state)
    errors: list[BaseException] = []

    def run(mine: Adapter, other: Adapter) -> None:
        try:
            for _ in range(5):
                with loratool.apply(model, mine) as handle:
                    handle.swap(other)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in ((A, B), (B, A), (B, B))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bits(model) == bits_of(state)


@pytest.mark.parametrize("undo", ["compressed", "copy"])
def test_another_device_gives_the_same_bits(undo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The way of blocks to a device and back, forced on the CPU as in test_rows."""
    from test_rows import forced

    state, A, B = pair(torch.bfloat16)
    base, model = save_sharded(state, tmp_path / "base"), model_of(state)
    with small_blocks(64):
        forced(monkeypatch, [])
        monkeypatch.setattr(parameter.Spot, "device", "cpu:0")
        handle = loratool.apply(model, A, undo=undo)
        assert bits(model) == merged(base, [A], tmp_path)
        handle.swap(B)
        assert bits(model) == merged(base, [B], tmp_path)
        handle.remove()
    assert bits(model) == bits_of(state)
