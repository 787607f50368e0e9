"""What a sweep has computed so far: in memory, and on disk where it is certain what it belongs to."""

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from polylib.lab import store
from polylib.lab.fingerprint import Fingerprint, content, fingerprint
from polylib.lab.knobs import Knob
from polylib.lab.results import Outcome, check_lengths

Places = tuple[int, ...]  # a point, as the place of each knob's value in its list


class Kept:
    """The outcomes of the runs of one sweep, by their places.

    On disk lies what other processes may use: outcomes of a run that Python can read completely, and that left
    everything that it depends on as it was. The others live as long as this object. `refresh` forgets what was
    computed by other code or from other data.

    Args:
        run: the experiment.
        knobs: its knobs, by name.
        batch: the name of the batched knob, or None.
    """

    def __init__(self, run: Callable[..., Any], knobs: Mapping[str, Knob], batch: str | None) -> None:
        self.run, self.knobs, self.batch = run, knobs, batch
        self._code: Fingerprint | None = None  # `run` and what it depends on, when they were last looked at
        self._outcomes: dict[Places, Outcome] = {}
        self.unkept: str | None = None  # why outcomes are not on disk, as a sentence

    def refresh(self) -> Fingerprint:
        """Look at the code and its data anew, and say what they are."""
        now = fingerprint(self.run)
        if self._code is not None and now.digest != self._code.digest:
            self._outcomes.clear()
        self._code = now
        return now

    def get(self, places: Places) -> Outcome | None:
        """The outcome of a run, if there is one."""
        if places not in self._outcomes:
            name = self._name(places)
            if self._code is None or self._code.unread or name is None:
                return None
            outcome = store.load(self._code.digest, name)
            if outcome is None:
                return None
            self._outcomes[places] = outcome
        return self._outcomes[places]

    def put(self, places: Places, outcome: Outcome, before: Fingerprint, after: Fingerprint) -> Outcome:
        """Keep what a run returned, with the fingerprints of `run` when it began and when it was over.

        An outcome counts for `before`. A run that changes what it depends on is remembered nevertheless, until
        something else changes, if it can't have been the reader who did so meanwhile.

        Raises:
            ValueError: arrays that do not fit the batched knob.
        """
        check_lengths(outcome, self.batch, 0 if self.batch is None else len(self.knobs[self.batch].values))
        name = self._name(places)
        if self._code is not None and self._code.digest == before.digest:  # no newer code is known
            self._outcomes[places] = outcome
            if threading.current_thread() is threading.main_thread():  # where readers' cells are executed
                self._code = after
        if before.unread or name is None:
            self._tell(f"run depends on {before.unread or 'a value of a knob whose content can not be read'}")
        elif before.code != after.code:
            changed = [part for part, digest in before.parts.items() if after.parts.get(part) != digest]
            self._tell(f"run changes {changed[0] if changed else 'something'}, on which its result depends")
        else:
            store.save(before.digest, name, outcome)
        return outcome

    def _name(self, places: Places) -> str | None:
        """The name of a run on disk, made of the content of its arguments; None where that can't be read."""
        contents: dict[str, list[str | None]] = {}
        for (name, knob), place in zip(self.knobs.items(), places, strict=True):
            contents[name] = [knob.content(k) for k in (range(len(knob.values)) if name == self.batch else [place])]
        if any(None in found for found in contents.values()):
            return None
        return content(contents)

    def _tell(self, reason: str) -> None:
        if self.unkept is None:
            self.unkept = f"The results are not kept on disk: {reason}."
            warnings.warn(self.unkept, stacklevel=2)
