"""Arguments that a user adds to a tool's own: those that apex sets are refused, and the files that they name are
reported.

An option's short, long and negative names are taken from the tool's own --help.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.errors import ParameterUnknown
from apex_build.native.run import run_tool
from apex_build.storage.digests import sha256_file

_NAMES = re.compile(r" {0,2}(-{1,2}[A-Za-z][\w-]*(?:,? +-{1,2}[A-Za-z][\w-]*)*)(?: (\S+(?: \S+)*))?(?:  .*)?")
_FILE = re.compile(r"FNAME|FILE|PATH|DIR|filename")
_SCALE = re.compile(r":-?[\d.]+$")  # of FNAME:SCALE

_OTHER_MODEL = "the model is the file that apex was given"
_PRINTS = "apex reads what the tool prints"
_ENDS = "the tool would exit without doing its work"
_OURS = "apex does"
# An option of each group, by its long name -> what to use instead, or why it is not possible.
_LOGS = (
    "--log-disable",
    "--log-file",
    "--log-prefix",
    "--log-timestamps",
    "--log-colors",
    "--log-verbosity",
    "--log-verbose",
)
_ASIDE = ("--help", "--version", "--cache-list", "--completion-bash", "--list-devices", "--license")
_MODELS = ("--model", "--model-url", "--docker-repo", "--hf-repo", "--hf-file", "--hf-repo-v", "--hf-file-v")
_OF_ALL = {
    **dict.fromkeys(_MODELS, _OTHER_MODEL),
    **dict.fromkeys(_LOGS, _PRINTS),
    **dict.fromkeys(_ASIDE, _ENDS),
    "--threads": "--threads N",
    "--n-gpu-layers": "--gpu-layers N",
}
_RESERVED: Mapping[str, Mapping[str, str]] = {
    "llama-imatrix": {
        **dict.fromkeys(("--ctx-size", "--batch-size"), "--context N"),
        **dict.fromkeys(("--file", "--binary-file", "--prompt"), "--text FILE"),
        "--chunks": "--chunks N",
        "--output": "-o FILE",
        "--mtp": "--mtp or --no-mtp",
        "--mtp-rows": "--mtp-rows ROWS",
        "--show-statistics": "apex inspect FILE",
        **dict.fromkeys(("--chunk", "--in-file", "--output-format", "--output-frequency", "--save-frequency"), _OURS),
        **dict.fromkeys(("--parse-special", "--escape", "--parallel"), _OURS),
    },
    "llama-perplexity": {
        "--ctx-size": "--set EVALUATOR.context=N",
        "--chunks": "--set EVALUATOR.chunks=N",
        "--parse-special": "--set EVALUATOR.parse_special=no",
        **dict.fromkeys(("--file", "--prompt"), "--text FILE"),
        "--binary-file": "--data EVALUATOR=FILE",
        "--mtp-depth": "--set EVALUATOR.depth=N",
        **dict.fromkeys(("--kl-divergence", "--kl-divergence-base", "--mtp", "--mtp-output-file"), "--only EVALUATOR"),
        **dict.fromkeys(("--hellaswag", "--winogrande", "--multiple-choice"), "--only EVALUATOR"),
        **dict.fromkeys(
            ("--hellaswag-tasks", "--winogrande-tasks", "--multiple-choice-tasks"), "--set EVALUATOR.tasks=N"
        ),
        **dict.fromkeys(("--ppl-stride", "--ppl-output-type"), _PRINTS),
        **dict.fromkeys(("--parallel", "--escape"), _OURS),
    },
    "llama-server": {
        "--ctx-size": "--set EVALUATOR.context=N",
        **dict.fromkeys(("--host", "--port", "--parallel", "--api-prefix", "--api-key", "--api-key-file"), _OURS),
        **dict.fromkeys(
            ("--ssl-key-file", "--ssl-cert-file", "--models-dir", "--models-preset", "--lookup-cache-dynamic"), _OURS
        ),
        "--spec-type": "--only EVALUATOR",
        "--spec-draft-model": "--only EVALUATOR",
        "--spec-draft-n-max": "--set EVALUATOR.lengths=N, or --set speed.n_max=N",
    },
    "llama-bench": {
        "--repetitions": "--set speed.repetitions=N",
        "--n-prompt": "--set speed.prompt=N",
        "--n-gen": "--set speed.generate=N",
        "-pg": "--set speed.prompt=N",
        **dict.fromkeys(("--output", "--output-err"), _PRINTS),
    },
}


@dataclass(frozen=True)
class Option:
    """An option of a tool with all its names. `values`: how many words follow it; `file`: they name files."""

    names: tuple[str, ...]
    values: int
    file: bool


@dataclass(frozen=True)
class Extra:
    """Additional arguments, with absolute paths of the files that they name, and the sha256 of each file."""

    arguments: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict, hash=False)


def resolve(program: Path, given: Sequence[str]) -> Extra:
    """Check and complete what a user adds to a tool's arguments.

    Raises ParameterUnknown for an option that apex sets itself, under any name, and for a missing file.
    """
    if not given:
        return Extra()
    reserved = {**_OF_ALL, **_RESERVED.get(program.name, {})}
    arguments: list[str] = []
    files: dict[str, str] = {}
    for words, option in _options(program, given):
        if option is not None:
            if why := next((reserved[name] for name in option.names if name in reserved), None):
                raise _refused(program, words[0], why)
            words = [_with_files(program, option, number, word, files) for number, word in enumerate(words)]
        arguments += words
    return Extra(tuple(arguments), files)


def check_no_double(program: Path, own: Sequence[str], given: Sequence[str]) -> None:
    """Raises ParameterUnknown if the user gives an option that is already in `own`, under any of its names."""
    if given:
        ours = {option for _, option in _options(program, own) if option is not None}
        for words, option in _options(program, given):
            if option in ours:
                raise _refused(program, words[0], _OURS)


@functools.lru_cache(maxsize=16)
def options_of(program: Path) -> Mapping[str, Option]:
    """A tool's options by each of their names, from its help."""
    found: dict[str, Option] = {}
    for line in run_tool([program, "--help"], check=False, timeout=120).lines:
        if match := _NAMES.fullmatch(line):
            names, hint = tuple(re.findall(r"-[\w-]+", match[1])), match[2] or ""
            values = [word for word in re.sub(r"<[^>]*>", "X", hint).split() if not word.startswith("(")]
            option = Option(names, len(values), bool(_FILE.search(hint)))
            found |= dict.fromkeys(names, option)
    return found


def _options(program: Path, given: Sequence[str]) -> Iterator[tuple[list[str], Option | None]]:
    """The words of each option, with the option: None for words that belong to none."""
    known = options_of(program)
    at = 0
    while at < len(given):
        name, equals, _ = given[at].partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")  # as the tools do
        option = known.get(name)
        end = at + 1 + (option.values if option and not equals else 0)
        yield list(given[at:end]), option
        at = end


def _with_files(program: Path, option: Option, number: int, word: str, files: dict[str, str]) -> str:
    """The word with absolute paths for the files in it; they are added to `files`."""
    head, equals, value = word.partition("=") if number == 0 else ("", "", word)
    if number == 0 and not equals:
        return word
    return head + equals + ",".join(_file(program, option, part, files) for part in value.split(","))


def _file(program: Path, option: Option, part: str, files: dict[str, str]) -> str:
    if Path(part).expanduser().exists():
        path, scale = Path(part), ""
    else:
        path, scale = Path(_SCALE.sub("", part)), part[len(_SCALE.sub("", part)) :]
    path = path.expanduser()
    if path.is_file() and (option.file or "/" in part):
        files[str(path.absolute())] = sha256_file(path)
    elif option.file and not path.exists():
        raise ParameterUnknown(f"--tool-argument {option.names[-1]}: {part}: no such file", hint=f"{program} --help")
    elif not option.file:
        return part
    return f"{path.absolute()}{scale}"


def _refused(program: Path, word: str, why: str) -> ParameterUnknown:
    name = word.partition("=")[0]
    if why.startswith(("-", "apex ")) and why != _OURS:
        return ParameterUnknown(
            f"--tool-argument {name}: apex sets this option of {program.name} itself", hint=f"use {why} instead"
        )
    reason = "apex sets this itself" if why == _OURS else why
    return ParameterUnknown(
        f"--tool-argument {name}: {program.name} cannot get this option: {reason}", hint=f"leave {name} out"
    )
