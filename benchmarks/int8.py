"""What int8 costs and brings: agreement, accuracy and speed of the files that `dynamixer export --int8` tries, in their order.

    python benchmarks/int8.py --run RUN --data imagenette128

Writes benchmarks/results/int8.json and the table in docs/export.md. Calibrated on 300 pictures of the training split, measured on
all of the other; speed is that of one thread of OpenVINO, fp32 and int8 in turn. The model is the one of benchmarks/rollout.py.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dynamixer
from dynamixer.export.check import apart, compare, tensors
from dynamixer.export.formats import need, run_openvino, save_openvino, trace, write_openvino
from dynamixer.export.int8 import IN_FP32, quantise
from dynamixer.export.run import CALIBRATED
from dynamixer.speed.bench import about
from dynamixer.speed.clock import in_turn, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/int8.json"
PAGE = ROOT / "docs/export.md"
EVERY = 10**9
BATCHES, ROUNDS = (1, 16), 60


def measured(run: str, data: str, folder: Path) -> list[dict[str, Any]]:
    checkpoint = dynamixer.load(run)
    preprocessing = checkpoint.preprocessing
    calibration, lot = apart([data], checkpoint, compared=EVERY, calibrated=CALIBRATED)
    pictures = [*tensors(calibration, preprocessing, [1])]
    written = folder / "fp32.xml"
    write_openvino(trace(checkpoint.model, (1, 3, *preprocessing.size), "batch"), written, {})
    openvino = need("openvino", "openvino")
    rows = []
    for in_fp32, names_of in IN_FP32.items():
        path = folder / "int8.xml"
        save_openvino(quantise(openvino.Core().read_model(written), pictures, in_fp32=names_of), path, {})
        found = compare(
            checkpoint.model, run_openvino(path)[0], lot, preprocessing, batches=[50], sizes=[preprocessing.size]
        )
        row = {
            "in_fp32": in_fp32,
            "pictures": found.pictures,
            "share": round(found.share, 2),
            "model_accuracy": round(found.model_accuracy or 0, 2),
            "file_accuracy": round(found.file_accuracy or 0, 2),
            "megabytes": round(path.with_suffix(".bin").stat().st_size / 1e6, 2),
        }
        both = {"fp32": _alone(written), "int8": _alone(path)}
        for batch in BATCHES:
            x = np.concatenate(pictures[:batch])
            taken = in_turn({name: partial(call, x) for name, call in both.items()}, rounds=ROUNDS)
            row[f"times_fp32_at_{batch}"] = [round(times, 2) for times in ratio(taken["fp32"], taken["int8"])]
        rows.append(row)
        print(row)
    return rows


def _alone(path: Path) -> Any:
    """The file in OpenVINO on one thread."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    return need("openvino", "openvino").Core().compile_model(path, "CPU", options)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| in fp32 | same top-1 | accuracy, was | at batch 1 | at batch 16 |", "|---|---|---|---|---|"]
    for row in rows:
        speeds = [f"{row[f'times_fp32_at_{batch}'][1]:.2f}x" for batch in BATCHES]
        accuracy = f"{row['file_accuracy']:.1f} %, {row['model_accuracy']:.1f} %"
        lines.append(f"| {row['in_fp32']} | {row['share']:.1f} % | {accuracy} | {speeds[0]} | {speeds[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True, help="data with a training and another split")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(options.run, options.data, Path(folder))
    machine = about() | {"openvino": need("openvino", "openvino").__version__, "openvino_threads": 1, "seeds": 1}
    RESULTS.write_text(json.dumps({"about": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    start, rest = PAGE.read_text(encoding="utf-8").split("<!-- int8.json -->\n")
    end = rest.split("\n<!-- end -->", 1)[1]
    PAGE.write_text(f"{start}<!-- int8.json -->\n{table(rows)}\n<!-- end -->{end}", encoding="utf-8")


if __name__ == "__main__":
    main()
