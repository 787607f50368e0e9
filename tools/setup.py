"""Make .venv with everything that the book needs. `make` calls this; only the standard library is used.

The stamp .venv/.ready is written last. The marker .venv.incomplete lies beside .venv while a set-up runs:
the next set-up that finds it starts from an empty .venv.
"""

import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
MARKER = os.path.join(ROOT, ".venv.incomplete")
STAMP = os.path.join(VENV, ".ready")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
OLDEST = (3, 11)

# Settings of the JupyterLab inside .venv. They are defaults: what a reader chooses in JupyterLab wins.
OVERRIDES = {
    "@jupyterlab/docmanager-extension:plugin": {
        "defaultViewers": {"markdown": "Jupytext Notebook", "myst": "Jupytext Notebook"}
    },
    # Every cell stays on the page: widgets and figures don't vanish while one scrolls, and searching finds all text.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": False,
    },
}


def check_python():
    """Say in one sentence what is wrong with this Python, if something is."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        sys.exit(
            f"polylib needs Python 3.11 or newer; {sys.executable} is Python {version}. "
            "Install a newer one, or name it: make lab PYTHON=/path/to/python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            f"{sys.executable} (Python {version}) can't make a virtual environment: venv or ensurepip is missing. "
            "On Debian or Ubuntu: apt install python3-venv"
        )


def works():
    """True if .venv holds a Python that is new enough and has pip."""
    test = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.call([PYTHON, "-c", test], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def write_overrides():
    """Chapters open as notebooks, and JupyterLab asks nothing of the network. Nothing is written to the user's home."""
    folder = os.path.join(VENV, "share", "jupyter", "lab", "settings")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "overrides.json"), "w") as file:
        json.dump(OVERRIDES, file, indent=2)


def main():
    check_python()
    start = time.time()
    clean = os.path.exists(MARKER) or not works()
    with open(MARKER, "w") as file:
        file.write("A set-up is running, or was interrupted.\n")
    if os.path.exists(STAMP):
        os.remove(STAMP)
    if clean:
        print("Making .venv with Python " + ".".join(map(str, sys.version_info[:3])), flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", VENV])
    print("Installing polylib and what it needs (minutes the first time, seconds later)", flush=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt", "-e", ".[all]"]
    subprocess.check_call(pip if sys.stdout.isatty() else [*pip, "--quiet"], cwd=ROOT)
    write_overrides()
    os.remove(MARKER)
    with open(STAMP, "w") as file:
        file.write("Set up from pyproject.toml and constraints.txt.\n")
    print(f"Ready in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"Set-up stopped: {' '.join(error.cmd)} failed. The next call starts again.")
    except KeyboardInterrupt:
        sys.exit("Set-up interrupted. The next call starts again.")
