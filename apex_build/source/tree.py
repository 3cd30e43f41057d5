"""The fetched tree: a git repository with one base commit, which has the same hash on every machine, and a commit for
each patch on top.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import HashMismatch, SourceMissing, TreeEdited
from apex_build.places import source_root
from apex_build.progress import Report, Step, silent
from apex_build.source.git import command, committed_files, environment, failed, git, missing, run
from apex_build.source.pins import Pin
from apex_build.source.tree_digest import digest_of, is_executable, sha256, tree_digest, wanted
from apex_build.storage.digests import sha256_json
from apex_build.storage.scratch import scratch_folder

BASE = "apex-base"  # tag of the base commit
BRANCH = "apex"
_WHO = "apex-build <apex-build@localhost>"
_WHEN = "1767225600 +0000"  # 2026-01-01, always, so that the commit has the same hash everywhere
# Overrides every .gitattributes: files are kept byte for byte.
_ATTRIBUTES = "* -text -eol -ident -filter -working-tree-encoding -export-ignore -export-subst\n"
# For the developer's git in this tree; apex passes its own settings on the command line.
_CONFIG = "[core]\n\tautocrlf = false\n\thooksPath = /dev/null\n[commit]\n\tgpgSign = false\n[gc]\n\tauto = 0\n"
_DIGEST_LINE = "Tree-digest: "
_STATUS = ("status", "--porcelain", "-z", "--untracked-files=all", "--ignore-submodules=none", "--no-renames")


@dataclass(frozen=True)
class TreeStatus:
    """The state of the tree's folder. `base` and `head` are commits; `digest` is the one in the message of the base
    commit (verify checks it); `outdated`: it differs from the pin's; `edited` lists uncommitted edits, `untracked` new
    files.
    """

    pin: Pin
    path: Path
    present: bool
    base: str | None = None
    head: str | None = None
    digest: str | None = None
    outdated: bool = False
    edited: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()


def tree_path(pin: Pin) -> Path:
    return source_root() / pin.name


def fetch_command(pin: Pin) -> str:
    return f"apex source fetch{pin.option}"


def require_tree(pin: Pin) -> Path:
    """The tree's folder. Raises SourceMissing if it has not been fetched."""
    path = tree_path(pin)
    if not (path / ".git").exists():
        raise SourceMissing(
            f"the source of pin {pin.name} has not been fetched: {path} does not exist", hint=fetch_command(pin)
        )
    return path


def status(pin: Pin) -> TreeStatus:
    """Raises TreeEdited if the folder exists but is not a tree that apex laid out."""
    path = tree_path(pin)
    if not path.exists():
        return TreeStatus(pin, path, present=False)
    base, head = base_and_head(path)
    message = git(path, "cat-file", "commit", base)
    digest = next((line[len(_DIGEST_LINE) :] for line in message.splitlines() if line.startswith(_DIGEST_LINE)), None)
    edited, untracked = edits(path)
    return TreeStatus(pin, path, True, base, head, digest, digest != pin.tree_digest, edited, untracked)


def base_and_head(path: Path) -> tuple[str, str]:
    """The base commit and HEAD. Raises TreeEdited if there is no base commit or HEAD does not descend from it."""
    found = (
        run(path, "rev-parse", "--verify", "--quiet", f"refs/tags/{BASE}^{{commit}}")
        if (path / ".git").exists()
        else None
    )
    if found is None or found.returncode != 0:
        raise TreeEdited(
            f"{path} is not a tree that apex laid out: it has no commit tagged {BASE}",
            hint=f"move it away (mv {path} {path}.mine), then run apex source fetch",
        )
    base = found.stdout.decode().strip()
    if run(path, "merge-base", "--is-ancestor", base, "HEAD").returncode != 0:
        raise TreeEdited(
            f"{path}: HEAD does not descend from the base commit {BASE} ({base[:12]})",
            hint=f"git -C {path} switch {BRANCH}",
        )
    return base, git(path, "rev-parse", "--verify", "HEAD^{commit}")


def some(names: Sequence[str], joint: str = ", ") -> str:
    """The first few of a list, for a message."""
    return joint.join(names[:6]) + (f"{joint}and {len(names) - 6} more" if len(names) > 6 else "")


def edits(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Uncommitted edits: (tracked files that differ from HEAD, new files that git does not ignore)."""
    tracked: list[str] = []
    untracked: list[str] = []
    for entry in filter(None, git(path, *_STATUS).split("\0")):
        (untracked if entry.startswith("??") else tracked).append(entry[3:])
    return tuple(tracked), tuple(untracked)


def lay_out(pin: Pin, files: Iterable[tuple[str, bytes]], folder: Path, report: Report = silent) -> str:
    """Create the repository at `folder` (which must not exist) from (path, content) pairs; returns the base commit.

    git writes all files, from a fast-import stream: it refuses paths that leave the tree. File modes follow from the
    content. Raises HashMismatch if the files are not the pin's; the caller must then remove `folder`.
    """
    git(None, "init", "--quiet", folder, env={"GIT_DEFAULT_HASH": "sha1"})
    with (folder / ".git" / "config").open("a", encoding="utf-8") as config:
        config.write(_CONFIG)
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "attributes").write_text(_ATTRIBUTES, encoding="utf-8")
    _check_digest(pin, _import(pin, files, folder, report), "the fetched source")
    git(folder, "symbolic-ref", "HEAD", f"refs/heads/{BRANCH}")
    git(folder, "tag", BASE, f"refs/heads/{BRANCH}")
    git(folder, "reset", "--quiet", "--hard", "HEAD")
    return git(folder, "rev-parse", "HEAD")


def _import(pin: Pin, files: Iterable[tuple[str, bytes]], folder: Path, report: Report) -> str:
    hashes: dict[str, str] = {}
    message = (
        f"llama.cpp {pin.commit[:12]}: the files that a build uses\n\n"
        f"Pin: {pin.name}\nUpstream-commit: {pin.commit}\n{_DIGEST_LINE}{pin.tree_digest}\n"
    )
    try:
        importer = subprocess.Popen(
            command(folder, "fast-import", "--quiet", "--date-format=raw"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd=folder,
        )
    except FileNotFoundError:
        raise missing(folder) from None
    with importer:
        assert importer.stdin and importer.stderr
        try:
            with suppress(BrokenPipeError):  # git exited early; its message is read below
                data = message.encode()
                head = (
                    f"commit refs/heads/{BRANCH}\nauthor {_WHO} {_WHEN}\ncommitter {_WHO} {_WHEN}\ndata {len(data)}\n"
                )
                importer.stdin.write(head.encode() + data)
                for path, content in files:
                    hashes[path] = sha256(content)
                    mode = "100755" if is_executable(content) else "100644"
                    importer.stdin.write(f"M {mode} inline {path}\ndata {len(content)}\n".encode() + content + b"\n")
                    if len(hashes) % 100 == 0:
                        report(Step(f"unpacking {pin.name}", len(hashes), None, "files"))
                importer.stdin.write(b"done\n")
                importer.stdin.close()
            words = importer.stderr.read()
            importer.wait()
        except BaseException:
            importer.kill()
            with suppress(OSError):
                importer.stdin.close()
            raise
        if importer.returncode != 0:
            raise failed(f"git fast-import failed in {folder}", words)
    return tree_digest(hashes)


def _check_digest(pin: Pin, found: str, what: str, hint: str | None = None) -> None:
    if found != pin.tree_digest:
        raise HashMismatch(
            f"{what} is not the tree of pin {pin.name}: expected digest {pin.tree_digest}, found {found}",
            hint=hint,
        )


def verify_base(pin: Pin, path: Path) -> str:
    """Recompute the digest from the content of the base commit. Raises HashMismatch if it is not the pin's or there are
    other files.
    """
    base, _head = base_and_head(path)
    _check_digest(
        pin, digest_of(committed_files(path, base)), f"the base commit of {path}", f"{fetch_command(pin)} --force"
    )
    names = git(path, "ls-tree", "-r", "-z", "--name-only", "--full-tree", base).split("\0")
    strange = [name for name in names if name and not wanted(name)]
    if strange:
        raise HashMismatch(
            f"the base commit of {path} has a file that does not belong to it: {strange[0]}",
            hint=f"{fetch_command(pin)} --force",
        )
    return pin.tree_digest


def verify_clean(path: Path) -> None:
    """Raise TreeEdited, naming the files, if any file differs from HEAD. Reads all of them again, without trusting
    git's index.
    """
    if _content_tree(path, afresh=True) == git(path, "rev-parse", "HEAD^{tree}"):
        return
    with scratch_folder("index") as temp:
        env = {"GIT_INDEX_FILE": str(temp / "index")}
        git(path, "read-tree", "HEAD", env=env)
        found = git(path, *_STATUS, env=env).split("\0")
    raise TreeEdited(
        f"{path} has uncommitted edits: {some([entry[3:] for entry in found if entry])}",
        hint=f"keep them: git -C {path} add -A && git -C {path} commit && apex patch save; or put them aside: "
        f"git -C {path} stash -u",
    )


def tree_identity(path: Path) -> str:
    """sha256 of what a build of `path` compiles: tracked files as they are now, and new files that git does not ignore.

    Committing an edit does not change it. In a folder without a git repository, the `wanted` files count.
    """
    if (path / ".git").exists():
        return sha256_json({"git tree": _content_tree(path)})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    named = ((file.relative_to(path).as_posix(), file) for file in files)
    return sha256_json({"tree digest": digest_of((name, file.read_bytes()) for name, file in named if wanted(name))})


def commit_identity(path: Path, commit: str) -> str:
    """The `tree_identity` that the tree has if it is clean at this commit."""
    return sha256_json({"git tree": git(path, "rev-parse", "--verify", f"{commit}^{{tree}}")})


def check_out(path: Path, commit: str, folder: Path) -> None:
    """Check out a commit of the tree in `folder` (one of ours, with its index beside it). Unchanged files keep their
    times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = (f"--git-dir={path / '.git'}", f"--work-tree={folder}")
    done = run(
        None, *where, "read-tree", "--reset", "-u", commit, env={"GIT_INDEX_FILE": f"{folder}.index"}, cwd=folder
    )
    if done.returncode != 0:
        raise failed(f"git read-tree failed in {folder}", done.stderr)


def under_way(path: Path) -> str | None:
    """The git operation in progress in this tree: `rebase`, `am`, `cherry-pick`, `revert` or `merge`."""
    if (path / git(path, "rev-parse", "--git-path", "rebase-merge")).exists():
        return "rebase"
    if (folder := path / git(path, "rev-parse", "--git-path", "rebase-apply")).exists():
        return "am" if (folder / "applying").exists() else "rebase"
    heads = {"cherry-pick": "CHERRY_PICK_HEAD", "revert": "REVERT_HEAD", "merge": "MERGE_HEAD"}
    return next(
        (verb for verb, head in heads.items() if run(path, "rev-parse", "-q", "--verify", head).returncode == 0), None
    )


def refuse_under_way(path: Path) -> None:
    """Raise TreeEdited while a git operation is in progress: HEAD is then neither the old nor the new state."""
    if verb := under_way(path):
        raise TreeEdited(
            f"{path}: a git {verb} is in progress",
            hint=f"git -C {path} {verb} --continue finishes it, git -C {path} {verb} --abort undoes it",
        )


def _content_tree(path: Path, *, afresh: bool = False) -> str:
    """git's tree hash of the folder's current content, computed in a scratch index and object folder, so that nothing
    in the tree changes.
    """
    objects = (path / git(path, "rev-parse", "--git-path", "objects")).resolve()
    with scratch_folder("index") as temp:
        index = temp / "index"
        scratch = temp / "objects"
        scratch.mkdir()
        env: Mapping[str, str] = {
            "GIT_INDEX_FILE": str(index),
            "GIT_OBJECT_DIRECTORY": str(scratch),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        own = path / git(path, "rev-parse", "--git-path", "index")
        if own.is_file() and not afresh:
            # git's index knows which files are unchanged: 20 ms instead of reading them all. Keep its time: git reads
            # files again that are newer.
            shutil.copy2(own, index)
        else:
            git(path, "read-tree", "HEAD", env=env)
        git(path, "add", "--all", "--", ".", env=env)
        return git(path, "write-tree", env=env)
