"""Predict how long a calibration will take: run a few chunks, and extrapolate."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

from apex_build.calibration.run import Settings, arguments, memory_for
from apex_build.calibration.sets import CalibrationText
from apex_build.gguf_model.catalogue import Model
from apex_build.native import output
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.storage.scratch import scratch_folder

_MEASURED = 6  # chunks, without the first one, which warms up
_LEAST = 3  # chunks of a shard


@dataclass(frozen=True)
class Forecast:
    """`start`: seconds until the first chunk begins, for loading the model. `chunks`: of the whole text."""

    chunks: int
    measured: int
    start: float
    chunk: float  # seconds

    def seconds(self, workers: int = 1, before: int = 0) -> float:
        """Seconds for a run on several such machines, a shard each; `before`: chunks that are run here first."""
        return self.start + self.chunk * (before + -(-self.chunks // workers))

    @property
    def workers(self) -> list[int]:
        """Possible numbers of machines."""
        return [number for number in (1, 2, 4, 8, 16, 32) if number == 1 or self.chunks >= _LEAST * number]


@dataclass
class _Clock:
    began: float
    report: Report
    chunks: int = 0
    start: float = 0.0
    marks: list[float] = field(default_factory=list)
    seen: int = 0

    def line(self, said: str) -> None:
        now = time.monotonic()
        if plan := output.planned(said):
            self.chunks, self.start = plan.chunks, now - self.began
        mark = output.chunks_done(said)
        if self.chunks and mark is not None and mark > self.seen:
            self.seen = mark
            self.marks.append(now)
            self.report(Step("measuring", mark, _MEASURED, "chunks"))
            if mark >= _MEASURED:
                raise _Enough


class _Enough(Exception):
    pass


def forecast(
    model: Model, text: CalibrationText, tools: Toolset, settings: Settings, report: Report = silent
) -> Forecast:
    """Run the text's first chunks, draft head included. Nothing is kept. Raises ToolFailed, ToolKilled."""
    with scratch_folder("forecast") as folder:
        place = folder / "text"
        place.mkdir()
        (place / text.name).write_bytes(text.data)
        command = [*arguments(model, settings, tools), "--file", text.name, "--output", str(folder / "x.gguf")]
        clock = _Clock(time.monotonic(), report)
        with contextlib.suppress(_Enough):
            run_tool(
                command,
                cwd=place,
                on_line=clock.line,
                explain=output.explain,
                memory=memory_for(model, settings),
            )
    chunks = min(clock.chunks, settings.chunks or clock.chunks)
    if clock.seen > 1 and len(clock.marks) > 1:
        each = (clock.marks[-1] - clock.marks[0]) / (clock.seen - 1)
    else:
        each = (clock.marks[-1] - clock.began - clock.start) / clock.seen
    return Forecast(chunks, clock.seen, clock.start, each)
