"""Networks as folders with a model card, and their way to and from the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import sparsekern
from sparsekern._load import load
from sparsekern.compact import Plan, plan_of, save
from sparsekern.compact.store import read
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.atomic import check_name, opened, parse_json, replacing
from sparsekern.files.schema import NOTHING, PLAIN, TEXT, Either, Entries, Fields, Kind, OneOf, Whole

FORMAT = "sparsekern.folder"
VERSION = 1
MODEL, PLAN, SETTINGS, CARD = "model.safetensors", "plan.json", "sparsekern.json", "README.md"
FILES = (MODEL, PLAN, SETTINGS, CARD)

# Largest text to read in bytes.
_LARGEST = 64 << 20
# Tensors that the card lists; a plan may have thousands.
_MOST_ROWS = 200

_SETTINGS = Fields(
    {
        "format": OneOf((FORMAT,)),
        "version": OneOf((VERSION,)),
        "class": TEXT,
        "sha256": TEXT,
        "parameters": Fields({"before": Whole(0), "after": Whole(0)}),
        "factory": Either((Kind(dict), NOTHING)),
        "settings": Entries(TEXT, Either((PLAIN, Kind(dict), Kind(list)))),
        "figures": Entries(TEXT, PLAIN),
        "controls": Entries(TEXT, Entries(TEXT, PLAIN)),
        "licence": Either((TEXT, NOTHING)),
        "sparsekern": TEXT,
    }
)


class Folder(NamedTuple):
    """What a folder holds besides the network.

    Attributes:
        plan: the indices of the original network that stay.
        factory: what says how the full-size network is made, as for ``made_by`` of :func:`sparsekern.save`.
        settings: how the network was trained.
        figures: measured numbers by name.
        controls: the same numbers of other networks, by their names.
        licence: identifier of the licence, such as ``apache-2.0``.
    """

    plan: Plan
    factory: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    controls: Mapping[str, Mapping[str, Any]]
    licence: str | None


def save_folder(
    network: nn.Module,
    folder: str | os.PathLike[str],
    *,
    factory: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    licence: str | None = None,
) -> None:
    """Write a network with its plan, its settings and a model card to a folder.

    The files are ``model.safetensors`` (see :func:`sparsekern.save`), ``plan.json``, ``sparsekern.json`` and
    ``README.md``. ``sparsekern.json`` comes last: a folder without it is not complete.

    Args:
        network: the network, compact or not.
        folder: the folder; it is made if it does not exist.
        factory: plain data that says how the full-size network is made. With that of a training of
            ``sparsekern train``, :func:`from_hub` needs no module.
        settings: plain data about the training.
        figures: measured numbers by name, such as ``{"Dice": 0.78, "latency (ms)": 4.1}``.
        controls: the same numbers of other networks by name, such as those of the dense network and of one
            whose channels were chosen at random.
        licence: identifier of the licence, as the Hub knows it.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed; the message names the extra.
        TypeError: ``network`` is not a module.
        ValueError: an argument is no plain data, or the folder has files of these names that this function
            did not write. Nothing is written.
        OSError: the folder cannot be written.
    """
    _require("folder")
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}, expected a torch.nn.Module")
    check_name(folder, "folder")
    network, place = unwrap(network), Path(folder)
    plan = plan_of(network)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(network).__qualname__,
        "sha256": "",
        "parameters": _parameters(network, plan),
        "factory": _plain(factory, "factory"),
        "settings": _plain(settings or {}, "settings"),
        "figures": _plain(figures or {}, "figures"),
        "controls": _plain(controls or {}, "controls"),
        "licence": licence,
        "sparsekern": sparsekern.__version__,
    }
    for name in ("settings", "figures", "controls", "licence"):
        _SETTINGS.required[name].check(about[name], name)
    card = _card(about, plan)
    _check_own(place)
    place.mkdir(parents=True, exist_ok=True)
    save(network, place / MODEL, made_by=factory)
    about["sha256"] = read(place / MODEL).metadata["sha256"]
    for name, text in ((PLAN, plan.to_json()), (CARD, card), (SETTINGS, json.dumps(about, indent=1) + "\n")):
        with replacing(place / name, "folder") as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_folder(folder: str | os.PathLike[str]) -> Folder:
    """What a folder of :func:`save_folder` holds besides the network.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or not of the same network as the others; names the folder.
    """
    return _read(Path(folder))


def from_hub(
    source: str | os.PathLike[str],
    module: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """The network of a folder of :func:`save_folder`, on this machine or on the Hugging Face Hub.

    No code from the folder is run, and nothing is imported that it names.

    Args:
        source: a folder, or ``owner/name`` of a repository on the Hub.
        module: the full-size network as its factory makes it; None if the factory is one of
            ``sparsekern train``. It stays as it is.
        revision: branch, tag or commit of the repository; None for its main branch.
        token: access token of the Hub; None for the one that its own tools have stored.

    Returns:
        The network; with ``module`` in the mode of ``module``, else in evaluation mode.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed; the message names the extra.
        OSError: a file cannot be read, or the Hub cannot be reached.
        ValueError: ``source`` is neither a folder nor a name of a repository, a file is damaged or not of the
            same network as the others, or ``module`` is another network.
    """
    check_name(source, "source")
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(os.fspath(source), revision, token)
    elif revision is not None:
        raise ValueError(f"revision: got {revision!r} for a folder, expected None")
    _read(folder)
    return load(folder / MODEL) if module is None else load(module, folder / MODEL)


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    message: str = "Add a pruned network",
    token: str | None = None,
) -> str:
    """Upload a folder of :func:`save_folder` to the Hugging Face Hub.

    Args:
        folder: the folder; only the files that :func:`save_folder` writes are uploaded.
        repository: ``owner/name``; it is made if it does not exist.
        private: whether a new repository is private.
        message: message of the commit.
        token: access token of the Hub; None for the one that its own tools have stored.

    Returns:
        The address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed; the message names the extra.
        OSError: a file cannot be read, or the Hub cannot be reached.
        ValueError: the folder is not complete, or the name is not valid. Nothing is uploaded.
    """
    _require("repository")
    import huggingface_hub

    _read(Path(folder))
    _check_repository(repository, "repository")
    hub = huggingface_hub.HfApi(token=token)
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_folder(
        repo_id=repository, folder_path=Path(folder), allow_patterns=list(FILES), commit_message=message
    )
    return str(commit.commit_url)


def _require(argument: str) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModuleNotFoundError(
            f"{argument}: needs huggingface_hub, expected it to be installed; run: "
            'pip install "sparsekern[hub]"',
            name="huggingface_hub",
        )


def _download(source: str, revision: str | None, token: str | None) -> Path:
    """The folder with the files of a repository."""
    _require("source")
    import huggingface_hub

    _check_repository(source, "source")
    return Path(
        huggingface_hub.snapshot_download(source, revision=revision, token=token, allow_patterns=list(FILES))
    )


def _check_repository(name: str, argument: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        fits = name.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        expected = "owner/name" if argument == "repository" else "a folder that exists, or owner/name"
        raise ValueError(f"{argument}: got {name!r}, expected {expected}")


def _plain(data: Mapping[str, Any] | None, argument: str) -> Any:
    """A copy of plain data, as JSON has it."""
    try:
        return json.loads(json.dumps(data if data is None else dict(data), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: got what is no plain data ({error}), expected what JSON can hold"
        ) from None


def _parameters(network: nn.Module, plan: Plan) -> dict[str, int]:
    """Number of parameter elements of the network, and of the one that the plan is for."""
    before = after = 0
    for name, parameter in network.named_parameters():
        part = plan.tensors.get(name)
        after += parameter.numel()
        size = 1
        for length in parameter.shape if part is None else part.shape:
            size *= length
        before += size
    return {"before": before, "after": after}


def _check_own(folder: Path) -> None:
    """Check that a file that would be replaced is one of an earlier call.

    Raises:
        ValueError: the folder is a file, or has other files of these names.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {os.fspath(folder)!r} is a file, expected a folder")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not (folder / SETTINGS).exists():
        raise ValueError(
            f"folder: {os.fspath(folder)!r} has {', '.join(there)} and no {SETTINGS}, expected an empty "
            "folder, or one that save_folder wrote"
        )


def _read(folder: Path) -> Folder:
    where = f"folder: {os.fspath(folder)!r}"
    try:
        about = _text(folder / SETTINGS)
        _SETTINGS.check(about, SETTINGS)
        plan_text = json.dumps(_text(folder / PLAN), sort_keys=True)
        stored = read(folder / MODEL)
        if stored.metadata["sha256"] != about["sha256"]:
            raise ValueError(f"{MODEL} is not the one that {SETTINGS} was written for")
        if plan_text != json.dumps(parse_json(stored.metadata["plan"]), sort_keys=True):
            raise ValueError(f"{PLAN} is not the plan of {MODEL}")
        if about["factory"] != stored.made_by:
            raise ValueError(f"{SETTINGS} names another factory than {MODEL}")
        plan = Plan.from_json(stored.metadata["plan"])
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}") from None
    names = ("factory", "settings", "figures", "controls", "licence")
    return Folder(plan, *(about[name] for name in names))


def _text(path: Path) -> Any:
    with opened(path, "folder") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{path.name} is longer than {_LARGEST} bytes")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None


def _card(about: Mapping[str, Any], plan: Plan) -> str:
    """The model card: what the network was, what stays, figures with controls, and how it is loaded."""
    import huggingface_hub

    head = huggingface_hub.ModelCardData(
        library_name="sparsekern", license=about["licence"], tags=["pruning", "pytorch"]
    )
    before, after = (about["parameters"][name] for name in ("before", "after"))
    lines = [
        "---",
        head.to_yaml().strip(),
        "---",
        "",
        f"# {about['class']}, pruned",
        "",
        f"A `{about['class']}` of {before:,} parameters, of which {after:,} stay "
        f"({after / max(before, 1):.1%}). Whole channels were removed: the network is dense, and an "
        "ordinary `torch.nn.Module`.",
        "",
        f"Licence: {about['licence'] or 'not stated'}. Made with sparsekern {about['sparsekern']}.",
        "",
        "## Use",
        "",
        "```python",
        "import sparsekern",
        "",
        f"network = sparsekern.from_hub(folder{'' if about['factory'] else ', full_size_network'})",
        "```",
        "",
        *_figures(about["figures"], about["controls"]),
        *_stays(plan),
    ]
    for title, name in (("Factory", "factory"), ("Settings", "settings")):
        if about[name]:
            lines += [f"## {title}", "", "```json", json.dumps(about[name], indent=1), "```", ""]
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a row for each figure and a column for this network and each control."""
    if not figures:
        return ["## Figures", "", "None were measured.", ""]
    names = [*controls]
    rows = [
        f"| {_cell(key)} | {_cell(value)} | "
        + "".join(f"{_cell(controls[n].get(key, ''))} | " for n in names)
        for key, value in figures.items()
    ]
    head = "| | this network | " + "".join(f"{_cell(name)} | " for name in names)
    note = [] if controls else ["No control was measured, such as channels chosen at random.", ""]
    return ["## Figures", "", head, "|---" * (2 + len(names)) + "|", *rows, "", *note]


def _stays(plan: Plan) -> list[str]:
    """A table of the tensors that lost indices."""
    if plan.removes_nothing:
        return ["## What stays", "", "Everything.", ""]
    cut = [(name, part) for name, part in plan.tensors.items() if part.new_shape != part.shape]
    rows = [
        f"| `{_cell(name)}` | {list(part.shape)} | {list(part.new_shape)} |"
        for name, part in cut[:_MOST_ROWS]
    ]
    rest = [f"{len(cut) - _MOST_ROWS} more tensors are in `{PLAN}`.", ""] if len(cut) > _MOST_ROWS else []
    return ["## What stays", "", "| tensor | was | is |", "|---|---|---|", *rows, "", *rest]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
