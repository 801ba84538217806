"""diffusers loads what is written for it: fused, and in its forward, the pipeline is what a merge makes of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.peers
diffusers = pytest.importorskip("diffusers")

from diffusers_cases import (  # noqa: E402
    FLUX_TARGETS,
    TEXT_TARGETS,
    UNET_TARGETS,
    flux,
    fused,
    load,
    quiet,
    stable_diffusion,
    states,
    trained,
)
from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from strategies import Maker, make_update  # noqa: E402

import loratool  # noqa: E402
from loratool import Adapter, Target, Targeted, TensorRef  # noqa: E402
from loratool.checkpoint import open_checkpoint  # noqa: E402
from loratool.conventions.diffusers_places import TEXT_ENCODERS, text_encoders  # noqa: E402
from loratool.updates import Add, Replace, Scaling  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("pipelines")
        return {"sd": stable_diffusion(folder), "flux": flux(folder)}


# -- random adapters of a pipeline ------------------------------------------------------------------------------------

SCALES = (("alpha/rank", 3.0), ("alpha/sqrt(rank)", 2.0), ("none", 0.3), ("alpha", -0.5))


def shapes(base: Path, component: str, targets: list[str]) -> dict[str, tuple[int, ...]]:
    """The weights of a component's modules that `target_modules` would hit, by name."""
    found = {}
    for name, ref in open_checkpoint(base).tensors.items():
        module = name.removesuffix(".weight")
        if name.startswith(f"{component}.") and module != name and module.endswith(tuple(targets)):
            found[name] = ref.shape
    assert found
    return found


def layers(base: Path, component: str, targets: list[str], form: str = "lora", **options: Any) -> list[Targeted]:
    """An update for each of them, of many ranks, scales and rules."""
    made = []
    for number, (name, shape) in enumerate(shapes(base, component, targets).items()):
        rule, alpha = SCALES[number % 4]
        chosen = {"rank": 1 + number % 3, "rule": rule, "alpha": alpha, **options}
        made.append(Targeted(Target(name, shape), make_update(form, shape, Maker(number), **chosen)))
    return made


def biases(base: Path, component: str, targets: list[str]) -> list[Targeted]:
    """Differences of the layers' biases, of the first half of them; the others get zeros."""
    names = [name.removesuffix("weight") + "bias" for name in shapes(base, component, targets)]
    known = open_checkpoint(base).tensors
    return [
        Targeted(Target(name, known[name].shape), Add(Maker(number)(*known[name].shape), Scaling(scale=0.7)))
        for number, name in enumerate(names[: len(names) // 2])
    ]


def in_parts(items: list[Targeted]) -> Iterator[Targeted]:
    """Each as two: of the upper rows, and of all; convolutions with a core as well."""
    for number, item in enumerate(items):
        shape, make = item.target.shape, Maker(100 + number)
        upper = shape[0] // 2
        yield Targeted(Target(item.target.name, shape, rows=(0, upper)), make_update("lora", (upper, *shape[1:]), make))
        form = "lora-mid" if len(shape) > 2 else "lora"
        yield Targeted(item.target, make_update(form, shape, make, 3, "alpha", 0.4))


def embedding(base: Path, form: str) -> Targeted:
    ((name, shape),) = shapes(base, "text_encoder", ["token_embedding"]).items()
    return Targeted(Target(name, shape, layout="embedding"), make_update(form, shape, Maker(9), 2))


def unet_and_text(base: Path) -> list[Targeted]:
    return layers(base, "unet", UNET_TARGETS) + layers(base, "text_encoder", TEXT_TARGETS)


def dora(base: Path) -> list[Targeted]:
    return layers(base, "unet", UNET_TARGETS, "dora0-lora") + layers(base, "text_encoder", TEXT_TARGETS, "dora0-lora")


def dora_beside_lora(base: Path) -> list[Targeted]:
    return layers(base, "unet", UNET_TARGETS) + layers(base, "text_encoder", TEXT_TARGETS, "dora0-lora")


def with_biases(base: Path) -> list[Targeted]:
    biased = ["conv1", "proj_in", "time_emb_proj"]
    return [
        *layers(base, "unet", biased), *biases(base, "unet", biased),
        *layers(base, "text_encoder", TEXT_TARGETS), *biases(base, "text_encoder", TEXT_TARGETS),
    ]  # fmt: skip


def parts(base: Path) -> list[Targeted]:
    return [*in_parts(unet_and_text(base))]


def embeddings(base: Path) -> list[Targeted]:
    return [embedding(base, "lora"), *layers(base, "text_encoder", ["fc1"])]


def dora_embeddings(base: Path) -> list[Targeted]:
    return [embedding(base, "dora1-lora"), *layers(base, "text_encoder", ["q_proj"], "dora0-lora")]


def no_attention(base: Path) -> list[Targeted]:
    """diffusers sees no generation of names in a text encoder without one of its attention's projections."""
    return layers(base, "unet", ["conv1"]) + layers(base, "text_encoder", ["fc1", "fc2"])


def rslora(base: Path) -> list[Targeted]:
    return layers(base, "unet", UNET_TARGETS, rule="alpha/sqrt(rank)", alpha=3.0)


def flux_and_text(base: Path) -> list[Targeted]:
    return layers(base, "transformer", FLUX_TARGETS) + layers(base, "text_encoder", TEXT_TARGETS)


def one_of_several_ends(base: Path) -> list[Targeted]:
    """`proj_out` is a module of its own, and the end of another one's name."""
    made = layers(base, "transformer", ["proj_out"])
    return [item for item in made if item.target.name == "transformer.proj_out.weight"]


def flux_dora(base: Path) -> list[Targeted]:
    return layers(base, "transformer", FLUX_TARGETS, "dora0-lora")


CASES = [
    *(("sd", make) for make in (unet_and_text, dora, dora_beside_lora, with_biases, parts, embeddings,
                                dora_embeddings, no_attention, rslora)),
    *(("flux", make) for make in (flux_and_text, one_of_several_ends, flux_dora)),
]  # fmt: skip


def assert_fused(base: Path, written: Path, merged: Path) -> None:
    """Every component with the adapter fused is what is merged, and something changed."""
    got, want, before = fused(load(base), written), states(load(merged)), states(load(base))
    changed = 0
    for component, state in want.items():
        for name, value in state.items():
            torch.testing.assert_close(got[component][name], value, rtol=1e-5, atol=2e-5, msg=f"{component}.{name}")
            changed += not torch.equal(before[component][name], got[component][name])
    assert changed


@pytest.mark.parametrize(("pipeline", "make"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("with_base", [True, False], ids=["with base", "without"])
def test_fused_is_merged(
    pipelines: Mapping[str, Path], tmp_path: Path, pipeline: str, make: Any, with_base: bool
) -> None:
    base = pipelines[pipeline]
    adapter = Adapter(tuple(make(base)))
    loratool.convert(adapter, tmp_path / "a", "diffusers", base=base if with_base else None)
    loratool.merge(base, adapter, tmp_path / "merged")
    assert_fused(base, tmp_path / "a", tmp_path / "merged")
    loratool.merge(base, tmp_path / "a", tmp_path / "again")
    again = open_checkpoint(tmp_path / "again").tensors
    for name, ref in open_checkpoint(tmp_path / "merged").tensors.items():
        torch.testing.assert_close(again[name].read(), ref.read(), rtol=1e-5, atol=2e-5, msg=name)


FORWARDS = [("sd", unet_and_text), ("sd", dora), ("sd", parts), ("flux", flux_and_text), ("flux", flux_dora)]


@pytest.mark.parametrize(("pipeline", "make"), FORWARDS, ids=lambda value: getattr(value, "__name__", value))
def test_forward_is_that_of_the_merge(pipelines: Mapping[str, Path], tmp_path: Path, pipeline: str, make: Any) -> None:
    base = pipelines[pipeline]
    adapter = Adapter(tuple(make(base)))
    loratool.convert(adapter, tmp_path / "a", "diffusers", base=base)
    loratool.merge(base, adapter, tmp_path / "merged")
    adapted = load(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.load_lora_weights(tmp_path / "a")
    assert not [str(one.message) for one in caught if "inconsisten" in str(one.message) or "keys" in str(one.message)]
    before, got, want = (outputs(pipe) for pipe in (load(base), adapted, load(tmp_path / "merged")))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=2e-4, msg=name)
    assert any(float((before[name] - value).abs().max()) > 0.01 for name, value in want.items())


def outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tokens, time, words = torch.tensor([[0, 7, 30, 4, 1]]), torch.tensor([300]), torch.randn(1, 5, 16)
    with torch.no_grad():
        found = {"text_encoder": pipeline.text_encoder(tokens).last_hidden_state}
        if hasattr(pipeline, "unet"):
            return found | {"unet": pipeline.unet(torch.randn(1, 4, 8, 8), time, words).sample}
        given = {
            "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.3]),
            "img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(5, 3),
        }  # fmt: skip
        return found | {"transformer": pipeline.transformer(**given).sample}


def test_flux_norms(pipelines: Mapping[str, Path], tmp_path: Path) -> None:
    """diffusers puts them into the model when it loads the adapter, and back when it unloads it."""
    base = pipelines["flux"]
    name = "transformer_blocks.0.attn.norm_added_k.weight"
    norm = Targeted(Target(f"transformer.{name}", (16,)), Replace(TensorRef.of(torch.rand(16))))
    adapter = Adapter((*layers(base, "transformer", FLUX_TARGETS), norm))
    report = loratool.convert(adapter, tmp_path / "a", "diffusers", base=base)
    assert any("norms are whole tensors" in note for note in report.notes)
    pipeline = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(tmp_path / "a")
    assert torch.equal(pipeline.transformer.state_dict()[name], norm.update.components()["value"].read())
    other = Adapter((*layers(base, "text_encoder", TEXT_TARGETS), norm))
    loratool.convert(other, tmp_path / "b", "diffusers", base=base)
    pipeline = load(pipelines["sd"])
    with pytest.raises(ValueError, match="contain `'lora'`"):
        pipeline.load_lora_weights(tmp_path / "b")


@pytest.mark.parametrize("how", ["as", "component", "config"])
def test_an_adapter_of_one_model(pipelines: Mapping[str, Path], tmp_path: Path, how: str) -> None:
    """Of the UNet alone, by its own names: from PEFT's folder, for the pipeline."""
    base = pipelines["sd"]
    unet = load(base).unet
    config = LoraConfig(r=4, lora_alpha=10, target_modules=UNET_TARGETS, rank_pattern={"to_q": 2})
    folder = tmp_path / "peft"
    folder.mkdir()
    state = {f"base_model.model.{name}": value for name, value in trained(unet, config).items()}
    save_file(state, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    given: dict[str, Any] = {"as_component": "unet"}
    if how == "component":
        given = {"base": base / "unet"}
    elif how == "config":
        copied = tmp_path / "alone"
        copied.mkdir()
        for file in (base / "unet").iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        given = {"base": copied}
    loratool.convert(folder, tmp_path / "a", "diffusers", **given)
    loratool.merge(base, tmp_path / "a", tmp_path / "merged")
    assert_fused(base, tmp_path / "a", tmp_path / "merged")
    loratool.merge(base / "unet", folder, tmp_path / "unet")
    ours = open_checkpoint(tmp_path / "merged").tensors
    for name, ref in open_checkpoint(tmp_path / "unet").tensors.items():
        assert torch.equal(ours[f"unet.{name}"].read(), ref.read()), name


def test_names_of_older_text_encoders(pipelines: Mapping[str, Path], tmp_path: Path) -> None:
    """`text_model.` before them, as in every file on the Hub; many ranks and scales, so that the config counts."""
    base = pipelines["sd"]
    made = layers(base, "text_encoder", TEXT_TARGETS)
    older = [
        Targeted(Target(item.target.name.replace(".", ".text_model.", 1), item.target.shape), item.update)
        for item in made
    ]
    loratool.convert(Adapter(tuple(older)), tmp_path / "a", "diffusers")
    loratool.merge(base, Adapter(tuple(made)), tmp_path / "merged")
    assert_fused(base, tmp_path / "a", tmp_path / "merged")


def test_the_table_of_text_encoders_is_that_of_the_loaders() -> None:
    seen = set()
    for name, kind in inspect.getmembers(diffusers, inspect.isclass):
        modules = getattr(kind, "_lora_loadable_modules", None)
        if modules and (count := text_encoders(name)) is not None:
            assert len([module for module in modules if module.startswith("text_encoder")]) == count, name
            seen |= {known for known in TEXT_ENCODERS if name.startswith(known)}
    assert seen == {*TEXT_ENCODERS}
