"""The architecture as tests: one name a quantity, one direction of imports, a light import, a pinned surface."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_reg

ROOT = Path(lightning_reg.__file__).parent
QUANTITIES = {path.stem for path in (ROOT / "functional").glob("*.py")} - {
    "__init__",
    "_tokens",
    "_scores",
    "_attention_nodes",
    "_fusing",
}
SHARED = {
    "metrics": {"base"},
    "callbacks": {
        "building",
        "control",
        "guard",
        "monitor",
        "observer",
        "progressive_sparsity",
        "recording",
        "regularizer",
        "stability",
        "surgery",
    },
    "losses": set(),
    "kernels": {"launching", "long_attention", "operators", "reduction", "short_attention", "vocabulary"},
}
# who may import whom: never back
LAYERS = {
    "kernels": set(),
    "functional": {"kernels"},
    "losses": {"functional"},
    "metrics": {"functional"},
    "schedules": set(),
    "mil": {"functional"},
    "capture": {"functional"},
    "plotting": set(),
    "engine": {"functional", "capture"},
    "classes": set(),
    "reparam": {"functional", "capture", "classes"},
    "rewriting": {"capture", "classes"},
    "conditions": set(),
    "pruning": {"functional", "capture", "reparam"},
    "alarms": set(),
    "sampling": {"functional", "capture"},
    "spectra": {"functional", "capture", "reparam"},
    "activations": {"functional", "capture"},
    "attention": {"functional", "capture"},
    "norm_scaling": {"functional", "capture"},
    "qk_norm": {"functional", "capture", "attention", "reparam", "rewriting"},
    "early_warning": {"functional"},
    "calibration": {"functional", "metrics", "capture", "activations"},
    "callbacks": {
        "functional",
        "activations",
        "attention",
        "norm_scaling",
        "qk_norm",
        "losses",
        "mil",
        "metrics",
        "schedules",
        "capture",
        "engine",
        "reparam",
        "pruning",
        "plotting",
        "early_warning",
        "alarms",
        "sampling",
        "spectra",
        "rewriting",
        "conditions",
    },
}
CARD = ("Formula", "Source", "Input", "Unit and range", "Default and why", "Cost", "When it hurts", "Not together with")
SURFACE = {
    "lightning_reg": {"regularize"},
    "lightning_reg.functional": {
        "activation_density", "activation_hoyer", "activation_l1", "activation_locality", "chunk_density",
        "temporal_delta", "attention_entropy", "attention_entropy_from_probs",
        "attention_entropy_from_scores", "attention_with_entropy", "max_attention_logit",
        "max_attention_logit_from_scores", "prediction_entropy", "z_loss", "exact_density", "exact_chunk_density",
        "attention_support", "effective_keys", "largest_weight", "entropy_floor", "entropy_floor_from_scores",
        "effective_rank", "massive_activations", "gradient_rms",
        "cett", "cett_threshold", "dead_neurons", "lr_sensitivity", "predict_crossing", "reuse_ratio",
        "spectral_norm", "spectral_reparam",
        "entropy_guided", "layer_norm_scaling", "softcap", "softcapped_attention", "stochastic_attention",
        "drelu", "fatrelu", "relu2", "shifted_relu", "statistical_topk", "topk",
        "qk_clip_factors", "qk_norm",
        "erk_densities", "magnitude_mask", "n_m_mask", "random_mask", "rigl_mask", "rigl_share", "weight_sparsity",
    },
    "lightning_reg.losses": {
        "ActivationDensityLoss", "ActivationHoyerLoss", "ActivationL1Loss", "ActivationLocalityLoss",
        "AttentionLogitLoss", "EntropyGuidedLoss", "PredictionEntropyLoss", "ZLoss",
        "AttentionEntropyLoss", "ChunkDensityLoss", "TemporalDeltaLoss",
    },
    "lightning_reg.metrics": {
        "ActivationDensity", "AttentionEntropy", "AttentionSupport", "CETT", "ChunkDensity", "DeadNeurons",
        "EffectiveRank", "LRSensitivity", "MassiveActivations", "ReuseRatio", "SpectralNorm", "WeightSparsity",
    },
    "lightning_reg.callbacks": {
        "ActivationDensityRegularizer", "ActivationHoyerRegularizer", "ActivationL1Regularizer",
        "ActivationLocalityRegularizer", "AttentionEntropyRegularizer", "AttentionLogitRegularizer",
        "ChunkDensityRegularizer", "EntropyGuidedRegularizer", "PredictionEntropyRegularizer", "Regularizer",
        "TemporalDeltaRegularizer", "ZLossRegularizer",
        "ActivationSubstitution", "LayerNormScaling", "ProgressiveSparsity", "QKClip", "QKNorm", "SigmaReparam",
        "SoftCap", "StochasticAttention", "WeightSparsity",
        "Guard", "RegMonitor", "StabilityMonitor",
        "apply_sigma_reparam", "fold_checkpoint", "merge_sigma_reparam", "update_sigma_reparam",
        "load_softcap", "remove_softcap",
    },
}  # fmt: skip


@pytest.mark.parametrize("role", SHARED)
def test_every_file_of_a_role_has_the_name_of_a_quantity(role: str) -> None:
    names = {path.stem for path in (ROOT / role).glob("*.py")} - {"__init__"} - SHARED[role]
    assert names <= QUANTITIES


def imported(path: Path) -> set[str]:
    """Parts of the package a file imports when it runs, not for the type checker only."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    modules: list[str] = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            plain = node.module == "lightning_reg"
            modules += [f"lightning_reg.{alias.name}" for alias in node.names] if plain else [node.module]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in modules if name.startswith("lightning_reg.")}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    target = ROOT / layer
    for path in target.glob("*.py") if target.is_dir() else [target.with_suffix(".py")]:
        assert imported(path) - {layer} <= LAYERS[layer], path


@pytest.mark.parametrize("quantity", sorted(QUANTITIES))
def test_every_quantity_has_a_card(quantity: str) -> None:
    module = sys.modules.get(f"lightning_reg.functional.{quantity}") or importlib.import_module(
        f"lightning_reg.functional.{quantity}"
    )
    headings = [line for line in (module.__doc__ or "").splitlines() if line and not line.startswith(" ")]
    positions = [headings.index(heading) for heading in CARD]
    assert positions == sorted(positions)


@pytest.mark.parametrize("module", SURFACE)
def test_surface_is_pinned(module: str) -> None:
    public = importlib.import_module(module)
    assert set(public.__all__) == SURFACE[module]
    assert all(hasattr(public, name) for name in public.__all__)
    assert all((getattr(public, name).__doc__ or "").strip() for name in public.__all__)


def test_import_loads_nothing_heavy() -> None:
    heavy = ("triton", "timm", "transformers", "wandb", "hydra", "matplotlib", "plotly", "pandas", "sklearn")
    code = (
        "import sys, torch, lightning, torchmetrics; before = set(sys.modules);"
        "import lightning_reg, lightning_reg.callbacks, lightning_reg.losses, lightning_reg.metrics;"
        f"print([n for n in {heavy!r} if any(m.split('.')[0] == n for m in set(sys.modules) - before)])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_package_neither_prints_nor_asserts_on_arguments() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
