"""Hydra presets of the regularizers; ``hydra_plugins.lightning_reg_searchpath`` shows them to every Hydra project."""
