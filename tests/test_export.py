"""Realised models go where dense ones go: torch.compile, torch.export, ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwprune.realise import realise_
from hwprune.units import Mask

timm = pytest.importorskip("timm")

from hwprune.families import timm_vit  # noqa: E402 - needs timm


def realised(*, empty: bool = False) -> tuple[nn.Module, Tensor]:
    """A tiny ViT with fewer heads, narrower q/k and v, fewer neurons; one branch emptied if asked."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    units = timm_vit.find_units(model)
    mask: Mask = {}
    for u in units:
        mask[u.name] = torch.arange(u.count) < {"head": 2, "qk": 4, "vo": 6, "neuron": 40}[u.kind]
    if empty:
        mask["blocks.0.mlp:neuron"] = torch.zeros(96, dtype=torch.bool)
        mask["blocks.1.attn:head"] = torch.zeros(3, dtype=torch.bool)
    realise_(model, units, mask)
    return model, torch.randn(2, 3, 16, 16)


def tiled() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = timm_vit.example()
    units = timm_vit.find_units(model, ["block"], block=(20, 24))
    mask = {u.name: torch.rand(u.shape) < 0.5 for u in units}
    realise_(model, units, mask)
    return model, x


MODELS = {"structured": realised, "emptied": lambda: realised(empty=True), "tiles": tiled}
each_model = pytest.mark.parametrize("which", MODELS)


@each_model
def test_a_realised_model_compiles_without_a_graph_break(which: str) -> None:
    model, x = MODELS[which]()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_realised_model_compiles_for_training_too() -> None:
    model, x = realised()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


@each_model
def test_an_exported_program_computes_the_same_at_another_batch_size(which: str) -> None:
    model, x = MODELS[which]()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        more = torch.cat([x, x, x])
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@each_model
def test_onnx_runtime_computes_the_same(which: str, tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(
            needed, reason=f"{needed} is not installed: pip install hwprune[export]"
        )
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = MODELS[which]()
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        expected = model(x).numpy()
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
