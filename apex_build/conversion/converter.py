"""What the pinned source's converter supports, read from its code without running it: architectures, pre-tokenizers,
draft heads.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import ConversionFailed

# Keys of config.json that promise a draft head, by the family that has them: Qwen3.5 and 3.6; GLM, DeepSeek and their
# kin.
HEAD_KEYS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_TEXT, _OTHER = "TEXT_MODEL_MAP", "MMPROJ_MODEL_MAP"
_QWEN_SWITCH, _SWITCH = "_Qwen35MtpMixin", "supports_mtp_export"  # code that adds --no-mtp, in older and newer trees


@dataclass(frozen=True)
class Family:
    """The converter's code for one architecture.

    `writes_heads`: it can write a draft head. `head_keys`: what it looks for in the config; empty if it looks for
    none (a separate count). `can_omit_head`: it takes --no-mtp.
    """

    writes_heads: bool
    head_keys: frozenset[str]
    can_omit_head: bool


def architectures(source: Path) -> tuple[str, ...]:
    """What the source's converter can convert: the keys of TEXT_MODEL_MAP in conversion/__init__.py."""
    return tuple(_modules(source, _TEXT))


def has_other_file(source: Path, architecture: str) -> bool:
    """Whether the converter makes a second file from such a checkpoint, for vision or audio (mmproj)."""
    return architecture in _modules(source, _OTHER)


def pre_tokenizers(source: Path) -> tuple[str, ...]:
    """Values of `tokenizer.ggml.pre` that the source's llama.cpp understands: src/llama-vocab.cpp."""
    return tuple(sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', _read(source / "src" / "llama-vocab.cpp")))))


def quantizations(source: Path) -> tuple[str, ...]:
    """Methods of `quantization_config.quant_method` that the converter undoes: conversion/base.py."""
    return tuple(sorted(set(re.findall(r'quant_method == "([^"]+)"', _read(source / "conversion" / "base.py")))))


def family(source: Path, architecture: str) -> Family:
    """The class registered for the architecture, with its ancestors."""
    module = _modules(source, _TEXT)[architecture]
    classes = list(_lineage(source, module, architecture))
    names = {node.name for node in classes}
    text: set[str] = set()
    called: set[str] = set()
    for node in (inner for one in classes for inner in ast.walk(one)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text.add(node.value)
        elif isinstance(node, ast.Attribute):
            called.add(node.attr)
        elif isinstance(node, ast.Name):
            called.add(node.id)
    return Family(
        "add_nextn_predict_layers" in called,
        frozenset(text) & frozenset(HEAD_KEYS),
        _QWEN_SWITCH in names or _SWITCH in called,
    )


def _modules(source: Path, name: str) -> dict[str, str]:
    tree = ast.parse(_read(source / "conversion" / "__init__.py"))
    for node in tree.body:
        if (
            isinstance(node, ast.AnnAssign)
            and getattr(node.target, "id", "") == name
            and isinstance(node.value, ast.Dict)
        ):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {
                str(key.value): str(value.value)
                for key, value in pairs
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
            }
    raise ConversionFailed(f"{source} has another converter than this verb knows: no {name} in conversion/__init__.py")


def _lineage(source: Path, module: str, architecture: str) -> Iterator[ast.ClassDef]:
    """The registered class and its ancestors within the converter."""
    rest = [(module, _registered(_tree(source, module), architecture))]
    seen: set[str] = set()
    while rest:
        where, node = rest.pop()
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        yield node
        tree = _tree(source, where)
        for base in node.bases:
            name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
            place = _imported_from(tree, name) or where
            rest.append((place, _class(_tree(source, place), name)))


def _registered(tree: ast.Module, architecture: str) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                words = decorator.args if isinstance(decorator, ast.Call) else []
                if any(isinstance(word, ast.Constant) and word.value == architecture for word in words) and not _sees(
                    node
                ):
                    return node
    return None


def _sees(node: ast.ClassDef) -> bool:
    """A class for the second file of the same architecture is registered under the same name."""
    return any("mmproj" in ast.unparse(base).lower() or "vision" in ast.unparse(base).lower() for base in node.bases)


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _imported_from(tree: ast.Module, name: str) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and any(item.name == name for item in node.names):
            return node.module
    return None


@functools.lru_cache(maxsize=16)
def _tree(source: Path, module: str) -> ast.Module:
    return ast.parse(_read(source / "conversion" / f"{module}.py"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConversionFailed(f"{path} cannot be read: {error.strerror}", hint="apex source verify") from None
