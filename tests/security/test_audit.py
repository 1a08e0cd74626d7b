"""`make audit`: what is found fails, what cannot be asked is said and passes."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FOUND = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
CLEAN = {"name": "y", "version": "1", "vulns": []}
UNASKED = {"name": "z", "skip_reason": "could not be reached"}
CASES = {
    "a vulnerability": ([FOUND, CLEAN, UNASKED], 1, "x 1: CVE-1, mended in 2"),
    "none": ([CLEAN], 0, "1 of 1 pinned packages looked up, 0 known"),
    "no database": ([UNASKED], 0, "skipped: the database tells nothing (could not be reached)"),
    "no answer": (None, 0, "skipped: no answer from the database of vulnerabilities (no network)"),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_found_fails(case, tmp_path):
    dependencies, code, said = CASES[case]
    tool = tmp_path / "pip-audit"  # what the real tool writes, for the script around it
    answer = json.dumps({"dependencies": dependencies})
    write = 'for last; do :; done; printf "%s" "$ANSWER" > "$last"' if dependencies else "echo no network >&2; exit 1"
    tool.write_text(f"#!/bin/sh\n{write}\n")
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ANSWER": answer}
    done = subprocess.run(
        [ROOT / ".ci" / "audit", sys.executable], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout
