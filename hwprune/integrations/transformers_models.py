"""Lets transformers' own `from_pretrained` open pruned vision encoders.

A pruned model's config has an entry where transformers looks for a quantisation. We register what handles it:
it names the file of the weights, gives the empty model its pruned shape and then steps back, so that the
model is a plain one afterwards. Models without our entry pass through untouched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hwprune import shards
from hwprune.pruned_config import METHOD, PrunedConfig
from hwprune.spec import CheckpointError
from hwprune.transformers_checkpoint import STEM, check_agreement, note_entry, shape_


def register() -> None:
    """Make transformers know our config entry; does nothing a second time."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = _shaper(HfQuantizer)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PrunedConfig


def _shaper(base: Any) -> Any:
    """The class transformers makes one of where a config has our entry."""

    # Only transformers decides what it passes, hence **given.
    class Shaper(base):  # type: ignore[misc]
        """Gives an empty dense model its pruned shape; quantises nothing."""

        def update_attn_implementation(self, config: Any) -> Any:
            """Called with the config before the weights are looked for: name their file."""
            file = self.quantization_config.get("file")
            if file is not None:
                if file not in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"):
                    raise CheckpointError(
                        f"config.json: unknown file of weights {str(file)[:80]!r}"
                    )
                config.transformers_weights = file
            return config

        def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
            entry: PrunedConfig = self.quantization_config
            shape = _named_for(model, entry["shape"])
            with torch.device(
                "cpu"
            ):  # from_pretrained makes everything on the meta device, indices too
                shape_(model, shape, type(model).__name__)
            files = [Path(file) for file in given.get("checkpoint_files") or ()]
            if files and all(file.name.startswith(STEM) for file in files):
                stored, headers = shards.read_headers(files[0].parent, STEM)
                check_agreement(entry, headers, files[0].parent)
                expected = model.state_dict() if shape == entry["shape"] else {}
                wrong = [
                    name
                    for name, tensor in expected.items()
                    if name.startswith(tuple(f"{layer}." for layer in shape))
                    and (name not in stored or stored[name].shape != tuple(tensor.shape))
                ]
                if wrong:
                    raise CheckpointError(
                        f"{files[0].parent}: {wrong[0]} is missing from the file or of another shape; save the "
                        "model again"
                    )

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            entry: PrunedConfig = self.quantization_config
            note_entry(model, {**entry, "shape": _named_for(model, entry["shape"])})
            for name in ("hf_quantizer", "quantization_method"):
                vars(model).pop(name, None)
            model.is_quantized = False
            for module in model.modules():
                if hasattr(module, "config"):
                    vars(module.config).pop("_is_quantized", None)

        def is_serializable(self, **_: Any) -> bool:
            """`save_pretrained` writes the entry with the config."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Nothing is quantised."""
            return True

    return Shaper


def _named_for(model: nn.Module, shape: dict[str, Any]) -> dict[str, Any]:
    """The shape in the names of this class: an encoder opens the file of its classifier too, and back."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inner = hasattr(model, prefix[:-1])
    if inner and not any(name.startswith(prefix) for name in shape):
        return {f"{prefix}{name}": entry for name, entry in shape.items()}
    if not inner and all(name.startswith(prefix) for name in shape):
        return {name.removeprefix(prefix): entry for name, entry in shape.items()}
    return shape
