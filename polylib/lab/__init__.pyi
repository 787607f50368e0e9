"""What the notebooks share."""

from .claims import claim as claim
from .data import Split as Split
from .data import digits as digits
from .data import mnist1d as mnist1d
from .data import shells as shells
from .data import text as text
from .data import text_windows as text_windows
from .figures import colour as colour
from .figures import knob_axis as knob_axis
from .figures import panels as panels
from .figures import power_axis as power_axis
from .figures import ring as ring
from .figures import with_spread as with_spread
from .progress_bar import progress as progress
from .rate_search import search as search
from .scales import at_scale as at_scale
from .scales import scale as scale
from .schedules import constant as constant
from .schedules import one_cycle as one_cycle
from .stack import Stack as Stack
from .sweep import Sweep as Sweep
from .training import train as train
from .training import train_many as train_many
