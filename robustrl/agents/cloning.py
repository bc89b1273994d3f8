"""Behaviour cloning whose actions provably survive flipped demonstrations."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from robustrl.certify.classify import certified
from robustrl.certify.labels import FlipCertificates, LabelVote, Method, RidgeWeights
from robustrl.certify.radius import RadiusCertificate
from robustrl.errors import check_count, check_finite_array, check_positive
from robustrl.files import write_atomically

Floats = NDArray[np.float64]
Features = Callable[[Any], Any]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class FourierFeatures:
    """sqrt(2 / D) cos(standardised x @ frequencies + phases): random features of the Gaussian kernel, blind to actions.

    Args:
        mean: of the observations, shape (d,).
        scale: their standard deviation, shape (d,).
        frequencies: shape (d, D).
        phases: shape (D,).
    Source: Rahimi, Recht (NeurIPS 2007).
    """

    mean: Floats
    scale: Floats
    frequencies: Floats
    phases: Floats

    @classmethod
    def of(cls, observations: ArrayLike, n_features: int = 256, *, length_scale: float = 2.0, seed: int = 0) -> FourierFeatures:
        """Features for data like these.

        Args:
            observations: shape (n, ...).
            n_features: D.
            length_scale: of the kernel, in units of the typical distance sqrt(d) of standardised observations.
            seed: of frequencies and phases.
        """
        flat = check_finite_array("observations", observations)
        flat = flat.reshape(len(flat), -1)
        d, generator = flat.shape[1], np.random.default_rng(check_count("seed", seed, least=0))
        width = check_positive("length_scale", length_scale) * np.sqrt(d)
        scale = flat.std(axis=0)
        frequencies = generator.normal(size=(d, check_count("n_features", n_features))) / width
        phases = generator.uniform(0, 2 * np.pi, n_features)
        return cls(flat.mean(axis=0), np.where(scale > 0, scale, 1.0), frequencies, phases)

    def __call__(self, observations: NDArray[Any]) -> Floats:
        """Features (n, D) of observations (n, ...)."""
        flat = np.asarray(observations, dtype=np.float64).reshape(len(observations), -1)
        waves = np.cos((flat - self.mean) / self.scale @ self.frequencies + self.phases)
        return np.asarray(waves * np.sqrt(2 / len(self.phases)), dtype=np.float64)


class BehaviourCloning:
    """A policy for discrete actions by ridge regression on demonstrations, certified against flipped action labels.

    `certify` says for every observation how many of the demonstrated actions an attacker may replace, knowing everything,
    without any change of the action that `predict` returns. The features must not depend on the demonstrated actions.

    Args:
        observation_space: a Box.
        action_space: a Discrete.
        q: label noise of the vote, see `LabelVote`; 0 for none, which is fastest and certified exactly.
        ridge: penalty, > 0; chosen beforehand or from observations alone, never by the demonstrated actions.
        levels: largest vote of one demonstration.
        features: from observations (n, *shape) to features (n, D): a function of numpy arrays, or a torch module (float32, put
            into evaluation mode); called row by row. Default: `FourierFeatures` with the next three arguments.
        n_features, length_scale, seed: see `FourierFeatures.of`.

    Examples:
        >>> import gymnasium as gym, numpy as np
        >>> env = gym.make("CartPole-v1")
        >>> observations = np.random.default_rng(0).normal(size=(200, 4))
        >>> agent = BehaviourCloning(env.observation_space, env.action_space)
        >>> agent = agent.learn(observations, observations[:, 2] > 0)
        >>> action, _ = agent.predict(np.array([0.0, 0.0, 1.0, 0.0]))
        >>> int(action), int(agent.radius(np.array([0.0, 0.0, 1.0, 0.0]))) > 0
        (1, True)
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        q: float = 0.0,
        ridge: float = 0.1,
        levels: int = 15,
        features: Features | torch.nn.Module | None = None,
        n_features: int = 256,
        length_scale: float = 2.0,
        seed: int = 0,
    ) -> None:
        if not isinstance(observation_space, spaces.Box):
            raise TypeError(
                f"observation_space must be a Box (wrap dictionaries in FlattenObservation), got {observation_space}"
            )
        if not isinstance(action_space, spaces.Discrete):
            raise TypeError(f"action_space must be Discrete, got {action_space}")
        if features is not None and not callable(features):
            raise TypeError(f"features must be a function or a torch module, got {type(features).__name__}")
        LabelVote([0], int(action_space.n), q)  # a bad q should not wait for the demonstrations
        self.observation_space, self.action_space, self.q = observation_space, action_space, float(q)
        self.ridge, self.levels = check_positive("ridge", ridge), check_count("levels", levels)
        self.features = features
        self.n_features, self.seed = check_count("n_features", n_features), check_count("seed", seed, least=0)
        self.length_scale = check_positive("length_scale", length_scale)
        self._weights: RidgeWeights | None = None
        self._vote: LabelVote | None = None

    def learn(self, observations: ArrayLike, actions: ArrayLike) -> Self:
        """Fit to demonstrations.

        Args:
            observations: shape (n, *observation).
            actions: shape (n,), in the action space.
        Returns:
            the agent itself.
        Raises:
            ValueError: if shapes differ, an observation is not finite or an action is not in the action space.
        """
        rows = self._rows(observations)
        if rows.ndim != len(self._shape) + 1:
            raise ValueError(f"observations must have shape (n, *{self._shape}), got {rows.shape}")
        labels = check_finite_array("actions", actions) - self._start
        if labels.shape != (len(rows),):
            raise ValueError(f"actions must have shape ({len(rows)},), got {labels.shape}")
        if not np.isin(labels, np.arange(self.action_space.n)).all():
            raise ValueError(f"actions must lie in {self.action_space}, got {np.unique(labels + self._start)[:10].tolist()}")
        vote = LabelVote(labels, int(self.action_space.n), self.q)
        if self.features is None:
            options = {"length_scale": self.length_scale, "seed": self.seed}
            self.features = FourierFeatures.of(rows, self.n_features, **options)  # type: ignore[arg-type]
        self._weights = RidgeWeights(self._featurise(rows), ridge=self.ridge, levels=self.levels)
        self._vote = vote
        return self

    def predict(
        self,
        observation: ArrayLike,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """SB3's `predict`, for one observation or a batch; always deterministic, and without a state.

        Returns:
            actions (n,) or a single one, and `state` as it came.
        Raises:
            ValueError: if the shape is wrong or an observation is not finite.
            RuntimeError: before `learn`.
        """
        vote, weights, single = self._ballot(observation)
        actions = vote.predict(weights) + self._start
        return (actions[0] if single else actions), state

    def certify(self, observations: ArrayLike, method: Method | None = None) -> FlipCertificates:
        """Actions, and how many flipped labels cannot change them.

        Args:
            observations: shape (n, *observation), or a single one.
            method: see `LabelVote.certify`.
        Returns:
            entries per observation, shape (n,); `prediction` holds actions.
        Raises:
            ValueError, RuntimeError: see `predict`.
        """
        vote, weights, _ = self._ballot(observations)
        result = vote.certify(weights, method)
        return replace(result, prediction=result.prediction + self._start)

    def radius(self, observations: ArrayLike, method: Method | None = None) -> NDArray[np.int64]:
        """Certified label flips per observation, shape (n,); () for a single one."""
        radius = self.certify(observations, method).radius
        return radius[0] if self._rows(observations).shape == self._shape else radius

    def certify_trajectory(self, observations: ArrayLike, method: Method | None = None) -> int:
        """Label flips that change no action of an episode, from the observations visited in it, shape (n, *observation).

        The agent is deterministic; while no action changes, neither does what the environment (with the same randomness) shows
        next. So the whole episode stays as it was: its certificate is the smallest of its steps.
        """
        return int(self.certify(observations, method).radius.min())

    def evidence(self, observation: ArrayLike, method: Method | None = None) -> dict[str, Any]:
        """What `robustrl.certify.labels.label_flip_certificate` recomputes the certificate of one observation from.

        Raises:
            ValueError: if it is not a single observation.
        """
        vote, weights, _ = self._ballot(observation)
        if len(weights) != 1:
            raise ValueError(f"observation must be a single one, got {len(weights)}")
        return vote.evidence(weights[0], method)

    def certificate(self, observation: ArrayLike, method: Method | None = None) -> RadiusCertificate:
        """The certificate of one observation: how many flipped demonstrations cannot change its action. Norm 0, alpha 0."""
        evidence = self.evidence(observation, method)
        return certified("label-flips", evidence, alpha=0.0, norm=0, scope="training-labels")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, atomically and without pickles. A user's own `features` are not in it.

        Raises:
            OSError: if the file cannot be written.
            RuntimeError: before `learn`.
        """
        weights, vote = self._fitted()
        fourier = self.features if isinstance(self.features, FourierFeatures) else None
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            format=FORMAT,
            low=self.observation_space.low,
            high=self.observation_space.high,
            actions=(int(self.action_space.n), self._start),
            q=self.q,
            ridge=self.ridge,
            levels=self.levels,
            features=weights.features,
            labels=vote.labels,
            **({} if fourier is None else vars(fourier)),
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: Features | torch.nn.Module | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            features: the function it was trained with, if it was the user's own.
        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or needs `features` and got none.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
            if int(data["format"]) != FORMAT:
                raise ValueError(f"format {data['format']} is not {FORMAT}")
            fourier = {name: data[name] for name in FourierFeatures.__dataclass_fields__ if name in data}
            if features is None and not fourier:
                raise ValueError("it was trained with features of its own: pass features=")
            n, start = data["actions"].tolist()
            agent = cls(
                spaces.Box(data["low"], data["high"], dtype=data["low"].dtype.type),
                spaces.Discrete(n, start=start),
                q=float(data["q"]),
                ridge=float(data["ridge"]),
                levels=int(data["levels"]),
                features=features or FourierFeatures(**fourier),
            )
            agent._weights = RidgeWeights(data["features"], ridge=agent.ridge, levels=agent.levels)
            agent._vote = LabelVote(data["labels"], n, agent.q)
            if len(agent._vote) != len(agent._weights.features):
                raise ValueError("features and labels differ in number")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be loaded as a cloned policy: {error}") from None
        return agent

    @property
    def _shape(self) -> tuple[int, ...]:
        assert self.observation_space.shape is not None
        return self.observation_space.shape

    @property
    def _start(self) -> int:
        return int(self.action_space.start)

    def _fitted(self) -> tuple[RidgeWeights, LabelVote]:
        if self._weights is None or self._vote is None:
            raise RuntimeError("the agent has no demonstrations yet: call learn(observations, actions) first")
        return self._weights, self._vote

    def _rows(self, observations: ArrayLike) -> NDArray[Any]:
        rows = np.asarray(observations)
        if rows.shape != self._shape and (rows.shape[1:] != self._shape or rows.ndim == 0):
            raise ValueError(f"observations must have shape {self._shape} or (n, *{self._shape}), got {rows.shape}")
        check_finite_array("observations", rows)
        return rows

    def _ballot(self, observations: ArrayLike) -> tuple[LabelVote, NDArray[np.int64], bool]:
        """The vote, the weights (n, demonstrations), and whether there was a single observation."""
        weights, vote = self._fitted()
        rows = self._rows(observations)
        single = rows.shape == self._shape
        return vote, weights(self._featurise(rows[None] if single else rows)), single

    def _featurise(self, rows: NDArray[Any]) -> Floats:
        """Features, row by row: in a batch the last bits depend on a row's place, and the certified action is the executed one."""
        return check_finite_array("features(observations)", np.concatenate([self._feature(row[None]) for row in rows]), ndim=2)

    def _feature(self, row: NDArray[Any]) -> Floats:
        assert self.features is not None
        if not isinstance(self.features, torch.nn.Module):
            return np.asarray(self.features(row))
        device = next((p.device for p in self.features.parameters()), "cpu")
        with torch.no_grad():
            values = self.features.eval()(torch.from_numpy(row).float().to(device)).double().cpu().numpy()
        return np.asarray(values, dtype=np.float64)
