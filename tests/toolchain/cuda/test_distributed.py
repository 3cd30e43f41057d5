"""sccache's distributed mode on one machine: a scheduler and two servers compile C++ and CUDA for one of our builds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tiny_cuda import SPARK, make_cuda_source, tiny_plan
from waiting import until

from apex_build.errors import CompilerMissing
from apex_build.native.run import run_tool, start, stop
from apex_build.toolchain.build.launcher import launcher, sccache
from apex_build.toolchain.build.run import build
from apex_build.toolchain.cuda.toolkit import CudaToolkit

LOCAL = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        return int(listener.getsockname()[1])


def answers(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOCAL, int(address.rpartition(":")[2]))) == 0


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Path]:
    """Start a scheduler with two servers; yields the client's configuration."""
    program = sccache()
    dist = program.with_name("sccache-dist") if program else None
    bwrap = shutil.which("bwrap")
    if dist is None or not os.access(dist, os.X_OK):
        pytest.skip("the sccache of this environment comes without sccache-dist")
    if bwrap is None or os.geteuid():
        pytest.skip("a server of sccache-dist needs bubblewrap (bwrap) and root; this machine has not both")
    client, secret = (
        run_tool([dist, "auth", kind]).lines[-1] for kind in ("generate-shared-token", "generate-jwt-hs256-key")
    )
    scheduler = f"{LOCAL}:{free_port()}"
    config = tmp_path / "scheduler.conf"
    config.write_text(
        f'public_addr = "{scheduler}"\n[client_auth]\ntype = "token"\ntoken = "{client}"\n'
        f'[server_auth]\ntype = "jwt_hs256"\nsecret_key = "{secret}"\n'
    )
    commands = [[str(dist), "scheduler", "--config", str(config)]]
    for number in (1, 2):
        address, folder = f"{LOCAL}:{free_port()}", tmp_path / f"server{number}"
        (folder / "build").mkdir(parents=True)
        token = run_tool(
            [dist, "auth", "generate-jwt-hs256-server-token", "--secret-key", secret, "--server", address]
        ).lines[-1]
        config = folder / "server.conf"
        config.write_text(
            f'cache_dir = "{folder}/toolchains"\npublic_addr = "{address}"\nscheduler_url = "http://{scheduler}"\n'
            f'[builder]\ntype = "overlay"\nbuild_dir = "{folder}/build"\nbwrap_path = "{bwrap}"\n'
            f'[scheduler_auth]\ntype = "jwt_token"\ntoken = "{token}"\n'
        )
        commands.append([str(dist), "server", "--config", str(config)])
    settings = tmp_path / "client.conf"
    settings.write_text(
        f'[dist]\nscheduler_url = "http://{scheduler}"\ntoolchains = []\ncache_dir = "{tmp_path}/client"\n'
        f'[dist.auth]\ntype = "token"\ntoken = "{client}"\n'
    )
    children: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with (tmp_path / f"{number}.log").open("wb") as output:
                children.append(
                    start(command, cwd=tmp_path, env={"SCCACHE_NO_DAEMON": "1", "SCCACHE_LOG": "info"}, output=output)
                )
            if number == 0:  # a server asks the scheduler once
                until(partial(answers, scheduler), children[0])
        try:
            until(lambda: (tmp_path / "0.log").read_text().count("Registered new server") == 2, seconds=30)
        except AssertionError:
            pytest.skip("the servers of sccache-dist do not start here: " + (tmp_path / "1.log").read_text()[-300:])
        yield settings
    finally:
        for child in children:
            stop(child)


def test_a_build_on_two_servers(
    farm: Path, toolkit: CudaToolkit, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX_SCCACHE_CONF", str(farm))
    built = build(tiny_plan(make_cuda_source(tmp_path / "source"), SPARK), jobs=4)
    assert built.counts
    print(built.counts)
    assert built.counts["elsewhere"] >= 5  # tool.cpp, and of each .cu file at least the device code and the host code
    assert built.toolset.manifest["cuda"]["device_code"]["sm_121a"] == {"objects": 2, "kernels": 2}


def test_a_configuration_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APEX_SCCACHE_CONF", "nowhere.conf")
    with (
        pytest.raises(CompilerMissing, match=r"names 'nowhere\.conf', and there is no such file"),
        launcher(tmp_path, [tmp_path]),
    ):
        pass
