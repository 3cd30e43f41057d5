"""Check whether the tools in use can load a model and run its draft head, according to their pin, or which pin can."""

from __future__ import annotations

from apex_build.errors import LoadFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset
from apex_build.source.pins import Pin, all_pins


def check_served(model: Model, tools: Toolset) -> None:
    """Raises LoadFailed if these tools cannot load the model. Skips tools that were not built from a shipped pin."""
    pin = pin_of(tools)
    if pin is None or pin.serves is None:
        return
    if model.architecture not in pin.serves.architectures:
        raise LoadFailed(
            f"{model.path}: the llama.cpp of pin {pin.name} does not support the architecture {model.architecture!r}",
            hint=instead_of(tools, model)
            or "apex source status lists the pins; apex build --pin FILE.toml builds another llama.cpp",
        )
    if model.has_head and not _loads_head(pin, model) and (other := instead_of(tools, model, head=True)):
        raise LoadFailed(
            f"{model.path}: the llama.cpp of pin {pin.name} cannot load {model.architecture} models with a draft head",
            hint=other,
        )


def instead_of(tools: Toolset, model: Model, *, head: bool = False) -> str | None:
    """How to get the tools of another pin that support this architecture, or with `head` run its draft head; None if no
    pin does.
    """
    own = pin_of(tools)
    for pin in all_pins():
        if pin.serves is None or pin == own:
            continue
        if model.architecture in (pin.serves.heads if head else pin.serves.architectures):
            return f"apex build --pin {pin.name}, then run the same command with APEX_PIN={pin.name}"
    return None


def pin_of(tools: Toolset) -> Pin | None:
    """The shipped pin that the tools were built from."""
    made_of = tools.manifest.get("pin") or {}
    return next(
        (pin for pin in all_pins() if (pin.name, pin.commit) == (made_of.get("name"), made_of.get("commit"))), None
    )


def _loads_head(pin: Pin, model: Model) -> bool:
    return pin.serves is None or model.architecture in pin.serves.heads | pin.serves.heads_idle
