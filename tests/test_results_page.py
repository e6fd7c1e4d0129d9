"""The tables of the results page are those of the published cells."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "results" / "page.py"


def test_the_page_says_what_the_cells_say() -> None:
    checked = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    page = SCRIPT.parents[1] / "results.md"
    assert page.read_text(encoding="utf-8").count("<!-- table: ") >= 6  # the check is of marked tables alone
