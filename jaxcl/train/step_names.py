"""The step folders of Orbax, without those that it cannot read: for one of them it would not open the others either."""

from collections.abc import Iterator
from typing import Any

from etils import epath
from orbax.checkpoint import path as ocp_path


class ReadableSteps:
    """Orbax's usual names of steps, as its protocol NameFormat.

    Attributes:
      unreadable: {step: why} of the folders left out.
    """

    def __init__(self):
        self._names = ocp_path.step.standard_name_format()
        self.unreadable: dict[int, str] = {}

    def build_name(self, step: int) -> str:
        return self._names.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        """The metadata of all steps that can be read."""
        self.unreadable.clear()
        for found in self._names.find_all(base_path):
            try:
                _ = found.commit_timestamp  # it is what Orbax reads of each step
            except Exception as error:  # noqa: BLE001 - json and Orbax's checks raise any error
                why = (str(error).splitlines() or [type(error).__name__])[0][:200]
                self.unreadable[found.step] = f"its own metadata cannot be read, {why}"
            else:
                yield found

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._names.find_step(base_path, step)


def complete_steps(folder: epath.Path) -> tuple[int, ...]:
    """Steps of the complete checkpoints in a folder, ascending; of one process, while Orbax makes all of them wait."""
    if not folder.is_dir():
        return ()
    names = ReadableSteps()
    return tuple(sorted({found.step for found in names.find_all(folder)} | names.unreadable.keys()))
