"""The closure of what code imports: it holds all that the code reaches, and no more than that."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import polylib
from polylib.lab import closure

SOURCES = {
    "from a package": "from polylib.neurons import PolyNorm",
    "from a package, renamed": "from polylib.neurons import PolyNorm as P",
    "from a module": "from polylib.neurons.polycom import PolyNorm",
    "an attribute": "import polylib\npolylib.neurons.PolyNorm()",
    "an attribute of an alias": "import polylib.neurons as n\nn.PolyNorm()",
    "an attribute of a package": "from polylib import neurons\nneurons.PolyNorm()",
    "inside a function": "def f():\n    from polylib.neurons import PolyNorm\n    return PolyNorm()",
    "everything": "from polylib.neurons import *",
    "a package handed on": "import polylib\nf(getattr(polylib, 'neurons'))",
    "by a name": "import importlib\nimportlib.import_module('polylib.' + part)",
    "code that does not parse": "from polylib import (",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_way_to_import_reaches_the_method_and_its_kernel(source):
    reached = closure.of_source(source)
    assert {"polylib", "polylib.neurons", "polylib.neurons.polycom", "polylib.kernels.poly_norm"} <= reached


def test_what_is_not_used_is_not_reached():
    reached = closure.of_source("from polylib.neurons import PolyNorm")
    assert not {name for name in reached if name.startswith(("polylib.optimization", "polylib.quantization"))}
    assert "polylib.kernels.phm_linear" not in reached
    assert closure.of_source("import torch\nimport polylib_helpers") == frozenset()
    assert closure.of_source("x = 'polylib.neurons'") == frozenset()


def test_what_all_chapters_share_reaches_no_part_of_the_book():
    reached = closure.of_source("from polylib.lab import Sweep, Stack, claim, digits, panels, search, train_many")
    parts = {path.parent.name for path in Path(polylib.__file__).parent.glob("*/__init__.py")} - {"lab", "kernels"}
    assert not {name for name in reached if name.split(".")[1:2] and name.split(".")[1] in parts}
    assert "polylib.lab.sweep_live" in reached


def test_a_reached_module_is_followed():
    assert "polylib.kernels.poly_norm" in closure.of_modules(["polylib.neurons.polycom"])
    assert closure.of_modules(["torch", "polylib.no_such_module"]) == frozenset()


def test_what_is_loaded_in_a_fresh_process_is_in_the_closure():
    """The static answer against Python's own: importing a name loads no module of polylib outside its closure.

    The kernels are one package that loads all its operations; only those that are used count.
    """
    source = "from polylib.quantization import quantize_model\nfrom polylib.regimes import ReluRNN"
    code = f"{source}\nimport sys\nprint(*[m for m in sys.modules if m.split('.')[0] == 'polylib'])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    reached = closure.of_source(source)
    assert {name for name in loaded if not name.startswith("polylib.kernels.")} <= reached


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package whose files may be edited."""
    root = tmp_path / "polylib"
    shutil.copytree(Path(polylib.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(closure, "ROOT", root)
    return root


def test_the_digest_follows_the_files_of_the_closure_and_no_others(copy):
    def now() -> str:
        return closure.digest(closure.of_source("from polylib.neurons import PolyNorm"))

    before = now()
    for other in ("optimization/curvature.py", "kernels/phm_linear.py", "lab/assets/polylib.css"):
        (copy / other).write_text((copy / other).read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert now() == before
    for reached in ("neurons/polycom.py", "kernels/poly_norm.py", "neurons/__init__.py"):
        (copy / reached).write_text((copy / reached).read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
        assert now() != before
        before = now()


def test_another_name_in_a_list_changes_nothing_for_what_does_not_use_it(copy):
    def now() -> list[str]:
        return [closure.digest(closure.of_source(f"from polylib.{source}")) for source in sources]

    sources = "neurons import PolyNorm", "kernels import poly_norm"
    before, file = now(), copy / "kernels/__init__.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(f"from polylib.kernels._cost import Cost as Other\n{text}", encoding="utf-8")
    assert now() == before
    other = text.replace("from polylib.kernels.poly_norm import", "from polylib.kernels.poly_relu import")
    assert other != text
    file.write_text(other, encoding="utf-8")  # the name is now that of another module
    assert now()[1] != before[1]
    file.write_text(f"{text}\nimport os\n", encoding="utf-8")
    assert all(a != b for a, b in zip(now(), before, strict=True))


def test_without_comments_only_the_code_counts(copy):
    def now() -> str:
        return closure.digest(closure.of_source("from polylib.neurons import PolyNorm"), comments=False)

    before, file = now(), copy / "neurons/polycom.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"""', '"""Changed. ', 1) + "\n\n# changed\n", encoding="utf-8")
    assert now() == before
    file.write_text(f"{text}\nother = 1\n", encoding="utf-8")
    assert now() != before


def test_a_new_import_is_seen_at_once(copy):
    source = "from polylib.neurons import PolyNorm"
    assert "polylib.optimization.curvature" not in closure.of_source(source)
    file = copy / "neurons/polycom.py"
    file.write_text(f"from polylib.optimization import lanczos\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    assert "polylib.optimization.curvature" in closure.of_source(source)
