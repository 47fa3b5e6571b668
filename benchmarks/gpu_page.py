"""What benchmarks/gpu.py found, as the tables that docs/results/throughput.md has."""

from __future__ import annotations

from typing import Any

from gpu_runs import Part

COUNTS = ("passed", "failed", "skipped", "error")


def table(*head: str) -> list[str]:
    return ["", row_of(*head), "|" + "---|" * len(head)]


def row_of(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def page(found: Part) -> str:
    """Of all parts that have ended."""
    command, gpu = found["command"], found["gpu"]
    lines = [f"`{command}`: {gpu}, torch {found['torch']}, {found['seconds']:.0f} s"]
    for name, part in found["parts"].items():
        lines += ["", f"{name}: {part['state']}, {part['seconds']:.0f} s", *WORDS[name](part)]
    return "\n".join(lines) + "\n"


def tests(part: Part) -> list[str]:
    if "passed" not in part:
        return []
    return [", ".join(f"{part[each]} {each}" for each in COUNTS), *part["names_failed"]]


def parity(part: Part) -> list[str]:
    lines = table("codec", "compute", "attention", "stages", "swarm = one process", "one process = itself")
    for row in part.get("cases", []):
        why = "; ".join(f"{way}: {said}" for way, said in row.get("why", {}).items())
        itself = row.get("reference_equals_itself", "")
        shape = (f"`{row['codec']}`", row["dtype"], row["attention"], row["stages"])
        lines.append(row_of(*shape, row.get("equal", why), itself))
    return lines


def throughput(part: Part) -> list[str]:
    if "runs" not in part:
        return []
    lines = table("link", "codec", "schedule", "tokens/s", "bytes/token", "computing, by stage", "codec / compute")
    for row in part["runs"]:
        link = f"{row['link']}, blocking" if row["blocking"] else row["link"]
        figures: tuple[Any, ...] = (row["state"], "", "", "")
        if "tokens_per_s" in row:
            figures = (f"{row['tokens_per_s']:,.0f}", f"{row['bytes_per_token']:,.1f}")
            figures += (percent(row["compute_shares"]), percent(row["codec_over_compute"]))
        lines.append(row_of(link, f"`{row['codec']}`", f"`{row['schedule']}`", *figures))
    cost = part["codec_cost"]
    said = cost["state"]
    if "codecs" in cost:
        shares = ", ".join(f"`{each['codec']}` {each['share']:.1%}" for each in cost["codecs"])
        said = f"{shares} of a stage's forward and backward of {cost['tokens']} tokens; target {cost['target']:.0%}"
    return [*lines, "", f"Codec alone, on the device: {said}"]


def percent(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def loss(part: Part) -> list[str]:
    if "target" not in part:
        return []
    to, last = part["seconds_to_target"], part["last_losses"]
    return [
        f"Loss {part['target']:.4f} over {part['link']}, {part['compared_steps']} steps of {part['tokens_per_step']} "
        f"tokens: bf16 {to['bf16']:.1f} s, mapl {to['mapl']:.1f} s, **{part['dense_over_mapl']:.2f} times**; "
        f"last losses {last['bf16']:.4f} and {last['mapl']:.4f}"
    ]


WORDS = {"tests": tests, "parity": parity, "throughput": throughput, "loss": loss}
