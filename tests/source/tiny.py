"""A small stand-in for llama.cpp: its files, an sdist, an upstream repository, and a pin that names all three."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from apex_build.source.pins import Pin, load_pin

IMATRIX = "tools/imatrix/imatrix.cpp"
LINES = "".join(f"line {n}\n" for n in range(1, 61))
FILES: dict[str, bytes] = {
    ".gitignore": b"__pycache__/\n*.log\n/build*\n",
    "CMakeLists.txt": b"project(llama)\n",
    "LICENSE": b"MIT\n",
    "convert_hf_to_gguf.py": b"#!/usr/bin/env python3\nprint('convert')\n",
    "ggml/CMakeLists.txt": b"project(ggml)\n",
    "ggml/src/ggml.c": LINES.encode(),
    "ggml/src/kept.log": b"tracked although .gitignore names it\n",
    "ggml/src/windows.c": b"one\r\ntwo\r\nthree\r\n",
    "models/templates/chat.jinja": "ä{{ messages }}\n".encode(),
    "tools/imatrix/imatrix.cpp": LINES.encode(),
    "tools/imatrix/README.md": b"# imatrix\n",
    # what no build uses
    "README.md": b"# llama.cpp\n",
    "docs/build.md": b"how to build\n",
    "models/ggml-vocab.gguf": b"GGUF",
    "tools/ui/src/app.ts": b"app\n",
}
Member = tuple[str, bytes]


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def make_sdist(path: Path, files: Mapping[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    """Like llama-cpp-python's: the tree in vendor/llama.cpp, with other files and a stray .git."""
    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        add(tar, f"{top}/CMakeLists.txt", b"project(llama_cpp_python)\n")
        add(tar, f"{top}/setup.py", b"raise SystemExit('the build code of the sdist was run')\n")
        add(tar, f"{top}/.git/config", b"[core]\n")
        add(tar, f"{top}/vendor/llama.cpp/.git", b"gitdir: ../../.git\n")
        for name, content in files.items():
            add(tar, f"{top}/vendor/llama.cpp/{name}", content, mode=0o755 if name.endswith(".c") else 0o644)
        if extra:
            extra(tar)
    return path


def make_tarball(path: Path, members: Iterable[Member], extra: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            add(tar, name, content)
        if extra:
            extra(tar)
    return path


def git(folder: Path, *arguments: str) -> str:
    """Run git like a developer, with an identity but without the machine's configuration."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    who = ("-c", "user.name=Dev Élan", "-c", "user.email=dev@example.org", "-c", "init.defaultBranch=master")
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@dataclasses.dataclass(frozen=True)
class World:
    """Everything a test needs: the pin and its TOML file, its origins, and the tree's folder."""

    pin: Pin
    toml: Path
    sdist: Path
    upstream: Path
    patches: Path
    tree: Path
    cache: Path

    def left_over(self) -> list[str]:
        """Files left in the source folder and the download cache, except complete trees and downloads, and locks."""
        found = [path.name for path in self.tree.parent.iterdir()] if self.tree.parent.is_dir() else []
        found += [path.name for path in self.cache.rglob("*") if path.is_file()]
        return sorted(name for name in found if name not in (self.tree.name, self.sdist.name))


def write_pin(world: World, **changes: object) -> World:
    pin = dataclasses.replace(world.pin, **changes)  # type: ignore[arg-type]
    text = "".join(f'{key} = "{getattr(pin, key)}"\n' for key in ("name", "commit", "repository", "tree_digest"))
    text += f'patches = "{world.patches}"\n[sdist]\n'
    text += "".join(f'{key} = "{getattr(pin, key)}"\n' for key in ("requirement", "file", "sha256", "folder"))
    text += f"size = {pin.size}\n" if pin.size else ""
    world.toml.write_text(text, encoding="utf-8")
    return dataclasses.replace(world, pin=load_pin(str(world.toml)))


def tarball_of(world: World, path: Path) -> Path:
    git(world.upstream, "archive", "--format=tar.gz", "--prefix=llama.cpp-tiny/", f"--output={path}", world.pin.commit)
    return path


@dataclasses.dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Apex = Callable[..., Said]


def commit(tree: Path, files: Mapping[str, bytes], message: str) -> str:
    write(tree, files)
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "-m", message)
    return git(tree, "rev-parse", "HEAD")


def edited(number: int, text: str) -> bytes:
    """LINES with one line replaced."""
    return LINES.replace(f"line {number}\n", f"{text}\n").encode()


def folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}
