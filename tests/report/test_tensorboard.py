"""TensorBoard: the certificate joins the run that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from robustrl.certify.returns import certify_quantile, certify_return
from robustrl.noise import Gaussian
from robustrl.report.attack import AttackReport
from robustrl.report.tensorboard import log_certificate
from robustrl.threat import ThreatModel

RETURNS = np.random.default_rng(0).integers(100, 201, 500).astype(float)


def certificate() -> Any:
    return certify_return(RETURNS, Gaussian(0.2), [0.0, 0.2, 0.6], method="paper", return_low=0, return_high=200)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def hparams(events: EventAccumulator) -> dict[str, Any]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {key: value.number_value or value.string_value or value.bool_value for key, value in found.items()}


def test_scalars_image_and_hparams_join_the_run(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        writer.add_scalar("rollout/ep_rew_mean", 3.0, 1)  # type: ignore[no-untyped-call]
    threat = ThreatModel(norm=2, episode=0.6).to_dict()
    report = AttackReport({"kind": "X"}, threat, RETURNS, np.array([150.0, 160.0]), np.zeros(2), 170.0, 0.05)
    log_certificate(tmp_path, certificate(), [report], {"algo": "ppo", "sigma": 0.2, "net": [64], "greedy": True})
    assert {path.parent for path in tmp_path.rglob("events*")} == {tmp_path}  # one run, not one per call
    events = read(tmp_path)
    values = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    for budget, value in zip((0, 0.2, 0.6), certificate().values, strict=True):
        assert values[f"certificate/budget_{budget:g}"] == pytest.approx(value)
    assert values["attack/budget_0.6"] == 155.0
    assert values["rollout/ep_rew_mean"] == 3.0
    assert events.Tags()["images"] == ["certificate"]
    assert hparams(events) == {"algo": "ppo", "sigma": 0.2, "net": "[64]", "greedy": True}


def test_budgets_without_a_certificate_have_no_scalar(tmp_path: Path) -> None:
    log_certificate(tmp_path / "new", certify_quantile(RETURNS[:30], 0.5, Gaussian(0.2), [0.0, 5.0]))
    assert read(tmp_path / "new").Tags()["scalars"] == ["certificate/budget_0"]
