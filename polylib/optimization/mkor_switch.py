"""When to stop preconditioning: a rule for the hybrid that MKOR's paper calls MKOR-H.

The paper switches to the first-order optimizer once the second order gains little. Its published code has no rule for
that, so the one here is our own choice.
"""

import math

from polylib import _checks


class GainSwitch:
    """Whether the loss still falls fast enough, compared with the best it did.

    The gain is the average of log(last loss / loss), with weights that fall by `decay` a step. Once it has been below
    `fraction` of its largest value for `patience` steps on end, the answer is no, for good. With `MKOR`:
    `mkor.active = switch.update(loss.item())` before each step.

    Args:
        decay: from 0, below 1. Starting from zero, so that the noise of the first steps counts little.
        fraction: of the largest gain, above 0 and at most 1.
        patience: 1 or more steps.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, decay: float = 0.95, fraction: float = 0.1, patience: int = 50) -> None:
        self.decay = _checks.number("decay", decay, least=0, below=1)
        self.fraction = _checks.number("fraction", fraction, above=0, most=1)
        self.patience = _checks.integer("patience", patience, least=1)
        self.gain = self.largest = 0.0
        self.below, self.on = 0, True
        self._last: float | None = None

    def update(self, loss: float) -> bool:
        """Take the loss of one more step; whether to go on with the second order.

        Raises:
            ValueError: a loss that is not a finite number above 0.
        """
        loss = _checks.number("loss", loss, above=0)
        if self._last is not None:
            self.gain = self.decay * self.gain + (1 - self.decay) * math.log(self._last / loss)
            self.largest = max(self.largest, self.gain)
            self.below = self.below + 1 if self.gain < self.fraction * self.largest else 0
            self.on = self.on and self.below < self.patience
        self._last = loss
        return self.on
