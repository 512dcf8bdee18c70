"""The figures of `bench` as a table and as a roofline."""

from pathlib import Path
from typing import Any

from dynamixer.files import check_picture_path, whole_file


def table(found: dict[str, Any]) -> str:
    """All models' figures as Markdown."""
    lines = []
    for model in found["models"]:
        height, width = model["size"]
        lines += [
            f"{model['model']}, {height}x{width}, {model['precision']}, times against {model['baseline']} "
            f"(median of rounds, quartiles)",
            "",
            "| | variant | images/s | times | share of the ceiling | p50 | p99 | peak memory | kept for backward |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        parts: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
            (f"batch {model['batch']}", model["inference"], model["ceiling"]),
            ("batch 1", model["latency"], {}),
            (_training_title(model), model["training"], model["training_ceiling"]),
        )
        for title, rows, ceiling in parts:
            for name, row in rows.items():
                is_of_it = ceiling and not name.endswith("int8")  # the ceiling is that of the run's precision
                share = f"{100 * row['images_per_s'] / ceiling['images_per_s']:.0f} %" if is_of_it else ""
                peak, kept = _mib(row, "peak_mib"), _mib(row, "kept_mib")
                times = f"{row['times_baseline']:.2f} ({row['times_low']:.2f}-{row['times_high']:.2f})"
                lines.append(
                    f"| {title} | {name} | {row['images_per_s']:.1f} | {times} | {share} | {row['p50_ms']:.0f} ms | "
                    f"{row['p99_ms']:.0f} ms | {peak} | {kept} |"
                )
            if ceiling:
                best, rate = ceiling["images_per_s"], ceiling["gflop_per_s"]
                bound = f"{best / rows[model['baseline']]['images_per_s']:.2f}" if rows else ""
                lines.append(
                    f"| {title} | matrix products alone, {rate:.0f} GFLOP/s | {best:.1f} | {bound} | | | | | |"
                )
        lines.append("")
        for name, why in model["refused"].items():
            lines.append(f"{name} is not timed: {why}")
        if model["start"]:
            start = model["start"]
            lines.append(
                f"second start: {start['ready_to_first_answer_s']:.1f} s from the model to the first answer, "
                f"{start['process_s']:.1f} s for the process with its imports"
            )
            lines.append("")
    return "\n".join(lines).rstrip()


def _mib(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.0f} MiB" if key in row else ""


def _training_title(model: dict[str, Any]) -> str:
    batch = model["train_batch"]
    return "training step" if batch == model["batch"] else f"training step, batch {batch}"


def scale_table(found: dict[str, Any]) -> str:
    """Cost against picture size and batch as Markdown."""
    lines = [
        "| model | pixels | batch | images/s | GFLOP an image | GFLOP/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        work = 2e-9 * row["multiply_adds"]
        lines.append(
            f"| {row['model']} | {row['size']} | {row['batch']} | {row['images_per_s']:.2f} | {work:.2f} | "
            f"{work * row['images_per_s']:.0f} | {_mib(row, 'peak_mib')} |"
        )
    return "\n".join(lines)


def parts_table(found: dict[str, Any]) -> str:
    """Where the time goes, as Markdown."""
    lines = []
    for one in found["profiles"]:
        height, width = one["size"]
        lines += [
            f"{one['model']}, {height}x{width}, {one['precision']}, {one['what']}, batch {one['batch']}: {one['ms']:.0f} ms",
            "",
            "| operation | | time | share | rate of its products |",
            "|---|---|---|---|---|",
        ]
        for part in one["parts"]:
            rate = f"{part['gflop_per_s']:.0f} GFLOP/s" if "gflop_per_s" in part else ""
            name = part["operation"].rpartition("::")[2].strip("_")
            lines.append(f"| {name} | {part['part']} | {part['ms']:.1f} ms | {100 * part['share']:.1f} % | {rate} |")
        lines += [
            "",
            f"Its matrix products alone, each by itself at its best: {one['bound_ms']:.0f} ms, "
            f"{one['bound_gflop_per_s']:.0f} GFLOP/s.",
            "",
        ]
    return "\n".join(lines).rstrip()


def roofline(found: dict[str, Any], path: Path) -> None:
    """Draw each model's products and variants under the machine's limits, as PNG.

    Raises:
        UserError: the path is no name for a PNG.
    """
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    check_picture_path(path)
    models = found["models"]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6.4 * len(models), 5.4), layout="constrained")
        for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            _draw(axis, model)
        about = found["about"]
        figure.suptitle(
            f"{about['processor']}, {about['cores']} cores, {about['vectors']}, torch {about['torch']}", fontsize=9
        )
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def _draw(axis: Any, model: dict[str, Any]) -> None:
    ceiling, products = model["ceiling"], model["ceiling"]["products"]
    top = max(product["gflops"] for product in products)
    reach = [0.3, max(product["intensity"] for product in products) * 2]
    knee = top / ceiling["copy_gb_per_s"]
    axis.plot([reach[0], knee, reach[1]], [reach[0] * ceiling["copy_gb_per_s"], top, top], color="black", linewidth=1.5)
    axis.annotate(
        f"memory, {ceiling['copy_gb_per_s']:.0f} GB/s", (reach[0] * 2, reach[0] * 1.5 * ceiling["copy_gb_per_s"])
    )
    work = [2e-9 * p["m"] * p["k"] * p["n"] * p["count"] for p in products]
    axis.scatter(
        [p["intensity"] for p in products],
        [p["gflops"] for p in products],
        s=[20 + 300 * w / max(work) for w in work],
        alpha=0.4,
        color="tab:blue",
        label="each matrix product by itself; area: its share of the work",
    )
    per_image = 2e-9 * model["multiply_adds"]
    for number, (name, row) in enumerate(model["inference"].items()):
        rate = per_image * row["images_per_s"]
        axis.axhline(rate, color=f"C{number + 1}", linewidth=1.2, linestyle="--", label=f"{name}: {rate:.0f} GFLOP/s")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP for each byte that has to move",
        ylabel="GFLOP/s",
        title=f"{model['model']}, batch {model['batch']}, {model['precision']}",
    )
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, fontsize=8, frameon=False)
    axis.grid(alpha=0.2, which="both")
