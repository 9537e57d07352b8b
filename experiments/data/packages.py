"""Where data and weights are that come inside Python packages: looked for without importing them."""

from importlib.util import find_spec
from pathlib import Path

from experiments.evidence import MissingData


def find_package(name: str, command: str, root: Path) -> Path:
    """Folder of a package: unpacked in ``root``, or installed.

    Raises:
        MissingData: If it is in neither place; names the command that installs it.
    """
    if (root / name).is_dir():
        return root / name
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(f"The package {name} is not in {root} and", command)
    return Path(spec.submodule_search_locations[0])
