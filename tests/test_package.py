"""The package: its public names, its light import, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from typing import Any

import pytest

import robustrl

HEAVY = ("torch", "stable_baselines3", "scipy", "matplotlib", "gymnasium", "numpy", "joblib", "tensorboard")


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_every_public_name_can_be_had_and_is_listed() -> None:
    for name in robustrl.__all__:
        assert getattr(robustrl, name) is not None
    assert set(robustrl.__all__) <= set(dir(robustrl))
    assert set(robustrl.__all__) == {*robustrl._NAMES, *robustrl._MODULES}
    assert len(set(robustrl.__all__)) == len(robustrl.__all__)


def test_names_of_the_design_are_there() -> None:
    names = "Gaussian Uniform Laplace Splitting certify_return certify_success certify_quantile certify_policy attack_policy "
    names += "verify_certificate load_agent ThreatModel make_vec_env"
    assert set(names.split()) <= set(robustrl.__all__)
    assert robustrl.policy.PolicyView is not None
    assert robustrl.agents.SmoothedAgent is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'robustrl' has no attribute 'certify_everything'"):
        _ = robustrl.certify_everything
    with pytest.raises(ImportError):
        exec("from robustrl import certify_everything")


REGISTERING = {"gymnasium", "numpy"}
"""What `gym.make("robustrl/...")` after a plain `import robustrl` costs: a tenth of a second."""


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_after("import robustrl; robustrl.__version__; dir(robustrl)") == REGISTERING


def test_the_command_lines_help_loads_nothing_heavy() -> None:
    code = "import robustrl.cli\nfor words in ([], ['certify']):\n sys.argv = ['robustrl', *words, '--help']\n"
    code += " try: robustrl.cli.main()\n except SystemExit as stop: assert not stop.code, stop.code"
    assert modules_after(code) == REGISTERING


def test_noise_and_threat_need_no_torch() -> None:
    assert not modules_after("import robustrl as r; r.Gaussian(0.2).lower(0.9, 0.1); r.ThreatModel(norm=2, step=1)") & {
        "torch",
        "stable_baselines3",
        "matplotlib",
    }


@pytest.mark.parametrize(
    "name", ["noise", "threat", "envs.single", "envs.chain", "agents.smoothed", "certify.returns", "api", "policy", "seeding"]
)
def test_examples_in_docstrings_run(name: str) -> None:
    module: Any = importlib.import_module(f"robustrl.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name in ("policy", "seeding", "api", "noise")


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert robustrl.__version__ == version("robustrl")


def test_types_are_shipped() -> None:
    from importlib.resources import files

    assert files("robustrl").joinpath("py.typed").is_file()
