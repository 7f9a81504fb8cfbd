"""Writes docs/configuration.md, every key of every script, from the schemas and the values in params.yaml and conf/.

python -m tests.configuration_page
"""

import itertools
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from modeling.config import Config
from modeling.options import ConvertConfig, EncoderConfig, EvaluateConfig, SampleConfig, SearchConfig
from modeling.system.manual import Key, keys_of, markdown_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"
SCHEMAS = {  # of the scripts that Hydra configures, with the file in conf/
    "main.py": ("config", Config), "prepare_data.py": ("config", Config), "sample.py": ("sample", SampleConfig),
    "evaluate.py": ("evaluate", EvaluateConfig), "convert.py": ("convert", ConvertConfig),
    "train_encoder.py": ("encoder", EncoderConfig), "search.py": ("search", SearchConfig),
}  # fmt: skip
HEAD = """# Configuration

Every key of every script, as `--help` of the script shows it, with the default of `params.yaml` or of `conf/`. It is
given as `key=value` on the command line ([running.md](running.md#change-values)). The page is written by
`make configuration` from `modeling/sections.py` and `modeling/options.py`.
"""


def keys_by_script() -> dict[str, list[Key]]:
    """The keys of each script with their defaults."""
    found = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for script, (name, schema) in SCHEMAS.items():
            values = OmegaConf.to_container(compose(name), resolve=False)
            assert isinstance(values, dict)
            found[script] = list(keys_of(schema, values))
    return found


def page() -> str:
    """The content of docs/configuration.md."""
    parts = [HEAD]
    for keys, same in itertools.groupby(keys_by_script().items(), key=lambda item: item[1]):
        parts.append(f"## {' and '.join(script for script, _ in same)}\n\n{markdown_table(keys)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
