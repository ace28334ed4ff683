"""Runs the same thing on several backends and compares: `unillava parity`.

    from unillava.parity import Settings, run_parity
    report = run_parity(Settings("path/to/checkpoint", reference="transformers"))
    print(report.passed)

No framework is imported here: each backend has a process of its own.
"""

from unillava.parity.run import Report, Settings, run_parity

__all__ = ["Report", "Settings", "run_parity"]
