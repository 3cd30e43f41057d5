"""Draft acceptance as a user sees it: llama-server drafts with the model's head, and the trunk accepts or rejects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from apex_build.plugin_api import (
    AUTO_ROWS,
    GENERATED,
    HEAD_ROWS,
    Draft,
    Evaluator,
    Figure,
    Parameter,
    ParameterUnknown,
    Prompt,
    Server,
    Service,
    Step,
    Task,
    hookimpl,
    ratio_interval,
    share_interval,
    tokens_of,
)

APEX_API = 3

# for apex check: mixture-of-experts models do best with drafts of two tokens
_CHECKED = {name: f"greedy.n2.{name}" for name in ("acceptance", "same_text", "drafted", "accepted")}


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [
        Evaluator(
            name="draft-acceptance",
            evaluate=evaluate,
            needs=("head", "prompts"),
            parameters={
                "lengths": Parameter("1,2,3,4", "text", "how many tokens are drafted at a time: a number, or several"),
                "temperature": Parameter(
                    0.8, "number", "of the sampled texts, beside the server's other samplers; 0: greedy only"
                ),
                "seed": Parameter(1, "int", "of the first prompt's sampled text; each prompt has the next one"),
                "n_predict": Parameter(48, "int", "tokens written after each prompt"),
                "rows": Parameter(
                    "auto",
                    "text",
                    "hidden rows that the head reads: pre or post the final norm; auto: the server's choice",
                ),
                "context": Parameter(2048, "int", "tokens of the context, for a prompt and its continuation"),
            },
            headline=(("greedy.n2.acceptance", "acceptance"), ("greedy.n*.acceptance", "acceptance")),
            runs=_runs,
            serves=(Service("check", _CHECKED, {"lengths": "2", "temperature": "0", "context": "4096"}),),
            description="llama-server with draft-mtp: tokens drafted and accepted, tokens for each evaluation of the "
            "trunk",
        )
    ]


def _runs(task: Task) -> dict[str, float]:
    modes = 2 if float(task.settings["temperature"]) > 0 else 1
    passes = 1 + len(_lengths(str(task.settings["lengths"]))) * modes
    read = sum(tokens_of(len(prompt.text.encode())) for prompt in task.prompts)
    written = len(task.prompts) * task.number("n_predict")
    return {f"{task.evaluator}: {task.model.path.name}": passes * (read + written * GENERATED)}


@dataclass(frozen=True)
class Writing:
    """What was written after a prompt. `written` leaves out the first token, which comes from evaluating the prompt
    itself.

    `drafts`: what became of each, or None if the server does not tell.
    """

    domain: str
    text: str
    written: int
    drafted: int
    accepted: int
    drafts: tuple[Draft, ...] | None  # as Server.drafts gives them

    def at(self, place: int) -> tuple[int, int]:
        """Accepted and drafted tokens at this position in the drafts, starting at 1."""
        drafts = self.drafts or ()
        return sum(draft.accepted >= place for draft in drafts), sum(draft.drafted >= place for draft in drafts)

    @property
    def evaluations(self) -> int:
        """Evaluations of the trunk. Tokens outside drafts were written alone: the last one, for which nothing is
        drafted.
        """
        drafts = self.drafts or ()
        return sum(draft.evaluations for draft in drafts) + max(
            0, self.written - sum(draft.written for draft in drafts)
        )


def evaluate(task: Task) -> list[Figure]:
    """Greedy texts without drafts, then with drafts of each length, greedy and sampled."""
    lengths = _lengths(str(task.settings["lengths"]))
    n_predict = task.number("n_predict")
    if n_predict < 2:
        raise ParameterUnknown(
            f"{task.evaluator}.n_predict takes a number from 2, not {n_predict}: the first token is never drafted"
        )
    temperature = float(task.settings["temperature"])
    modes = {"greedy": 0.0, **({"sampled": temperature} if temperature > 0 else {})}
    counter = _counter(task, len(task.prompts) * (1 + len(lengths) * len(modes)))
    rows = str(task.settings["rows"])
    if rows not in (AUTO_ROWS, *HEAD_ROWS):
        raise ParameterUnknown(f"{task.evaluator}.rows takes {AUTO_ROWS}, {' or '.join(HEAD_ROWS)}, not '{rows}'")
    base = ("--parallel", "1", "--ctx-size", str(task.number("context")))
    # a server without this project's patches does not know the option
    drafting = ("--spec-type", "draft-mtp", *(() if rows == AUTO_ROWS else ("--mtp-rows", rows)))

    with task.serve(*base) as server:
        server.check_room(((prompt.origin, prompt.text) for prompt in task.prompts), n_predict)
        plain = [_write(server, prompt, n_predict, counter, False) for prompt in task.prompts]
    figures = []
    for length in lengths:
        with task.serve(*base, *drafting, "--spec-draft-n-max", str(length)) as server:
            for mode, heat in modes.items():
                writings: list[Writing] = []
                for number, prompt in enumerate(task.prompts):
                    told = not writings or writings[-1].drafts is not None
                    options = {"temperature": heat, "seed": task.number("seed") + number}
                    writings.append(_write(server, prompt, n_predict, counter, told, **options))
                name = f"{mode}.n{length}"
                figures += _figures(name, length, writings)
                if mode == "greedy":
                    same = [one.text == other.text for one, other in zip(writings, plain, strict=True)]
                    low, high = share_interval(sum(same), len(same))
                    share = 100 * sum(same) / len(same)
                    figures.append(
                        Figure(f"{name}.same_text", share, 100 * low, 100 * high, "%", len(same), better="higher")
                    )
    return figures


def _write(
    server: Server, prompt: Prompt, n_predict: int, done: Callable[[], None], told: bool, **options: Any
) -> Writing:
    since = server.printed()
    answer = server.completion(prompt.text, n_predict=n_predict, cache_prompt=False, **options)
    drafts = server.drafts(answer, since) if told else None
    drafted, accepted = (int(answer["timings"].get(name, 0)) for name in ("draft_n", "draft_n_accepted"))
    if drafts is not None:  # the server counts a token twice if it evaluates it twice
        accepted = sum(draft.accepted for draft in drafts)
    done()
    return Writing(
        prompt.domain, answer["content"], max(0, int(answer["tokens_predicted"]) - 1), drafted, accepted, drafts
    )


def _figures(name: str, length: int, writings: Sequence[Writing]) -> list[Figure]:
    """Figures over all prompts, and for each domain if there are several."""
    domains = {"": list(writings)}
    names = dict.fromkeys(writing.domain for writing in writings)
    if len(names) > 1:
        domains |= {domain: [writing for writing in writings if writing.domain == domain] for domain in names}
    figures = []
    for domain, group in domains.items():
        n = len(group)
        told = all(one.drafts is not None for one in group)
        figures += [
            Figure(f"{name}.drafted", sum(one.drafted for one in group), unit="tokens", n=n, domain=domain),
            Figure(f"{name}.accepted", sum(one.accepted for one in group), unit="tokens", n=n, domain=domain),
            _ratio(f"{name}.acceptance", group, [(one.accepted, one.drafted) for one in group], "%", domain),
        ]
        for place in range(1, length + 1) if not domain else ():
            figures.append(
                _ratio(f"{name}.acceptance_at_{place}", group, [one.at(place) for one in group], "%", domain, told)
            )
        steps = [(one.written, one.evaluations) for one in group]
        figures.append(_ratio(f"{name}.tokens_per_step", group, steps, "", domain, told))
    return figures


def _ratio(
    name: str, group: Sequence[Writing], pairs: Sequence[tuple[int, int]], unit: str, domain: str, told: bool = True
) -> Figure:
    """The sum of first values over the sum of second values, one pair for each prompt; each domain's prompts are a
    stratum.
    """
    over, under = zip(*pairs, strict=True)
    label = _label(name)
    if not told or not sum(under):
        note = "nothing was drafted" if told else "this llama-server does not report each draft"
        return Figure(name, None, unit=unit, n=len(pairs), domain=domain, note=note, better="higher", label=label)
    strata = [sorted({one.domain for one in group}).index(one.domain) for one in group]
    value, low, high = ratio_interval(over, under, strata).times(100 if unit == "%" else 1)
    return Figure(name, value, low, high, unit, len(pairs), domain, better="higher", label=label)


def _label(name: str) -> str:
    mode, length, what = name.split(".")
    texts = {"acceptance": "accepted drafts, {} at a time", "tokens_per_step": "tokens for each step, {} drafted"}
    return f"{texts[what].format(length.removeprefix('n'))}, {mode}" if what in texts else ""


def _lengths(text: str) -> list[int]:
    if not re.fullmatch(r"\s*[1-9][0-9]?(\s*,\s*[1-9][0-9]?)*\s*", text):
        raise ParameterUnknown(f"draft-acceptance.lengths takes numbers from 1 to 99, such as 1,2,3,4: not '{text}'")
    return sorted({int(part) for part in text.split(",")})


def _counter(task: Task, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        task.report(Step(f"{task.evaluator}: {task.model.path.name}", done, total, "prompts"))

    return count
