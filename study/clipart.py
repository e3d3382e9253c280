"""Make a data set of drawings by people, of Open Clip Art Library 0.18: 8,121, public domain, from Debian.

    sudo apt-get install openclipart-png openclipart-svg          # 156 MB; Debian, Ubuntu
    python study/clipart.py                       # writes data/clipart/{train,val}/CLASS/*.png
    python study.py --data data/clipart --out out/clipart

Without root: `apt-get download openclipart-png openclipart-svg`, `dpkg -x FILE.deb clip` for both, and
`python study/clipart.py --source clip/usr/share/openclipart`.

A class is all folders of one name (birds, flags, fruit ...) with at least --least pictures; stars, drawn by
a program, are left out. Attributes are the keywords in the SVG files, those that 1 to 50 % of the train
pictures have: train/attributes.csv. Pictures are put on white squares of 64 pixels, scaled down where they
are larger. Every fifth of a class goes to val. Of two pictures of a class with one name the first is taken.
"""
import argparse
import collections
import csv
import html
import re
from pathlib import Path

from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # one of them has 231 million

def keywords(svg: Path) -> set[str]:
    """Return the keywords in an SVG's metadata (dc:subject), in lower case; none of a missing file."""
    text = svg.read_text(encoding="utf-8", errors="replace") if svg.exists() else ""
    subject = re.search("<dc:subject>(.*?)</dc:subject>", text, re.DOTALL)
    words = re.findall("<rdf:li[^>]*>(.*?)</rdf:li>", subject[1], re.DOTALL) if subject else []
    return {re.sub(r"[\s,]+", " ", html.unescape(word)).strip().lower() for word in words} - {""}


def squared(path: Path, size=64) -> Image.Image:
    """Return a picture on white, padded to a square of size x size pixels."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square.convert("RGB")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, default="/usr/share/openclipart", help="folder of png/, svg/")
    parser.add_argument("--out", type=Path, default="data/clipart", help="folder to write")
    parser.add_argument("--least", type=int, default=50, help="pictures that a class must have")
    args = parser.parse_args(argv)
    if (args.out / "train").exists():
        parser.error(f"--out {args.out} is there already: remove it, or give another")
    classes = collections.defaultdict(dict)
    for path in sorted(args.source.glob("png/**/*.png")):
        classes[path.parent.name].setdefault(path.name, path)
    classes.pop("stars", None)  # 1,378 rings and rays that a program drew, nearly white
    classes = {name: paths for name, paths in classes.items() if len(paths) >= args.least}
    if not classes:
        parser.error(f"--source {args.source}: no png/ of pictures; install openclipart-png, openclipart-svg")
    words = {}
    for name, paths in classes.items():
        for split in ("train", "val"):
            (args.out / split / name).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths.values()):
            split = "val" if number % 5 == 4 else "train"
            squared(path).save(args.out / split / name / path.name)
            if split == "train":
                svg = args.source / "svg" / path.relative_to(args.source / "png").with_suffix(".svg")
                words[f"{name}/{path.name}"] = keywords(svg)
    counts = collections.Counter(word for found in words.values() for word in found)
    kept = sorted(word for word, count in counts.items() if 0.01 <= count / len(words) <= 0.5)
    with open(args.out / "train" / "attributes.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["filename", *kept])
        table.writerows([name, *(int(word in found) for word in kept)] for name, found in words.items())
    print(f"{args.out}: {len(classes)} classes, {len(words)} pictures to train, {len(kept)} attributes")


if __name__ == "__main__":
    main()
