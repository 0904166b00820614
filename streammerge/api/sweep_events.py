"""The events of a sweep: those of one batch after the other, as those of a run over all points."""

from __future__ import annotations

from streammerge.events import Control, Event


class OverAll:
    """Turns the events of one batch after the other into those of a run over all points."""

    def __init__(self, control: Control, elements: int, tensors: int) -> None:
        self._control = control
        self._totals = {"elements_total": elements, "tensors_total": tensors}
        self._begun = False
        self._warned: set[str] = set()
        self.base: dict[str, int] = {}
        """What was done before the batch."""

    def __call__(self, event: Event) -> None:
        """Emit an event of a batch."""
        values = dict(event.values)
        if event.kind in ("start", "resume"):
            if self._begun:
                return
            self._begun = True
            values["bytes_done"] += self.base["bytes_done"]
            event = Event("resume" if values["bytes_done"] else "start", values)
        elif event.kind == "progress":
            counts = {key: values[key] + self.base[key] for key in values.keys() & self.base.keys()}
            event = Event("progress", values | counts | self._totals)
        elif event.kind == "warning":
            if values["message"] in self._warned:
                return
            self._warned.add(values["message"])
        elif event.kind == "commit":
            return
        self._control.emit(event)
