"""Runs the pinned source's convert_hf_to_gguf.py in the converter's own Python: this file imports nothing of apex_build.

    driver.py SOURCE HF_DIR PRE_TOKENIZER [arguments of convert_hf_to_gguf.py ...]

Two things are not as upstream has them. No code of the checkpoint runs: upstream loads tokenizers with trust_remote_code=True.
And PRE_TOKENIZER, where it is not empty, names the pre-tokenizer instead of a hash that knows only the tokenizers of known models.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
from typing import Any


def refuse_code(folder: str) -> None:
    """From here on no Python file of the checkpoint can be opened, nor a copy of one in transformers' cache of such files."""
    roots = tuple(os.path.join(os.path.realpath(root), "") for root in (folder, os.environ["HF_MODULES_CACHE"]))  # noqa: PTH118

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            named = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  a download cache holds links with plain names
            if named.endswith((".py", ".pyc", ".so")) and (path.startswith(roots) or named.startswith(roots)):
                raise PermissionError(f"apex: the checkpoint wants its own code to run: {named}")

    sys.addaudithook(audit)


def distrust(module: Any) -> None:
    """Let `from_pretrained` of transformers' Auto classes never trust a checkpoint's code, whatever the caller says."""
    for name in ("AutoConfig", "AutoTokenizer"):  # what the converter uses
        owner = getattr(module, name)
        trusting = owner.from_pretrained

        @functools.wraps(trusting)
        def from_pretrained(*arguments: Any, trusting: Any = trusting, **options: Any) -> Any:
            return trusting(*arguments, **{**options, "trust_remote_code": False})

        owner.from_pretrained = from_pretrained


def main(source: str, folder: str, pre_tokenizer: str, *arguments: str) -> None:
    sys.path[0] = source  # not the folder of this file
    sys.path.insert(1, os.path.join(source, "gguf-py"))  # noqa: PTH118
    transformers = importlib.import_module("transformers")
    distrust(transformers)
    if pre_tokenizer:
        importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre_tokenizer
    refuse_code(folder)
    sys.argv = ["convert_hf_to_gguf.py", folder, *arguments]
    runpy.run_path(os.path.join(source, "convert_hf_to_gguf.py"), run_name="__main__")  # noqa: PTH118


if __name__ == "__main__":
    main(*sys.argv[1:])
