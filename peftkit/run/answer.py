"""Ask the model of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.report import read_plan
from peftkit.rundir import RunDir


def answer(path: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Greedy answers, one per prompt: user turns where the run was trained on chats, raw text elsewhere.

    Raises UserError where the run has no result yet, or the base cannot be had any more.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(Problem("prompt", "an empty prompt", "text to answer"))
    run = RunDir.open(path)
    plan = read_plan(run)
    result = run.adapter if plan.method.peft else run.model
    if not result.is_dir():
        raise UserError(
            Problem(
                str(path), "a run without a result", "a finished run", f"go on with it: peftkit resume {path}"
            )
        )
    from peftkit.data.formats import Example
    from peftkit.data.template import render_prompt
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.adapter import load_adapter
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import eos_ids, load_model, load_tokenizer, loadable
    from peftkit.model.locate import locate

    device = detect_device().kind
    tokenizer = load_tokenizer(str(result), plan.base)
    if plan.method.peft is None:
        model = load_model(str(result), plan.base, device=device)
    else:
        base = locate(plan.base.id, revision=plan.base.revision, where="base")
        model = load_adapter(load_model(loadable(base, "base"), plan.base, device=device), result)
    chats = any(event["event"] == "data" and event.get("chats") for event in run.events())
    texts = []
    for prompt in prompts:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}) if chats else ()
        texts.append(render_prompt(Example("prompt", messages=turns, prompt=prompt), tokenizer)[0])
    answers = generate_answers(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, eos_token_ids=eos_ids(model, tokenizer)
    )
    return [text.strip() for text in answers]
