"""What a measurement found: figures of each arm, ratios between arms, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwprune.meter import told
from hwprune.meter.estimate import Estimate, Unavailable
from hwprune.meter.memory import Memory
from hwprune.meter.rounds import Floats, holm, of_ratio, p_value, verdict

Figure = Estimate | Unavailable
AGAIN = "A/A"  # the arm that is the measured model once more


@dataclass(frozen=True)
class ArmFigures:
    """One arm.

    Attributes:
        name: as the caller calls it.
        latency_s: median seconds a call; a call is one batch.
        latency_p95_s: 95th percentile of all calls.
        throughput_per_s: images a second, from the median.
        cpu_time_s: seconds of CPU time a call, of all threads of this process.
        memory: of one forward.
        average_power_w: while the arm runs without pause.
        energy_j: gross joules an image.
        mad_s: median absolute deviation of the rounds.
        calls: timed, in rounds that count.
        flags: see `hwprune.meter.told.FLAGS`.
        error: why it is not measured; "" where it is.
    """

    name: str
    latency_s: Figure
    latency_p95_s: Figure
    throughput_per_s: Figure
    cpu_time_s: Figure
    memory: Memory | Unavailable
    average_power_w: Figure
    energy_j: Figure
    mad_s: float | None = None
    calls: int = 0
    flags: tuple[str, ...] = ()
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        peak: dict[str, Any] = (
            self.memory.to_dict()
            if isinstance(self.memory, Unavailable)
            else {
                "value": self.memory.peak_bytes,
                "weight_bytes": self.memory.weight_bytes,
                "activation_bytes": self.memory.activation_bytes,
                "method": self.memory.method,
            }
        )
        return {
            "latency_s": self.latency_s.to_dict(),
            "latency_p95_s": self.latency_p95_s.to_dict(),
            "throughput_per_s": self.throughput_per_s.to_dict(),
            "cpu_time_s": self.cpu_time_s.to_dict(),
            "peak_memory_bytes": peak,
            "average_power_w": self.average_power_w.to_dict(),
            "energy_j": self.energy_j.to_dict(),
            "mad_s": self.mad_s,
            "calls": self.calls,
            "flags": list(self.flags),
            "error": self.error or None,
        }


@dataclass(frozen=True)
class Ratio:
    """One arm by another: below 1 is less time, less energy.

    Attributes:
        latency, energy: paired by round, with 95 % intervals.
        cpu_time: the same of the CPU time of this process. On a busy CPU it is the steadier figure: it does
            not count the time in which other processes held the core.
        latency_verdict, energy_verdict: "lower", "higher", "same" (tight about 1) or "ambiguous"; "" where
            there is no figure.
    """

    latency: Figure
    energy: Figure
    cpu_time: Figure
    latency_verdict: str = ""
    energy_verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found = {}
        for name in ("latency", "energy"):
            told = getattr(self, f"{name}_verdict")
            found[name] = getattr(self, name).to_dict() | ({"verdict": told} if told else {})
        return found | {"cpu_time": self.cpu_time.to_dict()}


@dataclass(frozen=True)
class Split:
    """Where a saving comes from (`measure.md` 5.1.9).

    Attributes:
        value: masked by dense: the same layers, only with zeros in them. Not a gain of pruning.
        structure: the pruned model by masked: the same function in smaller layers.
        weights: the pruned model by itself with random weights: how much its own values matter.
    """

    value: Ratio
    structure: Ratio
    weights: Ratio

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {name: getattr(self, name).to_dict() for name in ("value", "structure", "weights")}


@dataclass(frozen=True, repr=False, eq=False)
class Measurement:
    """A model measured, alone or against others; figures asked of it directly are the model's.

    Attributes:
        arms: name -> figures; the first is the model.
        rounds_s: arm -> seconds a forward, [rounds, turns], A/A included.
        rounds_cpu_s: the same in CPU seconds, [rounds].
        rounds_j: the same in joules an image, [rounds, 1]; empty without energy.
        latency_limit, energy_limit: half-widths asked for.
        noise_rel: of the machine, before and after: relative standard deviation of one fixed small product.
        discarded: (step, round, reason).
        invalid: why nothing of this counts; "" where it does.
        settings: batch, mode, l2, dtype, device, seed, inputs.
        provenance: versions, device, clocks, commit.
        warnings: what the reader must know.
        seconds: step -> time spent.
    """

    arms: Mapping[str, ArmFigures]
    rounds_s: Mapping[str, Floats]
    rounds_cpu_s: Mapping[str, Floats]
    rounds_j: Mapping[str, Floats]
    latency_limit: float
    energy_limit: float
    noise_rel: tuple[float, float]
    discarded: tuple[tuple[str, int, str], ...]
    invalid: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    energy_reason: str = ""

    @property
    def model(self) -> ArmFigures:
        """Figures of the model."""
        return next(iter(self.arms.values()))

    @property
    def latency_s(self) -> Figure:
        """Median seconds a call of the model."""
        return self.model.latency_s

    @property
    def latency_p95_s(self) -> Figure:
        """95th percentile of the calls of the model."""
        return self.model.latency_p95_s

    @property
    def throughput_per_s(self) -> Figure:
        """Images a second of the model."""
        return self.model.throughput_per_s

    @property
    def cpu_time_s(self) -> Figure:
        """CPU seconds a call of the model."""
        return self.model.cpu_time_s

    @property
    def memory(self) -> Memory | Unavailable:
        """Peak memory of a forward of the model."""
        return self.model.memory

    @property
    def average_power_w(self) -> Figure:
        """Power while the model runs."""
        return self.model.average_power_w

    @property
    def energy_j(self) -> Figure:
        """Joules an image of the model."""
        return self.model.energy_j

    @property
    def aa(self) -> Ratio:
        """The model by itself, as if they were two: the interval must contain 1."""
        main = self.model.name
        return Ratio(
            self._plain(self.rounds_s, AGAIN, main, self.latency_limit),
            self._plain(self.rounds_j, AGAIN, main, self.energy_limit),
            self._plain(self.rounds_cpu_s, AGAIN, main, self.latency_limit),
        )

    @property
    def aa_ok(self) -> bool:
        """Whether the model is as fast as itself: its A/A interval is there and contains 1."""
        return all(
            figure.contains(1.0)
            for figure in (self.aa.latency, self.aa.energy)
            if isinstance(figure, Estimate)
        ) and isinstance(self.aa.latency, Estimate)

    def ratio(self, above: str, below: str) -> Ratio:
        """One arm by another.

        Args:
            above: name of the arm above the line, e.g. "model".
            below: of that below it, e.g. "dense".

        Raises:
            ValueError: no such arm.
        """
        known = [*self.arms, AGAIN]
        for name in (above, below):
            if name not in known:
                raise ValueError(f"no arm {name!r}; expected one of {', '.join(known)}")
        latency, latency_said = self._judged(
            self.rounds_s, above, below, self.latency_limit, self.aa.latency
        )
        energy, energy_said = self._judged(
            self.rounds_j, above, below, self.energy_limit, self.aa.energy
        )
        cpu_time = self._plain(self.rounds_cpu_s, above, below, self.latency_limit)
        return Ratio(latency, energy, cpu_time, latency_said, energy_said)

    def split(self) -> Split | Unavailable:
        """Value and structure apart, where the arms dense, masked and random were measured."""
        missing = [name for name in ("dense", "masked", "random") if name not in self.arms]
        if missing:
            return Unavailable(f"the split needs the arm(s) {', '.join(missing)}")
        name = self.model.name
        return Split(
            self.ratio("masked", "dense"), self.ratio(name, "masked"), self.ratio(name, "random")
        )

    def _plain(
        self, rounds: Mapping[str, Floats], above: str, below: str, limit_rel: float
    ) -> Figure:
        if self.invalid:
            return Unavailable(self.invalid)
        for name in (above, below):
            if name in self.arms and self.arms[name].error:
                return Unavailable(f"{name}: {self.arms[name].error}")
            if name not in rounds:
                return Unavailable(self.energy_reason or f"{name} was not measured")
        seed = int(self.settings["seed"])
        return of_ratio(rounds[above], rounds[below], limit_rel, seed)

    def _judged(
        self, rounds: Mapping[str, Floats], above: str, below: str, limit_rel: float, aa: Figure
    ) -> tuple[Figure, str]:
        found = self._plain(rounds, above, below, limit_rel)
        if isinstance(found, Unavailable):
            return found, ""
        # The comparisons that were set up: the model with every other arm.
        main = self.model.name
        others = [n for n in self.arms if n != main and n in rounds]
        family = {n: p_value(rounds[main], rounds[n]) for n in others}
        partner = {above, below} - {main}
        name = next(iter(partner), "")
        if main in (above, below) and name in family:
            p = holm(family)[name]
        else:
            p = min(1.0, max(1, len(family)) * p_value(rounds[above], rounds[below]))
        itself = aa if isinstance(aa, Estimate) else None
        return found, verdict(found, p, limit_rel, itself)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: figures of the model, its ratio to the first other arm, all arms, all ratios."""
        main, *others = self.arms
        nothing = Unavailable("nothing to compare with was given (against)")
        first = (
            self.ratio(main, others[0]).to_dict() if others else Ratio(*(nothing,) * 3).to_dict()
        )
        split = self.split()
        return {
            **self.model.to_dict(),
            "ratio": {"against": others[0] if others else None, **first},
            "ratios": {name: self.ratio(main, name).to_dict() for name in others},
            "split": None if isinstance(split, Unavailable) else split.to_dict(),
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "aa": self.aa.to_dict() | {"ok": self.aa_ok},
            "noise_rel": list(self.noise_rel),
            "rounds": {
                "latency_s": {name: v.tolist() for name, v in self.rounds_s.items()},
                "cpu_time_s": {name: v.tolist() for name, v in self.rounds_cpu_s.items()},
                "energy_j": {name: v.tolist() for name, v in self.rounds_j.items()},
            },
            "discarded": [list(entry) for entry in self.discarded],
            "invalid": self.invalid or None,
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "seconds": dict(self.seconds),
            "provenance": dict(self.provenance),
        }

    def __str__(self) -> str:
        """A table of at most 100 columns, and what to know of it."""
        return told.text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return told.html_text(self)
