"""Roles of the tensors of an architecture, one of them new, and a draft head outside the blocks."""

import re
from collections.abc import Callable

from apex_build.plugin_api import Part, Role, hookimpl

APEX_API = 3
ROLES: dict[str, str | Part] = {"mem_k": "memory", "mem_v": "memory", "mtp_proj": Part("nextn", draft_head=True)}


@hookimpl
def apex_roles() -> list[Role]:
    return [Role("memory", "keys and values of the memory layers")]


@hookimpl
def apex_tensor_roles(architecture: str) -> Callable[[str], str | Part | None] | None:
    known = {f"{part}.weight": role for part, role in ROLES.items()}
    return (lambda name: known.get(re.sub(r"^blk\.\d+\.", "", name))) if architecture == "my-name" else None
