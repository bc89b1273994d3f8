"""The command about safe exploration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustrl.options import EnvKwargs, Workers, parse_number, parse_object


def explore(
    env: Annotated[
        str, typer.Option("--env", help="Gymnasium id: a grid world of robustrl, or FrozenLake, CliffWalking, Taxi.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; runs that are there already are kept.")],
    agents: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            help="ase (the default), undirected-ase, safe-r-max, r-max, mbie, safe-epsilon-greedy, epsilon-greedy or q-learning; "
            "more than once to compare.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each agent.")] = 5,
    timesteps: Annotated[int, typer.Option(help="Steps of each run.")] = 2_000,
    env_kwargs: EnvKwargs = None,
    tau: Annotated[
        str | None,
        typer.Option(
            help="Lower bound of every positive probability, or from_P (the truth, where the environment has a table of it); default what "
            "the environment declares."
        ),
    ] = None,
    delta: Annotated[float, typer.Option(help="Failure probability.")] = 0.05,
    gamma: Annotated[float | None, typer.Option(help="Discount; default what the environment declares.")] = None,
    safe_set: Annotated[
        str | None, typer.Option(help="from_P: start from the largest safe set that the environment's table P has.")
    ] = None,
    unsafe_below: Annotated[float | None, typer.Option(help="Steps with a smaller reward are dangerous.")] = None,
    unsafe_states: Annotated[str | None, typer.Option(help="Steps into these states, 5,7,11, are dangerous.")] = None,
    options: Annotated[
        str | None,
        typer.Option("--options", help="Further keyword arguments of single agents as JSON: {agent: {name: value}}."),
    ] = None,
    workers: Workers = 1,
) -> None:
    """Explore a finite environment without leaving what is proven safe; writes curves, a map, an animation and certificates."""
    from robustrl.exploration import explore as run
    from robustrl.mdp import Unsafe
    from robustrl.report.exploration import ExplorationRun, exploration_table

    dangers = [] if unsafe_below is None else [Unsafe.reward_below(unsafe_below)]
    if unsafe_states is not None:
        dangers.append(Unsafe.states([int(parse_number("--unsafe-states", text)) for text in unsafe_states.split(",")]))
    given = {
        "tau": tau if tau in (None, "from_P") else parse_number("--tau", tau),
        "gamma": gamma,
        "safe_set": safe_set,
        "unsafe": None if not dangers else dangers[0] if len(dangers) == 1 else dangers[0] | dangers[1],
    }

    def finished(one: ExplorationRun) -> None:
        found = "" if one.safe_pairs is None else f", {one.safe_pairs[-1]} pairs proven safe"
        print(f"{one.agent}, seed {one.seed}: {one.unsafe_visits[-1]} unsafe visits{found}, {one.seconds:.1f} s", flush=True)

    runs = run(
        env,
        agents or ["ase"],
        seeds=seeds,
        timesteps=timesteps,
        out=out,
        env_kwargs=parse_object("--env-kwargs", env_kwargs),
        options={name: value for name, value in given.items() if value is not None},
        agent_options=parse_object("--options", options),
        delta=delta,
        n_workers=workers,
        on_run=finished,
    )
    print(exploration_table(runs))
    stuck = sorted({one.agent for one in runs if one.stuck})
    if stuck:
        print(f"no safe policy reaches an end of the episode, and nothing is left to learn ({', '.join(stuck)})")
    print(
        f"curves: {out / 'curves.png'}   raw: {out / 'curves.csv'}   runs and certificates: {out / 'runs'}   TensorBoard: {out / 'tb'}"
    )
    for picture in sorted([*out.glob("*-map.png"), *out.glob("*-growth.gif")]):
        print(f"picture: {picture}")
