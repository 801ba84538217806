"""A native file as an Adapter: every rule of a reader, and every broken one told."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from loratool.adapter import LAYOUTS, Adapter, BaseIdentity, Target, Targeted, TensorIdentity, is_name, is_part
from loratool.container import Header, read_header, strict_json
from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.format import conditions, info
from loratool.format.keys import (
    BASE_KEYS,
    COMPONENTS,
    DIGEST,
    DIRECTIONS,
    FEATURES,
    FORMAT_NAME,
    IDENTITY_KEYS,
    MAJOR,
    MANIFEST_KEYS,
    MAX_FREE_VALUES,
    MAX_MANIFEST,
    MAX_RANK,
    MAX_UPDATES,
    METADATA_KEY,
    OWN_KEYS,
    PARTS,
    SCALE_KEYS,
    UPDATE_KEYS,
)
from loratool.tensors import DTYPE_BITS, TensorRef, is_int
from loratool.updates import KINDS, RULES, Add, Dora, Replace, ReplaceRows, Scale, Scaling, Update


class Parsed(NamedTuple):
    adapter: Adapter
    manifest: dict[str, Any]


def read(path: Path) -> Adapter:
    """Read a native adapter; only its header is touched.

    Raises InvalidFile with every broken rule, Unsupported for a version, feature or kind of a later format.
    """
    return adapter_of(read_header(path))


def adapter_of(header: Header) -> Adapter:
    """The adapter that a header describes; raises like `read`."""
    return parse(header).adapter


def parse(header: Header) -> Parsed:
    where = str(header.path)
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise InvalidFile(
            Problem("E-MANIFEST", f"no {METADATA_KEY!r} in the metadata: not a loratool adapter", where, rule="R-010")
        )
    if len(text.encode("utf-8")) > MAX_MANIFEST:
        raise InvalidFile(Problem("E-LIMIT", f"manifest is over {MAX_MANIFEST:,} bytes", where, rule="R-016"))
    manifest = strict_json(text, where, "E-MANIFEST", "R-010")
    if not isinstance(manifest, dict):
        raise InvalidFile(Problem("E-MANIFEST", "the manifest is not a JSON object", where, rule="R-010"))
    _check_version(manifest, where)
    reader = _Reader(where, header.tensors)
    adapter = reader.adapter(manifest)
    if not reader.problems and not _all_finite(manifest):
        reader.complain("E-MANIFEST", "R-010", "a number is larger than any double")
    problems = reader.problems or adapter.check()
    if problems:
        raise (Unsupported if {p.code for p in problems} <= {"E-FEATURE", "E-KIND"} else InvalidFile)(problems)
    return Parsed(replace(adapter, metadata=info.kept(header.metadata)), manifest)


def _all_finite(value: Any) -> bool:
    """Whether no number of a document, vendors' keys included, overflows to infinity."""
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_version(manifest: dict[str, Any], where: str) -> None:
    """Stop at another format or major version: none of the other rules would mean anything."""
    version = manifest.get("version")
    if manifest.get("format") != FORMAT_NAME or not isinstance(version, str):
        raise InvalidFile(
            Problem("E-MANIFEST", f"format is {manifest.get('format')!r}, version {version!r}", where, rule="R-011")
        )
    if not re.fullmatch(r"[1-9][0-9]*\.(0|[1-9][0-9]*)", version):
        raise InvalidFile(Problem("E-MANIFEST", f"version {version!r} is not MAJOR.MINOR", where, rule="R-011"))
    if version.split(".")[0] != str(MAJOR):
        raise Unsupported(
            Problem(
                "E-VERSION",
                f"format version {version}; this loratool reads {MAJOR}.x",
                where,
                "install a newer loratool",
                "R-012",
            )
        )


class _Reader:
    """Turns a manifest into an Adapter and collects every broken rule on the way."""

    def __init__(self, where: str, tensors: Mapping[str, TensorRef]) -> None:
        self.where = where
        self.tensors = tensors
        self.used: set[str] = set()
        self.problems: list[Problem] = []

    def complain(self, code: str, rule: str, message: str) -> None:
        self.problems.append(Problem(code, message, self.where, rule=rule))

    def typed(self, what: str, value: object, kind: type, rule: str = "R-015") -> Any:
        """The value if it has the JSON type, else a complaint and an empty value of that type."""
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        self.complain("E-MANIFEST", rule, f"{what} must be {kind.__name__}, found {value!r:.80}")
        return kind()

    def known_keys(self, what: str, value: Mapping[str, Any], known: Collection[str]) -> None:
        for key in value:
            if key not in known and "." not in key:
                self.complain("E-UNKNOWN-KEY", "R-014", f"{what} has the unknown key {key!r}")

    def adapter(self, manifest: dict[str, Any]) -> Adapter:
        features = self.typed("features", manifest.get("features"), list)
        if not all(isinstance(feature, str) for feature in features):
            self.complain("E-MANIFEST", "R-013", "features must be strings")
        else:
            if unknown := [feature for feature in features if feature not in FEATURES]:
                for feature in unknown:
                    self.complain("E-FEATURE", "R-013", f"feature {feature!r} is not known to this reader")
                return Adapter(())  # a later format: what else would be wrong with it can not be told
            if len(set(features)) < len(features):
                self.complain("E-FEATURE", "R-013", "a feature is listed twice")
        self.known_keys("manifest", manifest, MANIFEST_KEYS)
        entries = self.typed("updates", manifest.get("updates"), list)
        if not 1 <= len(entries) <= MAX_UPDATES and isinstance(manifest.get("updates"), list):
            self.complain("E-LIMIT", "R-016", f"{len(entries)} updates; 1 to {MAX_UPDATES:,} are allowed")
        seen: Counter[str] = Counter()
        updates = [item for n, entry in enumerate(entries) if (item := self.targeted(n, entry, seen)) is not None]
        if not self.problems:
            for name in self.tensors.keys() - self.used:
                self.complain("E-COMPONENTS", "R-030", f"tensor {name!r} belongs to no update")
        base = self.base(self.typed("base", manifest.get("base"), dict), updates)
        provenance = self.typed("provenance", manifest.get("provenance"), dict)
        if not all(isinstance(value, str) for value in provenance.values()):
            self.complain("E-MANIFEST", "R-042", "provenance values must be strings")
        when = self.when(manifest, features)
        about = self.typed("info", manifest.get("info", {}), dict, "R-044")
        if info.too_many(manifest):
            what = f"info, provenance and vendor keys hold over {MAX_FREE_VALUES:,} JSON values"
            self.complain("E-LIMIT", "R-016", what)
        return Adapter(tuple(updates), base, provenance, info=about, when=when)

    def when(self, manifest: dict[str, Any], features: list[Any]) -> Mapping[str, Any]:
        """On which inputs the adapter acts (R-045); empty for all of them."""
        if ("when" in manifest) != (conditions.FEATURE in features):
            what = "when and the feature conditional go together: one of them is missing"
            self.complain("E-FEATURE", "R-045", what)
        if "when" not in manifest:
            return {}
        before = len(self.problems)
        when: dict[str, Any] = self.typed("when", manifest["when"], dict, "R-045")
        if len(self.problems) == before:
            self.known_keys("when", when, {*conditions.CONDITIONS})
        if len(self.problems) == before:
            self.problems += conditions.malformed(when, self.where)
        return {name: value for name, value in when.items() if name in conditions.CONDITIONS}

    def targeted(self, n: int, raw: object, seen: Counter[str]) -> Targeted | None:
        before = len(self.problems)
        what = f"updates[{n}]"
        entry: dict[str, Any] = self.typed(what, raw, dict, "R-020")
        name = self.typed(f"{what}.target", entry.get("target"), str, "R-020")
        kind = self.typed(f"{what}.kind", entry.get("kind"), str, "R-020")
        if len(self.problems) > before:
            return None
        ordinal, seen[name] = seen[name], seen[name] + 1
        part, stored = entry.get("part", ""), name
        if "part" in entry and not is_part(part):
            message = f"{what}.part must be 1 to 100 letters, digits, _ and -: {part!r:.80}"
            self.complain("E-MANIFEST", "R-048", message)
            return None
        name = f"{part}.{stored}" if part else stored
        if not stored or not is_name(name):
            self.complain("E-LIMIT", "R-016", f"{what}.target is empty, too long or has control characters")
            return None
        if kind not in KINDS:
            self.complain("E-KIND", "R-021", f"{what} ({name}) is of the unknown kind {kind!r}")
            return None
        is_dora = kind == Dora.kind
        self.known_keys(what, entry, UPDATE_KEYS | SCALE_KEYS | OWN_KEYS.get(kind, set()))
        target = self.target(what, name, entry)
        direction = entry.get("direction") if is_dora else kind
        if is_dora and direction not in DIRECTIONS:
            self.complain("E-MANIFEST", "R-028", f"{what} needs a direction among {DIRECTIONS}")
            return None
        if "axis" in OWN_KEYS.get(kind, set()) and (not is_int(entry.get("axis")) or entry["axis"] not in (0, 1)):
            self.complain("E-MANIFEST", "R-028", f"{what} needs an axis 0 or 1")
            return None
        parts = self.components(what, f"{stored}.{ordinal}.", str(direction), is_dora)
        scaling = self.scaling(what, str(direction), entry, parts)
        if len(self.problems) > before or target is None:
            return None
        magnitude = parts.pop("magnitude", None)
        update: Update
        if direction == Scale.kind:
            update = Scale(parts["factor"], entry["axis"])
        elif direction in (Replace.kind, ReplaceRows.kind):
            update = KINDS[direction](**parts)
        else:
            update = KINDS[str(direction)](**parts, factors=scaling)  # type: ignore[call-arg]  # table of dataclasses
        if magnitude is not None:
            update = Dora(update, magnitude, entry["axis"])
        return Targeted(target, update)

    def target(self, what: str, name: str, entry: dict[str, Any]) -> Target | None:
        shape, rows, expert, experts = (entry.get(key) for key in ("shape", "rows", "expert", "experts"))
        layout = entry.get("layout", "")
        good = isinstance(shape, list) and all(map(is_int, shape))
        good &= rows is None or (isinstance(rows, list) and len(rows) == 2 and all(map(is_int, rows)))
        good &= all(value is None or is_int(value) for value in (expert, experts))
        good &= not any(key in entry and entry[key] is None for key in ("rows", "expert", "experts"))
        if not good:
            self.complain("E-MANIFEST", "R-020", f"{what} ({name}): shape, rows, expert, experts must be whole numbers")
            return None
        if layout not in LAYOUTS or ("layout" in entry and not layout):
            self.complain("E-MANIFEST", "R-027", f"{what} ({name}): layout {layout!r} is not in_out or embedding")
            return None
        assert isinstance(shape, list)
        return Target(name, tuple(shape), tuple(rows) if rows else None, expert, experts, layout, entry.get("part", ""))

    def components(self, what: str, prefix: str, kind: str, is_dora: bool) -> dict[str, TensorRef]:
        """The tensors of one update; exactly one of the kind's component sets must be there."""
        extra = {"magnitude"} if is_dora else set()
        parts = {part: self.tensors[prefix + part] for part in PARTS[kind] | extra if prefix + part in self.tensors}
        self.used.update(prefix + part for part in parts)
        if parts.keys() - extra not in COMPONENTS[kind] or not extra <= parts.keys():
            choices = " or ".join(", ".join(sorted(choice | extra)) for choice in COMPONENTS[kind])
            self.complain(
                "E-COMPONENTS",
                "R-030",
                f"{what} has the tensors {sorted(parts)} under {prefix!r}; {kind} needs {choices}",
            )
            return {}
        return parts

    def scaling(self, what: str, kind: str, entry: dict[str, Any], parts: Mapping[str, TensorRef]) -> Scaling:
        """Rank, alpha, rule and scale of an update, and that they agree (R-024 to R-026)."""
        rank, alpha, rule, scale = (entry.get(key) for key in ("rank", "alpha", "scaling", "scale"))
        if kind in (Scale.kind, Replace.kind, ReplaceRows.kind):
            if SCALE_KEYS & entry.keys():
                self.complain("E-SCALE", "R-024", f"{what}: a {kind} has no {sorted(SCALE_KEYS & entry.keys())}")
            return Scaling()
        if "scaling" in entry and not isinstance(rule, str):
            self.complain("E-MANIFEST", "R-020", f"{what}.scaling must be a string")
            return Scaling()
        for key in ("alpha", "scale"):
            if key in entry and (not isinstance(entry[key], int | float) or isinstance(entry[key], bool)):
                self.complain("E-MANIFEST", "R-020", f"{what}.{key} must be a number")
                return Scaling()
        if "rank" in entry and not is_int(rank):
            self.complain("E-MANIFEST", "R-020", f"{what}.rank must be a whole number")
            return Scaling()
        if rank is not None and not 1 <= rank <= MAX_RANK:
            self.complain("E-LIMIT", "R-016", f"{what}: rank {rank} is not within 1 to {MAX_RANK:,}")
            return Scaling()
        if scale is None or (rule != "none" and rule not in RULES) or (alpha is None) != (rule == "none"):
            self.complain(
                "E-SCALE",
                "R-024",
                f"{what} needs a scale, a scaling among none, {', '.join(RULES)}, and alpha unless none",
            )
            return Scaling()
        whole = kind == Add.kind or {"w1", "w2"} <= parts.keys()
        if kind == Add.kind and (rule != "none" or rank is not None):
            self.complain("E-SCALE", "R-024", f"{what}: an add has scaling none, and no rank")
        elif parts and whole != (rank is None):
            self.complain("E-RANK", "R-026", f"{what}: rank is {rank}, its tensors have {'none' if whole else 'one'}")
        elif whole and rule not in ("none", "alpha"):
            self.complain("E-RANK", "R-026", f"{what}: scaling {rule} needs a rank, its tensors have none")
        elif not math.isfinite(scale) or not math.isfinite(alpha or 0) or not _agrees(scale, rule, alpha, rank):
            self.complain("E-SCALE", "R-025", f"{what}: scale {scale} is not {rule} of alpha {alpha}, rank {rank}")
        return Scaling(rule, rank, None if alpha is None else float(alpha), float(scale))

    def base(self, entry: dict[str, Any], updates: list[Targeted]) -> BaseIdentity:
        self.known_keys("base", entry, BASE_KEYS)
        texts = {name: entry[name] for name in ("name", "revision", "architecture", "tokenizer") if name in entry}
        tensors, tokens = entry.get("tensors", {}), entry.get("added_tokens", {})
        if not all(isinstance(text, str) for text in texts.values()) or not isinstance(tensors, dict):
            self.complain("E-BASE", "R-040", f"base: {', '.join(texts) or 'names'} must be strings, tensors an object")
            return BaseIdentity()
        if "tokenizer" in texts and not DIGEST.fullmatch(texts["tokenizer"]):
            self.complain("E-BASE", "R-040", f"base.tokenizer is {texts['tokenizer']!r:.80}, not a digest")
        if not isinstance(tokens, dict) or not all(map(_is_size, tokens.values())):
            self.complain("E-BASE", "R-040", "base.added_tokens must give token numbers from 0")
            tokens = {}
        shapes = {item.target.name: item.target.shape for item in updates}
        resized = {u.target.name for u in updates if u.update.kind == Replace.kind and u.target.covers_all}
        found = {}
        for target, value in tensors.items():
            identity = self.identity(f"base.tensors[{target!r}]", value, {*IDENTITY_KEYS, "parts"})
            if identity is None:
                continue
            if target not in shapes and not self.problems:
                self.complain("E-BASE", "R-040", f"base.tensors names {target!r}, which no update changes")
            elif target in shapes and shapes[target] != identity.shape and not (target in resized or identity.parts):
                self.complain("E-BASE", "R-040", f"base.tensors and the updates give {target!r} different shapes")
            found[target] = identity
        return BaseIdentity(tensors=found, added_tokens=tokens, **texts)

    def identity(self, what: str, value: object, keys: Collection[str]) -> TensorIdentity | None:
        """What a stored tensor of the base is; None, and a complaint, where that is not said."""
        if not isinstance(value, dict):
            self.complain("E-BASE", "R-040", f"{what} needs digest, dtype and shape")
            return None
        self.known_keys(what, value, keys)
        digest, dtype, shape, others = (value.get(key) for key in (*IDENTITY_KEYS, "parts"))
        good = isinstance(digest, str) and DIGEST.fullmatch(digest) and isinstance(dtype, str) and dtype in DTYPE_BITS
        if not good or not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
            self.complain("E-BASE", "R-040", f"{what} needs digest, dtype and shape")
            return None
        if "parts" not in value or "parts" not in keys:
            return TensorIdentity(str(digest), str(dtype), tuple(shape))
        if not isinstance(others, dict) or not others:
            self.complain("E-BASE", "R-040", f"{what}.parts must name the tensors beside it")
            return None
        parts = {name: self.identity(f"{what}.parts[{name!r}]", part, IDENTITY_KEYS) for name, part in others.items()}
        known = {name: part for name, part in parts.items() if part is not None}
        return TensorIdentity(str(digest), str(dtype), tuple(shape), known)


def _is_size(value: object) -> bool:
    return is_int(value) and 0 <= value <= 2**53  # type: ignore[operator]  # is_int has looked


def _agrees(scale: float, rule: str, alpha: float | None, rank: int | None) -> bool:
    if rule == "none" or alpha is None:
        return True
    expected = RULES[rule](alpha, rank or 1)
    return abs(scale - expected) <= abs(expected) * 2**-40
