"""Draft acceptance as a user lives it: llama-server drafts with the model's own head, and counts what the trunk accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.native.server import serve
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent


@dataclass(frozen=True)
class Prompt:
    domain: str
    text: str


@dataclass(frozen=True)
class Acceptance:
    """Tokens drafted by the head and accepted by the trunk, over all prompts."""

    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


def read_prompts(path: Path) -> list[Prompt]:
    """One JSON object a line: `domain` and `prompt`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Prompt(row["domain"], row["prompt"]) for row in rows]


def draft_acceptance(
    tools: Toolset,
    model: Path,
    prompts: Sequence[Prompt],
    *,
    n_max: int = 2,
    n_predict: int = 48,
    report: Report = silent,
    arguments: Sequence[str] = (),
) -> dict[str, Acceptance]:
    """Acceptance by domain, greedy, with drafts of up to `n_max` tokens and `n_predict` tokens written for each prompt."""
    counts: dict[str, tuple[int, int]] = {}
    wanted = ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max), "-np", "1", "--ctx-size", "2048", *arguments]
    with serve(tools, model, arguments=wanted) as server:
        for number, prompt in enumerate(prompts, 1):
            timings = server.completion(prompt.text, n_predict=n_predict, cache_prompt=False)["timings"]
            drafted, accepted = counts.get(prompt.domain, (0, 0))
            counts[prompt.domain] = (drafted + timings.get("draft_n", 0), accepted + timings.get("draft_n_accepted", 0))
            report(Step(f"drafting with {model.name}", number, len(prompts), "prompts"))
    return {domain: Acceptance(*pair) for domain, pair in counts.items()}


def overall(by_domain: dict[str, Acceptance]) -> Acceptance:
    return Acceptance(sum(a.drafted for a in by_domain.values()), sum(a.accepted for a in by_domain.values()))
