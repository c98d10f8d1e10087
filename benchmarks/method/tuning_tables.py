"""The tables of the tuning: learning rates by arm and set, and variants of the default."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.method.arms import VARIANTS, arm_of
from benchmarks.method.runs import Run
from benchmarks.method.sets import RATES as CHOSEN
from benchmarks.method.tables import SETS, Record, Table, grid, row
from benchmarks.method.tuning import RATES, SEEDS, TUNED


def report(records: Sequence[Record]) -> str:
    """Both tables of the lines of the tuning; empty where there are none."""
    if not records:
        return ""
    parts = [_about_rates(), *(_rates(records, model) for model in TUNED)]
    screened = _screened(records)
    if len(screened.arms) > 1:
        parts += [_about_variants(), _variants(screened)]
    return "\n\n".join(part for part in parts if part)


def _about_rates() -> str:
    return f"""## Learning rates

`python -m benchmarks.method --tune --data DIR`. Dice on seeds that the study does not use ({SEEDS[0]} and
{SEEDS[1]}), mean and number of seeds. The best rates of the first seed ran with the second one, those of
`narrow` with two further seeds where they were too close, and the best mean was chosen (bold). No rate of the
default is more than 0.001 above that of the dense network, so pruned networks have the rates of the dense
one, and narrow networks from scratch those of `narrow`, also at other budgets."""


def _rates(records: Sequence[Record], model: str) -> str:
    """The rates of one network; empty if it has not been tuned."""
    arms = TUNED[model].arms
    found: dict[tuple[str, str, float], dict[int, float]] = {}
    for record in records:
        key = record["arm"], record["set"], record["training"]["lr"]
        known = record["model"] == model and record["arm"] in arms
        if known and record["recipe"] == arm_of(record["arm"]).recipe():
            found.setdefault(key, {})[record["seed"]] = record["dice"]
    rates = sorted(RATES)
    rows = []
    for arm in arms:
        for name in SETS:
            own = CHOSEN[model].get(arm, {}).get(name)
            cells = [_written(found.get((arm, name, lr), {}), own == lr) for lr in rates]
            if any(cells):
                rows.append([arm, name, *cells])
    return grid([f"{model}: arm", "set", *(f"{lr:g}" for lr in rates)], rows) if rows else ""


def _written(values: Mapping[int, float], chosen: bool) -> str:
    if not values:
        return ""
    mark = "**" if chosen else ""
    return f"{mark}{statistics.fmean(values.values()):.4f}{mark} ({len(values)})"


def _screened(records: Sequence[Record]) -> Table:
    """The variants and the default at the rates of the default."""
    names = ("default", *VARIANTS)
    own = []
    for record in records:
        if record["arm"] in names:
            rate = Run("unet", record["keep"], record["seed"], record["arm"], record["set"]).rate()
            if record["training"]["lr"] == rate and record["recipe"] == arm_of(record["arm"]).recipe():
                own.append(record)
    return Table(own, "unet", 0.1, names)


def _about_variants() -> str:
    return """## Variants of the default

`python -m benchmarks.method --screen --data DIR`, at the rates and with the seeds of the tuning: each
variant minus the default, with the share of the default's processor time."""


def _variants(table: Table) -> str:
    rows = []
    for arm in table.arms:
        if arm != "default":
            title, *cells = row(table, arm, arm, "default")
            rows.append([title, VARIANTS[arm].about, *cells, _time(table, arm)])
    return grid(["variant", "change", *table.sets, "all", "time"], rows)


def _time(table: Table, arm: str) -> str:
    own, base = (
        [line["processor_seconds"] for key, line in table.lines.items() if key[0] == name]
        for name in (arm, "default")
    )
    return f"{statistics.fmean(own) / statistics.fmean(base):.2f}"
