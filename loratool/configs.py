"""config.json as the weights of an output need it: sizes, heads, ties, dtypes. Every edit is named.

A transformers config may hold others (`text_config`): an edit is made wherever the old value stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratool.errors import Problem
from loratool.ground import EMBEDDINGS
from loratool.layout import NewTensor
from loratool.strangers import HEADS
from loratool.tensors import Shape, TensorRef

# The last layer of a model that classifies: its rows are the labels.
CLASSIFIERS = (
    "score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight",
    "qa_outputs.weight",
)  # fmt: skip
CLASSES = {  # what PEFT's task types wrap
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPE_KEYS = ("torch_dtype", "dtype")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
MANY = 50  # labels that are shown in an edit


class Edit(NamedTuple):
    """One value of a config: `key` is dotted, `before` None where there was none, `after` None where it is gone."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.after)}"


@dataclass(frozen=True)
class Trained:
    """What an adapter's folder says of the trained model: PEFT's task type, or the model's own class; its labels."""

    task: str = ""
    model_class: str = ""
    labels: Mapping[int, str] = field(default_factory=dict)
    problem_type: str = ""


@dataclass(frozen=True)
class Weights:
    """One model's weights before and after: the base's tensors, those that are computed, those that are new.

    Names are the model's own, without that of a pipeline's component. `dtype` is that of all floats, or None.
    """

    base: Mapping[str, TensorRef]
    changes: Mapping[str, NewTensor]
    added: Mapping[str, NewTensor]
    dtype: str | None = None

    @property
    def resized(self) -> dict[str, tuple[Shape, Shape]]:
        found = {}
        for name, new in self.changes.items():
            old = new.source or new.original
            if old is not None and old.shape != new.shape and not new.part:
                found[name] = old.shape, new.shape
        return found

    def shape(self, name: str) -> Shape | None:
        """What a tensor has in the output; None if it is not in it."""
        new = self.changes.get(name) or self.added.get(name)
        return new.shape if new else self.base[name].shape if name in self.base else None


@dataclass
class Editor:
    """Edits one config in place; `edits`, `notes` and `problems` grow on the way."""

    config: dict[str, Any]
    weights: Weights
    trained: Sequence[Trained] = ()
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def edit(self) -> bool:
        """Make every edit that the weights need; whether there was one."""
        self._vocabulary()
        self._tie()
        self._head()
        self._layers()
        self._inputs()
        self._dtype()
        return bool(self.edits)

    @property
    def vocabulary(self) -> int | None:
        """The rows of the output's embedding, as the config has them by now; None if it has no such number."""
        sizes = [scope["vocab_size"] for _, scope in self.scopes() if type(scope.get("vocab_size")) is int]
        return max(sizes, default=None)

    def scopes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The config and those inside it, with their dotted prefixes."""
        yield from _scopes("", self.config)

    def _set(self, prefix: str, scope: dict[str, Any], key: str, value: Any) -> None:
        if scope.get(key) != value or type(scope.get(key)) is not type(value):
            self.edits.append(Edit(prefix + key, scope.get(key), value))
            scope[key] = value

    def _vocabulary(self) -> None:
        """`vocab_size` is the number of rows of the embedding and of the output head."""
        sizes = {scope["vocab_size"] for _, scope in self.scopes() if type(scope.get("vocab_size")) is int}
        resized = {name: (old[0], new[0]) for name, (old, new) in self.weights.resized.items() if old[1:] == new[1:]}
        tables = {name: pair for name, pair in resized.items() if name.endswith((*EMBEDDINGS, *HEADS))}
        grown = {pair for name, pair in resized.items() if name in tables or pair[0] in sizes}
        for old, new in sorted(grown):
            for name in self._left_behind(old, new):
                what = f"{name} has {old} rows, and the vocabulary {new}: no model loads both"
                hint = f"train it as well, or leave the new rows out: --skip '{min(tables or resized)}'"
                self.problems.append(Problem("E-SHAPE", what, hint=hint))
            places = [(prefix, scope) for prefix, scope in self.scopes() if scope.get("vocab_size") == old]
            for prefix, scope in places:
                self._set(prefix, scope, "vocab_size", new)
            if not places:
                self.notes.append(f"config.json names no vocab_size of {old}: where it stands, it has to become {new}")

    def _left_behind(self, old: int, new: int) -> list[str]:
        """Tables of the output that still have the old number of rows, where others have the new one."""
        names = [*self.weights.base, *self.weights.added]
        shapes = {name: self.weights.shape(name) for name in names if name.endswith((*EMBEDDINGS, *HEADS))}
        return [name for name, shape in shapes.items() if shape and shape[0] == old]

    def _tie(self) -> None:
        """A loader that ties the head to the embedding would not read a head that is another one."""
        ties = [(prefix, scope) for prefix, scope in self.scopes() if "tie_word_embeddings" in scope]
        if ties and not any(scope["tie_word_embeddings"] for _, scope in ties):
            return
        computed = {**self.weights.changes, **self.weights.added}
        tables = [new.updates for name, new in computed.items() if name.endswith(EMBEDDINGS)]
        heads = [new for name, new in computed.items() if name.endswith(HEADS) and new.updates]
        own = [new for new in heads if new.updates not in tables]
        if not own or not (ties or any(new.name in self.weights.added for new in own)):
            return
        for prefix, scope in self.scopes():
            if prefix in ("", "text_config.") or scope.get("tie_word_embeddings"):
                self._set(prefix, scope, "tie_word_embeddings", False)

    def _head(self) -> None:
        """A head that classifies: as many labels as it has rows, and the class that has it."""
        fresh = {name: new.shape for name, new in self.weights.added.items() if name in CLASSIFIERS}
        other = {name: new.shape for name, new in self.weights.changes.items() if name in CLASSIFIERS and new.updates}
        for name, shape in {**fresh, **other}.items():
            if name != "qa_outputs.weight":
                self._labels(shape[0])
            if name in fresh:
                self._class(name)

    def _labels(self, count: int) -> None:
        known = self.config.get("id2label")
        now = len(known) if isinstance(known, dict) else self.config.get("num_labels", 2)
        trained = next((trained for trained in self.trained if len(trained.labels) == count), None)
        named = {str(number): label for number, label in trained.labels.items()} if trained else known
        if now != count or named != known:
            labels = trained.labels if trained else {number: f"LABEL_{number}" for number in range(count)}
            self._set("", self.config, "id2label", {str(number): label for number, label in sorted(labels.items())})
            self._set("", self.config, "label2id", {label: number for number, label in sorted(labels.items())})
            if not trained:
                self.notes.append(f"the adapter does not say what its {count} labels are called")
        if "num_labels" in self.config:
            self._set("", self.config, "num_labels", count)
        if trained and trained.problem_type:
            self._set("", self.config, "problem_type", trained.problem_type)

    def _class(self, head: str) -> None:
        names = self.config.get("architectures")
        old = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        stem = re.fullmatch(r"(\w+?)(For[A-Z]\w*|LMHeadModel|Model)?", old)
        own = {trained.model_class for trained in self.trained if trained.model_class}
        tasks = {trained.task for trained in self.trained if trained.task in CLASSES}
        if head == "qa_outputs.weight":
            tasks = {"QUESTION_ANS"}
        if len(own) == 1:
            self._set("", self.config, "architectures", [*own])
        elif stem and stem[1] and len(tasks) == 1 and tasks < {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}:
            self._set("", self.config, "architectures", [stem[1] + CLASSES[tasks.pop()]])
        else:
            what = f"config.json names the class {old or 'of no model'}: the adapter does not say which one has {head}"
            self.notes.append(f"{what}; write it to `architectures`")

    def _layers(self) -> None:
        """Layers that are added to a stack (PEFT's layer_replication)."""
        before, after = _stack(self.weights.base), _stack([*self.weights.base, *self.weights.added])
        if before == after:
            return
        for prefix, scope in self.scopes():
            for key in LAYER_COUNTS:
                if type(scope.get(key)) is int and scope[key] == before:
                    self._set(prefix, scope, key, after)
            for key, value in scope.items():
                if isinstance(value, list) and len(value) == before > 1:
                    self.notes.append(f"config.json has {before} entries of {prefix}{key}, one a layer: write {after}")

    def _inputs(self) -> None:
        """A denoiser whose first layer got more inputs (diffusers' control adapters); its outputs stay as many."""
        for old, new in self.weights.resized.values():
            if len(old) < 2 or old[0] != new[0] or self.config.get("in_channels") != old[1] != new[1]:
                continue
            self._set("", self.config, "in_channels", new[1])
            if self.config.get("out_channels") is None:  # diffusers: as many as inputs
                self._set("", self.config, "out_channels", old[1])

    def _dtype(self) -> None:
        if self.weights.dtype is None:
            return
        for prefix, scope in self.scopes():
            for key in DTYPE_KEYS:
                if isinstance(scope.get(key), str):
                    self._set(prefix, scope, key, TORCH_NAMES[self.weights.dtype])


def dumped(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def trained_of(adapter_config: Mapping[str, Any], config: Mapping[str, Any]) -> Trained:
    """What the adapter_config.json and the config.json of an adapter's folder say; {} for one that is not there."""
    mapping = adapter_config.get("auto_mapping")
    own = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    labels = config.get("id2label")
    named = labels if isinstance(labels, dict) and all(re.fullmatch(r"\d{1,6}", str(key)) for key in labels) else {}
    kind = config.get("problem_type")
    return Trained(
        str(adapter_config.get("task_type") or ""),
        own if isinstance(own, str) else "",
        {int(key): str(label) for key, label in named.items()},
        kind if isinstance(kind, str) else "",
    )


def _scopes(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")) and "quant" not in key:
            yield from _scopes(f"{prefix}{key}.", value)


def _stack(names: Sequence[str] | Mapping[str, Any]) -> int:
    """The number of layers of the longest stack."""
    numbers = (re.search(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def as_text(value: Any) -> str | None:
    """A value of a config as JSON; None for one that is not there."""
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    text = as_text(value) or "none"
    return text if len(text) <= MANY else f"{text[:MANY]}..."
