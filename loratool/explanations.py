"""What every error code means and what helps: shown by `loratool explain`, and the source of docs/errors.md."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from loratool.errors import ChoiceNeeded, Problem


@dataclass(frozen=True)
class Explanation:
    """One error code in words: what it says of the input, and what to do."""

    code: str
    meaning: str
    cure: str

    def to_json(self) -> dict[str, str]:
        return vars(self).copy()


_TEXTS: dict[str, tuple[str, str]] = {
    # -- what is asked of you
    "E-OPTION": (
        "An option does not fit what it is used on: it is unknown there, contradicts another one, answers a question"
        " that the files do not ask, or names something that is not there.",
        "The message says which option and why. Leave it out, or give one of the values that it lists.",
    ),
    "E-USAGE": (
        "The command line can not be understood: an unknown option, a missing argument, a value of the wrong kind.",
        "`loratool COMMAND --help` shows the arguments, with examples.",
    ),
    "E-ALPHA": (
        "The file holds the factors of a LoRA and not its alpha, so the scale is unknown. A merge with a guessed scale"
        " would be wrong without any sign of it.",
        "Give --alpha X with --scaling (alpha/rank is usual; the first edition of LLMs from scratch has alpha; rsLoRA"
        " alpha/sqrt(rank)), or --config with the adapter_config.json of the training.",
    ),
    "E-AMBIGUOUS": (
        "What is given can be read in more than one way: several conventions or weights files, or a name that fits"
        " several tensors of the base.",
        "The message lists the candidates. Choose with --from, --adapter or --map, or give the path of one file.",
    ),
    "E-ADAPTER": (
        "The file holds several adapters, or not the one that was named.",
        "Choose one of those listed with --adapter NAME.",
    ),
    # -- files that can not be read
    "E-MISSING": ("A path, or a file that belongs to it, is not there.", "Check the path; finish the download."),
    "E-READ": ("The operating system could not read a file.", "Check permissions and the disk."),
    "E-SUFFIX": ("The file is none that holds weights.", "Give a .safetensors, .bin, .pt, .pth, .gguf or .npz file."),
    "E-HEADER": (
        "The file does not begin as a safetensors file does: truncated, damaged, or something else.",
        "Download or save it again.",
    ),
    "E-TENSOR": (
        "A tensor's entry contradicts itself, or its dtype is unknown.",
        "Save the file again with the current release of its producer.",
    ),
    "E-JSON": ("A side file is not valid JSON in UTF-8.", "Correct it, or fetch it again."),
    "E-INDEX": (
        "The index of a sharded checkpoint and its shards disagree, or it points outside its folder.",
        "Finish the download; write the checkpoint again if it stays.",
    ),
    "E-PICKLE": (
        "A pickle holds something else than tensors and plain values, or can not be read. loratool never runs what is"
        " in a pickle.",
        "Save it as safetensors, or as a plain state dict with torch.save.",
    ),
    "E-EMPTY": ("There is no tensor in it, or tensors without a number.", "Gather sharded parameters before saving."),
    "E-DUPLICATE": ("One name stands for two things.", "Keep one of them."),
    "E-LIMIT": (
        "A header, a side file or a number in it is larger than anything real, or than the format allows.",
        "Check where the file comes from.",
    ),
    "E-NAMES": (
        "Tensor names do not fit together: parts of a layer without the rest, names that are no text, or two that"
        " differ only in a wrapper's prefix.",
        "Save the whole state dict, once.",
    ),
    "E-CHANGED": ("A file was changed while it was read.", "Run it again when nothing writes to the file."),
    "E-CLOSED": ("An object was used after it was closed.", "Open it again."),
    # -- what an adapter says
    "E-CONVENTION": (
        "None of the layouts that loratool knows matches: it may be a plain checkpoint, or an unknown trainer's file.",
        "`loratool inspect PATH` shows what is in it; if you know the layout, name it with --from.",
    ),
    "E-COMPONENTS": (
        "An update lacks a part (one of two factors, a magnitude), or has one that belongs to nobody.",
        "Take the file that the trainer wrote, whole.",
    ),
    "E-UNUSED": (
        "A tensor of the adapter belongs to no update, so a merge would lose it.",
        "Leave it out on purpose with --skip PATTERN if it is not needed.",
    ),
    "E-UNSUPPORTED": (
        "The input is understood, and a merge of it would be wrong or is not possible.",
        "The message says what to do instead, where there is something.",
    ),
    "E-CONFIG": (
        "A config contradicts the tensors, or itself, or has a key that is not known.",
        "Use the config that belongs to this adapter.",
    ),
    "E-RANK": (
        "The rank that is written down (in a config, or in the header) is not that of the factors: it is another"
        " adapter's, and so may alpha be.",
        "Use the config of this adapter.",
    ),
    "E-SCALE": (
        "Alpha, scaling rule and scale contradict each other, or are not finite. An adapter can say how strong it is in"
        " several places (.alpha tensors, adapter_config.json, the header's lora_alpha and its like); they have to"
        " agree.",
        "The message names both values and where each stands: --alpha with one of them settles it. Otherwise write the"
        " right alpha into the file.",
    ),
    "E-SHAPE": (
        "Shapes do not fit: of the factors to each other, or of the update to the base's tensor.",
        "Check that this is the adapter's base; --allow-new permits resized tensors.",
    ),
    "E-RANGE": ("Rows, an expert or an index lie outside the tensor.", "Check that this is the adapter's base."),
    "E-OVERLAP": (
        "Two updates change the same elements in a way whose sum is not defined, such as two replacements.",
        "Merge only one of the adapters.",
    ),
    "E-NONFINITE": (
        "NaN or infinity, stored in the adapter or computed from it.",
        "Train or download it again; a smaller weight helps where a sum overflows.",
    ),
    "E-DTYPE": ("A tensor is of a dtype that is not allowed there.", "Save it in a floating-point dtype."),
    "E-LAYOUT": (
        "It can not be told how the base stores a matrix ([out, in] or [in, out]); in a safetensors file, that its"
        " tensors leave holes or overlap.",
        "Give the base with --base, or say it with --layout PATTERN=in_out (or out_in).",
    ),
    # -- adapter and base
    "E-TARGET": (
        "The base has no tensor that an update is for.",
        "Is it the adapter's base, whole, in the layout that it was trained on? `loratool inspect ADAPTER --base BASE`"
        " compares; --map FILE leads names to others; --allow-new adds whole tensors; --skip leaves some out.",
    ),
    "E-BESIDE": (
        "A weights file lies beside the adapter's own, and it can not be said what it changes: what was trained in it"
        " would be lost. Files that a trainer keeps for itself (optimizer, scheduler, random states) are known.",
        "Leave it out with --skip and its name, if the model is to do without it.",
    ),
    "E-TOKENIZER": (
        "The tokenizer of the output is not clear: two adapters bring different ones, or one has tokens that the"
        " merged vocabulary has no rows for.",
        "Say whose to take: --tokenizer-from base, adapter, or a folder.",
    ),
    "E-CONDITIONAL": (
        "The adapter acts on some inputs only (an activated LoRA, a prompt, a router): merged, it would always act.",
        "Load it beside the base in a program that knows such adapters; `loratool convert` keeps the condition where"
        " the layout has a place for it.",
    ),
    "E-BASE-MISMATCH": (
        "The adapter knows the digests of the base it was trained on, and this is another one.",
        "Merge into the base it was trained on.",
    ),
    "E-NOT-PINNED": (
        "With --require-pinned every adapter has to prove its base, and this one holds no digests of it.",
        "`loratool pin ADAPTER --base BASE -o NEW` writes the digests of a base that you trust.",
    ),
    "E-BASE": ("What the adapter says of its base is malformed.", "Write the adapter again."),
    "E-MAP": ("A map of names leads nowhere here, or is not valid.", "Correct the file, or leave out --map."),
    "E-TIED": (
        "Two names are one tensor (embedding and head), and their updates differ or only one was trained.",
        "Merge with --allow-new, which gives the head a tensor of its own; where the message does not name it, save the"
        " base with untied embeddings first: tie_word_embeddings=False in transformers.",
    ),
    "E-WRAPPED": (
        "The base is itself an adapter, or a checkpoint with LoRA layers in it.",
        "Are the arguments swapped? Else `loratool extract WRAPPED --base-out DIR` writes the clean base.",
    ),
    "E-MERGED": (
        "The base has the receipt of a merge: merging into it again would add up.",
        "Merge all adapters at once into the original base, or `loratool unmerge` it first. Where an adapter was"
        " trained on the merged model, merge with --onto-merged puts it on top.",
    ),
    "E-NO-CHANGE": (
        "An adapter, or the whole merge, would change no bit: its scale, weight or factors are zero, or every change is"
        " smaller than the steps of the output's dtype.",
        "Give the alpha it was trained with, or a wider --dtype; --allow-unchanged merges it as it is.",
    ),
    "E-NO-BASE": (
        "The file is an adapter without base weights, so there is nothing to extract it from.",
        "Merge and inspect take it as it is; extract --base BASE binds it to a base.",
    ),
    "E-QUANTISED": (
        "The base's weights are quantised in a way that can not be merged into, or is not known.",
        "Merge into the 16-bit model that it was made from, or dequantise with --dtype bf16 where the message says so.",
    ),
    # -- merged checkpoints
    "E-RECEIPT": (
        "There is no receipt of a merge, it is broken, or it contradicts what was given.",
        "Restore the file, or merge again from the base.",
    ),
    "E-UNDO": ("The undo record is broken, or belongs to another merge.", "Give the right record, or --base instead."),
    "E-NOT-EXACT": (
        "Without the base the merge can not be taken out, or not to the bit.",
        "Give --base BASE, or --undo RECORD if the merge wrote one.",
    ),
    # -- outputs
    "E-EXISTS": (
        "The output exists already, or its folder does not.",
        "Name another with -o; --force replaces a file, or a folder with a model or an adapter in it.",
    ),
    "E-OUTPUT": (
        "The output can not have this name or place: NAME.safetensors and the like are files, any other name a folder.",
        "The message says which it can have.",
    ),
    "E-DISK": ("Writing failed, or is not permitted there.", "Write to another folder or disk."),
    "E-SPACE": ("The disk has less room than is to be written.", "Free some space, or write elsewhere."),
    "E-STDOUT": ("The result could not be printed.", "Check where the output goes."),
    "E-MEMORY": ("The work needs more memory than --max-memory allows.", "Allow more."),
    "E-WORKER": ("A worker of an executor is lost, or runs another release.", "Start it again, with equal releases."),
    "E-INTERRUPTED": ("It was interrupted.", "Nothing unfinished was left behind; run it again."),
    "E-BUG": ("A bug in loratool.", "LORATOOL_DEBUG=1 shows the traceback; please report it."),
    # -- the native file, for those who write one
    "E-MANIFEST": ("The manifest is missing, or a value in it has the wrong type.", "Write the file again."),
    "E-VERSION": ("It is of a version of the format that this release does not know.", "Install a newer loratool."),
    "E-FEATURE": ("It needs a feature of the format that this release does not know.", "Install a newer loratool."),
    "E-UNKNOWN-KEY": ("The manifest has a key that the format does not define there.", "Write the file again."),
    "E-KIND": ("An update is of a kind that this release does not know.", "Install a newer loratool."),
    "E-CANONICAL": (
        "The file can be read, and is not in the one form that writers must give it.",
        "`loratool convert FILE --to native -o NEW` writes it in that form.",
    ),
}

EXPLANATIONS = {code: Explanation(code, meaning, cure) for code, (meaning, cure) in _TEXTS.items()}


def explain(code: str) -> Explanation:
    """What an error code means. Case and the leading ``E-`` do not matter. Raises ChoiceNeeded for an unknown one."""
    name = code.strip().upper().removeprefix("ERROR[").removesuffix("]")
    name = name if name.startswith("E-") else f"E-{name}"
    if name in EXPLANATIONS:
        return EXPLANATIONS[name]
    near = difflib.get_close_matches(name, EXPLANATIONS, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`loratool explain` lists them all"
    raise ChoiceNeeded(Problem("E-OPTION", f"there is no error code {code!r:.60}", hint=hint))
