"""Files made from a shared trunk are bit-identical to files made in one go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.quantization.preflight import Allowed
from apex_build.quantization.run import prepare, run
from apex_build.storage.digests import sha256_file
from apex_build.sweep.shared_trunk import head_job, same_trunk, trunk_job
from apex_build.sweep.without_head import write_without_head

SMALL = {"edge": 1, "near": 1, "attention_edge": 1}


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        (
            "draft-head-only",
            [
                {"draft_head": "Q8_0"},
                {"draft_head": "Q4_K"},
                {"draft_head.routed": "IQ2_XXS", "draft_head.other": "Q6_K"},
            ],
        ),
        ("i-compact", [SMALL, {**SMALL, "draft_head": "IQ3_XXS"}]),
    ],
)
def test_bit_identical(
    policy: str, parameters: list[dict[str, str]], tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    plugins = load_plugins()
    model = read_model(testbed, plugins.role_of)
    headless = tmp_path / "without-head.gguf"
    write_without_head(calibrated, model, headless)
    spec = plugins.policy(policy)
    jobs = [prepare(model, spec, dict(p), tools, tmp_path / "x.gguf", imatrix=calibrated) for p in parameters]
    # without data for the head, from the trunk that was made with the other imatrix: the data for the trunk is the same
    allowed = Allowed(uncalibrated=True)
    jobs.append(
        prepare(
            model,
            spec,
            {**parameters[0], "draft_head": "Q3_K"},
            tools,
            tmp_path / "x.gguf",
            imatrix=headless,
            allowed=allowed,
        )
    )
    assert same_trunk(jobs)
    trunk = read_model(run(trunk_job(jobs[0], tmp_path / "trunk.gguf")).path, plugins.role_of)
    for number, job in enumerate(jobs):
        whole = run(replace(job, out=tmp_path / f"whole-{number}.gguf"))
        parts = run(head_job(replace(job, out=tmp_path / f"parts-{number}.gguf"), trunk))
        assert sha256_file(whole.path) == sha256_file(parts.path)
        assert not parts.reused
    assert run(trunk_job(jobs[-2], tmp_path / "trunk.gguf")).reused, "whatever the head is to be"


def test_another_trunk_is_told(tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path) -> None:
    plugins = load_plugins()
    model, spec = read_model(testbed, plugins.role_of), plugins.policy("draft-head-only")
    jobs = [
        prepare(model, spec, {"trunk": trunk}, tools, tmp_path / "x.gguf", imatrix=calibrated)
        for trunk in ("Q8_0", "Q6_K")
    ]
    assert not same_trunk(jobs)
