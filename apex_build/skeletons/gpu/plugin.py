"""A GPU to build for."""

from apex_build.plugin_api import GpuTarget, hookimpl

APEX_API = 3


@hookimpl
def apex_gpu_targets() -> list[GpuTarget]:
    return [
        GpuTarget(
            name="my-name",
            architecture="89-real",
            memory_gib=22,
            description="a card of the Ada generation",
            minimum_cuda="11.8",
        )
    ]
