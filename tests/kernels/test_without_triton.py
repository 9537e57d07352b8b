"""Where Triton is not installed nothing is missed on a CPU, and a GPU gets the torch code with one warning."""

import subprocess
import sys

SCRIPT = """
import sys, warnings

sys.modules["triton"] = None  # as if it were not installed
warnings.simplefilter("ignore")
import torch
from lightning_reg import kernels, regularize
from lightning_reg.callbacks import ActivationDensityRegularizer, AttentionEntropyRegularizer, SigmaReparam
from lightning_reg.functional import attention_with_entropy
from lightning_reg.kernels import operators

warnings.simplefilter("error")
q, k, v = torch.randn(3, 2, 2, 700, 8)
output, entropy = attention_with_entropy(q, k, v, is_causal=True)
scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(torch.ones(700, 700, dtype=torch.bool).triu(1), -torch.inf)
p = scores.softmax(-1)
assert (output - p @ v.double()).abs().max() < 1e-5
assert (entropy + torch.xlogy(p, p).sum(-1)).abs().max() < 1e-5

layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
with regularize(layer, [SigmaReparam(), AttentionEntropyRegularizer(0.1), ActivationDensityRegularizer(0.1)]) as reg:
    reg.add(layer(torch.randn(2, 5, 16)).square().mean()).backward()
assert all(parameter.grad is not None for parameter in layer.parameters())
assert "not installed" in operators._missing_on(0)
print("exact")
"""


def test_without_triton_the_numbers_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip().endswith("exact"), done.stderr[-2000:]
