"""Somebody who was told what a cache holds at one moment, and of every change since."""

from baton.name_changes import Changed, Held


class Told:
    def __init__(self, held: Held) -> None:
        self.names = set(held.names)
        assert len(self.names) == len(held.names)

    def hear(self, changed: Changed | None) -> None:
        for name, is_held in changed.names.items() if changed is not None else ():
            assert (name in self.names) is not is_held, "told of a change that was none"
            (self.names.add if is_held else self.names.remove)(name)
