"""The command line of `report.py`: its options, and which of them go together."""

import argparse
from pathlib import Path

from modeling.comparison.summaries import find_runs

OF_ONE_RUN, OF_THE_TABLE = ("reference", "save", "command", "plot"), ("sort", "descending", "csv")
SUFFIXES = {"plot": ".png", "csv": ".csv", "html": ".html"}


def read_arguments(description: str | None, references: Path) -> argparse.Namespace:
    """The options of the command line, with `is_table`: whether they ask for the table of runs.

    `runs` are the folders that were named, those in them where one is no run, or all under runs/; `are_named` says
    whether it is the first.

    Args:
        description: for `--help`.
        references: the folder with the references, unless `--references` names another one.

    Raises:
        UserError: where there is no run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="run", help="a run's folder, such as outputs, or one of runs"
    )
    parser.add_argument("--sort", metavar="KEY", help="order the table by a column: a title, or a name in the CSV file")
    parser.add_argument("--descending", action="store_true", help="with --sort: the greatest first")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the table, with all columns")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page of runs; default: all in runs/")
    parser.add_argument("--reference", metavar="NAME", help="default: the one that differs in the fewest keys")
    parser.add_argument("--save", metavar="NAME", help="make this finished run a reference")
    parser.add_argument("--command", help="the command that --save records for the run; default: from its config.yaml")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw run and reference")
    parser.add_argument("--references", type=Path, default=references, help="folder with the references")
    options = parser.parse_args()
    of_one, of_table = ([key for key in keys if getattr(options, key)] for keys in (OF_ONE_RUN, OF_THE_TABLE))
    if options.html and (of_one or of_table):
        parser.error(f"--html is a page of its own: leave out --{(of_one or of_table)[0]}")
    if of_one and (of_table or len(options.runs) != 1):
        parser.error(f"--{of_one[0]} needs one run, and no option of the table")
    if options.save and (options.reference or options.plot):
        parser.error("--save compares nothing: leave out --reference and --plot")
    if options.command and not options.save:
        parser.error("--command belongs to --save")
    if options.descending and not options.sort:
        parser.error("--descending belongs to --sort")
    for key, suffix in SUFFIXES.items():
        if (path := getattr(options, key)) and path.suffix != suffix:
            parser.error(f"--{key} {path}: expected a name that ends with {suffix}")
    given, options.runs = options.runs, find_runs(options.runs or [Path("runs")])
    options.are_named = options.runs == given
    if of_one and not options.are_named:
        parser.error(f"--{of_one[0]} needs one run: {given[0]} is a folder with runs in it")
    options.is_table = bool(of_table) or not options.are_named or len(given) > 2
    return options
