from __future__ import annotations

import itertools

import pytest

from sparsekern.prune.schedule import Schedule


def cubic(**changes: object) -> Schedule:
    options: dict = {"steps": 100, "keep": 0.2, "warmup": 0.1, "finish": 0.6, "events": 10}
    return Schedule.cubic(**(options | changes))


def test_events_lie_between_warmup_and_finish() -> None:
    schedule = cubic()
    assert [event.step for event in schedule.events] == list(range(10, 60, 5))
    assert schedule.finish == 60


def test_fades_end_where_the_next_event_begins() -> None:
    schedule = cubic(steps=137, events=7)
    ends = [event.step + event.fade_steps for event in schedule.events]
    assert ends == [*(event.step for event in schedule.events[1:]), schedule.finish]


def test_shares_fall_to_keep_and_fastest_at_first() -> None:
    shares = [1.0, *(event.share for event in cubic().events)]
    falls = [before - after for before, after in itertools.pairwise(shares)]
    assert shares[-1] == pytest.approx(0.2)
    assert all(fall > 0 for fall in falls)
    assert falls == sorted(falls, reverse=True)


@pytest.mark.parametrize(("events", "area"), [(10, 0.3025), (20, 0.2756)])
def test_the_area_under_the_staircase_is_what_it_is_said_to_be(events: int, area: float) -> None:
    schedule = cubic(steps=10_000, events=events)
    shares = [1.0, *(event.share for event in schedule.events)]
    stops = [event.step + event.fade_steps for event in schedule.events]
    spans = [stop - start for start, stop in zip([0, *stops], [*stops, 10_000], strict=True)]
    cost = sum(share * span for share, span in zip(shares, spans, strict=True)) / 10_000
    assert area == pytest.approx((1 + 1 / events) ** 2 / 4, abs=1e-4)
    assert cost == pytest.approx(0.1 + 0.5 * (0.2 + 0.8 * area) + 0.4 * 0.2, abs=1e-4)


def test_even_events_are_close_to_the_least_area_that_any_spacing_has() -> None:
    # At these positions the derivative of the staircase's area is zero; the last event comes first.
    left = [0.0, 1.0]
    for _ in range(9):
        last, before = left[-1], left[-2]
        left.append((last**3 + 3 * last**2 * (last - before)) ** (1 / 3))
    least = sum((a - b) * a**3 for b, a in itertools.pairwise(left)) / left[-1] ** 4
    assert least == pytest.approx(0.2915, abs=1e-4)
    assert (0.3025 - least) * 0.8 * 0.3 < 0.003


def test_few_steps_make_fewer_events() -> None:
    schedule = cubic(steps=10, events=50)
    assert [event.step for event in schedule.events] == [1, 2, 3, 4, 5]
    assert all(event.fade_steps == 1 for event in schedule.events)


def test_no_event_before_the_first_step() -> None:
    assert cubic(warmup=0.0).events[0].step == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("steps", 0),
        ("steps", 1),
        ("steps", 10.0),
        ("steps", True),
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("warmup", "0.1"),
        ("warmup", float("nan")),
        ("finish", 0.1),
        ("finish", 1.5),
        ("finish", None),
        ("events", 0),
        ("events", True),
    ],
)
def test_an_argument_out_of_range_is_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got {value!r}"):
        cubic(**{argument: value})
