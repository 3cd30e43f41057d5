"""Patch files (`git format-patch`): read them, compare them with commits, and commit them with the same hashes
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path

from apex_build.errors import PatchConflict
from apex_build.source.git import git, last_words, run
from apex_build.source.tree_digest import sha256
from apex_build.storage.scratch import scratch_folder

COMMITTER = {"GIT_COMMITTER_NAME": "apex-build", "GIT_COMMITTER_EMAIL": "apex-build@localhost"}
_FROM = re.compile(rb"\AFrom ([0-9a-f]{40}) ")
_FOOTER = re.compile(rb"\n-- \n[^ +\-\\@\n][^\n]*\n*\Z")  # `-- ` and git's version
# A commit is always written the same way, regardless of the tree's configuration and of other objects in its store.
_FORMAT = [
    "format-patch",
    "--quiet",
    "--always",
    "--no-numbered",
    "--no-signature",
    "--full-index",
    "--no-attach",
    "--no-thread",
    "--no-cover-letter",
    "--no-notes",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-renames",
    "--diff-algorithm=myers",
    "--unified=3",
    "--inter-hunk-context=0",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--subject-prefix=PATCH",
    "--suffix=.patch",
]


@dataclass(frozen=True)
class Patch:
    """A patch file. `date` is in git's raw form (seconds and zone), `message` is the whole commit message. `key`
    identifies the content regardless of the flags and the version of git that wrote it: author, date, message, and the
    diff without line numbers and object names.
    """

    name: str
    content: bytes
    subject: str
    author: str
    email: str
    date: str
    message: str
    diff: bytes
    key: str

    @property
    def sha256(self) -> str:
        return sha256(self.content)


class ApplyFailed(Exception):
    """A patch does not apply; `reason` names file and hunk."""

    def __init__(self, patch: Patch, reason: str) -> None:
        super().__init__(f"{patch.name} does not apply: {reason}")
        self.patch = patch
        self.reason = reason


def read_patch(name: str, content: bytes) -> Patch:
    """Raises PatchConflict for a file that is not a patch: no author, no date, no subject or no diff."""
    with scratch_folder("mail") as temp:
        arguments = ("mailinfo", "-b", "--encoding=UTF-8", "--no-scissors", "body", "diff")
        done = run(None, *arguments, feed=content, cwd=temp)
        said = done.stdout.decode("utf-8", "replace").splitlines()
        head = dict(line.split(": ", 1) for line in said if ": " in line)
        body = (temp / "body").read_text(encoding="utf-8", errors="replace") if done.returncode == 0 else ""
        diff = (temp / "diff").read_bytes() if done.returncode == 0 else b""
    when = parsedate_tz(head.get("Date", ""))
    lacking = [] if head.get("Author") and head.get("Email") else ["From"]
    lacking += [] if head.get("Subject") else ["Subject"]
    lacking += ["Date"] if when is None else []
    if lacking or when is None:
        raise PatchConflict(
            f"{name} is not a mailable patch: missing {', '.join(lacking)}",
            hint="write it with git format-patch, or apex patch save",
        )
    zone = when[9] or 0
    date = f"{mktime_tz(when)} {'-' if zone < 0 else '+'}{abs(zone) // 3600:02d}{abs(zone) // 60 % 60:02d}"
    message = "\n\n".join(filter(None, (head["Subject"], body.strip("\n")))) + "\n"
    start = re.search(rb"^diff --git ", diff, re.MULTILINE)
    diff = _FOOTER.sub(b"\n", diff[start.start() :]) if start else b""
    said_by = "\0".join((head["Author"], head["Email"], date, message)).encode()
    key = sha256(said_by + b"\0" + b"\n".join(_plain(diff)))
    return Patch(name, content, head["Subject"], head["Author"], head["Email"], date, message, diff, key)


def _plain(diff: bytes) -> list[bytes]:
    """The lines of the diff, without those that depend on where, or by which git, it was made."""
    lines = (b"@@" if line.startswith(b"@@ ") else line for line in diff.rstrip(b"\n").split(b"\n"))
    return [line for line in lines if not line.startswith(b"index ")]


def commits_between(path: Path, base: str, head: str) -> list[str]:
    return git(path, "rev-list", "--reverse", "--topo-order", f"{base}..{head}").split()


def merges_between(path: Path, base: str, head: str) -> list[str]:
    return git(path, "rev-list", "--min-parents=2", f"{base}..{head}").split()


def format_patches(path: Path, base: str, head: str) -> dict[str, Patch]:
    """Commit -> its patch, for base..head without merges, in order. The content of a patch is canonical: it does not
    name the commit.
    """
    patches: dict[str, Patch] = {}
    with scratch_folder("patches") as temp:
        git(path, *_FORMAT, "-o", temp, f"{base}..{head}")
        for file in sorted(temp.iterdir(), key=lambda file: int(file.name.split("-", 1)[0])):
            content = file.read_bytes()
            commit = _FROM.match(content)
            assert commit, "the output of git format-patch starts with the commit"
            patches[commit[1].decode()] = read_patch(file.name, _FROM.sub(b"From " + b"0" * 40 + b" ", content))
    return patches


def commit_patches(path: Path, parent: str, patches: Sequence[Patch], *, three_way: bool = False) -> list[str]:
    """Commit the patches on top of `parent` without touching the working tree; returns the commits. Raises ApplyFailed.

    `three_way`: merge if the context of a change differs, using the blobs that the patch names if the repository has
    them. The committer is fixed and the commit time is the author's, so a series gives the same hashes everywhere.
    """
    commits: list[str] = []
    with scratch_folder("index") as temp:
        index = {"GIT_INDEX_FILE": str(temp / "index")}
        git(path, "read-tree", parent, env=index)
        for patch in patches:
            how = ("--cached", "--3way") if three_way else ("--cached",)
            done = run(path, "apply", *how, "--whitespace=nowarn", "-", feed=patch.diff, env=index)
            if done.returncode != 0:
                git(path, "read-tree", parent, env=index)  # try again without merging: git then names the hunk
                plain = run(path, "apply", "--cached", "--check", "-", feed=patch.diff, env=index)
                raise ApplyFailed(patch, explain(patch.diff, plain.stderr or done.stderr))
            tree = git(path, "write-tree", env=index)
            who = {"GIT_AUTHOR_NAME": patch.author, "GIT_AUTHOR_EMAIL": patch.email, "GIT_AUTHOR_DATE": patch.date}
            who |= {**COMMITTER, "GIT_COMMITTER_DATE": patch.date}
            parent = git(path, "commit-tree", tree, "-p", parent, feed=patch.message.encode(), env=who)
            commits.append(parent)
    return commits


def explain(diff: bytes, stderr: bytes) -> str:
    """The reason why git apply failed, with the hunk: `src/a.cpp, hunk 2 of 3 (@@ -10,7 +10,8 @@)`."""
    if not diff:
        return "it changes nothing"
    reasons: list[str] = []
    for line in stderr.decode("utf-8", "replace").splitlines():
        text = line.removeprefix("error: ").strip()
        if failed := re.fullmatch(r"patch failed: (.+):(\d+)", text):
            reasons.append(_hunk(diff, failed[1], int(failed[2])))
        elif not text.endswith(": patch does not apply"):
            reasons.append(text)
    return "; ".join(dict.fromkeys(reasons)) or last_words(stderr)


def _hunk(diff: bytes, file: str, line: int) -> str:
    hunks: list[tuple[int, str]] = []
    here = False
    for text in diff.decode("utf-8", "replace").split("\n"):
        if text.startswith("diff --git "):
            here = text.endswith((f" b/{file}", f' "b/{file}"'))
        elif here and (head := re.match(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", text)):
            hunks.append((int(head[1]), head[0]))
    for number, (start, head_text) in enumerate(hunks, 1):
        if start == line:
            return f"{file}, hunk {number} of {len(hunks)} ({head_text})"
    return f"{file}, the hunk at line {line}"
