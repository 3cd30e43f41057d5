"""The patch series: applied, shown and saved, byte for byte, without ever losing anybody's work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source.tiny import IMATRIX, LINES, Apex, World, commit, edited, folder, git

from apex_build.errors import PatchConflict, TreeEdited
from apex_build.source.fetch import fetch, verify
from apex_build.source.series import apply_series, save_series, series_digest, series_status
from apex_build.source.tree import tree_identity, tree_path


def test_empty_series(world: World, apex: Apex) -> None:
    fetch(world.pin)
    assert apex("patch", "apply").out == "nothing to apply: the whole series is applied\n"
    assert "the series is empty" in apex("patch", "status").out
    assert series_status(world.pin).complete
    empty = series_digest(world.pin)
    world.patches.mkdir()
    (world.patches / "series").write_text("# nothing yet\n\n")
    assert series_digest(world.pin) == empty
    assert verify(world.pin).patches == ()


def test_saved_patches_are_letters(series: World) -> None:
    saved = folder(series.patches)
    assert sorted(saved) == ["0001-imatrix-record-the-draft-head.patch", "0002-ggml-ndern.patch", "series"]
    assert saved["series"].decode().split() == sorted(saved)[:2]
    text = saved["0001-imatrix-record-the-draft-head.patch"].decode()
    assert text.startswith(
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: =?UTF-8?q?Dev=20=C3=89lan?= <dev@example.org>\n"
    )
    assert "Subject: [PATCH] imatrix: record the draft head\n\nWhy: it is never run.\n" in text
    assert f" {IMATRIX} | 2 +-\n" in text
    assert "2.39" not in text.split("\n-- ")[-1][-20:]


def test_apply_and_save_again_changes_no_byte(
    series: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apex: Apex
) -> None:
    before = folder(series.patches)
    head = git(series.tree, "rev-parse", "HEAD")
    heads = set()
    for name in ("one", "two"):
        monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / name))
        done = fetch(series.pin)
        assert done.applied == tuple(sorted(before)[:2])
        heads.add(git(done.path, "rev-parse", "HEAD"))
        assert git(done.path, "rev-parse", "HEAD^{tree}") == git(series.tree, "rev-parse", "HEAD^{tree}")
        assert (done.path / "ggml/src/windows.c").read_bytes() == b"one\r\ntwo and a half\r\nthree\r\n"
        said = apex("patch", "save")
        assert said.out == "2 patches, all as saved before\n"
        assert folder(series.patches) == before
        assert verify(series.pin).patches == done.applied
        assert apex("patch", "apply").out.startswith("nothing to apply")
    assert len(heads) == 1, "the same series gives the same commits everywhere"
    assert heads != {head}, "a person's own commits keep their own committer and time"
    assert git(tree_path(series.pin), "log", "-1", "--format=%an %cn %ad") == git(
        tree_path(series.pin), "log", "-1", "--format=Dev Élan apex-build %cd"
    )


def test_letters_of_other_flags_and_versions(series: World, apex: Apex) -> None:
    """The default output of git format-patch counts as the same patch; saving converts it to our form, once."""
    for file in series.patches.glob("*.patch"):
        file.unlink()
    git(series.tree, "format-patch", "--quiet", "-o", str(series.patches), "apex-base")
    assert series_status(series.pin).complete
    assert verify(series.pin)
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    assert len(apply_series(series.pin)) == 2
    assert len(save_series(series.pin).written) == 2
    assert save_series(series.pin).written == ()


def test_local_diff_settings_do_not_change_the_bytes(series: World) -> None:
    before = folder(series.patches)
    for key, value in (
        ("diff.noprefix", "true"),
        ("diff.algorithm", "patience"),
        ("diff.context", "9"),
        ("core.abbrev", "7"),
        ("format.signature", "me"),
        ("format.numbered", "true"),
        ("diff.mnemonicPrefix", "true"),
    ):
        git(series.tree, "config", key, value)
    save_series(series.pin)
    assert folder(series.patches) == before


def test_comments_and_other_files_stay(series: World) -> None:
    text = (series.patches / "series").read_text()
    (series.patches / "series").write_text(f"# for llama.cpp\n#\n\n{text}")
    (series.patches / "README.md").write_text("why\n")
    (series.patches / "0009-draft.patch").write_text("a draft\n")
    assert series_status(series.pin).unlisted == ("0009-draft.patch",)
    assert save_series(series.pin).written == ()
    commit(series.tree, {"ggml/src/more.c": b"more\n"}, "ggml: more")
    assert save_series(series.pin).written == ("0003-ggml-more.patch",)
    assert (series.patches / "series").read_text() == f"# for llama.cpp\n#\n\n{text}0003-ggml-more.patch\n"
    assert (series.patches / "README.md").read_text() == "why\n"
    assert (series.patches / "0009-draft.patch").exists()
    assert [path.name for path in series.patches.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_the_users_own_beside_the_series_stays(series: World) -> None:
    """Folders, links, and a patch that the series does not list yet."""
    (series.patches / "notes" / "more").mkdir(parents=True)
    (series.patches / "notes" / "more" / "one.txt").write_text("mine")
    (series.patches / "link").symlink_to("notes/more/one.txt")
    commit(series.tree, {"ggml/src/more.c": b"more\n"}, "ggml: more")
    mine = series.patches / "0003-ggml-more.patch"
    mine.write_text("of a week's work")
    before = sorted(path.name for path in series.patches.iterdir())
    with pytest.raises(TreeEdited, match=r"refusing to overwrite .*0003-ggml-more\.patch") as caught:
        save_series(series.pin)
    assert str(caught.value.hint).endswith("0003-ggml-more.patch.mine")
    assert sorted(path.name for path in series.patches.iterdir()) == before and mine.read_text() == "of a week's work"
    mine.rename(series.patches / "0003-ggml-more.patch.mine")
    assert save_series(series.pin).written == ("0003-ggml-more.patch",)
    assert (series.patches / "notes" / "more" / "one.txt").read_text() == "mine"
    assert (series.patches / "link").readlink() == Path("notes/more/one.txt")
    assert (series.patches / "0003-ggml-more.patch.mine").read_text() == "of a week's work"


def test_status(series: World, apex: Apex) -> None:
    said = apex("patch", "status")
    assert said.code == 0
    assert said.out.count("applied") == 2
    git(series.tree, "reset", "--quiet", "--hard", "HEAD~1")
    commit(series.tree, {"tools/imatrix/README.md": b"# more\n"}, "imatrix: document")
    (series.tree / "LICENSE").write_text("mine\n")
    (series.tree / "note.txt").write_text("note\n")
    said = apex("patch", "status")
    assert "missing" in said.out
    assert "imatrix: document    (apex patch save)" in said.out
    assert "not committed: LICENSE" in said.out
    assert "new, not committed: note.txt" in said.out
    found = json.loads(apex("patch", "status", "--json").out)
    assert [patch["state"] for patch in found["patches"]] == ["applied", "missing"]
    assert found["edited"] == ["LICENSE"]
    assert found["untracked"] == ["note.txt"]
    assert found["unsaved"][0][1] == "imatrix: document"
    assert not found["complete"]
    rows = json.loads(apex("source", "status", "--json").out)
    assert rows[0]["state"] == "1 edited files, 1 new files, 1 unsaved commits"
    assert rows[0]["patches"] == "1 of 2 applied"


def test_status_of_an_amended_patch(series: World) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "HEAD~1")
    (series.tree / IMATRIX).write_bytes(edited(10, "TEN"))
    git(series.tree, "commit", "--quiet", "-a", "--amend", "--no-edit")
    states = series_status(series.pin).patches
    assert [(patch.name[:4], patch.state) for patch in states] == [("0001", "changed"), ("0002", "missing")]
    # white space alone is a change as well
    (series.tree / IMATRIX).write_bytes(edited(10, "ten "))
    git(series.tree, "commit", "--quiet", "-a", "--amend", "--no-edit")
    assert series_status(series.pin).patches[0].state == "changed"
    with pytest.raises(TreeEdited, match=r"0002-ggml-ndern\.patch, which this tree never had"):
        # the tree was reset by hand; its record still knows the patch, so forget that first
        next(series.tree.glob(".git/apex-patches.json")).unlink()
        save_series(series.pin)


# --- patches that do not apply ----------------------------------------------------------------------------------------
def conflict(world: World) -> None:
    """Patch 2 of the series touches lines 20, 35 and 50 of a file; the tree differs from what it expects at line 35."""
    patch = world.patches / "0002-imatrix-three-places.patch"
    git(world.tree, "checkout", "--quiet", "-b", "side", "apex-base")
    text = LINES.replace("line 35\n", "other 35\n").encode()
    commit(world.tree, {IMATRIX: text}, "the base that patch 2 was made on")
    for number in (20, 35, 50):
        text = text.replace(b" %d\n" % number, b" %d changed\n" % number)
    commit(world.tree, {IMATRIX: text, "LICENSE": b"BSD\n"}, "imatrix: three places")
    patch.write_text(git(world.tree, "format-patch", "-1", "--stdout") + "\n")
    git(world.tree, "checkout", "--quiet", "apex")
    git(world.tree, "branch", "--quiet", "-D", "side")
    names = (world.patches / "series").read_text().split()
    (world.patches / "series").write_text(f"{names[1]}\n{patch.name}\n")
    (world.patches / names[0]).unlink()


def test_conflict_names_patch_file_and_hunk(series: World, apex: Apex) -> None:
    conflict(series)
    head = git(series.tree, "rev-parse", "HEAD")
    said = apex("patch", "apply")
    assert said.code == PatchConflict.exit_code, said.err
    assert "0002-imatrix-three-places.patch does not apply" in said.err
    assert f"{IMATRIX}, hunk 2 of 3 (@@ -32,7 +32,7 @@)" in said.err
    assert "Traceback" not in said.err
    assert git(series.tree, "rev-parse", "HEAD") == head
    assert git(series.tree, "status", "--porcelain") == ""
    assert not (series.tree / ".git/rebase-apply").exists()
    status = series_status(series.pin)
    assert [patch.state for patch in status.patches] == ["applied", "conflict"]
    assert status.patches[1].detail == f"{IMATRIX}, hunk 2 of 3 (@@ -32,7 +32,7 @@)"
    assert "conflict" in apex("patch", "status").out


def test_conflict_while_fetching_leaves_nothing(
    series: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conflict(series)
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "fresh"))
    said = apex("source", "fetch")
    assert said.code == PatchConflict.exit_code
    assert "hunk 2 of 3" in said.err
    assert "--no-patches" in said.err
    assert list((tmp_path / "fresh").iterdir()) == []
    assert apex("source", "fetch", "--no-patches").code == 0
    said = apex("source", "verify")
    assert said.code == TreeEdited.exit_code
    assert (
        "not fully applied" in said.err and "missing 0002-ggml-ndern.patch, 0002-imatrix-three-places.patch" in said.err
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("diff --git a/LICENSE b/LICENSE\n", "missing From, Subject, Date"),
        ("From: A <a@b>\nSubject: x\nDate: never\n\n---\ndiff --git a/LICENSE b/LICENSE\n", "missing Date"),
        ("From: A <a@b>\nSubject: x\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n\nbody only\n", "it changes nothing"),
        (
            "From: A <a@b>\nSubject: x\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n\n---\n"
            "diff --git a/absent.c b/absent.c\n--- a/absent.c\n+++ b/absent.c\n@@ -1 +1 @@\n-a\n+b\n",
            "absent.c: does not exist in index",
        ),
        (
            "From: A <a@b>\nSubject: x\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n\n---\n"
            "diff --git a/../evil b/../evil\nnew file mode 100644\n--- /dev/null\n+++ b/../evil\n@@ -0,0 +1 @@\n+b\n",
            "invalid path '../evil'",
        ),
        (
            "From: A <a@b>\nSubject: x\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n\n---\n"
            "diff --git a/.git/x b/.git/x\nnew file mode 100755\n--- /dev/null\n+++ b/.git/x\n@@ -0,0 +1 @@\n+b\n",
            "invalid path '.git/x'",
        ),
    ],
)
def test_bad_patch_file(world: World, apex: Apex, text: str, words: str) -> None:
    fetch(world.pin)
    world.patches.mkdir()
    (world.patches / "0001-x.patch").write_text(text)
    (world.patches / "series").write_text("0001-x.patch\n")
    said = apex("patch", "apply")
    assert said.code == PatchConflict.exit_code, said.err
    assert "0001-x.patch" in said.err
    assert words in said.err
    assert git(world.tree, "rev-list", "--count", "HEAD") == "1"
    assert git(world.tree, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ("0001-absent.patch\n", "cannot read 0001-absent.patch, listed in "),
        ("../0001-x.patch\n", "lists '../0001-x.patch': expected a file beside it with a name like NNNN-"),
        ("/etc/passwd\n", "expected a file beside it"),
    ],
)
def test_bad_series_file(world: World, apex: Apex, listing: str, words: str) -> None:
    fetch(world.pin)
    world.patches.mkdir()
    (world.patches / "series").write_text(listing)
    for verb in (("patch", "apply"), ("patch", "status"), ("source", "fetch"), ("source", "verify"), ("patch", "save")):
        said = apex(*verb)
        assert said.code == PatchConflict.exit_code
        assert words in said.err


def test_patch_named_twice(series: World) -> None:
    names = (series.patches / "series").read_text()
    (series.patches / "series").write_text(names * 2)
    with pytest.raises(PatchConflict, match=r"0001-.* twice"):
        series_status(series.pin)


def test_verify_finds_a_changed_base(series: World, apex: Apex) -> None:
    git(series.tree, "tag", "--force", "apex-base", "HEAD~1")
    said = apex("source", "verify")
    assert said.code == 12
    assert "the base commit of" in said.err
    assert "expected digest" in said.err
    git(series.tree, "checkout", "--quiet", "--orphan", "other")
    git(series.tree, "commit", "--quiet", "-m", "other root")
    said = apex("source", "verify")
    assert said.code == TreeEdited.exit_code
    assert "does not descend from the base commit" in said.err


def test_series_digest_follows_the_patches(series: World) -> None:
    before = series_digest(series.pin)
    patch = series.patches / "0002-ggml-ndern.patch"
    patch.write_bytes(patch.read_bytes().replace(b"+new", b"+New"))
    assert series_digest(series.pin) != before


def test_tree_identity(series: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = series.tree
    clean = tree_identity(tree)
    (tree / "build-x.log").write_text("ignored\n")
    assert tree_identity(tree) == clean
    (tree / IMATRIX).write_bytes(edited(11, "eleven"))
    dirty = tree_identity(tree)
    assert dirty != clean
    assert git(tree, "diff", "--cached", "--name-only") == "", "the tree's own index stays as it is"
    git(tree, "commit", "--quiet", "-am", "eleven")
    assert tree_identity(tree) == dirty, "committing changes nothing that is compiled"
    (tree / "ggml/src/extra.c").write_text("x\n")
    assert tree_identity(tree) not in (clean, dirty)
    (tree / "ggml/src/extra.c").unlink()
    git(tree, "reset", "--quiet", "--hard", "HEAD~1")
    assert tree_identity(tree) == clean
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "other"))
    assert tree_identity(fetch(series.pin).path) == clean, "the same on every machine"
    plain = tree_identity(series.upstream.with_name("links"))
    assert plain != clean
