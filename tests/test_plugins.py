"""The suite runs beside plugins of pytest that it does not use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_benchmark_plugin_does_not_end_the_suite(tmp_path: Path) -> None:
    """pytest-benchmark warns, once it sees xdist, before any test: warnings are errors here."""
    warns = "import warnings\ndef pytest_configure():\n    warnings.warn('disabled by xdist')\n"
    (tmp_path / "stand_in.py").write_text(warns)
    metadata = tmp_path / "stand_in-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nbenchmark = stand_in\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/common/test_logs.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
