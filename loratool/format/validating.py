"""What a validator finds in a file beyond the duties of a reader: canonical form, and the values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loratool.adapter import Adapter, Targeted
from loratool.container import Header, canonical_order, encode_header, read_header
from loratool.errors import LoratoolError, Problem
from loratool.format import info
from loratool.format.keys import METADATA_KEY
from loratool.format.reading import Parsed, parse
from loratool.format.writing import canonical_json, features_of
from loratool.tensors import FLOATS, TensorRef, all_finite


def validate(path: Path) -> list[Problem]:
    """Every rule of the spec that a file breaks, the writer's duties and the values included; [] for a valid file."""
    try:
        header = read_header(path)
    except LoratoolError as error:
        if error.code == "E-READ":
            raise  # no finding about the file: there is none
        return list(error.problems)
    try:
        parsed = parse(header)
    except LoratoolError as error:
        return [*error.problems, *_canonical(header, None)]
    return [*_canonical(header, parsed), *_values(parsed.adapter, str(path))]


def _canonical(header: Header, parsed: Parsed | None) -> Iterator[Problem]:
    where = str(header.path)
    if parsed:
        yield from info.untyped(parsed.adapter.info, where)
        wanted = sorted(features_of(parsed.adapter))
        if parsed.manifest["features"] != wanted:
            yield Problem(
                "E-FEATURE",
                f"features are {parsed.manifest['features']}, the updates use {wanted}",
                where,
                rule="R-017",
            )
        if canonical_json(parsed.manifest) != header.metadata[METADATA_KEY]:
            yield Problem("E-CANONICAL", "the manifest is not in canonical JSON (RFC 8785)", where, rule="R-050")
    entries = [(name, tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()]
    if list(header.tensors) != canonical_order((name, dtype) for name, dtype, _ in entries):
        yield Problem("E-CANONICAL", "tensors are not in canonical order", where, rule="R-052")
    metadata = {name: text for name, text in header.metadata.items() if name == METADATA_KEY}
    metadata |= info.kept(header.metadata)
    if metadata.keys() != header.metadata.keys():
        found = sorted(header.metadata.keys() - metadata.keys())
        what = f"the metadata has {found[0]!r}: beside {METADATA_KEY!r} stand names with a dot and ss_ names only"
        yield Problem("E-CANONICAL", what, where, rule="R-051")
    elif metadata and encode_header(entries, metadata)[8:] != header.text.encode("utf-8"):
        yield Problem("E-CANONICAL", "the header is not in canonical form", where, rule="R-051")


def _values(adapter: Adapter, where: str) -> Iterator[Problem]:
    for item in adapter.updates:
        for part, tensor in item.update.components().items():
            if tensor.dtype in FLOATS:
                if not all_finite(tensor.read()):
                    yield Problem(
                        "E-NONFINITE",
                        f"component {part} of {item.target.name} has NaN or infinity",
                        where,
                        rule="R-033",
                    )
            elif part in item.update.index_components and (problem := check_index(item, tensor)) is not None:
                yield Problem(problem.code, problem.message, where, rule=problem.rule)


def check_index(item: Targeted, index: TensorRef) -> Problem | None:
    """Rule R-034: the rows to replace are increasing and inside the tensor."""
    rows = index.read().tolist()
    if rows == sorted(set(rows)) and rows and rows[0] >= 0 and rows[-1] < item.target.shape[0]:
        return None
    return Problem(
        "E-RANGE",
        f"the row index is not increasing within 0..{item.target.shape[0] - 1}",
        item.target.name,
        rule="R-034",
    )
