"""Whether the tools in use can load a model and run its draft head, by what their pin says of itself; and which pin's
can.
"""

from __future__ import annotations

from apex_build.errors import LoadFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset
from apex_build.source.pins import Pin, all_pins


def check_served(model: Model, tools: Toolset) -> None:
    """Raises LoadFailed for a model that these tools cannot load. Ignores tools not built from one of our pins."""
    pin = pin_of(tools)
    if pin is None or pin.serves is None:
        return
    if model.architecture not in pin.serves.architectures:
        raise LoadFailed(
            f"{model.path}: the llama.cpp of the pin {pin.name} does not know the architecture {model.architecture!r}",
            hint=instead_of(tools, model)
            or "apex source status lists the pins; apex build --pin FILE.toml builds another llama.cpp",
        )
    if model.has_head and not _loads_head(pin, model) and (other := instead_of(tools, model, head=True)):
        raise LoadFailed(
            f"{model.path}: the llama.cpp of the pin {pin.name} cannot load a model of {model.architecture} with its "
            "draft head",
            hint=other,
        )


def instead_of(tools: Toolset, model: Model, *, head: bool = False) -> str | None:
    """What to do to have another pin's tools that know this architecture, or with `head` run its draft head; None if
    none does.
    """
    own = pin_of(tools)
    for pin in all_pins():
        if pin.serves is None or pin == own:
            continue
        if model.architecture in (pin.serves.heads if head else pin.serves.architectures):
            return f"apex build --pin {pin.name}, then the same with APEX_PIN={pin.name} before it"
    return None


def pin_of(tools: Toolset) -> Pin | None:
    """The pin of ours that the tools were built from."""
    made_of = tools.manifest.get("pin") or {}
    return next(
        (pin for pin in all_pins() if (pin.name, pin.commit) == (made_of.get("name"), made_of.get("commit"))), None
    )


def _loads_head(pin: Pin, model: Model) -> bool:
    return pin.serves is None or model.architecture in pin.serves.heads | pin.serves.heads_idle
