"""The user's pip configuration: index, proxy, certificates. apex-build names no host and has no such settings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from unearth.auth import MultiDomainBasicAuth
from unearth.fetchers.sync import PyPIClient

from apex_build.errors import DownloadFailed

# pip's own order: a command's section of its files overrides [global], the environment overrides both.
_SECTIONS = ("global", "install", "download", ":env:")


@dataclass(frozen=True)
class PipConfig:
    """pip's options that matter for finding and fetching a file. `index_url` None is pip's default index."""

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    no_index: bool = False
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    timeout: float = 15.0
    retries: int = 5


def read_pip_config() -> PipConfig:
    """Ask pip (`pip config list`), which knows its files and variables; without pip, only the PIP_* variables are
    used.
    """
    for command in ([sys.executable, "-m", "pip"], [shutil.which("pip") or ""]):
        if not command[0]:
            continue
        try:
            done = subprocess.run(
                [*command, "config", "list"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                stdin=subprocess.DEVNULL,
                cwd="/",  # python -m looks in the current folder first
                env={**os.environ, **_absolute("PIP_CONFIG_FILE")},
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return parse_pip_config(done.stdout)
        if "No module named pip" not in done.stderr:
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise DownloadFailed(
                f"pip cannot read its own configuration; it said: {said[0]}", hint="python -m pip config debug"
            )
    variables = (
        (key[4:].lower().replace("_", "-"), value) for key, value in os.environ.items() if key.startswith("PIP_")
    )
    return parse_pip_config("\n".join(f":env:.{key}={value!r}" for key, value in variables))


def _absolute(variable: str) -> dict[str, str]:
    given = os.environ.get(variable)
    return {variable: os.path.abspath(given)} if given else {}  # noqa: PTH100  os.devnull, too, stays what it is


def parse_pip_config(listing: str) -> PipConfig:
    """From the lines `section.key='value'` that `pip config list` prints."""
    sections: dict[str, dict[str, str]] = {name: {} for name in _SECTIONS}
    for line in listing.splitlines():
        match = re.fullmatch(r"([^.=\s]+)\.([A-Za-z0-9_-]+)=(.*)", line)
        if not match or match[1] not in sections:
            continue
        try:
            value = ast.literal_eval(match[3])
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, str) and value.strip():  # pip ignores empty values
            sections[match[1]][match[2].replace("_", "-").lower()] = value.strip()
    options: dict[str, str] = {}
    for name in _SECTIONS:
        options.update(sections[name])
    return PipConfig(
        index_url=options.get("index-url") or options.get("pypi-url"),
        extra_index_urls=tuple(options.get("extra-index-url", "").split()),
        find_links=tuple(options.get("find-links", "").split()),
        trusted_hosts=tuple(options.get("trusted-host", "").split()),
        no_index=options.get("no-index", "").lower() in ("1", "y", "yes", "t", "true", "on"),
        cert=options.get("cert"),
        client_cert=options.get("client-cert"),
        proxy=options.get("proxy"),
        timeout=_number(options, ("timeout", "default-timeout"), PipConfig.timeout),
        retries=int(_number(options, ("retries",), PipConfig.retries)),
    )


def _number(options: Mapping[str, str], names: tuple[str, ...], default: float) -> float:
    for name in names:
        try:
            return max(0.0, float(options[name]))
        except (KeyError, ValueError):
            continue
    return default


def open_session(config: PipConfig) -> PyPIClient:
    """An HTTP client that connects as pip would: certificates, proxy, trusted hosts; credentials from index URLs,
    netrc, keyring.
    """
    proxy = config.proxy if config.proxy is None or "://" in config.proxy else f"http://{config.proxy}"
    mounts: dict[str, httpx2.BaseTransport] = {}
    for host in config.trusted_hosts:
        # unearth's own transport for trusted hosts would bypass the proxy
        through = None if urllib.request.proxy_bypass(host) else proxy or urllib.request.getproxies().get("https")
        if through:
            mounts[f"all://{host}"] = httpx2.HTTPTransport(verify=False, proxy=through)
    client = PyPIClient(
        trusted_hosts=config.trusted_hosts,
        verify=_certificates(config),
        proxy=proxy,
        timeout=config.timeout,
        follow_redirects=True,
        mounts=mounts,
    )
    urls = [url for url in (config.index_url, *config.extra_index_urls) if url]
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=urls)
    return client


def _certificates(config: PipConfig) -> ssl.SSLContext | bool:
    if not config.cert and not config.client_cert:
        return True
    try:
        place = Path(config.cert).expanduser() if config.cert else None
        if place is not None and place.is_dir():
            context = ssl.create_default_context(capath=str(place))
        else:
            context = ssl.create_default_context(cafile=str(place) if place else None)
        if config.client_cert:
            context.load_cert_chain(Path(config.client_cert).expanduser())
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        named = " and ".join(filter(None, (config.cert, config.client_cert)))
        raise DownloadFailed(f"pip is configured with the certificate {named}, which cannot be used: {error}") from None
    return context
