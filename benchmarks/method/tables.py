"""The report of the study, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.method.arms import ARMS
from benchmarks.method.sets import FOLDER, GENERATED
from benchmarks.method.statistics import Difference, describe

SETS = (FOLDER, *GENERATED)
Record = Mapping[str, Any]

# Arms that train for equally long.
EQUAL_TIME = (
    ("default-time", "dense"),
    ("default-time", "narrow-long"),
    ("default", "dense-time"),
    ("default", "narrow-time"),
)


class Table:
    """Lines of one network at one budget, by arm, set and seed.

    Lines of an older recipe are left out: the last recipe of the file counts for an arm. So are arms that
    have not run on all sets.

    Args:
        records: lines whose trainings may be compared.
        model, keep: the network and the budget.
        names: the arms in their order.
    """

    def __init__(
        self, records: Sequence[Record], model: str, keep: float, names: Iterable[str] = ARMS
    ) -> None:
        self.model, self.keep = model, keep
        own = [r for r in records if r["model"] == model and r["keep"] in (None, keep)]
        recipe = {r["arm"]: r["recipe"] for r in own}
        self.lines = {(r["arm"], r["set"], r["seed"]): r for r in own if r["recipe"] == recipe[r["arm"]]}
        self.sets = [name for name in SETS if any(name == key[1] for key in self.lines)]
        trained = {key[:2] for key in self.lines}
        self.arms = [arm for arm in names if all((arm, name) in trained for name in self.sets)]

    def values(self, arm: str, name: str, what: str) -> dict[int, float]:
        """A figure by seed."""
        return {
            seed: line[what] for (a, s, seed), line in sorted(self.lines.items()) if (a, s) == (arm, name)
        }

    def paired(self, arm: str, base: str, name: str, what: str = "dice") -> dict[int, float]:
        """`arm` minus `base` by seed, of the seeds that both have."""
        own, other = (self.values(one, name, what) for one in (arm, base))
        return {seed: own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())}

    def over_sets(self, differences: Sequence[Mapping[int, float]]) -> list[float]:
        """One number a seed: the mean over the sets, of the seeds that all sets have."""
        if not differences:
            return []
        seeds = sorted(set.intersection(*(set(one) for one in differences)))
        return [statistics.fmean(one[seed] for one in differences) for seed in seeds]


def report(
    records: Sequence[Record],
    times: Mapping[str, Any] | None = None,
    older: Sequence[Record] = (),
    tuning: str = "",
    picture: str = "",
) -> str:
    """All tables of `records`, and of `times` of their networks.

    Args:
        records: the lines of the study with its settings of now.
        times: what `--latency` has written.
        older: lines at the learning rate that all arms had before each got its own.
        tuning: tables of the tuning, as text.
        picture: name of the file with the picture of the budgets, shown where there are two.

    Raises:
        ValueError: there are no `records`.
    """
    if not records:
        raise ValueError("results: got no complete line, expected some; run the study first")
    parts = [_head([*records, *older])]
    for table in _tables(records):
        parts.append(f"## {table.model}, keep={table.keep:g} of the MACs")
        parts += [_scores(table), _claims(table), _equal_time(table)]
        parts.append(_costs(table, times["times"] if times else []))
    budgets = unets(records)
    if len(budgets) > 1:
        parts += [_curve(budgets), f"![Dice over the budget]({picture})" if picture else ""]
    if older:
        table = Table(older, "unet", 0.1)
        rate = older[0]["training"]["lr"]
        parts.append(f"## unet, keep=0.1, learning rate {rate:g} for all arms and sets")
        parts += [_scores(table), _claims(table)]
    parts.append(tuning)
    if times:
        parts.append(_timed(times["environment"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def unets(records: Sequence[Record]) -> list[Table]:
    """The tables of the UNet, one for each budget."""
    return [table for table in _tables(records) if table.model == "unet"]


def _tables(records: Sequence[Record]) -> list[Table]:
    pairs = {(r["model"], r["keep"]) for r in records if r["keep"] is not None}
    return [Table(records, *pair) for pair in sorted(pairs, key=_order)]


def _order(pair: tuple[str, float]) -> tuple[bool, float, float]:
    """The budget of the main claim first, then the others from wide to narrow."""
    return pair[0] != "unet", abs(pair[1] - 0.1) > 1e-9, -pair[1]


def _head(records: Sequence[Record]) -> str:
    machines = sorted({f"{r['machine']}, torch {r['torch']}, {r['threads']} thread" for r in records})
    commits = sorted({str(r["commit"]) for r in records})
    trainings = {r["model"]: r["training"] for r in records}
    lines = [
        "# The method: what pruning is worth",
        "",
        "Commands: `python -m benchmarks.method --data DIR`, then `--report`. Dice is the mean over the "
        "foreground classes, over all pixels of the held-out images together; void pixels do not count.",
        "Seeds are paired: all arms have the same first weights (where they have the same layers), order and "
        "augmentation. An entry `+0.010 [+0.002, +0.018]` is a mean difference with its 95 % percentile "
        "bootstrap interval over seeds. `all` is the mean over the sets, one number a seed, with the exact "
        "two-sided sign-flip probability. With six seeds the interval is rather too short, and the least "
        "possible probability is 0.03; neither is corrected for the number of comparisons.",
        "",
        *(f"* {model}: {_training(training)}" for model, training in sorted(trainings.items())),
        *(f"* {machine}" for machine in machines),
        f"* commits {', '.join(commits)}",
    ]
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> str:
    return (
        f"width {training['width']:g}, {training['steps']} steps of {training['batch']} crops of "
        f"{training['crop']}x{training['crop']} pixels, AdamW, weight decay {training['weight_decay']:g}"
    )


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _scores(table: Table) -> str:
    rows = []
    for arm in table.arms:
        cells, means = [], []
        for name in table.sets:
            found = list(table.values(arm, name, "dice").values())
            cells.append(f"{statistics.fmean(found):.4f} ({len(found)})" if found else "")
            means += [statistics.fmean(found)] if found else []
        whole = f"{statistics.fmean(means):.4f}" if len(means) == len(table.sets) else ""
        rows.append([arm, ARMS[arm].about, *cells, whole])
    return grid(["Dice (seeds)", "what it is", *table.sets, "all"], rows)


def _claims(table: Table) -> str:
    """The default minus each other arm."""
    others = [arm for arm in table.arms if arm != "default"]
    # First the comparison that a user asks for first.
    others.sort(key=lambda arm: arm != "narrow")
    rows = [row(table, other, "default", other) for other in others]
    return grid(["default minus", *table.sets, "all"], rows) if "default" in table.arms else ""


def _equal_time(table: Table) -> str:
    """Differences of arms that train for equally long, of those that were run; empty without them."""
    rows = [
        row(table, f"{arm} minus {base}", arm, base)
        for arm, base in EQUAL_TIME
        if arm in table.arms and base in table.arms
    ]
    return grid(["equal processor time of training", *table.sets, "all"], rows) if rows else ""


def row(table: Table, title: str, arm: str, base: str) -> list[str]:
    """Cells of `arm` minus `base`: of each set, and of their mean."""
    found = [table.paired(arm, base, name) for name in table.sets]
    whole = table.over_sets(found)
    return [title, *(cell(list(one.values())) for one in found), cell(whole, p=True)]


def cell(differences: Sequence[float], *, p: bool = False) -> str:
    """A mean difference with its interval, with `p` also its probability; the number of seeds if not 6."""
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.4f} (1 seed)"
    return _written(describe(differences), p)


def _written(found: Difference, p: bool) -> str:
    seeds = "" if found.count == 6 else f" ({found.count} seeds)"
    chance = f" p={found.p:.2f}" if p else ""
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{chance}{seeds}"


def _costs(table: Table, times: Sequence[Record]) -> str:
    """Means over seeds and sets; shares are of the dense network or training on the same set and seed."""
    rows = []
    for arm in table.arms:
        own = {key[1:]: line for key, line in table.lines.items() if key[0] == arm}
        line = [arm]
        for what in ("parameters", "macs", "activation_bytes", "processor_seconds", "steps"):
            line.append(_share(table, own, lambda record, what=what: float(record[what])))
        rows.append([*line, _latency(table, arm, times)])
    head = [
        "share of dense",
        "parameters",
        "MACs",
        "activation bytes",
        "processor time of training",
        "steps",
        "latency",
    ]
    return _dense(table) + grid(head, rows)


def _dense(table: Table) -> str:
    """What the shares are of, as a sentence; empty without the dense network."""
    own = [line for key, line in table.lines.items() if key[0] == "dense"]
    if not own:
        return ""
    names = ("parameters", "macs", "activation_bytes", "processor_seconds")
    weights, macs, activations, seconds = (statistics.fmean(line[name] for line in own) for name in names)
    return (
        f"The dense network has {weights / 1e6:.2f} M parameters and takes {macs / 1e6:.0f} M MACs and "
        f"{activations / 1e6:.1f} MB of activations for one crop; its training takes {seconds:.0f} s of "
        "processor time.\n\n"
    )


def _share(table: Table, own: Mapping[Any, Record], value: Callable[[Record], float]) -> str:
    pairs = [(line, table.lines.get(("dense", *key))) for key, line in own.items()]
    shares = [value(line) / value(dense) for line, dense in pairs if dense is not None]
    return f"{statistics.fmean(shares):.1%}" if shares else ""


def _latency(table: Table, arm: str, times: Sequence[Record]) -> str:
    own = [one for one in times if (one["model"], one["keep"]) == (table.model, table.keep)]
    seconds = {(one["arm"], one["set"]): one["latency"] for one in own}
    shares = [
        seconds[arm, name] / seconds["dense", name]
        for name in table.sets
        if (arm, name) in seconds and ("dense", name) in seconds
    ]
    return f"{statistics.fmean(shares):.1%}" if shares else ""


def _curve(tables: Sequence[Table]) -> str:
    """Differences to dense over the budget."""
    tables = sorted(tables, key=lambda table: -table.keep)
    arms = [arm for arm in ARMS if sum(arm in table.arms for table in tables) > 1 and arm != "dense"]
    rows = []
    for arm in arms:
        cells = []
        for table in tables:
            found = [table.paired(arm, "dense", name) for name in table.sets]
            cells.append(cell(table.over_sets(found), p=True))
        rows.append([arm, *cells])
    head = ["minus dense, mean over sets", *(f"keep={table.keep:g}" for table in tables)]
    return "## unet over the budget\n\n" + grid(head, rows)


def _timed(environment: Record) -> str:
    return (
        f"Latency: one image, {environment['machine']}, torch {environment['torch']}, "
        f"{environment['threads']} thread, commit {environment['commit']}, networks of one seed, in turns. "
        "Processor time is that of trainings beside which other programs ran."
    )
