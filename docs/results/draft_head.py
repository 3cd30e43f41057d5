"""Tables and plots of draft-head.md, from the folder that measure.sh filled: python docs/results/draft_head.py FOLDER

Prints the tables as Markdown, and writes the plots beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apex_build.report.plot import Chart, Mark, Series, draw

HERE = Path(__file__).parent
AGREEMENT = "depth1.agreement"
Row = dict[str, Any]
QUARTER = "routed IQ2_XXS, rest Q4_K"
# bytes of the head on the shapes of Qwen3.5/3.6-35B-A3B: apex plan, policy draft-head-only (tests/policy/test_small_head.py)
ON_35B = {QUARTER: "232 MB on the 35B-A3B", "routed IQ1_S, rest Q4_K": "181 MB"}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def over_all(figures: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {figure["name"]: figure for figure in figures if not figure["domain"]}


def swept(folder: Path, name: str) -> list[Row]:
    """Points of a sweep: label, head data, bytes, figures by name (None: refused)."""
    rows = []
    for row in read(folder / name / "sweep.jsonl"):
        figures = over_all(row["figures"]["draft-head"]) if "draft-head" in row["figures"] else None
        values = {key.removeprefix("draft_head").lstrip("."): value for key, value in row["values"].items()}
        rows.append({"values": values, "head_data": row["head_data"], "bytes": row["head_bytes"], "figures": figures})
    return rows


def evaluated(path: Path, evaluator: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    return {row["file"].removesuffix(".gguf"): over_all(row["figures"]) for row in read(path) if row["evaluator"] == evaluator}


def cell(figure: Mapping[str, Any] | None, digits: int = 2) -> str:
    if figure is None:
        return ""
    if figure["low"] is None:
        return f"{figure['value']:.{digits}f}"
    sign = "+" if figure["name"].endswith("difference") else ""
    return f"{figure['value']:{sign}.{digits}f} [{figure['low']:{sign}.{digits}f}, {figure['high']:{sign}.{digits}f}]"


def table(head: str, rows: Iterable[Iterable[str]]) -> None:
    columns = head.split(" | ")
    print(f"| {head} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def interval(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    return None if figure["low"] is None else (figure["low"], figure["high"])


def mark(row: Row, label: str, *, ring: bool = False) -> Mark:
    """Score against bytes; the thick bar is the paired difference's interval, about the point."""
    if row["figures"] is None:
        return Mark(row["bytes"] / 1e6, None, label)
    score, difference = row["figures"][AGREEMENT], row["figures"].get(f"{AGREEMENT}.difference")
    value = score["value"]
    inner = None
    if difference and difference["low"] is not None:
        inner = (value + difference["low"] - difference["value"], value + difference["high"] - difference["value"])
    return Mark(row["bytes"] / 1e6, value, label, y_interval=interval(score), inner=inner, ring=ring)


def types(folder: Path) -> list[Row]:
    rows = swept(folder, "types")
    without = {row["values"][""]: row for row in rows if not row["head_data"]}
    gains = evaluated(folder / "gains.jsonl", "draft-head")
    lines = []
    for row in rows:
        if not row["head_data"]:
            continue
        kind, figures = row["values"][""], row["figures"]
        other = without[kind]["figures"]
        gain = gains.get(f"testbed-f16-draft_head-{kind}-with-head-data", {})
        lines.append(
            [
                kind,
                f"{row['bytes']:,}",
                cell(figures[AGREEMENT]),
                cell(figures[f"{AGREEMENT}.difference"]),
                cell(other[f"{AGREEMENT}.difference"]) if other else "refused",
                cell(gain.get(f"{AGREEMENT}.difference")),
                cell(gain.get("depth1.kld.difference"), 4),
            ]
        )
    table("head | bytes | agreement, % | difference from Q8_0, points | without head data | gain, points | gain, KLD", lines)
    return rows


def mixtures(folder: Path) -> list[Row]:
    rows = [*swept(folder, "mixtures"), *swept(folder, "mixtures-q6")]
    parts = {part: swept(folder, f"part-{part}")[-1] for part in ("eh_proj", "attention", "routed", "shared")}
    head = "head | bytes | depth 1, points | depth 2 | depth 3 | tokens a step, drafts of 3"

    def line(name: str, row: Row) -> list[str]:
        figures = row["figures"]
        depths = [cell(figures[f"depth{depth}.agreement.difference"]) for depth in (1, 2, 3)]
        return [name, f"{row['bytes']:,}", *depths, cell(figures["tokens.3.difference"], 4)]

    table(head, [line(f"{part} IQ2_XXS, rest Q8_0", row) for part, row in parts.items()])
    for row in rows:
        row["name"] = f"routed {row['values']['routed']}, rest {row['values']['other']}"
    rows.sort(key=lambda row: -row["bytes"])
    table(head, [line(row["name"], row) for row in rows])
    table(head, [line(f"i-nano trunk, head {row['values']['']}", row) for row in swept(folder, "nano")])
    table(head, [line(row["values"][""], row) for row in swept(folder, "types") if row["head_data"]])
    return rows


def plot_types(rows: list[Row], mixed: list[Row]) -> None:
    series = [
        Series(name, tuple(mark(row, row["values"][""]) for row in rows if row["head_data"] == data))
        for name, data in (("one type, with head data", True), ("one type, without", False))
    ]
    marks = tuple(
        mark(row, f"{row['name']} ({ON_35B[row['name']]})" if row["name"] in ON_35B else row["name"], ring=row["name"] == QUARTER)
        for row in mixed
    )
    series.append(Series("mixtures, with head data", marks, joined=False))
    q8 = rows[0]["figures"][AGREEMENT]
    draw(
        Chart(
            f"Draft head of the test model, n = {q8['n']:,} positions",
            "bytes of the head (MB)",
            "agreement with the trunk at depth 1 (%)",
            tuple(series),
            lines=((q8["value"] - 0.5, "0.5 points under Q8_0"),),
            ring="shipped as …-mtp",
            inner="95 % of the difference from Q8_0",
        ),
        HERE / "draft-head-types.svg",
    )


def chunks(folder: Path) -> None:
    found = evaluated(folder / "chunks.jsonl", "draft-head")
    numbers = {"full": 283}
    series = []
    lines = []
    for kind, name in (("IQ2_XXS", "all IQ2_XXS"), ("mixture", QUARTER)):
        marks = []
        for file, figures in found.items():
            stem, _, count = file.partition("-")
            if stem != kind or not (count.isdigit() or count in numbers):
                continue
            difference = figures[f"{AGREEMENT}.difference"]
            number = numbers.get(count) or int(count)
            marks.append(Mark(number, difference["value"], y_interval=interval(difference)))
            lines.append((name, number, [name, str(number), cell(figures[AGREEMENT]), cell(difference)]))
        series.append(Series(name, tuple(sorted(marks, key=lambda one: one.x))))
    table("head | chunks of 512 | agreement, % | difference from Q8_0, points", [line[2] for line in sorted(lines)])
    draw(
        Chart("How much text the head needs", "chunks of 512 tokens", "difference from Q8_0 (points)", tuple(series)),
        HERE / "draft-head-chunks.svg",
    )


def domains(folder: Path) -> None:
    names = ("chat", "code", "reasoning", "tool-calling")
    rows = []
    for row in read(folder / "chunks.jsonl"):
        trained = row["file"].removesuffix(".gguf").removeprefix("IQ2_XXS-")
        if not row["file"].startswith("IQ2_XXS-") or trained not in (*names, "50", "full"):
            continue
        of = {figure["domain"]: figure for figure in row["figures"] if figure["name"] == f"{AGREEMENT}.difference"}
        rows.append(
            [
                {"50": "all four, 50 chunks", "full": "all four, 283 chunks"}.get(trained, trained),
                *(cell(of[name]) for name in ("", *names)),
            ]
        )
    table(f"calibrated on | all | {' | '.join(names)}", rows)


def acceptance(folder: Path, rows: list[Row], mixed: list[Row]) -> None:
    found = evaluated(folder / "acceptance.jsonl", "draft-acceptance")
    scores = {"mixture-full": next(row for row in mixed if row["name"] == QUARTER)["figures"]}
    for row in rows:
        if row["figures"]:
            name = f"testbed-f16-draft_head-{row['values']['']}-{'with' if row['head_data'] else 'without'}-head-data"
            scores[name] = row["figures"]
    marks, lines = [], []
    for file, figures in found.items():
        accepted, score, same = figures["greedy.n1.acceptance"], scores[file][AGREEMENT], figures["greedy.n1.same_text"]
        name = QUARTER if file == "mixture-full" else file.removeprefix("testbed-f16-draft_head-").replace("-with-head-data", "")
        name = name.replace("-without-head-data", " (no data)")
        marks.append(Mark(score["value"], accepted["value"], name, x_interval=interval(score), y_interval=interval(accepted)))
        drafted = f"{figures['greedy.n1.drafted']['value']:.0f}"
        lines.append([name, cell(score), cell(accepted, 1), drafted, cell(figures["greedy.n1.tokens_per_step"], 3), cell(same, 1)])
    table("head | agreement, % | acceptance, % | drafted | tokens a step | same text, %", lines)
    draw(
        Chart(
            "Score and acceptance",
            "agreement at depth 1, teacher-forced (%)",
            "greedy acceptance in llama-server, drafts of 1 (%)",
            (Series("", tuple(marks), joined=False),),
        ),
        HERE / "draft-head-acceptance.svg",
    )


def main() -> None:
    folder = Path(sys.argv[1])
    rows = types(folder)
    mixed = mixtures(folder)
    chunks(folder)
    domains(folder)
    acceptance(folder, rows, mixed)
    plot_types(rows, mixed)


if __name__ == "__main__":
    main()
