"""Hydra presets of the regularizers, found by every Hydra project through ``hydra_plugins.lightning_reg_searchpath``."""
