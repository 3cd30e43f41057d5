"""Pins: the shipped ones are whole, a user's own is read, and a bad one is refused by name."""

from __future__ import annotations

import pytest
from source.tiny import Apex, World

from apex_build.errors import PinUnknown
from apex_build.source.pins import DEFAULT_PIN, all_pins, load_pin


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
    with pytest.raises(PinUnknown, match=r"no pin is named .*there are: pr-22673, latest"):
        load_pin(name)


def test_unknown_pin_on_the_command_line(apex: Apex) -> None:
    said = apex("source", "fetch", pin="nothing-like-it")
    assert said.code == PinUnknown.exit_code
    assert "no pin is named 'nothing-like-it'; there are: pr-22673, latest" in said.err
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
        ('name = "tiny"', "name = ", "cannot be read"),
    ],
)
def test_bad_pin_file(world: World, old: str, new: str, words: str) -> None:
    world.toml.write_text(world.toml.read_text().replace(old, new))
    with pytest.raises(PinUnknown, match=words):
        load_pin(str(world.toml))


def test_missing_pin_file(world: World) -> None:
    with pytest.raises(PinUnknown, match=r"there is no pin file .*absent\.toml"):
        load_pin(str(world.toml.with_name("absent.toml")))
