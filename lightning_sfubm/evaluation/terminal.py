"""The result table on a terminal, as the end of a run."""

import os
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from lightning_sfubm.evaluation.facts import comparison_facts, domain_facts, plain
from lightning_sfubm.evaluation.run_folder import Json, RunFolder


def print_results(run_dir: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print one table per domain and the paired differences of a run folder.

    Args:
        run_dir: the run folder.
        console: where to; standard output by default.

    Raises:
        DataError: there is no such folder.
    """
    console = console or Console()
    folder = RunFolder.read(run_dir)
    if not folder.results:
        console.print("No results were stored.")
    for domain in folder.domains:
        if domain in folder.results:
            console.print(_table(plain(domain_facts(domain, folder.results[domain]))))
    if folder.results and (comparisons := plain(comparison_facts(folder))):
        console.print("\nPaired differences in Hit@1 (95 % interval, exact McNemar p with Holm's correction)")
        for fact in comparisons:
            console.print(f"  {fact['domain']}: {_difference(fact)}", markup=False, highlight=False)
    for problem in folder.problems:
        console.print(f"note: {problem}", style="yellow", markup=False, highlight=False)


def print_metrics(stage: str, results: Sequence[Mapping[str, float]], console: Console | None = None) -> None:
    """Print what ``validate`` or ``test`` of a federated run found, one line for every client and metric.

    Args:
        stage: ``"validate"`` or ``"test"``.
        results: metrics by ``<client>/<stage>/<metric>``, one mapping a client.
        console: where to; standard output by default.
    """
    table = Table(title=stage, title_justify="left", show_header=False)
    for name, value in ((name, value) for client in results for name, value in sorted(client.items())):
        table.add_row(name.replace("[", r"\["), f"{value:.4f}")
    (console or Console()).print(table)


def _table(domain: Json) -> Table:
    chance = domain["chance"]
    caption = "beside Hit@1: its 95 % interval; valid: answers that name exactly one candidate"
    if chance["hit@1"] is not None:
        level = f"chance: Hit@1 {chance['hit@1']:.3f}, NDCG@10 {chance['ndcg@10']:.3f}"
        caption = f"{domain['num_candidates']} candidates, {level}; {caption}"
    table = Table(title=domain["name"], title_justify="left", caption=caption, caption_justify="left")
    table.add_column("method")
    for name in ("Hit@1", "NDCG@10", "MRR", "valid", "users"):
        table.add_column(name, justify="right", no_wrap=True)
    group = None
    for row in domain["rows"]:
        if row["group"] != group and table.row_count:
            table.add_section()
        group = row["group"]
        hit, metrics = row["metrics"]["hit@1"], row["metrics"]
        interval = "" if hit["value"] is None else f" [dim]{hit['low']:.3f} to {hit['high']:.3f}[/dim]"
        table.add_row(
            row["label"].replace("[", r"\["),
            _num(hit["value"]) + interval,
            _num(metrics["ndcg@10"]["value"]),
            _num(metrics["mrr"]["value"]),
            _num(metrics["valid_ratio"]["value"]),
            f"{row['users']:,}",
        )
    return table


def _difference(fact: Json) -> str:
    names = f"{fact['label_a']} - {fact['label_b']}"
    if "not_compared" in fact:
        return f"{names}: not compared, {fact['not_compared']}"
    hit = fact["hit@1"]
    if hit["difference"] is None:
        return f"{names}: no user in common"
    interval = f"{hit['difference']:+.3f} [{hit['low']:+.3f}, {hit['high']:+.3f}]"
    return f"{names} {interval}, p = {fact['p_holm']:.2g}, {hit['users']:,} users"


def _num(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
