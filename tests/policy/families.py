"""Every architecture that a pin loads or converts, as a catalogue of tensors: names and shapes from the pin's sources.

    python tests/policy/families.py [TREE...]

prints, for each architecture of the trees (default: those that have been fetched), the share of its bytes that each
APEX tier leaves to the base type's mixture without meaning to.

Names and shapes are from the loader (`create_tensor` in src/models/*.cpp), or from gguf-py's lists for tensors that are
only converted.
A catalogue includes all alternatives of a family, dense layers and experts, attention and SSM; shares refer to their
sum.
"""

from __future__ import annotations

import ast
import operator
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf

from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.quantizable import n_dims, quantizable
from apex_build.hookspecs import PolicySpec
from apex_build.plugins import load_plugins
from apex_build.policy import render, sandbox

LAYERS = 32  # two of them are laid out, and count for all
_LAID_OUT = 2
_CALL = re.compile(r"create_tensor\(\s*tn\(\s*LLM_(TENSOR_\w+)((?:\s*,\s*[^,()]+)*)\s*\)\s*,\s*\{([^{}]*)\}")
_QKV = re.compile(r"create_tensor_qkv\(\s*layer\s*,\s*\w+\s*,\s*([^,]+),\s*([^,]+),\s*([^,]+),\s*([^,)]+)")
_CLASS = re.compile(r"struct (llama_model_\w+) : public (llama_model_\w+) \{")
_LOADED = re.compile(r"((?:case LLM_ARCH_\w+:\s*)+)\{?\s*return new (llama_model_\w+)\(")
_BODY = re.compile(r"^void (llama_model_\w+)::load_arch_tensors\(.*?^\}", re.DOTALL | re.MULTILINE)

# Extents of a model of some 10^9 weights; a name that is not here is one of the many small ranks and groups.
_SMALL = 512
_EXTENTS = {
    **dict.fromkeys(
        ("n_embd", "hidden_size", "n_embd_out", "moe_n_embd", "n_embd_inp", "n_embd_backbone", "attn_hidden_size"), 2048
    ),
    **dict.fromkeys(("n_ff", "n_ff_cur", "ffn_size", "intermediate_size", "ffn_intermediate_size", "n_ffn_up"), 5632),
    **dict.fromkeys(("n_ff_exp", "n_ff_exp_i", "n_ff_shexp", "n_ff_shexp_actual", "n_ff_chexp"), 768),
    **dict.fromkeys(("n_vocab", "n_vocab_out", "n_vocab_draft", "n_draft_vocab", "n_target_vocab"), 131072),
    **dict.fromkeys(("d_inner", "ssm_intermediate_size", "value_dim", "n_embd_q", "n_embd_q_il", "projected"), 4096),
    **dict.fromkeys(("n_expert", "n_chunk_expert"), 64),
    **dict.fromkeys(("n_head", "n_head_l", "n_head_i", "q_num_heads", "num_heads", "num_attention_heads"), 16),
    **dict.fromkeys(("n_head_kv", "k_num_heads", "n_v_heads", "o_groups", "n_group"), 4),
    **dict.fromkeys(("n_head_qkv",), 24),
    **dict.fromkeys(
        ("n_embd_head_k", "n_embd_head_v", "n_embd_head", "head_dim", "head_size", "v_head_dim", "v_dim", "qk_dim"), 128
    ),
    **dict.fromkeys(("n_embd_head_qk_nope", "n_embd_head_v_mla", "n_embd_head_k_kda", "n_embd_head_v_kda"), 128),
    **dict.fromkeys(("n_embd_head_k_mla", "qk_head_dim"), 192),
    **dict.fromkeys(("n_embd_head_qk_rope", "qk_rope_head_dim", "n_rot"), 64),
    **dict.fromkeys(
        ("d_conv", "ssm_d_conv", "ssm_conv_kernel_size", "n_shortconv_l_cache", "ple_conv_kernel", "kernel"), 4
    ),
    **dict.fromkeys(("n_expert_shared", "n_token_types", "n_cls_out", "coff", "hc", "hc_mult", "n_altup"), 2),
    "n_layer": LAYERS,
    "n_expert_used": 8,
    "n_ctx_train": 4096,
    "n_embd_per_layer": 256,
    "n_embd_altup": 256,
    "hc_dim": 4096,
}
# of what only the converter's lists have: biases and tables that it stores under no other suffix
_VECTORS = ("norm", "exp_probs_b", "attn_rot_embd", "rope_f", ".ffn.weight", "ffn.act")
_OPERATORS: Mapping[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
}


def families(tree: Path) -> dict[str, list[Tensor]]:
    """Architecture -> its tensors, for two layers. Tensors that the loader does not create get the shape of the same
    name elsewhere.
    """
    constants = runpy.run_path(str(tree / "gguf-py" / "gguf" / "constants.py"))
    names = _names(tree)
    loaded = {arch: _created(tree, body, names) for arch, body in _loaders(tree).items()}
    usual: dict[str, tuple[int, ...]] = {}
    for shapes in loaded.values():
        for name, shape in shapes.items():
            usual.setdefault(name, shape)
    for arch, tensors in constants["MODEL_TENSORS"].items():
        own = loaded.setdefault(constants["MODEL_ARCH_NAMES"][arch], {})
        for tensor in tensors:
            if tensor not in constants["TENSOR_NAMES"]:
                continue  # one of the newest pin's has no name anywhere
            name = constants["TENSOR_NAMES"][tensor].replace("{bid}", "%d").replace("{xid}", "%d") + ".weight"
            own.setdefault(name, usual.get(name) or _by_name(name))
    return {arch: list(_tensors(arch, shapes)) for arch, shapes in sorted(loaded.items()) if shapes}


def model_of(arch: str, tensors: list[Tensor]) -> Model:
    head_layers = int(any(tensor.draft_head for tensor in tensors))
    return Model(Path(f"{arch}.gguf"), (), arch, arch, _LAID_OUT, head_layers, 64, 8, None, {}, tuple(tensors))


def unexplained(model: Model, policy: PolicySpec) -> tuple[float, list[str]]:
    """The share of bytes, and the names, without a rule, except those that tiers leave to the mixture on purpose."""
    left: list[str] = []
    n_left, n_bytes = 0.0, 0.0
    types = _rules(model, policy)
    for tensor in model.tensors:
        if not quantizable(tensor.name, tensor.shape):
            n_bytes += _n_bytes(tensor, "F32" if n_dims(tensor.shape) == 1 else "F16")
            continue
        own = _n_bytes(tensor, types.get(tensor.name, _main_type(policy.base_type)))
        n_bytes += own
        if tensor.name not in types and tensor.role not in ("embedding", "output"):
            n_left += own
            left.append(tensor.name)
    return n_left / n_bytes, left


def _rules(model: Model, policy: PolicySpec) -> dict[str, str]:
    """Tensor -> type by the policy's template, rendered in this process: our own templates need no sandbox."""
    names = {tensor.name for tensor in model.tensors if quantizable(tensor.name, tensor.shape)}
    values = {name: parameter.default for name, parameter in policy.parameters.items()}
    request = render._request(policy, model, names, None)
    parameters = {name.replace(".", "_"): value for name, value in values.items()}
    made, seen = sandbox.environment(request["library"]), sandbox.views(request["catalogue"])
    text, _ = sandbox.render(made, request["template"], {**seen, **parameters})
    lines = (line.partition("=") for line in text.splitlines() if line and not line.startswith("#"))
    exactly = {sandbox.exactly(name): name for name in names}
    return {exactly[pattern]: type_name for pattern, _, type_name in lines}


def _main_type(base_type: str) -> str:
    return re.sub(r"_[SML]$", "", base_type) if base_type.startswith("Q") else base_type


def _n_bytes(tensor: Tensor, type_name: str) -> float:
    block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    laid_out_for = LAYERS / _LAID_OUT if tensor.layer is not None and not tensor.draft_head else 1
    return tensor.n_elements * n_bytes / block * laid_out_for


def _tensors(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """A family with `nextn` tensors gets a draft head of one block, with everything that a block may have."""
    role_of = load_plugins().role_of
    head = any(".nextn." in name for name in shapes)
    for name, shape in shapes.items():
        layers = range(_LAID_OUT if ".nextn." in name else 0, _LAID_OUT + head)
        for layer in layers if "blk.%d." in name else (None,):
            full = name.replace("%d", str(layer or 0), 1).replace("%d", "0")
            role = role_of(arch, full) or "other"
            assert isinstance(role, str)
            yield Tensor(full, shape[: n_dims(shape)], "F16", 0, role, layer, (layer or 0) >= _LAID_OUT)


@cache
def _names(tree: Path) -> Mapping[str, str]:
    """TENSOR_ATTN_Q -> blk.%d.attn_q"""
    text = (tree / "src" / "llama-arch.cpp").read_text()
    listed = text[text.index("LLM_TENSOR_NAMES = {") :]
    return dict(re.findall(r'\{\s*LLM_(TENSOR_\w+)\s*,\s*"([^"]+)"', listed[: listed.index("};")]))


def _loaders(tree: Path) -> dict[str, str]:
    """Architecture -> the code that creates its tensors, or its parent's."""
    arch_names = dict(
        re.findall(r'\{\s*(LLM_ARCH_\w+)\s*,\s*"([^"(]+)"', (tree / "src" / "llama-arch.cpp").read_text())
    )
    parents = dict(_CLASS.findall((tree / "src" / "models" / "models.h").read_text()))
    bodies = {
        found[1]: found[0]
        for file in sorted((tree / "src" / "models").glob("*.cpp"))
        for found in _BODY.finditer(file.read_text())
    }
    made: dict[str, str] = {}
    for cases, owner in _LOADED.findall((tree / "src" / "llama-model.cpp").read_text()):
        while owner not in bodies and owner in parents:
            owner = parents[owner]
        for case in re.findall(r"LLM_ARCH_\w+", cases):
            made[arch_names[case]] = bodies.get(owner, "")
    return made


def _created(tree: Path, body: str, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Name (with %d for numbers) -> extents, for all weights that this code may create."""
    body = re.sub(r"(\w)\((?:i|il|bid)?\)", r"\1", body)  # hparams.n_ff(i)
    found: dict[str, tuple[int, ...]] = {}
    for tensor, arguments, extents in _CALL.findall(body):
        suffix = re.search(r'"(\w+)"', arguments)
        if suffix is None or suffix[1] == "weight":
            found.setdefault(
                names[tensor] + (".weight" if suffix else ""),
                tuple(_extent(text) for text in extents.split(",") if text.strip()),
            )
    for width, *parts in _QKV.findall(body):
        q, k, v = (_extent(part) for part in parts)
        for name, rows in (("attn_qkv", q + k + v), ("attn_q", q), ("attn_k", k), ("attn_v", v)):
            found.setdefault(f"blk.%d.{name}.weight", (_extent(width), rows))
    if "create_tensor_gate_up_exps" in body:
        wide = (_EXTENTS["n_embd"], _EXTENTS["n_ff_exp"], _EXTENTS["n_expert"])
        found.update({f"blk.%d.ffn_{part}_exps.weight": wide for part in ("gate", "up", "gate_up")})
    return found


def _extent(text: str) -> int:
    """Evaluate an expression such as `n_embd_head_k * n_head` with the table."""
    plain = re.sub(r"hparams\.(?:\w+\.)*(\w+)", r"\1", text.strip())
    plain = re.sub(r"\b(\d+)u\b", r"\1", plain)
    return max(_value(ast.parse(plain, mode="eval").body), 1)


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        value: int = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        return value
    if isinstance(node, ast.Name):
        return _EXTENTS.get(node.id, _SMALL)
    assert isinstance(node, ast.Constant) and isinstance(node.value, int), ast.dump(node)
    return node.value


def _by_name(name: str) -> tuple[int, ...]:
    """The shape of a tensor that only the converter knows."""
    return (2048,) if any(part in name for part in _VECTORS) else (2048, 2048)


def main(trees: list[Path]) -> None:
    plugins = load_plugins()
    policies = [policy for policy in plugins.policies().values() if policy.plugin == "apex" and not policy.needs]
    for tree in trees:
        print(f"{tree.name}: {len(families(tree))} architectures, {len(policies)} tiers")
        for arch, tensors in families(tree).items():
            model = model_of(arch, tensors)
            shares = {policy.name: unexplained(model, policy) for policy in policies}
            most = max(shares, key=lambda name: shares[name][0])
            share, names = shares[most]
            parts = sorted({re.sub(r"^blk\.\d+\.", "", name) for name in names})
            print(f"{arch:24} {len(tensors):4} tensors  {share:7.3%}  {most if share else '':12} {' '.join(parts)}")


if __name__ == "__main__":
    from apex_build.source.pins import all_pins
    from apex_build.source.tree import tree_path

    main([Path(given) for given in sys.argv[1:]] or [tree_path(pin) for pin in all_pins() if tree_path(pin).is_dir()])
