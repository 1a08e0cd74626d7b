"""Fine-tuning methods. A new one is a file here and a line below."""

from peftkit.methods import adalora, full, ia3, ln, lora, oft, prefix, prompt, qlora, vera
from peftkit.methods.base import Conflict, Method, NewTokens, Options, PeftSpec, Selection, TokenRows

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (full, lora, qlora, prefix, ia3, prompt, vera, oft, adalora, ln)
}

__all__ = ["METHODS", "Conflict", "Method", "NewTokens", "Options", "PeftSpec", "Selection", "TokenRows"]
