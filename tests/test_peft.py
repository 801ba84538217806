"""PEFT: merging its folders and its wrapped checkpoints gives what PEFT's own merge gives."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    HIDDEN,
    Net,
    State,
    assert_float32_close,
    assert_rounded,
    assert_same_bits,
    bert,
    changed,
    edit_json,
    fill,
    gpt2,
    llama,
    own,
    read,
    save_base,
)
from peft_cases import CASES, Built, Case, build, merge_with_peft, row
from safetensors.torch import load_file, save_file
from torch import nn

import loratool

pytestmark = pytest.mark.heavy

FORMS = ["folder", "native", "pth", "safetensors"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Built]:
    """Every row is built once: PEFT is the slow part."""
    done: dict[str, Built] = {}

    def get(case: Case) -> Built:
        if case.name not in done:
            done[case.name] = build(case, tmp_path_factory.mktemp(case.name))
        return done[case.name]

    return get


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about most of what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def save_wrapped(state: Mapping[str, Any], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(own(state), file)
    else:
        torch.save(dict(state), file)
    return file


def extract(built: Built, file: Path, folder: Path, **options: Any) -> Path:
    out = folder / "extracted.lora.safetensors"
    options.setdefault("base_out", folder / "base-out")
    loratool.extract(file, out, config=built.config, **options)
    assert loratool.validate(out) == []
    return out


def adapter_in(form: str, built: Built, folder: Path) -> Path:
    if form == "folder":
        return built.adapter
    if form == "native":
        out = folder / "adapter.lora.safetensors"
        loratool.save(loratool.load(built.adapter, base=built.base), out)
        assert loratool.validate(out) == []
        return out
    return extract(built, save_wrapped(built.wrapped, folder / f"wrapped.{form}"), folder)


def check_merged(out: Path, built: Built) -> None:
    """Every tensor is PEFT's, rounded once; what PEFT leaves alone keeps its bits."""
    got, base = read(out), built.base_state
    assert sorted(got) == sorted(base)
    touched = changed(base, built.exact)
    assert len(touched) == built.case.changed
    for name, value in got.items():
        assert value.dtype == base[name].dtype, name
        if name not in touched:
            assert torch.equal(value, base[name]), f"{name} should not have changed"
            continue
        assert_rounded(value, built.exact[name], name=name)
        if value.dtype == torch.float32 and built.case.adapter_dtype is None:
            assert_float32_close(value, built.merged[name], name=name)


# --- one row per feature ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merges_as_peft_does(case: Case, form: str, built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(case)
    adapter = adapter_in(form, made, tmp_path)
    loratool.merge(made.base, [adapter], tmp_path / "out")
    check_merged(tmp_path / "out", made)

    loratool.unmerge(tmp_path / "out", [adapter], tmp_path / "back", base=made.base)
    assert_same_bits(read(tmp_path / "back"), made.base_state)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_base_comes_out_of_a_wrapped_checkpoint(
    case: Case, form: str, built: Callable[[Case], Built], tmp_path: Path
) -> None:
    made = built(case)
    extract(made, save_wrapped(made.wrapped, tmp_path / f"wrapped.{form}"), tmp_path)
    got, base = read(tmp_path / "base-out"), made.base_state
    # a tied model holds its head twice in memory and once on disk
    extra = set(got) - set(base)
    assert all(name.endswith("lm_head.weight") for name in extra), extra
    same = {name: value for name, value in got.items() if name not in extra}
    assert_same_bits(same, base, skip=made.trained_in_place)


@pytest.mark.parametrize("name", ["llama", "gpt2-dora", "bert-classifier", "mixtral", "net-dora"])
def test_reads_the_pickle_that_older_peft_wrote(name: str, built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(named(name))
    loratool.merge(made.base, [peft_cases.as_bin(made, tmp_path / "bin")], tmp_path / "out")
    check_merged(tmp_path / "out", made)


def test_reads_keys_that_kept_the_adapter_name(built: Callable[[Case], Built], tmp_path: Path) -> None:
    """Hand-dumped files carry `lora_A.default.weight` where PEFT writes `lora_A.weight`."""
    made = built(named("llama"))
    folder = tmp_path / "dumped"
    folder.mkdir()
    shutil.copy(made.config, folder)
    state = {name: value for name, value in made.wrapped.items() if ".lora_" in name}
    save_file(state, folder / "adapter_model.safetensors")
    loratool.merge(made.base, [folder], tmp_path / "out")
    check_merged(tmp_path / "out", made)


# --- wrapped checkpoints in wrappings of their own ----------------------------------------------


def _bare(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict())


WRAPPINGS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "state_dict": lambda m: {"state_dict": _bare(m), "epoch": 3},
    "model_state_dict": lambda m: {
        "model_state_dict": _bare(m),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
    },
    "DataParallel": lambda m: _bare(nn.DataParallel(m)),
    "compile": lambda m: _bare(torch.compile(m)),
    "compile-in-DataParallel": lambda m: {"state_dict": _bare(nn.DataParallel(torch.compile(m)))},
    "compile-of-layers": lambda m: _bare(_with_compiled_layers(m)),
    "average": lambda m: _bare(torch.optim.swa_utils.AveragedModel(m)),
}


def _with_compiled_layers(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name in ("fc", "head"):
        module = model.get_submodule(f"base_model.model.{name}")
        model.set_submodule(f"base_model.model.{name}", torch.compile(module))
    return model


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_around_a_wrapped_model_are_taken_off(wrapping: str, tmp_path: Path) -> None:
    case = row("wrappings", Net, 6, target_modules=["fc", "emb"], modules_to_save=["head"])
    model, made = wrapped_net(case, tmp_path)
    with quiet():
        state = WRAPPINGS[wrapping](model)
    adapter = extract(made, save_wrapped(state, tmp_path / "wrapped.pth"), tmp_path)
    assert_same_bits(read(tmp_path / "base-out"), made.base_state)
    loratool.merge(made.base, [adapter], tmp_path / "out")
    check_merged(tmp_path / "out", made)


def wrapped_net(case: Case, folder: Path) -> tuple[nn.Module, Built]:
    """A wrapped model that is still alive, with its truth beside it."""
    peft = peft_cases.peft()
    torch.manual_seed(3)
    net = case.model()
    base = save_base(net, folder / "base", names="memory")
    with quiet():
        model = peft.get_peft_model(net, peft.LoraConfig(**case.config))
        fill(model, seed=8)
        model.save_pretrained(folder / "adapter")
    made = Built(
        case=case,
        base=base,
        adapter=folder / "adapter",
        wrapped=own(model.state_dict()),
        exact=merge_with_peft(copy.deepcopy(model).double()),
        merged=merge_with_peft(copy.deepcopy(model)),
        trained_in_place=frozenset(),
    )
    return model, made


# --- several adapters in one model --------------------------------------------------------------


@pytest.fixture
def two_adapters(tmp_path: Path) -> tuple[nn.Module, Path]:
    peft = peft_cases.peft()
    torch.manual_seed(4)
    net = Net()
    base = save_base(net, tmp_path / "base", names="memory")
    first = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc", "emb"])
    second = peft.LoraConfig(r=5, lora_alpha=8, target_modules=["fc", "fc2"], use_rslora=True)
    model = peft.get_peft_model(net, first)
    model.add_adapter("other", second)
    for name in ("default", "other"):
        model.set_adapter(name)
        fill(model, seed=len(name))
    return model, base


def merged_by_peft(model: nn.Module, adapters: list[str]) -> State:
    return merge_with_peft(copy.deepcopy(model).double(), adapters)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_one_of_two_adapters(two_adapters: tuple[nn.Module, Path], name: str, suffix: str, tmp_path: Path) -> None:
    model, base = two_adapters
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / ("" if name == "default" else name)
    file = save_wrapped(model.state_dict(), tmp_path / f"wrapped.{suffix}")
    out = tmp_path / "chosen.lora.safetensors"
    config = folder / "adapter_config.json"
    loratool.extract(file, out, config=config, adapter=name, base_out=tmp_path / "base-out")
    assert_same_bits(read(tmp_path / "base-out"), read(base))
    want = merged_by_peft(model, [name])
    for source, target in ((out, tmp_path / "out"), (folder, tmp_path / "out2")):
        loratool.merge(base, [source], target)
        for tensor, value in read(target).items():
            assert_rounded(value, want[tensor], name=tensor)


def test_which_of_two_adapters_is_never_guessed(two_adapters: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = two_adapters
    model.save_pretrained(tmp_path / "saved")
    file = save_wrapped(model.state_dict(), tmp_path / "wrapped.pth")
    config = tmp_path / "saved" / "adapter_config.json"
    out = tmp_path / "out.lora.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(file, out, config=config)
    assert "default" in str(caught.value)
    assert "other" in str(caught.value)
    assert "adapter" in caught.value.hint
    with pytest.raises(loratool.LoratoolError, match="default"):
        loratool.extract(file, out, config=config, adapter="nobody")
    assert not out.exists()


def test_two_folders_in_one_merge(two_adapters: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, base = two_adapters
    model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    loratool.merge(base, [saved, saved / "other"], tmp_path / "out")
    want = merged_by_peft(model, ["default", "other"])
    got = read(tmp_path / "out")
    assert changed(read(base), got) == {"fc.weight", "fc2.weight", "emb.weight"}
    for name, value in got.items():
        assert_rounded(value, want[name], name=name)


def test_a_folder_without_an_adapter_at_its_top(built: Callable[[Case], Built], tmp_path: Path) -> None:
    """PEFT saves an adapter that has a name in a subfolder; above it lies only a README."""
    made = built(named("net-adapter-name"))
    top = made.adapter.parent
    assert not (top / "adapter_config.json").exists()
    if error := refusal(lambda: loratool.merge(made.base, [top], tmp_path / "out")):
        assert "my_adapter" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        check_merged(tmp_path / "out", made)


# --- what the files do not say is asked for -----------------------------------------------------


def test_alpha_without_a_config_is_asked_for(built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(named("llama"))
    file = save_wrapped(made.wrapped, tmp_path / "wrapped.pth")
    out = tmp_path / "out.lora.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(file, out)
    assert caught.value.code == "E-ALPHA"
    assert "alpha" in caught.value.hint
    assert "down_proj" in str(caught.value)
    assert not out.exists()

    loratool.extract(file, out, alpha=6, scaling="alpha/rank")
    loratool.merge(made.base, [out], tmp_path / "out")
    check_merged(tmp_path / "out", made)


def test_token_rows_without_their_indices_are_refused(built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(named("llama-tokens"))
    file = save_wrapped(made.wrapped, tmp_path / "wrapped.pth")
    with pytest.raises(loratool.LoratoolError, match="embed_tokens"):
        loratool.extract(file, tmp_path / "o.lora.safetensors", alpha=6, scaling="alpha/rank")


@pytest.mark.parametrize("field", ["r", "lora_alpha", "use_rslora"])
def test_config_fields_left_out_mean_pefts_defaults(field: str, built: Callable[[Case], Built], tmp_path: Path) -> None:
    """r 8 (the tensors know better), lora_alpha 8, use_rslora false."""
    made = built(named("llama"))
    folder = tmp_path / "adapter"
    shutil.copytree(made.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[field]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loratool.merge(made.base, [folder], tmp_path / "out")
    got, base = read(tmp_path / "out"), made.base_state
    factor = 8 / 6 if field == "lora_alpha" else 1.0
    for name in changed(base, made.exact):
        want = base[name].double() + factor * (made.exact[name] - base[name].double())
        assert_float32_close(got[name], want.float(), name=name)


# --- what must be refused -----------------------------------------------------------------------

CHANGES_THE_BASE = ["pissa", "pissa_niter_4", "olora", "lora_ga", "corda", "loftq"]


@pytest.mark.parametrize("init", CHANGES_THE_BASE)
def test_initialisations_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    """The adapter is relative to a base that PEFT changed: merged into the real one it is noise."""
    peft = peft_cases.peft()
    torch.manual_seed(5)
    net = Net()
    base = save_base(net, tmp_path / "base", names="memory")
    runnable = init in ("pissa", "pissa_niter_4", "olora")
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=init if runnable else True)
    model = peft.get_peft_model(net, config)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    if runnable:
        weight = "base_model.model.fc.base_layer.weight"
        assert not torch.equal(model.state_dict()[weight], read(base)["fc.weight"])
    edit_json(adapter / "adapter_config.json", init_lora_weights=init)
    refuses(lambda: loratool.merge(base, [adapter], tmp_path / "out"), init.split("_niter")[0])
    refuses(lambda: loratool.load(adapter), init.split("_niter")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_out_of_a_changed_base_never_meets_the_real_one(init: str, tmp_path: Path) -> None:
    """In a wrapped checkpoint base and adapter fit: refusing is right, binding them is too."""
    peft = peft_cases.peft()
    torch.manual_seed(5)
    net = Net()
    base = save_base(net, tmp_path / "base", names="memory")
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=init)
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path / "adapter")
    file = save_wrapped(model.state_dict(), tmp_path / "wrapped.pth")
    native = tmp_path / "native.lora.safetensors"

    def extract_and_merge() -> None:
        loratool.extract(file, native, config=tmp_path / "adapter" / "adapter_config.json")
        loratool.merge(base, [native], tmp_path / "out")

    assert refusal(extract_and_merge)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_merged(init: str, tmp_path: Path) -> None:
    case = row("init", Net, 1, target_modules=["fc"], init_lora_weights=init)
    _, made = wrapped_net(case, tmp_path)
    loratool.merge(made.base, [made.adapter], tmp_path / "out")
    check_merged(tmp_path / "out", made)


def test_a_pissa_adapter_that_peft_converted_is_merged(tmp_path: Path) -> None:
    """Its `path_initial_model_for_weight_conversion` makes it relative to the real base again."""
    peft = peft_cases.peft()
    torch.manual_seed(6)
    net = Net()
    base = save_base(net, tmp_path / "base", names="memory")
    config = peft.LoraConfig(r=2, target_modules=["fc", "fc2"], init_lora_weights="pissa")
    model = peft.get_peft_model(net, config)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    fill(model, seed=9)
    config.init_lora_weights = "pissa"
    with quiet():
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    want = merge_with_peft(copy.deepcopy(model).double())
    got = read(tmp_path / "out")
    for name in ("fc.weight", "fc2.weight"):
        distance = (got[name].double() - want[name]).abs().max().item()
        assert distance < 1e-5, name  # the residual went through a float32 decomposition


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
    ],
)
def test_features_that_change_what_the_tensors_mean_are_refused(
    field: str, value: Any, built: Callable[[Case], Built], tmp_path: Path
) -> None:
    made = built(named("llama"))
    folder = tmp_path / "adapter"
    shutil.copytree(made.adapter, folder)
    edit_json(folder / "adapter_config.json", **{field: value})
    refuses(lambda: loratool.merge(made.base, [folder], tmp_path / "out"), field)
    file = save_wrapped(made.wrapped, tmp_path / "wrapped.pth")
    out = tmp_path / "o.lora.safetensors"
    config = folder / "adapter_config.json"
    refuses(lambda: loratool.extract(file, out, config=config), field)
    assert not (tmp_path / "out").exists()
    assert not out.exists()


@pytest.mark.parametrize("kind", ["VeraConfig", "OFTConfig"])
def test_other_methods_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    peft = peft_cases.peft()
    options: dict[str, Any] = {
        "VeraConfig": {"r": 2},
        "OFTConfig": {"oft_block_size": 4, "r": 0},
    }[kind]
    model = llama()
    base = save_base(model, tmp_path / "base")
    config = getattr(peft, kind)(target_modules=["q_proj"], **options)
    with quiet():
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    method = kind.removesuffix("Config").upper()
    refuses(lambda: loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out"), method)
    assert not (tmp_path / "out").exists()


def refusal(act: Callable[[], object]) -> loratool.LoratoolError | None:
    """The error of the library, if there is one: for what may be refused, but not done wrongly."""
    try:
        act()
    except loratool.LoratoolError as error:
        return error
    return None


def refuses(act: Callable[[], object], names: str) -> None:
    with pytest.raises(loratool.LoratoolError) as caught:
        act()
    assert caught.value.code == "E-UNSUPPORTED"
    assert names.lower() in str(caught.value).lower()
    assert caught.value.hint


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    peft = peft_cases.peft()
    net = Net()
    base = save_base(net, tmp_path / "base", names="memory")
    config = peft.LoraConfig(r=2, target_modules=["grouped"])
    with quiet():
        model = peft.get_peft_model(net, config)
    fill(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(loratool.LoratoolError, match="grouped"):
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_bias_on_a_layer_without_bias_is_refused(tmp_path: Path) -> None:
    peft = peft_cases.peft()
    model = llama()
    base = save_base(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with quiet():
        wrapped = peft.get_peft_model(model, config)
        fill(wrapped, seed=1)
        wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(loratool.LoratoolError, match="bias"):
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def apart(state: State) -> State:
    """Mixtral's tensors as they are on disk: experts one by one, gate and up apart."""
    found: State = {}
    for name, value in state.items():
        block, _, last = name.rpartition(".mlp.")
        module = f"{block}.block_sparse_moe"
        if last == "gate.weight":
            found[f"{module}.{last}"] = value
        elif last not in ("experts.gate_up_proj", "experts.down_proj"):
            found[name] = value
        else:
            names = ("w1", "w3") if "gate" in last else ("w2",)
            for expert, matrix in enumerate(value):
                for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                    found[f"{module}.experts.{expert}.{part}.weight"] = rows
    return found


@pytest.mark.parametrize("form", FORMS)
def test_experts_on_a_base_with_other_names_are_never_dropped(form: str, tmp_path: Path) -> None:
    """transformers 5 fuses Mixtral's experts when it loads them; on disk they lie one by one."""
    made = build(named("mixtral"), tmp_path / "mixtral")
    adapter = adapter_in(form, made, tmp_path)
    on_disk = tmp_path / "disk"
    on_disk.mkdir()
    save_file(own(apart(made.base_state)), on_disk / "model.safetensors")
    loratool.merge(on_disk, [adapter], tmp_path / "out")
    got, exact = read(tmp_path / "out"), apart(made.exact)
    assert changed(read(on_disk), got) == changed(read(on_disk), exact)
    for name, value in got.items():
        assert_rounded(value, exact[name], name=name)


# --- tied embeddings ----------------------------------------------------------------------------


def tied(folder: Path, **config: Any) -> tuple[nn.Module, Path, Path]:
    peft = peft_cases.peft()
    torch.manual_seed(7)
    model = llama(tied=True)
    base = save_base(model, folder / "base")
    assert "lm_head.weight" not in read(base)
    with quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **config))
        fill(wrapped, seed=2)
        wrapped.save_pretrained(folder / "adapter")
    return wrapped.eval(), base, folder / "adapter"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def loaded(folder: Path) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def test_a_tied_pair_trained_as_one_is_merged_once(tmp_path: Path) -> None:
    """With `ensure_weight_tying` both ends hold the same factors. PEFT's merge adds them twice; its
    forward, which is what was trained, adds them once.
    """
    wrapped, base, adapter = tied(tmp_path, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    want = logits(wrapped)
    loratool.merge(base, [adapter], tmp_path / "out")
    assert torch.allclose(logits(loaded(tmp_path / "out")), want, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora-head", "lora-both", "saved-head", "saved-embedding", "saved-both"],
)
@pytest.mark.parametrize("allow_new", [False, True])
def test_a_change_to_one_end_of_a_tie_is_kept_or_refused(
    config: dict[str, Any], allow_new: bool, tmp_path: Path
) -> None:
    """One shared tensor can not hold two values: the result gets both, or there is no result."""
    wrapped, base, adapter = tied(tmp_path, **config)
    want = logits(wrapped)
    if error := refusal(lambda: loratool.merge(base, [adapter], tmp_path / "out", allow_new=allow_new)):
        assert "tie" in str(error) or "lm_head" in str(error)
        assert error.hint
        assert not (tmp_path / "out").exists()
    else:
        assert torch.allclose(logits(loaded(tmp_path / "out")), want, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["embedding", "head"],
)
def test_a_tied_pair_saved_as_one_stays_tied(config: dict[str, Any], tmp_path: Path) -> None:
    wrapped, base, adapter = tied(tmp_path, ensure_weight_tying=True, **config)
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    saved = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(*(saved[f"base_model.model.{name}"] for name in ends))
    want = logits(wrapped)
    loratool.merge(base, [adapter], tmp_path / "out")
    assert torch.allclose(logits(loaded(tmp_path / "out")), want, atol=1e-5)


# --- a vocabulary that grew ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [41, 40, 2]},
    ],
    ids=["saved", "lora", "tokens"],
)
@pytest.mark.parametrize("form", ["folder", "native"])
def test_a_grown_vocabulary_needs_consent(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    peft = peft_cases.peft()
    import transformers

    torch.manual_seed(8)
    base = save_base(llama(), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with quiet():
        model.resize_token_embeddings(43, mean_resizing=False)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **config))
        fill(wrapped, seed=4)
        wrapped.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    if form == "native":
        adapter = tmp_path / "adapter.lora.safetensors"
        loratool.save(loratool.load(tmp_path / "adapter", base=base), adapter)
        assert loratool.validate(adapter) == []
    with pytest.raises(loratool.LoratoolError, match="embed_tokens") as caught:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "new" in caught.value.hint
    loratool.merge(base, [adapter], tmp_path / "out", allow_new=True)
    want = merge_with_peft(copy.deepcopy(wrapped).double())
    got = read(tmp_path / "out")
    assert got["model.embed_tokens.weight"].shape == (43, HIDDEN)
    for name, value in got.items():
        assert_rounded(value, want[name], name=name)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["plain", "head"])
def test_embeddings_saved_along_are_those_of_the_base(targets: list[str], saved: bool, tmp_path: Path) -> None:
    peft = peft_cases.peft()
    torch.manual_seed(10)
    model = llama()
    base = save_base(model, tmp_path / "base")
    with quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        fill(wrapped, seed=3)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {name for name in state if ".lora_" not in name}
    assert bool(whole) == saved
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    want = merge_with_peft(copy.deepcopy(wrapped).double())
    got = read(tmp_path / "out")
    assert len(changed(read(base), got)) == len(targets)
    for name, value in got.items():
        assert_rounded(value, want[name], name=name)


# --- names that need a prefix -------------------------------------------------------------------


@pytest.mark.parametrize("bare", ["adapter", "base"])
def test_a_bare_encoder_and_a_whole_model_find_each_other(bare: str, tmp_path: Path) -> None:
    """Trained on BertModel, merged into BertFor..., or the other way round: `bert.` on one side."""
    peft = peft_cases.peft()
    torch.manual_seed(12)
    model = bert()
    whole, encoder = save_base(model, tmp_path / "whole"), save_base(model.bert, tmp_path / "bare")
    trained = model.bert if bare == "adapter" else model
    config = peft.LoraConfig(r=2, target_modules=["query", "word_embeddings"])
    with quiet():
        wrapped = peft.get_peft_model(trained, config)
        fill(wrapped, seed=6)
        wrapped.save_pretrained(tmp_path / "adapter")
    want = merge_with_peft(copy.deepcopy(wrapped).double())
    base = whole if bare == "adapter" else encoder
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    got = read(tmp_path / "out")
    assert len(changed(read(base), got)) == 2
    for name, value in got.items():
        other = name.removeprefix("bert.") if bare == "adapter" else f"bert.{name}"
        if other in want:
            assert_rounded(value, want[other], name=name)
        else:
            assert torch.equal(value, read(base)[name])


# --- patterns that overlap ----------------------------------------------------------------------


def test_the_alpha_of_overlapping_patterns_is_that_of_the_file(tmp_path: Path) -> None:
    """Saving sorts the patterns. Which one was meant in training is lost: PEFT itself, reading the
    file again, takes the first, and so does loratool.
    """
    peft = peft_cases.peft()
    torch.manual_seed(13)
    patterns = {"q_proj": 3, "layers.0.self_attn.q_proj": 20}
    model = llama()
    base = save_base(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern=patterns)
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        fill(wrapped, seed=6)
        wrapped.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    want = merge_with_peft(again.double())[name]
    assert not torch.allclose(want, merge_with_peft(wrapped.double())[name])
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert_rounded(read(tmp_path / "out")[name], want, name=name)
    assert any("alpha_pattern" in note for note in report.plan.notes)


# --- any mixture of it all ----------------------------------------------------------------------

MODULES = ["emb", "conv1", "conv2", "point", "conv3", "fc", "fc2", "head.0"]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.sampled_from([1, 3, 16, 0.5])),
        "target_modules": draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 6))),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 30))),
    }
    if "head.0" not in config["target_modules"] and draw(st.booleans()):
        config["modules_to_save"] = ["head"]
    biased = not {"emb", "point"} & set(config["target_modules"])
    config["lora_bias"] = biased and not config["use_dora"] and draw(st.booleans())
    if config["lora_bias"]:
        config["bias"] = "none"
    return config


@pytest.mark.parametrize("form", ["native", "pth"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(config=configs(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_mixture_is_merged_as_peft_does(form: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = row("mixture", Net, 0, names="memory", base_dtype=dtype, **config)
        made = build(case, folder / "made")
        adapter = adapter_in(form, made, folder)
        loratool.merge(made.base, [adapter], folder / "out")
        got, base = read(folder / "out"), made.base_state
        assert sorted(got) == sorted(base)
        for tensor, value in got.items():
            assert value.dtype == base[tensor].dtype
            assert_rounded(value, made.exact[tensor], name=tensor)
        loratool.unmerge(folder / "out", [adapter], folder / "back", base=made.base)
        assert_same_bits(read(folder / "back"), base)


# --- nothing is dropped -------------------------------------------------------------------------


def test_a_tensor_nobody_knows_is_an_error(built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(named("llama"))
    folder = tmp_path / "adapter"
    shutil.copytree(made.adapter, folder)
    state = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    save_file({**state, key: torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(loratool.LoratoolError, match="lora_C"):
        loratool.merge(made.base, [folder], tmp_path / "out")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_is_an_error(half: str, built: Callable[[Case], Built], tmp_path: Path) -> None:
    made = built(named("llama"))
    folder = tmp_path / "adapter"
    shutil.copytree(made.adapter, folder)
    state = load_file(folder / "adapter_model.safetensors")
    del state[f"base_model.model.model.layers.0.self_attn.k_proj.{half}.weight"]
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(loratool.LoratoolError, match="k_proj"):
        loratool.merge(made.base, [folder], tmp_path / "out")


def test_a_target_the_base_lacks_is_an_error(built: Callable[[Case], Built], tmp_path: Path) -> None:
    """Two layers were trained, the base has one."""
    made = built(named("llama"))
    small = save_base(llama(layers=1), tmp_path / "small")
    with pytest.raises(loratool.LoratoolError, match=r"layers\.1\."):
        loratool.merge(small, [made.adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "targets"), [(gpt2, ["attn.c_proj"]), (bert, ["query"])], ids=["in_out", "out_in"])
def test_a_square_factor_pair_is_never_merged_the_wrong_way(
    model: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    """The flag that tells the two apart, turned over: right by other knowledge, or refused."""
    made = build(row("square", model, 0, target_modules=targets), tmp_path / "square")
    config = json.loads(made.config.read_text())
    edit_json(made.config, fan_in_fan_out=not config["fan_in_fan_out"])
    if error := refusal(lambda: loratool.merge(made.base, [made.adapter], tmp_path / "out")):
        assert error.hint
    else:
        for name, value in read(tmp_path / "out").items():
            assert_rounded(value, made.exact[name], name=name)
