"""The tables and sentences of docs/evidence.md, from the results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamixer.errors import UserError
from dynamixer.files import write_text
from dynamixer.study import beyond
from dynamixer.study.figures import Bar, Picture, comparison, write_pictures
from dynamixer.study.plan import plan
from dynamixer.study.results import Results
from dynamixer.study.rows import (
    BASE,
    BEYOND,
    DATASETS,
    MAIN,
    MAIN_SEEDS,
    PEERS,
    ROWS,
    SEEDS,
    TABLES,
    Run,
    config_of,
    protocol,
    runs,
)
from dynamixer.study.statistics import CONFIDENCE, Difference, Spread, holm, paired, spread
from dynamixer.study.words import (
    NOT_RUN,
    NOTHING,
    common,
    in_order,
    interval_text,
    markdown,
    share_of,
    signed,
    spread_text,
)

# The comparisons named before the runs, with the paper's difference: one row less another.
CONTRASTS = (
    ("dynamic", "static", "dynamic against static matrices, with the softmax", 1.2),
    ("dynamic_plain", "static_plain", "dynamic against static matrices, without the softmax", None),
    ("dynamic_plain", "dynamic", "without against with the softmax, dynamic matrices", None),
)
# Differences that answer further questions; chosen when results had been seen.
FURTHER = (
    ("dynamic", "static_plain", "dynamic matrices with the softmax against static ones without"),
    ("static_plain", "static", "without against with the softmax, static matrices"),
    ("frozen", "static", "a random generator against static matrices, with the softmax"),
    ("frozen_plain", "static_plain", "a random generator against static matrices, without the softmax"),
    ("dense_plain", "dynamic_plain", "dense against dynamic matrices, without the softmax"),
)
SMALL = 0.3  # points: published differences, of one run each, that are not judged


@dataclass(frozen=True)
class Line:
    """A row of a table: accuracies by seed, and what follows from them."""

    row: str
    label: str
    tops: dict[int, float]
    difference: Difference | None  # to the first row, on common seeds
    paper: float | None  # the paper's difference

    @property
    def spread(self) -> Spread | None:
        """Of the accuracies."""
        return spread(list(self.tops.values())) if self.tops else None

    @property
    def verdict(self) -> str:
        """Whether the difference is on the paper's side of zero, if that has one."""
        if self.row == BASE or self.difference is None or self.paper is None or abs(self.paper) <= SMALL:
            return NOTHING
        if self.row == "static":  # a main comparison, judged with correction
            return "judged below"
        if not self.difference.sign:
            return "one seed" if self.difference.low is None else "not settled"
        return "agrees" if self.difference.sign * self.paper > 0 else "disagrees"


def lines_of(number: int, dataset: str, results: Results) -> list[Line]:
    """The rows of a table on a dataset."""
    table = TABLES[number]
    base = results.tops(dataset, BASE)
    found = []
    for row, paper in table.rows.items():
        if dataset != "cifar10" and row not in MAIN:
            continue
        tops, theirs = results.tops(dataset, row), table.rows[BASE]
        difference = paired(tops, base) if row != BASE else None
        gap = None if paper is None or theirs is None else round(paper - theirs, 1)
        found.append(Line(row, table.labels.get(row, ROWS[row].label), tops, difference, gap))
    return found


def table_text(dataset: str, lines: Iterable[Line], results: Results) -> str:
    """As Markdown."""
    out = [
        "| row | parameters | step | top-1 % (seeds) | difference, 95 % interval | p | published | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        time = results.time(dataset, line.row)
        trained = results.of("runs", dataset, line.row)
        size = trained[0]["parameters"] if trained else time["parameters"] if time else None
        is_base = line.row == BASE
        cells = [
            line.label,
            NOTHING if size is None else f"{size:,}",
            "not timed" if time is None else f"{time['ratio']:.2f}x",
            spread_text(line.spread),
            NOTHING if line.difference is None else interval_text(line.difference),
            NOTHING if line.difference is None or line.difference.p is None else _p(line.difference.p),
            NOTHING if line.paper is None or is_base else signed(line.paper, 1),
            line.verdict,
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def timed(dataset: str, results: Results) -> str:
    """On what the steps of a dataset's tables were timed; nothing before they were."""
    if not (time := results.time(dataset, BASE)):
        return ""
    return (
        f"Steps of {time['batch']} pictures, {time['rounds']} in turn, with {time['threads']} thread of {time['cpu']}, "
        f"torch {time['torch']}: {time['milliseconds']:.0f} ms for {ROWS[BASE].label}."
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def sentence(lines: Sequence[Line]) -> str:
    """What a table says, and whether it agrees with the paper."""
    compared = [line for line in lines if line.row != BASE]
    known = [line for line in compared if line.difference is not None]
    if not known:
        return "Nothing to compare yet." if any(line.tops for line in lines) else "Not yet run."
    sides = {1: [v for v in known if _sign(v) > 0], -1: [v for v in known if _sign(v) < 0]}
    base = next((line.label for line in lines if line.row == BASE), BASE)
    parts = [
        f"{word} than {base}: {_named(found)}" for word, found in (("better", sides[1]), ("worse", sides[-1])) if found
    ]
    tested = any(line.difference and line.difference.low is not None for line in known)
    none = f"no interval of a difference to {base} leaves out zero" if tested else "one seed: nothing can be tested yet"
    text = "; ".join(parts) or none
    judged = [v for v in known if v.verdict not in (NOTHING, "judged below")]
    if judged:
        said = [(w, [v for v in judged if v.verdict == w]) for w in ("agrees", "disagrees", "not settled", "one seed")]
        text += f". Against what is published: {'; '.join(f'{word} {_labels(found)}' for word, found in said if found)}"
    missing = len(compared) - len(known)
    rows = "row" if missing == 1 else "rows"
    return f"{text[0].upper()}{text[1:]}.{f' {missing} {rows} not yet run.' if missing else ''}"


def _sign(line: Line) -> int:
    return line.difference.sign if line.difference else 0


def _named(lines: list[Line]) -> str:
    return ", ".join(f"{v.label} ({signed(v.difference.mean)})" for v in lines if v.difference)


def _labels(lines: list[Line]) -> str:
    return f"({', '.join(v.label for v in lines)})"


def contrasts(dataset: str, results: Results) -> str:
    """The comparisons named before the runs, corrected by Holm for all of them; those without a p-value yet count as 1."""
    found = [
        (words, paper, paired(results.tops(dataset, a), results.tops(dataset, b))) for a, b, words, paper in CONTRASTS
    ]
    if not any(difference for *_, difference in found):
        return ""
    corrected = holm([1.0 if d is None or d.p is None else d.p for *_, d in found])
    planned = MAIN_SEEDS if dataset == "cifar10" else SEEDS
    out = []
    for (words, paper, d), p in zip(found, corrected, strict=True):
        if d is None:
            out.append(f"- {words}: not yet run")
            continue
        settled = d.p is not None and p < 1 - CONFIDENCE
        says = "by one seed" if d.p is None else f"p {_p(p)}, {'settled' if settled else 'not settled'}"
        of_paper = ""
        if paper is not None:
            agrees = "leaves it open" if not settled else "agrees" if d.mean * paper > 0 else "disagrees"
            of_paper = f"; the paper has {signed(paper, 1)}, this {agrees}"
        so_far = f" of {planned}" if d.seeds < planned else ""
        seeds = f"{d.seeds}{so_far} seed{'s' * (max(d.seeds, planned * bool(so_far)) > 1)}"
        out.append(f"- {words}: {interval_text(d)} points over {seeds}: {says}{of_paper}")
    return "\n".join(["Main comparisons, p-values corrected by Holm's method, 95 % intervals not:", "", *out])


def further(dataset: str, results: Results) -> str:
    """Other differences, uncorrected; also what dropping the softmax gains less what being dynamic gains."""
    out = []
    tops = {row: results.tops(dataset, row) for pair in FURTHER for row in pair[:2]} | {
        row: results.tops(dataset, row) for row in MAIN
    }
    compared = [(tops[a], tops[b], words) for a, b, words in FURTHER]
    gains = [_less(tops[a], tops[b]) for a, b, *_ in CONTRASTS]
    compared += [
        (gains[0], gains[1], "what being dynamic gains with the softmax, less what it gains without"),
        (gains[2], gains[0], "what dropping the softmax gains, less what being dynamic gains with it"),
    ]
    for a, b, words in compared:
        if d := paired(a, b):
            p = "by one seed" if d.p is None else f"p {_p(d.p)}"
            out.append(f"- {words}: {interval_text(d)} points over {d.seeds} seed{'s' * (d.seeds > 1)}: {p}")
    if not out:
        return ""
    return "\n".join(["Further differences, chosen when results had been seen, not corrected:", "", *out])


def _less(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}


def short(results: Results) -> str:
    """The main comparisons in a table, and the other reading of the paper's, for who reads no further; or nothing yet."""
    lines = []
    seen = (*FURTHER[0][:2], f"{FURTHER[0][2]} (chosen when results had been seen)", CONTRASTS[0][3])
    for a, b, words, paper in (*CONTRASTS, seen):
        found = [paired(results.tops(dataset, a), results.tops(dataset, b)) for dataset in DATASETS]
        cells = [NOT_RUN if d is None else f"{interval_text(d)}, {d.seeds} seed{'s' * (d.seeds > 1)}" for d in found]
        lines.append((words, *cells, NOTHING if paper is None else signed(paper, 1)))
    if all(cell == NOT_RUN for _, *cells, _ in lines for cell in cells):
        return ""
    head = (
        "points of top-1",
        *(dataset.title.partition(",")[0] for dataset in DATASETS.values()),
        "published, ImageNet",
    )
    return markdown(head, lines)


def ranking(results: Results) -> str:
    """Table 5 in a sentence, best first; empty until a peer was run."""
    found = {line.row: line for line in lines_of(5, "cifar10", results) if line.tops}
    told = in_order({line.label: line.tops for line in found.values()})
    if not told or not found.keys() & {*PEERS}:
        return ""
    epochs = config_of(Run("cifar10", BASE, 0), "").epochs
    over = common(line.tops for line in found.values())
    data = f"trained alike for {epochs} epochs, top-1 on CIFAR-10 over {over}"
    return f"Against networks of its size, {data}: {told}."


def blocks(results: Results) -> tuple[dict[str, str], dict[str, Picture]]:
    """The generated parts of the page by their marks, and the pictures that they show by file name."""
    done, all_of_it = share_of(results, runs())
    state = (
        "All runs are done." if done == all_of_it else f"{done} of {all_of_it} runs are done; what is missing says so."
    )
    head = "\n\n".join(filter(None, (short(results), ranking(results), state)))
    text, pictures = {"state": head, "plan": plan(results)}, {}
    for number in TABLES:
        parts = []
        for dataset in ("cifar10", "imagenette") if number == 1 else ("cifar10",):
            lines = lines_of(number, dataset, results)
            done, all_of_it = share_of(results, [run for run in runs(number) if run.dataset == dataset])
            parts.append(f"{DATASETS[dataset].title}; runs done: {done} of {all_of_it}.")
            if done:
                parts.append(table_text(dataset, lines, results))
                parts.append(timed(dataset, results) if number == 1 else "")
            if any(line.difference for line in lines):
                name = f"evidence-{number}{'-imagenette' if dataset != 'cifar10' else ''}.png"
                pictures[name] = _drawn(number, dataset, lines)
                parts.append(f"![{pictures[name].caption}](images/{name})")
            parts += [contrasts(dataset, results), further(dataset, results)] if number == 1 else []
            parts.append(sentence(lines))
        text[str(number)] = "\n\n".join(part for part in parts if part)
    text[str(BEYOND)], more = beyond.block(results)
    return text, pictures | more


def summary(results: Results) -> str:
    """The tables of any results, of other pictures and other training too, and what they say, without pictures."""
    text, _ = blocks(results)
    del text["plan"]  # of the page's runs
    return "\n\n".join(part for one in text.values() for part in one.split("\n\n") if not part.startswith("!["))


def _drawn(number: int, dataset: str, lines: Sequence[Line]) -> Picture:
    bars = [Bar(v.label, tuple(v.tops.values()), v.difference, v.paper) for v in lines]
    return comparison(f"{TABLES[number].title}, {DATASETS[dataset].title.partition(',')[0]}", bars)


def write_page(docs: Path, results: Results) -> list[Path]:
    """Write the generated parts of DOCS/evidence.md, and its pictures into DOCS/images.

    Returns:
        What was written.

    Raises:
        UserError: results of another protocol, no such page, or one without a place for a part.
    """
    results.check({run: protocol(run, config_of(run, "")) for run in runs()})  # the page's words are about these
    path = docs / "evidence.md"
    try:
        page = path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"there is no {path}: --pages takes the folder of the page, docs.") from None
    text, pictures = blocks(results)
    for mark, part in text.items():
        start, found, rest = page.partition(f"<!-- study: {mark} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not found or not end:
            raise UserError(
                f"{path} has no place for the study's part {mark}: `<!-- study: {mark} -->` to `<!-- end -->`."
            )
        page = f"{start}{found}{part}\n{end}{after}"
    written = write_pictures(docs / "images", pictures)
    write_text(path, page)
    return [path, *written]
