"""Puts into README.md how well this machine's profile predicts, from the newest rows; measures nothing."""

from parts import rows

NAME = "profile"
FOLDER = rows.ROOT / "profiles" / "rows"


def text() -> str:
    """Markdown from the rows of cost-model and vit-contract."""
    found = rows.read(FOLDER / "cost-model.jsonl")
    networks = rows.newest([r for r in found if "plans" in r], ("model",))
    held = [r for r in found if "plans" not in r][-1]["held_out"]["all"]
    lines = [
        "| network | plan | of MACs | latency, of dense: predicted | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in networks:
        for name, plan in row["plans"].items():
            said, seen = plan["predicted"], plan["measured"]
            lines.append(
                f"| {row['model'].partition(',')[0]} | {name} | {plan['macs_ratio']:.2f} "
                f"| {said['value']:.3f} [{said['lo']:.3f}, {said['hi']:.3f}] "
                f"| {seen['value']:.3f} [{seen['lo']:.3f}, {seen['hi']:.3f}] | {plan['error']:+.1%} |"
            )
    last = networks[-1]
    lines += [
        "",
        f"Profile `{last['profile']}`: {last['threads']} thread of an {last['device']}, batch {last['batch']}, "
        f"{last['dtype']}, random weights. Only the dense network was timed before predicting. Operations held "
        f"out with their whole site: {held['median']:.1%} off in the median, {held['p90']:.1%} at the 90th "
        f"percentile, of {held['n']}. Rows: profiles/rows/cost-model.jsonl, commit {last['commit']}. Again: "
        "`scripts/bench cost-model`.",
        "",
        "| real ViT-Tiny pruned to | asked | latency measured, of dense | top-1 kept |",
        "|---|---|---|---|",
    ]
    contract = rows.read(FOLDER / "vit-contract.jsonl")
    for row in rows.newest(contract, ("budget", "method")):
        seen = row.get("latency_ratio")
        if not seen or row["method"] not in (
            "latency",
            "macs",
        ):  # the others: scripts/bench vit-contract
            continue
        asked = f"latency {row['budget']:.2f}"
        if row["asked_macs"]:
            asked = f"MACs {row['asked_macs']:.3f}, predicted as slow"
        lines.append(
            f"| {row['budget']:.2f} | {asked} | {seen['value']:.3f} [{seen['lo']:.3f}, {seen['hi']:.3f}] "
            f"| {row['top1_ratio']:.3f} ± {row['top1_ratio_se']:.3f} |"
        )
    lines += [
        "",
        f"Rows: profiles/rows/vit-contract.jsonl, commit {contract[-1]['commit']}, batch "
        f"{contract[-1]['batch']}, no training. On one core of a CPU time goes nearly as MACs do, so both ways "
        "of asking come to much the same model. Again: `scripts/bench vit-contract`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    rows.write_between(rows.ROOT / "README.md", NAME, text())
