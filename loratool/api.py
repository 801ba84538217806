"""The library calls: the verbs, load and save. The command line calls exactly these."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypedDict, TypeVar

from loratool import format as native_format
from loratool import live, maps, outputs
from loratool.adapter import Adapter
from loratool.binding import led
from loratool.checkpoint import open_checkpoint, read_json
from loratool.conventions import of_base
from loratool.conventions.choices import Choices
from loratool.conventions.load import load as load_adapter
from loratool.conventions.selection import Selection
from loratool.conventions.writing import Options
from loratool.convert import ConvertReport, plan_convert, run_convert
from loratool.errors import ChoiceNeeded, InvalidFile, Problem
from loratool.extract import ExtractReport, run_extract
from loratool.merge import MergeReport, UnmergeReport, run_merge, run_unmerge
from loratool.plan import Plan, plan_merge
from loratool.quantised import logical
from loratool.status import Status, status_of
from loratool.summary import Summary, inspect_path
from loratool.unmerging import plan_unmerge
from loratool.verify import VerifyReport, run_verify
from loratool.virtual import MergedFolder, each_tensor, open_virtual
from loratool.workers import ProgressCallback

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Unpack

PathLike: TypeAlias = str | Path
AdapterLike: TypeAlias = PathLike | Adapter
Weighted: TypeAlias = AdapterLike | tuple[AdapterLike, float | None]
Adapters: TypeAlias = AdapterLike | Sequence[Weighted] | Mapping[str, float] | Mapping[Path, float]

P = ParamSpec("P")
R = TypeVar("R")


def _typed(function: Callable[P, R]) -> Callable[P, R]:
    """An input that can not be read is a typed error, like any other."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (BrokenPipeError, ConnectionError):
            raise  # a progress callback's
        except OSError as error:
            where = str(error.filename or "")
            raise InvalidFile(Problem("E-READ", f"can not be read: {error.strerror or error}", where)) from error

    return wrapper


class Reading(TypedDict, total=False):
    """What the files of an adapter leave open, and which part of them is wanted; taken by every call that reads one.

    `convention` is what to read, where several match, and `adapter` one of several in a file. `alpha` (one, or one per
    name pattern), `scaling` ("alpha", "alpha/rank", "alpha/sqrt(rank)") and `config` (a PEFT adapter_config.json) say
    what a file does not; so do, for packed query, key and value, `enable_lora` ("101", or one per name pattern), for
    loralib's full state dicts `already_merged`, and `layout` ("in_out" or "out_in" per name pattern) for square
    matrices whose orientation nothing shows. `component` takes only the updates of those parts of a pipeline ("unet",
    "te1"). `map` is a file of rules (or several) that lead an adapter's names to those of a base, instead of those that
    come with the library. `only` and `skip` are shell-style patterns, of keys in the file or of targets: what they
    leave out is named in a note. An answer to a question that the files do not ask is an error.
    """

    alpha: float | Mapping[str, float] | None
    scaling: str | None
    config: PathLike | None
    convention: str | None
    adapter: str | None
    layout: Mapping[str, str] | None
    component: str | Sequence[str] | None
    enable_lora: str | Mapping[str, str] | None
    already_merged: bool
    map: PathLike | Sequence[PathLike] | None
    only: str | Sequence[str]
    skip: str | Sequence[str]


def _choices(given: Reading) -> Choices:
    """What the files leave open, from a caller's arguments. Raises ChoiceNeeded for what can be no answer."""
    if unknown := given.keys() - Reading.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")  # as of any function
    alpha, config, enable_lora = given.get("alpha"), given.get("config"), given.get("enable_lora")
    files = given.get("map") or ()
    return Choices(
        alpha=dict(alpha) if isinstance(alpha, Mapping) else {} if alpha is None else {"*": float(alpha)},
        scaling=given.get("scaling"),
        config=None if config is None else read_json(Path(config)),
        adapter=given.get("adapter"),
        layout=dict(given.get("layout") or {}),
        components=_several(given.get("component")),
        enable_lora={"*": enable_lora} if isinstance(enable_lora, str) else dict(enable_lora or {}),
        already_merged=given.get("already_merged", False),
        maps=tuple(maps.read(Path(file)) for file in ([files] if isinstance(files, str | Path) else files)),
        convention=given.get("convention"),
        selection=Selection(_several(given.get("only")), _several(given.get("skip"))),
    )


def _several(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One, or several of them, or none."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


@_typed
def load(
    path: PathLike,
    *,
    base: PathLike | None = None,
    **reading: Unpack[Reading],
) -> Adapter:
    """Read an adapter of any convention. Headers only: numbers are read when they are needed.

    `base` binds it to a checkpoint's names and orientation, which PEFT's MoE and Conv1D layers need. The other options
    are those of `Reading`.

    Raises InvalidFile, Unsupported, ChoiceNeeded or Mismatch.

    >>> loratool.load("adapter/").updates[0].target.name  # doctest: +SKIP
    'model.layers.0.self_attn.q_proj.weight'
    """
    given = _choices(reading)
    if base is None:
        return load_adapter(Path(path), given).adapter
    opened = logical(open_checkpoint(Path(base)))
    view = maps.View(opened.tensors, given.maps or maps.shipped())
    return led(load_adapter(Path(path), given, view).adapter, opened, view, str(path))


@_typed
def save(adapter: Adapter, path: PathLike) -> None:
    """Write an adapter as a native file, whole or not at all; the same adapter gives the same bytes.

    Raises ChoiceNeeded for an unknown scale, InvalidFile for a contradiction, OutputRefused if `path` exists.
    """
    native_format.write(of_base.bound(adapter), Path(path))


@_typed
def inspect(
    path: PathLike,
    *,
    base: PathLike | None = None,
    **reading: Unpack[Reading],
) -> Summary:
    """Say what an adapter or checkpoint is, from its headers. Imports no torch for safetensors and zipped pickles."""
    return inspect_path(Path(path), None if base is None else Path(base), _choices(reading))


@_typed
def extract(
    wrapped: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    base_out: PathLike | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
    **reading: Unpack[Reading],
) -> ExtractReport:
    """Write the adapter inside a wrapped checkpoint as a native file, bound to the digests of its base tensors.

    `base` is that of a file without base weights, whose names and digests the adapter gets. With `base_out`, also write
    the clean base checkpoint as a folder. `already_merged` says that its weights hold the
    delta: the base is then what is left without it, to rounding. `force` replaces outputs that are there. Raises
    ChoiceNeeded where alpha is not stored.
    """
    return run_extract(
        Path(wrapped),
        outputs.place(out),
        _choices(reading),
        base_path=None if base is None else Path(base),
        base_out=None if base_out is None else outputs.place(base_out),
        force=force,
        progress=progress,
    )


@_typed
def convert(
    source: AdapterLike,
    out: PathLike,
    to: str,
    *,
    base: PathLike | None = None,
    uniform: bool = False,
    as_component: str = "",
    task_type: str = "",
    base_name: str = "",
    revision: str = "",
    bake: bool = False,
    pin: bool = False,
    force: bool = False,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write an adapter in another convention, `to` ("peft", "native"), whole or not at all. Every delta is kept.

    `base` binds it to a checkpoint, as in `load`. `uniform` brings all LoRA updates to one rank and one scale, for
    consumers that read only one. `as_component` says which part of a pipeline ("unet", "te1") an adapter of one model
    is for. `base_name` and `revision` say where the base is published, `task_type` what PEFT calls the task; what the
    source's own config says of these stays. What the convention can not hold is refused, all of it at once, or with
    `bake` replaced by the whole tensors that a merge into `base` would give. `pin` notes the
    digests of the base's tensors in a native file, `force` replaces an output that is there. What the source leaves
    open is said as in `load`.

    Raises Unsupported for what does not fit, ChoiceNeeded, Mismatch, and OutputRefused if `out` exists.

    >>> loratool.convert("my.lora.safetensors", "adapter/", "peft", uniform=True)  # doctest: +SKIP
    """
    planned = plan_convert(
        source if isinstance(source, Adapter) else Path(source),
        outputs.place(out),
        to,
        _choices(reading),
        base=None if base is None else Path(base),
        options=Options(uniform, as_component, task_type, base_name, revision),
        bake=bake,
        pin=pin,
        force=force,
    )
    return run_convert(planned)


@_typed
def pin(
    source: AdapterLike, out: PathLike, base: PathLike, *, force: bool = False, **reading: Unpack[Reading]
) -> ConvertReport:
    """Write an adapter as a native file that holds the digests of the base's tensors that it changes.

    It is refused on any other base then, and `require_pinned` of `merge` takes it. Raises what `convert` raises.

    >>> loratool.pin("adapter/", "pinned.lora.safetensors", "base/")  # doctest: +SKIP
    """
    return convert(source, out, "native", base=base, pin=True, force=force, **reading)


@_typed
def plan(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    allow_unchanged: bool = False,
    require_pinned: bool = False,
    onto_merged: bool = False,
    tokenizer_from: PathLike = "",
    digests: bool = True,
    reproducible: bool = False,
    undo: PathLike | None = None,
    link: bool = False,
    resume: bool = False,
    force: bool = False,
    form: str = "",
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    **reading: Unpack[Reading],
) -> Plan:
    """All checks of a merge without writing anything. Raises what `merge` would raise."""
    given = [(adapter, 1.0 if weight is None else weight) for adapter, weight in _weighted(adapters)]
    return plan_merge(
        Path(base),
        given,
        outputs.place(out),
        dtype=dtype,
        allow_new=allow_new,
        allow_unchanged=allow_unchanged,
        require_pinned=require_pinned,
        onto_merged=onto_merged,
        choices=_choices(reading),
        digests=digests,
        reproducible=reproducible,
        undo=None if undo is None else Path(undo),
        link=link,
        resume=resume,
        force=force,
        form=form,
        tokenizer=str(tokenizer_from),
        threads=threads,
        max_memory=max_memory,
        device=device,
    )


@_typed
def merge(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    allow_unchanged: bool = False,
    require_pinned: bool = False,
    onto_merged: bool = False,
    tokenizer_from: PathLike = "",
    digests: bool = True,
    reproducible: bool = False,
    undo: PathLike | None = None,
    link: bool = False,
    resume: bool = False,
    force: bool = False,
    form: str = "",
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
    **reading: Unpack[Reading],
) -> MergeReport:
    """Write base + adapters as a checkpoint: W + sum of weight * scale * delta, rounded once.

    `adapters` is a path or an `Adapter`, or a list of them, each alone or as (adapter, weight), or {path: weight}.
    `dtype` is "keep", "bf16", "fp16" or "fp32". `allow_new` permits adapters to add tensors or resize them. An adapter
    that changes nothing (a scale, weight or factors of zero) is refused, and so is a merge after which every bit is
    what it was, unless `allow_unchanged`. `require_pinned` refuses adapters that hold no digests of their base.
    `onto_merged` takes a base that is itself the result of a merge, which is otherwise taken only from adapters whose
    digests prove that they were trained on it; the receipt keeps the chain.
    `tokenizer_from` is "base", "adapter" or a folder: whose tokenizer and chat
    template to write; by default what the weights need. A config that does not fit the merged weights is edited, and
    every edit is in the notes. `undo` names a record to
    write, with which `unmerge` gives the base back bit for bit. `digests=False` leaves the digests of changed tensors
    out of the receipt, which then proves less. `reproducible` rounds as if computed exactly, to the same bits on every
    machine, in about twice the time. `link` makes untouched files hard links instead of copies. `resume`
    keeps the finished files of an interrupted run of the same merge, after verifying them. `force` replaces an output
    (and an undo record) that is there, at once when the new one is complete. An output named `NAME.safetensors` is one
    file, `NAME.pth` (.pt, .bin) a pickle like the base with everything that is in it, any other name a folder; `form`
    "pth" writes the pickle into a folder. `threads` workers (all
    cores, at most 8) use at most `max_memory` bytes beside the interpreter and torch; `device` "cuda" moves their
    arithmetic to a GPU. `progress` is called from the
    workers, one call at a time. Every problem is raised before a byte is written. The options of `Reading` hold for all
    adapters, and each of them must have use for them.

    With an `executor` of `concurrent.futures`, its workers do the work: processes, or machines that share a file system
    and have the same releases of loratool and torch. `max_memory` is then what one task may use, and `progress` is
    called from this thread. Where their CPUs are of different kinds, `reproducible` gives the same bits on all of them.

    >>> loratool.merge("base/", [("style/", 0.8), "task.lora.safetensors"], "merged/")  # doctest: +SKIP
    """
    if executor is not None and threads is not None:
        raise ChoiceNeeded(Problem("E-OPTION", "an executor has workers of its own", hint="leave out threads"))
    planned = plan(
        base,
        adapters,
        out,
        dtype=dtype,
        allow_new=allow_new,
        allow_unchanged=allow_unchanged,
        require_pinned=require_pinned,
        onto_merged=onto_merged,
        tokenizer_from=tokenizer_from,
        digests=digests,
        reproducible=reproducible,
        undo=undo,
        link=link,
        resume=resume,
        force=force,
        form=form,
        threads=threads if executor is None else 1,  # its workers' memory is counted by task
        max_memory=max_memory,
        device=device,
        **reading,
    )
    return run_merge(planned, progress, executor)


@_typed
def open_merged(
    base: PathLike,
    adapters: Adapters,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    reproducible: bool = False,
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> MergedFolder:
    """Open base + adapters as if they were merged: an object with the interface of `safetensors.safe_open`.

    Nothing is written. A tensor, or what is asked for of it with `get_slice(name)[rows, columns]`, is computed when it
    is asked for, to the bits that `merge` writes with the same options. `open_shard(name)` is one of its `files`.
    `threads` workers compute. Every problem that a merge has is raised here.

    >>> with loratool.open_merged("base/", "adapter/") as merged:  # doctest: +SKIP
    ...     half = merged.get_slice("model.layers.0.mlp.up_proj.weight")[:2816]
    """
    given = [(adapter, 1.0 if weight is None else weight) for adapter, weight in _weighted(adapters)]
    return open_virtual(
        Path(base),
        given,
        dtype=dtype,
        allow_new=allow_new,
        choices=_choices(reading),
        reproducible=reproducible,
        threads=threads,
    )


def iter_merged(
    base: PathLike,
    adapters: Adapters,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    reproducible: bool = False,
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of base + adapters as (name, tensor), for weight loaders. As `open_merged`, one after the other.

    Problems are raised by the call, before the first tensor. A tensor is the caller's; memory that the caller no longer
    holds is used again.

    >>> model.load_weights(loratool.iter_merged("base/", "adapter/"))  # doctest: +SKIP
    """
    merged = open_merged(
        base,
        adapters,
        dtype=dtype,
        allow_new=allow_new,
        reproducible=reproducible,
        threads=threads,
        **reading,
    )
    return each_tensor(merged)


@_typed
def plan_of_unmerge(
    merged: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    base: PathLike | None = None,
    undo: PathLike | None = None,
    exact: bool = False,
    force: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    **reading: Unpack[Reading],
) -> Plan:
    """All checks of an unmerge without writing anything. Raises what `unmerge` would raise."""
    base_path = None if base is None else Path(base)
    undo_path = None if undo is None else Path(undo)
    return plan_unmerge(
        Path(merged),
        _weighted(adapters),
        outputs.place(out),
        base_path=base_path,
        undo_path=undo_path,
        exact=exact,
        force=force,
        choices=_choices(reading),
        threads=threads,
        max_memory=max_memory,
        device=device,
    )


@_typed
def unmerge(
    merged: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    base: PathLike | None = None,
    undo: PathLike | None = None,
    exact: bool = False,
    force: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: ProgressCallback | None = None,
    **reading: Unpack[Reading],
) -> UnmergeReport:
    """Take merged adapters out again. With the merge's `undo` record or the `base` bit for bit; with neither to
    rounding, and the report says how far.

    `force` replaces an output that is there. Raises AnswerIsNo where that is impossible (a replaced tensor), or with
    `exact`, where it would not be exact.
    """
    planned = plan_of_unmerge(
        merged,
        adapters,
        out,
        base=base,
        undo=undo,
        exact=exact,
        force=force,
        threads=threads,
        max_memory=max_memory,
        device=device,
        **reading,
    )
    return run_unmerge(planned, progress)


@_typed
def apply(
    model: nn.Module,
    adapter: AdapterLike,
    /,
    *,
    weight: float = 1.0,
    undo: PathLike | None = None,
    reproducible: bool | None = None,
    check_base: bool = True,
    **reading: Unpack[Reading],
) -> live.Handle:
    """Merge an adapter into the parameters of a running model, in place: bit for bit what `merge` of all adapters that
    are in it, in their order, gives. The handle takes it out again, or swaps it.

    `undo` says where the original bits come from: "compressed" (the default: in memory, what rounding took away),
    "copy" (in the host's memory, the parameters themselves) or the folder of the base that was loaded. It is for the
    whole model, and stays until another call says otherwise; so does `reproducible`, which is as in `merge`, and always
    on for a model with DTensors. Those are changed where their shards lie, without gathering; every process must make
    the same calls. `check_base=False` takes the model for the adapter's base without looking. The other
    options are those of `Reading`.

    Raises Mismatch with all that does not fit, and what is wrong with the adapter. Whatever is raised, every parameter
    then has the bits that it had before. Do not call it between a forward pass and its backward pass.

    >>> with loratool.apply(model, "style/", weight=0.8) as handle:  # doctest: +SKIP
    ...     handle.swap("other/")
    """
    given, factor = _adapter(adapter), _weight(weight)
    options = _choices(reading)
    return live.put(
        model,
        given,
        1.0 if factor is None else factor,
        options,
        undo=undo,
        reproducible=reproducible,
        check_base=check_base,
    )


@_typed
def verify(
    merged: PathLike,
    base: PathLike,
    adapters: Adapters,
    *,
    sample: float | None = None,
    ulps: int = 1,
    rounded_delta: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    **reading: Unpack[Reading],
) -> VerifyReport:
    """Whether `merged` is `base` with these adapters, merged by any tool: `report.answer`, and why not.

    Each element may be `ulps` units in the last place from the correctly rounded result, or as far as float32
    arithmetic can be; `rounded_delta` also accepts a delta that was rounded before it was added. Tensors that no
    adapter changes must be byte-equal. `sample` looks at that share of each tensor's rows only.

    Raises Mismatch where the adapters do not fit the base, and what is wrong with the files.

    >>> loratool.verify("merged/", "base/", [("style/", 0.8)]).answer  # doctest: +SKIP
    True
    """
    return run_verify(
        Path(merged),
        Path(base),
        [(adapter, 1.0 if weight is None else weight) for adapter, weight in _weighted(adapters)],
        _choices(reading),
        sample=sample,
        ulps=ulps,
        rounded_delta=rounded_delta,
        threads=threads,
        progress=progress,
    )


@_typed
def status(path: PathLike, *, check: bool = False, progress: ProgressCallback | None = None) -> Status:
    """What was merged into a checkpoint, from its receipt; `check` compares the digests of the merged tensors."""
    return status_of(Path(path), check, progress)


@_typed
def validate(path: PathLike) -> list[Problem]:
    """Every rule of the format's specification that a native file breaks; [] if it is valid."""
    return native_format.validate(Path(path))


def _weighted(adapters: Adapters) -> list[tuple[Path | Adapter, float | None]]:
    """The adapters with their weights, None where none is given. Raises ChoiceNeeded for what is neither."""
    if isinstance(adapters, str | Path | Adapter):
        pairs: list[tuple[object, object]] = [(adapters, None)]
    elif isinstance(adapters, Mapping):
        pairs = [*adapters.items()]
    elif isinstance(adapters, Iterable):
        pairs = [entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None) for entry in adapters]
    else:
        pairs = [(adapters, None)]
    if not pairs:
        raise ChoiceNeeded(Problem("E-OPTION", "no adapter is given", hint="give at least one"))
    return [(_adapter(adapter), _weight(weight)) for adapter, weight in pairs]


def _adapter(given: object) -> Path | Adapter:
    if isinstance(given, Adapter):
        return given
    if isinstance(given, str | Path):
        return Path(given)
    hint = "adapters are paths or Adapters, each alone or as (adapter, weight), or {adapter: weight}"
    raise ChoiceNeeded(Problem("E-OPTION", f"{given!r:.80} is no adapter", hint=hint))


def _weight(given: object) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not math.isfinite(given):
        raise ChoiceNeeded(Problem("E-OPTION", f"{given!r:.80} is no weight", hint="a weight is a finite number"))
    return float(given)
