"""Configuration of a tiny RetNet that is in no library: it stands for any model with code of its own."""

from transformers import PretrainedConfig


class TinyRetNetConfig(PretrainedConfig):
    """Sizes of a RetNet."""

    model_type = "tiny_retnet"

    def __init__(self, vocab_size=2048, hidden_size=64, num_heads=2, ffn_dim=128, num_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.ffn_dim = ffn_dim
        self.num_layers = num_layers
        self.num_hidden_layers = num_layers
        super().__init__(**kwargs)
