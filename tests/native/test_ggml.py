"""What libggml reports about its types, compared with gguf-py and with llama-quantize."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from apex_build.errors import BuildMissing, ShapeUnfit, TypeUnknown
from apex_build.native.ggml import Ggml
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset


def test_sizes_agree_with_gguf_py(tools: Toolset) -> None:
    ggml = Ggml(tools)
    for name in ggml.type_names():
        known = gguf.GGMLQuantizationType.__members__.get(name)
        if known is not None and name != "Q8_1":  # never in a file, and gguf-py is wrong about it
            traits = ggml.type_traits(name)
            assert (traits.block_size, traits.type_size) == gguf.GGML_QUANT_SIZES[known]
    assert {"F32", "F16", "BF16", "Q4_K", "IQ2_XXS", "IQ1_M", "TQ1_0", "MXFP4"} <= set(ggml.type_names())
    assert len(set(ggml.type_names())) == len(ggml.type_names())


def test_a_type(tools: Toolset) -> None:
    traits = Ggml(tools).type_traits("iq2_xxs")
    assert (traits.name, traits.block_size, traits.type_size, traits.quantized) == ("IQ2_XXS", 256, 66, True)
    assert traits.bits_per_weight == 2.0625
    assert not Ggml(tools).type_traits("F16").quantized


def test_bytes_of_a_row(tools: Toolset) -> None:
    ggml = Ggml(tools)
    assert ggml.row_bytes("Q4_K", 2048) == 8 * 144
    assert ggml.row_bytes("F32", 0) == 0
    with pytest.raises(ShapeUnfit, match="a row of 100 values cannot be Q4_K, whose blocks hold 256"):
        ggml.row_bytes("q4_k", 100)


def test_an_unknown_type_lists_near_names(tools: Toolset) -> None:
    with pytest.raises(TypeUnknown) as caught:
        Ggml(tools).type_traits("IQ2_XX")
    assert "IQ2_XX" in caught.value.message
    assert "IQ2_XXS" in str(caught.value.hint)


def test_who_needs_an_imatrix_is_what_the_tool_refuses(tools: Toolset, testbed: Path) -> None:
    """llama-quantize --dry-run tells whether the real run would need an imatrix: ask for each type, with one tensor."""
    ggml = Ggml(tools)
    for name in ggml.type_names():
        if not ggml.type_traits(name).quantized or name in ("Q8_1", "Q8_K"):
            continue
        override = f"^blk\\.0\\.ffn_up_shexp\\.weight$={name.lower()}"
        done = run_tool([tools.tool("llama-quantize"), "--dry-run", "--tensor-type", override, testbed, "Q8_0"])
        asked = any("will require an imatrix" in line for line in done.lines)
        assert asked == ggml.type_traits(name).requires_imatrix, name


def test_the_exceptions_of_llama_quantize(tools: Toolset) -> None:
    ggml = Ggml(tools)
    assert ggml.needs_imatrix("IQ2_XXS", "output.weight"), "the tool makes an exception, and the library aborts"
    assert not ggml.needs_imatrix("IQ2_S", "output.weight") and not ggml.needs_imatrix("IQ1_M", "token_embd.weight")
    assert ggml.needs_imatrix("IQ2_XXS", "blk.6.nextn.eh_proj.weight")
    assert not ggml.needs_imatrix("Q2_K", "blk.0.attn_q.weight", "Q2_K")
    assert ggml.needs_imatrix("Q2_K", "blk.0.attn_q.weight", "q2_k_s")
    assert ggml.type_traits("IQ3_XXS").requires_imatrix
    assert not ggml.type_traits("IQ3_XXS").library_requires_imatrix


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    with pytest.raises(BuildMissing, match="no library libggml-base"):
        Ggml(Toolset(tmp_path))
    (tmp_path / "bin" / "libggml-base.so").write_bytes(b"not a library")
    with pytest.raises(BuildMissing, match="cannot be used"):
        Ggml(Toolset(tmp_path))
