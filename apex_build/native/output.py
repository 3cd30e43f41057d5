"""Parse what llama-imatrix, llama-perplexity, llama-quantize and llama-server print.

Pure functions of lines; None if a line is not of that kind.
The formats are those of tools/imatrix/imatrix.cpp, tools/perplexity/perplexity.cpp and src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apex_build.places import newer_build

_PLANNED = re.compile(
    r"(?:computing|calculating perplexity) over (\d+) chunks, n_ctx=(\d+), batch_size=(\d+), n_seq=(\d+)"
)
_MARK = re.compile(r"\[(\d+)\](?:-?(?:\d+\.\d+|nan|inf))?,")
_KLD_ROW = re.compile(r"\s*(\d+)\s+\d+\.\d+ ±\s+\S+\s+-?\d+\.\d+ ±")
_PROBES_PLANNED = re.compile(r"kl_divergence_probes: (\d+) probes$")
_PROBE = re.compile(r"kl_divergence_probes: (\d+)/\d+ ")
_PERPLEXITY = re.compile(r"Final estimate: PPL = (\d+\.\d+) \+/- (\d+\.\d+)")

_HEAD_ROWS = re.compile(r"MTP rows: ([a-z0-9_]+)$")

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+)\s+- \[([\d, ]+)\], type =\s+(\w+), (.*)")
_SIZES = re.compile(r"size =\s+(\d+\.\d+) MiB(?: ->\s+(\d+\.\d+) MiB)?(?: \((\w+)\))?$")
_CONVERTING = re.compile(r"converting to (\w+) \.\. ")
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\).*-> falling back "
    r"to\s+(\w+)"
)
_UNFIT = re.compile(r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\)")
_NO_FALLBACK = "no tensor type fallback is defined"
_PATTERN = re.compile(r"failed to quantize: (.*regular expression.*|.*regex.*)", re.IGNORECASE)
_FILE_TYPE = re.compile(r"\s*(\d+)\s+or\s+(\w+)\s*:")
_TOTAL = re.compile(r"quant size\s+=\s+(\d+\.\d+) MiB \((\d+\.\d+) BPW\)")
_CACHE = re.compile(r"llama_kv_cache\w*: size =\s+(\d+\.\d+) MiB \(\s*\d+ cells,\s+(\d+) layers")
_STATE = re.compile(r"llama_memory_recurrent: size =\s+(\d+\.\d+) MiB")
_COMPUTE = re.compile(r"sched_reserve:\s+\S+ compute buffer size =\s+(\d+\.\d+) MiB")
_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_DRAFT = re.compile(r"\| accepted +(\d+)/ *(\d+) draft tokens( \(restore checkpoint\))?")
_DEVICE = re.compile(r"  [A-Za-z]+\d+: (.+) \(\d+ MiB, \d+ MiB free\)$")
_LOADS = re.compile(r"projected to use \d+ MiB|you need at least \d+ tokens")
_MISSING_DATA = re.compile(r"Missing importance matrix for tensor (\S+) in|- offending tensor: (\S+)")

# What a tool's failure means, first match wins: pattern, diagnosis (its groups filled in), hint ({newer}: how to get
# tools of a newer llama.cpp).
_DIAGNOSES = tuple(
    (re.compile(pattern), diagnosis, hint)
    for pattern, diagnosis, hint in (
        (
            r"error: invalid argument: (\S+)",
            "this build of the tool does not know {0}",
            "apex build, for tools with this project's patches",
        ),
        (r"No space left on device", "the disk is full", "free some space, or write to another disk"),
        (
            r"(?:failed|unable) to allocate|bad_alloc|Cannot allocate memory",
            "memory ran out",
            "use a smaller context or batch",
        ),
        (
            r"unknown model architecture: '([^']*)'",
            "the pinned llama.cpp does not know the architecture {0!r}",
            "{newer}",
        ),
        (
            r"model is corrupted or incomplete",
            "the model file is cut short or damaged",
            "download or convert it again, then: apex inspect FILE",
        ),
        (
            r"you need at least (\d+) tokens",
            "the text is too short: {0} tokens are needed",
            "give more text, or a smaller context",
        ),
        (
            r"the MTP head of this architecture can not be evaluated$",
            "the MTP head of this architecture can not be evaluated",
            "leave the head out: --only NAME, an evaluator that needs no head (apex evaluate --list), or calibrate "
            "with --no-mtp",
        ),
        (
            r"unknown pre-tokenizer type: '([^']*)'",
            "the pinned llama.cpp does not know the pre-tokenizer {0!r}",
            "{newer}; or convert again with: apex convert FOLDER --pre-tokenizer NAME",
        ),
        (r"couldn't bind HTTP server socket", "the server's port is taken", None),
        (r"error loading model: (.*)", "the model could not be loaded: {0}", None),
    )
)


# Warnings that tools print in their first seconds: pattern, our message.
_WARNINGS = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (
            r"no usable GPU found, --gpu-layers option will be ignored",
            "no usable GPU was found: --gpu-layers is ignored, everything runs on the CPU",
        ),
        (r"ggml_cuda_init: failed to initialize CUDA: (.*)", "CUDA cannot be used, the CPU does all: {0}"),
        (
            r"missing pre-tokenizer type, using: '([^']*)'",
            "the model names no pre-tokenizer: {0} is used, and words may be split wrongly",
        ),
        (
            r"GENERATION QUALITY WILL BE DEGRADED",
            "the model names no pre-tokenizer: words may be split wrongly; convert it again",
        ),
        (r"warning: failed to (mlock \d+-byte buffer[^:]*)", "the tool could not {0}"),
        (r"(lora for '[^']*' cannot use .*, fallback to CPU)", "{0}"),
    )
)


@dataclass(frozen=True)
class Planned:
    """A planned run over a text: chunks of `context` tokens, `sequences` of them a pass, `batch` tokens a batch."""

    chunks: int
    context: int
    batch: int
    sequences: int


@dataclass(frozen=True)
class Perplexity:
    value: float
    error: float  # standard error


@dataclass(frozen=True)
class TensorLine:
    """A tensor as llama-quantize lists it. `target` is `source` if it is copied. MiB as printed, so rounded: not for
    sums.
    """

    number: int
    total: int
    name: str
    shape: tuple[int, ...]  # ggml's order, four extents
    source: str  # types in upper case
    target: str
    mib_before: float
    mib_after: float
    without_data: bool = False  # an imatrix was given and has nothing for this tensor


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows cannot hold the requested type; llama-quantize used another without an error."""

    name: str
    columns: int
    block: int
    wanted: str
    taken: str


@dataclass(frozen=True)
class Allocations:
    """Bytes that a context takes, rounded to a hundredth of a MiB. `kv_layers`: number of layers with a KV cache."""

    kv_cache: int
    kv_layers: int
    recurrent_state: int
    compute_buffers: int


def planned(line: str) -> Planned | None:
    """The plan that llama-imatrix and llama-perplexity print before they start."""
    found = _PLANNED.search(line)
    return Planned(*(int(group) for group in found.groups())) if found else None


def chunks_done(line: str) -> int | None:
    """The last chunk that a (perhaps unfinished) line counts: `[11]5.3,[12]5.3412,` or a row of the KL divergence
    table. Of llama-imatrix --no-ppl it is `[11],[12],`.
    """
    if row := _KLD_ROW.match(line):
        return int(row[1])
    last = line.rfind("[")
    while last >= 0:
        if mark := _MARK.match(line, last):
            return int(mark[1])
        last = line.rfind("[", 0, last)
    return None


def probes_planned(line: str) -> int | None:
    """How many probes llama-perplexity --kl-divergence-probes is about to score."""
    return int(found[1]) if (found := _PROBES_PLANNED.search(line)) else None


def probes_done(line: str) -> int | None:
    return int(found[1]) if (found := _PROBE.search(line)) else None


def perplexity(line: str) -> Perplexity | None:
    found = _PERPLEXITY.search(line)
    return Perplexity(float(found[1]), float(found[2])) if found else None


def head_rows(line: str) -> str | None:
    """The hidden rows that llama-perplexity --mtp fed to the draft head, named as in gguf_model/mtp_rows.py."""
    found = _HEAD_ROWS.search(line)
    return found[1] if found else None


def tensors_done(line: str) -> tuple[int, int, str] | None:
    """llama-quantize's progress: number, total, name of the current tensor."""
    found = _TENSOR.match(line)
    return (int(found[1]), int(found[2]), found[3]) if found else None


def tensor_lines(lines: Sequence[str]) -> tuple[TensorLine, ...]:
    """All tensors that llama-quantize listed, in a real run or with --dry-run.

    A remark about missing calibration data may come between the two halves of a tensor's line. Without a second half
    the tensor is left out.
    """
    result: list[TensorLine] = []
    waiting: TensorLine | None = None
    for line in lines:
        rest = line
        if found := _TENSOR.match(line):
            shape = tuple(int(extent) for extent in found[4].split(","))
            source = found[5].upper()
            waiting = TensorLine(int(found[1]), int(found[2]), found[3], shape, source, source, 0.0, 0.0)
            rest = found[6]
        elif waiting and "did not find weights for" in line:
            waiting = replace(waiting, without_data=True)
        sizes = _SIZES.search(rest)
        if waiting and sizes:
            converting = _CONVERTING.search(rest)
            target = converting[1] if converting else sizes[3]
            before = float(sizes[1])
            after = float(sizes[2]) if sizes[2] else before
            result.append(
                replace(waiting, target=(target or waiting.source).upper(), mib_before=before, mib_after=after)
            )
            waiting = None
    return tuple(result)


def fallbacks(lines: Sequence[str]) -> tuple[Fallback, ...]:
    found = (_FALLBACK.search(line) for line in lines)
    return tuple(Fallback(f[1], int(f[2]), int(f[3]), f[4].upper(), f[5].upper()) for f in found if f)


def quantized_size(lines: Sequence[str]) -> tuple[float, float] | None:
    """(MiB, bits per weight) of all tensors together, as llama-quantize prints them at its end."""
    for line in reversed(lines):
        if found := _TOTAL.search(line):
            return float(found[1]), float(found[2])
    return None


def file_types(lines: Sequence[str]) -> dict[str, int]:
    """The types for a whole file that llama-quantize --help lists: name -> LLAMA_FTYPE."""
    listed = (_FILE_TYPE.match(line) for line in lines)
    return {found[2].upper(): int(found[1]) for found in listed if found}


def unfit_row(lines: Sequence[str]) -> tuple[str, int, int, str] | None:
    """The tensor that llama-quantize gave up on, because no type fits its rows: name, columns, block, type."""
    unfit = [found for line in lines if (found := _UNFIT.search(line))]
    if not unfit or not any(_NO_FALLBACK in line for line in lines):
        return None
    name, columns, block, type_name = unfit[-1].groups()
    return name, int(columns), int(block), type_name.upper()


def refused_pattern(lines: Sequence[str]) -> str | None:
    """llama-quantize's message about a pattern in its rules that it cannot read."""
    return next((found[1] for line in lines if (found := _PATTERN.search(line))), None)


def tensor_without_data(lines: Sequence[str]) -> str | None:
    """The tensor without calibration data that llama-quantize refused a low-bit type for."""
    for line in lines:
        if found := _MISSING_DATA.search(line):
            return found[1] or found[2]
    return None


def allocations(lines: Sequence[str]) -> Allocations:
    """What a context takes, from llama.cpp's debug output: all caches and devices together."""
    caches = [found for line in lines if (found := _CACHE.search(line))]
    return Allocations(
        sum(_mib(found[1]) for found in caches),
        sum(int(found[2]) for found in caches),
        sum(_mib(found[1]) for line in lines if (found := _STATE.search(line))),
        sum(_mib(found[1]) for line in lines if (found := _COMPUTE.search(line))),
    )


def _mib(text: str) -> int:
    return round(float(text) * (1 << 20))


def loads(line: str) -> bool:
    """Whether llama-perplexity, given a text that is too short, has understood the model's header by this line."""
    return _LOADS.search(line) is not None


def server_address(lines: Sequence[str]) -> str | None:
    """Where llama-server listens."""
    found = next((found for line in reversed(lines) if (found := _LISTENING.search(line))), None)
    return found[1] if found else None


def draft(line: str) -> tuple[int, int, bool] | None:
    """A draft that llama-server prints under LLAMA_TRACE (update_slots in server-context.cpp): tokens accepted and
    drafted, and whether a line about the same draft follows, cut to what was accepted.
    """
    found = _DRAFT.search(line)
    return (int(found[1]), int(found[2]), found[3] is not None) if found else None


HEAD_UNKNOWN = "the MTP head of this architecture can not be evaluated"


def head_left_out(line: str) -> bool:
    """Whether llama-imatrix says, before its first chunk, that it runs only the trunk."""
    return "ignoring --mtp" in line


def warning(line: str) -> str | None:
    """A warning in a tool's line that the user should see at once, in our words; None if there is none."""
    for pattern, words in _WARNINGS:
        if found := pattern.search(line):
            return words.format(*found.groups())
    return None


def explain(lines: Sequence[str]) -> tuple[str, str | None] | None:
    """What a tool's failure means, for `run_tool(explain=...)`: diagnosis and hint."""
    if tensor := tensor_without_data(lines):
        return (
            f"{tensor} has no calibration data, and its type needs it",
            "apex calibrate MODEL, which runs the draft head too",
        )
    for pattern, diagnosis, hint in _DIAGNOSES:
        for line in lines:
            if found := pattern.search(line):
                return diagnosis.format(*found.groups()), hint and hint.replace("{newer}", newer_build())
    return None


def device_listed(line: str) -> str | None:
    """The name of a GPU, from a line of --list-devices."""
    found = _DEVICE.fullmatch(line)
    return found[1] if found else None
