from pathlib import Path

from my_name.plugin import read

from apex_build.plugin_api import check_plugin

FOLDER = Path(__file__).parents[1] / "my_name"


def test_the_documents(tmp_path: Path) -> None:
    assert check_plugin(FOLDER).given["sources"] == ("my-name",)
    (tmp_path / "one.md").write_text("# One\n")
    assert [document.text for document in read({"folder": "."}, tmp_path)] == ["# One\n"]
