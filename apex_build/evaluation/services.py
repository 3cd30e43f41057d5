"""Evaluators that apex picks by itself, by what they declare they are for (hookspecs.Service), never by name."""

from __future__ import annotations

from collections.abc import Mapping

from apex_build.errors import EvaluationRefused, PluginFailed
from apex_build.hookspecs import Evaluator, Service
from apex_build.loaded import origin_of


def serving(evaluators: Mapping[str, Evaluator], purpose: str, meaning: str = "") -> list[tuple[Evaluator, Service]]:
    """Those that serve a purpose; with `meaning` those that name a figure for it."""
    return [
        (evaluator, service)
        for evaluator in evaluators.values()
        for service in evaluator.serves
        if service.purpose == purpose and (not meaning or meaning in service.figures)
    ]


def the_one_serving(evaluators: Mapping[str, Evaluator], purpose: str, meaning: str) -> tuple[Evaluator, Service]:
    """The only evaluator that serves a purpose. Raises EvaluationRefused if there is none, PluginFailed if there are
    several.
    """
    found = serving(evaluators, purpose, meaning)
    if not found:
        raise EvaluationRefused(
            f"no evaluator serves '{purpose}' with a figure for {meaning}",
            hint="apex plugins list: was a plugin left out?",
        )
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise PluginFailed(
            f"two evaluators serve '{purpose}' with a figure for {meaning}: '{first.name}' of plugin "
            f"'{origin_of(first)[0]}' and "
            f"'{second.name}' of plugin '{origin_of(second)[0]}'",
            hint="leave one of the plugins out: APEX_PLUGINS_OFF=NAME",
        )
    return found[0]


def settings_for(evaluator: Evaluator, service: Service, **further: str) -> dict[str, str]:
    """Its settings for the purpose, as for `--set`; `further` ones if the evaluator has such a parameter."""
    known = {name: value for name, value in further.items() if name in evaluator.parameters}
    return {f"{evaluator.name}.{name}": value for name, value in {**service.settings, **known}.items()}
