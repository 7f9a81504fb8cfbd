"""Looks at runs, also while they are training: a table of all, one beside a reference, two beside each other, a page.

    python report.py                              # every run under runs/: what differs, and what came out
    python report.py --sort held-out              # the least first, or --descending; --csv runs.csv has everything
    python report.py runs/A runs/B                # what differs between two, and by how much their results do
    python report.py runs/A                       # on track? beside the reference of the nearest configuration
    python report.py runs/A --reference default --plot compare.png
    python report.py runs/A --save default        # makes a finished run a reference
    python report.py runs/search                  # the table of the runs in a folder, such as a search's
    python report.py --html report.html           # a page of all runs, or of those named

A run is finished, running, stopped, failed (its numbers were not finite) or damaged. Bits/dim (sigma^2 = beta, x_0
clipped) and the distances FID and FD (Frechet, in the encoder's features) are there if evaluate.py wrote its file into
the run's folder or below evaluation/.

On track: losses are averaged over windows of equal numbers of images seen. The band is the reference's +- 5 % and 2.5
standard errors, narrower for a run of the same seed and batches. A run is off track when it leaves the band on the same
side in three consecutive windows, or when a loss at its end is outside. "linear" is the best linear denoiser's loss on
the same held-out images, a ceiling: a network above it has learned less there than a matrix. "literature" is what
others report for the paper's network and recipe; it was not recorded here and is no part of the verdict.

The exit code is 0 (written; on track), 1 (off track) or 2 (wrong arguments; nothing to show or compare).
"""

import argparse
import datetime
import sys
from pathlib import Path

from modeling.comparison.arguments import read_arguments
from modeling.comparison.bands import compare
from modeling.comparison.curves import read_run
from modeling.comparison.pair import describe_pair
from modeling.comparison.references import choose_reference, command_of, load_references, make_reference, save_reference
from modeling.comparison.report import describe, judge, plot
from modeling.comparison.summaries import RunSummary, in_order_of_settings, read_summaries, read_summary
from modeling.comparison.table import make_table
from modeling.system.errors import errors_in_one_line
from modeling.system.files import check_writable, naming, write_atomically
from modeling.system.reading import read_yaml

ROOT = Path(__file__).parent


def summaries(options: argparse.Namespace) -> tuple[list[RunSummary], list[str]]:
    runs, problems = read_summaries(options.runs)
    return runs if options.are_named else in_order_of_settings(runs), problems


def show_table(options: argparse.Namespace) -> None:
    if options.csv:
        check_writable(options.csv)
    runs, problems = summaries(options)
    table = make_table(runs)
    if options.sort:
        table = table.sorted_by(options.sort, descending=options.descending)
    print("\n".join([table.describe(), *([""] if problems else []), *problems]))
    if options.csv:
        write_atomically(options.csv, table.as_csv().encode())
        print(f"\n{options.csv}")


def save(options: argparse.Namespace) -> None:
    run = read_run(options.runs[0])
    command = options.command or command_of(run.config, read_yaml(ROOT / "params.yaml", dict))
    reference = make_reference(run, options.save, command, datetime.date.today().isoformat())
    print(f"{save_reference(reference, options.references)}: {command}")


def show_beside_reference(options: argparse.Namespace) -> bool:
    """Whether the run is on track."""
    if options.plot:
        check_writable(options.plot)
    run, references = read_run(options.runs[0]), load_references(options.references)
    comparison = compare(run, *choose_reference(references, run.config, options.reference))
    print(describe(comparison))
    if options.plot:
        with naming(options.plot):
            plot(comparison, options.plot)
        print(f"\n{options.plot}")
    is_on_track, verdict = judge(comparison)
    print(f"\n{verdict}")
    return is_on_track


def main() -> int:
    with errors_in_one_line(exit_code=2):
        options = read_arguments(__doc__, ROOT / "references")
        if options.html:
            check_writable(options.html)
            from modeling.comparison.page import write_page  # imports the library of charts, which takes a second

            runs, problems = summaries(options)
            write_page(runs, options.html, options.references)
            print("\n".join([*problems, str(options.html)]))
        elif options.is_table:
            show_table(options)
        elif len(options.runs) == 2:
            print(describe_pair(*(read_summary(folder) for folder in options.runs)))
        elif options.save:
            save(options)
        else:
            return 0 if show_beside_reference(options) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
