"""The names of the verbs: built-in ones with their modules, and those from plugins."""

from __future__ import annotations

# verb -> module of this folder; its click command is named `command`
VERBS = {
    "build": "build",
    "cache": "cache",
    "calibrate": "calibrate",
    "calibration-sets": "calibration_sets",
    "check": "check",
    "completion": "completion",
    "config": "config",
    "convert": "convert",
    "demo": "demo",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "imatrix": "imatrix",
    "inspect": "inspect",
    "patch": "patch",
    "pin": "pin",
    "plan": "plan",
    "plugins": "plugins",
    "policies": "policies",
    "quantize": "quantize",
    "show": "manifest",
    "source": "source",
    "sweep": "sweep",
}


def all_verbs() -> list[str]:
    """Sorted. No verb's module is imported, and no plugin's."""
    from apex_build.plugins import command_summaries

    return sorted({*VERBS, *command_summaries()})
