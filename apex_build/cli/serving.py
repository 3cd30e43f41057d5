"""The command that runs a finished file in llama-server, with its draft head drafting."""

from __future__ import annotations

import shlex
from pathlib import Path

from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset

_DRAFTED = 2  # tokens of a draft: the length that apex evaluate and apex demo measure first


def command_line(path: Path, model: Model, tools: Toolset) -> str:
    """For a file made from `model`. One sequence (-np 1): the head drafts for only one at a time."""
    words = [str(tools.bin / "llama-server"), "-m", str(path)]
    if model.has_head:
        words += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(_DRAFTED), "-np", "1"]
    return shlex.join(words)
