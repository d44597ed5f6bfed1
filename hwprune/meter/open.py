"""Opens the sensor that a name means: NVIDIA, AMD or CPU."""

from __future__ import annotations

import re

from hwprune.meter.clock import Clock
from hwprune.meter.estimate import Unavailable
from hwprune.meter.nvml import open_nvml
from hwprune.meter.nvml_device import FORMS, cuda_device, is_nvidia
from hwprune.meter.rapl import open_rapl
from hwprune.meter.rocm import open_rocm
from hwprune.meter.source import EnergySource


def open_source(spec: object, *, clock: Clock | None = None) -> EnergySource | Unavailable:
    """Opens a sensor; `Unavailable` with the reason where there is none.

    Args:
        spec: "cuda:0" or a torch.device (found by UUID or PCI address, not by index), "nvml:0",
            "GPU-<uuid>", a PCI address, "rocm:0", or "rapl" (also "cpu"): the CPU packages.
        clock: a test's own.

    Raises:
        ValueError: a name of no known form.
    """
    name = str(spec)
    if name in ("rapl", "cpu"):
        return open_rapl(clock)
    if re.fullmatch(r"rocm(:\d+)?", name):
        return open_rocm(name, clock)
    if not is_nvidia(name):
        raise ValueError(f"expected a device as {FORMS}, got {name!r}")
    if name.startswith("cuda") and _torch_is_for_rocm():
        index = name.partition(":")[2]
        found = cuda_device(int(index) if index else None)
        if isinstance(found, Unavailable):
            return found
        if found.pci is None:
            return Unavailable(f"torch does not tell the PCI address of {name}; name it as rocm:0")
        return open_rocm(name, clock, found.pci)
    return open_nvml(name, clock)


def _torch_is_for_rocm() -> bool:
    """Whether torch calls AMD GPUs cuda."""
    import torch

    return torch.version.hip is not None
