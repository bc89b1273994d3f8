"""What was searched of the episodes of a deterministic policy, and the worst that it shows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustrl.certify.certificate import Floats
from robustrl.certify.storage import Fields, pack
from robustrl.errors import check_choice, check_count

Flags = NDArray[np.bool_]
Integers = NDArray[np.int32]

SLACK = 1e-6
"""Budgets count as this much larger, relatively: more than rounding, and the ledger's tolerance, can give an attacker."""
MOST_LABELS = 64
"""Pairs of what was paid and what was earned that a state keeps; of more, neighbours are joined."""
MOST_BYTES = 2_000_000_000
ENCODING = "base64(zlib(arrays one after the other, little-endian, C order))"
UNSEARCHED = -1


@dataclass(frozen=True)
class Accounting:
    """What an attacker of single frames pays for an action, if the l2 (linf) change of the whole stack must be at least its cost.

    Write e_t for what is added to frame t, and E_t for the change of the stack of k frames that the policy sees at step t.

    "step": ‖e_t‖ <= eps for all t. In l2, ‖E_t‖^2 is a sum of k terms ‖e_s‖^2 (copies of the first frame included), so ‖E_t‖ <= eps sqrt(k):
    an action of cost c needs eps >= c / sqrt(k). The l1 norm is no smaller than the l2 norm. In linf, ‖E_t‖ <= eps.

    "episode": sum ‖e_t‖^2 <= B^2. With weights w_t of steps, sum_t w_t ‖E_t‖^2 = sum_s ‖e_s‖^2 sum_t w_t n_st, where n_st tells how often
    frame s is in stack t; so actions of costs c_t need sum w_t c_t^2 <= B^2 if sum_t w_t n_st <= 1 for every s. A frame is in k stacks,
    once in each: w = 1 / k will do. Where the first stack is filled with copies of the first frame, that is k - t times in stack t < k,
    k (k + 1) / 2 in all: w_t = 2 / (k (k + 1)) for t < k (no more than 1 / k), and 1 / k from then on, will do. With norm 1, B bounds
    sum ‖e_t‖_1, which is no smaller than (sum ‖e_t‖_2^2)^(1/2).

    Args:
        per: "step" or "episode".
        norm: 1, 2 or inf ("step" only), of frames.
        frame_stack: k.
        stack_padding: "reset" (copies of the first frame) or "zero".
    """

    per: Literal["step", "episode"]
    norm: float = 2.0
    frame_stack: int = 1
    stack_padding: str = "reset"

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("step", "episode"))
        norm = math.inf if str(self.norm) == "inf" else self.norm
        object.__setattr__(self, "norm", float(check_choice("norm", norm, (1, 2, math.inf))))
        check_count("frame_stack", self.frame_stack)
        check_choice("stack_padding", self.stack_padding, ("reset", "zero"))
        if self.per == "episode" and self.norm == math.inf:
            raise ValueError("per must be 'step' for norm inf, which limits single steps only")

    def __str__(self) -> str:
        return f"l{self.norm:g} budget per {self.per}"

    @property
    def cost_norm(self) -> float:
        """The norm of a stack's change that costs must be given in."""
        return math.inf if self.norm == math.inf else 2.0

    def limits(self, budgets: Floats) -> Floats:
        """What `charges` may amount to within budgets."""
        radii = budgets * (1 + SLACK)
        return radii if self.per == "step" else radii**2

    def charges(self, costs: Floats, times: ArrayLike) -> Floats:
        """What actions add to the account, of their costs, at given steps; any shape, >= 0."""
        k = self.frame_stack
        if self.per == "step":
            return costs if self.norm == math.inf else costs / math.sqrt(k)
        early = (np.asarray(times) < k) & (self.stack_padding == "reset")
        return costs**2 * np.where(early, 2 / (k * (k + 1)), 1 / k)

    def add(self, spent: Any, charge: Any) -> Any:
        """The account after one more action: the largest charge per step, or their sum."""
        return np.maximum(spent, charge) if self.per == "step" else spent + charge

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"norm": "inf" if self.norm == math.inf else self.norm}

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Inverse of `to_dict`."""
        found = cls(
            per=fields.take("per", str),
            norm=fields.take("norm", float, str),
            frame_stack=fields.take("frame_stack", int),
            stack_padding=fields.take("stack_padding", str),
        )
        fields.finish()
        return found


class Explored(NamedTuple):
    """Trees of episodes (joined where histories lead to one state), one after the other.

    Attributes:
        seeds: of the environment, all different, >= 0, int64 (n,).
        roots: first state of every episode, int32 (n,), increasing; its states are those up to the next root.
        times: steps taken before a state, int32 (N,).
        ended: whether the episode is over, bool (N,).
        parents: state that an action is taken in, int32 (E,); all actions that the largest budget can bring about there are listed.
        actions: int32 (E,), counted from 0.
        children: state after it, int32 (E,), or -1 where nobody looked.
        rewards: float64 (E,); 0 where nobody looked.
        costs: least norm of the stack's change that can bring it about, float64 (E,).
    """

    seeds: NDArray[np.int64]
    roots: Integers
    times: Integers
    ended: Flags
    parents: Integers
    actions: Integers
    children: Integers
    rewards: Floats
    costs: Floats

    def check(self, horizon: int, reward_low: float, never_ends_early: bool) -> None:
        """Raise ValueError if no honest search can have seen this."""
        n, states, edges = len(self.seeds), len(self.times), len(self.parents)
        for name, size in zip(self._fields, (n, n, states, states, *[edges] * 5), strict=True):
            if getattr(self, name).shape != (size,):
                raise ValueError(f"{name} must be of shape ({size},), got {getattr(self, name).shape}")
        sizes = np.diff(self.roots, append=states)
        if n == 0 or self.roots[0] != 0 or sizes.min() < 1 or self.times[self.roots].any() or self.ended[self.roots].any():
            raise ValueError("roots must be the first states of episodes that have begun and not ended, in order")
        if self.seeds.min() < 0 or len(np.unique(self.seeds)) < n:
            raise ValueError("seeds must be >= 0 and all different: an episode counts once")
        if self.times.min() < 0 or self.times.max() > horizon or (self.times == horizon)[~self.ended].any():
            raise ValueError(f"times must be from 0 to the horizon {horizon}, where every episode has ended")
        if never_ends_early and (self.times[self.ended] < horizon).any():
            raise ValueError("never_ends_early must be False: an episode did end early")
        if self.parents.min(initial=0) < 0 or max(self.parents.max(), self.children.max()) >= states or self.actions.min() < 0:
            raise ValueError("parents, actions and children must be numbers of states and actions")
        looked = self.children != UNSEARCHED
        above, below = self.parents[looked], self.children[looked]
        episodes = np.repeat(np.arange(n), sizes)
        if (
            below.min(initial=0) < 0
            or (episodes[above] != episodes[below]).any()
            or (self.times[above] + 1 != self.times[below]).any()
        ):
            raise ValueError("children must be states of the same episode, one step later")
        if not (self.costs >= 0).all():
            raise ValueError("costs must be >= 0")
        if not (
            np.isfinite(self.rewards).all() and (self.rewards[looked] >= reward_low).all() and not self.rewards[~looked].any()
        ):
            raise ValueError(f"rewards must be finite and at least reward_low = {reward_low:g}")
        free = np.bincount(self.parents[self.costs == 0], minlength=states) > 0
        if (free == self.ended).any() or self.ended[self.parents].any():
            raise ValueError("every state must have an action that costs nothing, but for those where the episode has ended")
        pairs = self.parents.astype(np.int64) * (int(self.actions.max()) + 1) + self.actions
        if len(np.unique(pairs)) < edges:
            raise ValueError("actions must be listed once per state")


def worst_returns(tree: Explored, accounting: Accounting, budgets: Floats, horizon: int, rest: float) -> tuple[Floats, Floats]:
    """The least return over all paths within a budget, of those that were played to the end and of those that were cut, (n, K) each.

    An attacked episode follows some path from its root, and its actions' charges stay within the budget. Either the path is in the tree to
    the end, then the return is one of the first, or it leaves it by an action that nobody looked at, taken at step t: then the return is at
    least what the path has earned before plus `rest` for each of the horizon - t steps to come. inf where there is no such path.

    Args:
        tree: what was searched.
        accounting: what an attacker pays.
        budgets: (K,).
        horizon: most steps of an episode.
        rest: least reward of each step that is possible still.
    """
    limits = accounting.limits(budgets)
    order = np.lexsort((tree.parents, tree.times[tree.parents]))
    parents, children, rewards, times = (
        a[order] for a in (tree.parents, tree.children, tree.rewards, tree.times[tree.parents])
    )
    charges = accounting.charges(tree.costs[order], times)
    levels = np.append(np.unique(limits), math.inf)
    if accounting.per == "step":  # all that lies between two budgets is the same: few accounts per state
        charges = levels[np.searchsorted(levels, charges)]
    ends = np.searchsorted(times, np.arange(horizon + 1))
    played, cut = np.full((2, len(tree.roots), len(budgets)), math.inf)
    episode, state = np.arange(len(tree.roots)), tree.roots.astype(np.int64)
    spent, earned = np.zeros(len(state)), np.zeros(len(state))
    for t in range(horizon):
        if not state.size:
            break
        here = slice(ends[t], ends[t + 1])
        first, last = (np.searchsorted(parents[here], state, side) for side in ("left", "right"))
        edge, label = _ranges(first + ends[t], last - first)
        after = accounting.add(spent[label], charges[edge])
        within = after <= levels[-2]
        edge, label, spent = edge[within], label[within], after[within]
        looked = children[edge] != UNSEARCHED
        left = label[~looked]
        _lower(cut, episode[left], spent[~looked], earned[left] + (horizon - t) * rest, limits)
        edge, label, spent = edge[looked], label[looked], spent[looked]
        earned, episode, state = earned[label] + rewards[edge], episode[label], children[edge].astype(np.int64)
        over = tree.ended[state]
        _lower(played, episode[over], spent[over], earned[over], limits)
        kept = _undominated(state[~over], spent[~over], earned[~over])
        state, spent, earned = kept
        episode = np.searchsorted(tree.roots, state, side="right") - 1
    return played, cut


def _ranges(first: NDArray[Any], counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """All numbers of the ranges first[i], ..., first[i] + counts[i] - 1, and their i."""
    owner = np.repeat(np.arange(len(first)), counts)
    before = np.cumsum(counts) - counts
    return first[owner] + np.arange(len(owner)) - before[owner], owner


def _lower(table: Floats, rows: NDArray[Any], spent: Floats, values: Floats, limits: Floats) -> None:
    """Lower a table's entries to the values of the rows that are within its limits."""
    for k, limit in enumerate(limits):
        within = spent <= limit
        np.minimum.at(table[:, k], rows[within], values[within])


def _undominated(state: NDArray[Any], spent: Floats, earned: Floats) -> tuple[NDArray[Any], Floats, Floats]:
    """Of every state's accounts those that no other undercuts in both, at most `MOST_LABELS`."""
    order = np.lexsort((earned, spent, state))
    state, spent, earned = state[order], spent[order], earned[order]
    new = np.ones(len(state), dtype=bool)
    new[1:] = state[1:] != state[:-1]
    if new.all():
        return state, spent, earned
    # The running minimum within a state: an integer per value, shifted down from state to state.
    rank = np.unique(earned, return_inverse=True)[1] - np.cumsum(new) * (len(state) + 1)
    best = np.minimum.accumulate(rank)
    keep = np.ones(len(state), dtype=bool)
    keep[1:] = rank[1:] < best[:-1]
    state, spent, earned, new = state[keep], spent[keep], earned[keep], new[keep]
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=len(state))
    if counts.max() <= MOST_LABELS:
        return state, spent, earned
    # Neighbours are joined into one that pays what the cheapest pays and earns what the poorest earns.
    place, owner = _ranges(np.zeros(len(starts), dtype=np.int64), counts)
    block = np.where(counts[owner] <= MOST_LABELS, place, place * MOST_LABELS // counts[owner])
    opens = np.ones(len(state), dtype=bool)
    opens[1:] = (owner[1:] != owner[:-1]) | (block[1:] != block[:-1])
    closes = np.append(opens[1:], True)
    return state[opens], spent[opens], earned[closes]


def encoded(tree: Explored) -> dict[str, Any]:
    """Plain data for a certificate."""
    little = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in tree._asdict().items()}
    return {
        "encoding": ENCODING,
        "arrays": [[name, array.dtype.str, array.size] for name, array in little.items()],
        **pack(b"".join(array.tobytes() for array in little.values())),
    }


KINDS = {"seeds": "<i8", "ended": "|b1", "rewards": "<f8", "costs": "<f8"}


def decoded(fields: Fields) -> Explored:
    """The inverse of `encoded`."""
    if fields.take("encoding", str) != ENCODING:
        raise fields.error("encoding", f"must be {ENCODING!r}")
    listed, expected = fields.take("arrays", list), [(name, KINDS.get(name, "<i4")) for name in Explored._fields]
    try:
        layout = [(str(name), str(kind), check_count(f"size of {name}", size, least=0)) for name, kind, size in listed]
        if [row[:2] for row in layout] != expected:
            raise ValueError(f"must be {expected}")
        sizes = [np.dtype(kind).itemsize * size for _, kind, size in layout]
        if sum(sizes) > MOST_BYTES:
            raise ValueError(f"{sum(sizes)} bytes")
    except (TypeError, ValueError) as error:
        raise fields.error("arrays", f"cannot be laid out: {error}") from None
    raw = fields.unpack(sum(sizes), f"{sum(sizes)} bytes of arrays")
    fields.finish()
    parts = np.split(np.frombuffer(raw, dtype=np.uint8), np.cumsum(sizes)[:-1])
    arrays = [part.view(kind) for (_, kind, _), part in zip(layout, parts, strict=True)]
    if arrays[3].view(np.uint8).max(initial=0) > 1:
        raise fields.error("arrays", "cannot be laid out: ended must be booleans")
    return Explored(*arrays)
