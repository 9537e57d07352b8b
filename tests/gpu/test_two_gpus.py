"""Two GPUs over NCCL: data parallel and sharded trainings equal the hand-written loss, checkpoints come back whole.

The bounds are those of `test_engine.py`. Each group of cases runs once, under torchrun, in `two_gpus.py`; the groups
run side by side with `pytest -n 7 --dist loadgroup`.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_reg.callbacks import fold_checkpoint
from tests.gpu import small, two_gpus
from tests.gpu.test_engine import PRECISIONS, RATIO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

REFUSED = {  # by sharded strategy: callbacks of the contracts that need whole weights, and what they say
    "fsdp1": {
        "entropy_guided": "learned thresholds do not work with",
        "sigma_reparam": "SigmaReparam does not work with",
        "qk_clip": "QKClip does not work with",
        "qk_clip_every": "QKClip does not work with",
        "guard": "QKClip does not work with",
        "weight_sparsity": "WeightSparsity does not work with",
        "rigl": "WeightSparsity does not work with",
        "together": "SigmaReparam does not work with",
    },
}
REFUSED["fsdp2"] = {**REFUSED["fsdp1"], "together": "WeightSparsity does not work with"}
del REFUSED["fsdp2"]["sigma_reparam"]


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def results(group: str) -> dict[str, Any]:
    """What a group of cases left, by case; a text for one that raised."""
    environment = {key: v for key, v in os.environ.items() if not key.startswith(("PYTEST", "MASTER_", "LOCAL_"))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, two_gpus.__file__, group, str(folder())],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    file = folder() / f"{group}.pt"
    assert file.exists(), done.stderr[-3000:]
    return torch.load(file)


def result(group: str, case: str) -> Any:
    found = results(group).get(case, "the processes ended before this case")
    assert not isinstance(found, str), found
    return found


def vector(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def cases(group: str) -> list[str]:
    return [case for case in two_gpus.exactness(group) if case.startswith("library/")]


def within(group: str, *values: Any) -> Any:
    """Parameters of a test that reads the one run of a group, as all of that group do in one process of pytest."""
    return pytest.param(*values, marks=pytest.mark.xdist_group(group))


@pytest.mark.parametrize(
    ("group", "case"), [within(kind, kind, case) for kind in ("ddp", "fsdp1", "fsdp2") for case in cases(kind)]
)
def test_training_equals_the_handwritten_loss(group: str, case: str) -> None:
    kind = case.split("/")[1]
    bound = PRECISIONS.get(kind, PRECISIONS["float32"])[1]
    got, wanted, exact, without = (
        vector(result(group, name)) for name in (case, f"by_hand/{kind}", f"exact/{kind}", f"without/{kind}")
    )
    difference, rounding = (got - wanted).abs().max().item(), small.rms(wanted - exact)
    print(f"{group} {case}: max {difference:.2e}, rms {small.rms(got - exact):.2e} where by hand {rounding:.2e}")
    assert difference <= bound
    assert small.rms(got - exact) <= RATIO * rounding + 1e-8
    assert small.rms(without - exact) > 5 * rounding, "the penalties are lost in rounding: the test shows nothing"


@pytest.mark.xdist_group("fsdp1")
def test_compiled_blocks_in_fsdp1_do_what_torch_does_without_the_library() -> None:
    """torch cannot compile inside of FSDP1 in every version; where it can, the result is exact."""
    alone, ours = (results("fsdp1").get(f"{label}/compiled") for label in ("without", "with"))
    if isinstance(alone, str):
        assert isinstance(ours, str)
        assert ours.split(":")[0] == alone.split(":")[0]
    else:
        wanted, got = vector(result("fsdp1", "by_hand/float32")), vector(result("fsdp1", "with/compiled"))
        assert (got - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("name", list(two_gpus.ALL))
@pytest.mark.parametrize("kind", [within(f"contracts_{kind}", kind) for kind in ("fsdp1", "fsdp2")])
def test_callbacks_train_sharded_as_data_parallel_or_refuse(kind: str, name: str) -> None:
    group = f"contracts_{kind}"
    if name in REFUSED[kind]:
        raised = results(group)[f"{kind}/{name}"]
        assert isinstance(raised, str), "trained, though it needs whole weights"
        assert raised.startswith(f"RuntimeError: {REFUSED[kind][name]}")
        return
    got, wanted = vector(result(group, f"{kind}/{name}")), vector(result(group, f"ddp/{name}"))
    assert (got - wanted).abs().max() <= 1e-6
    if name != "stability":
        assert (wanted - vector(result(group, "without"))).abs().max() > 1e-5


@pytest.mark.xdist_group("fsdp2")
def test_sigma_reparam_in_half_precision_is_refused_where_weights_are_sharded() -> None:
    raised = results("fsdp2")["refused/bf16_true"]
    assert isinstance(raised, str), "trained, though FSDP2 takes parameters of one dtype only"
    assert raised.startswith("RuntimeError: SigmaReparam keeps its gains in float32")


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_hold_the_same_state(kind: str) -> None:
    assert result("ranks", kind) is True


def restored(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and output of a plain model that loads a folded checkpoint."""
    module = small.Small.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        return dict(module.state_dict()), module.eval()(small.data(1)[0])


@pytest.mark.xdist_group("checkpoints")
def test_sharded_checkpoint_consolidates_and_folds_to_a_plain_model() -> None:
    trained = result("checkpoints", "sharded")
    sharded = folder() / "sharded" / "epoch=1.ckpt"
    assert sharded.is_dir()
    command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(sharded)]
    subprocess.run(command, check=True, capture_output=True)
    weights, output = restored(fold_checkpoint(f"{sharded}.consolidated"))
    for name, tensor in trained["state"].items():
        assert torch.equal(weights[name], tensor), name
    assert (output - trained["output"]).abs().max() <= 1e-4


@pytest.mark.xdist_group("checkpoints")
def test_whole_checkpoint_folds_to_a_plain_model() -> None:
    trained = result("checkpoints", "whole")
    weights, output = restored(fold_checkpoint(folder() / "whole" / "epoch=1.ckpt"))
    for name, tensor in trained["state"].items():
        assert torch.equal(weights[name], tensor), name
    assert (output - trained["output"]).abs().max() <= 1e-4


@pytest.mark.xdist_group("checkpoints")
def test_training_resumed_from_a_sharded_checkpoint_equals_the_uninterrupted_one() -> None:
    whole, resumed = (result("checkpoints", label)["state"] for label in ("sharded", "resumed"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
