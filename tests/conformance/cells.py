"""One cell of the matrix: a family, a task and a method, from plan to merged model, on tiny weights."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peftkit.archs import FAMILIES, Family, family_of, shape_from_config
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.errors import UserError
from peftkit.methods import METHODS
from peftkit.plan import Plan
from tests.conftest import save_tiny
from tests.rigs.plans import plan_for
from tests.rigs.tiny import LABELS, VOCAB

STEPS = 20
CLASSES = tuple("abcdefgh"[:LABELS])
RESULTS = Path(__file__).parent / "results.json"

# variant -> (method section, learning rate of these tiny models)
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"name": "full"}, 1e-3),
    "lora": ({"name": "lora", "rank": 4}, 1e-2),
    "lora, norms": ({"name": "lora", "rank": 4, "rslora": True, "also_train": ["norms"]}, 1e-2),
    "lora, layers": ({"name": "lora", "rank": 4, "layers": "last 1", "rank_pattern": {"attention": 2}}, 1e-2),
    "lora, experts": ({"name": "lora", "rank": 4, "targets": ["attention", "experts"]}, 1e-2),
    "dora": ({"name": "lora", "rank": 4, "dora": True}, 1e-2),
    "pissa": ({"name": "lora", "rank": 4, "init": "pissa"}, 1e-2),
    "qlora": ({"name": "qlora", "rank": 4}, 1e-2),
    "prefix": ({"name": "prefix", "virtual_tokens": 4}, 1e-1),
    "prefix, projection": ({"name": "prefix", "virtual_tokens": 4, "projection": True}, 1e-2),
    "prompt": ({"name": "prompt", "virtual_tokens": 4}, 1e-1),
    "ia3": ({"name": "ia3"}, 5e-2),
    "vera": ({"name": "vera", "rank": 16}, 5e-2),
    "oft": ({"name": "oft", "block_size": 4}, 1e-2),
    "adalora": ({"name": "adalora", "initial_rank": 4, "rank": 2}, 1e-2),
    "ln": ({"name": "ln"}, 1e-2),
}
CASES = [(t, task) for family in FAMILIES for t in family.model_types for task in family.heads]


def applies(model_type: str, task: str, variant: str) -> bool:
    """Whether a cell says anything: experts only on mixtures."""
    family = family_of(model_type)
    assert family is not None
    return variant != "lora, experts" or family.has_experts


CELLS = [(t, task, v) for t, task in CASES for v in VARIANTS if applies(t, task, v)]


@dataclass
class Cell:
    """What one cell showed. `checks` maps a check to "ok", or to what went wrong."""

    family: str
    answer: str = "works"  # "works" | "works, changed" | "refused"
    reason: str = ""
    num_trainable: int = 0
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> dict[str, str]:
        return {name: said for name, said in self.checks.items() if said != "ok"}


def rows_for(task: str, num: int = 4, length: int = 16) -> list[Tokenized]:
    """Random rows of a task."""
    import torch

    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(num):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        if task == "causal-lm":
            labels = [IGNORE_INDEX] * 4 + ids[4:]
        elif task == "seq2seq":
            labels = torch.randint(3, VOCAB, (6,), generator=generator).tolist()
        elif task == "classification":
            labels = [i % LABELS]
        else:
            labels = torch.randint(0, LABELS, (length,), generator=generator).tolist()
        found.append(Tokenized(ids, labels, f"row {i}"))
    return found


class Bench:
    """A saved tiny base, and everything a cell does with it through peftkit's own functions."""

    def __init__(self, model_type: str, task: str, variant: str, folder: Path) -> None:
        from peftkit.evaluate.losses import collate

        self.task, (self.method, self.rate) = task, VARIANTS[variant]
        self.folder, self.config = save_tiny(folder, model_type, task)
        self.rows = rows_for(task)
        self.batch = collate(self.rows, 0, task=task)
        self.plan: Plan | None = None

    def make_plan(self) -> Plan:
        labels = CLASSES if "class" in self.task else ()
        plan = plan_for(
            self.config,
            self.method,
            task=self.task,
            labels=labels,
            train={"max_length": 64, "max_steps": STEPS, "micro_batch": 4},
        )
        self.plan = replace(plan, base=replace(plan.base, id=str(self.folder)))
        return self.plan

    def load(self) -> Any:
        from peftkit.model.load import load_model

        assert self.plan is not None
        return load_model(str(self.folder), self.plan.base, device="cpu")

    def attach(self) -> Any:
        from transformers import set_seed

        from peftkit.model.adapter.attach import attach_adapter

        set_seed(0)
        return attach_adapter(self.load(), self.plan, tokenizer=None)

    def logits(self, model: Any) -> Any:
        import torch

        from peftkit.evaluate.step import forward_inputs

        model.eval()
        with torch.no_grad():
            return model(**forward_inputs(model, self.batch, self.task)).logits.float()

    def train(self, model: Any) -> tuple[float, float]:
        """(first, last) loss of a short training on one batch."""
        import torch

        from peftkit.model.adapter.attach import trainable_tensors
        from peftkit.train.adalora import allocator_state

        optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=self.rate, weight_decay=0.0)
        has_budget = bool(allocator_state(model)) or self.plan.method.name == "adalora"
        model.train()
        losses = []
        for step in range(STEPS):
            loss = model(**self.batch).loss
            loss.backward()
            optimizer.step()
            if has_budget:
                model.base_model.update_and_allocate(step + 1)
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses[0], losses[-1]


def _close(a: Any, b: Any, tolerance: float) -> str:
    gap = float((a - b).abs().max())
    return "ok" if gap <= tolerance else f"logits differ by {gap:.2g}"


def _check_counts(bench: Bench, model: Any) -> str:
    from peftkit.model.adapter.attach import count_parameters, trainable_by_role

    counted, planned = count_parameters(model)[0], bench.plan.method.num_trainable
    by_role = trainable_by_role(model, bench.plan)
    if counted == planned and by_role == dict(bench.plan.method.trainable_by_role):
        return "ok"
    return f"planned {planned:,}, counted {counted:,} ({by_role})"


def _check_training(bench: Bench, model: Any) -> dict[str, str]:
    from peftkit.evaluate.step import loss_from_logits
    from peftkit.train.preflight import frozen_checksums, run_preflight

    found = {}
    try:
        run_preflight(model, bench.plan, [[row] for row in bench.rows], pad_id=0, loss=loss_from_logits)
        found["every trained tensor gets a gradient"] = "ok"
    except UserError as error:
        found["every trained tensor gets a gradient"] = str(error)
    frozen = frozen_checksums(model)
    first, last = bench.train(model)
    found["20 steps lower the loss"] = "ok" if last < first - 1e-3 else f"{first:.4f} -> {last:.4f}"
    changed = [name for name, value in frozen_checksums(model).items() if frozen[name] != value]
    found["frozen tensors stay bit-equal"] = "ok" if not changed else f"changed: {changed[:3]}"
    return found


def _dequantized(bench: Bench, quantized: Any) -> Any:
    """The base in full precision with the values that its 4-bit weights stand for."""
    import bitsandbytes as bnb
    import torch
    from torch.nn.utils.parametrize import is_parametrized

    plan = bench.plan
    whole = replace(plan.base, quant_type=None, skip_4bit=(), experts_4bit=())
    bench.plan = replace(plan, base=whole)
    dense = bench.load()
    bench.plan = plan
    modules = dict(dense.named_modules())
    base = quantized.get_base_model()
    with torch.no_grad():
        for name, module in base.named_modules():
            plain = name.replace(".base_layer", "")
            weight = getattr(module, "weight", None)
            if not is_parametrized(module) and getattr(weight, "quant_state", None) is not None:
                value = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                turned = type(modules[plain]).__name__ == "Conv1D"
                modules[plain].weight.copy_(value.T if turned else value)
            if is_parametrized(module):
                for key in list(module.parametrizations):
                    getattr(modules[plain], key).copy_(getattr(module, key))
    return dense


def mergeable(plan: Plan, config: dict[str, Any]) -> bool:
    """Whether PEFT can merge the result: not what has no weights to merge into, nor beside some heads."""
    family = family_of(config["model_type"])
    assert family is not None
    lora = plan.method.peft is not None and plan.method.peft.class_name == "LoraConfig"
    beside = family.heads[plan.base.task].container and not lora  # type: ignore[index]
    return METHODS[plan.method.name].mergeable and plan.method.peft is not None and not beside


def mergeable_text(family: Family) -> list[str]:
    """What of a family cannot be merged, for the page."""
    tasks = [task for task, head in family.heads.items() if head.container]
    why = "its head is a module of modules, beside which PEFT merges LoRA only"
    return [f"not mergeable for {task}: IA3, VeRA, OFT, LN tuning ({why})" for task in tasks]


def _check_saved(bench: Bench, model: Any, folder: Path) -> dict[str, str]:
    from peftkit.model.adapter.attach import save_trained
    from peftkit.model.adapter.load import load_adapter
    from tests.conformance.tokenizer import NoTokenizer

    trained = bench.logits(model)
    save_trained(model, bench.plan, NoTokenizer(), folder / "out", initial_adapter=folder / "start")
    if bench.plan.method.peft is None:
        kept, bench.folder = bench.folder, folder / "out"
        again = bench.load()
        bench.folder = kept
    else:
        again = load_adapter(bench.load(), folder / "out")
    found = {"saved and loaded equal": _close(bench.logits(again), trained, 2e-4)}
    if not mergeable(bench.plan, bench.config):
        return found
    if bench.plan.base.quant_type is not None:
        again = load_adapter(_dequantized(bench, model), folder / "out")
    found["merged equal"] = _close(bench.logits(again.merge_and_unload()), trained, 1e-3)
    return found


def _check_checkpointing(bench: Bench) -> str:
    """Gradients with recomputation equal those without."""
    from peftkit.model.adapter.attach import trainable_tensors
    from peftkit.train.preflight import perturb_zero_init

    grads = []
    for on in (False, True):
        model = bench.attach()
        perturb_zero_init(model)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**bench.batch).loss.backward()
        grads.append({name: t.grad for name, t in trainable_tensors(model).items()})
    for name, grad in grads[0].items():
        other = grads[1][name]
        if (grad is None) != (other is None):
            return f"only one has a gradient of {name}"
        if grad is not None and not grad.allclose(other, rtol=1e-3, atol=1e-5):
            return f"another gradient of {name}"
    return "ok"


def _check_generation(bench: Bench, model: Any) -> str:
    """Greedy decoding as peftkit does it equals greedy decoding by whole forward passes."""
    import torch

    wanted = bench.plan.evaluate
    size = min(2, wanted.generation_batch)
    ids = bench.batch["input_ids"][:size]
    model.eval()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        use_cache=wanted.use_cache,
        eos_token_id=2,
        pad_token_id=0,
    )
    start = model.config.decoder_start_token_id if bench.task == "seq2seq" else None
    grown = ids if start is None else torch.full((size, 1), start)
    for _ in range(5):
        inputs = (
            {"input_ids": grown, "attention_mask": torch.ones_like(grown)}
            if start is None
            else {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": grown}
        )
        with torch.no_grad():
            logits = model(**inputs).logits[:, -1].float()
        logits[:, 2] = -1e9
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    return "ok" if torch.equal(made, grown) else f"{made[:, -5:].tolist()} for {grown[:, -5:].tolist()}"


def _check_coverage(bench: Bench, model: Any) -> str:
    from peftkit.model.quantize import share_in_4bit
    from peftkit.plan.method import share_in_4bit as planned_coverage

    shape = shape_from_config({**bench.config, "num_labels": LABELS}, task=bench.task)
    held, planned = share_in_4bit(model), planned_coverage(shape)
    return "ok" if abs(held - planned) < 1e-6 else f"planned {planned:.4f}, in 4-bit {held:.4f}"


def _changes(plan: Plan) -> str:
    """What the plan changed for this family, in words."""
    keys = {
        "method.left_out",
        "base.kept_out_of_4bit",
        "evaluate.generation_batch",
        "evaluate.use_cache",
        "base.config.rescale_every",
    }
    found = [d.reason for d in plan.decisions if d.key in keys and d.source == "decided" and d.reason]
    # a default other than all linear layers is a change too
    return "; ".join(
        found + [d.reason for d in plan.decisions if d.key == "method.targets" and d.reason.startswith("attention")]
    )


def _refused(error: UserError) -> str:
    """A refusal in a line."""
    [problem, *_] = error.problems
    return f"{problem.got}: {problem.fix}"


def run_cell(model_type: str, task: str, variant: str) -> Cell:
    """Everything that is claimed of a cell, checked on a tiny model."""
    from peftkit.model.adapter.attach import save_initial_adapter

    family = family_of(model_type)
    assert family is not None
    cell = Cell(family.name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bench = Bench(model_type, task, variant, folder)
        try:
            plan = bench.make_plan()
        except UserError as error:
            return replace(cell, answer="refused", reason=_refused(error))
        cell.num_trainable = plan.method.num_trainable or 0
        cell.reason = _changes(plan)
        cell.answer = "works, changed" if cell.reason else "works"
        if plan.base.quant_type is not None:
            cell.checks["planned share is in 4-bit"] = _check_coverage(bench, bench.load())
        model = bench.attach()
        save_initial_adapter(model, plan, folder / "start", overwrite=True)
        cell.checks["planned parameters are counted"] = _check_counts(bench, model)
        cell.checks |= _check_training(bench, model)
        cell.checks |= _check_saved(bench, model, folder)
        if METHODS[plan.method.name].allows_checkpointing:
            cell.checks["gradient checkpointing equal"] = _check_checkpointing(bench)
        if task in {"causal-lm", "seq2seq"}:
            cell.checks["cached generation equal"] = _check_generation(bench, model)
    return cell


def key(model_type: str, task: str, variant: str) -> str:
    """A cell's name in the results."""
    return f"{model_type} | {task} | {variant}"


def read_results() -> dict[str, Cell]:
    """The committed results."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {name: Cell(**value) for name, value in found.items()}


def write_results(cells: dict[str, Cell]) -> None:
    """Commit these: the page of families is made of them."""
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(cell))}" for name, cell in cells.items())
    RESULTS.write_text("{\n" + text + "\n}\n", encoding="utf-8")
