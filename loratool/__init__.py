"""LoRA adapters as one exact, versioned file: extract, inspect, merge, unmerge."""

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted, TensorIdentity
from loratool.api import (
    apply,
    convert,
    extract,
    inspect,
    iter_merged,
    load,
    merge,
    open_merged,
    pin,
    plan,
    save,
    status,
    unmerge,
    validate,
    verify,
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
from loratool.explanations import Explanation, explain
from loratool.extract import ExtractReport
from loratool.live import Handle, LiveReport
from loratool.merge import MergeReport, UnmergeReport
from loratool.plan import Plan
from loratool.status import Status
from loratool.summary import Summary
from loratool.tensors import TensorRef
from loratool.verify import VerifyReport
from loratool.version import __version__
from loratool.virtual import MergedFile, MergedFolder, MergedSlice
from loratool.workers import Progress

__all__ = [
    "Adapter",
    "AnswerIsNo",
    "BaseIdentity",
    "ChoiceNeeded",
    "ConvertReport",
    "Explanation",
    "ExtractReport",
    "Handle",
    "InvalidFile",
    "LiveReport",
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
    "Status",
    "Summary",
    "Target",
    "Targeted",
    "TensorIdentity",
    "TensorRef",
    "UnmergeReport",
    "Unsupported",
    "VerifyReport",
    "__version__",
    "apply",
    "convert",
    "explain",
    "extract",
    "inspect",
    "iter_merged",
    "load",
    "merge",
    "open_merged",
    "pin",
    "plan",
    "save",
    "status",
    "unmerge",
    "validate",
    "verify",
]
