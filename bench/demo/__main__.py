"""Small students learn scikit-learn's digits: from eight teachers of mixed quality, by every method, by the pixel.

python -m mtkd_fast.bench.demo [--quick] [--out FOLDER]    writes FOLDER/{demo,methods,segmentation}.json and two .png
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from . import page
from .methods import page as methods_page
from .segmentation import page as segmentation_page

PAGES = (page, methods_page, segmentation_page)
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mtkd_fast.bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="everything, but too little of it to conclude from")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the .json and .png files")
    options = parser.parse_args(arguments)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"the demo needs {', '.join(missing)}: pip install --no-build-isolation 'mtkd_fast[demo]'")
    failures = [failure for each in PAGES for failure in shown(each, options.quick, options.out)]
    for failure in failures:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failures else 0


def shown(each, quick: bool, folder: Path) -> list[str]:
    """Runs a page, prints and writes it. Returns what failed."""
    started = time.monotonic()
    found = each.run(quick)
    found["seconds"] = time.monotonic() - started
    print(each.text(found), end="\n\n")
    for path in each.write(found, folder):
        print("wrote", path)
    return found["failures"]


if __name__ == "__main__":
    sys.exit(main())
