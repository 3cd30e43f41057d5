"""The stages as functions, for scripts: what the verbs of `apex` call. Each takes a frozen dataclass of options and
returns one.

    source  ->  build  ->  convert  ->  calibrate  ->  plan  ->  quantize  ->  evaluate, check, sweep

A `Workplace` holds what they share: the built tools, the plugins, and a function for progress reports; without one, the
current tools and the installed plugins are used. Nothing is printed; every error is an `ApexError` with the verb's own
exit code.
"""

from __future__ import annotations

from apex_build.calibration.run import Calibration
from apex_build.calibration.run import Settings as CalibrationSettings
from apex_build.conversion.convert import Converted
from apex_build.errors import ApexError
from apex_build.evaluation.check import Bounds, Checked
from apex_build.evaluation.run import Result
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.metadata import Setting
from apex_build.progress import Report, Step, silent
from apex_build.quantization.preflight import Allowed
from apex_build.source.fetch import Fetched, fetch
from apex_build.source.pins import Pin, all_pins, load_pin
from apex_build.stages.build import BuildOptions, build
from apex_build.stages.calibrate import CalibrateOptions, calibrate
from apex_build.stages.check import CheckOptions, check
from apex_build.stages.convert import ConvertOptions, convert
from apex_build.stages.demo import Demo, demo
from apex_build.stages.evaluate import EvaluateOptions, evaluate
from apex_build.stages.given import ModelFile, Workplace, workplace
from apex_build.stages.plan import Planned, PlanOptions, plan
from apex_build.stages.quantize import QuantizedFile, QuantizeOptions, quantize
from apex_build.stages.sweep import SweepOptions, Swept, sweep
from apex_build.storage.finding import Located, locate
from apex_build.storage.manifest import Manifest
from apex_build.toolchain.build.run import Built

__all__ = [
    "Allowed",
    "ApexError",
    "Bounds",
    "BuildOptions",
    "Built",
    "CalibrateOptions",
    "Calibration",
    "CalibrationSettings",
    "CheckOptions",
    "Checked",
    "ConvertOptions",
    "Converted",
    "Demo",
    "EvaluateOptions",
    "Fetched",
    "Located",
    "Manifest",
    "Model",
    "ModelFile",
    "Pin",
    "PlanOptions",
    "Planned",
    "QuantizeOptions",
    "QuantizedFile",
    "Report",
    "Result",
    "Setting",
    "Step",
    "SweepOptions",
    "Swept",
    "ToolOptions",
    "Workplace",
    "all_pins",
    "build",
    "calibrate",
    "check",
    "convert",
    "demo",
    "evaluate",
    "fetch",
    "load_pin",
    "locate",
    "plan",
    "quantize",
    "silent",
    "sweep",
    "workplace",
]
