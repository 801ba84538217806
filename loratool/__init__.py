"""LoRA adapters as one exact, versioned file: extract, inspect, merge, unmerge."""

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted, TensorIdentity
from loratool.api import (
    convert,
    extract,
    inspect,
    iter_merged,
    load,
    merge,
    open_merged,
    plan,
    save,
    unmerge,
    validate,
)
from loratool.convert import ConvertReport
from loratool.errors import (
    AnswerIsNo,
    ChoiceNeeded,
    InvalidFile,
    LoratoolError,
    Mismatch,
    OutputRefused,
    Problem,
    Unsupported,
)
from loratool.extract import ExtractReport
from loratool.merge import MergeReport, Progress, UnmergeReport
from loratool.plan import Plan
from loratool.summary import Summary
from loratool.tensors import TensorRef
from loratool.version import __version__
from loratool.virtual import MergedFile, MergedFolder, MergedSlice

__all__ = [
    "Adapter",
    "AnswerIsNo",
    "BaseIdentity",
    "ChoiceNeeded",
    "ConvertReport",
    "ExtractReport",
    "InvalidFile",
    "LoratoolError",
    "MergeReport",
    "MergedFile",
    "MergedFolder",
    "MergedSlice",
    "Mismatch",
    "OutputRefused",
    "Plan",
    "Problem",
    "Progress",
    "Summary",
    "Target",
    "Targeted",
    "TensorIdentity",
    "TensorRef",
    "UnmergeReport",
    "Unsupported",
    "__version__",
    "convert",
    "extract",
    "inspect",
    "iter_merged",
    "load",
    "merge",
    "open_merged",
    "plan",
    "save",
    "unmerge",
    "validate",
]
