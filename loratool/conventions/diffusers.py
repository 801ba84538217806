"""diffusers' adapters, ``pytorch_lora_weights.safetensors``: three generations of names, which one file may mix.

    unet.X.processor.to_q_lora.down.weight      the attention processors' (X.to_q; `to_out` is X.to_out.0)
    unet.X.to_q.lora.down.weight                then; in text encoders X.q_proj.lora_linear_layer.down.weight
    transformer.X.to_q.lora_A.weight            now, as PEFT

Down is A [rank, in], up is B [out, rank], a convolution's [rank, in, k, k] and [out, rank, 1, 1]; `.lora_B.bias` [out]
and `.lora_magnitude_vector` as PEFT has them, and an embedding's `.lora_embedding_A` [rank, tokens] and
`.lora_embedding_B` [dim, rank]. The first segment names a component of the pipeline; a file of one model
alone has none. The scale is PEFT's with the LoraConfig in the header (`lora_adapter_metadata`), or alpha/rank with
``.alpha`` tensors (never both: diffusers refuses that, too) or with an alpha in the header (`headers`); with none of
them it is 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import diffusers_write, flux_names, kohya, two_layouts, unknown_keys
from loratool.conventions.choices import Choices
from loratool.conventions.diffusers_names import (
    COMPONENTS,
    FILE_STEM,
    FOREIGN_PREFIX,
    MAGNITUDE,
    METADATA_KEY,
    NORM,
    ROOTS,
    SIDES,
    key_of,
    path_of,
)
from loratool.conventions.headers import Said, documents
from loratool.conventions.scalars import scalar
from loratool.conventions.scales import Scales
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.format import is_native
from loratool.names import natural, prefix_rule
from loratool.tensors import TensorRef
from loratool.updates import Add, Dora, Lora, Replace, Scaling

NAME = "diffusers"
TITLE = "diffusers adapter"
KINDS = ("lora", "dora", "replace", "add")
TESTED = "diffusers 0.42.1"
OPTIONS = ("component",)
SUFFIXES: tuple[str, ...] = ()
ASKS = ("alpha", "scaling", "components")
CONDITIONS: tuple[str, ...] = ()
misfits, write = diffusers_write.misfits, diffusers_write.write


def detect(source: Checkpoint) -> bool:
    """Factors of diffusers' names; bare ones only in a file that diffusers wrote, or of a denoiser's modules."""
    if is_native(source.metadata) or source.components or source.shards[0].path.stem == "adapter_model":
        return False
    # PEFT's own prefix is PEFT's file. `transformer.h` are GPT-2 and its like, out of some other dump.
    if any(name.startswith(("base_model.model.", "transformer.h.")) for name in source.tensors):
        return False
    if METADATA_KEY not in source.metadata and kohya.is_lycoris(source):
        return False  # lora_A and lora_B beside differences and magnitudes, which diffusers does not write
    factors = [
        name for name in source.tensors if "lora" in name and (key := key_of(name)) and key.part in SIDES.values()
    ]
    if METADATA_KEY in source.metadata or source.shards[0].path.stem.startswith(FILE_STEM):
        return bool(factors)
    return any(_is_telling(name) for name in factors)


def _is_telling(name: str) -> bool:
    first = name.partition(".")[0]
    return first in {*COMPONENTS, *ROOTS} or name.startswith(FOREIGN_PREFIX) or not re.search(r"\.lora_[AB]\.", name)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    reader = Reader(source.tensors, documents(source), Scales(source, choices), base, where)
    updates = reader.updates()
    notes = (*source.notes, *reader.notes)
    return Adapter(tuple(updates), provenance={"convention": NAME}, notes=notes, doubts=tuple(reader.doubts))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


@dataclass
class Reader:
    """Turns the tensors of a file into updates; problems and notes grow on the way."""

    tensors: Mapping[str, TensorRef]
    documents: Mapping[str, Mapping[str, Any]] | None
    scales: Scales
    base: Mapping[str, TensorRef] | None
    where: str
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    modules: dict[tuple[str, str], dict[str, TensorRef]] = field(default_factory=lambda: defaultdict(dict))
    norms: dict[tuple[str, str], TensorRef] = field(default_factory=dict)  # by component and tensor name
    alphas: dict[str, dict[str, Said]] = field(default_factory=dict)  # the stored ones, by component and module
    implied: int = 0  # updates that nothing but their loaders' rule gives an alpha

    def updates(self) -> list[Targeted]:
        self._sort()
        self._choose()
        self._split_flux()
        self._read_alphas()
        self._check_dora()
        if self.problems:
            raise Unsupported(self.problems)
        if not self.modules and not self.norms:
            raise InvalidFile(Problem("E-EMPTY", "no adapter tensor in it", self.where))
        self.scales.choices.check_used([path_of(*key) for key in self.modules], self.where)
        rename = self._match()
        found: list[Targeted] = []
        for (component, module), parts in self.modules.items():
            try:
                found += self._module(component, module, parts, rename)
            except LoratoolError as error:
                self.problems += error.problems
        found += [
            Targeted(Target(rename(component, name), ref.shape), Replace(ref))
            for (component, name), ref in self.norms.items()
        ]
        self.problems += self.scales.contradictions()
        if self.problems:
            raise Mismatch(self.problems)
        self.scales.check()
        self._say_scales()
        return sorted(found, key=lambda item: natural(item.target.name))

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _sort(self) -> None:
        """Every tensor gets its module and part. One that has none would be lost, so it is a problem."""
        styles: dict[str, set[bool]] = defaultdict(set)  # of factors by component: whether they are named as PEFT's
        unknown: list[str] = []
        for name, ref in self.tensors.items():
            key = key_of(name)
            if key is not None:
                parts = self.modules[key.component, key.module]
                if key.part in parts:
                    what = f"{name!r} and {parts[key.part].name!r} are the same part of {key.module}"
                    self.problems.append(Problem("E-DUPLICATE", what, self.where, "keep one of them"))
                parts[key.part] = ref
                if key.part in SIDES.values():
                    styles[key.component].add(name.endswith(key.part))
            elif NORM.search(name):
                first, _, rest = name.partition(".")
                known = first in COMPONENTS
                bare = name.removeprefix(FOREIGN_PREFIX)
                self.norms[(first, rest) if known else ("", bare)] = ref
            else:
                unknown.append(name)
        self.problems += unknown_keys.of_diffusers(unknown, self.where)
        self._move_magnitudes()
        for component in sorted(component for component, found in styles.items() if len(found) > 1):
            # It looks at the first name only, and then ignores those of the other generation.
            what = "names of two generations: all are used, while diffusers' loader may leave some of them out"
            self.notes.append(f"{component or 'the adapter'} has {what}")

    def _move_magnitudes(self) -> None:
        """A magnitude of ``to_out`` belongs to ``to_out.0`` where the factors are there."""
        for component, module in [*self.modules]:
            inner = (component, f"{module}.0")
            if set(self.modules[component, module]) == {MAGNITUDE} and inner in self.modules:
                self.modules[inner].update(self.modules.pop((component, module)))

    def _split_flux(self) -> None:
        """Flux's original names, where the base has diffusers'; XLabs' can be nothing else."""
        home = None if self.base is None else flux_names.component_of(self.base)
        for component, module in [*self.modules]:
            if component not in ("", "transformer") or not flux_names.diffusers_modules(module):
                continue
            if home is not None:
                parts = self.modules.pop((component, module))
                try:
                    for name, own in flux_names.split(module, parts, self._rows_of(home), self.where):
                        self.modules[home, name].update(own)
                except LoratoolError as error:
                    self.problems += error.problems
            elif flux_names.is_xlabs(module) and self.base is None:
                self.doubts.append(f"{module}: which tensors of the base it updates")
            elif flux_names.is_xlabs(module):
                what = f"{module}: XLabs' names are known for diffusers' Flux only, and the base is none"
                hint = "merge into the diffusers version of the model"
                self.problems.append(Problem("E-UNSUPPORTED", what, self.where, hint))
        for component, name in [*self.norms] if home is not None else []:
            owner, _, last = name.rpartition(".")
            if last == "scale" and (found := flux_names.diffusers_modules(owner)):
                self.norms[home or "", f"{found[0]}.weight"] = self.norms.pop((component, name))

    def _rows_of(self, component: str) -> Callable[[str], int | None]:
        def rows(module: str) -> int | None:
            ref = (self.base or {}).get(path_of(component, f"{module}.weight"))
            return ref.shape[0] if ref is not None and ref.shape else None

        return rows

    def _match(self) -> Callable[[str, str], str]:
        """The base's name for a tensor of a component: in a pipeline below the component's name, alone without it."""
        wanted: dict[str, list[str]] = defaultdict(list)
        for component, module in self.modules:
            wanted[component].append(f"{module}.weight")
        for component, name in self.norms:
            wanted[component].append(name)
        if self.base is None:
            return path_of
        present = {name.partition(".")[0] for name in self.base} & set(COMPONENTS)
        if len(wanted) > 1 and not present:
            names = ", ".join(component or "one without a name" for component in sorted(wanted))
            what = f"the adapter updates several components ({names}), the base is one model"
            hint = "give the pipeline's folder as the base; into a single file, `loratool convert --to kohya` leads"
            raise Mismatch(Problem("E-TARGET", what, self.where, hint))
        rules = {component: self._rule(component, names, present) for component, names in wanted.items()}
        lost = [
            name for component, names in wanted.items() for name in names if rules[component](name) not in self.base
        ]
        if len(lost) == sum(map(len, wanted.values())) and (other := two_layouts.hint(lost, self.base)):
            what = f"the base has none of the {len(lost)} tensors that the adapter changes, like {lost[0]}"
            raise Mismatch(Problem("E-TARGET", what, self.where, other))
        return lambda component, name: rules[component](name)

    def _rule(self, component: str, names: list[str], present: Iterable[str]) -> Callable[[str], str]:
        assert self.base is not None
        prefix = f"{component}." if component else ""
        if component and component not in present and present:
            return lambda name: prefix + name  # the base is a pipeline without it: the plan names what is missing
        inside = prefix if component in present else ""
        known = [name.removeprefix(inside) for name in self.base if name.startswith(inside)]
        # A text encoder's `text_model.` has come and gone between releases of transformers.
        rename, notes = prefix_rule(names, known, self.where)
        self.notes += [f"{component}: {note}" if component else note for note in notes]
        return lambda name: inside + rename(name)

    # -- one module ---------------------------------------------------------------------------------------------------

    def _module(
        self, component: str, module: str, parts: Mapping[str, TensorRef], rename: Callable[[str, str], str]
    ) -> Iterator[Targeted]:
        path = path_of(component, module)
        if parts.keys() & {"lora_embedding_A", "lora_embedding_B"}:
            yield self._embedding(component, module, parts, rename)
            return
        A, B = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if A is None or B is None:
            lack = "down (lora_A)" if B else "up (lora_B)" if A else "down and up"
            what = f"{path} has {', '.join(sorted(parts))} and no {lack}"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where))
        bias, magnitude = parts.get("lora_B.bias"), parts.get(MAGNITUDE)
        if not A.numel or not B.numel or not 2 <= len(A.shape) == len(B.shape) or any(dim != 1 for dim in B.shape[2:]):
            what = f"{path}: down is {list(A.shape)}, up {list(B.shape)}; they must be [rank, in...] and [out, rank]"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        out, rank, *_ = B.shape
        if A.shape[0] != rank:
            what = f"{path}: down has rank {A.shape[0]}, up {rank}: a grouped convolution, or parts of two adapters"
            raise Unsupported(
                Problem("E-UNSUPPORTED", what, self.where, f"merge without: --skip '*{unknown_keys.alike(module)}'")
            )
        scaling = self._scaling(component, module, rank)
        update: Lora | Dora = Lora(A, B.reshape(out, rank), scaling)
        if magnitude is not None:
            if magnitude.numel != out:
                what = f"{path}: the magnitude is {list(magnitude.shape)}, for {out} outputs"
                raise InvalidFile(Problem("E-SHAPE", what, self.where))
            update = Dora(update, magnitude.reshape(out), axis=0)
        yield Targeted(Target(rename(component, f"{module}.weight"), (out, *A.shape[1:])), update)
        if bias is not None:
            # A bare scale: the bias has no rank of its own.
            target = Target(rename(component, f"{module}.weight").removesuffix("weight") + "bias", bias.shape)
            yield Targeted(target, Add(bias, Scaling("none", None, None, scaling.scale)))

    def _embedding(
        self, component: str, module: str, parts: Mapping[str, TensorRef], rename: Callable[[str, str], str]
    ) -> Targeted:
        """PEFT's, delta = (B @ A).T with A [rank, tokens], B [dim, rank]; the table is [tokens, dim]."""
        path = path_of(component, module)
        A, B, magnitude = (parts.get(part) for part in ("lora_embedding_A", "lora_embedding_B", MAGNITUDE))
        shapes = ", ".join(f"{part} {list(ref.shape)}" for part, ref in parts.items())
        if A is None or B is None or parts.keys() - {"lora_embedding_A", "lora_embedding_B", "alpha", MAGNITUDE}:
            what = f"{path} has {shapes}: an embedding has lora_embedding_A and lora_embedding_B"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where))
        if not A.numel or not B.numel or not len(A.shape) == len(B.shape) == 2 or A.shape[0] != B.shape[1]:
            what = f"{path} has {shapes}: they must be [rank, tokens] and [dim, rank]"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        update: Lora | Dora = Lora(B.T, A.T, self._scaling(component, module, A.shape[0]))
        if magnitude is not None:
            update = Dora(update, magnitude.reshape(magnitude.numel), axis=1)  # PEFT's norm is over the tokens
        target = Target(rename(component, f"{module}.weight"), (A.shape[1], B.shape[0]), layout="embedding")
        return Targeted(target, update)

    # -- scale --------------------------------------------------------------------------------------------------------

    def _check_dora(self) -> None:
        """diffusers makes all modules of a component DoRA or none: without a magnitude one gets the base's norm."""
        for component in {component for component, _ in self.modules}:
            own = {module: parts for (owner, module), parts in self.modules.items() if owner == component}
            missing = [module for module, parts in own.items() if MAGNITUDE not in parts]
            document = (self.documents or {}).get(component)
            wanted = document.get("use_dora", False) if document is not None else len(missing) < len(own)
            if wanted and missing:
                what = f"{component or 'the adapter'} is DoRA, and {missing[0]} has no magnitude"
                self.problems.append(Problem("E-COMPONENTS", what, self.where, "is the file complete?"))
            elif not wanted and len(missing) < len(own):
                what = f"there are magnitudes, and {METADATA_KEY} says that {component or 'the adapter'} is no DoRA"
                self.problems.append(Problem("E-COMPONENTS", what, self.where, "take the file that the trainer wrote"))

    def _scaling(self, component: str, module: str, rank: int) -> Scaling:
        """What the consumers of the file make of it; unknown where that would be chance.

        diffusers gives a module without alpha the one alpha of its component. Files that name no component (ComfyUI's
        ``diffusion_model.`` and bare ones) it converts first, and there no alpha is a scale of 1, as it is in ComfyUI.
        """
        path, alphas = path_of(component, module), self.alphas.get(component, {})
        own = [alphas[module]] if module in alphas else []
        scaling = self.scales.of(module, rank, *own, component=component, label=path)
        answered = scaling.scale is not None or self.scales.choices.alpha
        if answered or self.documents is not None or self.scales.unsettled:
            return scaling
        values = {said.alpha for said in alphas.values()}
        if not alphas or not component:
            self.implied += 1
            return Scaling.by("alpha/rank", rank, rank)
        return Scaling.by("alpha/rank", values.pop() if len(values) == 1 else None, rank)

    def _read_alphas(self) -> None:
        for (component, module), parts in self.modules.items():
            if (ref := parts.get("alpha")) is not None:
                try:
                    said = Said(scalar(ref, self.where), ref.name)
                    self.alphas.setdefault(component, {})[module] = said
                except LoratoolError as error:
                    self.problems += error.problems
        if self.alphas and self.documents is not None:
            said = next(said for alphas in self.alphas.values() for said in alphas.values())
            what = f"alpha is stored twice: {METADATA_KEY} in the header, and {said.where} = {said.alpha:g}"
            self.problems.append(
                Problem("E-UNSUPPORTED", what, self.where, "diffusers refuses it too: remove one of them")
            )

    def _say_scales(self) -> None:
        self.notes += self.scales.notes()
        if self.implied:
            what = f"no alpha is stored for {self.implied} updates: a scale of 1, as their loaders take it"
            self.notes.append(f"{what}; if the trainer had another, give --alpha with --scaling")

    def _choose(self) -> None:
        """The components that are wanted; all, if nothing was said."""
        wanted = self.scales.choices.components
        known = {component for component, _ in (*self.modules, *self.norms)}
        if unknown := [name for name in wanted if name not in known]:
            names = ", ".join(sorted(known - {""})) or "none by name"
            raise ChoiceNeeded(Problem("E-OPTION", f"it has no component {unknown[0]!r}, but {names}", self.where))
        if not wanted:
            return
        self.notes.append(f"left out, as asked for: {', '.join(sorted(known - {*wanted}))}")
        self.modules = defaultdict(dict, {key: parts for key, parts in self.modules.items() if key[0] in wanted})
        self.norms = {key: ref for key, ref in self.norms.items() if key[0] in wanted}
