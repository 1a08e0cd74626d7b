"""A tiny RetNet (Sun et al. 2023) in its parallel form: retention with decay instead of softmax attention."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_retnet import TinyRetNetConfig


class Retention(nn.Module):
    """(Q K^T * D) V with D[n, m] = gamma^(n - m) for n >= m, one gamma a head (equations 5 and 8)."""

    def __init__(self, config):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden):
        num_rows, length, width = hidden.shape

        def heads(x):
            return x.view(num_rows, length, self.num_heads, -1).transpose(1, 2)

        q, k, v = heads(self.q_proj(hidden)), heads(self.k_proj(hidden)), heads(self.v_proj(hidden))
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.num_heads, device=hidden.device, dtype=hidden.dtype))
        steps = torch.arange(length, device=hidden.device)
        gaps = (steps[:, None] - steps[None, :]).to(hidden.dtype)
        decay = torch.where(gaps >= 0, gamma[:, None, None] ** gaps, 0.0)
        mixed = (q @ k.transpose(-1, -2) * (width // self.num_heads) ** -0.5 * decay) @ v
        mixed = nn.functional.layer_norm(mixed, mixed.shape[-1:])
        mixed = mixed.transpose(1, 2).reshape(num_rows, length, width)
        return self.out_proj(nn.functional.silu(self.g_proj(hidden)) * mixed)


class FeedForward(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size)

    def forward(self, hidden):
        return self.fc2(nn.functional.gelu(self.fc1(hidden)))


class Block(nn.Module):
    """Retention and a feed-forward, each behind a norm."""

    def __init__(self, config):
        super().__init__()
        self.retention_norm = nn.LayerNorm(config.hidden_size)
        self.retention = Retention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size)
        self.ffn = FeedForward(config)

    def forward(self, hidden):
        hidden = hidden + self.retention(self.retention_norm(hidden))
        return hidden + self.ffn(self.ffn_norm(hidden))


class TinyRetNetForCausalLM(PreTrainedModel, GenerationMixin):
    """The blocks between an embedding and a head."""

    config_class = TinyRetNetConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(self, input_ids=None, attention_mask=None, labels=None, inputs_embeds=None, return_dict=True, **kwargs):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.lm_head(self.norm(hidden))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
            )
        return CausalLMOutput(loss=loss, logits=logits)
