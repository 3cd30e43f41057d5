"""A policy: a tier of APEX's with a smaller draft head."""

from pathlib import Path

from apex_build.plugin_api import Parameter, PolicySpec, hookimpl

APEX_API = 3
TEMPLATE = Path(__file__).with_name("my-name.jinja")
PARAMETERS = {"routed_head": Parameter("IQ2_XXS", "type", "the routed experts of the draft head")}


@hookimpl
def apex_policies() -> list[PolicySpec]:
    about = "i-nano with a small draft head"
    return [PolicySpec("my-name", TEMPLATE, "IQ2_XXS", calibrated=True, parameters=PARAMETERS, description=about)]
