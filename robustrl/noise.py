"""Noise mechanisms and what an attacker can do against them.

A mechanism perturbs frames and knows its trade-off function: the smallest probability `lower(p, budget)` and the
largest probability `upper(p, budget)` that any attacker within `budget` can give to an event of clean probability p.
The reward certificate of a whole episode and the certificate of one input are the same call with different evidence.

Budgets are totals over the episode in the mechanism's own norm and in observation units:

=============  ======================================  =====================================================
mechanism      norm of the budget                       lower(p, B)
=============  ======================================  =====================================================
Gaussian       l2: sqrt(sum_t ||e_t||_2^2)              Phi(Phi^-1(p) - B / sigma)
Uniform        l1: sum_t ||e_t||_1                      max(p - B / (2 lam), 0)
Splitting      l1: sum_t ||e_t||_1                      max(p - B / (2 lam), 0)
Laplace        l1: sum_t ||e_t||_1                      max(p exp(-B / b), 1 - (1 - p) exp(B / b))
Ablation       l0: number of altered whole frames       max(p - (1 - (1 - keep)^B), 0)
=============  ======================================  =====================================================

All of them hold against *adaptive* attackers, provided the noise is drawn afresh at every step, independently of
everything the attacker has seen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from robustrl.errors import check_budget, check_choice, check_count, check_positive, check_probability, check_real

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Frames = TypeVar("Frames", NDArray[Any], "torch.Tensor")
"""A batch of frames, shape (n, *frame), as a numpy array or a torch tensor of a floating dtype."""

Generator = Any
"""A `numpy.random.Generator` for numpy frames, a `torch.Generator` on the frames' device for tensors."""


class Noise(ABC):
    """A noise mechanism: how frames are perturbed, and what is proven about it."""

    norm: ClassVar[float]
    """Norm of the budget: 0 (altered whole frames), 1 or 2."""
    scopes: ClassVar[frozenset[str]] = frozenset({"input", "step", "episode"})
    """What the proof covers; `require` refuses everything else."""

    @abstractmethod
    def perturb(self, x: Frames, generator: Generator) -> Frames:
        """Return a noisy copy of a batch of frames.

        Args:
            x: frames, shape (n, *frame), floating dtype; numpy array or torch tensor.
            generator: `numpy.random.Generator` or `torch.Generator`, matching `x`; advanced.
        Returns:
            same type, shape, dtype and device as `x`. The sum is formed in the precision of the draws and rounded once.
        Raises:
            ValueError: if `x` has an integer dtype (noise on integers is rounded and wraps around) or is not a batch.
            TypeError: if `x` is neither an array nor a tensor, or `generator` is not of its library.
        """

    @abstractmethod
    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """Smallest probability of an event under any adaptive attacker within `budget`.

        Args:
            p: clean probability of the event, in [0, 1]; any shape.
            budget: episode total in the mechanism's norm, observation units; broadcast against `p`. May be inf.
        Returns:
            float64 array of the broadcast shape.
        Raises:
            ValueError: if a probability is outside [0, 1] or a budget is negative or NaN.
        """

    @abstractmethod
    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """Largest probability of an event under any adaptive attacker; accurate for tiny `p`. See `lower`."""

    @abstractmethod
    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        """A subgradient of the convex map p -> lower(p, budget), for p in [0, 1). See `lower`."""

    @abstractmethod
    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        """Budget below which lower(p_lower) stays above upper(p_upper), 0 if none.

        Attacks of norm strictly less than the radius cannot change the winner; in norm 0, attacks on that many frames.

        Args:
            p_lower: lower bound on the winning class's probability.
            p_upper: upper bound on every other class's; default 1 - p_lower, which makes the threshold 1/2.
        Returns:
            radius in the mechanism's norm.
        Raises:
            ValueError: if a probability is outside [0, 1].
        """

    def covering_budget(
        self, norm: float, *, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> float:
        """An episode budget in this mechanism's norm that covers every attacker of a threat model.

        Args:
            norm: the threat's norm, one of 0, 1, 2, inf.
            step: per-step radius in that norm, or None.
            episode: whole-episode budget in that norm, or None (norm inf has no episode budget).
            horizon: most steps an episode can have.
            n_features: entries of one frame.
        Raises:
            ValueError: if the mechanism has no bound for that norm, or a number is negative or NaN.
        """
        check_choice("norm", norm, (0, 1, 2, math.inf))
        check_count("horizon", horizon)
        check_count("n_features", n_features)
        step = None if step is None else float(check_budget("step", step))
        episode = None if episode is None else float(check_budget("episode", episode))
        bounds = self._covering_budgets(norm, step, episode, horizon, n_features)
        if not bounds:
            raise ValueError(f"{type(self).__name__} has no certificate for this threat: norm {norm} with the budgets given")
        return min(bounds)

    @abstractmethod
    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        """Every bound that applies; see `covering_budget`."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the mechanism's certificates do not cover, in words."""
        return ()

    @property
    def scale(self) -> str:
        """The parameters in words, for titles."""
        values = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self._fields().items())
        return f"{type(self).__name__}({', '.join(values)})"

    def require(self, scope: str) -> None:
        """Raise ValueError unless the mechanism has a proof for `scope`."""
        if scope not in self.scopes:
            raise ValueError(f"{type(self).__name__} has no proof for scope {scope!r}; it covers {sorted(self.scopes)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a certificate or a run file; `noise_from_dict` is the inverse."""
        return {"kind": type(self).__name__, **self._fields()}

    def _fields(self) -> dict[str, Any]:
        return asdict(cast(Any, self))


@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent Gaussian noise, fresh at every step.

    Args:
        sigma: standard deviation in observation units: one number, or one per feature (broadcast along the last axis).
            A zero in a per-feature sigma means that the attacker cannot touch that feature. A plain sigma of 0 is the
            undefended agent: it certifies at budget 0 only.

    The episode bound is the adaptive Neyman-Pearson bound Phi(Phi^-1(p) - mu), mu = B / sigma, exact for the law of
    the return; with per-feature sigma, mu = B / min sigma over the attackable features.

    Source: Kumar, Levine, Feizi, "Policy Smoothing for Provably Robust Reinforcement Learning" (ICLR 2022),
    arXiv:2106.11420, theorem on adaptive adversaries; Cohen, Rosenfeld, Kolter (ICML 2019) for one input.
    """

    sigma: float | tuple[float, ...]
    norm: ClassVar[float] = 2

    def __init__(self, sigma: float | Sequence[float] | NDArray[Any]) -> None:
        value: float | tuple[float, ...]
        if np.ndim(sigma) == 0:
            value = check_real("sigma", sigma, allowed="a finite number >= 0")
            low = value
        else:
            value = tuple(check_real("sigma", s, allowed="a finite number >= 0") for s in np.asarray(sigma).tolist())
            if not value or not any(value):
                raise ValueError(f"sigma must have at least one positive entry, got {value}")
            low = min(value)
        if low < 0:
            raise ValueError(f"sigma must be >= 0, got {sigma}")
        object.__setattr__(self, "sigma", value)

    @property
    def smallest(self) -> float:
        """Smallest sigma over the attackable features: the one an l2 attacker aims at."""
        return min(s for s in self.sigma if s > 0) if isinstance(self.sigma, tuple) else self.sigma

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        _check_frames(x, generator)
        if isinstance(self.sigma, tuple) and x.shape[-1] != len(self.sigma):
            raise ValueError(f"sigma has {len(self.sigma)} entries, but the frames' last axis has {x.shape[-1]}")
        if self.sigma == 0.0:
            return x + 0
        noise = _standard_normal(x, generator)
        noise *= self.sigma if isinstance(self.sigma, float) else _like(self.sigma, noise)
        noise += x
        return _rounded(noise, x)

    def mu(self, budget: ArrayLike) -> Floats:
        """The Gaussian-DP parameter B / sigma of an episode budget B."""
        b = check_budget("budget", budget)
        if self.smallest == 0:
            if np.any(b > 0):
                raise ValueError(
                    f"sigma must be > 0 for budgets > 0: without noise only budget 0 has a certificate, got {b.max()}"
                )
            return np.zeros_like(b)
        return b / self.smallest

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return self._shifted(p, -self.mu(budget))

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return self._shifted(p, self.mu(budget))

    def _shifted(self, p: ArrayLike, shift: Floats) -> Floats:
        p = check_probability("p", p)
        finite = np.where(np.isinf(shift), 0.0, shift)  # even a certain event falls to an unlimited attacker
        return np.where(np.isinf(shift), shift > 0, np.where(shift == 0, p, ndtr(ndtri(p) + finite)))

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        mu = self.mu(budget)
        p = check_probability("p", p)
        finite = np.where(np.isinf(mu), 0.0, mu)
        with np.errstate(invalid="ignore", over="ignore"):
            slope = np.exp(finite * ndtri(p) - finite**2 / 2)
        return np.where(np.isinf(mu), 0.0, np.where(finite == 0, 1.0, slope))

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        if p_upper is None:
            return 0.0 if p_lower <= 0.5 or self.smallest == 0 else self.smallest * float(ndtri(p_lower))
        p_upper = float(check_probability("p_upper", p_upper))
        return 0.0 if p_lower <= p_upper else self.smallest / 2 * float(ndtri(p_lower) - ndtri(p_upper))

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        bounds = []
        if norm in (1, 2):  # ||e||_2 <= ||e||_1, step by step and over the episode
            bounds += [step * math.sqrt(horizon)] if step is not None else []
            bounds += [episode] if episode is not None else []
        elif norm == math.inf and step is not None:
            bounds.append(step * math.sqrt(horizon * self._effective_features(n_features)))
        return bounds

    def _effective_features(self, n_features: int) -> float:
        """Sum of (smallest / sigma_i)^2 over the attackable entries of a frame: their number if all sigmas are equal."""
        if isinstance(self.sigma, float):
            return float(n_features)
        copies, rest = divmod(n_features, len(self.sigma))
        if rest:
            raise ValueError(f"n_features must be a multiple of the {len(self.sigma)} entries of sigma, got {n_features}")
        return copies * math.fsum((self.smallest / s) ** 2 for s in self.sigma if s > 0)

    @property
    def caveats(self) -> tuple[str, ...]:
        if isinstance(self.sigma, tuple) and min(self.sigma) == 0:
            untouched = [i for i, s in enumerate(self.sigma) if s == 0]
            return (f"attacks on features {untouched}, which carry no noise",)
        return ()


class _TotalVariation(Noise):
    """Mechanisms whose whole proof is a bound on the probability that attacked and clean runs ever differ."""

    @abstractmethod
    def shift(self, budget: ArrayLike) -> Floats:
        """Largest probability, in [0, 1], that an attacker within `budget` is noticed by the policy at all."""

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.maximum(check_probability("p", p) - self.shift(budget), 0.0)

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.minimum(check_probability("p", p) + self.shift(budget), 1.0)

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        return np.where(check_probability("p", p) > self.shift(budget), 1.0, 0.0)


class _TotalVariationL1(_TotalVariation):
    """The l1 members: P(runs ever differ) <= sum_t ||e_t||_1 / (2 lam), by maximal coupling step after step."""

    lam: float
    norm: ClassVar[float] = 1

    def shift(self, budget: ArrayLike) -> Floats:
        return np.minimum(check_budget("budget", budget) / (2 * self.lam), 1.0)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        return max(0.0, self.lam * (p_lower - rival))

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return _l1_covering_budgets(norm, step, episode, horizon, n_features)


@dataclass(frozen=True)
class Uniform(_TotalVariationL1):
    """Independent uniform noise on [-lam, lam], fresh at every step; l1 budgets.

    Args:
        lam: half width in observation units.

    Source: Yang et al. (ICML 2020), arXiv:2002.08118, for one input; the adaptive episode bound follows from a
    maximal coupling of every step (docs: policy smoothing).
    """

    lam: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_positive("lam", self.lam))

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        _check_frames(x, generator)
        noise = _uniform(x, generator)
        noise *= 2 * self.lam
        noise -= self.lam
        noise += x
        return _rounded(noise, x)


@dataclass(frozen=True)
class Splitting(_TotalVariationL1):
    """Splitting noise (SSN) with a fresh split per coordinate and step; l1 budgets.

    Every coordinate is replaced by the midpoint of the cell it falls in, for cells of width 2 lam cut at a random
    offset s in [0, 2 lam): at most one bit about it survives. Values are clipped to [low, high] first, which only
    brings two inputs closer.

    Args:
        lam: half the cell width, in observation units.
        low: lower end of the observation range.
        high: upper end of the observation range.
        fresh: must stay True: a split that is used twice can be read off the past observations, and then no bound holds.

    Source: Levine, Feizi (ICML 2021), arXiv:2103.10834; the adaptive episode bound needs the fresh splits.
    """

    lam: float
    low: float = 0.0
    high: float = 1.0
    fresh: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_positive("lam", self.lam))
        object.__setattr__(self, "low", check_real("low", self.low))
        object.__setattr__(self, "high", check_real("high", self.high))
        if self.high <= self.low:
            raise ValueError(f"high must be > low, got low={self.low}, high={self.high}")
        if self.fresh is not True:
            raise ValueError("fresh must be True: past observations reveal a reused split, so no certificate holds for it")

    def split(self, x: Frames, s: Frames) -> Frames:
        """The splitting map for offsets `s` in [0, 2 lam), shape of `x`; computed in the wider of the two precisions."""
        xp, width = _namespace(x), 2 * self.lam
        cell = xp.ceil((xp.clip(x, self.low, self.high) - self.low - s) / width)
        top = xp.clip(width * cell + s + self.low, self.low, self.high)
        bottom = xp.clip(width * (cell - 1) + s + self.low, self.low, self.high)
        return _rounded((top + bottom) / 2, x)

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        _check_frames(x, generator)
        offsets: Frames = _uniform(x, generator) * (2 * self.lam)
        return self.split(x, offsets)


@dataclass(frozen=True)
class Laplace(Noise):
    """Independent Laplace noise of scale b, fresh at every step; l1 budgets.

    Args:
        b: scale (mean absolute deviation) in observation units.

    The episode bound is adaptive composition of pure differential privacy with epsilon = B / b.

    Source: Lecuyer et al. (S&P 2019) and Teng et al. (2020) for one input; composition by Dwork, Roth (2014).
    """

    b: float
    norm: ClassVar[float] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "b", check_positive("b", self.b))

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        _check_frames(x, generator)
        xp = _namespace(x)
        u = _uniform(x, generator) - 0.5
        return _rounded(x - self.b * xp.sign(u) * xp.log(xp.clip(1 - 2 * xp.abs(u), np.finfo(np.float32).tiny, None)), x)

    def _epsilon(self, budget: ArrayLike) -> Floats:
        return check_budget("budget", budget) / self.b

    def lower(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore", invalid="ignore"):
            high = 1 - np.where(p == 1, 0.0, (1 - p) * np.exp(epsilon))
        return np.where(np.isinf(epsilon), 0.0, np.maximum(p * np.exp(-epsilon), high))

    def upper(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore", invalid="ignore"):
            small = np.where(p == 0, 0.0, p * np.exp(epsilon))
        return np.where(np.isinf(epsilon), 1.0, np.minimum(small, p - (1 - p) * np.expm1(-epsilon)))

    def slope(self, p: ArrayLike, budget: ArrayLike) -> Floats:
        p, epsilon = np.broadcast_arrays(check_probability("p", p), self._epsilon(budget))
        with np.errstate(over="ignore"):
            steep = np.exp(epsilon)
        slope = np.where(p < 1 / (1 + np.exp(-epsilon)), np.exp(-epsilon), steep)
        return np.where(np.isinf(epsilon), 0.0, slope)

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        if p_upper is None:
            if p_lower <= 0.5:
                return 0.0
            return math.inf if p_lower == 1 else -self.b * math.log(2 * (1 - p_lower))
        p_upper = float(check_probability("p_upper", p_upper))
        if p_lower <= p_upper:
            return 0.0
        low, high = 0.0, self.b
        while self.lower(p_lower, high) >= self.upper(p_upper, high) and high < 1e3 * self.b:
            low, high = high, 2 * high
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.lower(p_lower, middle) >= self.upper(p_upper, middle) else (low, middle)
        return low

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return _l1_covering_budgets(norm, step, episode, horizon, n_features)


@dataclass(frozen=True)
class Ablation(_TotalVariation):
    """Each arriving frame is shown with probability `keep`, else replaced by `fill`; budgets count altered frames.

    Args:
        keep: probability that a frame reaches the policy, drawn afresh for every frame.
        fill: the null token, one value for the whole frame.

    P(an altered frame is ever shown) <= 1 - (1 - keep)^B for an attacker who may alter B frames.

    Source: Levine, Feizi (AAAI 2020), arXiv:1911.09272, for one input; the frame version is elementary (docs).
    """

    keep: float
    fill: float = 0.0
    norm: ClassVar[float] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_real("keep", self.keep, allowed="a probability in (0, 1)"))
        object.__setattr__(self, "fill", check_real("fill", self.fill))
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be a probability in (0, 1), got {self.keep}")

    def perturb(self, x: Frames, generator: Generator) -> Frames:
        _check_frames(x, generator)
        first = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]
        shown: Frames = _namespace(x).where(_uniform(first, generator) < self.keep, x, _like(self.fill, x))
        return shown

    def shift(self, budget: ArrayLike) -> Floats:
        frames = np.floor(check_budget("budget", budget))
        return -np.expm1(frames * math.log1p(-self.keep))

    def radius(self, p_lower: float, p_upper: float | None = None) -> float:
        p_lower = float(check_probability("p_lower", p_lower))
        rival = 1 - p_lower if p_upper is None else float(check_probability("p_upper", p_upper))
        if p_lower <= rival:
            return 0.0
        frames = math.floor(math.log1p(-(p_lower - rival) / 2) / math.log1p(-self.keep)) + 1
        while frames > 0 and 2 * self.shift(frames) * (1 + 1e-12) >= p_lower - rival:  # a tie would let the rival win
            frames -= 1
        return float(frames)

    def _covering_budgets(
        self, norm: float, step: float | None, episode: float | None, horizon: int, n_features: int
    ) -> list[float]:
        return [float(horizon)] if norm != 0 or episode is None else [float(horizon), episode]


MECHANISMS: dict[str, type[Noise]] = {
    kind.__name__: kind for kind in cast(list[type[Noise]], [Gaussian, Uniform, Splitting, Laplace, Ablation])
}


def noise_from_dict(data: dict[str, Any]) -> Noise:
    """Rebuild a mechanism from `Noise.to_dict`.

    Raises:
        ValueError: if the kind or its parameters are unknown.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in MECHANISMS:
        raise ValueError(f"noise kind must be one of {sorted(MECHANISMS)}, got {kind!r}")
    try:
        return MECHANISMS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"noise {kind} does not take the parameters {sorted(fields)}: {error}") from None


def _l1_covering_budgets(norm: float, step: float | None, episode: float | None, horizon: int, n_features: int) -> list[float]:
    """Every threat in l1 terms: per step ||e||_1 <= factor ||e||_p, and the steps add up."""
    bounds: list[float] = []
    if norm == 0:
        return bounds
    factor = {1: 1.0, 2: math.sqrt(n_features), math.inf: float(n_features)}[norm]
    if step is not None:
        bounds.append(horizon * factor * step)
    if episode is not None and norm != math.inf:
        bounds.append(episode * factor * (1.0 if norm == 1 else math.sqrt(horizon)))
    return bounds


def _check_frames(x: Any, generator: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"noise needs frames as a numpy array or torch tensor, got {type(x).__name__}")
    if "float" not in str(x.dtype):
        raise ValueError(
            f"noise needs frames of a floating dtype, got {x.dtype}: integers would round and wrap around; "
            "convert and scale the observation first"
        )
    if x.ndim < 2:
        raise ValueError(f"noise needs a batch of frames (n, *frame), got shape {tuple(x.shape)}")
    if isinstance(x, np.ndarray):
        fits = isinstance(generator, np.random.Generator)
    else:
        import torch

        fits = isinstance(generator, torch.Generator)
    if not fits:
        raise TypeError(f"generator must be of the frames' library ({type(x).__module__}), got {type(generator).__name__}")


def _namespace(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def _like(value: Any, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.asarray(value, dtype=x.dtype)
    import torch

    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _standard_normal(x: Any, generator: Any) -> Any:
    """N(0, 1) in double precision for arrays, in at least single precision for tensors (doubles are slow on many GPUs)."""
    if isinstance(x, np.ndarray):
        return generator.standard_normal(x.shape)
    import torch

    return torch.randn(x.shape, generator=generator, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _uniform(x: Any, generator: Any) -> Any:
    """U[0, 1) in double precision.

    The l1 proofs need draws that are continuous on the scale of the attack: single-precision ones lie on a grid of 2^-24,
    and an attacker could step across its points, in many entries, for next to nothing.
    """
    if isinstance(x, np.ndarray):
        return generator.random(x.shape)
    import torch

    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
    return torch.rand(x.shape, generator=generator, dtype=wide, device=x.device)


def _rounded(y: Any, x: Frames) -> Frames:
    """`y` in the dtype of `x`: rounding after the noise is post-processing."""
    rounded: Frames = y.astype(x.dtype, copy=False) if isinstance(x, np.ndarray) else y.to(x.dtype)
    return rounded
