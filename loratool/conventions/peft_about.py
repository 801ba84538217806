"""The half of an adapter_config that says what the adapter is for: by it, PEFT's and transformers' loaders find a class
and a base. An adapter that was PEFT's keeps its own; else the base's config tells, or the user.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions.base_names import is_id
from loratool.conventions.writing import Options
from loratool.errors import ChoiceNeeded, Problem
from loratool.names import natural
from loratool.updates import Replace

TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# The modules that PEFT takes for trained whole, whatever the config says, and then misses in a file without them.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_DROPOUTS = {
    "LORA": ("lora_dropout",),
    "LOHA": ("rank_dropout", "module_dropout"),
    "LOKR": ("rank_dropout", "module_dropout"),
}
# What makes `target_modules` mean less than it says.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")


@dataclass(frozen=True)
class About:
    """What the adapter is for, as its config is to say it. `own` is the config of the PEFT adapter that it was."""

    kind: str  # peft_type of what is written
    task: str | None
    auto_mapping: Mapping[str, Any] | None
    base_name: str | None
    revision: str | None
    own: Mapping[str, Any] = field(default_factory=dict)
    headless: bool = False  # the task has a head, and the adapter none

    @classmethod
    def of(cls, adapter: Adapter, kind: str, base: Checkpoint | None, options: Options) -> About:
        """Raises ChoiceNeeded for a task that PEFT does not have."""
        if options.task_type and options.task_type not in TASKS:
            what = f"PEFT has no task {options.task_type!r}"
            raise ChoiceNeeded(Problem("E-OPTION", what, hint=f"--task-type takes {', '.join(TASKS)}"))
        config = adapter.info.get("config", {})
        own = config if "peft_type" in config else {}
        task, mapping = _task_of(base), _class_of(base)
        if own.get("task_type") in TASKS or own.get("auto_mapping"):
            task, mapping = own.get("task_type"), own.get("auto_mapping") or mapping
        task = options.task_type or task
        heads = HEADS.get(task or "", ())
        headless = bool(heads) and not _has_head(adapter, base, heads)
        if headless and options.task_type:
            what = f"PEFT loads the head of a {task} from the adapter ({' or '.join(heads)}), and it has none"
            raise ChoiceNeeded(Problem("E-OPTION", what, hint="leave --task-type out"))
        if headless:
            task = None
        if task is not None:
            mapping = None
        name = adapter.base.name if is_id(adapter.base.name) else None
        revision = adapter.base.revision if name else ""
        return cls(kind, task, mapping, name, revision or None, own, headless)

    def fields(self) -> dict[str, Any]:
        """Of the config, all that is not read from the updates."""
        own = self.own if self.own.get("peft_type") == self.kind else {}
        kept = {key: own.get(key, 0.0) for key in _DROPOUTS.get(self.kind, ())}
        return {
            **kept,
            "task_type": self.task,
            "auto_mapping": dict(self.auto_mapping) if self.auto_mapping else None,
            "base_model_name_or_path": self.base_name,
            "revision": self.revision,
        }

    @property
    def saved(self) -> tuple[str, ...]:
        """The modules that PEFT trained whole: it saves them with every tensor they have."""
        found = self.own.get("modules_to_save")
        return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()

    def targets(self, layers: Collection[str], known: Collection[str] | None) -> list[str] | None:
        """The source's own list of `target_modules`, where it names these layers and no others."""
        listed = self.own.get("target_modules")
        if not isinstance(listed, list) or not listed or any(self.own.get(key) for key in _NARROWING):
            return None
        if not all(isinstance(name, str) and name for name in listed):
            return None
        hits = {end: {layer for layer in layers if _ends(layer, end)} for end in listed}
        if not all(hits.values()) or set().union(*hits.values()) != {*layers}:
            return None
        if known is not None and any(_ends(name, end) for name in known if name not in layers for end in listed):
            return None
        return sorted(listed, key=natural)

    def notes(self) -> Iterator[str]:
        """What its loaders will ask for and not find."""
        if self.headless:
            yield "PEFT loads the head of a classifier from the adapter, which has none: task_type is left out"
        if self.task is None and self.auto_mapping is None:
            yield "task_type is null: AutoPeftModelFor... do not load it; --task-type says it, or --base"
        if self.base_name is None:
            yield "base_model_name_or_path is null: AutoPeftModel... find no base; --base-name OWNER/MODEL says it"


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _has_head(adapter: Adapter, base: Checkpoint | None, heads: Collection[str]) -> bool:
    """Whether an adapter has the whole tensors of a head, all that the base has of it."""
    whole = {item.target.name for item in adapter.updates if isinstance(item.update, Replace)}
    wanted = [name for name in (whole if base is None else base.tensors) if {*name.split(".")[:-1]} & {*heads}]
    return {*wanted} <= whole and (bool(wanted) or base is not None)


def _names_of(base: Checkpoint | None) -> tuple[Mapping[str, Any], list[str]]:
    config = (base.side_json("config.json") if base is not None else None) or {}
    listed = config.get("architectures")
    return config, [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _task_of(base: Checkpoint | None) -> str | None:
    """The task of the class in a base's config, where PEFT has one."""
    config, names = _names_of(base)
    for name in names:
        for end, task in _CLASSES.items():
            if name.endswith(end):
                return task
        if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") is True:
            return "SEQ_2_SEQ_LM"
    return None


def _class_of(base: Checkpoint | None) -> dict[str, Any] | None:
    """The class itself, by which AutoPeftModel finds it."""
    config, names = _names_of(base)
    if names and "model_type" in config:
        return {"base_model_class": names[0], "parent_library": "transformers"}
    kind = config.get("_class_name")
    return {"base_model_class": kind, "parent_library": "diffusers"} if isinstance(kind, str) else None
