"""Run by `test_two_gpus.py` under torchrun in two processes: one group of cases, results in a file as they come.

On a machine without two CUDA devices it runs over gloo on the CPU, for whoever changes it there.
"""

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

sys.path.insert(0, str(Path(__file__).parents[2]))
from lightning_reg.callbacks import SigmaReparam, fold_checkpoint, stability
from tests import tiny
from tests.gpu import small
from tests.test_contracts import ALL

CUDA = torch.cuda.device_count() > 1
BATCHES = 16  # of both processes
TIMEOUT = timedelta(seconds=90)
PENALTIES, NAMES = tuple(small.WEIGHTS), small.NAMES
CHECKPOINTS = {"plain": None, "nonreentrant": False, "reentrant": True}


# --- strategies ------------------------------------------------------------------------------------------------------


class FullyShardedV1(FSDPStrategy):
    """Also on the CPU, which Lightning does not allow."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if CUDA:
            return super()._setup_model(model)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class WholeWeights(pl.Callback):
    """Keeps the whole weights of a sharded training, and what the model then returns."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.output = torch.zeros(())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.output = trainer.strategy.model(small.data(1)[0].to(pl_module.device, pl_module.dtype)).float().cpu()
        pl_module.train()
        if isinstance(trainer.strategy, FSDPStrategy):
            with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
                own = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in pl_module.named_parameters()}
                self.state = {name: p.detach().cpu().clone() for name, p in own.items()}
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
            self.state = folded(get_model_state_dict(pl_module, options=options))  # nothing but on the first rank


def folded(state: dict[str, Any]) -> dict[str, Any]:
    """Plain keys in place of those of sigma-Reparam."""
    if not any("parametrizations" in key for key in state):
        return state
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "state.pt")
        return torch.load(fold_checkpoint(Path(folder) / "state.pt"))


class Sharded(small.Small):
    """FSDP2: every block and the whole net are sharded, compiled before if asked."""

    compiled = False

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for index, block in enumerate(self.net.blocks):
            if self.compiled:
                self.net.blocks[index] = block = torch.compile(block)
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Compiled(small.Small):
    """Compiles its blocks in place."""

    def configure_model(self) -> None:
        for block in self.net.blocks:
            block.compile()


class CompiledSharded(Sharded):
    compiled = True


def strategy(kind: str, **arguments: Any) -> Any:
    backend = {"process_group_backend": "nccl" if CUDA else "gloo", "timeout": TIMEOUT}
    if kind == "ddp":
        return DDPStrategy(**backend, **arguments)
    if kind == "fsdp1":
        return FullyShardedV1(auto_wrap_policy={small.Block}, **backend, **arguments)
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **backend, **arguments)


def precision(name: str, kind: str) -> dict[str, Any]:
    if name == "fp16_mixed":  # no first steps are skipped: the reference in float64 skips none
        device = "cuda" if CUDA else "cpu"
        if kind == "fsdp1":
            plugin = FSDPPrecision("16-mixed")  # which takes no scaler here, whatever its signature says
            plugin.scaler = ShardedGradScaler(device, init_scale=1024.0)
            return {"plugins": [plugin]}
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        return {"plugins": [MixedPrecision("16-mixed", device, scaler=scaler)]}
    spelled = {"bf16_mixed": "bf16-mixed", "bf16_true": "bf16-true", "float64": "64-true"}
    return {"precision": spelled[name]} if name in spelled else {}


def fit(
    module: small.Small, callbacks: list[pl.Callback], kind: str, dtype: str = "float32", ckpt_path: Any = None,
    arguments: dict[str, Any] | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """Weights by name after training, and the model's output on one batch."""
    torch.compiler.reset()
    whole = WholeWeights()
    settings = {**precision(dtype, kind), **settings}
    trainer = tiny.trainer(
        [*callbacks, *([] if kind == "ddp" else [whole])], accelerator="gpu" if CUDA else "cpu", devices=2,
        strategy=strategy(kind, **(arguments or {})), **settings,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    state = dict(small.weights_by_name(module)) if kind == "ddp" else whole.state
    return {name.removeprefix("net."): tensor.detach().double().cpu() for name, tensor in state.items()}


# --- groups of cases -------------------------------------------------------------------------------------------------


def exactness(kind: str) -> dict[str, Callable[[], Any]]:
    """Trainings with the library and by hand; the references are `by_hand/<precision>`, `without/<precision>`."""
    modules = {"ddp": (small.Small, Compiled), "fsdp1": (small.Small, Compiled), "fsdp2": (Sharded, CompiledSharded)}
    plain, compiled = modules[kind]
    # by hand: under the same strategy where weights are rounded for the exchange, and where it can be
    by = "fsdp1" if kind == "fsdp1" else "ddp"
    dtypes = ["float32", "bf16_mixed"] + (["fp16_mixed"] if kind != "fsdp2" else ["bf16_true"])
    cases: dict[str, Callable[[], Any]] = {}
    for dtype in [*dtypes, "accumulate"]:
        settings = {"dtype": "float32", "accumulate_grad_batches": 3} if dtype == "accumulate" else {"dtype": dtype}
        names = names_of(kind, dtype)
        cases[f"by_hand/{dtype}"] = partial(_fit, small.Small, names, by, by_hand=True, **settings)
        cases[f"without/{dtype}"] = partial(_fit, small.Small, (), by, by_hand=True, **settings)
        exact = {**settings, "dtype": "float64"}
        cases[f"exact/{dtype}"] = partial(_fit, small.Small, names, "ddp", by_hand=True, **exact)
    for dtype in dtypes:
        names = names_of(kind, dtype)
        for checkpoint, use_reentrant in CHECKPOINTS.items():
            run = partial(_fit, plain, names, kind, dtype=dtype, use_reentrant=use_reentrant)
            cases[f"library/{dtype}/{checkpoint}"] = run
        if dtype in ("float32", "bf16_mixed") and kind != "fsdp1":
            cases[f"library/{dtype}/compiled"] = partial(_fit, compiled, names, kind, dtype=dtype)
    names = names_of(kind, "float32")
    for checkpoint, use_reentrant in CHECKPOINTS.items():
        run = partial(_fit, plain, names, kind, use_reentrant=use_reentrant, accumulate_grad_batches=3)
        cases[f"library/accumulate/{checkpoint}"] = run
    if kind == "ddp":
        cases["by_hand/manual"] = partial(_fit, small.Manual, names, by, by_hand=True)
        cases["without/manual"] = partial(_fit, small.Manual, (), by, by_hand=True)
        cases["exact/manual"] = partial(_fit, small.Manual, names, by, by_hand=True, dtype="float64")
        cases["library/manual/plain"] = partial(_fit, small.Manual, names, kind)
        for option in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view"):
            cases[f"library/float32/{option}"] = partial(_fit, plain, names, kind, arguments={option: True})
        static = partial(_fit, plain, names, kind, use_reentrant=True, arguments={"static_graph": True})
        cases["library/float32/reentrant_static_graph"] = static
    if kind == "fsdp1":
        own = {"activation_checkpointing_policy": {small.Block}}
        cases["library/float32/checkpointed_by_the_strategy"] = partial(_fit, plain, names, kind, arguments=own)
        cases["without/compiled"] = partial(_fit, compiled, (), kind, by_hand=True)
        cases["with/compiled"] = partial(_fit, compiled, names, kind)
    if kind == "fsdp2":
        cases["refused/bf16_true"] = partial(_fit, plain, NAMES, kind, dtype="bf16_true")
    return cases


def names_of(kind: str, dtype: str) -> tuple[str, ...]:
    """Penalties and, where the strategy takes it, sigma-Reparam."""
    return PENALTIES if kind == "fsdp1" or (kind == "fsdp2" and dtype == "bf16_true") else NAMES


def _fit(
    module: type[small.Small], names: tuple[str, ...], kind: str, by_hand: bool = False,
    use_reentrant: bool | None = None, **settings: Any,
) -> Any:  # fmt: skip
    made = module(names if by_hand else (), use_reentrant=use_reentrant, batches=BATCHES)
    return fit(made, [] if by_hand else small.callbacks(names), kind, **settings)


def contracts(kind: str) -> dict[str, Callable[[], Any]]:
    """Every callback under a sharded strategy and under DDP: the same weights, or a refusal."""

    def run(name: str, kind: str) -> Any:
        module = (Sharded if kind == "fsdp2" else small.Small)(batches=BATCHES)
        return fit(module, ALL[name](), kind)

    cases = {f"{under}/{name}": partial(run, name, under) for name in ALL for under in ("ddp", kind)}
    return {"without": lambda: fit(small.Small(batches=BATCHES), [], "ddp"), **cases}


def checkpoints(folder: Path) -> dict[str, Callable[[], Any]]:
    """sigma-Reparam under FSDP2: sharded and whole checkpoints, and a training resumed from the sharded one."""

    def run(label: str, epochs: int, distributed: bool, ckpt_path: Path | None = None) -> Any:
        saver = ModelCheckpoint(folder / label, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        whole = WholeWeights()
        trainer = tiny.trainer(
            [SigmaReparam(), saver, whole], accelerator="gpu" if CUDA else "cpu", devices=2, max_epochs=epochs,
            strategy=strategy("fsdp2", save_distributed_checkpoint=distributed), enable_checkpointing=True,
        )  # fmt: skip
        module = Sharded(batches=BATCHES, optimizer="adam")
        trainer.fit(module, ckpt_path=ckpt_path)
        return {"state": whole.state, "output": whole.output}

    return {
        "sharded": partial(run, "sharded", 2, True),
        "resumed": partial(run, "resumed", 2, True, folder / "sharded" / "epoch=0.ckpt"),
        "whole": partial(run, "whole", 2, False),
    }


def ranks() -> dict[str, Callable[[], Any]]:
    """Both processes hold the same gains and singular vectors."""

    class Agree(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            tensors: list[Tensor] = [*pl_module.parameters(), *pl_module.buffers()]
            mine = torch.cat([t.full_tensor().flatten() if hasattr(t, "full_tensor") else t.flatten() for t in tensors])
            mine = mine.detach().cpu()
            assert torch.equal(trainer.strategy.broadcast(mine), mine), "the processes differ"

    def run(kind: str, module: type[small.Small]) -> bool:
        fit(module(batches=BATCHES), [*small.callbacks(), Agree()], kind)
        return True

    return {"ddp": partial(run, "ddp", small.Small), "fsdp2": partial(run, "fsdp2", Sharded)}


GROUPS: dict[str, Callable[[Path], dict[str, Callable[[], Any]]]] = {
    **{kind: lambda _, kind=kind: exactness(kind) for kind in ("ddp", "fsdp1", "fsdp2")},
    **{f"contracts_{kind}": lambda _, kind=kind: contracts(kind) for kind in ("fsdp1", "fsdp2")},
    "checkpoints": checkpoints,
    "ranks": lambda _: ranks(),
}


def main(group: str, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    stability.LEAST_STEPS = 1
    results: dict[str, Any] = {}
    for name, run in GROUPS[group](folder).items():
        try:
            results[name] = run()
        except Exception as error:  # reported by the test of this case
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
        if int(os.environ["RANK"]) == 0:
            torch.save(results, folder / f"{group}.pt")
            line = results[name].splitlines()[0] if isinstance(results[name], str) else "done"
            print(f"{group} {name}: {line}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
