"""Fine-tuning methods. A new one is a file here and a line below."""

from peftkit.methods import full, ia3, lora, prefix, qlora
from peftkit.methods.base import Method, Options, PeftSpec, TokenRows

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (full, lora, qlora, prefix, ia3)
}

__all__ = ["METHODS", "Method", "Options", "PeftSpec", "TokenRows"]
