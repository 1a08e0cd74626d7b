"""Every family with every method: the cell runs, and shows what the committed results say."""

import pytest

from peftkit.archs import FAMILIES
from tests.conformance.cells import CELLS, key, read_results, run_cell
from tests.conformance.page import PAGE, page

# About a minute: one family of each kind, the methods that differ most.
FAST = {
    ("llama", "causal-lm", variant)
    for variant in ("full", "lora", "dora", "pissa", "qlora", "prefix", "prompt", "ia3", "vera", "oft", "adalora")
} | {
    ("gpt2", "causal-lm", "lora"),
    ("gpt2", "causal-lm", "qlora"),
    ("gpt2", "causal-lm", "oft"),
    ("falcon", "causal-lm", "prefix"),
    ("mixtral", "causal-lm", "lora, experts"),
    ("mixtral", "causal-lm", "qlora"),
    ("qwen3_next", "causal-lm", "lora"),
    ("deepseek_v3", "causal-lm", "lora"),
    ("rwkv", "causal-lm", "lora"),
    ("mamba", "causal-lm", "lora"),
    ("mamba", "causal-lm", "qlora"),
    ("mamba", "causal-lm", "prefix"),
    ("falcon_mamba", "causal-lm", "prompt"),
    ("zamba2", "causal-lm", "lora"),
    ("jamba", "causal-lm", "ia3"),
    ("t5", "seq2seq", "lora"),
    ("t5", "seq2seq", "prefix"),
    ("bart", "seq2seq", "prompt"),
    ("bert", "classification", "lora"),
    ("bert", "token-classification", "ia3"),
    ("modernbert", "classification", "qlora"),
}


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=key(*c), marks=() if c in FAST else pytest.mark.slow) for c in CELLS]
)
@pytest.mark.filterwarnings("ignore")
def test_cell(cell):
    found, committed = run_cell(*cell), read_results()[key(*cell)]
    assert not found.failed
    measure = "measure again: python -m tests.conformance.measure, then python -m tests.conformance.page"
    assert found == committed, measure


def test_every_cell_is_measured_and_none_fails():
    results = read_results()
    assert set(results) == {key(*cell) for cell in CELLS}
    assert not [name for name, cell in results.items() if cell.failed or cell.answer == "raised"]
    assert {cell.family for cell in results.values()} == {family.name for family in FAMILIES}


def test_the_page_of_families_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.conformance.page"
