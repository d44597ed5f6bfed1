"""The entry in a diffusers config that says what shape a model was pruned to.

It stands under `quantization_config`, the one key that stock diffusers refuses to overlook: without
hwprune imported, `from_pretrained` stops at "Unknown quantization type, got hwprune" instead of filling a
missing block with random numbers. With hwprune imported the model opens as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hwprune.spec import VERSION, CheckpointError, check_shape

KEY, METHOD = "quantization_config", "hwprune"


class PrunedConfig(dict[str, Any]):
    """The checked entry; a plain dict for JSON, with what diffusers asks of such a config.

    Attributes:
        quant_method: the name diffusers looks up.
    """

    quant_method = METHOD

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> PrunedConfig:
        """Check an entry read from a file.

        Raises:
            CheckpointError: unknown version, or no table of sizes.
        """
        version = entry.get("version")
        if version != VERSION or isinstance(version, bool):
            raise CheckpointError(
                f"config.json: version {str(version)[:40]} of the hwprune entry is unknown, expected "
                f"{VERSION}; upgrade hwprune to open files of a newer one"
            )
        shape = entry.get("shape")
        check_shape(shape)
        assert isinstance(shape, dict)
        if not shape:
            raise CheckpointError("config.json: the hwprune entry has an empty shape; leave it out")
        return cls(entry)

    def to_dict(self) -> dict[str, Any]:
        """A plain copy."""
        return dict(self)

    to_diff_dict = to_dict  # what some versions of diffusers call for printing


def pruned_entry(config: Mapping[str, Any] | None) -> PrunedConfig | None:
    """Our entry in a diffusers config, checked; None where the model is dense or quantised.

    Raises:
        CheckpointError: it is there, and is not as expected.
    """
    entry = (config or {}).get(KEY)
    if not isinstance(entry, Mapping) or entry.get("quant_method") != METHOD:
        return None
    return PrunedConfig.from_dict(entry)


def note_shape(model: nn.Module, shape: Mapping[str, Mapping[str, Any]]) -> None:
    """Write into a model's config what shape it has now, so that `save_pretrained` tells.

    Args:
        model: a realised denoiser; one without diffusers' config is left alone.
        shape: from `realise_coupled_`; added to that of an earlier pruning.

    Raises:
        ValueError: an earlier pruning removed blocks, so that names have moved.
    """
    register = getattr(model, "register_to_config", None)
    if register is None:
        return
    before = pruned_entry(getattr(model, "config", None))
    earlier = dict(before["shape"]) if before is not None else {}
    check_names_stand(model)
    whole = {**earlier, **{name: dict(entry) for name, entry in shape.items()}}
    gone = [name for name, entry in whole.items() if entry["type"] == "removed"]
    whole = {
        name: entry
        for name, entry in whole.items()
        if not any(name.startswith(f"{block}.") for block in gone)
    }
    entry = {"quant_method": METHOD, "version": VERSION, "shape": whole}
    register(**{KEY: PrunedConfig(entry)})


def check_names_stand(model: nn.Module) -> None:
    """Refuse to prune again a model whose blocks were renumbered by an earlier pruning.

    Raises:
        ValueError: naming the first block that went.
    """
    before = pruned_entry(getattr(model, "config", None))
    gone = [n for n, e in (before or {"shape": {}})["shape"].items() if e["type"] == "removed"]
    if gone:
        raise ValueError(
            f"{gone[0]} was removed from this model before, so its blocks have new numbers; prune the dense "
            "model once with everything"
        )
