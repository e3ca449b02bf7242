"""Known vulnerabilities of what constraints.txt pins, by pip-audit: `make audit`.

Exit code 1 where one is known, or where pip-audit fails for another reason than the network. A
service that cannot be reached, or that does not know what it is asked about, is no failure of this
project: exit code 0, and the last line says that nothing was audited.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

NOT_AUDITED = "NOT AUDITED"
_NETWORK = re.compile(r"Could not connect|not redirecting properly|requests\.exceptions\.")
_COMMAND = ("-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off",
            "--format", "json", "--requirement")  # fmt: skip
"""Every distribution is in the file, at its version: nothing is left to resolve."""


def main(arguments: Sequence[str]) -> int:
    """Audit the file that is named and print what was found."""
    (path,) = arguments
    done = subprocess.run(
        [sys.executable, *_COMMAND, path], capture_output=True, text=True, check=False
    )
    code, lines = judged(done.stdout, done.stderr)
    print("\n".join(lines))
    return code


def judged(output: str, errors: str) -> tuple[int, list[str]]:
    """Exit code and words for what pip-audit printed on its two streams."""
    try:
        rows = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = next(iter(errors.strip().splitlines()[-1:]), "pip-audit said nothing")
        if _NETWORK.search(errors):
            return 0, [f"{NOT_AUDITED}: the vulnerability service cannot be reached ({last})"]
        return 1, [f"pip-audit failed: {last}"]
    skipped = [row["name"] for row in rows if "skip_reason" in row]
    audited = [row for row in rows if "skip_reason" not in row]
    found = [words for row in audited for words in _vulnerabilities(row)]
    if not audited:
        return 0, [
            f"{NOT_AUDITED}: the vulnerability service knows none of {len(skipped)} distributions"
        ]
    lines = [*found, f"{len(audited)} distributions audited, {len(found)} known vulnerabilities"]
    if skipped:
        lines.append(f"{NOT_AUDITED}, unknown to the service: {', '.join(skipped)}")
    return int(bool(found)), lines


def _vulnerabilities(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['name']} {row['version']}: {each['id']}, "
        f"fixed in {', '.join(each['fix_versions']) or 'no release yet'}"
        for each in row["vulns"]
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
