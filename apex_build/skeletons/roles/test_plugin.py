from pathlib import Path

from apex_build.plugin_api import Part, check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_roles() -> None:
    checked = check_plugin(FOLDER)
    assert checked.given["roles"] == ("memory",)
    assert checked.role_of("my-name", "blk.3.mem_k.weight") == "memory"
    assert checked.role_of("my-name", "mtp_proj.weight") == Part("nextn", draft_head=True)
    assert checked.role_of("my-name", "blk.3.attn_q.weight") == "attention"  # from the built-in plugin
