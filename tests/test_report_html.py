"""Reports in a notebook: a small table whose every word is text."""

from __future__ import annotations

from typing import Any

from hwprune.diffusion_report import DiffusionReport
from hwprune.report import Report

COMMON: dict[str, Any] = {
    "budget": {"latency": "<b>4.2ms</b>"},
    "kinds": ("head",),
    "macs": 6e6,
    "params": 600_000,
    "dense_macs": 10e6,
    "dense_params": 1_000_000,
    "layers": (),
    "seconds": {"learn": 1.0},
    "warnings": ("<script>alert(1)</script>",),
}


def test_a_report_is_a_table_in_a_notebook() -> None:
    ratio = {"value": 0.61, "lo": 0.6, "hi": 0.62}
    vision = Report(
        **COMMON,
        distortion={"measured": 0.1, "predicted": 0.2, "unit": "nats"},
        calibration={"images": 4},
        on_device={"measured": {"latency_ratio": ratio, "energy_ratio": None}},
    )
    far = {"held": 0.1, "held_se": 0.01, "relative": 0.02, "check": 0.1, "unrepaired": 0.2}
    diffusion = DiffusionReport(
        **COMMON,
        method="ours",
        distance=far,
        sampling={"steps": 8},
        images={"held": 16},
        learning={"settled": True},
    )
    for report, said in ((vision, "0.610 [0.600, 0.620]"), (diffusion, "16 held-out images")):
        text = report._repr_html_()
        assert "<td>10.00 M</td><td>6.00 M</td><td>0.600</td>" in text and said in text
        assert "<script" not in text and "&lt;script&gt;" in text and "<b>" not in text
        assert text.count("<tr>") == text.count("</tr>") == 3
        assert repr(report) == str(report) and len(repr(report).splitlines()) < 8
