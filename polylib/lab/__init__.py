"""What the notebooks share: sweeps, claims, training loops, data, figures and the scale of an experiment.

`train`, `train_many`, `digits` and `at_scale` need torch and numpy alone; `Sweep`, `panels` and the figures need what
`pip install polylib[notebooks]` brings. Names are imported when they are first used.
"""

from importlib import import_module

_HOME = {
    "Split": "data",
    "Sweep": "sweep",
    "at_scale": "scales",
    "claim": "claims",
    "constant": "training",
    "digits": "data",
    "mnist1d": "data",
    "one_cycle": "training",
    "panels": "figures",
    "progress": "progress_bar",
    "scale": "scales",
    "shells": "data",
    "text": "data",
    "text_windows": "data",
    "train": "training",
    "train_many": "training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'polylib.lab' has no attribute {name!r}")
    try:
        return getattr(import_module(f"polylib.lab.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("polylib"):
            raise
        raise ImportError(f"polylib.lab.{name} needs {error.name}: pip install 'polylib[notebooks]'") from error


def __dir__() -> list[str]:
    return __all__
