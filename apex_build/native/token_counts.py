"""Tokens of texts by a model's own tokenizer: libllama opened through cffi, of the model the vocabulary alone.

In a child process (`python -m apex_build.native.token_counts`), since libllama ends its process over a file that it
cannot take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_build.errors import BuildMissing, LoadFailed
from apex_build.native.library import open_library
from apex_build.native.surroundings import bound, environment
from apex_build.native.toolset import Toolset

_SECONDS = 1800.0
_FUNCTIONS = """
struct llama_model_params llama_model_default_params(void);
void * llama_model_load_from_file(const char * path, struct llama_model_params params);
void * llama_model_get_vocab(void * model);
bool llama_vocab_get_add_bos(void * vocab);
int32_t llama_tokenize(void * vocab, const char * text, int32_t length, int32_t * tokens, int32_t most,
                       bool add_special, bool parse_special);
void llama_log_set(void (*callback)(int, const char *, void *), void * data);
"""
_POINTERS = "void * tensor_split; void * progress; void * progress_data; void * overrides; bool vocab_only;"
# llama_model_params up to the field that is set. The rest is room for what a version has there: a struct that is too
# large does no harm, since this one is passed in memory.
_ROOM = "char rest[256];"
_LAYOUTS = {
    True: f"struct llama_model_params {{ void * devices; void * buffers; int32_t numbers[5]; {_POINTERS} {_ROOM} }};",
    False: f"struct llama_model_params {{ void * devices; void * buffers; int32_t numbers[3]; {_POINTERS} {_ROOM} }};",
}
_LATER = "llama_load_mode_name"  # in the libraries that have two numbers more


def count_tokens(toolset: Toolset, model: Path, texts: Sequence[bytes]) -> list[int]:
    """Tokens of each text on its own, special tokens parsed, without what the model puts around a text.

    Raises BuildMissing, LoadFailed.
    """
    if not texts:
        return []
    request = {"root": str(toolset.root), "model": str(model.absolute()), "texts": [text.decode() for text in texts]}
    child = subprocess.run(
        [*bound(), sys.executable, "-m", __name__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
        env=environment(toolset.bin / "llama-quantize", {"CUDA_VISIBLE_DEVICES": ""}),  # a vocabulary needs no GPU
    )
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit status {child.returncode}"]
        raise LoadFailed(f"{model}: its vocabulary cannot be loaded: {lines[-1]}", hint=f"apex inspect {model}")
    answer = json.loads(child.stdout)
    if "missing" in answer:
        raise BuildMissing(answer["missing"], hint=answer["hint"])
    return [int(count) for count in answer["counts"]]


def _counts(toolset: Toolset, model: str, texts: Sequence[str]) -> list[int]:
    ffi, later = open_library(toolset, "llama", f"void * {_LATER}(int);")
    layout = _LAYOUTS[hasattr(later, _LATER)]
    ffi, lib = open_library(toolset, "llama", f"{layout}\n{_FUNCTIONS}")
    parameters = lib.llama_model_default_params()
    nulls = ("tensor_split", "progress", "progress_data", "overrides")
    flags = bytes(ffi.buffer(ffi.addressof(parameters, "vocab_only"), 6))
    if any(getattr(parameters, name) != ffi.NULL for name in nulls) or flags[0] or max(flags) != 1:
        raise BuildMissing(f"{toolset.library('llama')}: unknown layout of llama_model_params")
    parameters.vocab_only = True
    loaded = lib.llama_model_load_from_file(os.fsencode(model), parameters)
    if loaded == ffi.NULL:
        sys.exit("libllama refuses it")  # after the library's own words
    vocab = lib.llama_model_get_vocab(loaded)
    found = []
    for text in texts:
        data = text.encode()
        n = lib.llama_tokenize(vocab, data, len(data), ffi.NULL, 0, False, True)
        found.append(abs(n))  # negative: what there would be room for
    return found


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    try:
        counts = _counts(Toolset(Path(request["root"])), request["model"], request["texts"])
    except BuildMissing as error:
        json.dump({"missing": error.message, "hint": error.hint}, sys.stdout)
        return
    json.dump({"counts": counts}, sys.stdout)


if __name__ == "__main__":
    main()
