"""Folders of compact models that Hugging Face transformers opens without this package."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sparsekern.compact import Plan, compact
from sparsekern.compact.verify import as_arguments, leaves, mode
from sparsekern.configs import Unsayable, fitted, layer_widths
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.atomic import new_folder
from sparsekern.nn.held_factor import holds_factors
from sparsekern.prune.decide.roles import role_name

__all__ = ["layer_widths", "save_pretrained"]


def save_pretrained(
    small: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a compact model to a folder that transformers opens without this package.

    ``AutoModelForCausalLM.from_pretrained(folder)``, or the class that fits, gives the same outputs, bit by
    bit. The sizes of the configuration follow from the tensors of the model: hidden size, heads, key-value
    heads, size of a head, intermediate size, layers; and so do epsilons of norms. The folder gets its name
    only after the model in it was opened and has given the outputs of ``small`` on the example inputs, in
    evaluation mode.

    Args:
        small: a ``PreTrainedModel`` as :meth:`sparsekern.Pruner.compact` or :func:`sparsekern.prune_once`
            gives it. It stays as it is.
        folder: a new or an empty folder.
        example_inputs: as for :class:`sparsekern.Pruner`, and so are ``example_kwargs``. Without both, token
            ids or an image of the sizes in the configuration.

    Raises:
        TypeError: ``small`` is not a ``PreTrainedModel``.
        ValueError: the configuration cannot say a width, for example because layers differ; or a model that
            is made from it computes something else. The text names the layers and the way out.
        OSError: the folder has files or cannot be written. There is no folder after any exception.
    """
    small = _plain(small)
    args, kwargs = _arguments(small, example_inputs, example_kwargs)
    config = _configuration(small)
    expected = _outputs(small, args, kwargs)
    with new_folder(folder) as temporary, _quietly():
        stock = _shell(type(small), config, small)
        stock.save_pretrained(temporary)
        loaded = _opened(type(small), temporary, small)
        _check(small, loaded, expected, _outputs(loaded, args, kwargs))


def _plain(small: nn.Module) -> PreTrainedModel:
    """The model inside its wrappers, with the weights that it computes with."""
    small = unwrap(small)
    if isinstance(small, PreTrainedModel) and holds_factors(small):
        small = compact(small, Plan({}))
    if not isinstance(small, PreTrainedModel):
        raise TypeError(f"small: got {type(small).__name__}, expected a transformers PreTrainedModel")
    return small


def _configuration(small: PreTrainedModel) -> Any:
    """The configuration that makes a model of the sizes of ``small``.

    Raises:
        ValueError: there is none; the text names the way out.
    """
    try:
        config = fitted(type(small), small.config, small)
    except Unsayable as error:
        raise ValueError(f"small: {error.text}; {_way_out(small, error)}") from None
    try:
        if callable(getattr(config, "validate", None)):
            config.validate()
    except Exception as error:
        # The checks of a family may raise anything; they run again when transformers reads the file.
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"small: got sizes that {type(config).__name__} refuses: {reason}; prune with equal='role', "
            f"which keeps to the widths that the configuration accepts"
        ) from None
    return config


def _shell(kind: type[PreTrainedModel], config: Any, small: PreTrainedModel) -> PreTrainedModel:
    """A model made from ``config`` with the tensors of ``small``, which are not copied."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        stock = kind(copy.deepcopy(config))
    stock.load_state_dict(small.state_dict(), assign=True)
    stock.tie_weights()
    if getattr(small, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(small.generation_config)
    return stock


def _opened(kind: type[PreTrainedModel], folder: Path, small: PreTrainedModel) -> PreTrainedModel:
    """The model that transformers makes of a folder, with the attention functions of ``small``."""
    attention = getattr(small.config, "_attn_implementation", None)
    options: dict[str, Any] = {"attn_implementation": attention} if isinstance(attention, str) else {}
    first = next(small.parameters())
    loaded: Any = kind.from_pretrained(folder, dtype=first.dtype, local_files_only=True, **options)
    opened: PreTrainedModel = loaded.to(first.device)
    return opened


def _check(small: nn.Module, loaded: nn.Module, expected: list[Any], found: list[Any]) -> None:
    """Check that two models gave the same outputs, bit by bit.

    Raises:
        ValueError: they did not; the text names what the models keep besides their parameters and differs.
    """
    same = len(expected) == len(found) and all(map(_same, expected, found))
    ours, theirs = dict(small.named_parameters()), dict(loaded.named_parameters())
    if same and ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours):
        return
    apart = [
        f"{name} is {mine} and there {other}"
        for (name, mine), (_, other) in zip(_kept(small), _kept(loaded), strict=False)
        if not _same(mine, other)
    ]
    why = "; ".join(apart[:3]) or "the values that it computes with differ"
    raise ValueError(
        f"small: got outputs that a {type(small).__name__} of its configuration does not repeat: {why}; this "
        f"family computes with a width in another way than by its tensors, so keep that width: pass the "
        f"modules that hold it to the Pruner's protect, or save the model with sparsekern.save"
    )


def _kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules compute with besides parameters: buffers of one element and real numbers, by name."""
    for prefix, module in sorted(model.named_modules()):
        for name, value in sorted(
            (*vars(module).items(), *module._buffers.items()), key=lambda item: item[0]
        ):
            if type(value) is float or (isinstance(value, Tensor) and value.numel() == 1):
                yield f"{prefix}.{name}", value if isinstance(value, float) else value.item()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and (not isinstance(one, (bool, int, float, str)) or one == other)


@torch.no_grad()
def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors and numbers that a model gives in evaluation mode."""
    with mode(model, training=False):
        return [leaf for _, leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, (Tensor, int, float))]


def _arguments(
    model: PreTrainedModel, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword arguments of a forward pass; without examples, token ids or an image."""
    if example_inputs is not None or example_kwargs:
        return as_arguments(() if example_inputs is None else example_inputs, example_kwargs)
    config, device = model.config, next(model.parameters()).device
    name, made = model.main_input_name, dict[str, Any]()
    if name == "input_ids":
        words: Any = model.get_input_embeddings()
        size = words.weight.shape[0]
        made[name] = torch.arange(12, device=device).reshape(2, 6) * 7 % size
        if config.is_encoder_decoder:
            made["decoder_input_ids"] = made[name][:, :4]
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        side, colours = config.image_size, getattr(config, "num_channels", 3)
        pixels = torch.linspace(-1, 1, 2 * colours * side * side, device=device)
        made[name] = pixels.sin().reshape(2, colours, side, side).to(model.dtype)
    else:
        raise ValueError(
            f"example_inputs: got None for a {type(model).__name__}, which reads {name}, expected the "
            f"arguments of a forward pass"
        )
    return (), made


def _way_out(small: nn.Module, error: Unsayable) -> str:
    """What to do, for a configuration that cannot say the widths of a model."""
    usual, unusual = ([(role_name(small, n), dim) for n, dim in side] for side in error.sides())
    if set(usual).intersection(unusual):
        return "prune with equal='role', which keeps the same part of every layer as wide"
    modules = dict.fromkeys(role.rpartition(".")[0] or role for role, _ in unusual or usual)
    return (
        f"the configuration has no field for these widths alone, so prune with protect={list(modules)[:4]}, "
        f"or save the model with sparsekern.save"
    )


class _quietly:
    """Without progress bars and advice of transformers."""

    def __enter__(self) -> None:
        self._level, self._bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self._level)
        if self._bar:
            logging.enable_progress_bar()
