"""What pruning a denoiser was asked, what it decided, and what came of it on images nothing was chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hwprune.report import html_table, promised, ratio_lines


@dataclass(frozen=True, repr=False)
class DiffusionReport:
    """The record of one run; `to_dict` is what `report.json` holds.

    Attributes:
        budget: what was asked, e.g. {"params": 0.8}.
        method: how the units were chosen.
        kinds: unit kinds that were allowed.
        macs, params: of the pruned denoiser: MACs of one image in one evaluation, by torch's FLOP counter.
        dense_macs, dense_params: of the dense one.
        distance: mean squared distance of final latents to the dense model's on held-out images ("held"),
            its standard error ("held_se"), the same as a share of the dense latents' variance ("relative"),
            on the images masks were chosen by ("check"), and there before repair ("unrepaired").
        sampling: steps, solver, guidance, evaluations of the model an image takes.
        images: how many to learn from, to choose by, and held out; conditions.
        learning: updates, share of gates at exactly 0 or 1, whether they settled.
        layers: one row a layer: what is kept of it.
        seconds: step -> wall time.
        warnings: what the user should know.
        environment: versions and device.
        on_device: ratios to the dense model for budgets of latency and energy, of one evaluation, "predicted"
            and "measured"; empty where none was asked for.
    """

    budget: Mapping[str, float | str]
    method: str
    kinds: tuple[str, ...]
    macs: float
    params: int
    dense_macs: float
    dense_params: int
    distance: Mapping[str, float]
    sampling: Mapping[str, Any]
    images: Mapping[str, int]
    learning: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    on_device: Mapping[str, Any] = field(default_factory=dict)

    @property
    def macs_ratio(self) -> float:
        """Kept fraction of the MACs."""
        return self.macs / self.dense_macs

    @property
    def params_ratio(self) -> float:
        """Kept fraction of the parameters."""
        return self.params / self.dense_params

    @property
    def settled(self) -> bool:
        """False where time ran out before the gates had settled within the budget."""
        return bool(self.learning["settled"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the keys DESIGN promises to scripts."""
        fields = asdict(self)
        on_device = fields.pop("on_device")
        return promised(fields, self.macs_ratio, self.params_ratio, on_device)

    def __str__(self) -> str:
        """A few lines for a terminal."""
        macs, dense_macs = self.macs / 1e6, self.dense_macs / 1e6
        params, dense_params = self.params / 1e6, self.dense_params / 1e6
        far = self.distance
        lines = [
            f"MACs    {dense_macs:10.1f} M -> {macs:10.1f} M  ({self.macs_ratio:.3f})",
            f"params  {dense_params:10.2f} M -> {params:10.2f} M  ({self.params_ratio:.3f})",
            f"final latents are {far['held']:.4g} ± {far['held_se']:.2g} (mean squared) from the dense "
            f"model's on {self.images['held']} held-out images: {far['relative']:.1%} of their variance",
            *ratio_lines(self.on_device),
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return html_table(self.to_dict(), str(self).splitlines()[2:])
