"""Table 6 of the page: what the paper does not have, from how it is learned to how dynamic the matrices are."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from dynamixer.study.figures import Picture, matrices, series
from dynamixer.study.measure import KINDS, PICTURES, SEGMENTS, SEVERITIES, SIZES
from dynamixer.study.results import Line, Results
from dynamixer.study.rows import BASE, DATASETS, MAIN, PEERS, ROWS, SCARCE, TABLES, config_of, runs
from dynamixer.study.statistics import paired, spread
from dynamixer.study.words import NOT_RUN, common, in_order, interval_text, markdown, spread_text

NATIVE = 32
SHARES = (100, 30, 10)
GROUPS = {"noise": KINDS[:4], "blur": KINDS[4:9], "weather": (*KINDS[9:13], "spatter"), "digital": KINDS[13:18]}
LEARNED = (("dynamic", "static"), ("dynamic_plain", "static_plain"), ("dynamic_plain", "dynamic"))
BySeed = dict[int, float]


def block(results: Results) -> tuple[str, dict[str, Picture]]:
    """The text of the table's parts, and their pictures."""
    parts = (
        *(_by_epoch(results, *which) for which in (("imagenette", 100, MAIN), ("cifar10", min(SHARES), SCARCE))),
        _less_data(results),
        _other_sizes(results),
        _corrupted(results),
        *(_depth(results, dataset) for dataset in DATASETS),
        _matrices(results),
    )
    return "\n\n".join(text for text, _ in parts), {
        name: picture for _, some in parts for name, picture in some.items()
    }


def _part(heading: str, text: str) -> str:
    return f"### {heading}\n\n{text}"


def _cells(found: Mapping[float, BySeed], places: Sequence[float]) -> list[str]:
    return [spread_text(spread(list(found[p].values())) if found.get(p) else None) for p in places]


def _values(every: Mapping[str, Mapping[float, BySeed]]) -> dict[str, dict[float, list[float]]]:
    """What a plot shows: labels for rows, and no empty ones."""
    by_label = {
        ROWS[row].label: {place: list(seeds.values()) for place, seeds in found.items() if seeds}
        for row, found in every.items()
    }
    return {label: found for label, found in by_label.items() if found}


def _against(words: str, ours: BySeed, theirs: BySeed) -> str:
    """A difference in words, or that it is not known."""
    difference = paired(ours, theirs)
    if difference is None:
        return f"{words}: {NOT_RUN}"
    return f"{words}: {interval_text(difference)} points{' by one seed' if difference.seeds == 1 else ''}"


def _by_epoch(results: Results, dataset: str, share: int, rows: Sequence[str]) -> tuple[str, dict[str, Picture]]:
    """Held-out accuracy over the course of training, where runs have more than two epochs, and how differences go."""
    less = "" if share == max(SHARES) else f" {share} % of"
    heading = f"How it is learned,{less} {DATASETS[dataset].title.partition(',')[0]}"
    found: dict[str, dict[float, BySeed]] = {row: {} for row in rows}
    for line in results.lines["epochs"]:
        if (line["dataset"], int(line["share"])) == (dataset, share) and line["row"] in found and line["val_top1"]:
            found[line["row"]].setdefault(float(line["epoch"]), {})[int(line["seed"])] = float(line["val_top1"])
    epochs = sorted({epoch for line in found.values() for epoch in line})
    if not epochs:
        return _part(heading, "Not yet run."), {}
    shown = [epochs[round(n * (len(epochs) - 1) / 4)] for n in range(5)] if len(epochs) > 5 else epochs
    pairs = [(a, b) for a, b in LEARNED if {a, b} <= found.keys()]
    went = []
    for a, b in pairs:
        first, last = (paired(found[a].get(e, {}), found[b].get(e, {})) for e in (epochs[0], epochs[-1]))
        if first and last:
            went.append(
                f"{ROWS[a].label} less {ROWS[b].label} goes from {first.mean:+.1f} points after the first epoch to "
                f"{last.mean:+.1f} after the last"
            )
    lines = [
        [
            f"{ROWS[a].label} less {ROWS[b].label}",
            str(max(len(found[a].get(e, {}).keys() & found[b].get(e, {}).keys()) for e in shown)),
            *(interval_text(d) if (d := paired(found[a].get(e, {}), found[b].get(e, {}))) else NOT_RUN for e in shown),
        ]
        for a, b in pairs
    ]
    name = f"evidence-6-epochs-{dataset}.png"
    picture = series(
        f"Held-out pictures by epoch,{less} {DATASETS[dataset].title}", "epoch", "top-1 (%)", _values(found)
    )
    text = (
        "Top-1 of held-out pictures; differences in points over the seeds that both rows have (one seed has no interval), the"
        " learning rate falling to nothing at the last epoch.\n\n"
        f"{markdown(['row', 'seeds', *(f'epoch {e:.0f}' for e in shown)], lines)}\n\n![{picture.caption}](images/{name})\n\n"
        f"Of held-out pictures, {'; '.join(went) or NOT_RUN}."
    )
    return _part(heading, text), {name: picture}


def _less_data(results: Results) -> tuple[str, dict[str, Picture]]:
    heading = "Less data"
    found = {row: {float(s): results.tops("cifar10", row, s) for s in SHARES} for row in SCARCE}
    if not any(seeds for row in found.values() for share, seeds in row.items() if share < 100):
        return _part(heading, "Not yet run."), {}
    steps = config_of(runs()[0], "")
    count = DATASETS["cifar10"].pictures * steps.epochs // steps.batch_size
    name = "evidence-6-data.png"
    picture = series("Less data, about the same number of steps", "training pictures (%)", "top-1 (%)", _values(found))
    lines = [[ROWS[row].label, *_cells(v, SHARES)] for row, v in found.items()]
    says = "; ".join(
        _against(f"at {share} %", found["dynamic"][share], found["static"][share]) for share in map(float, SHARES)
    ).replace(".0 %", " %")
    text = (
        f"Top-1 in % after about {count:,} steps, whatever the number of pictures.\n\n"
        f"{markdown(['row', *(f'{s} %' for s in SHARES)], lines)}\n\n![{picture.caption}](images/{name})\n\n"
        f"Dynamic less static, with the softmax, {says}. Static matrices without the softmax were not trained on less."
    )
    return _part(heading, text), {name: picture}


def _other_sizes(results: Results) -> tuple[str, dict[str, Picture]]:
    heading = "Other sizes at test time"
    found: dict[str, dict[float, BySeed]] = {}
    for row in MAIN:
        lines = results.of("sizes", "cifar10", row)
        by_size = {float(s): {v["seed"]: v["top1"] for v in lines if v["size"] == s} for s in SIZES}
        measured = {seed for seeds in by_size.values() for seed in seeds}
        by_size[float(NATIVE)] = {s: top for s, top in results.tops("cifar10", row).items() if s in measured}
        found[row] = by_size
    sizes = sorted((*SIZES, NATIVE))
    if not any(seeds for row in found.values() for seeds in row.values()):
        return _part(heading, "Not yet run."), {}
    name = "evidence-6-sizes.png"
    picture = series("Other sizes at test time", "side of the test pictures (px)", "top-1 (%)", _values(found))
    table = markdown(
        ["row", *(f"{s} px" for s in sizes)], [[ROWS[row].label, *_cells(v, sizes)] for row, v in found.items()]
    )
    pairs = {"with the softmax": ("dynamic", "static"), "without it": ("dynamic_plain", "static_plain")}
    says = "; ".join(
        _against(f"{words}, at {size} px", found[a][float(size)], found[b][float(size)])
        for words, (a, b) in pairs.items()
        for size in (24, 48)
    )
    text = (
        f"Top-1 in %, trained at {NATIVE} px only; the pictures are scaled, which adds no detail to them.\n"
        f"[Any size](any-size.md) says how they are read.\n\n{table}\n\n"
        f"![{picture.caption}](images/{name})\n\nDynamic less static, {says}."
    )
    return _part(heading, text), {name: picture}


def _mean_error(lines: Sequence[Line], kinds: Sequence[str], severities: Sequence[int]) -> BySeed:
    """The plain mean over kinds and severities, by seed."""
    seeds = sorted({v["seed"] for v in lines})
    return {
        seed: statistics.fmean(
            v["error"] for v in lines if v["seed"] == seed and v["kind"] in kinds and v["severity"] in severities
        )
        for seed in seeds
    }


def _corrupted(results: Results) -> tuple[str, dict[str, Picture]]:
    heading = "Corrupted pictures"
    lines = {row: results.of("corrupted", "cifar10", row) for row in MAIN + PEERS}
    if not any(lines.values()):
        return _part(heading, "Not yet run."), {}
    every = {row: _mean_error(v, KINDS, SEVERITIES) for row, v in lines.items()}
    table = []
    for row, found in lines.items():
        clean = {seed: 100 - top for seed, top in results.tops("cifar10", row).items() if seed in every[row]}
        groups = [_mean_error(found, kinds, SEVERITIES) for kinds in GROUPS.values()]
        cells = [spread_text(spread(list(v.values())) if v else None) for v in (clean, every[row], *groups)]
        table.append([ROWS[row].label, *cells])
    by_severity = {row: {float(s): _mean_error(v, KINDS, [s]) for s in SEVERITIES} for row, v in lines.items()}
    name = "evidence-6-corrupted.png"
    picture = series("Corrupted test pictures, mean of 19 kinds", "severity", "error (%)", _values(by_severity))
    says = "; ".join(
        _against(words, every[a], every[b])
        for words, a, b in (("with the softmax", "dynamic", "static"), ("without it", "dynamic_plain", "static_plain"))
    )
    tops = {ROWS[row].label: found for row, found in every.items() if found}
    text = (
        "Error in %, the plain mean over kinds and severities; not comparable with the published CIFAR-10-C. Clean are all\n"
        "10,000 test pictures, corrupted 1,000 of them.\n\n"
        f"{markdown(['row', 'clean', 'corrupted', *GROUPS], table)}\n\n![{picture.caption}](images/{name})\n\n"
        f"Error of dynamic less that of static matrices, {says}. "
        f"Over {common(tops.values())}, the largest first: {in_order(tops)}."
    )
    return _part(heading, text), {name: picture}


def _depth(results: Results, dataset: str) -> tuple[str, dict[str, Picture]]:
    heading = f"How dynamic the matrices are, {DATASETS[dataset].title.partition(',')[0]}"
    every = {row: results.of("depth", dataset, row) for row in TABLES[1].rows}
    every = {row: lines for row, lines in every.items() if lines}
    if not every:
        return _part(heading, "Not yet run."), {}
    blocks = sorted({v["block"] for lines in every.values() for v in lines})
    keys = ("dynamic", "change", "entropy")
    figures = {key: {row: _by_block(lines, key) for row, lines in every.items()} for key in keys}
    whole = {key: {row: _mean(found.values()) for row, found in figures[key].items()} for key in keys}
    table = [
        [
            ROWS[row].label,
            str(len({line["seed"] for line in every[row]})),
            *(f"{_mean([figures['dynamic'][row][float(b)]]):.2f}" for b in blocks),
            *(f"{whole[key][row]:.2f}" for key in keys),
        ]
        for row in every
    ]
    name = f"evidence-6-depth{'' if dataset == 'cifar10' else f'-{dataset}'}.png"
    title = "Part of the matrices that changes with the picture"
    moving = {row: found for row, found in figures["dynamic"].items() if ROWS[row].model.get("generator") != "static"}
    picture = series(title, "block", "dynamic, 0 to 1", _values(moving))
    head = ["row", "seeds", *(f"block {b}" for b in blocks), *(f"{key}, all" for key in keys)]
    text = (
        f"Over {PICTURES} test pictures, means over rows and columns of the grid and over seeds: the part of what tells the\n"
        "matrices apart from plain averaging that changes with the picture (`dynamic`, by block and over all), how far a weight\n"
        "usually moves in units of an even weight, which is one part of the row (`change`), and how even the weights' sizes\n"
        "are (`entropy`, 1 for even). Nearly even matrices can be dynamic and do little: read `dynamic` with `change`.\n"
        "Without the softmax rows need not sum to 1, and how their sums change counts too: compare rows with the softmax, or\n"
        "rows without it. Normal noise, which such rows begin as, has an entropy of about 0.9: there it shows no learning.\n\n"
        f"{markdown(head, table)}\n\n![{picture.caption}](images/{name})\n\n"
        f"{_moving({row: [_mean([found[float(b)]]) for b in blocks] for row, found in figures['dynamic'].items()})}"
    )
    return _part(heading, text), {name: picture}


def _moving(by_block: Mapping[str, Sequence[float]]) -> str:
    """What the depths say of the paper's form, and of a generator that learned nothing."""
    if BASE not in by_block:
        return f"{ROWS[BASE].label}: {NOT_RUN}."
    ours = by_block[BASE]
    least, most = (f"in block {ours.index(value)} ({value:.2f})" for value in (min(ours), max(ours)))
    says = f"The paper's form is least dynamic {least} and most {most}"
    if "frozen" not in by_block:
        return f"{says}."
    random = statistics.fmean(by_block["frozen"])
    return f"{says}; over all blocks {statistics.fmean(ours):.2f}, with a random generator {random:.2f}."


def _matrices(results: Results) -> tuple[str, dict[str, Picture]]:
    heading = "What the matrices look like, Imagenette"
    every = {row: results.of("matrices", "imagenette", row) for row in MAIN}
    every = {row: lines for row, lines in every.items() if lines}
    if not every:
        return _part(heading, "Not yet run."), {}
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for row, lines in every.items():
        for v in sorted(lines, key=lambda v: v["segment"]):
            above = f"{v['picture']}, segment {v['segment']}"
            found.setdefault(ROWS[row].label, {})[above] = tuple(map(float, v["weights"].split()))
    negative = [
        f"{100 * statistics.fmean(weight < 0 for weights in row.values() for weight in weights):.0f} % ({label})"
        for label, row in found.items()
        if any(weight < 0 for weights in row.values() for weight in weights)
    ]
    says = (
        f"\n\nWithout the softmax tokens are subtracted too: negative are {' and '.join(negative)} of these weights.\n"
        "Of normal noise it would be half."
        if negative
        else ""
    )
    first = next(iter(every.values()))[0]
    name = "evidence-6-matrices.png"
    picture = matrices(f"Matrices of row {first['line']} of the grid in block {first['block']}, seed 0", found)
    text = (
        f"The first {SEGMENTS} segments, in the middle row of the grid and the last block before it shrinks: the mean over\n"
        f"{PICTURES} test pictures, and the first and the last of these. Nothing was picked. Above each matrix stands its\n"
        "largest weight in units of an even weight, to which its colours are scaled.\n\n"
        f"![{picture.caption}](images/{name}){says}"
    )
    return _part(heading, text), {name: picture}


def _by_block(lines: Sequence[Line], key: str) -> dict[float, BySeed]:
    """The mean over axes, by block and seed."""
    places = sorted({(v["block"], v["seed"]) for v in lines})
    found: dict[float, BySeed] = {}
    for number, seed in places:
        some = [v[key] for v in lines if (v["block"], v["seed"]) == (number, seed)]
        found.setdefault(float(number), {})[seed] = statistics.fmean(some)
    return found


def _mean(every: Iterable[BySeed]) -> float:
    return statistics.fmean(value for seeds in every for value in seeds.values())
