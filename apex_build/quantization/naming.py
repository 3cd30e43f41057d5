"""Names of quantized files, as their readers understand them.

Clients read the quantization from the end of a file's name, each by its own rule: the model hub's parser looks for the
last name of a llama.cpp file type in it, with one group of letters behind it (`Q4_K_M_COMPACT`); llama.cpp's downloader
takes the last word after `-` or `.`, of letters, digits and `_`. A tag TYPE_LETTERS at the end is one quantization for
both, and differs for each policy and its parameters (tests/quantization/test_naming.py tries both).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from apex_build.errors import OutputUnwritable, ParameterUnknown
from apex_build.hookspecs import PolicySpec
from apex_build.near import nearby
from apex_build.parameters import BASE_TYPE
from apex_build.places import model_stem
from apex_build.policy.plan import TYPE_LIST, Entry, Plan
from apex_build.storage.digests import sha256_json

TEMPLATE = "{model}-{tag}"
# llama.cpp's file types: what parsers look for. A tensor type that is not among them takes its usual mixture's name:
# Q4_K is Q4_K_M.
_NAMES = """
F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ1_S IQ1_M
IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XS IQ3_XXS IQ3_S IQ3_M IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0
"""
FILE_TYPES = tuple(_NAMES.split())
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
_SOURCE = re.compile(rf"[-_.](FP?32|FP?16|BF16|{'|'.join(FILE_TYPES)}|{'|'.join(_ALIASES)})$", re.IGNORECASE)
_POLICY = re.compile(r"[a-z]+(-[a-z]+)*")
_LETTERS = 4  # of the digest for parameters


def type_of_most_weights(plan: Plan) -> str:
    """The file type for the name: what people expect of size and quality.

    By bytes a few weights in a larger type may outnumber all others: a 35B by i-micro has 39 % of its bytes in Q3_K and
    32 % in IQ1_M, and at 2.3 bits per weight nobody would call it Q3_K_M.
    """
    return _most(plan, lambda entry: entry.n_elements)


def type_of_most_bytes(plan: Plan) -> str:
    """The file type of most bytes, for `general.file_type`."""
    return _most(plan, lambda entry: entry.n_bytes)


def _most(plan: Plan, amount: Callable[[Entry], int]) -> str:
    totals: dict[str, int] = {}
    for entry in plan.entries:
        totals[entry.type] = totals.get(entry.type, 0) + amount(entry)
    return file_type_of(max(totals, key=lambda name: totals[name]))


def file_type_of(tensor_type: str) -> str:
    return _ALIASES.get(tensor_type, tensor_type)


def tag(plan: Plan, policy: PolicySpec) -> str:
    """IQ2_XXS_INANO; with parameters that are not the defaults, four letters of their digest behind an X:
    IQ2_XXS_INANOXFKQB.
    """
    kind = type_of_most_weights(plan)
    letters = policy.name.replace("-", "").upper()
    if not _POLICY.fullmatch(policy.name):  # another policy may have the same letters
        letters = re.sub("[^A-Z]", "", letters) + _digest(policy.name)
    changed = changed_parameters(plan, policy)
    said = {
        name
        for name, value in changed.items()
        if policy.base_type == f"{{{name}}}" and file_type_of(value.upper()) == kind
    }
    told = {name: value for name, value in changed.items() if name not in said}
    return f"{kind}_{letters}" + (f"X{_digest(sha256_json(told))}" if told else "")


def changed_parameters(plan: Plan, policy: PolicySpec) -> dict[str, str]:
    """Parameters that differ from the policy's defaults, as texts."""
    defaults = {name: parameter.default for name, parameter in policy.parameters.items()}
    changed = {name: str(plan.parameters[name]) for name, value in defaults.items() if plan.parameters[name] != value}
    usual = re.sub(r"\{([\w.]+)\}", lambda found: str(plan.parameters.get(found[1], found[0])), policy.base_type)
    if plan.base_type != usual.upper():
        changed[BASE_TYPE] = plan.base_type
    if TYPE_LIST in plan.parameters:
        changed[TYPE_LIST] = str(plan.parameters[TYPE_LIST])
    return changed


def file_name(model: Path, plan: Plan, policy: PolicySpec, template: str = TEMPLATE) -> str:
    """The name of a file: `{model}`, without the type that it had, `{tag}`, `{type}`, `{policy}`.

    Raises ParameterUnknown for another field, OutputUnwritable for an invalid name.
    """
    fields = {
        "model": source_stem(model),
        "tag": tag(plan, policy),
        "type": type_of_most_weights(plan),
        "policy": policy.name,
    }

    def fill(found: re.Match[str]) -> str:
        if found[1] not in fields:
            has = ", ".join(f"{{{field}}}" for field in fields)
            raise ParameterUnknown(f"--name: there is no {found[0]}{nearby(found[1], fields)}; there are {has}")
        return fields[found[1]]

    name = re.sub(r"\{(\w*)\}", fill, template)
    name = name if name.endswith(".gguf") else f"{name}.gguf"
    if "/" in name or not name.isprintable() or name.startswith("."):
        raise OutputUnwritable(f"--name {template}: {name!r} is not the name of a file", hint="give the folder with -o")
    return name


def source_stem(path: Path) -> str:
    """The model's name without its type, such as F16, which does not apply to files made from it."""
    stem = model_stem(path)
    return _SOURCE.sub("", stem) or stem


def _digest(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "".join(chr(ord("A") + number // 26**place % 26) for place in range(_LETTERS))
