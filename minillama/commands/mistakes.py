"""Shows what the checker knows of an exercise: each mistake with its sentence, as a diff against the right answer."""

import textwrap

from ..course.exercises import Question, exercise, exercises


def add_arguments(parser):
    parser.add_argument("name", nargs="?", help="an exercise, such as lora_linear (none: all of them, with numbers)")


def run(args):
    if args.name is None:
        for name, asked in exercises().items():
            known = asked.wrong if isinstance(asked, Question) else asked.mistakes
            print(f"{name:28} {len(known):3} {'foreseen answers' if isinstance(asked, Question) else 'mistakes'}")
        return
    asked = exercise(args.name)
    if isinstance(asked, Question):
        print(f"{args.name}: a prediction")
        for answer, sentence in asked.wrong.items():
            print(f"\n{sorted(answer) if isinstance(answer, frozenset) else answer}\n  {sentence}")
        return
    print(f"{args.name}: {asked.call}")
    for mistake in asked.mistakes:
        print(f"\n{mistake.name}")
        print(textwrap.fill(mistake.sentence, 100, initial_indent="  ", subsequent_indent="  "))
        print(*(f"    {line}" for line in mistake.diff()), sep="\n")
