"""The scores that llama-perplexity prints, as data; what it prints on the way to them is in output.py.

Pure functions of its lines. The formats are those of tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = r"(-?(?:\d+\.\d+|nan|inf))"
_RUNNING = re.compile(rf"\[(\d+)\]{_NUMBER},")
# PPL, ln(PPL(Q)/PPL(base)), KL divergence, Δp RMS, same top p: each with its error
_DIVERGENCE = re.compile(rf"\s*(\d+)\s+{_NUMBER} ±\s+{_NUMBER}" + rf"\s+{_NUMBER} ±\s+{_NUMBER}(?: %)?" * 4)
# `12\t33.33333333%\t[...]`, `12\t33.3333\t-4.5 ...` or `12\t33.33333333`: tasks so far, and their accuracy
_TASKS = re.compile(r"(\d+)\t(\d+\.\d+)(?:%?\t.*)?\s*")
_ERROR = re.compile(r"[\d.]+ E (.*)")  # time, level, text
_TOO_SHORT = re.compile(r"you need at least (\d+) tokens")
_TOKENS = re.compile(r"tokenizes to only (\d+) tokens")


def running_perplexities(lines: Sequence[str]) -> list[tuple[int, float]]:
    """(number of chunks, perplexity of all of them so far), after each chunk."""
    return [(int(number), float(value)) for number, value in _RUNNING.findall("".join(lines))]


def divergence_rows(lines: Sequence[str]) -> list[list[float]]:
    """The table of --kl-divergence, a row for each chunk over all chunks so far.

    Number of chunks; then value and standard error of PPL, ln(PPL(Q)/PPL(base)), KL divergence, Δp RMS, same top p.
    """
    return [[float(value) for value in row.groups()] for line in lines if (row := _DIVERGENCE.match(line))]


def divergence_statistic(lines: Sequence[str], name: str) -> tuple[float, float] | None:
    """A line of the statistics at the end, such as 'Mean KLD': value and standard error, NaN where none is printed."""
    label = r" +".join(map(re.escape, name.split()))
    pattern = re.compile(rf"{label}\s*:\s*{_NUMBER}(?:\s+±\s+{_NUMBER})?")
    found = next((found for line in lines if (found := pattern.match(line))), None)
    return (float(found[1]), float(found[2] or "nan")) if found else None


def tasks_scored(lines: Sequence[str]) -> tuple[int, float]:
    """Multiple-choice tasks done and their accuracy in percent, by the last line that says so; (0, 0.0) without one."""
    found = next((found for line in reversed(lines) if (found := _TASKS.fullmatch(line))), None)
    return (int(found[1]), float(found[2])) if found else (0, 0.0)


def logged_error(lines: Sequence[str]) -> str | None:
    """The first error in the log: the tool may exit with code 0 in spite of it."""
    return next((found[1] for line in lines if (found := _ERROR.match(line))), None)


def vocabulary_differs(lines: Sequence[str]) -> bool:
    """Whether the model has another vocabulary than its reference: the tool says so and continues."""
    return any("inconsistent vocabulary" in line for line in lines)


def text_too_short(lines: Sequence[str]) -> tuple[int, int | None] | None:
    """Tokens that a text would need, and those that it has, if the tool says that it is too short."""
    needed = next((found for line in lines if (found := _TOO_SHORT.search(line))), None)
    has = next((found for line in lines if (found := _TOKENS.search(line))), None)
    return (int(needed[1]), int(has[1]) if has else None) if needed else None
