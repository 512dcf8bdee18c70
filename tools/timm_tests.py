"""Run timm's own model tests on our models: the sdist of the installed timm, with `dynamixer` imported first and added to
its list of modules with intermediate features. TorchScript is left out. Nothing of timm is kept.

    python tools/timm_tests.py [pytest arguments]
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"timm=={version('timm')}"
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "timm",
            "-d",
            folder,
            wanted,
        ]
        subprocess.run(fetch, check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        root = next(p for p in Path(folder).iterdir() if p.is_dir())
        tests = root / "tests/test_models.py"
        text, changed = re.subn(r"(FEAT_INTER_FILTERS = \[)", r"\1 'dynamixer',", tests.read_text(), count=1)
        if not changed:
            raise SystemExit("timm's list of modules with intermediate features has moved: adapt this script.")
        tests.write_text(text)
        selection = ["-k", "dynamixer and not torchscript", "-p", "dynamixer", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "tests/test_models.py", *selection, *sys.argv[1:]]
        return subprocess.run(command, cwd=root, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
