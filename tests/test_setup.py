"""The set-up: what pyproject.toml, constraints.txt, environment.yml and the Makefile promise each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST = PROJECT["requires-python"].removeprefix(">=") + ".0"


def requirements(path: Path) -> list[Requirement]:
    lines = path.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, Requirement]:
    return {canonicalize_name(pin.name): pin for pin in requirements(ROOT / "constraints.txt")}


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def extras() -> list[Requirement]:
    listed = PROJECT["dependencies"] + [
        item for extra, items in PROJECT["optional-dependencies"].items() if extra != "all" for item in items
    ]
    return [Requirement(item) for item in listed]


# constraints.txt -----------------------------------------------------------------------------------------------------


def test_constraints_are_exact_releases() -> None:
    for pin in requirements(ROOT / "constraints.txt"):
        assert re.fullmatch(r"==[0-9][^+,*]*", str(pin.specifier)), f"{pin}: expected name==release, no local build"


def test_constraints_satisfy_pyproject() -> None:
    pinned = pins()
    for requirement in extras():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(version(pinned[name])), f"{requirement} against {pinned[name]}"


def test_constraints_are_what_is_tested_here() -> None:
    """The pins are the installed versions, or the reason is a marker that excludes this machine."""
    different = []
    for name, pin in pins().items():
        try:
            installed = metadata(name)["Version"].split("+")[0]
        except PackageNotFoundError:
            continue
        if (pin.marker is None or pin.marker.evaluate()) and installed != version(pin):
            different.append(f"{pin} (installed: {installed})")
    if different and not os.environ.get("CI") and not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("this environment was not made by the Makefile")
    assert not different, f"not the tested set: {', '.join(different)}"


def test_constraints_admit_the_oldest_python() -> None:
    """No pin asks for a later patch release than pyproject.toml does."""
    for name, pin in pins().items():
        try:
            needs = metadata(name).get("Requires-Python") or ""
        except PackageNotFoundError:
            continue
        assert SpecifierSet(needs).contains(OLDEST), f"{pin} needs Python {needs}, and pyproject.toml allows {OLDEST}"


def test_constraints_agree_with_the_published_torch() -> None:
    """A CPU build of torch asks for less than the Linux wheel that most readers get. Their pins must fit, too."""
    torch = version(pins()["torch"])
    path = ROOT / "tests" / "data" / f"torch-{torch}-requires-dist.txt"
    assert path.exists(), (
        f"constraints.txt pins torch {torch}, and {path.relative_to(ROOT)} is missing. Take the METADATA of the "
        "published manylinux wheel of that torch, not of a CPU build; write its Requires-Dist lines without 'extra ==' "
        "to that file; remove the file of the version before; move the pin of triton to the version it names."
    )
    pinned = pins()
    for requirement in requirements(path):
        pin = pinned.get(canonicalize_name(requirement.name))
        if pin is not None:
            assert requirement.specifier.contains(version(pin)), f"torch {torch} requires {requirement}; pinned: {pin}"
    assert "triton" in pinned, "the Linux wheel of torch brings triton: constraints.txt must pin it"


def test_triton_is_for_linux_only() -> None:
    for requirement in [pins()["triton"], *(item for item in extras() if item.name == "triton")]:
        assert requirement.marker is not None
        assert requirement.marker.evaluate({"sys_platform": "linux"})
        assert not requirement.marker.evaluate({"sys_platform": "darwin"})


# environment.yml, JupyterLab, API page -------------------------------------------------------------------------------


def test_environment_is_python_and_this_package() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["dependencies"] == [
        f"python{PROJECT['requires-python']}",
        "pip",
        {"pip": ["-c constraints.txt", "-e .[all]"]},
    ]
    assert "all" in PROJECT["optional-dependencies"]


def test_all_means_every_extra() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(PROJECT["optional-dependencies"]) - {"all"}


def test_api_page_lists_every_package() -> None:
    page = (ROOT / "book" / "api.md").read_text()
    packages = {f"polylib.{path.parent.name}" for path in (ROOT / "polylib").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"polylib\.\w+", page)), "add the new package to book/api.md"


def test_saving_from_jupyterlab_leaves_the_header_alone(tmp_path: Path) -> None:
    """A save after a run changes nothing in the file: no versions, no outputs, no cell metadata."""
    jupytext = pytest.importorskip("jupytext")
    text = (
        ROOT / "book" / "intro.md"
    ).read_text() + "\n```{code-cell} ipython3\n:tags: [hide-input]\n\nprint(1)\n```\n"
    (tmp_path / "chapter.md").write_text(text)
    config = jupytext.config.load_jupytext_configuration_file(str(ROOT / "pyproject.toml"))
    notebook = jupytext.read(tmp_path / "chapter.md", config=config)
    notebook.metadata["language_info"] = {"name": "python", "version": "3.99", "pygments_lexer": "ipython3"}
    notebook.metadata["widgets"] = {"state": 1}
    cell = notebook.cells[-1]
    cell.metadata["execution"] = {"iopub.status.idle": "now"}
    cell.metadata["trusted"] = True
    jupytext.write(
        notebook, tmp_path / "chapter.md", fmt=notebook.metadata["jupytext"]["text_representation"], config=config
    )
    assert (tmp_path / "chapter.md").read_text() == text


# import polylib ------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = """
import time, torch
start = time.perf_counter()
import polylib
print((time.perf_counter() - start) * 1000)
"""
    assert min(float(run_python(code)) for _ in range(3)) < 50, "import polylib adds 50 ms or more to import torch"


def test_import_without_optional_packages() -> None:
    """The methods and kernels need torch and numpy only; what needs more says so when it is used."""
    code = """
import sys
blocked = {"triton", "plotly", "jupyter", "ipywidgets", "IPython", "joblib", "sklearn", "scipy", "tqdm", "jupyterlab"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, polylib, polylib.kernels, polylib.neurons, polylib.lab
x = torch.ones(2, 3)
assert polylib.neurons.QuadraticLinear(3, 4)(x).shape == (2, 4)
try:
    polylib.lab.Sweep
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("Sweep was imported without plotly")
"""
    run_python(code)


# Makefile ------------------------------------------------------------------------------------------------------------

pytestmark_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def copy_of_makefile(folder: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/setup.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def ready(folder: Path) -> None:
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".ready").touch()


@pytestmark_make
def test_every_target_sets_up_once(tmp_path: Path) -> None:
    folder = copy_of_makefile(tmp_path)
    for target in ("lab", "test", "book", "serve", "notebooks"):
        assert "tools/setup.py" in make(folder, "-n", target)
    ready(folder)
    for target in ("lab", "test", "book", "serve", "notebooks"):
        assert "tools/setup.py" not in make(folder, "-n", target)
    for changed in ("pyproject.toml", "constraints.txt"):
        later = (folder / ".venv" / ".ready").stat().st_mtime + 10
        os.utime(folder / changed, (later, later))
        assert "tools/setup.py" in make(folder, "-n", "test")
        os.utime(folder / changed, (0, 0))


@pytestmark_make
def test_lab_passes_arguments_on(tmp_path: Path) -> None:
    folder = copy_of_makefile(tmp_path)
    ready(folder)
    printed = make(folder, "-n", "lab", "ARGS=--no-browser --port 8899")
    assert "--LabApp.default_url=/lab/tree/book/intro.md" in printed
    assert printed.rstrip().endswith(" --no-browser --port 8899")


@pytestmark_make
def test_help_lists_every_target(tmp_path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    printed = make(copy_of_makefile(tmp_path), "help")
    assert all(f"make {target} " in printed for target in targets)


@pytest.fixture
def setup_script(tmp_path: Path) -> dict:
    """The functions of tools/setup.py, at work in an empty folder."""
    copy_of_makefile(tmp_path)
    scope = {"__name__": "setup", "__file__": str(tmp_path / "tools" / "setup.py")}
    exec((tmp_path / "tools" / "setup.py").read_text(), scope)
    return scope


def test_old_python_gets_a_clear_sentence(setup_script: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs Python 3.11 or newer; .* is Python 3.10.13"):
        setup_script["check_python"]()


def test_python_without_venv_gets_a_clear_sentence(setup_script: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"can't make a virtual environment.*python3-venv"):
        setup_script["check_python"]()


def test_interrupted_setup_starts_again(setup_script: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker stays when pip is killed; the next call clears .venv, and the stamp comes last."""
    folder = Path(setup_script["ROOT"])
    calls = []

    def killed(command: list[str], **_: object) -> None:
        calls.append(command)
        assert (folder / ".venv.incomplete").exists()
        assert not (folder / ".venv" / ".ready").exists()
        if "pip" in command and len(calls) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(setup_script["subprocess"], "check_call", killed)
    monkeypatch.setitem(setup_script, "works", lambda: True)
    (folder / ".venv.incomplete").touch()
    with pytest.raises(KeyboardInterrupt):
        setup_script["main"]()
    setup_script["main"]()
    assert [("--clear" in command) for command in calls] == [True, False, True, False]
    assert not (folder / ".venv.incomplete").exists()
    assert (folder / ".venv" / ".ready").exists()
    overrides = json.loads((folder / ".venv/share/jupyter/lab/settings/overrides.json").read_text())
    assert overrides["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]["markdown"] == "Jupytext Notebook"


def test_notebook_formats_are_checked_without_compiling_grammars() -> None:
    """Every kernel that draws a figure imports jsonschema; from 4.25 on that takes seconds."""
    code = "import sys, jsonschema; sys.exit('lark' in sys.modules)"
    assert subprocess.call([sys.executable, "-c", code]) == 0
