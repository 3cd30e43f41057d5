from pathlib import Path

from apex_build.plugin_api import check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_gpu() -> None:
    assert check_plugin(FOLDER).given["gpus"] == ("my-name",)
