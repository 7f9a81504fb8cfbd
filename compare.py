"""Is a run on track? Compares its losses with those of a reference run, also while it is still training.

    python compare.py runs/<run>                                     # with the reference of the nearest configuration
    python compare.py runs/<run> --reference default --plot compare.png
    python compare.py runs/<run> --save default                      # makes a finished run a reference

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
    parser.add_argument("run", type=Path, help="a run's folder, such as outputs or runs/<name>")
    parser.add_argument("--reference", metavar="NAME", help="default: the one that differs in the fewest keys")
    parser.add_argument("--save", metavar="NAME", help="make this finished run a reference")
    parser.add_argument("--command", help="the command that --save records for the run; default: from its config.yaml")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both")
    parser.add_argument("--references", type=Path, default=ROOT / "references", help="folder with the references")
    options = parser.parse_args()
    if options.save and (options.reference or options.plot):
        parser.error("--save compares nothing: leave out --reference and --plot")
    if options.command and not options.save:
        parser.error("--command belongs to --save")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot}: expected a name that ends with .png")
    with errors_in_one_line(exit_code=2):
        if options.plot:
            check_writable(options.plot)
        run = read_run(options.run)
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
