"""What admission promises, against the fleet in virtual time."""

import pytest
from msgspec.structs import replace
from overload_model import ANSWER_TOKENS, STANDARD, Fleet, Outcome, goodput, request

from baton.config import ServiceClass, parse_classes
from baton.errors import ConfigurationError, InvalidRequestError
from coordinator.delivery import Urgency
from coordinator.failures import FailureKind, RequestFailed
from coordinator.policies.base import PrefillChoice, Work
from coordinator.routing import Route

OFF = ServiceClass("standard", 0.0, 0.0)
INTERACTIVE, BATCH = ServiceClass("interactive", 1.0, 0.1), ServiceClass("batch", 30.0, 0.0)


def overload(fleet: Fleet, times: float, seconds: float = 60.0, drain_s: float = 15.0) -> list[Outcome]:
    """Arrivals at so many times the capacity, and time for what was taken to end."""
    arrived = fleet.offer(times * fleet.capacity, seconds)
    fleet.run(fleet.now + seconds + drain_s)
    return arrived


@pytest.mark.parametrize("slots", [4, 64])
def test_goodput_at_ten_times_the_capacity_stays_at_its_peak_and_collapses_without_admission(slots: int) -> None:
    answer_s = slots / 8.0
    fleet, unguarded = Fleet(slots=slots, answer_s=answer_s), Fleet(slots=slots, answer_s=answer_s, classes=(OFF,))
    peak = max(goodput(overload(fleet, times), 60.0) for times in (0.5, 0.8, 1.0, 1.2))
    arrived = overload(fleet, 10.0)
    assert len(arrived) > 4000, "the overload did not happen"
    assert goodput(arrived, 60.0) >= 0.9 * peak
    assert goodput(overload(unguarded, 10.0), 60.0) < 0.2 * peak


def test_a_fleet_that_was_never_busy_before_learns_within_seconds() -> None:
    fleet = Fleet()
    arrived = overload(fleet, 10.0)
    settled = [each for each in arrived if each.at_s > 10.0]
    assert goodput(settled, 50.0) >= 0.85 * fleet.capacity


def test_after_an_overload_the_next_requests_are_taken_at_once_and_in_time() -> None:
    fleet = Fleet()
    overload(fleet, 10.0, drain_s=0.0)
    end_s = fleet.now
    arrived = overload(fleet, 0.5, 20.0)
    refused = [each.at_s - end_s for each in arrived if each.retry_after_s is not None]
    assert all(at_s < 2 * STANDARD.ttft_s for at_s in refused), refused
    later = [each for each in arrived if each.at_s > end_s + 2 * STANDARD.ttft_s]
    assert len(later) > 40
    assert all(each.ttft_s is not None and each.ttft_s <= STANDARD.ttft_s for each in later)


def test_nobody_is_refused_while_the_fleet_keeps_up() -> None:
    fleet = Fleet()
    assert not [each for each in overload(fleet, 0.5) if each.retry_after_s is not None]


def test_a_burst_is_taken_while_the_coordinator_is_too_busy_with_it_to_hear_what_has_started() -> None:
    fleet = Fleet(slots=2000, prefill_tokens_per_s=1e6)
    fleet.offer(500.0, 5.0)
    fleet.run(10.0)
    burst = []
    for _ in range(1000):  # as long as nothing runs, no worker is heard
        fleet.now += 0.001
        burst.append(fleet.ask())
    assert not [each for each in burst if each.retry_after_s is not None]
    fleet.run(20.0)
    assert all(each.ttft_s is not None and each.ttft_s < STANDARD.ttft_s for each in burst)


def test_an_idle_fleet_takes_whoever_comes_whatever_was_predicted() -> None:
    hopeless = Route("w", None, PrefillChoice.LOCAL_MIXED, Work(1, 1), ttft_s=1e6, itl_s=1e6)
    fleet = Fleet(policy=lambda fleet, tokens: hopeless)
    for _ in range(5):
        assert fleet.ask(Urgency(max_ttft_s=0.001, deadline_s=0.001)).retry_after_s is None
        fleet.run(fleet.now + 60.0)


def test_nobody_is_shut_out_for_good_by_a_prediction_that_is_wrong() -> None:
    hopeless = Route("w", None, PrefillChoice.LOCAL_MIXED, Work(1, 1), ttft_s=1e6)
    fleet = Fleet(num_workers=2, slots=4, answer_s=4.0, policy=lambda fleet, tokens: hopeless)
    taken = 0
    for _ in range(200):
        taken += fleet.ask().retry_after_s is None
        fleet.run(fleet.now + 0.1)
    assert 12 <= taken <= 24, "one each second, and those that find a worker idle"


def queueing(fleet: Fleet, tokens: int) -> Route:
    """A policy that knows the prefill queue, and nothing of slots."""
    own_s = tokens / fleet.prefill_tokens_per_s
    queued_s = sum(len(asked.choices[0].prompt) for asked, _ in fleet.waiting) / fleet.prefill_tokens_per_s
    busy_s = max(0.0, fleet.prefill_free_s - fleet.now)
    return Route("w", None, PrefillChoice.LOCAL_MIXED, Work(1, 1), ttft_s=own_s + busy_s + queued_s, own_s=own_s)


@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("slots", [4, 64])
def test_a_policy_that_predicts_too_little_is_not_believed_and_a_sudden_overload_is_seen(
    slots: int, before: float
) -> None:
    """While the fleet keeps up, short queues are served at the pace of prefill: a hundred times that of slots."""
    fleet = Fleet(slots=slots, answer_s=slots / 8.0, policy=queueing)
    if before:
        overload(fleet, before)
    assert goodput(overload(fleet, 10.0), 60.0) >= 0.9 * fleet.capacity


def counting(fleet: Fleet, tokens: int) -> Route:
    """One that knows how many answers must end first."""
    ahead = max(0, fleet.running + len(fleet.waiting) + 1 - fleet.slots)
    return replace(queueing(fleet, tokens), turns=ahead / fleet.slots, itl_s=fleet.answer_s / ANSWER_TOKENS)


def test_where_places_are_counted_hardly_anybody_who_is_taken_comes_late_from_the_first_one_on() -> None:
    late = {}
    for policy in (queueing, counting):
        fleet = Fleet(policy=policy)
        overload(fleet, 0.5)
        arrived = overload(fleet, 10.0)
        assert goodput(arrived, 60.0) >= 0.9 * fleet.capacity
        late[policy] = sum((each.ttft_s or 0.0) > STANDARD.ttft_s for each in arrived)
    assert late[counting] <= 5 < late[queueing]


def test_a_policy_that_predicts_well_is_believed_from_the_first_burst_on() -> None:
    fleet = Fleet(slots=64, prefill_tokens_per_s=1000.0, policy=queueing)
    arrived = fleet.offer(100.0, 10.0)  # of 10 a second that prefill can do
    fleet.run(30.0)
    assert goodput(arrived, 10.0) >= 9.0
    assert not [each for each in arrived if each.ttft_s is not None and each.ttft_s > STANDARD.ttft_s]


def test_a_long_prompt_is_not_refused_for_its_own_length_but_for_the_wait() -> None:
    fleet = Fleet(num_workers=1, slots=64, prefill_tokens_per_s=1000.0, policy=queueing)
    assert fleet.ask(prompt_tokens=700).retry_after_s is None
    assert fleet.ask(prompt_tokens=8000).retry_after_s is None, "8 s of its own, against a target of 1 s"
    assert fleet.ask(prompt_tokens=9000).retry_after_s is not None, "it would wait for 8.1 s"
    assert fleet.ask(prompt_tokens=100).retry_after_s is not None


def test_retry_after_grows_with_those_who_were_refused_and_is_bounded_and_spread() -> None:
    fleet = Fleet()
    arrived = overload(fleet, 10.0)
    waits = [each.retry_after_s for each in arrived if each.retry_after_s is not None]
    assert all(0.5 <= wait <= 30.0 for wait in waits)
    first, last = waits[:20], waits[-200:]
    assert sum(first) / len(first) < sum(last) / len(last)
    assert len(set(last)) > 50
    fleet.run(fleet.now + 120.0)
    later = overload(fleet, 2.0, 10.0)
    fresh = next(each.retry_after_s for each in later if each.retry_after_s is not None)
    assert fresh < 5.0, "those refused two minutes ago do not come back any more"


def test_while_interactive_requests_come_batch_leaves_them_room_and_still_gets_what_is_free() -> None:
    fleet = Fleet(classes=(INTERACTIVE, BATCH))
    batch = fleet.offer(10 * fleet.capacity, 60.0, "batch")
    interactive = fleet.offer(0.4 * fleet.capacity, 60.0, "interactive")
    fleet.run(120.0)
    in_time = goodput(interactive, 60.0) * 60.0
    assert in_time >= 0.9 * len(interactive)
    assert goodput(batch, 60.0, 30.0) >= 0.4 * fleet.capacity


def test_without_interactive_requests_batch_may_wait_for_as_long_as_its_target() -> None:
    fleet = Fleet(classes=(INTERACTIVE, BATCH))
    arrived = fleet.offer(10 * fleet.capacity, 60.0, "batch")
    fleet.run(120.0)
    waited = [each.ttft_s for each in arrived if each.ttft_s is not None]
    assert 15.0 < max(waited) < 40.0


def test_slow_tokens_refuse_classes_that_want_them_fast_until_they_are_fast_again() -> None:
    fleet = Fleet(classes=(ServiceClass("interactive", 10.0, 0.1), BATCH), slots=64)

    def tokens(gap_s: float) -> None:
        fleet.itl_sum, fleet.itl_count = fleet.itl_sum + 100 * gap_s, fleet.itl_count + 100
        fleet.now += 0.6

    fleet.run(10.0)
    tokens(0.02)
    assert fleet.ask(Urgency("interactive")).retry_after_s is None
    fleet.run(fleet.now + 0.1)  # its first token
    assert fleet.ask(Urgency("interactive")).retry_after_s is None
    tokens(0.2)
    assert fleet.ask(Urgency("interactive")).retry_after_s is not None
    assert fleet.ask(Urgency("batch")).retry_after_s is None
    tokens(0.08)
    assert fleet.ask(Urgency("interactive")).retry_after_s is not None, "still above where refusals end"
    tokens(0.05)
    assert fleet.ask(Urgency("interactive")).retry_after_s is None


def test_a_model_that_is_never_fast_enough_for_a_class_serves_it_all_the_same() -> None:
    fleet = Fleet(classes=(INTERACTIVE,), slots=64)
    fleet.run(10.0)
    fleet.itl_sum, fleet.itl_count = 30.0, 100  # 0.3 s, of 0.1 wanted
    assert all(fleet.ask().retry_after_s is None for _ in range(1))
    fleet.run(fleet.now + 0.1)
    assert fleet.ask().retry_after_s is None


def busy(**options: object) -> Fleet:
    """8 requests a second, and about 0.7 s of them wait."""
    fleet = Fleet(classes=(ServiceClass("standard", 30.0, 0.0),), **options)
    overload(fleet, 1.0, 20.0, drain_s=0.0)
    while len(fleet.waiting) < 6:
        fleet.ask()
    return fleet


def test_a_client_that_wants_its_first_token_sooner_than_its_class_is_refused_sooner() -> None:
    fleet = busy()
    hasty = request(urgency=Urgency(max_ttft_s=0.1))
    hasty.started_s = fleet.now
    with pytest.raises(RequestFailed, match="first token") as refused:
        fleet.admission.admit(hasty, None, 10, 1)
    assert refused.value.kind is FailureKind.OVERLOADED
    assert fleet.ask(Urgency(max_ttft_s=10.0)).retry_after_s is None


def test_a_deadline_is_held_against_answers_as_long_as_lately_and_never_longer_than_asked_for() -> None:
    fleet = busy()
    fleet.admission._answer_tokens, fleet.itl_sum, fleet.itl_count = 50.0, fleet.itl_sum + 10.0, fleet.itl_count + 100
    short, long = request(max_tokens=5), request(max_tokens=4000)
    for each in (short, long):
        each.urgency, each.started_s = Urgency(deadline_s=4.0), fleet.now
    fleet.admission.admit(short, None, 10, 1)
    with pytest.raises(RequestFailed, match="an answer in"):
        fleet.admission.admit(long, None, 10, 1)
    patient = request(max_tokens=4000, urgency=Urgency(deadline_s=8.0))
    patient.started_s = fleet.now
    fleet.admission.admit(patient, None, 10, 1)


def test_what_is_asked_again_is_never_refused() -> None:
    fleet = Fleet()
    overload(fleet, 10.0, drain_s=0.0)
    assert [each for each in [fleet.ask() for _ in range(10)] if each.retry_after_s is not None]
    again = request()
    again.asked_again = True
    fleet.admission.admit(again, None, 10, 1)


def test_the_books_are_empty_when_everything_has_ended() -> None:
    fleet = Fleet()
    overload(fleet, 3.0)
    fleet.run(fleet.now + 60.0)
    assert len(fleet.admission) == 0
    assert fleet.admission._backlog.work == 0.0
    assert fleet.admission._forecasts == {}
    assert fleet.admission.pressure("standard") == 0.0


def test_refusals_and_targets_are_counted_by_class_and_predictions_compared() -> None:
    fleet = Fleet()
    arrived = overload(fleet, 5.0)
    fleet.run(fleet.now + 60.0)

    def value(name: str, **labels: str) -> float:
        return fleet.metrics.registry.get_sample_value(name, labels) or 0.0

    refused = sum(each.retry_after_s is not None for each in arrived)
    assert value("baton_admission_refused_total", service_class="standard", cause="ttft") == refused
    met = value("baton_class_first_tokens_total", service_class="standard", in_time="yes")
    assert met == sum(each.ttft_s is not None and each.ttft_s <= 1.0 for each in arrived)
    near = value("baton_ttft_ratio_bucket", le="1.5") - value("baton_ttft_ratio_bucket", le="0.5")
    assert near > 0.7 * value("baton_ttft_ratio_count")


@pytest.mark.parametrize("bounds", [Urgency("gold"), Urgency(max_ttft_s=0.0), Urgency(deadline_s=float("nan"))])
def test_a_class_or_a_limit_that_is_none_is_an_error_that_names_its_field(bounds: Urgency) -> None:
    with pytest.raises(InvalidRequestError, match=r"service_class must be one of standard|must be a number of seconds"):
        Fleet().admission.check(bounds)


@pytest.mark.parametrize("text", ["", "fast", "fast=1", "fast=1/x", "Fast=1/1", "a=1/1,a=2/2", "a=-1/1"])
def test_classes_that_cannot_be_read_are_an_error_that_shows_how(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"such as interactive=2/0\.2"):
        parse_classes(text)
