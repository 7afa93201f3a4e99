"""What ``past-ray rollouts`` shows: a table of rollouts, or each with its turns."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Decode = Callable[[Sequence[int]], str]

Row = dict[str, Any]


def print_rows(rows: Sequence[Row], *, run: Path) -> None:
    """Print one line a rollout; the answer, or the error of a failed one, is cut to fit."""
    has_several = len({row["work_dir"] for row in rows}) > 1
    table = Table(box=None, pad_edge=False, expand=True)
    if has_several:
        table.add_column("stage", no_wrap=True)
    table.add_column("step", justify="right")
    table.add_column("rollout", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("reward", "tokens", "stale"):
        table.add_column(name, justify="right")
    table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        stage = [row["work_dir"].relative_to(run).name] if has_several else []
        cells = [
            *stage,
            str(row["step"]),
            row["rollout_id"],
            row["status"],
            number(row["reward"]),
            str(row["num_tokens"]),
            "-" if row["staleness"] is None else str(row["staleness"]),
            " ".join((row["error"] or row["answer"]).split()),
        ]
        # Text: an answer may hold what looks like rich's markup.
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


def print_full(rows: Sequence[Row]) -> None:
    """Print each rollout with the text of its turns; ids where the tokenizer is gone."""
    console = Console(highlight=False)
    for row in rows:
        decode = decoder(row["work_dir"])
        parts = ", ".join(f"{name} {number(value)}" for name, value in row["reward_parts"])
        console.rule(Text(f"step {row['step']}  {row['rollout_id']}"), align="left")
        _line(console, "status", f"{row['status']} {row['error']}".strip())
        _line(console, "reward", number(row["reward"]) + (f" ({parts})" if parts else ""))
        _line(console, "version", f"{row['policy_version']}, staleness {row['staleness']}")
        seconds = f"generation {row['generation_s']:.2f}, environment {row['environment_s']:.2f}"
        _line(console, "seconds", seconds)
        for place, turn in enumerate(row["turns"], start=1):
            size = f"{len(turn['token_ids'])} tokens, {turn['finish_reason']}"
            gain = f"reward {number(turn['reward'])}"
            console.print(Text(f"turn {place}: {size}, {gain}", style="bold"))
            _line(console, "prompt", decode(turn["prompt_ids"]))
            _line(console, "answer", decode(turn["token_ids"]))


@cache
def decoder(work_dir: Path) -> Decode:
    """Return what turns ids into text with the run's tokenizer, or into a list where it is gone.

    The tokenizer is looked for in the model that the run started from, then in its checkpoints.
    """
    folders = sorted(work_dir.glob("step-*"), reverse=True)
    record = work_dir / "rl.json"
    if record.is_file():
        folders.insert(0, Path(json.loads(record.read_text())["init_folder"]))
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            # The library of its own loads in a fraction of the time of transformers.
            from tokenizers import Tokenizer

            tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)
    return str


def number(value: float | None) -> str:
    """Format a reward."""
    return "-" if value is None else f"{value:.3g}"


def _line(console: Console, name: str, text: str) -> None:
    console.print(Text(f"  {name:<8} ", style="dim").append(text, style="not dim"), soft_wrap=True)
