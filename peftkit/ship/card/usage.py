"""How to load what a card is of: code for transformers and PEFT, commands for vLLM and Ollama.

The tests execute the Python of a generated card as it stands. What they do not run names what it follows.
"""

from __future__ import annotations

from dataclasses import dataclass

VLLM = "https://docs.vllm.ai/en/v0.8.5/features/lora.html"
HERE = "path/to/this/folder"  # what a card calls a folder that is not on the Hub
VLLM_SERVE = "https://docs.vllm.ai/en/v0.8.4/serving/openai_compatible_server.html"
OLLAMA = "https://github.com/ollama/ollama/blob/v0.1.43/docs/import.md"
_RAN = "This code is run by the tests of peftkit:"
_VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # what --max-lora-rank takes
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


@dataclass(frozen=True)
class Use:
    """What the code depends on. `name`, `base` and `revision` are plain: they stand in code as they are."""

    layout: str
    name: str
    base: str | None
    revision: str | None
    task: str
    num_labels: int
    chats: bool
    dtype: str | None
    quant_type: str | None
    double_quant: bool
    compute_dtype: str | None
    rank: int | None
    plain_lora: bool


def how_to_load(use: Use) -> str:
    """The last section of a card."""
    parts = [f"## How to load it\n\n{_python(use)}"] if use.layout != "gguf" else ["## How to load it\n"]
    return "\n".join([*parts, _vllm(use), _ollama(use)])


def _python(use: Use) -> str:
    auto = _AUTO.get(use.task, "AutoModel")
    lines = _load_adapter(use, auto) if use.layout == "adapter" else _load_model(use, auto)
    title = "Transformers and PEFT" if use.layout == "adapter" else "Transformers"
    code = "\n".join([*lines, f'tokenizer = AutoTokenizer.from_pretrained("{use.name}")', "", *_ask(use)])
    return f"### {title}\n\n{_RAN}\n\n```python\n{code}\n```\n"


def _load_adapter(use: Use, auto: str) -> list[str]:
    """Code that ends with `model`: the base as it was trained on, and the adapter on it."""
    given = [f'    dtype="{use.dtype or "auto"}",']
    if use.revision:
        given.append(f'    revision="{use.revision}",')
    if use.num_labels:
        given.append(f"    num_labels={use.num_labels},")
        given.append("    ignore_mismatched_sizes=True,  # the head comes with the adapter")
    names = [auto, "AutoTokenizer"]
    if use.quant_type:
        names.append("BitsAndBytesConfig")
        double = ", bnb_4bit_use_double_quant=True" if use.double_quant else ""
        compute = f', bnb_4bit_compute_dtype="{use.compute_dtype}"' if use.compute_dtype else ""
        given += [
            "    quantization_config=BitsAndBytesConfig(",
            f'        load_in_4bit=True, bnb_4bit_quant_type="{use.quant_type}"{double}{compute}',
            "    ),",
        ]
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(names)}",
        "",
        f"base = {auto}.from_pretrained(",
        f'    "{use.base or "path/to/the/base"}",',
        *given,
        ")",
        f'model = PeftModel.from_pretrained(base, "{use.name}")',
    ]


def _load_model(use: Use, auto: str) -> list[str]:
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{use.name}", dtype="auto")',
    ]


def _ask(use: Use) -> list[str]:
    """Code that asks `model` something and prints the answer."""
    if "classification" in use.task:
        return [
            'inputs = tokenizer("A text to classify", return_tensors="pt", return_token_type_ids=False)',
            "print(model(**inputs).logits.argmax(-1).tolist())",
        ]
    generate = "output = model.generate(**inputs, max_new_tokens=64)"
    if use.task == "seq2seq":
        return [
            'inputs = tokenizer("Your text", return_tensors="pt", return_token_type_ids=False)',
            generate,
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    inputs = ['inputs = tokenizer("Your text", return_tensors="pt", return_token_type_ids=False)']
    if use.chats:
        inputs = [
            'messages = [{"role": "user", "content": "Your question"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    answer = 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    return [*inputs, generate, answer]


def _shell(*lines: str) -> str:
    return "```sh\n" + "\n".join(lines) + "\n```\n"


def _vllm(use: Use) -> str:
    """Not run here: it needs a GPU."""
    if use.task != "causal-lm":
        return ""
    if use.layout == "gguf":
        return "### vLLM\n\nIt serves the merged model: `peftkit export RUN --to safetensors`.\n"
    if use.layout == "model":
        return f"### vLLM\n\nNot run here; after {VLLM_SERVE}:\n\n" + _shell(f"vllm serve {use.name}")
    rank = next((size for size in _VLLM_RANKS if size >= (use.rank or 0)), None)
    if not use.plain_lora or rank is None:
        rewrite = (
            "`peftkit export RUN --to adapter --for vllm` rewrites what can be, and says what is in the way"
        )
        merge = "`peftkit merge` writes a whole model, where the method can be merged"
        return f"### vLLM\n\nIt serves plain LoRA, which this is not. {rewrite}; {merge}.\n"
    command = f"vllm serve {use.base or 'path/to/the/base'} --enable-lora --max-lora-rank {rank}"
    serve = _shell(f"{command} \\", f"  --lora-modules mine={use.name}")
    return f"### vLLM\n\nNot run here; after {VLLM}:\n\n{serve}"


def _ollama(use: Use) -> str:
    """Not run here; the GGUF and its Modelfile are checked through llama.cpp when they are exported."""
    if use.task != "causal-lm":
        return ""
    own = use.name.rpartition("/")[2].lower() if use.name != HERE else "mine"
    commands = _shell(f"ollama create {own} -f Modelfile", f"ollama run {own}")
    if use.layout == "gguf":
        return f"### Ollama\n\nNot run here; in the folder with the Modelfile, after {OLLAMA}:\n\n{commands}"
    first = "It takes GGUF: `peftkit export RUN --to ollama` writes that with a Modelfile."
    return f"### Ollama\n\n{first} Not run here; after {OLLAMA}:\n\n{commands}"
