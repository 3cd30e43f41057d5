"""All errors that a user can meet: one class each, with its own exit code.

The message names the file or tensor, what was expected and what was found; `hint` is the next command to try.
Exit codes 0 to 2 are success, an internal error and a wrong command line (click's); 130 is Ctrl-C.
"""

from __future__ import annotations


class ApexError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1
    advice: str | None = None  # the default hint, unless the raiser gives a better one

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.advice


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: unwinds everything; not an error."""


# --- source: pins, fetching, patches ----------------------------------------------------------------------------------
class PinUnknown(ApexError):
    """No pin of this name, or its file is not valid."""

    exit_code = 10


class DownloadFailed(ApexError):
    """A file could not be fetched, or arrived cut short."""

    exit_code = 11


class HashMismatch(ApexError):
    """A file or a tree does not have the pinned or listed hash."""

    exit_code = 12


class ArchiveUnsafe(ApexError):
    """An archive contains something unsafe to extract: a link, a device, a path that escapes."""

    exit_code = 13
    advice = "download the archive again and compare its sha256; apex source fetch needs no archive"


class TreeEdited(ApexError):
    """The fetched tree was changed by hand."""

    exit_code = 14


class PatchConflict(ApexError):
    """A patch of the series does not apply."""

    exit_code = 15


class SourceMissing(ApexError):
    """The source tree has not been fetched."""

    exit_code = 16


class GitFailed(ApexError):
    """git is missing, or failed in a source tree."""

    exit_code = 17


class PatchUnknown(ApexError):
    """No patch of this number or name in the series, or more than one."""

    exit_code = 18


class SeriesUnfit(ApexError):
    """A series or pin cannot be used for this: a series to export has several authors, or a status is not green."""

    exit_code = 19


# --- toolchain: compilers and builds ----------------------------------------------------------------------------------
class CompilerMissing(ApexError):
    """No usable C++ compiler or build tool."""

    exit_code = 20


class BuildFailed(ApexError):
    """CMake or the compiler failed."""

    exit_code = 21


class BuildMissing(ApexError):
    """The native tools have not been built, or the build is damaged."""

    exit_code = 22


class GpuUnknown(ApexError):
    """No GPU of this name, and no CUDA architecture either."""

    exit_code = 25


class ToolkitUnusable(ApexError):
    """No CUDA toolkit that can build this: parts of it are missing, or it is too old for the GPU or the compiler."""

    exit_code = 26


class BuildForeign(ApexError):
    """A packed build for another architecture or CPU, or a newer system."""

    exit_code = 27


class UpstreamTestsFailed(ApexError):
    """Tests of llama.cpp pass without the series and fail with it."""

    exit_code = 28


# --- conversion: Hugging Face folders to GGUF -------------------------------------------------------------------------
class EnvironmentUnusable(ApexError):
    """The converter's Python lacks packages, or its environment could not be made."""

    exit_code = 23


class ConversionFailed(ApexError):
    """The converter ended with an error, or wrote a model without the draft head."""

    exit_code = 24


# --- native: running the tools ----------------------------------------------------------------------------------------
class ToolFailed(ApexError):
    """A native tool failed."""

    exit_code = 30


class ToolKilled(ApexError):
    """A native tool was killed by a signal."""

    exit_code = 31


class ToolTimeout(ApexError):
    """A native tool did not become ready, or end, in time."""

    exit_code = 32


# --- files: models and imatrices --------------------------------------------------------------------------------------
class ModelMissing(ApexError):
    """No such model file."""

    exit_code = 40
    advice = "check the path; apex inspect FILE shows what a model file holds"


class ModelInvalid(ApexError):
    """Not a GGUF model: foreign, truncated, zero header, or sizes that do not add up."""

    exit_code = 41


class ImatrixInvalid(ApexError):
    """Not an imatrix file, or a damaged one."""

    exit_code = 42


class ImatrixMismatch(ApexError):
    """The imatrix belongs to another model."""

    exit_code = 43


class CheckpointInvalid(ApexError):
    """A Hugging Face folder that cannot be converted: files missing, or a promised draft head without tensors."""

    exit_code = 44


class HeadRowsMismatch(ApexError):
    """The imatrix's data for the draft head is from other hidden rows than the head was trained on, or does not name
    them.
    """

    exit_code = 45


class LoadFailed(ApexError):
    """The built tools cannot load the model: tensors or keys are missing, or its vocabulary or architecture is unknown
    to them.
    """

    exit_code = 46


class ManifestMissing(ApexError):
    """No apex manifest there, and none beside it."""

    exit_code = 47
    advice = "give an output of apex, its manifest (OUT.json), or a folder of the cache: apex cache list"


# --- calibration ------------------------------------------------------------------------------------------------------
class CalibrationSetInvalid(ApexError):
    """A calibration set, source or text that cannot be used."""

    exit_code = 50


class ChatTemplateFailed(ApexError):
    """The model's chat template raised, or tried what the sandbox forbids."""

    exit_code = 51


class HeadRowsDoubtful(ApexError):
    """The draft head drafts clearly better with other hidden rows than its architecture is known to use."""

    exit_code = 52


# --- policy -----------------------------------------------------------------------------------------------------------
class PolicyUnknown(ApexError):
    """No policy of this name."""

    exit_code = 60


class ParameterUnknown(ApexError):
    """The policy has no such parameter, or its value is not valid."""

    exit_code = 61


class TypeUnknown(ApexError):
    """Not a GGUF tensor type, or not one that llama-quantize can write."""

    exit_code = 62


class TemplateFailed(ApexError):
    """A policy's template raised, or rendered a line that is not `pattern=type`."""

    exit_code = 63


class TemplateUnsafe(ApexError):
    """A policy's template tried what the sandbox forbids."""

    exit_code = 64
    advice = "a template sees only data, no files and no Python: docs/policies.md; apex policies lists the policies"


class PlanMismatch(ApexError):
    """llama-quantize would do something other than the plan says."""

    exit_code = 65


class PolicyUnfit(ApexError):
    """The policy needs a part that the model does not have."""

    exit_code = 66


class MeasurementUnfit(ApexError):
    """A measurement of a model that cannot be used: damaged, or of another model or build."""

    exit_code = 67


class BudgetUnfit(ApexError):
    """No file of this size can be made: smaller than the smallest possible one, or larger than the largest."""

    exit_code = 68


# --- quantization -----------------------------------------------------------------------------------------------------
class DiskTooSmall(ApexError):
    """Not enough disk space for the output."""

    exit_code = 70


class OutputUnwritable(ApexError):
    """The output's folder cannot be written, or the output exists."""

    exit_code = 71


class DataMissing(ApexError):
    """A tensor's type needs calibration data that the imatrix does not hold."""

    exit_code = 72


class ShapeUnfit(ApexError):
    """A tensor's shape cannot hold the planned type."""

    exit_code = 73


class AlreadyQuantized(ApexError):
    """The input is quantized already."""

    exit_code = 74


class VerificationFailed(ApexError):
    """The written file is not what was planned."""

    exit_code = 75


# --- evaluation -------------------------------------------------------------------------------------------------------
class EvaluatorUnknown(ApexError):
    """No evaluator of this name."""

    exit_code = 76


class EvaluationRefused(ApexError):
    """The measurement is impossible: a head, text, reference or data is missing or unsuitable."""

    exit_code = 77


class VocabularyMismatch(ApexError):
    """The reference has another vocabulary than the file."""

    exit_code = 78


# --- the command line's own file --------------------------------------------------------------------------------------
class ConfigInvalid(ApexError):
    """An apex.toml that is not TOML, or has unknown names."""

    exit_code = 3


# --- plugins and the machine ------------------------------------------------------------------------------------------
class PluginFailed(ApexError):
    """A plugin could not be loaded, or raised."""

    exit_code = 80


class SystemUnsupported(ApexError):
    """Unsupported operating system: apex-build runs on Linux."""

    exit_code = 81


class ClusterFailed(ApexError):
    """No Dask scheduler at the address, or it was lost on the way."""

    exit_code = 83


class WorkersUnfit(ApexError):
    """No worker of the cluster can take the work: another build of the tools, too little memory, too many threads."""

    exit_code = 84


class PluginIncompatible(ApexError):
    """A plugin was made for a version of the plugin API that this apex-build does not have."""

    exit_code = 82


class CheckFailed(ApexError):
    """A checked file does not write text, or its drafts are not accepted."""

    exit_code = 90
