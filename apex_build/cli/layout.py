"""Tables and names as text: columns if they fit the terminal's width; words are never broken."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = 2  # between columns
_LEAST = 12  # characters that a shortened word keeps


def shorten(text: str, width: int) -> str:
    """The text cut to `width` characters in its middle: names differ at their ends."""
    if len(text) <= width:
        return text
    if width <= 1:
        return text[:width]
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def lay_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int | None = None
) -> list[str]:
    """Lines of a table, its header first. `right`: columns to align right. `width` None: unlimited.

    Columns that are too wide are wrapped between words; then long words are shortened in their middle; and where even
    that does not fit, each row gets its own lines.
    """
    table = [[str(cell).split("\n") for cell in row] for row in (columns, *rows)]
    widths = [max(len(line) for row in table for line in row[at]) for at in range(len(columns))]
    if width is not None and _total(widths) > width:
        words = [
            max(len(word) for row in table for line in row[at] for word in line.split(" ")) for at in range(len(widths))
        ]
        least = [max(1, min(found, one)) for found, one in zip(widths, words, strict=True)]
        if _total(least) > width:
            least = _narrowed(least, [min(_LEAST, one) for one in least], width)
        if _total(least) > width:
            return _records(columns, rows, width)
        widths = _narrowed(widths, least, width)
    return [line for row in table for line in _row(row, widths, right)]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, broken between words; a longer word is shortened in its middle."""
    lines: list[str] = []
    for word in text.split(" "):
        word = shorten(word, width)
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _narrowed(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Narrow the widest columns first, none below its minimum."""
    found = list(widths)
    while _total(found) > width:
        can = [at for at in range(len(found)) if found[at] > least[at]]
        if not can:
            break
        found[max(can, key=lambda at: found[at])] -= 1
    return found


def _row(row: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[int]) -> list[str]:
    cells = [[part for line in cell for part in wrap(line, width)] for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        placed = [
            p.rjust(w) if at in right else p.ljust(w) for at, (p, w) in enumerate(zip(parts, widths, strict=True))
        ]
        lines.append((" " * _GAP).join(placed).rstrip())
    return lines


def _records(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Each row as lines `column  value`."""
    label = max(map(len, columns))
    lines: list[str] = []
    for number, row in enumerate(rows):
        lines += [""] if number else []
        for column, cell in zip(columns, row, strict=True):
            parts = [part for line in str(cell).split("\n") for part in wrap(line, max(8, width - label - _GAP))]
            lines += [
                f"{(column if not at else '').ljust(label + _GAP)}{part}".rstrip()
                for at, part in enumerate(parts)
                if part
            ]
    return lines
