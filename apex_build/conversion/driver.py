"""Runs the pinned source's convert_hf_to_gguf.py in the converter's own Python: this file imports nothing of
apex_build.

    driver.py SOURCE HF_DIR ORDERS.json [arguments of convert_hf_to_gguf.py ...]

It differs from upstream in three ways. No code of the checkpoint runs: upstream loads tokenizers with
trust_remote_code=True. A pre-tokenizer named in the orders is used instead of a hash of known models' tokenizers. And
an account is kept, written before the first byte of the model: for each tensor that will be written,
which tensors of the checkpoint its values come from, followed through the converter's lazy operations.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import sys
from typing import Any


def refuse_code(folder: str) -> None:
    """Block opening Python files of the checkpoint from now on, and their copies in transformers' cache."""
    roots = tuple(os.path.join(os.path.realpath(root), "") for root in (folder, os.environ["HF_MODULES_CACHE"]))  # noqa: PTH118

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            named = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  a download cache holds links with plain names
            if named.endswith((".py", ".pyc", ".so")) and (path.startswith(roots) or named.startswith(roots)):
                raise PermissionError(f"apex: the checkpoint wants its own code to run: {named}")

    sys.addaudithook(audit)


def distrust(module: Any) -> None:
    """Make `from_pretrained` of transformers' Auto classes never trust a checkpoint's code, whatever is passed."""
    for name in ("AutoConfig", "AutoTokenizer"):  # what the converter uses
        owner = getattr(module, name)
        trusting = owner.from_pretrained

        @functools.wraps(trusting)
        def from_pretrained(*arguments: Any, trusting: Any = trusting, **options: Any) -> Any:
            return trusting(*arguments, **{**options, "trust_remote_code": False})

        owner.from_pretrained = from_pretrained


def keep_account(model_base: Any, gguf: Any, orders: dict[str, Any]) -> None:
    """Record what becomes of each tensor of the checkpoint; leave out those that the orders drop; set their
    metadata.
    """
    read: set[str] = set()  # tensors whose values were read before anything is written: by code that is not lazy
    written: dict[str, list[str]] = {}
    drop = set(orders["drop"])
    index_tensors = model_base.index_tensors
    add_tensor = gguf.GGUFWriter.add_tensor
    write_header = gguf.GGUFWriter.write_header_to_file

    def named(name: str, make: Any) -> Any:
        tensor = make()
        if not isinstance(tensor, gguf.LazyBase) or tensor._func is None:
            read.add(name)
            return tensor
        load = tensor._func

        def loading(*arguments: Any, **options: Any) -> Any:
            read.add(name)
            return load(*arguments, **options)

        tensor._func = loading
        tensor.__dict__["_apex_name"] = name
        return tensor

    def index(self: Any, *arguments: Any, **options: Any) -> Any:
        accept = self.filter_tensors

        def filter_tensors(item: tuple[str, Any]) -> Any:
            name, make = item
            return None if name in drop else accept((name, functools.partial(named, name, make)))

        self.filter_tensors = filter_tensors
        return index_tensors(self, *arguments, **options)

    def add(self: Any, name: str, tensor: Any, *arguments: Any, **options: Any) -> None:
        written[name] = sorted(sources(tensor, gguf.LazyBase))
        add_tensor(self, name, tensor, *arguments, **options)

    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        for key, kind, value in orders["metadata"]:
            if kind == "ARRAY":
                self.add_array(key, value)
            else:
                self.add_key_value(key, value, gguf.GGUFValueType[kind])
        with open(orders["account"], "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"written": written, "read": sorted(read)}, file)
        print(orders["mark"], flush=True)
        if orders["stop"]:
            raise SystemExit(0)
        write_header(self, *arguments, **options)

    model_base.index_tensors = index
    gguf.GGUFWriter.add_tensor = add
    gguf.GGUFWriter.write_header_to_file = begin


def sources(tensor: Any, lazy: Any) -> set[str]:
    """Names of the checkpoint's tensors that a lazy tensor is made from."""
    names: set[str] = set()
    seen: set[int] = set()
    rest = [tensor]
    while rest:
        item = rest.pop()
        if isinstance(item, (list, tuple)):
            rest.extend(item)
        elif isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, lazy) and id(item) not in seen:
            seen.add(id(item))
            if name := item.__dict__.get("_apex_name"):
                names.add(name)
            rest += [item._args, item._kwargs]
    return names


def main(source: str, folder: str, orders_file: str, *arguments: str) -> None:
    with open(orders_file, encoding="utf-8") as file:  # noqa: PTH123
        orders = json.load(file)
    sys.path[0] = source  # not the folder of this file
    sys.path.insert(1, os.path.join(source, "gguf-py"))  # noqa: PTH118
    transformers = importlib.import_module("transformers")
    distrust(transformers)
    base = importlib.import_module("conversion.base")
    if orders["pre_tokenizer"]:
        base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: orders["pre_tokenizer"]
    keep_account(base.ModelBase, importlib.import_module("gguf"), orders)
    refuse_code(folder)
    sys.argv = ["convert_hf_to_gguf.py", folder, *arguments]
    runpy.run_path(os.path.join(source, "convert_hf_to_gguf.py"), run_name="__main__")  # noqa: PTH118


if __name__ == "__main__":
    main(*sys.argv[1:])
