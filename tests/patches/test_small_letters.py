"""What llama-quantize leaves behind and prints, and where the tools look for backends."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from architectures import write_model

from apex_build.native.toolset import Toolset
from apex_build.source.pins import load_pin
from apex_build.source.series import read_series

_MARK = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { FILE * f = fopen("ran", "w"); if (f) fclose(f); }
"""
SUBJECTS = {letter.subject for letter in read_series(load_pin())}


def needs(subject: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(subject not in SUBJECTS, reason=f"the series of {load_pin().name} has no {subject!r}")


def quantize(tools: Toolset, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [tools.tool("llama-quantize"), *arguments, 1]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace", cwd=cwd)


@needs("llama : never leave a quantized file with an empty header")
def test_a_failed_run_leaves_nothing(tools: Toolset, testbed: Path, headless_imatrix: Path, tmp_path: Path) -> None:
    """The head has no data, and is quantized last."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there before")
    ran = quantize(tools, "--imatrix", headless_imatrix, testbed, out, "IQ2_XXS")
    assert ran.returncode and "Missing importance matrix" in ran.stdout + ran.stderr
    assert out.read_bytes() == b"what was there before" and [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@needs("llama : never leave a quantized file with an empty header")
def test_a_pipe_stays_a_pipe(tools: Toolset, testbed: Path) -> None:
    ran = quantize(tools, testbed, "/dev/null", "Q8_0")
    assert ran.returncode == 0 and Path("/dev/null").is_char_device() and not Path("/dev/null.part").exists()


@needs("llama : say which tensors an imatrix has no data for")
def test_tensors_without_data_are_summed_up(
    tools: Toolset, testbed: Path, headless_imatrix: Path, tmp_path: Path
) -> None:
    ran = quantize(tools, "--imatrix", headless_imatrix, testbed, tmp_path / "out.gguf", "Q4_K_M")
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0
    lines = re.findall(r"did not find weights for (\S+)", said)
    head = [name for name in lines if name.startswith("blk.6.")]
    assert len(head) == 11, "all but the two that are not quantized"
    assert re.search(
        rf"WARNING: the imatrix has no data for {len(lines)} of the quantized tensors \(\d+\.\d\d MiB\): {lines[0]}, ",
        said,
    )
    assert "WARNING: 11 of them belong to the MTP head, see --mtp of llama-imatrix" in said


@needs("llama : quantize attn_output_a of deepseek4 with an imatrix")
def test_a_matrix_that_is_loaded_as_several(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    model = write_model("deepseek4", testbed, tmp_path / "model.gguf")
    command = [tools.tool("llama-imatrix"), "-m", model, "-f", heldout / "code.txt", "-c", 128, "--chunks", 2, "-t", 1]
    subprocess.run(
        [str(part) for part in [*command, "-o", tmp_path / "imatrix.gguf", "--mtp"]], check=True, capture_output=True
    )
    ran = quantize(tools, "--imatrix", tmp_path / "imatrix.gguf", model, tmp_path / "out.gguf", "Q4_0")
    assert ran.returncode == 0 and (tmp_path / "out.gguf").is_file(), ran.stdout[-1000:]


@needs("ggml : do not load backends from the current directory")
def test_a_library_in_the_current_folder_is_not_loaded(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """Stock tools run it, even those with all backends built in; it could be in a folder with a downloaded model."""
    source, here = tmp_path / "backend.c", tmp_path / "downloaded"
    here.mkdir()
    source.write_text(_MARK)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(here / "libggml-blas.so"), str(source)], check=True)
    command = [tools.tool("llama-perplexity"), "-m", testbed, "-f", source, "-t", "1"]
    subprocess.run([str(part) for part in command], cwd=here, capture_output=True)
    assert not (here / "ran").exists()
