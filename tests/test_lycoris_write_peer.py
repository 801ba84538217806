"""LyCORIS loads what `convert --to lycoris` writes: its forward is that of a merge of the original adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.peers
lycoris = pytest.importorskip("lycoris")

from lycoris.functional import factorization  # noqa: E402
from models import assert_float32_close, changed  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from strategies import Maker, make_update  # noqa: E402
from test_lycoris_peer import bias_of, layers, net, weight_of  # noqa: E402

import loratool  # noqa: E402
from loratool import Adapter, Target, Targeted  # noqa: E402
from loratool.updates import Dora, Lokr, Scaling, Update  # noqa: E402

RANK = 2


def lokr(shape: tuple[int, ...], make: Maker, *, whole: bool) -> Lokr:
    """Factors of the sizes that LyCORIS works out itself, the second one whole or of rank 1."""
    (a, b), (c, d) = (factorization(size, -1) for size in shape[:2])
    if whole:
        return Lokr(Scaling(scale=0.75), w1=make(a, c), w2=make(b, d, *shape[2:]))
    return Lokr(Scaling.by("alpha/rank", 0.75, 1), w1=make(a, c), B2=make(b, 1), A2=make(1, d, *shape[2:]))


def update(form: str, shape: tuple[int, ...], seed: int) -> Update:
    make = Maker(seed)
    if form.startswith("dora-"):
        return Dora(update(form.removeprefix("dora-"), shape, seed), make(shape[0], positive=True), 0)
    if form.startswith("lokr"):
        return lokr(shape, make, whole=form == "lokr-whole")
    if form.endswith("-mid") and (len(shape) == 2 or set(shape[2:]) == {1}):
        form = form.removesuffix("-mid")  # LyCORIS has a core only where there is a kernel
    made: Update = make_update(form, shape, make, RANK, "alpha/sqrt(rank)" if seed % 2 else "alpha/rank", 1.5)
    return made


FORMS = ["lora", "lora-mid", "loha", "loha-mid", "lokr", "lokr-whole", "add", "dora-lora", "dora-loha", "dora-lokr"]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_lycoris_computes_what_was_written_for_it(form: str, tmp_path: Path) -> None:
    model, base = net(tmp_path)
    items = []
    for seed, (name, _) in enumerate(layers(model)):
        shape = tuple(base[f"{name}.weight"].shape)
        if form in ("lokr", "dora-lokr") and max(factorization(shape[0], -1)[1], factorization(shape[1], -1)[1]) <= 2:
            continue  # LyCORIS makes such factors whole
        items.append(Targeted(Target(f"{name}.weight", shape), update(form, shape, seed)))
        if form == "add" and f"{name}.bias" in base:
            items.append(Targeted(Target(f"{name}.bias", shape[:1]), make_update("add", shape[:1], Maker(seed))))
    if form == "lora":  # several on one layer, one of them of a range of rows
        target = replace(items[0].target, rows=(1, 4))
        items.append(Targeted(target, make_update("lora", target.region, Maker(9), 3, "alpha", 0.4)))
    if form == "add":
        for number, name in enumerate(("norm.weight", "norm.bias", "group_norm.weight")):
            items.append(Targeted(Target(name, (8,)), make_update("add", (8,), Maker(20 + number))))
    made = Adapter(tuple(items))
    file, out = tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors"
    loratool.convert(made, file, "lycoris", base=tmp_path / "base.safetensors", as_component="model")
    loratool.merge(tmp_path / "base.safetensors", made, out)
    want = load_file(out)
    assert changed(base, want) == {item.target.name for item in items}

    network: Any = lycoris.create_lycoris_from_weights(1.0, "", model, weights_sd=load_file(file))[0]
    assert len(network.loras) == len({item.target.name.rpartition(".")[0] for item in items})
    for module in network.loras:
        module.double().eval()
    network.apply_to()
    for name, module in layers(model):
        shape = base[f"{name}.weight"].shape
        assert_float32_close(want[f"{name}.weight"], weight_of(module, shape), name=name)
        if f"{name}.bias" in base:
            assert_float32_close(want[f"{name}.bias"], bias_of(module, shape), name=name)
    if form == "add":
        x = torch.randn(3, 8, dtype=torch.float64)
        weight, bias = want["norm.weight"].double(), want["norm.bias"].double()
        assert_float32_close(torch.layer_norm(x, (8,), weight, bias), model.get_submodule("norm")(x))
