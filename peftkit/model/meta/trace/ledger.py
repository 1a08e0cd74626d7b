"""Record of every allocation and free of a computation, by a dispatch mode: bytes, phase and kind."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.plan.memory import TILE_VOCAB

# the backward pass from the first gradient of a trained tensor on is a phase of its own
SETUP, FORWARD, BACKWARD, BACKWARD_BELOW, OPTIMIZER, EVALUATION = (
    "setup",
    "forward",
    "backward",
    "backward below",
    "optimizer step",
    "evaluation",
)


@dataclass
class Block:
    """One storage, live or freed."""

    num_bytes: int
    kind: str
    phase: str
    is_recomputed: bool  # made again by checkpointing, inside the backward pass
    freed_in: str | None = None


@dataclass(frozen=True)
class PhasePeak:
    """The highest point of a phase: live bytes by component, which sum to the peak."""

    phase: str
    components: dict[str, int]

    @property
    def allocated_bytes(self) -> int:
        return sum(self.components.values())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records what each operation allocates and when it is freed.

    `round_to` is the allocator's granularity in bytes: 512 for CUDA's, 1 for the CPU's.
    `vocab` is the size by which logits are distinguished from other activations.
    `scratch` returns the temporary bytes of an operation's kernel, by the operation's name.
    `scalar_value` answers `.item()` of a tensor, which has no value on the meta device.
    """

    def __init__(
        self,
        *,
        round_to: int,
        vocab: int,
        scratch: Mapping[str, Callable[..., list[int]]],
        scalar_value: Callable[[torch.Tensor], Any],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.round_to, self.vocab, self.scratch, self.scalar_value = round_to, vocab, scratch, scalar_value
        self.blocks: list[Block] = []
        self.events: list[tuple[int, bool]] = []  # (block, allocated or freed), in order
        self.phase = SETUP
        self._block_of_storage: dict[int, int] = {}

    def allocate(self, num_bytes: int, kind: str) -> int:
        """Record a block that no tensor stands for. Returns its number."""
        rounded = -(-num_bytes // self.round_to) * self.round_to
        in_backward = self.phase in {BACKWARD, BACKWARD_BELOW}
        self.blocks.append(Block(rounded, kind, self.phase, in_backward and torch.is_grad_enabled()))
        self.events.append((len(self.blocks) - 1, True))
        return len(self.blocks) - 1

    def free(self, block: int) -> None:
        """Record that a block is freed."""
        if self.blocks[block].freed_in is None:
            self.blocks[block].freed_in = self.phase
            self.events.append((block, False))

    def live_bytes(self, *, kinds: Collection[str] | None = None) -> int:
        """Return the bytes that are allocated now, of some kinds or of all."""
        live_blocks = (block for block in self.blocks if block.freed_in is None)
        return sum(block.num_bytes for block in live_blocks if kinds is None or block.kind in kinds)

    def see(self, tensor: torch.Tensor, kind: str) -> None:
        """Track a tensor's storage until it is freed, or set the kind of one that is tracked."""
        storage = tensor.untyped_storage()
        known_block = self._block_of_storage.get(storage._cdata)
        if known_block is not None:
            self.blocks[known_block].kind = kind if kind != "" else self.blocks[known_block].kind
            return
        if storage.nbytes() == 0:
            return
        block = self.allocate(storage.nbytes(), kind or self._infer_kind(tensor))
        address = storage._cdata
        self._block_of_storage[address] = block

        def gone() -> None:
            self._block_of_storage.pop(address, None)
            self.free(block)

        weakref.finalize(storage, gone).atexit = False

    def _infer_kind(self, tensor: torch.Tensor) -> str:
        """Return "logits and loss" for a tensor with a vocabulary axis after its first, else ""."""
        is_table = tensor.ndim == 2 and tensor.shape[0] == self.vocab
        if not {self.vocab, TILE_VOCAB}.isdisjoint(tensor.shape[1:]) and not is_table:
            return "logits and loss"
        return ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self.scalar_value(args[0])
        name = func._schema.name
        scratch_sizes = self.scratch.get(name)
        scratch = [self.allocate(n, "") for n in scratch_sizes(*args, **(kwargs or {}))] if scratch_sizes else []
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.see(tensor, "")
        for block in scratch:
            self.free(block)
        return result

    def peaks(self, phases: Iterable[str]) -> dict[str, PhasePeak]:
        """Return the highest point of each phase that occurred. Call it when the phases are over.

        What outlives the forward pass counts as activations saved for the backward pass; other blocks as
        temporaries.
        """
        return {phase: self._peak(phase) for phase in phases if any(b.phase == phase for b in self.blocks)}

    def _peak(self, phase: str) -> PhasePeak:
        """Replay the events and return a phase's highest point."""
        highest, highest_index, current_bytes, current_phase = -1, 0, 0, SETUP
        for index, (number, is_allocation) in enumerate(self.events):
            block = self.blocks[number]
            current_phase = block.phase if is_allocation else (block.freed_in or current_phase)
            current_bytes += block.num_bytes if is_allocation else -block.num_bytes
            if current_phase == phase and current_bytes > highest:
                highest, highest_index = current_bytes, index
        live_blocks: set[int] = set()
        for number, is_allocation in self.events[: highest_index + 1]:
            (live_blocks.add if is_allocation else live_blocks.discard)(number)
        components: Counter[str] = Counter()
        for number in live_blocks:
            origin = self.blocks[number]
            if origin.kind:
                component = origin.kind
            elif origin.is_recomputed:
                component = "recomputed layer"
            else:
                is_saved = origin.phase == FORWARD and origin.freed_in != FORWARD
                component = "activations" if is_saved else "temporaries"
            components[component] += self.blocks[number].num_bytes
        return PhasePeak(phase, {kind: total for kind, total in components.most_common() if total})
