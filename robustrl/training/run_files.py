"""The run directory: `model.zip`, `run.json`, `normalization.npz`, `denoiser.pt`, `chunks/`, `certificate.json`, `attack.json`, `tb/`.

After robust training `model.zip` holds the weights that did best under attack, and `model-last.zip` those that training ended with.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustrl.envs.recipe import EnvRecipe
from robustrl.errors import check_count
from robustrl.files import write_atomically
from robustrl.policy import Normalization

SCHEMA = 1
NORMALIZATION = "normalization.npz"
DENOISER = "denoiser.pt"


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` holds: plain data from which model and environment are rebuilt.

    Attributes:
        algo: "ppo", "a2c", "dqn", "sac", "td3", "ddpg", "recurrent_ppo", "sa_ppo" or "sa_dqn".
        recipe: `EnvRecipe.to_dict`; its normalisation has a file of its own, `normalization.npz`.
        seed: root seed of training.
        timesteps: environment steps trained.
        hyperparameters: keyword arguments of the algorithm, as text where they are no plain data; "network", "activation" and "robust"
            as `train` was told and what it kept; "distilled" of a student, what `distil` was told.
        versions: of the libraries that trained it.
        denoiser: of a run whose policy sees its observations through the network in `denoiser.pt`: "frame_stack", the frames that
            the policy itself takes, and what trained the network; empty without one.
    """

    algo: str
    recipe: dict[str, Any]
    seed: int
    timesteps: int
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    denoiser: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `run.json`, and `normalization.npz` if there is a normalisation, into the folder."""
        stated = asdict(self)
        if not self.denoiser:
            del stated["denoiser"]
        if self.recipe.get("normalization") is not None:
            Normalization.from_dict(self.recipe["normalization"]).save(Path(folder) / NORMALIZATION)
            stated["recipe"]["normalization"] = NORMALIZATION
        text = json.dumps({"schema": SCHEMA, **stated}, indent=1, default=str)
        write_atomically(Path(folder) / "run.json", text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunInfo:
        """Read `run.json` of a folder.

        Raises:
            FileNotFoundError: if there is none, or the normalisation that it names is missing.
            ValueError: if it is damaged.
        """
        path = Path(folder) / "run.json"
        if not path.exists():
            model = path.with_name("model.zip")
            hint = f"; for the model alone give {model}" if model.exists() else ""
            raise FileNotFoundError(f"{folder} is no run directory: it has no run.json{hint}")
        try:
            data = json.loads(path.read_text())
            if data.pop("schema") != SCHEMA:
                raise ValueError("unknown schema")
            run = cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        kinds = {
            "algo": str,
            "recipe": dict,
            "seed": int,
            "timesteps": int,
            "hyperparameters": dict,
            "versions": dict,
            "denoiser": dict,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(run, name), kind):
                raise ValueError(f"{path} is damaged: {name} must be {kind.__name__}, got {getattr(run, name)!r}")
        if run.recipe.get("normalization") == NORMALIZATION:
            run.recipe["normalization"] = Normalization.load(Path(folder) / NORMALIZATION).to_dict()
        return run

    @property
    def policy_frames(self) -> int:
        """Frames that the policy takes, behind a denoiser that may take more.

        Raises:
            ValueError: if `run.json` does not say.
        """
        return check_count("frame_stack", self.denoiser.get("frame_stack", self.recipe.get("frame_stack", 1)))

    @property
    def env(self) -> EnvRecipe:
        """The environment it was trained in; see `environment`."""
        return self.environment()

    def environment(self, *, trust: bool = False) -> EnvRecipe:
        """The environment it was trained in.

        Args:
            trust: import the module that its id names, if it names one.
        Raises:
            ValueError: if it used a factory or wrappers, which `run.json` can name but not hold, its id is not registered, or
                names a module that is not imported.
        """
        return EnvRecipe.from_dict(self.recipe, trust=trust)

    @property
    def self_contained(self) -> bool:
        """Whether the environment can be rebuilt from the file alone."""
        return self.recipe.get("factory") is None and not self.recipe.get("wrappers")
