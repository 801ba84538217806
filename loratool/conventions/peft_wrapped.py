"""The state dict of a PEFT-wrapped model: the base under ``.base_layer.``, the adapter's name in every key.

    base_model.model.X.base_layer.weight      base_model.model.X.lora_A.NAME.weight
    base_model.model.X.original_module.*      base_model.model.X.modules_to_save.NAME.*

`inject_adapter_in_model` (and what diffusers and transformers build on it) leaves out ``base_model.model.``. Neither
alpha nor rank patterns are in it: they come from ``--config adapter_config.json`` or ``--alpha``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.peft import PeftReader
from loratool.conventions.peft_config import chosen_config, parse, refuse_unsupported
from loratool.conventions.peft_names import PREFIX, WRAPPED_PART, foreign_problems, foreign_wrapped, is_wrapped
from loratool.conventions.scales import Scales
from loratool.errors import ChoiceNeeded, InvalidFile, Problem, Unsupported
from loratool.tensors import TensorRef

NAME = "peft-wrapped"
TITLE = "PEFT-wrapped checkpoint"
KINDS = ("lora", "dora", "loha", "lokr", "replace", "add", "replace_rows")
TESTED = "peft 0.21.2"
ASKS = ("alpha", "scaling", "config", "adapter", "layout")


def detect(source: Checkpoint) -> bool:
    return is_wrapped(source.tensors) or bool(foreign_wrapped(source.tensors))


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    own = source.side_json("adapter_config.json") if source.path.is_dir() else None
    config = chosen_config(choices.config, own, str(source.path))
    parsed = None
    if config is not None:
        refuse_unsupported(config, str(source.path), base_inside=True)
        parsed = parse(config, str(source.path))
    parts, inside = _split(source, choices)
    bias = parsed.bias if parsed else "none"
    trained = {name: ref for name, ref in inside.items() if name.endswith(".bias") and _trained(name, bias, source)}
    reader = PeftReader({**trained, **parts}, parsed, Scales(source, choices), base or inside or None)
    adapter = reader.adapter()
    notes = [*source.notes, *adapter.notes]
    if trained:
        notes.append(f"bias={bias!r}: {len(trained)} biases were trained in place, the base's own are not in this file")
    return replace(adapter, provenance={"convention": NAME}, notes=tuple(notes))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return _split(source, choices)[1]


def adapters(source: Checkpoint) -> list[str]:
    """The names of the adapters in a wrapped checkpoint."""
    return sorted({match["adapter"] for name in source.tensors if (match := WRAPPED_PART.match(name))})


def _split(source: Checkpoint, choices: Choices) -> tuple[dict[str, TensorRef], dict[str, TensorRef]]:
    """The chosen adapter's tensors by their saved names, and the base's by its own."""
    chosen = _choose(source, choices)
    parts: dict[str, TensorRef] = {}
    rest: dict[str, TensorRef] = {}
    for key, ref in source.tensors.items():
        name = key.removeprefix(PREFIX)
        match = WRAPPED_PART.match(name)
        if match is None:
            rest[name] = ref
        elif match["adapter"] == chosen:
            saved = match["before"].removesuffix(".modules_to_save") + (match["after"] or "")
            parts[saved.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = ref
    saved_modules = {name.partition(".modules_to_save.")[0] for name in source.tensors if ".modules_to_save." in name}
    wrapped = {_wrapped_module(name) for name in source.tensors} - {""}
    base: dict[str, TensorRef] = {}
    for name, ref in rest.items():
        clean = _base_name(name, wrapped, {module.removeprefix(PREFIX) for module in saved_modules})
        if clean in base and base[clean].digest() != ref.digest():
            raise InvalidFile(
                Problem("E-NAMES", f"{ref.name} and {base[clean].name} both stand for {clean}", str(source.path))
            )
        base[clean] = ref
    return parts, base


def _choose(source: Checkpoint, choices: Choices) -> str:
    found = adapters(source)
    if choices.adapter is not None:
        if choices.adapter in found:
            return choices.adapter
        raise ChoiceNeeded(
            Problem(
                "E-ADAPTER",
                f"there is no adapter {choices.adapter!r}",
                str(source.path),
                f"it holds {', '.join(found)}",
            )
        )
    if not found:
        raise Unsupported(foreign_problems(foreign_wrapped(source.tensors), str(source.path)))
    if len(found) > 1:
        raise ChoiceNeeded(
            Problem(
                "E-ADAPTER",
                f"it holds several adapters: {', '.join(found)}",
                str(source.path),
                "choose one with --adapter NAME",
            )
        )
    return found[0]


def _wrapped_module(name: str) -> str:
    """The module that a PEFT key says is wrapped, without inner `base_layer` segments."""
    match = WRAPPED_PART.match(name.removeprefix(PREFIX))
    if match is None or match["saved"]:
        return ""
    module = match["before"].rpartition(".")[0].removesuffix(".token_adapter")
    return ".".join(segment for segment in module.split(".") if segment != "base_layer")


def _base_name(name: str, wrapped: set[str], saved: set[str]) -> str:
    """The base's own name: without `base_layer`, `token_adapter` and `original_module` where PEFT put them.

    A model may have modules of those names itself: they go only below a module that is wrapped.
    """
    kept: list[str] = []
    for segment in name.split("."):
        module = ".".join(kept)
        if segment in ("base_layer", "token_adapter") and module in wrapped:
            continue
        if segment == "original_module" and module in saved:
            continue
        kept.append(segment)
    return ".".join(kept)


def _trained(name: str, bias: str, source: Checkpoint) -> bool:
    """Whether a bias of the file was trained in place: all of them, or those of LoRA modules."""
    if bias == "all":
        return True
    wrapped = {_wrapped_module(key) for key in source.tensors}
    return bias == "lora_only" and name.removesuffix(".bias") in wrapped
