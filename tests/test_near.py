"""Mistyped names get suggestions, wherever a name can be given."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from apex_build.calibration.sets import load_set
from apex_build.cli import apex
from apex_build.errors import ApexError, CalibrationSetInvalid, EvaluatorUnknown, PinUnknown, PolicyUnknown
from apex_build.evaluation.run import check_settings
from apex_build.near import near, near_folder, nearby
from apex_build.plugins import load_plugins
from apex_build.source.pins import load_pin
from apex_build.storage.outputs import check_place


def test_case_and_what_joins_words_do_not_count() -> None:
    assert near("I NANO", ["quality", "i-nano", "draft_head"]) == ["i-nano"]
    assert near("drafthead", ["quality", "draft_head"]) == ["draft_head"]
    assert nearby("zzz", ["quality"]) == ""
    assert nearby("qualiti", ["quality"]) == "; near it: quality"


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(apex, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("words", "right"), [(("quantise",), "quantize"), (("source", "fetsch"), "fetch"), (("patch", "stat"), "status")]
)
def test_verbs(words: tuple[str, ...], right: str) -> None:
    said = ran(*words)
    assert said.exit_code == 2 and f"No such command '{words[-1]}'; near it: {right}" in said.output


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Q4_K_M", "--policy uniform --set type=Q4_K"),
        ("q8_0", "--policy uniform --set type=Q8_0"),
        ("IQ3_M", "--policy uniform --set type=IQ3_S"),
        ("IQ2_XXS", "--policy uniform --set type=IQ2_XXS"),
        ("F16", "--policy uniform --set type=F16"),
        ("nano", "apex policies"),
    ],
)
def test_a_type_in_place_of_a_policy(name: str, hint: str) -> None:
    with pytest.raises(PolicyUnknown) as caught:
        load_plugins().policy(name)
    assert (caught.value.hint or "").startswith(hint)


@pytest.mark.parametrize(
    ("ask", "error", "right"),
    [
        (lambda: load_set("defalt"), CalibrationSetInvalid, "default"),
        (lambda: load_pin("lastest"), PinUnknown, "latest"),
        (lambda: load_plugins().policy("i-nanno"), PolicyUnknown, "i-nano"),
        (lambda: check_settings({"draft_head.depth": "1"}, load_plugins().evaluators()), ApexError, "draft-head"),
    ],
)
def test_names_of_the_product(ask: object, error: type[ApexError], right: str) -> None:
    with pytest.raises(error, match=f"near it: {right}"):
        ask()  # type: ignore[operator]


def test_evaluators(testbed: Path, heldout: Path) -> None:
    said = ran("evaluate", testbed, "--only", "perplxity", "--text", heldout / "chat.txt", "--tools", heldout)
    assert isinstance(said.exception, (EvaluatorUnknown, ApexError))


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert near_folder(tmp_path / "modles" / "deeper") == f"; near it: {tmp_path / 'models'}"
    assert near_folder(tmp_path / "zzz") == ""
    with pytest.raises(ApexError, match=f"modles: no such folder; near it: {tmp_path / 'models'}"):
        check_place(tmp_path / "modles" / "model.gguf", "")
