"""How workers are chosen, one small file each: the cost by which one of those that may serve a request is preferred.

They know the columns of the `WorkerTable` and the work, and neither requests nor links. `coordinator.routing` keeps the
rules that hold under every policy.
"""

from coordinator.policies.base import RoutingPolicy
from coordinator.policies.cost_based import CostBased
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.policies.power_of_two import PowerOfTwo
from coordinator.policies.prefix_aware import PrefixAware
from coordinator.policies.round_robin import RoundRobin
from coordinator.policies.session_affinity import SessionAffinity

POLICIES: dict[str, type[RoutingPolicy]] = {
    policy.name: policy for policy in (CostBased, PrefixAware, SessionAffinity, LeastLoaded, PowerOfTwo, RoundRobin)
}
