"""The drafts of pull requests only describe patches that exist."""

from __future__ import annotations

from apex_build.source.pins import all_pins
from apex_build.source.series import read_series
from apex_build.workshop.exporting import check_author, export_facts


def test_facts_are_about_patches_of_a_series() -> None:
    subjects = {patch.subject for pin in all_pins() for patch in read_series(pin)}
    facts = export_facts()
    assert facts
    # a pin's patch may carry a subject of its own: one of an entry's subjects has to be there
    assert [entry["subjects"] for entry in facts.values() if not subjects & set(entry["subjects"])] == []
    assert all(entry["tested"] for entry in facts.values())


def test_each_patch_says_how_it_was_tested() -> None:
    facts = export_facts()
    assert [patch.name for pin in all_pins() for patch in read_series(pin) if patch.subject not in facts] == []


def test_our_series_have_one_author() -> None:
    for pin in all_pins():
        check_author(pin, read_series(pin))
