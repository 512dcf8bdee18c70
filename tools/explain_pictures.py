"""Make the pictures and the printed text of docs/explain.md anew: a photograph by the weights of dynamixer_tiny that ship.

    python tools/explain_pictures.py imagenette128/val.parquet

Look at them afterwards: the page says in words what is to be seen.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = ROOT / "docs/explain.md", ROOT / "docs/images"
KEPT = {
    "token-03": "explain-token-03.webp",
    "matrices-03": "explain-matrices-03.png",
    "receptive": "explain-receptive.webp",
    "dynamic": "explain-dynamic.png",
    "branches": "explain-branches.png",
    "attribution": "attribution.webp",
}


def main(pictures: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        explain = [sys.executable, "-m", "dynamixer", "explain", "palace.jpg", "--token", "5,8", "--blocks", "0,3"]
        explain += ["--pictures", str(Path(pictures).resolve()), "--out", temporary]
        printed = subprocess.run(explain, cwd=IMAGES, check=True, stdout=subprocess.PIPE, text=True).stdout
        attribution = [
            ROOT / "examples/attribution.py",
            "palace.jpg",
            "dynamixer_tiny",
            Path(temporary) / "attribution.png",
        ]
        subprocess.run([sys.executable, *map(str, attribution)], cwd=IMAGES, check=True)
        for name, kept in KEPT.items():
            with Image.open(Path(temporary) / f"{name}.png") as picture:
                plain = picture.convert("RGB")
                if kept.endswith(".webp"):
                    plain.save(IMAGES / kept, quality=80)
                else:
                    plain.quantize(256).save(IMAGES / kept, optimize=True)
    text = printed[: printed.index("pictures: ")].strip()
    page = PAGE.read_text(encoding="utf-8")
    found, count = re.subn(
        r"(?<=<!-- explain -->\n).*?(?=\n<!-- end -->)", lambda _: f"```\n{text}\n```", page, count=1, flags=re.DOTALL
    )
    assert count == 1, "the page has a place for the text"
    PAGE.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", metavar="D", help="over which the mixing is measured")
    try:
        main(parser.parse_args().pictures)
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)
