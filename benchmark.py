"""How fast training, sampling and the start are: against the loop of the tutorials, diffusers and the machine.

    python prepare_data.py && python benchmark.py       # everything; about 40 minutes on two cores
    python benchmark.py training sampling               # some of the sections; --help lists them
    python benchmark.py --seconds 0.5 --rounds 1        # a quick look

Every contender is a process of its own and all of a table take turns, so that what else the machine does hits them
alike; the numbers are medians over the rounds, with the lowest and the highest. Writes benchmark.json and benchmark.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import describe_machine, to_markdown
from benchmarks.sections import SECTIONS
from benchmarks.start import measure_start
from benchmarks.turns import measure
from modeling.system.errors import errors_in_one_line
from modeling.system.files import check_writable, write_atomically, write_json


def measured_tables(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """The chosen tables, one after the other: title and rows."""
    for name in options.sections or [*SECTIONS, "start"]:
        if name == "start":
            yield "Start", measure_start(options.rounds)
            continue
        for title, cases in SECTIONS[name]():
            if options.only in title:
                yield title, measure(title, cases, options.rounds, options.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"some of {' '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--only", default="", metavar="TEXT", help="of these, the tables whose title contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="without .json and .md")
    options = parser.parse_args()
    if unknown := set(options.sections) - {*SECTIONS, "start"}:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; available: {' '.join(SECTIONS)} start")
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    tables, environment, report = {}, describe_machine(), "nothing was measured"
    with errors_in_one_line():
        check_writable(options.out.with_suffix(".json"))
        check_writable(options.out.with_suffix(".md"))
        for title, rows in measured_tables(options):
            tables[title] = rows
            report = to_markdown(tables, environment)  # after each table: the next one may run out of memory
            write_json(options.out.with_suffix(".json"), {"environment": environment, "tables": tables})
            write_atomically(options.out.with_suffix(".md"), report.encode())
        print(report)


if __name__ == "__main__":
    main()
