"""The patched tools on a device whose memory the host cannot read: ggml's RPC backend, served by this machine's CPU.

Regarding access to tensors it behaves like a GPU: a pointer into such memory would crash or give other numbers. Where
there is a GPU that the tools can use (APEX_TOOLS=BUILD names a CUDA build), everything runs on it too.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf_edit import changed, copy
from waiting import until

from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset

# ggml loads what GGML_BACKEND_PATH names when it meets -dev
_CLIENT = """
#include "ggml-rpc.h"
#include <cstdlib>
extern "C" ggml_backend_reg_t ggml_backend_init(void) {
    return ggml_backend_rpc_add_server(std::getenv("TEST_DEVICE"));
}
"""

_SERVER = """
import sys, cffi
ffi = cffi.FFI()
ffi.cdef("void * ggml_backend_dev_by_type(int);")
ffi.cdef("void ggml_backend_rpc_start_server(const char *, const char *, size_t, size_t, void **);")
cpu = ffi.dlopen(sys.argv[1]).ggml_backend_dev_by_type(0)
ffi.dlopen(sys.argv[2]).ggml_backend_rpc_start_server(sys.argv[3].encode(), ffi.NULL, 1, 1, ffi.new("void *[]", [cpu]))
"""


Numbers = npt.NDArray[np.floating[Any]]
GPUS = ["CUDA0"] if shutil.which("nvidia-smi") else []


@dataclass(frozen=True)
class Device:
    """`name`: as -dev takes it. `exact`: it computes as the host does, so that only the order of additions differs."""

    name: str
    environment: dict[str, str]
    exact: bool

    def alike(self, here: Numbers, there: Numbers) -> bool:
        """Whether two arrays of sums, or of scores, agree as far as the device allows."""
        if self.exact:
            return np.allclose(here, there, rtol=5e-6, atol=0)
        return bool(np.abs(here - there).sum() <= 0.01 * np.abs(here).sum())


@pytest.fixture(scope="module", params=["RPC0", *GPUS])
def device(
    request: pytest.FixtureRequest, tools: Toolset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Device]:
    if request.param == "RPC0":
        with served(tools, tmp_path_factory.mktemp("device")) as environment:
            yield Device("RPC0", environment, exact=True)
        return
    listed = subprocess.run([tools.tool("llama-perplexity"), "--list-devices"], capture_output=True, text=True).stdout
    if f"{request.param}:" not in listed:
        pytest.skip(f"these tools cannot use {request.param}: APEX_TOOLS=BUILD names a CUDA build")
    yield Device(request.param, dict(os.environ), exact=False)


@contextmanager
def served(tools: Toolset, folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which the tools find the device RPC0."""
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin

    ggml, library = ensure_source(load_pin()) / "ggml", folder / "libclient.so"
    (folder / "client.cpp").write_text(_CLIENT)
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{ggml}/include",
        f"-I{ggml}/src",
    ]
    sources = sorted(path for path in (ggml / "src" / "ggml-rpc").glob("*.cpp") if "apple" not in path.name)
    command += ["-o", str(library), str(folder / "client.cpp"), *map(str, sources)]
    subprocess.run([*command, str(tools.library("ggml-base"))], check=True, capture_output=True)

    for _ in range(10):
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        served = [sys.executable, "-c", _SERVER, str(tools.library("ggml")), str(library), f"127.0.0.1:{port}"]
        server = subprocess.Popen(served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(partial(answers_or_ended, server, port))
            if server.poll() is None:
                yield {**os.environ, "GGML_BACKEND_PATH": str(library), "TEST_DEVICE": f"127.0.0.1:{port}"}
                return
        finally:
            server.kill()
            server.wait()
    raise AssertionError("the RPC server ends at once, on ten ports")


def answers_or_ended(server: subprocess.Popen[bytes], port: int) -> bool:
    """Another program may have taken the port."""
    with socket.socket() as probe:
        return server.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0


def run(tool: Path, *arguments: object, device: Device | None = None) -> str:
    """`-dev` goes first, because it makes the tool look for the device; without one, no GPU is used."""
    command = [tool, "-dev", device.name if device else "none", *arguments, "-t", 1]
    environment = device.environment if device else None
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, errors="replace", env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert not device or f"using device {device.name} (" in ran.stdout + ran.stderr, "the device was not used"
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("layers", [99, 3], ids=["the whole model", "half of it"])
def test_the_imatrix_is_summed_up_there(
    layers: int, device: Device, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    tool, common = (
        tools.tool("llama-imatrix"),
        ["-m", testbed, "-f", heldout / "code.txt", "-c", 256, "-b", 1024, "--chunks", 6],
    )
    run(tool, *common, "--mtp", "-o", tmp_path / "host.gguf")
    said = run(tool, *common, "--mtp", "-ngl", layers, "-v", "-o", tmp_path / "device.gguf", device=device)
    host, there = read_imatrix(tmp_path / "host.gguf"), read_imatrix(tmp_path / "device.gguf")
    assert host.head_tokens == there.head_tokens == 6 * 256
    assert host.entries.keys() == there.entries.keys()
    summed = set(re.findall(rf"adding up (\S+) on {device.name}", said))
    assert "is not supported by" not in said
    for name, entry in host.entries.items():
        found = there.entries[name]
        assert sum(entry.counts) == sum(found.counts), name
        # other kernels round otherwise, and then a router may pick another expert
        assert np.allclose(entry.counts, found.counts, rtol=0, atol=0 if device.exact else 5), name
        assert device.alike(entry.values(), found.values()), name
        if device.exact and name not in summed:
            assert layers < 99 and np.array_equal(entry.values(), found.values()), name
    assert {name.split(".")[1] for name in summed} >= ({"0", "3", "6"} if layers == 99 else {"5", "6"})


def test_sums_that_stay_on_the_device_are_continued_and_saved_in_between(
    device: Device, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    tool, common = (
        tools.tool("llama-imatrix"),
        ["-m", testbed, "-f", heldout / "code.txt", "-c", 256, "-b", 256, "-ngl", 99, "-v"],
    )
    whole, three, rest = (tmp_path / f"{name}.gguf" for name in ("whole", "three", "rest"))
    run(tool, *common, "--mtp", "--chunks", 6, "--save-frequency", 3, "-o", whole, device=device)
    run(tool, *common, "--mtp", "--chunks", 3, "-o", three, device=device)
    run(tool, *common, "--mtp", "--chunk", 3, "--chunks", 3, "--in-file", three, "-o", rest, device=device)
    for one, other in ((whole, rest), (three, Path(f"{whole}.at_3"))):
        a, b = read_imatrix(one), read_imatrix(other)
        assert a.head_tokens == b.head_tokens and a.entries.keys() == b.entries.keys()
        for name, entry in a.entries.items():
            assert entry.counts == b.entries[name].counts, name
            assert np.array_equal(entry.values(), b.entries[name].values()), name


def test_a_value_on_the_device_that_is_not_finite_is_refused_when_it_is_saved(
    device: Device, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    model = changed(
        testbed, tmp_path / "spoilt.gguf", lambda name, values: values * np.nan if name == "blk.5.ssm_a" else values
    )
    assert model.read_bytes() != testbed.read_bytes()
    command = [
        tools.tool("llama-imatrix"),
        "-dev",
        device.name,
        "-ngl",
        99,
        "-m",
        model,
        "-f",
        heldout / "code.txt",
        "-c",
        256,
    ]
    command += ["--chunks", 3, "-t", 1, "-o", tmp_path / "out.gguf"]
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, errors="replace", env=device.environment
    )
    assert ran.returncode == 1
    assert "nan detected in blk.5." in ran.stdout + ran.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_the_scores_of_the_head_are_the_same(
    device: Device, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    tool, common = tools.tool("llama-perplexity"), ["-m", testbed, "-f", heldout / "code.txt", "-c", 256, "-b", 1024]
    common += ["--chunks", 6, "--mtp", "--mtp-output-file"]
    run(tool, *common, tmp_path / "host.csv")
    run(tool, *common, tmp_path / "device.csv", "-ngl", 99, "-v", device=device)
    if device.exact:
        assert (tmp_path / "host.csv").read_bytes() == (tmp_path / "device.csv").read_bytes()
        return
    host, there = (np.genfromtxt(tmp_path / f"{name}.csv", delimiter=",", skip_header=1) for name in ("host", "device"))
    assert host.shape == there.shape and np.isfinite(host).all()
    for column in range(host.shape[1]):
        assert device.alike(host[:, column], there[:, column]), column


@pytest.mark.parametrize("layers", [99, 3], ids=["the whole model", "half of it"])
def test_probed_tensors_are_quantized_and_put_back_there(
    layers: int, device: Device, tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path
) -> None:
    """With tied embeddings the table is on the host, and the output is a copy of it on the device."""
    tied = copy(testbed, tmp_path / "tied.gguf", keys={}, drop="output.weight")
    tool, common = tools.tool("llama-perplexity"), ["-m", tied, "-c", 128]
    run(tool, *common, "-f", heldout / "code.txt", "--chunks", 4, "--kl-divergence-base", tmp_path / "logits")
    (tmp_path / "probes.txt").write_text(
        "plain\nembeddings\ttoken_embd.weight=q2_K\nexperts\tblk.5.ffn_down_exps.weight=iq2_xxs\tblk.3.attn_q.weight=q3_K\n"
        "plain\n"
    )
    common += ["--kl-divergence", "--kl-divergence-base", tmp_path / "logits", "--imatrix", calibrated]
    common += ["--kl-divergence-probes", tmp_path / "probes.txt", "--kl-divergence-output"]
    run(tool, *common, tmp_path / "host.tsv")
    run(tool, *common, tmp_path / "device.tsv", "-ngl", layers, "-v", device=device)
    found = (tmp_path / "device.tsv").read_text()
    if device.exact:
        assert found == (tmp_path / "host.tsv").read_text()
    else:
        host, there = (np.genfromtxt(tmp_path / f"{name}.tsv", skip_header=1) for name in ("host", "device"))
        # by the reference of the host even the model as it is has a small divergence there
        assert np.allclose(host[4:12, 3], there[4:12, 3], rtol=0.05), (host, there)
        assert (np.abs(there[:4, 3]) < 0.05 * there[4:8, 3]).all(), there
    lines = [line.partition("\t")[2] for line in found.splitlines()[1:]]
    assert lines[:4] == lines[12:] and len(set(lines)) == 12
