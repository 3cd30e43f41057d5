"""The rules of llama-quantize's --tensor-type-file: parsing what a template rendered, and refusing rules that would
not work as written.

llama-quantize reads `pattern=type` words, lower-cases the pattern, and searches (not matches) it in each tensor's name;
the first rule that is found wins. It has no comments, and ignores a rule that matches nothing
(tools/quantize/quantize.cpp, src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from apex_build.errors import TemplateFailed, TypeUnknown
from apex_build.gguf_model.catalogue import Tensor
from apex_build.native.ggml import Ggml
from apex_build.parameters import writable_type
from apex_build.policy.render import Places, find, only_name
from apex_build.policy.sandbox import exactly
from apex_build.printable import printable

_OPTIONAL = "optional"
_WARNING = re.compile(r"\s*#\s*warning:\s*(\S.*)")
_BLOCK = re.compile(r"blk\.\d+\.")
_MOST_WARNINGS, _LONGEST_WARNING = 8, 400


@dataclass(frozen=True)
class Rule:
    """One line. `where`: the template's file and line, or another name of its place, for messages."""

    pattern: str
    type: str
    where: str
    optional: bool = False

    @property
    def line(self) -> str:
        return f"{self.pattern}={self.type}"


def parse_rules(lines: Iterable[tuple[str, str]], ggml: Ggml) -> tuple[Rule, ...]:
    """Rules from (text, place) lines. Blank lines and `# comments` are left out; `# optional` allows a rule to find no
    tensor.

    Raises TemplateFailed for a line that is not a rule, TypeUnknown for its type; both name the place.
    """
    rules = []
    for line, where in lines:
        text, _, comment = line.partition("#")
        text = text.strip()
        if not text:
            continue
        pattern, equals, type_name = text.partition("=")
        if not equals or not pattern or not type_name or " " in text or not text.isprintable():
            raise TemplateFailed(f"{where}: {text!r:.200} is not of the form pattern=type, without spaces")
        if pattern != pattern.lower():
            raise TemplateFailed(
                f"{where}: '{pattern}': llama-quantize lower-cases patterns, which changes the meaning of this one"
            )
        try:
            if only_name(pattern) is None:
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise TemplateFailed(f"{where}: '{pattern}' is not a regular expression: {error}") from None
        try:
            rules.append(Rule(pattern, writable_type(type_name, ggml), where, comment.strip() == _OPTIONAL))
        except TypeUnknown as error:
            raise TypeUnknown(f"{where}: {error.message} (in the rule '{text}')", hint=error.hint) from None
    return tuple(rules)


def apply_rules(
    rules: Sequence[Rule],
    tensors: Sequence[Tensor],
    quantizable: Collection[str] | None = None,
    places: Mapping[str, Places] | None = None,
) -> dict[str, Rule]:
    """Tensor name -> the rule that decides for it. Only tensors that would be quantized count (None: all). `places`:
    where the patterns are found, if that is known (`render.find`).

    Raises TemplateFailed for a rule that finds no tensor, or finds by accident: one that cuts a word of a name
    (`attn_q` in `attn_qkv`, `blk.1` in `blk.12`), or is not anchored and finds tensors of several roles. A pattern for
    a whole block is fine: `blk\\.6\\.`.
    """
    deciding: dict[str, Rule] = {}
    if places is None:
        places = find((rule.pattern for rule in rules), [tensor.name for tensor in tensors])
    for rule in rules:
        if not places[rule.pattern] and not rule.optional:
            hint = "end the line with '# optional' if that is right"
            raise TemplateFailed(
                f"{rule.where}: the pattern '{rule.pattern}' matches no tensor of the model", hint=hint
            )
        found = [(tensors[index], start, end) for index, start, end in places[rule.pattern]]
        counted = [one for one in found if quantizable is None or one[0].name in quantizable]
        _refuse_accidents(rule, counted)
        for tensor, _, _ in counted:
            deciding.setdefault(tensor.name, rule)
    return deciding


def idle_rules(rules: Sequence[Rule], deciding: Mapping[str, Rule]) -> list[str]:
    """Warnings for rules without effect. A line for one tensor that an earlier line names too may be overruled."""
    used, named = {id(rule) for rule in deciding.values()}, {exactly(name) for name in deciding}
    idle = [rule for rule in rules if id(rule) not in used and not rule.optional and rule.pattern not in named]
    why = "earlier rules decide for the tensors that it matches, or llama-quantize copies them"
    return [f"{rule.where}: the rule '{rule.line}' decides for no tensor: {why}" for rule in idle]


def fitted(deciding: Mapping[str, Rule], tensors: Sequence[Tensor], ggml: Ggml) -> tuple[tuple[str, Rule], ...]:
    """For tensors whose rows cannot hold their rule's type, a rule to put before it: the nearest type that they can
    hold.
    """
    return tuple(
        (tensor.name, Rule(exactly(tensor.name), _nearest(tensor, rule.type, ggml), rule.where))
        for tensor in tensors
        if (rule := deciding.get(tensor.name)) and tensor.shape[0] % ggml.type_traits(rule.type).block_size
    )


def _nearest(tensor: Tensor, wanted: str, ggml: Ggml) -> str:
    """The smallest type that fits and has at least as many bits; if no block fits, the tensor keeps its type."""
    bits = ggml.type_traits(wanted).bits_per_weight
    for name in ("IQ4_NL", "Q5_0", "Q8_0"):
        traits = ggml.type_traits(name)
        if traits.bits_per_weight >= bits and tensor.shape[0] % traits.block_size == 0:
            return name
    return tensor.type if tensor.type in ("F16", "BF16") else "F16"


def policy_warnings(lines: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The policy's own warnings: its `# warning: TEXT` lines."""
    found = (_WARNING.match(line) for line, _ in lines)
    return tuple(printable(one[1])[:_LONGEST_WARNING] for one in found if one)[:_MOST_WARNINGS]


def rules_text(rules: Sequence[Rule]) -> str:
    """The file for llama-quantize: rules only, one a line."""
    return "".join(f"{rule.line}\n" for rule in rules)


def _refuse_accidents(rule: Rule, found: Sequence[tuple[Tensor, int, int]]) -> None:
    if all((start, end) == (0, len(tensor.name)) for tensor, start, end in found) or _whole_block(found):
        return
    roles: dict[str, str] = {}
    for tensor, start, end in found:
        roles.setdefault(tensor.role, tensor.name)
        if _inside_word(tensor.name, start) or _inside_word(tensor.name, end):
            raise TemplateFailed(
                f"{rule.where}: the pattern '{rule.pattern}' also matches '{tensor.name}', in the middle of a word",
                hint="anchor it and escape its dots: ^blk\\.3\\.attn_q\\.weight$ ; in a template, {{ tensor.name | "
                "exactly }}",
            )
    if len(roles) > 1:
        names = ", ".join(f"{name} ({role})" for role, name in sorted(roles.items()))
        raise TemplateFailed(
            f"{rule.where}: the pattern '{rule.pattern}' is not anchored and finds tensors of several roles: {names}",
            hint="anchor it with ^ and $, or write a line for each role",
        )


def _whole_block(found: Sequence[tuple[Tensor, int, int]]) -> bool:
    """Whether every match is a name's beginning up to the dot after a block's number."""
    return all(start == 0 and _BLOCK.fullmatch(tensor.name[:end]) for tensor, start, end in found)


def _inside_word(name: str, at: int) -> bool:
    return 0 < at < len(name) and name[at - 1].isalnum() and name[at].isalnum()
