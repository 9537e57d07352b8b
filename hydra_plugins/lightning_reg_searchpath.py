"""Puts the presets of lightning_reg on Hydra's search path, so that ``+lightning_reg=[aem,deft]`` works anywhere.

``hydra_plugins`` is a namespace shared by all Hydra plugins: it must not get an ``__init__.py``.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningRegSearchPath(SearchPathPlugin):
    """Appends ``pkg://lightning_reg.conf``, after the project's own configs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before it composes a config."""
        search_path.append(provider="lightning_reg", path="pkg://lightning_reg.conf")
