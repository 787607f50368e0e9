"""The whole grid of a lab on a Dask cluster of two workers, killed in the middle and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed")
pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parents[2]
LAB = "labs/learning-rate.md"
ROWS = 2 * 3 * 4  # batch sizes, optimizers and networks; all learning rates of a row are computed at once

# The cells of the lab up to its Sweep, and then what the page "Past one machine" tells to write.
SCRIPT = """
import sys
import jupytext

if __name__ == "__main__":
    for cell in jupytext.read(sys.argv[1], fmt="md:myst").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), globals())
            STEPS = 10  # a shorter training, of two learning rates, for every point of the grid
            RATES = [0.1, 0.32]
            if "Sweep(" in cell.source:
                break

    import joblib
    from dask.distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        with joblib.parallel_config(backend="dask"):
            sweep.compute()
"""


def finished(cache: Path) -> dict[Path, int]:
    """The results on disk, with the time at which each was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("output.pkl")}


def test_a_killed_grid_of_a_lab_resumes_on_a_cluster(tmp_path):
    script, cache = tmp_path / "grid.py", tmp_path / "cache"
    script.write_text(SCRIPT)
    environment = {**os.environ, "POLYLIB_CACHE": str(cache), "OMP_NUM_THREADS": "1", "POLYLIB_SCALE": "ci"}
    call = {"args": [sys.executable, script, ROOT / LAB], "env": environment, "cwd": tmp_path}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(**call, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while len(finished(cache)) < 5 and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    kept = finished(cache)
    assert 5 <= len(kept) < ROWS, (tmp_path / "log").read_text()[-2000:]
    again = subprocess.run(**call, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    whole = finished(cache)
    assert len(whole) == ROWS
    assert all(whole[path] == written for path, written in kept.items())  # nothing finished was computed again
