"""All that a plugin imports from apex_build: the hooks' data, what evaluators work with, errors for the user.

Names that need NumPy or the tools are loaded when they are first used, so that importing a plugin costs little.
docs/plugins.md teaches each hook by an example; `apex plugins new` writes a plugin to start from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apex_build.errors import (
    ApexError,
    BudgetUnfit,
    CalibrationSetInvalid,
    DiskTooSmall,
    EvaluationRefused,
    MeasurementUnfit,
    OutputUnwritable,
    ParameterUnknown,
    PolicyUnfit,
    ShapeUnfit,
    ToolFailed,
    ToolKilled,
    TypeUnknown,
    VocabularyMismatch,
)
from apex_build.hookspecs import (
    API_VERSION,
    ROLES,
    Computed,
    Document,
    Evaluator,
    Figure,
    GpuTarget,
    Parameter,
    Part,
    PolicySpec,
    PolicyTask,
    Role,
    Service,
    Source,
    hookimpl,
)

if TYPE_CHECKING:
    from apex_build.cli.show import as_json, note, progress, table
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
    from apex_build.evaluation.pace import GENERATED, expect, remember, tokens_of, work_of
    from apex_build.evaluation.pace import Estimate as PaceEstimate
    from apex_build.evaluation.probes import BASELINE, Probe, ProbeScore, probe_seconds, run_probes
    from apex_build.evaluation.reference import reference_logits
    from apex_build.evaluation.task import Prompt, Server, Step, Task
    from apex_build.gguf_model.catalogue import Model, Tensor
    from apex_build.gguf_model.examine import weights as importance
    from apex_build.gguf_model.fingerprint import fingerprint
    from apex_build.gguf_model.mtp_rows import AUTO as AUTO_ROWS
    from apex_build.gguf_model.mtp_rows import CHOICES as HEAD_ROWS
    from apex_build.gguf_model.mtp_rows import tool_arguments as head_rows_arguments
    from apex_build.gguf_model.rows import TensorRows, mapped_rows
    from apex_build.native.footprint import footprint
    from apex_build.native.ggml import Ggml
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
    from apex_build.native.tensor_data import Codec, codec
    from apex_build.native.toolset import Toolset
    from apex_build.native.type_costs import quantize_seconds
    from apex_build.parameters import Value, parse_settings, values_of
    from apex_build.places import cache_folder
    from apex_build.plugin_check import check_plugin
    from apex_build.policy.dry_run import quantizable_tensors
    from apex_build.policy.size import other_bytes, padded_bytes
    from apex_build.quantization.data import Data, read_data
    from apex_build.report.plot import Chart, Mark, Series, draw
    from apex_build.report.plot import available as can_plot
    from apex_build.stages.evaluate import EvaluateOptions
    from apex_build.stages.evaluate import evaluate as evaluate_files
    from apex_build.stages.given import Workplace, workplace
    from apex_build.stages.plan import Planned, PlanOptions
    from apex_build.stages.plan import plan as plan_model
    from apex_build.stages.quantize import QuantizeOptions, plan_files, write_file
    from apex_build.storage.digests import sha256_file, sha256_json
    from apex_build.storage.json_files import read_json, write_json
    from apex_build.storage.outputs import check_place, whole_file
    from apex_build.storage.scratch import scratch_folder
    from apex_build.storage.sizes import parse_bytes
    from apex_build.system import cpus
    from apex_build.toolchain.machine.gpus import resolve as gpus_of

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
    **{
        name: ("evaluation.probes", name) for name in ("BASELINE", "Probe", "ProbeScore", "probe_seconds", "run_probes")
    },
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
    # what a policy that computes, and a verb around it, need
    **{name: ("gguf_model.rows", name) for name in ("TensorRows", "mapped_rows")},
    **{name: ("native.tensor_data", name) for name in ("Codec", "codec")},
    **{name: ("quantization.data", name) for name in ("Data", "read_data")},
    **{name: ("evaluation.pace", name) for name in ("expect", "remember", "work_of")},
    "PaceEstimate": ("evaluation.pace", "Estimate"),
    "quantize_seconds": ("native.type_costs", "quantize_seconds"),
    "fingerprint": ("gguf_model.fingerprint", "fingerprint"),
    "importance": ("gguf_model.examine", "weights"),
    "cache_folder": ("places", "cache_folder"),
    "padded_bytes": ("policy.size", "padded_bytes"),
    "read_json": ("storage.json_files", "read_json"),
    "sha256_file": ("storage.digests", "sha256_file"),
    "sha256_json": ("storage.digests", "sha256_json"),
    "write_json": ("storage.json_files", "write_json"),
    "Ggml": ("native.ggml", "Ggml"),
    "Toolset": ("native.toolset", "Toolset"),
    "Value": ("parameters", "Value"),
    "values_of": ("parameters", "values_of"),
    "parse_settings": ("parameters", "parse_settings"),
    "cpus": ("system", "cpus"),
    "parse_bytes": ("storage.sizes", "parse_bytes"),
    "check_place": ("storage.outputs", "check_place"),
    "whole_file": ("storage.outputs", "whole_file"),
    "footprint": ("native.footprint", "footprint"),
    "gpus_of": ("toolchain.machine.gpus", "resolve"),
    "other_bytes": ("policy.size", "other_bytes"),
    "quantizable_tensors": ("policy.dry_run", "quantizable_tensors"),
    # the stages, for a verb: apex_build.api has them all, and docs/api.md
    **{name: ("stages.given", name) for name in ("Workplace", "workplace")},
    **{name: ("stages.plan", name) for name in ("PlanOptions", "Planned")},
    "plan_model": ("stages.plan", "plan"),
    **{name: ("stages.quantize", name) for name in ("QuantizeOptions", "plan_files", "write_file")},
    "EvaluateOptions": ("stages.evaluate", "EvaluateOptions"),
    "evaluate_files": ("stages.evaluate", "evaluate"),
    # what a verb shows
    **{name: ("report.plot", name) for name in ("Chart", "Mark", "Series", "draw")},
    "can_plot": ("report.plot", "available"),
    **{name: ("cli.show", name) for name in ("as_json", "note", "progress", "table")},
}

__all__ = [
    "API_VERSION",
    "AUTO_ROWS",
    "BASELINE",
    "GENERATED",
    "HEAD_ROWS",
    "NORMAL",
    "ROLES",
    "ApexError",
    "BudgetUnfit",
    "CalibrationSetInvalid",
    "Chart",
    "Codec",
    "Computed",
    "Data",
    "DiskTooSmall",
    "Document",
    "Draft",
    "Estimate",
    "EvaluateOptions",
    "EvaluationRefused",
    "Evaluator",
    "Figure",
    "Ggml",
    "GpuTarget",
    "HeadScores",
    "Mark",
    "MeasurementUnfit",
    "Model",
    "OutputUnwritable",
    "PaceEstimate",
    "Parameter",
    "ParameterUnknown",
    "Part",
    "PlanOptions",
    "Planned",
    "PolicySpec",
    "PolicyTask",
    "PolicyUnfit",
    "Probe",
    "ProbeScore",
    "Prompt",
    "QuantizeOptions",
    "Role",
    "Series",
    "Server",
    "Service",
    "ShapeUnfit",
    "Source",
    "Step",
    "Task",
    "Tensor",
    "TensorRows",
    "ToolFailed",
    "ToolKilled",
    "ToolRun",
    "Toolset",
    "TypeUnknown",
    "Value",
    "VocabularyMismatch",
    "Workplace",
    "as_json",
    "cache_folder",
    "can_plot",
    "check_context",
    "check_place",
    "check_plugin",
    "chunks_planned",
    "clustered_mean",
    "clustered_ratio",
    "codec",
    "cpus",
    "divergence_rows",
    "divergence_statistic",
    "draw",
    "evaluate_files",
    "expect",
    "fingerprint",
    "footprint",
    "gpus_of",
    "head_rows_arguments",
    "head_rows_used",
    "hookimpl",
    "importance",
    "logged_error",
    "mapped_rows",
    "note",
    "other_bytes",
    "padded_bytes",
    "parse_bytes",
    "parse_settings",
    "plan_files",
    "plan_model",
    "probe_seconds",
    "progress",
    "quantizable_tensors",
    "quantize_seconds",
    "ratio_interval",
    "read_data",
    "read_head_scores",
    "read_json",
    "reference_logits",
    "refuse_short",
    "remember",
    "run_over_chunks",
    "run_probes",
    "running_perplexities",
    "scored_positions",
    "scratch_folder",
    "sha256_file",
    "sha256_json",
    "share_interval",
    "student",
    "table",
    "tasks_scored",
    "text_arguments",
    "tokens_of",
    "total_chunks",
    "values_of",
    "vocabulary_differs",
    "whole_file",
    "work_of",
    "workplace",
    "write_file",
    "write_json",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module, attribute = _LATER[name]
    found = getattr(importlib.import_module(f"apex_build.{module}"), attribute)
    globals()[name] = found
    return found
