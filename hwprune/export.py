"""A model as a file for other runtimes: ONNX, or torch's own exported program; checked before it is kept.

What was written is opened and run beside the model, at several batch sizes where the batch may vary. A file
that disagrees is removed, never left behind.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hwprune.images import input_size
from hwprune.layers import BlockSparseLinear
from hwprune.statistics import model_output
from hwprune.transformers_base import is_transformers

Kind: TypeAlias = Literal["onnx", "torch-export"]
Runs: TypeAlias = Callable[[Tensor], Tensor]

SUFFIX: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
# Of the largest output: fp32 sums in another order differ by 1e-6 to 1e-5 on ViTs; a wrong graph by far more.
TOLERANCE = 1e-3
_ONNX_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
_TILES = {
    "onnx": "ONNX knows no tiles: they are dense weights with zeros there, as slow and large as those were; "
    "head, neuron, qk and vo make ONNX models faster",
    "torch-export": "its tiles are operations of hwprune: import hwprune.layers before torch.export.load",
}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class ExportError(ValueError):
    """The exported file does not compute what the model does, or cannot be made."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        file: where it is.
        format: onnx or torch-export.
        bytes: its size.
        batch: images of a call, or "dynamic".
        input_shape: of one image.
        batches: sizes it was checked at.
        max_error: largest absolute difference to the model's output there.
        max_output: largest absolute output of the model.
        notes: what is needed to run it.
    """

    file: str
    format: str
    bytes: int
    batch: int | str
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    max_error: float
    max_output: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **asdict(self),
            "input_shape": list(self.input_shape),
            "batches": list(self.batches),
        }


def export(
    model: nn.Module, out: str | Path, *, to: Kind, batch: int | Literal["dynamic"] = "dynamic"
) -> Exported:
    """Write a vision transformer as a file, and check that it computes the same.

    Args:
        model: of timm or transformers, dense or pruned, in float32; unchanged. Of transformers the file gives
            the logits, else the projected image, else the pooled one, else all tokens side by side.
        out: the file; replaced whole if it is there.
        to: onnx, or torch-export (a .pt2 file).
        batch: images of a call, or "dynamic" = any number.

    Raises:
        ExportError: torch cannot export it, or the file computes something else; nothing is left behind.
        ValueError: an unknown format, a batch below 1, a model too large for ONNX.
        ModuleNotFoundError: packages for ONNX are not installed.
        OSError: the file cannot be written.
    """
    if to not in SUFFIX:
        raise ValueError(f"--to: expected {' or '.join(SUFFIX)}, got {to!r}")
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"--batch: expected a number of at least 1, or dynamic, got {batch!r}")
    path = Path(out)
    _check(model, path, to)
    net = copy.deepcopy(model).eval().cpu()
    shape = tuple(input_size(net))
    if is_transformers(net):
        net = _OneTensor(net)
    sizes = (2, 1, 5) if batch == "dynamic" else (int(batch),)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, *shape, generator=generator) for size in sizes]
    fresh = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with torch.no_grad():
            runs = _written(net, inputs[0], fresh, to, batch == "dynamic")
            error, largest = _compare(net, runs, inputs)
        fresh.replace(path)
    finally:
        for left in path.parent.glob(f"{fresh.name}*"):  # and data beside it
            left.unlink(missing_ok=True)
    sparse = any(isinstance(module, BlockSparseLinear) for module in net.modules())
    notes = (_TILES[to],) if sparse else ()
    size = path.stat().st_size
    return Exported(str(path), to, size, batch, shape, sizes, error, largest, notes)


class _OneTensor(nn.Module):
    """A model of transformers that gives the one tensor of its answer that counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] -> [B, C]."""
        return model_output(self.model, images)


def _check(model: nn.Module, path: Path, to: str) -> None:
    """Refuse what cannot work, before the work."""
    types = {p.dtype for p in model.parameters()}
    if types - {torch.float32}:
        raise ValueError(
            f"expected a model in float32, got {', '.join(sorted(map(str, types)))}; model.float() first"
        )
    if not path.parent.is_dir() or path.is_dir():
        what = "is a folder" if path.is_dir() else f": no such folder {path.parent}"
        raise FileNotFoundError(f"--out {path} {what}; name a file in a folder that exists")
    if to != "onnx":
        return
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install 'hwprune[export]'"
        )
    size = sum(p.nbytes for p in model.parameters())
    if size > _ONNX_BYTES:
        raise ValueError(
            f"{size / 1e9:.1f} GB of weights do not fit into one ONNX file (2 GB); use --to torch-export"
        )


def _written(net: nn.Module, x: Tensor, fresh: Path, to: str, dynamic: bool) -> Runs:
    """Export to a file; returns what runs that file."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None
    try:
        with _quietly():
            if (
                to == "onnx"
            ):  # of the model, not of a program of it: tiles then know what becomes of them
                torch.onnx.export(
                    net,
                    (x,),
                    fresh,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=["images"],
                    output_names=["output"],
                    verbose=False,
                    external_data=False,
                )
                return _onnx_runtime(fresh)
            program = torch.export.export(net, (x,), dynamic_shapes=shapes)
            torch.export.save(program, fresh)
            module = torch.export.load(fresh).module()
    except (OSError, ImportError):
        raise
    # torch raises of its own classes, a dozen of them, where a graph cannot be had.
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"cannot be exported: {type(error).__name__}: {said}") from error
    return lambda given: module(given)


def _onnx_runtime(file: Path) -> Runs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(file), sess_options=options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(given: Tensor) -> Tensor:
        (found,) = session.run(None, {name: given.numpy()})
        return torch.from_numpy(found)

    return run


def _compare(net: nn.Module, runs: Runs, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference and largest output over all inputs.

    Raises:
        ExportError: they differ by more than the tolerance, or in shape, or are not finite.
    """
    worst, largest = 0.0, 0.0
    for x in inputs:
        expected = net(x)
        if not isinstance(expected, Tensor):
            raise ExportError(
                f"the model returns a {type(expected).__name__}, expected one tensor; wrap it in a module that "
                "returns the part you need, and use torch.export.export on that"
            )
        try:
            got = runs(x)
        except Exception as error:  # a runtime's own classes
            said = " ".join(str(error).split())[:300]
            raise ExportError(f"what was written does not run at batch {len(x)}: {said}") from error
        if got.shape != expected.shape:
            raise ExportError(
                f"what was written gives {tuple(got.shape)} at batch {len(x)}, the model "
                f"{tuple(expected.shape)}"
            )
        off = float((got.double() - expected.double()).abs().max())
        size = float(expected.double().abs().max())
        if not off <= TOLERANCE * max(size, 1e-6):
            raise ExportError(
                f"what was written computes something else: it differs by {off:.3g} at batch {len(x)}, where "
                f"outputs go to {size:.3g} (allowed {TOLERANCE:g} of that); it was removed, please report this "
                "model"
            )
        worst, largest = max(worst, off), max(largest, size)
    return worst, largest


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter talks of each of its passes; what goes wrong is an error here."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
