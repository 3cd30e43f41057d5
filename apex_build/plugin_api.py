"""What a plugin imports, and nothing else of apex_build: the hooks' data, what evaluators work with, errors for the
user.

Names that need NumPy or the tools are loaded when they are first used, so that importing a plugin costs little.
docs/plugins.md teaches each hook by an example; `apex plugins new` writes a plugin to start from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apex_build.errors import (
    ApexError,
    CalibrationSetInvalid,
    DiskTooSmall,
    EvaluationRefused,
    ParameterUnknown,
    ToolFailed,
    ToolKilled,
    VocabularyMismatch,
)
from apex_build.hookspecs import (
    API_VERSION,
    ROLES,
    Document,
    Evaluator,
    Figure,
    GpuTarget,
    Parameter,
    Part,
    PolicySpec,
    Role,
    Service,
    Source,
    hookimpl,
)

if TYPE_CHECKING:
    from apex_build.evaluation.chunked import check_context, refuse_short, scored_positions, text_arguments
    from apex_build.evaluation.chunked import planned as total_chunks
    from apex_build.evaluation.chunked import run as run_over_chunks
    from apex_build.evaluation.head_scores import Scores as HeadScores
    from apex_build.evaluation.head_scores import read_csv as read_head_scores
    from apex_build.evaluation.intervals import (
        NORMAL,
        Estimate,
        clustered_mean,
        clustered_ratio,
        ratio_interval,
        share_interval,
        student,
    )
    from apex_build.evaluation.pace import GENERATED, tokens_of
    from apex_build.evaluation.probes import Probe, ProbeScore, probe_seconds, run_probes
    from apex_build.evaluation.reference import reference_logits
    from apex_build.evaluation.task import Prompt, Server, Step, Task
    from apex_build.gguf_model.catalogue import Model, Tensor
    from apex_build.gguf_model.mtp_rows import AUTO as AUTO_ROWS
    from apex_build.gguf_model.mtp_rows import CHOICES as HEAD_ROWS
    from apex_build.gguf_model.mtp_rows import tool_arguments as head_rows_arguments
    from apex_build.native.output import head_rows as head_rows_used
    from apex_build.native.output import planned as chunks_planned
    from apex_build.native.run import ToolRun
    from apex_build.native.scores import (
        divergence_rows,
        divergence_statistic,
        logged_error,
        running_perplexities,
        tasks_scored,
        vocabulary_differs,
    )
    from apex_build.native.server import Draft
    from apex_build.plugin_check import check_plugin
    from apex_build.storage.scratch import scratch_folder

# name here -> its module, and its name there
_LATER = {
    **{name: ("evaluation.task", name) for name in ("Prompt", "Server", "Step", "Task")},
    **{
        name: ("evaluation.intervals", name)
        for name in (
            "NORMAL",
            "Estimate",
            "clustered_mean",
            "clustered_ratio",
            "ratio_interval",
            "share_interval",
            "student",
        )
    },
    **{
        name: ("evaluation.chunked", name)
        for name in ("check_context", "refuse_short", "scored_positions", "text_arguments")
    },
    **{name: ("evaluation.probes", name) for name in ("Probe", "ProbeScore", "probe_seconds", "run_probes")},
    **{name: ("gguf_model.catalogue", name) for name in ("Model", "Tensor")},
    **{name: ("evaluation.pace", name) for name in ("GENERATED", "tokens_of")},
    **{
        name: ("native.scores", name)
        for name in (
            "divergence_rows",
            "divergence_statistic",
            "logged_error",
            "running_perplexities",
            "tasks_scored",
            "vocabulary_differs",
        )
    },
    "AUTO_ROWS": ("gguf_model.mtp_rows", "AUTO"),
    "Draft": ("native.server", "Draft"),
    "HEAD_ROWS": ("gguf_model.mtp_rows", "CHOICES"),
    "HeadScores": ("evaluation.head_scores", "Scores"),
    "ToolRun": ("native.run", "ToolRun"),
    "check_plugin": ("plugin_check", "check_plugin"),
    "chunks_planned": ("native.output", "planned"),
    "head_rows_arguments": ("gguf_model.mtp_rows", "tool_arguments"),
    "head_rows_used": ("native.output", "head_rows"),
    "read_head_scores": ("evaluation.head_scores", "read_csv"),
    "reference_logits": ("evaluation.reference", "reference_logits"),
    "run_over_chunks": ("evaluation.chunked", "run"),
    "scratch_folder": ("storage.scratch", "scratch_folder"),
    "total_chunks": ("evaluation.chunked", "planned"),
}

__all__ = [
    "API_VERSION",
    "AUTO_ROWS",
    "GENERATED",
    "HEAD_ROWS",
    "NORMAL",
    "ROLES",
    "ApexError",
    "CalibrationSetInvalid",
    "DiskTooSmall",
    "Document",
    "Draft",
    "Estimate",
    "EvaluationRefused",
    "Evaluator",
    "Figure",
    "GpuTarget",
    "HeadScores",
    "Model",
    "Parameter",
    "ParameterUnknown",
    "Part",
    "PolicySpec",
    "Probe",
    "ProbeScore",
    "Prompt",
    "Role",
    "Server",
    "Service",
    "Source",
    "Step",
    "Task",
    "Tensor",
    "ToolFailed",
    "ToolKilled",
    "ToolRun",
    "VocabularyMismatch",
    "check_context",
    "check_plugin",
    "chunks_planned",
    "clustered_mean",
    "clustered_ratio",
    "divergence_rows",
    "divergence_statistic",
    "head_rows_arguments",
    "head_rows_used",
    "hookimpl",
    "logged_error",
    "probe_seconds",
    "ratio_interval",
    "read_head_scores",
    "reference_logits",
    "refuse_short",
    "run_over_chunks",
    "run_probes",
    "running_perplexities",
    "scored_positions",
    "scratch_folder",
    "share_interval",
    "student",
    "tasks_scored",
    "text_arguments",
    "tokens_of",
    "total_chunks",
    "vocabulary_differs",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module, attribute = _LATER[name]
    found = getattr(importlib.import_module(f"apex_build.{module}"), attribute)
    globals()[name] = found
    return found
