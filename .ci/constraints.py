"""Turns pip's installation report into constraints.txt: one `name==version` a line.

Usage: python .ci/constraints.py REPORT CONSTRAINTS
"""

import json
import os
import re
import sys
from pathlib import Path


def main(report: str, target: str) -> None:
    packages = [item["metadata"] for item in json.loads(Path(report).read_text(encoding="utf-8"))["install"]]
    pins = sorted(
        f"{re.sub('[-_.]+', '-', package['name']).lower()}=={package['version']}"
        for package in packages
        if package["name"] != "tfkit-keras"
    )
    temporary = Path(f"{target}.new")
    temporary.write_text("\n".join(["# Written by `make constraints`.", *pins, ""]), encoding="utf-8")
    os.replace(temporary, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
