"""Output for people: tables and progress at 80 columns and in pipes, and the time left for the whole run."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from apex_build.cli.layout import lay_out, shorten
from apex_build.progress import Piece, Step, Whole, silent

COLUMNS = ("name", "what it measures", "needs", "parameters")
ROWS = [
    (
        "draft-acceptance",
        "llama-server with draft-mtp: tokens drafted and accepted",
        "head, prompts",
        "lengths=1,2,3,4, seed=1",
    ),
    ("kld", "how far the model's probabilities are from the reference's", "text, reference", "context=512, chunks=0"),
    ("a-model-of-a-very-long-name-that-goes-on-and-on-Q4_K_M-i-nano.gguf", "x", "", ""),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_its_width_and_breaks_no_word(width: int) -> None:
    lines = lay_out(COLUMNS, ROWS, width=width)
    assert max(map(len, lines)) <= width
    words = {word for cells in (COLUMNS, *ROWS) for cell in cells for word in cell.split()}
    for word in " ".join(lines).split():
        assert word in words or "…" in word, word
    assert any(line.split()[:1] == ["draft-acceptance"] or "draft-acceptance" in line for line in lines)


def test_a_name_is_shortened_in_its_middle() -> None:
    name = "Qwen3.6-35B-A3B-of-somebody-F16-i-nano.gguf"
    short = shorten(name, 24)
    assert len(short) == 24 and short.startswith("Qwen3.6") and short.endswith("i-nano.gguf") and short.count("…") == 1
    assert shorten("short", 24) == "short"


def test_columns_are_aligned_and_wrapped_cells_stay_in_theirs() -> None:
    lines = lay_out(("name", "bytes"), [("a", "1"), ("bcd", "1234567")], right=(1,))
    assert lines == ["name    bytes", "a           1", "bcd   1234567"]
    assert lay_out(("a", "b"), [("x\ny", "z")]) == ["a  b", "x  z", "y"]


def test_pipes_get_plain_text() -> None:
    ran = subprocess.run([sys.executable, "-m", "apex_build", "policies"], capture_output=True, text=True, check=True)
    assert not re.search(r"[│┃━┏\x1b]", ran.stdout)
    assert re.search(r"^i-nano +apex +IQ2_XXS +yes +\w", ran.stdout, re.MULTILINE)


def on_a_terminal(code: str, columns: int = 80) -> str:
    """The output of a program on a terminal of this width."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.environ.pop("COLUMNS", None)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", code])
    said = b""
    try:
        while block := os.read(terminal, 1 << 16):
            said += block
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, said.decode()
    return said.decode()


@pytest.mark.slow
def test_80_columns_hold_the_bar_the_clock_and_the_time_left() -> None:
    code = """
from apex_build.cli import show
from apex_build.progress import Step
import time
with show.progress() as report:
    for n in range(1, 6):
        name = "draft-acceptance: Qwen3.6-35B-A3B-somebody-BF16-draft_head-IQ2_XXS-without-head-data.gguf"
        report(Step(name, n, 100, "prompts"))
        time.sleep(.25)
"""
    said = on_a_terminal(code)
    lines = [
        line
        for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n").split("\n")
        if "prompts" in line
    ]
    assert lines and max(map(len, lines)) <= 80
    last = lines[-1]
    assert re.search(r"draft-\S*…\S*head-data\.gguf [━╸╺ ]+ \d/100 prompts \d+:\d\d \d+:\d\d left", last), last


def test_tables_fit_a_terminal() -> None:
    said = on_a_terminal("from apex_build.cli import main; main(['evaluate', '--list'])")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).splitlines()
    assert max(map(len, lines)) <= 80 and any("draft-acceptance" in line for line in lines)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(pieces: list[Piece], took: list[dict[str, float]]) -> Iterator[tuple[float, float]]:
    """(seconds since the start, predicted seconds left) while the runs of each piece take these times."""
    clock = Clock()
    said: list[Step] = []
    whole = Whole("all", said.append, pieces, clock)
    for number, runs in enumerate(took):
        report = whole.of(number)
        for run, seconds in runs.items():
            report(Step(run, 0, 20, "chunks"))
            for chunk in range(1, 21):
                clock.now += seconds / 20
                report(Step(run, chunk, 20, "chunks"))
                yield clock.now, whole.left()
        whole.finish(number)
    assert said[-1].done == 100 and whole.left() == 0
    shares = [step.done for step in said]
    assert shares[0] == 0 and max(shares) == 100


def right(pieces: list[Piece], took: list[dict[str, float]], start: float = 0.1) -> None:
    told = list(work(pieces, took))
    end = told[-1][0]
    for now, left in told:
        if start * end <= now < 0.95 * end:
            assert abs(left - (end - now)) <= (end - now) / 3, (now, left, end)


def test_a_sweep_knows_its_end_after_a_tenth() -> None:
    """Ten equal points; the first also scores the baseline, which the others find in the cache. Nothing is known about
    the machine.
    """
    runs = [{f"head: p{n} on chat": 600.0, "head: base on chat": 600.0} for n in range(10)]
    took = [{run: 60.0 for run in one if n == 0 or "base" not in run} for n, one in enumerate(runs)]
    for expected in (1.0, 100.0, 10_000.0):
        right([Piece("head", one, expected) for one in runs], took)


def test_an_evaluation_of_two_files_knows_its_end() -> None:
    """By evaluators of different speed, of which the machine only remembers the order of magnitude."""
    runs, took, kinds = [], [], []
    for file in ("a", "b"):
        for kind, seconds in (("perplexity", 40.0), ("kld", 50.0), ("head", 80.0)):
            names = [f"{kind}: {file} on {text}" for text in ("chat", "code")]
            runs.append(dict.fromkeys(names, seconds * 0.7))
            took.append(dict.fromkeys(names, seconds))
            kinds.append(kind)
    right([Piece(kind, one, sum(one.values())) for kind, one in zip(kinds, runs, strict=True)], took)


def test_the_end_of_pieces_that_run_at_the_same_time() -> None:
    """Six of 60 s each on two workers of a cluster, the second a little behind the first: 180 s and a little."""
    clock, said = Clock(), list[Step]()
    pieces = [Piece("head", {f"head: p{n}": 600.0}, 100.0) for n in range(6)]
    whole = Whole("all", said.append, pieces, clock, at_once=lambda: 2)
    assert whole.left() == 300
    for now in range(1, 184):
        clock.now = float(now)
        for worker in (0, 1):
            number, second = divmod(now - 3 * worker - 1, 60)
            if 0 <= number < 3:
                whole.of(2 * number + worker)(Step(f"head: p{2 * number + worker}", second + 1, 60, "chunks"))
                if second == 59:
                    whole.finish(2 * number + worker)
        if 18 <= now < 175:
            assert abs(whole.left() - (183 - now)) <= (183 - now) / 3, now
    assert said[-1].done == 100 and whole.left() == 0 and max(step.done for step in said[:-1]) < 100


def test_the_end_of_pieces_that_run_alone_after_the_others() -> None:
    """What is timed is not measured on the workers of a cluster, but afterwards, one after the other."""
    pieces = [Piece("head", {f"head: p{n}": 1.0}, 100.0, alone=n >= 4) for n in range(6)]
    assert Whole("all", silent, pieces, Clock(), at_once=lambda: 2).left() == 200 + 200


def test_all_that_runs_at_the_same_time_is_shown() -> None:
    said: list[Step] = []
    whole = Whole("all", said.append, [Piece("a", {f"a: p{n}": 1.0}, 100.0) for n in range(7)], Clock())
    whole.of(3)(Step("a: p3", 0, 5, "chunks"))
    assert said[-1].detail == "1 of 7, a: p3 0/5 chunks"
    whole.of(0)(Step("waiting for another evaluation", 0))
    whole.of(3)(Step("a: p3", 1, 5, "chunks"))
    assert said[-1].detail == "2 of 7, a: p3 1/5 chunks, waiting for another evaluation"
    whole.finish(3)
    assert said[-1].detail == "2 of 7, waiting for another evaluation"
    for number in (1, 2, 4, 5, 6):
        whole.of(number)(Step(f"a: p{number}", 2, 5, "chunks"))
    assert said[-1].detail.startswith("7 of 7, waiting ") and said[-1].detail.endswith("a: p4 2/5 chunks, and 2 more")


def test_what_was_there_before_takes_no_time() -> None:
    clock = Clock()
    said: list[Step] = []
    whole = Whole("all", said.append, [Piece("a", {"a": 1.0}, 100.0), Piece("a", {"b": 1.0}, 100.0)], clock)
    assert whole.left() == 200
    whole.finish(0, reused=True)
    assert whole.left() == 100
