"""Exact certificates from votes over all noisy copies of an input: no sampling, no failure probability.

A mechanism with finitely many noisy copies (`DeterministicSplitting`, `BandAblation`) is looked at in full. If an attack can
change at most r of the copies, at most r votes change, whatever the base function does with them.

Source: Levine, Feizi (ICML 2021), arXiv:2103.10834; the rule for ties and trajectories is derived in docs/methods/splitting.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from robustrl.errors import as_floats, check_budget, check_choice, check_count
from robustrl.noise import DeterministicSplitting, Noise
from robustrl.policy import Padding, PolicyView
from robustrl.policy.actions import refuse_broken

Counts = NDArray[np.int64]
Budget = Literal["step", "episode"]

CHUNK = 2**22
"""Most entries of the noisy copies that exist at a time."""


class Copies(Protocol):
    """A mechanism all of whose noisy copies can be listed."""

    @property
    def levels(self) -> int:
        """Number of noisy copies of one input."""

    def views(self, x: Any, start: int, stop: int) -> Any:
        """Copies start .. stop - 1 of one input, (stop - start, *x.shape)."""


def exact_radius(counts: ArrayLike) -> tuple[Counts, Counts]:
    """The winner of a vote, and how many voters may change their mind without changing it.

    Args:
        counts: votes per class, integers >= 0, (..., K) with K >= 2.
    Returns:
        prediction A (the lowest index among the most frequent classes), and r = min over B != A of floor((n_A - n_B - [B < A])
        / 2), int64 (...). Tight: some r + 1 changes let another class win. r = 0 is an exact statement too.
    Raises:
        ValueError: if a count is no integer >= 0, or there are fewer than two classes.
    """
    votes = as_floats("counts", counts)
    if votes.ndim < 1 or votes.shape[-1] < 2:
        raise ValueError(f"counts must have one column per class, 2 at least, got shape {votes.shape}")
    if not np.all((votes >= 0) & (votes == np.floor(votes)) & (votes < 2**53)):
        raise ValueError("counts must be integers >= 0")
    votes = votes.astype(np.int64)
    winner = votes.argmax(-1)
    own, classes = np.take_along_axis(votes, winner[..., None], -1), np.arange(votes.shape[-1])
    room = (own - votes - (classes < winner[..., None])) // 2
    room[np.arange(votes.shape[-1]) == winner[..., None]] = np.iinfo(np.int64).max
    return winner, room.min(-1)


@dataclass(frozen=True)
class SplittingVotes:
    """The votes of all noisy copies of n inputs, and what follows from them with certainty.

    Attributes:
        counts: copies on which each of the K classes had the highest score, int64 (n, K).
        step: one grid step, in observation units.
    """

    counts: Counts
    step: float

    @property
    def prediction(self) -> Counts:
        """The smoothed function's class, (n,)."""
        return exact_radius(self.counts)[0]

    @property
    def steps(self) -> Counts:
        """Certified l1 radius in grid steps, (n,)."""
        return exact_radius(self.counts)[1]

    @property
    def radius(self) -> NDArray[np.float64]:
        """Certified l1 radius (n,), in observation units. Attacks on the grid, of this norm at most, change nothing."""
        return self.steps * np.float64(self.step)


def certify_splitting(base: Any, x: Any, mechanism: DeterministicSplitting, *, batch_size: int | None = None) -> SplittingVotes:
    """Evaluate all noisy copies of each input.

    Args:
        base: torch module in evaluation mode, `PolicyView` or any deterministic callable: inputs (rows, *shape) float32 to
            scores (rows, K); the vote is for the highest, the lowest index of several.
        x: inputs on the mechanism's grid, (n, *shape), array or tensor of any numeric dtype.
        mechanism: the splitting.
        batch_size: most copies per forward pass; default by the size of an input.
    Raises:
        ValueError: if an input is off the grid, a score is NaN or inf, or a module is in training mode.

    Every input meets the same sequence of batches, in which an offset has its own row: what an offset's vote is depends on its
    noisy copy alone, down to the last bit of the network's arithmetic.
    """
    return SplittingVotes(count_votes(base, x, mechanism, batch_size=batch_size), mechanism.grid.step)


def count_votes(base: Any, x: Any, mechanism: Copies, *, batch_size: int | None = None) -> Counts:
    """The votes of all copies of each input, int64 (n, K); see `certify_splitting`."""
    function, inputs = _function(base), _inputs(base, x)
    return np.stack([np.sum(list(_votes(function, one, mechanism, batch_size)), axis=0) for one in inputs])


def decide_splitting(
    base: Any, x: Any, mechanism: DeterministicSplitting, radius: float, *, batch_size: int | None = None
) -> NDArray[np.bool_]:
    """Whether the certified radius of each input is at least `radius`, looking at no more copies than that takes.

    Args:
        base: see `certify_splitting`.
        x: see `certify_splitting`.
        mechanism: see `certify_splitting`.
        radius: l1, in observation units.
        batch_size: copies between two decisions; default by the size of an input.
    Returns:
        (n,); the same as certify_splitting(...).steps >= the grid steps that fit into `radius`.
    """
    # Any step that could still fit by a rounding error is asked for.
    steps = math.floor(float(check_budget("radius", radius)) / mechanism.grid.step + 1e-9)
    function, inputs = _function(base), _inputs(base, x)
    return np.array([_decide(_votes(function, one, mechanism, batch_size), mechanism.levels, steps) for one in inputs])


def _decide(chunks: Iterator[Counts], remaining: int, steps: int) -> bool:
    counts = np.zeros(1, dtype=np.int64)
    for chunk in chunks:
        counts, remaining = counts + chunk, remaining - int(chunk.sum())
        if np.any(_leads(counts, -remaining) >= 2 * steps):  # even if all other votes go to the strongest rival
            return True
        if np.all(_leads(counts, remaining) < 2 * steps):  # even if all other votes go to the candidate
            return False
    raise AssertionError("a complete vote is decided")


def _leads(counts: Counts, others: int) -> Counts:
    """min over B != A of n_A - n_B - [B < A] for every class A, if `others` more votes go to A (or against it)."""
    classes = np.arange(len(counts))
    leads = counts[:, None] - counts[None] - (classes[None] < classes[:, None]) + others
    leads[classes, classes] = np.iinfo(np.int64).max
    least: Counts = leads.min(axis=1)
    return least


def _votes(function: Callable[[Tensor], Tensor], x: Tensor, mechanism: Copies, batch_size: int | None) -> Iterator[Counts]:
    rows = max(1, CHUNK // max(1, x.numel())) if batch_size is None else check_count("batch_size", batch_size)
    for start in range(0, mechanism.levels, rows):
        with torch.inference_mode():
            scores = function(mechanism.views(x, start, min(start + rows, mechanism.levels)).float())
            if scores.ndim != 2 or scores.shape[1] < 2:
                raise ValueError(f"base must give scores (rows, K) of K >= 2 classes, got shape {tuple(scores.shape)}")
            refuse_broken(not torch.isfinite(scores).all())
            yield torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1]).cpu().numpy()


def _function(base: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(base, nn.Module) and any(part.training for part in base.modules()):
        raise ValueError("base must be in evaluation mode, call base.eval(): in training mode it is no function of its input")
    if not isinstance(base, PolicyView):
        function: Callable[[Tensor], Tensor] = base
        return function
    if base.memory_shape is not None or not base.discrete:
        raise TypeError("base must be a policy with discrete actions and without memory")
    return base.scores


def _inputs(base: Any, x: Any) -> Tensor:
    device = next((p.device for p in base.parameters()), None) if isinstance(base, nn.Module) else None
    inputs = torch.as_tensor(x, device=device)
    if inputs.ndim < 2 or len(inputs) == 0:
        raise ValueError(f"x must be a batch of inputs (n, *shape), got shape {tuple(inputs.shape)}")
    return inputs


def trajectory_radius(
    steps: Sequence[int] | Counts, *, n_frames: int = 1, padding: Padding = "reset", budget: Budget = "episode"
) -> int:
    """The l1 budget, in grid steps, within which no attack changes an executed trajectory.

    Args:
        steps: certified radius, in grid steps, of the observation at every step of the trajectory.
        n_frames: frames in one observation, each of which is attacked once, when it arrives. 1 if whole observations are
            attacked afresh at every step.
        padding: how an episode's first stack is filled: with copies of the (attacked) first frame, or zeros.
        budget: bound what one "step"'s frame may suffer, at every step, or the whole "episode".
    Raises:
        ValueError: if a radius is no integer >= 0, or there is none.

    An attack that changes nothing up to step t meets the same observation at t. There it has moved the stack by
    sum_i c_i ||e_i||_1, with c_i copies of frame i in the stack: at most (sum_i c_i) times the per-step budget, and at most
    (max_i c_i) times the episode's. For n_frames = 1 both are the smallest radius.
    """
    radii = as_floats("steps", steps)
    if radii.ndim != 1 or radii.size == 0 or not np.all((radii >= 0) & (radii == np.floor(radii))):
        raise ValueError(f"steps must hold one integer >= 0 per step of the trajectory, got {steps!r}")
    check_count("n_frames", n_frames)
    check_choice("padding", padding, ("reset", "zero"))
    check_choice("budget", budget, ("step", "episode"))
    t = np.arange(len(radii))
    if padding == "reset":
        weight = np.full(len(t), n_frames) if budget == "step" else np.maximum(n_frames - t, 1)
    else:
        weight = np.minimum(t + 1, n_frames) if budget == "step" else np.ones(len(t))
    return int((radii // weight).min())


def verify_splitting(evidence: dict[str, Any], noise: Noise, alpha: float) -> tuple[int, float, bool]:
    """Prediction, radius (observation units) and abstention (never) from {"counts": votes per class}."""
    counts = _complete(evidence["counts"], noise, alpha, ndim=1)
    prediction, steps = exact_radius(counts)
    return int(prediction), int(steps) * _splitting(noise).grid.step, False


def verify_trajectory(evidence: dict[str, Any], noise: Noise, alpha: float) -> tuple[int, float, bool]:
    """Length, radius (observation units) and abstention (never) of a trajectory.

    Args:
        evidence: {"counts": votes per step and class, "n_frames", "padding", "budget"}; see `trajectory_radius`.
        noise: the splitting.
        alpha: 0, there is no chance in it.
    """
    counts = _complete(evidence["counts"], noise, alpha, ndim=2)
    options = {name: evidence[name] for name in ("n_frames", "padding", "budget")}
    return len(counts), trajectory_radius(exact_radius(counts)[1], **options) * _splitting(noise).grid.step, False


def _splitting(noise: Noise) -> DeterministicSplitting:
    if not isinstance(noise, DeterministicSplitting):
        raise TypeError(f"noise must be a DeterministicSplitting, got {noise!r}")
    return noise


def _complete(counts: Any, noise: Noise, alpha: float, ndim: int) -> NDArray[np.float64]:
    """Counts in which every noisy copy has voted."""
    votes, levels = as_floats("counts", counts), _splitting(noise).levels
    if alpha != 0:
        raise ValueError(f"alpha must be 0 for an exact certificate, got {alpha}")
    if votes.ndim != ndim or not np.all(votes.sum(-1) == levels):
        raise ValueError(f"counts must add up to the {levels} levels of the splitting, got {votes.sum(-1)}")
    return votes
