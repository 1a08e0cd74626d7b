"""Growth on real tiny models with real PEFT: the function stays, the state fits, plain PEFT loads it."""

import math
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import PeftkitError
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors
from peftkit.model.adapter.grow import AdaptedWeight, adapted_weights, grow_adapter
from peftkit.model.load import load_model
from peftkit.train.checkpoint.snapshot import optimizer_state
from tests.conftest import save_tiny
from tests.rigs.plans import plan_for
from tests.rigs.tiny import VOCAB

IDS = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
FEW = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "mixtral": ["q_proj", "v_proj"]}
MANY = {"llama": "all-linear", "gpt2": "all-linear", "mixtral": ["attention", "experts"]}
STYLES = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
BIG, SMALL = {"rank": 8, "alpha": 16}, {"rank": 4, "alpha": 8}
# move -> (before, after), each (few or many modules, rank and alpha)
MOVES = {
    "rank": ((MANY, SMALL), (MANY, BIG)),
    "rank, alpha kept": ((MANY, SMALL), (MANY, {"rank": 12, "alpha": 8})),
    "modules": ((FEW, SMALL), (MANY, SMALL)),
    "both": ((FEW, SMALL), (MANY, {"rank": 12, "alpha": 24})),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """model type -> (folder of its weights, configuration)."""
    return cache(lambda kind, **changes: save_tiny(tmp_path_factory.mktemp(kind), kind, **changes))


@dataclass
class Bench:
    """A tiny base, and a recipe's adapter on it."""

    folder: object
    config: dict
    double: bool = False

    def plan(self, method):
        """The recipe's plan. `peft` holds arguments that PEFT takes and a recipe does not."""
        recipe = {key: value for key, value in method.items() if key != "peft"}
        plan = plan_for(self.config, recipe)
        more = method.get("peft", {})
        spec = replace(plan.method.peft, arguments={**plan.method.peft.arguments, **more})
        base = replace(plan.base, id=str(self.folder))
        return replace(plan, base=base, method=replace(plan.method, peft=spec))

    def base(self, method):
        return load_model(str(self.folder), self.plan(method).base, device="cpu")

    def attach(self, base, method, tokenizer=None):
        torch.manual_seed(0)
        if self.double:
            base.double().set_experts_implementation("eager")  # the grouped kernel has no double
        wrapped = attach_adapter(base, self.plan(method), tokenizer)
        return wrapped.double() if self.double else wrapped

    def start(self, method, steps=3):
        """(model, optimizer) after a few real steps."""
        model = self.attach(self.base(method), method)
        optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=1e-2, weight_decay=0.0)
        for _ in range(steps):
            step(model, optimizer)
        return model, optimizer


def step(model, optimizer):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def method_of(style, model_type, stage, name="lora"):
    targets, size = stage
    chosen = targets[model_type]
    if style == "dora" and model_type == "mixtral":  # PEFT has no DoRA for parameters
        chosen = FEW[model_type] if targets is FEW else "attention"
    return {"name": name, "targets": chosen, **size, **STYLES[style]}


def put(model, optimizer, grown):
    """Copy a grown checkpoint into a model and its optimizer, as a restore does."""
    live = trainable_tensors(model)
    assert list(live) == list(grown.trained)
    with torch.no_grad():
        for name, tensor in grown.trained.items():
            live[name].copy_(tensor)
    for key, value in grown.optimizer.items():
        name, field = key.rsplit("|", 1)
        optimizer.state[live[name]][field] = value.clone()


def grow_model(bench, model, optimizer, method, *, anew=False, **more):
    """(grown model, its optimizer, what grow returned), on the base from `unload` or one loaded anew."""
    old = adapted_weights(model)
    trained = {name: t.detach().clone() for name, t in trainable_tensors(model).items()}
    state = {key: t.clone() for key, t in optimizer_state(model, optimizer)[0].items()}
    larger = bench.attach(bench.base(method) if anew else model.unload(), method)
    grown = grow_adapter(trained, state, trainable_tensors(larger), old=old, new=adapted_weights(larger), **more)
    after = torch.optim.AdamW(trainable_tensors(larger).values(), lr=1e-2, weight_decay=0.0)
    put(larger, after, grown)
    return larger, after, grown


def difference(before, after):
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("double", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_the_function_is_the_same(saved, model_type, style, move, double):
    bench = Bench(*saved(model_type), double=double)
    before, after = (method_of(style, model_type, stage) for stage in MOVES[move])
    untrained = logits(bench.base(before)).to(torch.float64 if double else torch.float32)
    model, optimizer = bench.start(before)
    trained = logits(model)
    assert difference(trained, untrained) > 1e-2, "the adapter does something"
    larger, _, grown = grow_model(bench, model, optimizer, after)
    assert not grown.restarted
    # new magnitudes are those of the base rounded to fp32, in which everything trained is held
    rounds = style == "dora" and move in {"modules", "both"}
    assert difference(trained, logits(larger)) <= (1e-14 if double and not rounds else 1e-6)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("style", STYLES)
def test_the_function_is_the_same_on_a_4bit_base(saved, style, move):
    bench = Bench(*saved("llama"))
    before, after = (method_of(style, "llama", stage, name="qlora") for stage in MOVES[move])
    model, optimizer = bench.start(before)
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    trained = logits(model)
    larger, _, _ = grow_model(bench, model, optimizer, after)
    assert difference(trained, logits(larger)) <= 1e-6


@pytest.mark.parametrize(("model_type", "style"), [("llama", "dora"), ("gpt2", "lora"), ("mixtral", "rslora")])
def test_plain_peft_loads_what_was_grown(saved, model_type, style, tmp_path):
    from peft import PeftModel

    bench = Bench(*saved(model_type))
    before, after = (method_of(style, model_type, stage) for stage in MOVES["both"])
    larger, optimizer, _ = grow_model(
        bench, *bench.start({**before, "also_train": ["norms"]}), {**after, "also_train": ["norms"]}
    )
    step(larger, optimizer)
    larger.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bench.base(after), tmp_path)
    assert difference(logits(larger), logits(again)) <= 1e-6


def corner(tensor, like):
    return tensor[tuple(slice(size) for size in like.shape)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_next_step_moves_what_was_there_as_without_growth(saved, model_type):
    """At a kept scale: same gradients, same state, same step."""
    bench = Bench(*saved(model_type))
    small, large = (method_of("lora", model_type, stage) for stage in MOVES["rank"])
    plain, plain_optimizer = bench.start(small, steps=4)
    larger, optimizer, grown = grow_model(bench, *bench.start(small, steps=3), large)
    before = {name: tensor.clone() for name, tensor in grown.trained.items()}
    step(larger, optimizer)
    live = trainable_tensors(larger)
    state, plain_state = (optimizer_state(*pair)[0] for pair in ((larger, optimizer), (plain, plain_optimizer)))
    for name, tensor in trainable_tensors(plain).items():
        assert torch.allclose(corner(live[name], tensor), tensor, rtol=1e-5, atol=1e-6), name
        for field in ("exp_avg", "exp_avg_sq"):
            wanted = plain_state[f"{name}|{field}"]
            assert torch.allclose(corner(state[f"{name}|{field}"], wanted), wanted, rtol=1e-4, atol=1e-8)
        if "lora_B" in name:
            assert bool((live[name] != before[name])[:, tensor.shape[1] :].all()), "new columns learn at once"


def test_the_optimizer_state_is_padded_with_numbers_that_step_well(saved):
    bench = Bench(*saved("llama"))
    small, large = (method_of("lora", "llama", stage) for stage in MOVES["rank, alpha kept"])
    model, optimizer = bench.start(small)
    old = {key: tensor.clone() for key, tensor in optimizer_state(model, optimizer)[0].items()}
    _, _, grown = grow_model(bench, model, optimizer, large)
    assert list(grown.optimizer) == list(old), "no module is new: the same keys in the same order"
    for name in grown.trained:
        first, second = (grown.optimizer[f"{name}|{field}"] for field in ("exp_avg", "exp_avg_sq"))
        then, then_sq = old[f"{name}|exp_avg"], old[f"{name}|exp_avg_sq"]
        c = 3.0 if "lora_B" in name else 1.0  # alpha / 4 over alpha / 12
        assert first.shape == second.shape == grown.trained[name].shape
        assert torch.allclose(corner(first, then) * c, then)
        assert torch.allclose(corner(second, then) * c * c, then_sq)
        is_new = torch.ones_like(first, dtype=torch.bool)
        corner(is_new, then).fill_(False)
        assert is_new.sum() == 2 * then.numel()
        assert not first[is_new].any()
        assert torch.allclose(second[is_new], then_sq.mean() / c**2)
        assert float(second[is_new].min()) > 0
        assert torch.equal(grown.optimizer[f"{name}|step"], old[f"{name}|step"])


def test_new_modules_have_peft_s_start_and_no_state(saved):
    bench = Bench(*saved("llama"))
    small, large = (method_of("dora", "llama", stage) for stage in MOVES["modules"])
    model, optimizer = bench.start(small)
    held = {key.rpartition("|")[0] for key in optimizer_state(model, optimizer)[0]}
    larger, after, grown = grow_model(bench, model, optimizer, large)
    new = [name for name in grown.trained if name not in held]
    assert any("magnitude" in name for name in new)
    assert not any(key.rpartition("|")[0] in new for key in grown.optimizer)
    assert all((grown.trained[name] == 0).all() == ("lora_B" in name) for name in new)
    step(larger, after)
    steps = {name: float(after.state[p]["step"]) for name, p in trainable_tensors(larger).items()}
    assert steps == {name: 1.0 if name in new else 4.0 for name in grown.trained}


ALSO = {
    "kept": (["embeddings", "head", "norms"], ["embeddings", "head", "norms"]),
    "kept, tied": (["embeddings"], ["embeddings"]),
    "token rows": ([{"tokens": ["a", "b"]}], [{"tokens": ["a", "b"]}]),
    "added": ([], ["embeddings", "norms"]),
    "more": (["norms"], ["embeddings", "norms"]),
    "added, tied": ([], ["embeddings"]),
}


@pytest.mark.parametrize("case", ALSO)
def test_what_is_trained_beside_the_factors_is_carried_over(saved, case):
    also, also_after = ALSO[case]
    bench = Bench(*saved("llama", tie_word_embeddings="tied" in case))
    before, after = (method_of("lora", "llama", stage) for stage in MOVES["both"])
    model, optimizer = bench.start({**before, "also_train": also})
    trained, held = logits(model), optimizer_state(model, optimizer)[0]
    beside = {name: t.detach().clone() for name, t in trainable_tensors(model).items() if "lora_" not in name}
    assert bool(beside) == bool(also)
    larger, after_optimizer, grown = grow_model(bench, model, optimizer, {**after, "also_train": also_after})
    assert difference(trained, logits(larger)) <= 1e-6
    for name, tensor in beside.items():
        assert torch.equal(grown.trained[name], tensor)
        assert torch.equal(grown.optimizer[f"{name}|exp_avg_sq"], held[f"{name}|exp_avg_sq"])
    step(larger, after_optimizer)
    tables = [larger.get_input_embeddings(), larger.get_output_embeddings()]
    assert "tied" not in case or tables[0].weight is tables[1].weight, "one table, still"


def test_an_adapter_of_embeddings_grows_on_the_side_that_is_not_zero(saved):
    """PEFT starts it with A = 0 and a random B: zero columns of B would never learn beside zero rows of A."""
    bench = Bench(*saved("llama"))
    small = {"name": "lora", **SMALL, "peft": {"target_modules": ["embed_tokens", "q_proj"]}}
    model, optimizer = bench.start(small)
    trained = logits(model)
    larger, _, grown = grow_model(bench, model, optimizer, {**small, "rank": 12})
    assert difference(trained, logits(larger)) <= 1e-6
    (a,) = (t for name, t in grown.trained.items() if "lora_embedding_A" in name)
    (b,) = (t for name, t in grown.trained.items() if "lora_embedding_B" in name)
    assert not a[4:].any()
    assert torch.allclose(b[:, 4:].norm(dim=0), b[:, :4].norm(dim=0).mean())


@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
def test_fused_experts_keep_their_adapters_when_a_second_parameter_is_adapted(saved, first, tmp_path):
    """PEFT nests its wrappers: the name that one parameter's adapter had becomes the other's."""
    from peft import PeftModel

    bench = Bench(*saved("mixtral"))
    few = {"name": "lora", "targets": ["q_proj"], "target_parameters": [f"mlp.experts.{first}"], **SMALL}
    both = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    many = {**few, "target_parameters": both, **BIG}
    model, optimizer = bench.start(few)
    trained, old = logits(model), adapted_weights(model)
    larger, after, _ = grow_model(bench, model, optimizer, many, anew=True)
    assert difference(trained, logits(larger)) <= 1e-6
    outer, new = "base_model.model.model.layers.0.mlp.experts", adapted_weights(larger)
    assert old[outer].weight.endswith(first)
    assert new[outer].weight.endswith("down_proj")
    assert new[f"{outer}.base_layer"].weight.endswith("gate_up_proj")
    step(larger, after)
    larger.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bench.base(many), tmp_path)
    assert difference(logits(larger), logits(again)) <= 1e-6


def test_an_unloaded_base_may_nest_its_wrappers_otherwise(saved):
    """What `grow_adapter` does by the weight's name stays right; plain PEFT could not load the result."""
    bench = Bench(*saved("mixtral"))
    few = {"name": "lora", "targets": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"], **SMALL}
    many = {**few, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model, optimizer = bench.start(few)
    trained = logits(model)
    larger, _, _ = grow_model(bench, model, optimizer, many)
    assert difference(trained, logits(larger)) <= 1e-6
    outer = adapted_weights(larger)["base_model.model.model.layers.0.mlp.experts"]
    assert outer.weight.endswith("gate_up_proj"), "PEFT orders them as a fresh base does: say so in grow.py"


def test_ranks_and_scales_that_differ_by_module(saved):
    bench = Bench(*saved("llama"))
    small, large = (method_of("rslora", "llama", stage) for stage in MOVES["rank"])
    small["peft"] = {"rank_pattern": {"v_proj": 6}}
    large["peft"] = {"rank_pattern": {"q_proj": 5, "down_proj": 16}, "alpha_pattern": {"q_proj": 3}}
    model, optimizer = bench.start(small)
    trained = logits(model)
    larger, _, _ = grow_model(bench, model, optimizer, large)
    found = {name.rpartition(".")[2]: adapted for name, adapted in adapted_weights(larger).items()}
    assert [found[module].rank for module in ("q_proj", "down_proj", "v_proj")] == [5, 16, 8]
    assert found["q_proj"].scale == pytest.approx(3 / math.sqrt(5))
    assert difference(trained, logits(larger)) <= 1e-6


def test_directions_become_the_new_rows_of_a(saved):
    bench = Bench(*saved("mixtral"))
    few = {"name": "lora", "targets": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], **SMALL}
    many = {**few, "targets": ["q_proj", "v_proj"], **BIG}
    model, optimizer = bench.start(few)
    trained = logits(model)
    place = "model.layers.0."
    generator = torch.Generator().manual_seed(1)
    old, new, experts = (f"{place}{n}" for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.down_proj"))
    rows = {
        old: torch.randn(2, 64, generator=generator),
        new: torch.randn(8, 64, generator=generator),
        experts: torch.randn(4, 4, 128, generator=generator),
    }
    start = {name: t.detach().clone() for name, t in trainable_tensors(model).items()}
    larger, _, grown = grow_model(bench, model, optimizer, many, directions=rows)
    assert difference(trained, logits(larger)) <= 1e-6
    names = {adapted.weight: f"{name}.lora_A.default.weight" for name, adapted in adapted_weights(larger).items()}
    a, was = grown.trained[names[old]], start[names[old]]
    length = was.norm(dim=1).mean()
    assert torch.allclose(a[4:6], rows[old] / rows[old].norm(dim=1, keepdim=True) * length)
    assert torch.allclose(a[4:].norm(dim=1), length), "PEFT's own rows follow, as long"
    a = grown.trained[names[new]]
    assert torch.allclose(a / a.norm(dim=1, keepdim=True), rows[new] / rows[new].norm(dim=1, keepdim=True))
    a, was = grown.trained[names[experts]].view(4, 8, 128), start[names[experts]].view(4, 4, 128)
    assert torch.equal(a[:, :4], was)
    directions = rows[experts] / rows[experts].norm(dim=2, keepdim=True)
    assert torch.allclose(a[:, 4:], directions * was.norm(dim=2).mean(dim=1).view(4, 1, 1))


# --- made-up adapters of one weight


def adapter(rank, d_in, d_out, *, num_experts=1, zero="B", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank * num_experts, d_in, generator=generator, dtype=dtype)
    b = torch.randn(d_out, rank * num_experts, generator=generator, dtype=dtype)
    sides = {"A": (a * 0, b), "B": (a, b * 0), "": (a, b)}
    return dict(zip(("m.lora_A.x.weight", "m.lora_B.x.weight"), sides[zero], strict=True))


def delta(tensors, scale, num_experts):
    """PEFT's s B A: rows of A by expert, columns of B by rank."""
    a, b = tensors.values()
    a, b = a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts)
    return scale * torch.einsum("ore,eri->eoi", b, a)


SIZE, SCALE = st.integers(1, 6), st.floats(0.05, 20)
SIZES = st.tuples(st.integers(1, 3), SIZE, st.integers(0, 6), SIZE, SIZE)


@settings(max_examples=150)
@given(SIZES, SCALE, SCALE, st.sampled_from("AB"), st.integers(0, 99))
def test_any_growth_keeps_the_product(sizes, s, s_new, zero, seed):
    num_experts, rank, more, d_in, d_out = sizes
    num_experts = 1 if zero == "A" else num_experts  # embeddings have none
    trained = adapter(rank, d_in, d_out, num_experts=num_experts, zero="", seed=seed)
    fresh = adapter(rank + more, d_in, d_out, num_experts=num_experts, zero=zero, seed=seed + 1)
    optimizer = {f"{name}|exp_avg_sq": tensor**2 for name, tensor in trained.items()}
    grown = grow_adapter(
        trained,
        optimizer,
        fresh,
        old={"m": AdaptedWeight("w", rank, s)},
        new={"m": AdaptedWeight("w", rank + more, s_new)},
    )
    before, after = delta(trained, s, num_experts), delta(grown.trained, s_new, num_experts)
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-12 * float(before.abs().max()))
    assert {name: t.shape for name, t in grown.trained.items()} == {name: t.shape for name, t in fresh.items()}
    assert all((tensor > 0).all() for tensor in grown.optimizer.values()), "squares are padded with their mean"
    a, b = grown.trained.values()
    a = a.view(num_experts, -1, d_in)[:, rank:].abs().amax(-1)
    b = b.view(d_out, -1, num_experts).permute(2, 1, 0)[:, rank:].abs().amax(-1)
    assert bool(((a > 0) != (b > 0)).all()), "new directions: one side is zero, never both"


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.25])
def test_a_scale_by_a_power_of_two_is_exact(factor):
    trained, fresh = adapter(2, 5, 4, zero=""), adapter(4, 5, 4, seed=1)
    old, new = {"m": AdaptedWeight("w", 2, 1.5 * factor)}, {"m": AdaptedWeight("w", 4, 1.5)}
    grown = grow_adapter(trained, {}, fresh, old=old, new=new)
    a, b = grown.trained.values()
    assert torch.equal(a[:2], trained["m.lora_A.x.weight"])
    assert torch.equal(b[:, :2] / factor, trained["m.lora_B.x.weight"])
    assert not b[:, 2:].any()


def grow_made_up(trained=None, optimizer=None, fresh=None, *, ranks=(2, 4), weights=("w", "w"), rows=None):
    old = {"m": AdaptedWeight(weights[0], ranks[0], 1.0)}
    new = {"m": AdaptedWeight(weights[1], ranks[1], 1.0)}
    trained = adapter(ranks[0], 5, 4, zero="") if trained is None else trained
    fresh = adapter(ranks[1], 5, 4, seed=1) if fresh is None else fresh
    return grow_adapter(trained, optimizer or {}, fresh, old=old, new=new, directions=rows)


BAD = {
    "smaller": ({"ranks": (4, 2)}, "rank 2 is below 4"),
    "half a pair": ({"trained": {"m.lora_A.x.weight": torch.ones(2, 5)}}, "no m.lora_B.x.weight"),
    "dropped": ({"trained": {**adapter(2, 5, 4, zero=""), "head": torch.ones(3)}}, "does not train head"),
    "dropped module": ({"weights": ("v", "w")}, "v is no longer adapted"),
    "another shape": ({"fresh": adapter(4, 6, 4, seed=1)}, r"m.lora_A.x.weight: \(2, 5\) does not fit"),
    "a stranger's state": ({"optimizer": {"n|exp_avg": torch.ones(3)}}, "n has an optimizer state"),
    "now with magnitudes": (
        {"fresh": {**adapter(4, 5, 4), "m.lora_magnitude_vector.x.weight": torch.ones(4)}},
        "no m.lora_magnitude_vector.x.weight",
    ),
    "a start with an effect": ({"fresh": adapter(4, 5, 4, zero="")}, "is not zero at initialisation"),
    "nothing new": ({"fresh": {n: t * 0 for n, t in adapter(4, 5, 4).items()}}, "both zero"),
    "directions for nothing": ({"rows": {"v": torch.ones(2, 5)}}, "directions for v"),
    "directions of another width": ({"rows": {"w": torch.ones(2, 6)}}, "finite rows of 5"),
    "directions of no length": ({"rows": {"w": torch.zeros(2, 5)}}, "both zero"),
    "broken directions": ({"rows": {"w": torch.full((2, 5), float("nan"))}}, "finite rows of 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_grow_is_refused_by_name(case):
    arguments, said = BAD[case]
    with pytest.raises(PeftkitError, match=said):
        grow_made_up(**arguments)


def test_state_that_cannot_be_cut_into_rows_is_made_anew():
    """8-bit blocks and factored moments; as long as nothing changes in shape or scale they are kept."""
    trained = adapter(2, 5, 4, zero="")
    blocks = {}
    for name in trained:
        blocks |= {f"{name}|state1": torch.ones(10, dtype=torch.uint8), f"{name}|absmax1": torch.ones(1)}
        blocks[f"{name}|step"] = 7
    grown = grow_made_up(trained, blocks)
    assert not grown.optimizer
    assert grown.restarted == tuple(trained)
    kept = grow_made_up(trained, blocks, fresh=adapter(2, 5, 4), ranks=(2, 2))
    assert kept.optimizer == blocks
    assert not kept.restarted
    factored = {f"{name}|exp_avg_sq_row": torch.ones(4) for name in trained}
    assert grow_made_up(trained, factored).restarted == tuple(trained)
    plain = {f"{name}|state2": tensor**2 for name, tensor in trained.items()} | {"m.lora_A.x.weight|step": 7}
    assert grow_made_up(trained, plain).optimizer["m.lora_A.x.weight|step"] == 7


def test_nothing_that_was_given_is_changed():
    trained, fresh = adapter(2, 5, 4, zero=""), adapter(4, 5, 4, seed=1)
    rows = {"w": torch.ones(2, 5)}
    state = {f"{name}|exp_avg": tensor.clone() for name, tensor in trained.items()}
    copies = [{name: t.clone() for name, t in part.items()} for part in (trained, fresh, rows, state)]
    grow_made_up(trained, state, fresh, rows=rows)
    for part, copy in zip((trained, fresh, rows, state), copies, strict=True):
        assert all(torch.equal(tensor, copy[name]) for name, tensor in part.items())


def test_only_one_unmerged_lora_can_grow(saved):
    bench = Bench(*saved("llama"))
    method = {"name": "lora", "rank": 2}
    model = bench.attach(bench.base(method), method)
    model.merge_adapter()
    with pytest.raises(PeftkitError, match="is merged"):
        adapted_weights(model)
    with pytest.raises(PeftkitError, match="IA3"):
        adapted_weights(bench.attach(bench.base({"name": "ia3"}), {"name": "ia3"}))


def test_a_start_that_changes_the_base_is_refused(saved):
    bench = Bench(*saved("llama"))
    before = {"name": "lora", "rank": 4}
    with pytest.raises(
        PeftkitError, match="is not zero at initialisation; attach it with the default LoRA initialisation"
    ):
        grow_model(bench, *bench.start(before), {"name": "lora", "rank": 8, "init": "pissa"})


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_starts_without_effect_are_taken(saved, init):
    bench = Bench(*saved("llama"))
    method = {"name": "lora", "rank": 4, "targets": ["q_proj"], "init": init, "dropout": 0.1}
    model, optimizer = bench.start(method)
    trained = logits(model)
    larger, _, _ = grow_model(bench, model, optimizer, {**method, "rank": 8, "targets": ["q_proj", "v_proj"]})
    assert difference(trained, logits(larger)) <= 1e-6
