"""The report that pipelines and sweeps leave at their end."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("altair", "vl_convert")
INSTALL = 'pip install "wsss[report]"'


def write_report(folder: Path, options: Sequence[str] = ()) -> None:
    """`report.html` in a folder, by `wsss-report` in a process of its own; without its packages a sentence.

    What it cannot do is said and fails nothing: the results are there.
    """
    if any(find_spec(package) is None for package in PACKAGES):
        print(f"no report.html in {folder}: {INSTALL} brings what it needs, then wsss-report {folder}", flush=True)
        return
    start = [sys.executable, "-c", "from wsss.commands.report import main; main()"]
    ended = subprocess.run([*start, *options, str(folder)], capture_output=True, text=True, errors="replace")
    last = ((ended.stderr if ended.returncode else ended.stdout).strip().splitlines() or ["it said nothing"])[-1]
    print(f"no report.html in {folder}: {last}" if ended.returncode else last, flush=True)  # else where it is
