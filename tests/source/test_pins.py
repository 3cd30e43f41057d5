"""Pins: the shipped ones are complete, a user's pin is read, and a bad one is rejected by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from source.tiny import Apex, World

from apex_build.errors import PinUnknown
from apex_build.places import chosen_pin_name
from apex_build.source.pins import DEFAULT_PIN, Pin, all_pins, load_pin
from apex_build.source.tree import tree_path


def test_shipped_pins() -> None:
    pins = all_pins()
    assert [pin.name for pin in pins] == [DEFAULT_PIN, "latest"]
    assert load_pin() == pins[0]
    assert len({pin.tree_digest for pin in pins}) == 2
    assert pins[0].patches_folder.name == DEFAULT_PIN


@pytest.mark.parametrize("name", ["pr-1", "", "../vendor/latest", "a b"])
def test_unknown_pin(name: str) -> None:
    if not name:
        assert load_pin(name).name == DEFAULT_PIN
        return
    with pytest.raises(PinUnknown, match=r"there is no pin .*There are: pr-22673, latest"):
        load_pin(name)


def test_unknown_pin_on_the_command_line(apex: Apex) -> None:
    said = apex("source", "fetch", pin="nothing-like-it")
    assert said.code == PinUnknown.exit_code
    assert "there is no pin 'nothing-like-it'. There are: pr-22673, latest" in said.err
    assert "Traceback" not in said.err


def test_own_pin(world: World) -> None:
    pin = load_pin(str(world.toml))
    assert pin == world.pin
    assert pin.patches_folder == world.patches
    assert pin.option == f" --pin {world.toml}"
    assert load_pin().option == ""
    assert load_pin("latest").option == " --pin latest"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "tiny"', 'name = "../x"', "`name` must match"),
        ("tree_digest", "digest", "`tree_digest` must match .*found nothing"),
        ('folder = "vendor/llama.cpp"', 'folder = "../.."', "`sdist.folder` must match"),
        ('file = "tiny', 'file = "/etc/tiny', "`sdist.file` must match"),
        ("[sdist]", "[other]", "`sdist.requirement` must match"),
        ("size = ", "size = -", "`sdist.size` must be a number of bytes"),
        ('name = "tiny"', "name = ", "cannot read the pin file"),
    ],
)
def test_bad_pin_file(world: World, old: str, new: str, words: str) -> None:
    world.toml.write_text(world.toml.read_text().replace(old, new))
    with pytest.raises(PinUnknown, match=words):
        load_pin(str(world.toml))


def test_missing_pin_file(world: World) -> None:
    with pytest.raises(PinUnknown, match=r"pin file .*absent\.toml not found"):
        load_pin(str(world.toml.with_name("absent.toml")))


@pytest.mark.parametrize("pin", all_pins(), ids=lambda pin: pin.name)
def test_what_a_pin_serves_is_what_its_tree_knows(pin: Pin) -> None:
    source = tree_path(pin) / "src" / "llama-arch.cpp"
    if not source.is_file():
        pytest.skip(f"the source of {pin.name} has not been fetched")
    names = source.read_text(encoding="utf-8").partition("LLM_ARCH_NAMES")[2].partition("};")[0]
    known = {name for name in re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"', names) if "unknown" not in name}
    assert pin.serves is not None and pin.serves.architectures == known
    assert pin.serves.heads | pin.serves.heads_idle < known and not pin.serves.heads & pin.serves.heads_idle


@pytest.mark.parametrize(
    "serves", ["3", "[]", "{ architectures = 3, heads = [], heads_idle = [] }", "{ architectures = [], heads = [1] }"]
)
def test_what_a_pin_serves_has_a_form(serves: str, world: World, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(f"serves = {serves}\n{world.toml.read_text()}")
    with pytest.raises(PinUnknown, match="serves"):
        load_pin(str(wrong))


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setenv("APEX_PIN", "latest")
    assert (
        load_pin().name == "latest"
        and load_pin().option == ""
        and load_pin(DEFAULT_PIN).option == f" --pin {DEFAULT_PIN}"
    )
    monkeypatch.setenv("APEX_PIN", str(world.toml))
    assert load_pin() == world.pin and chosen_pin_name() == world.pin.name and load_pin().option == ""


def test_the_table_of_heads_is_what_the_pins_say() -> None:
    """docs/patches.md, 'What each pin serves'. tests/patches/test_architectures.py checks it with the tools."""
    text = (Path(__file__).parents[2] / "docs" / "patches.md").read_text(encoding="utf-8")
    header, _, *lines = text[text.index("| architecture | ") :].split("\n\n")[0].splitlines()
    pins = [load_pin(name.strip()) for name in header.split("|")[2:4]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    told = {name: row[1:] for row in rows for name in row[0].split(" (")[0].split(", ")}
    assert set(told) == set(ARCHITECTURES)
    for name, (*said, heads, matrices, fed) in told.items():
        assert said == [how_served(pin, name) for pin in pins], name
        assert int(heads) == ARCHITECTURES[name].heads, name
        assert (fed or "none") == (ROWS[ARCHITECTURES[name].rows] if "runs" in said else "none"), (name, matrices)


ROWS = {"post_norm": "after the norm", "pre_norm": "before the norm", "streams": "streams"}


def how_served(pin: Pin, architecture: str) -> str:
    serves = pin.serves
    assert serves
    if architecture in serves.heads:
        return "runs"
    if architecture in serves.heads_idle:
        return "loaded"
    return "refused" if architecture in serves.architectures else "unknown"
