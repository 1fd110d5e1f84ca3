"""Marks a folder of students' notebooks: a table of verdicts, and a page with what the class got wrong most."""

from pathlib import Path

from tqdm import tqdm

from ..course import grading
from . import table


def add_arguments(parser):
    parser.add_argument("folder", type=Path, help="with the students' notebooks, a file each, in subfolders or not")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="where grades.csv and grades.html go (grades)")
    parser.add_argument(
        "--seconds", type=float, default=grading.LIMITS["seconds"], help="of computing for one exercise (60)"
    )
    parser.add_argument(
        "--memory", type=float, default=grading.LIMITS["memory"], help="gigabytes for one, beyond torch's own (4)"
    )


def run(args):
    if not grading.apart():
        print("no `unshare` here: the notebooks run without a network namespace, with Python's sockets shut")
    rows = grading.grade(args.folder, args.seconds, args.memory, lambda found, n: tqdm(found, total=n, unit="answer"))
    args.out.mkdir(parents=True, exist_ok=True)
    grading.write_csv(rows, args.out / "grades.csv")
    grading.write_page(rows, args.out / "grades.html")
    hardest = sorted(grading.most_wrong(rows), key=lambda row: row[2] / row[1])
    shown = [(name, f"{passed} of {n}", mistakes[0][0] if mistakes else "") for name, n, passed, mistakes in hardest]
    print(table([("exercise", "right", "most frequent mistake"), *shown], left=(0, 2)))
    print(f"\n  {args.out / 'grades.csv'} · {args.out / 'grades.html'}")
