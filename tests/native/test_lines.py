"""From bytes to lines: what is kept, what is only shown, and when."""

from __future__ import annotations

from apex_build.native.lines import Lines
from apex_build.printable import printable


def feed(*blocks: bytes) -> tuple[list[str], list[str]]:
    kept: list[str] = []
    shown: list[str] = []
    lines = Lines(kept.append, shown.append)
    for block in blocks:
        lines.feed(block)
    lines.close()
    return kept, shown


def test_unfinished_progress_is_shown_as_it_grows_and_kept_once() -> None:
    kept, shown = feed(b"[1]5.3,", b"[2]5.4,", b"\nend\n")
    assert kept == ["[1]5.3,[2]5.4,", "end"]
    assert shown == ["[1]5.3,", "[1]5.3,[2]5.4,", "[1]5.3,[2]5.4,", "end"]


def test_rewritten_progress_is_shown_but_not_kept() -> None:
    kept, shown = feed(b"10%\r", b"20%\r", b"done\n")
    assert kept == ["done"]
    assert [text for text in shown if text.endswith("%")] == ["10%", "10%", "20%", "20%"]


def test_carriage_return_before_newline_is_a_line_end_also_when_cut_between() -> None:
    assert feed(b"one\r", b"\ntwo\r\n")[0] == ["one", "two"]


def test_characters_cut_between_blocks_and_bytes_that_are_none() -> None:
    assert feed("Δp".encode()[:1], "Δp".encode()[1:], b"\n\xff\n")[0] == ["Δp", "\ufffd"]


def test_the_last_line_needs_no_end() -> None:
    assert feed(b"a\nb")[0] == ["a", "b"]


def test_an_endless_line_is_cut() -> None:
    kept, _ = feed(b"x" * (3 << 20))
    assert "".join(kept) == "x" * (3 << 20)
    assert max(map(len, kept)) <= 1 << 20


def test_escape_sequences_do_not_reach_a_message() -> None:
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07\x9b1m\ttab") == "red ]0;title1m\ttab"
