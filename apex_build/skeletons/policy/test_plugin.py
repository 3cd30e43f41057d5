from pathlib import Path

from apex_build.plugin_api import check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_rules_of_a_sample_model() -> None:
    checked = check_plugin(FOLDER)
    assert checked.given["policies"] == ("my-name",)
    rules = checked.rules["my-name"]
    assert rules["blk.40.ffn_gate_exps.weight"] == "IQ2_XXS"
    assert rules["blk.40.nextn.eh_proj.weight"] == "Q4_K"
