"""Puts into README.md how well this machine's profile predicts, from the newest rows; measures nothing."""

from parts import rows

NAME = "profile"
FOLDER = rows.ROOT / "profiles" / "rows"


def text() -> str:
    """Markdown from the rows of cost-model."""
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
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    rows.write_between(rows.ROOT / "README.md", NAME, text())
