"""The stack of Llamas against Hugging Face's, run by run."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.models.llama_stack import LlamaStack
from lightning_reg.functional import max_attention_logit

STACK = LlamaStack(width=12, layers=2, heads=3, hidden=20, vocabulary=17, deviation=0.4)
HF = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
      "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
      "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "query_norm": "self_attn.q_norm",
      "key_norm": "self_attn.k_norm"}  # fmt: skip


def reference(stack: LlamaStack, weights: dict[str, Tensor]) -> torch.nn.Module:
    """Hugging Face's model of one run, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kind, config = (Qwen3ForCausalLM, Qwen3Config) if stack.qk_norm else (LlamaForCausalLM, LlamaConfig)
    net = kind(config(
        vocab_size=stack.vocabulary, hidden_size=stack.width, intermediate_size=stack.hidden, head_dim=4,
        num_hidden_layers=stack.layers, num_attention_heads=stack.heads, num_key_value_heads=stack.heads,
        rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).double()  # fmt: skip
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    state = {}
    for name, weight in weights.items():
        layer, _, part = name.rpartition(".")
        full = f"model.layers.{layer}.{HF[part]}" if layer else names[name]
        transposed = weight.dim() == 2 and name != "embedding"
        state[f"{full}.weight"] = weight.T if transposed else weight
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_run_is_a_llama_of_its_own(qk_norm: bool) -> None:
    stack = LlamaStack(12, 2, 3, 20, 17, 0.4, qk_norm=qk_norm)
    flat = torch.stack([stack.draw(seed) for seed in range(3)]).double()
    flat += 0.1 * torch.randn_like(flat)  # norms that are not one
    flat.requires_grad_()
    tokens = torch.randint(0, 17, (3, 2, 8))
    losses, _ = stack(flat, tokens)
    upstream = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((losses * upstream).sum(), flat)
    for run in range(3):
        own = stack.unpack(flat.detach())
        net = reference(stack, {name: weight[run] for name, weight in own.items()})
        logits = net(tokens[run][:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[run][:, 1:].flatten())
        torch.testing.assert_close(losses[run], loss, atol=1e-6, rtol=1e-6)  # its norms and angles are in float32
        loss.backward()
        for name, part in stack.unpack(grad).items():
            layer, _, kind = name.rpartition(".")
            if kind in ("query", "down", "norm1", "query_norm"):
                theirs = net.get_parameter(f"model.layers.{layer}.{HF[kind]}.weight").grad * upstream[run]
                ours = part[run].T if part[run].dim() == 2 else part[run]
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_largest_logit_is_that_of_the_library() -> None:
    flat = torch.stack([STACK.draw(seed) for seed in range(2)]).double()
    tokens = torch.randint(0, 17, (2, 3, 8))
    _, largest = STACK(flat, tokens)
    for run in range(2):
        net = reference(STACK, {name: weight[run] for name, weight in STACK.unpack(flat).items()})
        seen: list[float] = []
        original = F.scaled_dot_product_attention

        def spy(query: Tensor, key: Tensor, *arguments, **options):
            largest = max_attention_logit(query.detach(), key.detach(), is_causal=True, scale=options["scale"])
            seen.append(float(largest.max()))  # noqa: B023
            return original(query, key, *arguments, **options)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            net(tokens[run][:, :-1], use_cache=False)
        torch.testing.assert_close(largest[run], torch.tensor(seen, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_a_run_that_is_nan_leaves_the_others_alone() -> None:
    flat = torch.stack([STACK.draw(seed) for seed in range(2)])
    tokens = torch.randint(0, 17, (2, 2, 8))
    whole, _ = STACK(flat, tokens)
    flat[0] = torch.nan
    flat.requires_grad_()
    losses, largest = STACK(flat, tokens)
    (grad,) = torch.autograd.grad(losses.sum(), flat)
    assert losses[0].isnan()
    assert largest[0].isnan().all()
    torch.testing.assert_close(losses[1], whole[1], atol=0, rtol=0)
    assert grad[1].isfinite().all()
