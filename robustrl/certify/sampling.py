"""Evidence about a smoothed function: how often its base function says what on noisy copies of an input.

The only place in this room that samples. Everything random happens on the device, the host waits once per tally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustrl.certify.certificate import Floats
from robustrl.errors import check_count, check_real
from robustrl.noise import Gaussian, Noise
from robustrl.policy import PolicyView
from robustrl.seeding import integer_seed

if TYPE_CHECKING:
    from robustrl.certify.radius import RadiusCertificate

Counts = NDArray[np.int64]

FINEST = 2.0**-13
"""Smallest noise relative to the largest entry of an input: a thousand steps of single precision."""

ROWS_CPU, ROWS_GPU = (32, 4096), (32, 65536)
"""Fewest and most noisy copies per forward pass: what amortises a call, and stays in a processor's cache."""
ENTRIES_CPU, ENTRIES_GPU = 2**17, 2**27
"""Most entries of one pass's noisy copies, unless these are fewer than the fewest."""


@dataclass(frozen=True)
class Tally:
    """What a base function said on noisy copies of b inputs. Tallies of the same inputs add up.

    Attributes:
        counts: how often each of the K classes had the highest score, (b, K).
        n: noisy copies per input.
        classes: the class per input that the fields below are about, (b,); it was fixed before these samples were drawn.
        both: antithetic pairs x + e, x - e that are both of the class, (b,).
        exactly_one: pairs of which one is, (b,).
        moments: sums of (1{class} - 1/2) e / sigma over two independent halves, (b, 2, d).
        halves: samples in each half.
        products: sums over independent pairs, both of the class, of <e, e'> / sigma^2, (b,).
        values: sums of the clipped scores, (b, K).
    """

    counts: Counts
    n: int
    classes: Counts | None = None
    both: Counts | None = None
    exactly_one: Counts | None = None
    moments: Floats | None = None
    halves: tuple[int, int] | None = None
    products: Floats | None = None
    values: Floats | None = None

    def __add__(self, other: Tally) -> Tally:
        if not isinstance(other, Tally):
            return NotImplemented
        mine, theirs = ([f.name for f in fields(t) if getattr(t, f.name) is not None] for t in (self, other))
        if mine != theirs or self.counts.shape != other.counts.shape or not np.array_equal(self._about(), other._about()):
            raise ValueError("tallies can only be added if they count the same things about the same inputs and classes")
        total = {name: getattr(self, name) + getattr(other, name) for name in mine if name not in ("classes", "halves")}
        if self.halves is not None and other.halves is not None:
            total["halves"] = (self.halves[0] + other.halves[0], self.halves[1] + other.halves[1])
        return Tally(**total, classes=self.classes)

    def _about(self) -> Counts:
        return np.empty(0, np.int64) if self.classes is None else self.classes

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def top(self) -> Counts:
        """The most frequent class of every input, the lowest of several, (b,)."""
        top: Counts = self.counts.argmax(axis=1)
        return top


class Smoothed:
    """A function on noisy copies of its input: g(x) = the class that f(x + noise) takes most often.

    The base function may be an image classifier or one step of a policy; the calls are the same.

    Args:
        base: torch module, SB3 model with discrete actions, `PolicyView`, or any callable: inputs (rows, *shape) float32 to
            scores (rows, K). The class is the highest score's. A module is evaluated in evaluation mode and left as it was.
        noise: the mechanism.
        bounds: (low, high) that scores are clipped to before they are averaged, for `certify(method="values")`.
        device: where to sample; default where the base's parameters are.
        seed: root of the noise; every call draws afresh. Two objects of one seed draw the same: samples of the one must not choose what
            samples of the other are counted for.
        batch_size: most rows per forward pass; default by the size of an input. Noise, and so the counts, do not depend on it.
        amp: dtype such as torch.bfloat16 for autocasting inside the base function; noise stays in float32.

    Examples:
        >>> import torch, robustrl as rrl
        >>> smoothed = rrl.Smoothed(torch.nn.Linear(2, 3), rrl.Gaussian(0.5), seed=0)
        >>> certificate = smoothed.certify(torch.zeros(1, 2), n=1000)[0]
        >>> certificate.prediction, certificate.radius  # doctest: +SKIP
    """

    def __init__(
        self,
        base: Any,
        noise: Noise,
        *,
        bounds: tuple[float, float] | None = None,
        device: Any = None,
        seed: int | None = None,
        batch_size: int | None = None,
        amp: torch.dtype | None = None,
    ) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a robustrl noise mechanism such as Gaussian(0.2), got {noise!r}")
        noise.require("input")
        self.base, self.function = base, _function(base)
        self.noise, self.amp = noise, amp
        self.bounds = None if bounds is None else _bounds(bounds)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        module = self.function if isinstance(self.function, nn.Module) else None
        found = None if module is None else next((p.device for p in module.parameters()), None)
        self.device = torch.device(device or found or "cpu")
        self._next_stream = integer_seed(np.random.SeedSequence(seed))

    def tally(
        self, x: Any, n: int, *, classes: Any = None, pairs: bool = False, gradient: bool = False, values: bool = False
    ) -> Tally:
        """Count the classes of `n` noisy copies of each input.

        Args:
            x: inputs (b, *shape), array or tensor of a floating dtype.
            n: copies of each.
            classes: the class of each input, (b,), that `pairs` and `gradient` are about; chosen from other samples.
            pairs: draw antithetic pairs x + e, x - e (`n` must be even).
            gradient: also sum what the gradient of the class's probability is estimated from (`n` must be even).
            values: also sum the scores, clipped to `bounds`.
        Returns:
            Tally, on the host.
        Raises:
            ValueError: if an input or a score is NaN or inf, a number is out of range, or pairs or gradients are asked of another
                noise than a Gaussian of one sigma.
            TypeError: for inputs that are no floats.
        """
        inputs = self.inputs(x)
        if isinstance(self.function, PolicyView) and not self.function.discrete:
            raise TypeError("base must be a policy with discrete actions to be counted; see outputs() for continuous ones")
        counting = _Counting(self, inputs, check_count("n", n), classes, pairs=pairs, gradient=gradient, values=values)
        with self.evaluating() as scores:
            for copies in self._passes(inputs, n, pairs=pairs, keep_noise=gradient):
                counting.add(copies, scores(copies.rows))
        return counting.result()

    def outputs(self, x: Any, n: int) -> Tensor:
        """What the base function gives on `n` noisy copies of each input: (b, n, K), on the device.

        Raises:
            ValueError: if an output is NaN or inf.
        """
        inputs = self.inputs(x)
        with self.evaluating() as scores:
            found = torch.cat([scores(copies.rows) for copies in self._passes(inputs, check_count("n", n))])
        if not torch.isfinite(found).all():
            raise ValueError("outputs of the base function must be finite, got NaN or inf")
        return found.reshape(len(inputs), n, *found.shape[1:])

    def predict(self, x: Any, n: int = 1000, alpha: float = 0.001) -> Counts:
        """The smoothed function's class of each input, or `ABSTAIN`; see `robustrl.certify.classify.predict`."""
        from robustrl.certify import classify

        return classify.predict(self, x, n, alpha)

    def certify(self, x: Any, n0: int = 100, n: int = 100_000, alpha: float = 0.001, **options: Any) -> list[RadiusCertificate]:
        """A radius around each input within which the smoothed function keeps its class; see `classify.certify`."""
        from robustrl.certify import classify

        return classify.certify(self, x, n0, n, alpha, **options)

    def decide(
        self, x: Any, radius: float, alpha: float = 0.001, max_n: int = 100_000, **options: Any
    ) -> list[RadiusCertificate]:
        """Whether the radius of each input is at least `radius`, with as few samples as it takes; see `classify.decide`."""
        from robustrl.certify import classify

        return classify.decide(self, x, radius, alpha, max_n, **options)

    def next_stream(self) -> int:
        """A number that seeds another function, such that the two share no samples."""
        self._next_stream += 1
        return self._next_stream

    def inputs(self, x: Any) -> Tensor:
        """Inputs (b, *shape) as float32 on the device, checked."""
        try:
            found = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"x must be an array or tensor of inputs (b, *shape), got {type(x).__name__}") from None
        if not found.is_floating_point():
            raise TypeError(
                f"x must be of a floating dtype, got {found.dtype}: convert it, and scale it to the units of the noise, first"
            )
        if found.ndim < 2 or 0 in found.shape:
            raise ValueError(f"x must be a batch of inputs (b, *shape), got shape {tuple(found.shape)}")
        if not torch.isfinite(found).all():
            raise ValueError("x must be finite, got NaN or inf")
        inputs = found.detach().to(self.device, torch.float32)
        scale = min(
            (value for name in ("sigma", "lam", "b") for value in _positive(getattr(self.noise, name, None))), default=math.inf
        )
        if scale < FINEST * float(inputs.abs().max()):
            raise ValueError(
                f"{self.noise} is too little noise for inputs as large as {float(inputs.abs().max()):g}: sums in single precision "
                "would be rounded to a grid; subtract an offset, or scale"
            )
        return inputs

    def rounding(self, x: Any, norm: float) -> list[float]:
        """How far single precision moves each input, in a norm, rounded up; 0 where it does not.

        Samples around the rounded input say nothing about a ball around the given one, but about a smaller ball inside.
        """
        given, inputs = torch.as_tensor(x), self.inputs(x)
        if norm == 0 or given.dtype in (torch.float32, torch.float16, torch.bfloat16):  # rounding alters no entry of its own
            return [0.0] * len(inputs)
        moved = (given.to(inputs.device).double() - inputs.double()).flatten(1)
        lengths: list[float] = (torch.linalg.vector_norm(moved, ord=norm, dim=1) * (1 + 1e-12)).tolist()
        return lengths

    def _passes(self, x: Tensor, n: int, *, pairs: bool = False, keep_noise: bool = False) -> Iterator[_Copies]:
        """Noisy copies of all inputs, one pass of the base function after the other, in one buffer.

        An input's copies are drawn by a generator of its own, in blocks that depend on `n` and its size alone.
        """
        most = self.rows(x)
        buffer = torch.empty(min(most, n * len(x)), *x.shape[1:], device=self.device)
        noise = torch.empty_like(buffer) if keep_noise else None
        first, self._next_stream = self._next_stream, self._next_stream + len(x)
        pieces: list[tuple[int, int, int]] = []
        filled = 0
        for i, clean in enumerate(x):
            generator = torch.Generator(self.device).manual_seed((first + i) % 2**63)
            for start in range(0, n, most):
                size = min(most, n - start)
                if filled + size > len(buffer):
                    yield _Copies(buffer[:filled], pieces, noise)
                    pieces, filled = [], 0
                rows = buffer[filled : filled + size]
                self._perturb(clean, rows, generator, pairs, None if noise is None else noise[filled : filled + size])
                pieces.append((i, filled, filled + size))
                filled += size
        yield _Copies(buffer[:filled], pieces, noise)

    def _perturb(self, clean: Tensor, out: Tensor, generator: torch.Generator, pairs: bool, noise: Tensor | None) -> None:
        """Fill `out` with noisy copies of one input."""
        if not isinstance(self.noise, Gaussian) or isinstance(self.noise.sigma, tuple):
            out.copy_(self.noise.perturb(clean.expand_as(out), generator))
            return
        if pairs:
            half = len(out) // 2
            torch.neg(out[:half].normal_(generator=generator), out=out[half:])
        else:
            out.normal_(generator=generator)
        if noise is not None:
            noise.copy_(out)
        torch.add(clean, out, alpha=self.noise.sigma, out=out)

    def rows(self, x: Tensor) -> int:
        """Noisy copies per pass of the base function."""
        (least, most), entries = (ROWS_CPU, ENTRIES_CPU) if self.device.type == "cpu" else (ROWS_GPU, ENTRIES_GPU)
        return 2 * (max(least, min(most, entries // math.prod(x.shape[1:]))) // 2)

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The base function, to be called on rows; its module in evaluation mode meanwhile."""
        function, modes = self.function, []
        if isinstance(function, PolicyView):
            view = function.for_inference()
            function = view.scores if view.discrete else view.mean_action
        elif isinstance(function, nn.Module):
            modes = [(part, part.training) for part in function.modules()]
            function.eval()
        try:
            with torch.inference_mode():
                yield lambda rows: self._scores(function, rows)
        finally:
            for part, mode in modes:
                part.training = mode

    def _scores(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        casting: AbstractContextManager[Any] = nullcontext()
        if self.amp is not None:
            casting = torch.autocast(self.device.type, self.amp)
        try:
            with casting:
                found = [function(part) for part in torch.split(rows, self.batch_size or len(rows))]
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # out of memory, say
                raise
            what = f"{tuple(rows.shape[1:])}, {str(rows.dtype).removeprefix('torch.')}, on {rows.device}"
            raise ValueError(f"the base function does not take inputs of shape {what}: {error}") from error
        for part in found:
            if not isinstance(part, Tensor) or part.ndim != 2:
                hint = "; pass the SB3 model, not its policy" if hasattr(self.base, "get_distribution") else ""
                raise ValueError(f"the base function must map (rows, *shape) to scores (rows, K), got {_shape(part)}{hint}")
        scores = found[0] if len(found) == 1 else torch.cat(found)
        if len(scores) != len(rows):
            raise ValueError(f"the base function must give a row of scores per input, got {len(scores)} for {len(rows)}")
        return scores.float()


@dataclass(frozen=True)
class _Copies:
    """One pass: noisy copies, whose they are as (input, start, stop), and their noise in units of sigma."""

    rows: Tensor
    pieces: list[tuple[int, int, int]]
    noise: Tensor | None


class _Counting:
    """A tally in the making, on the device."""

    def __init__(self, of: Smoothed, x: Tensor, n: int, classes: Any, *, pairs: bool, gradient: bool, values: bool) -> None:
        self.n, self.device, self.bounds = n, of.device, of.bounds
        self.classes = None if classes is None else check_classes(classes, len(x))
        self.about = None if self.classes is None else self.classes.tolist()
        self.pairs, self.gradient, self.values = pairs, gradient, values
        if pairs and gradient:
            raise ValueError("pairs and gradient need different samples: ask for one of them")
        if pairs or gradient:
            if not isinstance(of.noise, Gaussian) or isinstance(of.noise.sigma, tuple) or of.noise.sigma == 0:
                raise ValueError(f"pairs and gradient need Gaussian noise of one sigma > 0, got {of.noise}")
            if n % 2:
                raise ValueError(f"n must be even for pairs and gradient, got {n}")
            if classes is None:
                raise ValueError("classes must be given for pairs and gradient, chosen from other samples")
        if values and of.bounds is None:
            raise ValueError("bounds must be given to Smoothed for values: the range that scores are clipped to")
        b, zeros = len(x), torch.zeros
        self.counts: Tensor | None = None
        self.sums: Tensor | None = None
        self.finite = torch.ones((), dtype=torch.bool, device=of.device)
        self.both, self.one = (zeros(b, dtype=torch.int64, device=of.device) for _ in range(2))
        self.moments = zeros(b, 2, x[0].numel() if gradient else 0, dtype=torch.float64, device=of.device)
        self.products = zeros(b, dtype=torch.float64, device=of.device)
        self.b = b

    def add(self, copies: _Copies, scores: Tensor) -> None:
        if self.counts is None:
            if scores.shape[1] < 2:
                raise ValueError(
                    "the base function must score at least two classes, got one: add a column of zeros for the other"
                )
            self.counts = torch.zeros(self.b, scores.shape[1], dtype=torch.int64, device=self.device)
            self.sums = torch.zeros(self.b, scores.shape[1], dtype=torch.float64, device=self.device)
            if self.classes is not None and self.classes.max() >= scores.shape[1]:
                raise ValueError(f"classes must be below K = {scores.shape[1]}, got {self.classes.max()}")
        assert self.sums is not None
        self.finite &= torch.isfinite(scores).all()
        found = scores.argmax(dim=1)
        for i, a, b in copies.pieces:
            self.counts[i].scatter_add_(0, found[a:b], torch.ones_like(found[a:b]))
            if self.values and self.bounds is not None:
                self.sums[i] += scores[a:b].clamp(*self.bounds).double().sum(dim=0)
            if self.about is not None and (self.pairs or self.gradient):
                self._add_halves(i, found[a:b] == self.about[i], None if copies.noise is None else copies.noise[a:b])

    def _add_halves(self, i: int, hit: Tensor, noise: Tensor | None) -> None:
        half = len(hit) // 2
        first, second = hit[:half], hit[half:]
        if noise is None:
            self.both[i] += (first & second).sum()
            self.one[i] += (first ^ second).sum()
            return
        flat = noise.flatten(1)
        for j, (part, e) in enumerate(((first, flat[:half]), (second, flat[half:]))):
            self.moments[i, j] += (part.float() - 0.5) @ e
        both = (first & second).double()
        self.products[i] += both @ (flat[:half] * flat[half:]).sum(dim=1, dtype=torch.float64)

    def result(self) -> Tally:
        assert self.counts is not None
        assert self.sums is not None
        if not bool(self.finite):
            raise ValueError("scores of the base function must be finite, got NaN or inf")

        def host(part: Tensor, wanted: bool) -> Any:
            return part.cpu().numpy() if wanted else None

        return Tally(
            counts=self.counts.cpu().numpy(),
            n=self.n,
            classes=self.classes,
            both=host(self.both, self.pairs),
            exactly_one=host(self.one, self.pairs),
            moments=host(self.moments, self.gradient),
            halves=(self.n // 2, self.n // 2) if self.gradient else None,
            products=host(self.products, self.gradient),
            values=host(self.sums, self.values),
        )


def check_classes(classes: Any, b: int) -> Counts:
    """Classes (b,) as int64; refuse fractions and negatives."""
    found = np.asarray(classes)
    if found.shape != (b,) or found.dtype.kind not in "iu" or (found < 0).any():
        raise ValueError(f"classes must hold one class >= 0 per input, {b} integers, got {classes!r}")
    return found.astype(np.int64)


def _function(base: Any) -> Any:
    """What is called: a module, a view of a policy, or any callable."""
    if isinstance(base, nn.Module) and not isinstance(base, PolicyView):
        return base
    if isinstance(base, PolicyView) or hasattr(base, "policy"):
        view = PolicyView.of(base, n_frames=base.n_frames if isinstance(base, PolicyView) else 1)
        if view.memory_shape is not None:
            raise TypeError("base must be a policy without memory: a recurrent one is no function of its observation")
        return view
    if callable(base):
        return base
    raise TypeError(f"base must be a torch module, an SB3 model, a PolicyView or a callable, got {type(base).__name__}")


def _positive(scale: Any) -> list[float]:
    return [value for value in (scale if isinstance(scale, tuple) else (scale,)) if isinstance(value, float) and value > 0]


def _bounds(bounds: Sequence[float]) -> tuple[float, float]:
    low, high = (check_real("bounds", value) for value in bounds)
    if low >= high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    return low, high


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
