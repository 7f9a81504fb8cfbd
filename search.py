"""Searches for better values: each trial is a run of main.py, and hopeless ones are stopped early.

    python search.py                                       # what conf/search.yaml says
    python search.py num_trials=40 'overrides="experiment=demo seed=1"' out=runs/search-demo

It needs `pip install -r requirements-sweeps.txt` (Optuna). The same command resumes after a stop or a kill; more
num_trials continue a finished search.
"""

from importlib.util import find_spec

from modeling.config import parse
from modeling.options import SearchConfig
from modeling.system.command_line import script
from modeling.system.errors import UserError
from modeling.system.signals import stopping_on_signals


@script("search", SearchConfig, parse)
def main(options: SearchConfig) -> None:
    if find_spec("optuna") is None:
        raise UserError("search.py: Optuna is not installed, run `pip install -r requirements-sweeps.txt`")
    with stopping_on_signals():
        from modeling.comparison.search import Search

        print(Search(options).run())


if __name__ == "__main__":
    main()
