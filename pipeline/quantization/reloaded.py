"""What is asked of a written folder before it is committed, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.quantization.folder import Order, Written


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """A written folder to be checked: the digests of its tensors as they were meant, and tokens to ask it."""

    variant: str
    folder: Path
    digests: Mapping[str, str]
    tokens: tuple[int, ...]
    trust_remote_code: bool

    @staticmethod
    def of(order: Order, written: Written) -> Reload:
        """The check of what a writer wrote, on the first calibration sample where there is one."""
        return Reload(
            variant=order.target.variant, folder=order.out, digests=written.digests,
            tokens=order.calibration[0] if order.calibration else (), trust_remote_code=order.trust_remote_code,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """How far a reloaded model is from the one that was meant.

    `module` deviates most of the packed `modules`: by `module_deviation` of what its largest output is off. `deviation`
    is that of the model's logits (or hidden states), None where the model takes no tokens; `bound` the most that
    computing in the kernels' dtypes explains of it. Where the model is too large to be loaded, `left_out` says so, and
    its files alone were compared.
    """

    modules: int = 0
    module: str = ""
    module_deviation: float | None = None
    deviation: float | None = None
    bound: float = 0.0
    seconds: float
    left_out: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures for the manifest."""
        figures = {"reload_module_deviation": self.module_deviation, "reload_deviation": self.deviation}
        known = {name: float(f"{value:.3g}") for name, value in figures.items() if value is not None}
        return {**known, "reload_seconds": round(self.seconds, 3)}

    @property
    def notes(self) -> dict[str, str]:
        """What the manifest should say beside them."""
        return {"reload": self.left_out} if self.left_out else {}

    def sentence(self, variant: str) -> str:
        """The figures for people."""
        if self.module_deviation is None:
            return f"{variant}: lies on the disk as it was meant, but {self.left_out}"
        answer = "" if self.deviation is None else f", its answer within {self.deviation:.2g}"
        return (
            f"{variant}: reloads as it was meant; outputs of its {self.modules} packed modules lie within "
            f"{self.module_deviation:.2g} of their size{answer} ({self.seconds:.1f} s)"
        )
