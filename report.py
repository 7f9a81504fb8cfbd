"""Is a run on track? Compares its losses with those of a reference run, also while it is still training.

    python report.py runs/<run>                                     # with the reference of the nearest configuration
    python report.py runs/<run> --reference default --plot compare.png
    python report.py runs/<run> --save default                      # makes a finished run a reference
    python report.py --html report.html                             # a page of all runs in runs/, or of those named

The losses are averaged over windows of equal numbers of images seen. The band is the reference's +- 5 % and 2.5
standard errors, narrower for a run of the same seed and batches. A run is off track when it leaves the band on the same
side in three consecutive windows, or when a loss at its end is outside. The exit code is 0 (on track), 1 (off track) or
2 (nothing to compare).
"""

import argparse
import datetime
import sys
from pathlib import Path

from modeling.comparison.bands import compare
from modeling.comparison.curves import read_run
from modeling.comparison.references import choose_reference, command_of, load_references, make_reference, save_reference
from modeling.comparison.report import describe, judge, plot
from modeling.system.errors import errors_in_one_line
from modeling.system.files import check_writable, naming
from modeling.system.reading import read_yaml

ROOT = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="run", help="a run's folder, such as outputs or runs/RUN")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page of runs; default: all in runs/")
    parser.add_argument("--reference", metavar="NAME", help="default: the one that differs in the fewest keys")
    parser.add_argument("--save", metavar="NAME", help="make this finished run a reference")
    parser.add_argument("--command", help="the command that --save records for the run; default: from its config.yaml")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both")
    parser.add_argument("--references", type=Path, default=ROOT / "references", help="folder with the references")
    options = parser.parse_args()
    if options.html and (options.reference or options.plot or options.save):
        parser.error("--html is a page of its own: leave out --reference, --plot and --save")
    if not options.html and len(options.runs) != 1:
        parser.error("expected one run to compare, or --html FILE.html")
    if options.html and options.html.suffix != ".html":
        parser.error(f"--html {options.html}: expected a name that ends with .html")
    if options.save and (options.reference or options.plot):
        parser.error("--save compares nothing: leave out --reference and --plot")
    if options.command and not options.save:
        parser.error("--command belongs to --save")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot}: expected a name that ends with .png")
    with errors_in_one_line(exit_code=2):
        if options.html:
            from modeling.comparison.page import write_page  # imports the library of charts, which takes a second

            folders = options.runs or sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
            write_page(folders, options.html)
            print(options.html)
            return 0
        if options.plot:
            check_writable(options.plot)
        run = read_run(options.runs[0])
        if options.save:
            command = options.command or command_of(run.config, read_yaml(ROOT / "params.yaml", dict))
            reference = make_reference(run, options.save, command, datetime.date.today().isoformat())
            print(f"{save_reference(reference, options.references)}: {command}")
            return 0
        references = load_references(options.references)
        comparison = compare(run, *choose_reference(references, run.config, options.reference))
        print(describe(comparison))
        if options.plot:
            with naming(options.plot):
                plot(comparison, options.plot)
            print(f"\n{options.plot}")
        is_on_track, verdict = judge(comparison)
        print(f"\n{verdict}")
        return 0 if is_on_track else 1


if __name__ == "__main__":
    sys.exit(main())
