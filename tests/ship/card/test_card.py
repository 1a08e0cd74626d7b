"""Cards from facts: front matter that the Hub takes, texts that steer nothing, nothing of this machine."""

import re
from dataclasses import fields

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.ship.card.card import BaseFacts, CardFacts, Score, TrainingDataFacts, is_hub_id, render_card, strip_paths

TOKEN = "hf_" + "Zq7w" * 9
KNOWN = CardFacts(
    layout="adapter",
    name="me/tuned",
    chats=True,
    base=BaseFacts(
        id="meta-llama/Llama-3.1-8B",
        revision="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        config_sha256="ab" * 32,
        weights_sha256="cd" * 32,
        quant_type="nf4",
        double_quant=True,
        compute_dtype="bfloat16",
        dtype="bfloat16",
        license="other",
        license_name="llama3.1",
        license_link="https://llama.meta.com/llama3_1/license",
    ),
    method="qlora",
    settings={"rank": 24, "alpha": 48, "target_modules": ["q_proj", "v_proj"], "packing": False},
    rank=24,
    plain_lora=True,
    data=TrainingDataFacts(("openai/gsm8k", "own.jsonl"), ("openai/gsm8k",), 7000, 400, 10**6, 10**5, "ef" * 32, "all"),
    languages=("en",),
    num_trainable=40_000_000,
    num_total=8_000_000_000,
    planned_bytes=9 * 2**30,
    measured_bytes=8 * 2**30,
    device="NVIDIA L4",
    scores=(Score("evaluation loss, nats per token", 1.25, 2.5), Score("exact_match", 0.5, 0.25, 0.4, 0.6, 100)),
    verdict="not lagging (as good as was asked for)",
    merge={"base": "dequantized", "kl": 0.0027, "top1_agreement": 0.97, "num_prompts": 8, "passed": True},
    versions={"peftkit": "0.1.0", "peft": "0.21.2"},
)


def front_of(card):
    from huggingface_hub import ModelCard

    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    front = yaml.safe_load(found[1])
    assert ModelCard(card).data.to_dict() == front, "the Hub's own reader finds the same"
    return front


def test_the_front_matter_is_what_the_hub_wants():
    assert front_of(render_card(KNOWN)) == {
        "library_name": "peft",
        "base_model": "meta-llama/Llama-3.1-8B",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "https://llama.meta.com/llama3_1/license",
        "language": ["en"],
        "datasets": ["openai/gsm8k"],
        "pipeline_tag": "text-generation",
        "tags": ["peftkit", "qlora"],
    }
    assert render_card(KNOWN) == render_card(KNOWN)


@pytest.mark.parametrize(
    ("layout", "relation", "library", "wanted"),
    [
        ("model", None, "transformers", "finetune"),
        ("model", "merge", "transformers", "merge"),
        ("gguf", None, "gguf", "quantized"),
    ],
)
def test_what_was_made_of_an_adapter_says_so(layout, relation, library, wanted):
    card = render_card(changed(layout=layout, relation=relation))
    front = front_of(card)
    assert (front["library_name"], front["base_model_relation"]) == (library, wanted)
    assert "PeftModel" not in card
    assert ("```python" in card) == (layout == "model")


def test_several_adapters_in_one_are_a_merge_and_nothing_to_compare_with_is_no_pass():
    card = render_card(changed(layout="model", merge={"adapters": [["a", 1.0], ["b", 0.5]], "passed": True}))
    assert front_of(card)["base_model_relation"] == "merge"
    assert "within tolerance" not in card
    assert "| within tolerance | yes |" in render_card(KNOWN)


def changed(**changes):
    return CardFacts(**{**{one.name: getattr(KNOWN, one.name) for one in fields(KNOWN)}, **changes})


def test_the_text_says_what_is_known():
    card = render_card(KNOWN)
    for line in (
        "An adapter (qlora) for [meta-llama/Llama-3.1-8B](https://huggingface.co/meta-llama/Llama-3.1-8B)",
        "Licence: other (llama3.1), inherited from the base.",
        "| revision | d04e592bb4f6aa9cfee91e2e20afa771667e1d4b |",
        "| quantized in training to | 4 bits, nf4 with double quantization |",
        r"| target\_modules | q\_proj, v\_proj |",
        "| examples trained on | 7,000 |",
        "| share trained | 0.500 % |",
        "| peak memory of training, planned | 9.00 GiB |",
        "| evaluation loss, nats per token | 2.5 before, 1.25 after |",
        r"| exact\_match | 0.25 before, 0.5 after, 95 % interval 0.4 to 0.6 (100 examples) |",
        "| peftkit's diagnosis | not lagging (as good as was asked for) |",
        "| merged into | dequantized |",
        "| KL divergence, nats per token | 0.0027 |",
        "| same top token | 97.00 % of tokens |",
        "| compared with base and adapter on | 8 prompts |",
        "vllm serve meta-llama/Llama-3.1-8B --enable-lora --max-lora-rank 32 \\",
        '        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        'bnb_4bit_compute_dtype="bfloat16"',
    ):
        assert line in card, card
    assert "None" not in card


def test_what_is_unknown_is_left_out_or_said_in_words():
    card = render_card(CardFacts(layout="adapter"))
    assert front_of(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["peftkit"]}
    assert "Licence: unknown; the base does not name one." in card
    for heading in ("## Base", "## Data", "## Verdict", "## Merge", "## Loss", "None"):
        assert heading not in card
    assert "vLLM serves plain LoRA only, which this is not" in card


def test_a_local_base_is_no_hub_id():
    for name in ("/home/me/llama", "./llama", "~/llama", "C:\\models\\llama", "a/b/c", "../x", ""):
        assert not is_hub_id(name)
        card = render_card(changed(base=BaseFacts(id=name)))
        assert "base_model" not in front_of(card)
        assert '"path/to/the/base"' in card
        assert "/home" not in card
        assert "models\\" not in card
    assert is_hub_id("gpt2")
    assert is_hub_id("org/a.b-c_d")
    assert not is_hub_id(TOKEN)


@given(st.from_regex(r"[\w./-]{1,12}", fullmatch=True) | st.sampled_from(["a--b", "a/b.git", "a.", "-a/b", "é"]))
def test_what_counts_as_a_hub_id_is_one_to_the_client(name):
    from huggingface_hub.utils import validate_repo_id

    if is_hub_id(name):
        validate_repo_id(name)


def test_paths_are_cut_to_their_last_part_and_other_slashes_stay():
    for text, wanted in {
        "of /home/me/data/x.jsonl:7 and '/srv/y'": "of x.jsonl:7 and 'y'",
        "~/runs/one": "one",
        "C:\\Users\\me\\x.csv": "x.csv",
        "file:///srv/x.csv": "x.csv",
        "https://huggingface.co/org/name": "https://huggingface.co/org/name",
        "org/name, nats/token, 5 / 3": "org/name, nats/token, 5 / 3",
    }.items():
        assert strip_paths(text) == wanted


TEXTS = st.text() | st.sampled_from(
    ["---", "\n---\n", "a: b", "/home/me/x", TOKEN, "```", "| x |", "no", "1e3", "\ud800", "\x85", "{}", "&a"]
)
NUMBERS = st.none() | st.integers(0, 2**60)


@settings(max_examples=150)
@given(
    st.builds(
        CardFacts,
        layout=st.sampled_from(["adapter", "model", "gguf"]),
        name=TEXTS,
        relation=st.none() | TEXTS,
        task=TEXTS,
        labels=st.tuples(TEXTS, TEXTS),
        base=st.builds(BaseFacts, **dict.fromkeys(["id", "said", "revision", "quant_type", "dtype"], TEXTS))
        | st.builds(BaseFacts, **dict.fromkeys(["id", "license", "license_name", "license_link"], TEXTS)),
        method=TEXTS,
        settings=st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS, max_size=3), max_size=3),
        data=st.builds(TrainingDataFacts, names=st.tuples(TEXTS), hub_ids=st.tuples(TEXTS), mask=TEXTS, sha256=TEXTS),
        languages=st.tuples(TEXTS),
        num_trainable=NUMBERS,
        num_total=NUMBERS,
        device=TEXTS,
        scores=st.tuples(st.builds(Score, name=TEXTS, after=st.floats(), of=TEXTS)),
        verdict=TEXTS,
        merge=st.dictionaries(st.sampled_from(["base", "kl", "passed"]), TEXTS | st.floats(), max_size=3),
        versions=st.dictionaries(TEXTS, TEXTS, max_size=2),
    )
)
def test_whatever_the_facts_hold_the_card_is_whole_and_gives_nothing_away(facts):
    card = render_card(facts)
    front = front_of(card)
    assert set(front) >= {"library_name", "tags"}
    assert all(isinstance(value, str | list) for value in front.values())
    assert TOKEN not in card
    assert "/home/me" not in card
    assert card.encode("utf-8")
    fences = [line for line in card.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    assert [line for line in fences if line not in {"```", "```python", "```sh"}] == []
    for line in card.splitlines():
        assert not line.startswith("#") or re.match(r"#{1,3} \S", line)
