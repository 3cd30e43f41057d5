from pathlib import Path

from apex_build.plugin_api import check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_evaluator() -> None:
    """Measuring needs the tools: apex evaluate MODEL --plugin my_name --only my-name --prompts FILE."""
    assert check_plugin(FOLDER).given["evaluators"] == ("my-name",)
