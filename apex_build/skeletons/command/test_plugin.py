from pathlib import Path

from click.testing import CliRunner
from my_name.plugin import command

from apex_build.plugin_api import check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_command() -> None:
    assert check_plugin(FOLDER).given["commands"] == ("my-name",)
    assert CliRunner().invoke(command, ["hello"]).output == "HELLO\n"
