"""Every check, in the order of cost. Stops at the first stage that fails."""

import subprocess
import sys
import time

from tools.execute import ROOT

STAGES = {
    "style of code and cells": ["tools.lint"],
    "the library": ["pytest", "tests", "--ignore=tests/site", "-n", "2", "-q"],
    "chapters and labs": ["tools.book", "execute"],
    "the site": ["tools.book", "build"],
    "the pages in a browser": ["pytest", "tests/site/test_pages.py", "-n", "2", "-q"],
    # Alone on the machine, since they wait for a figure to follow.
    "sweeps and JupyterLab in a browser": ["pytest", "tests/site", "--ignore=tests/site/test_pages.py", "-q"],
}


def main() -> int:
    for number, (name, module) in enumerate(STAGES.items(), start=1):
        print(f"\n== {number}/{len(STAGES)} {name}", flush=True)
        start = time.perf_counter()
        status = subprocess.call([sys.executable, "-m", *module], cwd=ROOT)
        if status != 0:
            print(f"make test stopped at {number}/{len(STAGES)}: {name}", file=sys.stderr)
            return status
        if number < len(STAGES):
            print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
