"""Tabular agents with the interface of Stable-Baselines3."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zipfile
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from robustrl.agents.ase.declaration import Declaration, SafeSet
from robustrl.errors import check_count
from robustrl.files import write_atomically
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.outcomes import ModelViolation
from robustrl.mdp.unsafe import Unsafe

Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]
FORMAT = 2


class UnsafeStateError(RuntimeError):
    """An agent is asked for an action in a state where none is proven safe."""


class TabularAgent(BaseAlgorithm):
    """A learner for finite environments that works wherever an SB3 algorithm does: callbacks, loggers, `evaluate_policy`.

    Args:
        env: one environment with Discrete spaces, its id, a VecEnv of one, or a `Declaration` (to act, or to set one later).
        safe_set, unsafe, analogy, tau, gamma: what is known beforehand, see `ASE`; default what the environment declares.
        tensorboard_log: folder for TensorBoard.
        verbose: 0 silent, 1 prints the log.
        seed: of the agent's own choices and of the environment's first reset.
        device: ignored, tables need none.

    Attributes:
        declaration: what was known before the first step.
        unsafe_visits: dangerous steps so far.

    Raises:
        ValueError: if spaces are not Discrete, there are several environments, or something does not fit.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments, beside `seed` and what the declaration holds, that `load` builds the agent with again."""

    def __init__(
        self,
        env: Any,
        *,
        safe_set: SafeSet | None = None,
        unsafe: Unsafe | None = None,
        analogy: Analogy | None = None,
        tau: float | str | None = None,
        gamma: float | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str = "auto",
        stats_window_size: int = 100,
    ) -> None:
        declared = env if isinstance(env, Declaration) else None
        super().__init__(
            BasePolicy, None if declared else env, 0.0, tensorboard_log=tensorboard_log, verbose=verbose, device="cpu", seed=seed,
            stats_window_size=stats_window_size,
        )  # fmt: skip
        if declared is None:
            declared = Declaration.of(_inner(self.env), safe_set=safe_set, unsafe=unsafe, analogy=analogy, tau=tau, gamma=gamma)
        elif any(given is not None for given in (safe_set, unsafe, analogy, tau, gamma)):
            raise ValueError(
                "a Declaration holds safe_set, unsafe, analogy, tau and gamma already: give them to Declaration.of"
            )
        self.declaration, self.outcomes = declared, declared.outcomes
        if self.env is None:
            self.n_envs = 1
            self.observation_space = spaces.Discrete(self.outcomes.n_states)
            self.action_space = spaces.Discrete(self.outcomes.n_actions)
        for name, space, size in (
            ("observation_space", self.observation_space, self.outcomes.n_states),
            ("action_space", self.action_space, self.outcomes.n_actions),
        ):
            if not isinstance(space, spaces.Discrete) or space.n != size:
                raise ValueError(f"{name} of the environment must be Discrete({size}), got {space}")
        self.unsafe_visits, self._scale = 0, declared.declared.reward_scale
        self._slots: dict[tuple[int, int, int, float, bool], int] = {}
        self.set_random_seed(seed)

    def _setup_model(self) -> None:
        """SB3's hook; there is nothing to set up."""

    # What a learner adds

    @abstractmethod
    def _act(self, state: int) -> int:
        """The action to learn with."""

    @abstractmethod
    def _observe(self, state: int, action: int, slot: int, successor: int, ended: bool) -> None:
        """Learn from a step; `ended` by a terminal outcome, not by a time limit."""

    @abstractmethod
    def greedy(self) -> Integers:
        """The action (S,) that is best by what is known; -1 where the agent has none."""

    def acting(self) -> Integers:
        """The policy (S,) that the agent goes for the return by while it learns; -1 where it has none."""
        return self.greedy()

    def safe_actions(self, state: int) -> Flags:
        """Actions that the agent may take, (A,)."""
        mask: Flags = self.outcomes.valid[state]
        return mask

    def _contradicted(self, why: str, declared: bool) -> None:
        """The environment did what was excluded; `declared` says whether it was possible at least before the first safe set."""
        raise ModelViolation(why)

    def _facts(self) -> dict[str, Any]:
        """What the log shows beside the counters."""
        return {}

    def _pack(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything learnt, as plain data and arrays."""
        return {}, {}

    def _unpack(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """The inverse of `_pack`."""

    # SB3's interface

    def set_random_seed(self, seed: int | None = None) -> None:
        """Restart the agent's own random choices and, at its next reset, the environment's; no global generator is touched."""
        self._rng = np.random.default_rng(seed)
        if seed is not None:
            self.action_space.seed(seed)
            if self.env is not None:
                self.env.seed(seed)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another copy of the environment.

        Raises:
            ValueError: if it is another environment, as far as both say what they are, or says nothing.
        """
        wrapped = self._wrap_env(env, self.verbose)
        self.declaration.check(_inner(wrapped))
        super().set_env(wrapped, force_reset)

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Take steps and learn from them.

        Args:
            total_timesteps: number of steps.
            callback: SB3 callback, list of them, or function.
            log_interval: episodes between two lines of the log.
            tb_log_name: name of the run in TensorBoard, default the class's.
            reset_num_timesteps: count steps from 0 and reset the environment. What was learnt stays.
            progress_bar: show one.
        Raises:
            ModelViolation: if the environment contradicts what was declared. The step that did so is counted, also its danger where the
                outcome was declared at all.
            ValueError: if the agent has no environment.
        """
        if self.env is None:
            raise ValueError("env must be set before learning: agent.set_env(env)")
        total = check_count("total_timesteps", total_timesteps)
        until, callbacks = self._setup_learn(
            total, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        callbacks.on_training_start(locals(), globals())
        callbacks.on_rollout_start()
        state = self.state_of(self._last_obs)
        running, env, action = True, self.env, np.zeros(1, dtype=np.int64)
        while running and self.num_timesteps < until and not self.finished:
            self._update_current_progress_remaining(self.num_timesteps, until)
            taken = self._act(state)
            action[0] = taken + self._first_action
            self._last_obs, rewards, dones, infos = env.step(action)  # type: ignore[assignment]
            self.num_timesteps += 1
            info, ended = infos[0], bool(dones[0]) and not infos[0].get("TimeLimit.truncated", False)
            after = self.state_of(info["terminal_observation"] if dones[0] else self._last_obs)
            slot = self._slot(state, taken, after, float(rewards[0]), ended)
            cost = int(self.outcomes.dangerous[state, taken, slot])
            self.unsafe_visits += cost
            if not self.outcomes.candidates[state, taken, slot]:
                self._contradicted(
                    f"state {state}, action {taken} left the first safe set by slot {slot}: it is not closed", True
                )
            self._observe(state, taken, slot, after, ended)
            following = self.state_of(self._last_obs)
            info.update(cost=cost, cost_sum=self.unsafe_visits)
            info.update(certified=self.certified, safe_actions=self.safe_actions(following))
            self._update_info_buffer(infos, dones)
            callbacks.update_locals(locals())
            running = callbacks.on_step()
            state = following
            if dones[0]:
                self._episode_num += 1
                callbacks.on_rollout_end()
                if log_interval and self._episode_num % log_interval == 0:
                    self._dump()
                callbacks.on_rollout_start()
        callbacks.on_rollout_end()
        self._dump()
        callbacks.on_training_end()
        return self

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to learn that the caller has asked for."""
        return False

    @property
    def certified(self) -> bool:
        """Whether the agent's safety is proven."""
        return False

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """The best action by what is known, for a state or a batch of them.

        Returns:
            int64 actions of the shape of `observation`, and `state` unchanged.
        Raises:
            UnsafeStateError: in a state where no action is proven safe.
            ValueError: for observations that are no states.
        """
        given = np.asarray(observation)
        states = given - self._first_state
        if given.dtype.kind not in "iu" or (states < 0).any() or (states >= self.outcomes.n_states).any():
            raise ValueError(f"observation must hold states of {self.observation_space}, got {observation!r}")
        chosen = self.greedy()[states]
        if (chosen < 0).any():
            raise UnsafeStateError(f"no action is proven safe in state {given[chosen < 0].flat[0]}")
        return np.asarray(chosen + self._first_action), state

    def save(
        self,
        path: str | os.PathLike[str] | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write a zip of a JSON document and numpy arrays; nothing in it is a pickle. ".zip" is added where there is no suffix.

        What is written is fixed: `exclude` and `include` are refused.
        """
        if exclude is not None or include is not None:
            raise ValueError("exclude and include must be None: everything that was learnt is written, and nothing else")
        plain, arrays = self._pack()
        declared, known = self.declaration.to_arrays()
        document = {
            "format": FORMAT,
            "kind": type(self).__name__,
            "declaration": declared,
            "settings": {name: getattr(self, name) for name in self.settings},
            "spaces": [int(self._first_state), int(self._first_action)],
            "seed": self.seed,
            "verbose": self.verbose,
            "num_timesteps": self.num_timesteps,
            "unsafe_visits": self.unsafe_visits,
            "episodes": self._episode_num,
            "rng": self._rng.bit_generator.state,
            "learnt": plain,
        }
        tables, data = io.BytesIO(), io.BytesIO()
        np.savez_compressed(
            tables,
            allow_pickle=False,
            **{f"declaration/{k}": v for k, v in known.items()},
            **{f"learnt/{k}": v for k, v in arrays.items()},
        )
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("agent.json", json.dumps(document, allow_nan=False))
            archive.writestr("arrays.npz", tables.getvalue())
        if isinstance(path, io.BufferedIOBase):
            path.write(data.getvalue())
            return
        name = os.fspath(path)
        write_atomically(name if os.path.splitext(name)[1] else name + ".zip", data.getvalue())

    @classmethod
    def load(cls, path: Any, env: Any = None, **kwargs: Any) -> Self:  # type: ignore[override]  # SB3's other options mean nothing here
        """Read an agent that `save` wrote.

        Args:
            path: file; ".zip" is added where there is no suffix.
            env: environment to go on with; None to act only, or to set one later.
            kwargs: `tensorboard_log`, `verbose`; `device` and the like are ignored.
        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no such file, of another class, or `env` is another environment.
        """
        if not isinstance(path, io.BufferedIOBase):
            path = os.fspath(path)
            path = path if os.path.exists(path) or os.path.splitext(path)[1] else path + ".zip"
        try:
            with zipfile.ZipFile(path) as archive:
                document = json.loads(archive.read("agent.json"))
                with np.load(io.BytesIO(archive.read("arrays.npz")), allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in stored.files}
            if document["format"] != FORMAT or document["kind"] != cls.__name__:
                raise ValueError(f"holds a {document['kind']} of format {document['format']}, not a {cls.__name__} of {FORMAT}")
            declaration = Declaration.from_arrays(document["declaration"], _under("declaration/", arrays))
            agent = cls(
                declaration,
                seed=document["seed"],
                tensorboard_log=kwargs.get("tensorboard_log"),
                verbose=kwargs.get("verbose", document["verbose"]),
                **document["settings"],
            )
            agent._unpack(document["learnt"], _under("learnt/", arrays))
            agent.num_timesteps, agent.unsafe_visits = document["num_timesteps"], document["unsafe_visits"]
            agent._episode_num = document["episodes"]
            agent._rng.bit_generator.state = document["rng"]
            agent.observation_space = spaces.Discrete(agent.outcomes.n_states, start=document["spaces"][0])
            agent.action_space = spaces.Discrete(agent.outcomes.n_actions, start=document["spaces"][1])
        except (zipfile.BadZipFile, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"path must be a file that {cls.__name__}.save wrote, {path} is not: {error}") from None
        if env is not None:
            agent.set_env(env)
        return agent

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """What was learnt, as arrays by name."""
        return {"tables": dict(self._pack()[1])}

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """Not supported: `load` makes an agent with what was learnt."""
        raise NotImplementedError(f"{type(self).__name__} has no parameters to set: use {type(self).__name__}.load")

    # Small change

    @property
    def _first_state(self) -> int:
        return int(self.observation_space.start)  # type: ignore[attr-defined]

    @property
    def _first_action(self) -> int:
        return int(self.action_space.start)  # type: ignore[attr-defined]

    def state_of(self, observation: Any) -> int:
        """The state, counted from 0, that one observation, or a batch of one, shows."""
        return int(np.asarray(observation).item()) - self._first_state

    def _slot(self, state: int, action: int, successor: int, reward: float, ended: bool) -> int:
        """Which declared slot a step has shown."""
        key = (state, action, successor, reward, ended)
        if key not in self._slots:
            try:
                self._slots[key] = self.declaration.declared.slot(*key)
            except ModelViolation as violation:
                self._contradicted(str(violation), False)
                raise
        return self._slots[key]

    def _dump(self) -> None:
        """One line of the log."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", float(np.mean([found["r"] for found in self.ep_info_buffer])))
            self.logger.record("rollout/ep_len_mean", float(np.mean([found["l"] for found in self.ep_info_buffer])))
        self.logger.record("safety/unsafe_visits", self.unsafe_visits)
        for name, value in self._facts().items():
            self.logger.record(name, value, exclude="tensorboard" if isinstance(value, str) else None)
        self.logger.record("time/episodes", self._episode_num, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)


def _under(prefix: str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _inner(env: VecEnv | None) -> Any:
    """The one environment, with its wrappers, behind a VecEnv."""
    if env is not None and unwrap_vec_normalize(env) is not None:
        raise ValueError("env must pay its own rewards: a VecNormalize makes outcomes unrecognisable")
    base = env.unwrapped if env is not None else None
    if not isinstance(base, DummyVecEnv) or base.num_envs != 1:
        raise ValueError(f"env must be one environment of this process, got {base}")
    return base.envs[0]
