"""`unillava doctor` on this machine: every installed framework answers."""

from __future__ import annotations

from unillava import doctor


def test_every_framework_of_this_environment_answers():
    findings = doctor.examine()
    assert doctor.usable(findings) == ["torch", "mindspore", "paddle"], findings.backends
    for backend in findings.backends.values():
        assert "float32" in backend.devices["cpu"]
    assert findings.launchers["torchrun"] and findings.launchers["msrun"]
    levels = {problem.level for problem in doctor.diagnose(findings)}
    assert "error" not in levels, doctor.diagnose(findings)
