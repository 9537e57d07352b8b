"""Does logit growth give divergence away? Small language models over the edge: python -m experiments.early_warning.

For each setting all runs, every learning rate with every seed, are trained as one stack. Their losses and largest
attention logits become two tables in the output folder, ``<setting>_loss.csv`` and ``<setting>_max_logit.csv``, from
which the results are drawn. A setting that is there already is not repeated.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from experiments.data.python_docs import read
from experiments.early_warning_results import Curves, write_curves, write_results
from experiments.models.classifier import cosine
from experiments.models.llama_stack import LlamaStack
from experiments.run_info import ROOT, run_info


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="early_warning")
def main(cfg: DictConfig) -> None:
    """Train every setting, then write the results."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    folder, device = Path(cfg.output_dir), "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    text = read(Path(cfg.root))[0].to(device)
    for name in cfg.settings:
        if (folder / f"{name}_max_logit.csv").exists():
            continue
        options = cfg.setting[name]
        setting = Setting(cfg.steps, cfg.batch_size, cfg.length, cfg.weight_decay, **options.get("schedule", {}))
        runs = [(float(rate), int(seed)) for rate in cfg.learning_rates for seed in options.get("seeds", cfg.seeds)]
        start = time.perf_counter()
        curves = train(LlamaStack(**{**cfg.model, **options.get("model", {})}), text, runs, setting, cfg.every)
        Console().print(f"{name}: {len(runs)} runs, {cfg.steps} steps, {time.perf_counter() - start:.0f} s")
        write_curves(folder / name, curves)
    command = "python -m experiments.early_warning"
    write_results(folder, cfg.tuning_seeds, {"command": command, **run_info(), "steps": cfg.steps})


@dataclass(frozen=True)
class Setting:
    """How all runs of a stack are trained: AdamW (0.9, 0.95), the gradient of each run clipped to norm 1.

    Args:
        steps: Of training.
        batch: Windows in a batch.
        length: Bytes of a window.
        weight_decay: Of the matrices, times the learning rate.
        warmup: Share of the steps in which the learning rate rises to its peak; 1: through the whole run.
        decay: Half a cosine to 0 afterwards; else the peak is held.
    """

    steps: int
    batch: int = 16
    length: int = 64
    weight_decay: float = 0.0
    warmup: float = 1.0
    decay: bool = True

    def share(self, step: int) -> float:
        """Learning rate at a step, relative to its peak."""
        if not self.decay and step >= self.steps * self.warmup:
            return 1.0
        return cosine(step, self.steps, self.warmup)


def train(model: LlamaStack, text: Tensor, runs: Sequence[tuple[float, int]], setting: Setting, every: int) -> Curves:
    """Train every run (peak learning rate, seed) at once; a seed fixes the start and the order of the text.

    Args:
        model: The network, the same for all.
        text: Bytes (count,) on the device that trains.
        runs: Learning rates and seeds.
        setting: How to train.
        every: Steps between two measurements.
    """
    step = _Step(model, text, runs, setting)
    go = _graph(step) if text.is_cuda else step
    for _ in range(setting.steps):
        go()
    points = setting.steps // every
    loss = step.loss[: points * every].view(points, every, -1).mean(1)
    largest = step.max_logit[: points * every][every - 1 :: every]
    return Curves(list(runs), (torch.arange(points) + 1) * every, loss.cpu(), largest.cpu())


class _Step:
    """One training step of all runs; all it needs to know is on the device, so it can be captured as a graph."""

    def __init__(self, model: LlamaStack, text: Tensor, runs: Sequence[tuple[float, int]], setting: Setting) -> None:
        device, seeds = text.device, sorted({seed for _, seed in runs})
        self.model, self.text, self.starts = model, text, _starts(seeds, len(text), setting).to(device)
        self.places = torch.arange(setting.length + 1, device=device)
        self.seed = torch.tensor([seeds.index(seed) for _, seed in runs], device=device)
        share = torch.tensor([setting.share(step) for step in range(setting.steps)])
        self.rates = (share[:, None] * torch.tensor([rate for rate, _ in runs])).to(device)
        self.decay = (model.decayed() * setting.weight_decay).to(device)
        self.flat = torch.stack([model.draw(seed) for _, seed in runs]).to(device).requires_grad_()
        self.mean, self.square = torch.zeros_like(self.flat.data), torch.zeros_like(self.flat.data)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.loss = torch.zeros(setting.steps, len(runs), device=device)
        self.max_logit = torch.zeros_like(self.loss)

    def __call__(self) -> None:
        starts = self.starts.index_select(0, self.step)[0].index_select(0, self.seed)
        losses, largest = self.model(self.flat, self.text[starts[..., None] + self.places].long())
        (grad,) = torch.autograd.grad(losses.sum(), self.flat)
        with torch.no_grad():
            self._update(grad * (1.0 / torch.linalg.vector_norm(grad, dim=1, keepdim=True)).clamp(max=1.0))
            self.loss.index_copy_(0, self.step, losses.detach()[None])
            self.max_logit.index_copy_(0, self.step, largest.amax(1)[None])
            self.step += 1

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [self.flat.data, self.mean, self.square, self.step, self.loss, self.max_logit]

    def _update(self, grad: Tensor) -> None:
        """AdamW with a learning rate for each run."""
        rate = self.rates.index_select(0, self.step)[0][:, None]
        count = (self.step + 1).float()
        self.mean.lerp_(grad, 0.1)
        self.square.mul_(0.95).addcmul_(grad, grad, value=0.05)
        unit = (self.mean / (1 - 0.9**count)) / ((self.square / (1 - 0.95**count)).sqrt() + 1e-8)
        self.flat.sub_(rate * (unit + self.decay * self.flat))


def _starts(seeds: Sequence[int], bytes_: int, setting: Setting) -> Tensor:
    """Where the windows of each step begin (steps, seeds, batch)."""
    shape, last = (setting.steps, setting.batch), bytes_ - setting.length
    return torch.stack([torch.randint(0, last, shape, generator=torch.Generator().manual_seed(s)) for s in seeds], 1)


def _graph(step: _Step) -> Callable[[], None]:
    """The step as a CUDA graph; what the warm-up has changed is put back."""
    kept = [tensor.clone() for tensor in step.state()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, old in zip(step.state(), kept):
        tensor.copy_(old)
    return graph.replay


if __name__ == "__main__":
    main()
