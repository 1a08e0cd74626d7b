"""Every allocation and free of a computation, followed by a dispatch mode: bytes, phase and kind."""

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
SETUP, FORWARD, BACKWARD, BELOW, OPTIMIZER, EVALUATION = (
    "setup",
    "forward",
    "backward",
    "backward below",
    "optimizer step",
    "evaluation",
)


@dataclass
class Block:
    """One live or past storage."""

    num_bytes: int
    kind: str
    phase: str
    recomputed: bool  # made again by checkpointing, inside the backward pass
    freed_in: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """What is alive at the highest point of a phase: bytes by component. They sum to the peak."""

    phase: str
    components: dict[str, int]

    @property
    def allocated_bytes(self) -> int:
        return sum(self.components.values())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what each operation allocates and when it is freed.

    `round_to` is the allocator's granularity in bytes: 512 for CUDA's, 1 for the CPU's.
    `vocab` is the size by which logits are told from other activations.
    `scratch` tells the bytes that an operation's kernel takes and gives back, by the operation's name.
    `truth` answers what the code asks of the values of a tensor, which the meta device does not have.
    """

    def __init__(
        self,
        *,
        round_to: int,
        vocab: int,
        scratch: Mapping[str, Callable[..., list[int]]],
        truth: Callable[[torch.Tensor], Any],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.round_to, self.vocab, self.scratch, self.truth = round_to, vocab, scratch, truth
        self.blocks: list[Block] = []
        self.events: list[tuple[int, bool]] = []  # (block, allocated or freed), in order
        self.phase = SETUP
        self._of_storage: dict[int, int] = {}

    def allocate(self, num_bytes: int, kind: str) -> int:
        """Write down a block that no tensor stands for. Returns its number."""
        rounded = -(-num_bytes // self.round_to) * self.round_to
        in_backward = self.phase in {BACKWARD, BELOW}
        self.blocks.append(Block(rounded, kind, self.phase, in_backward and torch.is_grad_enabled()))
        self.events.append((len(self.blocks) - 1, True))
        return len(self.blocks) - 1

    def free(self, block: int) -> None:
        """Write down that a block is given back."""
        if self.blocks[block].freed_in is None:
            self.blocks[block].freed_in = self.phase
            self.events.append((block, False))

    def live_bytes(self, *, of: Collection[str] | None = None) -> int:
        """What is allocated now, of some kinds or of all."""
        alive = (block for block in self.blocks if block.freed_in is None)
        return sum(block.num_bytes for block in alive if of is None or block.kind in of)

    def see(self, tensor: torch.Tensor, kind: str) -> None:
        """Follow a tensor's storage, or say what a followed one is for."""
        storage = tensor.untyped_storage()
        known = self._of_storage.get(storage._cdata)
        if known is not None:
            self.blocks[known].kind = kind if kind != "" else self.blocks[known].kind
            return
        if storage.nbytes() == 0:
            return
        block = self.allocate(storage.nbytes(), kind or self._kind(tensor))
        address = storage._cdata
        self._of_storage[address] = block

        def gone() -> None:
            self._of_storage.pop(address, None)
            self.free(block)

        weakref.finalize(storage, gone).atexit = False

    def _kind(self, tensor: torch.Tensor) -> str:
        is_table = tensor.ndim == 2 and tensor.shape[0] == self.vocab
        if not {self.vocab, TILE_VOCAB}.isdisjoint(tensor.shape[1:]) and not is_table:
            return "logits and loss"
        return ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self.truth(args[0])
        name = func._schema.name
        extra = self.scratch.get(name)
        scratch = [self.allocate(n, "") for n in extra(*args, **(kwargs or {}))] if extra else []
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.see(tensor, "")
        for block in scratch:
            self.free(block)
        return result

    def peaks(self, phases: Iterable[str]) -> dict[str, Snapshot]:
        """The highest point of each phase. Call it when the phases are over.

        What outlives the forward pass is kept for the backward pass; what does not was temporary.
        """
        return {phase: self._peak(phase) for phase in phases if any(b.phase == phase for b in self.blocks)}

    def _component(self, block: Block) -> str:
        if block.kind:
            return block.kind
        if block.recomputed:
            return "recomputed layer"
        kept = block.phase == FORWARD and block.freed_in != FORWARD
        return "activations" if kept else "temporaries"

    def _peak(self, phase: str) -> Snapshot:
        """Replay the events up to the phase's highest point."""
        best, best_at, current, now = -1, 0, 0, SETUP
        for at, (number, allocated) in enumerate(self.events):
            block = self.blocks[number]
            now = block.phase if allocated else (block.freed_in or now)
            current += block.num_bytes if allocated else -block.num_bytes
            if now == phase and current > best:
                best, best_at = current, at
        alive: set[int] = set()
        for number, allocated in self.events[: best_at + 1]:
            (alive.add if allocated else alive.discard)(number)
        sums: Counter[str] = Counter()
        for number in alive:
            sums[self._component(self.blocks[number])] += self.blocks[number].num_bytes
        return Snapshot(phase, {kind: total for kind, total in sums.most_common() if total})
