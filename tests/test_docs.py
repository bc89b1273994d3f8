"""The tutorial and the README's example run as they stand."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_block_after_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert len(blocks("docs/tutorial.md")) == 5
    for block in blocks("docs/tutorial.md"):
        exec(block, namespace)  # the page is ours


def test_the_page_on_agents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/agents.md")
    exec(block, {})  # the page is ours
    assert (tmp_path / "normalization.npz").exists()


@pytest.mark.parametrize("page", ["attacks", "robust_training"])
def test_the_pages_on_attacks_run_block_after_block(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert len(blocks(f"docs/methods/{page}.md")) >= 2
    for block in blocks(f"docs/methods/{page}.md"):
        exec(block, namespace)  # the page is ours


def test_the_page_on_lipschitz_networks_runs() -> None:
    (block,) = blocks("docs/methods/lipschitz_networks.md")
    namespace: dict[str, Any] = {}
    exec(block, namespace)  # the page is ours
    assert namespace["extractor"].lipschitz() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("page", ["splitting", "label_flips"])
def test_the_pages_on_exact_methods_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(f"docs/methods/{page}.md")
    exec(block, {})  # the page is ours
    assert (tmp_path / "certificate.json").exists()


def test_the_readme_example_runs_with_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md")
    small = {
        "learn(200_000)": "learn(4_096)",
        "episodes=10_000": "episodes=500",
        "SmoothedPGD()": "SmoothedPGD(draws=8)",
        "episodes=200": "episodes=10",
    }
    for long, short in small.items():
        assert long in block
        block = block.replace(long, short)
    exec(block, {})
    assert (tmp_path / "certificate.json").exists()
    assert (tmp_path / "certificate.png").exists()


@pytest.mark.parametrize(
    ("script", "words", "written"),
    [
        ("own_agent.py", "--timesteps 2048 --episodes 100 --attacked 4", "certificate-0.1.json"),
        ("continuous_agent.py", "--episodes 4 --attacked 1 --workers 1", "certificate.json"),
        ("one_input.py", "--epochs 5 --n 1000", "step.json"),
        ("attack_and_harden.py", "--timesteps 1024 --episodes 2 --horizon 20", "hardened.json"),
        ("lipschitz_agent.py", "--rounds 1 --observations 500", "deterministic.json"),
        ("shield.py", "--explore 1200 --train 1024", "certificate.json"),
    ],
)
def test_the_examples_run(
    script: str, words: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words.split(), "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert "certified" in capsys.readouterr().out
    assert (tmp_path / written).exists()


@pytest.mark.parametrize("page", ["deterministic", "fast_training"])
def test_the_blocks_of_method_pages_run_one_after_the_other(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(f"docs/methods/{page}.md"):
        exec(block, names)
    assert "rrl" in names


def test_no_page_has_a_gap_to_fill() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert [str(page) for page in pages if re.search(r"@[A-Z]+@", page.read_text())] == []
