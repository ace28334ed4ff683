"""Real runs of `unillava parity`, each backend in its own process, on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unillava.checkpoint import open_checkpoint
from unillava.errors import UnillavaError
from unillava.parity import Settings, job, run_parity
from unillava.parity import run as parity_run
from unillava.spec import parameter_table

BAR = 1e-5
FORWARD_ONLY = {"gradients": False, "new_tokens": 0, "repeats": 1}


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("UNILLAVA_BACKEND", raising=False)


@pytest.fixture
def changed(tmp_path):
    """`changed(directory, name)`: a copy in which one tensor is slightly different."""

    def change(directory: Path, name: str, by: float = 0.02) -> Path:
        copy = tmp_path / f"changed-{name}"
        shutil.copytree(directory, copy)
        for file in copy.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                noise = np.random.default_rng(0).standard_normal(tensors[name].shape)
                tensors[name] = (tensors[name] + by * noise).astype(np.float32)
                save_file(tensors, file, metadata={"format": "pt"})
                return copy
        raise AssertionError(f"{name} is in no file")

    return change


def assert_equal(report: parity_run.Report, spec) -> None:
    """Every output, the loss and every gradient of every backend is within the bar."""
    wanted = set(job.module_names(spec)) | {"merge", "logits"}
    for candidate in report.candidates:
        this, reference = candidate.run, report.reference_result.runs[0]
        assert {d.name.partition("@")[0] for d in this.outputs} == wanted, candidate.label
        assert {d.name for d in this.gradients} == set(parameter_table(spec)), candidate.label
        for d in (*this.outputs, *this.gradients):
            assert d.relative <= BAR, (candidate.label, d)
        assert abs(this.loss - reference.loss) <= BAR * reference.loss
        assert abs(this.gradient_norm - reference.gradient_norm) <= BAR * reference.gradient_norm
        assert candidate.result.tokens == report.reference_result.tokens
        assert candidate.passed
    assert report.passed


def test_torch_computes_what_transformers_computes(tiny, photo):
    """With images of two shapes, a video and text only in one padded batch; noise measured."""
    directory = tiny("llava_next_video")
    spec = open_checkpoint(str(directory)).spec
    steps = []
    report = run_parity(
        Settings(
            str(directory), ("torch",), "transformers", images=(str(photo), str(photo)),
            new_tokens=8, repeats=2,
        ),
        lambda *step: steps.append(step),
    )  # fmt: skip
    assert_equal(report, spec)
    assert [row.title for row in report.rows] == ["image 1", "image 2", "video", "text"]
    assert all(len(tokens) == 8 for tokens in report.reference_result.tokens)
    names = [d.name for d in report.candidates[0].run.outputs]
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc2@video" in names
    assert names.index("vision_tower.vision_model.encoder.layers.0") < names.index("merge")
    assert names[-1] == "logits"
    assert len(report.noise_runs) == 3
    assert set(report.output_noise) == set(report.reference_result.order)
    assert 0 < max(report.output_noise.values()) <= BAR
    assert 0 < max(report.gradient_noise.values()) <= BAR
    assert report.noise_facts.tokens_equal
    assert report.reference_result.versions.keys() >= {"transformers", "torch"}
    labels = {label for label, *_ in steps}
    assert labels == {"transformers (reference)", "transformers (noise)", "torch"}
    assert all(done <= total for _, done, total, _ in steps)


@pytest.mark.parametrize(
    "model",
    [
        ("llava_next", "llama", "clip"),
        ("llava_next", "llama3", "siglip"),
        ("llava", "qwen2", "siglip"),
        ("llava_next_video", "mistral", "clip"),
    ],
    ids="-".join,
)
def test_all_backends_compute_the_same(model, tiny, photo):
    directory = tiny(*model)
    report = run_parity(Settings(str(directory), images=(str(photo),), repeats=1, new_tokens=12))
    assert (report.reference, [c.label for c in report.candidates]) == (
        "torch", ["mindspore", "paddle"],
    )  # fmt: skip
    assert_equal(report, open_checkpoint(str(directory)).spec)
    assert report.noise_facts is None and report.output_noise == {}


@pytest.mark.parametrize(
    ("tensor", "first", "layer"),
    [
        (
            "vision_tower.vision_model.encoder.layers.1.self_attn.v_proj.weight",
            "vision_tower.vision_model.encoder.layers.1.self_attn.v_proj",
            "vision_tower.vision_model.encoder.layers.1",
        ),
        (
            "vision_tower.vision_model.embeddings.position_embedding.weight",
            "vision_tower.vision_model.embeddings",
            "vision_tower.vision_model.embeddings",
        ),
        ("image_newline", "merge", "merge"),
        ("language_model.lm_head.weight", "logits", "logits"),
    ],
)
def test_the_changed_layer_is_named(tiny, changed, tensor, first, layer):
    directory = tiny("llava_next")
    overrides = {"torch": str(changed(directory, tensor))}
    report = run_parity(Settings(str(directory), ("torch",), overrides=overrides, **FORWARD_ONLY))
    found = report.candidates[0].divergence
    assert not report.passed
    assert (found.name, found.layer, found.jump) == (first, layer, first)


def test_blocks_first_and_then_inside_the_one_that_diverges(tiny, changed, monkeypatch):
    """What is done with models whose outputs would not all fit."""
    monkeypatch.setattr(parity_run, "KEEP_EVERYTHING_BYTES", 0)
    directory, block = tiny("llava_next"), "language_model.model.layers.1"
    overrides = {"torch": str(changed(directory, f"{block}.mlp.up_proj.weight"))}
    report = run_parity(Settings(str(directory), ("torch",), overrides=overrides, **FORWARD_ONLY))
    names = [d.name for d in report.candidates[0].run.outputs]
    assert not [name for name in names if ".layers.0." in name or ".layers.2." in name]
    assert names.index(f"{block}.self_attn.q_proj") < names.index(f"{block}.mlp.up_proj")
    assert names.index(f"{block}.mlp.up_proj") < names.index(block)
    found = report.candidates[0].divergence
    assert (found.name, found.layer) == (f"{block}.mlp.up_proj", block)
    assert found.before == f"{block}.mlp.gate_proj"


# --- the command -----------------------------------------------------------------------------


def test_a_changed_checkpoint_fails_with_exit_code_1(run, tiny, changed, photo, tmp_path):
    """Everything at once: gradients, tokens, noise, HTML and JSON; a passing backend beside it."""
    directory = tiny("llava_next")
    tensor = "language_model.model.layers.1.self_attn.k_proj.weight"
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    done = run(
        "parity", directory, "--backends", "torch,paddle", "--image", photo,
        "--override", f"torch={changed(directory, tensor)}", "--repeats", "2",
        "--max-new-tokens", "12", "--out", page, "--json", data, "--prompt", "무엇이 있나요?",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert "FAIL torch (override) parts from torch at" in done.out
    assert "PASS paddle" in done.out and str(page) in done.err
    found = json.loads(data.read_text(encoding="utf-8"))
    bad, good = found["candidates"]
    assert not found["passed"] and good["passed"] and not bad["passed"]
    assert bad["first_divergence"]["name"] == tensor.removesuffix(".weight")
    assert bad["first_divergence"]["layer"] == "language_model.model.layers.1"
    failing = {(t["guide"], t["criterion"]) for t in bad["thresholds"] if t["passed"] is False}
    assert ("unillava", "every output") in failing and ("unillava", "every gradient") in failing
    assert not [t for t in good["thresholds"] if t["decides"] and not t["passed"]]
    assert len(found["rows"][0]["replies"]["paddle"]) == 12
    text = page.read_text(encoding="utf-8")
    assert "무엇이 있나요?" in text and "data:image/jpeg;base64," in text
    assert text.index("FAIL") < text.index("Outputs, layer by layer")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "report.html", "report.json",
    ]  # fmt: skip


def test_a_pass_has_exit_code_0(spawn, tiny, tmp_path):
    """In a process of its own, from another folder, without gradients and tokens."""
    page = tmp_path / "r.html"
    done = spawn(
        "parity", tiny("llava"), "--backends", "torch@cpu", "--reference", "transformers",
        "--device", "cpu", "--no-gradients", "--repeats", "1", "--max-new-tokens", "0",
        "--out", page, "--work-dir", tmp_path,
    )  # fmt: skip
    assert done.succeeded().out.count("PASS torch@cpu computes what transformers computes") == 1
    text = page.read_text(encoding="utf-8")
    assert "no replies were generated" in text and "Gradients, parameter" not in text
    assert list(tmp_path.iterdir()) == [page]  # the temporary folder is gone


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--override", "torch"], "BACKEND=VALUE"),
        (["--backends", "torch"], "nothing to compare"),
        (["--out", "/nowhere/at/all/r.html"], "folder for the report"),
        (["--backends", "torch,paddle", "--dtype", "int3"], "unknown dtype"),
        (["--backends", "torch,paddle", "--image", "/nowhere.jpg"], "/nowhere.jpg"),
        (["--backends", "torch,paddle", "--template", "nonesuch"], "nonesuch"),
        (["--backends", "torch", "--reference", "torch@cuda:99"], "torch@cuda:99"),
    ],
)
def test_bad_input_has_exit_code_2(run, tiny, options, told):
    error = run("parity", tiny("llava"), *options).refused()
    assert told in error


def test_a_process_that_dies_is_reported_with_its_log(tmp_path, tiny):
    wanted = job.Job(
        "torch", "native", "torch", "cpu", "float32", str(tiny("llava")), None, None,
        str(tmp_path / "absent"),
        str(tmp_path / "store"), True, ("auto",), (), False, 0,
    )  # fmt: skip
    with pytest.raises(UnillavaError, match="ended without a result") as caught:
        job.run_job(wanted, tmp_path / "job", lambda *_: None)
    assert "exit code 1" in caught.value.given and "KeyError" in caught.value.given
