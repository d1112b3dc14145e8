"""What the command line tells of a table that was predicted from those of other devices."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from latency_lut.transfer import TransferStats
from latency_lut.transferred import Transferred
from spaces.space import Space


def summary_rows(transferred: Transferred, stats: TransferStats) -> list[tuple[str, str, str]]:
    """What, value and unit: what was measured, what was predicted, and how well."""
    samples = f"{transferred.pair_samples} + {transferred.network_samples}"
    rows = [
        ("predicted from", ", ".join(transferred.sources), "tables of these devices"),
        ("samples", samples, "pairs + networks, measured"),
        ("measured now", f"{stats.pairs} + {stats.networks}", f"pairs + networks; {stats.seconds:.1f} s in all"),
    ]
    for what, estimates, error in (
        ("pairs", list(transferred.pairs.values()), transferred.pair_error),
        ("networks", [network.estimate for network in transferred.networks], transferred.network_error),
    ):
        if estimates:
            std = float(np.median([estimate.std_us / estimate.us for estimate in estimates]))
            rows.append((f"{what}, predicted", f"{len(estimates)}", f"standard deviation {std:.1%} in the median one"))
        if error is not None:
            rows.append((f"{what}, mean error", f"{error:.1%}", "of the samples, leave-one-out"))
    return rows


def proposals(space: Space, name: str, transferred: Transferred, stats: TransferStats) -> Table:
    """What would tell most if it were measured next, and what is predicted of it."""
    table = Table(title=f"{name}: proposed to be measured next")
    table.add_column("what")
    for column in ("predicted, us", "standard deviation"):
        table.add_column(column, justify="right")
    networks = {(network.architecture, network.lowerings): network.estimate for network in transferred.networks}
    rows = [(f"{spec} {lowering}", transferred.pairs[spec, lowering]) for spec, lowering in stats.proposed_pairs]
    for drawn in stats.proposed_networks:
        network = space.network(drawn[0])
        rows.append((f"network, {len(network.nodes)} layers, {network.macs / 1e6:.2f} M MACs", networks[drawn]))
    for what, estimate in rows:
        table.add_row(what, f"{estimate.us:.1f}", f"{estimate.std_us / estimate.us:.1%}")
    return table


def next_command(name: str, transferred: Transferred) -> str:
    """What measures the proposals, too."""
    samples = transferred.pair_samples + transferred.network_samples
    return f"python -m latency_lut device={name} 'transfer=[{','.join(transferred.sources)}]' samples={2 * samples}"
