"""Widths of every layer, for formats whose metadata can hold one number for each layer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from sparsekern.configs.depth import with_depth
from sparsekern.configs.fields import Skeleton, changed, class_of, fields_of, value_of
from sparsekern.configs.fit import Fit, Unsayable, opened

_NAMES = {
    "embedding_length": ("hidden_size", "d_model", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim", "d_kv"),
}
# Those that may be a list with a number for each layer.
_LISTS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")


def layer_widths(model: nn.Module) -> dict[str, Any]:
    """The widths of a decoder, as GGUF metadata name them, with one number or a number for each layer.

    Args:
        model: a compact model with a configuration and one list of layers.

    Returns:
        ``{family}.{key}`` for the keys ``block_count``, ``embedding_length``, ``feed_forward_length``,
        ``attention.head_count``, ``attention.head_count_kv`` and ``attention.key_length`` that the
        configuration has. The second to fourth widths are a list where layers differ.

    Raises:
        ValueError: the model has several lists of layers, or a width that this table cannot hold.
    """
    kind, want = class_of(model), Skeleton.of(model)
    config = with_depth(kind, model.config, want)
    path, layers = _layers(want, config)
    config = opened(kind, config, want)
    fit = Fit(kind, config)
    values: dict[str, list[int]] = defaultdict(list)
    for index in range(layers):
        one = _without_others(want, path, index)
        numbers = fit.numbers(one)
        if missing := Skeleton.made(kind, changed(config, numbers)).differing(one):
            absent = {p: float(s) for p, (_, s) in missing.items() if not _elsewhere(p[0], path, index)}
            if absent:
                raise Unsayable("", absent, type(config).__name__)
        for field in fields_of(config, int):
            values[field].append(numbers.get(field, value_of(config, field)))
    return _named(type(config).__name__, config.model_type, layers, values)


def _layers(skeleton: Skeleton, config: Any) -> tuple[str, int]:
    """Name and length of the list of layers."""
    counts = {value_of(config, field) for field in fields_of(config, int)}
    lists = [
        name
        for name, length in skeleton.lengths.items()
        if isinstance(skeleton.module.get_submodule(name), nn.ModuleList) and length in counts
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"model: got {len(outer)} lists of layers in a {type(skeleton.module).__name__}, expected one"
        )
    return outer[0], skeleton.lengths[outer[0]]


def _elsewhere(name: str, path: str, index: int) -> bool:
    """Whether a tensor belongs to another layer than that of this index."""
    return name.startswith(f"{path}.") and not name.startswith(f"{path}.{index}.")


def _without_others(skeleton: Skeleton, path: str, index: int) -> Skeleton:
    """The skeleton without the tensors of all layers but one."""
    shapes = {name: shape for name, shape in skeleton.shapes.items() if not _elsewhere(name, path, index)}
    return Skeleton(shapes, {}, skeleton.module)


def _named(family: str, prefix: str, layers: int, values: dict[str, list[int]]) -> dict[str, Any]:
    table: dict[str, Any] = {f"{prefix}.block_count": layers}
    names = {field: key for key, fields in _NAMES.items() for field in fields}
    for field, numbers in values.items():
        key, uniform = names.get(field), len(set(numbers)) == 1
        if not uniform and key not in _LISTS:
            raise Unsayable(field, {(f"layer {i}", 0): float(n) for i, n in enumerate(numbers)}, family)
        if key is not None:
            table[f"{prefix}.{key}"] = numbers[0] if uniform else numbers
    return table
