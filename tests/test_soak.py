"""Ten of the kills of soak.py, which kills as often as it is asked to (20 s)."""
import subprocess
import sys

from conftest import ROOT


def test_stages_that_are_killed_at_random_end_as_without_a_kill(tmp_path):
    """In a process of its own: it forks, and this one may have threads."""
    command = [sys.executable, ROOT / "tests" / "soak.py", "--kills", "10", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "OK after 10 kills" in done.stdout
