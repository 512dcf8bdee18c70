"""What the study costs: by the rates that were measured before it, and what the part that is done took."""

from dynamixer.study.measure import KINDS, SEVERITIES, SIZES, parts_of
from dynamixer.study.results import Results
from dynamixer.study.rows import DATASETS, config_of, pictures_of, runs
from dynamixer.study.words import markdown

NATIVE = 32
FASTER = 2.4  # times as many pictures a second in evaluation as in training, roughly


def plan(results: Results) -> str:
    """What all of it costs by the rates that were measured before, and what the training that was done took."""
    counted, hours = pictures_of(runs()), 0.0
    out: list[list[str]] = []
    took_so_far, done = dict.fromkeys(counted, 0.0), dict.fromkeys(counted, 0)
    for line in results.lines["runs"]:
        part = line["dataset"] if int(line["share"]) == 100 else f"{line['dataset']}, part"
        took_so_far[part] += float(line["hours"]) / 2
        done[part] += 1
    for part, (count, seen, epochs) in counted.items():
        dataset = DATASETS[part.partition(",")[0]]
        took = seen / dataset.rate / 2 / 3600
        hours += took
        title = "the same with 30 % and 10 % of the pictures" if "," in part else dataset.title
        lengths = ", ".join(map(str, sorted(epochs)))
        out.append(
            [title, str(count), lengths, f"{seen:,}", f"{took:.1f}", str(done[part]), f"{took_so_far[part]:.1f}"]
        )
    head = ("what", "runs", "epochs", "training pictures seen", "hours", "runs done", "training so far")
    read = evaluation_hours()
    out.append(["held-out, test, corrupted and rescaled pictures", "", "", "", f"{read:.1f}", "", ""])
    out.append(
        [
            "all",
            str(len(runs())),
            "",
            "",
            f"{hours + read:.1f}",
            str(sum(done.values())),
            f"{sum(took_so_far.values()):.1f}",
        ]
    )
    return markdown(head, out)


def evaluation_hours() -> float:
    """Of two cores, for all pictures that are read without training on them."""
    pictures = 0.0
    for run in runs():
        held, test = (5_000, 10_000) if run.dataset == "cifar10" else (947, 3_925)
        parts = parts_of(run, corrupted=True)
        read: float = config_of(run, "").epochs * held + test
        read += test * sum((size / NATIVE) ** 2 for size in SIZES) if "sizes" in parts else 0
        read += 1_000 * len(KINDS) * len(SEVERITIES) if "corrupted" in parts else 0
        pictures += read / DATASETS[run.dataset].rate
    return pictures / FASTER / 2 / 3600
