"""A progress bar that leaves room for entropy and density beside the loss."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

PARTS_TO_DROP = {"reg", "train", "value", "mean_active"}


class ProgressBar(TQDMProgressBar):
    """TQDM's bar with ``reg/attention_entropy/value`` shown as ``attention_entropy``; none for validations."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | dict]:
        metrics = super().get_metrics(trainer, pl_module)
        return {short_name(name): value for name, value in metrics.items() if name != "v_num"}

    def init_validation_tqdm(self) -> Tqdm:
        bar = super().init_validation_tqdm()
        bar.disable = True  # twenty short validations would leave as many bars in a log
        return bar


def short_name(name: str) -> str:
    """Name of a metric without the parts that all share."""
    return "/".join(part for part in name.split("/") if part not in PARTS_TO_DROP)
