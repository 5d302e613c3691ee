"""The default tests on the newest torch, which pyproject.toml allows and .ci/run does not take."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def command(*words):
    """Run a command in the repository's root, in the open; its exit code."""
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=free).returncode


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)  # gigabytes to download, then the tests
def test_the_default_tests_pass_on_the_newest_torch(tmp_path):
    folder = tmp_path / "venv"
    python = folder / "bin" / "python"
    try:
        assert command(sys.executable, "-m", "venv", folder) == 0
        assert command(python, "-m", "pip", "install", "--quiet", "torch", ".[test]") == 0
        command(python, "-c", "import torch; print('torch', torch.__version__)")
        assert command(python, "-m", "pytest", "-q") == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # pytest would keep it
