"""What the notebooks share: sweeps, claims, training loops, data, figures and the scale of an experiment.

`train`, `train_many`, `digits` and `at_scale` need torch and numpy alone; `Sweep`, `panels` and the figures need what
`pip install polylib[notebooks]` brings. Names are imported when they are first used.
"""

from polylib._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
